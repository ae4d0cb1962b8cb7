"""Tables of volumes: matched by name, merged to scans and patients, refused where they differ."""


import numpy as np
import pandas as pd
import pytest
from helpers_evaluation import simulate

from ctclip.evaluation import evaluate as ev
from ctclip.evaluation import tables as tables_module
from ctclip.evaluation.metrics import ABNORMALITIES, EvaluationError
from ctclip.evaluation.render import format_report
from ctclip.evaluation.tables import VolumeTable, common_volumes, rows_of

NAMES = list(ABNORMALITIES)
FEW = {"resamples": 20}  # where intervals are not what a test is about


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
