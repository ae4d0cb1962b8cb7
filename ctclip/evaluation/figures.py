"""Evaluation and training as pictures (matplotlib): PNG for the run's folder and notebooks, SVG for the page."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ctclip.errors import UserError
from ctclip.evaluation.metrics import bin_index, positives_at, sorted_by_class, threshold_sweep
from ctclip.fileio import replacing
from ctclip.formatting import percent
from ctclip_model import UNKNOWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING_CURVES = "training_curves.png"  # in a run folder; training and evaluation both write it
INK, GREY, LIGHT, GRID, BAND = "#222222", "#767676", "#dddddd", "#eaeaea", "#f0f0f0"
BLUE, ORANGE, GREEN, PURPLE, OLIVE = "#0072b2", "#d55e00", "#009e73", "#9a5b9e", "#a08a00"
PAGE_COLOURS = {  # the page's variables, which differ in light and dark
    INK: "text", GREY: "muted", LIGHT: "strong", GRID: "line", BAND: "band", "#ffffff": "paper",
    BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple", OLIVE: "olive",
}
MOST_POINTS = 150  # of a curve
SOFTWARE = "ctclip"  # in every PNG, by which it is known as ours
SWEEP_CURVES = (  # key of M; name; colour
    ("positive_rate", "Positive rate", ORANGE), ("hamming_accuracy", "Hamming accuracy", GREEN),
    ("f1_macro", "F1 macro", BLUE), ("precision_macro", "Precision macro", OLIVE),
    ("recall_macro", "Recall macro", PURPLE), ("crg", "CRG", INK),
)
TRAINING_PANELS = (  # title; curves: key of log.jsonl, name, colour
    ("Loss", (("train_loss", "training", BLUE), ("tuning_loss", "tuning patients", ORANGE))),
    ("Macro AUROC, tuning patients", (("tuning_auroc_macro", "macro AUROC", GREEN),)),
    ("Positive rate at 0.5, %", (("positive_rate", "predicted", ORANGE), ("label_rate", "labels", INK))),
)


@dataclass(frozen=True)
class LabelPlot:
    """A kind of plot on unit axes that every label has. `draw` takes the axes and one label's arrays, (N,) each:
    labels, probabilities, calibrated probabilities. `metric` names the value above it. `title`, `lead` and `legend`
    (style of the mark, meaning) are the page's. `one_class`: it is also drawn of labels with one class only."""

    draw: Callable[[Axes, np.ndarray, np.ndarray, np.ndarray], None]
    xlabel: str
    ylabel: str
    metric: str
    title: str
    lead: str
    legend: tuple[tuple[str, str], ...]
    one_class: bool = False


def draw_roc(ax: Axes, labels: np.ndarray, probabilities: np.ndarray, _: np.ndarray) -> None:
    fp, tp = _at_every_threshold(labels, probabilities)
    x, y = thinned(fp / fp[-1], tp / tp[-1])
    ax.plot([0, 1], [0, 1], color=LIGHT, linewidth=1)
    area = thinned(x, y, 50)
    ax.fill([*area[0], 1], [*area[1], 0], color=BLUE, alpha=0.1, linewidth=0)
    ax.plot(x, y, color=BLUE, linewidth=1.4)


def draw_precision_recall(ax: Axes, labels: np.ndarray, probabilities: np.ndarray, _: np.ndarray) -> None:
    """From recall 1 down to 0, each precision held down to the next recall: the area below is average precision.
    Dashed: the label rate."""
    ax.plot([0, 1], [labels.mean()] * 2, color=GREY, linewidth=1, linestyle="--")
    fp, tp = _at_every_threshold(labels, probabilities)
    fp, tp = fp[tp > 0][::-1], tp[tp > 0][::-1]
    precision = tp / (tp + fp)
    x, y = thinned(np.append(tp / tp[0], 0), np.append(precision, precision[-1]), 75)  # two points each
    ax.step(x, y, where="post", color=BLUE, linewidth=1.4)


