"""Findings other than the 18, and labels that are not known, against scikit-learn on the rows that are known; and from
the command line.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk
from helpers_evaluation import simulate

import ctclip_evaluation
from ctclip.data.label_table import listed_findings, read_label_table, read_probability_table, with_unknown
from ctclip.data.tables import CohortError
from ctclip.evaluation import evaluate as ev
from ctclip.evaluation import metrics as cm
from ctclip.evaluation.calibration import fit_calibration, load_calibration
from ctclip.evaluation.render import format_report
from ctclip.evaluation.tables import as_table, read_labels, read_predictions, rows_of, write_table
from ctclip_model import ABNORMALITIES, UNKNOWN

OWN = ["Rib fracture", "Emphysema", "Calcification", "Mass", "Tree-in-bud"]  # one of them among the 18
SIXTEEN = [name for name in ABNORMALITIES if name not in ("Mosaic attenuation pattern", "Lung opacity")]
FEW = {"resamples": 100}


def own_tables(patients=40, seed=0, unknown=0.3, first=1, names=OWN):
    """(predictions, labels) of findings of one's own, a share of the labels unknown."""
    predictions, labels = (
        table.iloc[:, : len(names)].set_axis(names, axis=1) for table in simulate(patients, seed=seed, first=first)
    )
    hidden = np.random.default_rng(seed + 100).random(labels.shape) < unknown
    return predictions, labels.mask(hidden, UNKNOWN)


# ------------------------------------------------------------------------------------------------ which columns count


def write(path, header, *rows):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.mark.parametrize("header, row, findings, unused", [
    ("VolumeName," + ",".join(reversed(ABNORMALITIES)) + ",Mass", ",".join("1" * 19), ABNORMALITIES, ("Mass",)),
    ("VolumeName,Mass,Emphysema,Report", "1,0,text", ("Emphysema", "Mass"), ("Report",)),
    ("VolumeName,PatientID,Mass,Score", "p1,,0.5", None, None),
    ("VolumeName,Mass,Nodule", "1,", ("Mass",), ("Nodule",)),
    ("VolumeName,Lung nodule,Mass", "n/a,1", ("Lung nodule", "Mass"), ()),  # a fault of the row, not of the column
])  # fmt: skip
def test_findings_are_the_columns_of_the_label_table(header, row, findings, unused, tmp_path):
    path = write(tmp_path / "l.csv", header, f"a,{row}")
    if findings is None:
        with pytest.raises(CohortError, match="found no column of findings, expected VolumeName and a column for each"):
            read_label_table(path)
        return
    table = read_label_table(path)
    assert (table.findings, table.unused) == (findings, unused)


@pytest.mark.parametrize("cell, rest, said", [
    ("2", "1", "line 3: found '2' for Mass, expected 0, 1 or an empty cell as in a finding's column; correct it, or"),
    ("yes", "0", "line 3: found 'yes' for Mass, "),
    ("-1", "1", "line 3: found '-1' for Mass, .*; say that -1 is unknown .--minus-one-is-unknown., or name"),
    ("2", "3", None),  # hardly a finding
    ("2", "", None),
])  # fmt: skip
def test_a_cell_that_keeps_a_column_out_is_named(cell, rest, said, tmp_path):
    path = write(tmp_path / "l.csv", 'VolumeName,Emphysema,"Mass"', f"a,1,{rest}", f"b,0,{cell}", f"c,0,{rest}")
    table = read_label_table(path)
    assert table.findings == ("Emphysema",) and table.unused == ("Mass",)
    assert len(table.doubtful) == bool(said) and (said is None or re.search(said, table.doubtful[0]))
    if said:
        predicted = pd.DataFrame({"Emphysema": [0.5, 0.25, 0.75]}, ["a", "b", "c"])
        report = format_report(ev.evaluate(predicted, read_labels(path), resamples=10))
        assert table.doubtful[0] in " ".join(report.split())


def test_where_no_column_is_a_finding_the_nearest_says_why(tmp_path):
    path = write(tmp_path / "l.csv", "VolumeName,Mass,Score", "a,1,7", "b,-1,8", "c,0,9")
    with pytest.raises(CohortError, match="line 3: found '-1' for Mass, .*--minus-one-is-unknown"):
        read_label_table(path)


def test_an_empty_cell_is_unknown_and_minus_one_only_on_demand(tmp_path):
    path = write(tmp_path / "l.csv", "VolumeName,Mass,Nodule", "a,1,", "b,0,1")
    assert with_unknown(read_label_table(path).values).tolist() == [[1, UNKNOWN], [0, 1]]
    path = write(tmp_path / "l.csv", "VolumeName,Mass,Lung nodule", "a,1,-1", "b,0,1")
    assert read_label_table(path, minus_one=True).values.tolist() == [[-np.inf, 1], [1, 0]]
    with pytest.raises(cm.EvaluationError, match="line 2: found -1 for Lung nodule of a, expected 0, 1 or an empty"):
        read_labels(path)


