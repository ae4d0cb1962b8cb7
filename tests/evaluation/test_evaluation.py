"""ctclip_evaluation: every number of metrics.json recomputed by another route, thresholds and calibration that never
see the patients they are reported on, tables whose faults end in one line and exit code 2, and the command itself.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers_evaluation import decided, reference, simulate
from sklearn import metrics as sk

import ctclip_evaluation
from ctclip.config import SYNTHETIC_NOTE, Settings
from ctclip.evaluation import calibration as cal
from ctclip.evaluation import command, figures, output
from ctclip.evaluation import evaluate as ev
from ctclip.evaluation import run_folder as folders
from ctclip.evaluation import tables as tables_module
from ctclip.evaluation import thresholds as th
from ctclip.evaluation.metrics import ABNORMALITIES, EvaluationError, bin_index
from ctclip.evaluation.render import format_report
from ctclip.evaluation.run_folder import RunError
from ctclip.evaluation.tables import Rows, VolumeTable, common_volumes, patients_of, rows_of
from ctclip.fileio import replacing
from ctclip.inference.run_predictions import run_inputs

SCRIPT = Path(__file__).resolve().parents[2] / "ctclip_evaluation.py"
NAMES = list(ABNORMALITIES)
FEW = {"resamples": 20}  # where intervals are not what a test is about


def settings(**kwargs):
    return Settings(**(FEW | kwargs))


# ------------------------------------------------------------------------------------------------------- evaluation


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


def label_reference(y, p, decisions, j):
    d = decisions[:, j]
    two = 0 < y[:, j].sum() < len(y)
    scores = (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score))
    return {name: score(y[:, j], d, zero_division=0) for name, score in scores} | {
        "auroc": sk.roc_auc_score(y[:, j], p[:, j]) if two else None,
        "average_precision": sk.average_precision_score(y[:, j], p[:, j]) if two else None,
        "accuracy": sk.accuracy_score(y[:, j], d), "positive_rate": d.mean(), "label_rate": y[:, j].mean(),
    }


def without_ranking(row):
    return {key: value for key, value in row.items() if key not in ("auroc", "average_precision")}


def errors_reference(y, p):
    """Brier score, calibration error and mean probability, (18,) each."""
    ece = [sum(abs((p - y)[bin_index(p[:, j]) == k, j].sum()) for k in range(10)) / len(y) for j in range(18)]
    brier = [sk.brier_score_loss(y[:, j], p[:, j], labels=[0, 1]) for j in range(18)]
    return {"brier": np.array(brier), "ece": np.array(ece), "mean": p.mean(axis=0)}


def sets_reference(y, p, q, cuts, one):
    ranking = {key: reference(y, p)[key] for key in ("auroc_macro", "auroc_micro")}
    micro = {"auroc_micro": sk.roc_auc_score(y.ravel(), q.ravel())}
    return {
        "at_0.5": reference(y, p), "calibrated": ranking | micro | decided(y, (q >= 0.5).astype(int)),
        "tuned": reference(y, p, cuts), "tuned_global": reference(y, p, one),
    }


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
    patients = patients_of(predictions.index)
    fit_y, fit_p = tuning[1].to_numpy(), tuning[0].to_numpy()
    calibration = cal.fit_calibration(fit_y, fit_p, patients_of(tuning[0].index), objective="f1")
    cuts, one = th.tune_label_thresholds(fit_y, fit_p, "f1"), th.tune_global_threshold(fit_y, fit_p, "f1")
    calibrated = calibration.apply(p)
    draws = drawn_rows(patients, 5)
    expected = sets_reference(y, p, calibrated, cuts, one)
    resampled = [sets_reference(y[i], p[i], calibrated[i], cuts, one) for i in draws]
    intervals = {name: {key: percentiles([r[name][key] for r in resampled]) for key in row}
                 for name, row in expected.items()}
    tuned, half = p >= cuts, p >= 0.5
    before, after = errors_reference(y, p), errors_reference(y, calibrated)
    slopes = {"slope": calibration.slope, "intercept": calibration.intercept, "shift": np.zeros(18)}
    per_label, bounds = {}, {}
    for j, name in enumerate(NAMES):
        again = [(label_reference(y[i], p[i], tuned[i], j), label_reference(y[i], p[i], half[i], j)) for i in draws]
        at_half = without_ranking(label_reference(y, p, half, j))
        per_label[name] = label_reference(y, p, tuned, j) | {
            "threshold": cuts[j], "positives": y[:, j].sum(), "at_0.5": at_half}
        cases = [len(set(patients[y[:, j] == value])) for value in (0, 1)]
        given = [key for key in again[0][0] if min(cases) >= 10 or key in ("accuracy", "positive_rate", "label_rate")]
        bounds[name] = {key: percentiles([row[key] for row, _ in again]) if key in given else None
                        for key in again[0][0]}
        bounds[name]["at_0.5"] = {key: percentiles([row[key] for _, row in again]) if key in given else None
                                  for key in at_half}
    keys = ("hamming_accuracy", "f1_macro", "precision_macro", "recall_macro", "positive_rate")
    claims = {"tuned": th.tune_label_thresholds(y, p, "f1"), "tuned_global": th.tune_global_threshold(y, p, "f1")}
    optimism_keys = ("positive_rate", "hamming_accuracy", "f1_macro", "recall_macro", "crg")
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
        "optimism": {name: {"claimed": {key: reference(y, p, cut)[key] for key in optimism_keys},
                            "honest": {key: expected[name][key] for key in optimism_keys}}
                     for name, cut in claims.items()},
        "undefined_auroc": ["Bronchiectasis"], "n_rows": 80, "n_volumes": 80, "n_patients": 40,
        "unit": {"name": "volume", "how": "every reconstruction by itself, as the challenge counts",
                 "conflicting_labels": 0},
        "left_out": {"labels": 2, "baseline": 2}, "volumes_without_patient": 0,
        "probabilities": {"min": p.min(), "max": p.max(), "mean": p.mean()},
        "threshold_table": [{"threshold": c / 20} | {key: decided(y, (p >= c / 20).astype(int))[key] for key in keys}
                            for c in range(1, 20)],
        "phantom": False, "note": None,
        "settings": {"objective": "f1", "calibration": "auto", "unit": "volume", "prevalence": None, "resamples": 5,
                     "seed": 0, "allow_partial": True},
    }
    found = stored.pop("intervals")
    errors = found.pop("calibration")
    of_label = {name: {key: found["per_label"][name].pop(key) for key in
                       ("brier_before", "brier_after")} for name in NAMES}
    noise = {when: stored["calibration"][when].pop("ece_if_calibrated") for when in ("before", "after")}
    assert 0 < noise["after"] < stored["calibration"]["after"]["ece"]  # its value is checked in test_bootstrap
    assert_same(found, intervals | {"per_label": bounds})
    for when, values in (("before", p), ("after", calibrated)):
        again = np.array([errors_reference(y[i], values[i])["brier"] for i in draws])
        assert errors[when]["brier"] == pytest.approx(percentiles(list(again.mean(axis=1))), abs=1e-12)
        for j, name in enumerate(NAMES):
            assert of_label[name][f"brier_{when}"] == pytest.approx(percentiles(list(again[:, j])), abs=1e-12)
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
        judged = ev.fit_thresholds(Rows(names, patients, y, values, len(y)), None, settings(objective="f1"))
        sides[side] = values, judged.calibrated, judged.thresholds
    rows = {side: [sets_reference(y[i], values[i], after[i], cuts[i], 0.5) for i in (slice(None), *draws)]
            for side, (values, after, cuts) in sides.items()}
    for name in ("at_0.5", "calibrated", "tuned"):
        assert_same(found[name], rows["base"][0][name])
        assert_same(found["this"][name], rows["this"][0][name])
        for key, row in found["differences"][name].items():
            gaps = [one[name][key] - other[name][key] for one, other in zip(rows["this"], rows["base"], strict=True)]
            assert_same(row, difference_reference(gaps), f"{name}/{key}")
        assert set(found["differences"][name]) == set(found[name])
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
            if min(len(set(patients[y[:, 4 * k] == value])) for value in (0, 1)) < 10 and key in ev.NEED_CASES:
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


def test_the_example_goes_from_97_percent_to_honest(tmp_path, monkeypatch, capsys):
    """The guide's worked example: the tuned rate within two points of the label rate on unseen patients; calibrated and
    mapped tables rank as the given one does, and the mapped one decides at 0.5 as tuned."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "write_figures", lambda *args: None)
    assert ctclip_evaluation.main(["--example", "--resamples", "100"]) == 0
    printed, folder = capsys.readouterr().out, Path("results/example")
    assert printed.count("Simulated predictions, neither patients nor a model") == 2
    metrics = json.loads((folder / "metrics.json").read_text())
    half, tuned = metrics["at_0.5"], metrics["tuned"]
    assert half["positive_rate"] == pytest.approx(0.97, abs=0.005)
    assert half["auroc_macro"] == pytest.approx(0.75, abs=0.01)
    assert abs(tuned["positive_rate"] - tuned["label_rate"]) < 0.02 and tuned["auroc_macro"] == half["auroc_macro"]
    before, after = metrics["calibration"]["before"], metrics["calibration"]["after"]
    assert after["ece"] < 0.05 < 0.5 < before["ece"] and after["ece"] < 2 * after["ece_if_calibrated"]
    y = tables_module.load_labels(folder / "labels.csv").to_numpy()
    given, calibrated, mapped = (tables_module.load_predictions(folder / f"predictions{kind}.csv").to_numpy()
                                 for kind in ("", "_calibrated", "_mapped"))
    for j in range(18):
        auroc = sk.roc_auc_score(y[:, j], given[:, j])
        assert sk.roc_auc_score(y[:, j], calibrated[:, j]) == sk.roc_auc_score(y[:, j], mapped[:, j]) == auroc
    assert (mapped >= 0.5).mean() == pytest.approx(tuned["positive_rate"], abs=1e-12)
    assert abs(calibrated.mean() - y.mean()) < 0.01
    fitted = set(patients_of(tables_module.load_predictions(folder / "tuning_predictions.csv").index))
    assert not fitted & set(patients_of(tables_module.load_predictions(folder / "predictions.csv").index))


