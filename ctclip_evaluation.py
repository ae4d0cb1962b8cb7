"""Predictions and labels -> metrics, thresholds, figures and a report; also a script.

    python ctclip_evaluation.py                                        the newest run under results/
    python ctclip_evaluation.py --checkpoint results/RUN
    python ctclip_evaluation.py --predictions P.csv --labels L.csv [--baseline B.csv]

What is decided here, once, for every number this project prints:
- A label is called positive where `probability >= threshold`. The challenge cuts at 0.5; so does "at_0.5".
- Precision, recall and F1 are computed per label with 0/0 = 0 and averaged plainly over the 18, as the challenge does.
- AUROC macro is the mean over labels with both classes present; the others are named, never counted as 0 or 0.5.
- Thresholds never see the patients they are reported on: they come from tuning patients, or, without any,
  each fifth of the patients is cut by thresholds fitted on the other four ("cross-fitted by patient").
- `format_report` needs nothing but the dictionary written to metrics.json, so what is printed is what is stored.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip_model import ABNORMALITIES, CheckpointError, OneLineParser, replacing

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.figure import Figure

    from ctclip_data import Batch, Volume
    from ctclip_model import CTCLIPMultiAbnormalityModel

N_LABELS = len(ABNORMALITIES)
FOLDS = 5
TABLE_CUTS = np.arange(1, 20) / 20  # 0.05 to 0.95
RATE_TOLERANCE = 0.05  # positive rate against label rate, in fractions of all decisions
PHANTOM_AUROC = 0.85  # what the built-in cohort must reach
PUBLISHED_AUROC = {"CT-CLIP zero-shot": 0.731, "CT-CLIP ClassFine": 0.756}  # macro, CT-RATE valid, as published
TRAINING_CURVES = "training_curves.png"  # in a run folder; training and evaluation both write it
PHANTOM_NOTE = "These are phantoms: the figures speak of the pipeline, not of patients."


class EvaluationError(ValueError):
    """Bad input; the message is one line: what was found, what was expected, what to do."""


# ---------------------------------------------------------------------------------------------------------- metrics


def undefined_labels(labels: np.ndarray) -> list[str]:
    """Names of the labels of (N, 18) that hold one class only: no AUROC, and no threshold of their own."""
    positives = np.asarray(labels).sum(axis=0)
    return [name for name, count in zip(ABNORMALITIES, positives, strict=True) if count in (0, len(labels))]


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray, thresholds: float | np.ndarray = 0.5) -> dict:
    """The dictionary M of metrics.json for (N, 18) labels in {0, 1} and probabilities in [0, 1].

    `thresholds` is one cut, (18,) cuts, or (N, 18) cuts per decision; positive means probability >= threshold.
    Every value is a plain float, or None where it is undefined. AUROC does not depend on `thresholds`.
    """
    labels, probabilities = _checked(labels, probabilities)
    return _ranking_metrics(labels, probabilities) | _decision_metrics(labels, probabilities >= thresholds)


def per_label_metrics(labels: np.ndarray, probabilities: np.ndarray, thresholds: float | np.ndarray = 0.5) -> dict:
    """{label: auroc (None where undefined), precision, recall, f1, accuracy, positive_rate, label_rate, threshold,
    positives}; `thresholds` as in compute_metrics, and with (N, 18) of them `threshold` is the column's median."""
    labels, probabilities = _checked(labels, probabilities)
    columns = {
        "auroc": _auroc_per_label(labels, probabilities),
        **_decision_columns(labels, probabilities >= thresholds),
        "label_rate": labels.mean(axis=0),
        "threshold": np.median(np.broadcast_to(thresholds, labels.shape), axis=0),
    }
    positives = labels.sum(axis=0, dtype=np.int64)
    return {
        name: {key: _plain(column[j]) for key, column in columns.items()} | {"positives": int(positives[j])}
        for j, name in enumerate(ABNORMALITIES)
    }


def crg_score(labels: np.ndarray, decisions: np.ndarray) -> float | None:
    """The challenge's CRG, pooled over all labels and scans: 1 if perfect, 1/3 for all-zero, all-one and random
    decisions; None where the truth holds one class only."""
    labels, decisions = np.asarray(labels, bool), np.asarray(decisions, bool)
    x, a = labels.size, int(labels.sum())
    if a in (0, x):
        return None
    r, u = (x - a) / (2 * a), (x - a) / 2
    tp, fn, fp = (labels & decisions).sum(), (labels & ~decisions).sum(), (~labels & decisions).sum()
    score = r * tp - r * fn - fp
    return float(u / (2 * u - score))


def threshold_table(labels: np.ndarray, probabilities: np.ndarray, cuts: Sequence[float] = TABLE_CUTS) -> list[dict]:
    """One row per cut: threshold, hamming_accuracy, f1_macro, precision_macro, recall_macro, positive_rate."""
    labels, probabilities = _checked(labels, probabilities)
    keys = ("hamming_accuracy", "f1_macro", "precision_macro", "recall_macro", "positive_rate")
    rows = []
    for cut in cuts:
        metrics = _decision_metrics(labels, probabilities >= cut)
        rows.append({"threshold": float(cut)} | {key: metrics[key] for key in keys})
    return rows


def _decision_columns(labels: np.ndarray, decisions: np.ndarray) -> dict[str, np.ndarray]:
    """Every per-label metric of the decisions, (18,) each."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(labels, decisions, average=None, zero_division=0)
    accuracy, positive_rate = (labels == decisions).mean(axis=0), decisions.mean(axis=0)
    return {"precision": precision, "recall": recall, "f1": f1, "accuracy": accuracy, "positive_rate": positive_rate}


def _decision_metrics(labels: np.ndarray, decisions: np.ndarray) -> dict:
    """The part of M that depends on the decisions."""
    columns = _decision_columns(labels, decisions)
    right = labels == decisions
    return {
        "f1_macro": float(columns["f1"].mean()),
        "precision_macro": float(columns["precision"].mean()),
        "recall_macro": float(columns["recall"].mean()),
        "hamming_accuracy": float(right.mean()),
        "exact_match": float(right.all(axis=1).mean()),
        "positive_rate": float(decisions.mean()),
        "label_rate": float(labels.mean()),
        "crg": crg_score(labels, decisions),
    }


def _ranking_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict:
    """The part of M that no threshold can change."""
    from sklearn.metrics import roc_auc_score

    per_label = _auroc_per_label(labels, probabilities)
    defined = per_label[~np.isnan(per_label)]
    both_classes = 0 < labels.sum() < labels.size
    return {
        "auroc_macro": float(defined.mean()) if defined.size else None,
        "auroc_micro": float(roc_auc_score(labels.ravel(), probabilities.ravel())) if both_classes else None,
    }


def _auroc_per_label(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(18,) AUROC, NaN where one class is absent."""
    from sklearn.metrics import roc_auc_score

    undefined = undefined_labels(labels)
    return np.array([
        np.nan if name in undefined else roc_auc_score(labels[:, j], probabilities[:, j])
        for j, name in enumerate(ABNORMALITIES)
    ])


