"""Predictions and labels -> metrics, calibration, thresholds, intervals, and their files.

What is promised, for every number this project prints:
- Thresholds and calibration never see the patients they are reported on: they come from tuning patients, or, without
  any, what is reported on each fifth of the patients was fitted on the other four ("cross-fitted by patient").
- Intervals are of patients, not volumes (bootstrap.py); each metric is defined in one place (metrics.py).
- Reports need nothing but the dictionary written to metrics.json, so what is printed is what is stored.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from ctclip import __version__
from ctclip.config import CALIBRATION_FILE, SYNTHETIC_NOTE, UNITS, Settings
from ctclip.data.ct_rate import names_patient
from ctclip.data.patients import StatedIds, merge_ids, stated_ids, without_patient
from ctclip.data.tables import ID_COLUMNS, MAPPED, UNCALIBRATED
from ctclip.evaluation import bootstrap, figures, render, report, subgroups, summary, tables, thresholds
from ctclip.evaluation import metrics as measure
from ctclip.evaluation.calibration import (
    CROSS_FITTED,
    TUNING,
    Calibration,
    FittedThresholds,
    fit_thresholds,
    rates_asked_for,
)
from ctclip.evaluation.cases import Case, worst_cases
from ctclip.evaluation.clinical import SPECIFICITIES, clinical_metrics
from ctclip.evaluation.ensemble import COMPARED_WITH_MEMBERS, mean_and_spread
from ctclip.evaluation.run_folder import (
    APPLIED_FILES,
    ELSEWHERE,
    PAGE,
    PICTURES,
    REPORT_TEXT,
    RESULT_FILES,
    alone_in,
    differing_settings,
    encoder_note,
    writing,
)
from ctclip.evaluation.tables import EvaluationInputs, Rows, VolumeTable
from ctclip.fileio import make_folder, replacing
from ctclip.formatting import decimal, percent
from ctclip_model import ABNORMALITIES, UNKNOWN

NEED_CASES = ("auroc", "average_precision", "precision", "recall", "f1")  # no interval without enough cases
NEED_CALLED = ("precision", "f1", "positive_rate")  # of a label: none without enough patients called positive
TABLE_THRESHOLDS = np.arange(1, 20) / 20  # 0.05 to 0.95
TABLE_METRICS = ("hamming_accuracy", "f1_macro", "precision_macro", "recall_macro", "positive_rate")
RATE_TOLERANCE = 0.05  # positive rate against label rate, in fractions of all decisions
PHANTOM_AUROC = 0.85  # what the built-in cohort must reach
PUBLISHED_AUROC = {"CT-CLIP zero-shot": 0.731, "CT-CLIP ClassFine": 0.756}  # macro, CT-RATE valid, as published
COMPARED = ("at_0.5", "calibrated", "tuned")  # ways to decide that are compared with a baseline's
OPTIMISM_METRICS = ("positive_rate", "hamming_accuracy", "f1_macro", "recall_macro", "crg")


AnyTable: TypeAlias = "pd.DataFrame | VolumeTable"


class Scores(NamedTuple):
    """One way to decide: {metric: (1 + B,)} of all labels and {metric: (1 + B, L)} of each, of the table itself and of
    B resamples; {metric: (P,)} of all labels without one patient after the other, of what depends on decisions. The
    keys are those of metrics.json. Where there are too few cases, resamples and `left_out` are NaN. `sums`: confusion
    counts (1 + B, 4 L + 2). `rarely_called` (L,): labels with fewer than bootstrap.MIN_CASES patients called positive.
    """

    values: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    left_out: dict[str, np.ndarray]
    sums: np.ndarray
    rarely_called: np.ndarray

    @property
    def summary(self) -> dict[str, float | None]:
        return measure.plain(self.values)

    @property
    def intervals(self) -> dict[str, list[float] | None]:
        return {key: bootstrap.jackknife_interval(values[0], self.left_out[key]) if key in self.left_out
                else bootstrap.interval(values) for key, values in self.values.items()}

    def difference(self, other: Scores, key: str) -> dict:
        """Of one metric of all labels, this - other."""
        gaps = self.values[key] - other.values[key]
        if key in self.left_out:
            return bootstrap.jackknife_difference(gaps[0], self.left_out[key] - other.left_out[key])
        return bootstrap.difference(gaps)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: `metrics` as stored in metrics.json, and the arrays that files, figures and the page draw from."""

    metrics: dict
    rows: Rows
    fitted: FittedThresholds
    inputs: EvaluationInputs

    def __repr__(self) -> str:
        return summary.format_summary(self.metrics)