def test_a_baseline_without_tuning_patients_is_compared_alike():
    """Without tuning patients this one's own cross-fitted figures are the ones compared."""
    predictions, labels = simulate(20, seed=0)
    metrics = ev.evaluate(predictions, labels, baseline=simulate(20, seed=0, distance=0.3)[0], **FEW)
    assert metrics["baseline"]["this"]["tuned"] == metrics["tuned"]
    same = ev.evaluate(predictions, labels, baseline=predictions.sample(frac=1, random_state=0), **FEW)["baseline"]
    assert same["at_0.5"] == same["this"]["at_0.5"]
    for block in ("at_0.5", "calibrated", "tuned"):
        assert {row["p"] for row in same["differences"][block].values()} == {1}


# ----------------------------------------------------------------------------------- scans, patients, partial tables


def small_tables():
    """Patient 1: scan a twice, scan b once; patient 2: one scan; labels of 1_a differ, and 1_b has another finding."""
    names = ["valid_1_a_1.nii.gz", "valid_2_a_1.nii.gz", "valid_1_b_1.nii.gz", "valid_1_a_2.nii.gz"]
    p, y = np.full((4, 18), 0.5), np.zeros((4, 18), int)
    p[:, 0], y[:, 0] = (0.2, 0.9, 0.7, 0.4), (0, 1, 0, 1)
    y[2, 1] = 1
    index = pd.Index(names, name="VolumeName")
    return pd.DataFrame(p, index, NAMES), pd.DataFrame(y, index, NAMES)


