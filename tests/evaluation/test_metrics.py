"""ctclip.evaluation.metrics against hand-worked cases and against scikit-learn, on data with ties."""

import json

import numpy as np
import pytest
from helpers_evaluation import reference, with_ties
from sklearn import metrics as sk

from ctclip.evaluation import metrics as cm
from ctclip.evaluation.metrics import ABNORMALITIES, EvaluationError

M_KEYS = {"auroc_macro", "auroc_micro", "f1_macro", "precision_macro", "recall_macro", "hamming_accuracy",
          "exact_match", "positive_rate", "label_rate", "crg"}


def test_metrics_by_hand():
    """Three volumes; label 0: y 1 1 0, p .9 .4 .5 -> decisions 1 0 1; label 1 all positive, label 2 all negative,
    each decided 1 0 0; all other labels negative and decided so."""
    y, p = np.zeros((3, 18), int), np.zeros((3, 18))
    y[:, 0], p[:, 0] = (1, 1, 0), (0.9, 0.4, 0.5)
    y[:, 1], p[:, 1] = 1, (0.7, 0.1, 0.2)
    y[:, 2], p[:, 2] = 0, (0.7, 0.1, 0.2)
    m = cm.compute_metrics(y, p)
    assert set(m) == M_KEYS
    assert cm.lacks_a_class(y).tolist() == [False, *[True] * 17]
    assert m["auroc_macro"] == 0.5  # label 0 only: .9 beats .5, .4 does not
    # label 0: precision 1/2, recall 1/2, F1 1/2; label 1: 1, 1/3, 1/2; label 2 and the rest: 0
    assert m["precision_macro"] == pytest.approx(1.5 / 18)
    assert m["recall_macro"] == pytest.approx((1 / 2 + 1 / 3) / 18)
    assert m["f1_macro"] == pytest.approx(1 / 18)
    assert m["hamming_accuracy"] == pytest.approx(1 - (2 + 2 + 1) / 54)
    assert m["exact_match"] == 0
    assert m["positive_rate"] == pytest.approx(4 / 54)
    assert m["label_rate"] == pytest.approx(5 / 54)
    # CRG: X 54, A 5, TP 2, FN 3, FP 2; r = 4.9, U = 24.5, s = 9.8 - 14.7 - 2 = -6.9
    assert m["crg"] == pytest.approx(24.5 / (49 + 6.9))
    # micro AUROC: positives .9 .4 .7 .1 .2 against negatives .5 .7 .1 .2 and 45 zeros
    pairs = (49) + (45 + 2) + (48 + 0.5) + (45 + 0.5) + (46 + 0.5)
    assert m["auroc_micro"] == pytest.approx(pairs / (5 * 49))
    rows = cm.per_label_metrics(y, p)
    assert list(rows) == list(ABNORMALITIES)
    assert rows["Medical material"] == {
        "auroc": 0.5, "average_precision": pytest.approx((1 + 2 / 3) / 2),
        "precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": pytest.approx(1 / 3),
        "positive_rate": pytest.approx(2 / 3), "label_rate": pytest.approx(2 / 3), "threshold": 0.5, "positives": 2,
        "known": 3}
    assert rows["Arterial wall calcification"]["auroc"] is None and rows["Cardiomegaly"]["auroc"] is None


def test_a_probability_on_the_threshold_is_positive():
    y, p = with_ties()
    assert cm.compute_metrics(y, np.full(p.shape, 0.5))["positive_rate"] == 1
    assert cm.compute_metrics(y, np.full(p.shape, np.nextafter(0.5, 0)))["positive_rate"] == 0


@pytest.mark.parametrize("labels", [0, 1])
def test_one_class_truth_is_undefined_not_zero(labels):
    y = np.full((4, 18), labels)
    m = cm.compute_metrics(y, np.full((4, 18), 0.9))
    assert m["auroc_macro"] is None and m["auroc_micro"] is None and m["crg"] is None
    assert m["hamming_accuracy"] == labels and m["f1_macro"] == labels and m["label_rate"] == labels
    assert cm.lacks_a_class(y).all()
    json.dumps(m, allow_nan=False)


