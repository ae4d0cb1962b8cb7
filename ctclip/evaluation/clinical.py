"""What reporting guidelines ask for beside the challenge's metrics (TRIPOD+AI, BMJ 2024; CLAIM 2024): sensitivity,
specificity and predictive values at the tuned thresholds, sensitivity at fixed specificities, calibration on the
reported patients, net benefit, and how far the thresholds would move with other tuning patients.

Legend as in metrics.py: N rows, L labels, B resamples, the first of which is the table itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, logit

from ctclip.config import Settings
from ctclip.evaluation import bootstrap
from ctclip.evaluation.calibration import CROSS_FITTED, FittedThresholds, rates_asked_for
from ctclip.evaluation.metrics import Resamples, confusion_counts, masked_mean, nanmean, plain, ratio
from ctclip.evaluation.tables import Rows
from ctclip.evaluation.thresholds import resampled_thresholds
from ctclip_model import UNKNOWN

SPECIFICITIES = (0.80, 0.90, 0.95)
SENSITIVITY_AT = "sensitivity_at_specificity_"  # as ranking_columns names them
DECISION_METRICS = ("sensitivity", "specificity", "ppv", "npv")
NET_BENEFIT_AT = (0.05, 0.10, 0.20, 0.30, 0.50)  # threshold probabilities that are stored; the figure has all
AT_LABEL_RATE = "label_rate"
THRESHOLD_RESAMPLES = 100
LOGIT_EDGE = 1e-6  # a probability of 0 or 1 has no logit
NEWTON_STEPS = 50


def clinical_metrics(
    rows: Rows, fitted: FittedThresholds, ranked: Mapping[str, np.ndarray], sums: np.ndarray, resamples: Resamples,
    settings: Settings,
) -> dict[str, Any]:
    """metrics.json's "clinical": {"summary": {...}, "per_label": {label: {...}}, "intervals": {the same keys}}.
    `ranked`: ranking_columns with SPECIFICITIES; `sums` (B, 4 L + 2): confusion counts of the tuned decisions."""
    y, p, calibrated = rows.labels, rows.probabilities, fitted.calibrated
    decisions = p >= fitted.thresholds
    counts, columns = resampled_columns(y, p, calibrated, ranked, sums, resamples)
    few = ~bootstrap.enough_cases(y, rows.patients)
    hide = dict.fromkeys(columns, few) | {
        key: few | (bootstrap.called_patients(y, made, resamples) < bootstrap.MIN_CASES)
        for key, made in (("ppv", decisions), ("npv", ~decisions))}
    if fitted.fitted_on == CROSS_FITTED:  # of five maps: their intervals are too short (LOG.md)
        hide |= dict.fromkeys(("calibration_slope_calibrated", "calibration_intercept_calibrated"), np.ones_like(few))
    for key, column in columns.items():
        column[1:, hide[key]] = np.nan
    low, high = _threshold_spread(fitted, settings)
    benefits, everybody = net_benefits(y, calibrated, resamples)
    for threshold in NET_BENEFIT_AT:
        called = bootstrap.called_patients(y, calibrated >= threshold, resamples)
        benefits[f"{threshold:.2f}"][1:, few | (called < bootstrap.MIN_CASES)] = np.nan
    per_label = {}
    for j, name in enumerate(rows.findings):
        per_label[name] = plain({key: column[:, j] for key, column in columns.items()}) | {
            key: int(count[0, j]) for key, count in counts.items()
        } | {
            "threshold_range": None if np.isnan(low[j]) else [float(low[j]), float(high[j])],
            "net_benefit": {key: _float(column[0, j]) for key, column in benefits.items()},
            "net_benefit_all": {key: _float(column[j]) for key, column in everybody.items()},
        }  # fmt: skip
    summary = resampled_summary(counts, columns)
    label_bounds = _label_intervals(columns, rows.findings)
    for j, name in enumerate(rows.findings):
        label_bounds[name]["net_benefit"] = None if few[j] else {
            key: bootstrap.interval(column[:, j]) for key, column in benefits.items()}
    return {
        "summary": plain(summary),
        "per_label": per_label,
        "intervals": {"summary": {key: bootstrap.interval(values) for key, values in summary.items()},
                      "per_label": label_bounds},
    }


def resampled_columns(
    labels: np.ndarray, probabilities: np.ndarray, calibrated: np.ndarray, ranked: Mapping[str, np.ndarray],
    sums: np.ndarray, resamples: Resamples,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(confusion counts, metrics of each label) in every resample, (B, L) each; labels and probabilities (N, L), the
    rest as in clinical_metrics."""
    counts = _confusion(sums)
    columns = _decision_columns(counts)
    columns |= {key: column.copy() for key, column in ranked.items() if key.startswith(SENSITIVITY_AT)}
    for when, values in (("uncalibrated", probabilities), ("calibrated", calibrated)):
        of_those = _calibration_columns(labels, values, resamples)
        columns |= {f"{key}_{when}": column for key, column in of_those.items()}
    return counts, columns


