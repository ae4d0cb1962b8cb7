"""From a folder of scans to a table: what counts as a scan, what it is called, what is written, and that a bad one
costs only its own row. results.json is held against the challenge's form as the reference file describes it."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from itertools import count, cycle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_data import affine_of, chest, reoriented, write
from helpers_dicom import DICOMDIR, DOSE_REPORT, write_other, write_series
from helpers_scans import as_itk, write_mha
from helpers_training import one_line
from matplotlib.figure import Figure
from pydicom import dcmread

import run_task2
from ctclip.data.cohort import Volume, load_cohort
from ctclip.data.ct_rate import PREVALENCE
from ctclip.data.loading import read_ahead
from ctclip.evaluation import figures
from ctclip.inference import fusion, heat_maps
from ctclip.inference import predictions as predictions_module
from ctclip.inference import scans as scans_module
from ctclip.inference.part_files import part_path, part_paths, read_lines
from ctclip.inference.predictions import ResultsFile, predict, predict_scans, write_predictions
from ctclip.inference.run_predictions import PartialTable
from ctclip.inference.scans import PredictionError, Scan, find_scans
from ctclip_model import ABNORMALITIES, VisualTransformer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MODEL = FIXTURES / "tiny_a_classfine.pt"
SPACING = (7.5, 7.9, 12.25)


def call(*flags) -> int:
    return run_task2.main(["--mode", "predict", "--checkpoint", str(MODEL), "--device", "cpu", *map(str, flags)])


# ------------------------------------------------------------------ one scan, however it is stored


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """One chest in every format and several orientations, under one folder."""
    root = tmp_path_factory.mktemp("stored")
    hu, affine = chest((46, 44, 21)), affine_of(SPACING)
    write(root / "a.nii.gz", hu, SPACING, affine)
    write(root / "deep" / "b.nii", hu, SPACING, affine)
    write_mha(root / "c.mha", hu, affine)
    write_mha(root / "deep" / "d.mha", hu, affine, compressed=True)
    write_series(root / "dicom", hu, affine)
    write_series(root / "deep" / "dicom", *reoriented(hu, affine, "RAI"))
    for codes in ("RAS", "LAS", "LPI"):
        voxels, turned = reoriented(hu, affine, codes)
        write(root / f"{codes}.nii.gz", voxels, tuple(np.linalg.norm(turned[:3, :3], axis=0)), turned)
        write_mha(root / f"{codes}_m.mha", voxels, turned)
    (root / "notes.txt").write_text("not a scan")
    (root / "._a.nii.gz").write_bytes(b"what a Mac leaves on a stick")
    return root


def test_same_scan_in_every_format_and_orientation_has_the_same_probabilities(stored):
    predictions = predict_scans(stored, MODEL, device="cpu")
    table = predictions.table
    assert list(table.index) == [
        "LAS.nii.gz", "LAS_m.mha", "LPI.nii.gz", "LPI_m.mha", "RAS.nii.gz", "RAS_m.mha", "a.nii.gz", "c.mha",
        "deep/b.nii", "deep/d.mha", "deep/dicom", "dicom",
    ]  # fmt: skip
    assert list(table.columns) == list(ABNORMALITIES) and not predictions.failures
    assert table.std().max() < 1e-6 and (table.max() - table.min()).max() < 1e-4
    assert table.iloc[0].std() > 0.01, "a model that answers alike everywhere would show nothing"


def test_names_are_those_of_files_unless_two_are_alike(tmp_path):
    """So that predictions of a cohort in the hub's layout join its label table."""
    for name in ("train_1/train_1_a/train_1_a_1.nii.gz", "train_2/train_2_a/train_2_a_1.nii.gz"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).touch()
    assert [scan.name for scan in find_scans(tmp_path / "in")] == ["train_1_a_1.nii.gz", "train_2_a_1.nii.gz"]
    for number in "56":
        ct = tmp_path / "in" / "patient" / "ct"
        write_series(ct, chest((20, 18, 8)), affine_of(SPACING), f"1.2.3.4.{number}", f"b{number}")
    names = [scan.name for scan in find_scans(tmp_path / "in")]
    assert names[:2] == ["ct/series_5", "ct/series_6"] and len(names) == 4
    (tmp_path / "in" / "train_2_a_1.mha").touch()
    assert [scan.name for scan in find_scans(tmp_path / "in")] == [
        "train_2_a_1.mha", "patient/ct/series_5", "patient/ct/series_6",
        "train_1/train_1_a/train_1_a_1.nii.gz", "train_2/train_2_a/train_2_a_1.nii.gz",
    ]  # fmt: skip


def test_a_single_file_a_series_folder_and_one_of_its_files(stored):
    whole = predict(stored, MODEL, device="cpu")
    one = next((stored / "dicom").iterdir())
    for source, name in ((stored / "c.mha", "c.mha"), (stored / "dicom", "dicom"), (one, one.name)):
        table = predict(source, MODEL, device="cpu")
        assert list(table.index) == [name]
        np.testing.assert_allclose(table.to_numpy()[0], whole.to_numpy()[0], atol=1e-4)
    both = predict([stored / "c.mha", stored / "dicom"], MODEL, device="cpu")
    assert list(both.index) == ["c.mha", "dicom"]


def test_probabilities_are_those_of_the_model_by_hand(stored):
    from ctclip.data.preprocessing import preprocess_volume
    from ctclip_model import CTCLIPMultiAbnormalityModel

    model = CTCLIPMultiAbnormalityModel(str(MODEL)).eval()
    with torch.inference_mode():
        expected = model(preprocess_volume(stored / "a.nii.gz", shape=model.input_shape)[None]).sigmoid()
    table = predict(stored / "a.nii.gz", MODEL, device="cpu")
    np.testing.assert_allclose(table.to_numpy(), expected.numpy(), atol=1e-6)


# ------------------------------------------------------------------ the command and its files


UNDECIDED = [*ABNORMALITIES, "Scale", "Warning"]  # columns of a table without thresholds
ROUNDED = 6e-5  # a table has four digits


