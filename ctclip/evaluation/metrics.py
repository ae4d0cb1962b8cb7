"""Labels and probabilities -> numbers, each defined here once: for a single table and for a thousand resamples of it.

Legend: N rows (volumes, scans or patients), L labels, P patients, B resamples, `counts` (B, P) how often a patient is
drawn; a plain evaluation is the one resample in which every patient is drawn once.

- A decision is positive where `probability >= threshold`. The challenge's threshold is 0.5.
- Precision, recall and F1 are computed per label with 0/0 = 0 and averaged over the labels, as the challenge does.
- AUROC macro is the mean over labels with both classes present; the others are named, never counted as 0 or 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ctclip.errors import UserError
from ctclip_model import ABNORMALITIES, N_LABELS

TABLE_THRESHOLDS = np.arange(1, 20) / 20  # 0.05 to 0.95
ECE_BINS = 10
CHUNK = 2**18  # numbers of a (B, rows) array that are worked on at a time: 2 MB, which stay in the processor's cache


class EvaluationError(UserError):
    """Bad input; the message is one line: what was found, what was expected, what to do."""


# ------------------------------------------------------------------------------------------------- for one table


def undefined_labels(labels: np.ndarray) -> list[str]:
    """Names of the labels of (N, L) that hold one class only: no AUROC, and no threshold of their own."""
    positives = np.asarray(labels).sum(axis=0)
    return [name for name, count in zip(ABNORMALITIES, positives, strict=True) if count in (0, len(labels))]


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray, thresholds: float | np.ndarray = 0.5) -> dict:
    """The dictionary M of metrics.json for (N, L) labels in {0, 1} and probabilities in [0, 1].

    `thresholds` is one for all, (L,), or (N, L): one per decision; positive means probability >= threshold.
    Every value is a plain float, or None where it is undefined. AUROC does not depend on `thresholds`.
    """
    labels, probabilities = checked(labels, probabilities)
    return ranking_metrics(labels, probabilities) | decision_metrics(labels, probabilities >= thresholds)


def per_label_metrics(labels: np.ndarray, probabilities: np.ndarray, thresholds: float | np.ndarray = 0.5) -> dict:
    """{label: auroc and average_precision (None where undefined), precision, recall, f1, accuracy, positive_rate,
    label_rate, threshold, positives}; `thresholds` as in compute_metrics, and with (N, L) of them `threshold` is the
    column's median."""
    labels, probabilities = checked(labels, probabilities)
    auroc, average_precision = ranking_columns(labels, probabilities)
    columns = {
        "auroc": auroc,
        "average_precision": average_precision,
        **decision_columns(labels, probabilities >= thresholds),
        "threshold": np.median(np.broadcast_to(thresholds, labels.shape), axis=0),
    }
    positives = labels.sum(axis=0, dtype=np.int64)
    return {
        name: {key: none_if_nan(column[j]) for key, column in columns.items()} | {"positives": int(positives[j])}
        for j, name in enumerate(ABNORMALITIES)
    }


def threshold_table(
    labels: np.ndarray, probabilities: np.ndarray, thresholds: Sequence[float] | np.ndarray = TABLE_THRESHOLDS
) -> list[dict]:
    """One row per threshold: threshold, hamming_accuracy, f1_macro, precision_macro, recall_macro, positive_rate."""
    sweep = threshold_sweep(labels, probabilities, np.asarray(thresholds))
    keys = ("hamming_accuracy", "f1_macro", "precision_macro", "recall_macro", "positive_rate")
    return [{"threshold": float(threshold)} | {key: float(sweep[key][i, 0]) for key in keys}
            for i, threshold in enumerate(thresholds)]


