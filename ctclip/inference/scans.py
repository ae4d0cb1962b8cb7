"""Scans in, table out: NIfTI, .mha and DICOM -> calibrated probabilities, as a DataFrame, a CSV or a results.json.

    from ctclip.inference.scans import predict
    table = predict("scans", "results/RUN")        # a DataFrame: one row for each scan, one column for each finding
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.config import SYNTHETIC_NOTE
from ctclip.data.dicom import SERIES_PREFIX, is_dicom, series_of
from ctclip.data.readers import FILE_SUFFIXES
from ctclip.data.volume_file import VolumeError
from ctclip.evaluation.metrics import EvaluationError
from ctclip.evaluation.run_folder import newest_run, run_calibration, run_record, run_tuning
from ctclip.fileio import replacing
from ctclip.inference.predictor import load_model, predict_volumes
from ctclip_model import ABNORMALITIES

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from ctclip.evaluation.calibration import Calibration
    from ctclip_model import CTCLIPMultiAbnormalityModel, Prompts

TRAINED_ON_PHANTOMS = f"Model trained on phantoms. {SYNTHETIC_NOTE}"
FORMS = ("calibrated", "uncalibrated", "mapped")
Answer = Callable[[np.ndarray], np.ndarray]
RESULTS_VERSION = {"major": 1, "minor": 0}  # of the challenge's file


@dataclass(frozen=True)
class Scan:
    """An input: its name, and its file or one file of its DICOM series."""

    name: str
    path: Path

    @property
    def short(self) -> str:
        """The name without folders; a series that shares its folder with others keeps that one."""
        parts = self.name.split("/")
        return "/".join(parts[-2:] if parts[-1].startswith(SERIES_PREFIX) else parts[-1:])

    @property
    def stem(self) -> str:
        """The name without its suffix: what the challenge calls a scan."""
        suffix = max((s for s in FILE_SUFFIXES if self.name.lower().endswith(s)), key=len, default="")
        return self.name[: len(self.name) - len(suffix)]


def find_scans(sources: str | Path | Sequence[str | Path]) -> list[Scan]:
    """The scans that files and folders hold, folders with all below them, in the order of their names.

    .nii, .nii.gz and .mha files, and the DICOM series of each folder; hidden files are left alone. No scan is opened,
    so that one that cannot be read is found as well. A scan is called as its file or, for DICOM, its folder; where two
    would be called alike, all are called by their paths below the folder that was given.

    Raises EvaluationError where there is none, or two of one name all the same.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    scans = [scan for source in sources for scan in _scans_of(Path(source))]
    if not scans:
        where = ", ".join(map(str, sources)) or "an empty list"
        raise EvaluationError(f"{where}: found no .nii, .nii.gz or .mha file and no DICOM series, expected a scan or a "
                              "folder of scans")
    short = [replace(scan, name=scan.short) for scan in scans]
    if len({scan.stem for scan in short}) == len(short):
        return short
    paths: dict[str, Path] = {}
    for scan in scans:
        if scan.stem in paths:
            both = f"{paths[scan.stem]} and {scan.path}"
            raise EvaluationError(f"{both}: found two scans that are both called {scan.stem}, expected each name once; "
                                  "rename one, or keep them in folders of their own")
        paths[scan.stem] = scan.path
    return scans


def _scans_of(source: Path) -> Iterator[Scan]:
    if not source.exists():
        raise EvaluationError(f"{source}: found no such file or folder, expected a scan or a folder of scans; check "
                              "the path")
    if source.is_file() and (source.name.lower().endswith(FILE_SUFFIXES) or is_dicom(source)):
        yield Scan(printable(source.name), source)
        return

    def refuse(error: OSError) -> None:
        raise EvaluationError(f"{error.filename}: found a folder that cannot be listed ({error.strerror}), expected "
                              "one to look for scans in; check its permissions") from error

    seen: set[str] = set()
    for folder, below, files in os.walk(source, onerror=refuse, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:  # links may lead round in circles
            below.clear()
            continue
        seen.add(real)
        others = []
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(folder, name)
            if name.lower().endswith(FILE_SUFFIXES):
                yield Scan(printable(path.relative_to(source).as_posix()), path)
            else:
                others.append(path)
        if any(is_dicom(path) for path in others):
            yield from _series_in(Path(folder), source)


def _series_in(folder: Path, source: Path) -> Iterator[Scan]:
    above = folder.relative_to(source).parent.as_posix()
    try:
        found = series_of(folder)
    except VolumeError:  # no SimpleITK, or a damaged header
        found = {}
    for name, path in (found or {folder.resolve().name: folder}).items():  # a scan that reading will say more of
        yield Scan(printable(name if above == "." else f"{above}/{name}"), path)


def printable(name: str) -> str:
    """A name for tables and lines of text: what is no UTF-8 and what ends a line is spelled out."""
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)