@pytest.mark.parametrize("text", ["-inf", "inf", "nan", "1_0"])
def test_only_what_is_empty_is_an_empty_cell(text, tmp_path):
    path = write(tmp_path / "l.csv", "VolumeName,Emphysema,Mass", f"a,{text},1")
    with pytest.raises(cm.EvaluationError, match="line 2: found .* for Emphysema of a"):
        read_labels(path)


@pytest.mark.parametrize("column", ["Lung nodul", "lung nodule", "Lung  nodule", "Emphysem", "Lung_nodule"])
def test_a_column_that_may_be_one_of_the_18_is_refused(column, tmp_path):
    path = write(tmp_path / "l.csv", f"VolumeName,{column},Mass", "a,1,0")
    with pytest.raises(CohortError, match="found column .*, expected '(Lung nodule|Emphysema)'.*--findings"):
        read_label_table(path)
    assert read_label_table(path, [column]).findings == (column,)


def test_findings_are_listed_with_commas():
    assert listed_findings("Mass, Lung nodule") == ["Mass", "Lung nodule"] and listed_findings(None) is None
    assert listed_findings('Mass, "Effusion, any"') == ["Mass", "Effusion, any"]
    for text in ("", " , ", "Mass,Mass", 'Mass,"Effusion'):
        with pytest.raises(CohortError, match="--findings"):
            listed_findings(text)


def test_predictions_need_the_findings_of_the_labels(tmp_path):
    path = write(tmp_path / "p.csv", "VolumeName,Mass,Score,Report", "a,0.5,0.25,x", "b,0.5,7,y")
    assert read_predictions(path).findings == ("Mass",)
    with pytest.raises(cm.EvaluationError, match="line 3: found 7 for Score of b, expected a probability"):
        read_predictions(path, ["Mass", "Score"])
    with pytest.raises(cm.EvaluationError, match="found no column 'Nodule'"):
        read_predictions(path, ["Nodule"])
    with pytest.raises(cm.EvaluationError, match="found no column 'Nodule', expected all 2 findings"):
        read_predictions(path).select(["Mass", "Nodule"])
    assert read_probability_table(path, ["Mass"]).unused == ("Score", "Report")


def test_a_table_with_unknown_labels_is_read_back_as_written(tmp_path):
    labels = own_tables()[1]
    write_table(tmp_path / "l.csv", list(labels.index), labels.to_numpy().astype(int), findings=OWN)
    assert ",," in (tmp_path / "l.csv").read_text() and "-1" not in (tmp_path / "l.csv").read_text()
    pd.testing.assert_frame_equal(read_labels(tmp_path / "l.csv", OWN).frame, labels.astype(np.int8))


# ------------------------------------------------------------------------------------------------ metrics


def test_metrics_of_known_labels_equal_scikit_learn():
    predictions, labels = own_tables()
    p, y = predictions.to_numpy(), labels.to_numpy()
    rows, decisions, known = cm.per_label_metrics(y, p, 0.4, OWN), p >= 0.4, y != UNKNOWN
    expected = {}
    for j, name in enumerate(OWN):
        own = known[:, j]
        truth, score, called = y[own, j], p[own, j], decisions[own, j]
        expected[name] = {
            "auroc": sk.roc_auc_score(truth, score), "average_precision": sk.average_precision_score(truth, score),
            "precision": sk.precision_score(truth, called), "recall": sk.recall_score(truth, called),
            "f1": sk.f1_score(truth, called), "accuracy": sk.accuracy_score(truth, called),
            "positive_rate": called.mean(), "label_rate": truth.mean(), "threshold": 0.4,
            "positives": truth.sum(), "known": own.sum()}
        assert rows[name] == pytest.approx(expected[name], abs=1e-12)
    m = cm.compute_metrics(y, p, 0.4)
    for macro, key in (("auroc_macro", "auroc"), ("f1_macro", "f1"), ("precision_macro", "precision")):
        assert m[macro] == pytest.approx(np.mean([row[key] for row in expected.values()]), abs=1e-12)
    assert m["auroc_micro"] == pytest.approx(sk.roc_auc_score(y[known], p[known]), abs=1e-12)
    assert m["hamming_accuracy"] == pytest.approx((y == decisions)[known].mean(), abs=1e-12)
    assert m["positive_rate"] == pytest.approx(decisions[known].mean(), abs=1e-12)
    assert m["label_rate"] == pytest.approx(y[known].mean(), abs=1e-12)
    assert m["exact_match"] == pytest.approx(((y == decisions) | ~known).all(axis=1).mean(), abs=1e-12)
    sweep = cm.threshold_sweep(y, p, np.array([0.4]))
    assert sweep["f1_macro"][0] == pytest.approx([m["f1_macro"], *(row["f1"] for row in rows.values())], abs=1e-12)
    brier = cm.calibration_columns(y, p)["brier"]
    assert brier == pytest.approx([sk.brier_score_loss(y[o, j], p[o, j]) for j, o in enumerate(known.T)], abs=1e-12)


