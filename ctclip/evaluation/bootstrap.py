"""Bootstrap intervals and p-values: patients are drawn with replacement, and every metric is computed on each draw.

Patients, not volumes: a patient's volumes are not independent, and drawn one by one they would make every interval too
short. Thresholds and calibration stay fixed; the intervals are about the sample of reported patients, not about those
that were fitted on. Two predictions are compared on the same draws, so that what both get right or wrong cancels.

Everywhere the first of the resamples is the table itself: (1 + B,) values are a metric and its B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ctclip.config import RESAMPLES
from ctclip.evaluation.metrics import EvaluationError, Resamples, bin_indices, calibration_errors
from ctclip_model import UNKNOWN

LEVEL = 0.95
ROUNDING = 1e-12  # smaller differences are rounding
MIN_CASES = 10  # patients with and without a finding; with fewer, intervals are too short (LOG.md)
DEFINED = 0.95  # share of the resamples in which a metric must be defined for its interval to be given


def draw(patients: Sequence[str] | np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Resamples:
    """The table itself, then as many patients as there are, drawn with replacement, `resamples` times; the order of
    rows does not matter."""
    if resamples < 1:
        raise EvaluationError(f"found {resamples} resamples, expected at least 1; 1000 are usual")
    unique, group = np.unique(np.asarray(patients), return_inverse=True)
    n = len(unique)
    rng, shares = np.random.default_rng(seed), np.full(n, 1 / n)
    counts = np.ones((n, 1 + resamples), np.int16).T  # a patient's counts lie together: rankings need them so
    for row in counts[1:]:
        row[:] = rng.multinomial(n, shares)
    return Resamples(group, counts)


def resampled_brier(labels: np.ndarray, probabilities: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Brier scores (1 + B, L). Calibration errors are not resampled: noise in a bin counts as error, so an estimate
    lies above the truth and resamples above the estimate; see ece_if_calibrated."""
    known = labels != UNKNOWN
    sums = resamples.sums(np.column_stack([np.where(known, (probabilities - labels) ** 2, 0), known]))
    errors, counts = np.split(sums, 2, axis=1)
    return np.divide(errors, counts, out=np.full(errors.shape, np.nan), where=counts > 0)


def ece_if_calibrated(
    probabilities: np.ndarray, known: np.ndarray, group: np.ndarray, draws: int = 100, seed: int = 0
) -> float:
    """The macro calibration error that these probabilities (N, L) would show if they meant exactly what they say.

    Labels are drawn from the probabilities, `draws` times, one random number for all of a patient's rows (`group`,
    (N,)); `known` (N, L) masks those that there are. What an observed error is to be compared with: it is never 0 on a
    finite table.
    """
    rng, bins = np.random.default_rng(seed), bin_indices(probabilities, known)
    drawn = (rng.random((group.max() + 1, probabilities.shape[1]))[group] < probabilities for _ in range(draws))
    errors = [calibration_errors(np.where(known, labels, UNKNOWN), probabilities, bins) for labels in drawn]
    return float(np.nanmean(errors))


def interval(values: np.ndarray) -> list[float] | None:
    """[low, high] percentiles of (1 + B,); None where there are no resamples, or the metric is undefined in too many to
    say."""
    known = values[1:][~np.isnan(values[1:])]
    if not len(known) or len(known) < DEFINED * (len(values) - 1):
        return None
    tail = (1 - LEVEL) / 2
    return [float(x) for x in np.quantile(known, (tail, 1 - tail))]


def intervals(values: Mapping[str, np.ndarray]) -> dict[str, list[float] | None]:
    return {key: interval(of_one) for key, of_one in values.items()}


def label_intervals(columns: Mapping[str, np.ndarray], findings: Sequence[str]) -> dict[str, dict]:
    """{label: {metric: interval}} of {metric: (1 + B, L)}."""
    return {name: intervals({key: column[:, j] for key, column in columns.items()}) for j, name in enumerate(findings)}


def enough_cases(labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """(L,) mask: labels that MIN_CASES patients have, and as many lack."""
    counts = [[len(np.unique(patients[labels[:, j] == value])) for j in range(labels.shape[1])] for value in (0, 1)]
    return np.min(counts, axis=0) >= MIN_CASES


def difference(resampled: np.ndarray) -> dict:
    """{difference, interval, p} of the difference of two predictions, (1 + B,).

    p is two-sided, from the share of resamples on the other side of 0, so that p < 0.05 where the interval excludes 0;
    with 1000 resamples it is never below 0.002. None where undefined.
    """
    if np.isnan(resampled[0]) or (bounds := interval(resampled)) is None:
        return {"difference": None, "interval": None, "p": None}
    known = resampled[1:][~np.isnan(resampled[1:])]
    tail = min((known <= ROUNDING).sum(), (known >= -ROUNDING).sum())
    p = float(min(1, 2 * (tail + 1) / (len(known) + 1)))
    return {"difference": float(resampled[0]), "interval": bounds, "p": p}


def label_differences(resampled: np.ndarray, findings: Sequence[str]) -> dict[str, dict]:
    """{label: as from `difference`, and p_corrected} for differences (1 + B, L).

    p_corrected is Holm's over the labels (Scandinavian Journal of Statistics 1979): below 0.05 for any label at all in
    about 5 % of comparisons of equals.
    """
    rows = {name: difference(resampled[:, j]) for j, name in enumerate(findings)}
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