def threshold_sweep(labels: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric of decision_metrics but exact_match at each of T thresholds, (T, 19): of all labels together, then of
    each label alone. NaN where undefined."""
    labels, probabilities = checked(labels, probabilities)

    def called(truth: int) -> np.ndarray:
        columns = [np.sort(probabilities[labels[:, j] == truth, j]) for j in range(labels.shape[1])]
        return np.stack([len(column) - np.searchsorted(column, thresholds) for column in columns], axis=1)

    tp, fp, positives, n = called(1), called(0), labels.sum(axis=0, dtype=np.int64), len(labels)
    ends = np.broadcast_to((np.nan, n), (len(thresholds), 2))
    sums = np.concatenate([tp, fp, np.broadcast_to(positives, tp.shape), ends], axis=1)
    together, columns = summary_from_counts(sums), per_label_from_counts(sums)
    alone = {
        "f1_macro": columns["f1"], "precision_macro": columns["precision"], "recall_macro": columns["recall"],
        "hamming_accuracy": columns["accuracy"], "positive_rate": columns["positive_rate"],
        "label_rate": columns["label_rate"], "crg": _crg(tp, fp, positives, np.float64(n)),
    }
    return {key: np.column_stack([together[key], column]) for key, column in alone.items()}


def decision_columns(labels: np.ndarray, decisions: np.ndarray) -> dict[str, np.ndarray]:
    """Every per-label metric of (N, L) decisions, (L,) each."""
    return per_label_from_counts(confusion_counts(labels, decisions).sum(axis=0))


def decision_metrics(labels: np.ndarray, decisions: np.ndarray) -> dict:
    """The part of M that depends on the decisions."""
    counts = confusion_counts(labels, decisions).sum(axis=0)
    return {key: none_if_nan(value) for key, value in summary_from_counts(counts).items()}


def ranking_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict:
    """The part of M that no threshold can change."""
    auroc, _ = ranking_columns(labels, probabilities)
    micro = pooled_auroc(labels, probabilities)[0]
    return {"auroc_macro": none_if_nan(nanmean(auroc)), "auroc_micro": none_if_nan(micro)}


def ranking_columns(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision of each label, (L,), NaN where one class is absent."""
    auroc, average_precision = resampled_auroc_and_ap(labels, probabilities, *no_resampling(labels))
    return auroc[0], average_precision[0]


def calibration_columns(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """{"brier", "ece", "mean": (L,)}: Brier score (mean squared difference of probability and label; Monthly Weather
    Review 1950), expected calibration error, mean probability."""
    return {
        "brier": ((probabilities - labels) ** 2).mean(axis=0),
        "ece": calibration_errors(labels, probabilities, bin_indices(probabilities)),
        "mean": probabilities.mean(axis=0),
    }


def calibration_errors(labels: np.ndarray, probabilities: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Expected calibration error of each label (L,): |mean probability - label rate| of each bin, weighted by rows.

    `bins` are those of bin_indices. Nixon et al., CVPR Workshops 2019, call bins of equal size adaptive.
    """
    n_labels = labels.shape[1]
    gaps = np.bincount(bins.ravel(), (probabilities - labels).ravel(), n_labels * ECE_BINS)
    return np.abs(gaps).reshape(n_labels, ECE_BINS).sum(axis=1) / len(labels)


def bin_indices(probabilities: np.ndarray) -> np.ndarray:
    """(N, L) -> the bin of each, numbered through all labels."""
    bins = np.stack([bin_index(column) for column in probabilities.T], axis=1)
    return bins + ECE_BINS * np.arange(probabilities.shape[1])


def bin_index(probabilities: np.ndarray) -> np.ndarray:
    """(N,) -> the bin of each, 0 to ECE_BINS - 1. Bins hold equal numbers of rows (edges are quantiles; equal
    probabilities share one): after a focal loss all probabilities lie in a few bins of equal width."""
    edges = np.quantile(probabilities, np.arange(1, ECE_BINS) / ECE_BINS)
    return np.searchsorted(edges, probabilities, side="right")


def checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels int8, probabilities float64), both (N, L); EvaluationError where they are not what they should be."""
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if labels.shape != probabilities.shape or labels.ndim != 2 or labels.shape[1] != N_LABELS or not len(labels):
        raise EvaluationError(
            f"found labels {labels.shape} and probabilities {probabilities.shape}, expected both (N, {N_LABELS}) "
            "with N at least 1; pass one row per volume and one column per abnormality"
        )
    if not np.isin(labels, (0, 1)).all():
        raise EvaluationError("found labels other than 0 and 1, expected 0 or 1; binarise the labels first")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():  # NaN fails both comparisons
        raise EvaluationError("found probabilities outside [0, 1] or NaN; pass sigmoid outputs, not logits")
    return labels.astype(np.int8), probabilities


def none_if_nan(value: float | np.ndarray) -> float | None:
    """A float for JSON, None for NaN."""
    return None if np.isnan(value) else float(value)


def nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1), np.nan)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """numerator / denominator, `empty` for 0 / 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, empty), where=denominator != 0)


# --------------------------------------------------------------------------------- sums over rows, and what they give

# Everything that depends on decisions is a function of sums over rows. confusion_counts gives what each row adds;
# weighted sums of it, one per resample, are a matrix product; `*_of` turns sums with any leading axes into metrics.


def confusion_counts(labels: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """(N, 3 L + 2): true positives, false positives, positives of each label; whether all L are right; 1."""
    labels, decisions = labels.astype(bool), np.asarray(decisions, bool)
    right = (labels == decisions).all(axis=1, keepdims=True)
    parts = [labels & decisions, ~labels & decisions, labels, right, np.ones_like(right)]
    return np.concatenate(parts, axis=1).astype(np.float64)


def _unpacked(sums: np.ndarray) -> tuple[np.ndarray, ...]:
    labels = (sums.shape[-1] - 2) // 3
    tp, fp, positives, right, n = np.split(sums, [labels, 2 * labels, 3 * labels, 3 * labels + 1], axis=-1)
    return tp, fp, positives, right[..., 0], n


def per_label_from_counts(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Sums (..., 3 L + 2) of confusion_counts -> per-label metrics (..., L)."""
    tp, fp, positives, _, n = _unpacked(sums)
    return {
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, positives),
        "f1": _ratio(2 * tp, tp + fp + positives),
        "accuracy": (n - fp - positives + tp) / n,
        "positive_rate": (tp + fp) / n,
        "label_rate": positives / n,
    }


