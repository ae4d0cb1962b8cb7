"""The one reader of tables: what is a CSV and what is named so, columns that shift, names that are joined, numbers.

The reference is pandas, where it reads the same (tests/fuzz has mutated tables), and Python's float().
"""

import gzip
import io
import os
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from helpers_data import HEADER, META_HEADER, label_line, meta_line

from ctclip.data.cohort import read_metadata
from ctclip.data.tables import CohortError, how_names_differ, join, number, read_table, shown, unknown_columns
from ctclip.evaluation.tables import load_labels, load_predictions
from ctclip_model import ABNORMALITIES

LABELS = "\n".join([HEADER, *(label_line(f"train_{i}_a_1.nii.gz", (i % 18,)) for i in range(5))]) + "\n"


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "kind", "remedy"),
    [
        (zipped("[Content_Types].xml", "docProps/app.xml", "xl/workbook.xml"), "an Excel workbook", "as CSV"),
        (zipped("mimetype", "content.xml"), "an OpenDocument sheet", "as CSV"),
        (zipped("labels.csv"), "a zip archive", "unpack"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), r"an Excel workbook \(.xls\)", "as CSV"),
        (gzip.compress(LABELS.encode()), "a gzip file", "unpack"),
        (LABELS.encode("utf-16"), "UTF-16 text", "UTF-8"),
        (LABELS.encode("utf-16-le"), "UTF-16 text", "UTF-8"),
        (LABELS.encode("utf-16-be"), "UTF-16 text", "UTF-8"),
        (b"<!DOCTYPE html><html>sign in</html>", "an HTML or XML page", "download"),
        (b"\n {\"VolumeName\": 1}", "JSON", "CSV"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "a git-LFS pointer", "git lfs pull"),
        (LABELS.replace(",", ";").encode(), "columns separated by semicolons", "commas separate"),
        (LABELS.replace(",", "\t").encode(), "columns separated by tabs", "commas separate"),
        (LABELS.replace(",", "|").encode(), "columns separated by vertical bars", "commas separate"),
        (LABELS.encode()[:-40] + bytes(40), "a zero byte in line", "commas"),
        (LABELS.replace("train_3", "träin_3").encode("latin-1"), "not text in columns", "UTF-8"),
        (LABELS.replace("VolumeName", "volumename").encode(), r"no column 'VolumeName' \(but 'volumename'\)", "spell"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_named_csv_and_is_none_is_said(content, kind, remedy, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(CohortError, match=f"found .*{kind}.*, expected .*{remedy}") as error:
        read_table(path, ABNORMALITIES)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_metadata_header_one_column_short_is_refused(tmp_path):
    """Row names, as R writes them: read by name, every column would be that of its left neighbour."""
    path = tmp_path / "m.csv"
    path.write_text("\n".join([META_HEADER, *(f"{i},{meta_line(f'valid_{i}_a_1.nii.gz')}" for i in range(3))]))
    for read in (read_metadata, lambda path: read_table(path, (), META_HEADER.split(",")[1:])):
        with pytest.raises(CohortError, match="line 2: found 6 values, expected 5 as in the header; name every column"):
            read(path)
    path.write_text(path.read_text().replace("VolumeName", "row,VolumeName", 1))
    assert list(read_metadata(path)) == [f"valid_{i}_a_1.nii.gz" for i in range(3)]


@pytest.mark.parametrize("line", [2, 4, 6])
def test_an_unquoted_comma_in_one_row_is_refused_by_training_and_evaluation_alike(line, tmp_path):
    """Commas at the end of every row shift nothing."""
    rows, path = LABELS.splitlines(), tmp_path / "l.csv"
    path.write_text("\n".join([rows[0], *(f"{row},," for row in rows[1:])]))
    assert len(load_labels(path)) == 5
    rows[line - 1] += ","
    path.write_text("\n".join(rows))
    if line > 2:
        with pytest.raises(ValueError, match=f"line {line}: found 20 values, expected 19"):
            load_labels(path)
    rows[line - 1] += "1"
    path.write_text("\n".join(rows))
    for read in (load_labels, lambda path: read_table(path, ABNORMALITIES)):
        with pytest.raises(ValueError, match=f"line {line}: found 20 values, expected 19"):
            read(path)


@pytest.mark.parametrize("cell", ["1_0", "٠", "１", "0x1", "nan", "NA", "", "1,", "1e", "TRUE", "1 0", "--1", "1e999"])
def test_cells_that_are_no_number_are_none(cell):
    assert not 0 <= number(cell) <= 1


def test_numbers_are_read_to_the_last_bit(tmp_path):
    values = np.random.default_rng(0).random((50, 18)) ** 9
    path = tmp_path / "p.csv"
    path.write_text("\n".join([HEADER, *(",".join([f"scan {i}", *map(repr, row.tolist())])
                                         for i, row in enumerate(values))]))
    assert np.array_equal(load_predictions(path).to_numpy(), values)
    assert [number(cell) for cell in ("1", " .5 ", "1.", "+1e-3")] == [1, 0.5, 1, 0.001]


def test_a_long_table_takes_little_time_and_memory(tmp_path):
    """A million rows in seconds and far below a gigabyte: here 20,000, which took 1.4 s and 32 MB."""
    rows = [",".join([repr(x) for x in row]) for row in np.random.default_rng(0).random((100, 18)).tolist()]
    path = tmp_path / "p.csv"
    path.write_text("\n".join([HEADER, *(f"train_{i}_a_1.nii.gz,{rows[i % 100]}" for i in range(20_000))]))
    start = time.process_time()
    read_table(path, ABNORMALITIES)
    assert time.process_time() - start < 0.7
    tracemalloc.start()
    read_table(path, ABNORMALITIES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / 20_000 < 600  # bytes; the 18 numbers alone are 144


def test_a_name_that_an_open_quote_has_joined_to_the_next_row_is_refused(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text(LABELS.replace("train_2_a_1.nii.gz", '"train_2_a_1.nii.gz').replace("train_3_a", '"train_3_a'))
    with pytest.raises(ValueError, match="not text in columns|several lines"):
        load_labels(path)
    path.write_text(LABELS.replace("train_2_a_1.nii.gz", '"train_2\n_a_1.nii.gz"'))
    with pytest.raises(ValueError, match="found a VolumeName of several lines"):
        load_labels(path)


def test_identical_numbers_in_other_spelling_are_the_same_row(tmp_path):
    path, rows = tmp_path / "l.csv", LABELS.splitlines()
    path.write_text("\n".join([*rows, rows[2].replace(",0", ",0.0")]))
    assert len(load_labels(path)) == 5


def test_columns_beside_the_18_are_known_or_named():
    known = ["PatientID", "ScanID", "Warning", "PatientSex", "PatientAge", "Manufacturer", "ZSpacing", "Unnamed: 0"]
    assert unknown_columns([*known, "Pneumothorax", "Emphysema.1"]) == ["Pneumothorax", "Emphysema.1"]


@pytest.mark.parametrize("written", [
    "dataset/valid/{}.nii.gz", "D:\\ct\\{}.nii.gz", "{}.mha", "{}", "./{}.NII.GZ", "{}.nii", "\\\\server\\a\\{}.dcm",
])  # fmt: skip
@pytest.mark.parametrize("upper", [False, True])
def test_names_of_one_volume_are_joined(written, upper):
    names = [f"Patient{i} baseline.nii.gz" for i in range(30)]
    others = [written.format(name.removesuffix(".nii.gz")) for name in names][::-1]
    others = [other.upper() for other in others] if upper else others
    assert join(names, others) == dict(zip(names, others[::-1], strict=True))


def test_names_that_may_be_of_two_volumes_are_not_joined():
    assert join(["p1/scan.nii.gz", "p2/scan.nii.gz"], ["scan"]) == {}
    assert join(["p1/scan.nii.gz"], ["p2/scan.nii.gz"]) == {}
    assert join(["a.nii.gz", "A.mha"], ["a"]) == {}
    assert join(["a.nii.gz"], ["a.mha", "a.nii"]) == {}
    assert join(["p1/scan", "p2/scan"], ["x\\P2\\scan.nii.gz", "x\\P1\\scan.nii.gz"]) == {
        "p1/scan": "x\\P1\\scan.nii.gz", "p2/scan": "x\\P2\\scan.nii.gz"}
    assert join(["a", "a.nii.gz"], ["a.nii.gz", "b"]) == {"a.nii.gz": "a.nii.gz"}


def test_what_tells_names_apart_is_said():
    assert how_names_differ(["a", "b"], ["a.nii.gz", "c.nii.gz"]) == " (all 2 names lack the suffix .nii.gz)"
    assert how_names_differ(["a.mha", "a.nii"], ["a"]) == " (all 2 names have the suffix .mha or .nii, none there)"
    assert how_names_differ(["a.mha"], ["b.nii.gz"]) == " (its names are like 'a.mha')"
    assert how_names_differ(["p1/a"], ["p2/a"]) == " (its names are like 'p1/a')"
    assert how_names_differ([], ["a"]) == ""


@pytest.mark.parametrize(("hidden", "letter", "said"), [
    ("scan\u200b_1.nii.gz", "\u200b", "'\\u200b' (ZERO WIDTH SPACE)"),
    ("\ufeffscan_1.nii.gz", "\ufeff", "'\\ufeff' (ZERO WIDTH NO-BREAK SPACE)"),
    ("scan_1\u00a0.nii.gz", "\u00a0", "'\\xa0' (NO-BREAK SPACE)"),
    ("scan _1.nii.gz", " ", "' ' (SPACE)"),
])
def test_names_that_look_alike_are_told_apart_by_the_letter(hidden, letter, said):
    line = how_names_differ([hidden, "c"], ["b", "scan_1.nii.gz"])
    assert line == f" (it has {hidden!r}, which differs in {said} only)" and (letter == " " or letter not in line)
    assert shown(hidden) == (hidden if letter == " " else repr(hidden))


@pytest.mark.parametrize("column", ["Lung\u00a0nodule", "\u200bLung nodule", "lung  nodule"])
def test_a_column_that_looks_like_one_of_ours_is_shown_as_it_is(column, tmp_path):
    (tmp_path / "labels.csv").write_text(LABELS.replace("Lung nodule", column), encoding="utf-8")
    with pytest.raises(CohortError) as error:
        read_table(tmp_path / "labels.csv", ABNORMALITIES)
    assert f"found no column 'Lung nodule' (but {column!r}), expected" in str(error.value)
    assert all(letter.isprintable() for letter in str(error.value))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "p.csv")
    with pytest.raises(CohortError, match="found a pipe or a device, expected a file, .*; write it into a file first"):
        read_table(tmp_path / "p.csv", ABNORMALITIES)