def predict(
    scans: str | Path | Sequence[str | Path],
    checkpoint: str | Path | None = None,
    *,
    form: str = "calibrated",
    prompts: Prompts | None = None,
    explain: str | None = None,
    explain_dir: str | Path = "results/explain",
    device: str | None = None,
    workers: int | None = None,
    on_scan: Callable[[str, np.ndarray], None] | None = None,
) -> pd.DataFrame:
    """Probabilities of scans, (scans, labels), indexed by VolumeName; one volume in memory while the next is read.

    Args:
        scans: .nii, .nii.gz or .mha files, DICOM series (a folder, or any file of one), or folders of all these. Voxels
            in HU, spacing and orientation in the header. `find_scans` says what they are called.
        checkpoint: a run's folder (default: the newest under results/), or a CT-CLIP file with a head or a text tower.
        form: "calibrated" (the run's calibration, where it has one), "uncalibrated" (as the model gives them) or
            "mapped" (no probabilities any more: the run's tuned cuts lie on 0.5, the order of scans is kept).
        prompts: findings of your own (`ctclip.inference.prompts.read_prompts`), for a CT-CLIP file with its text tower.
        explain: labels separated by commas, or "all": heat maps of them go to `explain_dir`.
        device: cpu, cuda, cuda:1, ...; default cuda where there is one.
        workers: threads that read ahead.
        on_scan: called with each scan's name and row as soon as there is one.

    Returns:
        The table. `attrs["failures"]` lists what could not be read, as (name, reason), and has no row; `attrs["scans"]`
        every scan that was found; `attrs["how"]` says what the numbers are, `attrs["note"]` is their
        disclaimer; `attrs["files"]` are the heat maps.

    Raises:
        EvaluationError, CheckpointError, FileNotFoundError: one line each, before anything is computed.
    """
    from ctclip.data.cohort import Volume

    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    found = find_scans(scans)
    checkpoint = Path(checkpoint) if checkpoint else newest_run()
    calibration = run_calibration(checkpoint) if checkpoint.is_dir() else None
    if form == "mapped" and calibration is None:
        raise EvaluationError(f"{checkpoint}: found no tuning patients, expected some to fit the thresholds that "
                              "--map-thresholds puts on 0.5; name a run, or leave the flag out")
    model = load_model(checkpoint, device, prompts)
    calibration = calibration if model.labels == ABNORMALITIES else None
    final, how = _form(form, calibration)
    blank = np.zeros(len(ABNORMALITIES), np.float32)
    volumes = [Volume(scan.name, scan.path, blank) for scan in found]
    failures: list[tuple[str, str]] = []
    note = TRAINED_ON_PHANTOMS if checkpoint.is_dir() and run_record(checkpoint).get("phantom") else None
    shown, _ = _form("calibrated" if form == "mapped" else form, calibration)
    pictures = None if explain is None else _Pictures(model, found, explain, Path(explain_dir), shown, note)

    rows: dict[str, np.ndarray] = {}

    def on_answer(index: int, voxels: torch.Tensor, logits: torch.Tensor) -> None:
        probabilities = logits.sigmoid().numpy()[None]
        if pictures is not None:
            pictures.add(index, voxels, probabilities)
        name = found[index].name
        rows[name] = final(probabilities)[0]
        if on_scan is not None:
            on_scan(name, rows[name])

    predict_volumes(
        model,
        volumes,
        workers=workers,
        on_batch=lambda batch: failures.extend(batch.failures),
        on_answer=on_answer,
        resample_there=True,
    )
    table = rows_table(rows, model.labels)
    files = pictures.files if pictures else []
    table.attrs = {"failures": failures, "scans": found, "how": how, "note": note, "files": files}
    return table


def rows_table(rows: Mapping[str, np.ndarray], labels: Sequence[str]) -> pd.DataFrame:
    """{name of a scan: its row} as a table, in that order."""
    import pandas as pd

    values = np.stack(list(rows.values())) if rows else np.zeros((0, len(labels)))
    return pd.DataFrame(values, index=pd.Index(list(rows), name="VolumeName"), columns=list(labels))


