"""What reporting guidelines ask for: against scikit-learn on the known rows and on rows that are really drawn again,
and against hand-worked values.
"""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
from helpers_evaluation import simulate
from scipy.special import logit
from sklearn.linear_model import LogisticRegression

from ctclip.config import Settings, evaluation_parser
from ctclip.evaluation import bootstrap, clinical
from ctclip.evaluation import evaluate as ev
from ctclip.evaluation.calibration import fit_thresholds
from ctclip.evaluation.command import settings_from_flags
from ctclip.evaluation.metrics import Resamples, confusion_counts, drawn_once, ranking_columns, ranking_metrics
from ctclip.evaluation.render import format_report
from ctclip.evaluation.tables import rows_of
from ctclip.evaluation.thresholds import resampled_thresholds, tune_label_thresholds
from ctclip_model import UNKNOWN


def example(patients=60, seed=0, unknown=0.2):
    """Rows with unknown labels, and what was fitted on them."""
    predictions, labels = simulate(patients, seed=seed)
    hidden = np.random.default_rng(seed + 50).random(labels.shape) < unknown
    labels = labels.mask(hidden, UNKNOWN)
    rows = rows_of(predictions, labels, list(predictions.index))
    return rows, fit_thresholds(rows, None, Settings())


@pytest.fixture(scope="module")
def measured():
    rows, fitted = example()
    resamples = bootstrap.draw(rows.patients, 50)
    ranked = ranking_columns(rows.labels, rows.probabilities, resamples, specificities=clinical.SPECIFICITIES)
    sums = resamples.sums(confusion_counts(rows.labels, rows.probabilities >= fitted.thresholds))
    return rows, fitted, resamples, clinical.clinical_metrics(rows, fitted, ranked, sums, resamples, Settings())


def test_decisions_equal_scikit_learn_on_the_known_rows(measured):
    rows, fitted, _, found = measured
    decisions = rows.probabilities >= fitted.thresholds
    for j, name in enumerate(rows.findings):
        own = rows.labels[:, j] != UNKNOWN
        y, d = rows.labels[own, j], decisions[own, j]
        tn, fp, fn, tp = sk.confusion_matrix(y, d, labels=[0, 1]).ravel()
        row = found["per_label"][name]
        assert [row[key] for key in ("tp", "fp", "fn", "tn")] == [tp, fp, fn, tn]
        for key, top, bottom in (("sensitivity", tp, tp + fn), ("specificity", tn, tn + fp), ("ppv", tp, tp + fp),
                                 ("npv", tn, tn + fn)):
            assert row[key] == (pytest.approx(top / bottom) if bottom else None)
    known = rows.labels != UNKNOWN
    micro = sk.f1_score(rows.labels[known], decisions[known])
    assert found["summary"]["f1_micro"] == pytest.approx(micro)


def test_sensitivity_at_a_specificity_is_the_highest_that_the_roc_curve_has(measured):
    rows, _, resamples, found = measured
    j = 9
    own = rows.labels[:, j] != UNKNOWN
    draws = [np.repeat(np.arange(len(rows)), counts[resamples.group]) for counts in resamples.counts[:5]]
    columns = ranking_columns(rows.labels, rows.probabilities, resamples, specificities=(0.8, 0.95))
    values = [columns[f"sensitivity_at_specificity_{at}"] for at in ("0.80", "0.95")]
    for b, drawn in enumerate(draws):
        drawn = drawn[own[drawn]]
        fpr, tpr, _ = sk.roc_curve(rows.labels[drawn, j], rows.probabilities[drawn, j], drop_intermediate=False)
        for i, specificity in enumerate((0.8, 0.95)):
            assert values[i][b, j] == pytest.approx(tpr[fpr <= 1 - specificity + 1e-9].max())
    name = rows.findings[j]
    assert found["per_label"][name]["sensitivity_at_specificity_0.80"] == pytest.approx(values[0][0, j])


def test_ties_between_classes_count_as_alarms():
    labels, p = np.array([1, 0, 1, 0]), np.array([0.9, 0.9, 0.4, 0.1])
    once = Resamples(np.zeros(4, np.int64), np.ones((1, 1), np.int16))
    found = ranking_metrics(labels, p, once, specificities=(0.5, 0.9))
    assert found.sensitivities[:, 0].tolist() == [1.0, 0.0]


def test_calibration_of_the_reported_patients_is_a_logistic_regression(measured):
    rows, fitted, _, found = measured
    for j in (1, 9, 10):
        own = rows.labels[:, j] != UNKNOWN
        y, p = rows.labels[own, j], fitted.calibrated[own, j]
        fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit(p)[:, None], y)
        row = found["per_label"][rows.findings[j]]
        assert row["calibration_slope_calibrated"] == pytest.approx(fit.coef_[0, 0], abs=1e-4)
        assert row["calibration_intercept_calibrated"] == pytest.approx(fit.intercept_[0], abs=1e-4)
        assert row["observed_expected_calibrated"] == pytest.approx(y.mean() / p.mean())


