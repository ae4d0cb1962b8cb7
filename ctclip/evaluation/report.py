"""An evaluation as a report: sections of tables, paragraphs and figures, made once. render.py writes them as text,
Markdown and HTML. All but the figures is made from what metrics.json holds, so what is shown is what is stored.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctclip.config import CALIBRATION_FILE
from ctclip.data.patients import own_patient_note
from ctclip.data.tables import UNCALIBRATED, some
from ctclip.evaluation import figures
from ctclip.evaluation.bootstrap import MIN_CASES
from ctclip.evaluation.calibration import CROSS_FITTED, TUNING, few_patients_note
from ctclip.evaluation.clinical import AT_LABEL_RATE
from ctclip.evaluation.metrics import threshold_sweep
from ctclip.evaluation.run_folder import REPORT_TEXT
from ctclip.evaluation.subgroups import MIN_PATIENTS
from ctclip.formatting import change_text, decimal, interval_text, metric_text, percent, plural
from ctclip_model import ABNORMALITIES

DECISIONS = (("sensitivity", "Sensitivity"), ("specificity", "Specificity"), ("ppv", "PPV"), ("npv", "NPV"))
SHOWN_NET_BENEFIT = "0.10", "0.20"  # threshold probabilities, of those in metrics.json
AT_SPECIFICITY = "sensitivity_at_specificity_"
ON_REPORTED = (  # calibration on the reported patients: key of metrics.json's "clinical", title
    ("calibration_slope_calibrated", "Slope"), ("calibration_intercept_calibrated", "Intercept"),
    ("calibration_in_the_large_calibrated", "In the large"), ("observed_expected_calibrated", "O/E"),
    ("observed_expected_uncalibrated", "O/E uncalibrated"),
)
AUROCS = (("AUROC macro", "auroc_macro"), ("AUROC micro", "auroc_micro"))
METRIC_ROWS = (  # of the dictionary M, in the order they are shown
    ("Positive rate", "positive_rate"), ("Label rate", "label_rate"), ("Hamming accuracy", "hamming_accuracy"),
    ("Exact match", "exact_match"), ("F1 macro", "f1_macro"), ("Precision macro", "precision_macro"),
    ("Recall macro", "recall_macro"), ("CRG", "crg"),
)
WHEN = ("before", "after")  # calibration
CRG_MEANING = (
    "the score of the challenge's report task: finding a positive earns, and missing it costs, the more the rarer "
    "positives are; a false alarm costs 1, a true negative earns nothing. 1 is perfect; calling all, none or random "
    "volumes positive gives 0.333"
)
FILES = (  # beside the page: names, what they hold
    (("metrics.json",), "every number of this page"),
    ((REPORT_TEXT,), "this page's tables as text"),
    (("per_label.csv",), "metrics and both thresholds of each label"),
    (("predictions.csv",), "probabilities as they were evaluated"),
    (("predictions_calibrated.csv",), "calibrated probabilities, for reading"),
    (("predictions_mapped.csv",), "rescaled so that 0.5 decides as the tuned thresholds do, for the challenge"),
    (("labels.csv",), "labels as they were evaluated"),
    ((CALIBRATION_FILE,), "calibration, and each label's threshold for uncalibrated and calibrated probabilities"),
    (("tuning_predictions.csv", "tuning_labels.csv"), "of the patients that thresholds and calibration are fitted on"),
    (("run.json", "log.jsonl"), "settings of the run; a line for each epoch"),
    ((*figures.EVALUATION_FIGURES, figures.TRAINING_CURVES), "figures of this page"),
)
FILE_OF_SECTION = {"headline": "metrics.json", "thresholds": CALIBRATION_FILE, "per_label": "per_label.csv",
                   "calibration": CALIBRATION_FILE, "training": "log.jsonl", "cases": "predictions.csv"}
NO_INTERVALS = f"No intervals with fewer than {MIN_CASES} patients"
STOPS, UNDEFINED = np.arange(201) / 200, 65535  # of the page's slider


class Value(NamedTuple):
    """A cell with its 95 % interval, "" where there is none."""

    text: str
    interval: str = ""


Cell = str | Value
TableRow = Sequence[Cell]


class Paragraph(NamedTuple):
    text: str
    warning: bool = False


class Table(NamedTuple):
    """Rows of cells, the first of each its name. Without columns: facts, a name and a value each. A row of one cell is
    the heading of those that follow. Every row of a sortable table is about one label."""

    title: str
    columns: Sequence[str]
    rows: Sequence[TableRow]
    sortable: bool = False


class Panel(NamedTuple):
    """One plot. `svgs`: the same drawing for a wide and, where it needs another shape there, for a narrow page; none
    where there is nothing to draw, which `caption` explains."""

    title: str
    caption: str
    svgs: Sequence[str] = ()


class Figure(NamedTuple):
    """Plots that are read together. `legend`: (style of the mark, meaning); `shape` of their arrangement."""

    panels: Sequence[Panel]
    legend: Sequence[tuple[str, str]] = ()
    shape: str = "panels"


class Files(NamedTuple):
    """Links to files beside the page: (names, what they hold)."""

    links: Sequence[tuple[Sequence[str], str]]


Block = Paragraph | Table | Figure | Files


class Section(NamedTuple):
    key: str
    title: str
    blocks: Sequence[Block]


def _section(key: str, title: str, *blocks: str | Block) -> Section:
    """A string is a paragraph."""
    return Section(key, title, [Paragraph(block) if isinstance(block, str) else block for block in blocks])


def report_sections(metrics: Mapping) -> dict[str, Section]:
    """The sections of text and tables by key, from the content of metrics.json."""
    parts: list[Callable[[Mapping], Section]] = [
        _data, _headline, _criteria, _comparison, _thresholds, _threshold_table, _per_label,
        *([_clinical] if metrics.get("clinical") else []), *([_net_benefit] if _has_net_benefit(metrics) else []),
        _calibration,
        *([_ensemble] if "ensemble" in metrics else []),
        *([_subgroups] if metrics["subgroups"] else []), *([_baseline] if metrics["baseline"] else []),
        *([_limits] if metrics.get("reference_standard") else []),
    ]
    return {section.key: section for section in (part(metrics) for part in parts)}


def _has_net_benefit(metrics: Mapping) -> bool:
    """Whether it stands beside that of acting on everybody; metrics.json of an earlier version has not that."""
    rows = (metrics.get("clinical") or {"per_label": {}})["per_label"].values()
    return bool(rows) and all("net_benefit_all" in row for row in rows)


def fitted_on(thresholds: Mapping) -> str:
    """Where thresholds and calibration come from, of metrics.json's "thresholds"."""
    volumes, patients = thresholds["n_volumes"], thresholds["n_patients"]
    if thresholds["fitted_on"] == TUNING:
        return f"fitted on {volumes:,} volumes of {patients:,} patients, none of them reported here"
    return f"cross-fitted: each fifth of the {patients:,} patients is evaluated with what was fitted on the others"


