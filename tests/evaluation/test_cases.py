"""Cases: the most wrong volumes by hand, which of them have pictures, and volumes that are not at hand."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ctclip.data.cohort import load_cohort
from ctclip.data.tables import CohortError
from ctclip.data.windows import SOFT_TISSUE_LABELS, SOFT_TISSUE_WINDOW
from ctclip.evaluation import cases
from ctclip.evaluation.calibration import TUNING, FittedThresholds
from ctclip.evaluation.case_slices import Evidence, EvidenceError
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
    assert pictured[0].picture == pictured[3].picture
    assert [shown.jpeg[:2] for shown in pictured[0].picture.slices] == [b"\xff\xd8"] * 2
    assert pictured[0].picture.command == "" and pictured[0].picture.through == "with the most lung"
    assert [name for name, _ in failures] == names[1:] and "valid_999" in failures[1][0]
    assert "truncated" in failures[0][1] or "damaged" in failures[0][1]
    only_first, failures = cases.with_pictures(listed, "volume", data_dir, 1)
    assert [case.picture is not None for case in only_first] == [True, False, False] * 2 and not failures
    of_scan = cases.Case("Emphysema", "false negative", volumes[0].scan, 0.5, 0.5)
    scan, failures = cases.with_pictures([of_scan], "scan", data_dir, 1)
    assert scan[0].picture == pictured[0].picture and not failures
    with pytest.raises(CohortError, match="found no folder"):
        cases.with_pictures(listed, "volume", tmp_path / "nowhere", 1)


def test_evidence_is_asked_once_for_each_volume(phantoms):
    """For all its labels; the ring and the command are each label's own, without where the cohort lies."""
    volume, first_version = (next(volume for volume in load_cohort(phantoms, "valid").volumes
                                  if ("_fixed" in str(volume.path)) == fixed) for fixed in (True, False))
    asked = []

    def of(volume, labels):
        asked.append((volume.name, labels))
        values = np.zeros((len(labels), 8, 8, 8), np.float32)
        for place in range(len(labels)):
            values[place, 4, 2 + 2 * place, 4] = 1
        return torch.full((1, 24, 48, 48), -1.0), values

    listed = [cases.Case(label, "false negative", volume.name, 0.1, 0.5) for label in ("Emphysema", "Cardiomegaly")]
    pictured, failures = cases.with_pictures(listed, "volume", phantoms, 1, None, Evidence(Path("results/a b"), of))
    assert asked == [(volume.name, ["Emphysema", "Cardiomegaly"])] and not failures
    first, second = (case.picture for case in pictured)
    assert first.through == "through the strongest evidence (ring)" and second.window == SOFT_TISSUE_WINDOW
    assert first.slices[0].ring[0] < 0.5 < second.slices[0].ring[0]
    inside = volume.path.relative_to(phantoms).as_posix()
    assert second.command == ("python run_task2.py --mode predict --checkpoint 'results/a b' --input "
                              f"{phantoms.name}/{inside} --explain Cardiomegaly")
    listed = [cases.Case("Emphysema", "false negative", first_version.name, 0.1, 0.5)]
    (case,), _ = cases.with_pictures(listed, "volume", phantoms, 1, None, Evidence(Path("run"), of))
    assert case.picture.command == ""  # read alone it has no spacing


def test_without_evidence_after_all_slices_show_the_most_lung(phantoms):
    volumes = load_cohort(phantoms, "valid").volumes[:2]

    def of(volume, labels):
        raise EvidenceError("found other bytes")

    listed = [cases.Case("Emphysema", "false negative", volume.name, 0.1, 0.5) for volume in volumes]
    pictured, failures = cases.with_pictures(listed, "volume", phantoms, 2, None, Evidence(Path("run"), of))
    assert failures == [("evidence", "found other bytes")]  # said once
    assert [case.picture.through for case in pictured] == ["with the most lung"] * 2


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