def test_a_label_of_which_nothing_is_known_is_in_no_mean():
    predictions, labels = own_tables(unknown=0)
    without = cm.compute_metrics(labels.to_numpy()[:, 1:], predictions.to_numpy()[:, 1:])
    labels[OWN[0]] = UNKNOWN
    metrics = cm.compute_metrics(labels.to_numpy(), predictions.to_numpy())
    assert metrics == pytest.approx(without, abs=1e-12)
    row = cm.per_label_metrics(labels.to_numpy(), predictions.to_numpy(), findings=OWN)[OWN[0]]
    assert (row["known"], row["positives"]) == (0, 0)
    assert all(row[key] is None for key in ("auroc", "average_precision", "precision", "recall", "f1", "label_rate"))


def test_predictions_of_unknown_labels_change_nothing():
    """The whole of metrics.json, with a tuning set, cross-fitted, and against a baseline."""
    predictions, labels = own_tables()
    tuning, other = own_tables(seed=1, first=100), own_tables(seed=2)[0].set_axis(predictions.index)

    def with_noise(table, truth, seed):
        return table.where(truth != UNKNOWN, np.random.default_rng(seed).random(table.shape))

    changed = with_noise(predictions, labels, 5), labels
    for options in ({"tuning": tuning}, {"objective": "f1"}, {"baseline": other, "unit": "volume"}):
        noisy = dict(options)
        if "tuning" in options:
            noisy["tuning"] = with_noise(*tuning, 6), tuning[1]
        found, expected = (
            ev.evaluate(*both, **given, **FEW) for both, given in ((changed, noisy), ((predictions, labels), options))
        )
        for metrics in (found, expected):
            metrics.pop("probabilities")
        assert json.dumps(found) == json.dumps(expected)


def test_calibration_of_a_partly_known_label_is_that_of_its_known_rows():
    predictions, labels = own_tables(patients=60, names=OWN[:1])
    p, y = predictions.to_numpy(), labels.to_numpy()
    patients = np.array([name.split("_")[1] for name in predictions.index])
    whole = fit_calibration(y, p, patients, "platt", findings=OWN[:1])
    known = y[:, 0] != UNKNOWN
    rows = np.flatnonzero(known)
    # all rows weigh as much as there are patients, so these known ones as their share of them
    fit = fit_calibration(y[rows], p[rows], np.arange(len(rows)) % round(known.mean() * 60), "platt", findings=OWN[:1])
    assert whole.thresholds == pytest.approx(fit.thresholds)
    assert whole.slope == pytest.approx(fit.slope, rel=0.02)
    assert whole.intercept == pytest.approx(fit.intercept, abs=0.02)


def test_merged_labels_are_unknown_only_where_they_must_be():
    names = [f"valid_{patient}_{scan}_{k}.nii.gz" for patient, scan, k in
             [(1, "a", 1), (1, "a", 2), (1, "b", 1), (2, "a", 1), (2, "b", 1), (3, "a", 1), (3, "a", 2), (4, "a", 1),
              (4, "b", 1)]]
    labels = pd.DataFrame({"Mass": [0, UNKNOWN, UNKNOWN, 0, 0, UNKNOWN, UNKNOWN, 0, UNKNOWN],
                           "Nodule": [1, 0, UNKNOWN, UNKNOWN, 1, 0, 0, UNKNOWN, 1]}, index=names)
    p = pd.DataFrame(0.5, index=names, columns=labels.columns)
    scans, patients = (rows_of(p, labels, names, unit) for unit in ("scan", "patient"))
    assert dict(zip(scans.names, scans.labels.tolist(), strict=True)) == {
        "valid_1_a": [0, 1], "valid_2_a": [0, UNKNOWN], "valid_2_b": [0, 1], "valid_3_a": [UNKNOWN, 0],
        "valid_4_a": [0, UNKNOWN], "valid_4_b": [UNKNOWN, 1]}
    assert dict(zip(patients.names, patients.labels.tolist(), strict=True)) == {
        "valid_1": [0, 1], "valid_2": [0, 1], "valid_3": [UNKNOWN, 0], "valid_4": [UNKNOWN, 1]}
    assert scans.unlabelled == patients.unlabelled == 1  # the only volume of valid_1_b


