"""Cases: the most wrong volumes by hand, pictures with marker voxels, and volumes that are not at hand."""

import io
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from ctclip.data.cohort import load_cohort
from ctclip.data.tables import CohortError
from ctclip.data.windows import SOFT_TISSUE_LABELS, Window
from ctclip.evaluation import cases
from ctclip.evaluation.calibration import TUNING, FittedThresholds
from ctclip.evaluation.metrics import ABNORMALITIES
from ctclip.evaluation.tables import Rows


def rows_with(labels, probabilities, names=None):
    """Rows whose first label is as given; all others negative at 0."""
    y, p = np.zeros((len(labels), 18), np.int8), np.zeros((len(labels), 18))
    y[:, 0], p[:, 0] = labels, probabilities
    names = np.array(names or [f"valid_{i}_a_1.nii.gz" for i in range(len(labels))])
    return Rows(names, np.array([name[:7] for name in names]), y, p, ABNORMALITIES, len(names))


def fitted(calibrated, threshold, calibrated_threshold):
    thresholds, shown = np.full(18, threshold), np.full(18, calibrated_threshold)
    return FittedThresholds(None, TUNING, 0, [], {}, calibrated, thresholds, shown, np.array(threshold))


def test_the_most_wrong_volumes_by_hand():
    """At 0.5: false negatives 0.1, 0.2, 0.3, 0.4 (three are listed), false positives 0.9, 0.6 and, equal to it, 0.5."""
    rows = rows_with([1, 1, 1, 1, 1, 0, 0, 0, 0], [0.3, 0.1, 0.2, 0.4, 0.8, 0.6, 0.9, 0.2, 0.5])
    found = cases.worst_cases(rows, fitted(rows.probabilities / 2, 0.5, 0.25))
    assert [(c.kind, c.name[6], c.probability) for c in found] == [
        ("false negative", "1", 0.05), ("false negative", "2", 0.1), ("false negative", "0", 0.15),
        ("false positive", "6", 0.45), ("false positive", "5", 0.3), ("false positive", "8", 0.25)]
    assert {c.label for c in found} == {ABNORMALITIES[0]} and {c.threshold for c in found} == {0.25}
    assert cases.worst_cases(rows, fitted(rows.probabilities, 2.0, 1.0))[-1].kind == "false negative"


def test_the_picture_is_turned_as_radiologists_look():
    """Axes (z, x, y) in LPS: markers at the patient's right, front and head lie to the left, at the top and the top."""
    hu = torch.full((1, *cases.PICTURE_SHAPE), -1.0)
    hu[0, :, :, 30:33] = -0.8  # a thin shell, as partial volumes make it: not lung
    hu[0, 97:104, 80:120, 80:120] = hu[0, 80:120, 80:120, 97:104] = -0.8  # the planes with the most lung
    hu[0, 97:104, 10:14, 97:104] = 1  # right
    hu[0, 97:104, 97:104, 10:14] = 1  # front
    hu[0, 190:194, 97:104, 97:104] = 1  # head
    shown = np.array(Image.open(io.BytesIO(cases.picture(hu, Window(0, 2000)))).convert("L"))
    assert shown.shape == (200, 400)
    axial, coronal = shown[:, :200], shown[:, 200:]
    for slice_, row, column in ((axial, 100, 12), (axial, 12, 100), (coronal, 8, 100)):
        assert slice_[row, column] > 150, (row, column)
    for slice_, row, column in ((axial, 100, 188), (axial, 188, 100), (coronal, 191, 100)):
        assert slice_[row, column] < 60, (row, column)


def test_pictures_of_the_first_of_each_kind_and_what_could_not_be_read(phantoms, tmp_path):
    data_dir = tmp_path / "cohort"
    shutil.copytree(phantoms, data_dir)
    volumes = load_cohort(data_dir, "valid").volumes
    spoiled = volumes[1].path
    spoiled.write_bytes(spoiled.read_bytes()[:2000])
    names = [volumes[0].name, volumes[1].name, "valid_999_a_1.nii.gz"]
    kinds = ("false negative", "false positive")
    listed = [cases.Case("Emphysema", kind, name, 0.5, 0.5) for kind in kinds for name in names]
    pictured, failures = cases.with_pictures(listed, "volume", data_dir, 3)
    assert [case.picture is not None for case in pictured] == [True, False, False] * 2
    assert pictured[0].picture == pictured[3].picture and pictured[0].picture[:2] == b"\xff\xd8"
    assert [name for name, _ in failures] == names[1:] and "valid_999" in failures[1][0]
    assert "truncated" in failures[0][1] or "damaged" in failures[0][1]
    only_first, failures = cases.with_pictures(listed, "volume", data_dir, 1)
    assert [case.picture is not None for case in only_first] == [True, False, False] * 2 and not failures
    of_scan = cases.Case("Emphysema", "false negative", volumes[0].scan, 0.5, 0.5)
    scan, failures = cases.with_pictures([of_scan], "scan", data_dir, 1)
    assert scan[0].picture == pictured[0].picture and not failures
    with pytest.raises(CohortError, match="found no folder"):
        cases.with_pictures(listed, "volume", tmp_path / "nowhere", 1)


def test_cases_of_cross_validation_are_found_in_the_training_split(phantoms):
    volume = load_cohort(phantoms, "train").volumes[0]
    asked = cases.Case("Emphysema", "false negative", volume.name, 0.5, 0.5)
    (case,), failures = cases.with_pictures([asked], "volume", phantoms, 1)
    assert case.picture is not None and not failures


def test_what_is_no_hu_has_no_picture(phantoms, tmp_path):
    """The check is prediction's: a volume in 0 to 255 under a good header, and no metadata row."""
    data_dir = tmp_path / "cohort"
    shutil.copytree(phantoms, data_dir)
    volume = next(each for each in load_cohort(data_dir, "valid").volumes if "_fixed" in str(each.path))
    image = nib.load(volume.path)
    grey = ((np.clip(np.asarray(image.dataobj), -1000, 1000) + 1000) * (255 / 2000)).astype(np.uint8)
    header = image.header
    header.set_data_dtype(np.uint8)
    nib.save(nib.Nifti1Image(grey, image.affine, header), volume.path)
    asked = cases.Case("Emphysema", "false negative", volume.name, 0.5, 0.5)
    (case,), ((name, reason),) = cases.with_pictures([asked], "volume", data_dir, 1)
    assert case.picture is None and name == volume.name and ("not HU" in reason or "ambiguous" in reason)


def test_lung_findings_are_seen_in_the_lung_window():
    assert set(ABNORMALITIES) > SOFT_TISSUE_LABELS
    assert {"Lung nodule", "Emphysema", "Consolidation"}.isdisjoint(SOFT_TISSUE_LABELS)
    assert {"Cardiomegaly", "Hiatal hernia", "Pleural effusion"} <= SOFT_TISSUE_LABELS