def test_volumes_become_scans_and_patients():
    predictions, labels = small_tables()
    scans = rows_of(predictions, labels, list(predictions.index), "scan")
    assert scans.names.tolist() == ["valid_1_a", "valid_2_a", "valid_1_b"] and scans.unit == "scan"
    assert scans.probabilities[:, 0] == pytest.approx([0.3, 0.9, 0.7])
    assert scans.labels[:, :2].tolist() == [[1, 0], [1, 0], [0, 1]] and scans.conflicts == 1
    patients = rows_of(predictions, labels, list(predictions.index), "patient")
    assert patients.names.tolist() == patients.patients.tolist() == ["valid_1", "valid_2"]
    assert patients.probabilities[:, 0] == pytest.approx([0.7, 0.9])
    assert patients.labels[:, :2].tolist() == [[1, 1], [1, 0]]
    assert patients.conflicts == 2 and patients.n_volumes == 4 and len(patients) == 2
    with pytest.raises(EvaluationError, match="found unit 'study', expected one of volume, scan, patient"):
        rows_of(predictions, labels, list(predictions.index), "study")


@pytest.mark.parametrize("unit, n", [("scan", 30), ("patient", 30), ("volume", 60)])
def test_the_unit_is_carried_through_and_printed(unit, n):
    predictions, labels = simulate(30, seed=0)
    metadata = {name: {"SliceThickness": "1" if "_1.nii" in name else "5"} for name in predictions.index}
    metrics = ev.evaluate(predictions, labels, unit=unit, metadata=metadata, **FEW)
    assert metrics["n_rows"] == n and metrics["n_volumes"] == 60 and metrics["n_patients"] == 30
    assert metrics["thresholds"]["n_rows"] == n
    assert f"Unit               {unit}: " in format_report(metrics)
    groups = {g["group"]: g["n_rows"] for g in metrics["subgroups"]["Slice thickness"]}
    assert groups == ({"up to 1 mm": 30, "over 4 mm": 30} if unit == "volume" else {"several": 30})