def summary_from_counts(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Sums (..., 3 L + 2) of confusion_counts -> the part of M that depends on decisions (...); NaN: undefined."""
    tp, fp, positives, right, n = _unpacked(sums)
    columns = per_label_from_counts(sums)
    return {
        "f1_macro": columns["f1"].mean(axis=-1),
        "precision_macro": columns["precision"].mean(axis=-1),
        "recall_macro": columns["recall"].mean(axis=-1),
        "hamming_accuracy": columns["accuracy"].mean(axis=-1),
        "exact_match": right / n[..., 0],
        "positive_rate": columns["positive_rate"].mean(axis=-1),
        "label_rate": columns["label_rate"].mean(axis=-1),
        "crg": _crg(tp.sum(axis=-1), fp.sum(axis=-1), positives.sum(axis=-1), tp.shape[-1] * n[..., 0]),
    }


def crg_exchange(positives: float | np.ndarray, decisions: float | np.ndarray) -> float | np.ndarray:
    """r: how many false positives weigh as much as one positive found or missed."""
    return (decisions - positives) / (2 * positives)


def _crg(tp: np.ndarray, fp: np.ndarray, a: np.ndarray, x: np.ndarray) -> np.ndarray:
    """CRG, the challenge's score for decisions, from pooled counts; NaN where the truth holds one class only.

    1/3 where all, none or random cases are called positive, 1 where every decision is right.
    """
    two = (a > 0) & (a < x)
    r = crg_exchange(np.where(two, a, 1), x)
    u = (x - a) / 2
    score = r * tp - r * (a - tp) - fp
    return np.where(two, _ratio(u, 2 * u - score, np.nan), np.nan)


# ---------------------------------------------------------------------------------------------- areas under curves


def no_resampling(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(group, counts) of the resample in which every row is drawn once."""
    return np.zeros(len(labels), np.int64), np.ones((1, 1))


def auroc_and_ap(
    labels: np.ndarray, scores: np.ndarray, group: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(AUROC (B,), average precision (B,)) of one ranking in B resamples; NaN where one class is absent.

    labels, scores and group (rows,): group[i] is the column of `counts` (B, P) that says how often row i is drawn.
    Ties count half in the AUROC and are one step of average precision, as in scikit-learn. The AUROC's sums are of
    integers and halves below 2**53: exact. The order is found once for all resamples.
    """
    order = np.argsort(-scores, kind="stable")
    scores, positive, group = scores[order], labels[order] == 1, group[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # last row of each run of ties
    tied = len(ends) < len(scores)
    auroc, average_precision = np.full(len(counts), np.nan), np.full(len(counts), np.nan)
    for rows in _chunks(len(counts), len(scores)):
        drawn = counts[rows][:, group]
        tp = np.cumsum(drawn * positive, axis=1)
        called = np.cumsum(drawn, axis=1)
        if tied:
            tp, called = tp[:, ends], called[:, ends]
        gain, negatives = tp[:, -1], called[:, -1] - tp[:, -1]
        found = np.diff(tp, axis=1, prepend=0)
        behind = negatives[:, None] - (called - tp)  # negatives ranked lower than this run
        alarms = np.diff(called, axis=1, prepend=0) - found
        pairs = gain * negatives
        auroc[rows] = _ratio((found * (behind + alarms / 2)).sum(axis=1), pairs, np.nan)
        precision_sum = (found * tp / np.maximum(called, 1)).sum(axis=1)
        average_precision[rows] = np.where(pairs > 0, _ratio(precision_sum, gain, np.nan), np.nan)
    return auroc, average_precision


def resampled_auroc_and_ap(
    labels: np.ndarray, probabilities: np.ndarray, group: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision of each label in B resamples, (B, L) each; see auroc_and_ap."""
    columns = [auroc_and_ap(labels[:, j], probabilities[:, j], group, counts) for j in range(labels.shape[1])]
    auroc, average_precision = zip(*columns, strict=True)
    return np.stack(auroc, axis=1), np.stack(average_precision, axis=1)


def pooled_auroc(
    labels: np.ndarray, probabilities: np.ndarray, group: np.ndarray | None = None, counts: np.ndarray | None = None
) -> np.ndarray:
    """AUROC of all N x L decisions as one ranking ("micro"), in B resamples (B,); by default (1,), not resampled."""
    if group is None or counts is None:
        group, counts = no_resampling(labels)
    return auroc_and_ap(labels.ravel(), probabilities.ravel(), np.repeat(group, labels.shape[1]), counts)[0]


def _chunks(resamples: int, rows: int) -> Iterator[slice]:
    step = max(1, CHUNK // rows)
    for start in range(0, resamples, step):
        yield slice(start, start + step)


# --------------------------------------------------------------------------- two predictions, without resampling


def auroc_difference(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, groups: Sequence
) -> tuple[float, float] | None:
    """(macro AUROC of `first` minus that of `second`, its standard error), for two predictions of the same volumes.

    labels, first, second (N, L), probabilities in [0, 1]; groups (N,) is each volume's patient. Labels with one class
    are skipped. Paired: what both predictions get right or wrong cancels. Clustered: a patient's volumes are not
    independent. None where no label has both classes, or one patient leaves nothing to judge the spread by. Nothing is
    resampled: the same input gives the same numbers, in O(L N log N).

    DeLong, DeLong & Clarke-Pearson, Biometrics 1988, for the influence of a volume on an AUROC; Obuchowski, Biometrics
    1997, for summing it within a patient. Here it is averaged over the labels first, so that their covariance counts.
    """
    labels, first = checked(labels, first)
    labels, second = checked(labels, second)
    undefined = undefined_labels(labels)
    defined = [j for j, name in enumerate(ABNORMALITIES) if name not in undefined]
    unique, patient = np.unique(np.asarray(groups), return_inverse=True)
    if not defined or len(unique) < 2:
        return None
    difference, influence = 0.0, np.zeros(len(labels))
    for j in defined:
        (auroc, of_first), (other, of_second) = (_auroc_influence(labels[:, j], p[:, j]) for p in (first, second))
        difference += (auroc - other) / len(defined)
        influence += (of_first - of_second) / len(defined)
    by_patient = np.bincount(patient, weights=influence)
    variance = (by_patient**2).sum() * len(unique) / (len(unique) - 1)
    return float(difference), float(np.sqrt(variance))


def _auroc_influence(labels: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """(AUROC of one label, how much each volume raises it (N,)); the latter sums to 0 within either class."""
    positive = labels == 1
    ahead_of = _share_below(scores[~positive], scores[positive])  # DeLong's placement values, ties count half
    behind = 1 - _share_below(scores[positive], scores[~positive])
    auroc = ahead_of.mean()
    influence = np.empty(len(labels))
    influence[positive] = (ahead_of - auroc) / len(ahead_of)
    influence[~positive] = (behind - auroc) / len(behind)
    return auroc, influence


def _share_below(others: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share of `others` below each value, equal ones counted half."""
    others = np.sort(others)
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))