def evaluate(
    predictions: AnyTable, labels: AnyTable, tuning: tuple[AnyTable, AnyTable] | None = None,
    baseline: AnyTable | None = None, output_dir: str | Path | None = None, history: list[dict] | None = None,
    phantom: bool = False, metadata: Mapping[str, Mapping[str, str]] | None = None, **settings: Any,
) -> dict:
    """Everything format_report prints and metrics.json holds; with `output_dir` also writes the files and figures.

    Tables are those of load_predictions and load_labels, or any DataFrame with a column for each finding whose index,
    or column VolumeName, names the volumes; a column PatientID, and ScanID, says whose they are. The findings are those
    of `labels`; NaN or UNKNOWN (-1) there is left out. `tuning` is (predictions,
    labels) of patients who do not occur in `predictions`; without it everything fitted is cross-fitted by patient.
    `baseline` holds other predictions for the same volumes. `history` is log.jsonl's list of epochs. `metadata` is
    {volume: row of text cells}, for subgroups. `settings` are those of Settings.
    """
    fitted_on = None if tuning is None else (tables.as_table(tuning[0]), tables.as_table(tuning[1]))
    inputs = EvaluationInputs(tables.as_table(predictions), tables.as_table(labels), fitted_on, history, phantom)
    other = None if baseline is None else tables.as_table(baseline)
    evaluation = evaluate_tables(inputs, Settings(**settings), other, metadata)
    if output_dir is not None:
        with alone_in(make_folder(output_dir, ELSEWHERE)):
            write_tables(output_dir, evaluation)
            write_pictures(output_dir, evaluation, worst_cases(evaluation.rows, evaluation.fitted))
    return summary.Metrics(evaluation.metrics)


