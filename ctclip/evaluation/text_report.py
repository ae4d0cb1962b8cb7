"""metrics.json -> the blocks that are printed: at most 100 columns wide, everything taken from the stored numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ctclip.evaluation.bootstrap import MIN_CASES
from ctclip.evaluation.results import CROSS_FITTED, TUNING
from ctclip.evaluation.subgroups import MIN_PATIENTS
from ctclip_model import N_LABELS

WIDTH = 100
MEASURES = (  # of the dictionary M, in the order they are printed
    ("Positive rate", "positive_rate"),
    ("Label rate", "label_rate"),
    ("Hamming accuracy", "hamming_accuracy"),
    ("Exact match", "exact_match"),
    ("F1 macro", "f1_macro"),
    ("Precision macro", "precision_macro"),
    ("Recall macro", "recall_macro"),
    ("CRG", "crg"),
)
AUROCS = (("AUROC macro", "auroc_macro"), ("AUROC micro", "auroc_micro"))


def format_report(metrics: dict) -> str:
    """The printed blocks from an evaluation's metrics (or a metrics.json read back)."""
    blocks = [_analysis_block(metrics), _calibration_block(metrics), _optimal_block(metrics), _table_block(metrics),
              _comparison_block(metrics)]
    if metrics["subgroups"]:
        blocks.append(_subgroup_block(metrics))
    if metrics["baseline"]:
        blocks.append(_baseline_block(metrics))
    blocks.append(_success_block(metrics))
    return "\n\n".join("\n".join(block) for block in blocks)


def _analysis_block(metrics: dict) -> list[str]:
    half, p, unit = metrics["at_0.5"], metrics["probabilities"], metrics["unit"]
    rows = [
        [name, f"{row['positives']:,}", percent(row["label_rate"]), percent(row["at_0.5"]["positive_rate"])]
        for name, row in metrics["per_label"].items()
    ]
    rows.append(["All labels", f"{sum(row['positives'] for row in metrics['per_label'].values()):,}",
                 percent(half["label_rate"]), percent(half["positive_rate"])])
    return [
        "PREDICTION ANALYSIS",
        f"Samples            {metrics['n_volumes']:,} volumes of {metrics['n_patients']:,} patients",
        *_wrapped(f"Unit               {unit['name']}: {unit['how']} ({metrics['n_rows']:,} rows)"),
        *([f"                   labels differ within {unit['conflicting_labels']:,} of them: present in any counts"]
          if unit["conflicting_labels"] else []),
        *([f"                   {metrics['volumes_without_patient']:,} names are not like train_12_a_1.nii.gz: "
           "patients may be told apart wrongly"] if metrics["volumes_without_patient"] else []),
        *(f"Left out           {count:,} rows of the {source}, absent elsewhere (--allow-partial)"
          for source, count in metrics["left_out"].items()),
        f"Probabilities      {p['min']:.4f} to {p['max']:.4f}, mean {p['mean']:.4f}",
        f"At or above 0.5    {percent(half['positive_rate'])} of {metrics['n_rows'] * N_LABELS:,} decisions "
        f"(truly positive: {percent(half['label_rate'])})",
        "",
        *_table(["Label distribution", "positive", "label rate", "predicted rate at 0.5"], rows),
        *_note(metrics),
    ]


def _calibration_block(metrics: dict) -> list[str]:
    calibration, cuts, found = metrics["calibration"], metrics["thresholds"], metrics["intervals"]["calibration"]
    losses = calibration["cross_validated_log_loss"]
    lines = ["CALIBRATION", *_wrapped(f"Method {calibration['method']}; {fitted_on(cuts)}.")]
    if losses:
        tried = ", ".join(f"{method} {loss:.4f}" for method, loss in losses.items())
        lines += _wrapped(f"Chosen for the lowest log loss on patients it was not fitted on: {tried}.")
    if metrics["settings"]["prevalence"]:
        lines += _wrapped("Moved to the prevalence asked for, which is not that of the patients it was fitted on.")
    states = ("before", "after")
    overall = [
        ["Brier score", *(f"{calibration[when]['brier']:.4f} {_range(found[when]['brier'])}" for when in states)],
        ["Expected calibration error", *(f"{calibration[when]['ece']:.4f}" for when in states)],
        ["  if p were right", *(f"{calibration[when]['ece_if_calibrated']:.4f}" for when in states)],
    ]
    for title, key in (("Positive rate at 0.5", "positive_rate"), ("Label rate", "label_rate")):
        overall.append([title, *(percent(metrics[name][key]) for name in ("at_0.5", "calibrated"))])
    rows = [
        [name, f"{row['slope']:.2f}", f"{row['intercept']:+.2f}",
         *(percent(row[f"mean_{when}"]) for when in states),
         percent(metrics["per_label"][name]["label_rate"]),
         *(f"{row[f'{key}_{when}']:.3f}" for key in ("brier", "ece") for when in states)]
        for name, row in calibration["per_label"].items()
    ]
    header = ["Per label", "slope", "icpt.", "mean p", "after", "labels", "Brier", "after", "ECE", "after"]
    return lines + [*_table(["Mean of the 18 labels", "before", "after"], overall), "", *_table(header, rows)]


