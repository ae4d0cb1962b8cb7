"""Bootstrap intervals and p-values: patients are drawn with replacement, and every metric is computed on each draw.

Patients, not volumes: a patient's volumes are not independent, and drawn one by one they would make every interval too
short. Thresholds and calibration stay fixed; the intervals are about the sample of reported patients, not about those
that were fitted on. Two predictions are compared on the same draws, so that what both get right or wrong cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ctclip.config import RESAMPLES
from ctclip.evaluation.metrics import (
    EvaluationError,
    bin_indices,
    calibration_errors,
    confusion_counts,
    nanmean,
    none_if_nan,
    per_label_from_counts,
    pooled_auroc,
    resampled_auroc_and_ap,
    summary_from_counts,
)
from ctclip_model import ABNORMALITIES

LEVEL = 0.95
ROUNDING = 1e-12  # smaller differences are rounding
MIN_CASES = 10  # patients with and without a finding; with fewer, intervals are too short (LOG.md)
DEFINED = 0.95  # share of the resamples in which a metric must be defined for its interval to be given


@dataclass(frozen=True)
class Resamples:
    """`counts` (B, P) float: how often each patient is drawn. `group` (N,): the patient of each row."""

    group: np.ndarray
    counts: np.ndarray

    def sums(self, summands: np.ndarray) -> np.ndarray:
        """(N, K) -> (B, K): sums over the rows drawn."""
        by_patient = np.zeros((self.counts.shape[1], summands.shape[1]))
        np.add.at(by_patient, self.group, summands)
        return self.counts @ by_patient

    def only(self, chosen: np.ndarray) -> Resamples:
        """The same draws, seen by some of the rows: a mask (N,)."""
        return Resamples(self.group[chosen], self.counts)


def draw(patients: Sequence[str] | np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Resamples:
    """As many patients as there are, drawn with replacement, `resamples` times; the order of rows does not matter."""
    if resamples < 1:
        raise EvaluationError(f"found {resamples} resamples, expected at least 1; 1000 are usual")
    unique, group = np.unique(np.asarray(patients), return_inverse=True)
    counts = np.random.default_rng(seed).multinomial(len(unique), np.full(len(unique), 1 / len(unique)), resamples)
    return Resamples(group, counts.astype(np.float64))


# -------------------------------------------------------------------------------------------- metrics in every resample

# Summaries are {metric: (B,)}, per-label columns {metric: (B, L)}, with the keys of metrics.json.


def resampled_decisions(labels: np.ndarray, decisions: np.ndarray, resamples: Resamples) -> tuple[dict, dict]:
    """(the part of M that depends on decisions, per-label columns) in every resample."""
    sums = resamples.sums(confusion_counts(labels, decisions))
    return summary_from_counts(sums), per_label_from_counts(sums)


def resampled_ranking(labels: np.ndarray, probabilities: np.ndarray, resamples: Resamples) -> tuple[dict, dict]:
    """(the part of M that no threshold can change, per-label columns) in every resample."""
    auroc, average_precision = resampled_auroc_and_ap(labels, probabilities, resamples.group, resamples.counts)
    micro = pooled_auroc(labels, probabilities, resamples.group, resamples.counts)
    summary = {"auroc_macro": nanmean(auroc), "auroc_micro": micro}
    return summary, {"auroc": auroc, "average_precision": average_precision}


def resampled_brier(labels: np.ndarray, probabilities: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Brier scores (B, L). Calibration errors are not resampled: noise in a bin counts as error, so an estimate lies
    above the truth and resamples above the estimate; see ece_if_calibrated."""
    sums = resamples.sums(np.column_stack([(probabilities - labels) ** 2, np.ones(len(labels))]))
    return sums[:, :-1] / sums[:, -1:]


def ece_if_calibrated(probabilities: np.ndarray, group: np.ndarray, draws: int = 100, seed: int = 0) -> float:
    """The macro calibration error that these probabilities (N, L) would show if they meant exactly what they say.

    Labels are drawn from the probabilities, `draws` times, one random number for all of a patient's rows (`group`,
    (N,)). What an observed error is to be compared with: it is never 0 on a finite table.
    """
    rng, bins = np.random.default_rng(seed), bin_indices(probabilities)
    drawn = (rng.random((group.max() + 1, probabilities.shape[1]))[group] < probabilities for _ in range(draws))
    return float(np.mean([calibration_errors(labels, probabilities, bins).mean() for labels in drawn]))


# --------------------------------------------------------------------------------------------------------- intervals


def interval(values: np.ndarray) -> list[float] | None:
    """[low, high] percentiles of (B,); None where the metric is undefined in too many resamples to say."""
    known = values[~np.isnan(values)]
    if len(known) < DEFINED * len(values):
        return None
    tail = (1 - LEVEL) / 2
    return [float(x) for x in np.quantile(known, (tail, 1 - tail))]


def enough_cases(labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """(L,) mask: labels that MIN_CASES patients have, and as many lack."""
    counts = [[len(np.unique(patients[labels[:, j] == value])) for j in range(labels.shape[1])] for value in (0, 1)]
    return np.min(counts, axis=0) >= MIN_CASES


# -------------------------------------------------------------------------------------------------------- differences


def compare(first: Mapping, second: Mapping, first_resampled: Mapping, second_resampled: Mapping) -> dict:
    """{key: {difference: first - second, interval, p}} of two dictionaries of numbers and the same resampled, (B,)."""
    return {
        key: difference(first[key], second[key], first_resampled[key] - second_resampled[key])
        for key in first
        if key in first_resampled
    }


def difference(first: float | None, second: float | None, resampled: np.ndarray) -> dict:
    """One difference. p is two-sided, from the share of resamples on the other side of 0, so that p < 0.05 where
    the interval excludes 0; with 1000 resamples it is never below 0.002. None where undefined."""
    if first is None or second is None or (bounds := interval(resampled)) is None:
        return {"difference": None, "interval": None, "p": None}
    known = resampled[~np.isnan(resampled)]
    tail = min((known <= ROUNDING).sum(), (known >= -ROUNDING).sum())
    return {
        "difference": first - second,
        "interval": bounds,
        "p": float(min(1, 2 * (tail + 1) / (len(known) + 1))),
    }


def compare_labels(first: np.ndarray, second: np.ndarray, resampled: np.ndarray) -> dict[str, dict]:
    """{label: as from `difference`, and p_corrected} for (L,), (L,) and differences (B, L).

    p_corrected is Holm's over the labels (Scandinavian Journal of Statistics 1979): below 0.05 for any label at all in
    about 5 % of comparisons of equals.
    """
    rows = {
        name: difference(none_if_nan(first[j]), none_if_nan(second[j]), resampled[:, j])
        for j, name in enumerate(ABNORMALITIES)
    }
    corrected = holm([row["p"] for row in rows.values()])
    return {name: row | {"p_corrected": p} for (name, row), p in zip(rows.items(), corrected, strict=True)}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment; None stays None and is not counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[i] = highest
    return adjusted
