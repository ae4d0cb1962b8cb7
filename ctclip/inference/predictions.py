"""Scans in, table out: NIfTI, .mha and DICOM -> calibrated probabilities, as a DataFrame, a CSV or a results.json.

    from run_task2 import predict
    table = predict("scans", "results/RUN")        # a DataFrame: one row for each scan, one column for each finding

`predict_scans` gives the table with what belongs to it: the scans that could not be read, the heat maps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ctclip.config import SYNTHETIC_NOTE
from ctclip.data.cohort import Volume
from ctclip.data.ct_rate import PREVALENCE
from ctclip.data.geometry import place_volume
from ctclip.evaluation.calibration import Calibration
from ctclip.evaluation.run_folder import newest_run, run_calibration, run_record, run_tuning
from ctclip.fileio import replacing
from ctclip.inference.heat_maps import parse_labels, write_scan_heat_maps
from ctclip.inference.predictor import load_model, predict_volumes
from ctclip.inference.scans import PredictionError, Scan, find_scans
from ctclip_model import ABNORMALITIES, Prompts, saved_config

TRAINED_ON_PHANTOMS = f"Model trained on phantoms. {SYNTHETIC_NOTE}"
FORMS = ("calibrated", "uncalibrated", "mapped")
Transform = Callable[[np.ndarray], np.ndarray]  # the model's probabilities (N, labels) -> the answers


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for some scans, and what became of each scan."""

    table: pd.DataFrame  # (scans that could be read, labels), index VolumeName
    scans: list[Scan]  # all that were found, in order
    failures: list[tuple[str, str]]  # (name, reason) of those that could not be read
    heat_maps: list[Path]  # files that were written: .nii.gz and .png
    description: str  # what the numbers are
    note: str | None  # disclaimer to show with them


def predict(
    scans: str | Path | Sequence[str | Path], checkpoint: str | Path | None = None, **options: Any
) -> pd.DataFrame:
    """The table of `predict_scans`, whose options it takes: probabilities (scans, labels), indexed by VolumeName.

    A scan that cannot be read has no row; `predict_scans` tells which, and why.
    """
    return predict_scans(scans, checkpoint, **options).table


def predict_scans(
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
) -> Predictions:
    """Probabilities of scans; one volume in memory while the next is read.

    Args:
        scans: .nii, .nii.gz or .mha files, DICOM series (a folder, or any file of one), or folders of all these. Voxels
            in HU, spacing and orientation in the header. `find_scans` says what they are called.
        checkpoint: a run's folder (default: the newest under results/), or a CT-CLIP file with a head or a text tower.
        form: "calibrated" (the run's calibration, where it has one), "uncalibrated", or "mapped" (not probabilities:
            rescaled so that the run's tuned thresholds lie at 0.5; the order of scans is kept).
        prompts: findings of your own (`ctclip.inference.prompts.read_prompts`), for a CT-CLIP file with its text tower.
        explain: labels separated by commas, or "all": heat maps of them go to `explain_dir`.
        device: cpu, cuda, cuda:1, ...; default cuda where there is one.
        workers: threads that read ahead.
        on_scan: called with each scan's name and row as soon as there is one.

    Raises:
        UserError, CheckpointError, PromptError, FileNotFoundError: one line each, before anything is computed.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    found = find_scans(scans)
    checkpoint = Path(checkpoint) if checkpoint else newest_run()
    calibration = run_calibration(checkpoint) if checkpoint.is_dir() else None
    if form == "mapped" and calibration is None:
        raise PredictionError(
            f"{checkpoint}: found no tuning patients, expected some to fit the thresholds that --map-thresholds puts "
            "at 0.5; name a run, or leave the flag out"
        )
    model = load_model(checkpoint, device, prompts)
    calibration = calibration if model.labels == ABNORMALITIES else None
    transform, description = _transform(form, calibration)
    note = TRAINED_ON_PHANTOMS if checkpoint.is_dir() and run_record(checkpoint).get("phantom") else None
    labels = [] if explain is None else parse_labels(explain, model.labels)
    shown, _ = _transform("calibrated" if form == "mapped" else form, calibration)
    failures: list[tuple[str, str]] = []
    rows: dict[str, np.ndarray] = {}
    files: list[Path] = []

    def on_answer(index: int, voxels: torch.Tensor, logits: torch.Tensor) -> None:
        scan, probabilities = found[index], logits.sigmoid().numpy()[None]
        if labels:
            placement, target = place_volume(scan.path, model.input_shape), Path(explain_dir, scan.stem)
            answers = shown(probabilities)[0]
            files.extend(
                write_scan_heat_maps(model, voxels, placement, labels, target.parent, target.name, answers, note)
            )
        rows[scan.name] = transform(probabilities)[0]
        if on_scan is not None:
            on_scan(scan.name, rows[scan.name])

    no_labels = np.zeros(len(ABNORMALITIES), np.float32)
    predict_volumes(
        model,
        [Volume(scan.name, scan.path, no_labels) for scan in found],
        workers=workers,
        on_batch=lambda batch: failures.extend(batch.failures),
        on_answer=on_answer,
        resample_on_device=True,
    )
    return Predictions(rows_table(rows, model.labels), found, failures, files, description, note)


def rows_table(rows: Mapping[str, np.ndarray], labels: Sequence[str]) -> pd.DataFrame:
    """{name of a scan: its row} as a table, in that order."""
    values = np.stack(list(rows.values())) if rows else np.zeros((0, len(labels)))
    return pd.DataFrame(values, index=pd.Index(list(rows), name="VolumeName"), columns=list(labels))


def _transform(form: str, calibration: Calibration | None) -> tuple[Transform, str]:
    """What makes the answers of the model's probabilities, and what the answers are."""
    if calibration is None or form == "uncalibrated":
        return (lambda probabilities: probabilities), "uncalibrated probabilities"
    if form == "mapped":
        thresholds = f"tuned thresholds ({calibration.objective})"
        return calibration.rescale_to_half, f"not probabilities: rescaled so that the {thresholds} lie at 0.5"
    description = f"calibrated probabilities ({calibration.method}, {calibration.n_patients} tuning patients)"
    return calibration.apply, description


