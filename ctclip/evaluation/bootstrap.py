"""Intervals and p-values from resamples: patients are drawn with replacement, or left out one after the other.

Patients, not volumes: a patient's volumes are not independent, and drawn one by one they would make every interval too
short. Thresholds and calibration stay fixed; the intervals are about the sample of reported patients, not about those
that were fitted on. Two predictions are compared on the same draws, so that what both get right or wrong cancels.

What each metric takes is what held best in tests/benchmarks/coverage.py (LOG.md):
- metrics of all labels that depend on decisions (macro F1, ...): Student's t with the jackknife's standard error. The
  bootstrap's distribution of F1 lies below the value and is too narrow where labels are rare.
- metrics of one label, all shares between 0 and 1: normal on the logit scale with the bootstrap's standard error.
- AUROC and Brier score of all labels, and differences of labels: the bootstrap's percentiles.

Everywhere the first of the resamples is the table itself: (1 + B,) values are a metric and its B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import expit, logit, ndtri, stdtr, stdtrit

from ctclip.config import RESAMPLES
from ctclip.evaluation.metrics import (
    EvaluationError,
    Resamples,
    bin_indices,
    calibration_errors,
    confusion_counts,
    jackknifed_decisions,
    ratio,
)
from ctclip_model import UNKNOWN

LEVEL = 0.95
ROUNDING = 1e-12  # smaller differences are rounding
TAIL = (1 - LEVEL) / 2
MIN_CASES = 10  # patients with and without a finding; with fewer, intervals are too short (LOG.md)
MACRO_NEED_CALLED = ("precision_macro", "f1_macro")
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
    return ratio(errors, counts, np.nan)


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
    return [float(x) for x in np.quantile(known, (TAIL, 1 - TAIL))]


def logit_interval(values: np.ndarray) -> list[float] | None:
    """[low, high] of a share, normal on the logit scale with the spread of (1 + B,). None where the share is 0 or 1, or
    is so, or undefined, in too many resamples: they cannot show what the sample does not hold."""
    inside = values[1:][(values[1:] > 0) & (values[1:] < 1)]
    if not 0 < values[0] < 1 or len(inside) < 2 or len(inside) < DEFINED * (len(values) - 1):
        return None
    half = ndtri(1 - TAIL) * logit(inside).std(ddof=1)
    return [float(x) for x in expit(logit(values[0]) + np.array([-half, half]))]


def jackknife_error(left_out: np.ndarray) -> float | None:
    """Standard error of a metric, from its values (P,) without one patient after the other; None where it is undefined
    without one of them, or there are too few."""
    n = len(left_out)
    if n < MIN_CASES or np.isnan(left_out).any():
        return None
    return float(np.sqrt((n - 1) * left_out.var()))


def jackknife_interval(value: float, left_out: np.ndarray) -> list[float] | None:
    """[low, high] within [0, 1] by Student's t (Miller, Biometrika 1974). None as in jackknife_error, or where all
    patients are alike."""
    error = jackknife_error(left_out)
    if error is None or error < ROUNDING:
        return None
    half = stdtrit(len(left_out) - 1, 1 - TAIL) * error
    return [max(0.0, float(value - half)), min(1.0, float(value + half))]


def label_intervals(columns: Mapping[str, np.ndarray], findings: Sequence[str]) -> dict[str, dict]:
    """{label: {metric: interval}} of {metric: (1 + B, L)}, all of them shares."""
    return {name: {key: logit_interval(column[:, j]) for key, column in columns.items()}
            for j, name in enumerate(findings)}


def enough_cases(labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """(L,) mask: labels that MIN_CASES patients have, and as many lack."""
    counts = [[len(np.unique(patients[labels[:, j] == value])) for j in range(labels.shape[1])] for value in (0, 1)]
    return np.min(counts, axis=0) >= MIN_CASES


def left_out_decisions(labels: np.ndarray, decisions: np.ndarray, resamples: Resamples) -> dict[str, np.ndarray]:
    """jackknifed_decisions, NaN where an interval would not hold: too few patients called positive of any label,
    too few with a row that is right, or with one that is not (MIN_CASES each), no resamples wanted."""
    left_out = jackknifed_decisions(labels, decisions, resamples)
    right = confusion_counts(labels, decisions)[:, [-2]]
    exact = (resamples.by_patient(np.column_stack([right, 1 - right])) > 0).sum(axis=0).min()
    for keys, enough in ((MACRO_NEED_CALLED, called_patients(labels, decisions, resamples).min() >= MIN_CASES),
                         (("exact_match",), exact >= MIN_CASES), (tuple(left_out), len(resamples.counts) > 1)):
        for key in () if enough else keys:
            left_out[key] = np.full_like(left_out[key], np.nan)
    return left_out


def called_patients(labels: np.ndarray, decisions: np.ndarray, resamples: Resamples) -> np.ndarray:
    """(L,) patients with a row that is called positive, of (N, L) decisions whose label is known."""
    return (resamples.by_patient((decisions & (labels != UNKNOWN)).astype(np.float64)) > 0).sum(axis=0)


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


def without_test(value: float) -> dict:
    """A difference of which no interval and no p-value would hold."""
    return {"difference": None if np.isnan(value) else float(value), "interval": None, "p": None}


def jackknife_difference(value: float, left_out: np.ndarray) -> dict:
    """The same as `difference` by Student's t, from the difference (P,) without one patient after the other."""
    error = jackknife_error(left_out)
    if error is None:
        return without_test(value)
    half, freedom = stdtrit(len(left_out) - 1, 1 - TAIL) * error, len(left_out) - 1
    p = 2 * stdtr(freedom, -abs(value) / error) if error > ROUNDING else float(abs(value) <= ROUNDING)
    return {"difference": float(value), "interval": [float(value - half), float(value + half)], "p": float(p)}


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
