"""Tables of volumes: matched by name, merged to scans and patients, refused where they differ."""


import numpy as np
import pandas as pd
import pytest
from helpers_evaluation import simulate

from ctclip.errors import UserError
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
    assert "40 of 40 names are not like train_12_a_1.nii.gz" in format_report(metrics)


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


# ------------------------------------------------------------------ names and patients


def renamed(frames, rename):
    return [frame.set_axis([rename(name) for name in frame.index]).rename_axis("VolumeName") for frame in frames]


@pytest.mark.parametrize("form", ["chest_ct_scan_{:03d}.nii.gz", "UKB_2020_{:03d}_1.nii.gz", "site_A_patient{}_scan1",
                                  "p{}/scan", "p{}\\scan.nii.gz"])
def test_names_of_another_form_are_patients_of_their_own_and_intervals_have_a_width(form):
    """Not one patient for all, and not one for each site: of 40 volumes, 40."""
    predictions, labels = simulate(20, seed=0)
    names = dict(zip(predictions.index, (form.format(i) for i in range(40)), strict=True))
    metrics = ev.evaluate(*renamed((predictions, labels), names.get), resamples=100)
    assert metrics["n_patients"] == metrics["volumes_without_patient"] == 40
    low, high = metrics["intervals"]["at_0.5"]["auroc_macro"]
    assert high - low > 0.01
    assert "40 of 40 names are not like train_12_a_1.nii.gz and have no PatientID" in format_report(metrics)


@pytest.mark.parametrize("where", ["predictions", "labels", "metadata", "both, the labels with scans"])
def test_a_patient_column_counts_as_ct_rates_names_do(where):
    """In any table: the same numbers as under CT-RATE's names, and nothing said."""
    frames = simulate(20, seed=0)
    expected = ev.evaluate(*frames, unit="scan", **FEW)
    numbers = [name.split("_")[1] for name in frames[0].index]
    predictions, labels = renamed(frames, dict(zip(frames[0].index, (f"scan {i}" for i in range(40)), strict=True)).get)
    metadata = None
    if where in ("predictions", "both, the labels with scans"):
        predictions["PatientID"] = numbers
    if where in ("labels", "both, the labels with scans"):
        labels["PatientID"] = numbers
    if where.startswith("both"):
        labels["ScanID"] = "a"
    if where == "metadata":
        stated = zip(labels.index, numbers, strict=True)
        metadata = {name: {"PatientID": number, "ScanID": "a"} for name, number in stated}
    found = ev.evaluate(predictions, labels, unit="scan", metadata=metadata, **FEW)
    assert found["n_patients"] == 20 and found["volumes_without_patient"] == 0
    assert "patient of its own" not in format_report(found)
    if "both" in where or where == "metadata":
        assert found["n_rows"] == 20 and found["at_0.5"] == expected["at_0.5"]
        assert found["intervals"]["at_0.5"] != {} and found["thresholds"]["n_rows"] == expected["thresholds"]["n_rows"]


@pytest.mark.parametrize("change, message", [
    (lambda p, y: (p, y.assign(PatientID="P1")), "1 patient only .P1.*or a PatientID column or --patients CSV"),
    (lambda p, y: (p.assign(PatientID=["P1", None] * 20), y), "found no PatientID in 20 of 40 rows, first valid_1_a_2"),
    (lambda p, y: (p.assign(scan_id="a"), y), "found ScanID without PatientID"),
    (lambda p, y: (p.assign(PatientID="P1"), y.assign(PatientID="P2")), "found patient P2 for valid_1_a_1.nii.gz, exp"),
    (lambda p, y: (p.reset_index(drop=True), y), "found 0 as the name of a volume in a DataFrame, expected text"),
    (lambda p, y: (p, y.rename(columns={"Emphysema": "emphysema"})), "found column 'emphysema', expected 'Emphysema'"),
    (lambda p, y: (p.astype(str), y), "found text in column 'Medical material'.* of a DataFrame"),
    (lambda p, y: ("p.csv", y), "found a str as a table, expected a DataFrame; read files with load_predictions"),
    (lambda p, y: (p.to_numpy(), y), "found a ndarray as a table"),
])  # fmt: skip
def test_a_frame_that_cannot_be_used_is_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        ev.evaluate(*change(*simulate(20, seed=0)), **FEW)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", ["index without a name", "column VolumeName", "names without suffix"])
def test_a_frame_without_a_named_index_is_evaluated_and_written_readable(shape, undrawn, tmp_path):
    predictions, labels = simulate(20, seed=0)
    given = {
        "index without a name": lambda frame: frame.rename_axis(None),
        "column VolumeName": lambda frame: frame.reset_index(),
        "names without suffix": lambda frame: frame.rename(index=lambda name: name.removesuffix(".nii.gz")),
    }[shape]
    metrics = ev.evaluate(given(predictions), given(labels), output_dir=tmp_path, **FEW)
    pd.testing.assert_frame_equal(tables_module.load_predictions(tmp_path / "predictions.csv"), predictions)
    assert metrics["n_patients"] == 20