def _value(values: Mapping, intervals: Mapping, key: str, digits: int = 4) -> Value:
    return Value(metric_text(values[key], key, digits), interval_text(intervals[key], key, digits))


def _difference(first: Mapping, second: Mapping, key: str) -> str:
    return change_text(None if None in (first[key], second[key]) else first[key] - second[key], key)


def _note(metrics: Mapping) -> list[Paragraph]:
    return [Paragraph(metrics["note"], warning=True)] if metrics["note"] else []


def _data(metrics: Mapping) -> Section:
    facts = [*data_facts(metrics), ("CRG", CRG_MEANING)]
    return _section("data", "Prediction analysis", Table("Data", (), facts), *_note(metrics))


def data_facts(metrics: Mapping) -> list[tuple[str, str]]:
    half, p, unit, rows = metrics["at_0.5"], metrics["probabilities"], metrics["unit"], metrics["n_rows"]
    decisions = rows * len(metrics["per_label"]) - unknown_labels(metrics)["decisions"]
    facts = [
        ("Samples", f"{metrics['n_volumes']:,} volumes of {metrics['n_patients']:,} patients"),
        ("Unit", f"{unit['name']}: {unit['how']} ({rows:,} rows)"),
    ]
    return facts + notices(metrics) + [
        ("Probabilities", f"{p['min']:.4f} to {p['max']:.4f}, mean {p['mean']:.4f}"),
        ("At or above 0.5", f"{percent(half['positive_rate'])} of {decisions:,} decisions "
                            f"(truly positive: {percent(half['label_rate'])})"),
    ]


def ensemble_text(ensemble: Mapping) -> str:
    """How several predictions became one, of metrics.json's "ensemble"."""
    count, some_only = len(ensemble["sources"]), ensemble["tuning_patients_of_some"]
    text = {
        "mean": f"mean of the logits of {count} predictions of the same volumes",
        "stacked": f"mean of the logits of {count} predictions of the same volumes, weighted for each finding as "
                   f"fitted on {ensemble['tuning_patients']:,} tuning patients",
        "pooled": f"{count} predictions put together, each of patients that no other one predicts",
    }[ensemble["method"]]
    if some_only:
        text += (f"; {some_only:,} patients are tuning patients of some only, so thresholds and calibration are "
                 "cross-fitted")
    return text


def _ensemble(metrics: Mapping) -> Section:
    ensemble = metrics["ensemble"]
    keys = [(title, key) for title, key in (*AUROCS, *METRIC_ROWS) if key in ensemble]

    def row(name: str, volumes: str, values: Mapping) -> TableRow:
        return name, volumes, *(metric_text(values[key], key) for _, key in keys)

    members = [row(f"{place} {source}", f"{member['n_volumes']:,}", member)
               for place, (source, member) in enumerate(zip(ensemble["sources"], ensemble["members"], strict=True), 1)]
    spread = [row(title, "", {key: ensemble[key][what] for _, key in keys})
              for title, what in (("Mean", "mean"), ("Standard deviation (n - 1)", "sd"))]
    together = metrics["tuned"] | {"auroc_macro": metrics["at_0.5"]["auroc_macro"]}
    blocks: list[str | Block] = [Table(
        "Members", ("", "Volumes", *(title for title, _ in keys)),
        [*members, *spread, row("All together", f"{metrics['n_volumes']:,}", together)],
    )]
    if ensemble["weights"]:
        rows = [(name, *(decimal(weight, 3) for weight in weights)) for name, weights in ensemble["weights"].items()]
        blocks.append(Table("Weights", ("Label", *map(str, range(1, 1 + len(members)))), rows, sortable=True))
    skipped = "".join(f" Skipped: {count:,} volumes of {source}, absent from another (--allow-partial)."
                      for source, count in ensemble["left_out"].items())
    text = ensemble_text(ensemble)
    return _section(
        "ensemble", "Several predictions",
        f"{text[0].upper()}{text[1:]}.{skipped} Each alone is evaluated in the same way; F1, positive rate and CRG are "
        "at tuned thresholds.", *blocks,
    )