def auroc_difference(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, groups: Sequence
) -> tuple[float, float] | None:
    """(macro AUROC of `first` minus that of `second`, its standard error), for two predictions of the same volumes.

    labels, first, second (N, 18), probabilities in [0, 1]; groups (N,) is each volume's patient. Labels with one class
    are left out. Paired: what both predictions get right or wrong cancels. Clustered: a patient's volumes are not
    independent. None where no label has both classes, or one patient leaves nothing to judge the spread by. Nothing is
    resampled: the same input gives the same numbers, in O(18 N log N).

    DeLong, DeLong & Clarke-Pearson, Biometrics 1988, for the influence of a volume on an AUROC; Obuchowski, Biometrics
    1997, for summing it within a patient. Here it is averaged over the labels first, so that their covariance counts.
    """
    labels, first = _checked(labels, first)
    labels, second = _checked(labels, second)
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


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


# ------------------------------------------------------------------------------------------------------- thresholds

# Each objective scores every cut at once: tp and fp are (L, C) counts for L labels and C cuts, positives is (L, 1)
# and n the number of volumes. It returns (C,) scores to maximise, so that one label (L = 1) and one global cut for
# all labels (L = 18) are the same search.
#
# Why "prevalence" is the default. Simulated classifiers, 18 labels at CT-RATE's rates, 100 tuning patients of two
# volumes each, scored on 1500 unseen patients; positive rate minus label rate in points (mean over 20 draws, worst
# draw in brackets) and macro F1 there:
#     AUROC      prevalence             f1                   youden               hamming
#     0.60    -0.2  (2.1)  0.256   +32.1 (46.5)  0.306   +25.6 (32.6)  0.294   -14.6 (17.2)  0.077
#     0.75    -0.3  (2.0)  0.397   +11.5 (19.7)  0.402   +18.1 (26.1)  0.401    -9.5 (13.2)  0.253
#     0.85    -0.2  (2.0)  0.525    +4.1  (8.3)  0.513   +14.5 (21.7)  0.500    -6.0  (8.4)  0.433
#     0.92    -0.1  (1.7)  0.650    +1.3  (4.6)  0.633    +9.6 (13.3)  0.607    -3.6  (6.2)  0.604
# Tuning F1 itself makes a weak model over-predict again and from 0.85 on loses even F1 to its own overfitting;
# matching the label rate is honest at every strength and costs F1 only where the model is hardly better than chance.


def _score_f1(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int) -> np.ndarray:
    return (2 * tp / np.maximum(tp + fp + positives, 1)).mean(axis=0)


def _score_prevalence(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int) -> np.ndarray:
    return -np.abs((tp + fp - positives).sum(axis=0)) / (n * len(tp))


def _score_hamming(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int) -> np.ndarray:
    return 1 - (positives - tp + fp).mean(axis=0) / n


def _score_youden(tp: np.ndarray, fp: np.ndarray, positives: np.ndarray, n: int) -> np.ndarray:
    both = (positives > 0) & (positives < n)  # sensitivity and specificity need both classes
    youden = tp / np.maximum(positives, 1) - fp / np.maximum(n - positives, 1)
    return np.where(both, youden, 0).sum(axis=0) / max(both.sum(), 1)


OBJECTIVES: dict[str, Callable[..., np.ndarray]] = {
    "prevalence": _score_prevalence,  # predicted rate = label rate
    "f1": _score_f1,
    "hamming": _score_hamming,
    "youden": _score_youden,
}
DEFAULT_OBJECTIVE = "prevalence"


def tune_global_threshold(
    labels: np.ndarray, probabilities: np.ndarray, objective: str = DEFAULT_OBJECTIVE
) -> float:
    """The one cut for all labels that maximises `objective` (macro F1, pooled rate, pooled accuracy, mean Youden)."""
    labels, probabilities = _checked(labels, probabilities)
    return _best_cut(labels, probabilities, objective)


def tune_label_thresholds(
    labels: np.ndarray, probabilities: np.ndarray, objective: str = DEFAULT_OBJECTIVE
) -> np.ndarray:
    """(18,) cuts, each maximising `objective` on its own label.

    A label without both classes here (named by undefined_labels) has nothing to tune on and takes the global cut.
    """
    labels, probabilities = _checked(labels, probabilities)
    undefined = undefined_labels(labels)
    fallback = _best_cut(labels, probabilities, objective) if undefined else None
    return np.array([
        fallback if name in undefined else _best_cut(labels[:, [j]], probabilities[:, [j]], objective)
        for j, name in enumerate(ABNORMALITIES)
    ])


def cross_fit_thresholds(
    labels: np.ndarray,
    probabilities: np.ndarray,
    patients: Sequence[str],
    folds: int = FOLDS,
    seed: int = 0,
    objective: str = DEFAULT_OBJECTIVE,
    tune: Callable[..., np.ndarray | float] = tune_label_thresholds,
) -> np.ndarray:
    """(N, 18) cuts, one per decision: each row's come from `tune` on the folds that do not hold its patient.

    Folds are drawn from the sorted patients, so they depend on `seed` and on who is there, not on the order of rows.
    """
    labels, probabilities = _checked(labels, probabilities)
    unique, patient_index = np.unique(np.asarray(patients), return_inverse=True)
    if len(unique) < 2:
        raise EvaluationError(
            f"found volumes of 1 patient only ({unique[0]}), expected at least 2 to cross-fit thresholds; give tuning "
            "tables of other patients, or name volumes as CT-RATE does (train_12_a_1.nii.gz is patient train_12)"
        )
    folds = min(folds, len(unique))
    fold_of_patient = np.random.default_rng(seed).permutation(len(unique)) % folds
    fold = fold_of_patient[patient_index]
    thresholds = np.empty(labels.shape)
    for k in range(folds):
        others = fold != k
        thresholds[~others] = tune(labels[others], probabilities[others], objective=objective)
    return thresholds


def candidate_cuts(probabilities: np.ndarray) -> np.ndarray:
    """Ascending cuts, one for each way `probability >= cut` can divide these values: below all of them, midway
    between neighbours (tied volumes are never split), above all of them (that last one may exceed 1)."""
    values = np.unique(probabilities)
    lower, upper = np.concatenate([[0.0], values]), np.concatenate([values, [1.0]])
    middle = (lower + upper) / 2
    # Neighbours so close that their midpoint rounds onto the lower one: the upper value itself divides them.
    middle[1:] = np.where(middle[1:] > values, middle[1:], np.nextafter(values, 2))
    return middle