def test_a_frame_has_its_own_findings():
    predictions, labels = own_tables()
    table = as_table(labels.assign(Report="text", PatientID=[f"p{i // 3}" for i in range(len(labels))]))
    assert table.findings == ("Emphysema", *[name for name in OWN if name != "Emphysema"])
    assert table.unused == ["Report"]
    metrics = ev.evaluate(predictions, labels.where(labels != UNKNOWN), **FEW)  # NaN as well
    assert list(metrics["per_label"]) == list(table.findings)
    assert metrics["unknown_labels"]["decisions"] == (labels == UNKNOWN).to_numpy().sum()


# ------------------------------------------------------------------------------------------------ command line


def run(*args, capsys):
    code = ctclip_evaluation.main([*map(str, args), "--resamples", "100", "--pictures", "0"])
    return code, capsys.readouterr()


def save(folder, predictions, labels):
    predictions.to_csv(folder / "p.csv", index_label="VolumeName")
    labels.astype(object).where(labels != UNKNOWN, "").to_csv(folder / "l.csv", index_label="VolumeName")
    return "--predictions", folder / "p.csv", "--labels", folder / "l.csv", "--output-dir", folder / "out"


def test_a_table_of_findings_of_ones_own_is_evaluated_and_applied(tmp_path, capsys):
    predictions, labels = own_tables(seed=3)
    labels.iloc[0] = UNKNOWN
    code, out = run(*save(tmp_path, predictions, labels), capsys=capsys)
    assert code == 0, out.err
    order = ["Emphysema", *[name for name in OWN if name != "Emphysema"]]
    assert f"5, 1 of them among CT-RATE's 18: {', '.join(order)}" in " ".join(out.out.split())
    assert "1 volumes without a known label" in out.out and "are left out" in out.out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(metrics["per_label"]) == order and "as published" not in str(metrics["success_criteria"])
    calibration = load_calibration(tmp_path / "out/calibration.json")
    assert calibration.findings == tuple(order)
    names = [str(tmp_path / name) for name in ("out", "p.csv", "new")]
    assert not ctclip_evaluation.main(["--apply", names[0], "--predictions", names[1], "--output-dir", names[2]])
    applied = read_predictions(tmp_path / "new/predictions_calibrated.csv").frame
    assert set(applied.pop("Scale")) == {calibration.calibrated_scale} and list(applied) == order
    np.testing.assert_allclose(applied.to_numpy(), calibration.apply(predictions[order].to_numpy()))


def test_sixteen_of_the_18_are_evaluated_on_predictions_of_all(undrawn, tmp_path, capsys):
    predictions, labels = simulate(40, seed=4)
    code, out = run(*save(tmp_path, predictions, labels[SIXTEEN]), capsys=capsys)
    assert code == 0 and "16, 16 of them among CT-RATE's 18" in out.out
    assert "'Lung opacity', 'Mosaic attenuation pattern'" in " ".join(out.out.split())  # not used, of p.csv
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    alone = ev.evaluate(predictions[SIXTEEN], labels[SIXTEEN], **FEW)
    assert metrics["tuned"] == alone["tuned"] and list(metrics["per_label"]) == SIXTEEN


def test_findings_can_be_chosen(undrawn, tmp_path, capsys):
    predictions, labels = simulate(40, seed=4)
    tables = save(tmp_path, predictions, labels)
    code, _ = run(*tables, "--findings", "Emphysema,Lung nodule", capsys=capsys)
    assert code == 0
    assert list(json.loads((tmp_path / "out/metrics.json").read_text())["per_label"]) == ["Emphysema", "Lung nodule"]
    code, out = run(*tables, "--findings", "Emphysem", capsys=capsys)
    assert code == 2 and "found no column 'Emphysem'" in out.err


def test_minus_one_on_demand(undrawn, tmp_path, capsys):
    predictions, labels = own_tables()
    tables = save(tmp_path, predictions, labels)
    labels.to_csv(tmp_path / "l.csv", index_label="VolumeName")
    code, out = run(*tables, "--findings", ",".join(OWN), capsys=capsys)
    assert code == 2 and "--minus-one-is-unknown" in out.err
    code, out = run(*tables, "--minus-one-is-unknown", capsys=capsys)
    assert code == 0 and f"{(labels == UNKNOWN).to_numpy().sum()} of {labels.size} are left out" in out.out


def test_a_calibration_of_some_findings_is_theirs():
    predictions, labels = own_tables()
    whole = fit_calibration(labels.to_numpy(), predictions.to_numpy(), list(labels.index), findings=OWN)
    chosen = whole.select(["Mass", "Emphysema"])
    p = predictions.to_numpy()
    assert np.array_equal(chosen.apply(p[:, [3, 1]]), whole.apply(p)[:, [3, 1]])
    assert np.array_equal(chosen.thresholds, whole.thresholds[[3, 1]])
    with pytest.raises(cm.EvaluationError, match="found a calibration without 'Nodule'"):
        whole.select(["Nodule"])