def notices(metrics: Mapping) -> list[tuple[str, str]]:
    """What a reader of any of the numbers should know of the data."""
    found = [("Encoder", note)] if (note := metrics.get("encoder_note")) else []
    found += _findings_notices(metrics)
    if differ := metrics["unit"]["conflicting_labels"]:
        found.append(("", f"labels differ within {differ:,} of the rows: a label of any volume counts"))
    if unnamed := metrics["volumes_without_patient"]:
        found.append(("", own_patient_note(unnamed, metrics["n_volumes"])))
    if metrics["n_patients"] < MIN_CASES:
        found.append(("", f"{NO_INTERVALS}: they would be far too short"))
    if few := few_patients_note(metrics["thresholds"]["n_patients"]):
        found.append(("", few))
    for what, holder in (("predictions", metrics), ("baseline's predictions", metrics["baseline"] or {})):
        if (scale := holder.get("scale", UNCALIBRATED)) != UNCALIBRATED:
            found.append(("Scale", f"the {what} say that they are {scale}, not the model's own: they are not "
                                   "calibrated again, and what is called uncalibrated is the table as it is"))
    for source, columns in metrics.get("unused_columns", {}).items():
        found.append(("Not used", f"{some(columns)} of {source}: not among the findings that are evaluated"))
    found += [("Not used", line) for line in metrics.get("doubtful_columns", ())]
    for source, count in metrics["left_out"].items():
        found.append(("Skipped", f"{count:,} rows of the {source}, absent from the other tables (--allow-partial)"))
    return found


def unknown_labels(metrics: Mapping) -> Mapping[str, int]:
    """How many decisions have an unknown label, and how many volumes have no known one; before 0.8 none might."""
    return metrics.get("unknown_labels", {"decisions": 0, "volumes": 0})


def _findings_notices(metrics: Mapping) -> list[tuple[str, str]]:
    """Which findings are evaluated where they are not the 18, and how much of their labels is unknown."""
    found, findings, unknown = [], tuple(metrics["per_label"]), unknown_labels(metrics)
    if findings != ABNORMALITIES:
        of_the_18 = sum(name in ABNORMALITIES for name in findings)
        found.append(("Findings", f"{len(findings)}, {of_the_18} of them among CT-RATE's 18: {', '.join(findings)}"))
    if label_map := metrics.get("label_map"):
        made = [f"; {name} has the highest probability of {', '.join(how['predictions'])}"
                for name, how in label_map["findings"].items() if how["predictions"] != [name]]
        found.append(("Label map", f"{label_map['name']} (source: metrics.json): positive where any of a finding's "
                                   f"columns is{''.join(made)}"))
    if unknown["decisions"]:
        total = metrics["n_rows"] * len(findings)
        found.append(("Unknown labels", f"{unknown['decisions']:,} of {total:,} are left out"))
    if unknown["volumes"]:
        found.append(("Skipped", f"{unknown['volumes']:,} volumes without a known label"))
    return found


def _resampled(metrics: Mapping, text: str) -> str:
    """`text` with how often patients are resampled, or that they are not."""
    if metrics["n_patients"] < MIN_CASES:
        return NO_INTERVALS
    return text.format(f"{metrics['settings']['resamples']:,} bootstrap resamples or the jackknife")


def _headline(metrics: Mapping) -> Section:
    half, tuned, intervals = metrics["at_0.5"], metrics["tuned"], metrics["intervals"]
    before, after = (metrics["calibration"][when]["brier"] for when in WHEN)
    brier = Value(f"{before:.3f} -> {after:.3f}", interval_text(intervals["calibration"]["after"]["brier"], "", 3))
    beside = {
        "positive_rate": f"label rate {percent(half['label_rate'])}; {percent(half['positive_rate'])} at 0.5",
        "f1_macro": f"{half['f1_macro']:.3f} at 0.5",
        "hamming_accuracy": f"{1 - half['label_rate']:.3f} if every decision is negative",
        "crg": "0.333 without a model; 1 is perfect",
    }
    rows: list[TableRow] = [
        ("Macro AUROC", _value(half, intervals["at_0.5"], "auroc_macro", 3),
         f"mean of {len(metrics['per_label']) - len(metrics['undefined_auroc'])} labels; needs no threshold"),
        *((f"{title}, tuned", _value(tuned, intervals["tuned"], key, 3), beside[key])
          for title, key in METRIC_ROWS if key in beside),
        ("Brier score", brier, "before and after calibration; lower is better"),
    ]
    return _section(
        "headline", "Headline results",
        f"{_resampled(metrics, 'Each value with its 95 % interval from {} of the patients')}. "
        f"Tuned: one threshold per label, {fitted_on(metrics['thresholds'])}.",
        f"CRG is {CRG_MEANING}.",
        Table("Headline results", ("", "", ""), rows),
    )


