"""Calibration: the fit against scikit-learn's logistic regression, every threshold objective against an
exhaustive search by scikit-learn, and the promises: monotone, so that no AUROC of a label moves; honest on patients not
seen.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers_evaluation import RATES, rows, sigmoid, simulate, with_ties
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from ctclip.config import Settings
from ctclip.evaluation import calibration as cal
from ctclip.evaluation import evaluate as ev
from ctclip.evaluation import tables as tables_module
from ctclip.evaluation import thresholds as th
from ctclip.evaluation.metrics import (
    ABNORMALITIES,
    EvaluationError,
    calibration_columns,
    compute_metrics,
    lacks_a_class,
)
from ctclip.evaluation.render import format_report
from ctclip.evaluation.tables import row_keys

NAMES = list(ABNORMALITIES)


def fitted(predictions, labels, **kwargs):
    r = rows(predictions, labels)
    return cal.fit_calibration(r.labels, r.probabilities, r.patients, **kwargs)


def over_predictor(n_patients, seed, **kwargs):
    """Probabilities that are too high, and of different spread per label."""
    predictions, labels = simulate(n_patients, seed, **kwargs)
    z = cal.logit(predictions.to_numpy()) * np.linspace(0.3, 1.5, 18) + np.linspace(0.5, 2.5, 18)
    return predictions.copy().assign(**dict(zip(NAMES, sigmoid(z).T, strict=True))), labels


# -------------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("method", ["platt", "temperature"])
def test_slopes_without_a_common_one_are_logistic_regression_on_platts_targets(method, monkeypatch):
    monkeypatch.setattr(cal, "SLOPE_PRIOR_SD", 1e4)
    predictions, labels = over_predictor(60, seed=0)
    calibration = fitted(predictions, labels, method=method)
    for j in range(18):
        y, x = labels.to_numpy()[:, j], cal.compressed_logit(predictions.to_numpy()[:, [j]])
        positives = y.sum() / 2  # two volumes share the weight of their patient
        high, low = (positives + 1) / (positives + 2), 1 / (60 - positives + 2)
        t = np.where(y == 1, high, low)
        # cross entropy with soft targets: each row once as a positive of weight t, once as a negative of weight 1 - t
        model = LogisticRegression(C=np.inf, fit_intercept=method == "platt", tol=1e-10, max_iter=10_000)
        model.fit(np.concatenate([x, x]), np.repeat([1, 0], len(y)), sample_weight=np.concatenate([t, 1 - t]))
        slope, intercept = model.coef_[0, 0], model.intercept_[0] if method == "platt" else 0
        if slope < 0:  # worse than chance here: the best that does not turn the ranking round is a constant
            slope, intercept = 0, cal.logit(t.mean()) if method == "platt" else 0
        assert calibration.slope[j] == pytest.approx(slope, rel=2e-3, abs=1e-3)
        assert calibration.intercept[j] == pytest.approx(intercept, abs=5e-3)


def test_the_fit_is_the_minimum_of_what_it_says_it_minimises():
    from scipy.optimize import minimize

    predictions, labels = over_predictor(40, seed=1)
    y, x = labels.to_numpy(), cal.compressed_logit(predictions.to_numpy())
    calibration = fitted(predictions, labels, method="platt")
    positives = y.sum(axis=0) / 2
    t = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (40 - positives + 2))

    def entropy(slope, intercept, j):
        z = slope * x[:, j] + intercept
        return 0.5 * (np.logaddexp(0, z) - t[:, j] * z).sum()

    def shared(v):
        prior = v[0] ** 2 / (2 * cal.COMMON_SLOPE_PRIOR_SD**2)
        return sum(entropy(np.exp(v[0]), v[1 + j], j) for j in range(18)) + prior

    common = minimize(shared, np.zeros(19), method="BFGS").x[0]
    for j in (0, 5, 17):
        def own(v, j=j):
            return entropy(np.exp(v[0]), v[1], j) + (v[0] - common) ** 2 / (2 * cal.SLOPE_PRIOR_SD**2)

        best = minimize(own, [common, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
        assert own([np.log(calibration.slope[j]), calibration.intercept[j]]) == pytest.approx(best.fun, rel=1e-6)


def test_rare_labels_borrow_the_common_slope(monkeypatch):
    """All labels have the same true slope; one of 25 patients has label 0. Alone, its slope is far off."""
    off = {}
    for spread in (1e4, cal.SLOPE_PRIOR_SD):
        monkeypatch.setattr(cal, "SLOPE_PRIOR_SD", spread)
        errors = []
        for seed in range(6):
            predictions, labels = simulate(25, seed)
            labels.iloc[:, 0] = 0
            labels.iloc[2 * seed : 2 * seed + 2, 0] = 1
            slope = np.log(fitted(predictions, labels, method="platt").slope)
            errors.append(abs(slope[0] - np.median(slope[9:])))
        off[spread] = np.mean(errors)
    assert off[cal.SLOPE_PRIOR_SD] < 0.5 * off[1e4]


@pytest.mark.parametrize("case", ["reversed", "separated", "all positive", "all negative", "constant", "saturated"])
def test_no_input_gives_a_slope_or_intercept_that_is_no_number(case):
    predictions, labels = simulate(20, seed=3)
    name = NAMES[4]
    if case == "reversed":
        predictions[name] = 1 - predictions[name]
    elif case == "separated":
        predictions[name] = np.where(labels[name] == 1, 0.9, 0.1)
    elif case.startswith("all"):
        labels[name] = int(case == "all positive")
    elif case == "constant":
        predictions[name] = 0.7
    else:
        predictions[name] = np.round(predictions[name])  # exact zeros and ones
    for method in ("platt", "temperature"):
        calibration = fitted(predictions, labels, method=method)
        assert (calibration.slope > 0).all() and np.isfinite(calibration.intercept).all()
        q = calibration.apply(predictions.to_numpy())[:, 4]
        assert ((q >= 0) & (q <= 1)).all()
        if case.startswith("all") and method == "platt":
            assert abs(q.mean() - labels[name].mean()) < 0.1


@pytest.mark.parametrize("method", ["platt", "temperature", "auto"])
def test_auroc_of_every_label_is_the_same_before_and_after(method):
    """Also for values packed near 0 and 1, as float32 sigmoids leave them, and for ties."""
    rng = np.random.default_rng(0)
    predictions, labels = over_predictor(100, seed=0)
    y = labels.to_numpy()
    calibration = fitted(predictions, labels, method=method)
    steep = cal.Calibration(**{**calibration.__dict__, "slope": calibration.slope * 40})
    given = predictions.to_numpy()
    packed = sigmoid((14 * rng.normal(size=given.shape)).astype(np.float32)).astype(np.float64)
    for p in (given, np.round(given, 2), packed):
        for fit in (calibration, steep):
            for after in (fit.apply(p), fit.rescale_to_half(p)):
                assert ((after >= 0) & (after <= 1)).all()
                for j in range(18):
                    assert sk.roc_auc_score(y[:, j], after[:, j]) == sk.roc_auc_score(y[:, j], p[:, j])
                    order = np.argsort(p[:, j])
                    assert (np.diff(after[order, j]) >= 0).all()
                    assert len(np.unique(after[:, j])) == len(np.unique(p[:, j]))


def test_calibrated_probabilities_mean_what_they_say_on_unseen_patients():
    calibration = fitted(*over_predictor(300, seed=0))
    unseen, labels = over_predictor(1500, seed=1)
    y, p = labels.to_numpy(), unseen.to_numpy()
    q = calibration.apply(p)
    assert calibration.method == "platt" and (p >= 0.5).mean() > 0.8
    assert abs(q.mean(axis=0) - y.mean(axis=0)).max() < 0.05 and abs(q.mean() - y.mean()) < 0.01
    assert calibration_columns(y, q)["ece"].mean() < 0.04 < 0.4 < calibration_columns(y, p)["ece"].mean()
    assert cal.log_loss(y, q) == pytest.approx(sk.log_loss(y.ravel(), q.ravel()), abs=1e-9)
    assert cal.log_loss(y, q) < cal.log_loss(y, p)


def logits_with_true_posterior(n_patients, seed):
    """Predictions that are calibrated as they are: the posterior of the two normals that simulate draws from."""
    predictions, labels = simulate(n_patients, seed)
    score, d = cal.logit(predictions.to_numpy()), 0.954
    return predictions, labels, d * score - d**2 / 2 + cal.logit(RATES)


@pytest.mark.parametrize("slope, shift, expected", [(1, 0, "none"), (3, 0, "temperature"), (1, 2, "platt")])
def test_auto_takes_the_method_that_the_predictions_need(slope, shift, expected):
    predictions, labels, z = logits_with_true_posterior(300, seed=5)
    table = predictions.assign(**dict(zip(NAMES, sigmoid(slope * z + shift).T, strict=True)))
    calibration = fitted(table, labels)
    assert calibration.method == expected == min(calibration.losses, key=calibration.losses.get)
    assert set(calibration.losses) == set(cal.METHODS)


def test_cross_validated_losses_are_of_patients_that_were_not_fitted_on():
    """Labels that have nothing to do with the predictions: a fit that saw them would beat their own base rate."""
    predictions, labels = simulate(12, seed=0)
    rng = np.random.default_rng(0)
    labels[:] = np.repeat(rng.random((12, 18)) < 0.5, 2, axis=0).astype(np.int8)
    assert fitted(predictions, labels).losses["platt"] > np.log(2)


def test_moving_to_another_prevalence():
    """Elkan's correction: odds times the ratio of prior odds; and what it is for: calibrated at the new rate."""
    tuning = over_predictor(300, seed=0)
    rates = {name: float(r) for name, r in zip(NAMES, np.clip(RATES * 2, 0, 0.6), strict=True)}
    plain, moved = fitted(*tuning, method="platt"), fitted(*tuning, method="platt", prevalence=rates)
    p = np.full((1, 18), 0.7)
    before, after = cal.logit(plain.apply(p)), cal.logit(moved.apply(p))
    y = tuning[1].to_numpy()
    k = y.sum(axis=0) / 2  # patients; what Platt's targets come to on average is the rate that is moved from
    mean = (k * (k + 1) / (k + 2) + (300 - k) / (300 - k + 2)) / 300
    expected = cal.logit(np.array(list(rates.values()))) - cal.logit(mean)
    np.testing.assert_allclose(after - before, expected[None], atol=1e-9)
    # a cohort with those rates: patients drawn from a large one by their labels' odds
    predictions, labels = over_predictor(6000, seed=1)
    rng = np.random.default_rng(2)
    for j, name in list(enumerate(NAMES))[4:8]:
        y = labels[name].to_numpy()
        keep = rng.random(len(y)) < np.where(y == 1, 1, RATES[j] * (1 - rates[name]) / (rates[name] * (1 - RATES[j])))
        assert y[keep].mean() == pytest.approx(rates[name], abs=0.02)
        assert moved.apply(predictions.to_numpy())[keep, j].mean() == pytest.approx(rates[name], abs=0.03)
        assert abs(plain.apply(predictions.to_numpy())[keep, j].mean() - rates[name]) > 0.04
        positive = predictions[name].to_numpy()[keep] >= moved.thresholds[j]
        assert positive.mean() == pytest.approx(rates[name], abs=0.04)
        assert abs((predictions[name].to_numpy()[keep] >= plain.thresholds[j]).mean() - rates[name]) > 0.04


