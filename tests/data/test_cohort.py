"""Tables -> cohort, against small cohorts written by hand in the hub's layout.

Checked: columns matched by name; every kind of bad row skipped with a reason and never in the way of the others;
version 2 preferred to version 1.
"""

import re
import shutil

import numpy as np
import pytest
from helpers_data import HEADER, META_HEADER, A, B, C, label_line, meta_line, tables

from ctclip.data.cohort import load_cohort, read_metadata
from ctclip.data.ct_rate import labels_path, metadata_path, no_chest_path, volume_path
from ctclip.data.tables import CohortError
from ctclip_model import UNKNOWN


def names(cohort):
    return [volume.name for volume in cohort.volumes]


def test_joins_and_prefers_the_fixed_version(data_dir):
    cohort = load_cohort(data_dir, "valid")
    assert names(cohort) == [A, B, C] and len(cohort) == 3 and not cohort.skipped
    a, b, c = cohort.volumes
    assert [v.path for v in (a, b, c)] == [data_dir / volume_path(n, n != B) for n in (A, B, C)]
    assert a.labels.dtype == np.float32 and np.flatnonzero(a.labels).tolist() == [0, 17] and not c.labels.any()
    assert a.metadata is None and b.metadata["RescaleIntercept"] == -1024 and b.metadata["ZSpacing"] == 12
    assert (a.patient, a.scan) == ("valid_1", "valid_1_a")
    assert cohort.summary().splitlines()[0] == "3 volumes, 2 scans, 2 patients"
    assert names(load_cohort(str(data_dir), "valid", limit=2)) == [A, B]


def test_a_name_with_a_letter_that_cannot_be_seen_is_said(data_dir):
    path = data_dir / labels_path("valid")
    path.write_text(path.read_text().replace(B, f"{B}\u200b"), encoding="utf-8")
    cohort = load_cohort(data_dir, "valid")
    said = f"a letter that cannot be seen, which may match no file: 1, first '{B}\\u200b'"
    assert names(cohort) == [A, C] and said in cohort.summary()


def test_columns_are_matched_by_name(data_dir):
    """Reversed columns, an extra one, spaces and a byte order mark change nothing."""
    table = (data_dir / labels_path("valid")).read_text().splitlines()
    turned = [",".join([*reversed(line.split(",")), "x"]) for line in table]
    turned[0] = "\ufeff" + turned[0].replace(",Cardiomegaly,", ", Cardiomegaly ,")
    tables(data_dir, turned)
    assert [np.flatnonzero(v.labels).tolist() for v in load_cohort(data_dir, "valid").volumes] == [[0, 17]] * 2 + [[]]


@pytest.mark.parametrize(
    ("path", "column"),
    [
        (labels_path("valid"), "VolumeName"),
        (metadata_path("valid"), "VolumeName"),
        (metadata_path("valid"), "ZSpacing"),
    ],
)
def test_a_wrong_header_is_an_error_naming_the_column(data_dir, path, column):
    text = (data_dir / path).read_text()
    (data_dir / path).write_text(text.replace(column, "Other", 1))
    with pytest.raises(CohortError, match=f"{path.name}: found no column '{column}', expected VolumeName.*; "):
        load_cohort(data_dir, "valid")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00binary\x81", None])
def test_an_unreadable_label_table_is_an_error(data_dir, content):
    path = data_dir / labels_path("valid")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CohortError) as caught:
        load_cohort(data_dir, "valid")
    assert "\n" not in str(caught.value) and path.name in str(caught.value) and "expected" in str(caught.value)