def _criteria(metrics: Mapping) -> Section:
    rows = [(row["criterion"], row["figure"], "pass" if row["passed"] else "FAIL")
            for row in metrics["success_criteria"]]
    table = Table("Success criteria", ("Criterion", "Found", "Result"), rows)
    return _section("criteria", "Success criteria", table, *_note(metrics))


def _comparison(metrics: Mapping) -> Section:
    half, tuned, intervals = metrics["at_0.5"], metrics["tuned"], metrics["intervals"]["tuned"]
    rows: list[TableRow] = [
        (title, *(metric_text(metrics[name][key], key) for name in ("at_0.5", "calibrated", "tuned_global")),
         _value(tuned, intervals, key), _difference(tuned, half, key))
        for title, key in (*METRIC_ROWS, *AUROCS)
    ]
    columns = ("Metric", "At 0.5", "Calibrated, at 0.5", "Global threshold", "Tuned (95 % CI)", "Tuned - at 0.5")
    return _section(
        "comparison", "Performance comparison",
        f"Thresholds and calibration: {fitted_on(metrics['thresholds'])}. Tuned: one threshold per label. "
        f"{_resampled(metrics, '95 % CI: {} of the ' + format(metrics['n_patients'], ',') + ' patients')}. "
        "AUROC needs no threshold.",
        *_rarely_called(metrics),
        Table("Performance comparison", columns, rows),
    )


def _rarely_called(metrics: Mapping) -> list[str]:
    """How many labels have too few patients called positive for intervals; metrics.json of before 0.8 does not say."""
    counts = [(title, len(metrics.get("rarely_called", {}).get(name, ())))
              for title, name in (("at 0.5", "at_0.5"), ("calibrated", "calibrated"), ("tuned", "tuned"))]
    if not any(count for _, count in counts):
        return []
    return [f"Labels called positive in fewer than {MIN_CASES} patients: "
            f"{', '.join(f'{count} {title}' for title, count in counts)}. Their precision, F1 and positive rate have "
            "no interval, nor have macro precision and F1, which contain theirs. Exact match has none where fewer "
            f"than {MIN_CASES} patients have a row that is right, or one that is not. Cross-fitted, macro metrics of "
            "calibrated probabilities have none."]


def _thresholds(metrics: Mapping) -> Section:
    thresholds, one = metrics["thresholds"], metrics["tuned_global"]
    lead = [
        f"Objective {thresholds['objective']}; {fitted_on(thresholds)}.",
        f"Global threshold {thresholds['global']:.4f}: positive rate {percent(one['positive_rate'])} (label rate "
        f"{percent(one['label_rate'])}), F1 {one['f1_macro']:.4f}, Hamming accuracy {one['hamming_accuracy']:.4f}.",
    ]
    if thresholds["fitted_on"] == CROSS_FITTED:
        lead.append("The thresholds shown are for new patients; the results beside them are those of the cross-fitted "
                    "thresholds.")
    if thresholds["took_global"]:
        lead.append("Only one class where thresholds are fitted, so the global threshold: "
                    f"{', '.join(thresholds['took_global'])}.")
    lead.append("Optimism: what the same search would have claimed on the reported patients themselves (apparent), "
                "beside what the thresholds from other patients gave (held out).")
    rows: list[TableRow] = []
    for title, name in (("One threshold per label", "tuned"), ("One global threshold", "tuned_global")):
        apparent, held_out = metrics["optimism"][name]["claimed"], metrics["optimism"][name]["honest"]
        rows += [(title,), *((measure, metric_text(held_out[key], key), metric_text(apparent[key], key),
                              _difference(apparent, held_out, key)) for measure, key in METRIC_ROWS if key in held_out)]
    table = Table("Optimism", ("Metric", "Held out", "Apparent", "Optimism"), rows)
    return _section("thresholds", "Optimal threshold", *lead, table)


def _threshold_table(metrics: Mapping) -> Section:
    rows = [(f"{row['threshold']:.2f}", *(metric_text(row[key], key) for key in row if key != "threshold"))
            for row in metrics["threshold_table"]]
    columns = ("Threshold", "Hamming", "F1", "Precision", "Recall", "Positive rate")
    return _section(
        "threshold_table", "Threshold table",
        f"One threshold for all labels; label rate {percent(metrics['at_0.5']['label_rate'])}. AUROC does not depend "
        "on a threshold.",
        Table("Threshold table", columns, rows),
    )


