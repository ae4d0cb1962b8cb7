"""The challenge's results.json from tables of predictions, as `--mode predict` writes it from scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.data.tables import MAPPED, join
from ctclip.evaluation.calibration import Calibration, fit_calibration, load_calibration
from ctclip.evaluation.evaluate import Evaluation
from ctclip.evaluation.run_folder import run_calibration, run_tuning
from ctclip.evaluation.tables import EvaluationInputs, VolumeTable, tuning_rows
from ctclip.evaluation.thresholds import rescale_to_half
from ctclip.formatting import plural
from ctclip.inference.predictions import ResultsFile, check_output, known_rates
from ctclip.inference.scans import PredictionError, scans_of_table
from ctclip_model import ABNORMALITIES

NEEDS_TUNING = "expected some to fit thresholds on; add --tuning-predictions and --tuning-labels, or --apply RUN"


def check_results_json(path: str, unit: str = "volume", runs: Sequence[str | Path] = ()) -> None:
    """Raises PredictionError, before anything is computed, for a place or name that cannot be written, for thresholds
    of merged scans or patients, and for runs that are to be evaluated and have no tuning patients."""
    if Path(path).suffix != ".json":
        raise PredictionError(f"--results-json {path}: found another ending, expected .json; rename it")
    check_output(path)
    if unit != "volume":
        raise PredictionError(f"found --unit {unit} with --results-json, expected volume, as the challenge counts; "
                              "evaluate by the other unit without --results-json")
    if bare := [run for run in runs if Path(run).is_dir() and run_tuning(Path(run)) is None]:
        raise PredictionError(f"{bare[0]}: found no tuning_predictions.csv, expected the tuning patients of a run for "
                              "--results-json; name the run where it was trained")


def check_thresholds(inputs: EvaluationInputs) -> None:
    """Raises PredictionError for an evaluation that has no thresholds of other patients for the 18 findings."""
    if inputs.tuning is None:
        raise PredictionError(f"found --results-json and no tuning patients, {NEEDS_TUNING}")
    if inputs.labels.findings != ABNORMALITIES:
        raise PredictionError(f"found --results-json and {len(inputs.labels.findings)} findings, expected the "
                              "challenge's 18; leave --results-json out")


def results_from_evaluation(path: str, evaluation: Evaluation) -> str:
    """Writes every volume of the table of predictions, and of those that only the labels have, once; -> what to print.
    The latter are answered with the tuning patients' prevalence, as scans that cannot be read are."""
    inputs, calibration = evaluation.inputs, evaluation.fitted.calibration
    assert inputs.tuning is not None  # check_thresholds
    names, values = _names_and_values(inputs.predictions)
    predicted = join(inputs.labels.frame.index, names)
    missing = [name for name in inputs.labels.frame.index if name not in predicted]
    mapped, rates = calibration.rescale_to_half(values), known_rates(inputs.tuning[1])
    written = _write(path, names, mapped, calibration, missing, rates)
    instead = "is answered" if len(missing) == 1 else "are answered"
    return written + (f"\n{plural(len(missing), 'volume')} of {inputs.labels.source} without a prediction, first "
                      f"{missing[0]}, {instead} with the tuning patients' prevalence" if missing else "")


def results_from_table(path: str, table: VolumeTable, calibration: Calibration | None) -> str:
    """Writes every volume of a table of predictions once, cut by `calibration`'s thresholds; -> what to print.

    The table has the probabilities that the calibration is for, or those calibrated by it; without a calibration it has
    to be mapped already. Raises PredictionError otherwise, and for thresholds of merged scans or patients.
    """
    names, values = _names_and_values(table)
    if calibration is None:
        if table.scale != MAPPED:
            raise PredictionError(f"{table.source}: found predictions that are {table.scale}, and no tuning patients, "
                                  f"{NEEDS_TUNING}")
        return _write(path, names, values)
    if calibration.unit != "volume":
        raise PredictionError(f"found thresholds for one row per {calibration.unit}, expected some for volumes, as the "
                              "challenge counts; name a run that has its tuning tables")
    thresholds = {calibration.calibrated_scale: calibration.calibrated_thresholds,
                  calibration.scale: calibration.thresholds}
    if table.scale not in thresholds:
        raise PredictionError(f"{table.source}: found predictions that are {table.scale}, expected {calibration.scale} "
                              f"ones, or {calibration.calibrated_scale}, as these thresholds are for; predict with "
                              "--uncalibrated")
    return _write(path, names, rescale_to_half(values, thresholds[table.scale]), calibration)


def stored_thresholds(source: str, chosen: Mapping[str, Any]) -> Calibration:
    """Of `--apply`: a run's, fitted anew on its tuning patients where something is `chosen`, or a calibration.json's,
    as `--mode predict` takes them."""
    path = Path(source)
    if path.is_dir():
        calibration = run_calibration(path, **chosen)
        if calibration is None:
            raise PredictionError(f"{source}: found no calibration and no tuning patients, expected an evaluated run; "
                                  "evaluate it first")
    elif chosen:
        raise PredictionError(f"--apply {source}: found a file and {', '.join(chosen)}, expected a run, on whose "
                              "tuning patients thresholds are fitted; name the run")
    else:
        calibration = load_calibration(path)
    return calibration.select(ABNORMALITIES)


def tuned_thresholds(tuning: tuple[VolumeTable, VolumeTable], chosen: Mapping[str, Any]) -> Calibration:
    """Fitted on tuning tables, for predictions without labels."""
    rows = tuning_rows(tuning)
    return fit_calibration(rows.labels, rows.probabilities, rows.patients, findings=rows.findings,
                           scale=tuning[0].scale, **chosen)


def _names_and_values(table: VolumeTable) -> tuple[list[str], np.ndarray]:
    return list(table.frame.index), table.frame[list(ABNORMALITIES)].to_numpy()


def _write(
    path: str, names: Sequence[str], values: np.ndarray, calibration: Calibration | None = None,
    missing: Sequence[str] = (), rates: np.ndarray | None = None,
) -> str:
    scans = scans_of_table([*names, *missing])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    substitute = np.full(len(ABNORMALITIES), np.nan) if rates is None else rates
    ResultsFile(Path(path), scans, substitute, dict(zip(names, values, strict=True))).close()
    whose = "mapped as they were" if calibration is None else f"tuned thresholds ({calibration.objective}) lie at 0.5"
    return f"Wrote {path}: {plural(len(scans), 'scan')}; {whose}"
