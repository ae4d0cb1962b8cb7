"""Evaluation: every number of metrics.json recomputed by another route, thresholds and calibration that never see the
patients they are reported on, success criteria, and files that are written whole.
"""

import json

import numpy as np
import pandas as pd
import pytest
from helpers_evaluation import decided, ranked, simulate
from scipy import special, stats
from sklearn import metrics as sk

from ctclip.config import SYNTHETIC_NOTE, Settings
from ctclip.evaluation import calibration as cal
from ctclip.evaluation import evaluate as ev
from ctclip.evaluation import figures
from ctclip.evaluation import tables as tables_module
from ctclip.evaluation import thresholds as th
from ctclip.evaluation.bootstrap import holm
from ctclip.evaluation.metrics import ABNORMALITIES, EvaluationError, bin_index
from ctclip.evaluation.render import format_report
from ctclip.evaluation.summary import format_summary
from ctclip.evaluation.tables import Rows, row_keys
from ctclip.fileio import replacing

NAMES = list(ABNORMALITIES)
FEW = {"resamples": 20}  # where intervals are not what a test is about


def settings(**kwargs):
    return Settings(**(FEW | kwargs))


def test_reported_labels_never_reach_the_thresholds():
    reported, tuning = simulate(40, seed=0), simulate(40, seed=1, first=100)
    before = ev.evaluate(*reported, tuning=tuning, **FEW)
    shuffled = reported[1].sample(frac=1, random_state=0).set_axis(reported[1].index)
    after = ev.evaluate(reported[0], shuffled, tuning=tuning, **FEW)
    assert after["thresholds"] == before["thresholds"]
    assert after["tuned"]["positive_rate"] == before["tuned"]["positive_rate"]
    assert after["tuned"]["hamming_accuracy"] != before["tuned"]["hamming_accuracy"]


def test_tuning_patients_among_the_reported_are_refused_by_name():
    with pytest.raises(EvaluationError, match="found 2 tuning patients among the reported ones .'valid_4', 'valid_5'."):
        ev.evaluate(*simulate(5, seed=0), tuning=simulate(5, seed=1, first=4))


def test_one_tuning_patient_is_refused_and_few_are_said():
    reported = simulate(30, seed=0)
    with pytest.raises(EvaluationError, match="found tuning volumes of 1 patient only .valid_100."):
        ev.evaluate(*reported, tuning=simulate(1, seed=1, first=100))
    for patients in (2, cal.FEW_PATIENTS - 1, cal.FEW_PATIENTS):
        metrics = ev.evaluate(*reported, tuning=simulate(patients, seed=1, first=100), **FEW)
        for text in (format_report(metrics), format_summary(metrics)):
            said = f"are fitted on {patients} patients only" in " ".join(text.split())
            assert said == (patients < cal.FEW_PATIENTS)


@pytest.mark.parametrize("with_tuning", [True, False])
def test_an_over_predictor_becomes_honest_on_unseen_patients(with_tuning):
    reported = simulate(500, seed=0, shift=2.2)
    tuning = simulate(200, seed=1, shift=2.2, first=1000) if with_tuning else None
    metrics = ev.evaluate(*reported, tuning=tuning, **FEW)
    half, tuned = metrics["at_0.5"], metrics["tuned"]
    assert half["auroc_macro"] == pytest.approx(0.75, abs=0.02)
    assert half["positive_rate"] == pytest.approx(0.97, abs=0.02)
    assert abs(tuned["positive_rate"] - tuned["label_rate"]) < 0.02
    assert tuned["auroc_macro"] == half["auroc_macro"] and tuned["auroc_micro"] == half["auroc_micro"]
    assert tuned["f1_macro"] > half["f1_macro"] + 0.05 and tuned["hamming_accuracy"] > half["hamming_accuracy"] + 0.4


def drawn_rows(patients, resamples, seed=0):
    """Row numbers of every resample, written out: patients in sorted order are drawn, with all of their rows."""
    unique = np.unique(patients)
    counts = np.random.default_rng(seed).multinomial(len(unique), np.full(len(unique), 1 / len(unique)), resamples)
    return [np.repeat(np.arange(len(patients)), row[np.searchsorted(unique, patients)]) for row in counts]