def _per_label(metrics: Mapping) -> Section:
    rows = []
    for name, row in metrics["per_label"].items():
        intervals = metrics["intervals"]["per_label"][name]
        rows.append((
            name, f"{row['positives']:,}", percent(row["label_rate"]), percent(row["at_0.5"]["positive_rate"]),
            percent(row["positive_rate"]), *(_value(row, intervals, key, 3) for key in ("auroc", "f1")),
        ))
    half, undefined = metrics["at_0.5"], metrics["undefined_auroc"]
    columns = ("Label", "Positive", "Label rate", "Rate at 0.5", "Tuned rate", "AUROC (95 % CI)", "F1 (95 % CI)")
    return _section(
        "per_label", "Per label",
        f"All labels: {sum(row['positives'] for row in metrics['per_label'].values()):,} positive, label rate "
        f"{percent(half['label_rate'])}, predicted rate {percent(half['positive_rate'])} at 0.5. AUROC "
        "needs no threshold; tuned rate and F1 are at the label's own. "
        f"AUROC and F1 with 95 % intervals, where {MIN_CASES} patients have the label and as many lack it, and F1 "
        "where as many are called positive.",
        *([f"No AUROC, only one class here: {', '.join(undefined)}. A label without positives counts 0 in F1, as in "
           "the challenge."] if undefined else []),
        Table("Per label", columns, rows, sortable=True),
    )


def _clinical(metrics: Mapping) -> Section:
    clinical, per_label = metrics["clinical"], metrics["clinical"]["per_label"]
    bounds, label_bounds = clinical["intervals"]["per_label"], metrics["intervals"]["per_label"]
    decisions, rankings = [], []
    for name, row in per_label.items():
        threshold = metrics["thresholds"]["per_label"][name]
        spread = Value(_threshold(threshold), "-".join(map(_threshold, row["threshold_range"] or ())))
        decisions.append((name, spread, *(f"{row[key]:,}" for key in ("tp", "fp", "fn", "tn")),
                          *(_value(row, bounds[name], key, 3) for key, _ in DECISIONS)))
        own = metrics["per_label"][name]
        rankings.append((name, _value(own, label_bounds[name], "average_precision", 3), decimal(own["label_rate"], 3),
                         *(_value(row, bounds[name], key, 3) for key in row if key.startswith(AT_SPECIFICITY))))
    at = [f"Sensitivity at {key.removeprefix(AT_SPECIFICITY)}" for key in next(iter(per_label.values()))
          if key.startswith(AT_SPECIFICITY)]
    macro, micro = (flat(_value(clinical["summary"], clinical["intervals"]["summary"], key, 3))
                    for key in ("specificity_macro", "f1_micro"))
    return _section(
        "clinical", "Decisions and ranking per label",
        f"At the tuned thresholds; 95 % intervals where {MIN_CASES} patients have the label, as many lack it and, for "
        "predictive values, as many are called so. Beside a threshold (uncalibrated): where 95 % of those lie that "
        f"are fitted on resamples of the same tuning patients. Macro specificity {macro}, micro F1 {micro}.",
        Table("Decisions at the tuned thresholds",
              ("Label", "Threshold", "TP", "FP", "FN", "TN", *(title for _, title in DECISIONS)), decisions,
              sortable=True),
        "Average precision (AUPRC) beside its chance level, the label rate; the highest sensitivity at a specificity "
        "of at least the one named.",
        Table("Ranking", ("Label", "Average precision", "Chance", *at), rankings, sortable=True),
    )


def _net_benefit(metrics: Mapping) -> Section:
    per_label, bounds = metrics["clinical"]["per_label"], metrics["clinical"]["intervals"]["per_label"]

    def cell(name: str, at: str) -> Value:
        interval = (bounds[name]["net_benefit"] or {at: None})[at]
        return Value(decimal(per_label[name]["net_benefit"][at], 3), interval_text(interval, "", 3))

    rows = [(name, cell(name, AT_LABEL_RATE), *(
        part for at in SHOWN_NET_BENEFIT for part in (cell(name, at), decimal(row["net_benefit_all"][at], 3))))
        for name, row in per_label.items()]
    columns = [part for at in SHOWN_NET_BENEFIT for part in (f"At {at} (95 % CI)", "Everybody")]
    unit = metrics["unit"]["name"]
    return _section(
        "net_benefit_table", "Net benefit at some threshold probabilities",
        f"Net benefit, in true positives per {unit}, of acting where the calibrated probability is at least the one "
        "named, beside that of acting on everybody; acting on nobody is worth 0, and at the label rate so is acting on "
        f"everybody, but no interval would hold. The others have one where {MIN_CASES} patients have the label, as "
        "many lack it, and as many reach the probability named; the calibration stays as it is in resamples.",
        Table("Net benefit", ("Label", "At the label rate", *columns), rows, sortable=True),
    )


def _threshold(threshold: float) -> str:
    return f"{threshold:.3f}" if threshold <= 1 else "above 1"


def _limits(metrics: Mapping) -> Section:
    unknown = metrics["volumes_without_patient"]
    limits = [
        f"{metrics['n_patients']:,} patients of the tables given, not a sample that anybody drew for this purpose.",
        "One data set: nothing here says how the model does in another hospital, with other scanners or another "
        "prevalence; predictive values and calibration change with the prevalence.",
        f"Thresholds and calibration: {fitted_on(metrics['thresholds'])}.",
        *(["Patients are told apart by names that say nothing of them: intervals may be too short."]
          if unknown else []),
        "Research use only; not a medical device.",
    ]
    return _section("limits", "Reference standard and limits", metrics["reference_standard"], *limits)


