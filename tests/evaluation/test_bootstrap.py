"""Intervals, differences and subgroups: every resample against scikit-learn on rows that are really drawn again; the
width of intervals against DeLong's; the jackknife against scipy's t-tests; corrected p-values against hand-worked ones.
"""

import numpy as np
import pytest
from helpers_evaluation import both_classes, decided, rows, simulate, with_ties
from scipy import stats
from sklearn import metrics as sk

from ctclip.evaluation import bootstrap as boot
from ctclip.evaluation import metrics as cm
from ctclip.evaluation import subgroups as sub
from ctclip.evaluation.metrics import ABNORMALITIES, EvaluationError

NAMES = list(ABNORMALITIES)


def cohort(ties=True, n_patients=40, seed=0):
    """(labels, probabilities, patients): one to three volumes a patient, one label with one class."""
    rng = np.random.default_rng(seed)
    y, p = with_ties(seed, n=3 * n_patients)
    if not ties:
        p = np.clip(p + 1e-3 * rng.normal(size=p.shape), 0, 1)
    y[:, 7] = 0
    return y, p, rng.integers(0, n_patients, len(y))


@pytest.mark.parametrize("ties", [True, False])
def test_every_resample_is_what_scikit_learn_says_of_the_rows_drawn(ties):
    y, p, patients = cohort(ties)
    resamples = boot.draw(patients, 40, seed=3)
    ranking, ranked = cm.resampled_ranking(y, p, resamples)
    summary, columns = cm.resampled_decisions(y, p >= 0.5, resamples)
    assert summary.keys() | ranking.keys() == set(cm.compute_metrics(y, p))
    for b, counts in enumerate(resamples.counts.astype(int)):
        drawn = np.repeat(np.arange(len(y)), counts[resamples.group])
        Y, P = y[drawn], p[drawn]
        two = both_classes(Y)
        auroc = [sk.roc_auc_score(Y[:, j], P[:, j]) for j in two]
        np.testing.assert_allclose(ranked["auroc"][b, two], auroc, atol=1e-12)
        expected = [sk.average_precision_score(Y[:, j], P[:, j]) for j in two]
        np.testing.assert_allclose(ranked["average_precision"][b, two], expected, atol=1e-12)
        one = [j for j in range(18) if j not in two]
        assert 7 in one and all(np.isnan(column[b, one]).all() for column in ranked.values())
        assert ranking["auroc_macro"][b] == pytest.approx(np.mean(auroc), abs=1e-12)
        assert ranking["auroc_micro"][b] == pytest.approx(sk.roc_auc_score(Y.ravel(), P.ravel()), abs=1e-12)
        reference = decided(Y, (P >= 0.5).astype(int))
        assert {key: values[b] for key, values in summary.items()} == pytest.approx(reference, abs=1e-12)
        for key, values in cm.resampled_decisions(Y, P >= 0.5, cm.drawn_once(Y))[1].items():
            np.testing.assert_allclose(columns[key][b], values[0], atol=1e-12)