@pytest.fixture
def mixed(tmp_path):
    """Two good scans, and three that cannot be read."""
    folder = tmp_path / "in"
    for seed, name in enumerate(("one", "three")):
        write_mha(folder / f"{name}.mha", chest(seed=seed), affine_of(SPACING))
    (folder / "two.mha").write_bytes((folder / "one.mha").read_bytes()[:9000])
    (folder / "four.nii.gz").write_bytes(b"")
    write_series(folder / "five", chest((20, 18, 8)), affine_of(SPACING), RescaleType="MGML")
    return folder


def test_unreadable_scans_are_named_at_the_end_and_the_others_written(mixed, tmp_path, capsys):
    assert call("--input", mixed, "--output", tmp_path / "out" / "p.csv") == 2
    out, err = capsys.readouterr()
    table = pd.read_csv(tmp_path / "out" / "p.csv", index_col="VolumeName")
    assert list(table.index) == ["one.mha", "three.mha"] and list(table.columns) == UNDECIDED
    assert set(table.pop("Scale")) == {"uncalibrated"} and table.pop("Warning").isna().all()
    assert ((table > 0) & (table < 1)).all().all() and "2 scans" in out
    for name in ("two.mha", "four.nii.gz", "five"):
        assert f"skipped: {name}: found " in err
    last = "3 of 5 scans could not be read and are not in it; they are named above"
    assert err.strip().splitlines()[-1].endswith(last)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.fixture
def overflowing(tmp_path, monkeypatch):
    """A model whose numbers are all finite, and whose answers are not; loading would refuse it."""
    monkeypatch.setattr("ctclip_model.HUGE_WEIGHT", float("inf"))
    huge = {"classifier.weight": torch.full((18, 16), 3e38), "classifier.bias": torch.full((18,), 3e38)}
    state = torch.load(MODEL, weights_only=True) | huge
    torch.save(state, tmp_path / "huge.pt")
    return tmp_path / "huge.pt"


def test_an_answer_that_is_no_number_is_an_unreadable_scan(mixed, overflowing, tmp_path, capsys):
    for name in ("p.csv", "results.json"):
        flags = ["--mode", "predict", "--checkpoint", overflowing, "--input", mixed / "one.mha", "--device", "cpu"]
        assert run_task2.main(list(map(str, [*flags, "--output", tmp_path / name]))) == 2
        err = capsys.readouterr().err
        assert "skipped: one.mha: found an answer that is no number" in err and "1 of 1 scans could not be read" in err
    assert pd.read_csv(tmp_path / "p.csv").empty and not part_paths(tmp_path / "p.csv")
    [row] = json.loads((tmp_path / "results.json").read_text())["predictions"]
    assert row["probabilities"] == PREVALENCE