def _calibration(metrics: Mapping) -> Section:
    calibration, intervals = metrics["calibration"], metrics["intervals"]["calibration"]
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in calibration["cross_validated_log_loss"].items())
    lead = f"Method {calibration['method']}; {fitted_on(metrics['thresholds'])}."
    if losses:
        lead += f" Chosen for the lowest log loss on patients it was not fitted on: {losses}."
    if metrics["settings"]["prevalence"]:
        lead += " Moved to the prevalence asked for, which is not that of the patients it was fitted on."
    overall: list[TableRow] = [
        ("Brier score", *(_value(calibration[when], intervals[when], "brier") for when in WHEN)),
        *((title, *(decimal(calibration[when][key]) for when in WHEN)) for title, key in (
            ("Expected calibration error (ECE)", "ece"), ("ECE if perfectly calibrated", "ece_if_calibrated"))),
        *((title, *(percent(metrics[name][key]) for name in ("at_0.5", "calibrated"))) for title, key in (
            ("Positive rate at 0.5", "positive_rate"), ("Label rate", "label_rate"))),
    ]
    rows = [
        (name, f"{row['slope']:.2f}", *(percent(row[f"mean_{when}"]) for when in WHEN),
         percent(metrics["per_label"][name]["label_rate"]),
         *(decimal(row[f"{key}_{when}"], 3) for key in ("brier", "ece") for when in WHEN))
        for name, row in calibration["per_label"].items()
    ]
    columns = ("Label", "Slope of the map", "Mean p before", "Mean p after", "Label rate", "Brier before",
               "Brier after", "ECE before", "ECE after")
    return _section(
        "calibration", "Calibration", lead,
        Table("Calibration", ("Mean of the labels", "Uncalibrated", "Calibrated"), overall),
        Table("Calibration per label", columns, rows, sortable=True),
        *_calibration_on_reported(metrics),
    )


def _calibration_on_reported(metrics: Mapping) -> list[str | Table]:
    if not (clinical := metrics.get("clinical")):
        return []
    rows = [(name, *(_value(row, clinical["intervals"]["per_label"][name], key, 2) for key, _ in ON_REPORTED))
            for name, row in clinical["per_label"].items()]
    return [
        "On the reported patients: logistic regression of the label on the calibrated probability's logit (slope 1 "
        "and intercept 0 are perfect; a slope below 1: too extreme), its intercept with the slope held at 1 (in the "
        "large), and observed positives over expected ones (O/E, 1 is perfect).",
        Table("Calibration on the reported patients", ("Label", *(title for _, title in ON_REPORTED)), rows,
              sortable=True),
    ]


def _subgroups(metrics: Mapping) -> Section:
    def of_group(group: Mapping) -> TableRow:
        start = (group["group"][:24], f"{group['n_patients']:,}")
        if group["too_small"]:
            return *start, "too few patients", *[""] * 6
        return (*start, _value(group, group["intervals"], "auroc_macro", 3), str(group["auroc_labels"]),
                decimal(group["auroc_everyone"], 3), _against_largest(group), percent(group["positive_rate"]),
                percent(group["label_rate"]), decimal(group["f1_macro"], 3))

    rows = [row for attribute, groups in metrics["subgroups"].items() for row in ((attribute,), *map(of_group, groups))]
    columns = ("Group", "Patients", "AUROC (95 % CI)", "Labels", "AUROC, all", "Difference (95 % CI)", "Positive rate",
               "Label rate", "F1")
    return _section(
        "subgroups", "Subgroups",
        f"AUROC: macro over the labels that at least {MIN_CASES} patients of the group have and as many lack (their "
        "number beside it), and that of all patients over the same labels. Rates and F1: tuned thresholds. Groups of "
        f"fewer than {MIN_PATIENTS} patients are too small to evaluate. Difference: of the AUROC from that of the "
        f"attribute's largest group over the labels of both, on the same resamples. {_compared(metrics['subgroups'])}",
        Table("Subgroups", columns, rows),
    )


def _compared(subgroups: Mapping) -> str:
    """How many differences stand beside each other."""
    count = sum(_against_largest(group) != "" for groups in subgroups.values() for group in groups)
    if not count:
        return "No two groups are compared."
    return (f"Compared: {plural(count, 'difference')}, not corrected for their number; by chance alone, about one "
            "interval in 20 does not hold 0.")


def _against_largest(group: Mapping) -> Cell:
    found = group.get("auroc_difference")
    if not found or found["difference"] is None:
        return ""
    return Value(change_text(found["difference"], "", 3), interval_text(found["interval"], "", 3))


