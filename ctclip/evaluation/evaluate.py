"""Predictions and labels -> metrics, calibration, thresholds, intervals, a report.

What is promised, for every number this project prints:
- Thresholds and calibration never see the patients they are reported on: they come from tuning patients, or, without
  any, each fifth of the patients is judged by what was fitted on the other four ("cross-fitted by patient").
- Intervals are of patients, not volumes (bootstrap.py); each metric is defined in one place (metrics.py).
- `format_report` needs nothing but the dictionary written to metrics.json, so what is printed is what is stored.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip import __version__
from ctclip.config import CALIBRATION_FILE, SYNTHETIC_NOTE, UNITS, Settings, given_evaluation_flags
from ctclip.evaluation.bootstrap import (
    Resamples,
    by_label,
    compare,
    compare_labels,
    draw,
    ece_if_calibrated,
    enough_cases,
    intervals,
    resampled_brier,
    resampled_decisions,
    resampled_ranking,
)
from ctclip.evaluation.calibration import Calibration, cross_folds, fit_calibration, load_calibration, read_prevalence
from ctclip.evaluation.cases import Case, with_pictures, worst_cases
from ctclip.evaluation.example import EXAMPLE_NOTE, write_example
from ctclip.evaluation.figures import (
    TRAINING_CURVES,
    precision_recall_figure,
    rate_figure,
    reliability_figure,
    roc_figure,
    sweep_figure,
    training_figure,
    write_figure,
)
from ctclip.evaluation.html_report import write_page
from ctclip.evaluation.metrics import (
    EvaluationError,
    calibration_columns,
    compute_metrics,
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
from ctclip.evaluation.results import CROSS_FITTED, TUNING, Evaluation, EvaluationInputs, FittedThresholds
from ctclip.evaluation.run_folder import (
    foreign_folder,
    make_folder,
    newest_run,
    refuse_run_folder,
    run_inputs,
    run_metadata,
    run_record,
)
from ctclip.evaluation.subgroups import groups_of, subgroup_metrics
from ctclip.evaluation.tables import (
    Rows,
    count_unnamed,
    join,
    load_labels,
    load_predictions,
    refuse_overlap,
    row_keys,
    rows_of,
    source_of,
    tuning_rows,
    write_table,
)
from ctclip.evaluation.text_report import decimal, format_report, percent
from ctclip.evaluation.thresholds import objective_score, rescale_to_half, tune_global_threshold, tune_label_thresholds
from ctclip.fileio import replacing
from ctclip_model import ABNORMALITIES, CheckpointError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [  # for scripts of your own; the rest of this file is the command
    "EvaluationError", "Settings", "compute_metrics", "evaluate", "fit_calibration", "format_report",
    "load_calibration", "load_labels", "load_predictions", "rescale_to_half", "per_label_metrics",
]

NEED_CASES = ("auroc", "average_precision", "precision", "recall", "f1")  # no interval without enough cases
RESAMPLES_BETWEEN = 100, 10_000  # fewer say nothing, more need more memory than they are worth
RATE_TOLERANCE = 0.05  # positive rate against label rate, in fractions of all decisions
PHANTOM_AUROC = 0.85  # what the built-in cohort must reach
PUBLISHED_AUROC = {"CT-CLIP zero-shot": 0.731, "CT-CLIP ClassFine": 0.756}  # macro, CT-RATE valid, as published


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    predictions: pd.DataFrame,
    labels: pd.DataFrame,
    tuning: tuple[pd.DataFrame, pd.DataFrame] | None = None,
    baseline: pd.DataFrame | None = None,
    output_dir: str | Path | None = None,
    history: list[dict] | None = None,
    phantom: bool = False,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    **settings,
) -> dict:
    """Everything format_report prints and metrics.json holds; with `output_dir` also writes the files and figures.

    Frames are those of load_predictions and load_labels. `tuning` is (predictions, labels) of patients who do not
    occur in `predictions`; without it everything fitted is cross-fitted by patient. `baseline` holds other predictions
    for the same volumes. `history` is log.jsonl's list of epochs. `metadata` is {volume: row of text cells}, for
    subgroups. `settings` are those of Settings.
    """
    inputs = EvaluationInputs(predictions, labels, tuning, history, phantom)
    evaluation = evaluate_tables(inputs, Settings(**settings), baseline, metadata)
    if output_dir is not None:
        write_results(output_dir, evaluation, most_wrong(evaluation))
    return evaluation.metrics


def evaluate_tables(
    inputs: EvaluationInputs,
    settings: Settings,
    baseline: pd.DataFrame | None = None,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
) -> Evaluation:
    """`evaluate` before anything is written."""
    predictions, labels = inputs.predictions, inputs.labels
    tables = {"predictions": predictions, "labels": labels} | ({} if baseline is None else {"baseline": baseline})
    volumes, left_out = join(tables, settings.allow_partial)
    rows = rows_of(predictions, labels, volumes, settings.unit, left_out)
    fitted = fit_thresholds(rows, inputs.tuning, settings)
    resamples = draw(rows.patients, settings.resamples, settings.seed)
    measured = score(rows, fitted, resamples)
    metrics = measured.point | {
        "calibration": measured.point["calibration"] | _calibration_report(measured, fitted.calibration),
        "per_label": _per_label(rows, fitted, measured),
        "thresholds": _thresholds(fitted),
        "optimism": _optimism(rows, measured, settings),
        "undefined_auroc": undefined_labels(rows.labels),
        "unit": {"name": rows.unit, "how": UNITS[rows.unit], "conflicting_labels": rows.conflicts},
        "n_rows": len(rows),
        "n_volumes": rows.n_volumes,
        "n_patients": rows.n_patients,
        "volumes_without_patient": count_unnamed(volumes),
        "left_out": rows.left_out | fitted.skipped,
        "probabilities": {name: float(getattr(rows.probabilities, name)()) for name in ("min", "max", "mean")},
        "threshold_table": threshold_table(rows.labels, rows.probabilities),
        "intervals": intervals(measured.tree) | {"per_label": _label_intervals(measured.column_tree)},
        "subgroups": None,
        "baseline": None,
        "phantom": inputs.phantom,
        "note": SYNTHETIC_NOTE if inputs.phantom else inputs.note,
        "settings": asdict(settings),
        "versions": {"ctclip": __version__, "python": platform.python_version(), "numpy": np.__version__},
    }
    if metadata is not None:
        tuned = rows.probabilities >= fitted.thresholds
        metrics["subgroups"] = subgroup_metrics(rows, tuned, _row_groups(rows, volumes, metadata), resamples)
    if baseline is not None:
        others = rows_of(baseline, labels, volumes, settings.unit)
        alike = measured if inputs.tuning is None else score(rows, fit_thresholds(rows, None, settings), resamples)
        theirs = score(others, fit_thresholds(others, None, settings), resamples)
        metrics["baseline"] = {"source": source_of(baseline)} | _comparison(alike, theirs)
    metrics["success_criteria"] = success_criteria(metrics)
    return Evaluation(metrics, rows, fitted, inputs)


def fit_thresholds(
    rows: Rows, tuning: tuple[pd.DataFrame, pd.DataFrame] | None, settings: Settings
) -> FittedThresholds:
    """Calibration and thresholds from tuning patients, or cross-fitted by patient where there are none."""
    fitted, fitted_on = rows, CROSS_FITTED
    if tuning is not None:
        fitted, fitted_on = tuning_rows(tuning, settings.unit, settings.allow_partial), TUNING
        refuse_overlap(rows.patients, fitted.patients, source_of(tuning[0]))

    def fit(chosen: np.ndarray | slice) -> Calibration:
        return fit_calibration(fitted.labels[chosen], fitted.probabilities[chosen], fitted.patients[chosen],
                               settings.calibration, settings.objective, settings.prevalence, settings.unit)

    def judged_by(fitted: Calibration, own: np.ndarray | slice) -> tuple:
        one = np.array(fitted.global_threshold)
        return fitted.apply(rows.probabilities[own]), fitted.thresholds, fitted.calibrated_thresholds, one

    calibration, took_global = fit(slice(None)), set(undefined_labels(fitted.labels))
    if tuning is not None:
        judged = judged_by(calibration, slice(None))
    else:
        judged = tuple(np.empty(rows.labels.shape) for _ in range(4))
        for others, own in cross_folds(rows.patients):
            took_global |= set(undefined_labels(rows.labels[others]))
            for values, of_fold in zip(judged, judged_by(fit(others), own), strict=True):
                values[own] = of_fold
    named = [name for name in ABNORMALITIES if name in took_global]
    return FittedThresholds(calibration, fitted_on, fitted.n_volumes, named, fitted.left_out, *judged)


@dataclass(frozen=True)
class Scores:
    """Metrics of one table: `point` {set: M, "calibration": errors}, `tree` the same in every resample, (B,) each;
    `columns` {set: {metric: (18,)}} and `column_tree` the same with (B, 18), NaN where cases are too few to say."""

    point: dict
    tree: dict
    columns: dict
    column_tree: dict


def score(rows: Rows, fitted: FittedThresholds, resamples: Resamples) -> Scores:
    """Everything that has an interval, for four ways to decide: at 0.5, calibrated at 0.5, tuned, tuned globally."""
    y, p, q = rows.labels, rows.probabilities, fitted.calibrated
    auroc, average_precision = ranking_columns(y, p)
    ranking = ranking_metrics(y, p)
    ranking_in, ranked_in = resampled_ranking(y, p, resamples)
    measured = Scores({}, {}, {}, {})
    for name, decided in (
        ("at_0.5", p >= 0.5),
        ("calibrated", q >= 0.5),
        ("tuned", p >= fitted.thresholds),
        ("tuned_global", p >= fitted.global_thresholds),
    ):
        summary_in, measured.column_tree[name] = resampled_decisions(y, decided, resamples)
        measured.columns[name] = decision_columns(y, decided)
        measured.point[name] = ranking | decision_metrics(y, decided)
        measured.tree[name] = ranking_in | summary_in
    # A monotone map leaves each label's AUROC alone; only the pooled one moves. (Cross-fitted columns are made of five
    # maps, so their own AUROC would differ a little, and would be of no map that anyone applies.)
    measured.point["calibrated"]["auroc_micro"] = none_if_nan(pooled_auroc(y, q)[0])
    measured.tree["calibrated"]["auroc_micro"] = pooled_auroc(y, q, resamples.group, resamples.counts)
    measured.columns["tuned"] |= {"auroc": auroc, "average_precision": average_precision}
    measured.column_tree["tuned"] |= ranked_in
    enough = enough_cases(y, rows.patients)
    for columns in measured.column_tree.values():
        columns |= {key: np.where(enough, columns[key], np.nan) for key in NEED_CASES if key in columns}
    _measure_calibration(measured, rows, fitted, resamples)
    return measured


def _measure_calibration(measured: Scores, rows: Rows, fitted: FittedThresholds, resamples: Resamples) -> None:
    """Adds "calibration": errors as given ("before") and calibrated ("after")."""
    point, tree, columns, column_tree = {}, {}, {}, {}
    for when, values in (("before", rows.probabilities), ("after", fitted.calibrated)):
        errors, brier_in = calibration_columns(rows.labels, values), resampled_brier(rows.labels, values, resamples)
        point[when] = {key: float(column.mean()) for key, column in errors.items()}
        point[when]["ece_if_calibrated"] = ece_if_calibrated(values, resamples.group)
        tree[when] = {"brier": brier_in.mean(axis=1)}
        columns |= {f"{key}_{when}": column for key, column in errors.items()}
        column_tree[f"brier_{when}"] = brier_in
    for whole, part in ((measured.point, point), (measured.tree, tree), (measured.columns, columns),
                        (measured.column_tree, column_tree)):
        whole["calibration"] = part


def _calibration_report(measured: Scores, calibration: Calibration) -> dict:
    """What metrics.json holds under "calibration", beside the errors before and after."""
    columns = {"slope": calibration.slope, "intercept": calibration.intercept, "shift": calibration.shift}
    columns |= measured.columns["calibration"]
    return {
        "method": calibration.method,
        "cross_validated_log_loss": dict(calibration.losses),
        "per_label": {
            name: {key: float(column[j]) for key, column in columns.items()} for j, name in enumerate(ABNORMALITIES)
        },
    }


def _per_label(rows: Rows, fitted: FittedThresholds, measured: Scores) -> dict:
    """Per-label metrics at the tuned cuts, with those that depend on the cut repeated at 0.5 under "at_0.5"."""
    table = per_label_metrics(rows.labels, rows.probabilities, fitted.thresholds)
    for j, row in enumerate(table.values()):
        row["at_0.5"] = {key: float(column[j]) for key, column in measured.columns["at_0.5"].items()}
    return table


def _label_intervals(column_tree: Mapping) -> dict:
    """{label: {metric: interval, Brier score before and after: interval, "at_0.5": {metric: interval}}}."""
    tuned, half, errors = (by_label(intervals(column_tree[name])) for name in ("tuned", "at_0.5", "calibration"))
    return {name: row | errors[name] | {"at_0.5": half[name]} for name, row in tuned.items()}


def _thresholds(fitted: FittedThresholds) -> dict:
    """What metrics.json holds under "thresholds": cuts for new patients, on probabilities as given, and calibrated."""
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


def _optimism(rows: Rows, measured: Scores, settings: Settings) -> dict:
    """What the same search on the reported patients would have claimed, beside what the honest cuts gave."""
    y, p = rows.labels, rows.probabilities
    keys = ("positive_rate", "hamming_accuracy", "f1_macro", "recall_macro", "crg")
    result = {}
    for name, tune in (("tuned", tune_label_thresholds), ("tuned_global", tune_global_threshold)):
        claimed = decision_metrics(y, p >= tune(y, p, settings.objective, settings.prevalence))
        honest = measured.point[name]
        result[name] = {"claimed": {key: claimed[key] for key in keys}, "honest": {key: honest[key] for key in keys}}
    return result


def _row_groups(
    rows: Rows, volumes: Sequence[str], metadata: Mapping[str, Mapping[str, str]]
) -> list[dict[str, str]]:
    """Attributes of each row; a row whose volumes differ in one is in the group "several"."""
    merged: dict[str, dict[str, str]] = {}
    for key, groups in zip(row_keys(volumes, rows.unit), groups_of(volumes, metadata), strict=True):
        known = merged.setdefault(key, dict(groups))
        for attribute, group in groups.items():
            if known[attribute] != group:
                known[attribute] = "several"
    return [merged[str(name)] for name in rows.names]


def _comparison(this: Scores, other: Scores) -> dict:
    """Every difference (this - baseline) on the same draws of patients. The baseline has no tuning patients, so both
    are cross-fitted here, to be judged alike."""
    sets = ("at_0.5", "calibrated", "tuned")
    return {
        "fitted_on": CROSS_FITTED,
        **{name: other.point[name] for name in sets},
        "this": {name: this.point[name] for name in sets},
        "auroc_per_label": dict(zip(ABNORMALITIES, map(none_if_nan, other.columns["tuned"]["auroc"]), strict=True)),
        "differences": {
            name: compare(this.point[name], other.point[name], this.tree[name], other.tree[name]) for name in sets
        }
        | {
            "per_label": {
                key: compare_labels(
                    column, other.columns["tuned"][key],
                    this.column_tree["tuned"][key] - other.column_tree["tuned"][key],
                )
                for key, column in this.columns["tuned"].items()
                if key != "label_rate"
            }
        },
    }


def most_wrong(evaluation: Evaluation) -> list[Case]:
    """The cases that the tuned cuts got most wrong."""
    fitted = evaluation.fitted
    return worst_cases(evaluation.rows, fitted.calibrated, fitted.thresholds, fitted.calibrated_thresholds)


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


# ------------------------------------------------------------------------------------------------------------- files


# What an evaluation leaves in its folder. Training removes them when the weights that they belong to are replaced.
APPLIED_FILES = ("predictions_calibrated.csv", "predictions_mapped.csv")
PAGE = "report.html"
RESULT_FILES = ("metrics.json", "per_label.csv", CALIBRATION_FILE, PAGE, *APPLIED_FILES)


def write_results(output_dir: str | Path, evaluation: Evaluation, cases: Sequence[Case]) -> None:
    """RESULT_FILES, predictions.csv and the figures; each file is replaced whole or not at all."""
    folder = make_folder(output_dir)
    _write_tables(folder, evaluation)
    _write_figures(folder, evaluation)
    write_page(folder / PAGE, evaluation, evaluation.inputs.history, evaluation.inputs.record, cases)


def _write_tables(folder: Path, evaluation: Evaluation) -> None:
    metrics, rows, fitted = evaluation.metrics, evaluation.rows, evaluation.fitted
    with replacing(folder / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    own, given = folder / "predictions.csv", evaluation.inputs.predictions
    if own.resolve() != Path(source_of(given)).resolve():  # a run's own file stays as it was written
        with replacing(own) as path:
            given[list(ABNORMALITIES)].to_csv(path)
    with replacing(folder / "per_label.csv") as path:
        _per_label_frame(metrics).to_csv(path)
    fitted.calibration.save(folder / CALIBRATION_FILE)
    for name in APPLIED_FILES:
        (folder / name).unlink(missing_ok=True)
    if fitted.fitted_on == TUNING:  # cross-fitted columns are made of five maps: no file that anyone could compare
        _write_applied(folder, fitted.calibration, rows.names, rows.probabilities)


def _write_applied(folder: Path, calibration: Calibration, names: Sequence[str], probabilities: np.ndarray) -> None:
    for name, values in zip(
        APPLIED_FILES, (calibration.apply(probabilities), calibration.rescale_to_half(probabilities)), strict=True
    ):
        write_table(folder / name, names, values)


def _write_figures(folder: Path, evaluation: Evaluation) -> None:
    """The page's figures, for notebooks."""
    history, metrics = evaluation.inputs.history, evaluation.metrics
    y, p = evaluation.rows.labels, evaluation.rows.probabilities
    figures = {
        "roc.png": roc_figure(y, p),
        "precision_recall.png": precision_recall_figure(y, p),
        "reliability.png": reliability_figure(y, p, evaluation.fitted.calibrated),
        "threshold_sweep.png": sweep_figure(y, p, metrics),
        "positive_rate.png": rate_figure(metrics),
    }
    if history:
        figures[TRAINING_CURVES] = training_figure(history)
    for name, figure in figures.items():
        write_figure(figure, folder / name, metrics["note"])


