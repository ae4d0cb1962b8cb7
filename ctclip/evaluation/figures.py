"""Evaluation and training as pictures (matplotlib), for the run's folder and for notebooks."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.evaluation.metrics import bin_index, threshold_table, undefined_labels
from ctclip.evaluation.text_report import percent
from ctclip.fileio import replacing
from ctclip_model import ABNORMALITIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING_CURVES = "training_curves.png"  # in a run folder; training and evaluation both write it
INK, GREY, LIGHT = "#222222", "#767676", "#dddddd"
BLUE, ORANGE, GREEN, PURPLE, OLIVE = "#0072b2", "#d55e00", "#009e73", "#9a5b9e", "#a08a00"
COLOURS = {"ink": INK, "blue": BLUE, "orange": ORANGE, "green": GREEN}
TRAINING_PANELS = (  # title; curves: key of log.jsonl, name, colour
    ("Loss", (("train_loss", "training", "blue"), ("tuning_loss", "tuning patients", "orange"))),
    ("Macro AUROC, tuning patients", (("tuning_auroc_macro", "macro AUROC", "green"),)),
    ("Positive rate at 0.5", (("positive_rate", "predicted", "orange"), ("label_rate", "labels", "ink"))),
)


def write_training_figure(history: list[dict], path: str | Path, note: str | None) -> None:
    """Saves training_figure(history) as a PNG, whole or not at all; for a run that is still going on."""
    write_figure(training_figure(history), Path(path), note)


def write_figure(figure: Figure, path: Path, note: str | None) -> None:
    """Saves a PNG, whole or not at all, with the note on the picture itself: pictures travel without their report."""
    if note:
        figure.text(0.004, -0.005, note, va="top", color=GREY, fontsize=7)  # below; "tight" makes room for it
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight" if note else None)


def roc_figure(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """18 small ROC curves, AUROC in each title; a label with one class says so instead."""
    from sklearn.metrics import roc_auc_score, roc_curve

    def draw(ax, y: np.ndarray, p: np.ndarray) -> str:
        ax.plot([0, 1], [0, 1], color=LIGHT, linewidth=1)
        fpr, tpr, _ = roc_curve(y, p)
        ax.fill_between(fpr, tpr, color=BLUE, alpha=0.1, linewidth=0)
        ax.plot(fpr, tpr, color=BLUE, linewidth=1.6)
        return f"AUROC {roc_auc_score(y, p):.3f}, {int(y.sum())}/{len(y)} positive"

    return _label_panels(labels, probabilities, draw, "False positive rate", "True positive rate")


def precision_recall_figure(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """18 small precision-recall curves with average precision; the line across is what chance gives, the label rate."""
    from sklearn.metrics import average_precision_score

    def draw(ax, y: np.ndarray, p: np.ndarray) -> str:
        ax.axhline(y.mean(), color=GREY, linewidth=1, linestyle="--")
        ax.step(*precision_recall_stairs(y, p), where="post", color=BLUE, linewidth=1.6)
        return f"AP {average_precision_score(y, p):.3f}, label rate {y.mean():.3f}"

    return _label_panels(labels, probabilities, draw, "Recall", "Precision")


def precision_recall_stairs(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(recall, precision) of one label from recall 1 down to 0, each precision held down to the next recall: the area
    below is average precision. (scikit-learn ends with a point at precision 1 that nobody has reached.)"""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(labels, probabilities)
    precision, recall = precision[recall > 0], recall[recall > 0]
    return np.append(recall, 0), np.append(precision, precision[-1])