def test_bad_rows_are_skipped_with_their_reason(data_dir):
    """One bad row of every kind beside three good volumes."""
    rows, metadata, expected = [HEADER], [META_HEADER, meta_line(B), meta_line(C)], {}
    for name in (A, B, C):
        rows += [label_line(name)]
    rows += [label_line(A)]  # once more, the same

    def bad(number, reason, *labels, fixed=True, meta=None):
        name = f"valid_{number}_a_1.nii.gz"
        path = data_dir / volume_path(name, fixed)
        path.parent.mkdir(parents=True)
        path.touch()
        rows.extend(line.replace("NAME", name) for line in labels)
        metadata.extend([meta.replace("NAME", name)] if meta else [])
        expected[name] = reason

    good = label_line("NAME")
    bad(10, "contradictory label rows", good, label_line("NAME", (3,)))
    bad(11, "labels other than 0 and 1", good.replace("0,0", "0,0.5", 1))
    bad(12, "labels other than 0 and 1", good.replace("0,0", "0,yes", 1))
    bad(13, "labels other than 0 and 1", good.replace("0,0", "0,-1", 1))
    bad(14, "labels other than 0 and 1", "NAME,1")
    bad(15, "no label row", meta=meta_line("NAME"))
    needed = "(needed by a version-1 file)"
    bad(16, f"no metadata row {needed}", good, fixed=False)
    bad(17, f"no ZSpacing in its metadata row {needed}", good, fixed=False, meta=meta_line("NAME", ""))
    bad(18, "not a chest (no-chest list)", good)
    bad(19, "not a chest (no-chest list)", good)
    bad(20, f"contradictory metadata rows {needed}", good, fixed=False, meta=meta_line("NAME"))
    metadata.append(meta_line("valid_20_a_1.nii.gz", 5.0))
    rows += [label_line("valid_90_a_1.nii.gz"), label_line("valid_91_a_1.nii.gz")]
    no_chest = "valid_18_a_1\ndataset/valid/valid_19/valid_19_a/valid_19_a_1.nii.gz\nvalid_999_a_1.nii.gz\n\n"
    cohort = load_cohort(tables(data_dir, rows, metadata, no_chest), "valid")
    assert names(cohort) == [A, B, C]
    assert dict(cohort.skipped) == expected and len(cohort.skipped) == len(expected)
    assert cohort.not_on_disk == 2
    summary = cohort.summary()
    assert "not on disk: 2" in summary and "counted once: 1" in summary
    assert "skipped: 4 x labels other than 0 and 1: valid_11_a_1.nii.gz, valid_12_a_1.nii.gz, " in summary
    assert len(summary.splitlines()) < 15


def test_version_2_does_without_a_metadata_table(data_dir):
    (data_dir / metadata_path("valid")).unlink()
    (data_dir / no_chest_path("valid")).unlink()
    cohort = load_cohort(data_dir, "valid")
    assert names(cohort) == [A, C]
    assert cohort.skipped == [(B, "no metadata row (needed by a version-1 file)")]
    assert "no validation_metadata.csv" in cohort.summary() and "no no_chest_valid.txt" in cohort.summary()
    cohort = load_cohort(tables(data_dir, [HEADER, label_line(A)]), "valid")  # nothing is skipped for want of metadata
    assert "validation_metadata" not in cohort.summary() and "no no_chest_valid.txt" in cohort.summary()
    shutil.copy(data_dir / volume_path(A, True), data_dir / "dataset" / "valid_fixed" / "scan 7.nii.gz")
    cohort = load_cohort(tables(data_dir, [HEADER, label_line("scan 7")]), "valid")
    assert len(cohort) == 1 and "no_chest" not in cohort.summary()  # CT-RATE's lists are no matter of other names


def test_a_comma_too_many_does_not_shift_the_columns_and_a_cell_too_many_is_refused(data_dir):
    table = (data_dir / labels_path("valid")).read_text().splitlines()
    tables(data_dir, [table[0], *(line + ",1" for line in table[1:])])
    with pytest.raises(CohortError, match="line 2: found 20 values, expected 19 as in the header"):
        load_cohort(data_dir, "valid")
    tables(data_dir, [table[0], *(line + "," for line in table[1:])])
    assert [np.flatnonzero(v.labels).tolist() for v in load_cohort(data_dir, "valid").volumes] == [[0, 17]] * 2 + [[]]


@pytest.mark.parametrize(
    ("labels", "told"),
    [([HEADER], "empty label table.*; add volumes$"),
     ([HEADER, label_line("valid_77_a_1.nii.gz")], "not on disk: 1.* expected at least one in .*/dataset/valid_fixed "
      "or .*/dataset/valid; add volumes, such as .*/dataset/valid_fixed/valid_77/valid_77_a/valid_77_a_1.nii.gz$"),
     ([HEADER, label_line("scan 7")], "; add volumes, such as .*/dataset/valid_fixed/scan 7.nii.gz$")],
)  # fmt: skip
def test_an_empty_cohort_is_an_error(data_dir, labels, told):
    with pytest.raises(CohortError, match=f"no usable valid volume .*{told}"):
        load_cohort(tables(data_dir, labels, [META_HEADER]), "valid")


def test_wrong_folder_and_split_are_errors(data_dir):
    with pytest.raises(CohortError, match="found no folder .*expected"):
        load_cohort(data_dir / "nowhere", "valid")
    with pytest.raises(CohortError, match="found split 'test', expected"):
        load_cohort(data_dir, "test")
    with pytest.raises(CohortError, match="train_predicted_labels.csv"):
        load_cohort(data_dir, "train")


