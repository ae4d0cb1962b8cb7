"""What is printed at the end of an evaluation: the results that a person acts on, from what metrics.json holds. All
tables are in the report (report.py).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from html import escape

from ctclip.evaluation.calibration import TUNING
from ctclip.evaluation.report import WHEN, ensemble_text, notices
from ctclip.formatting import TIED, change_text, decimal, metric_text, percent, plural

COLUMN, LINE_WIDTH = 24, 120
BASELINE_ROWS = (("AUROC macro", "at_0.5", "auroc_macro"), ("F1 macro, cross-fitted thresholds", "tuned", "f1_macro"))
SHOWN_FINDINGS = 3  # of the best, and of the worst


class Metrics(dict):
    """An evaluation's metrics, as metrics.json holds them; a notebook shows their summary."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(format_summary(self))}</pre>"


def format_summary(metrics: Mapping) -> str:
    """The blocks of an evaluation's metrics (or of a metrics.json read back), with the notice that belongs to them."""
    rows = [
        ("PREDICTION ANALYSIS", _analysis(metrics)),
        *((f"  {name or 'Note'}", text) for name, text in notices(metrics)),
        *_ensemble(metrics),
        ("OPTIMAL THRESHOLD", _threshold(metrics)),
        ("PERFORMANCE COMPARISON", "at 0.5 -> tuned"),
        *_comparison(metrics),
        *_findings(metrics),
        *_baseline(metrics),
        ("CRITERIA", _criteria(metrics)),
    ]
    lines = [line.replace(TIED, " ") for name, text in rows for line in textwrap.wrap(
        f"{name:<{COLUMN}}{text}".replace(" %", f"{TIED}%"), LINE_WIDTH, subsequent_indent=" " * COLUMN,
        break_on_hyphens=False)]  # fmt: skip
    return "\n".join([*lines, *([metrics["note"]] if metrics["note"] else [])])


def _analysis(metrics: Mapping) -> str:
    half, p, unit = metrics["at_0.5"], metrics["probabilities"], metrics["unit"]["name"]
    rows = "" if unit == "volume" else f", {plural(metrics['n_rows'], unit)}"
    return (
        f"{metrics['n_volumes']:,} volumes of {metrics['n_patients']:,} patients{rows}; range [{p['min']:.2f}, "
        f"{p['max']:.2f}]; at or above 0.5: {percent(half['positive_rate'])} (truly positive: "
        f"{percent(half['label_rate'])})"
    )


def _ensemble(metrics: Mapping) -> list[tuple[str, str]]:
    if not (ensemble := metrics.get("ensemble")):
        return []
    alone, together = ensemble["auroc_macro"], metrics["at_0.5"]["auroc_macro"]
    return [("ENSEMBLE", ensemble_text(ensemble)),
            ("", f"AUROC macro {decimal(alone['mean'], 3)} alone (mean; SD {decimal(alone['sd'], 3)}), "
                 f"{decimal(together, 3)} together")]


def _threshold(metrics: Mapping) -> str:
    thresholds = metrics["thresholds"]
    low, high = (pick(thresholds["per_label"].values()) for pick in (min, max))
    where = (f"fitted on {thresholds['n_patients']:,} other patients" if thresholds["fitted_on"] == TUNING
             else "cross-fitted by patient")
    return f"{_cut(thresholds['global'])} for all findings together; {_cut(low)} to {_cut(high)} one by one ({where})"


def _cut(threshold: float) -> str:
    return "above 1" if threshold > 1 else f"{threshold:.2f}"


def _comparison(metrics: Mapping) -> list[tuple[str, str]]:
    half, tuned, calibration = metrics["at_0.5"], metrics["tuned"], metrics["calibration"]
    label_rate = half["label_rate"]
    beside = {"hamming_accuracy": f"   (saying no to everything: {1 - label_rate:.3f})",
              "positive_rate": f"   (labels: {percent(label_rate)})"}
    rows = [
        (f"  {title}", " -> ".join(metric_text(m[key], key, 3) for m in (half, tuned)) + beside.get(key, ""))
        for title, key in (("Hamming accuracy", "hamming_accuracy"), ("F1 macro", "f1_macro"),
                           ("Positive rate", "positive_rate"))
    ]
    brier, ece = (" -> ".join(f"{calibration[when][key]:.3f}" for when in WHEN) for key in ("brier", "ece"))
    auroc = _with_interval(half["auroc_macro"], metrics["intervals"]["at_0.5"]["auroc_macro"])
    return [*rows, ("  AUROC macro", f"{auroc}; needs no threshold"),
            ("  Calibration error", f"{ece}   (ECE, before -> after calibration; Brier score {brier})")]


def _with_interval(value: float | None, bounds: tuple[float, float] | None) -> str:
    return decimal(value, 3) + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")


def _findings(metrics: Mapping) -> list[tuple[str, str]]:
    defined = {name: row["auroc"] for name, row in metrics["per_label"].items() if row["auroc"] is not None}
    text = [f"{name} {defined[name]:.3f}" for name in sorted(defined, key=lambda name: -defined[name])]
    if not text:
        return []
    return [("  Highest AUROC", ", ".join(text[:SHOWN_FINDINGS])),
            ("  Lowest AUROC", ", ".join(text[: -1 - SHOWN_FINDINGS : -1]))]


def _baseline(metrics: Mapping) -> list[tuple[str, str]]:
    """The two differences that matter most; the others are in the report."""
    if not (base := metrics["baseline"]):
        return []
    rows = []
    for title, name, key in BASELINE_ROWS:
        theirs, ours, found = base[name][key], base["this"][name][key], base["differences"][name][key]
        change = change_text(None if None in (theirs, ours) else ours - theirs, "", 3)
        bounds = f" ({found['interval'][0]:+.3f} to {found['interval'][1]:+.3f})" if found["interval"] else ""
        p = "" if found["p"] is None else f", p {found['p']:.3f}"
        rows.append(f"{title} {decimal(theirs, 3)} -> {decimal(ours, 3)}: {change}{bounds}{p}")
    return [("BASELINE", f"{rows[0]}   ({base['source']})"), ("", rows[1])]


def _criteria(metrics: Mapping) -> str:
    rows = metrics["success_criteria"]
    missed = [row["criterion"] for row in rows if not row["passed"]]
    met = f"{len(rows) - len(missed)} of {len(rows)} met"
    return f"{met}; not met: {'; '.join(missed)}" if missed else met