def test_the_tuning_patients_own_prevalence_changes_next_to_nothing():
    tuning = over_predictor(300, seed=0)
    own = dict(zip(NAMES, tuning[1].mean(), strict=True))
    plain, moved = fitted(*tuning), fitted(*tuning, prevalence=own)
    assert abs(moved.shift).max() < 0.05 and np.array_equal(moved.thresholds, plain.thresholds)


@pytest.mark.parametrize("positives", [0, 1, 3])
def test_rare_labels_are_moved_to_the_prevalence_asked_for_too(positives):
    predictions, labels = simulate(300, seed=0)
    labels.iloc[:, 0] = 0
    labels.iloc[: 2 * positives, 0] = 1
    moved = fitted(predictions, labels, method="platt", prevalence={NAMES[0]: 0.3})
    assert moved.apply(predictions.to_numpy())[:, 0].mean() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("decimals", [0, 1, 2, 3])
def test_rounded_probabilities_are_calibrated_too(decimals):
    """Rounding makes zeros and ones, whose plain logits no slope could move."""
    tuning, (unseen, labels) = simulate(200, seed=0, shift=2.2), simulate(400, seed=1, shift=2.2, first=900)
    exact, rounded = fitted(*tuning), fitted(tuning[0].round(decimals), tuning[1])
    assert rounded.method == "platt"
    y = labels.to_numpy()
    q, reference = rounded.apply(unseen.round(decimals).to_numpy()), exact.apply(unseen.to_numpy())
    assert abs(q.mean() - y.mean()) < 0.02
    assert cal.log_loss(y, q) < cal.log_loss(y, reference) + (0.09 if decimals == 0 else 0.04)
    assert cal.log_loss(y, q) < cal.log_loss(y, np.broadcast_to(y.mean(axis=0), y.shape)) + 0.002


