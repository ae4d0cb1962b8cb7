"""Run folders: which is the newest, what an evaluation finds in one, and how what is missing is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.config import CALIBRATION_FILE, DEFAULT_OBJECTIVE
from ctclip.evaluation.calibration import (
    Calibration,
    fit_calibration,
    load_calibration,
)
from ctclip.evaluation.metrics import EvaluationError
from ctclip.evaluation.results import EvaluationInputs
from ctclip.evaluation.tables import load_labels, load_predictions, tuning_rows, write_table
from ctclip.inference.predictor import load_model, predict_volumes, print_failures

if TYPE_CHECKING:
    import pandas as pd

    from ctclip.data.feature_cache import FeatureCache
    from ctclip.data.preprocessing import Volume
    from ctclip_model import CTCLIPMultiAbnormalityModel


def newest_run(results: str | Path = "results") -> Path:
    """The run folder under `results` that was written to last, judged by its log.jsonl and run.json."""
    written = [path for name in ("run.json", "log.jsonl") for path in Path(results).glob(f"*/{name}")]
    if not written:
        raise EvaluationError(
            f"{results}: found no run, expected a folder with run.json; train one with "
            "'python ctclip_training.py --mode quick_test' or give --predictions and --labels"
        )
    return max(written, key=lambda path: path.stat().st_mtime).parent


def run_inputs(
    run_dir: str | Path,
    data_dir: str | Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    tables: str | Path | None = None,
) -> EvaluationInputs:
    """The material of a run folder.

    Predictions that are not there yet are made with the run's model, on the validation split of the run's cohort. With
    `data_dir` they are made anew on that cohort, and kept in the folder `tables`, apart from the run's own.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise EvaluationError(f"{run}: found no such folder, expected a run folder; list results/ for its name")
    tables = run if data_dir is None else Path(tables or foreign_folder(run, data_dir))
    present = (tables / "predictions.csv").is_file() and (tables / "labels.csv").is_file()
    if data_dir is not None or not present:
        predict_run(run, data_dir, device, workers, tables)
    from ctclip.phantoms.cohort import is_phantom_cohort

    record = run_record(run)
    phantom = bool(record.get("phantom", False)) if data_dir is None else is_phantom_cohort(data_dir)
    cohort = data_dir or record.get("data_dir")
    predictions, labels = load_predictions(tables / "predictions.csv"), load_labels(tables / "labels.csv")
    history = read_history(run / "log.jsonl")
    folder = Path(cohort) if cohort else None
    return EvaluationInputs(predictions, labels, run_tuning(run), history, phantom, folder, record)


def make_folder(path: str | Path) -> Path:
    """The folder, made where there is none."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(
            f"{folder}: found a place that cannot be written ({error.strerror}), expected a folder; change --output-dir"
        ) from error
    return folder


def refuse_run_folder(folder: Path, own: Path | None = None) -> None:
    """A run's tables are replaced by nothing but its own: refuse to write others into its folder."""
    if (folder / "run.json").is_file() and (own is None or own.resolve() != folder.resolve()):
        raise EvaluationError(
            f"{folder}: found a run, whose tables others would replace, expected another folder; change --output-dir"
        )


def foreign_folder(run: Path, data_dir: str | Path | None) -> Path:
    """Where results of a run go by default: into its folder; on a cohort other than its own, into a folder in there."""
    return run if data_dir is None else run / f"on_{Path(data_dir).resolve().name}"