def evaluate_tables(
    inputs: EvaluationInputs, settings: Settings, baseline: VolumeTable | None = None,
    metadata: Mapping[str, Mapping[str, str]] | None = None, baseline_record: Mapping | None = None,
) -> Evaluation:
    """`evaluate` without files: nothing is written. `baseline_record` is the run.json of the baseline's run."""
    findings = inputs.labels.findings
    of = {"predictions": inputs.predictions, "labels": inputs.labels}
    of |= {} if baseline is None else {"baseline": baseline}
    of = tables.joined({what: table.select(findings) for what, table in of.items()})
    volumes, skipped = tables.common_volumes(of, settings.allow_partial)
    predictions, labels = of["predictions"].frame, of["labels"].frame
    if np.array_equal(*(table[list(findings)].to_numpy() for table in (predictions, labels))):
        raise measure.EvaluationError(
            f"found the same numbers for {len(predictions)} volumes as predictions and as labels, expected "
            "probabilities; name a table of predictions"
        )
    ids, own_settings = _stated_ids(inputs, of, metadata), _for_scale(inputs.predictions, settings)
    if inputs.tuning is not None:
        _check_tuning_scale(inputs.predictions, inputs.tuning[0])
    rows = tables.rows_of(predictions, labels, volumes, settings.unit, skipped, ids)
    fitted = fit_thresholds(rows, inputs.tuning, own_settings, inputs.predictions.scale)
    resamples = bootstrap.draw(rows.patients, settings.resamples, settings.seed)
    if rows.n_patients < bootstrap.MIN_CASES:  # no intervals: they would be far too short
        resamples = replace(resamples, counts=resamples.counts[:1])
    ranking = measure.resampled_ranking(rows.labels, rows.probabilities, resamples, SPECIFICITIES)
    scores = score_decisions(rows, fitted, resamples, ranking)
    metrics = {
        **_measured(rows, fitted, scores, resamples, own_settings),
        "scale": inputs.predictions.scale,
        "clinical": clinical_metrics(rows, fitted, ranking[1], scores["tuned"].sums, resamples, settings),
        "encoder_note": encoder_note(inputs.record),
        "reference_standard": _reference_standard(inputs, rows, settings),
        "volumes_without_patient": without_patient(volumes, ids),
        "subgroups": None,
        "baseline": None,
        "phantom": inputs.phantom,
        "note": SYNTHETIC_NOTE if inputs.phantom else inputs.note,
        "settings": asdict(own_settings),
        "versions": {"ctclip": __version__, "python": platform.python_version(), "numpy": np.__version__},
    }
    unused = {table.source: list(table.unused) for table in (*of.values(), *(inputs.tuning or ())) if table.unused}
    if unused:
        metrics["unused_columns"] = unused
    if doubtful := [line for table in of.values() for line in table.doubtful]:
        metrics["doubtful_columns"] = doubtful
    if inputs.label_map:
        metrics["label_map"] = inputs.label_map.content(findings)
    if inputs.members:
        metrics["ensemble"] = {**inputs.ensemble, **_members(inputs, settings, ids)}
    if metadata is not None:
        groups = subgroups.row_attributes(rows, volumes, metadata)
        decisions = rows.probabilities >= fitted.thresholds
        metrics["subgroups"] = subgroups.subgroup_metrics(rows, decisions, groups, resamples)
    if baseline is not None:
        others = tables.rows_of(of["baseline"].frame, labels, volumes, settings.unit, ids=ids)
        if inputs.tuning is not None:  # the baseline has none, so both are cross-fitted
            scores = score_decisions(rows, fit_thresholds(rows, None, own_settings), resamples, ranking)
        theirs = score_decisions(others, fit_thresholds(others, None, _for_scale(baseline, settings)), resamples)
        of_baseline: dict[str, Any] = {"source": baseline.source, "scale": baseline.scale}
        if inputs.record and baseline_record:
            of_baseline["settings"] = differing_settings(
                (inputs.predictions.source, inputs.record), (baseline.source, baseline_record))
        metrics["baseline"] = of_baseline | _comparison(scores, theirs, findings)
    metrics["success_criteria"] = success_criteria(metrics)
    return Evaluation(metrics, rows, fitted, inputs)


def _reference_standard(inputs: EvaluationInputs, rows: Rows, settings: Settings) -> str:
    """What the labels are, as far as it is known, or as it was stated."""
    if stated := " ".join((settings.reference_standard or "").split()):
        return f"Reference standard, as stated for this evaluation: {stated}"
    if inputs.phantom:
        return "Reference standard: what the phantoms were made with, exact by construction."
    if inputs.note:
        return "Reference standard: simulated labels."
    if rows.findings == ABNORMALITIES and all(names_patient(str(name)) for name in rows.names):
        return ("Reference standard: labels as they were given. CT-RATE's own were taken from radiology reports by a "
                "text classifier, which on 142 scans labelled by hand made 16 false positives and 13 false negatives "
                "in 520 (as published).")
    return "Reference standard: labels as they were given; how they came about is for who made them to state."


def _for_scale(predictions: VolumeTable, settings: Settings) -> Settings:
    """`settings`, with which a table that says that it is calibrated, or mapped, is not calibrated again. Raises
    EvaluationError where they ask for that."""
    if predictions.scale == UNCALIBRATED:
        return settings
    if settings.calibration not in ("auto", "none") or settings.prevalence is not None:
        raise measure.EvaluationError(
            f"{predictions.source}: found predictions that are {predictions.scale}, expected uncalibrated ones for "
            "--calibration and --prevalence; predict with --uncalibrated, or leave these flags out"
        )
    return replace(settings, calibration="none")


def _check_tuning_scale(predictions: VolumeTable, tuning: VolumeTable) -> None:
    """Raises EvaluationError where thresholds would be fitted on another scale than they are used on."""
    if tuning.scale != predictions.scale:
        raise measure.EvaluationError(
            f"{tuning.source}: found tuning predictions that are {tuning.scale}, expected {predictions.scale} as in "
            f"{predictions.source}; predict both with --uncalibrated"
        )