# ------------------------------------------------------------------ files


def labels_of(checkpoint: Path) -> tuple[str, ...]:
    """What a run, or a model saved with prompts of its own, answers; the 18 findings where its folder does not say."""
    if not (checkpoint / "config.json").is_file():
        return ABNORMALITIES
    return tuple(saved_config(checkpoint).get("labels") or ABNORMALITIES)


def check_output(path: str | Path, labels: Sequence[str] = ABNORMALITIES) -> None:
    """Refuses, before anything is computed, a place or a form that cannot be written."""
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise PredictionError(f"--output {path}: found the ending {path.suffix or 'none'}, expected .csv (a table) or "
                              ".json (the challenge's results.json); rename it")
    if path.suffix == ".json" and tuple(labels) != ABNORMALITIES:
        raise PredictionError(f"--output {path}: found labels of your own, expected the challenge's 18 in a "
                              "results.json; write a .csv")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PredictionError(f"--output {path}: found a place that cannot be written ({folder}), expected a file's "
                              "name in a folder of yours; name another")


def write_predictions(path: str | Path, predictions: Predictions, checkpoint: str | Path) -> None:
    """A CSV of the scans that could be read, or a results.json of all that were found."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ".json":
            content = _results(predictions, prevalence(Path(checkpoint)))
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        else:
            predictions.table.to_csv(temporary)


def _results(predictions: Predictions, substitute: np.ndarray) -> dict[str, Any]:
    """The challenge's results.json: every scan that was found exactly once, in the order found.

    substitute: (18,), the answer for one that could not be read; a scan that is missing makes the evaluation fail.
    """
    table, rows = predictions.table, []
    for scan in predictions.scans:
        values = table.loc[scan.name, list(ABNORMALITIES)] if scan.name in table.index else substitute
        answers = dict(zip(ABNORMALITIES, map(float, values), strict=True))
        rows.append({"input_image_name": scan.stem, "probabilities": answers})
    return {
        "name": "Generated probabilities",
        "type": "Abnormality Classification",
        "version": {"major": 1, "minor": 0},
        "predictions": rows,
    }


def prevalence(checkpoint: Path) -> np.ndarray:
    """(18,) share of positive volumes among a run's tuning patients, who are drawn like its training patients; without
    them, and for a weights file, in CT-RATE's train split."""
    tuning = run_tuning(checkpoint) if checkpoint.is_dir() else None
    return np.array(list(PREVALENCE.values())) if tuning is None else tuning[1].frame.to_numpy().mean(axis=0)