def percentiles(values):
    """[low, high] as metrics.json has them, from one value per resample (None where undefined)."""
    known = [value for value in values if value is not None]
    if len(known) < 0.95 * len(values):
        return None
    return list(np.quantile(known, (0.025, 0.975)))


def logit_interval(values):
    """[low, high] of a share from the share itself and its resamples."""
    inside = [value for value in values[1:] if value is not None and 0 < value < 1]
    if values[0] is None or not 0 < values[0] < 1 or len(inside) < max(2, 0.95 * (len(values) - 1)):
        return None
    half = stats.norm.ppf(0.975) * np.std(special.logit(inside), ddof=1)
    return list(special.expit(special.logit(values[0]) + np.array([-half, half])))


def patients_left_out(patients):
    """Row numbers without one patient after the other."""
    return [np.flatnonzero(patients != patient) for patient in np.unique(patients)]


def jackknife(value, left_out):
    """(value, standard error, [low, high]) by Student's t."""
    n = len(left_out)
    error = np.sqrt((n - 1) / n * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    half = stats.t.ppf(0.975, n - 1) * error
    return value, error, [value - half, value + half]


def jackknife_bounds(value, left_out):
    _, error, (low, high) = jackknife(value, left_out)
    return None if error < 1e-12 else [max(0, low), min(1, high)]


def without_interval(y, decisions, patients):
    """Metrics of all labels for which too few patients are called positive, or are right throughout."""
    called = min(len(set(patients[column])) for column in decisions.T)
    right = (y == decisions).all(axis=1)
    exact = min(len(set(patients[right])), len(set(patients[~right])))
    return {*(("f1_macro", "precision_macro") if called < 10 else ()), *(("exact_match",) if exact < 10 else ())}


def label_reference(y, p, decisions, j):
    two = 0 < y[:, j].sum() < len(y)
    return decided_label(y, decisions, j) | {
        "auroc": sk.roc_auc_score(y[:, j], p[:, j]) if two else None,
        "average_precision": sk.average_precision_score(y[:, j], p[:, j]) if two else None,
    }


def decided_label(y, decisions, j):
    """label_reference without the ranking."""
    y, d = y[:, j], decisions[:, j]
    precision, recall, f1, _ = sk.precision_recall_fscore_support(y, d, average="binary", zero_division=0)
    return {"precision": precision, "recall": recall, "f1": f1, "accuracy": sk.accuracy_score(y, d),
            "positive_rate": d.mean(), "label_rate": y.mean()}  # fmt: skip


def errors_reference(y, p):
    """Brier score, calibration error and mean probability, (18,) each."""
    ece = [sum(abs((p - y)[bin_index(p[:, j]) == k, j].sum()) for k in range(10)) / len(y) for j in range(18)]
    brier = [sk.brier_score_loss(y[:, j], p[:, j], pos_label=1) for j in range(18)]
    return {"brier": np.array(brier), "ece": np.array(ece), "mean": p.mean(axis=0)}


def sets_reference(y, p, q, cuts, one):
    micro = {"calibrated": {"auroc_micro": sk.roc_auc_score(y.ravel(), q.ravel())}}
    ranking = ranked(y, p)
    decisions = decisions_reference(y, p, q, cuts, one)
    return {name: row | ranking | micro.get(name, {}) for name, row in decisions.items()}


def decisions_reference(y, p, q, cuts, one):
    """sets_reference without AUROCs, which take ten times as long and have no jackknife."""
    none = {"auroc_macro": np.nan, "auroc_micro": np.nan}
    made = {"at_0.5": p >= 0.5, "calibrated": q >= 0.5, "tuned": p >= cuts, "tuned_global": p >= one}
    return {name: none | decided(y, d.astype(int)) for name, d in made.items()}


def test_every_number_of_metrics_json():
    """The whole file, key by key, from scikit-learn on rows that are really drawn again; with a tuning set, a baseline,
    a one-class label, subgroups and a table that holds more volumes."""
    predictions, labels = simulate(40, seed=0)
    labels["Bronchiectasis"] = 0
    tuning, (other, _) = simulate(45, seed=1, first=100), simulate(40, seed=0, distance=0.2)
    extra = simulate(1, seed=9, first=900)
    metadata = {name: {"PatientSex": "F"} for name in predictions.index}
    metrics = ev.evaluate(predictions, pd.concat([labels, extra[1]]), tuning, pd.concat([other, extra[0]]),
                          metadata=metadata, resamples=5, allow_partial=True, objective="f1")
    stored = json.loads(json.dumps(metrics, allow_nan=False))  # the file's text, as a test below makes sure
    y, p, q = labels.to_numpy(), predictions.to_numpy(), other.to_numpy()
    patients = row_keys(predictions.index, "patient")
    fit_y, fit_p = tuning[1].to_numpy(), tuning[0].to_numpy()
    calibration = cal.fit_calibration(fit_y, fit_p, row_keys(tuning[0].index, "patient"), objective="f1")
    cuts, one = th.tune_label_thresholds(fit_y, fit_p, "f1"), th.tune_global_threshold(fit_y, fit_p, "f1")
    calibrated = calibration.apply(p)
    draws = drawn_rows(patients, 5)
    expected = sets_reference(y, p, calibrated, cuts, one)
    resampled = [sets_reference(y[i], p[i], calibrated[i], cuts, one) for i in draws]
    rest = [decisions_reference(y[i], p[i], calibrated[i], cuts, one) for i in patients_left_out(patients)]
    tuned, half = p >= cuts, p >= 0.5
    decisions = {"at_0.5": half, "calibrated": calibrated >= 0.5, "tuned": tuned, "tuned_global": p >= one}
    intervals = {name: {key: percentiles([r[name][key] for r in resampled]) if key.startswith("auroc") else
                        None if key in without_interval(y, decisions[name], patients) else
                        jackknife_bounds(row[key], [r[name][key] for r in rest]) for key in row}
                 for name, row in expected.items()}
    assert any(None in row.values() for row in intervals.values())
    rarely = {name: [label for label, column in zip(NAMES, made.T, strict=True) if len(set(patients[column])) < 10]
              for name, made in decisions.items()}
    assert 0 < len(rarely["tuned"]) < 18
    before, after = errors_reference(y, p), errors_reference(y, calibrated)
    slopes = {"slope": calibration.slope, "intercept": calibration.intercept, "shift": np.zeros(18)}
    per_label, bounds = {}, {}
    for j, name in enumerate(NAMES):
        again = [(label_reference(y[i], p[i], tuned[i], j), decided_label(y[i], half[i], j)) for i in draws]
        at_half = decided_label(y, half, j)
        per_label[name] = label_reference(y, p, tuned, j) | {
            "threshold": cuts[j], "positives": y[:, j].sum(), "known": len(y),
            "threshold_calibrated": cal.expit(calibration.slope[j] * cal.logit(cuts[j]) + calibration.intercept[j]),
            "at_0.5": at_half}
        cases = [len(set(patients[y[:, j] == value])) for value in (0, 1)]
        few = ("auroc", "average_precision", "precision", "recall", "f1") if min(cases) < 10 else ()
        never = ("precision", "f1", "positive_rate")
        bounds[name] = {key: logit_interval([per_label[name][key], *(row[key] for row, _ in again)])
                        if key not in few and not (key in never and name in rarely["tuned"]) else None
                        for key in again[0][0]}
        bounds[name]["at_0.5"] = {key: logit_interval([at_half[key], *(row[key] for _, row in again)])
                                  if key not in few and not (key in never and name in rarely["at_0.5"]) else None
                                  for key in at_half}
    keys = ("hamming_accuracy", "f1_macro", "precision_macro", "recall_macro", "positive_rate")
    claims = {"tuned": th.tune_label_thresholds(y, p, "f1"), "tuned_global": th.tune_global_threshold(y, p, "f1")}
    claimed = {name: decided(y, (p >= cut).astype(int)) for name, cut in claims.items()}
    optimism_keys = ("positive_rate", "hamming_accuracy", "f1_macro", "recall_macro", "crg")
    table = [(c / 20, decided(y, (p >= c / 20).astype(int))) for c in range(1, 20)]
    expected |= {
        "per_label": per_label,
        "calibration": {
            "method": "platt", "cross_validated_log_loss": calibration.losses,
            "before": {key: column.mean() for key, column in before.items()},
            "after": {key: column.mean() for key, column in after.items()},
            "per_label": {
                name: {key: column[j] for key, column in slopes.items()}
                | {f"{key}_before": column[j] for key, column in before.items()}
                | {f"{key}_after": column[j] for key, column in after.items()} for j, name in enumerate(NAMES)}},
        "thresholds": {
            "global": one, "per_label": dict(zip(NAMES, cuts, strict=True)),
            "per_label_calibrated": dict(zip(NAMES, cal.expit(
                calibration.slope * cal.logit(cuts) + calibration.intercept), strict=True)),
            "objective": "f1", "fitted_on": "tuning patients", "n_rows": 90, "n_volumes": 90, "n_patients": 45,
            "took_global": []},
        "optimism": {name: {"claimed": {key: row[key] for key in optimism_keys},
                            "honest": {key: expected[name][key] for key in optimism_keys}}
                     for name, row in claimed.items()},
        "undefined_auroc": ["Bronchiectasis"], "rarely_called": rarely, "n_rows": 80, "n_volumes": 80, "n_patients": 40,
        "unit": {"name": "volume", "how": "every reconstruction by itself, as the challenge counts",
                 "conflicting_labels": 0},
        "left_out": {"labels": 2, "baseline": 2}, "unknown_labels": {"decisions": 0, "volumes": 0},
        "volumes_without_patient": 0,
        "probabilities": {"min": p.min(), "max": p.max(), "mean": p.mean()},
        "threshold_table": [{"threshold": cut} | {key: row[key] for key in keys} for cut, row in table],
        "scale": "uncalibrated", "phantom": False, "note": None,
        "settings": {"objective": "f1", "calibration": "auto", "unit": "volume", "prevalence": None, "resamples": 5,
                     "seed": 0, "allow_partial": True, "reference_standard": None},
    }
    found = stored.pop("intervals")
    errors = found.pop("calibration")
    of_label = {name: {key: found["per_label"][name].pop(key) for key in
                       ("brier_before", "brier_after")} for name in NAMES}
    assert stored.pop("clinical")["per_label"].keys() == set(ABNORMALITIES)  # its values: test_clinical.py
    assert "CT-RATE" in stored.pop("reference_standard") and stored.pop("encoder_note") is None
    noise = {when: stored["calibration"][when].pop("ece_if_calibrated") for when in ("before", "after")}
    assert 0 < noise["after"] < stored["calibration"]["after"]["ece"]  # its value is checked in test_bootstrap
    assert_same(found, intervals | {"per_label": bounds})
    for when, values in (("before", p), ("after", calibrated)):
        again = np.array([errors_reference(y[i], values[i])["brier"] for i in draws])
        assert errors[when]["brier"] == pytest.approx(percentiles(list(again.mean(axis=1))), abs=1e-12)
        for j, name in enumerate(NAMES):
            expected_bounds = logit_interval([{"before": before, "after": after}[when]["brier"][j], *again[:, j]])
            assert of_label[name][f"brier_{when}"] == pytest.approx(expected_bounds, abs=1e-12)
    assert len(stored.pop("success_criteria")) == 7 and set(stored.pop("versions")) == {"ctclip", "python", "numpy"}
    baseline, subgroups = stored.pop("baseline"), stored.pop("subgroups")
    assert_same(stored, expected)
    assert list(subgroups) == ["Sex"] and subgroups["Sex"][0]["n_patients"] == 40  # its figures: test_bootstrap
    check_comparison(baseline, y, p, q, patients, draws)


def check_comparison(found, y, p, q, patients, draws):
    """Baseline and this one judged alike: cross-fitted; differences on the same draws."""
    names = np.array([f"{patient}_a_{k % 2}" for k, patient in enumerate(patients)])
    sides = {}
    for side, values in (("this", p), ("base", q)):
        made = Rows(names, patients, y, values, ABNORMALITIES, len(y))
        judged = cal.fit_thresholds(made, None, settings(objective="f1"))
        sides[side] = values, judged.calibrated, judged.thresholds
    every = [(sets_reference, i) for i in (slice(None), *draws)]
    every += [(decisions_reference, i) for i in patients_left_out(patients)]
    rows = {side: [measure(y[i], values[i], after[i], cuts[i], 0.5) for measure, i in every]
            for side, (values, after, cuts) in sides.items()}
    untested = {name: {key for values, _, cuts in sides.values()
                       for key in without_interval(y, values >= (0.5 if name == "at_0.5" else cuts), patients)}
                for name in ("at_0.5", "tuned")}
    family = []
    for name in ("at_0.5", "calibrated", "tuned"):
        assert_same(found[name], rows["base"][0][name])
        assert_same(found["this"][name], rows["this"][0][name])
        for key, row in found["differences"][name].items():
            gaps = [one[name][key] - other[name][key] for one, other in zip(rows["this"], rows["base"], strict=True)]
            row, place = dict(row), f"{name}/{key}"
            if name != "calibrated" and key != "label_rate" and not (name == "tuned" and key.startswith("auroc")):
                family.append((row["p"], row.pop("p_corrected")))
            if name == "calibrated" or key in untested[name]:
                assert_same(row, {"difference": gaps[0], "interval": None, "p": None}, place)
            elif key.startswith("auroc"):
                assert_same(row, difference_reference(gaps[:6]), place)
            else:
                value, error, bounds = jackknife(gaps[0], gaps[6:])
                p_value = 2 * stats.t.sf(abs(value) / error, len(gaps) - 7) if error > 1e-12 else 1
                assert_same(row, {"difference": value, "interval": bounds, "p": p_value}, place)
        assert set(found["differences"][name]) == set(found[name])
    assert len(family) == 16 and {p for p, _ in family} != {None}
    assert [corrected for _, corrected in family] == pytest.approx(holm([p for p, _ in family]))
    columns = {side: [[label_reference(y[i], values[i], values[i] >= cuts[i], j) for i in (slice(None), *draws)]
                      for j in range(0, 18, 4)] for side, (values, _, cuts) in sides.items()}
    per_label = found["differences"]["per_label"]
    assert set(per_label) == {"auroc", "average_precision", "precision", "recall", "f1", "accuracy", "positive_rate"}
    for key, by_label in per_label.items():
        for k, name in enumerate(NAMES[::4]):
            row = dict(by_label[name])
            corrected = row.pop("p_corrected")
            pairs = zip(columns["this"][k], columns["base"][k], strict=True)
            gaps = [None if one[key] is None or other[key] is None else one[key] - other[key] for one, other in pairs]
            few = min(len(set(patients[y[:, 4 * k] == value])) for value in (0, 1)) < 10 and key in ev.NEED_CASES
            called = [len(set(patients[values[:, 4 * k] >= cuts[:, 4 * k]])) for values, _, cuts in sides.values()]
            if few or (min(called) < 10 and key in ev.NEED_CALLED):
                gaps[1:] = [None] * 5
            assert_same(row, difference_reference(gaps), f"{key}/{name}")
            assert (corrected is None) == (row["p"] is None) and (corrected is None or corrected >= row["p"])
    assert per_label["auroc"]["Bronchiectasis"]["difference"] is found["auroc_per_label"]["Bronchiectasis"] is None
    assert found["auroc_per_label"]["Emphysema"] == pytest.approx(sk.roc_auc_score(y[:, 7], q[:, 7]))
    assert found["fitted_on"] == "cross-fitted by patient" and found["source"] == "a table given in memory"


def difference_reference(gaps):
    """`gaps`: the difference itself, then one per resample."""
    bounds = percentiles(gaps[1:])
    if gaps[0] is None or bounds is None:
        return {"difference": None, "interval": None, "p": None}
    known = np.array([gap for gap in gaps[1:] if gap is not None])
    known[abs(known) < 1e-12] = 0  # differences that are rounding only
    tail = min((known <= 0).sum(), (known >= 0).sum())
    return {"difference": gaps[0], "interval": bounds, "p": min(1, 2 * (tail + 1) / (len(known) + 1))}


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


def test_a_baseline_without_tuning_patients_is_compared_alike():
    """Without tuning patients this one's own cross-fitted figures are the ones compared."""
    predictions, labels = simulate(20, seed=0)
    metrics = ev.evaluate(predictions, labels, baseline=simulate(20, seed=0, distance=0.3)[0], **FEW)
    assert metrics["baseline"]["this"]["tuned"] == metrics["tuned"]
    assert metrics["intervals"]["calibrated"]["recall_macro"] is None  # the maps follow the reported patients
    assert metrics["intervals"]["calibrated"]["hamming_accuracy"] is not None
    same = ev.evaluate(predictions, labels, baseline=predictions.sample(frac=1, random_state=0), **FEW)["baseline"]
    assert same["at_0.5"] == same["this"]["at_0.5"]
    for block in ("at_0.5", "calibrated", "tuned"):
        assert {row["p"] for key, row in same["differences"][block].items()} <= {1, None}
        assert same["differences"][block]["hamming_accuracy"]["p"] == (None if block == "calibrated" else 1)


# ------------------------------------------------------------------------------------------------- what is printed


def criteria_of(half, tuned, phantom, note=None):
    base = {"label_rate": 0.2, "auroc_macro": 0.74, "hamming_accuracy": 0.81, "positive_rate": 0.2}
    metrics = {"at_0.5": base | half, "tuned": base | tuned, "phantom": phantom, "note": note,
               "per_label": dict.fromkeys(ABNORMALITIES)}
    rows = ev.success_criteria(metrics)
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
    simulated = criteria_of({}, {}, False, "Simulated predictions")[1]
    assert len(simulated) == 5 and "AUROC" not in str(simulated)  # nothing published is about them
    over = criteria_of({"positive_rate": 0.97}, {"positive_rate": 0.25, "hamming_accuracy": 0.8}, True)[0]
    assert over == [True, False, False, False, True, False]
    assert criteria_of({}, {"positive_rate": 0.005}, True)[0][4] is False


def test_report_blocks_width_and_rates_side_by_side():
    predictions, labels = simulate(40, seed=0, shift=2.2)
    labels["Coronary artery wall calcification"] = 0
    metrics = ev.evaluate(predictions, labels, baseline=simulate(40, seed=0, distance=0.3)[0], phantom=True, **FEW)
    report = format_report(metrics)
    assert report == format_report(json.loads(json.dumps(metrics)))
    for block in ("PREDICTION ANALYSIS", "CALIBRATION", "OPTIMAL THRESHOLD", "THRESHOLD TABLE",
                  "PERFORMANCE COMPARISON", "COMPARISON WITH THE BASELINE", "SUCCESS CRITERIA"):
        assert block in report.splitlines()
    assert max(map(len, report.splitlines())) <= 100
    assert SYNTHETIC_NOTE in report and "nan" not in report.lower().replace("no auroc", "")
    m = metrics["at_0.5"]
    rate, truth = f"{100 * m['positive_rate']:.1f} %", f"{100 * m['label_rate']:.1f} %"
    assert f"{rate} against {truth}" in report
    row = report.index("\nPositive rate "), report.index("\nLabel rate ")
    assert report[row[0] + 1 : row[1]].count("\n") == 0  # neighbours
    assert "No AUROC, only one class here: Coronary artery wall calcification" in report
    table = report[report.index("THRESHOLD TABLE") : report.index("PERFORMANCE COMPARISON")]
    assert "does not depend on a threshold" in table and table.count("AUROC") == 1
    assert SYNTHETIC_NOTE not in format_report(ev.evaluate(predictions, labels, **FEW))


def test_baseline_must_cover_the_same_volumes():
    predictions, labels = simulate(10, seed=0)
    with pytest.raises(EvaluationError, match="no row for 2 of the 20 volumes.*first valid_1_a_1.nii.gz"):
        ev.evaluate(predictions, labels, baseline=predictions.iloc[2:])


def test_groups_too_small_are_said_to_be():
    predictions, labels = simulate(60, seed=0)
    metadata = {name: {"PatientSex": "M" if k < 100 else "F"} for k, name in enumerate(predictions.index)}
    report = format_report(ev.evaluate(predictions, labels, metadata=metadata, **FEW))
    lines = report[report.index("SUBGROUPS") :].splitlines()
    assert any(line.split()[:2] == ["male", "50"] and "(" in line for line in lines)
    assert any(line.split() == ["female", "10", "too", "few", "patients"] for line in lines)
    assert max(map(len, report.splitlines())) <= 100


# ------------------------------------------------------------------------------------------------------------- files


def test_files_are_written_whole_and_read_back(tmp_path):
    predictions, labels = simulate(20, seed=0)
    history = [{"epoch": 1, "stage": "frozen", "train_loss": 0.6, "tuning_loss": 0.7, "tuning_auroc_macro": None,
                "positive_rate": 0.5, "label_rate": 0.2}]
    out = tmp_path / "new" / "folder"
    metrics = ev.evaluate(predictions, labels, output_dir=out, history=history, **FEW)
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.json", "files.jsonl", "metrics.json", "net_benefit.png", "per_label.csv", "positive_rate.png",
        "precision_recall.png", "predictions.csv", "reliability.png", "report.html", "report.txt", "roc.png",
        "threshold_sweep.png", "training_curves.png"]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    pd.testing.assert_frame_equal(tables_module.load_predictions(out / "predictions.csv"), predictions)
    table = pd.read_csv(out / "per_label.csv", index_col="label")
    assert list(table.index) == list(ABNORMALITIES)
    for name in ABNORMALITIES:
        assert table.loc[name, "f1"] == pytest.approx(metrics["per_label"][name]["f1"])
        assert table.loc[name, "recall_at_0.5"] == pytest.approx(metrics["per_label"][name]["at_0.5"]["recall"])
    for picture in out.glob("*.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10_000


def test_curves_are_those_of_scikit_learn_and_figures_share_nothing_but_their_axes():
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 2)) < 0.4).astype(int)
    p = np.round(0.6 * rng.random(labels.shape) + 0.3 * labels, 2)  # with ties
    captions = {key: {"A": f"{key} A", "B": f"{key} B"} for key in figures.LABEL_PLOTS}
    curves, titles = {}, {}
    for key, figure in figures.label_figures(labels, p, p, captions):
        curves[key] = [ax.lines[-1].get_xydata() for ax in figure.axes]
        titles[key] = [ax.get_title() for ax in figure.axes]
        assert {len(ax.lines) for ax in figure.axes} == {5 if key == "reliability" else 2}
    for j in range(2):
        fpr, tpr, _ = sk.roc_curve(labels[:, j], p[:, j], drop_intermediate=False)
        np.testing.assert_allclose(curves["roc"][j], np.column_stack([fpr, tpr]))
        precision, recall, _ = sk.precision_recall_curve(labels[:, j], p[:, j])
        found = np.column_stack([recall, precision])[recall > 0]
        np.testing.assert_allclose(curves["precision_recall"][j], [*found, (0, found[-1, 1])])
        assert all(titles[key][j].endswith(f"{key} {'AB'[j]}") for key in titles)