def _form(form: str, calibration: Calibration | None) -> tuple[Answer, str]:
    """(the model's probabilities (N, labels) -> the answers, what they are)."""
    if form == "mapped":
        return calibration.rescale_to_half, f"no probabilities any more: tuned cuts ({calibration.objective}) on 0.5"
    if form == "uncalibrated" or calibration is None:
        return (lambda probabilities: probabilities), "probabilities as the model gives them, not calibrated"
    how = f"calibrated probabilities ({calibration.method}, {calibration.n_patients} tuning patients)"
    return calibration.apply, how


class _Pictures:
    """Heat maps of every scan that is read."""

    def __init__(
        self,
        model: CTCLIPMultiAbnormalityModel,
        scans: Sequence[Scan],
        labels: str,
        folder: Path,
        probability: Answer,
        note: str | None,
    ):
        from ctclip.inference.heat_maps import parse_labels

        self.model, self.scans, self.folder, self.probability, self.note = model, scans, folder, probability, note
        self.labels = parse_labels(labels, model.labels)
        self.files: list[Path] = []

    def add(self, index: int, voxels: torch.Tensor, probabilities: np.ndarray) -> None:
        from ctclip.data.geometry import place_volume
        from ctclip.inference.heat_maps import explain_scan

        scan = self.scans[index]
        answers = self.probability(probabilities)[0]
        placement = place_volume(scan.path, self.model.input_shape)
        folder, name = self.folder / Path(scan.stem).parent, Path(scan.stem).name
        self.files += explain_scan(self.model, voxels, placement, self.labels, folder, name, answers, self.note)


# ------------------------------------------------------------------ files


def labels_of(checkpoint: Path) -> tuple[str, ...]:
    """What a run, or a model saved with prompts of its own, answers; the 18 findings where its folder does not say."""
    path = checkpoint / "config.json"
    try:
        return tuple(json.loads(path.read_text(encoding="utf-8"))["labels"]) if path.is_file() else ABNORMALITIES
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: found no labels ({error}), expected a saved model's; save it again") from error


def check_output(path: str | Path, labels: Sequence[str] = ABNORMALITIES) -> None:
    """Refuses, before anything is computed, a place or a form that cannot be written."""
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise EvaluationError(f"--output {path}: found the ending {path.suffix or 'none'}, expected .csv (a table) or "
                              ".json (the challenge's results.json); rename it")
    if path.suffix == ".json" and tuple(labels) != ABNORMALITIES:
        raise EvaluationError(f"--output {path}: found labels of your own, expected the challenge's 18 in a "
                              "results.json; write a .csv")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EvaluationError(f"--output {path}: found a place that cannot be written ({folder}), expected a file's "
                              "name in a folder of yours; name another")


def write_predictions(path: str | Path, table: pd.DataFrame, checkpoint: str | Path) -> None:
    """The table of `predict` as a CSV of the scans that were read, or as a results.json of all that were found."""
    path = Path(path)
    if path.suffix == ".json":
        write_results(path, table, prevalence(Path(checkpoint)))
        return
    write_csv(path, table)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        table.to_csv(temporary)


def write_results(path: Path, table: pd.DataFrame, instead: np.ndarray) -> None:
    """The challenge's results.json: every scan that was found exactly once, in the order found.

    `instead` (18,) is the answer for one that could not be read: a scan that is missing makes the evaluation fail.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    predictions = []
    for scan in table.attrs["scans"]:
        values = table.loc[scan.name].to_numpy() if scan.name in table.index else instead
        answers = dict(zip(ABNORMALITIES, map(float, values), strict=True))
        predictions.append({"input_image_name": scan.stem, "probabilities": answers})
    content = {
        "name": "Generated probabilities",
        "type": "Abnormality Classification",
        "version": RESULTS_VERSION,
        "predictions": predictions,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def prevalence(checkpoint: Path) -> np.ndarray:
    """(18,) share of positive volumes among a run's tuning patients, who are drawn like its training patients; without
    them, and for a weights file, in CT-RATE's train split."""
    from ctclip.data.ct_rate import PREVALENCE

    tuning = run_tuning(checkpoint) if checkpoint.is_dir() else None
    return np.array(list(PREVALENCE.values())) if tuning is None else tuning[1].to_numpy().mean(axis=0)
