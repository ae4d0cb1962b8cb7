"""A saved ensemble: a run's folder without weights, whose run.json names other runs, its partners, with the digests of
their weights, and says how their logits become one. Its tables, calibration and thresholds are those of the fused
logits, under a run's names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.config import CALIBRATION_FILE
from ctclip.evaluation.run_folder import (
    BEST_FILES,
    TABLES,
    RunError,
    check_names,
    run_calibration,
    run_record,
    writing,
)
from ctclip.evaluation.tables import VolumeTable, write_table
from ctclip.fileio import check_writable, make_folder, replacing
from ctclip_model import ABNORMALITIES, saved_config, sha256_of

WEIGHTS_FILE = "model.safetensors"
PARTNER_FILES = (WEIGHTS_FILE, "config.json")  # what a partner's answers follow from
AGAIN = "save the ensemble again"
REMEDY = "choose another --save-ensemble"


@dataclass(frozen=True)
class Ensemble:
    """A saved ensemble of K partners. `digests` are {name: SHA-256} of each one's PARTNER_FILES; `weights` (K, L) of
    the `findings`, which sum to 1 over the partners, None where all count alike."""

    folder: Path
    partners: tuple[Path, ...]
    digests: tuple[Mapping[str, str], ...]
    findings: tuple[str, ...]
    weights: np.ndarray | None

    @property
    def names(self) -> str:
        return ", ".join(partner.name for partner in self.partners)

    @property
    def description(self) -> str:
        return f"{'mean' if self.weights is None else 'weighted mean'} of {self.names}"

    def weights_of(self, findings: Sequence[str]) -> np.ndarray | None:
        """`weights` of some of the findings, in this order."""
        return None if self.weights is None else self.weights[:, [self.findings.index(name) for name in findings]]

    def check_partners(self) -> None:
        """Raises RunError for a partner that is absent, or no longer what the ensemble was saved with."""
        for partner, digests in zip(self.partners, self.digests, strict=True):
            for name, digest in digests.items():
                if not (partner / name).is_file():
                    raise RunError(f"{partner}: found no {name}, expected the run that the ensemble {self.folder} "
                                   f"names; copy it to there, or {AGAIN}")
                if sha256_of(partner / name) != digest:
                    raise RunError(f"{partner / name}: found another file than when the ensemble {self.folder} was "
                                   f"saved, expected the same; restore it, or {AGAIN}")


def saved_ensemble(folder: str | Path) -> Ensemble | None:
    """The ensemble in a folder; None where that is an ordinary run's, a file or nothing. Its partners are not looked
    at. Raises RunError for a damaged one."""
    folder = Path(folder)
    record = run_record(folder) if folder.is_dir() else {}
    if "ensemble" not in record:
        return None
    try:
        partners, by_finding = record["ensemble"]["partners"], record["ensemble"]["weights"]
        findings, weights = tuple(record["labels"]), None
        if by_finding is not None:
            weights = np.array([by_finding[name] for name in findings], float).T
            if weights.shape != (len(partners), len(findings)) or not (weights >= 0).all():
                raise ValueError("not a weight for each finding and partner")
            if not np.allclose(weights.sum(axis=0), 1):
                raise ValueError("weights that do not sum to 1")
        if len(partners) < 2:
            raise ValueError("fewer than two partners")
        paths = tuple(Path(os.path.normpath(folder / partner["path"])) for partner in partners)
        digests = tuple({name: str(partner["sha256"][name]) for name in PARTNER_FILES} for partner in partners)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{folder / 'run.json'}: found no readable ensemble ({type(error).__name__}: {error}), expected "
                       f"what --save-ensemble writes; {AGAIN}") from error
    return Ensemble(folder, paths, digests, findings, weights)


def answer_digests(checkpoint: str | Path) -> dict[str, Any]:
    """SHA-256 of everything that a model's answers follow from, for JSON: of a run's files, of a weights file; of an
    ensemble, its partners' files as it was saved with them, and its weights."""
    checkpoint = Path(checkpoint)
    if (ensemble := saved_ensemble(checkpoint)) is not None:
        weights = None if ensemble.weights is None else ensemble.weights.tolist()
        return {"partners": [dict(each) for each in ensemble.digests], "weights": weights}
    if checkpoint.is_dir():
        return file_digests(checkpoint)
    return {WEIGHTS_FILE: sha256_of(checkpoint)}


def file_digests(run: Path) -> dict[str, str]:
    """{name: SHA-256} of a run's PARTNER_FILES."""
    return {name: sha256_of(run / name) for name in PARTNER_FILES}


def labels_of(checkpoint: str | Path) -> tuple[str, ...]:
    """What a run, an ensemble, or a model saved with prompts of its own, answers; the 18 findings where its folder does
    not say."""
    checkpoint = Path(checkpoint)
    if (ensemble := saved_ensemble(checkpoint)) is not None:
        return ensemble.findings
    if not (checkpoint / "config.json").is_file():
        return ABNORMALITIES
    return tuple(saved_config(checkpoint).get("labels") or ABNORMALITIES)


def check_partners(partners: Sequence[str | Path]) -> tuple[str, ...]:
    """The findings that all of these runs answer, in the first one's order. Raises RunError, before any work, where
    they make no ensemble."""
    folders = [Path(partner) for partner in partners]
    if len(folders) < 2:
        raise RunError(f"found {len(folders)} run, expected at least two for an ensemble; name more")
    for place, folder in enumerate(folders):
        if saved_ensemble(folder) is not None:
            raise RunError(f"{folder}: found an ensemble, expected a run; name its partners instead")
        if missing := [name for name in PARTNER_FILES if not (folder / name).is_file()]:
            raise RunError(f"{folder}: found no {missing[0]}, expected a run with a finished epoch; check its name, or "
                           "let its training go on")
        if folder.resolve() in [other.resolve() for other in folders[:place]]:
            raise RunError(f"{folder}: found this run twice, expected different ones; name it once")
    findings = labels_of(folders[0])
    if others := [folder for folder in folders if set(labels_of(folder)) != set(findings)]:
        raise RunError(f"{others[0]}: found other findings than {folders[0]} has, expected the same; train both on the "
                       "same --findings")
    return findings