def predict_run(
    run: Path, data_dir: str | Path | None, device: str | None, workers: int | None, tables: Path
) -> None:
    """Writes predictions.csv and labels.csv of the cohort's validation split into `tables`.

    What the run's cache has of the volumes is taken from there; streamed volumes are nowhere else.
    """
    from ctclip.data.preprocessing import FETCH_COMMAND, load_cohort

    record = run_record(run)
    data_dir = data_dir or record.get("data_dir")
    if data_dir is None or not (run / "model.safetensors").is_file():
        raise EvaluationError(
            f"{run}: found no predictions.csv with labels.csv, expected them or a finished epoch to make them with; "
            "let training go on (--resume), or give --predictions and --labels"
        )
    cohort = load_cohort(data_dir, "valid")
    model = load_model(run, device)
    print(f"Predicting the unseen split of {data_dir}\n{cohort.summary()}")
    cache = run_cache(record, model)
    if not within_reach(cohort.volumes, cache):
        where = f"{run_cache_dir(record)} (no such folder)" if cache is None else cache.folder
        raise EvaluationError(
            f"{data_dir}: found none of the {len(cohort)} volumes on disk (they were streamed) and none in {where}, "
            "expected them in the cache of this encoder; evaluate a run that was trained with --freeze-backbone on the "
            f"cache they were streamed into, or fetch the files with {FETCH_COMMAND} valid"
        )
    read, logits = predict_volumes(model, cohort.volumes, workers=workers, on_batch=print_failures, cache=cache)
    if not read:
        raise EvaluationError(f"{data_dir}: none of the {len(cohort)} volumes of its valid split could be read")
    names = [cohort.volumes[i].name for i in read]
    tables.mkdir(parents=True, exist_ok=True)
    write_table(tables / "labels.csv", names, np.stack([cohort.volumes[i].labels for i in read]).astype(int))
    write_table(tables / "predictions.csv", names, logits.sigmoid().numpy())


def run_cache_dir(record: Mapping) -> str:
    """The --cache-dir of a run, as its record has it."""
    return record.get("config", {}).get("cache_dir", "cache")


def run_cache(record: Mapping, model: CTCLIPMultiAbnormalityModel) -> FeatureCache | None:
    """The cache of the folder that a run's record names, to read from; None where there is no such folder."""
    from ctclip.data.feature_cache import FeatureCache

    folder = Path(run_cache_dir(record))
    return FeatureCache(folder, model) if folder.is_dir() else None


def within_reach(volumes: Sequence[Volume], cache: FeatureCache | None) -> bool:
    """Whether any of the volumes has a file or, where it was streamed, an entry in the cache."""
    if any(volume.signature is None for volume in volumes):
        return True
    return cache is not None and any(row is not None for row in cache.rows(volumes))


def run_record(run: Path) -> dict:
    """Content of a run's run.json, or {} where there is none."""
    path = run / "run.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{path}: found no JSON object ({error}), expected a run's record; restore it") from error


def read_history(path: str | Path) -> list[dict] | None:
    """Epochs of a log.jsonl, or None where there is none; a last line cut off by an interrupted run is left out."""
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
                raise EvaluationError(
                    f"{path}, line {number}: found no JSON ({error}), expected one epoch; remove that line"
                ) from error
    return epochs


def run_calibration(run: Path) -> Calibration | None:
    """The calibration stored with a run; fitted now on its tuning patients where there is none yet; None where it has
    no tuning patients. One that was fitted on merged scans or patients (`--unit`) is not for single volumes: it is
    fitted anew, with the same objective."""
    objective = DEFAULT_OBJECTIVE
    if (run / CALIBRATION_FILE).is_file():
        stored = load_calibration(run / CALIBRATION_FILE)
        if stored.unit == "volume":
            return stored
        objective = stored.objective
    tuning = run_tuning(run)
    if tuning is None:
        return None
    rows = tuning_rows(tuning)
    return fit_calibration(rows.labels, rows.probabilities, rows.patients, objective=objective)


def run_tuning(run: Path) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """(predictions, labels) of a run's tuning patients, or None."""
    if not (run / "tuning_predictions.csv").is_file():
        return None
    return load_predictions(run / "tuning_predictions.csv"), load_labels(run / "tuning_labels.csv")


def run_metadata(data_dir: str | Path | None) -> dict[str, dict[str, str]] | None:
    """Rows of the metadata table of a cohort's unseen split, for subgroups; None where there is none."""
    from ctclip.data.preprocessing import metadata_path, read_metadata

    if data_dir is None or not (path := Path(data_dir, metadata_path("valid"))).is_file():
        return None
    return read_metadata(path)
