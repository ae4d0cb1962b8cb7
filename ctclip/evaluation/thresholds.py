"""Labels and probabilities -> thresholds: exhaustive search for the best one by an objective; the map onto 0.5.

Thresholds are for probabilities as the model gives them, before calibration. `prevalence` (L,), NaN where nothing is
asked for, weighs positives and negatives so that each label has the rate asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import numpy as np

from ctclip.config import DEFAULT_OBJECTIVE, OBJECTIVES
from ctclip.evaluation.metrics import (
    EvaluationError,
    Resamples,
    checked,
    class_counts,
    crg_exchange,
    lacks_a_class,
    positives_at,
    sorted_by_class,
)
from ctclip_model import UNKNOWN

# Each objective scores all candidates at once: tp and fp are (L, T) for L labels and T thresholds, positives and the
# number of known rows n are (L, 1), rate is the share of positives among all known labels. It returns (T,) scores to
# maximise, so that one label (L = 1) and one global threshold for all labels are the same search.


def _score_f1(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: np.ndarray, rate: float) -> np.ndarray:
    predicted_and_true = tp + fp + positives
    return (2 * tp / np.where(predicted_and_true > 0, predicted_and_true, 1)).mean(axis=0)


def _score_crg(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: np.ndarray, rate: float) -> np.ndarray:
    """CRG grows with this sum over the labels, so its best thresholds are found label by label, at the pooled rate."""
    r = crg_exchange(rate, 1)
    return (r * tp - r * (positives - tp) - fp).sum(axis=0) / n.sum()


def _score_youden(
    tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: np.ndarray, rate: float, floor: float | None = None
) -> np.ndarray:
    """Sensitivity + specificity - 1, means over the labels with both classes; with `floor`, the most specific threshold
    that finds at least that share of the positives."""
    both = (positives > 0) & (positives < n)
    share = both / max(both.sum(), 1)
    sensitivity = (share * tp / np.where(both, positives, 1)).sum(axis=0)
    specificity = (share * (1 - fp / np.where(both, n - positives, 1))).sum(axis=0)
    if floor is None:
        return sensitivity + specificity - 1
    return np.where(sensitivity >= floor - 1e-12, 1 + specificity, sensitivity)


OBJECTIVE_SCORES: dict[str, Callable[..., np.ndarray]] = {  # in OBJECTIVES' order
    "prevalence": lambda tp, fp, positives, n, rate: -np.abs((tp + fp - positives).sum(axis=0)) / n.sum(),
    "f1": _score_f1,
    "hamming": lambda tp, fp, positives, n, rate: 1 - (positives - tp + fp).sum(axis=0) / n.sum(),
    "youden": _score_youden,
    "crg": _score_crg,
}
SENSITIVITY = re.compile(r"sensitivity\s*(?:>=|:|=)\s*(0?\.\d+|1|1\.0*)", re.ASCII)


def objective_score(objective: str) -> Callable[..., np.ndarray]:
    """The function behind a name: one of OBJECTIVES, or "sensitivity:X" with X in (0, 1] (also "sensitivity>=X")."""
    match = SENSITIVITY.fullmatch(objective)
    if match and float(match[1]) > 0:
        return partial(_score_youden, floor=float(match[1]))
    if objective not in OBJECTIVES:
        raise EvaluationError(
            f"found objective {objective!r}, expected one of {', '.join(OBJECTIVES)} or sensitivity:X with X above 0 "
            "and at most 1, such as sensitivity:0.9"
        )
    return OBJECTIVE_SCORES[objective]


def tune_global_threshold(
    labels: np.ndarray, probabilities: np.ndarray, objective: str = DEFAULT_OBJECTIVE,
    prevalence: np.ndarray | None = None,
) -> float:
    """The one threshold for all labels that maximises `objective` (macro F1, pooled rate, pooled accuracy, mean Youden,
    CRG, or mean specificity at a mean sensitivity)."""
    return _best_threshold(labels, probabilities, objective, prevalence, slice(None))


def tune_label_thresholds(
    labels: np.ndarray, probabilities: np.ndarray, objective: str = DEFAULT_OBJECTIVE,
    prevalence: np.ndarray | None = None,
) -> np.ndarray:
    """(L,) thresholds, each maximising `objective` on its own label.

    A label without both classes here (lacks_a_class) has nothing to tune on and takes the global threshold.
    """
    own = [slice(None) if lacks else slice(j, j + 1) for j, lacks in enumerate(lacks_a_class(labels))]
    return np.array([_best_threshold(labels, probabilities, objective, prevalence, which) for which in own])


def _class_weights(labels: np.ndarray, prevalence: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(L,) weights of each label's positives and negatives that give it the rate asked for; 1 with one class."""
    rates, wanted = label_rates(labels), target_rates(labels, prevalence)
    two = (rates > 0) & (rates < 1)
    safe = np.where(two, rates, 0.5)
    return np.where(two, wanted / safe, 1), np.where(two, (1 - wanted) / (1 - safe), 1)


