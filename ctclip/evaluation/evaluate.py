"""Predictions and labels -> metrics, calibration, thresholds, intervals.

What is promised, for every number this project prints:
- Thresholds and calibration never see the patients they are reported on: they come from tuning patients, or, without
  any, what is reported on each fifth of the patients was fitted on the other four ("cross-fitted by patient").
- Intervals are of patients, not volumes (bootstrap.py); each metric is defined in one place (metrics.py).
- Reports need nothing but the dictionary written to metrics.json, so what is printed is what is stored.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctclip import __version__
from ctclip.config import SYNTHETIC_NOTE, UNITS, Settings
from ctclip.evaluation.bootstrap import (
    Resamples,
    compare,
    compare_labels,
    draw,
    ece_if_calibrated,
    enough_cases,
    resampled_brier,
    resampled_decisions,
    resampled_ranking,
)
from ctclip.evaluation.calibration import Calibration, cross_folds, fit_calibration
from ctclip.evaluation.cases import worst_cases
from ctclip.evaluation.metrics import (
    calibration_columns,
    decision_columns,
    decision_metrics,
    none_if_nan,
    per_label_metrics,
    pooled_auroc,
    ranking_columns,
    ranking_metrics,
    threshold_table,
    undefined_labels,
)
from ctclip.evaluation.output import write_results
from ctclip.evaluation.results import (
    CROSS_FITTED,
    TUNING,
    CalibrationScores,
    Evaluation,
    EvaluationInputs,
    FittedThresholds,
    Scores,
)
from ctclip.evaluation.subgroups import groups_of, subgroup_metrics
from ctclip.evaluation.tables import (
    Rows,
    VolumeTable,
    check_no_overlap,
    common_volumes,
    count_unnamed,
    row_keys,
    rows_of,
    tuning_rows,
)
from ctclip.evaluation.thresholds import tune_global_threshold, tune_label_thresholds
from ctclip.formatting import decimal, percent
from ctclip_model import ABNORMALITIES

NEED_CASES = ("auroc", "average_precision", "precision", "recall", "f1")  # no interval without enough cases
RATE_TOLERANCE = 0.05  # positive rate against label rate, in fractions of all decisions
PHANTOM_AUROC = 0.85  # what the built-in cohort must reach
PUBLISHED_AUROC = {"CT-CLIP zero-shot": 0.731, "CT-CLIP ClassFine": 0.756}  # macro, CT-RATE valid, as published
COMPARED = ("at_0.5", "calibrated", "tuned")  # ways to decide that are compared with a baseline's
OPTIMISM_METRICS = ("positive_rate", "hamming_accuracy", "f1_macro", "recall_macro", "crg")


def evaluate(
    predictions: pd.DataFrame | VolumeTable,
    labels: pd.DataFrame | VolumeTable,
    tuning: tuple[pd.DataFrame | VolumeTable, pd.DataFrame | VolumeTable] | None = None,
    baseline: pd.DataFrame | VolumeTable | None = None,
    output_dir: str | Path | None = None,
    history: list[dict] | None = None,
    phantom: bool = False,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    **settings: Any,
) -> dict:
    """Everything format_report prints and metrics.json holds; with `output_dir` also writes the files and figures.

    Tables are those of load_predictions and load_labels. `tuning` is (predictions, labels) of patients who do not
    occur in `predictions`; without it everything fitted is cross-fitted by patient. `baseline` holds other predictions
    for the same volumes. `history` is log.jsonl's list of epochs. `metadata` is {volume: row of text cells}, for
    subgroups. `settings` are those of Settings.
    """
    fitted_on = None if tuning is None else (_as_table(tuning[0]), _as_table(tuning[1]))
    inputs = EvaluationInputs(_as_table(predictions), _as_table(labels), fitted_on, history, phantom)
    other = None if baseline is None else _as_table(baseline)
    evaluation = evaluate_tables(inputs, Settings(**settings), other, metadata)
    if output_dir is not None:
        write_results(output_dir, evaluation, worst_cases(evaluation.rows, evaluation.fitted))
    return evaluation.metrics


def _as_table(table: pd.DataFrame | VolumeTable) -> VolumeTable:
    return table if isinstance(table, VolumeTable) else VolumeTable(table)


def evaluate_tables(
    inputs: EvaluationInputs,
    settings: Settings,
    baseline: VolumeTable | None = None,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
) -> Evaluation:
    """`evaluate` without files: nothing is written."""
    tables = {"predictions": inputs.predictions, "labels": inputs.labels}
    tables |= {} if baseline is None else {"baseline": baseline}
    volumes, skipped = common_volumes(tables, settings.allow_partial)
    rows = rows_of(inputs.predictions.frame, inputs.labels.frame, volumes, settings.unit, skipped)
    fitted = fit_thresholds(rows, inputs.tuning, settings)
    resamples = draw(rows.patients, settings.resamples, settings.seed)
    scores = score_decisions(rows, fitted, resamples)
    errors = score_calibration(rows, fitted, resamples)
    metrics = {
        **{name: score.summary for name, score in scores.items()},
        "calibration": _calibration_content(errors, fitted.calibration),
        "per_label": _per_label_content(rows, fitted, scores["at_0.5"]),
        "thresholds": _thresholds_content(fitted),
        "optimism": _optimism(rows, scores, settings),
        "undefined_auroc": undefined_labels(rows.labels),
        "unit": {"name": rows.unit, "how": UNITS[rows.unit], "conflicting_labels": rows.conflicts},
        "n_rows": len(rows),
        "n_volumes": rows.n_volumes,
        "n_patients": rows.n_patients,
        "volumes_without_patient": count_unnamed(volumes),
        "left_out": rows.skipped | fitted.skipped,
        "probabilities": {name: float(getattr(rows.probabilities, name)()) for name in ("min", "max", "mean")},
        "threshold_table": threshold_table(rows.labels, rows.probabilities),
        "intervals": _intervals_content(scores, errors),
        "subgroups": None,
        "baseline": None,
        "phantom": inputs.phantom,
        "note": SYNTHETIC_NOTE if inputs.phantom else inputs.note,
        "settings": asdict(settings),
        "versions": {"ctclip": __version__, "python": platform.python_version(), "numpy": np.__version__},
    }
    if metadata is not None:
        positive = rows.probabilities >= fitted.thresholds
        metrics["subgroups"] = subgroup_metrics(rows, positive, _row_groups(rows, volumes, metadata), resamples)
    if baseline is not None:
        others = rows_of(baseline.frame, inputs.labels.frame, volumes, settings.unit)
        if inputs.tuning is not None:  # the baseline has none, so both are cross-fitted
            scores = score_decisions(rows, fit_thresholds(rows, None, settings), resamples)
        theirs = score_decisions(others, fit_thresholds(others, None, settings), resamples)
        metrics["baseline"] = {"source": baseline.source} | _comparison(scores, theirs)
    metrics["success_criteria"] = success_criteria(metrics)
    return Evaluation(metrics, rows, fitted, inputs)


def fit_thresholds(
    rows: Rows, tuning: tuple[VolumeTable, VolumeTable] | None, settings: Settings
) -> FittedThresholds:
    """Calibration and thresholds from tuning patients, or cross-fitted by patient where there are none."""
    source, fitted_on = rows, CROSS_FITTED
    if tuning is not None:
        source, fitted_on = tuning_rows(tuning, settings.unit, settings.allow_partial), TUNING
        check_no_overlap(rows.patients, source.patients, tuning[0].source)

    def fit(chosen: np.ndarray | slice) -> Calibration:
        return fit_calibration(source.labels[chosen], source.probabilities[chosen], source.patients[chosen],
                               settings.calibration, settings.objective, settings.prevalence, settings.unit)

    def apply(calibration: Calibration, own: np.ndarray | slice) -> tuple[np.ndarray, ...]:
        return (calibration.apply(rows.probabilities[own]), calibration.thresholds, calibration.calibrated_thresholds,
                np.array(calibration.global_threshold))

    calibration, without_own = fit(slice(None)), set(undefined_labels(source.labels))
    if tuning is not None:
        applied = apply(calibration, slice(None))
    else:
        applied = tuple(np.empty(rows.labels.shape) for _ in range(4))
        for others, own in cross_folds(rows.patients):
            without_own |= set(undefined_labels(rows.labels[others]))
            for values, of_fold in zip(applied, apply(fit(others), own), strict=True):
                values[own] = of_fold
    used_global = [name for name in ABNORMALITIES if name in without_own]
    return FittedThresholds(calibration, fitted_on, source.n_volumes, used_global, source.skipped, *applied)


# ------------------------------------------------------------------------------------------------- scores, resampled


def score_decisions(rows: Rows, fitted: FittedThresholds, resamples: Resamples) -> dict[str, Scores]:
    """Scores of four ways to decide: at 0.5, calibrated at 0.5, tuned per label, tuned globally."""
    y, p, calibrated = rows.labels, rows.probabilities, fitted.calibrated
    columns = dict(zip(("auroc", "average_precision"), ranking_columns(y, p), strict=True))
    ranking = Scores(ranking_metrics(y, p), columns, *resampled_ranking(y, p, resamples))
    summaries = replace(ranking, per_label={}, per_label_resampled={})  # per label they are reported once, with "tuned"
    # A monotone map leaves each label's AUROC alone; only the pooled one changes. (Cross-fitted columns are made of
    # five maps, so their own AUROC would differ a little, and would be of no map that anyone applies.)
    pooled = {"auroc_micro": none_if_nan(pooled_auroc(y, calibrated)[0])}
    pooled_resampled = {"auroc_micro": pooled_auroc(y, calibrated, resamples.group, resamples.counts)}
    recalibrated = replace(
        summaries, summary=summaries.summary | pooled, resampled=summaries.resampled | pooled_resampled
    )
    return {
        "at_0.5": _with_decisions(summaries, rows, p >= 0.5, resamples),
        "calibrated": _with_decisions(recalibrated, rows, calibrated >= 0.5, resamples),
        "tuned": _with_decisions(ranking, rows, p >= fitted.thresholds, resamples),
        "tuned_global": _with_decisions(summaries, rows, p >= fitted.global_thresholds, resamples),
    }


def _with_decisions(ranking: Scores, rows: Rows, decisions: np.ndarray, resamples: Resamples) -> Scores:
    """The scores that need no threshold, and those of the decisions; NaN in resamples of labels with too few cases."""
    resampled, columns = resampled_decisions(rows.labels, decisions, resamples)
    columns |= ranking.per_label_resampled
    enough = enough_cases(rows.labels, rows.patients)
    return Scores(
        ranking.summary | decision_metrics(rows.labels, decisions),
        decision_columns(rows.labels, decisions) | ranking.per_label,
        ranking.resampled | resampled,
        {key: np.where(enough, column, np.nan) if key in NEED_CASES else column for key, column in columns.items()},
    )


def score_calibration(rows: Rows, fitted: FittedThresholds, resamples: Resamples) -> dict[str, CalibrationScores]:
    """Calibration errors "before" (uncalibrated) and "after"."""
    return {
        when: CalibrationScores(
            calibration_columns(rows.labels, values),
            ece_if_calibrated(values, resamples.group),
            resampled_brier(rows.labels, values, resamples),
        )
        for when, values in (("before", rows.probabilities), ("after", fitted.calibrated))
    }


def _optimism(rows: Rows, scores: Mapping[str, Scores], settings: Settings) -> dict:
    """Held-out metrics ("honest") beside apparent ones ("claimed"): thresholds searched on the reported patients."""
    y, p = rows.labels, rows.probabilities
    result = {}
    for name, tune in (("tuned", tune_label_thresholds), ("tuned_global", tune_global_threshold)):
        apparent = decision_metrics(y, p >= tune(y, p, settings.objective, settings.prevalence))
        held_out = scores[name].summary
        result[name] = {
            "claimed": {key: apparent[key] for key in OPTIMISM_METRICS},
            "honest": {key: held_out[key] for key in OPTIMISM_METRICS},
        }
    return result


def _comparison(this: Mapping[str, Scores], other: Mapping[str, Scores]) -> dict:
    """Every difference (this - baseline) on the same draws of patients."""
    first, second = this["tuned"], other["tuned"]
    differences = {
        name: compare(this[name].summary, other[name].summary, this[name].resampled, other[name].resampled)
        for name in COMPARED
    }
    differences["per_label"] = {
        key: compare_labels(
            column, second.per_label[key], first.per_label_resampled[key] - second.per_label_resampled[key]
        )
        for key, column in first.per_label.items()
        if key != "label_rate"
    }
    return {
        "fitted_on": CROSS_FITTED,
        **{name: other[name].summary for name in COMPARED},
        "this": {name: this[name].summary for name in COMPARED},
        "auroc_per_label": dict(zip(ABNORMALITIES, map(none_if_nan, second.per_label["auroc"]), strict=True)),
        "differences": differences,
    }


def _row_groups(
    rows: Rows, volumes: Sequence[str], metadata: Mapping[str, Mapping[str, str]]
) -> list[dict[str, str]]:
    """Attributes of each row; of merged volumes that differ, "several"."""
    merged: dict[str, dict[str, str]] = {}
    for key, groups in zip(row_keys(volumes, rows.unit), groups_of(volumes, metadata), strict=True):
        known = merged.setdefault(key, dict(groups))
        for attribute, group in groups.items():
            if known[attribute] != group:
                known[attribute] = "several"
    return [merged[str(name)] for name in rows.names]


# ------------------------------------------------------------------------------------------ content of metrics.json


def _calibration_content(errors: Mapping[str, CalibrationScores], calibration: Calibration) -> dict:
    columns = {"slope": calibration.slope, "intercept": calibration.intercept, "shift": calibration.shift}
    for when, score in errors.items():
        columns |= {f"{key}_{when}": column for key, column in score.per_label.items()}
    return {
        **{when: score.summary for when, score in errors.items()},
        "method": calibration.method,
        "cross_validated_log_loss": dict(calibration.losses),
        "per_label": {
            name: {key: float(column[j]) for key, column in columns.items()} for j, name in enumerate(ABNORMALITIES)
        },
    }


def _per_label_content(rows: Rows, fitted: FittedThresholds, half: Scores) -> dict:
    """Per-label metrics at the tuned thresholds, with those that depend on them repeated at 0.5 under "at_0.5"."""
    table = per_label_metrics(rows.labels, rows.probabilities, fitted.thresholds)
    for j, row in enumerate(table.values()):
        row["at_0.5"] = {key: float(column[j]) for key, column in half.per_label.items()}
    return table


def _thresholds_content(fitted: FittedThresholds) -> dict:
    """Thresholds for new patients, on the uncalibrated and on the calibrated scale."""
    calibration = fitted.calibration
    return {
        "global": calibration.global_threshold,
        "per_label": dict(zip(ABNORMALITIES, calibration.thresholds.tolist(), strict=True)),
        "per_label_calibrated": dict(zip(ABNORMALITIES, calibration.calibrated_thresholds.tolist(), strict=True)),
        "objective": calibration.objective,
        "fitted_on": fitted.fitted_on,
        "n_rows": calibration.n_rows,
        "n_volumes": fitted.n_volumes,
        "n_patients": calibration.n_patients,
        "took_global": fitted.used_global_threshold,
    }


def _intervals_content(scores: Mapping[str, Scores], errors: Mapping[str, CalibrationScores]) -> dict:
    """Intervals of every summary, and {label: {metric: interval, "at_0.5": {metric: interval}}} under "per_label"."""
    tuned, half = scores["tuned"].label_intervals(), scores["at_0.5"].label_intervals()
    brier = {when: score.label_intervals() for when, score in errors.items()}
    return {
        **{name: score.intervals() for name, score in scores.items()},
        "calibration": {when: score.intervals() for when, score in errors.items()},
        "per_label": {
            name: {
                **tuned[name],
                **{f"brier_{when}": intervals[name] for when, intervals in brier.items()},
                "at_0.5": half[name],
            }
            for name in ABNORMALITIES
        },
    }


def success_criteria(metrics: dict) -> list[dict]:
    """[{criterion, figure, passed}] from an evaluation's metrics."""
    half, tuned = metrics["at_0.5"], metrics["tuned"]
    all_negative = 1 - half["label_rate"]
    rows = []

    def add(criterion: str, figure: str, passed: bool) -> None:
        rows.append({"criterion": criterion, "figure": figure, "passed": bool(passed)})

    for name, m in (("tuned", tuned), ("at 0.5", half)):
        gap = m["positive_rate"] - m["label_rate"]
        figure = f"{percent(m['positive_rate'])} against {percent(m['label_rate'])}"
        within = abs(gap) <= RATE_TOLERANCE + 1e-12
        add(f"Positive rate within {100 * RATE_TOLERANCE:.0f} points of the label rate, {name}", figure, within)
    published = {f" ({name} on CT-RATE, as published)": goal for name, goal in PUBLISHED_AUROC.items()}
    goals = {"": PHANTOM_AUROC} if metrics["phantom"] else {} if metrics["note"] else published
    auroc = half["auroc_macro"]
    for whose, goal in goals.items():
        add(f"Macro AUROC >= {goal:g}{whose}", decimal(auroc), auroc is not None and auroc >= goal)
    hamming = tuned["hamming_accuracy"]
    figure = f"{hamming:.4f} against {all_negative:.4f}"
    add("Hamming accuracy above the all-negative predictor's, tuned", figure, hamming > all_negative)
    for name, m in (("tuned", tuned), ("at 0.5", half)):
        rate = m["positive_rate"]
        add(f"Not degenerate (positive rate 1 % to 90 %), {name}", percent(rate), 0.01 <= rate <= 0.9)
    return rows