def _measured(
    rows: Rows, fitted: FittedThresholds, scores: Mapping[str, Scores], resamples: measure.Resamples,
    settings: Settings,
) -> dict[str, Any]:
    """What metrics.json says of the rows themselves, whatever they are compared with."""
    y, p = rows.labels, rows.probabilities
    sweep = measure.threshold_sweep(y, p, TABLE_THRESHOLDS)
    calibration, calibration_intervals, brier_intervals = _calibration(rows, fitted, resamples)
    per_label, label_intervals = _per_label(rows, fitted, scores)
    return {
        **{name: score.summary for name, score in scores.items()},
        "calibration": calibration,
        "per_label": per_label,
        "thresholds": _thresholds(fitted),
        "optimism": _optimism(rows, scores, settings),
        "undefined_auroc": measure.names_where(rows.findings, measure.lacks_a_class(y)),
        "rarely_called": {name: measure.names_where(rows.findings, score.rarely_called)
                          for name, score in scores.items()},
        "unknown_labels": {"decisions": int((y == UNKNOWN).sum()), "volumes": rows.unlabelled},
        "unit": {"name": rows.unit, "how": UNITS[rows.unit], "conflicting_labels": rows.conflicts},
        "n_rows": len(rows),
        "n_volumes": rows.n_volumes,
        "n_patients": rows.n_patients,
        "left_out": rows.skipped | fitted.skipped,
        "probabilities": {name: float(getattr(p, name)()) for name in ("min", "max", "mean")},
        "threshold_table": [{"threshold": float(threshold)} | {key: float(sweep[key][i, 0]) for key in TABLE_METRICS}
                            for i, threshold in enumerate(TABLE_THRESHOLDS)],
        "intervals": {
            **{name: score.intervals for name, score in scores.items()},
            "calibration": calibration_intervals,
            "per_label": {name: intervals | brier_intervals[name] for name, intervals in label_intervals.items()},
        },
    }


def _per_label(rows: Rows, fitted: FittedThresholds, scores: Mapping[str, Scores]) -> tuple[dict, dict]:
    """({label: its metrics}, {label: their intervals}); what depends on thresholds is repeated at 0.5."""
    half = scores["at_0.5"].columns
    metrics = measure.per_label_metrics(rows.labels, rows.probabilities, fitted.thresholds, rows.findings)
    intervals, half_intervals = (
        bootstrap.label_intervals(scores[name].columns, rows.findings) for name in ("tuned", "at_0.5")
    )
    calibrated_thresholds = np.median(np.broadcast_to(fitted.calibrated_thresholds, rows.labels.shape), axis=0)
    for j, name in enumerate(rows.findings):
        metrics[name]["threshold_calibrated"] = float(calibrated_thresholds[j])
        metrics[name]["at_0.5"] = measure.plain({key: column[:, j] for key, column in half.items()})
        intervals[name]["at_0.5"] = half_intervals[name]
    return metrics, intervals


def _thresholds(fitted: FittedThresholds) -> dict[str, Any]:
    """Those for new patients, on the uncalibrated and on the calibrated scale."""
    stored = fitted.calibration
    return {
        "global": stored.global_threshold,
        "per_label": dict(zip(stored.findings, stored.thresholds.tolist(), strict=True)),
        "per_label_calibrated": dict(zip(stored.findings, stored.calibrated_thresholds.tolist(), strict=True)),
        "objective": stored.objective,
        "fitted_on": fitted.fitted_on,
        "n_rows": stored.n_rows,
        "n_volumes": fitted.n_volumes,
        "n_patients": stored.n_patients,
        "took_global": fitted.used_global_threshold,
    }


def _stated_ids(
    inputs: EvaluationInputs, of: Mapping[str, VolumeTable], metadata: Mapping[str, Mapping[str, str]] | None
) -> StatedIds:
    """What all tables together state of the patients and scans of all volumes, those of tuning patients too."""
    every = (*of.values(), *(inputs.tuning or ()))
    columns = {column: [row[column] for row in metadata.values()] for column in ID_COLUMNS
               if all(column in row for row in metadata.values())} if metadata else {}
    sources = [*((table.source, table.ids) for table in every), ("--patients", inputs.patients)]
    if columns:
        sources.append(("the metadata table", stated_ids(metadata or (), columns, "the metadata table")))
    firsts = of["predictions"].frame.index, *(table.frame.index for table in (inputs.tuning or ())[:1])
    return merge_ids(sources, (name for index in firsts for name in index))


