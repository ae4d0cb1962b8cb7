"""The files of an evaluation: metrics.json, tables, calibration.json, report.html and the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.config import CALIBRATION_FILE
from ctclip.evaluation.calibration import Calibration
from ctclip.evaluation.cases import Case
from ctclip.evaluation.figures import write_figures
from ctclip.evaluation.metrics import EvaluationError
from ctclip.evaluation.render import write_page
from ctclip.evaluation.report import figure_captions
from ctclip.evaluation.results import TUNING, Evaluation
from ctclip.evaluation.run_folder import APPLIED_FILES, PAGE
from ctclip.evaluation.tables import load_predictions, write_table
from ctclip.fileio import make_folder, replacing
from ctclip_model import ABNORMALITIES


def write_results(output_dir: str | Path, evaluation: Evaluation, cases: Sequence[Case]) -> None:
    """RESULT_FILES, predictions.csv and the figures; each file is replaced whole or not at all."""
    folder = make_folder(output_dir, "change --output-dir")
    _write_tables(folder, evaluation)
    inputs, metrics = evaluation.inputs, evaluation.metrics
    arrays = evaluation.rows.labels, evaluation.rows.probabilities, evaluation.fitted.calibrated
    write_figures(folder, metrics, *arrays, figure_captions(metrics), inputs.history)
    write_page(folder / PAGE, metrics, *arrays, inputs.history, inputs.record, cases)


def write_calibrated(
    folder: Path, calibration: Calibration, names: Sequence[str] | np.ndarray, probabilities: np.ndarray
) -> None:
    """APPLIED_FILES: the probabilities calibrated, and rescaled so that 0.5 decides as the tuned thresholds do."""
    calibrated, rescaled = APPLIED_FILES
    write_table(folder / calibrated, names, calibration.apply(probabilities))
    write_table(folder / rescaled, names, calibration.rescale_to_half(probabilities))


def _write_tables(folder: Path, evaluation: Evaluation) -> None:
    metrics, rows, fitted = evaluation.metrics, evaluation.rows, evaluation.fitted
    with replacing(folder / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    own, given = folder / "predictions.csv", evaluation.inputs.predictions.frame[list(ABNORMALITIES)]
    if not _holds(own, given):  # a run's own file stays as it was written, with its other columns
        with replacing(own) as path:
            given.to_csv(path)
    with replacing(folder / "per_label.csv") as path:
        _per_label_frame(metrics).to_csv(path)
    fitted.calibration.save(folder / CALIBRATION_FILE)
    for name in APPLIED_FILES:
        (folder / name).unlink(missing_ok=True)
    if fitted.fitted_on == TUNING:  # cross-fitted columns are made of five maps: no file that anyone could compare
        write_calibrated(folder, fitted.calibration, rows.names, rows.probabilities)


def _holds(path: Path, predictions: pd.DataFrame) -> bool:
    try:
        return path.is_file() and load_predictions(path).equals(predictions)
    except EvaluationError:
        return False


def _per_label_frame(metrics: dict) -> pd.DataFrame:
    rows = {}
    for name, row in metrics["per_label"].items():
        bounds = metrics["intervals"]["per_label"][name]["auroc"] or (None, None)
        rows[name] = {key: value for key, value in row.items() if key != "at_0.5"}
        rows[name] |= {"auroc_low": bounds[0], "auroc_high": bounds[1]}
        rows[name] |= {f"{key}_at_0.5": value for key, value in row["at_0.5"].items()}
        rows[name] |= metrics["calibration"]["per_label"][name]
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index.name = "label"
    return frame
