"""ctclip_evaluation against hand-worked cases, against scikit-learn (on data with ties), and against its promises:
thresholds never see the patients they are reported on, bad input ends in one line and exit code 2, and every number
of metrics.json is recomputed here by another route.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

import ctclip_evaluation as ev
from ctclip_evaluation import ABNORMALITIES, EvaluationError

SCRIPT = Path(ev.__file__)
RATES = np.linspace(0.07, 0.32, 18)  # a spread like CT-RATE's
M_KEYS = {"auroc_macro", "auroc_micro", "f1_macro", "precision_macro", "recall_macro", "hamming_accuracy",
          "exact_match", "positive_rate", "label_rate", "crg"}
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
    two = [j for j in range(18) if 0 < y[:, j].sum() < len(y)]
    return decided(y, (p >= cut).astype(int)) | {
        "auroc_macro": np.mean([sk.roc_auc_score(y[:, j], p[:, j]) for j in two]),
        "auroc_micro": sk.roc_auc_score(y.ravel(), p.ravel()),
    }


def decided(y, d):
    x, a = y.size, y.sum()
    (tn, fp), (fn, tp) = sk.confusion_matrix(y.ravel(), d.ravel(), labels=[0, 1])
    r = (x - a) / (2 * a)
    u = (x - a) / 2
    return {
        "f1_macro": sk.f1_score(y, d, average="macro", zero_division=0),
        "precision_macro": sk.precision_score(y, d, average="macro", zero_division=0),
        "recall_macro": sk.recall_score(y, d, average="macro", zero_division=0),
        "hamming_accuracy": 1 - sk.hamming_loss(y, d),
        "exact_match": sk.accuracy_score(y, d),
        "positive_rate": d.sum() / d.size,
        "label_rate": a / x,
        "crg": u / (2 * u - (r * tp - r * fn - fp)),
    }


# ---------------------------------------------------------------------------------------------------------- metrics


def test_metrics_by_hand():
    """Three volumes; label 0: y 1 1 0, p .9 .4 .5 -> decisions 1 0 1; label 1 all positive, label 2 all negative,
    each decided 1 0 0; all other labels negative and decided so."""
    y, p = np.zeros((3, 18), int), np.zeros((3, 18))
    y[:, 0], p[:, 0] = (1, 1, 0), (0.9, 0.4, 0.5)
    y[:, 1], p[:, 1] = 1, (0.7, 0.1, 0.2)
    y[:, 2], p[:, 2] = 0, (0.7, 0.1, 0.2)
    m = ev.compute_metrics(y, p)
    assert set(m) == M_KEYS
    assert ev.undefined_labels(y) == list(ABNORMALITIES[1:])
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
    rows = ev.per_label_metrics(y, p)
    assert list(rows) == list(ABNORMALITIES)
    assert rows["Medical material"] == {
        "auroc": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": pytest.approx(1 / 3),
        "positive_rate": pytest.approx(2 / 3), "label_rate": pytest.approx(2 / 3), "threshold": 0.5, "positives": 2}
    assert rows["Arterial wall calcification"]["auroc"] is None and rows["Cardiomegaly"]["auroc"] is None


def test_a_probability_on_the_threshold_is_positive():
    y, p = with_ties()
    assert ev.compute_metrics(y, np.full(p.shape, 0.5))["positive_rate"] == 1
    assert ev.compute_metrics(y, np.full(p.shape, np.nextafter(0.5, 0)))["positive_rate"] == 0


@pytest.mark.parametrize("labels", [0, 1])
def test_one_class_truth_is_undefined_not_zero(labels):
    y = np.full((4, 18), labels)
    m = ev.compute_metrics(y, np.full((4, 18), 0.9))
    assert m["auroc_macro"] is None and m["auroc_micro"] is None and m["crg"] is None
    assert m["hamming_accuracy"] == labels and m["f1_macro"] == labels and m["label_rate"] == labels
    assert ev.undefined_labels(y) == list(ABNORMALITIES)
    json.dumps(m, allow_nan=False)


@pytest.mark.parametrize("decided, expected", [(0.0, 1 / 3), (1.0, 1 / 3), (None, 1.0)])
def test_crg_of_all_zero_all_one_and_perfect(decided, expected):
    y, _ = with_ties()
    p = y.astype(float) if decided is None else np.full(y.shape, decided)
    assert ev.compute_metrics(y, p)["crg"] == pytest.approx(expected, abs=1e-12)


def test_crg_of_random_decisions_is_a_third():
    rng = np.random.default_rng(0)
    y = rng.random((20_000, 18)) < 0.19
    for rate in (0.05, 0.5, 0.97):
        assert ev.crg_score(y, rng.random(y.shape) < rate) == pytest.approx(1 / 3, abs=0.005)


@pytest.mark.parametrize("seed", range(2))
def test_metrics_equal_scikit_learn_with_ties(seed):
    y, p = with_ties(seed)
    label_cuts = np.random.default_rng(seed).choice([0.2, 0.3, 0.5, 0.9], 18)
    row_cuts = np.random.default_rng(seed).choice([0.2, 0.3, 0.5, 0.9], p.shape)
    for cut in (0.5, 0.3, label_cuts, row_cuts):
        assert ev.compute_metrics(y, p, cut) == pytest.approx(reference(y, p, cut), abs=1e-12)
    for j, row in enumerate(ev.per_label_metrics(y, p, label_cuts).values()):
        d = p[:, j] >= label_cuts[j]
        expected = {
            "auroc": sk.roc_auc_score(y[:, j], p[:, j]), "precision": sk.precision_score(y[:, j], d, zero_division=0),
            "recall": sk.recall_score(y[:, j], d), "f1": sk.f1_score(y[:, j], d),
            "accuracy": sk.accuracy_score(y[:, j], d), "positive_rate": d.mean(), "label_rate": y[:, j].mean(),
            "threshold": label_cuts[j], "positives": y[:, j].sum()}
        assert row == pytest.approx(expected, abs=1e-12)


def test_metrics_are_plain_numbers():
    y, p = with_ties()
    m = ev.compute_metrics(y, p.astype(np.float32), np.full(18, 0.3))
    assert {type(value) for value in m.values()} == {float}


@pytest.mark.parametrize("change, message", [
    (lambda y, p: (y[:, :17], p[:, :17]), "expected both"),
    (lambda y, p: (y[:0], p[:0]), "N at least 1"),
    (lambda y, p: (y * 2, p), "other than 0 and 1"),
    (lambda y, p: (y, p * 3 - 1), "outside"),
    (lambda y, p: (y, np.where(p == 0.5, np.nan, p)), "NaN"),
])
def test_arrays_that_are_no_predictions_are_refused(change, message):
    with pytest.raises(EvaluationError, match=message):
        ev.compute_metrics(*change(*with_ties()))


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
    y[:, 4], y[:, 9] = 0, 1  # no AUROC: left out
    two = [j for j in range(18) if j not in (4, 9)]
    expected = np.mean([sk.roc_auc_score(y[:, j], first[:, j]) - sk.roc_auc_score(y[:, j], second[:, j]) for j in two])
    difference, error = ev.auroc_difference(y, first, second, patients)
    assert difference == pytest.approx(expected, abs=1e-12) and 0 < error < 0.05
    assert ev.auroc_difference(y, second, first, patients) == pytest.approx((-difference, error), abs=1e-15)
    order = np.random.default_rng(1).permutation(len(y))
    shuffled = ev.auroc_difference(y[order], first[order], second[order], patients[order])
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
    error = ev.auroc_difference(y, first, second, patients)[1]
    assert error == pytest.approx(resampled.std(), rel=0.1)
    alone = ev.auroc_difference(y, first, second, range(len(y)))[1]
    assert alone < 0.9 * error  # as if every volume were a patient of its own: too sure


def test_auroc_difference_of_identical_predictions_is_nothing():
    y, first, _, patients = two_predictions(20)
    assert ev.auroc_difference(y, first, first, patients) == (0, 0)


def test_duplicated_volumes_do_not_make_an_auroc_difference_surer():
    y, first, second, patients = two_predictions(40)
    once = ev.auroc_difference(y, first, second, patients)
    twice = ev.auroc_difference(*(np.repeat(a, 3, axis=0) for a in (y, first, second, patients)))
    assert twice == pytest.approx(once, abs=1e-12)


def test_auroc_difference_that_is_undefined():
    y, first, second, patients = two_predictions(10)
    assert ev.auroc_difference(np.zeros_like(y), first, second, patients) is None
    assert ev.auroc_difference(y, first, second, ["valid_1"] * len(y)) is None
    with pytest.raises(EvaluationError, match="expected both"):
        ev.auroc_difference(y, first, second[:-1], patients)


# ------------------------------------------------------------------------------------------------------- thresholds

SCORES = {  # by scikit-learn, for one label
    "f1": lambda y, d: sk.f1_score(y, d, zero_division=0),
    "prevalence": lambda y, d: -abs(d.mean() - y.mean()),
    "hamming": sk.accuracy_score,
    "youden": lambda y, d: sk.recall_score(y, d) + sk.recall_score(1 - y, ~d) - 1,
}


def test_every_objective_is_checked_here():
    assert set(SCORES) == set(ev.OBJECTIVES)


@pytest.mark.parametrize("objective", SCORES)
def test_label_thresholds_reach_the_best_score_there_is(objective):
    y, p = with_ties(3)
    cuts = ev.tune_label_thresholds(y, p, objective)
    for j in range(0, 18, 3):
        every_split = [p[:, j] >= cut for cut in (*np.unique(p[:, j]), 2.0)]
        best = max(SCORES[objective](y[:, j], d) for d in every_split)
        assert SCORES[objective](y[:, j], p[:, j] >= cuts[j]) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("objective", SCORES)
def test_global_threshold_reaches_the_best_score_there_is(objective):
    y, p = with_ties(4)

    def score(cut):
        d = p >= cut
        if objective == "prevalence":  # pooled: one rate for all decisions
            return -abs(d.mean() - y.mean())
        return np.mean([SCORES[objective](y[:, j], d[:, j]) for j in range(18)])

    assert len(np.unique(p)) < 15
    best = max(score(cut) for cut in (*np.unique(p), 2.0))
    assert score(ev.tune_global_threshold(y, p, objective)) == pytest.approx(best, abs=1e-12)


def test_cuts_divide_ties_never_and_reach_both_ends():
    values = np.array([0.2, 0.2, 0.4, np.nextafter(0.4, 1), 1.0])
    cuts = ev.candidate_cuts(values)
    assert [int((values >= cut).sum()) for cut in cuts] == [5, 3, 2, 1, 0]
    assert cuts[1] == pytest.approx(0.3)
    assert [int((np.zeros(3) >= cut).sum()) for cut in ev.candidate_cuts(np.zeros(3))] == [3, 0]


def test_a_global_search_in_parts_is_the_whole_search():
    rng = np.random.default_rng(0)
    y, p = (rng.random((4000, 18)) < 0.2).astype(int), rng.random((4000, 18))  # 72,000 cuts: three parts
    assert (p >= ev.tune_global_threshold(y, p, "prevalence")).sum() == y.sum()


def test_a_label_with_one_class_takes_the_global_threshold_and_is_named():
    predictions, labels = simulate(30, seed=1)
    labels["Emphysema"], labels["Cardiomegaly"] = 0, 1
    y, p = labels.to_numpy(), predictions.to_numpy()
    cuts = ev.tune_label_thresholds(y, p, "f1")
    common = ev.tune_global_threshold(y, p, "f1")
    named = [name for name, cut in zip(ABNORMALITIES, cuts, strict=True) if cut == common]
    assert named == ["Cardiomegaly", "Emphysema"] == ev.undefined_labels(y)
    reported = simulate(30, seed=2, first=100)
    metrics = ev.evaluate(*reported, tuning=(predictions, labels))
    assert metrics["thresholds"]["took_global"] == named
    assert "so the global cut: Cardiomegaly, Emphysema" in ev.format_report(metrics)


def test_an_unknown_objective_is_refused():
    with pytest.raises(EvaluationError, match="expected one of prevalence"):
        ev.tune_label_thresholds(*with_ties(), objective="auroc")


def test_cross_fit_covers_every_row_once_and_keeps_patients_apart():
    predictions, labels = simulate(23, seed=0)
    patients = ev.patients_of(predictions.index)
    seen = []

    def spy(y, p, objective):
        others = {patients[row] for row in np.flatnonzero((predictions.to_numpy()[:, None] == p).all(-1).any(1))}
        seen.append(others)
        return np.full(18, len(seen) / 10)

    cuts = ev.cross_fit_thresholds(labels.to_numpy(), predictions.to_numpy(), patients, tune=spy)
    assert len(seen) == 5
    for k, fitted_on in enumerate(seen, 1):
        judged = set(patients[cuts[:, 0] == k / 10])
        assert judged and not judged & fitted_on and judged | fitted_on == set(patients)


def test_cross_fitted_cuts_do_not_depend_on_the_own_labels():
    predictions, labels = simulate(20, seed=0)
    p, y, patients = predictions.to_numpy(), labels.to_numpy(), ev.patients_of(predictions.index)
    before = ev.cross_fit_thresholds(y, p, patients)
    for patient in np.unique(patients)[:6]:
        own = patients == patient
        flipped = np.where(own[:, None], 1 - y, y)
        after = ev.cross_fit_thresholds(flipped, p, patients)
        assert np.array_equal(before[own], after[own])
        assert not np.array_equal(before, after)


def test_cross_fit_does_not_depend_on_the_order_of_rows():
    predictions, labels = simulate(20, seed=0)
    p, y, patients = predictions.to_numpy(), labels.to_numpy(), ev.patients_of(predictions.index)
    order = np.random.default_rng(1).permutation(len(p))
    before = ev.cross_fit_thresholds(y, p, patients)
    assert np.array_equal(ev.cross_fit_thresholds(y[order], p[order], patients[order]), before[order])
    assert not np.array_equal(ev.cross_fit_thresholds(y, p, patients, seed=1), before)


def test_one_patient_cannot_be_cross_fitted():
    with pytest.raises(EvaluationError, match="1 patient only .valid_1."):
        ev.evaluate(*simulate(1, seed=0))


# ------------------------------------------------------------------------------------------------------- evaluation


def test_reported_labels_never_reach_the_thresholds():
    reported, tuning = simulate(40, seed=0), simulate(40, seed=1, first=100)
    before = ev.evaluate(*reported, tuning=tuning)
    shuffled = reported[1].sample(frac=1, random_state=0).set_axis(reported[1].index)
    after = ev.evaluate(reported[0], shuffled, tuning=tuning)
    assert after["thresholds"] == before["thresholds"]
    assert after["tuned"]["positive_rate"] == before["tuned"]["positive_rate"]
    assert after["tuned"]["hamming_accuracy"] != before["tuned"]["hamming_accuracy"]


def test_tuning_patients_among_the_reported_are_refused_by_name():
    with pytest.raises(EvaluationError, match="found 2 tuning patients among the reported ones .'valid_4', 'valid_5'."):
        ev.evaluate(*simulate(5, seed=0), tuning=simulate(5, seed=1, first=4))


@pytest.mark.parametrize("with_tuning", [True, False])
def test_an_over_predictor_becomes_honest_on_unseen_patients(with_tuning):
    reported = simulate(500, seed=0, shift=2.2)
    tuning = simulate(200, seed=1, shift=2.2, first=1000) if with_tuning else None
    metrics = ev.evaluate(*reported, tuning=tuning)
    half, tuned = metrics["at_0.5"], metrics["tuned"]
    assert half["auroc_macro"] == pytest.approx(0.75, abs=0.02)
    assert half["positive_rate"] == pytest.approx(0.97, abs=0.02)
    assert abs(tuned["positive_rate"] - tuned["label_rate"]) < 0.02
    assert tuned["auroc_macro"] == half["auroc_macro"] and tuned["auroc_micro"] == half["auroc_micro"]
    assert tuned["f1_macro"] > half["f1_macro"] + 0.05 and tuned["hamming_accuracy"] > half["hamming_accuracy"] + 0.4


def test_every_number_of_metrics_json():
    """The whole file, key by key, from scikit-learn; with a tuning set, a baseline and a one-class label."""
    predictions, labels = simulate(40, seed=0)
    labels["Bronchiectasis"] = 0
    tuning, (other, _) = simulate(45, seed=1, first=100), simulate(40, seed=0, distance=0.2)
    extra = simulate(1, seed=9, first=900)
    metrics = ev.evaluate(predictions, pd.concat([labels, extra[1]]), tuning, pd.concat([other, extra[0]]))
    stored = json.loads(json.dumps(metrics, allow_nan=False))  # the file's text, as a test below makes sure
    y, p, q = labels.to_numpy(), predictions.to_numpy(), other.to_numpy()
    fit_y, fit_p = tuning[1].to_numpy(), tuning[0].to_numpy()
    cuts, one = ev.tune_label_thresholds(fit_y, fit_p), ev.tune_global_threshold(fit_y, fit_p)
    base_cuts = ev.cross_fit_thresholds(y, q, ev.patients_of(predictions.index))
    auroc = lambda z, j: sk.roc_auc_score(y[:, j], z[:, j]) if y[:, j].any() else None  # noqa: E731

    def at(j, cut):
        d = p[:, j] >= cut
        rates = (sk.precision_score, sk.recall_score, sk.f1_score)
        values = [score(y[:, j], d, zero_division=0) for score in rates]
        names = ("precision", "recall", "f1", "accuracy", "positive_rate")
        return dict(zip(names, [*values, sk.accuracy_score(y[:, j], d), d.mean()], strict=True))

    keys = ("hamming_accuracy", "f1_macro", "precision_macro", "recall_macro", "positive_rate")
    expected = {
        "at_0.5": reference(y, p), "tuned": reference(y, p, cuts), "tuned_global": reference(y, p, one),
        "per_label": {
            name: at(j, cuts[j]) | {"auroc": auroc(p, j), "label_rate": y[:, j].mean(), "threshold": cuts[j],
                                    "positives": y[:, j].sum(), "at_0.5": at(j, 0.5)}
            for j, name in enumerate(ABNORMALITIES)},
        "thresholds": {"global": one, "per_label": dict(zip(ABNORMALITIES, cuts, strict=True)),
                       "objective": "prevalence", "fitted_on": "tuning patients", "n_volumes": 90, "n_patients": 45,
                       "took_global": []},
        "undefined_auroc": ["Bronchiectasis"], "n_volumes": 80, "n_patients": 40, "labels_without_prediction": 2,
        "probabilities": {"min": p.min(), "max": p.max(), "mean": p.mean()},
        "threshold_table": [{"threshold": c / 20} | {key: decided(y, (p >= c / 20).astype(int))[key] for key in keys}
                            for c in range(1, 20)],
        "baseline": {"source": "a table given in memory", "at_0.5": reference(y, q),
                     "tuned": reference(y, q, base_cuts), "fitted_on": "cross-fitted by patient",
                     "auroc_per_label": {name: auroc(q, j) for j, name in enumerate(ABNORMALITIES)},
                     "rows_not_compared": 2},
        "phantom": False,
    }
    criteria = stored.pop("success_criteria")
    assert len(criteria) == 7
    assert_same(stored, expected)


def assert_same(found, expected, where="metrics.json"):
    if isinstance(expected, dict):
        assert list(found) and set(found) == set(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for k, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}/{k}")
    elif expected is None or isinstance(expected, (str, bool)):
        assert found == expected, where
    else:
        assert found == pytest.approx(expected, abs=1e-12), where


def criteria_of(half, tuned, phantom):
    base = {"label_rate": 0.2, "auroc_macro": 0.74, "hamming_accuracy": 0.81, "positive_rate": 0.2}
    rows = ev.success_criteria({"at_0.5": base | half, "tuned": base | tuned, "phantom": phantom})
    return [row["passed"] for row in rows], [row["criterion"] + " " + row["figure"] for row in rows]


def test_success_criteria():
    good, text = criteria_of({}, {}, phantom=False)
    assert good == [True, True, True, False, True, True, True]
    assert "0.731 (CT-CLIP zero-shot on CT-RATE, as published) 0.7400" in text[2]
    assert "0.756 (CT-CLIP ClassFine on CT-RATE, as published) 0.7400" in text[3]
    assert text[4].endswith("0.8100 against 0.8000")  # the all-negative predictor's figure is stated
    phantom, text = criteria_of({"auroc_macro": 0.86}, {}, phantom=True)
    assert phantom == [True] * 6 and ">= 0.85 0.8600" in text[2]
    assert criteria_of({"auroc_macro": None}, {}, True)[0][2] is False
    over = criteria_of({"positive_rate": 0.97}, {"positive_rate": 0.25, "hamming_accuracy": 0.8}, True)[0]
    assert over == [True, False, False, False, True, False]
    assert criteria_of({}, {"positive_rate": 0.005}, True)[0][4] is False


def test_report_blocks_width_and_rates_side_by_side():
    predictions, labels = simulate(40, seed=0, shift=2.2)
    labels["Coronary artery wall calcification"] = 0
    metrics = ev.evaluate(predictions, labels, baseline=simulate(40, seed=0, distance=0.3)[0], phantom=True)
    report = ev.format_report(metrics)
    assert report == ev.format_report(json.loads(json.dumps(metrics)))
    for block in ("PREDICTION ANALYSIS", "OPTIMAL THRESHOLD", "THRESHOLD TABLE", "PERFORMANCE COMPARISON",
                  "COMPARISON WITH THE BASELINE", "SUCCESS CRITERIA"):
        assert block in report.splitlines()
    assert max(map(len, report.splitlines())) <= 100
    assert ev.PHANTOM_NOTE in report and "nan" not in report.lower().replace("no auroc", "")
    m = metrics["at_0.5"]
    rate, truth = f"{100 * m['positive_rate']:.1f} %", f"{100 * m['label_rate']:.1f} %"
    assert f"{rate} against {truth}" in report
    row = report.index("\nPositive rate "), report.index("\nLabel rate ")
    assert report[row[0] + 1 : row[1]].count("\n") == 0  # neighbours
    assert "No AUROC, only one class here: Coronary artery wall calcification" in report
    table = report[report.index("THRESHOLD TABLE") : report.index("PERFORMANCE COMPARISON")]
    assert "does not depend on a threshold" in table and table.count("AUROC") == 1
    assert ev.PHANTOM_NOTE not in ev.format_report(ev.evaluate(predictions, labels))


def test_baseline_must_cover_the_same_volumes():
    predictions, labels = simulate(10, seed=0)
    with pytest.raises(EvaluationError, match="no row for 2 of the 20 volumes.*first valid_1_a_1.nii.gz"):
        ev.evaluate(predictions, labels, baseline=predictions.iloc[2:])
    shuffled = ev.evaluate(predictions, labels, baseline=predictions.sample(frac=1, random_state=0))
    assert shuffled["baseline"]["at_0.5"] == shuffled["at_0.5"]


# ------------------------------------------------------------------------------------------------- tables and files


def test_tables_are_matched_by_column_name(tmp_path):
    predictions, labels = simulate(5, seed=0)
    shuffled = predictions[list(ABNORMALITIES)[::-1]].assign(comment="a, b").iloc[:, ::-1]
    shuffled.reset_index().iloc[:, ::-1].to_csv(tmp_path / "p.csv", index=False, encoding="utf-8-sig")
    pd.testing.assert_frame_equal(ev.load_predictions(tmp_path / "p.csv"), predictions)
    labels.astype(float).reset_index().to_csv(tmp_path / "l.csv", index=False)
    read = ev.load_labels(tmp_path / "l.csv")
    pd.testing.assert_frame_equal(read, labels)
    assert list(read.columns) == list(ABNORMALITIES) and (read.dtypes == np.int8).all()


def test_files_are_written_whole_and_read_back(tmp_path):
    predictions, labels = simulate(20, seed=0)
    history = [{"epoch": 1, "stage": "frozen", "train_loss": 0.6, "tuning_loss": 0.7, "tuning_auroc_macro": None,
                "positive_rate": 0.5, "label_rate": 0.2}]
    out = tmp_path / "new" / "folder"
    metrics = ev.evaluate(predictions, labels, output_dir=out, history=history)
    assert sorted(path.name for path in out.iterdir()) == [
        "metrics.json", "per_label.csv", "positive_rate.png", "predictions.csv", "roc.png", "threshold_sweep.png",
        "training_curves.png"]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    pd.testing.assert_frame_equal(ev.load_predictions(out / "predictions.csv"), predictions)
    table = pd.read_csv(out / "per_label.csv", index_col="label")
    assert list(table.index) == list(ABNORMALITIES)
    for name in ABNORMALITIES:
        assert table.loc[name, "f1"] == pytest.approx(metrics["per_label"][name]["f1"])
        assert table.loc[name, "recall_at_0.5"] == pytest.approx(metrics["per_label"][name]["at_0.5"]["recall"])
    for picture in out.glob("*.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10_000


HISTORY = [{"epoch": k, "stage": "frozen" if k < 3 else "unfrozen", "train_loss": 1 / k, "tuning_loss": 1.1 / k,
            "tuning_auroc_macro": auroc, "positive_rate": 0.3, "label_rate": 0.2}
           for k, auroc in enumerate((0.6, 0.75, None, 0.7), 1)]


@pytest.mark.parametrize("best, ringed", [(None, None), ((1, 1, 0, 0), (2, 0.75)), ((1, 1, 1, 0), None)])
def test_training_curves_ring_the_last_best_epoch(best, ringed):
    """Rows of an older log have no `best`; a best epoch may have no AUROC (the loss decided)."""
    rows = HISTORY if best is None else [
        row | {"best": bool(b), "open_layers": 0, "skipped_steps": 0} for row, b in zip(HISTORY, best, strict=True)]
    panels = ev.training_figure(rows).axes
    rings = [tuple(point) for ax in panels for ring in ax.collections for point in ring.get_offsets()]
    assert rings == ([ringed] if ringed else [])
    assert [len(ax.lines) for ax in panels] == [2, 1, 2]
    assert panels[1].lines[0].get_ydata() == pytest.approx([0.6, 0.75, np.nan, 0.7], nan_ok=True)


def test_training_curves_are_saved_while_a_run_goes_on(tmp_path):
    path = tmp_path / ev.TRAINING_CURVES
    sizes = []
    for phantom in (False, True):
        ev.write_training_figure(HISTORY[:1], path, phantom)
        picture = path.read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and list(tmp_path.iterdir()) == [path]
        sizes.append(int.from_bytes(picture[20:24], "big"))  # height, of the PNG's header
    assert sizes[1] > sizes[0]  # room for the note, below


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "metrics.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), ev.replacing(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


# ----------------------------------------------------------------------------------------------------------- script


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """p.csv, l.csv, and the working directory they lie in."""
    predictions, labels = simulate(12, seed=0)
    predictions.to_csv(tmp_path / "p.csv")
    labels.to_csv(tmp_path / "l.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(path, line, column, value):
    rows = [text.split(",") for text in path.read_text().splitlines()]
    rows[line - 1][column] = value
    path.write_text("\n".join(map(",".join, rows)) + "\n")


def copy_line(path):
    path.write_text(path.read_text() + path.read_text().splitlines()[2] + "\n")


BAD = {
    "probability above 1": ("p.csv", lambda f: edit(f, 3, 2, "1.5"),
                            "p.csv, line 3: found 1.5 for Arterial wall calcification of valid_1_a_2.nii.gz, expected"),
    "negative probability": ("p.csv", lambda f: edit(f, 3, 1, "-0.1"), "found -0.1 for Medical material"),
    "NaN": ("p.csv", lambda f: edit(f, 2, 1, "nan"), "line 2: found no number for Medical material"),
    "blank value": ("p.csv", lambda f: edit(f, 2, 1, ""), "line 2: found no number"),
    "text": ("p.csv", lambda f: edit(f, 2, 1, "high"), "line 2: found no number"),
    "infinite": ("p.csv", lambda f: edit(f, 2, 1, "inf"), "found inf"),
    "missing column": ("p.csv", lambda f: edit(f, 1, 3, "Cardio"), "found no column 'Cardiomegaly', expected"),
    "column twice": ("p.csv", lambda f: f.write_text(
        "\n".join(f"{line},{'Emphysema' if not k else 0}" for k, line in enumerate(f.read_text().splitlines()))),
        "found column 'Emphysema' twice"),
    "semicolons": ("p.csv", lambda f: f.write_text(f.read_text().replace(",", ";")), "commas separate"),
    "duplicate": ("p.csv", copy_line, "line 26: found valid_1_a_2.nii.gz again, expected one row"),
    "short row": ("p.csv", lambda f: f.write_text(f.read_text() + "valid_90_a_1.nii.gz,0.5\n"),
                  "line 26: found 2 values, expected 19"),
    "no name": ("p.csv", lambda f: edit(f, 4, 0, " "), "line 4: found no VolumeName"),
    "empty": ("p.csv", lambda f: f.write_text(""), "found an empty file"),
    "header only": ("p.csv", lambda f: f.write_text(f.read_text().splitlines()[0]), "no rows below the header"),
    "absent": ("p.csv", lambda f: f.unlink(), "found no readable file (No such file"),
    "a folder": ("p.csv", lambda f: (f.unlink(), f.mkdir()), "found no readable file"),
    "not a CSV": ("p.csv", lambda f: f.write_bytes(bytes(range(256)) * 9), "not text in columns"),
    "open quote": ("p.csv", lambda f: f.write_text(f.read_text() + '"open'), "not text in columns"),
    "label not binary": ("l.csv", lambda f: edit(f, 5, 4, "2"),
                         "l.csv, line 5: found 2 for Pericardial effusion of valid_2_a_2.nii.gz, expected 0 or 1"),
    "label missing": ("l.csv", lambda f: edit(f, 5, 4, ""), "line 5: found no number"),
    "prediction without label": ("l.csv", lambda f: edit(f, 2, 0, "valid_77_a_1.nii.gz"),
                                 "l.csv: found no row for 1 of the 24 volumes in p.csv, first valid_1_a_1.nii.gz"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tables, capsys):
    file, spoil, message = BAD[case]
    spoil(tables / file)
    assert ev.main(["--predictions", "p.csv", "--labels", "l.csv"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and message in printed.err and "expected" in printed.err
    assert not (tables / "results").exists()


@pytest.mark.parametrize("argv, message", [
    ([], "results: found no run"),
    (["--checkpoint", "nowhere"], "nowhere: found no such folder"),
    (["--checkpoint", "."], "found no predictions.csv with labels.csv"),
    (["--checkpoint", ".", "--labels", "l.csv"], "found --checkpoint with --labels"),
    (["--predictions", "p.csv"], "found --predictions without --labels"),
    (["--labels", "l.csv"], "found --labels without --predictions"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--tuning-labels", "l.csv"], "without --tuning-predictions"),
    (["--tuning-predictions", "p.csv", "--tuning-labels", "l.csv"], "found tuning tables only"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--baseline", "no.csv"], "no.csv: found no readable file"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--tuning-predictions", "p.csv", "--tuning-labels", "l.csv"],
     "12 tuning patients among the reported"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--output-dir", "p.csv"], "p.csv: found a place that cannot"),
])
def test_wrong_usage_is_one_line_and_exit_code_2(argv, message, tables, capsys):
    assert ev.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err and "expected" in printed.err


def run_script(*argv, cwd):
    return subprocess.run([sys.executable, str(SCRIPT), *argv], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_script_on_tables(tables):
    done = run_script("--predictions", "p.csv", "--labels=l.csv", "--baseline", "p.csv", "--output_dir=re_sults/x",
                      "--objective", "f1", cwd=tables)  # spaces and =, dashes and underscores
    assert done.returncode == 0, done.stderr
    assert "SUCCESS CRITERIA" in done.stdout and "Objective f1; fitted on 24 volumes of 12 patients." in done.stdout
    assert "Wrote re_sults/x" in done.stdout and "difference +0.0000" in done.stdout
    assert (tables / "re_sults" / "x" / "metrics.json").is_file()  # the flag's underscore is turned, the value's is not


def test_script_error_carries_no_traceback(tables):
    (tables / "p.csv").write_text("")
    done = run_script("--predictions", "p.csv", "--labels", "l.csv", cwd=tables)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: p.csv: found an empty file, expected") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [["--predictons", "p.csv"], ["--objective", "auroc"], ["stray"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        ev.main(argv)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1


def make_run(folder, phantom=True, seed=0):
    folder.mkdir(parents=True)
    for prefix, (predictions, labels) in {"": simulate(12, seed), "tuning_": simulate(12, seed + 1, first=50)}.items():
        predictions.assign(note=1).to_csv(folder / f"{prefix}predictions.csv")
        labels.to_csv(folder / f"{prefix}labels.csv")
    (folder / "run.json").write_text(json.dumps({"phantom": phantom}))
    lines = [json.dumps({"epoch": k, "stage": "frozen", "train_loss": 1 / k}) for k in (1, 2)]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"epoch": 3, "sta']))


def test_newest_run_is_evaluated_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("results/old"))
    make_run(Path("results/new"), seed=5)
    for path in Path("results/old").iterdir():
        os.utime(path, (1, 1))
    own = Path("results/new/predictions.csv").read_bytes()
    for slow in ("roc_figure", "sweep_figure"):  # drawn in the tests above
        monkeypatch.setattr(ev, slow, lambda *args: ev._new_figure(1, 1))
    assert ev.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith(f"Evaluating the newest run, {Path('results/new')}")
    assert ev.PHANTOM_NOTE in printed and "none of them reported here" in printed
    assert Path("results/new/training_curves.png").is_file()
    assert Path("results/new/predictions.csv").read_bytes() == own  # its other columns are kept
    assert not Path("results/old/metrics.json").exists()


def test_a_run_is_read_as_training_left_it(tmp_path):
    make_run(tmp_path / "run", phantom=False)
    predictions, labels, tuning, history, phantom = ev.run_predictions(tmp_path / "run")
    assert len(predictions) == len(labels) == len(tuning[0]) == len(tuning[1]) == 24
    assert [row["epoch"] for row in history] == [1, 2]  # the line cut off by an interruption is left out
    assert phantom is False
    (tmp_path / "run" / "log.jsonl").write_text('{"epoch": \n{"epoch": 2}\n')
    with pytest.raises(EvaluationError, match="log.jsonl, line 1: found no JSON"):
        ev.run_predictions(tmp_path / "run")
    (tmp_path / "run" / "labels.csv").unlink()
    with pytest.raises(EvaluationError, match="found no predictions.csv with labels.csv"):
        ev.run_predictions(tmp_path / "run")


def test_tables_of_a_phantom_run_stay_phantoms(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    monkeypatch.setattr(ev, "write_results", lambda *args: None)
    folder = str(tmp_path / "run")
    argv = ["--predictions", f"{folder}/predictions.csv", "--labels", f"{folder}/labels.csv"]
    assert ev.main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    assert ev.PHANTOM_NOTE in capsys.readouterr().out