def check_ensemble_folder(folder: str | Path) -> None:
    """Raises RunError or UserError, before any work, where no ensemble can be saved to a folder."""
    folder = Path(folder)
    if (folder / "run.json").is_file():
        raise RunError(f"{folder}: found a run, expected no such folder; {REMEDY}")
    check_writable(folder, REMEDY)
    check_names(folder, "run.json", *TABLES, *BEST_FILES)


def save_ensemble(
    folder: str | Path, partners: Sequence[str | Path], weights: Mapping[str, Sequence[float]] | None = None,
    tuning: tuple[VolumeTable, VolumeTable] | None = None, reported: tuple[VolumeTable, VolumeTable] | None = None,
) -> Ensemble:
    """Writes a folder that can be named wherever a run's can, and returns what it holds.

    Args:
        folder: no run's; made where it is not there. An evaluation's of the same predictions keeps its files.
        partners: run folders with the same findings. They stay where they are, and are read at every prediction.
        weights: {finding: K weights that sum to 1}, as `fit_weights` gives them transposed; None: all count alike.
        tuning: fused (predictions, labels) of patients whom no partner was trained on. What is calibrated and
            thresholded later is fitted on them (`run_calibration`). None: there are none.
        reported: fused (predictions, labels) of the unseen split, if it has been predicted already.

    Raises RunError for partners that make no ensemble, and for a folder that is a run's or holds the user's files.
    """
    folder = Path(folder)
    check_ensemble_folder(folder)
    findings, records = check_partners(partners), [run_record(Path(partner)) for partner in partners]
    content = _record(records, findings) | {
        "ensemble": {
            "method": "mean" if weights is None else "stacked",
            "partners": [_partner(folder, Path(partner)) for partner in partners],
            "weights": None if weights is None else {name: list(weights[name]) for name in findings},
        }
    }
    for table in (*(tuning or ()), *(reported or ())):
        table.select(findings)  # raises where it lacks one
    make_folder(folder, REMEDY)
    for prefix, tables in (("tuning_", tuning), ("", reported)):
        if tables is not None:
            with writing(folder, *(prefix + name for name in TABLES)):
                _write_tables(folder, prefix, *tables, findings)
    return _write_record(folder, content)  # last: without it this is no run


def copy_ensemble(ensemble: Ensemble, folder: str | Path) -> Ensemble:
    """The ensemble with copies of its partners' weights in one folder, partner_1 and so on, and with its calibration,
    without tables, names of patients or paths: for a container, or another machine. Raises RunError where a partner is
    missing or changed, and where the folder holds anything."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(f"{folder}: found something there, expected no such folder, or an empty one; name another")
    ensemble.check_partners()
    record, calibration = run_record(ensemble.folder), run_calibration(ensemble.folder)
    places = [f"partner_{k}" for k in range(1, 1 + len(ensemble.partners))]
    for partner, place in zip(ensemble.partners, places, strict=True):
        make_folder(folder / place, "name another folder")
        for name in PARTNER_FILES:
            with replacing(folder / place / name) as path:
                shutil.copyfile(partner / name, path)
    if calibration is not None:
        calibration.save(folder / CALIBRATION_FILE)
    kept = {key: record[key] for key in ("status", "phantom", "phantom_encoder", "labels")}
    partners = [{"path": place, "sha256": each} for place, each in zip(places, ensemble.digests, strict=True)]
    return _write_record(folder, kept | {"config": {}, "ensemble": record["ensemble"] | {"partners": partners}})


def _write_record(folder: Path, content: Mapping[str, Any]) -> Ensemble:
    with writing(folder, "run.json"), replacing(folder / "run.json") as path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    ensemble = saved_ensemble(folder)
    assert ensemble is not None
    return ensemble


def _partner(folder: Path, partner: Path) -> dict[str, Any]:
    """Its path, as seen from the ensemble's folder where both lie below a common one."""
    here, there = folder.resolve(), partner.resolve()
    near = here.anchor == there.anchor and Path(os.path.commonpath([here, there])) != Path(here.anchor)
    path = Path(os.path.relpath(there, here)) if near else there
    return {"path": path.as_posix(), "sha256": file_digests(partner)}


def _record(records: Sequence[Mapping[str, Any]], findings: Sequence[str]) -> dict[str, Any]:
    """A run's record: what the partners' have in common."""
    configs = [record.get("config", {}) for record in records]
    common = {key: records[0][key] for key in ("data_dir", "working_folder", "versions")
              if all(key in record and record[key] == records[0].get(key) for record in records)}
    return {
        "status": "finished",
        "config": {key: value for key, value in configs[0].items()
                   if all(key in config and config[key] == value for config in configs)},
        "phantom": any(bool(record.get("phantom")) for record in records),
        "phantom_encoder": any(bool(record.get("phantom_encoder")) for record in records),
        "labels": list(findings),
        **common,
    }  # fmt: skip


def _write_tables(
    folder: Path, prefix: str, predictions: VolumeTable, labels: VolumeTable, findings: Sequence[str]
) -> None:
    columns = list(findings)
    for name, table, values in (("predictions", predictions, predictions.frame[columns].to_numpy()),
                                ("labels", labels, labels.frame[columns].to_numpy().astype(int))):
        write_table(folder / f"{prefix}{name}.csv", table.frame.index, values, table.ids, findings)