HISTORY = [{"epoch": k, "stage": "frozen" if k < 3 else "unfrozen", "train_loss": 1 / k, "tuning_loss": 1.1 / k,
            "tuning_auroc_macro": auroc, "positive_rate": 0.3, "label_rate": 0.2}
           for k, auroc in enumerate((0.6, 0.75, None, 0.7), 1)]


@pytest.mark.parametrize("best, ringed", [(None, None), ((1, 1, 0, 0), (2, 0.75)), ((1, 1, 1, 0), None)])
def test_training_curves_ring_the_last_best_epoch(best, ringed):
    """Rows of an older log have no `best`; a best epoch may have no AUROC (the loss decided)."""
    rows = HISTORY if best is None else [
        row | {"best": bool(b), "open_layers": 0, "skipped_steps": 0} for row, b in zip(HISTORY, best, strict=True)]
    panels = figures.training_figure(rows).axes
    rings = [tuple(point) for ax in panels for ring in ax.collections for point in ring.get_offsets()]
    assert rings == ([ringed] if ringed else [])
    assert [len(ax.lines) for ax in panels] == [2, 1, 2]
    assert panels[1].lines[0].get_ydata() == pytest.approx([0.6, 0.75, np.nan, 0.7], nan_ok=True)


def test_training_curves_are_saved_while_a_run_goes_on(tmp_path):
    path = tmp_path / figures.TRAINING_CURVES
    sizes = []
    for note in (None, SYNTHETIC_NOTE):
        figures.write_training_figure(HISTORY[:1], path, note)
        picture = path.read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and list(tmp_path.iterdir()) == [path]
        sizes.append(int.from_bytes(picture[20:24], "big"))  # height, of the PNG's header
    assert sizes[1] > sizes[0]  # room for the note, below


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "metrics.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
