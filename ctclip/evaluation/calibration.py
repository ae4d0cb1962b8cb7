"""Tuning patients -> a calibration of the probabilities, stored together with the thresholds fitted on them.

Calibration increases with the probability of a label, so no AUROC of a label changes. It is fitted on patients other
than those reported; `cross_folds` is for tables without such patients. Thresholds are searched on uncalibrated
probabilities, and stored on both scales.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from ctclip.config import CALIBRATION_FILE, METHODS, UNITS, Settings
from ctclip.data.ct_rate import PREVALENCE
from ctclip.data.label_table import mistyped
from ctclip.data.tables import CALIBRATED, SCALES, UNCALIBRATED, some
from ctclip.evaluation.metrics import EvaluationError, checked, lacks_a_class, masked_mean, names_where
from ctclip.evaluation.tables import Rows, VolumeTable, check_no_overlap, tuning_rows
from ctclip.evaluation.thresholds import (
    label_rates,
    rescale_to_half,
    target_rates,
    tune_global_threshold,
    tune_label_thresholds,
)
from ctclip.fileio import read_json, replacing
from ctclip_model import ABNORMALITIES, UNKNOWN, check_written

FOLDS = 5
TUNING, CROSS_FITTED = "tuning patients", "cross-fitted by patient"  # FittedThresholds.fitted_on
SLOPE_PRIOR_SD = 0.6  # how far the labels' slopes lie apart, standard deviation of the logarithm (LOG.md)
CACHED_VALUES = 2**14  # computed at once: few enough for a processor's cache
COMMON_SLOPE_PRIOR_SD = 2.0  # the same for the slope all labels share: next to no opinion
LOGIT_LIMIT = 12.0  # calibrated logits are compressed beyond: float64 rounds to 1 from 37 on, and ranks would be lost
RAREST = 1e-6  # of --prevalence: one patient in a million; what is below is no rate that anybody has counted
ROUNDING = 1e-13  # relative; a loss is no better known, where gradients still are
LARGEST = 1e6  # slope or intercept of a calibration; fitted ones are below 1000
SAME_THRESHOLD = 1e-9  # a stored calibrated threshold differs by rounding only from the uncalibrated one, calibrated
LOG_LOSS_CLIP = 1e-7  # a log loss keeps probabilities this far from 0 and 1
FEW_PATIENTS = 50  # with fewer to fit on, rates are missed by 10 points and more (LOG.md)
COUNTS = ("true_positives", "positives", "true_negatives", "negatives")  # Calibration.counts
LOGIT_KNEE = 7.0  # logits beyond (0.1 %, 99.9 %) are compressed into one more unit before anything is fitted


def compressed_logit(probabilities: np.ndarray) -> np.ndarray:
    """Logit up to +-LOGIT_KNEE, then bent so that 0 and 1 come to +-(LOGIT_KNEE + 1): finite, and still increasing.

    With the plain logit, a table rounded to two decimals would hold infinities that no slope can move.
    """
    plain = logit(np.asarray(probabilities, np.float64))
    with np.errstate(divide="ignore"):
        beyond = 1 / (1 + 1 / np.maximum(np.abs(plain) - LOGIT_KNEE, 0))
    return np.sign(plain) * (np.minimum(np.abs(plain), LOGIT_KNEE) + beyond)


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over all known decisions, nats."""
    p = np.clip(probabilities, LOG_LOSS_CLIP, 1 - LOG_LOSS_CLIP)[labels != UNKNOWN]
    return float(-np.where(labels[labels != UNKNOWN] == 1, np.log(p), np.log1p(-p)).mean())