def _optimal_block(metrics: dict) -> list[str]:
    cuts, one, found = metrics["thresholds"], metrics["tuned_global"], metrics["intervals"]["per_label"]
    rows = [
        [name, f"{cuts['per_label'][name]:.4f}", percent(row["positive_rate"]), percent(row["label_rate"]),
         f"{row['precision']:.3f}", f"{row['recall']:.3f}", f"{row['f1']:.3f}",
         f"{decimal(row['auroc'], 3)} {_range(found[name]['auroc'], 3)}".strip()]
        for name, row in metrics["per_label"].items()
    ]
    lines = ["OPTIMAL THRESHOLD", *_wrapped(f"Objective {cuts['objective']}; {fitted_on(cuts)}.")]
    if cuts["fitted_on"] == CROSS_FITTED:
        lines.append("The cuts below are for new patients; the results beside them are those of the cross-fitted cuts.")
    lines += [
        f"Global: {cuts['global']:.4f} -> positive rate {percent(one['positive_rate'])} "
        f"(label rate {percent(one['label_rate'])}), F1 {one['f1_macro']:.4f}, Hamming {one['hamming_accuracy']:.4f}",
        "",
        *_table(["Per label", "cut", "rate", "labels", "prec.", "rec.", "F1", "AUROC, 95 % CI"], rows),
    ]
    if cuts["took_global"]:
        lines += _wrapped(f"One class only where cuts are fitted, so the global cut: {', '.join(cuts['took_global'])}.")
    return lines + ["", *_optimism_lines(metrics["optimism"])]


def _optimism_lines(optimism: dict) -> list[str]:
    rows = []
    for title, name in (("one cut per label", "tuned"), ("one global cut", "tuned_global")):
        claimed, honest = optimism[name]["claimed"], optimism[name]["honest"]
        for measure, key in MEASURES:
            if key not in honest:
                continue
            rows.append([f"{measure}, {title}", _figure(honest, key), _figure(claimed, key),
                         _difference(honest, claimed, key)])
    return [
        "Optimism: what the same search on the reported patients themselves would have claimed.",
        *_table(["", "honest", "claimed", "optimism"], rows),
    ]


def _table_block(metrics: dict) -> list[str]:
    keys = ("hamming_accuracy", "f1_macro", "precision_macro", "recall_macro")
    rows = [
        [f"{row['threshold']:.2f}", *(f"{row[key]:.4f}" for key in keys), percent(row["positive_rate"])]
        for row in metrics["threshold_table"]
    ]
    return [
        "THRESHOLD TABLE",
        f"One cut for all labels; label rate {percent(metrics['at_0.5']['label_rate'])}. "
        "AUROC is not listed: it does not depend on a threshold.",
        *_table(["Threshold", "Hamming", "F1", "Precision", "Recall", "Positive rate"], rows),
    ]


def _comparison_block(metrics: dict) -> list[str]:
    half, tuned, found = metrics["at_0.5"], metrics["tuned"], metrics["intervals"]
    columns = [half, metrics["calibrated"], metrics["tuned_global"], tuned]
    rows = [
        [title, *(_figure(m, key) for m in columns), _bounds(found["tuned"][key], key), _difference(half, tuned, key)]
        for title, key in MEASURES
    ]
    settings = metrics["settings"]
    lines = [
        "PERFORMANCE COMPARISON",
        *_wrapped(f"Thresholds and calibration: {fitted_on(metrics['thresholds'])}; tuned = one cut per label. "
                  f"95 % CI: {settings['resamples']:,} bootstrap resamples of the {metrics['n_patients']:,} patients."),
        *_table(["", "at 0.5", "calibrated", "global cut", "tuned", "95 % CI", "tuned - 0.5"], rows),
        "AUROC (needs no threshold): " + ", ".join(
            f"{title.split()[1]} {decimal(half[key])} {_range(found['at_0.5'][key])}".strip() for title, key in AUROCS
        ),
    ]
    if metrics["undefined_auroc"]:
        lines += _wrapped(f"No AUROC, only one class here: {', '.join(metrics['undefined_auroc'])}. A label without "
                          "positives counts 0 in F1, precision and recall, as in the challenge.")
    return lines


