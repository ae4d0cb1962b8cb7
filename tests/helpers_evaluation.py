"""Simulated predictions, and the metrics written out with scikit-learn as the reference."""

import numpy as np
import pandas as pd
from sklearn import metrics as sk

from ctclip.evaluation.tables import rows_of
from ctclip_model import ABNORMALITIES

RATES = np.linspace(0.07, 0.32, 18)  # a spread like CT-RATE's
D_FOR_AUROC_075 = 0.954  # distance of two unit normals whose AUROC is 0.75: sqrt(2) * 0.6745


def simulate(n_patients, seed, shift=0.0, distance=D_FOR_AUROC_075, first=1, split="valid"):
    """Two volumes per patient with the same labels and nearly the same score -> (predictions, labels) frames."""
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.random((n_patients, 18)) < RATES, 2, axis=0).astype(np.int8)
    score = distance * y + np.repeat(rng.normal(size=(n_patients, 18)), 2, axis=0) + 0.05 * rng.normal(size=y.shape)
    names = [f"{split}_{i}_a_{k}.nii.gz" for i in range(first, first + n_patients) for k in (1, 2)]
    index = pd.Index(names, name="VolumeName")
    p = 1 / (1 + np.exp(-(score + shift)))
    return pd.DataFrame(p, index, list(ABNORMALITIES)), pd.DataFrame(y, index, list(ABNORMALITIES))


def with_ties(seed=0, n=80):
    """(labels, probabilities) with few distinct values, 0, 0.5 and 1 among them, and every label two-class."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 18)) < 0.3).astype(int)
    p = np.clip(np.round((0.3 * y + rng.random((n, 18))) * 8) / 10, 0, 1)
    y[0], y[1], p[2, :], p[3, :], p[4, :] = 1, 0, 0.0, 1.0, 0.5
    return y, p


def reference(y, p, cut=0.5):
    """The dictionary M from scikit-learn and, for CRG, from the reference file's formula written out."""
    return decided(y, (p >= cut).astype(int)) | ranked(y, p)


def ranked(y, p):
    return {
        "auroc_macro": np.mean([sk.roc_auc_score(y[:, j], p[:, j]) for j in both_classes(y)]),
        "auroc_micro": sk.roc_auc_score(y.ravel(), p.ravel()),
    }


def decided(y, d):
    x, a = y.size, y.sum()
    (tn, fp), (fn, tp) = sk.confusion_matrix(y.ravel(), d.ravel(), labels=[0, 1])
    r = (x - a) / (2 * a)
    u = (x - a) / 2
    precision, recall, f1, _ = sk.precision_recall_fscore_support(y, d, average="macro", zero_division=0)
    return {
        "f1_macro": f1, "precision_macro": precision, "recall_macro": recall,
        "hamming_accuracy": 1 - sk.hamming_loss(y, d),
        "exact_match": sk.accuracy_score(y, d),
        "positive_rate": d.sum() / d.size,
        "label_rate": a / x,
        "crg": u / (2 * u - (r * tp - r * fn - fp)),
    }


def rows(predictions, labels, unit="volume"):
    return rows_of(predictions, labels, list(predictions.index), unit)


def both_classes(y):
    return [j for j in range(18) if 0 < y[:, j].sum() < len(y)]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))