def _at_every_threshold(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(2, T): false and true positives above all probabilities (N,), then at each of them, downwards."""
    thresholds = np.append(np.inf, np.unique(probabilities)[::-1])
    return positives_at(sorted_by_class(labels[:, None], probabilities[:, None]), thresholds)[:, 0]


def draw_reliability(ax: Axes, labels: np.ndarray, probabilities: np.ndarray, calibrated: np.ndarray) -> None:
    ax.plot([0, 1], [0, 1], color=LIGHT, linewidth=1)
    for values, colour in ((probabilities, ORANGE), (calibrated, BLUE)):
        place = bin_index(values)  # the bins of the calibration error
        x, y = (np.array([of[place == k].mean() for k in np.unique(place)]) for of in (values, labels))
        ax.plot(x, y, color=colour, linewidth=1)
        dots = np.column_stack([x, x + 1e-4, np.full(len(x), np.nan)])  # strokes with round ends: markers are long SVG
        ax.plot(dots.ravel(), np.repeat(y, 3), color=colour, linewidth=4, solid_capstyle="round")


def draw_net_benefit(ax: Axes, labels: np.ndarray, _: np.ndarray, calibrated: np.ndarray) -> None:
    """As a share of the label rate, the most there is to be had; nothing is drawn where it is below 0."""
    rate, thresholds = labels.mean(), np.arange(1, 100) / 100
    odds = thresholds / (1 - thresholds)
    everybody = 1 - (1 - rate) / rate * odds
    ax.plot(thresholds, np.where(everybody < 0, np.nan, everybody), color=GREY, linewidth=1, linestyle="--")
    fp, tp = positives_at(sorted_by_class(labels[:, None], calibrated[:, None]), thresholds)[:, 0]
    benefit = (tp - odds * fp) / len(labels)
    ax.plot(thresholds, np.where(benefit < 0, np.nan, benefit / rate), color=BLUE, linewidth=1.4)


LABEL_PLOTS = {
    "roc": LabelPlot(
        draw_roc, "False positive rate", "True positive rate", "AUROC", "ROC curves",
        "True positive rate (up) against false positive rate (across), for every threshold. The value is the area "
        "below, AUROC, with its 95 % interval.",
        (("line blue", "ROC curve"), ("line strong", "random ranking"))),
    "precision_recall": LabelPlot(
        draw_precision_recall, "Recall", "Precision", "AP", "Precision and recall",
        "Precision (up) against recall (across), for every threshold. The value is the area below, average precision, "
        "with its 95 % interval.",
        (("line blue", "precision at that recall"), ("line dashed muted", "label rate, as a random ranking gives"))),
    "reliability": LabelPlot(
        draw_reliability, "Mean probability in the bin", "Label rate in the bin", "ECE", "Reliability",
        "Label rate (up) among volumes of about the same probability (across): on the diagonal, probabilities are "
        "calibrated. The value is the mean distance from it, expected calibration error (ECE), before and after "
        "calibration.",
        (("dot orange", "uncalibrated"), ("dot blue", "calibrated"), ("line strong", "perfectly calibrated")), True),
    "net_benefit": LabelPlot(
        draw_net_benefit, "Threshold probability", "Net benefit / label rate", "", "Net benefit",
        "Net benefit of acting on the calibrated probability (up, 1: every positive is found and nothing else) against "
        "the probability from which one would act (across): the odds there are how many false positives one true "
        "positive is worth. Worth using where the curve lies above both 0, acting on nobody, and the dashed line, "
        "acting on everybody; where a line is missing it lies below 0, and acting so does harm.",
        (("line blue", "acting on the model"), ("line dashed muted", "acting on everybody"))),
}
EVALUATION_FIGURES = (*(f"{key}.png" for key in LABEL_PLOTS), "threshold_sweep.png", "positive_rate.png")


def label_figures(
    labels: np.ndarray, probabilities: np.ndarray, calibrated: np.ndarray, captions: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, Figure]]:
    """(key, figure) of each of LABEL_PLOTS: all labels in panels, six in a row; arrays (N, L), names by `captions`. A
    label without a curve says its caption instead. It is the same figure, whose curves are drawn anew: making its axes
    takes longer than they do."""
    findings = list(captions[next(iter(LABEL_PLOTS))])
    figure, axes = _panels(len(findings))
    frame = [set(ax.get_children()) for ax in axes]
    columns = list(known_columns(findings, labels, probabilities, calibrated))
    for key, plot in LABEL_PLOTS.items():
        for ax, own, (name, *arrays) in zip(axes, frame, columns, strict=True):
            for artist in set(ax.get_children()) - own:
                artist.remove()
            if has_curve(plot, arrays[0]):
                plot.draw(ax, *arrays)
            ax.set_title(f"{_two_lines(name)}\n{plot.metric} {captions[key][name]}", fontsize=8.5)
        figure.supxlabel(plot.xlabel, fontsize=10, y=0.012)
        figure.supylabel(plot.ylabel, fontsize=10, x=0.008)
        yield key, figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Empty unit axes, six in a row."""
    lines = -(-count // 6)
    height = 0.9 + 2.17 * lines
    figure = new_figure(13, height, layout=None)  # solving the layout of 18 panels takes a second; this one is fixed
    axes = figure.subplots(lines, 6, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(left=0.055, right=0.99, bottom=0.56 / height, top=1 - 0.59 / height, wspace=0.2, hspace=0.42)
    _unit_axes(axes.flat[0], edge=0.02)  # all share its limits and ticks
    for ax in axes.flat[count:]:
        ax.remove()
    for ax in axes.flat[:count]:
        ax.set_aspect("equal")
        _tidy(ax)
    return figure, list(axes.flat[:count])


def known_columns(findings: Iterable[str], labels: np.ndarray, *others: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """(name, labels (n,), others (n,)...) of each finding: the rows of (N, L) whose label is known."""
    for name, own, *columns in zip(findings, labels.T, *(other.T for other in others), strict=True):
        known = own != UNKNOWN
        yield name, own[known], *(column[known] for column in columns)


def label_svgs(
    plot: LabelPlot, salt: str, findings: Iterable[str], labels: np.ndarray, probabilities: np.ndarray,
    calibrated: np.ndarray,
) -> Iterator[str | None]:
    """Each label's panel for the page, None where it has no curve; arrays (N, L). `salt`: see svg. All are drawn on the
    same axes: making those takes longer than the curves."""
    figure = new_figure(2.1, 2, layout=None)
    ax = figure.add_axes((0.15, 0.13, 0.82, 0.83))
    _unit_axes(ax)
    _tidy(ax, grid="y")
    frame = set(ax.get_children())
    for name, *arrays in known_columns(findings, labels, probabilities, calibrated):
        if not has_curve(plot, arrays[0]):
            yield None
            continue
        plot.draw(ax, *arrays)
        yield svg(figure, f"{salt} {name}")
        for artist in set(ax.get_children()) - frame:
            artist.remove()


def has_curve(plot: LabelPlot, labels: np.ndarray) -> bool:
    return 0 < labels.sum() < len(labels) or (plot.one_class and len(labels) > 0)


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` of a curve's points, evenly along it, both ends among them; none is moved."""
    if len(x) <= most:
        return x, y
    along = np.append(0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    keep = np.unique(np.searchsorted(along, np.linspace(0, along[-1], most)).clip(max=len(x) - 1))
    keep[-1] = len(x) - 1
    return x[keep], y[keep]


def sweep_figure(
    thresholds: np.ndarray, sweep: Mapping[str, np.ndarray], metrics: Mapping, size: tuple[float, float] = (8.5, 4.5),
    page: bool = False,
) -> Figure:
    """What one threshold (T,) for all labels does to each metric, (T, 1 + L) of threshold_sweep. For the page: without
    a legend, and with names by which its script finds the curves."""
    figure = new_figure(*size, layout=None if page else "constrained")
    left, right = (0.4 / size[0], 0.1 / size[0])  # inches, as report.html has them for its slider
    ax = figure.add_axes((left, 0.3 / size[1], 1 - left - right, 1 - 0.4 / size[1])) if page else figure.subplots()
    for key, title, colour in SWEEP_CURVES:
        width = 2.4 if key == "positive_rate" else 1.6
        ax.plot(thresholds, sweep[key][:, 0], color=colour, linewidth=width, label=title, gid=f"curve-{key}")
    rate, chosen = metrics["at_0.5"]["label_rate"], min(metrics["thresholds"]["global"], 1)
    for gid, (x, y), colour, style, title in (
        ("label_rate", ((0, 1), (rate, rate)), ORANGE, "--", f"Label rate {percent(rate)}"),
        ("tuned", ((chosen, chosen), (0, 1)), GREY, ":", f"Global threshold {chosen:.3f}"),
        ("threshold", ((0.5, 0.5), (0, 1)), INK, "-", "Threshold 0.5"),
    ):
        ax.plot(x, y, color=colour, linestyle=style, linewidth=1.2, label=title, gid=f"curve-{gid}")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.set_xticks(np.arange(0, 1.01, 0.2 if size[0] < 6 else 0.1))
    _tidy(ax, grid="y")
    if not page:
        ax.set(xlabel="Threshold, one for all labels", ylabel="Value")
        ax.set_title("Threshold sweep", loc="left", fontsize=11)
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    return figure


def rate_figure(metrics: Mapping, narrow: bool = False) -> Figure:
    """Per label: how often it is present, and how often it is predicted at 0.5 and with tuned thresholds. On a narrow
    figure names stand above their row."""
    names, rows = list(metrics["per_label"])[::-1], list(metrics["per_label"].values())[::-1]
    places = np.arange(len(rows))
    truth, half, tuned = 100 * np.array([
        (row["label_rate"], row["at_0.5"]["positive_rate"], row["positive_rate"]) for row in rows]).T
    figure = new_figure(*((4.2, 1.06 + 0.43 * len(rows)) if narrow else (9, 1.14 + 0.27 * len(rows))))
    ax = figure.subplots()
    ax.hlines(places, truth, half, color=LIGHT, linewidth=2, zorder=1)
    ax.plot(truth, places, "|", markersize=10 if narrow else 13, markeredgewidth=2.6, color=INK, label="Label rate")
    ax.plot(half, places, "o", markersize=6.5, markerfacecolor="#ffffff", markeredgecolor=ORANGE, markeredgewidth=1.6,
            label="Predicted at 0.5", zorder=3)
    ax.plot(tuned, places, "o", markersize=6.5, color=BLUE, label="Predicted, tuned", zorder=4)
    ax.set(xlim=(-2, 102), ylim=(-0.7, len(rows) - (0 if narrow else 0.3)), xlabel="Share of volumes, %")
    _tidy(ax, grid="x")
    if narrow:
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        for place, name in zip(places, names, strict=True):
            ax.text(-2, place + 0.32, name, fontsize=9, color=INK)
    else:
        ax.set_yticks(places, names, fontsize=9)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, handletextpad=0.2, columnspacing=1,
                  labelcolor=INK)
    return figure


def difference_figure(rows: Mapping[str, Mapping]) -> Figure:
    """A row for each label, from the top down: its difference from a baseline, with its interval where there is one.
    Coloured where the corrected p is below 0.05."""
    height = 0.45 + 0.25 * len(rows)
    figure = new_figure(4.8, height, layout=None)  # solving a layout takes longer than the drawing
    ax = figure.add_axes((0.46, 0.35 / height, 0.52, 1 - 0.4 / height))
    places = range(len(rows))[::-1]
    ax.axvline(0, color=INK, linewidth=1)
    for place, row in zip(places, rows.values(), strict=True):
        told_apart = row["p_corrected"] is not None and row["p_corrected"] < 0.05
        colour = (BLUE if row["difference"] > 0 else ORANGE) if told_apart else GREY
        if row["interval"]:
            ax.plot(row["interval"], (place, place), color=colour, linewidth=2)
        ax.plot(row["difference"], place, "o", markersize=6, color=colour)
    ax.set_ylim(-0.7, len(rows) - 0.3)
    _tidy(ax, grid="x")
    ax.spines["left"].set_visible(False)
    ax.set_yticks(places, list(rows), fontsize=9)
    ax.locator_params("x", nbins=6)
    return figure


def training_figure(history: list[dict]) -> Figure:
    """Loss, tuning AUROC and positive rate by epoch, from log.jsonl; frozen epochs are shaded, the best is ringed."""
    figure = new_figure(13, 4)
    for ax, (title, curves) in zip(figure.subplots(1, 3), TRAINING_PANELS, strict=True):
        draw_training(ax, history, curves)
        ax.set_title(title, loc="left", fontsize=11)
    return figure


def training_svgs(history: list[dict]) -> list[tuple[str, str]]:
    """(title, drawing) of the panels that have a value to show."""
    panels = []
    for title, curves in TRAINING_PANELS:
        values = np.array([[row.get(key) for row in history] for key, _, _ in curves], dtype=float)
        if np.isfinite(values).any():
            figure = new_figure(4.2, 2.7)
            draw_training(figure.subplots(), history, curves)
            panels.append((title, svg(figure, title)))
    return panels


def draw_training(ax: Axes, history: list[dict], curves: Sequence[tuple[str, str, str]]) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [row.get("epoch", number) for number, row in enumerate(history, 1)]
    frozen = [epoch for epoch, row in zip(epochs, history, strict=True) if row.get("stage") == "frozen"]
    best = [(n, row.get("tuning_auroc_macro")) for n, row in zip(epochs, history, strict=True) if row.get("best")][-1:]
    ax.set(xlabel="Epoch", xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
    _tidy(ax, grid="y")
    if frozen:
        ax.axvspan(min(epochs) - 0.5, max(frozen) + 0.5, facecolor=BAND, edgecolor=LIGHT, linewidth=0.5, zorder=0,
                   label="Backbone frozen")
    for key, name, colour in curves:
        values = np.array([row.get(key) for row in history], dtype=float)  # None where an epoch has no value
        values[~np.isfinite(values)] = np.nan
        values *= 100 if key.endswith("_rate") else 1
        ax.plot(epochs, values, "o-", color=colour, markersize=4, label=name)
        for epoch, auroc in best:
            if key == "tuning_auroc_macro" and auroc is not None:
                ax.scatter(epoch, auroc, s=90, facecolors="none", edgecolors=INK, linewidths=1.3, zorder=3,
                           label=f"Best, epoch {epoch}")
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
    ax.legend(frameon=False, fontsize=9, labelcolor=INK)


def write_figures(
    folder: Path, metrics: Mapping, labels: np.ndarray, probabilities: np.ndarray, calibrated: np.ndarray,
    captions: Mapping[str, Mapping[str, str]], history: list[dict] | None,
) -> None:
    """All of an evaluation as PNG. `captions`: of LABEL_PLOTS, for each label."""
    thresholds = np.arange(1, 100) / 100
    sweep = threshold_sweep(labels, probabilities, thresholds)
    for key, figure in label_figures(labels, probabilities, calibrated, captions):
        write_figure(figure, folder / f"{key}.png", metrics["note"])
    write_figure(sweep_figure(thresholds, sweep, metrics), folder / "threshold_sweep.png", metrics["note"])
    write_figure(rate_figure(metrics), folder / "positive_rate.png", metrics["note"])
    if history:
        write_training_figure(history, folder / TRAINING_CURVES, metrics["note"])


def write_training_figure(history: list[dict], path: str | Path, note: str | None) -> None:
    """Saves training_figure(history) as a PNG, whole or not at all; for a run that is still going on."""
    write_figure(training_figure(history), Path(path), note)


def write_figure(figure: Figure, path: Path, note: str | None) -> None:
    """Saves a PNG, whole or not at all, with the note on the picture itself: pictures travel without their report."""
    below = figure.text(0.004, -0.005, note or "", va="top", color=GREY, fontsize=7)  # "tight" makes room for it
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight" if note else None, metadata={"Software": SOFTWARE})
    below.remove()


def svg(figure: Figure, salt: str) -> str:
    """A drawing to be put into an HTML page, in the page's font and colours; its width is the page's business. The same
    figure gives the same text, and `salt`, different for each drawing of a page, keeps its ids apart."""
    from matplotlib import rc_context

    for artist in figure.findobj():
        artist.set_clip_on(False)  # nothing leaves its axes, and clip paths need ids
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, dpi=72,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    (width, height), box = 72 * figure.get_size_inches(), figure.axes[0].get_position()
    axes = (box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height)
    text = file.getvalue()
    text = text[text.index(">", text.index("<svg ")) + 1 :]
    for colour, name in PAGE_COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r"<[^>]+>", lambda tag: _shorter_tag(tag[0]), text)
    for pattern, replacement in (
        (r"<defs>\s*<style.*?</defs>|<!--.*?-->", ""),  # a style for all paths of the page; comments
        (r'<path d="[^"]*" style="fill:none"/>', ""),  # backgrounds
        (r">\s*\n\s*<", "><"),
        (r"<g/>|<g></g>", ""),
    ):
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    corners = " ".join(f"{value:.1f}" for value in axes)
    return f'<svg viewBox="0 0 {width:g} {height:g}" data-axes="{corners}">{text.strip()}'


def _shorter_tag(tag: str) -> str:
    """An SVG tag without what the page has for all of them, its lengths to a tenth of a point."""
    tag = re.sub(r"-?\d+\.\d+", lambda number: f"{round(float(number[0]), 1):g}", tag)
    for pattern, replacement in (
        (r' id="curve-(\w+)"', r' data-curve="\1"'),
        (r' id="[\w.]+_\d+"| transform="rotate\(-0 [^"]*"', ""),  # figure_1, axes_1, ...: not unique in a page
        (r"\s*\n\s*", " "),
        (r" ?([MLC]) (-?\d)", r"\1\2"),
        (r"(?<=[;:]) ", ""),
        (r"font-family:[^;\"]+;|font-size:9px;|;fill:var\(--muted\)", ""),
        (r"fill:none;|;?stroke-line(cap|join):(square|miter)", ""),
    ):
        tag = re.sub(pattern, replacement, tag)
    return tag


def check_matplotlib() -> None:
    """Raises UserError, before any work, where pictures could not be drawn in the end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("found no package matplotlib, expected it for pictures; pip install matplotlib")


def import_matplotlib() -> None:
    """The first import, whatever MPLBACKEND names: a notebook hands its backend on to what it starts, and the import
    fails in an interpreter without it. In one that has it, the notebook's, its own figures go there as before."""
    wanted = os.environ.get("MPLBACKEND")
    if not wanted or "matplotlib" in sys.modules:
        return
    os.environ["MPLBACKEND"] = "agg"
    try:
        import matplotlib
    finally:
        os.environ["MPLBACKEND"] = wanted
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = wanted


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure on the Agg canvas, apart from pyplot's global state: a notebook's own figures stay untouched."""
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(ax: Axes, grid: Literal["x", "y"] | None = None) -> None:
    """Quiet axes; for the page without tick marks, whose symbols would be most of a small drawing."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(labelsize=9, length=0 if grid else 3, color=GREY, labelcolor=GREY if grid else INK)
    if grid:
        ax.grid(axis=grid, color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)


def _unit_axes(ax: Axes, edge: float = 0) -> None:
    ax.set(xlim=(-edge, 1 + edge), ylim=(-edge, 1 + edge))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks((0, 0.5, 1), ("0", "0.5", "1"))


def _two_lines(name: str, width: int = 22) -> str:
    """Titles of equal height: every name takes two lines, the first left empty if one is enough."""
    return "\n".join((["", *textwrap.wrap(name, width)])[-2:])