def _per_label_frame(metrics: dict) -> pd.DataFrame:
    import pandas as pd

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


# ------------------------------------------------------------------------------------------------------------ script


def report(
    inputs: EvaluationInputs,
    output_dir: Path,
    settings: Settings | None = None,
    baseline: str | None = None,
    metadata: str | None = None,
    pictures: int = 1,
) -> dict:
    """Evaluates, prints the blocks, writes the files; for scripts. Returns what metrics.json holds.

    `baseline` and `metadata` are files; `pictures` says how many of the most wrongly called volumes of each label and
    kind are shown as slices on the page.
    """
    from ctclip.data.preprocessing import CohortError, read_metadata

    other = load_predictions(baseline) if baseline else None
    known = read_metadata(metadata) if metadata else run_metadata(inputs.data_dir)
    if metadata and not set(known) & set(inputs.predictions.index):
        raise EvaluationError(f"{metadata}: found no row for any of the {len(inputs.predictions)} volumes, expected "
                              "rows named as they are; check VolumeName")
    evaluation = evaluate_tables(inputs, settings or Settings(), other, known)
    print(format_report(evaluation.metrics))
    cases, unseen = most_wrong(evaluation), []
    if inputs.data_dir is not None and pictures:
        try:
            cases, unseen = with_pictures(cases, evaluation.rows.unit, inputs.data_dir, pictures)
        except CohortError as error:  # the volumes may be elsewhere; the figures need none of them
            unseen = [("any volume", str(error))]
    write_results(output_dir, evaluation, cases)
    print(f"\nWrote {output_dir}: {PAGE}, metrics.json, tables (*.csv), {CALIBRATION_FILE}, figures (*.png)")
    for name, reason in unseen:
        print(f"No picture of {name}: {reason}")
    return evaluation.metrics


