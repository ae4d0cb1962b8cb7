"""An evaluation as one page, report.html: a single file that asks nothing of any network.

- A string is text and is escaped; only `Html` is markup, and only `tag` and what is built of it make any. Names of
  volumes, files and settings come from tables that anyone may have written.
- Prose and looks are in the template, figures here. The template's script only sorts tables and moves the threshold;
  without it the page lacks nothing else.
- What the slider shows is counted, not interpolated: at every cut k / 1000 exactly what compute_metrics gives.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.evaluation.bootstrap import MIN_CASES
from ctclip.evaluation.cases import Case
from ctclip.evaluation.figures import TRAINING_PANELS, precision_recall_stairs, reliability_points
from ctclip.evaluation.metrics import decision_metrics
from ctclip.evaluation.results import TUNING
from ctclip.evaluation.subgroups import MIN_PATIENTS
from ctclip.evaluation.text_report import AUROCS, MEASURES, decimal, fitted_on, percent
from ctclip.fileio import replacing
from ctclip_model import ABNORMALITIES, N_LABELS

if TYPE_CHECKING:
    from ctclip.evaluation.results import Evaluation

TEMPLATE = Path(__file__).with_name("report.html")
MOST_POINTS = 150  # of a curve
CUTS = np.arange(1001) / 1000  # where the slider stops
SWEEP = (  # key of M; name for all labels, for one; colour
    ("positive_rate", "Positive rate", "Positive rate", "orange"),
    ("hamming_accuracy", "Hamming accuracy", "Accuracy", "green"),
    ("f1_macro", "F1 macro", "F1", "blue"),
    ("precision_macro", "Precision macro", "Precision", "olive"),
    ("recall_macro", "Recall macro", "Recall", "purple"),
    ("crg", "CRG", "CRG", "ink"),
)
ARROW = " \N{RIGHTWARDS ARROW} "


def write_page(
    path: Path, evaluation: Evaluation, history: list[dict] | None, record: Mapping, cases: Sequence[Case]
) -> None:
    """Writes the page, whole or not at all. `history` is log.jsonl's list of epochs, `record` the content of a run's
    run.json, {} without a run."""
    metrics = evaluation.metrics
    data = _folder(record)
    slots = {
        "title": joined("CT-CLIP evaluation", f", {data}" if data else ""),
        "what": _what(metrics, data),
        "note": tag("p", metrics["note"], class_="note") if metrics["note"] else "",
        "resamples": joined(f"{metrics['settings']['resamples']:,}"),
        "fitted_on": joined(fitted_on(metrics["thresholds"])),
        "headline": _headline(metrics),
        "criteria": _criteria(metrics),
        "comparison": _comparison(metrics),
        "threshold": _sweep(evaluation),
        "labels_note": joined(" ".join(_label_remarks(metrics))),
        "labels": _per_label(metrics),
        "roc": _roc(evaluation),
        "precision_recall": _precision_recall(evaluation),
        "reliability": _reliability(evaluation),
        "rates": _rates(metrics),
        "training": _training(history or []),
        "calibration_note": joined(_method(metrics)),
        "calibration": _calibration(metrics),
        "optimism": _optimism(metrics),
        "min_cases": joined(MIN_CASES),
        "subgroups": _subgroups(metrics["subgroups"] or {}),
        "baseline_source": joined(metrics["baseline"]["source"] if metrics["baseline"] else ""),
        "baseline": _baseline(metrics["baseline"]) if metrics["baseline"] else "",
        "cases": _cases(cases),
        "configuration": _configuration(metrics, record, data),
        "data": script_json(payload(evaluation)),
    }
    with replacing(path) as temporary:
        temporary.write_text(_filled(TEMPLATE.read_text(encoding="utf-8"), slots), encoding="utf-8", newline="\n")


def _filled(template: str, slots: dict[str, str]) -> str:
    """{{name}} -> slots[name], in one pass; a section whose slot is empty is left out, contents list the others."""
    section = re.compile(r'<section id="(\w+)">\n<h2>(.*?)</h2>.*?</section>\n', re.DOTALL)
    template = section.sub(lambda match: match[0] if slots[match[1]] else "", template)
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    slots |= {
        "contents": joined(*(tag("li", tag("a", title, href=f"#{key}")) for key, title in section.findall(template))),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # no other script may run
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], template)


# ----------------------------------------------------------------------------------------------------------- markup


class Html(str):
    """Markup; any other string is text."""


def joined(*content: object) -> Html:
    """Html as it is, everything else escaped."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in content))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element; `class_` is class, `data_key` is data-key, and an attribute that is None is left out."""
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items() if value is not None
    )
    return Html(f"<{name}{written}>" + ("" if name == "img" else f"{joined(*content)}</{name}>"))


