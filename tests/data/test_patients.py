"""Whose volumes they are: CT-RATE's names by their form, any other name by a column, a table, or for itself."""

import json

import numpy as np
import pytest
from helpers_data import HEADER, META_HEADER, label_line, meta_line, put, tables

from ctclip.data.cohort import load_cohort, split_by_patient
from ctclip.data.ct_rate import labels_path, metadata_path, patient_of, scan_of, volume_name
from ctclip.data.patients import merge_ids, patient_and_scan, read_patients
from ctclip.data.tables import CohortError

NAMES = ["chest_ct_scan_001.nii.gz", "chest_ct_scan_002.nii.gz", "UKB_2020_007_1.nii.gz", "UKB_2020_008_1.nii.gz",
         "site_A_patient007_scan1", "site_A_patient008_scan1", "p1/scan", "p2/scan", "scan (1).mha", "train_12_a",
         "a_b_c_1.nii.gz", "hospital_12_a_1.nii.gz", "train_1_2_3.nii.gz", "train_١_a_1.nii.gz"]  # fmt: skip


def test_names_of_another_form_are_patients_and_scans_of_their_own():
    assert len({patient_of(name) for name in NAMES}) == len({scan_of(name) for name in NAMES}) == len(NAMES)
    assert [volume_name(name) for name in NAMES] == NAMES
    assert patient_of("scan_1.nii.gz") == patient_of("scan_1.mha") == "scan_1"


@pytest.mark.parametrize("name", ["train_12_a_1.nii.gz", "train_12_a_1", "TRAIN_12_A_1.NII.GZ", "train_12_a_1.mha",
                                  "D:\\ct\\train_12_a_1.nii.gz", "dataset/train/train_12/train_12_a_1.nii.gz"])
def test_ct_rates_names_are_one_however_they_are_written(name):
    assert volume_name(name) == "train_12_a_1.nii.gz"
    assert (patient_of(name), scan_of(name)) == ("train_12", "train_12_a")


def own_cohort(folder, labels=None, metadata=None):
    """Six volumes with names of another form, of three patients."""
    names = [f"chest_ct_scan_{i:03d}.nii.gz" for i in range(6)]
    for i, name in enumerate(names):
        put(folder, name, True, seed=i)
    return tables(folder, [HEADER, *(label_line(name, (i,)) for i, name in enumerate(names))] if labels is None else
                  labels(names), [META_HEADER, *map(meta_line, names)] if metadata is None else metadata(names)), names


def with_ids(names, lines):
    """Lines with a header, and a column PatientID: two volumes each."""
    return [f"{line},{'PatientID' if not i else f'P{(i - 1) // 2}'}" for i, line in enumerate(lines)]


def in_labels(names):
    return with_ids(names, [HEADER, *(label_line(name, (i,)) for i, name in enumerate(names))])


def in_metadata(names):
    return with_ids(names, [META_HEADER, *map(meta_line, names)])


def test_a_cohort_of_other_names_says_that_each_is_taken_for_a_patient(tmp_path):
    data_dir, _ = own_cohort(tmp_path)
    cohort = load_cohort(data_dir, "valid")
    summary = cohort.summary()
    assert summary.startswith("6 volumes, 6 scans, 6 patients\n")
    assert "6 of 6 names are not like train_12_a_1.nii.gz and have no PatientID: each counts as a patient" in summary
    assert len([line for line in summary.splitlines() if "patient of its own" in line]) == 1


@pytest.mark.parametrize("where", ["labels", "metadata", "patients", "patients without suffix"])
def test_training_splits_by_a_patient_column(where, tmp_path):
    data_dir, names = own_cohort(tmp_path, in_labels if where == "labels" else None,
                                 in_metadata if where == "metadata" else None)
    patients = None
    if where.startswith("patients"):
        patients = tmp_path / "patients.csv"
        lines = with_ids(names, ["VolumeName", *names])
        patients.write_text("\n".join(lines).replace(".nii.gz", "" if "without" in where else ".nii.gz"))
    cohort = load_cohort(data_dir, "valid", patients=patients)
    assert [volume.patient for volume in cohort.volumes] == ["P0", "P0", "P1", "P1", "P2", "P2"]
    assert cohort.summary().splitlines()[0] == "6 volumes, 6 scans, 3 patients"
    assert "patient of its own" not in cohort.summary()
    for seed in range(5):
        rest, held = split_by_patient(cohort.volumes, 0.3, seed)
        assert len(held) == 2 and not {v.patient for v in rest} & {v.patient for v in held}