def test_a_calibration_is_read_back_as_it_was_written(tmp_path):
    calibration = fitted(*simulate(20, seed=0), objective="f1", prevalence={"Emphysema": 0.3}, unit="scan")
    calibration.save(tmp_path / "calibration.json")
    read = cal.load_calibration(tmp_path / "calibration.json")
    for key, value in calibration.__dict__.items():
        assert np.array_equal(getattr(read, key), value), key


def test_decisions_are_the_same_on_both_scales_of_the_file(tmp_path):
    """Probabilities calibrated and then written as text, against the calibrated thresholds of the JSON file."""
    tuning, (unseen, _) = simulate(60, seed=0, shift=2.2), simulate(200, seed=1, shift=2.2, first=900)
    calibration = fitted(*tuning, method="platt", objective="f1", prevalence={"Emphysema": 0.05})
    calibration.save(tmp_path / "calibration.json")
    rows = json.loads((tmp_path / "calibration.json").read_text())["per_label"]
    uncalibrated, calibrated = (np.array([row[f"threshold_{scale}"] for row in rows.values()])
                                for scale in ("uncalibrated", "calibrated"))
    tables_module.write_table(tmp_path / "p.csv", unseen.index, calibration.apply(unseen.to_numpy()))
    values = tables_module.load_predictions(tmp_path / "p.csv").to_numpy()
    decisions = unseen.to_numpy() >= uncalibrated
    assert np.array_equal(values >= calibrated, decisions)
    assert (decisions != (values >= uncalibrated)).mean() > 0.05, "nothing would show a mistaken scale"