def test_metadata_rows_for_subgroups(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text(f"VolumeName,PatientAge,PatientSex,Rows\n{A}, 036Y ,F,512\n{B},,M,512\n{C},1Y,M,1\n{C},2Y,M,1\n")
    assert read_metadata(path) == {  # C is there twice, and differently
        A: {"PatientSex": "F", "PatientAge": "036Y"}, B: {"PatientSex": "M", "PatientAge": ""}}
    path.write_text(f"VolumeName,Rows\n{A},512\n")
    with pytest.raises(CohortError, match="found none of PatientSex.*expected at least one") as error:
        read_metadata(path)
    assert "\n" not in str(error.value)


def test_a_finding_that_is_mistyped_is_named(data_dir):
    path = data_dir / labels_path("valid")
    path.write_text(path.read_text().replace("Cardiomegaly", "Cardiomegalie", 1))
    with pytest.raises(CohortError, match="found column 'Cardiomegalie', expected 'Cardiomegaly'"):
        load_cohort(data_dir, "valid")


def test_findings_are_the_label_table_s_and_empty_cells_unknown(data_dir):
    header = "VolumeName,Rib fracture,Emphysema,Comment"
    rows = [header, f"{A},1,,x", f"{B},,0,y", f"{C},,,z", "valid_9_a_1.nii.gz,-1,0,"]
    metadata = [META_HEADER, *map(meta_line, (A, B, C))]
    cohort = load_cohort(tables(data_dir, rows, metadata), "valid")
    assert cohort.findings == ("Emphysema",)  # the other column has a cell that is no label
    assert "line 5: found '-1' for Rib fracture, expected 0, 1 or an empty cell" in cohort.summary()
    cohort = load_cohort(data_dir, "valid", findings=["Rib fracture", "Emphysema"])
    assert [volume.labels.tolist() for volume in cohort.volumes] == [[1, UNKNOWN], [UNKNOWN, 0]]
    assert cohort.skipped == [(C, "no known label")]
    summary = cohort.summary()
    assert "findings: 2 (Rib fracture, Emphysema)" in summary and "not used: 'Comment' of" in summary
    assert "found '-1'" not in summary  # of a column that was asked for
    assert "unknown labels: 2 of 4, left out of loss and metrics" in summary
    assert load_cohort(data_dir, "valid", minus_one_is_unknown=True).findings == ("Emphysema", "Rib fracture")


def test_rows_that_can_be_no_volume_are_said(data_dir):
    rows = [HEADER, label_line(A), label_line(B), label_line(""), f"{C},1"]
    cohort = load_cohort(tables(data_dir, rows, [META_HEADER, meta_line(A), meta_line(B), meta_line(C)]), "valid")
    (note,) = [line for line in cohort.summary().splitlines() if "faulty" in line]
    assert note.startswith("2 faulty label rows: ") and "line 4: found no VolumeName" in note
    assert cohort.skipped == [(C, "labels other than 0 and 1")]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (("scan.nii.gz", "./scan.nii.gz"), "found 'scan.nii.gz' and './scan.nii.gz' for one file"),
        (("scan", "scan.nii.gz"), "found 'scan' and 'scan.nii.gz' for one file"),
        (("../valid_fixed/scan.nii.gz",), "expected a name within the cohort's folder"),
        (("/etc/scan.nii.gz",), "expected a name within the cohort's folder"),
    ],
)
def test_a_file_belongs_to_one_row_and_lies_in_the_cohort(rows, told, data_dir):
    (data_dir / "dataset" / "valid_fixed" / "scan.nii.gz").touch()
    tables(data_dir, [HEADER, *map(label_line, rows)], [META_HEADER])
    with pytest.raises(CohortError, match=re.escape(told)):
        load_cohort(data_dir, "valid")


def test_a_volume_of_ct_rate_s_form_may_lie_in_its_split_s_folder(data_dir):
    name = "valid_70_a_1.nii.gz"
    path = data_dir / "dataset" / "valid_fixed" / name
    path.touch()
    tables(data_dir, [HEADER, label_line(name)], [META_HEADER])
    assert [volume.path for volume in load_cohort(data_dir, "valid").volumes] == [path]


@pytest.mark.parametrize("name", ["scan_001.nii.gz", "site_a/Patient 7.mha", "chest7"])
def test_a_volume_with_a_name_of_its_own_lies_in_the_folder_of_its_split(name, data_dir):
    """As version 2: no metadata row is needed."""
    file = name if "." in name else f"{name}.nii.gz"
    path = data_dir / "dataset" / "valid_fixed" / file
    path.parent.mkdir(exist_ok=True)
    path.touch()
    tables(data_dir, [HEADER, label_line(A), label_line(name)], [META_HEADER, meta_line(A)])
    cohort = load_cohort(data_dir, "valid")
    assert [v.name for v in cohort.volumes] == [A, name]
    assert cohort.volumes[1].path == path and cohort.volumes[1].metadata is None and cohort.skipped == []
