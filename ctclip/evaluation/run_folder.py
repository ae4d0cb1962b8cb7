"""A run's folder: which run is the newest, what its files hold, and which files an evaluation leaves there."""

from __future__ import annotations

import json
from pathlib import Path

from ctclip.config import CALIBRATION_FILE, DEFAULT_OBJECTIVE
from ctclip.data.cohort import read_metadata
from ctclip.data.ct_rate import metadata_path
from ctclip.errors import UserError
from ctclip.evaluation.calibration import Calibration, fit_calibration, load_calibration
from ctclip.evaluation.tables import VolumeTable, read_labels, read_predictions, tuning_rows

# What an evaluation leaves in its folder. Training removes them when the weights that they are about are replaced.
APPLIED_FILES = ("predictions_calibrated.csv", "predictions_mapped.csv")
PAGE = "report.html"
RESULT_FILES = ("metrics.json", "per_label.csv", CALIBRATION_FILE, PAGE, *APPLIED_FILES)


class RunError(UserError):
    """A run's folder that is missing, damaged, or not to be written to."""


def newest_run() -> Path:
    """The run folder under results/ that was written to last, by the times of its log.jsonl and run.json."""
    written = [path for name in ("run.json", "log.jsonl") for path in Path("results").glob(f"*/{name}")]
    if not written:
        raise RunError("results: found no run, expected a folder with run.json; train one with "
                       "'python ctclip_training.py --mode quick_test' or give --predictions and --labels")
    return max(written, key=lambda path: path.stat().st_mtime).parent


def check_output_folder(folder: Path, own: Path | None = None) -> None:
    """Raises RunError for a run's folder other than `own`: its tables must not be replaced by others."""
    if (folder / "run.json").is_file() and (own is None or own.resolve() != folder.resolve()):
        raise RunError(f"{folder}: found a run, whose tables others would replace, expected another folder; change "
                       "--output-dir")


def results_folder(run: Path, data_dir: str | Path | None) -> Path:
    """Where results of a run go by default: into its folder; on a cohort other than its own, into a folder in there."""
    return run if data_dir is None else run / f"on_{Path(data_dir).resolve().name}"


def run_record(run: Path) -> dict:
    """Content of a run's run.json, or {} where there is none."""
    path = run / "run.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: found no JSON object ({error}), expected a run's record; restore it") from error


def read_history(path: str | Path) -> list[dict] | None:
    """Epochs of a log.jsonl, or None where there is none; a last line cut off by an interrupted run is skipped."""
    path = Path(path)
    if not path.is_file():
        return None
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    epochs = []
    for number, line in enumerate(lines, 1):
        try:
            epochs.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise RunError(f"{path}, line {number}: found no JSON ({error}), expected one epoch; remove that "
                               "line") from error
    return epochs


def run_calibration(run: Path) -> Calibration | None:
    """The calibration stored with a run; fitted now on its tuning patients where there is none yet; None where it has
    no tuning patients. One that was fitted on merged scans or patients (`--unit`) is not for single volumes: it is
    fitted anew, with the same objective."""
    stored = load_calibration(run / CALIBRATION_FILE) if (run / CALIBRATION_FILE).is_file() else None
    if stored and stored.unit == "volume":
        return stored
    if (tuning := run_tuning(run)) is None:
        return None
    rows, objective = tuning_rows(tuning), stored.objective if stored else DEFAULT_OBJECTIVE
    return fit_calibration(rows.labels, rows.probabilities, rows.patients, objective=objective)


def run_tuning(run: Path) -> tuple[VolumeTable, VolumeTable] | None:
    """(predictions, labels) of a run's tuning patients, or None."""
    if not (run / "tuning_predictions.csv").is_file():
        return None
    return read_predictions(run / "tuning_predictions.csv"), read_labels(run / "tuning_labels.csv")


def run_metadata(data_dir: str | Path | None) -> dict[str, dict[str, str]] | None:
    """Rows of the metadata table of a cohort's unseen split, for subgroups; None where there is none."""
    if data_dir is None or not (path := Path(data_dir, metadata_path("valid"))).is_file():
        return None
    return read_metadata(path)
