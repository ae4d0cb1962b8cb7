"""Tuning patients -> what a probability means and where to cut it: calibration, thresholds, the map onto 0.5.

Every function here is monotone in the probabilities of a label, so no AUROC of a label changes. All of it is fitted on
patients other than those reported; `cross_folds` is for tables that come without such patients.

Thresholds are cuts on the probabilities *as given*; calibration changes what a probability says, not what they decide.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ctclip.config import CALIBRATION_FILE, DEFAULT_OBJECTIVE, METHODS, OBJECTIVES
from ctclip.evaluation.metrics import EvaluationError, checked, crg_exchange, undefined_labels
from ctclip.fileio import replacing
from ctclip_model import ABNORMALITIES, N_LABELS

FOLDS = 5
SLOPE_SPREAD = 0.6  # how far the labels' slopes lie apart, standard deviation of the logarithm (LOG.md)
COMMON_SPREAD = 2.0  # the same for the slope all labels share: next to no opinion
LOGIT_LIMIT = 12.0  # calibrated logits are compressed beyond: float64 rounds to 1 from 37 on, and ranks would be lost
FINITE = 1e-7  # probabilities nearer to 0 or 1 count as this near in a log loss
EDGE = 7.0  # logits beyond (0.1 %, 99.9 %) are compressed into one more unit before anything is fitted


# ------------------------------------------------------------------------------------------------------ calibration


def logit(probabilities: np.ndarray) -> np.ndarray:
    """Of values in [0, 1]; -inf and inf at the ends."""
    with np.errstate(divide="ignore"):
        return np.log(probabilities) - np.log1p(-np.asarray(probabilities, np.float64))


def edged_logit(probabilities: np.ndarray) -> np.ndarray:
    """Logit up to +-EDGE, then bent so that 0 and 1 come to +-(EDGE + 1): finite everywhere, and still increasing.

    With the plain logit, a table rounded to two decimals would hold infinities that no slope can move.
    """
    plain = logit(probabilities)
    with np.errstate(divide="ignore"):
        beyond = 1 / (1 + 1 / np.maximum(np.abs(plain) - EDGE, 0))
    return np.sign(plain) * (np.minimum(np.abs(plain), EDGE) + beyond)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-logits))


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over all decisions, nats; probabilities are kept 1e-7 away from 0 and 1."""
    p = np.clip(probabilities, FINITE, 1 - FINITE)
    return float(-np.where(labels == 1, np.log(p), np.log1p(-p)).mean())