def test_probabilities_that_are_too_extreme_have_a_slope_below_1():
    rng = np.random.default_rng(0)
    z = rng.normal(size=4000)
    y = (rng.random(4000) < 1 / (1 + np.exp(-z))).astype(int)[:, None]
    once = bootstrap.draw(np.arange(4000), 200)
    columns = clinical._calibration_columns(y, 1 / (1 + np.exp(-(2 * z + 1)))[:, None], once)
    assert columns["calibration_slope"][0, 0] == pytest.approx(0.5, abs=0.05)
    assert columns["calibration_in_the_large"][0, 0] < 0 and columns["observed_expected"][0, 0] < 1
    low, high = bootstrap.interval(columns["calibration_slope"][:, 0])
    assert low < 0.5 < high < 0.6


def test_one_step_of_a_resample_is_nearly_its_own_fit():
    rng = np.random.default_rng(1)
    x = rng.normal(size=600)
    y = (rng.random(600) < 1 / (1 + np.exp(-(0.8 * x - 0.5)))).astype(int)
    resamples = bootstrap.draw(np.arange(600), 20)
    column = x[:, None], y[:, None], np.ones((600, 1), bool)
    intercepts, slopes = (values[:, 0] for values in clinical._logistic_fits(*column, resamples, True))
    for b in range(1, 6):
        drawn = np.repeat(np.arange(600), resamples.counts[b])
        fit = LogisticRegression(C=np.inf, tol=1e-10).fit(x[drawn, None], y[drawn])
        assert slopes[b] == pytest.approx(fit.coef_[0, 0], abs=0.02)
        assert intercepts[b] == pytest.approx(fit.intercept_[0], abs=0.02)


def test_labels_that_are_perfectly_separated_have_no_slope():
    y = np.repeat([0, 1], 20)[:, None]
    columns = clinical._calibration_columns(y, np.repeat([0.1, 0.9], 20)[:, None], bootstrap.draw(np.arange(40), 5))
    assert np.isnan(columns["calibration_slope"]).all() and columns["observed_expected"][0, 0] == pytest.approx(1)


def test_net_benefit_by_hand():
    """Four known rows, two positive; at 0.2 (odds 1/4) three are called, two of them rightly."""
    labels, p = np.array([[1], [1], [0], [0], [UNKNOWN]]), np.array([[0.9], [0.3], [0.25], [0.1], [0.9]])
    once = drawn_once(labels)
    thresholds = np.array([0.2, 0.5])
    assert clinical.net_benefit(labels, p, thresholds, once).ravel() == pytest.approx([(2 - 1 / 4) / 4, 1 / 4])
    benefits, everybody = clinical.net_benefits(labels, p, once)
    assert benefits["0.20"][0, 0] == pytest.approx((2 - 1 / 4) / 4) and benefits["label_rate"][0, 0] == 1 / 4
    assert everybody["0.20"][0] == pytest.approx(0.5 - 0.5 / 4) and everybody["label_rate"][0] == 0
    for thresholds, one_class in (("label_rate", 1), ("label_rate", 0), ("0.10", 0)):
        benefits, everybody = clinical.net_benefits(np.full((3, 1), one_class), np.full((3, 1), 0.9), drawn_once(p[:3]))
        assert np.isfinite([benefits[thresholds][0, 0], everybody[thresholds][0]]).all()


def test_net_benefit_of_resamples_is_that_of_the_rows_drawn():
    rows, fitted = example(40)
    resamples = bootstrap.draw(rows.patients, 20)
    benefits, _ = clinical.net_benefits(rows.labels, fitted.calibrated, resamples)
    drawn = np.repeat(np.arange(len(rows)), resamples.counts[3][resamples.group])
    for j in range(3):
        own = drawn[rows.labels[drawn, j] != UNKNOWN]
        called, truth = fitted.calibrated[own, j] >= 0.2, rows.labels[own, j] == 1
        expected = ((called & truth).sum() - (called & ~truth).sum() / 4) / len(own)
        assert benefits["0.20"][3, j] == pytest.approx(expected)