def score_decisions(
    rows: Rows, fitted: FittedThresholds, resamples: measure.Resamples, ranked_before: tuple[dict, dict] | None = None
) -> dict[str, Scores]:
    """Scores of four ways to decide: at 0.5, calibrated at 0.5, tuned per label, tuned globally. `ranked_before`: these
    rows' resampled_ranking, where it is known."""
    y, p, calibrated = rows.labels, rows.probabilities, fitted.calibrated
    ranking, columns = ranked_before or measure.resampled_ranking(y, p, resamples)
    ranked = {key: columns[key].copy() for key in ("auroc", "average_precision")}
    # A monotone map leaves each label's AUROC alone; only the pooled one changes. (Cross-fitted columns are made of
    # five maps, so their own AUROC would differ a little, and would be of no map that anyone applies.)
    recalibrated = ranking | {"auroc_micro": measure.pooled_auroc(y, calibrated, resamples)}
    few = ~bootstrap.enough_cases(y, rows.patients)

    def scores(ranking: Mapping, decisions: np.ndarray, ranked: Mapping | None = None) -> Scores:
        sums = resamples.sums(measure.confusion_counts(y, decisions))
        values, columns = measure.metrics_from_counts(sums)
        columns |= ranked or {}
        rarely = bootstrap.called_patients(y, decisions, resamples) < bootstrap.MIN_CASES
        for keys, too_few in ((NEED_CASES, few), (NEED_CALLED, rarely)):
            for key in columns.keys() & keys:
                columns[key][1:, too_few] = np.nan
        left_out = bootstrap.left_out_decisions(y, decisions, resamples)
        return Scores({**ranking, **values}, columns, left_out, sums, rarely)

    decided = {
        "at_0.5": scores(ranking, p >= 0.5),
        "calibrated": scores(recalibrated, calibrated >= 0.5),
        "tuned": scores(ranking, p >= fitted.thresholds, ranked),  # AUROC per label is reported once, here
        "tuned_global": scores(ranking, p >= fitted.global_thresholds),
    }
    if fitted.fitted_on == CROSS_FITTED:  # maps follow the other reported patients: 89 % instead of 95 (LOG.md)
        for key in ("precision_macro", "recall_macro", "f1_macro"):
            decided["calibrated"].left_out[key][:] = np.nan
    return decided


def _calibration(rows: Rows, fitted: FittedThresholds, resamples: measure.Resamples) -> tuple[dict, dict, dict]:
    """(metrics.json's "calibration": errors "before" (uncalibrated) and "after"; their intervals; those per label)."""
    calibration = fitted.calibration
    intervals, columns = {}, {}
    per_label = {name: {key: row[key] for key in ("slope", "intercept", "shift")}
                 for name, row in calibration.content()["per_label"].items()}
    content: dict[str, Any] = {}
    for when, values in (("before", rows.probabilities), ("after", fitted.calibrated)):
        errors = measure.calibration_columns(rows.labels, values)
        content[when] = {key: float(measure.nanmean(column)) for key, column in errors.items()}
        known = rows.labels != UNKNOWN
        content[when]["ece_if_calibrated"] = bootstrap.ece_if_calibrated(values, known, resamples.group)
        for j, row in enumerate(per_label.values()):
            row |= measure.plain({f"{key}_{when}": column[[j]] for key, column in errors.items()})
        columns[f"brier_{when}"] = brier = bootstrap.resampled_brier(rows.labels, values, resamples)
        intervals[when] = {"brier": bootstrap.interval(measure.nanmean(brier))}
    content |= {"method": calibration.method, "cross_validated_log_loss": dict(calibration.losses),
                "per_label": per_label}
    return content, intervals, bootstrap.label_intervals(columns, rows.findings)