def test_resampled_brier_scores():
    y, p, patients = cohort()
    resamples = boot.draw(patients, 30)
    tree = boot.resampled_brier(y, p, resamples)
    for b, counts in enumerate(resamples.counts.astype(int)):
        drawn = np.repeat(np.arange(len(y)), counts[resamples.group])
        np.testing.assert_allclose(tree[b], ((p - y)[drawn] ** 2).mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("copies", [1, 2])
def test_the_calibration_error_that_a_finite_table_shows_of_itself(copies):
    """The mean over many tables whose labels are drawn from the probabilities, once for all copies of a row."""
    rng = np.random.default_rng(0)
    p = np.repeat(rng.beta(1, 4, size=(150, 18)), copies, axis=0)
    group = np.repeat(np.arange(150), copies)
    observed = [cm.calibration_columns((rng.random((150, 18))[group] < p).astype(np.int8), p)["ece"].mean()
                for _ in range(100)]
    assert boot.ece_if_calibrated(p, np.ones(p.shape, bool), group) == pytest.approx(np.mean(observed), rel=0.03)
    many = np.repeat(p, 10, axis=0)
    assert boot.ece_if_calibrated(many, np.ones(many.shape, bool), np.arange(1500 * copies)) < 0.5 * np.mean(observed)


def test_patients_are_drawn_not_volumes():
    patients = np.repeat(["b", "a", "c"], [5, 1, 2])
    resamples = boot.draw(patients, 200, seed=1)
    assert resamples.counts.shape == (201, 3) and (resamples.counts[0] == 1).all()  # the first is the table itself
    assert (resamples.counts.sum(axis=1) == 3).all() and (resamples.counts.max(axis=1) > 1).any()
    assert resamples.group.tolist() == [1] * 5 + [0] + [2] * 2
    assert np.array_equal(boot.draw(patients[::-1], 200, seed=1).counts, resamples.counts)
    assert not np.array_equal(boot.draw(patients, 200, seed=2).counts, resamples.counts)
    with pytest.raises(EvaluationError, match="found 0 resamples"):
        boot.draw(patients, 0)


def test_copies_of_volumes_do_not_make_an_interval_shorter():
    predictions, labels = simulate(60, seed=0)
    r = rows(predictions, labels)
    once = boot.draw(r.patients, 300)
    thrice = boot.draw(np.repeat(r.patients, 3), 300)
    for resampled in (cm.resampled_ranking, lambda y, p, draws: cm.resampled_decisions(y, p >= 0.5, draws)):
        first, _ = resampled(r.labels, r.probabilities, once)
        second, _ = resampled(np.repeat(r.labels, 3, 0), np.repeat(r.probabilities, 3, 0), thrice)
        assert first and set(first) == set(second)
        for key, values in first.items():
            assert boot.interval(second[key]) == pytest.approx(boot.interval(values), abs=1e-12)


def test_intervals_are_as_wide_as_delong_says():
    predictions, labels = simulate(150, seed=0)
    other = predictions.sample(frac=1, random_state=0).set_axis(predictions.index)
    r = rows(predictions, labels)
    draws = boot.draw(r.patients, 1000)
    first, second = (
        cm.resampled_ranking(r.labels, p.to_numpy(), draws)[0]["auroc_macro"] for p in (predictions, other)
    )
    difference, error = cm.auroc_difference(r.labels, predictions.to_numpy(), other.to_numpy(), r.patients)
    low, high = boot.interval(first - second)
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(difference, abs=0.3 * error)


def test_interval_by_hand_and_where_it_is_undefined():
    values = np.append(-1e9, np.arange(1001.0))  # the first is the value itself
    assert boot.interval(values) == pytest.approx([25, 975])
    values[1:41] = np.nan  # 4 % undefined: the rest speaks
    assert boot.interval(values) == pytest.approx([40 + 0.025 * 960, 40 + 0.975 * 960])
    values[1:61] = np.nan
    assert boot.interval(values) is None


def test_the_interval_of_a_share_by_hand():
    """0.8 has the logit log(4); the spread of these three logits is log(4) - log(2) = log(2)."""
    values = np.array([0.8, 2 / 3, 0.8, 8 / 9])
    half = np.log(2) * 1.959964
    expected = [1 / (1 + np.exp(half) / 4), 1 / (1 + np.exp(-half) / 4)]
    assert boot.logit_interval(values) == pytest.approx(expected, abs=1e-6)
    assert boot.label_intervals({"c": np.column_stack([values] * 18)}, NAMES)["Emphysema"]["c"] == pytest.approx(
        expected, abs=1e-6)
    many = np.append(0.8, np.tile([2 / 3, 0.8, 8 / 9], 100))
    assert boot.logit_interval(many) is not None
    many[1:20] = 1  # one in 16: the sample hardly shows what the metric can be
    assert boot.logit_interval(many) is None
    for edge in (0, 1, np.nan):  # and nothing of no width
        assert boot.logit_interval(np.full(50, edge)) is None


def test_the_jackknife_is_students_t_where_each_patient_has_one_row():
    """Hamming accuracy is then a mean of one value per patient; its difference, a mean of paired differences."""
    rng = np.random.default_rng(0)
    y, first, second = (rng.random((30, 18)) < share for share in (0.3, 0.4, 0.4))
    draws = boot.draw(np.arange(30), 5)
    own, other = ((y == decisions).mean(axis=1) for decisions in (first, second))
    left_out = [boot.left_out_decisions(y.astype(np.int8), decisions, draws)["hamming_accuracy"]
                for decisions in (first, second)]
    low, high = stats.ttest_1samp(own, 0).confidence_interval(0.95)
    assert boot.jackknife_interval(own.mean(), left_out[0]) == pytest.approx([low, high])
    test = stats.ttest_rel(own, other)
    assert boot.jackknife_difference(own.mean() - other.mean(), left_out[0] - left_out[1]) == {
        "difference": pytest.approx(own.mean() - other.mean()), "p": pytest.approx(test.pvalue),
        "interval": pytest.approx(list(test.confidence_interval(0.95)))}
    same = boot.jackknife_difference(0, left_out[0] - left_out[0])
    assert same == {"difference": 0, "interval": [0, 0], "p": 1}


def test_each_patient_is_left_out_with_all_rows():
    y, p, patients = cohort()
    draws = boot.draw(patients, 3)
    left_out = cm.jackknifed_decisions(y, p >= 0.5, draws)
    for k, patient in enumerate(np.unique(patients)):
        rest = patients != patient
        expected = decided(y[rest], (p[rest] >= 0.5).astype(int))
        assert {key: values[k] for key, values in left_out.items()} == pytest.approx(expected, abs=1e-12)


def test_the_jackknifes_standard_error_by_hand():
    """Values 1 to 10 without a patient: mean 5.5, sum of squares 82.5; 9 / 10 of it is the variance."""
    assert boot.jackknife_error(np.arange(1.0, 11)) == pytest.approx(np.sqrt(0.9 * 82.5))
    assert boot.jackknife_error(np.arange(9.0)) is None  # too few patients
    assert boot.jackknife_error(np.append(np.arange(10.0), np.nan)) is None
    assert boot.jackknife_interval(0.5, np.full(10, 0.5)) is None  # nothing of no width
    assert boot.jackknife_interval(0.99, 0.9 + np.arange(10) / 100)[1] == 1
    untested = boot.jackknife_difference(0.25, np.full(10, np.nan))
    assert untested == {"difference": 0.25, "interval": None, "p": None}


@pytest.mark.parametrize("called, right, without", [
    (10, 10, set()), (9, 10, {"f1_macro", "precision_macro"}), (10, 9, {"exact_match"})])
def test_macro_metrics_of_labels_hardly_ever_called_positive_have_no_interval(called, right, without):
    patients = np.repeat(np.arange(40), 2)
    decisions = np.tile(np.arange(80)[:, None] % 4 < 2, (1, 18))
    decisions[:, 5] = np.isin(patients, np.arange(called)) & (np.arange(80) % 2 == 0)
    y = decisions.astype(np.int8)
    y[:, 0] = np.where(patients < right, y[:, 0], 1 - y[:, 0])  # others have no row that is right throughout
    y[0, 1] = 1 - y[0, 1]
    draws = boot.draw(patients, 5)
    assert boot.called_patients(y, decisions, draws).tolist() == [20] * 5 + [called] + [20] * 12
    left_out = boot.left_out_decisions(y, decisions, draws)
    assert {key for key, values in left_out.items() if np.isnan(values).any()} == without
    alone = boot.left_out_decisions(y, decisions, cm.drawn_once(y))
    assert all(np.isnan(values).all() for values in alone.values())


def test_difference_by_hand():
    draws = np.concatenate([np.full(990, 0.2), np.full(9, -0.1)])
    assert boot.difference(np.append(0.8 - 0.7, draws)) == {
        "difference": pytest.approx(0.1), "interval": [0.2, 0.2], "p": pytest.approx(2 * 10 / 1000)}
    assert boot.difference(np.full(1000, 0.3))["p"] == pytest.approx(2 / 1000)
    assert boot.difference(np.zeros(1000))["p"] == 1
    undefined = {"difference": None, "interval": None, "p": None}
    assert boot.difference(np.append(np.nan, np.zeros(9))) == undefined
    assert boot.difference(np.append(0, np.full(9, np.nan))) == undefined


def test_p_says_what_the_interval_says():
    rng = np.random.default_rng(0)
    for _ in range(200):
        row = boot.difference(rng.normal(rng.normal(0, 2), 1, size=1000))
        low, high = row["interval"]
        assert (row["p"] < 0.05) == (low > 0 or high < 0) or abs(row["p"] - 0.05) < 0.003


def test_equals_are_told_apart_at_most_as_often_as_promised():
    """Two equally good predictions of 100 cohorts: p below 0.05 in about one of twenty."""
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        y = (rng.random(80) < 0.4).astype(int)
        first, second = 0.8 * y + rng.normal(size=(2, 80))
        draws = boot.draw(np.arange(80), 200, seed)
        one, other = (cm.ranking_metrics(y, s, draws).auroc for s in (first, second))
        hits += boot.difference(one - other)["p"] < 0.05
    assert 1 <= hits <= 11


def test_holm_by_hand():
    assert boot.holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert boot.holm([0.5, 0.9]) == [1, 1]
    assert boot.holm([None]) == [None]
    rows = boot.label_differences(np.full((1000, 18), 0.1), NAMES)
    assert all(row["p_corrected"] == pytest.approx(18 * 2 / 1000) for row in rows.values()) and list(rows) == NAMES


def test_labels_with_too_few_patients_of_either_class():
    patients = np.repeat(np.arange(30), 2)
    y = np.zeros((60, 18), np.int8)
    y[:20, 0], y[:18, 1], y[:40, 2], y[:42, 3], y[:20:2, 4] = 1, 1, 1, 1, 1
    assert np.flatnonzero(boot.enough_cases(y, patients)).tolist() == [0, 2, 4]  # 10; 9; 10 without; 9 without; 10


# --------------------------------------------------------------------------------------------------------- subgroups


@pytest.mark.parametrize("row, expected", [
    ({"PatientSex": "F", "PatientAge": "039Y", "Manufacturer": "A", "SliceThickness": "1.0"},
     ("female", "under 40", "A", "up to 1 mm")),
    ({"PatientSex": "m", "PatientAge": "040Y", "Manufacturer": "", "SliceThickness": "", "ZSpacing": "1.5"},
     ("male", "40 to 59", "not stated", "over 1 to 2 mm")),
    ({"PatientSex": "O", "PatientAge": "074Y", "ZSpacing": "2.5"},
     ("not stated", "60 to 74", "not stated", "over 2 to 4 mm")),
    ({"PatientAge": "075Y", "ZSpacing": "5"}, ("not stated", "75 and older", "not stated", "over 4 mm")),
    ({"PatientAge": "018M", "ZSpacing": "nan"}, ("not stated", "under 40", "not stated", "not stated")),
    ({"PatientAge": "old", "ZSpacing": "-1"}, ("not stated",) * 4),
    ({"PatientAge": "61"}, ("not stated", "60 to 74", "not stated", "not stated")),
    ({}, ("not stated",) * 4),
    ({"PatientSex": "Female", "PatientAge": "045Y"}, ("female", "40 to 59", "not stated", "not stated")),
    ({"PatientSex": " MALE", "PatientAge": "45.0"}, ("male", "40 to 59", "not stated", "not stated")),
    ({"PatientSex": "Ma", "PatientAge": "120 y"}, ("not stated", "75 and older", "not stated", "not stated")),
    ({"PatientAge": "999Y"}, ("not stated", "not stated (above 120 years given)", "not stated", "not stated")),
    ({"PatientAge": "1900"}, ("not stated", "not stated (above 120 years given)", "not stated", "not stated")),
    ({"PatientAge": "\u0664\u0665"}, ("not stated",) * 4),
])
def test_attributes_of_a_metadata_row(row, expected):
    assert tuple(sub.attributes(row).values()) == expected


def test_a_manufacturer_is_one_group_however_it_is_spelled():
    r = rows(*simulate(3, seed=0))
    makers = ["SIEMENS", "Siemens", "Siemens", "Siemens  Healthineers", "siemens", "siemens healthineers"]
    metadata = {name: {"Manufacturer": maker} for name, maker in zip(r.names, makers, strict=True)}
    groups = sub.row_attributes(r, list(r.names), metadata)
    assert [group["Manufacturer"] for group in groups] == [
        "Siemens", "Siemens", "Siemens", "Siemens  Healthineers", "Siemens", "Siemens  Healthineers"]
    by_patient = rows(*simulate(3, seed=0), unit="patient")
    groups = sub.row_attributes(by_patient, list(r.names), metadata)
    assert [group["Manufacturer"] for group in groups] == ["Siemens", "several", "several"]


def test_subgroups_are_the_metrics_of_their_rows():
    predictions, labels = simulate(120, seed=0)
    labels.iloc[:100, 9] = 0
    r = rows(predictions, labels)
    decisions = r.probabilities >= 0.6
    kinds = np.where(np.arange(240) < 100, "one", np.where(np.arange(240) < 204, "two", "tiny"))
    groups = [{"Sex": kind, "Age": "same"} for kind in kinds]
    draws = boot.draw(r.patients, 100)
    found = sub.subgroup_metrics(r, decisions, groups, draws)
    assert [(g["group"], g["n_rows"], g["n_patients"], g["too_small"]) for g in found["Sex"]] == [
        ("two", 104, 52, False), ("one", 100, 50, False), ("tiny", 36, 18, True)]
    assert "auroc_macro" not in found["Sex"][2] and found["Sex"][2]["n_positives"] == labels.iloc[204:].to_numpy().sum()
    for group in found["Sex"][:2]:
        own = kinds == group["group"]
        y, p = r.labels[own], r.probabilities[own]
        enough = [j for j in range(18) if min(y[:, j].sum(), (1 - y[:, j]).sum()) >= 20]  # of ten patients
        assert (9 in enough) == (group["group"] == "two") and len(enough) == group["auroc_labels"] < 18
        assert group["auroc_macro"] == pytest.approx(np.mean([sk.roc_auc_score(y[:, j], p[:, j]) for j in enough]))
        everyone = [sk.roc_auc_score(r.labels[:, j], r.probabilities[:, j]) for j in enough]
        assert group["auroc_everyone"] == pytest.approx(np.mean(everyone))
        reference = decided(y, decisions[own].astype(int))
        for key in sub.GROUP_METRICS:
            assert group[key] == pytest.approx(reference[key])
            low, high = group["intervals"][key]
            assert low < group[key] < high
    whole = found["Age"][0]
    assert whole["n_rows"] == 240 and whole["positive_rate"] == pytest.approx(decisions.mean())
    left_out = boot.left_out_decisions(r.labels, decisions, draws)["f1_macro"]
    assert whole["intervals"]["f1_macro"] == boot.jackknife_interval(whole["f1_macro"], left_out)