def _best_cut(labels: np.ndarray, probabilities: np.ndarray, objective: str) -> float:
    """Exhaustive search over candidate_cuts for (N, L) arrays. Of equally good cuts, the one whose predicted rate is
    nearest to the label rate, then the highest."""
    if objective not in OBJECTIVES:
        raise EvaluationError(f"found objective {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    cuts = candidate_cuts(probabilities)
    columns = list(zip(labels.T, probabilities.T, strict=True))
    sorted_positive = [np.sort(p[y == 1]) for y, p in columns]
    sorted_negative = [np.sort(p[y == 0]) for y, p in columns]
    positives = labels.sum(axis=0, dtype=np.int64)[:, None]
    scores, gaps = [], []
    for part in np.array_split(cuts, len(cuts) // 2**15 + 1):  # bounds the memory of a global search on a large cohort
        tp = np.stack([len(p) - np.searchsorted(p, part) for p in sorted_positive])
        fp = np.stack([len(p) - np.searchsorted(p, part) for p in sorted_negative])
        scores.append(OBJECTIVES[objective](tp, fp, positives, len(labels)))
        gaps.append(np.abs((tp + fp - positives).sum(axis=0)))
    score, gap = np.concatenate(scores), np.concatenate(gaps)
    best = np.flatnonzero(score >= score.max() - 1e-12)
    best = best[gap[best] == gap[best].min()]
    return float(cuts[best[-1]])


# ---------------------------------------------------------------------------------------------------- reading tables


def load_predictions(path: str | Path) -> pd.DataFrame:
    """Probabilities indexed by VolumeName, the 18 columns in ABNORMALITIES' order (matched by name, others ignored).

    Any fault of the file raises EvaluationError naming file, line and remedy. `attrs["source"]` keeps the path.
    """
    frame, lines = _read_table(path)
    values = frame.to_numpy()
    bad = ~((values >= 0) & (values <= 1))  # NaN fails both comparisons
    _refuse_values(path, frame, lines, bad, "a probability in [0, 1]", "write sigmoid outputs, not logits")
    return frame


def load_labels(path: str | Path) -> pd.DataFrame:
    """Labels 0/1 (int8) from a CSV with CT-RATE's header; otherwise like load_predictions."""
    frame, lines = _read_table(path)
    bad = ~np.isin(frame.to_numpy(), (0, 1))
    _refuse_values(path, frame, lines, bad, "0 or 1", "correct the label or remove the row")
    labels = frame.astype(np.int8)
    labels.attrs["source"] = str(path)
    return labels


def _read_table(path: str | Path) -> tuple[pd.DataFrame, list[int]]:
    """The 18 columns as floats (text that is no number becomes NaN) and the line of the file each row stands on."""
    import pandas as pd

    header, rows = _read_rows(path)
    columns = _find_columns(path, header)
    names: dict[str, int] = {}
    for line, row in rows:
        if len(row) != len(header):
            raise EvaluationError(
                f"{path}, line {line}: found {len(row)} values, expected {len(header)} as in the header; repair it"
            )
        name = row[columns[0]].strip()
        if not name:
            raise EvaluationError(f"{path}, line {line}: found no VolumeName, expected one; name the volume")
        if name in names:
            raise EvaluationError(
                f"{path}, line {line}: found {name} again, expected one row per volume (first on line {names[name]}); "
                "remove one of the two"
            )
        names[name] = line
    values = np.array([[_number(row[j]) for j in columns[1:]] for _, row in rows])
    frame = pd.DataFrame(values, index=pd.Index(names, name="VolumeName"), columns=list(ABNORMALITIES))
    frame.attrs["source"] = str(path)
    return frame, list(names.values())


def _read_rows(path: str | Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and (line number, fields) of every row that is not blank."""
    remedy = "give one with VolumeName and the 18 abnormalities, separated by commas"
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:  # -sig: spreadsheets put a byte order mark first
            reader = csv.reader(handle, strict=True)
            rows = [(reader.line_num, row) for row in reader if any(field.strip() for field in row)]
    except OSError as error:
        raise EvaluationError(f"{path}: found no readable file ({error.strerror}), expected a CSV; {remedy}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        found = f"something that is not text in columns ({error})"
        raise EvaluationError(f"{path}: found {found}, expected a CSV; {remedy}") from error
    if len(rows) < 2:
        found = "no rows below the header" if rows else "an empty file"
        raise EvaluationError(f"{path}: found {found}, expected at least one volume; {remedy}")
    return [field.strip() for field in rows[0][1]], rows[1:]


def _find_columns(path: str | Path, header: list[str]) -> list[int]:
    """Positions of VolumeName and the 18 labels in the header, wherever they stand."""
    wanted = ("VolumeName", *ABNORMALITIES)
    missing = [name for name in wanted if name not in header]
    if missing:
        raise EvaluationError(
            f"{path}: found no column {_some(missing)}, expected VolumeName and the 18 abnormalities; "
            "check the spelling and that commas separate the columns"
        )
    twice = [name for name in wanted if header.count(name) > 1]
    if twice:
        raise EvaluationError(f"{path}: found column {_some(twice)} twice, expected it once; remove one of the two")
    return [header.index(name) for name in wanted]


def _refuse_values(
    path: str | Path, frame: pd.DataFrame, lines: list[int], bad: np.ndarray, expected: str, remedy: str
) -> None:
    if not bad.any():
        return
    row, column = np.argwhere(bad)[0]
    value = frame.iat[row, column]
    found = "no number" if np.isnan(value) else f"{value:g}"
    more = f" ({bad.sum()} such values)" if bad.sum() > 1 else ""
    raise EvaluationError(
        f"{path}, line {lines[row]}: found {found} for {frame.columns[column]} of {frame.index[row]}{more}, "
        f"expected {expected}; {remedy}"
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


# ------------------------------------------------------------------------------------------------------- evaluation


def patients_of(names: Sequence[str]) -> np.ndarray:
    """Patient of each volume, read from its name: train_12_a_1.nii.gz and train_12_b_2.nii.gz are both train_12."""
    from ctclip_data import patient_of

    return np.array([patient_of(name) for name in names])


def evaluate(
    predictions: pd.DataFrame,
    labels: pd.DataFrame,
    tuning: tuple[pd.DataFrame, pd.DataFrame] | None = None,
    baseline: pd.DataFrame | None = None,
    output_dir: str | Path | None = None,
    history: list[dict] | None = None,
    phantom: bool = False,
    objective: str = DEFAULT_OBJECTIVE,
) -> dict:
    """Everything format_report prints and metrics.json holds; with `output_dir` also writes the files and figures.

    Frames are those of load_predictions and load_labels. `tuning` is (predictions, labels) of patients who do not
    occur in `predictions`; without it `tuned` is cross-fitted by patient. `baseline` holds other predictions for the
    same volumes. `history` is log.jsonl's list of epochs.
    """
    y, p = _join(predictions, labels)
    patients = patients_of(predictions.index)
    cuts = _fit_thresholds(y, p, patients, tuning, objective)
    ranking = _ranking_metrics(y, p)
    metrics = {
        "at_0.5": ranking | _decision_metrics(y, p >= 0.5),
        "tuned": ranking | _decision_metrics(y, p >= cuts["rows"]),
        "tuned_global": ranking | _decision_metrics(y, p >= cuts["rows_global"]),
        "per_label": _per_label_both(y, p, cuts["rows"]),
        "thresholds": cuts["summary"],
        "undefined_auroc": undefined_labels(y),
        "n_volumes": len(y),
        "n_patients": len(np.unique(patients)),
        "labels_without_prediction": len(labels) - len(predictions),
        "probabilities": {"min": float(p.min()), "max": float(p.max()), "mean": float(p.mean())},
        "threshold_table": threshold_table(y, p),
        "baseline": None if baseline is None else _evaluate_baseline(predictions, labels, baseline, objective),
        "phantom": phantom,
    }
    metrics["success_criteria"] = success_criteria(metrics)
    if output_dir is not None:
        write_results(output_dir, metrics, predictions, y, history)
    return metrics


def success_criteria(metrics: dict) -> list[dict]:
    """[{criterion, figure, passed}] from an evaluation's metrics."""
    half, tuned = metrics["at_0.5"], metrics["tuned"]
    all_negative = 1 - half["label_rate"]
    rows = []

    def add(criterion: str, figure: str, passed: bool) -> None:
        rows.append({"criterion": criterion, "figure": figure, "passed": bool(passed)})

    for name, m in (("tuned", tuned), ("at 0.5", half)):
        gap = m["positive_rate"] - m["label_rate"]
        figure = f"{_percent(m['positive_rate'])} against {_percent(m['label_rate'])}"
        within = abs(gap) <= RATE_TOLERANCE + 1e-12
        add(f"Positive rate within {100 * RATE_TOLERANCE:.0f} points of the label rate, {name}", figure, within)
    published = {f" ({name} on CT-RATE, as published)": goal for name, goal in PUBLISHED_AUROC.items()}
    auroc = half["auroc_macro"]
    for whose, goal in ({"": PHANTOM_AUROC} if metrics["phantom"] else published).items():
        add(f"Macro AUROC >= {goal:g}{whose}", _decimal(auroc), auroc is not None and auroc >= goal)
    hamming = tuned["hamming_accuracy"]
    figure = f"{hamming:.4f} against {all_negative:.4f}"
    add("Hamming accuracy above the all-negative predictor's, tuned", figure, hamming > all_negative)
    for name, m in (("tuned", tuned), ("at 0.5", half)):
        rate = m["positive_rate"]
        add(f"Not degenerate (positive rate 1 % to 90 %), {name}", _percent(rate), 0.01 <= rate <= 0.9)
    return rows


def _join(predictions: pd.DataFrame, labels: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """(N, 18) labels and probabilities in the order of `predictions`; every prediction needs its label row."""
    missing = predictions.index.difference(labels.index)
    if len(missing):
        raise EvaluationError(
            f"{_source(labels)}: found no row for {len(missing)} of the {len(predictions)} volumes in "
            f"{_source(predictions)}, first {missing[0]}, expected one each; give the labels of this cohort "
            "or remove those predictions"
        )
    columns = list(ABNORMALITIES)
    return _checked(labels.loc[predictions.index, columns].to_numpy(), predictions[columns].to_numpy())


def _fit_thresholds(
    y: np.ndarray, p: np.ndarray, patients: np.ndarray, tuning: tuple | None, objective: str
) -> dict:
    """{"rows", "rows_global": cuts to judge the reported rows by; "summary": metrics.json's `thresholds`}."""
    if tuning is None:
        fit_y, fit_p, fit_patients = y, p, patients
        rows = cross_fit_thresholds(y, p, patients, objective=objective)
        rows_global = cross_fit_thresholds(y, p, patients, objective=objective, tune=tune_global_threshold)
        fitted_on = "cross-fitted by patient"
    else:
        fit_y, fit_p = _join(*tuning)
        fit_patients = patients_of(tuning[0].index)
        _refuse_overlap(patients, fit_patients, _source(tuning[0]))
        fitted_on = "tuning patients"
    # Without tuning patients these are for new patients; the reported rows were judged by the cross-fitted ones.
    global_cut = tune_global_threshold(fit_y, fit_p, objective)
    label_cuts = tune_label_thresholds(fit_y, fit_p, objective)
    if tuning is not None:
        rows, rows_global = label_cuts, global_cut
    summary = {
        "global": global_cut,
        "per_label": dict(zip(ABNORMALITIES, label_cuts.tolist(), strict=True)),
        "objective": objective,
        "fitted_on": fitted_on,
        "n_volumes": len(fit_y),
        "n_patients": len(np.unique(fit_patients)),
        "took_global": undefined_labels(fit_y),
    }
    return {"rows": rows, "rows_global": rows_global, "summary": summary}


def _refuse_overlap(reported: np.ndarray, tuning: np.ndarray, source: str) -> None:
    shared = sorted(set(reported.tolist()) & set(tuning.tolist()))
    if shared:
        raise EvaluationError(
            f"{source}: found {len(shared)} tuning patients among the reported ones ({_some(shared)}), expected none; "
            "remove them from either table, or give no tuning tables to cross-fit"
        )


def _per_label_both(y: np.ndarray, p: np.ndarray, cuts: np.ndarray) -> dict:
    """Per-label metrics at the tuned cuts, with those that depend on the cut repeated at 0.5 under "at_0.5"."""
    half = _decision_columns(y, p >= 0.5)
    rows = per_label_metrics(y, p, cuts)
    for j, row in enumerate(rows.values()):
        row["at_0.5"] = {key: float(column[j]) for key, column in half.items()}
    return rows


def _evaluate_baseline(
    predictions: pd.DataFrame, labels: pd.DataFrame, baseline: pd.DataFrame, objective: str
) -> dict:
    """The baseline on the same volumes, at its own 0.5 and its own cross-fitted thresholds (it has no tuning set)."""
    missing = predictions.index.difference(baseline.index)
    if len(missing):
        raise EvaluationError(
            f"{_source(baseline)}: found no row for {len(missing)} of the {len(predictions)} volumes in "
            f"{_source(predictions)}, first {missing[0]}, expected the same volumes; predict them with the baseline too"
        )
    y, p = _join(baseline.loc[predictions.index], labels)
    cuts = cross_fit_thresholds(y, p, patients_of(predictions.index), objective=objective)
    ranking = _ranking_metrics(y, p)
    auroc = map(_plain, _auroc_per_label(y, p))
    return {
        "source": _source(baseline),
        "at_0.5": ranking | _decision_metrics(y, p >= 0.5),
        "tuned": ranking | _decision_metrics(y, p >= cuts),
        "fitted_on": "cross-fitted by patient",
        "auroc_per_label": dict(zip(ABNORMALITIES, auroc, strict=True)),
        "rows_not_compared": len(baseline) - len(predictions),
    }


def _source(frame: pd.DataFrame) -> str:
    return frame.attrs.get("source", "a table given in memory")


# ------------------------------------------------------------------------------------------------------------ report

MEASURES = (  # of the dictionary M, in the order they are printed
    ("Positive rate", "positive_rate"),
    ("Label rate", "label_rate"),
    ("Hamming accuracy", "hamming_accuracy"),
    ("Exact match", "exact_match"),
    ("F1 macro", "f1_macro"),
    ("Precision macro", "precision_macro"),
    ("Recall macro", "recall_macro"),
    ("CRG", "crg"),
)


def format_report(metrics: dict) -> str:
    """The printed blocks, at most 100 columns wide, from an evaluation's metrics (or a metrics.json read back)."""
    blocks = [_analysis_block(metrics), _optimal_block(metrics), _table_block(metrics), _comparison_block(metrics)]
    if metrics["baseline"]:
        blocks.append(_baseline_block(metrics))
    blocks.append(_success_block(metrics))
    return "\n\n".join("\n".join(block) for block in blocks)


def _analysis_block(metrics: dict) -> list[str]:
    half, p = metrics["at_0.5"], metrics["probabilities"]
    unused = metrics["labels_without_prediction"]
    rows = [
        [name, f"{row['positives']:,}", _percent(row["label_rate"]), _percent(row["at_0.5"]["positive_rate"])]
        for name, row in metrics["per_label"].items()
    ]
    rows.append(["All labels", f"{sum(row['positives'] for row in metrics['per_label'].values()):,}",
                 _percent(half["label_rate"]), _percent(half["positive_rate"])])
    lines = [
        "PREDICTION ANALYSIS",
        f"Samples            {metrics['n_volumes']:,} volumes of {metrics['n_patients']:,} patients"
        + (f" ({unused:,} label rows have no prediction)" if unused else ""),
        f"Probabilities      {p['min']:.4f} to {p['max']:.4f}, mean {p['mean']:.4f}",
        f"At or above 0.5    {_percent(half['positive_rate'])} of {metrics['n_volumes'] * N_LABELS:,} decisions "
        f"(truly positive: {_percent(half['label_rate'])})",
        "",
        *_table(["Label distribution", "positive", "label rate", "predicted rate at 0.5"], rows),
    ]
    return lines + ([PHANTOM_NOTE] if metrics["phantom"] else [])


def _optimal_block(metrics: dict) -> list[str]:
    cuts, one = metrics["thresholds"], metrics["tuned_global"]
    crossfit = cuts["fitted_on"] != "tuning patients"
    rows = [
        [name, f"{cuts['per_label'][name]:.4f}", _percent(row["positive_rate"]), _percent(row["label_rate"]),
         f"{row['precision']:.3f}", f"{row['recall']:.3f}", f"{row['f1']:.3f}", _decimal(row["auroc"], 3)]
        for name, row in metrics["per_label"].items()
    ]
    lines = [
        "OPTIMAL THRESHOLD",
        f"Objective {cuts['objective']}; fitted on {cuts['n_volumes']:,} volumes of {cuts['n_patients']:,} patients"
        + (", none of them reported here." if not crossfit else "."),
    ]
    if crossfit:
        lines += [
            "The cuts below are for new patients. The results are cross-fitted by patient: every patient was",
            "judged by cuts fitted on other patients only.",
        ]
    lines += [
        f"Global: {cuts['global']:.4f} -> positive rate {_percent(one['positive_rate'])} "
        f"(label rate {_percent(one['label_rate'])}), F1 {one['f1_macro']:.4f}, Hamming {one['hamming_accuracy']:.4f}",
        "",
        *_table(["Per label", "cut", "pos. rate", "label rate", "prec.", "recall", "F1", "AUROC"], rows),
    ]
    if cuts["took_global"]:
        lines += _wrapped(f"One class only where cuts are fitted, so the global cut: {', '.join(cuts['took_global'])}.")
    return lines


def _table_block(metrics: dict) -> list[str]:
    keys = ("hamming_accuracy", "f1_macro", "precision_macro", "recall_macro")
    rows = [
        [f"{row['threshold']:.2f}", *(f"{row[key]:.4f}" for key in keys), _percent(row["positive_rate"])]
        for row in metrics["threshold_table"]
    ]
    return [
        "THRESHOLD TABLE",
        f"One cut for all labels; label rate {_percent(metrics['at_0.5']['label_rate'])}. "
        "AUROC is not listed: it does not depend on a threshold.",
        *_table(["Threshold", "Hamming", "F1", "Precision", "Recall", "Positive rate"], rows),
    ]


def _comparison_block(metrics: dict) -> list[str]:
    half, one, tuned = metrics["at_0.5"], metrics["tuned_global"], metrics["tuned"]
    rows = [
        [title, _figure(half, key), _figure(one, key), _figure(tuned, key), _difference(half, tuned, key)]
        for title, key in MEASURES
    ]
    lines = [
        "PERFORMANCE COMPARISON",
        f"Thresholds from {_fitted_on(metrics['thresholds']['fitted_on'])}; tuned = one cut per label.",
        *_table(["", "at 0.5", "global cut", "tuned", "tuned - 0.5"], rows),
        f"AUROC (needs no threshold): macro {_decimal(half['auroc_macro'])}, micro {_decimal(half['auroc_micro'])}",
    ]
    if metrics["undefined_auroc"]:
        lines += _wrapped(f"No AUROC, only one class here: {', '.join(metrics['undefined_auroc'])}. A label without "
                          "positives counts 0 in F1, precision and recall, as in the challenge.")
    return lines


def _baseline_block(metrics: dict) -> list[str]:
    base = metrics["baseline"]
    columns = [base["at_0.5"], metrics["at_0.5"], base["tuned"], metrics["tuned"]]
    rows = [
        [title, *(_figure(m, key) for m in columns), _difference(base["tuned"], metrics["tuned"], key)]
        for title, key in MEASURES
    ]
    lines = [
        "COMPARISON WITH THE BASELINE",
        *_wrapped(f"Baseline: {base['source']}; its tuned cuts are {base['fitted_on']}."),
        *_table(["", "base at 0.5", "this at 0.5", "base tuned", "this tuned", "tuned diff."], rows),
    ]
    for title, key in (("AUROC macro", "auroc_macro"), ("AUROC micro", "auroc_micro")):
        this, other = metrics["at_0.5"], base["at_0.5"]
        lines.append(f"{title}: baseline {_figure(other, key)}, this {_figure(this, key)}, "
                     f"difference {_difference(other, this, key)}")
    return lines


def _success_block(metrics: dict) -> list[str]:
    rows = metrics["success_criteria"]
    width = max(len(row["criterion"]) for row in rows)
    lines = ["SUCCESS CRITERIA"]
    for row in rows:
        lines.append(f"{'pass' if row['passed'] else 'SHORT':<5}  {row['criterion']:<{width}}  {row['figure']}")
    return lines + ([PHANTOM_NOTE] if metrics["phantom"] else [])


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Aligned columns, the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 100)


def _fitted_on(fitted_on: str) -> str:
    return "tuning patients, results on others" if fitted_on == "tuning patients" else "cross-fitting by patient"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _decimal(value: float | None, digits: int = 4) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _figure(m: dict, key: str) -> str:
    return _percent(m[key]) if key.endswith("_rate") else _decimal(m[key])


def _difference(before: dict, after: dict, key: str) -> str:
    if before[key] is None or after[key] is None:
        return "undefined"
    change = after[key] - before[key]
    return f"{100 * change:+.1f} pts" if key.endswith("_rate") else f"{change:+.4f}"


# ------------------------------------------------------------------------------------------------------------- files


def write_results(
    output_dir: str | Path,
    metrics: dict,
    predictions: pd.DataFrame,
    labels: np.ndarray,
    history: list[dict] | None = None,
) -> list[Path]:
    """metrics.json, predictions.csv, per_label.csv and the figures; each file is replaced whole or not at all."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return list(_write_all(folder, metrics, predictions, labels, history))
    except OSError as error:
        raise EvaluationError(
            f"{folder}: found a place that cannot be written ({error.strerror}), expected a folder; change --output-dir"
        ) from error


def _write_all(
    folder: Path, metrics: dict, predictions: pd.DataFrame, labels: np.ndarray, history: list[dict] | None
) -> Iterator[Path]:
    with replacing(folder / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    yield folder / "metrics.json"
    own = folder / "predictions.csv"
    if own.resolve() != Path(_source(predictions)).resolve():  # a run's own file stays as training wrote it
        with replacing(own) as path:
            predictions[list(ABNORMALITIES)].to_csv(path)
    yield own
    with replacing(folder / "per_label.csv") as path:
        _per_label_frame(metrics["per_label"]).to_csv(path)
    yield folder / "per_label.csv"
    probabilities = predictions[list(ABNORMALITIES)].to_numpy()
    figures = {
        "roc.png": roc_figure(labels, probabilities),
        "threshold_sweep.png": sweep_figure(labels, probabilities, metrics),
        "positive_rate.png": rate_figure(metrics),
    }
    if history:
        figures[TRAINING_CURVES] = training_figure(history)
    for name, figure in figures.items():
        _write_figure(figure, folder / name, metrics["phantom"])
        yield folder / name


def write_training_figure(history: list[dict], path: str | Path, phantom: bool) -> None:
    """Saves training_figure(history) as a PNG, whole or not at all; for a run that is still going on."""
    _write_figure(training_figure(history), Path(path), phantom)


def _write_figure(figure: Figure, path: Path, phantom: bool) -> None:
    if phantom:  # on the picture itself: pictures travel without their report
        figure.text(0.004, -0.005, PHANTOM_NOTE, va="top", color=GREY, fontsize=7)  # below; "tight" makes room for it
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight" if phantom else None)


def _per_label_frame(per_label: dict) -> pd.DataFrame:
    import pandas as pd

    rows = {
        name: {key: value for key, value in row.items() if key != "at_0.5"}
        | {f"{key}_at_0.5": value for key, value in row["at_0.5"].items()}
        for name, row in per_label.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index.name = "label"
    return frame


# ----------------------------------------------------------------------------------------------------------- figures

INK, GREY, LIGHT = "#222222", "#767676", "#dddddd"
BLUE, ORANGE, GREEN, PURPLE, OLIVE = "#0072b2", "#d55e00", "#009e73", "#9a5b9e", "#a08a00"


def roc_figure(labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """18 small ROC curves, AUROC in each title; a label with one class says so instead."""
    from sklearn.metrics import roc_auc_score, roc_curve

    undefined = undefined_labels(labels)
    figure = _new_figure(13, 7.4, layout=None)  # solving the layout of 18 panels takes a second; this one is fixed
    axes = figure.subplots(3, 6, sharex=True, sharey=True)
    figure.subplots_adjust(left=0.055, right=0.99, bottom=0.075, top=0.92, wspace=0.2, hspace=0.42)
    for j, (ax, name) in enumerate(zip(axes.flat, ABNORMALITIES, strict=True)):
        y, p = labels[:, j], probabilities[:, j]
        if name in undefined:
            ax.text(0.5, 0.5, "one class only:\nno curve", ha="center", va="center", color=GREY, fontsize=9)
            auroc = "No AUROC"
        else:
            ax.plot([0, 1], [0, 1], color=LIGHT, linewidth=1)
            fpr, tpr, _ = roc_curve(y, p)
            ax.fill_between(fpr, tpr, color=BLUE, alpha=0.1, linewidth=0)
            ax.plot(fpr, tpr, color=BLUE, linewidth=1.6)
            auroc = f"AUROC {roc_auc_score(y, p):.3f}"
        ax.set_title(f"{_two_lines(name)}\n{auroc}, {int(y.sum())}/{len(y)} positive", fontsize=8.5)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
        _tidy(ax)
    figure.supxlabel("False positive rate", fontsize=10, y=0.012)
    figure.supylabel("True positive rate", fontsize=10, x=0.008)
    return figure


def sweep_figure(labels: np.ndarray, probabilities: np.ndarray, metrics: dict) -> Figure:
    """What one cut for all labels does to each metric, with 0.5, the global cut and the label rate marked."""
    rows = threshold_table(labels, probabilities, np.arange(1, 100) / 100)
    cuts = [row["threshold"] for row in rows]
    figure = _new_figure(8.5, 5)
    ax = figure.subplots()
    curves = (("Hamming accuracy", "hamming_accuracy", GREEN), ("F1 macro", "f1_macro", BLUE),
              ("Precision macro", "precision_macro", OLIVE), ("Recall macro", "recall_macro", PURPLE),
              ("Positive rate", "positive_rate", ORANGE))
    for title, key, color in curves:
        width = 2.4 if key == "positive_rate" else 1.6
        ax.plot(cuts, [row[key] for row in rows], color=color, linewidth=width, label=title)
    rate, chosen = metrics["at_0.5"]["label_rate"], metrics["thresholds"]["global"]
    ax.axhline(rate, color=ORANGE, linestyle="--", linewidth=1, label=f"Label rate {_percent(rate)}")
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
    figure = _new_figure(9, 6)
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
        f"Positive rate: {_percent(m['positive_rate'])} at 0.5, {_percent(t['positive_rate'])} tuned; "
        f"label rate {_percent(m['label_rate'])}",
        loc="left", fontsize=11, pad=24,
    )
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, fontsize=9, borderaxespad=0.1)
    _tidy(ax)
    return figure


def training_figure(history: list[dict]) -> Figure:
    """Loss, tuning AUROC and positive rate by epoch, from log.jsonl; frozen epochs are shaded, the best is ringed."""
    epochs = [row.get("epoch", number) for number, row in enumerate(history, 1)]
    panels = (
        ("Loss", (("train_loss", "Training", BLUE), ("tuning_loss", "Tuning patients", ORANGE))),
        ("Macro AUROC, tuning patients", (("tuning_auroc_macro", "Macro AUROC", GREEN),)),
        ("Positive rate at 0.5, %", (("positive_rate", "Predicted", ORANGE), ("label_rate", "Labels", INK))),
    )
    frozen = [epoch for epoch, row in zip(epochs, history, strict=True) if row.get("stage") == "frozen"]
    best = [(n, row.get("tuning_auroc_macro")) for n, row in zip(epochs, history, strict=True) if row.get("best")]
    figure = _new_figure(13, 4)
    for ax, (title, curves) in zip(figure.subplots(1, 3), panels, strict=True):
        if frozen:
            shade = {"facecolor": "#f0f0f0", "edgecolor": GREY, "linewidth": 0.5, "zorder": 0}
            ax.axvspan(min(epochs) - 0.5, max(frozen) + 0.5, label="Backbone frozen", **shade)
        for key, name, color in curves:
            values = np.array([row.get(key) for row in history], dtype=float)  # None where an epoch has no value
            ax.plot(epochs, values * (100 if key.endswith("_rate") else 1), "o-", color=color, markersize=4, label=name)
            if key == "tuning_auroc_macro" and best and best[-1][1] is not None:
                ring = {"facecolors": "none", "edgecolors": INK, "linewidths": 1.3, "zorder": 3}
                ax.scatter(*best[-1], s=90, label=f"Best, epoch {best[-1][0]}", **ring)
        ax.set(xlabel="Epoch", xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
        ax.set_title(title, loc="left", fontsize=11)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.legend(frameon=False, fontsize=9)
        _tidy(ax)
    return figure


def _new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
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
    import textwrap

    return "\n".join((["", *textwrap.wrap(name, width)])[-2:])


# -------------------------------------------------------------------------------------------------------- run folders


def newest_run(results: str | Path = "results") -> Path:
    """The run folder under `results` that was written to last, judged by its log.jsonl and run.json."""
    written = [path for name in ("run.json", "log.jsonl") for path in Path(results).glob(f"*/{name}")]
    if not written:
        raise EvaluationError(
            f"{results}: found no run, expected a folder with run.json; train one with "
            "'python ctclip_training.py --mode quick_test' or give --predictions and --labels"
        )
    return max(written, key=lambda path: path.stat().st_mtime).parent


def run_predictions(
    run_dir: str | Path,
    data_dir: str | Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    tables: str | Path | None = None,
) -> tuple:
    """(predictions, labels, tuning or None, history, phantom) of a run folder, tables as load_predictions gives them.

    Predictions that are not there yet are made with the run's model, on the validation split of the run's cohort. With
    `data_dir` they are made anew on that cohort, and kept in the folder `tables`, apart from the run's own.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise EvaluationError(f"{run}: found no such folder, expected a run folder; list results/ for its name")
    tables = run if data_dir is None else Path(tables or foreign_folder(run, data_dir))
    present = (tables / "predictions.csv").is_file() and (tables / "labels.csv").is_file()
    if data_dir is not None or not present:
        predict_run(run, data_dir, device, workers, tables)
    tuning = None
    if (run / "tuning_predictions.csv").is_file():
        tuning = load_predictions(run / "tuning_predictions.csv"), load_labels(run / "tuning_labels.csv")
    predictions, labels = load_predictions(tables / "predictions.csv"), load_labels(tables / "labels.csv")
    from ctclip_phantom import is_phantom_cohort

    phantom = _is_phantom(run) if data_dir is None else is_phantom_cohort(data_dir)
    return predictions, labels, tuning, read_history(run / "log.jsonl"), phantom


def foreign_folder(run: Path, data_dir: str | Path | None) -> Path:
    """Where results of a run go by default: into its folder; on a cohort other than its own, into a folder in there."""
    return run if data_dir is None else run / f"on_{Path(data_dir).resolve().name}"


def predict_run(
    run: Path, data_dir: str | Path | None, device: str | None, workers: int | None, tables: Path
) -> None:
    """Writes predictions.csv and labels.csv of the cohort's validation split into `tables`."""
    from ctclip_data import load_cohort

    record = run_record(run)
    data_dir = data_dir or record.get("data_dir")
    if data_dir is None or not (run / "model.safetensors").is_file():
        raise EvaluationError(
            f"{run}: found no predictions.csv with labels.csv, expected them or a finished epoch to make them with; "
            "let training go on (--resume), or give --predictions and --labels"
        )
    model = load_model(run, device)
    cohort = load_cohort(data_dir, "valid")
    print(f"Predicting the unseen split of {data_dir}\n{cohort.summary()}")
    read, logits = predict_volumes(model, cohort.volumes, workers=workers, on_batch=print_failures)
    if not read:
        raise EvaluationError(f"{data_dir}: none of the {len(cohort)} volumes of its valid split could be read")
    names = [cohort.volumes[i].name for i in read]
    tables.mkdir(parents=True, exist_ok=True)
    write_table(tables / "labels.csv", names, np.stack([cohort.volumes[i].labels for i in read]).astype(int))
    write_table(tables / "predictions.csv", names, logits.sigmoid().numpy())


def run_record(run: Path) -> dict:
    """Content of a run's run.json, or {} where there is none."""
    path = run / "run.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{path}: found no JSON object ({error}), expected a run's record; restore it") from error


def read_history(path: str | Path) -> list[dict] | None:
    """Epochs of a log.jsonl, or None where there is none; a last line cut off by an interrupted run is left out."""
    path = Path(path)
    if not path.is_file():
        return None
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    epochs = []
    for number, line in enumerate(lines, 1):
        try:
            epochs.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise EvaluationError(
                    f"{path}, line {number}: found no JSON ({error}), expected one epoch; remove that line"
                ) from error
    return epochs


def _is_phantom(run: Path) -> bool:
    """Whether run.json says that the run's cohort is the built-in one; False where there is no run.json."""
    return bool(run_record(run).get("phantom", False))


# ----------------------------------------------------------------------------------------------- running a model


def choose_device(name: str | None = None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EvaluationError(f"--device {name}: not usable here ({reason}), expected cpu, cuda or cuda:N") from error
    return device


def choose_precision(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, fp16 on older cards (T4), float32 elsewhere."""
    import torch

    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def choose_workers(workers: int | None) -> int:
    """Reading processes: what was asked for, else up to 8; none on two cores, where they only compete."""
    if workers is not None and workers < 0:
        raise EvaluationError(f"--workers is {workers}, expected at least 0")
    cpus = os.cpu_count() or 1
    return workers if workers is not None else min(8, cpus) if cpus > 2 else 0


def load_model(checkpoint: str | Path, device: str | None = None) -> CTCLIPMultiAbnormalityModel:
    """The model of a run folder, or of a CT-CLIP file that brings its head, in evaluation mode on the device."""
    from ctclip_model import CTCLIPMultiAbnormalityModel

    checkpoint = Path(checkpoint)
    if checkpoint.is_dir():
        if not (checkpoint / "model.safetensors").is_file():
            raise EvaluationError(f"{checkpoint}: found no model.safetensors, expected a run with a finished epoch")
        model = CTCLIPMultiAbnormalityModel.from_pretrained(checkpoint)
    else:
        model = CTCLIPMultiAbnormalityModel(str(checkpoint))
        if model.load_report.new:
            raise CheckpointError(
                f"{checkpoint} has no classification head: its answers would all be 0.5. Expected a ClassFine file or "
                "a run folder; fine-tune first with python ctclip_training.py --ctclip-path"
            )
    return model.to(choose_device(device)).eval()


def predict_volumes(
    model: CTCLIPMultiAbnormalityModel,
    volumes: Sequence[Volume],
    batch_size: int = 4,
    workers: int | None = None,
    on_batch: Callable[[Batch], None] | None = None,
    title: str = "predict",
) -> tuple[list[int], torch.Tensor]:
    """Runs `model`, in evaluation mode, over volumes; each is read once.

    In float32 on every device: in half precision some codes flip, and reading a volume costs more than encoding it.
    Returns the indices of the volumes that could be read, ascending, and their logits (n, 18) float32 on the CPU.
    `on_batch` sees every batch, with the failures and verdicts in it.
    """
    import torch
    from tqdm import tqdm

    from ctclip_cache import encoding
    from ctclip_data import volume_loader

    device = next(model.parameters()).device
    loader = volume_loader(volumes, model.input_shape, batch_size, num_workers=choose_workers(workers))
    rows: dict[int, torch.Tensor] = {}
    with encoding(model, device), tqdm(total=len(volumes), desc=title, unit="vol", delay=2, leave=False) as progress:
        for batch in loader:
            if on_batch is not None:
                on_batch(batch)
            progress.update(len(batch.index) + len(batch.failures))
            if not len(batch.index):
                continue
            logits = model(batch.volumes.to(device))
            rows |= dict(zip(batch.index.tolist(), logits.cpu(), strict=True))
    read = sorted(rows)
    return read, torch.stack([rows[i] for i in read]) if read else torch.zeros(0, N_LABELS)


def predict_files(
    checkpoint: str | Path, source: str | Path, device: str | None = None, workers: int | None = None
) -> tuple[list[str], np.ndarray, list[tuple[str, str]]]:
    """(names, probabilities (N, 18), failures as (name, reason)) for a .nii or .nii.gz file, or a folder of them.

    Files hold Hounsfield units with spacing and orientation in the header.
    """
    from ctclip_data import Volume

    source = Path(source)
    files = [source] if source.is_file() else sorted(source.rglob("*.nii*"))
    files = [file for file in files if file.name.endswith((".nii", ".nii.gz"))]
    if not files:
        raise EvaluationError(f"{source}: found no .nii or .nii.gz file, expected a scan or a folder of scans")
    root = source if source.is_dir() else source.parent
    blank = np.zeros(N_LABELS, np.float32)
    volumes = [Volume(str(file.relative_to(root)), file, blank) for file in files]
    failures: list[tuple[str, str]] = []
    model = load_model(checkpoint, device)
    read, logits = predict_volumes(
        model, volumes, workers=workers, on_batch=lambda batch: (print_failures(batch), failures.extend(batch.failures))
    )
    return [volumes[i].name for i in read], logits.sigmoid().numpy(), failures


def print_failures(batch: Batch) -> None:
    from tqdm import tqdm

    for name, reason in batch.failures:
        tqdm.write(f"left out: {name}: {reason}", file=sys.stderr)


def write_table(path: str | Path, names: Sequence[str], values: np.ndarray) -> None:
    """VolumeName and the 18 columns, as predictions (probabilities) and labels (0/1) files have them."""
    import pandas as pd

    frame = pd.DataFrame(values, index=pd.Index(names, name="VolumeName"), columns=list(ABNORMALITIES))
    with replacing(path) as temporary:
        frame.to_csv(temporary)


# ------------------------------------------------------------------------------------------------------------ script


def report(
    predictions: pd.DataFrame,
    labels: pd.DataFrame,
    tuning: tuple | None,
    history: list[dict] | None,
    phantom: bool,
    output_dir: Path,
    baseline: str | None = None,
    objective: str = DEFAULT_OBJECTIVE,
) -> dict:
    """Evaluates, prints the blocks, writes the files; for scripts. Returns what metrics.json holds."""
    other = load_predictions(baseline) if baseline else None
    metrics = evaluate(predictions, labels, tuning, other, output_dir, history, phantom, objective)
    print(format_report(metrics))
    print(f"\nWrote {output_dir}: metrics.json, predictions.csv, per_label.csv, figures (*.png)")
    return metrics


def main(argv: list[str] | None = None) -> int:
    started = time.perf_counter()
    args = _parser().parse_args(argv)
    from ctclip_data import CohortError

    try:
        report(*_inputs(args), args.baseline, args.objective)
    except (EvaluationError, CheckpointError, CohortError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Evaluation took {time.perf_counter() - started:.1f} s")
    return 0


def _inputs(args: argparse.Namespace) -> tuple:
    """(predictions, labels, tuning, history, phantom, output_dir) that the flags ask for."""
    tables = {"--predictions": args.predictions, "--labels": args.labels,
              "--tuning-predictions": args.tuning_predictions, "--tuning-labels": args.tuning_labels}
    given = [flag for flag, value in tables.items() if value]
    if args.checkpoint and given:
        raise EvaluationError(f"found --checkpoint with {given[0]}, expected a run or tables; drop one of the two")
    for one, other in (("--predictions", "--labels"), ("--tuning-predictions", "--tuning-labels")):
        if bool(tables[one]) != bool(tables[other]):
            has, lacks = (one, other) if tables[one] else (other, one)
            raise EvaluationError(f"found {has} without {lacks}, expected both; add {lacks} FILE.csv")
    if args.tuning_predictions and not args.predictions:
        raise EvaluationError("found tuning tables only, expected --predictions and --labels too; add them")
    if args.predictions:
        tuning = None
        if args.tuning_predictions:
            tuning = load_predictions(args.tuning_predictions), load_labels(args.tuning_labels)
        output_dir = args.output_dir or Path("results", "evaluation")
        phantom = _is_phantom(Path(args.predictions).parent)  # the tables of a run stay what they are
        return load_predictions(args.predictions), load_labels(args.labels), tuning, None, phantom, output_dir
    run = Path(args.checkpoint) if args.checkpoint else newest_run()
    if not args.checkpoint:
        print(f"Evaluating the newest run, {run} (choose another with --checkpoint)")
    folder = Path(args.output_dir or foreign_folder(run, args.data_dir))
    return *run_predictions(run, args.data_dir, args.device, args.workers, folder), folder


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Evaluate predictions for CT-RATE's 18 abnormalities.")
    source = parser.add_argument_group("what to evaluate (default: the newest run under results/)")
    source.add_argument("--checkpoint", metavar="RUN", help="run folder; its tables, thresholds' patients and log")
    source.add_argument("--predictions", metavar="CSV", help="VolumeName and 18 probabilities; needs --labels")
    source.add_argument("--labels", metavar="CSV", help="CT-RATE's label table; may hold more volumes")
    source.add_argument("--data-dir", metavar="DIR", help="predict this cohort's valid split instead")
    source.add_argument("--device", help="for predicting (default: cuda where there is one)")
    source.add_argument("--workers", type=int, metavar="N", help="reading processes beside the main one")
    tuning = parser.add_argument_group("thresholds")
    tuning.add_argument("--tuning-predictions", metavar="CSV",
                        help="other patients to fit thresholds on; without them, cross-fitted by patient")
    tuning.add_argument("--tuning-labels", metavar="CSV", help="labels of the tuning patients")
    tuning.add_argument("--objective", choices=OBJECTIVES, default=DEFAULT_OBJECTIVE,
                        help="what thresholds aim at; prevalence keeps the positive rate at the label rate, f1 and "
                             "youden over-predict with a weak model, hamming under-predicts (default: %(default)s)")
    output = parser.add_argument_group("comparison and output")
    output.add_argument("--baseline", metavar="CSV", help="other predictions for the same volumes, compared here")
    output.add_argument("--output-dir", metavar="DIR", help="default: the run folder, or results/evaluation for tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