def _subgroup_block(metrics: dict) -> list[str]:
    lines = [
        "SUBGROUPS",
        *_wrapped(f"AUROC: macro over the findings that at least {MIN_CASES} patients of the group have and as many "
                  "lack (their number in brackets), and everyone's over the same findings. Rates, F1: tuned cuts. "
                  f"Fewer than {MIN_PATIENTS} patients are too few to say anything."),
    ]
    header = ["", "patients", "AUROC, 95 % CI", "", "everyone", "rate", "labels", "F1"]
    rows = []
    for attribute, groups in metrics["subgroups"].items():
        rows.append([attribute, *[""] * 7])
        for group in groups:
            start = [f"  {group['group'][:24]}", f"{group['n_patients']:,}"]
            if group["too_small"]:
                rows.append([*start, "too few patients", *[""] * 5])
                continue
            bounds = _range(group["intervals"]["auroc_macro"], 3)
            rates = [percent(group[key]) for key in ("positive_rate", "label_rate")]
            rows.append([*start, f"{decimal(group['auroc_macro'], 3)} {bounds}".strip(), f"({group['auroc_labels']})",
                         decimal(group["auroc_everyone"], 3), *rates, f"{group['f1_macro']:.3f}"])
    return lines + _table(header, rows)


def _baseline_block(metrics: dict) -> list[str]:
    base = metrics["baseline"]
    this, differences = base["this"], base["differences"]
    lines = [
        "COMPARISON WITH THE BASELINE",
        *_wrapped(f"Baseline: {base['source']}. Cuts of both are {base['fitted_on']}. Differences are this - baseline "
                  "on the same draws of patients: 95 % interval, two-sided p."),
    ]
    rows = []
    for title, key in AUROCS:
        rows.append(_difference_row(title, key, base["at_0.5"], this["at_0.5"], differences["at_0.5"]))
    for name, when in (("at_0.5", "at 0.5"), ("tuned", "tuned")):
        for title, key in MEASURES:
            if key != "label_rate":
                rows.append(_difference_row(f"{title}, {when}", key, base[name], this[name], differences[name]))
    lines += [*_table(["", "baseline", "this", "difference", "95 % CI", "p"], rows), ""]
    per_label = differences["per_label"]
    rows = [
        [name, *(cell for key in ("auroc", "f1") for cell in _label_difference(per_label[key][name]))]
        for name in metrics["per_label"]
    ]
    return lines + [
        *_table(["Per label", "AUROC", "95 % CI", "p", "F1", "95 % CI", "p"], rows),
        *_wrapped("Differences; p is corrected for 18 labels (Holm). F1 at the tuned cuts. undef.: one class only, "
                  "here or in too many resamples."),
    ]


def _difference_row(title: str, key: str, base: dict, this: dict, differences: dict) -> list[str]:
    row = differences[key]
    p = "" if row["p"] is None else f"{row['p']:.3f}"
    figures = [_figure(base, key), _figure(this, key), _difference(base, this, key)]
    return [title, *figures, _bounds(row["interval"], key, "+"), p]


def _label_difference(row: dict) -> list[str]:
    if row["difference"] is None:
        return ["undef.", "", ""]
    return [f"{row['difference']:+.3f}", _bounds(row["interval"], "", "+", 3), f"{row['p_corrected']:.3f}"]


def _success_block(metrics: dict) -> list[str]:
    rows = metrics["success_criteria"]
    width = max(len(row["criterion"]) for row in rows)
    lines = ["SUCCESS CRITERIA"]
    for row in rows:
        lines.append(f"{'pass' if row['passed'] else 'SHORT':<5}  {row['criterion']:<{width}}  {row['figure']}")
    return lines + _note(metrics)


def _note(metrics: dict) -> list[str]:
    return _wrapped(metrics["note"]) if metrics["note"] else []


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Aligned columns, the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        .rstrip()
        for line in lines
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, drop_whitespace=True)


def fitted_on(cuts: dict) -> str:
    """Where thresholds and calibration come from, of metrics.json's "thresholds"."""
    if cuts["fitted_on"] == TUNING:
        return f"fitted on {cuts['n_volumes']:,} volumes of {cuts['n_patients']:,} patients, none of them reported here"
    return f"cross-fitted: each fifth of the {cuts['n_patients']:,} patients is judged by what was fitted on the others"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def decimal(value: float | None, digits: int = 4) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _figure(m: dict, key: str) -> str:
    return percent(m[key]) if key.endswith("_rate") else decimal(m[key])


def _difference(before: dict, after: dict, key: str) -> str:
    if before[key] is None or after[key] is None:
        return "undefined"
    change = after[key] - before[key]
    return f"{100 * change:+.1f} pts" if key.endswith("_rate") else f"{change:+.4f}"


def _range(bounds: Sequence[float] | None, digits: int = 4) -> str:
    return "" if bounds is None else f"({bounds[0]:.{digits}f}-{bounds[1]:.{digits}f})"


def _bounds(bounds: Sequence[float] | None, key: str, sign: str = "", digits: int = 4) -> str:
    """low to high, in the form of the figure they belong to."""
    if bounds is None:
        return ""
    if key.endswith("_rate"):
        return " to ".join(f"{100 * bound:{sign}.1f}" for bound in bounds) + (" pts" if sign else " %")
    return " to ".join(f"{bound:{sign}.{digits}f}" for bound in bounds)