def test_a_calibration_of_an_earlier_version_is_read(tmp_path):
    calibration = fitted(*simulate(20, seed=0), method="platt")
    content = calibration.content()
    for key in ("scale", "prevalence"):
        del content[key]
    content["global_threshold"] = content.pop("global_threshold_uncalibrated")
    for row in content["per_label"].values():
        row["threshold"] = row.pop("threshold_uncalibrated")
        del row["threshold_calibrated"]
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    read = cal.load_calibration(tmp_path / "calibration.json")
    for key, value in calibration.__dict__.items():
        assert np.array_equal(getattr(read, key), value), key
    assert np.array_equal(read.calibrated_thresholds, calibration.calibrated_thresholds)


@pytest.mark.parametrize("spoil, message", [
    (lambda c: c.pop("per_label"), "found no calibration"),
    (lambda c: c["per_label"].update(Emphysema=c["per_label"].pop("Emphysema")), "18 abnormalities in another order"),
    (lambda c: c["per_label"].clear(), "its labels are none"),
    (lambda c: c["per_label"]["Emphysema"].update(slope=-1), "slope not above 0"),
    (lambda c: c["per_label"]["Emphysema"].update(intercept="x"), "found no calibration"),
    (lambda c: c["per_label"]["Emphysema"].update(threshold_uncalibrated=-5), "threshold in it is not in"),
    (lambda c: c.update(global_threshold_uncalibrated=2), "threshold in it is not in"),
    (lambda c: c.clear(), "found no calibration"),
])
def test_a_spoiled_calibration_is_refused_in_one_line(spoil, message, tmp_path):
    path = tmp_path / "calibration.json"
    fitted(*simulate(5, seed=0)).save(path)
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match=message) as error:
        cal.load_calibration(path)
    assert "\n" not in str(error.value) and "expected" in str(error.value)
    with pytest.raises(EvaluationError, match="no readable file"):
        cal.load_calibration(tmp_path / "absent.json")