def _optimism(rows: Rows, scores: Mapping[str, Scores], settings: Settings) -> dict:
    """Held-out metrics ("honest") beside apparent ones ("claimed"): thresholds searched on the reported patients."""
    y, p, result = rows.labels, rows.probabilities, {}
    for name, tune in (("tuned", thresholds.tune_label_thresholds), ("tuned_global", thresholds.tune_global_threshold)):
        wanted = rates_asked_for(settings.prevalence, rows.findings)
        apparent = measure.decision_metrics(y, p >= tune(y, p, settings.objective, wanted))
        held_out = scores[name].summary
        result[name] = {"claimed": {key: apparent[key] for key in OPTIMISM_METRICS},
                        "honest": {key: held_out[key] for key in OPTIMISM_METRICS}}
    return result


def _members(inputs: EvaluationInputs, settings: Settings, ids: StatedIds) -> dict[str, Any]:
    """Every member evaluated alone as the ensemble is, without intervals; the mean and the spread of all."""
    members, settings = list[dict](), replace(settings, calibration="none")  # thresholds do not depend on it
    for member in inputs.members:
        of = {"predictions": member.predictions, "labels": member.labels}
        of = tables.joined({what: table.select(inputs.labels.findings) for what, table in of.items()})
        volumes, _ = tables.common_volumes(of, allow_partial=True)  # pooled members have a part of the labels
        rows = tables.rows_of(of["predictions"].frame, of["labels"].frame, volumes, settings.unit, ids=ids)
        scores = score_decisions(rows, fit_thresholds(rows, member.tuning, settings), measure.drawn_once(rows.labels))
        found = {key: scores[name].summary[key] for name, key in COMPARED_WITH_MEMBERS}
        members.append({"n_volumes": rows.n_volumes, "n_patients": rows.n_patients, **found})
    return {"members": members} | {key: mean_and_spread([member[key] for member in members])
                                   for _, key in COMPARED_WITH_MEMBERS}


def _comparison(this: Mapping[str, Scores], other: Mapping[str, Scores], findings: Sequence[str]) -> dict:
    """Every difference (this - baseline) on the same draws of patients. Those of calibrated probabilities have no
    interval and no p-value: maps are fitted to each prediction, and stay fixed in the resamples, so that equally good
    predictions would differ too often."""
    theirs = other["tuned"].columns
    differences = {
        name: {key: this[name].difference(other[name], key) if name != "calibrated"
               else bootstrap.without_test(values[0] - other[name].values[key][0])
               for key, values in this[name].values.items()}
        for name in COMPARED
    }
    # one family: what the report shows in one table; AUROCs need no threshold, and stand there once
    tested = [row for name in ("at_0.5", "tuned") for key, row in differences[name].items()
              if key != "label_rate" and not (name == "tuned" and key.startswith("auroc"))]
    for row, p in zip(tested, bootstrap.holm([row["p"] for row in tested]), strict=True):
        row["p_corrected"] = p
    differences["per_label"] = {key: bootstrap.label_differences(column - theirs[key], findings)
                                for key, column in this["tuned"].columns.items() if key != "label_rate"}
    auroc = {name: theirs["auroc"][:, j] for j, name in enumerate(findings)}
    return {
        "fitted_on": CROSS_FITTED,
        **{name: other[name].summary for name in COMPARED},
        "this": {name: this[name].summary for name in COMPARED},
        "auroc_per_label": measure.plain(auroc),
        "differences": differences,
    }


def success_criteria(metrics: dict) -> list[dict]:
    """[{criterion, figure, passed}] from an evaluation's metrics."""
    half, tuned = metrics["at_0.5"], metrics["tuned"]
    both = (("tuned", tuned), ("at 0.5", half))
    published = {f" ({name} on CT-RATE, as published)": goal for name, goal in PUBLISHED_AUROC.items()}
    if metrics["note"] or tuple(metrics["per_label"]) != ABNORMALITIES:
        published = {}
    goals = {"": PHANTOM_AUROC} if metrics["phantom"] else published
    auroc, hamming, all_negative = half["auroc_macro"], tuned["hamming_accuracy"], 1 - half["label_rate"]
    rows = [
        *((f"Positive rate within {100 * RATE_TOLERANCE:.0f} points of the label rate, {name}",
           f"{percent(m['positive_rate'])} against {percent(m['label_rate'])}",
           abs(m["positive_rate"] - m["label_rate"]) <= RATE_TOLERANCE + 1e-12) for name, m in both),
        *((f"Macro AUROC >= {goal:g}{whose}", decimal(auroc), auroc is not None and auroc >= goal)
          for whose, goal in goals.items()),
        ("Hamming accuracy above the all-negative predictor's, tuned", f"{hamming:.4f} against {all_negative:.4f}",
         hamming > all_negative),
        *((f"Not degenerate (positive rate 1 % to 90 %), {name}", percent(m["positive_rate"]),
           0.01 <= m["positive_rate"] <= 0.9) for name, m in both),
    ]
    return [{"criterion": criterion, "figure": figure, "passed": bool(passed)} for criterion, figure, passed in rows]