@dataclass(frozen=True)
class Calibration:
    """What was learned from tuning patients, per label (18,): calibrated logit = slope * logit + intercept + shift.

    The logit is edged_logit's; with the method "none", the plain one, so that nothing but the shift moves anything.

    `thresholds` (18,) and `global_threshold` are for probabilities as given (they may be just above 1: nothing is
    positive). `shift` moves to another prevalence. `losses` is the cross-validated log loss of each method tried;
    `unit` says what a row was (tables.UNITS).
    """

    method: str
    slope: np.ndarray
    intercept: np.ndarray
    shift: np.ndarray
    thresholds: np.ndarray
    global_threshold: float
    objective: str
    losses: Mapping[str, float]
    n_rows: int
    n_patients: int
    unit: str = "volume"

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """(N, 18) probabilities as given -> calibrated ones; increasing in each column, so that no order changes.

        Values that differ stay different, also where float32 sigmoids saturate.
        """
        logits = _logits(probabilities, self.method, self.slope, self.intercept) + self.shift
        over = np.maximum(np.abs(logits) - LOGIT_LIMIT, 0)
        return sigmoid(np.sign(logits) * (np.minimum(np.abs(logits), LOGIT_LIMIT) + np.log1p(over)))

    @property
    def calibrated_thresholds(self) -> np.ndarray:
        """`thresholds` (18,) on the calibrated scale; a cut that nothing reaches stays one."""
        return np.where(self.thresholds > 1, np.nextafter(1, 2), self.apply(np.clip(self.thresholds, 0, 1)))

    def rescale_to_half(self, probabilities: np.ndarray) -> np.ndarray:
        """(N, 18) probabilities as given -> values whose cut at 0.5 decides like `thresholds`; see rescale_to_half."""
        return rescale_to_half(probabilities, self.thresholds)

    def content(self) -> dict:
        """What calibration.json holds."""
        columns = {"slope": self.slope, "intercept": self.intercept, "shift": self.shift, "threshold": self.thresholds}
        return {
            "method": self.method,
            "per_label": {
                name: {key: float(column[j]) for key, column in columns.items()} for j, name in enumerate(ABNORMALITIES)
            },
            "global_threshold": self.global_threshold,
            "objective": self.objective,
            "cross_validated_log_loss": dict(self.losses),
            "unit": self.unit,
            "n_rows": self.n_rows,
            "n_patients": self.n_patients,
        }

    def save(self, path: str | Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.content(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_calibration(path: str | Path) -> Calibration:
    """A calibration.json; EvaluationError where it is not one."""
    remedy = "evaluate again to have it written"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = content["per_label"]
        if list(rows) != list(ABNORMALITIES):
            raise ValueError("its labels are not the 18 abnormalities in their order")
        columns = {key: np.array([float(row[key]) for row in rows.values()])
                   for key in ("slope", "intercept", "shift", "threshold")}
        cuts = np.append(columns["threshold"], float(content["global_threshold"]))
        if not all(np.isfinite(column).all() for column in columns.values()) or (columns["slope"] <= 0).any():
            raise ValueError("a number in it is not finite, or a slope not above 0")
        if not ((cuts >= 0) & (cuts <= np.nextafter(1, 2))).all():
            raise ValueError("a threshold in it is not in [0, 1]")
        return Calibration(
            str(content["method"]), columns["slope"], columns["intercept"], columns["shift"], columns["threshold"],
            float(content["global_threshold"]), str(content["objective"]), dict(content["cross_validated_log_loss"]),
            int(content["n_rows"]), int(content["n_patients"]), str(content["unit"]),
        )
    except OSError as error:
        raise EvaluationError(f"{path}: found no readable file ({error.strerror}), expected {CALIBRATION_FILE}; "
                              f"{remedy}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise EvaluationError(f"{path}: found no calibration ({error}), expected {CALIBRATION_FILE} as an evaluation "
                              f"writes it; {remedy}") from error


def fit_calibration(
    labels: np.ndarray,
    probabilities: np.ndarray,
    patients: Sequence[str],
    method: str = "auto",
    objective: str = "prevalence",
    prevalence: Mapping[str, float] | None = None,
    unit: str = "volume",
) -> Calibration:
    """Calibration and thresholds from (N, 18) labels and probabilities of tuning patients.

    `method`: "platt" (slope and intercept per label), "temperature" (slope only: cannot cure over-prediction), "none",
    or "auto", the one with the lowest log loss when each fifth of the patients is calibrated by the other four.
    `prevalence`: {label: rate in (0, 1)} of the cohort this is meant for, where it differs from the tuning patients';
    calibration and thresholds are then those for that cohort.
    """
    labels, probabilities = checked(labels, probabilities)
    patients = np.asarray(patients)
    if method not in ("auto", *METHODS):
        raise EvaluationError(f"found calibration {method!r}, expected auto, {', '.join(METHODS)}")
    losses = _cross_validated_losses(labels, probabilities, patients) if method == "auto" else {}
    method = min(losses, key=losses.__getitem__) if losses else "none" if method == "auto" else method
    n_patients = len(np.unique(patients))
    slope, intercept = _fit_slopes(labels, probabilities, n_patients, method)
    rates = _target_rates(labels, prevalence)
    # Elkan, IJCAI 2001; Saerens, Latinne & Decaestecker, Neural Computation 2002
    fitted_rates = _targets(labels, n_patients).mean(axis=0)  # what Platt's calibrated probabilities come to on average
    shift = np.zeros(N_LABELS) if prevalence is None else logit(rates) - logit(fitted_rates)
    return Calibration(
        method, slope, intercept, shift,
        tune_label_thresholds(labels, probabilities, objective, prevalence),
        tune_global_threshold(labels, probabilities, objective, prevalence),
        objective, losses, len(labels), n_patients, unit,
    )


def _cross_validated_losses(labels: np.ndarray, probabilities: np.ndarray, patients: np.ndarray) -> dict[str, float]:
    """Log loss of each method on patients it was not fitted on; {} with a single patient."""
    if len(np.unique(patients)) < 2:
        return {}
    calibrated = {method: np.empty(labels.shape) for method in METHODS}
    for others, own in cross_folds(patients):
        n_patients = len(np.unique(patients[others]))
        for method, values in calibrated.items():
            slope, intercept = _fit_slopes(labels[others], probabilities[others], n_patients, method)
            values[own] = sigmoid(_logits(probabilities[own], method, slope, intercept))
    return {method: log_loss(labels, values) for method, values in calibrated.items()}


def _logits(probabilities: np.ndarray, method: str, slope: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    return logit(probabilities) if method == "none" else slope * edged_logit(probabilities) + intercept


def _targets(labels: np.ndarray, n_patients: int) -> np.ndarray:
    """(N, 18) labels as Platt (1999) fits them: a little inside 0 and 1, the further the fewer patients there are."""
    positives = n_patients * labels.mean(axis=0)
    return np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (n_patients - positives + 2))


def _fit_slopes(
    labels: np.ndarray, probabilities: np.ndarray, n_patients: int, method: str
) -> tuple[np.ndarray, np.ndarray]:
    """(slope (18,), intercept (18,)) that minimise log loss; slopes above 0 and pulled towards a common one.

    A rare finding has a handful of positives, too few for a slope of its own: the logarithms of the slopes are taken
    as spread around a common one, fitted first, by SLOPE_SPREAD. Targets are Platt's, so that a label with one class,
    or perfectly separated, stays finite. A patient's volumes say the same thing twice: all rows together weigh as much
    as there are patients.
    """
    if method == "none":
        return np.ones(N_LABELS), np.zeros(N_LABELS)
    weight, targets = n_patients / len(labels), _targets(labels, n_patients)
    x = edged_logit(probabilities)
    free = 1.0 if method == "platt" else 0.0  # whether intercepts may move
    middle = free * x.mean(axis=0)  # about it, slope and intercept hardly depend on each other
    x = x - middle
    nothing = np.zeros(N_LABELS)
    common, level = _newton(x, targets, weight, free, nothing, nothing, COMMON_SPREAD, shared=True)
    slopes, level = _newton(x, targets, weight, free, common, level, SLOPE_SPREAD, shared=False)
    return np.exp(slopes), level - np.exp(slopes) * middle


def _newton(
    x: np.ndarray,
    targets: np.ndarray,
    weight: float,
    free: float,
    centre: np.ndarray,
    intercept: np.ndarray,
    spread: float,
    shared: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """(log slope (18,), intercept (18,)): Gauss-Newton on weight * cross entropy + (log slope - centre)^2 / 2 spread^2.

    Starts from `centre` and `intercept`. With `shared`, one slope for all labels; else each label is a problem of its
    own, and all are solved at once.
    """
    slope = centre
    pooled = (lambda a: np.full(N_LABELS, a.sum())) if shared else (lambda a: a)

    def cost(slope: np.ndarray, intercept: np.ndarray) -> np.ndarray:
        z = np.exp(slope) * x + intercept
        entropy = weight * (np.logaddexp(0, z) - targets * z).sum(axis=0)
        return pooled(entropy) + (slope - centre) ** 2 / (2 * spread**2)

    current = cost(slope, intercept)
    noise = 1e-10 * np.maximum(current, 1)  # smaller changes are rounding, or not worth a step
    for _ in range(100):
        scaled = np.exp(slope) * x
        q = sigmoid(scaled + intercept)
        error, curvature = weight * (q - targets), weight * q * (1 - q) + 1e-12
        g_slope = pooled((error * scaled).sum(axis=0)) + (slope - centre) / spread**2
        g_intercept = free * error.sum(axis=0)
        h_slope, h_both = (curvature * scaled**2).sum(axis=0), free * (curvature * scaled).sum(axis=0)
        h_intercept = curvature.sum(axis=0)
        reduced = pooled(h_slope - h_both**2 / h_intercept) + 1 / spread**2
        step = -(g_slope - pooled(h_both * g_intercept / h_intercept)) / reduced
        step = np.clip(step, -1, 1)
        move = np.clip(-(g_intercept + h_both * step) / h_intercept * free, -2, 2)  # where all is saturated, h is 0
        size, tried = np.ones(N_LABELS), cost(slope + step, intercept + move)
        for _ in range(30):  # halve the steps that do not improve
            worse = tried > current + noise
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
            tried = cost(slope + size * step, intercept + size * move)
        slope, intercept, before, current = slope + size * step, intercept + size * move, current, tried
        if (before - current <= noise).all():
            break
    return slope, intercept


def _smoothed_rates(labels: np.ndarray) -> np.ndarray:
    """Label rates, with those of one-class labels moved half a row away from 0 and 1."""
    return np.clip(labels.mean(axis=0), 0.5 / len(labels), 1 - 0.5 / len(labels))


def _target_rates(labels: np.ndarray, prevalence: Mapping[str, float] | None) -> np.ndarray:
    """(18,) rates to calibrate for: `prevalence` where it names the label, else those of `labels`."""
    return np.array([
        (prevalence or {}).get(name, rate) for name, rate in zip(ABNORMALITIES, _smoothed_rates(labels), strict=True)
    ])


def cross_folds(patients: Sequence[str], folds: int = FOLDS, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows of the others, rows of this fold), masks (N,): every row is in one fold, with all of its patient's rows.

    Folds are drawn from the sorted patients, so they depend on `seed` and on who is there, not on the order of rows.
    """
    unique, index = np.unique(np.asarray(patients), return_inverse=True)
    if len(unique) < 2:
        raise EvaluationError(
            f"found volumes of 1 patient only ({unique[0]}), expected at least 2 to cross-fit thresholds; give tuning "
            "tables of other patients, or name volumes as CT-RATE does (train_12_a_1.nii.gz is patient train_12)"
        )
    folds = min(folds, len(unique))
    fold = (np.random.default_rng(seed).permutation(len(unique)) % folds)[index]
    for k in range(folds):
        yield fold != k, fold == k


# ------------------------------------------------------------------------------------------------------- thresholds

# Each objective scores every cut at once: tp and fp are (L, C) for L labels and C cuts, positives is (L, 1), n the
# number of rows and rate the share of positives among all 18 x n decisions. It returns (C,) scores to maximise, so that
# one label (L = 1) and one global cut for all labels (L = 18) are the same search.


def _score_prevalence(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int, rate: float) -> np.ndarray:
    return -np.abs((tp + fp - positives).sum(axis=0)) / (n * len(tp))


def _score_f1(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int, rate: float) -> np.ndarray:
    predicted_and_true = tp + fp + positives
    return (2 * tp / np.where(predicted_and_true > 0, predicted_and_true, 1)).mean(axis=0)


def _score_hamming(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int, rate: float) -> np.ndarray:
    return 1 - (positives - tp + fp).mean(axis=0) / n


def _sensitivity_and_specificity(
    tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """(C,) each: means over the labels with both classes."""
    both = (positives > 0) & (positives < n)
    share = both / max(both.sum(), 1)
    sensitivity = (share * tp / np.where(both, positives, 1)).sum(axis=0)
    return sensitivity, (share * (1 - fp / np.where(both, n - positives, 1))).sum(axis=0)


def _score_youden(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int, rate: float) -> np.ndarray:
    return sum(_sensitivity_and_specificity(tp, fp, positives, n)) - 1


def _score_crg(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int, rate: float) -> np.ndarray:
    """CRG grows with this sum over the labels, so its best cuts can be sought label by label, at the pooled rate."""
    r = crg_exchange(rate, 1)
    return (r * tp - r * (positives - tp) - fp).sum(axis=0) / n


def _score_sensitivity(
    tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int, rate: float, floor: float
) -> np.ndarray:
    """The most specific cut that finds at least `floor` of the positives."""
    sensitivity, specificity = _sensitivity_and_specificity(tp, fp, positives, n)
    return np.where(sensitivity >= floor - 1e-12, 1 + specificity, sensitivity)


OBJECTIVE_SCORES: dict[str, Callable[..., np.ndarray]] = {  # in OBJECTIVES' order
    "prevalence": _score_prevalence,  # predicted rate = label rate
    "f1": _score_f1,
    "hamming": _score_hamming,
    "youden": _score_youden,
    "crg": _score_crg,
}
SENSITIVITY = re.compile(r"sensitivity\s*(?:>=|:|=)\s*(0?\.\d+|1|1\.0*)")


def objective_score(objective: str) -> Callable[..., np.ndarray]:
    """The function behind a name: one of OBJECTIVES, or "sensitivity:X" with X in (0, 1] (also "sensitivity>=X")."""
    match = SENSITIVITY.fullmatch(objective)
    if match and float(match[1]) > 0:
        return partial(_score_sensitivity, floor=float(match[1]))
    if objective not in OBJECTIVES:
        raise EvaluationError(
            f"found objective {objective!r}, expected one of {', '.join(OBJECTIVES)} or sensitivity:X with X above 0 "
            "and at most 1, such as sensitivity:0.9"
        )
    return OBJECTIVE_SCORES[objective]


def tune_global_threshold(
    labels: np.ndarray,
    probabilities: np.ndarray,
    objective: str = DEFAULT_OBJECTIVE,
    prevalence: Mapping[str, float] | None = None,
) -> float:
    """The one cut for all labels that maximises `objective` (macro F1, pooled rate, pooled accuracy, mean Youden, CRG,
    or mean specificity at a mean sensitivity). `prevalence` as in fit_calibration."""
    labels, probabilities = checked(labels, probabilities)
    return _best_cut(labels, probabilities, objective, _class_weights(labels, prevalence), slice(None))


def tune_label_thresholds(
    labels: np.ndarray,
    probabilities: np.ndarray,
    objective: str = DEFAULT_OBJECTIVE,
    prevalence: Mapping[str, float] | None = None,
) -> np.ndarray:
    """(18,) cuts, each maximising `objective` on its own label. `prevalence` as in fit_calibration.

    A label without both classes here (named by undefined_labels) has nothing to tune on and takes the global cut.
    """
    labels, probabilities = checked(labels, probabilities)
    weights = _class_weights(labels, prevalence)
    undefined = undefined_labels(labels)
    fallback = _best_cut(labels, probabilities, objective, weights, slice(None)) if undefined else None
    return np.array([
        fallback if name in undefined else _best_cut(labels, probabilities, objective, weights, slice(j, j + 1))
        for j, name in enumerate(ABNORMALITIES)
    ])


def _class_weights(labels: np.ndarray, prevalence: Mapping[str, float] | None) -> tuple[np.ndarray, np.ndarray]:
    """(18,) weights of each label's positives and negatives that give it the rate asked for; 1 with one class."""
    rates, wanted = labels.mean(axis=0), _target_rates(labels, prevalence)
    two = (rates > 0) & (rates < 1)
    safe = np.where(two, rates, 0.5)
    return np.where(two, wanted / safe, 1), np.where(two, (1 - wanted) / (1 - safe), 1)


def _best_cut(
    labels: np.ndarray, probabilities: np.ndarray, objective: str, weights: tuple[np.ndarray, np.ndarray], which: slice
) -> float:
    """Exhaustive search over candidate_cuts for the labels in `which`. Of equally good cuts, the one whose predicted
    rate is nearest to the label rate, then the highest."""
    score_of = objective_score(objective)
    of_positive, of_negative = (column[:, None] for column in weights)
    all_positives = of_positive * labels.sum(axis=0, dtype=np.int64)[:, None]
    rate = np.clip(all_positives.sum() / labels.size, 1e-12, 1)
    columns = list(zip(labels.T[which], probabilities.T[which], strict=True))
    sorted_positive = [np.sort(p[y == 1]) for y, p in columns]
    sorted_negative = [np.sort(p[y == 0]) for y, p in columns]
    positives, cuts = all_positives[which], candidate_cuts(probabilities[:, which])
    scores, gaps = [], []
    for part in np.array_split(cuts, len(cuts) // 2**15 + 1):  # bounds the memory of a global search on a large cohort
        tp = of_positive[which] * np.stack([len(p) - np.searchsorted(p, part) for p in sorted_positive])
        fp = of_negative[which] * np.stack([len(p) - np.searchsorted(p, part) for p in sorted_negative])
        scores.append(score_of(tp, fp, positives, len(labels), rate))
        gaps.append(np.abs((tp + fp - positives).sum(axis=0)))
    score, gap = np.concatenate(scores), np.concatenate(gaps)
    best = np.flatnonzero(score >= score.max() - 1e-12)
    best = best[gap[best] <= gap[best].min() + 1e-9]
    return float(cuts[best[-1]])


def candidate_cuts(probabilities: np.ndarray) -> np.ndarray:
    """Ascending cuts, one for each way `probability >= cut` can divide these values: below all of them, midway
    between neighbours (tied volumes are never split), above all of them (that last one may exceed 1)."""
    values = np.unique(probabilities)
    lower, upper = np.concatenate([[0.0], values]), np.concatenate([values, [1.0]])
    middle = (lower + upper) / 2
    # Neighbours so close that their midpoint rounds onto the lower one: the upper value itself divides them.
    middle[1:] = np.where(middle[1:] > values, middle[1:], np.nextafter(values, 2))
    return middle


def rescale_to_half(probabilities: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Values in [0, 1] that are >= 0.5 exactly where `probabilities` >= `cuts`, for readers that cut at 0.5.

    Two straight lines per label, from 0 to the cut and from the cut to 1: increasing, so that no label's AUROC changes
    (values closer than 1e-16 may fall together). What comes out ranks and decides; it is no probability any more.
    """
    p, cuts = np.broadcast_arrays(np.asarray(probabilities, np.float64), cuts)
    above = p >= cuts
    low = p / np.where(above, 1, 2 * cuts)
    high = 0.5 + (p - cuts) / np.where(above & (cuts < 1), 2 * (1 - cuts), 1)
    return np.where(above, high, low)


def read_prevalence(source: str) -> dict[str, float]:
    """{label: rate} from "ct-rate" (its training split, as published) or a JSON file naming labels and rates."""
    if source == "ct-rate":
        from ctclip.data.preprocessing import PREVALENCE

        return dict(PREVALENCE)
    try:
        rates = json.loads(Path(source).read_text(encoding="utf-8"))
        if not isinstance(rates, dict) or not rates:
            raise ValueError("it names no label")
        unknown = [name for name in rates if name not in ABNORMALITIES]
        if unknown:
            raise ValueError(f"it names {unknown[0]!r}, which is none of the 18 abnormalities")
        wrong = [f"{name}: {rate!r}" for name, rate in rates.items()
                 if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < 1]
        if wrong:
            raise ValueError(wrong[0])
    except OSError as error:
        raise EvaluationError(f"--prevalence {source}: found no readable file ({error.strerror}), expected ct-rate or "
                              "a JSON file of label and rate; check the path") from error
    except ValueError as error:
        raise EvaluationError(f"--prevalence {source}: found no rates ({error}), expected a JSON object of label and "
                              'rate between 0 and 1, such as {"Lung nodule": 0.45}; correct it') from error
    return {name: float(rate) for name, rate in rates.items()}