@pytest.mark.parametrize("text, message", [
    ('{"Emphysema": 0.2}', None), ('{"Emphysema": 1.2}', "Emphysema: 1.2"), ('{"Emphysem": 0.2}', "may be 'Emphysema'"),
    ("[0.2]", "names no label"), ("{}", "names no label"), ('{"Emphysema": true}', "Emphysema: True"),
    ("{", "found no rates"), ('{"Emphysema": 0}', "Emphysema: 0"), ('{"Emphysema": 1}', "Emphysema: 1"),
    ('{"Emphysema": 1e-320}', "Emphysema: 1e-320.*from 0.000001 to 0.999999"), ('{"Emphysema": NaN}', "Emphysema: nan"),
    ('{"Emphysema": 0.2, "Emphysema": 0.3}', "the key 'Emphysema' twice"),
])
def test_prevalence_files(text, message, tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(text)
    if message is None:
        assert cal.read_prevalence(str(path)) == {"Emphysema": 0.2}
        return
    with pytest.raises(EvaluationError, match=message) as error:
        cal.read_prevalence(str(path))
    assert "\n" not in str(error.value)


def test_prevalence_of_ct_rate_is_known():
    assert list(cal.read_prevalence("ct-rate")) == NAMES
    with pytest.raises(EvaluationError, match="no readable file"):
        cal.read_prevalence("nowhere.json")


# ------------------------------------------------------------------------------------------------- the map onto 0.5


@pytest.mark.parametrize("cut", [0.0, 1e-9, 0.19, 0.5, 0.97, 1 - 1e-12, 1.0, np.nextafter(1, 2)])
def test_the_map_decides_at_half_as_the_cut_did(cut):
    near = [cut, np.nextafter(cut, 0), np.nextafter(cut, 1)]
    p = np.unique(np.clip(np.concatenate([np.random.default_rng(0).random(500), near, [0, 1, 0.5]]), 0, 1))
    mapped = th.rescale_to_half(p, np.array(cut))
    assert np.array_equal(mapped >= 0.5, p >= cut)
    assert ((mapped >= 0) & (mapped <= 1)).all() and (np.diff(mapped) >= 0).all()


def test_the_map_gives_the_tuned_metrics_at_half():
    tuning, (predictions, labels) = over_predictor(100, seed=0), over_predictor(200, seed=1, first=500)
    calibration = fitted(*tuning, objective="f1")
    mapped = calibration.rescale_to_half(predictions.to_numpy())
    y = labels.to_numpy()
    assert compute_metrics(y, mapped) == pytest.approx(
        compute_metrics(y, predictions.to_numpy(), calibration.thresholds)
        | {"auroc_micro": sk.roc_auc_score(y.ravel(), mapped.ravel())}, abs=1e-12)


# ------------------------------------------------------------------------------------------------------- thresholds

def crg_sum(y, d, rate):
    r = (1 - rate) / (2 * rate)
    return (r * (y & d).sum() - r * (y & ~d).sum() - (~y & d).sum()) / len(y)


def most_specific(y, d, floor=0.8):
    found = sk.recall_score(y, d)
    return 1 + sk.recall_score(1 - y, ~d) if found >= floor else found


SCORES = {  # by scikit-learn, for one label
    "f1": lambda y, d, rate: sk.f1_score(y, d, zero_division=0),
    "prevalence": lambda y, d, rate: -abs(d.mean() - y.mean()),
    "hamming": lambda y, d, rate: sk.accuracy_score(y, d),
    "youden": lambda y, d, rate: sk.recall_score(y, d) + sk.recall_score(1 - y, ~d) - 1,
    "crg": lambda y, d, rate: crg_sum(y.astype(bool), d, rate),
    "sensitivity:0.8": lambda y, d, rate: most_specific(y, d),
}


def test_every_objective_is_checked_here():
    assert {name.partition(":")[0] for name in SCORES} == {*th.OBJECTIVES, "sensitivity"}


@pytest.mark.parametrize("objective", SCORES)
def test_label_thresholds_reach_the_best_score_there_is(objective):
    y, p = with_ties(3)
    cuts = th.tune_label_thresholds(y, p, objective)
    score = SCORES[objective]
    for j in range(0, 18, 3):
        best = max(score(y[:, j], p[:, j] >= cut, y.mean()) for cut in (*np.unique(p[:, j]), 2.0))
        assert score(y[:, j], p[:, j] >= cuts[j], y.mean()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("objective", SCORES)
def test_global_threshold_reaches_the_best_score_there_is(objective):
    y, p = with_ties(4)

    def score(cut):
        d = p >= cut
        if objective == "prevalence":  # pooled: one rate for all decisions
            return -abs(d.mean() - y.mean())
        if objective.startswith("sensitivity"):  # means over the labels, then the floor
            found = np.mean([sk.recall_score(y[:, j], d[:, j]) for j in range(18)])
            kept = np.mean([sk.recall_score(1 - y[:, j], ~d[:, j]) for j in range(18)])
            return 1 + kept if found >= 0.8 else found
        return np.mean([SCORES[objective](y[:, j], d[:, j], y.mean()) for j in range(18)])

    assert len(np.unique(p)) < 15
    best = max(score(cut) for cut in (*np.unique(p), 2.0))
    assert score(th.tune_global_threshold(y, p, objective)) == pytest.approx(best, abs=1e-12)


def test_cuts_for_crg_reach_the_best_pooled_crg_there_is():
    """Label by label, though CRG is pooled: no other cut of any label, with the others kept, gives a better one."""
    y, p = with_ties(5)
    cuts = th.tune_label_thresholds(y, p, "crg")
    best = compute_metrics(y, p, cuts)["crg"]
    for j in range(18):
        for cut in (*np.unique(p[:, j]), 2.0):
            other = cuts.copy()
            other[j] = cut
            assert compute_metrics(y, p, other)["crg"] <= best + 1e-12
    assert best > compute_metrics(y, p, th.tune_global_threshold(y, p, "crg"))["crg"] > 1 / 3


def test_on_calibrated_probabilities_crg_cuts_at_the_pooled_prevalence():
    """Within what the sampling of the data leaves: the gain is flat around its best cut."""
    _, labels, z = logits_with_true_posterior(4000, seed=0)
    y, q = labels.to_numpy(), sigmoid(z)
    assert th.tune_global_threshold(y, q, "crg") == pytest.approx(y.mean(), abs=0.02)


@pytest.mark.parametrize("floor", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("spelled", ["sensitivity:{}", "sensitivity>={}", "sensitivity={}"])
def test_sensitivity_is_reached_and_hardly_more(floor, spelled):
    predictions, labels = simulate(200, seed=0)
    y, p = labels.to_numpy(), predictions.to_numpy()
    cuts = th.tune_label_thresholds(y, p, spelled.format(floor))
    for j in range(18):
        found = sk.recall_score(y[:, j], p[:, j] >= cuts[j])
        assert floor <= found < floor + 2.5 / y[:, j].sum() or found == 1 == floor


@pytest.mark.parametrize("name", ["auroc", "sensitivity", "sensitivity:0", "sensitivity:1.5", "sensitivity:-1", ""])
def test_an_unknown_objective_is_refused(name):
    with pytest.raises(EvaluationError, match="expected one of prevalence"):
        th.tune_label_thresholds(*with_ties(), objective=name)


def test_cuts_divide_ties_never_and_reach_both_ends():
    values = np.array([0.2, 0.2, 0.4, np.nextafter(0.4, 1), 1.0])
    cuts = th.candidate_thresholds(values)
    assert [int((values >= cut).sum()) for cut in cuts] == [5, 3, 2, 1, 0]
    assert cuts[1] == pytest.approx(0.3)
    assert [int((np.zeros(3) >= cut).sum()) for cut in th.candidate_thresholds(np.zeros(3))] == [3, 0]


def test_a_global_search_in_parts_is_the_whole_search():
    rng = np.random.default_rng(0)
    y, p = (rng.random((4000, 18)) < 0.2).astype(int), rng.random((4000, 18))  # 72,000 cuts: three parts
    assert (p >= th.tune_global_threshold(y, p, "prevalence")).sum() == y.sum()


def test_a_label_with_one_class_takes_the_global_threshold_and_is_named():
    predictions, labels = simulate(30, seed=1)
    labels["Emphysema"], labels["Cardiomegaly"] = 0, 1
    y, p = labels.to_numpy(), predictions.to_numpy()
    cuts = th.tune_label_thresholds(y, p, "f1")
    common = th.tune_global_threshold(y, p, "f1")
    named = [name for name, cut in zip(ABNORMALITIES, cuts, strict=True) if cut == common]
    assert named == ["Cardiomegaly", "Emphysema"] == [NAMES[j] for j in np.flatnonzero(lacks_a_class(y))]
    reported = simulate(30, seed=2, first=100)
    metrics = ev.evaluate(*reported, tuning=(predictions, labels))
    assert metrics["thresholds"]["took_global"] == named
    assert "so the global threshold: Cardiomegaly, Emphysema" in format_report(metrics)


# --------------------------------------------------------------------------------------------- fitted on other patients


def test_folds_cover_every_row_once_and_keep_patients_apart():
    predictions, _ = simulate(23, seed=0)
    patients = row_keys(predictions.index, "patient")
    folds = list(cal.cross_folds(patients))
    assert len(folds) == 5 and (sum(own.astype(int) for _, own in folds) == 1).all()
    for others, own in folds:
        assert own.any() and not (others & own).any() and (others | own).all()
        assert not set(patients[own]) & set(patients[others])


def test_what_a_patient_is_judged_by_does_not_depend_on_the_own_labels():
    r = rows(*simulate(20, seed=0))
    before = cal.fit_thresholds(r, None, Settings())
    for patient in np.unique(r.patients)[:4]:
        own = r.patients == patient
        labels = np.where(own[:, None], 1 - r.labels, r.labels)
        flipped = cal.fit_thresholds(replace(r, labels=labels), None, Settings())
        for name in ("calibrated", "thresholds", "global_thresholds"):
            assert np.array_equal(getattr(before, name)[own], getattr(flipped, name)[own]), name
            assert not np.array_equal(getattr(before, name), getattr(flipped, name)), name


def test_cross_fitting_does_not_depend_on_the_order_of_rows():
    predictions, labels = simulate(20, seed=0)
    order = np.random.default_rng(1).permutation(len(predictions))
    before = cal.fit_thresholds(rows(predictions, labels), None, Settings())
    after = cal.fit_thresholds(rows(predictions.iloc[order], labels), None, Settings())
    for name in ("thresholds", "global_thresholds"):
        assert np.array_equal(getattr(after, name), getattr(before, name)[order])
    np.testing.assert_allclose(after.calibrated, before.calibrated[order], atol=1e-6)


def test_one_patient_cannot_be_cross_fitted():
    with pytest.raises(EvaluationError, match="1 patient only .valid_1."):
        ev.evaluate(*simulate(1, seed=0))