def test_names_that_tell_no_patient_are_counted_as_patients_and_said():
    predictions, labels = (t.set_axis([f"scan {k}" for k in range(40)]) for t in simulate(20, seed=0))
    metrics = ev.evaluate(predictions, labels, **FEW)
    assert metrics["n_patients"] == metrics["volumes_without_patient"] == 40
    assert "40 names are not like train_12_a_1.nii.gz" in format_report(metrics)


def test_only_what_all_tables_hold_is_evaluated_when_allowed():
    predictions, labels = simulate(20, seed=0)
    other = predictions.iloc[::-1].iloc[4:]
    tables = {"p": predictions.iloc[2:], "l": labels, "b": other}
    names, left_out = common_volumes({key: VolumeTable(frame) for key, frame in tables.items()}, allow_partial=True)
    assert names == list(predictions.index[2:36])
    assert left_out == {"p": 4, "l": 6, "b": 2}
    tuning = simulate(20, seed=1, first=100)
    metrics = ev.evaluate(predictions.iloc[2:], labels, (tuning[0], tuning[1].iloc[1:]), allow_partial=True, **FEW)
    assert metrics["n_volumes"] == 38 and metrics["left_out"] == {"labels": 2, "tuning predictions": 1}
    assert "Skipped            2 rows of the labels" in format_report(metrics)
    with pytest.raises(EvaluationError, match="no row for 2 of the 40 volumes.*first valid_1_a_1.nii.gz"):
        ev.evaluate(predictions.iloc[2:], labels, **FEW)
    with pytest.raises(EvaluationError, match="found no volume in common"):
        ev.evaluate(predictions.iloc[:2], labels.iloc[2:], allow_partial=True)
    with pytest.raises(EvaluationError, match="valid_1_a_1.nii.gz again"):
        ev.evaluate(pd.concat([predictions, predictions.iloc[:1]]), labels)


# ------------------------------------------------------------------------------------------------- what is printed