@dataclass(frozen=True)
class Calibration:
    """Fitted on tuning patients, for each of `findings` (L,): calibrated logit = slope * logit + intercept + shift.

    The logit is compressed_logit's; with the method "none", the plain one, so that only the shift changes anything.

    `thresholds` (L,) and `global_threshold` are for uncalibrated probabilities (they may be just above 1: nothing is
    positive). `shift` moves to another prevalence, `prevalence` as in fit_calibration. `losses` is the cross-validated
    log loss of each method tried; `unit` says what a row was (tables.UNITS), `scale` what its numbers were (SCALES).
    `counts` (L, 4) are COUNTS of the tuning rows at `thresholds`, which they chose; None in files of earlier versions.
    """

    findings: tuple[str, ...]
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
    prevalence: Mapping[str, float] | None = None
    scale: str = UNCALIBRATED
    counts: np.ndarray | None = None

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """(N, L) probabilities -> calibrated ones; increasing in each column, so that no order changes.

        Values that differ stay different, also where float32 sigmoids saturate.
        """
        logits = _logits(probabilities, self.method, self.slope, self.intercept) + self.shift
        over = np.maximum(np.abs(logits) - LOGIT_LIMIT, 0)
        return expit(np.sign(logits) * (np.minimum(np.abs(logits), LOGIT_LIMIT) + np.log1p(over)))

    @property
    def calibrated_scale(self) -> str:
        """What tables calibrated by this have in SCALE_COLUMN: "calibrated", and a name for the map. Fitted on another
        scale than the model's own, it changes nothing, and they stay on that scale."""
        if self.scale != UNCALIBRATED:
            return self.scale
        numbers = [self.method, *(column.tolist() for column in (self.slope, self.intercept, self.shift))]
        return f"{CALIBRATED} {hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:8]}"

    @property
    def chosen(self) -> dict[str, Any]:
        """What fit_calibration was asked for, to fit another one alike."""
        method = "auto" if self.losses else self.method  # several were compared
        return {"method": method, "objective": self.objective, "prevalence": self.prevalence}

    @property
    def calibrated_thresholds(self) -> np.ndarray:
        """`thresholds` (L,) on the calibrated scale; one above every probability stays so."""
        return np.where(self.thresholds > 1, np.nextafter(1, 2), self.apply(np.clip(self.thresholds, 0, 1)))

    def rescale_to_half(self, probabilities: np.ndarray) -> np.ndarray:
        """(N, L) probabilities -> values that a threshold of 0.5 divides as `thresholds` do."""
        return rescale_to_half(probabilities, self.thresholds)

    def select(self, findings: Sequence[str]) -> Calibration:
        """The same of these findings, in their order; EvaluationError where it was fitted without one of them."""
        if missing := [name for name in findings if name not in self.findings]:
            raise EvaluationError(f"found a calibration without {some(missing)}, expected one of all {len(findings)} "
                                  "findings; evaluate again to have it written")
        at = [self.findings.index(name) for name in findings]
        columns = {key: getattr(self, key)[at] for key in ("slope", "intercept", "shift", "thresholds")}
        return replace(self, findings=tuple(findings), **columns,
                       counts=None if self.counts is None else self.counts[at])

    def content(self) -> dict:
        """What calibration.json holds."""
        columns = {"slope": self.slope, "intercept": self.intercept, "shift": self.shift,
                   "threshold_uncalibrated": self.thresholds, "threshold_calibrated": self.calibrated_thresholds}
        per_label: dict[str, dict] = {
            name: {key: float(column[j]) for key, column in columns.items()} for j, name in enumerate(self.findings)
        }
        if self.counts is not None:
            for row, counts in zip(per_label.values(), self.counts.tolist(), strict=True):
                row |= dict(zip(COUNTS, counts, strict=True))
        return {
            "method": self.method,
            "per_label": per_label,
            "global_threshold_uncalibrated": self.global_threshold,
            "objective": self.objective,
            "prevalence": None if self.prevalence is None else dict(self.prevalence),
            "cross_validated_log_loss": dict(self.losses),
            "unit": self.unit,
            "scale": self.scale,
            "n_rows": self.n_rows,
            "n_patients": self.n_patients,
        }

    def save(self, path: str | Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.content(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_calibration(path: str | Path) -> Calibration:
    """A calibration.json; EvaluationError where it is not one, CheckpointError where it has changed since."""
    check_written(Path(path))
    try:
        return parse_calibration(read_json(path))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # of a list where an object belongs
        found = f"readable file ({error.strerror})" if isinstance(error, OSError) else f"calibration ({error})"
        raise EvaluationError(f"{path}: found no {found}, expected {CALIBRATION_FILE} as an evaluation writes it; "
                              "evaluate again to have it written") from error


def parse_calibration(content: Any) -> Calibration:
    """What `Calibration.content` gave. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
    rows = content["per_label"]
    if not rows or ({*rows} == {*ABNORMALITIES} and tuple(rows) != ABNORMALITIES):
        raise ValueError("its labels are none, or the 18 abnormalities in another order")
    earlier = "global_threshold" in content  # up to 0.7.0: thresholds are for uncalibrated probabilities, unnamed
    of_uncalibrated = "" if earlier else f"_{UNCALIBRATED}"
    slope, intercept, shift, thresholds = columns = np.array([
        [_number(row[key]) for row in rows.values()]
        for key in ("slope", "intercept", "shift", f"threshold{of_uncalibrated}")
    ])
    common, n_rows, n_patients = (content[key] for key in
                                  (f"global_threshold{of_uncalibrated}", "n_rows", "n_patients"))
    if not (np.abs(columns) < LARGEST).all() or (slope <= 0).any():
        raise ValueError(f"a number in it is not below {LARGEST:g}, or a slope not above 0")
    if content["method"] not in METHODS or content["unit"] not in UNITS or type(content["objective"]) is not str:
        raise ValueError("its method, unit or objective is none of ours")
    if not all(type(count) is int and count > 0 for count in (n_rows, n_patients)):
        raise ValueError("a number of rows or patients in it is none")
    if not all(0 <= threshold <= np.nextafter(1, 2) for threshold in (*thresholds, _number(common))):
        raise ValueError("a threshold in it is not in [0, 1]")
    counts = None
    if all(key in row for row in rows.values() for key in COUNTS):  # none in earlier files
        counts = np.array([[row[key] for key in COUNTS] for row in rows.values()])
        hits, of = counts[:, ::2], counts[:, 1::2]
        if counts.dtype.kind != "i" or (hits < 0).any() or (hits > of).any():
            raise ValueError("counts of tuning patients in it are none")
    prevalence, scale = content.get("prevalence"), content.get("scale", UNCALIBRATED)
    if prevalence is not None:
        check_rates(prevalence)
    if type(scale) is not str or scale.partition(" ")[0] not in SCALES:
        raise ValueError("its scale is none of ours")
    calibration = Calibration(
        tuple(rows), content["method"], slope, intercept, shift, thresholds, float(common), content["objective"],
        {str(key): _number(value) for key, value in content["cross_validated_log_loss"].items()},
        n_rows, n_patients, content["unit"], prevalence, scale, counts,
    )
    if not earlier:
        stored = [_number(row["threshold_calibrated"]) for row in rows.values()]
        if (np.abs(calibration.calibrated_thresholds - stored) > SAME_THRESHOLD).any():
            raise ValueError("a calibrated threshold in it is another one than the uncalibrated one, calibrated")
    return calibration


def _number(value: object) -> float:
    """A number of a JSON file, which can also hold text, true, NaN and integers beyond every float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise ValueError(f"{value!r:.40} in it is no number")
    return float(value)


def fit_calibration(
    labels: np.ndarray, probabilities: np.ndarray, patients: Sequence[str] | np.ndarray, method: str = "auto",
    objective: str = "prevalence", prevalence: Mapping[str, float] | None = None, unit: str = "volume",
    findings: Sequence[str] = ABNORMALITIES, scale: str = UNCALIBRATED,
) -> Calibration:
    """Calibration and thresholds from (N, L) labels (UNKNOWN: left out) and probabilities of tuning patients, of the
    `findings` that name the L columns.

    `method`: "platt" (slope and intercept per label), "temperature" (slope only: cannot cure over-prediction), "none",
    or "auto", the one with the lowest cross-validated log loss (five folds of patients).
    `prevalence`: {label: rate in (0, 1)} of the target cohort, where it differs from the tuning patients';
    calibration and thresholds are then those for that cohort.
    """
    labels, probabilities = checked(labels, probabilities)
    n_patients = len(np.unique(np.asarray(patients)))
    if method not in ("auto", *METHODS):
        raise EvaluationError(f"found calibration {method!r}, expected auto, {', '.join(METHODS)}")
    if len(findings) != labels.shape[1]:
        raise EvaluationError(f"found {labels.shape[1]} columns and {len(findings)} names of findings, expected as "
                              "many; pass `findings`")
    losses, wanted = {}, rates_asked_for(prevalence, findings)
    if method == "auto":  # a single patient leaves nothing to choose by
        losses = _cross_validated_losses(labels, probabilities, np.asarray(patients)) if n_patients > 1 else {}
        method = min(losses, key=losses.__getitem__, default="none")
    slope, intercept = _fit_slopes(labels, probabilities, n_patients, method)
    rates = target_rates(labels, wanted)
    # Elkan, IJCAI 2001; Saerens, Latinne & Decaestecker, Neural Computation 2002
    # what Platt's calibrated probabilities come to on average; 1/2 where nothing is known
    fitted_rates = np.nan_to_num(masked_mean(_targets(labels, n_patients), labels != UNKNOWN), nan=0.5)
    shift = np.zeros(labels.shape[1]) if wanted is None else logit(rates) - logit(fitted_rates)
    thresholds = tune_label_thresholds(labels, probabilities, objective, wanted)
    return Calibration(
        tuple(findings), method, slope, intercept, shift, thresholds,
        tune_global_threshold(labels, probabilities, objective, wanted),
        objective, losses, len(labels), n_patients, unit, prevalence, scale,
        counts_at(labels, probabilities, thresholds),
    )


def counts_at(labels: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(L, 4) COUNTS of (N, L) labels, those that are known, and probabilities decided at `thresholds` (L,)."""
    called, present, absent = probabilities >= thresholds, labels == 1, labels == 0
    return np.stack([(called & present).sum(0), present.sum(0), (~called & absent).sum(0), absent.sum(0)], axis=1)


def rates_asked_for(prevalence: Mapping[str, float] | None, findings: Sequence[str]) -> np.ndarray | None:
    """(L,) rates of `prevalence`, NaN for the findings that it does not name. Raises EvaluationError for a name that is
    neither one of the findings nor one of the 18."""
    if prevalence is None:
        return None
    if unknown := [name for name in prevalence if name not in findings and name not in ABNORMALITIES]:
        raise EvaluationError(f"--prevalence: found {unknown[0]!r}, expected one of the findings ({some(findings)}); "
                              "correct the name")
    return np.array([prevalence.get(name, np.nan) for name in findings])


def _cross_validated_losses(labels: np.ndarray, probabilities: np.ndarray, patients: np.ndarray) -> dict[str, float]:
    """Log loss of each method on patients it was not fitted on."""
    calibrated = {method: np.empty(labels.shape) for method in METHODS}
    for others, own in cross_folds(patients):
        n_patients = len(np.unique(patients[others]))
        for method, values in calibrated.items():
            fit = _fit_slopes(labels[others], probabilities[others], n_patients, method)
            values[own] = expit(_logits(probabilities[own], method, *fit))
    return {method: log_loss(labels, values) for method, values in calibrated.items()}


def _logits(probabilities: np.ndarray, method: str, slope: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    if method == "none":
        return logit(np.asarray(probabilities, np.float64))
    return slope * compressed_logit(probabilities) + intercept


def _targets(labels: np.ndarray, n_patients: int) -> np.ndarray:
    """(N, L) labels as Platt (1999) fits them: a little inside 0 and 1, the further the fewer patients there are."""
    patients = n_patients * (labels != UNKNOWN).mean(axis=0)
    positives = patients * label_rates(labels)
    return np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (patients - positives + 2))


def _fit_slopes(
    labels: np.ndarray, probabilities: np.ndarray, n_patients: int, method: str
) -> tuple[np.ndarray, np.ndarray]:
    """(slope (L,), intercept (L,)) that minimise log loss; slopes above 0 and pulled towards a common one.

    A rare finding has a handful of positives, too few for a slope of its own: the logarithms of the slopes are taken
    as spread around a common one, fitted first, by SLOPE_PRIOR_SD. Targets are Platt's, so that a label with one class,
    or perfectly separated, stays finite. A patient's volumes are not independent: all rows together weigh as much
    as there are patients.
    """
    n_labels = labels.shape[1]
    if method == "none":
        return np.ones(n_labels), np.zeros(n_labels)
    free, columns = method == "platt", np.empty((3, *labels.T.shape))  # whose sums no order in memory changes
    columns[:] = compressed_logit(probabilities).T, _targets(labels, n_patients).T, (labels != UNKNOWN).T
    x, _, known = columns
    x *= known
    # centred, slope and intercept hardly depend on each other
    mean = x.sum(axis=1) / np.maximum(known.sum(axis=1), 1) if free else np.zeros(n_labels)
    x -= mean[:, None] * known
    weight = n_patients / len(labels)
    common, start = _minimise_log_loss(columns[:, None], weight, free, 0.0, np.zeros((1, n_labels)),
                                       COMMON_SLOPE_PRIOR_SD)
    log_slope, intercept = _minimise_log_loss(columns[:, :, None], weight, free, common[0], start.T, SLOPE_PRIOR_SD)
    slope = np.exp(log_slope)
    return slope, intercept[:, 0] - slope * mean


def _minimise_log_loss(
    columns: np.ndarray, weight: float, free: bool, prior_mean: float, intercept: np.ndarray, prior_sd: float,
) -> tuple[np.ndarray, np.ndarray]:
    """For each of G groups of K columns, given as x, targets and whether the label is known, (3, G, K, N): the
    log slope that its columns share and their intercepts, (G,) and (G, K), that minimise
    weight * cross entropy + (log slope - prior_mean)^2 / (2 prior_sd^2). Intercepts begin at `intercept`, and stay
    there unless `free`.

    Newton's method, with the step halved until the loss falls. The second derivative of the exponential is left out
    where the curvature would hardly be positive with it.
    """

    def evaluated(groups: np.ndarray, unknowns: np.ndarray) -> tuple[np.ndarray, ...]:
        """(loss; gradient by log slope and intercepts; what a Newton step adds to them; the fall that it promises)"""
        slope = np.exp(unknowns[:, :1])
        sums = _sums(columns, groups, slope, unknowns[:, 1:])
        by_intercept, by_slope, spread, cross, square = weight * sums[1:]
        offset, bend = unknowns[:, 0] - prior_mean, slope[:, 0] * by_slope.sum(axis=1)
        by_slope, cross = bend + offset / prior_sd**2, slope * cross
        curvature, spread = slope[:, 0] ** 2 * square.sum(axis=1) + 1 / prior_sd**2, np.maximum(spread, 1e-12)
        if not free:
            by_intercept, cross = np.zeros_like(by_intercept), np.zeros_like(cross)
        curvature -= (cross**2 / spread).sum(axis=1)
        curvature += np.where(curvature + bend > curvature / 10, bend, 0)
        step = -(by_slope - (cross * by_intercept / spread).sum(axis=1)) / curvature
        gradient = np.column_stack([by_slope, by_intercept])
        steps = np.column_stack([step, -(by_intercept + cross * step[:, None]) / spread])
        loss = weight * sums[0].sum(axis=1) + offset**2 / (2 * prior_sd**2)
        return loss, gradient, steps, -(gradient * steps).sum(axis=1)

    tolerance = 1e-9 * weight * columns[2].sum(axis=-1).max(axis=1)
    unknowns = np.column_stack([np.full(len(intercept), prior_mean), intercept])
    groups = np.arange(len(unknowns))
    loss, gradient, steps, fall = state = evaluated(groups, unknowns)
    while len(groups := groups[np.abs(gradient[groups]).max(axis=1) > tolerance[groups]]):
        searching, share = groups, 1.0
        while len(searching) and share > 1e-6:
            tried = unknowns[searching] + share * steps[searching]
            new = evaluated(searching, tried)
            lower = new[0] <= (1 + ROUNDING) * loss[searching] - 1e-4 * share * fall[searching]
            unknowns[searching[lower]] = tried[lower]
            for old, values in zip(state, new, strict=True):
                old[searching[lower]] = values[lower]
            searching, share = searching[~lower], share / 2
        groups = np.setdiff1d(groups, searching)  # as exact as floats allow
    return unknowns[:, 0], unknowns[:, 1:]


def _sums(columns: np.ndarray, groups: np.ndarray, slope: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    """(6, g, K) sums over the N rows of columns (3, G, K, N), those of `groups` (g,): cross entropy; its derivatives by
    intercept and by slope; the second ones by intercept, by both, by slope. `slope` (g, 1), `intercept` (g, K)."""
    shape, n_rows = intercept.shape, columns.shape[-1]
    sums = np.empty((6, intercept.size))
    columns = columns.reshape(3, -1, n_rows)
    numbers = (groups[:, None] * shape[1] + np.arange(shape[1])).ravel()
    slope, intercept = np.broadcast_to(slope, shape).reshape(-1, 1), intercept.reshape(-1, 1)
    at_once = max(1, CACHED_VALUES // n_rows)
    for part in (slice(first, first + at_once) for first in range(0, len(numbers), at_once)):
        x, targets, known = (values[numbers[part]] for values in columns)
        z = slope[part] * x + intercept[part]
        tail = np.exp(-np.abs(z))
        p = np.where(z < 0, tail, 1) / (1 + tail)
        loss, error, spread = np.maximum(z, 0) + np.log1p(tail) - targets * z, p - targets, p * (1 - p)
        if not known.all():
            loss, error, spread = (known * values for values in (loss, error, spread))
        steep = spread * x
        # not `@`, whose threads wait for each other for longer than these vectors take
        for k, values in enumerate((loss, error, error * x, spread, steep, steep * x)):
            sums[k, part] = values.sum(axis=-1)
    return sums.reshape(6, *shape)


def cross_folds(patients: Sequence[str] | np.ndarray, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows of the others, rows of this fold), masks (N,): every row is in one fold, with all of its patient's rows.

    Folds are drawn from the sorted patients, so they depend on `seed` and on who is there, not on the order of rows.
    """
    unique, index = np.unique(np.asarray(patients), return_inverse=True)
    if len(unique) < 2:
        raise EvaluationError(
            f"found volumes of 1 patient only ({unique[0]}), expected at least 2 to cross-fit thresholds; give tuning "
            "tables of other patients, or a PatientID column or --patients CSV that tells patients apart"
        )
    fold = (np.random.default_rng(seed).permutation(len(unique)) % FOLDS)[index]
    for k in np.unique(fold):
        yield fold != k, fold == k


@dataclass(frozen=True)
class FittedThresholds:
    """Calibration and thresholds of the reported rows, fitted on other patients.

    `calibration` is for new patients. The reported rows have `calibrated` (N, L) probabilities; positive means
    probability >= `thresholds` or, with one for all labels, `global_thresholds`; both broadcast to (N, L).
    `calibrated_thresholds` are `thresholds` on the calibrated scale. `fitted_on` is TUNING or CROSS_FITTED, `n_volumes`
    the number of volumes fitted on. `used_global_threshold` names the labels with one class there; `skipped` counts
    the volumes of the tuning tables that one of them lacks. `source` are the rows fitted on.
    """

    calibration: Calibration
    fitted_on: str
    n_volumes: int
    used_global_threshold: list[str]
    skipped: dict[str, int]
    calibrated: np.ndarray
    thresholds: np.ndarray
    calibrated_thresholds: np.ndarray
    global_thresholds: np.ndarray
    source: Rows | None = None


def few_patients_note(n_patients: int) -> str | None:
    """What to say of calibration and thresholds fitted on so few patients; None where they are enough."""
    if n_patients >= FEW_PATIENTS:
        return None
    return (f"calibration and thresholds are fitted on {n_patients} patients only: with fewer than {FEW_PATIENTS}, "
            "rates can be wrong by 10 points and more")


def fit_thresholds(
    rows: Rows, tuning: tuple[VolumeTable, VolumeTable] | None, settings: Settings, scale: str = UNCALIBRATED
) -> FittedThresholds:
    """Calibration and thresholds from tuning patients, or cross-fitted by patient where there are none. `scale` says
    what the probabilities are (VolumeTable.scale)."""
    source, fitted_on, folds = rows, CROSS_FITTED, cross_folds(rows.patients)
    if tuning is not None:
        selected = tuning[0].select(rows.findings), tuning[1].select(rows.findings)
        source, fitted_on = tuning_rows(selected, settings.unit, settings.allow_partial, rows.ids), TUNING
        if source.n_patients < 2:
            raise EvaluationError(f"{tuning[0].source}: found tuning volumes of 1 patient only ({source.patients[0]}), "
                                  f"expected at least 2, better {FEW_PATIENTS}; add patients, or give no tuning tables "
                                  "to cross-fit")
        check_no_overlap(rows.patients, source.patients, tuning[0].source)
        folds = iter([(np.ones(len(source), bool), np.ones(len(rows), bool))])  # one, of everybody

    def fit(chosen: np.ndarray | slice) -> Calibration:
        return fit_calibration(source.labels[chosen], source.probabilities[chosen], source.patients[chosen],
                               settings.calibration, settings.objective, settings.prevalence, settings.unit,
                               rows.findings, scale)

    calibration, without_own = fit(slice(None)), lacks_a_class(source.labels)
    applied = np.empty((4, *rows.labels.shape))
    for others, own in folds:
        fitted = calibration if tuning is not None else fit(others)
        without_own = without_own | lacks_a_class(source.labels[others])
        applied[0, own] = fitted.apply(rows.probabilities[own])
        applied[1, own], applied[2, own] = fitted.thresholds, fitted.calibrated_thresholds
        applied[3, own] = fitted.global_threshold
    used_global = names_where(rows.findings, without_own)
    calibrated, thresholds, on_calibrated, global_thresholds = applied
    return FittedThresholds(calibration, fitted_on, source.n_volumes, used_global, source.skipped, calibrated,
                            thresholds, on_calibrated, global_thresholds, source)


def read_prevalence(source: str) -> dict[str, float]:
    """{label: rate} from "ct-rate" (its training split, as published) or a JSON file naming labels and rates."""
    if source == "ct-rate":
        return dict(PREVALENCE)
    try:
        rates = read_json(source)
        check_rates(rates)
    except (OSError, ValueError) as error:
        found = f"readable file ({error.strerror})" if isinstance(error, OSError) else f"rates ({error})"
        raise EvaluationError(f"--prevalence {source}: found no {found}, expected ct-rate or a JSON object of label "
                              f'and rate from {RAREST:f} to {1 - RAREST:f}, such as {{"Lung nodule": 0.45}}; correct '
                              "it") from error
    return {name: float(rate) for name, rate in rates.items()}


def check_rates(rates: Any) -> None:
    """Raises ValueError where something read from a file is not {label: rate}, with all rates possible ones."""
    if not isinstance(rates, dict) or not rates:
        raise ValueError("it names no label")
    wrong = [f"{name}: {rate!r}" for name, rate in rates.items()
             if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not RAREST <= rate <= 1 - RAREST]
    wrong += [f"{name!r}, which may be {near!r}" for name in rates if (near := mistyped(name))]
    if wrong:
        raise ValueError(wrong[0])