def apply_calibration(source: str, predictions: str, output_dir: Path) -> None:
    """`--apply`: other predictions, calibrated and with the tuned cuts on 0.5, as two tables in `output_dir`."""
    path = Path(source)
    calibration = load_calibration(path / CALIBRATION_FILE if path.is_dir() else path)
    frame = load_predictions(predictions)
    rows = rows_of(frame, None, list(frame.index), calibration.unit)
    refuse_run_folder(make_folder(output_dir))
    _write_applied(output_dir, calibration, rows.names, rows.probabilities)
    positive = (rows.probabilities >= calibration.thresholds).mean()
    print(f"{len(rows):,} {rows.unit}s; calibration {calibration.method}, thresholds for {calibration.objective}: "
          f"positive rate {percent((rows.probabilities >= 0.5).mean())} at 0.5 as given, {percent(positive)} now")
    print(f"Wrote {output_dir}: {APPLIED_FILES[0]} (probabilities), {APPLIED_FILES[1]} (tuned cuts at 0.5)")


def run(args: argparse.Namespace) -> int:
    """What the flags of ctclip_evaluation.py ask for; -> the exit code."""
    started = time.perf_counter()
    from ctclip.data.preprocessing import CohortError

    try:
        _refuse_idle_flags(args)
        if args.apply:
            apply_calibration(args.apply, args.predictions, Path(args.output_dir or Path("results", "applied")))
            return 0
        settings = settings_from_flags(args)
        report(*_inputs(args), settings, args.baseline, args.metadata, args.pictures)
    except (EvaluationError, CheckpointError, CohortError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Each file is whole, old or new; the same command starts again.", file=sys.stderr)
        return 130
    print(f"Evaluation took {time.perf_counter() - started:.1f} s")
    return 0


def _refuse_idle_flags(args: argparse.Namespace) -> None:
    """Flags that contradict each other, or that the chosen source would not look at."""
    tables = {"--predictions": args.predictions, "--labels": args.labels,
              "--tuning-predictions": args.tuning_predictions, "--tuning-labels": args.tuning_labels}
    given = [flag for flag, value in tables.items() if value]
    reading = [flag for flag, value in (("--device", args.device), ("--workers", args.workers)) if value is not None]
    if args.apply:
        idle = [flag for flag, value in (("--checkpoint", args.checkpoint), ("--example", args.example),
                                         ("--data-dir", args.data_dir)) if value]
        if given != ["--predictions"] or idle or reading or given_evaluation_flags(args):
            found = ", ".join([*given[1:], *idle, *reading, *given_evaluation_flags(args)]) or "no --predictions"
            raise EvaluationError(f"found --apply with {found}, expected --predictions CSV with it and no other table "
                                  "or setting; correct it")
        return
    if (args.checkpoint or args.example) and given:
        flag = "--checkpoint" if args.checkpoint else "--example"
        raise EvaluationError(f"found {flag} with {given[0]}, expected a run or tables; drop one of the two")
    for one, other in (("--predictions", "--labels"), ("--tuning-predictions", "--tuning-labels")):
        if bool(tables[one]) != bool(tables[other]):
            has, lacks = (one, other) if tables[one] else (other, one)
            raise EvaluationError(f"found {has} without {lacks}, expected both; add {lacks} FILE.csv")
    if args.tuning_predictions and not args.predictions:
        raise EvaluationError("found tuning tables only, expected --predictions and --labels too; add them")
    if reading and (given or args.example):
        raise EvaluationError(f"found {reading[0]} with tables, expected it with a run only; leave it out")


def _inputs(args: argparse.Namespace) -> tuple[EvaluationInputs, Path]:
    """(inputs, output folder) that the flags ask for."""
    if args.example:
        folder = make_folder(args.output_dir or Path("results", "example"))
        refuse_run_folder(folder)
        reported, tuning = write_example(folder)
        return EvaluationInputs(*reported, tuning=tuning, note=EXAMPLE_NOTE), folder
    if args.predictions:
        tuning = None
        if args.tuning_predictions:
            tuning = load_predictions(args.tuning_predictions), load_labels(args.tuning_labels)
        from ctclip.phantoms.cohort import is_phantom_cohort

        data_dir = Path(args.data_dir) if args.data_dir else None
        phantom = bool(run_record(Path(args.predictions).parent).get("phantom"))  # a run's tables stay what they are
        phantom = phantom or (data_dir is not None and is_phantom_cohort(data_dir))
        tables = load_predictions(args.predictions), load_labels(args.labels)
        folder = Path(args.output_dir or Path("results", "evaluation"))
        given = Path(args.predictions)
        refuse_run_folder(folder, given.parent if given.name == "predictions.csv" else None)
        return EvaluationInputs(*tables, tuning, phantom=phantom, data_dir=data_dir), folder
    run = Path(args.checkpoint) if args.checkpoint else newest_run()
    if not args.checkpoint:
        print(f"Evaluating the newest run, {run} (choose another with --checkpoint)")
    folder = Path(args.output_dir or foreign_folder(run, args.data_dir))
    refuse_run_folder(folder, None if args.data_dir else run)
    return run_inputs(run, args.data_dir, args.device, args.workers, folder), folder


def settings_from_flags(args: argparse.Namespace) -> Settings:
    """The Settings that add_evaluation_flags' flags ask for. What is wrong with a flag is said before any work."""
    objective_score(args.objective)
    low, high = RESAMPLES_BETWEEN
    if not low <= args.resamples <= high:
        raise EvaluationError(f"found --resamples {args.resamples}, expected {low} to {high:,}; 1000 are usual")
    if args.pictures < 0:
        raise EvaluationError(f"found --pictures {args.pictures}, expected 0 or more; 0 shows none")
    if args.baseline:
        load_predictions(args.baseline)
    if args.metadata:
        from ctclip.data.preprocessing import read_metadata

        read_metadata(args.metadata)
    return Settings(
        args.objective, args.calibration, args.unit, read_prevalence(args.prevalence) if args.prevalence else None,
        args.resamples, allow_partial=args.allow_partial,
    )