def criteria_of(half, tuned, phantom, note=None):
    base = {"label_rate": 0.2, "auroc_macro": 0.74, "hamming_accuracy": 0.81, "positive_rate": 0.2}
    rows = ev.success_criteria({"at_0.5": base | half, "tuned": base | tuned, "phantom": phantom, "note": note})
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


# ------------------------------------------------------------------------------------------------- tables and files


def test_tables_are_matched_by_column_name(tmp_path):
    predictions, labels = simulate(5, seed=0)
    shuffled = predictions[list(ABNORMALITIES)[::-1]].assign(comment="a, b").iloc[:, ::-1]
    shuffled.reset_index().iloc[:, ::-1].to_csv(tmp_path / "p.csv", index=False, encoding="utf-8-sig")
    pd.testing.assert_frame_equal(tables_module.load_predictions(tmp_path / "p.csv"), predictions)
    labels.astype(float).reset_index().to_csv(tmp_path / "l.csv", index=False)
    read = tables_module.load_labels(tmp_path / "l.csv")
    pd.testing.assert_frame_equal(read, labels)
    assert list(read.columns) == list(ABNORMALITIES) and (read.dtypes == np.int8).all()


def test_a_label_table_that_trains_also_evaluates(tmp_path):
    """Folders before CT-RATE's names, a comma at the end of every row and a row there twice change nothing; two
    different rows of a volume do. Folders before other names tell scans apart."""
    _, labels = simulate(3, seed=0)
    rows = labels.set_axis([f"dataset/valid/{name}" for name in labels.index]).rename_axis("VolumeName").to_csv()
    head, *lines = rows.splitlines()
    path = tmp_path / "l.csv"
    path.write_text("\n".join([head, *(f"{line}," for line in (*lines, lines[0]))]))
    pd.testing.assert_frame_equal(tables_module.load_labels(path), labels)
    path.write_text("\n".join([head, *lines, lines[0].replace(",0,", ",1,", 1)]))
    with pytest.raises(EvaluationError, match="line 8: found valid_1_a_1.nii.gz with other values, expected one row"):
        tables_module.load_labels(path)
    other = labels.set_axis([f"{folder}/scan.nii.gz" for folder in "abcdef"])
    other.to_csv(path, index_label="VolumeName")
    assert list(tables_module.load_labels(path).index) == list(other.index)


def test_files_are_written_whole_and_read_back(tmp_path):
    predictions, labels = simulate(20, seed=0)
    history = [{"epoch": 1, "stage": "frozen", "train_loss": 0.6, "tuning_loss": 0.7, "tuning_auroc_macro": None,
                "positive_rate": 0.5, "label_rate": 0.2}]
    out = tmp_path / "new" / "folder"
    metrics = ev.evaluate(predictions, labels, output_dir=out, history=history, **FEW)
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.json", "metrics.json", "per_label.csv", "positive_rate.png", "precision_recall.png",
        "predictions.csv", "reliability.png", "report.html", "roc.png", "threshold_sweep.png", "training_curves.png"]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    pd.testing.assert_frame_equal(tables_module.load_predictions(out / "predictions.csv"), predictions)
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