@pytest.mark.parametrize("decided, expected", [(0.0, 1 / 3), (1.0, 1 / 3), (None, 1.0)])
def test_crg_of_all_zero_all_one_and_perfect(decided, expected):
    y, _ = with_ties()
    p = y.astype(float) if decided is None else np.full(y.shape, decided)
    assert cm.compute_metrics(y, p)["crg"] == pytest.approx(expected, abs=1e-12)


def test_crg_of_random_decisions_is_a_third():
    rng = np.random.default_rng(0)
    y = rng.random((20_000, 18)) < 0.19
    for rate in (0.05, 0.5, 0.97):
        decided = cm.decision_metrics(y.astype(np.int8), rng.random(y.shape) < rate)
        assert decided["crg"] == pytest.approx(1 / 3, abs=0.005)


@pytest.mark.parametrize("seed", range(2))
def test_metrics_equal_scikit_learn_with_ties(seed):
    y, p = with_ties(seed)
    label_cuts = np.random.default_rng(seed).choice([0.2, 0.3, 0.5, 0.9], 18)
    row_cuts = np.random.default_rng(seed).choice([0.2, 0.3, 0.5, 0.9], p.shape)
    for cut in (0.5, 0.3, label_cuts, row_cuts):
        assert cm.compute_metrics(y, p, cut) == pytest.approx(reference(y, p, cut), abs=1e-12)
    for j, row in enumerate(cm.per_label_metrics(y, p, label_cuts).values()):
        d = p[:, j] >= label_cuts[j]
        expected = {
            "auroc": sk.roc_auc_score(y[:, j], p[:, j]),
            "average_precision": sk.average_precision_score(y[:, j], p[:, j]),
            "precision": sk.precision_score(y[:, j], d, zero_division=0),
            "recall": sk.recall_score(y[:, j], d), "f1": sk.f1_score(y[:, j], d),
            "accuracy": sk.accuracy_score(y[:, j], d), "positive_rate": d.mean(), "label_rate": y[:, j].mean(),
            "threshold": label_cuts[j], "positives": y[:, j].sum(), "known": len(y)}
        assert row == pytest.approx(expected, abs=1e-12)


def test_metrics_are_plain_numbers():
    y, p = with_ties()
    m = cm.compute_metrics(y, p.astype(np.float32), np.full(18, 0.3))
    assert {type(value) for value in m.values()} == {float}


@pytest.mark.parametrize("change, message", [
    (lambda y, p: (y[:, :17], p), "expected both"),
    (lambda y, p: (y[:0], p[:0]), "N and L at least 1"),
    (lambda y, p: (y * 2, p), "other than 0 and 1"),
    (lambda y, p: (y, p * 3 - 1), "outside"),
    (lambda y, p: (y, np.where(p == 0.5, np.nan, p)), "NaN"),
])
def test_arrays_that_are_no_predictions_are_refused(change, message):
    with pytest.raises(EvaluationError, match=message):
        cm.compute_metrics(*change(*with_ties()))


# ------------------------------------------------------------------------------------- difference of two predictions


def two_predictions(n_patients=150, seed=0):
    """(labels, first, second, patients): frequent labels, correlated predictions with ties, two volumes a patient."""
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.random((n_patients, 18)) < np.linspace(0.25, 0.5, 18), 2, axis=0).astype(int)
    shared, own, other = (np.repeat(rng.normal(size=(n_patients, 18)), 2, axis=0) for _ in range(3))
    first, second = (d * y + shared + 0.6 * n + 0.2 * rng.normal(size=y.shape) for d, n in ((1.0, own), (0.8, other)))
    patients = np.repeat([f"valid_{i}" for i in range(n_patients)], 2)
    return y, *(np.round(1 / (1 + np.exp(-s)), 2) for s in (first, second)), patients


def test_auroc_difference_equals_scikit_learn():
    y, first, second, patients = two_predictions()
    y[:, 4], y[:, 9] = 0, 1  # no AUROC: skipped
    two = [j for j in range(18) if j not in (4, 9)]
    expected = np.mean([sk.roc_auc_score(y[:, j], first[:, j]) - sk.roc_auc_score(y[:, j], second[:, j]) for j in two])
    difference, error = cm.auroc_difference(y, first, second, patients)
    assert difference == pytest.approx(expected, abs=1e-12) and 0 < error < 0.05
    assert cm.auroc_difference(y, second, first, patients) == pytest.approx((-difference, error), abs=1e-15)
    order = np.random.default_rng(1).permutation(len(y))
    shuffled = cm.auroc_difference(y[order], first[order], second[order], patients[order])
    assert shuffled == pytest.approx((difference, error), abs=1e-15)