@pytest.mark.parametrize("column", ["PatientID", "patient_id", "Patient ID", " patientid "])
def test_a_patient_column_may_be_spelled_as_exports_do(column, tmp_path):
    (tmp_path / "p.csv").write_text(f"VolumeName,{column},SCAN_ID\na,7,1\n")
    assert read_patients(tmp_path / "p.csv") == {"a": ("7", "1")}


def test_scans_are_told_apart_within_their_patient():
    ids = {"a": ("P1", "1"), "b": ("P1", "1"), "c": ("P2", "1"), "d": ("P2", "")}
    assert [patient_and_scan(name, ids.get(name)) for name in "abcde"] == [
        ("P1", "P1/1"), ("P1", "P1/1"), ("P2", "P2/1"), ("P2", "d"), ("e", "e")]


@pytest.mark.parametrize(("first", "second", "message"), [
    ({"a": ("P1", "")}, {"a": ("P2", "")}, "second: found patient P2 for a, expected P1 as in first"),
    ({"a": ("P1", "1")}, {"a": ("P1", "2")}, "second: found patient P1 2 for a, expected P1 1 as in first"),
    ({"train_1_a_1.nii.gz": ("P1", "")}, {}, "train_1_b_1.nii.gz: found no PatientID, expected one as for other"),
])  # fmt: skip
def test_tables_that_contradict_each_other_are_refused(first, second, message):
    names = ["a", "b", "train_1_a_1.nii.gz", "train_1_b_1.nii.gz"]
    with pytest.raises(CohortError, match=message):
        merge_ids([("first", first), ("second", second)], names)
    agreed = merge_ids([("first", {"a": ("P1", "")}), ("second", {"A.mha": ("P1", "7")})], names)
    assert agreed == {"a": ("P1", "7")}


@pytest.mark.parametrize(("content", "message"), [
    ("VolumeName,PatientID\na,P1\nb,\n", "found no PatientID in 1 of 2 rows, first b, expected one in each"),
    ("VolumeName,PatientID\na,P1\na,P2\n", "line 3: found a with other values, expected one row per volume"),
    ("VolumeName,Patient\na,P1\n", "found no column 'PatientID'"),
    ("VolumeName;PatientID\na;P1\n", "separated by semicolons"),
])  # fmt: skip
def test_a_table_of_patients_that_does_not_say_it_is_refused(content, message, tmp_path):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(CohortError, match=message) as error:
        read_patients(tmp_path / "p.csv")
    assert "\n" not in str(error.value)


def test_a_table_of_other_patients_is_refused_in_training(tmp_path):
    data_dir, names = own_cohort(tmp_path)
    for path in (labels_path, metadata_path):
        (data_dir / path("valid")).rename(data_dir / path("train"))
    (tmp_path / "p.csv").write_text("VolumeName,PatientID\nelsewhere.nii.gz,P1\n")
    with pytest.raises(CohortError, match="p.csv: found no row for any of the 6 volumes"):
        load_cohort(data_dir, "train", patients=tmp_path / "p.csv")


def test_label_rows_find_files_and_metadata_whatever_the_suffix(tmp_path):
    """Labels without a suffix, metadata in upper case and as paths; a column that is none of the 18 is named."""
    data_dir, names = own_cohort(
        tmp_path,
        lambda names: [HEADER + ",Pneumothorax", *(label_line(name.removesuffix(".nii.gz"), (i,)) + ",1"
                                                   for i, name in enumerate(names))],
        lambda names: [META_HEADER, *(meta_line(f"D:\\x\\{name.upper()}") for name in names)])  # fmt: skip
    cohort = load_cohort(data_dir, "valid")
    assert [v.path.name for v in cohort.volumes] == names and all(v.metadata["ZSpacing"] == 12 for v in cohort.volumes)
    assert "not used: 'Pneumothorax' of valid_predicted_labels.csv, not among the findings" in cohort.summary()
    assert json.dumps(cohort.skipped) == "[]" and np.all([v.labels.sum() == 1 for v in cohort.volumes])