def drop_line(path, line):
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows[: line - 1] + rows[line:]) + "\n")


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
    "prediction without label": ("l.csv", lambda f: drop_line(f, 2), "l.csv: found no row for 1 of the 24 volumes in "
                                 "p.csv, first valid_1_a_1.nii.gz (line 2), expected the same volumes"),
    "label without prediction": ("p.csv", lambda f: drop_line(f, 3), "p.csv: found no row for 1 of the 24 volumes in "
                                 "l.csv, first valid_1_a_2.nii.gz (line 3), expected the same volumes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tables, capsys):
    file, spoil, message = BAD[case]
    spoil(tables / file)
    assert ctclip_evaluation.main(["--predictions", "p.csv", "--labels", "l.csv"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and message in printed.err and "expected" in printed.err
    assert not (tables / "results").exists()


@pytest.mark.parametrize("argv, message", [
    ([], "results: found no run"),
    (["--checkpoint", "nowhere"], "nowhere: found no such folder"),
    (["--checkpoint", "."], "found no predictions.csv with labels.csv"),
    (["--apply", "c.json"], "found --apply without --predictions"),
    (["--apply", "c.json", "--predictions", "p.csv"], "c.json: found no readable file"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--resamples", "99"], "found --resamples 99, expected 100 to"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--metadata", "m.csv"], "m.csv: found no row for any of the 24"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--output-dir", "run"], "run: found a run, whose tables"),
    (["--example", "--output-dir", "run"], "run: found a run, whose tables"),
    (["--example", "--output-dir", "p.csv"], "p.csv: found a place that cannot be written"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--objective", "auroc"], "found objective 'auroc'"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--pictures", "-1"], "found --pictures -1"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--prevalence", "no.json"], "no.json: found no readable file"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--metadata", "no.csv"], "no.csv: found no readable file"),
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
    (tables / "m.csv").write_text("VolumeName,PatientSex\nelsewhere.nii.gz,F\n")
    (tables / "run").mkdir()
    (tables / "run" / "run.json").write_text("{}")
    assert ctclip_evaluation.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err and "expected" in printed.err


@pytest.mark.parametrize("argv, unused, goes_with", [
    (["--checkpoint", ".", "--labels", "l.csv"], "--checkpoint", "an evaluation of a run"),
    (["--checkpoint", ".", "--example"], "--checkpoint", "an evaluation of a run"),
    (["--example", "--predictions", "p.csv"], "--predictions", "an evaluation of tables, or --apply,"),
    (["--example", "--data-dir", "d"], "--data-dir", "an evaluation of a run or of tables"),
    (["--apply", "c.json", "--predictions", "p.csv", "--labels", "l.csv"], "--labels", "an evaluation of tables"),
    (["--apply", "c.json", "--predictions", "p.csv", "--objective", "f1"], "--objective", "an evaluation"),
    (["--apply", "c.json", "--predictions", "p.csv", "--example"], "--example", "an evaluation"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--device", "cuda:9"], "--device", "an evaluation of a run"),
])
def test_a_flag_that_the_source_does_not_use_is_refused(argv, unused, goes_with, capsys):
    assert ctclip_evaluation.main(argv) == 2
    assert capsys.readouterr().err == (f"error: found {unused}, which goes with {goes_with} only; leave it out, or add "
                                       "what it goes with\n")


def run_script(*argv, cwd):
    return subprocess.run([sys.executable, str(SCRIPT), *argv], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_script_on_tables(tables):
    done = run_script("--predictions", "p.csv", "--labels=l.csv", "--baseline", "p.csv", "--output_dir=re_sults/x",
                      "--objective", "f1", cwd=tables)  # spaces and =, dashes and underscores
    assert done.returncode == 0, done.stderr
    assert "SUCCESS CRITERIA" in done.stdout and "Objective f1; cross-fitted: each fifth of" in done.stdout
    assert "Wrote re_sults/x" in done.stdout and "COMPARISON WITH THE BASELINE" in done.stdout
    assert (tables / "re_sults" / "x" / "metrics.json").is_file()  # the flag's underscore is turned, the value's is not


def test_script_error_carries_no_traceback(tables):
    (tables / "p.csv").write_text("")
    done = run_script("--predictions", "p.csv", "--labels", "l.csv", cwd=tables)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: p.csv: found an empty file, expected") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [["--predictons", "p.csv"], ["--calibration", "x"], ["stray"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        ctclip_evaluation.main(argv)
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
    monkeypatch.setattr(figures, "label_figure", lambda *args: figures.new_figure(1, 1))  # drawn elsewhere
    assert ctclip_evaluation.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith(f"Evaluating the newest run, {Path('results/new')}")
    assert SYNTHETIC_NOTE in printed and "none of them reported here" in printed
    assert Path("results/new/training_curves.png").is_file()
    assert Path("results/new/predictions.csv").read_bytes() == own  # its other columns are kept
    assert not Path("results/old/metrics.json").exists()


def test_a_run_is_read_as_training_left_it(tmp_path):
    make_run(tmp_path / "run", phantom=False)
    run = run_inputs(tmp_path / "run")
    assert [len(table.frame) for table in (run.predictions, run.labels, *run.tuning)] == [24] * 4
    assert [row["epoch"] for row in run.history] == [1, 2]  # the line cut off by an interruption is left out
    assert run.phantom is False
    (tmp_path / "run" / "log.jsonl").write_text('{"epoch": \n{"epoch": 2}\n')
    with pytest.raises(RunError, match="log.jsonl, line 1: found no JSON"):
        run_inputs(tmp_path / "run")
    (tmp_path / "run" / "labels.csv").unlink()
    with pytest.raises(RunError, match="found no predictions.csv with labels.csv"):
        run_inputs(tmp_path / "run")


def test_applying_a_stored_calibration(tmp_path, monkeypatch, capsys):
    """To predictions of other patients, with no labels: what `apply` and `rescale_to_half` give."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    calibration = folders.run_calibration(tmp_path / "run")
    calibration.save(tmp_path / "run" / "calibration.json")
    new, _ = simulate(9, seed=7, first=300)
    new.to_csv("new.csv")
    assert ctclip_evaluation.main(["--apply", "run", "--predictions", "new.csv", "--output-dir", "out"]) == 0
    assert "18 volumes; calibration" in capsys.readouterr().out
    for name, function in (("calibrated", calibration.apply), ("mapped", calibration.rescale_to_half)):
        written = tables_module.load_predictions(f"out/predictions_{name}.csv")
        assert list(written.index) == list(new.index)
        assert np.array_equal(written.to_numpy(), function(new.to_numpy()))
    assert (written.to_numpy() >= 0.5).mean() == (new.to_numpy() >= calibration.thresholds).mean()


def test_a_run_s_calibration_is_stored_used_and_made_anew_where_it_does_not_fit(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    fitted = folders.run_calibration(run)
    assert fitted.n_patients == 12 and not (run / "calibration.json").exists()
    cal.Calibration(**{**fitted.__dict__, "method": "stored"}).save(run / "calibration.json")
    assert folders.run_calibration(run).method == "stored"
    cal.Calibration(**{**fitted.__dict__, "method": "stored", "unit": "scan"}).save(run / "calibration.json")
    assert folders.run_calibration(run).method == fitted.method  # merged scans are not what predict sees
    for name in ("calibration.json", "tuning_predictions.csv"):
        (run / name).unlink()
    assert folders.run_calibration(run) is None


def test_a_run_is_evaluated_into_its_own_folder_only(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "write_results", lambda *args: None)
    make_run(tmp_path / "run")
    run = str(tmp_path / "run")
    tables = ["--predictions", f"{run}/predictions.csv", "--labels", f"{run}/labels.csv"]
    assert ctclip_evaluation.main(["--checkpoint", run]) == ctclip_evaluation.main([*tables, "--output-dir", run]) == 0
    assert ctclip_evaluation.main(["--checkpoint", run, "--data-dir", str(tmp_path), "--output-dir", run]) == 2
    tuning = ["--predictions", f"{run}/tuning_predictions.csv", "--labels", f"{run}/tuning_labels.csv"]
    assert ctclip_evaluation.main([*tuning, "--output-dir", run]) == 2
    folders.run_calibration(tmp_path / "run").save(tmp_path / "run" / "calibration.json")
    assert ctclip_evaluation.main(["--apply", run, *tables[:2], "--output-dir", run]) == 2


def test_tables_of_a_phantom_run_stay_phantoms(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    monkeypatch.setattr(command, "write_results", lambda *args: None)
    folder = str(tmp_path / "run")
    argv = ["--predictions", f"{folder}/predictions.csv", "--labels", f"{folder}/labels.csv"]
    assert ctclip_evaluation.main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    assert SYNTHETIC_NOTE in capsys.readouterr().out