def test_patient_columns_of_predictions_survive(undrawn, tmp_path):
    predictions, labels = (t.set_axis([f"scan {i}" for i in range(40)]) for t in simulate(20, seed=0))
    predictions["PatientID"] = [f"P{i // 2}" for i in range(40)]
    predictions["ScanID"] = [f"S{i % 2}" for i in range(40)]
    ev.evaluate(predictions, labels, output_dir=tmp_path, **FEW)
    written = tables_module.load_predictions(tmp_path / "predictions.csv")
    assert written["PatientID"].tolist() == predictions["PatientID"].tolist()
    assert written["ScanID"].tolist() == predictions["ScanID"].tolist()
    assert rows_of(written, None, list(written.index), "patient").names.tolist() == [f"P{i}" for i in range(20)]


@pytest.mark.parametrize("written", ["{}", "data/valid/{}.nii.gz", "D:\\ct\\{}.mha", "{}.NII.GZ"])
@pytest.mark.parametrize("own", [False, True])
def test_tables_are_joined_by_stem(written, own):
    """Labels under other spellings of the same names, in another order: the same result."""
    frames = simulate(20, seed=0)
    if own:
        frames = renamed(frames, dict(zip(frames[0].index, (f"Scan {i}.nii.gz" for i in range(40)), strict=True)).get)
    predictions, labels = frames
    expected = ev.evaluate(predictions, labels, **FEW)
    other = labels.rename(index=lambda name: written.format(name.removesuffix(".nii.gz"))).iloc[::-1]
    metrics = ev.evaluate(predictions, other, **FEW)
    assert metrics == expected
    with pytest.raises(EvaluationError, match="no row for 1 of the 40 volumes"):
        ev.evaluate(predictions, other.iloc[1:], **FEW)


def test_names_that_cannot_be_joined_say_what_differs_and_offer_no_partial_result():
    """Each scan is labelled twice, as .nii.gz and .mha, and predicted once, without a suffix; or under other names."""
    predictions, labels = renamed(simulate(3, seed=0), lambda name: f"x {name}")
    twice = pd.concat([labels, labels.rename(index=lambda name: name.replace("nii.gz", "mha"))])
    bare = predictions.rename(index=lambda name: name.removesuffix(".nii.gz"))
    with pytest.raises(EvaluationError, match="6 of the 6.*all 12 names have the suffix .mha or .nii.gz") as error:
        ev.evaluate(bare, twice, **FEW)
    assert "--allow-partial" not in str(error.value)
    with pytest.raises(EvaluationError, match="no volume in common .its names are like 'x valid_1_a_1.nii.gz'."):
        ev.evaluate(predictions.rename(index=lambda name: f"y {name}"), labels, allow_partial=True, **FEW)


@pytest.mark.parametrize("n", [2, 9, 10])
def test_no_intervals_below_ten_patients_and_the_report_says_why(n):
    metrics = ev.evaluate(*simulate(n, seed=0), baseline=simulate(n, seed=0)[0], **FEW)
    given = [bounds for name in ("at_0.5", "tuned", "calibrated") for bounds in metrics["intervals"][name].values()]
    assert any(given) == (n == 10)
    assert ("No intervals with fewer than 10 patients" in format_report(metrics)) == (n < 10)
    assert ("bootstrap resamples" in format_report(metrics)) == (n == 10)


def test_tuning_patients_under_another_spelling_are_found_among_the_reported():
    predictions, labels = (t.set_axis([f"scan {i}.nii.gz" for i in range(40)]) for t in simulate(20, seed=0))
    tuning = [frame.rename(index=lambda name: f"D:\\{name.upper()}") for frame in (predictions, labels)]
    with pytest.raises(EvaluationError, match="found 40 tuning patients among the reported ones"):
        ev.evaluate(predictions, labels, tuning, **FEW)


def test_a_nineteenth_column_is_named_and_known_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictions, labels = simulate(20, seed=0)
    labels.assign(Pneumothorax=1, PatientSex="F").to_csv("l.csv")
    predictions.assign(Warning="").to_csv("p.csv")
    read = tables_module.read_predictions("p.csv"), tables_module.read_labels("l.csv")
    report = format_report(ev.evaluate(*read, **FEW))
    assert "Not used           'Pneumothorax' of l.csv: not among the findings that are" in report
    assert "Warning" not in report and "PatientSex" not in report