def _baseline(metrics: Mapping) -> Section:
    base = metrics["baseline"]
    this, differences = base["this"], base["differences"]
    rows: list[TableRow] = []
    for heading, name, measures in (("Without a threshold", "at_0.5", AUROCS), ("At 0.5", "at_0.5", METRIC_ROWS),
                                    ("Tuned", "tuned", METRIC_ROWS)):
        rows.append((heading,))
        for title, key in measures:
            if key != "label_rate":
                row = differences[name][key]
                change = Value(_difference(this[name], base[name], key), interval_text(row["interval"], key))
                tests = ("", "") if row["p"] is None else (decimal(row["p"], 3), decimal(row.get("p_corrected"), 3))
                rows.append((title, metric_text(base[name][key], key), metric_text(this[name][key], key), change,
                             *tests))

    def of_label(row: Mapping) -> TableRow:
        if row["difference"] is None:
            return "undefined", "", ""
        change = Value(change_text(row["difference"], "", 3), interval_text(row["interval"], "", 3))
        return change, decimal(row["p"], 3), decimal(row["p_corrected"], 3)

    auroc, f1 = (differences["per_label"][key] for key in ("auroc", "f1"))
    per_label = [(name, *of_label(auroc[name]), *of_label(f1[name])) for name in by_difference(auroc)]
    columns = ("Label", "AUROC", "p", "Corrected p", "F1, tuned", "p", "Corrected p")
    return _section(
        "baseline", "Comparison with the baseline",
        *_settings_compared(base),
        f"Baseline: {base['source']}. Thresholds of both are {base['fitted_on']}. Differences are this - baseline"
        + (f". {NO_INTERVALS}." if metrics["n_patients"] < MIN_CASES else
           " on the same patients, drawn again or left out: 95 % interval, two-sided p; corrected (Holm) for all "
           "metrics of all labels together, and for all labels of one metric. F1 of labels at the tuned thresholds. "
           "Undefined: only one class, here or in too many resamples. No interval and no p: as above, too few patients "
           "are called positive. Calibrated probabilities are not compared: maps fitted to either prediction, and kept "
           "fixed in resamples, would make equally good ones differ too often."),
        Table("Differences", ("Metric", "Baseline", "This", "Difference (95 % CI)", "p", "Corrected p"), rows),
        Table("Differences per label", columns, per_label, sortable=True),
    )


def by_difference(rows: Mapping[str, Mapping]) -> list[str]:
    """Labels by their difference from the baseline, the highest first; those without one last."""
    known = [name for name, row in rows.items() if row["difference"] is not None]
    return sorted(known, key=lambda name: -rows[name]["difference"]) + [name for name in rows if name not in known]


def _settings_compared(base: Mapping) -> list[str | Table]:
    """What differs between two runs; nothing where one of the predictions is no run's, or of an earlier version."""
    if (settings := base.get("settings")) is None:
        return []
    rows = [("Run" if what == "run" else what, other, this) for what, (this, other) in settings.items()]
    alike: list[str | Table] = [] if settings.keys() - {"run"} else ["Both runs were trained with the same flags."]
    return [Table("Settings that differ", ("", "Baseline", "This"), rows), *alike] if rows else alike


def _difference_figure(base: Mapping) -> Figure:
    """AUROC and F1 of all labels together and of each, in the order of the table."""
    differences, panels = base["differences"], []
    order = by_difference(differences["per_label"]["auroc"])
    for title, name, key, of_labels in (("AUROC, this - baseline", "at_0.5", "auroc_macro", "auroc"),
                                        ("F1 at tuned thresholds, this - baseline", "tuned", "f1_macro", "f1")):
        per_label = differences["per_label"][of_labels]
        rows = {"All labels (macro)": differences[name][key]} | {label: per_label[label] for label in order}
        known = {label: row for label, row in rows.items() if row["difference"] is not None}
        drawing = figures.svg(figures.difference_figure(known), title) if known else None
        panels.append(Panel(title, "", (drawing,) if drawing else ()))
    legend = (("dot blue", "higher than the baseline's, corrected p below 0.05"), ("dot orange", "lower"),
              ("dot muted", "not told apart; bars: 95 % intervals"))
    return Figure(panels, legend, "charts")


def decision_table(labels: Sequence[str], thresholds: Iterable[float], calibrated: Iterable[float]) -> Table:
    """Each label's threshold on both scales, in the order of the logits."""
    rows = [(str(number), name, *("no volume is positive" if t > 1 else f"{t:.4f}" for t in pair))
            for number, (name, *pair) in enumerate(zip(labels, thresholds, calibrated, strict=True))]
    return Table("Thresholds", ("", "Label", "Threshold, uncalibrated", "Threshold, calibrated"), rows)


def settings_section(metrics: Mapping, record: Mapping) -> Section:
    """Settings and versions of the evaluation, and what a run's run.json (else {}) says of the training."""
    # Without private paths.
    config = {key: value for key, value in (record.get("config") or {}).items() if key not in ("data_dir", "patients")}
    run = {key: record[key] for key in ("status", "device", "precision", "volumes", "patients") if key in record}
    data = data_name(record)
    parts = {
        "Evaluation": metrics["settings"], "Evaluated with": metrics["versions"],
        "Run": ({"data": data} if data else {}) | run, "Configuration of the run": config,
        "Trained with": record.get("versions", {}),
    }
    return _section("settings", "Settings and versions", *(
        Table(title, (), [(key.replace("_", " "), _plain(value)) for key, value in values.items()])
        for title, values in parts.items() if values
    ))