def table(what: str, header: Sequence, groups: Mapping[str, Iterable] | Iterable, look: str | None = None) -> Html:
    """Rows of cells, the first of each its heading, in a box that scrolls by itself. `groups` are rows, or rows by the
    title of their group; `what` is said to those who hear the page."""
    bodies = []
    for title, rows in (groups if isinstance(groups, Mapping) else {"": groups}).items():
        lines = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
        if title:
            lines.insert(0, tag("tr", tag("th", title, scope="rowgroup"), tag("td", colspan=len(header) - 1),
                                class_="group"))
        bodies.append(tag("tbody", *lines))
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header)))
    content = tag("table", head, *bodies, aria_label=what, class_=look)
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=what)


def legend(*keys: tuple[str, str]) -> Html:
    """(classes of the mark, what it means), in one line."""
    return tag("p", *(tag("span", tag("i", class_=f"key {mark}"), text) for mark, text in keys), class_="legend")


def script_json(data: object) -> Html:
    """JSON in which no HTML parser finds the end of a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 and U+2029 are escaped already
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


# ------------------------------------------------------------------------------------------------------------ words


def figure(value: float | None, key: str = "", digits: int = 4) -> str:
    """In the form of the metric `key`."""
    return percent(value) if value is not None and key.endswith("_rate") else decimal(value, digits)


def change(value: float | None, key: str = "", digits: int = 4) -> str:
    """A difference, with its sign; of rates in points."""
    if value is None:
        return "undefined"
    text = f"{100 * value:+.1f} pts" if key.endswith("_rate") else f"{value:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def span(bounds: Sequence[float] | None, key: str = "", digits: int = 4, form: Callable = figure) -> str:
    """An interval, its unit once; empty where there is none."""
    if bounds is None:
        return ""
    low, high = (form(bound, key, digits) for bound in bounds)
    return low.removesuffix(" %").removesuffix(" pts") + (" to " if form is change else "\N{EN DASH}") + high


def with_span(value: float | None, bounds: Sequence[float] | None, digits: int = 3, form: Callable = figure) -> Html:
    """A figure, and its interval in small."""
    return joined(form(value, "", digits), " ", tag("small", span(bounds, "", digits, form)))


def _what(metrics: Mapping, data: str) -> Html:
    unit, rows = metrics["unit"], metrics["n_rows"]
    lines = [
        f"{metrics['n_volumes']:,} volumes of {metrics['n_patients']:,} patients{f' from {data}' if data else ''}",
        f"unit: {unit['name']} ({unit['how']}" + (")" if unit["name"] == "volume" else f"; {rows:,} rows)"),
        f"written {datetime.now():%Y-%m-%d %H:%M}",
        *(f"left out: {count:,} rows of the {table}, absent elsewhere" for table, count in metrics["left_out"].items()),
    ]
    if metrics["volumes_without_patient"]:
        lines.append(f"{metrics['volumes_without_patient']:,} names are not like CT-RATE’s: patients may be told apart "
                     "wrongly")
    if unit["conflicting_labels"]:
        lines.append(f"labels differ within {unit['conflicting_labels']:,} of the rows: present in any counts")
    return joined("; ".join(lines) + ".")


def _label_remarks(metrics: Mapping) -> Iterable[str]:
    cuts, undefined = metrics["thresholds"], metrics["undefined_auroc"]
    if cuts["fitted_on"] != TUNING:
        yield "The cuts shown are for new patients; every reported patient was judged by cuts fitted on others only."
    if undefined:
        yield (f"One class only here, so AUROC and AP are undefined: {', '.join(undefined)}. A label without positives "
               "counts 0 in precision, recall and F1, as in the challenge.")
    if cuts["took_global"]:
        yield f"One class only where cuts are fitted, so the global cut: {', '.join(cuts['took_global'])}."


def _method(metrics: Mapping) -> str:
    calibration = metrics["calibration"]
    tried = ", ".join(f"{name} {loss:.4f}" for name, loss in calibration["cross_validated_log_loss"].items())
    return (f"Method: {calibration['method']}, {fitted_on(metrics['thresholds'])}."
            + (f" It has the lowest log loss on patients it was not fitted on: {tried}." if tried else "")
            + (" It is moved to the prevalence asked for." if metrics["settings"]["prevalence"] else ""))


def _folder(record: Mapping) -> str:
    return Path(str(record.get("data_dir") or "")).name


# ----------------------------------------------------------------------------------------------- figures and tables


def _headline(metrics: Mapping) -> Html:
    half, tuned, found = metrics["at_0.5"], metrics["tuned"], metrics["intervals"]
    before, after = (metrics["calibration"][when]["brier"] for when in ("before", "after"))
    rate = half["label_rate"]
    cards = [
        ("Macro AUROC", figure(half["auroc_macro"], "", 3), span(found["at_0.5"]["auroc_macro"], "", 3),
         f"mean of {N_LABELS - len(metrics['undefined_auroc'])} labels; needs no threshold"),
        ("Positive rate, tuned", percent(tuned["positive_rate"]), span(found["tuned"]["positive_rate"], "_rate"),
         f"label rate {percent(rate)}; {percent(half['positive_rate'])} at 0.5"),
    ]
    for title, key, beside in (
        ("F1 macro, tuned", "f1_macro", f"{half['f1_macro']:.3f} at 0.5"),
        ("Hamming accuracy, tuned", "hamming_accuracy", f"{1 - rate:.3f} if nothing is ever called positive"),
        ("CRG, tuned", "crg", "0.333 for all, none or random; 1 is perfect"),
    ):
        cards.append((title, figure(tuned[key], "", 3), span(found["tuned"][key], "", 3), beside))
    cards.append(("Brier score", f"{before:.3f}{ARROW}{after:.3f}", span(found["calibration"]["after"]["brier"], "", 3),
                  "before and after calibration; lower is better"))
    return tag("div", *(
        tag("div", tag("h3", title), tag("p", value, class_="value"),
            tag("p", bounds or "no interval", class_="bounds"), tag("p", beside), class_="card")
        for title, value, bounds, beside in cards
    ), class_="cards")


def _criteria(metrics: Mapping) -> Html:
    marks = {True: tag("span", "\N{CHECK MARK} pass", class_="pass"),
             False: tag("span", "\N{MULTIPLICATION SIGN} short", class_="short")}
    rows = [[row["criterion"], row["figure"], marks[row["passed"]]] for row in metrics["success_criteria"]]
    return table("Success criteria", ("Criterion", "Figure", "Result"), rows, "prose")


def _comparison(metrics: Mapping) -> Html:
    sets, bounds = ("at_0.5", "calibrated", "tuned_global", "tuned"), metrics["intervals"]["tuned"]
    rows = [
        [title, *(figure(metrics[name][key], key) for name in sets), span(bounds[key], key)] for title, key in MEASURES
    ]
    header = ("At 0.5", "Calibrated, at 0.5", "One global cut", "Tuned, one per label", "95 % interval, tuned")
    needs_none = [[title, with_span(metrics["at_0.5"][key], metrics["intervals"]["at_0.5"][key], 4)]
                  for title, key in AUROCS]
    return joined(table("Performance comparison", ("Metric", *header), rows),
                  table("AUROC", ("Needs no threshold", "Probabilities as given"), needs_none))


def _per_label(metrics: Mapping) -> Html:
    rows = []
    for name, row in metrics["per_label"].items():
        cut, bounds = metrics["thresholds"]["per_label"][name], metrics["intervals"]["per_label"][name]
        rows.append([
            name, with_span(row["auroc"], bounds["auroc"]), figure(row["average_precision"], "", 3),
            percent(row["label_rate"]), percent(row["at_0.5"]["positive_rate"]), percent(row["positive_rate"]),
            figure(cut) if cut <= 1 else "above 1", *(figure(row[key], "", 3) for key in ("precision", "recall")),
            with_span(row["f1"], bounds["f1"]),
        ])
    header = ("Label", "AUROC", "AP", "Label rate", "Rate at 0.5", "Rate, tuned", "Cut", "Precision", "Recall", "F1")
    return table("Per label", header, rows, "sortable")


def _calibration(metrics: Mapping) -> Html:
    calibration, found, when = metrics["calibration"], metrics["intervals"]["calibration"], ("before", "after")
    overall = [
        ["Brier score", *(with_span(calibration[state]["brier"], found[state]["brier"], 4) for state in when)],
        ["Expected calibration error (ECE)", *(figure(calibration[state]["ece"]) for state in when)],
        ["ECE if they were right", *(figure(calibration[state]["ece_if_calibrated"]) for state in when)],
    ]
    overall += [
        [title, *(percent(metrics[name][key]) for name in ("at_0.5", "calibrated"))]
        for title, key in (("Positive rate at 0.5", "positive_rate"), ("Label rate", "label_rate"))
    ]
    rows = [
        [name, f"{row['slope']:.2f}", change(row["intercept"], "", 2),
         *(percent(row[f"mean_{state}"]) for state in when), percent(metrics["per_label"][name]["label_rate"]),
         *(f"{row[f'{key}_{state}']:.3f}" for key in ("brier", "ece") for state in when)]
        for name, row in calibration["per_label"].items()
    ]
    header = ("Label", "Slope", "Intercept", "Mean p before", "Mean p after", "Label rate",
              *(f"{error} {state}" for error in ("Brier", "ECE") for state in when))
    return joined(table("Calibration", ("Mean of the 18 labels", "Before", "After"), overall),
                  table("Calibration per label", header, rows, "sortable"))


def _optimism(metrics: Mapping) -> Html:
    groups = {}
    for title, name in (("One cut per label", "tuned"), ("One global cut", "tuned_global")):
        honest, claimed = (metrics["optimism"][name][which] for which in ("honest", "claimed"))
        groups[title] = [
            [measure, figure(honest[key], key), figure(claimed[key], key), _difference(claimed[key], honest[key], key)]
            for measure, key in MEASURES if key in honest
        ]
    return table("Optimism", ("Metric", "Honest", "Claimed", "Optimism"), groups)


def _difference(first: float | None, second: float | None, key: str) -> str:
    return change(None if first is None or second is None else first - second, key)


def _subgroups(subgroups: Mapping[str, Sequence[Mapping]]) -> Html:
    def cells(row: Mapping) -> list:
        start = [row["group"], f"{row['n_patients']:,}"]
        if row["too_small"]:
            return [*start, tag("span", f"too few: under {MIN_PATIENTS}", class_="undefined"), *[""] * 5]
        return [*start, with_span(row["auroc_macro"], row["intervals"]["auroc_macro"]), row["auroc_labels"],
                figure(row["auroc_everyone"], "", 3), percent(row["positive_rate"]), percent(row["label_rate"]),
                figure(row["f1_macro"], "", 3)]

    header = ("Group", "Patients", "AUROC", "Labels in it", "Everyone’s AUROC", "Positive rate", "Label rate", "F1")
    groups = {attribute: map(cells, rows) for attribute, rows in subgroups.items()}
    return table("Subgroups", header, groups) if groups else Html()


def _baseline(base: Mapping) -> Html:
    def cells(title: str, key: str, name: str) -> list:
        first, second, row = base["this"][name][key], base[name][key], base["differences"][name][key]
        return [title, figure(second, key), figure(first, key), _difference(first, second, key),
                span(row["interval"], key, 4, change), decimal(row["p"], 3)]

    measures = [pair for pair in MEASURES if pair[1] != "label_rate"]
    groups = {
        title: [cells(measure, key, name) for measure, key in chosen]
        for title, name, chosen in (("Without a threshold", "at_0.5", AUROCS), ("At 0.5", "at_0.5", measures),
                                    ("Tuned", "tuned", measures))
    }
    columns = [base["differences"]["per_label"][key] for key in ("auroc", "f1")]
    rows = [[name, *(cell for column in columns for cell in _label_difference(column[name]))] for name in ABNORMALITIES]
    header = ("Label", "AUROC", "p", "p corrected", "F1, tuned", "p", "p corrected")
    return joined(table("Differences", ("Metric", "Baseline", "This", "Difference", "95 % interval", "p"), groups),
                  table("Differences per label", header, rows, "sortable"))


def _label_difference(row: Mapping) -> list:
    if row["difference"] is None:
        return ["undefined", "", ""]
    return [with_span(row["difference"], row["interval"], 3, change), decimal(row["p"], 3),
            decimal(row["p_corrected"], 3)]


def _cases(cases: Sequence[Case]) -> Html:
    by_label: dict[str, list[Case]] = {}
    for case in cases:
        by_label.setdefault(case.label, []).append(case)
    blocks = []
    for label, own in by_label.items():
        missed = sum(case.kind == "missed" for case in own)
        alarms = len(own) - missed
        count = tag("small", f"listed: {missed} missed, {alarms} false alarm{'' if alarms == 1 else 's'}")
        shown = tag("div", *(_picture(case) for case in own if case.picture), class_="cases")
        others = tag("ul", *(tag("li", _verdict(case)) for case in own if not case.picture), class_="others")
        blocks.append(tag("details", tag("summary", label, " ", count), shown, others))
    return joined(*blocks)


def _picture(case: Case) -> Html:
    source = "data:image/jpeg;base64," + base64.b64encode(case.picture).decode()
    picture = tag("img", src=source, alt=f"Axial and coronal slice of {case.name}")
    return tag("figure", picture, tag("figcaption", _verdict(case)))


def _verdict(case: Case) -> Html:
    verdict = f"{case.kind}: {case.probability:.3f}, cut {case.threshold:.3f}"
    return joined(tag("b", verdict), " ", tag("code", case.name))


def _configuration(metrics: Mapping, record: Mapping, data: str) -> Html:
    config = {key: value for key, value in (record.get("config") or {}).items() if key != "data_dir"}  # named in "Run"
    run = {key: record[key] for key in ("status", "device", "precision", "volumes", "patients") if key in record}
    parts = {
        "Evaluation": metrics["settings"], "Evaluated with": metrics["versions"],
        "Run": ({"data": data} if data else {}) | run, "Configuration of the run": config,
        "Trained with": record.get("versions", {}),
    }
    return tag("div", *(
        tag("div", tag("h3", title), tag("dl", *(
            joined(tag("dt", key.replace("_", " ")), tag("dd", _plain(value))) for key, value in values.items())))
        for title, values in parts.items() if values
    ), class_="lists")


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    return {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------------------------ plots


@dataclass(frozen=True)
class Axes:
    """Ranges of a plot's axes, and curves on them as SVG paths on a square of 1000 units, which the page stretches.
    `look` names classes of the template."""

    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)

    def place(self, x: float, y: float) -> tuple[str, str]:
        across, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return f"{round(1000 * across, 1):g}", f"{round(1000 * (1 - up), 1):g}"

    def line(self, x: Sequence, y: Sequence, look: str, steps: bool = False, **attributes: object) -> Html:
        """A curve through the points, broken where y is None or NaN; stairs with `steps`."""
        path, drawn = [], False
        for a, b in zip(x, np.array(y, dtype=float), strict=True):
            known = not np.isnan(b)
            if known:
                across, up = self.place(a, b)
                path.append(f"M{across} {up}" if not drawn else f"H{across}V{up}" if steps else f"L{across} {up}")
            drawn = known
        return tag("path", d="".join(path), class_=look, **attributes)

    def dots(self, x: Sequence, y: Sequence, look: str) -> Html:
        """Lines without length: their round ends keep their size when the plot is stretched."""
        points = [self.place(a, b) for a, b in zip(x, np.array(y, dtype=float), strict=True) if not np.isnan(b)]
        return tag("path", d="".join(f"M{across} {up}h0" for across, up in points), class_=f"{look} dots")

    def plot(
        self, what: str, marks: Iterable[Html], xticks: Sequence, yticks: Sequence, form: Callable = "{:g}".format
    ) -> Html:
        """A plot with a grid and ticks. Ticks are HTML, which nothing stretches; `form` writes those of y."""
        grid = "".join(f"M0 {self.place(self.x[0], tick)[1]}h1000" for tick in yticks)
        drawing = tag("svg", tag("title", what), tag("path", d=grid, class_="grid"), *marks, role="img",
                      viewBox="0 0 1000 1000", preserveAspectRatio="none")
        ticks = [
            tag("span", write(round(tick, 10)), class_=side, style=f"{edge}:{100 * (tick - low) / (high - low):.4g}%")
            for side, edge, where, (low, high), write in (("x", "left", xticks, self.x, "{:g}".format),
                                                          ("y", "bottom", yticks, self.y, form))
            for tick in where
        ]
        return tag("div", drawing, tag("div", *ticks, class_="ticks", aria_hidden="true"), class_="plot")


UNIT, HALVES = Axes(), (0, 0.5, 1)
DIAGONAL = UNIT.line((0, 1), (0, 1), "chance")


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS of a curve's points, evenly along it, both ends among them; none is moved."""
    if len(x) <= MOST_POINTS:
        return x, y
    along = np.concatenate([[0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    keep = np.unique(np.searchsorted(along, np.linspace(0, along[-1], MOST_POINTS)).clip(max=len(x) - 1))
    keep[-1] = len(x) - 1
    return x[keep], y[keep]


def _panels(metrics: Mapping, what: str, draw: Callable, keys: Iterable, one_class: bool = False) -> Html:
    """A legend and a small plot per label: `draw(j)` gives caption and marks. Labels with one class say that they have
    no curve, unless `one_class`."""
    figures = []
    for j, name in enumerate(ABNORMALITIES):
        if name in metrics["undefined_auroc"] and not one_class:
            caption, drawing = "undefined", tag("p", "one class only: no curve", class_="nothing")
        else:
            caption, marks = draw(j)
            drawing = UNIT.plot(f"{what} of {name}: {caption}", marks, HALVES, HALVES)
        figures.append(tag("figure", tag("figcaption", tag("b", name), tag("span", caption)), drawing))
    return joined(legend(*keys), tag("div", *figures, class_="panels"))


def _area(metrics: Mapping, j: int, key: str) -> str:
    name = ABNORMALITIES[j]
    bounds = span(metrics["intervals"]["per_label"][name][key], "", 3)
    return figure(metrics["per_label"][name][key], "", 3) + (f" ({bounds})" if bounds else "")


def _roc(evaluation: Evaluation) -> Html:
    from sklearn.metrics import roc_curve

    metrics, rows = evaluation.metrics, evaluation.rows

    def draw(j: int) -> tuple[str, list[Html]]:
        x, y = thinned(*roc_curve(rows.labels[:, j], rows.probabilities[:, j])[:2])
        marks = [DIAGONAL, UNIT.line([*x, 1], [*y, 0], "area blue"), UNIT.line(x, y, "blue")]
        return _area(metrics, j, "auroc"), marks

    return _panels(metrics, "ROC curve", draw, (("line blue", "ROC curve"), ("line chance", "chance")))


def _precision_recall(evaluation: Evaluation) -> Html:
    metrics, rows = evaluation.metrics, evaluation.rows

    def draw(j: int) -> tuple[str, list[Html]]:
        stairs = precision_recall_stairs(rows.labels[:, j], rows.probabilities[:, j])
        chance = UNIT.line((0, 1), [rows.labels[:, j].mean()] * 2, "chance dashed")
        return _area(metrics, j, "average_precision"), [chance, UNIT.line(*thinned(*stairs), "blue", steps=True)]

    keys = ("line blue", "precision at that recall"), ("line chance dashed", "label rate, what chance gives")
    return _panels(metrics, "Precision-recall curve", draw, keys)


def _reliability(evaluation: Evaluation) -> Html:
    metrics, labels = evaluation.metrics, evaluation.rows.labels
    states = ((evaluation.rows.probabilities, "orange"), (evaluation.fitted.calibrated, "blue"))

    def draw(j: int) -> tuple[str, list[Html]]:
        row, marks = metrics["calibration"]["per_label"][ABNORMALITIES[j]], [DIAGONAL]
        for values, colour in states:
            points = reliability_points(labels[:, j], values[:, j])
            marks += [UNIT.line(*points, f"{colour} thin"), UNIT.dots(*points, colour)]
        return f"ECE {row['ece_before']:.3f}{ARROW}{row['ece_after']:.3f}", marks

    keys = ("dot orange", "as given"), ("dot blue", "calibrated"), ("line chance", "means what it says")
    return _panels(metrics, "Reliability", draw, keys, one_class=True)


def _rates(metrics: Mapping) -> Html:
    """A dot plot. Places are shares of a drawing without a viewBox, so that marks keep their shape at any width."""
    rows, grid = [], range(0, 101, 25)
    for name, row in metrics["per_label"].items():
        rates = row["label_rate"], row["at_0.5"]["positive_rate"], row["positive_rate"]
        truth, half, tuned = (f"{100 * rate:.4g}%" for rate in rates)
        marks = [
            *(tag("line", x1=f"{x}%", x2=f"{x}%", y2="100%", class_="grid") for x in grid),
            tag("line", x1=truth, x2=half, y1="50%", y2="50%", class_="gap"),
            tag("line", x1=truth, x2=truth, y1="12%", y2="88%", class_="tick ink"),
            tag("circle", cx=half, cy="50%", r="4.5", class_="ring orange"),
            tag("circle", cx=tuned, cy="50%", r="4.5", class_="dot blue"),
        ]
        what = f"{name}: label rate {truth}, predicted at 0.5 {half}, with tuned cuts {tuned}"
        rows += [tag("span", name), tag("svg", tag("title", what), *marks, role="img")]
    scale = tag("div", *(tag("span", f"{x} %", style=f"left:{x}%") for x in grid), class_="scale", aria_hidden="true")
    keys = ("tick ink", "label rate"), ("ring orange", "predicted at 0.5"), ("dot blue", "predicted, tuned cuts")
    return joined(legend(*keys), tag("div", *rows, tag("span"), scale, class_="rates"))


def _training(history: list[dict]) -> Html:
    epochs = [row.get("epoch", number) for number, row in enumerate(history, 1)]
    frozen = [n for n, row in zip(epochs, history, strict=True) if row.get("stage") == "frozen"]
    best = [n for n, row in zip(epochs, history, strict=True) if row.get("best")][-1:]
    figures = []
    for title, curves in TRAINING_PANELS:
        values = {key: np.array([row.get(key) for row in history], dtype=float) for key, _, _ in curves}
        values = {key: np.where(np.isfinite(column), column, np.nan) for key, column in values.items()}
        if not all(np.isnan(column).all() for column in values.values()):
            figures.append(_training_figure(title, epochs, curves, values, frozen, best))
    keys = [("band", "backbone frozen")] * bool(frozen) + [("ring ink", f"best epoch, {epoch}") for epoch in best]
    return joined(legend(*keys), tag("div", *figures, class_="charts")) if figures else Html()


def _training_figure(
    title: str, epochs: Sequence, curves: Sequence, values: Mapping, frozen: Sequence, best: Sequence
) -> Html:
    known = np.concatenate([column[~np.isnan(column)] for column in values.values()])
    yticks = _ticks(known.min(), known.max())
    axes = Axes((min(epochs) - 0.5, max(epochs) + 0.5), (yticks[0], yticks[-1]))
    marks = []
    if frozen:
        right = axes.place(max(frozen) + 0.5, 0)[0]
        marks.append(tag("path", d=f"M0 0H{right}V1000H0", class_="band"))
    for key, _, colour in curves:
        ringed = best if key == "tuning_auroc_macro" else []
        at = [values[key][epochs.index(epoch)] for epoch in ringed]
        marks += [axes.line(epochs, values[key], colour), axes.dots(ringed, at, "ink outer"),
                  axes.dots(ringed, at, "paper inner"), axes.dots(epochs, values[key], colour)]
    xticks = [tick for tick in _ticks(min(epochs), max(epochs), whole=True) if min(epochs) <= tick <= max(epochs)]
    form = (lambda rate: f"{100 * rate:g} %") if "label_rate" in values else "{:g}".format
    drawing = axes.plot(f"{title} by epoch", marks, xticks, yticks, form)
    return tag("figure", tag("figcaption", tag("b", title)),
               legend(*((f"dot {colour}", name) for _, name, colour in curves)), drawing)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers around low to high."""
    from matplotlib.ticker import MaxNLocator

    if low == high and not whole:
        low, high = low - 0.05, high + 0.05
    return MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1).tick_values(low, high).tolist()


# --------------------------------------------------------------------------------------------------- threshold sweep


def payload(evaluation: Evaluation) -> dict:
    """What the slider counts with: rows; labels; tuned cuts, of all labels and of each; counts as from histograms."""
    rows, cuts = evaluation.rows, evaluation.metrics["thresholds"]
    sources = {"given": rows.probabilities, "calibrated": evaluation.fitted.calibrated}
    return {
        "rows": len(rows),
        "labels": ABNORMALITIES,
        "cuts": {"given": [cuts["global"], *cuts["per_label"].values()],
                 "calibrated": [None, *cuts["per_label_calibrated"].values()]},
        "counts": {name: histograms(rows.labels, values) for name, values in sources.items()},
    }


def histograms(labels: np.ndarray, probabilities: np.ndarray) -> list[list[list[int]]]:
    """[[positives, negatives] of each label], each [k, count, ...]: rows with k / 1000 <= p < (k + 1) / 1000.

    Compared in float64, as `p >= cut` is: summed from k on, they are the rows that a cut at k / 1000 calls positive.
    """
    place = np.searchsorted(CUTS, probabilities, side="right") - 1

    def counted(k: np.ndarray) -> list[int]:
        return np.stack(np.unique(k, return_counts=True), axis=1).ravel().tolist()

    return [[counted(place[labels[:, j] == truth, j]) for truth in (1, 0)] for j in range(N_LABELS)]


def _sweep(evaluation: Evaluation) -> Html:
    """The slider's plot as it stands at 0.5, for all labels; the page's script moves it."""
    metrics, rows = evaluation.metrics, evaluation.rows
    half, cuts, tuned = metrics["at_0.5"], CUTS[::10], min(metrics["thresholds"]["global"], 1)
    swept = [decision_metrics(rows.labels, rows.probabilities >= cut) for cut in cuts]
    marks = [UNIT.line((0, 1), [half["label_rate"]] * 2, "orange dashed", data_curve="label_rate")]
    for key, _, _, colour in SWEEP:
        look = f"{colour} bold" if key == "positive_rate" else colour
        marks.append(UNIT.line(cuts, [m[key] for m in swept], look, data_curve=key))
    marks += [UNIT.line((tuned, tuned), (0, 1), "muted dotted", data_curve="tuned"),
              UNIT.line((0.5, 0.5), (0, 1), "ink cut", data_curve="cut")]
    values = [
        tag("div", tag("dt", tag("i", class_=f"key line {colour}"), tag("span", name, data_all=name, data_one=one)),
            tag("dd", figure(half[key], key), data_value=key))
        for key, name, one, colour in SWEEP
    ]
    lines = (("upright ink", "cut 0.500", "cut"), ("upright dotted muted", "tuned cut", "tuned"),
             ("line dashed orange", f"label rate {percent(half['label_rate'])}", "label_rate"))
    keys = [tag("span", tag("i", class_=f"key {mark}"), tag("span", text, data_value=key)) for mark, text, key in lines]
    plot = UNIT.plot("Each metric against the threshold", marks, CUTS[::100], CUTS[::200])
    return tag("div", tag("dl", *values), tag("p", *keys, class_="legend"), plot, id="sweep")