def test_net_benefit_has_an_interval_where_enough_patients_would_be_acted_on():
    rows, fitted = example(120)
    resamples = bootstrap.draw(rows.patients, 30)
    ranked = ranking_columns(rows.labels, rows.probabilities, resamples, specificities=clinical.SPECIFICITIES)
    sums = resamples.sums(confusion_counts(rows.labels, rows.probabilities >= fitted.thresholds))
    found = clinical.clinical_metrics(rows, fitted, ranked, sums, resamples, Settings())
    few, given = ~bootstrap.enough_cases(rows.labels, rows.patients), []
    for j, name in enumerate(rows.findings):
        for threshold in clinical.NET_BENEFIT_AT:
            acted_on = (fitted.calibrated[:, j] >= threshold) & (rows.labels[:, j] != UNKNOWN)
            wanted = not few[j] and len(np.unique(rows.patients[acted_on])) >= bootstrap.MIN_CASES
            intervals = found["intervals"]["per_label"][name]["net_benefit"] or {}
            assert (intervals.get(f"{threshold:.2f}") is not None) == wanted
            given.append(wanted)
    assert any(given) and not all(given)


@pytest.mark.parametrize("objective", ["prevalence", "f1", "youden", "crg", "hamming", "sensitivity:0.9"])
def test_thresholds_of_the_table_itself_decide_as_the_tuned_ones_do_about_as_well(objective):
    rows, _ = example(unknown=0)
    once = Resamples(np.zeros(len(rows), np.int64), np.ones((1, 1), np.int16))
    found = resampled_thresholds(rows.labels, rows.probabilities, objective, None, once)[0]
    tuned = tune_label_thresholds(rows.labels, rows.probabilities, objective)
    rates = [(rows.probabilities >= cuts).mean(axis=0) for cuts in (found, tuned)]
    assert np.abs(rates[0] - rates[1]).max() < 0.15 and np.abs(rates[0] - rates[1]).mean() < 0.02


def test_thresholds_have_a_range_that_holds_the_threshold_and_shrinks_with_patients():
    widths = []
    for patients in (40, 400):
        rows, fitted = example(patients)
        low, high = clinical._threshold_spread(fitted, Settings())
        assert (low <= high).all()
        inside = (low <= fitted.calibration.thresholds) & (fitted.calibration.thresholds <= high)
        assert inside.mean() > 0.9
        widths.append(np.median(high - low))
    assert widths[1] < 0.6 * widths[0]


def test_no_intervals_with_few_cases_nor_for_predictive_values_of_few_calls(measured):
    predictions, labels = simulate(60, seed=0)
    labels["Emphysema"] = 0
    labels.iloc[:6, labels.columns.get_loc("Emphysema")] = 1
    predictions["Lung nodule"] *= 0.01
    metrics = ev.evaluate(predictions, labels, tuning=simulate(60, seed=1, first=500), resamples=100)
    intervals = metrics["clinical"]["intervals"]
    assert all(value is None for value in intervals["per_label"]["Emphysema"].values())
    assert intervals["per_label"]["Lung nodule"]["ppv"] is None
    known = intervals["per_label"]["Atelectasis"]
    assert known["ppv"] is not None and known["calibration_slope_calibrated"] is not None
    cross_fitted = ev.evaluate(predictions, labels, resamples=100)["clinical"]["intervals"]["per_label"]["Atelectasis"]
    assert cross_fitted["calibration_slope_calibrated"] is None is not cross_fitted["calibration_slope_uncalibrated"]
    assert intervals["summary"]["specificity_macro"] is None and intervals["summary"]["f1_micro"] is not None


def test_the_report_names_reference_standard_and_limits():
    metrics = ev.evaluate(*simulate(30, seed=0), resamples=100)
    text = " ".join(format_report(metrics).split())
    assert "CT-RATE's own were taken from radiology reports by a text classifier" in text
    assert "nothing here says how the model does in another hospital" in text and "micro F1" in text
    own = simulate(30, seed=0)
    own = [table.rename(index=lambda name: f"site_{name}") for table in own]
    assert "labels as they were given" in ev.evaluate(*own, resamples=100)["reference_standard"]
    args = evaluation_parser().parse_args(["--reference-standard", " Two readers,\n by consensus. "])
    stated = ev._reference_standard(None, None, settings_from_flags(args))
    assert stated == "Reference standard, as stated for this evaluation: Two readers, by consensus."
    assert "exact by construction" in ev.evaluate(*simulate(30, seed=0), phantom=True, resamples=100)[
        "reference_standard"]


def test_groups_are_compared_with_the_largest_on_the_same_resamples():
    predictions, labels = simulate(120, seed=0)
    sexes = {name: {"PatientSex": "F" if int(name.split("_")[1]) % 3 else "M"} for name in predictions.index}
    metrics = ev.evaluate(predictions, labels, metadata=sexes, resamples=100)
    women, men = sorted(metrics["subgroups"]["Sex"], key=lambda group: -group["n_patients"])
    assert "auroc_difference" not in women and men["auroc_difference"]["from"] == "female"
    low, high = men["auroc_difference"]["interval"]
    assert low < men["auroc_difference"]["difference"] < high
    assert "Compared: 1 difference, not corrected" in " ".join(format_report(metrics).split())
