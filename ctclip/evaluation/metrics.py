"""Labels and probabilities -> numbers, each defined here once: for a single table and for a thousand resamples of it.

Legend: N rows (volumes, scans or patients), L labels, P patients, B resamples. Labels are 0, 1 or UNKNOWN: what nobody
stated is left out, decision by decision.

- A decision is positive where `probability >= threshold`. The challenge's threshold is 0.5.
- Precision, recall and F1 are computed per label with 0/0 = 0 and averaged over the labels, as the challenge does; a
  label of which nothing is known has none of them.
- AUROC macro is the mean over labels with both classes present; the others are named, never counted as 0 or 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from ctclip.errors import UserError
from ctclip_model import ABNORMALITIES, UNKNOWN

ECE_BINS = 10
RANKING_CHUNK = 2**18  # numbers of an array worked on at a time: 2 MB, which stay in the processor's cache
SUMS_CHUNK = 64  # resamples whose counts are made floats at a time


class EvaluationError(UserError):
    """Bad input; the message is one line: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class Resamples:
    """`counts` (B, P) whole numbers: how often each patient is drawn. `group` (N,): the patient of each row."""

    group: np.ndarray
    counts: np.ndarray

    def of(self, rows: np.ndarray) -> Resamples:
        """Of a part of the rows, a mask (N,), and of their patients."""
        if rows.all():
            return self
        patients, group = np.unique(self.group[rows], return_inverse=True)
        return Resamples(group, self.counts[:, patients])

    def by_patient(self, summands: np.ndarray) -> np.ndarray:
        """(N, K) -> (P, K): sums over each patient's rows."""
        sums = np.zeros((self.counts.shape[1], summands.shape[1]))
        np.add.at(sums, self.group, summands)
        return sums

    def sums(self, summands: np.ndarray) -> np.ndarray:
        """(N, K) -> (B, K): sums over the rows drawn."""
        by_patient = self.by_patient(summands)
        parts = range(0, len(self.counts), SUMS_CHUNK)
        return np.concatenate([self.counts[at : at + SUMS_CHUNK].astype(np.float64) @ by_patient for at in parts])


def drawn_once(labels: np.ndarray) -> Resamples:
    """The one resample that is the table itself."""
    return Resamples(np.zeros(len(labels), np.int64), np.ones((1, 1), np.int16))