def test_auroc_difference_has_the_standard_error_of_a_bootstrap_over_patients():
    """A patient drawn w times weighs w: a resample's AUROC is a ratio of weighted counts of ordered pairs."""
    y, first, second, patients = two_predictions()
    rng = np.random.default_rng(0)
    weights = np.repeat(rng.multinomial(150, np.full(150, 1 / 150), size=2000), 2, axis=1).astype(np.float32)
    resampled = np.zeros(2000)
    for j in range(18):
        positive, negative = weights[:, y[:, j] == 1], weights[:, y[:, j] == 0]
        for sign, p in ((1, first[:, j]), (-1, second[:, j])):
            gap = p[y[:, j] == 1][:, None] - p[y[:, j] == 0]
            pairs = ((positive @ ((np.sign(gap) + 1) / 2).astype(np.float32)) * negative).sum(1)
            resampled += sign * pairs / (positive.sum(1) * negative.sum(1)) / 18
    error = cm.auroc_difference(y, first, second, patients)[1]
    assert error == pytest.approx(resampled.std(), rel=0.1)
    alone = cm.auroc_difference(y, first, second, range(len(y)))[1]
    assert alone < 0.9 * error  # as if every volume were a patient of its own: too sure


def test_auroc_difference_of_identical_predictions_is_nothing():
    y, first, _, patients = two_predictions(20)
    assert cm.auroc_difference(y, first, first, patients) == (0, 0)


def test_duplicated_volumes_do_not_make_an_auroc_difference_surer():
    y, first, second, patients = two_predictions(40)
    once = cm.auroc_difference(y, first, second, patients)
    twice = cm.auroc_difference(*(np.repeat(a, 3, axis=0) for a in (y, first, second, patients)))
    assert twice == pytest.approx(once, abs=1e-12)


def test_auroc_difference_that_is_undefined():
    y, first, second, patients = two_predictions(10)
    assert cm.auroc_difference(np.zeros_like(y), first, second, patients) is None
    assert cm.auroc_difference(y, first, second, ["valid_1"] * len(y)) is None
    with pytest.raises(EvaluationError, match="expected both"):
        cm.auroc_difference(y, first, second[:-1], patients)


# -------------------------------------------------------------------------------------------------------- calibration


def test_brier_score_and_calibration_error_by_hand():
    """One label, four volumes, ten bins of their own quantiles: every volume a bin, so ECE is the mean |p - y|."""
    y, p = np.zeros((4, 18), np.int8), np.zeros((4, 18))
    y[:, 0], p[:, 0] = (1, 0, 0, 1), (0.9, 0.2, 0.4, 0.6)
    columns = cm.calibration_columns(y, p)
    assert columns["brier"][0] == pytest.approx((0.01 + 0.04 + 0.16 + 0.16) / 4)
    assert columns["ece"][0] == pytest.approx((0.1 + 0.2 + 0.4 + 0.4) / 4)
    assert columns["mean"][0] == pytest.approx(0.525)
    assert columns["brier"][1:].max() == columns["ece"][1:].max() == 0
    p[:, 0] = 0.5  # equal probabilities share a bin: half of them are right
    assert cm.calibration_columns(y, p)["ece"][0] == 0


def test_brier_score_equals_scikit_learn_and_bins_are_of_equal_size():
    y, p = with_ties()
    columns = cm.calibration_columns(y, p)
    for j in range(18):
        assert columns["brier"][j] == pytest.approx(sk.brier_score_loss(y[:, j], p[:, j]), abs=1e-12)
    untied = np.random.default_rng(0).random(500)
    place = cm.bin_index(untied)
    assert np.bincount(place).tolist() == [50] * 10 and (np.diff(untied[np.argsort(place, kind="stable")]) > 0).any()
    expected = np.mean([abs(untied[place == k].mean() - (k % 2)) for k in range(10)])
    labels = np.repeat(place[:, None] % 2, 18, axis=1)
    assert cm.calibration_columns(labels, np.repeat(untied[:, None], 18, axis=1))["ece"][3] == pytest.approx(expected)