def files_section(folder: Path) -> Section | None:
    """Links to what lies beside the page; None where nothing does."""
    there = [([name for name in names if (folder / name).is_file()], meaning) for names, meaning in FILES]
    found = [(names, meaning) for names, meaning in there if names]
    lead = "In the same folder as this page: the links hold wherever the folder is moved."
    return _section("files", "Files", lead, Files(found)) if found else None


def data_name(record: Mapping) -> str:
    """The folder of a run's cohort, without where it lies; "" without a run."""
    return Path(str(record.get("data_dir") or "")).name


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    return {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


def figure_captions(metrics: Mapping) -> dict[str, dict[str, str]]:
    """The value above each panel of LABEL_PLOTS, for each label."""
    intervals, errors = metrics["intervals"]["per_label"], metrics["calibration"]["per_label"]
    areas = {
        plot: {name: "undefined: only one class" if row[key] is None else flat(_value(row, intervals[name], key, 3))
               for name, row in metrics["per_label"].items()}
        for plot, key in (("roc", "auroc"), ("precision_recall", "average_precision"))
    }
    ece = {name: f"{decimal(row['ece_before'], 3)} -> {decimal(row['ece_after'], 3)}" for name, row in errors.items()}
    rates = {name: "" if row["label_rate"] is None else f"label rate {percent(row['label_rate'])}"
             for name, row in metrics["per_label"].items()}
    return areas | {"reliability": ece, "net_benefit": rates}


def flat(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell.text} ({cell.interval})" if cell.interval else cell.text


def figure_sections(
    metrics: Mapping, labels: np.ndarray, probabilities: np.ndarray, calibrated: np.ndarray,
    history: list[dict] | None,
) -> dict[str, Section]:
    """The sections of plots by key; arrays (N, L). "sweep" is as it stands at 0.5: the page's script moves it."""
    made, captions, sweep = [], figure_captions(metrics), threshold_sweep(labels, probabilities, STOPS)
    for key, plot in figures.LABEL_PLOTS.items():
        drawings = figures.label_svgs(plot, key, captions[key], labels, probabilities, calibrated)
        panels = [Panel(name, caption, (drawing,) if drawing else ())
                  for (name, caption), drawing in zip(captions[key].items(), drawings, strict=True)]
        made.append(_section(key, plot.title, plot.lead, Figure(panels, plot.legend)))
    rates = [figures.svg(figures.rate_figure(metrics, narrow), f"rates {narrow}") for narrow in (False, True)]
    made.append(_section(
        "rates", "Positive rate against label rate",
        "How often each label is predicted, beside how often it is present; the nearer to the mark, the better.",
        Figure([Panel("Positive rate against label rate", "", rates)], shape="whole"),
    ))
    sweeps = [figures.svg(figures.sweep_figure(STOPS, sweep, metrics, size, page=True), f"sweep {size}")
              for size in ((11, 3.4), (4.2, 3.2))]
    made.append(_section(
        "sweep", "One threshold for all labels",
        "A label is positive where its probability is at or above the threshold. AUROC is not shown, as it does not "
        "depend on one. Not for choosing a threshold: one chosen on the reported patients is too optimistic.",
        Figure([Panel("Each metric against the threshold", "", sweeps)], shape="whole"),
    ))
    if metrics["baseline"]:
        section = _baseline(metrics)
        figure = _difference_figure(metrics["baseline"])
        made.append(section._replace(blocks=[*section.blocks[:-2], figure, *section.blocks[-2:]]))
    if panels := [Panel(title, "", (drawing,)) for title, drawing in figures.training_svgs(history or [])]:
        lead = ("By epoch, on the training patients and on the tuning patients kept apart from them. The weights of "
                "the epoch with the best AUROC on the tuning patients are kept.")
        made.append(_section("training", "Training", lead, Figure(panels, shape="charts")))
    return {section.key: section for section in made}


def slider_data(metrics: Mapping, labels: np.ndarray, probabilities: np.ndarray, calibrated: np.ndarray) -> dict:
    """What the slider shows: of each kind of probabilities the metrics of SWEEP_CURVES at each of STOPS, for all labels
    together and for each alone, as base64 of deflated uint16 (metrics, 1 + L, stops): ten-thousandths, UNDEFINED where
    there is no value. Tuned thresholds in the same order of labels."""
    thresholds, keys, values = metrics["thresholds"], [key for key, _, _ in figures.SWEEP_CURVES], {}
    tuned = {"uncalibrated": [thresholds["global"], *thresholds["per_label"].values()],
             "calibrated": [None, *thresholds["per_label_calibrated"].values()]}
    for name, array in (("uncalibrated", probabilities), ("calibrated", calibrated)):
        sweep = threshold_sweep(labels, array, STOPS)
        stacked = np.stack([sweep[key].T for key in keys])
        coded = np.where(np.isnan(stacked), UNDEFINED, np.round(10_000 * np.nan_to_num(stacked))).astype("<u2")
        values[name] = base64.b64encode(zlib.compress(coded.tobytes(), 9)).decode()
    rates = [metrics["at_0.5"]["label_rate"], *(row["label_rate"] for row in metrics["per_label"].values())]
    return {"labels": list(metrics["per_label"]), "metrics": keys, "stops": len(STOPS), "undefined": UNDEFINED,
            "values": values, "tuned": tuned, "label_rates": rates}