def _best_threshold(
    labels: np.ndarray, probabilities: np.ndarray, objective: str, prevalence: np.ndarray | None, which: slice
) -> float:
    """Exhaustive search over candidate_thresholds for the labels in `which`. Of equally good ones, the one whose
    positive rate is nearest to the label rate, then the highest."""
    labels, probabilities = checked(labels, probabilities)
    score_of = objective_score(objective)
    of_positive, of_negative = (column[:, None] for column in _class_weights(labels, prevalence))
    negatives, positives = (count[:, None] for count in class_counts(labels))
    known, positives = (negatives + positives)[which], of_positive * positives
    rate = np.clip(positives.sum() / max(np.sum(labels != UNKNOWN), 1), 1e-12, 1)
    positives = positives[which]
    candidates = candidate_thresholds(probabilities[:, which][labels[:, which] != UNKNOWN])
    by_class = sorted_by_class(labels[:, which], probabilities[:, which])
    scores, gaps = [], []
    for part in np.array_split(candidates, len(candidates) // 2**15 + 1):  # bounds the memory on a large cohort
        fp, tp = positives_at(by_class, part)
        tp, fp = of_positive[which] * tp, of_negative[which] * fp
        scores.append(score_of(tp, fp, positives, known, rate))
        gaps.append(np.abs((tp + fp - positives).sum(axis=0)))
    score, gap = np.concatenate(scores), np.concatenate(gaps)
    best = np.flatnonzero(score >= score.max() - 1e-12)
    best = best[gap[best] <= gap[best].min() + 1e-9]
    return float(candidates[best[-1]])


def resampled_thresholds(
    labels: np.ndarray, probabilities: np.ndarray, objective: str, prevalence: np.ndarray | None, resamples: Resamples
) -> np.ndarray:
    """(B, L): each label's threshold in B resamples; NaN where a label lacks a class. Of equally good ones, the
    highest."""
    score_of, (of_positive, of_negative) = objective_score(objective), _class_weights(labels, prevalence)
    rate = np.clip(label_rates(labels).mean(), 1e-12, 1)
    found = np.full((len(resamples.counts), labels.shape[1]), np.nan)
    for j in np.flatnonzero(~lacks_a_class(labels)):
        own = np.flatnonzero(labels[:, j] != UNKNOWN)
        order = own[np.argsort(-probabilities[own, j], kind="stable")]
        p, positive = probabilities[order, j], labels[order, j] == 1
        ends = np.flatnonzero(np.append(p[1:] != p[:-1], True))  # last row of each run of ties
        below = np.append(p[ends[1:]], 0.0)  # halfway to the next lower probability, as in candidate_thresholds
        cuts = np.append(np.nextafter(p[0], 2), np.minimum((p[ends] + below) / 2, p[ends]))
        for b, counts in enumerate(resamples.counts):
            drawn = counts[resamples.group[order]].astype(np.float64)
            tp, fp = (np.append(0, np.cumsum(drawn * which)[ends]) for which in (positive, ~positive))
            if tp[-1] and fp[-1]:
                tp, fp = of_positive[j] * tp, of_negative[j] * fp
                counted = np.array([[tp[-1] + fp[-1]]])
                score = score_of(tp[None], fp[None], np.array([[tp[-1]]]), counted, rate)
                found[b, j] = cuts[np.flatnonzero(score >= score.max() - 1e-12)[0]]
    return found


def candidate_thresholds(probabilities: np.ndarray) -> np.ndarray:
    """Ascending, one for each way `probability >= threshold` can divide these values: below all of them, midway
    between neighbours (tied volumes are never split), above all of them (that last one may exceed 1)."""
    values = np.unique(probabilities)
    lower, upper = np.concatenate([[0.0], values]), np.concatenate([values, [1.0]])
    middle = (lower + upper) / 2
    # Neighbours so close that their midpoint rounds onto the lower one: the upper value itself divides them.
    middle[1:] = np.where(middle[1:] > values, middle[1:], np.nextafter(values, 2))
    return middle


def rescale_to_half(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Values in [0, 1] that are >= 0.5 exactly where `probabilities` >= `thresholds`, for whoever decides at 0.5.

    Piecewise linear per label, from 0 to the threshold and from there to 1: increasing, so that no label's AUROC
    changes (values closer than 1e-16 may fall together). The result ranks and decides; it is no probability any more.
    """
    p, thresholds = np.broadcast_arrays(np.asarray(probabilities, np.float64), thresholds)
    above = p >= thresholds
    low = p / np.where(above, 1, 2 * thresholds)
    high = 0.5 + (p - thresholds) / np.where(above & (thresholds < 1), 2 * (1 - thresholds), 1)
    return np.where(above, high, low)


def label_rates(labels: np.ndarray) -> np.ndarray:
    """(L,) shares of positives among the known labels; 0 where none is known."""
    negatives, positives = class_counts(labels)
    return positives / np.maximum(negatives + positives, 1)


def target_rates(labels: np.ndarray, prevalence: np.ndarray | None) -> np.ndarray:
    """(L,) rates to calibrate for: `prevalence` where it is a number, else those of `labels`, with those of one-class
    labels moved half a row away from 0 and 1."""
    half = 0.5 / np.maximum((labels != UNKNOWN).sum(axis=0), 1)
    rates = np.clip(label_rates(labels), half, 1 - half)
    return rates if prevalence is None else np.where(np.isnan(prevalence), rates, prevalence)