def _label_intervals(columns: Mapping[str, np.ndarray], findings: Sequence[str]) -> dict[str, dict]:
    """Of shares as bootstrap.py has them; of slopes, intercepts and ratios, which are none, by percentiles."""
    shares = bootstrap.label_intervals({key: column for key, column in columns.items() if _is_share(key)}, findings)
    others = {key: column for key, column in columns.items() if not _is_share(key)}
    return {name: shares[name] | {key: bootstrap.interval(column[:, j]) for key, column in others.items()}
            for j, name in enumerate(findings)}


def _is_share(key: str) -> bool:
    return key in DECISION_METRICS or key.startswith(SENSITIVITY_AT)


def _float(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _confusion(sums: np.ndarray) -> dict[str, np.ndarray]:
    """{"tp", "fp", "fn", "tn": (B, L)} from the sums of confusion_counts."""
    labels = (sums.shape[1] - 2) // 4
    tp, fp, positives, known = np.split(sums[:, : 4 * labels], 4, axis=1)
    return {"tp": tp, "fp": fp, "fn": positives - tp, "tn": known - positives - fp}


def _decision_columns(counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DECISION_METRICS (B, L); NaN for 0 / 0, where the challenge counts 0."""
    tp, fp, fn, tn = (counts[key] for key in ("tp", "fp", "fn", "tn"))
    parts = {"sensitivity": (tp, tp + fn), "specificity": (tn, tn + fp), "ppv": (tp, tp + fp), "npv": (tn, tn + fn)}
    return {key: ratio(top, bottom, np.nan) for key, (top, bottom) in parts.items()}


def resampled_summary(counts: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Micro F1 and macro specificity, (B,) each; macro sensitivity is the recall of all metrics."""
    tp, wrong = counts["tp"].sum(axis=1), (counts["fp"] + counts["fn"]).sum(axis=1)
    micro = ratio(2 * tp, 2 * tp + wrong, np.nan)
    specificity = nanmean(columns["specificity"])
    if np.isnan(columns["specificity"][1:]).all(axis=0).any():  # a label without an interval: none of the mean either
        specificity[1:] = np.nan
    return {"f1_micro": micro, "specificity_macro": specificity}


# ------------------------------------------------------------------ calibration on the reported patients


def _calibration_columns(labels: np.ndarray, probabilities: np.ndarray, resamples: Resamples) -> dict[str, np.ndarray]:
    """(B, L) each, of the patients that are reported: "calibration_slope" and "calibration_intercept" of the logistic
    regression of the label on the probability's logit (1 and 0 are perfect), "calibration_in_the_large" (its intercept
    with the slope held at 1; Cox, Biometrika 1958), "observed_expected" (label rate / mean probability)."""
    known = labels != UNKNOWN
    x = logit(np.clip(probabilities, LOGIT_EDGE, 1 - LOGIT_EDGE))
    y = np.where(known, labels, 0)
    observed, expected = np.split(resamples.sums(np.column_stack([y, np.where(known, probabilities, 0)])), 2, axis=1)
    intercept, slope = _logistic_fits(x, y, known, resamples, True)
    large, _ = _logistic_fits(x, y, known, resamples, False)
    return {"calibration_slope": slope, "calibration_intercept": intercept, "calibration_in_the_large": large,
            "observed_expected": ratio(observed, expected, np.nan)}


def _logistic_fits(
    x: np.ndarray, y: np.ndarray, known: np.ndarray, resamples: Resamples, free: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(intercepts (B, L), slopes (B, L)) of each column of y (N, L) on that of x, slopes held at 1 unless `free`; NaN
    for one class and where the fit does not converge.

    Of the table itself by Newton's method; of a resample by one more step from there with its weights, which is as
    exact as the resamples are many (Moulton & Zeger, Computational Statistics & Data Analysis 1991).
    """
    fitted, terms = np.full((2, y.shape[1]), np.nan), np.zeros((*y.shape, 5))
    for j, own in enumerate(known.T):
        if 0 < y[own, j].sum() < own.sum():
            fitted[:, j], terms[own, j] = _logistic_fit(x[own, j], y[own, j], free)
    steps = _newton_step(resamples.sums(terms.reshape(len(terms), -1)).reshape(-1, y.shape[1], 5), free)
    steps[0] = 0  # the table itself is fitted
    return fitted[0] + steps[..., 0], fitted[1] + steps[..., 1]


def _logistic_fit(x: np.ndarray, y: np.ndarray, free: bool) -> tuple[np.ndarray, np.ndarray]:
    """((intercept, slope), what each row adds to the sums of `_newton_step` there (n, 5)); NaN without convergence."""
    theta = np.array([logit(y.mean()), 0.0]) if free else np.array([0.0, 1.0])
    for _ in range(NEWTON_STEPS):
        mean = expit(theta[0] + theta[1] * x)
        error, spread = y - mean, mean * (1 - mean)
        terms = np.column_stack([error, error * x, spread, spread * x, spread * x**2])
        step = _newton_step(terms.sum(axis=0), free)
        if not np.isfinite(step).all():
            break
        theta = theta + step
        if np.abs(step).max() < 1e-10:
            return theta, terms
    return np.full(2, np.nan), np.zeros((len(x), 5))


def _newton_step(sums: np.ndarray, free: bool) -> np.ndarray:
    """(..., 2) steps of (intercept, slope) from sums (..., 5): the gradient's two and the Hessian's three entries."""
    g0, g1, h00, h01, h11 = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        if not free:
            return np.stack([g0 / h00, np.zeros_like(g0)], axis=-1)
        determinant = h00 * h11 - h01**2
        return np.stack([(h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant], axis=-1)


# ------------------------------------------------------------------ decisions


def net_benefits(
    labels: np.ndarray, calibrated: np.ndarray, resamples: Resamples
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(net benefit (B, L) of acting on probabilities (N, L), net benefit (L,) of acting on everybody), by threshold:
    NET_BENEFIT_AT as "0.10", and AT_LABEL_RATE, each label's own rate, where acting on everybody is worth 0. That one
    is of the table itself only, (1, L): resamples have another rate, and their intervals did not hold (LOG.md)."""
    rate, odds = masked_mean(labels == 1, labels != UNKNOWN), np.array(NET_BENEFIT_AT) / (1 - np.array(NET_BENEFIT_AT))
    keys = [f"{threshold:.2f}" for threshold in NET_BENEFIT_AT]
    benefits = dict(zip(keys, net_benefit(labels, calibrated, np.array(NET_BENEFIT_AT), resamples), strict=True))
    everybody = dict(zip(keys, rate - (1 - rate) * odds[:, None], strict=True))
    counts = _confusion(confusion_counts(labels, calibrated >= rate).sum(axis=0, keepdims=True))
    tp, fp, fn, tn = (counts[key] for key in ("tp", "fp", "fn", "tn"))
    at_rate = ratio(tp - fp * ratio(tp + fn, fp + tn), tp + fp + fn + tn, np.nan)
    return benefits | {AT_LABEL_RATE: at_rate}, everybody | {AT_LABEL_RATE: 0 * rate}


def net_benefit(
    labels: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray, resamples: Resamples
) -> np.ndarray:
    """(T, B, L): true positives - false positives * odds of the threshold, per known row (Vickers & Elkin, Medical
    Decision Making 2006); `probabilities` (N, L) are calibrated ones. NaN where nothing is known."""
    known, odds = labels != UNKNOWN, thresholds / (1 - thresholds)
    count, benefits = resamples.sums(known), []
    for threshold, weight in zip(thresholds, odds, strict=True):
        added = np.where(known & (probabilities >= threshold), np.where(labels == 1, 1.0, -weight), 0.0)
        benefits.append(ratio(resamples.sums(added), count, np.nan))
    return np.array(benefits)


def _threshold_spread(fitted: FittedThresholds, settings: Settings) -> np.ndarray:
    """(2, L): 2.5 and 97.5 % percentiles of each label's threshold, fitted on resamples of the tuning patients; NaN for
    a label that lacks a class there."""
    source = fitted.source
    assert source is not None
    resamples = bootstrap.draw(source.patients, THRESHOLD_RESAMPLES, settings.seed)
    wanted = rates_asked_for(settings.prevalence, source.findings)
    found = resampled_thresholds(source.labels, source.probabilities, settings.objective, wanted, resamples)
    spread = np.full((2, found.shape[1]), np.nan)
    defined = ~np.isnan(found[1:]).all(axis=0)
    spread[:, defined] = np.nanquantile(found[1:, defined], (0.025, 0.975), axis=0)
    return spread