def test_a_cohort_whose_answers_are_no_numbers_is_not_evaluated(phantoms, overflowing, tmp_path, capsys):
    from ctclip_model import CTCLIPMultiAbnormalityModel

    CTCLIPMultiAbnormalityModel(str(overflowing)).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"data_dir": str(phantoms)}))
    assert run_task2.main(["--mode", "evaluate", "--checkpoint", str(tmp_path / "run"), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert "none of the 16 volumes of its valid split could be read" in err and "an answer that is no number" in err
    assert not (tmp_path / "run" / "predictions.csv").exists()


def test_patients_that_were_trained_on_are_not_reported_as_unseen(phantoms, tmp_path, capsys):
    from ctclip_model import CTCLIPMultiAbnormalityModel

    CTCLIPMultiAbnormalityModel(str(MODEL)).save_pretrained(tmp_path / "run")
    first = [load_cohort(phantoms, split).volumes[0].patient for split in ("train", "valid")]
    volumes = [volume for split in ("train", "valid") for volume in load_cohort(phantoms, split).volumes]
    table = tmp_path / "patients.csv"
    rows = [f"{volume.name},{'one' if volume.patient in first else volume.patient}\n" for volume in volumes]
    table.write_text("VolumeName,PatientID\n" + "".join(rows))
    record = {"data_dir": str(phantoms), "config": {"patients": str(table)}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert run_task2.main(["--mode", "evaluate", "--checkpoint", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert "1 patient of the unseen split among the training patients ('one')" in capsys.readouterr().err


def test_results_json_has_the_challenge_s_form_and_every_input_once(mixed, tmp_path, capsys):
    assert call("--input", mixed, "--output", tmp_path / "results.json") == 2
    assert "3 of 5 scans could not be read and are answered with the training prevalence" in capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["name", "type", "version", "predictions"]
    assert (results["name"], results["type"]) == ("Generated probabilities", "Abnormality Classification")
    assert results["version"] == {"major": 1, "minor": 0}
    answers = {row["input_image_name"]: row["probabilities"] for row in results["predictions"]}
    assert len(results["predictions"]) == 5 and sorted(answers) == ["five", "four", "one", "three", "two"]
    for row in results["predictions"]:
        assert set(row) == {"input_image_name", "probabilities"}
        assert tuple(row["probabilities"]) == ABNORMALITIES
        assert all(isinstance(value, float) and 0 <= value <= 1 for value in row["probabilities"].values())
    assert answers["two"] == answers["four"] == answers["five"] == PREVALENCE
    table = predict(mixed / "one.mha", MODEL, device="cpu")
    np.testing.assert_allclose(list(answers["one"].values()), table.to_numpy()[0], atol=1e-6)


def test_a_saved_model_with_findings_of_its_own_writes_a_table_and_no_results_json(stored, tmp_path, capsys):
    from dataclasses import asdict

    from ctclip_model import CTCLIPMultiAbnormalityModel

    sizes = asdict(CTCLIPMultiAbnormalityModel(str(MODEL)).sizes)
    model = CTCLIPMultiAbnormalityModel(None, sizes=sizes, head="prompts", labels=["Hernia", "Lung nodules"])
    model.save_pretrained(tmp_path / "own")
    flags = ["--mode", "predict", "--checkpoint", str(tmp_path / "own"), "--input", str(stored / "c.mha")]
    assert run_task2.main([*flags, "--output", str(tmp_path / "p.csv")]) == 0
    assert list(pd.read_csv(tmp_path / "p.csv").columns) == ["VolumeName", "Hernia", "Lung nodules", *UNDECIDED[-2:]]
    capsys.readouterr()
    assert run_task2.main([*flags, "--output", str(tmp_path / "p.json")]) == 2
    assert "found labels of your own" in capsys.readouterr().err and not (tmp_path / "p.json").exists()


def test_all_scans_unreadable_is_still_an_answer_for_each(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mha").write_bytes(b"nothing")
    assert call("--input", tmp_path / "in", "--output", tmp_path / "r.json") == 2
    predictions = json.loads((tmp_path / "r.json").read_text())["predictions"]
    assert [row["input_image_name"] for row in predictions] == ["a"]


def test_prevalence_of_a_run_is_that_of_its_tuning_patients(tmp_path):
    from ctclip.evaluation.tables import write_table

    labels = np.zeros((4, 18), int)
    labels[:3, 0] = 1
    names = [f"train_{i}_a_1.nii.gz" for i in range(4)]
    write_table(tmp_path / "tuning_labels.csv", names, labels)
    write_table(tmp_path / "tuning_predictions.csv", names, np.full((4, 18), 0.5))
    np.testing.assert_array_equal(predictions_module.prevalence(tmp_path), [0.75] + [0] * 17)


REFUSED = [
    (["--input", "nowhere"], "nowhere: found no such file or folder"),
    (["--input", "empty"], "found no .nii, .nii.gz or .mha file and no DICOM series"),
    (["--input", "pictures"], "no DICOM series (pictures: 2 files of other kinds skipped: 1 .nrrd, 1 .png)"),
    (["--input", "pictures/a.nrrd"], "found a file that ends in .nrrd, expected .nii, .nii.gz, .mha or DICOM; convert"),
    (["--input", "pictures/notes"], "found a file without an ending, expected .nii, .nii.gz, .mha or DICOM; name a"),
    (["--input", "good", "--output", "p.txt"], "found the ending .txt, expected .csv"),
    (["--input", "good", "--output", "empty/x.nii.gz/p.csv"], "a place that cannot be written"),
    (["--input", "good", "--output", "folder.csv"], "error: folder.csv: found a folder, expected a file or none"),
    (["--input", "good", "--map-thresholds"], "found no tuning patients"),
    (["--input", "good", "--prompts", "nothing.txt"], "nothing.txt"),
    (["--input", "good", "--explain", "Pneumothorax"], "Pneumothorax"),
    (["--input", "good", "--output", "p.json", "--prompts", "mine.txt"], "expected the challenge's 18 in"),
]


@pytest.mark.parametrize(("flags", "line"), REFUSED)
def test_wrong_usage_is_one_line_before_anything_is_computed(tmp_path, monkeypatch, capsys, flags, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "good" / "a.nii.gz", chest())
    (tmp_path / "pictures").mkdir()
    (tmp_path / "folder.csv").mkdir()
    for name in ("a.nrrd", "b.png", "notes"):
        (tmp_path / "pictures" / name).write_bytes(b"what it is")
    (tmp_path / "mine.txt").write_text("Pneumothorax\n")
    (tmp_path / "empty" / "x.nii.gz").write_bytes(b"") if "x.nii.gz" in " ".join(flags) else None
    monkeypatch.setattr(fusion, "predict_volumes", lambda *a, **k: pytest.fail("computed"))
    assert call(*flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err


@pytest.mark.parametrize("missing", ["label", "matplotlib", "folder"])
def test_what_heat_maps_need_is_missed_before_a_model_is_loaded(missing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good" / "a.nii.gz", chest())
    monkeypatch.setattr(fusion, "load_model", None)
    if missing == "matplotlib":
        monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    if missing == "folder":
        (tmp_path / "p_explain").touch()
    label = "Pneumothorax" if missing == "label" else "Emphysema"
    assert call("--input", "good", "--output", "p.csv", "--explain", label) == 2
    err = capsys.readouterr().err
    said = {"label": "found 'Pneumothorax' among the labels", "matplotlib": "found no package matplotlib",
            "folder": "p_explain: found a place that cannot be written"}
    assert err.count("\n") == 1 and said[missing] in err


def test_flags_of_predict_belong_to_predict(capsys):
    for also, flag, *value in (("", "--explain", "all"), ("", "--prompts", "x.txt"),
                               (" or --export features", "--assume-hu")):  # fmt: skip
        assert run_task2.main(["--mode", "train", flag, *value]) == 2
        assert f"found {flag}, which goes with --mode predict{also} only" in capsys.readouterr().err


def test_dicom_without_pydicom_is_one_scan_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    write_series(tmp_path / "in" / "series", chest((20, 18, 8)), affine_of(SPACING))
    write(tmp_path / "in" / "a.nii.gz", chest())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    predictions = predict_scans(tmp_path / "in", MODEL, device="cpu")
    assert list(predictions.table.index) == ["a.nii.gz"]
    [(name, reason)] = predictions.failures
    assert name == "series" and reason.endswith("pip install pydicom SimpleITK")


# ------------------------------------------------------------------ nothing wrong without a word


def filled(hu: np.ndarray) -> np.ndarray:
    """An abdomen, as far as the check sees: a body without lungs."""
    x, y = np.indices(hu.shape)[:2]
    hu[(hu < -600) & (np.abs(x - 24) < 18) & (np.abs(y - 22) < 12)] = 40
    return hu


def warnings_in(capsys) -> list[str]:
    """Without the progress bar, which is drawn again below each."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_a_name_that_spreadsheets_compute_is_kept_and_said(tmp_path, capsys):
    write_mha(tmp_path / "in" / "=1+1.mha", chest(), affine_of(SPACING))
    write_mha(tmp_path / "in" / "1-1.mha", chest(), affine_of(SPACING))
    assert call("--input", tmp_path / "in", "--output", tmp_path / "p.csv") == 0
    assert warnings_in(capsys) == ["warning: 1 name like =1+1.mha: begins as a formula does, and spreadsheet programs "
                                   "compute it; import VolumeName as text"]
    assert set(pd.read_csv(tmp_path / "p.csv").VolumeName) == {"=1+1.mha", "1-1.mha"}


def test_a_scan_that_may_be_no_chest_is_answered_with_a_warning(tmp_path, capsys):
    from ctclip.evaluation.tables import load_predictions

    write_mha(tmp_path / "in" / "abdomen.mha", filled(chest()), affine_of(SPACING))
    write_mha(tmp_path / "in" / "chest.mha", chest(), affine_of(SPACING))
    told = "little lung found (0% of lung and body, 0 mL): is this a chest?"
    assert call("--input", tmp_path / "in", "--output", tmp_path / "p.csv") == 0
    assert warnings_in(capsys) == [f"warning: abdomen.mha: {told}"]
    table = pd.read_csv(tmp_path / "p.csv", index_col="VolumeName", keep_default_na=False)
    assert list(table.columns) == UNDECIDED and list(table.Warning) == [told, ""]
    with pytest.warns(UserWarning, match="is this a chest"):
        alone = predict(tmp_path / "in", MODEL, device="cpu")
    assert list(alone.columns) == list(ABNORMALITIES)
    read = load_predictions(tmp_path / "p.csv")[list(ABNORMALITIES)]
    np.testing.assert_allclose(read.to_numpy(), alone.to_numpy(), atol=ROUNDED)
    assert not capsys.readouterr().err, "evaluation has nothing against the column"
    assert call("--input", tmp_path / "in", "--output", tmp_path / "r.json") == 0
    assert "Warning" not in (tmp_path / "r.json").read_text()
    assert call("--input", tmp_path / "in" / "chest.mha", "--output", tmp_path / "q.csv") == 0
    assert pd.read_csv(tmp_path / "q.csv", index_col=0).Warning.isna().all()


def test_other_dicom_objects_and_unequal_slices_are_told_with_the_answer(tmp_path, capsys):
    places = [0.0, *np.arange(6, 249, 12.25)]
    hu = chest((46, 44, len(places)))
    write_series(tmp_path / "cd" / "DICOM" / "ct", hu, affine_of(SPACING), places=places, SliceThickness="13")
    write_other(tmp_path / "cd" / "DICOM" / "ct" / "DOSE.dcm", DOSE_REPORT)
    write_other(tmp_path / "cd" / "DICOMDIR", DICOMDIR)
    assert call("--input", tmp_path / "cd", "--output", tmp_path / "p.csv") == 0
    lines = warnings_in(capsys)
    assert lines == [
        f"warning: {tmp_path / 'cd'}: 1 other DICOM object skipped: 1 Media Storage Directory",
        "warning: ct: 1 other DICOM object skipped: 1 X-Ray Radiation Dose SR; slices 6 to 12.25 mm apart: "
        "interpolated every 12.25 mm",
    ]
    table = pd.read_csv(tmp_path / "p.csv", index_col="VolumeName")
    assert list(table.index) == ["ct"], "a DICOMDIR makes no scan of its folder"
    assert lines[1] == f"warning: ct: {table.loc['ct', 'Warning']}"


def test_a_series_in_two_folders_is_told_with_each_answer(tmp_path, capsys):
    """As exports do that put so many files into a folder: each half would pass for a scan."""
    whole = write_series(tmp_path / "in" / "a", chest((46, 44, 21)), affine_of(SPACING))
    (tmp_path / "in" / "b").mkdir()
    for file in whole.iterdir():
        if dcmread(file).ImagePositionPatient[2] > 420:
            file.rename(tmp_path / "in" / "b" / file.name)
    write_series(tmp_path / "in" / "c", chest((46, 44, 21)), affine_of(SPACING), series="1.2.3.4.6")
    assert call("--input", tmp_path / "in", "--output", tmp_path / "p.csv") == 0
    told = "its series lies in 2 folders: if it is divided, put its files into one"
    table = pd.read_csv(tmp_path / "p.csv", index_col=0, keep_default_na=False)
    assert [told in warning for warning in table.Warning] == [True, True, False]
    assert sum(told in line for line in warnings_in(capsys)) == 2


def test_values_that_are_no_hu_are_answered_only_on_demand(tmp_path, capsys):
    grey = ((np.clip(chest(), -1000, 1000) + 1000) / 2000 * 255).astype(np.uint8)
    write_mha(tmp_path / "in" / "grey.mha", grey, affine_of(SPACING))
    assert call("--input", tmp_path / "in", "--output", tmp_path / "p.csv", "--explain", "Emphysema") == 2
    assert not (tmp_path / "p_explain").exists(), "no heat map of what is not answered"
    assert "voxels that are not HU: nothing but 0 to" in (err := capsys.readouterr().err) and "--assume-hu" in err
    flags = ["--input", tmp_path / "in", "--output", tmp_path / "p.csv", "--assume-hu", "--explain", "Emphysema"]
    assert call(*flags) == 0
    with pytest.warns(UserWarning, match="grey.mha: little lung"):
        table = predict(tmp_path / "in", MODEL, device="cpu", assume_hu=True)
    written = pd.read_csv(tmp_path / "p.csv", index_col=0)[list(ABNORMALITIES)]
    np.testing.assert_allclose(written, table, atol=ROUNDED)
    made = {path.name for path in (tmp_path / "p_explain" / "grey").iterdir()}
    assert made == {"Emphysema.nii.gz", "Emphysema.png", "maps.json", "overview.png"}
    with pytest.warns(UserWarning, match="grey.mha: found voxels that are not HU"):
        assert predict(tmp_path / "in", MODEL, device="cpu").empty


@pytest.mark.parametrize("kind", [".nrrd", ".mhd", ".hdr"])
def test_the_command_that_is_named_converts_the_file(tmp_path, capsys, kind):
    import SimpleITK

    SimpleITK.WriteImage(as_itk(chest(), affine_of(SPACING)), str(tmp_path / f"a{kind}"))
    assert call("--input", tmp_path / f"a{kind}") == 2
    command = capsys.readouterr().err.strip().partition("; convert it: python ")[2]
    subprocess.run([sys.executable, *shlex.split(command)], check=True)
    write(tmp_path / "b.nii.gz", chest(), SPACING, affine_of(SPACING))
    table = predict([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"], MODEL, device="cpu")
    np.testing.assert_allclose(table.loc["a.nii.gz"], table.loc["b.nii.gz"], atol=1e-5)


def test_files_of_other_kinds_in_a_folder_are_counted(tmp_path, capsys):
    write_mha(tmp_path / "in" / "a.mha", chest(), affine_of(SPACING))
    for name in ("b.nrrd", "c.nrrd", "d.tar.gz", "e.txt", ".f.zip"):
        (tmp_path / "in" / name).write_bytes(b"whatever")
    assert call("--input", tmp_path / "in", "--output", tmp_path / "p.csv") == 0
    told = f"warning: {tmp_path / 'in'}: 3 files of other kinds skipped: 2 .nrrd, 1 .tar.gz\n"
    assert capsys.readouterr().err == told


def test_scans_of_one_name_are_all_answered(tmp_path):
    """a.mha beside a.nii.gz and a DICOM folder a: the challenge lists .mha, which keeps the name alone."""
    write(tmp_path / "in" / "a.nii.gz", chest(), SPACING, affine_of(SPACING))
    write_mha(tmp_path / "in" / "a.mha", chest(), affine_of(SPACING))
    write_series(tmp_path / "in" / "a", chest(), affine_of(SPACING))
    assert [(scan.name, scan.stem) for scan in find_scans(tmp_path / "in")] == [
        ("a.mha", "a"), ("a.nii.gz", "a.nii.gz"), ("a", "a_2"),
    ]  # fmt: skip
    assert call("--input", tmp_path / "in", "--output", tmp_path / "p.csv") == 0
    assert list(pd.read_csv(tmp_path / "p.csv", index_col=0).index) == ["a.mha", "a.nii.gz", "a"]
    assert call("--input", tmp_path / "in", "--output", tmp_path / "r.json") == 0
    rows = json.loads((tmp_path / "r.json").read_text())["predictions"]
    assert [row["input_image_name"] for row in rows] == ["a", "a.nii.gz", "a_2"]


def test_scans_of_one_name_from_several_folders_are_named_by_their_paths(tmp_path):
    for folder in ("one", "two"):
        write_mha(tmp_path / folder / "a.mha", chest(), affine_of(SPACING))
    paths = [tmp_path / "one" / "a.mha", tmp_path / "two"]
    assert [scan.name for scan in find_scans(paths)] == ["one/a.mha", "two/a.mha"]
    assert [scan.name for scan in find_scans([*paths, *paths])] == ["one/a.mha", "two/a.mha"], "each file once"
    assert [scan.name for scan in find_scans(paths[1:])] == ["a.mha"]


def test_a_folder_that_cannot_be_listed_costs_only_itself(tmp_path, monkeypatch, capsys):
    write_mha(tmp_path / "in" / "a.mha", chest(), affine_of(SPACING))
    (tmp_path / "in" / "lost+found").mkdir()
    original = os.scandir

    def scandir(top):
        if str(top).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(top))
        return original(top)

    monkeypatch.setattr(os, "scandir", scandir)
    assert call("--input", tmp_path / "in", "--output", tmp_path / "r.json") == 2
    assert "lost+found: found a folder that cannot be listed (Permission denied)" in capsys.readouterr().err
    rows = json.loads((tmp_path / "r.json").read_text())["predictions"]
    assert [row["input_image_name"] for row in rows] == ["a"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("could not create a primitive"), ZeroDivisionError()])
@pytest.mark.parametrize("place", ["reading", "computing"])
def test_an_error_in_one_scan_costs_only_that_one(tmp_path, monkeypatch, capsys, error, place):
    from ctclip.data import loading
    from ctclip_model import CTCLIPMultiAbnormalityModel

    for name in ("a", "b", "c"):
        write_mha(tmp_path / "in" / f"{name}.mha", chest(), affine_of(SPACING))
    expected = predict(tmp_path / "in", MODEL, device="cpu")
    read, forward = loading.read_volume, CTCLIPMultiAbnormalityModel.forward

    def read_and_mark(volume, shape):
        tensor, decision = read(volume, shape)
        if volume.name == "b.mha":
            if place == "reading":
                raise error
            tensor[0, 0, 0, 0] = 0.5
        return tensor, decision

    def compute(self, volumes):
        if (volumes[:, 0, 0, 0, 0] == 0.5).any():
            raise error
        return forward(self, volumes)

    monkeypatch.setattr(loading, "read_volume", read_and_mark)
    monkeypatch.setattr(CTCLIPMultiAbnormalityModel, "forward", compute)
    assert call("--input", tmp_path / "in", "--output", tmp_path / "p.csv") == 2
    err = capsys.readouterr().err
    assert "skipped: b.mha: " in err and "1 of 3 scans" in err and "Traceback" not in err
    table = pd.read_csv(tmp_path / "p.csv", index_col=0)
    assert list(table.index) == ["a.mha", "c.mha"] and list(table.pop("Scale")) == ["uncalibrated"] * 2
    table = table.drop(columns="Warning")
    np.testing.assert_allclose(table, expected.loc[["a.mha", "c.mha"]], atol=ROUNDED)


def test_an_answer_that_is_no_number_costs_only_its_scan(tmp_path, monkeypatch, capsys):
    from ctclip_model import CTCLIPMultiAbnormalityModel

    for name, seed in (("a", 0), ("b", 1)):
        write_mha(tmp_path / "in" / f"{name}.mha", chest(seed=seed), affine_of(SPACING))
    forward = CTCLIPMultiAbnormalityModel.forward
    added = cycle([0.0, float("nan")])
    monkeypatch.setattr(CTCLIPMultiAbnormalityModel, "forward", lambda self, scan: forward(self, scan) + next(added))
    assert call("--input", tmp_path / "in", "--output", tmp_path / "r.json") == 2
    assert "skipped: b.mha: found an answer that is no number" in capsys.readouterr().err
    rows = json.loads((tmp_path / "r.json").read_text())["predictions"]
    answers = {row["input_image_name"]: row["probabilities"] for row in rows}
    assert answers["b"] == PREVALENCE != answers["a"]
    assert call("--input", tmp_path / "in", "--output", tmp_path / "p.csv") == 2
    assert list(pd.read_csv(tmp_path / "p.csv", index_col=0).index) == ["a.mha"]


def test_results_of_three_thousand_scans_are_kept_one_by_one_in_seconds(tmp_path):
    """Valid JSON with every scan at every moment, and no second file."""
    scans = [Scan(f"{i}.mha", Path(f"{i}.mha"), f"{i}\n\u00fc") for i in range(3000)]
    started = time.process_time()
    results = ResultsFile(tmp_path / "results.json", scans, np.full(18, 0.125))
    for i in range(0, 3000, 2):
        results.answer(f"{i}.mha", np.full(18, i / 3000, np.float32))
        if i % 600 == 0:
            rows = json.loads((tmp_path / "results.json").read_text())["predictions"]
            assert [row["input_image_name"] for row in rows] == [scan.stem for scan in scans]
            values = [list(row["probabilities"].values()) for row in rows]
            np.testing.assert_allclose(values[i], i / 3000, atol=1e-7)
            assert values[i + 1] == values[-1] == [0.125] * 18
    results.close()
    assert time.process_time() - started < 20 and [path.name for path in tmp_path.iterdir()] == ["results.json"]


# ------------------------------------------------------------------ reading ahead


def test_the_next_scan_is_read_while_one_is_computed(tmp_path, monkeypatch):
    """Order of events, not times: before the first batch is handed out, the second volume's reading has begun."""
    import threading

    from ctclip.data import loading

    begun, original = [threading.Event() for _ in range(4)], loading.read_volume

    def watched(volume, shape):
        begun[int(volume.name)].set()
        return original(volume, shape)

    monkeypatch.setattr(loading, "read_volume", watched)
    path = write(tmp_path / "a.nii.gz", chest())
    volumes = [Volume(str(i), path, np.zeros(18, np.float32)) for i in range(4)]
    batches = read_ahead(volumes, (24, 48, 48), [[0], [1], [2], [3]])
    first = next(batches)
    assert first.index.tolist() == [0] and begun[1].wait(5)
    assert not begun[3].wait(0.2), "and not everything is held at once"
    assert [batch.index.tolist() for batch in batches] == [[1], [2], [3]]


def test_reading_ahead_keeps_order_with_uneven_pieces_and_bad_files(tmp_path):
    good = write(tmp_path / "a.nii.gz", chest())
    paths = [good, tmp_path / "none.nii.gz", good, good, good]
    volumes = [Volume(str(i), path, np.zeros(18, np.float32)) for i, path in enumerate(paths)]
    for readers in (1, 3, 8):
        batches = list(read_ahead(volumes, (24, 48, 48), [[4, 1], [], [0, 2, 3]], readers))
        assert [batch.index.tolist() for batch in batches] == [[4], [], [0, 2, 3]]
        assert [name for batch in batches for name, _ in batch.failures] == ["1"]
        assert batches[1].volumes.shape == (0, 1, 24, 48, 48)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_scan(tmp_path):
    """A .mha of 210 MB, which would be 420 MB as floats, next to one of a quarter of a megabyte."""
    hu = chest((512, 512, 1))
    write_mha(tmp_path / "big.mha", np.broadcast_to(hu, (512, 512, 400)), affine_of((0.7, 0.7, 0.9)))
    write_mha(tmp_path / "small.mha", hu[::8, ::8].repeat(30, axis=2), affine_of((5.6, 5.6, 12.0)))
    script = (
        "import resource, sys\n"
        "from run_task2 import predict\n"
        "table = predict(sys.argv[2], sys.argv[1], device='cpu')\n"
        "assert len(table) == 1\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    root, used = Path(__file__).resolve().parents[2], {}
    for name in ("small.mha", "big.mha"):
        command = [sys.executable, "-c", script, MODEL, tmp_path / name]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        used[name] = int(done.stdout)
    assert used["big.mha"] - used["small.mha"] < 90, "MB"


def test_links_are_followed_and_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_mha(tmp_path / "real" / "p1" / "a.mha", chest((9, 8, 7)), affine_of(SPACING))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real" / "p1")
    (tmp_path / "real" / "p1" / "round").symlink_to(tmp_path / "in")
    assert [scan.name for scan in find_scans(tmp_path / "in")] == ["a.mha"]

    def refused(top, onerror, **kwargs):
        onerror(PermissionError(13, "Permission denied", "in/secret"))

    monkeypatch.setattr(scans_module.os, "walk", refused)
    with pytest.raises(PredictionError, match="in/secret: found a folder that cannot be listed .Permission denied."):
        find_scans(tmp_path / "in")


def test_names_that_are_no_text_are_spelled_out(tmp_path):
    good = write_mha(tmp_path / "good.mha", chest(), affine_of(SPACING)).read_bytes()
    (tmp_path / "in").mkdir()
    for name in (b"b\xff.mha", b"two\nlines.mha", "\u00fc b.mha".encode()):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "in"), name))).write_bytes(good)
    assert call("--input", tmp_path / "in", "--output", tmp_path / "p.csv") == 0
    names = list(pd.read_csv(tmp_path / "p.csv", index_col="VolumeName").index)
    assert names == ["b\\xff.mha", "two\\nlines.mha", "\u00fc b.mha"]


def test_a_series_whose_files_are_all_damaged_is_still_a_scan(tmp_path):
    folder = write_series(tmp_path / "in" / "series", chest((20, 18, 4)), affine_of(SPACING))
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:600])
    write(tmp_path / "in" / "a.nii.gz", chest())
    predictions = predict_scans(tmp_path / "in", MODEL, device="cpu")
    assert list(predictions.table.index) == ["a.nii.gz"] and [name for name, _ in predictions.failures] == ["series"]


def test_find_scans_asks_no_file_for_its_content(tmp_path):
    """Also what cannot be opened is listed: the challenge fails on a scan that is missing."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken link.mha").symlink_to(tmp_path / "gone")
    assert [(scan.name, scan.stem) for scan in find_scans(tmp_path / "in")] == [("broken link.mha", "broken link")]
    with pytest.raises(PredictionError, match="an empty list"):
        find_scans([])


def test_write_predictions_by_ending(tmp_path):
    write(tmp_path / "a.nii.gz", chest())
    predictions = predict_scans(tmp_path / "a.nii.gz", MODEL, device="cpu")
    write_predictions(tmp_path / "p.csv", predictions, MODEL)
    written = pd.read_csv(tmp_path / "p.csv", index_col=0)
    assert list(written.pop("Scale")) == ["uncalibrated"] and written.pop("Warning").isna().all()
    pd.testing.assert_frame_equal(written, predictions.table, check_dtype=False, atol=ROUNDED)


def test_a_file_of_the_user_is_not_replaced_and_an_earlier_output_is(phantoms, tmp_path, capsys):
    write(tmp_path / "a.nii.gz", chest())
    labels = next(phantoms.rglob("*valid_predicted_labels.csv"))
    others = {
        "labels.csv": labels.read_bytes(), "notes.csv": b"scan,comment\na,mine\n",
        "results.json": b'{"name": "mine", "predictions": []}', "binary.json": b"\xff\xfe\x00",
    }  # fmt: skip
    for name, mine in others.items():
        (tmp_path / name).write_bytes(mine)
        assert call("--input", tmp_path / "a.nii.gz", "--output", tmp_path / name) == 2
        err = capsys.readouterr().err
        assert one_line(err) and f"{name}: found a file that this command did not write, expected none" in err
        assert (tmp_path / name).read_bytes() == mine
    for name in ("p.csv", "r.json", "empty.csv"):
        (tmp_path / "empty.csv").touch()
        written = []
        for _ in range(2):
            assert call("--input", tmp_path / "a.nii.gz", "--output", tmp_path / name) == 0
            written.append((tmp_path / name).read_bytes())
        assert written[0] == written[1]


# ------------------------------------------------------------------ with heat maps, with prompts


@pytest.mark.parametrize("suffix", [".nii.gz", ".png"])
def test_a_heat_map_replaces_no_scan_and_no_picture_of_the_user(suffix, tmp_path, capsys):
    write(tmp_path / "a.nii.gz", chest())
    flags = ["--input", tmp_path / "a.nii.gz", "--output", tmp_path / "p.csv", "--explain", "Emphysema"]
    assert call(*flags) == 0 == call(*flags)
    target = tmp_path / "p_explain" / "a" / f"Emphysema{suffix}"
    if suffix == ".png":
        Figure(figsize=(1, 1)).savefig(target)
    else:
        shutil.copy(tmp_path / "a.nii.gz", target)
    mine, written = target.read_bytes(), (tmp_path / "p.csv").read_bytes()
    capsys.readouterr()
    assert call(*flags) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"Emphysema{suffix}: found a file that this command did not write" in err
    assert target.read_bytes() == mine and (tmp_path / "p.csv").read_bytes() == written


def test_explain_writes_maps_on_each_scan_s_grid_beside_the_output(stored, tmp_path, capsys):
    """With the answers, to the last bit, that there are without."""
    import nibabel

    for name in ("a.nii.gz", "RAS_m.mha"):
        flags = ["--input", stored / name]
        assert call(*flags, "--output", tmp_path / "p.csv", "--explain", "lung nodule,Emphysema") == 0
        assert call(*flags, "--output", tmp_path / "plain.csv") == 0
        assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()
        made = {path.name for path in (tmp_path / "p_explain" / name.split(".")[0]).iterdir()}
        pair = {f"{label}{ending}" for label in ("Lung_nodule", "Emphysema") for ending in (".nii.gz", ".png")}
        assert made == pair | {"maps.json", "overview.png"}
    assert f"Wrote 6 files of heat maps to {tmp_path / 'p_explain'}" in capsys.readouterr().out
    heat = nibabel.load(tmp_path / "p_explain" / "RAS_m" / "Emphysema.nii.gz")
    np.testing.assert_allclose(heat.affine, nibabel.load(stored / "RAS.nii.gz").affine, atol=1e-4)
    assert heat.shape == nibabel.load(stored / "RAS.nii.gz").shape and heat.get_fdata().any()


def test_heat_maps_of_earlier_predictions_are_no_scans(tmp_path, capsys):
    """With the output among the scans, and heat maps moved and copied to other folders."""
    write(tmp_path / "in" / "a.nii.gz", chest(), SPACING, affine_of(SPACING))
    (tmp_path / "in" / "a.png").write_bytes(b"a picture of the user's own")
    flags = ["--input", tmp_path / "in", "--output", tmp_path / "in" / "p.csv"]
    assert call(*flags, "--explain", "Emphysema") == 0
    made = tmp_path / "in" / "p_explain"
    shutil.copytree(made, tmp_path / "in" / "moved")
    (made / "a" / "Emphysema.png").unlink()
    capsys.readouterr()
    assert call(*flags) == 0
    assert list(pd.read_csv(tmp_path / "in" / "p.csv").VolumeName) == ["a.nii.gz"]
    told = [line for line in warnings_in(capsys) if "heat map" in line]
    assert told == [f"warning: {tmp_path / 'in'}: 2 heat maps of earlier predictions skipped"]
    with pytest.raises(PredictionError, match="moved: 1 heat map of earlier predictions skipped"):
        find_scans(tmp_path / "in" / "moved")
    assert call("--input", tmp_path / "in" / "moved" / "a" / "Emphysema.nii.gz") == 2
    assert "voxels that are not HU: nothing but" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_segmentation_beside_a_scan_is_refused(tmp_path, capsys, dtype):
    """Of organs, numbered from 0 to 117."""
    hu = chest()
    labels = np.digitize(hu, np.arange(-1000, 1000, 17)).astype(dtype)
    write(tmp_path / "in" / "a.nii.gz", hu, SPACING, affine_of(SPACING))
    write(tmp_path / "in" / "a_seg.nii.gz", labels, SPACING, affine_of(SPACING))
    predictions = predict_scans(tmp_path / "in", MODEL, device="cpu")
    assert list(predictions.table.index) == ["a.nii.gz"]
    ((name, reason),) = predictions.failures
    assert name == "a_seg.nii.gz" and "voxels that are not HU" in reason


def test_the_folder_one_is_in_is_a_series_by_its_own_name(stored, monkeypatch):
    monkeypatch.chdir(stored / "dicom")
    assert [scan.name for scan in find_scans(".")] == ["dicom"]


def test_what_is_done_when_ctrl_c_comes_is_kept(stored, tmp_path, monkeypatch, capsys):
    from ctclip.data import loading

    original, read = loading.read_volume, []

    def interrupted(volume, shape):
        read.append(volume.name)
        if len(read) == 4:
            raise KeyboardInterrupt
        return original(volume, shape)

    monkeypatch.setattr(loading, "read_volume", interrupted)
    assert call("--input", stored, "--output", tmp_path / "p.csv") == 130
    part = part_path(tmp_path / "p.csv")
    rows = [line for line in read_lines(part) if "name" in line]
    assert [row["name"] for row in rows] == read[: len(rows)] and 1 <= len(rows) <= 3
    line = f"Interrupted: kept in {part}: {len(rows)} scan{'s' * (len(rows) > 1)}; the same command goes on from there"
    assert line in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()
    alone = predict(stored / read[0], MODEL, device="cpu").iloc[0]
    assert rows[0]["probabilities"] == alone.tolist(), "which other scans there are changes no bit of an answer"


def test_what_is_done_when_the_process_is_killed_is_kept(tmp_path):
    """SIGKILL: no handler runs, so that the rows must have been on the disk already."""
    script = (
        "import os, signal, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from ctclip.inference.run_predictions import PartialTable\n"
        "with PartialTable(Path(sys.argv[1]), ['a', 'b']) as part:\n"
        "    part.append('one', np.float32([0.25, 0.1]))\n"
        "    part.append('two, too', np.float32([0.5, 0.2]))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root, path = Path(__file__).resolve().parents[2], tmp_path / "new" / "p.part.csv"
    done = subprocess.run([sys.executable, "-c", script, path], cwd=root, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    table = pd.read_csv(path, index_col="VolumeName")
    assert list(table.index) == ["one", "two, too"] and table.loc["one"].tolist() == [0.25, 0.1, "uncalibrated"]
    with PartialTable(path, ["a", "b"]) as part:
        part.append("three", np.float32([0, 1]))
        assert list(pd.read_csv(part.path).VolumeName) == ["three"], "of this run, not of the one before"
    assert not part.path.exists() and list(pd.read_csv(path).VolumeName) == ["one", "two, too"]


def test_rows_of_an_interrupted_command_survive_the_next_one(tmp_path):
    """The second command has a file of its own beside them, and removes that one only."""
    path, labels = tmp_path / "p.part.csv", ("A", "B")
    with pytest.raises(KeyboardInterrupt), PartialTable(path, labels) as first:
        first.append("one", np.array([0.1, 0.2]))
        raise KeyboardInterrupt
    kept = path.read_bytes()
    with PartialTable(path, labels) as second:
        second.append("two", np.array([0.3, 0.4]))
        assert second.path.name == "p.part2.csv" and second.path.exists()
    assert path.read_bytes() == kept and not second.path.exists()


def test_with_maps_a_scan_passes_the_tower_once(tmp_path, monkeypatch):
    """Also by way of the models of an ensemble of one."""
    for name in "abc":
        write(tmp_path / "in" / f"{name}.nii.gz", chest(), SPACING, affine_of(SPACING))
    seen, original = [], VisualTransformer.forward
    monkeypatch.setattr(VisualTransformer, "forward", lambda self, x: seen.append(len(x)) or original(self, x))
    predictions = predict_scans(tmp_path / "in", MODEL, device="cpu", explain="Emphysema,Cardiomegaly",
                                explain_dir=tmp_path / "maps")  # fmt: skip
    assert len(predictions.table) == sum(seen) == 3 and len(predictions.heat_maps) == 3 * 6
    assert {*predictions.heat_maps} == set(tmp_path.glob("maps/*/*"))


@pytest.mark.parametrize("written", [0, 3])  # of 2 pictures for each scan
def test_maps_that_cannot_be_written_end_the_command_in_a_line(written, tmp_path, monkeypatch, capsys):
    """Whichever scan's: they are written in a thread of their own. What is done, maps too, is kept."""
    for name in "ab":
        write(tmp_path / "in" / f"{name}.nii.gz", chest(), SPACING, affine_of(SPACING))
    drawn = count()

    def full(image, path):
        if next(drawn) >= written:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(heat_maps, "write_picture", full)
    flags = ["--input", tmp_path / "in", "--output", tmp_path / "p.csv", "--explain", "Emphysema"]
    assert call(*flags) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err and "Traceback" not in err and ("Kept in" in err) == bool(written), err
    assert len(part_paths(tmp_path / "p.csv")) == bool(written) and not (tmp_path / "p.csv").exists()