def write_tables(output_dir: str | Path, evaluation: Evaluation) -> None:
    """RESULT_FILES but the page and the figures, of which earlier ones go, and predictions.csv; each file is replaced
    whole or not at all, and none that is the user's (`run_folder.writing`)."""
    folder = make_folder(output_dir, ELSEWHERE)
    metrics, rows, fitted, inputs = evaluation.metrics, evaluation.rows, evaluation.fitted, evaluation.inputs
    own, given = folder / "predictions.csv", inputs.predictions.frame
    kept = _holds(own, given)  # a run's own file stays as it was written, with its other columns
    with writing(folder, *RESULT_FILES, *([] if kept else [own.name])):
        with replacing(folder / "metrics.json") as path:
            path.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        with replacing(folder / REPORT_TEXT) as path:
            path.write_text(render.format_report(metrics) + "\n", encoding="utf-8", newline="\n")
        if not kept:
            with replacing(own) as path:
                given.to_csv(path)
        with replacing(folder / "per_label.csv") as path:
            _per_label_frame(metrics).to_csv(path, index_label="label")
        fitted.calibration.save(folder / CALIBRATION_FILE)
        for name in (*APPLIED_FILES, *PICTURES):
            (folder / name).unlink(missing_ok=True)
        if fitted.fitted_on == TUNING:  # cross-fitted columns are made of five maps: no file that anyone could compare
            write_calibrated(folder, fitted.calibration, rows)


def write_pictures(output_dir: str | Path, evaluation: Evaluation, cases: Sequence[Case]) -> None:
    """The figures, the curves of training and the page, after `write_tables`: whatever fails while drawing, the tables
    are there."""
    folder, metrics, rows, inputs = Path(output_dir), evaluation.metrics, evaluation.rows, evaluation.inputs
    arrays = rows.labels, rows.probabilities, evaluation.fitted.calibrated
    with writing(folder, *PICTURES, *([figures.TRAINING_CURVES] if inputs.history else [])):
        figures.write_figures(folder, metrics, *arrays, report.figure_captions(metrics), inputs.history)
        render.write_page(folder / PAGE, metrics, *arrays, inputs.history, inputs.record, cases)


def write_calibrated(folder: Path, calibration: Calibration, rows: Rows) -> None:
    """APPLIED_FILES: the probabilities calibrated, and rescaled so that 0.5 decides as the tuned thresholds do."""
    calibrated, mapped = calibration.apply(rows.probabilities), calibration.rescale_to_half(rows.probabilities)
    for name, values, scale in zip(APPLIED_FILES, (calibrated, mapped), (calibration.calibrated_scale, MAPPED),
                                   strict=True):
        tables.write_table(folder / name, rows.names, values, rows.row_ids, calibration.findings, scale)


def _holds(path: Path, predictions: pd.DataFrame) -> bool:
    try:
        return path.is_file() and tables.load_predictions(path).equals(predictions)
    except measure.EvaluationError:
        return False


def _per_label_frame(metrics: dict) -> pd.DataFrame:
    rows = {}
    for name, row in metrics["per_label"].items():
        bounds = metrics["intervals"]["per_label"][name]["auroc"] or (None, None)
        rows[name] = {
            **{key: value for key, value in row.items() if key != "at_0.5"},
            "auroc_low": bounds[0], "auroc_high": bounds[1],
            **{f"{key}_at_0.5": value for key, value in row["at_0.5"].items()},
            **metrics["calibration"]["per_label"][name],
        }
    return pd.DataFrame.from_dict(rows, orient="index")