def reliability_figure(labels: np.ndarray, before: np.ndarray, after: np.ndarray) -> Figure:
    """18 small reliability diagrams: label rate against mean probability of each bin, before and after calibration."""

    def draw(ax, y: np.ndarray, p: np.ndarray) -> str:
        ax.plot([0, 1], [0, 1], color=LIGHT, linewidth=1)
        for values, color in ((p[:, 0], ORANGE), (p[:, 1], BLUE)):
            ax.plot(*reliability_points(y, values), "o-", color=color, markersize=3, linewidth=1.2)
        return f"mean p {p[:, 0].mean():.2f}, now {p[:, 1].mean():.2f}; rate {y.mean():.2f}"

    both = np.stack([before, after], axis=2)
    figure = _label_panels(labels, both, draw, "Mean probability in the bin", "Label rate in the bin", one_class=True)
    for color, title in ((ORANGE, "as given"), (BLUE, "calibrated")):
        figure.axes[0].plot([], [], "o-", color=color, markersize=3, label=title)
    figure.legend(loc="lower right", ncols=2, frameon=False, fontsize=9, bbox_to_anchor=(0.995, 0.0))
    return figure


def reliability_points(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean probability, label rate) of each bin of one label, (bins,); the bins of the calibration error."""
    place = bin_index(probabilities)
    used = np.unique(place)
    means = [(probabilities[place == k].mean(), labels[place == k].mean()) for k in used]
    x, y = zip(*means, strict=True)
    return np.array(x), np.array(y)


def _label_panels(
    labels: np.ndarray, values: np.ndarray, draw: Callable, xlabel: str, ylabel: str, one_class: bool = False
) -> Figure:
    """3 x 6 panels on unit axes. `draw(ax, labels (N,), values (N, ...))` returns the second line of the title; labels
    with one class say so instead, unless `one_class`."""
    undefined = () if one_class else undefined_labels(labels)
    figure = new_figure(13, 7.4, layout=None)  # solving the layout of 18 panels takes a second; this one is fixed
    axes = figure.subplots(3, 6, sharex=True, sharey=True)
    figure.subplots_adjust(left=0.055, right=0.99, bottom=0.075, top=0.92, wspace=0.2, hspace=0.42)
    for j, (ax, name) in enumerate(zip(axes.flat, ABNORMALITIES, strict=True)):
        if name in undefined:
            ax.text(0.5, 0.5, "one class only:\nno curve", ha="center", va="center", color=GREY, fontsize=9)
            caption = f"{int(labels[:, j].sum())}/{len(labels)} positive"
        else:
            caption = draw(ax, labels[:, j], values[:, j])
        ax.set_title(f"{_two_lines(name)}\n{caption}", fontsize=8.5)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
        _tidy(ax)
    figure.supxlabel(xlabel, fontsize=10, y=0.012)
    figure.supylabel(ylabel, fontsize=10, x=0.008)
    return figure


def sweep_figure(labels: np.ndarray, probabilities: np.ndarray, metrics: dict) -> Figure:
    """What one cut for all labels does to each metric, with 0.5, the global cut and the label rate marked."""
    rows = threshold_table(labels, probabilities, np.arange(1, 100) / 100)
    cuts = [row["threshold"] for row in rows]
    figure = new_figure(8.5, 5)
    ax = figure.subplots()
    curves = (("Hamming accuracy", "hamming_accuracy", GREEN), ("F1 macro", "f1_macro", BLUE),
              ("Precision macro", "precision_macro", OLIVE), ("Recall macro", "recall_macro", PURPLE),
              ("Positive rate", "positive_rate", ORANGE))
    for title, key, color in curves:
        width = 2.4 if key == "positive_rate" else 1.6
        ax.plot(cuts, [row[key] for row in rows], color=color, linewidth=width, label=title)
    rate, chosen = metrics["at_0.5"]["label_rate"], metrics["thresholds"]["global"]
    ax.axhline(rate, color=ORANGE, linestyle="--", linewidth=1, label=f"Label rate {percent(rate)}")
    ax.axvline(0.5, color=GREY, linestyle=":", linewidth=1.2, label="Cut at 0.5")
    ax.axvline(chosen, color=INK, linestyle="-.", linewidth=1.2, label=f"Global cut {chosen:.3f}")
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="Threshold, one for all labels", ylabel="Value")
    ax.set_title("Threshold sweep", loc="left", fontsize=11)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _tidy(ax)
    return figure


def rate_figure(metrics: dict) -> Figure:
    """Per label: how often it is there, and how often it is predicted at 0.5 and with tuned cuts."""
    rows = list(metrics["per_label"].items())[::-1]
    places = np.arange(len(rows))
    truth = 100 * np.array([row["label_rate"] for _, row in rows])
    half = 100 * np.array([row["at_0.5"]["positive_rate"] for _, row in rows])
    tuned = 100 * np.array([row["positive_rate"] for _, row in rows])
    figure = new_figure(9, 6)
    ax = figure.subplots()
    ax.hlines(places, truth, half, color=LIGHT, linewidth=2, zorder=1)
    ax.scatter(truth, places, marker="|", s=170, linewidths=2.6, color=INK, label="Label rate", zorder=2)
    ax.scatter(half, places, s=46, facecolors="white", edgecolors=ORANGE, linewidths=1.6, zorder=3,
               label="Predicted at 0.5")
    ax.scatter(tuned, places, s=46, color=BLUE, label="Predicted, tuned cuts", zorder=4)
    ax.set_yticks(places, [name for name, _ in rows], fontsize=9)
    ax.set(xlim=(-2, 102), ylim=(-0.7, len(rows) - 0.3), xlabel="Share of volumes, %")
    m, t = metrics["at_0.5"], metrics["tuned"]
    ax.set_title(
        f"Positive rate: {percent(m['positive_rate'])} at 0.5, {percent(t['positive_rate'])} tuned; "
        f"label rate {percent(m['label_rate'])}",
        loc="left", fontsize=11, pad=24,
    )
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=9, borderaxespad=0.1)
    _tidy(ax)
    return figure


def training_figure(history: list[dict]) -> Figure:
    """Loss, tuning AUROC and positive rate by epoch, from log.jsonl; frozen epochs are shaded, the best is ringed."""
    epochs = [row.get("epoch", number) for number, row in enumerate(history, 1)]
    frozen = [epoch for epoch, row in zip(epochs, history, strict=True) if row.get("stage") == "frozen"]
    best = [(n, row.get("tuning_auroc_macro")) for n, row in zip(epochs, history, strict=True) if row.get("best")]
    figure = new_figure(13, 4)
    for ax, (title, curves) in zip(figure.subplots(1, 3), TRAINING_PANELS, strict=True):
        if frozen:
            shade = {"facecolor": "#f0f0f0", "edgecolor": GREY, "linewidth": 0.5, "zorder": 0}
            ax.axvspan(min(epochs) - 0.5, max(frozen) + 0.5, label="Backbone frozen", **shade)
        percent_scale = any(key.endswith("_rate") for key, _, _ in curves)
        for key, name, colour in curves:
            color = COLOURS[colour]
            values = np.array([row.get(key) for row in history], dtype=float)  # None where an epoch has no value
            ax.plot(epochs, values * (100 if percent_scale else 1), "o-", color=color, markersize=4, label=name)
            if key == "tuning_auroc_macro" and best and best[-1][1] is not None:
                ring = {"facecolors": "none", "edgecolors": INK, "linewidths": 1.3, "zorder": 3}
                ax.scatter(*best[-1], s=90, label=f"Best, epoch {best[-1][0]}", **ring)
        ax.set(xlabel="Epoch", xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
        ax.set_title(title + (", %" if percent_scale else ""), loc="left", fontsize=11)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.legend(frameon=False, fontsize=9)
        _tidy(ax)
    return figure


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """A figure on the Agg canvas, apart from pyplot's global state: a notebook's own figures stay untouched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _tidy(ax) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9, length=3, color=GREY)


def _two_lines(name: str, width: int = 22) -> str:
    """Titles of equal height: every name takes two lines, the first left empty if one is enough."""
    return "\n".join((["", *textwrap.wrap(name, width)])[-2:])