def class_counts(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((L,) negatives, (L,) positives) of (N, L)."""
    return (labels == 0).sum(axis=0), (labels == 1).sum(axis=0)


def lacks_a_class(labels: np.ndarray) -> np.ndarray:
    """(L,) mask of the labels of (N, L) without negatives or without positives: no AUROC, no threshold of their own."""
    return np.min(class_counts(np.asarray(labels)), axis=0) == 0


def names_where(findings: Sequence[str], mask: np.ndarray) -> list[str]:
    return [name for name, chosen in zip(findings, mask, strict=True) if chosen]


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray, thresholds: float | np.ndarray = 0.5) -> dict:
    """The dictionary M of metrics.json for (N, L) labels in {0, 1, UNKNOWN} and probabilities in [0, 1].

    `thresholds` is one for all, (L,), or (N, L): one per decision; positive means probability >= threshold.
    Every value is a plain float, or None where it is undefined. AUROC does not depend on `thresholds`.
    """
    labels, probabilities = checked(labels, probabilities)
    ranking, _ = resampled_ranking(labels, probabilities, drawn_once(labels))
    return plain(ranking) | decision_metrics(labels, probabilities >= thresholds)


def decision_metrics(labels: np.ndarray, decisions: np.ndarray) -> dict:
    """The part of M that depends on (N, L) decisions."""
    return plain(resampled_decisions(labels, decisions, drawn_once(labels))[0])


def per_label_metrics(
    labels: np.ndarray, probabilities: np.ndarray, thresholds: float | np.ndarray = 0.5,
    findings: Sequence[str] = ABNORMALITIES,
) -> dict:
    """{label: auroc and average_precision (None where undefined), precision, recall, f1, accuracy, positive_rate,
    label_rate, threshold, positives, known (number of rows)}; `thresholds` as in compute_metrics, and with (N, L) of
    them `threshold` is the column's median. `findings` names the L columns."""
    labels, probabilities = checked(labels, probabilities)
    once = drawn_once(labels)
    columns = ranking_columns(labels, probabilities, once)
    columns |= resampled_decisions(labels, probabilities >= thresholds, once)[1]
    columns["threshold"] = np.median(np.broadcast_to(thresholds, labels.shape), axis=0, keepdims=True)
    negatives, positives = class_counts(labels)
    counts = [{"positives": int(own), "known": int(own + other)}
              for own, other in zip(positives, negatives, strict=True)]
    return {
        name: plain({key: column[:, j] for key, column in columns.items()}) | counts[j]
        for j, name in enumerate(_named(findings, labels))
    }


def _named(findings: Sequence[str], labels: np.ndarray) -> Sequence[str]:
    if len(findings) != labels.shape[1]:
        raise EvaluationError(f"found {labels.shape[1]} columns of labels and {len(findings)} names, expected one name "
                              "for each; pass them as `findings`")
    return findings


def threshold_sweep(labels: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """Each metric of decision_metrics but exact_match at each of T thresholds, (T, 1 + L): of all labels together, then
    of each label alone. NaN where undefined."""
    labels, probabilities = checked(labels, probabilities)
    fp, tp = np.ascontiguousarray(positives_at(sorted_by_class(labels, probabilities), thresholds).swapaxes(1, 2))
    negatives, positives = class_counts(labels)
    ends = np.broadcast_to((np.nan, len(labels)), (len(thresholds), 2))
    known = positives + negatives
    sums = np.concatenate([tp, fp, *(np.broadcast_to(each, tp.shape) for each in (positives, known)), ends], axis=1)
    together, columns = metrics_from_counts(sums)
    alone = {key: columns[own] for key, own in SUMMARY_OF.items()} | {"crg": _crg(tp, fp, positives, known)}
    return {key: np.column_stack([together[key], column]) for key, column in alone.items()}


def sorted_by_class(labels: np.ndarray, probabilities: np.ndarray) -> list[list[np.ndarray]]:
    """[negatives', positives'] probabilities of each of L labels, ascending."""
    return [[np.sort(p[y == truth]) for y, p in zip(labels.T, probabilities.T, strict=True)] for truth in (0, 1)]


def positives_at(by_class: Sequence[Sequence[np.ndarray]], thresholds: np.ndarray) -> np.ndarray:
    """(2, L, T): false and true positives of each label of sorted_by_class at each of T thresholds."""
    return np.array([[len(p) - np.searchsorted(p, thresholds) for p in of_class] for of_class in by_class])


def calibration_columns(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """{"brier", "ece", "mean": (L,)}: Brier score (mean squared difference of probability and label; Monthly Weather
    Review 1950), expected calibration error, mean probability. NaN for a label of which nothing is known."""
    known = labels != UNKNOWN
    return {
        "brier": masked_mean((probabilities - labels) ** 2, known),
        "ece": calibration_errors(labels, probabilities, bin_indices(probabilities, known)),
        "mean": masked_mean(probabilities, known),
    }


def calibration_errors(labels: np.ndarray, probabilities: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Expected calibration error of each label (L,): |mean probability - label rate| of each bin, weighted by rows.

    `bins` are those of bin_indices. Nixon et al., CVPR Workshops 2019, call bins of equal size adaptive.
    """
    n_labels, known = labels.shape[1], labels != UNKNOWN
    gaps = np.bincount(bins.ravel(), np.where(known, probabilities - labels, 0).ravel(), n_labels * ECE_BINS)
    return ratio(np.abs(gaps).reshape(n_labels, ECE_BINS).sum(axis=1), known.sum(axis=0), np.nan)


def bin_indices(probabilities: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(N, L) and the mask of what is known of them -> the bin of each, numbered through all labels."""
    bins = np.zeros(probabilities.shape, np.int64)
    for j, own in enumerate(known.T):
        bins[own, j] = bin_index(probabilities[own, j])
    return bins + ECE_BINS * np.arange(probabilities.shape[1])


def bin_index(probabilities: np.ndarray) -> np.ndarray:
    """(N,) -> the bin of each, 0 to ECE_BINS - 1. Bins hold equal numbers of rows (edges are quantiles; equal
    probabilities share one): after a focal loss all probabilities lie in a few bins of equal width."""
    if not len(probabilities):
        return np.zeros(0, np.int64)
    edges = np.quantile(probabilities, np.arange(1, ECE_BINS) / ECE_BINS)
    return np.searchsorted(edges, probabilities, side="right")


def checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels int8, probabilities float64), both (N, L), NaN in labels as UNKNOWN; EvaluationError where they are not
    what they should be."""
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if labels.shape != probabilities.shape or labels.ndim != 2 or not labels.size:
        raise EvaluationError(
            f"found labels {labels.shape} and probabilities {probabilities.shape}, expected both (N, L), with N and L "
            "at least 1; pass one row per volume and one column per finding"
        )
    if labels.dtype.kind == "f":
        labels = np.where(np.isnan(labels), UNKNOWN, labels)
    if not ((labels == 0) | (labels == 1) | (labels == UNKNOWN)).all():
        raise EvaluationError(f"found labels other than 0 and 1, expected 0 or 1, or {UNKNOWN} where it is unknown; "
                              "binarise the labels first")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():  # NaN fails both comparisons
        raise EvaluationError("found probabilities outside [0, 1] or NaN; pass sigmoid outputs, not logits")
    return labels.astype(np.int8), probabilities


def plain(values: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """The first of each (B,) as a float for JSON, None for NaN."""
    return {key: None if np.isnan(value[0]) else float(value[0]) for key, value in values.items()}


def masked_mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is in the mask; NaN where nothing is."""
    return ratio(np.where(mask, values, 0).sum(axis=0), mask.sum(axis=0), np.nan)


def nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1), np.nan)


def ratio(numerator: np.ndarray, denominator: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """numerator / denominator, `empty` for 0 / 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, np.float64), denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, empty), where=denominator != 0)


# In every resample: summaries {metric: (B,)} and per-label columns {metric: (B, L)}, with the keys of metrics.json.
# What depends on decisions is a function of sums over rows: confusion_counts gives what each row adds, a matrix product
# the weighted sums, one per resample, and metrics_from_counts turns sums with any leading axes into metrics.


def resampled_decisions(labels: np.ndarray, decisions: np.ndarray, resamples: Resamples) -> tuple[dict, dict]:
    """(the part of M that depends on decisions, per-label columns) in every resample."""
    return metrics_from_counts(resamples.sums(confusion_counts(labels, decisions)))


def jackknifed_decisions(labels: np.ndarray, decisions: np.ndarray, resamples: Resamples) -> dict[str, np.ndarray]:
    """The part of M that depends on decisions, without one of the P patients after the other: (P,) each."""
    sums = resamples.by_patient(confusion_counts(labels, decisions))
    return metrics_from_counts(sums.sum(axis=0) - sums)[0]


def resampled_ranking(
    labels: np.ndarray, probabilities: np.ndarray, resamples: Resamples, specificities: Sequence[float] = ()
) -> tuple[dict, dict]:
    """(the part of M that no threshold can change, per-label columns as from ranking_columns) in every resample."""
    columns = ranking_columns(labels, probabilities, resamples, specificities=specificities)
    micro = pooled_auroc(labels, probabilities, resamples)
    return {"auroc_macro": nanmean(columns["auroc"]), "auroc_micro": micro}, columns


def confusion_counts(labels: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """(N, 4 L + 2): true positives, false positives, positives, known ones of each label; whether all known labels are
    right; 1."""
    positive, known, decisions = labels == 1, labels != UNKNOWN, np.asarray(decisions, bool)
    right = ((positive == decisions) | ~known).all(axis=1, keepdims=True)
    parts = [positive & decisions, known & ~positive & decisions, positive, known, right, np.ones_like(right)]
    return np.concatenate(parts, axis=1).astype(np.float64)


SUMMARY_OF = {  # metric of M: the per-label metric that it summarises
    "f1_macro": "f1", "precision_macro": "precision", "recall_macro": "recall", "hamming_accuracy": "accuracy",
    "positive_rate": "positive_rate", "label_rate": "label_rate",
}


def metrics_from_counts(sums: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Sums (..., 4 L + 2) of confusion_counts -> (the part of M that depends on decisions (...), per-label metrics
    (..., L)); NaN: undefined. Macro metrics are means over the labels, rates are of all known decisions."""
    labels = (sums.shape[-1] - 2) // 4
    tp, fp, positives, known, ends = np.split(sums, np.arange(1, 5) * labels, axis=-1)
    ratios = {
        "precision": (tp, tp + fp),
        "recall": (tp, positives),
        "f1": (2 * tp, tp + fp + positives),
        "accuracy": (known - fp - positives + tp, known),
        "positive_rate": (tp + fp, known),
        "label_rate": (positives, known),
    }
    columns = {key: np.where(known > 0, ratio(*parts), np.nan) for key, parts in ratios.items()}
    of_all = {key: ratio(ratios[key][0].sum(axis=-1), ratios[key][1].sum(axis=-1), np.nan)
              for key in ("accuracy", "positive_rate", "label_rate")}
    summary = {key: of_all[own] if own in of_all else nanmean(columns[own]) for key, own in SUMMARY_OF.items()}
    rates = {key: summary.pop(key) for key in ("positive_rate", "label_rate")}  # shown after exact_match
    crg = _crg(*(part.sum(axis=-1) for part in (tp, fp, positives, known)))
    return summary | {"exact_match": ratio(ends[..., 0], ends[..., 1], np.nan)} | rates | {"crg": crg}, columns


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
    return np.where(two, ratio(u, 2 * u - score, np.nan), np.nan)


class _Ranking(NamedTuple):
    """One ranking by the runs of equal scores that hold a positive, from the highest score down: C runs, P patients.

    `positives` (C, P) and `tied` (C, P, None where no negative is tied with a positive) count each patient's rows in a
    run, `between` (C + 1, P) its negatives before the first run, between two, and after the last.
    """

    positives: csr_array
    between: csr_array
    tied: csr_array | None

    @classmethod
    def of(cls, labels: np.ndarray, scores: np.ndarray, group: np.ndarray, patients: int) -> _Ranking:
        order = np.argsort(-scores, kind="stable")
        scores, positive, group = scores[order], labels[order] == 1, group[order]
        run = np.cumsum(np.append(False, scores[1:] != scores[:-1]))
        has_positive = np.zeros(run[-1] + 1, bool)
        has_positive[run[positive]] = True
        earlier = np.cumsum(has_positive) - has_positive  # runs with a positive above each run
        tied, count = ~positive & has_positive[run], has_positive.sum()

        def counts(rows: np.ndarray, size: int) -> csr_array:
            place = earlier[run[rows]], group[rows]
            return csr_array((np.ones(rows.sum()), place), shape=(size, patients))

        between = counts(~positive & ~tied, count + 1)
        return cls(counts(positive, count), between, counts(tied, count) if tied.any() else None)

    def drawn(self, resamples: Resamples) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray, Any]]:
        """(resamples b, positives of each run (C, b), negatives at or above it (C, b), negatives (b,), those tied with
        it (C, b) or 0), the first resample alone: a table's own sums then have one order, resampled or not."""
        size, step = len(resamples.counts), max(1, RANKING_CHUNK // self.between.shape[0])
        for rows in (slice(1), *(slice(start, start + step) for start in range(1, size, step))):
            drawn = np.ascontiguousarray(resamples.counts[rows].T, np.float64)
            above = np.cumsum(self.between @ drawn, axis=0)
            alarms, negatives, level = above[:-1], above[-1], 0.0
            if self.tied is not None:
                level = self.tied @ drawn
                ties = np.cumsum(level, axis=0)
                alarms, negatives = alarms + ties, negatives + ties[-1]
            yield rows, self.positives @ drawn, alarms, negatives, level


class RankingMetrics(NamedTuple):
    """Of one ranking in B resamples; NaN where one class is absent."""

    auroc: np.ndarray  # (B,)
    average_precision: np.ndarray  # (B,); NaN where it is not wanted
    sensitivities: np.ndarray  # (S, B): the highest at which specificity is at least each of S


def ranking_metrics(
    labels: np.ndarray, scores: np.ndarray, resamples: Resamples, ap: bool = True, specificities: Sequence[float] = ()
) -> RankingMetrics:
    """Of labels and scores (N,). Ties count half in the AUROC and are one step of average precision, as in
    scikit-learn. The AUROC's sums are of integers and halves below 2**53: exact. The order is found once for all
    resamples, and what is summed over is the positives, which are few.
    """
    size, patients = resamples.counts.shape
    found = RankingMetrics(*(np.full(shape, np.nan) for shape in (size, size, (len(specificities), size))))
    positives = np.count_nonzero(labels == 1)
    if positives in (0, len(labels)):
        return found
    ranking = _Ranking.of(labels, scores, resamples.group, patients)
    for rows, hits, alarms, negatives, level in ranking.drawn(resamples):
        gain = hits.sum(axis=0)
        pairs = gain * negatives
        found.auroc[rows] = ratio((hits * (negatives - alarms + level / 2)).sum(axis=0), pairs, np.nan)
        if not ap and not specificities:
            continue
        tp = np.cumsum(hits, axis=0)
        if ap:
            precision_sum = (hits * tp / np.maximum(tp + alarms, 1)).sum(axis=0)
            found.average_precision[rows] = np.where(pairs > 0, ratio(precision_sum, gain, np.nan), np.nan)
        for i, specificity in enumerate(specificities):
            runs = (alarms <= (1 - specificity) * negatives + 1e-9).sum(axis=0)  # from the highest score down
            reached = np.where(runs > 0, tp[np.maximum(runs, 1) - 1, np.arange(len(runs))], 0)
            found.sensitivities[i, rows] = np.where(pairs > 0, ratio(reached, gain, np.nan), np.nan)
    return found


def ranking_columns(
    labels: np.ndarray, probabilities: np.ndarray, resamples: Resamples, ap: bool = True,
    specificities: Sequence[float] = (),
) -> dict[str, np.ndarray]:
    """RankingMetrics of each label in B resamples, (B, L) each: "auroc", "average_precision", and
    "sensitivity_at_specificity_0.90" for each of `specificities`."""
    keys = ("auroc", "average_precision", *(f"sensitivity_at_specificity_{each:.2f}" for each in specificities))
    columns = np.empty((len(keys), len(resamples.counts), labels.shape[1]))
    for j, own in enumerate((labels != UNKNOWN).T):
        found = ranking_metrics(labels[own, j], probabilities[own, j], resamples.of(own), ap, specificities)
        columns[:, :, j] = [found.auroc, found.average_precision, *found.sensitivities]
    return dict(zip(keys, columns, strict=True))


def pooled_auroc(labels: np.ndarray, probabilities: np.ndarray, resamples: Resamples) -> np.ndarray:
    """AUROC of all N x L decisions as one ranking ("micro"), in B resamples (B,)."""
    known = labels != UNKNOWN
    every = Resamples(np.broadcast_to(resamples.group[:, None], labels.shape)[known], resamples.counts)
    return ranking_metrics(labels[known], probabilities[known], every, ap=False).auroc


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
    defined = np.flatnonzero(~lacks_a_class(labels))
    unique, patient = np.unique(np.asarray(groups), return_inverse=True)
    if not len(defined) or len(unique) < 2:
        return None
    difference, influence = 0.0, np.zeros(len(labels))
    for j in defined:
        own = labels[:, j] != UNKNOWN
        (auroc, of_first), (other, of_second) = (_auroc_influence(labels[own, j], p[own, j]) for p in (first, second))
        difference += (auroc - other) / len(defined)
        influence[own] += (of_first - of_second) / len(defined)
    by_patient = np.bincount(patient, weights=influence)
    variance = (by_patient**2).sum() * len(unique) / (len(unique) - 1)
    return float(difference), float(np.sqrt(variance))


def _auroc_influence(labels: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """(AUROC of one label, how much each volume raises it (N,)); the latter sums to 0 within either class."""
    from scipy.stats import rankdata  # takes a second to import

    positive, ranks, below = labels == 1, rankdata(scores), np.empty(len(labels))
    for own in (positive, ~positive):  # DeLong's placement values: the share of the other class below, ties half
        below[own] = (ranks[own] - rankdata(scores[own])) / (~own).sum()
    auroc = below[positive].mean()
    return auroc, np.where(positive, (below - auroc) / positive.sum(), (1 - below - auroc) / (~positive).sum())
