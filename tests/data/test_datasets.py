"""Slices and (volume, labels) for training loops of one's own, against `preprocess_volume`; and the axes, on a chest
whose spine and larger lung are known places."""

import re
import warnings

import pytest
import torch
from helpers_data import SMALL, chest, write
from torch.utils.data import DataLoader

from ctclip.data import LabelledVolumes, preprocess_volume, slices
from ctclip.data.tables import CohortError
from ctclip.data.volume_file import VolumeError
from ctclip_model import SLICE_INPUT_SHAPE, UNKNOWN, CTCLIPMultiAbnormalityModel, ScaleCheck


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return write(tmp_path_factory.mktemp("scan") / "scan.nii.gz", chest())


def test_slices_are_adjacent_ones_of_the_preprocessed_volume(scan):
    volume = preprocess_volume(scan, shape=SLICE_INPUT_SHAPE)[0]
    assert slices(scan).shape == (8, 3, 224, 224)
    (middle,) = slices(scan, k=1)
    assert torch.equal(middle, volume[59:62])
    for triplet, centre in zip(slices(scan, k=3), (20, 60, 100), strict=True):
        assert torch.equal(triplet, volume[centre - 1 : centre + 2])
    for k in (0, 121, 2.5, "3", None):
        with pytest.raises(ValueError, match=re.escape(f"k is {k!r}, expected a whole number of 1 to 120 slices")):
            slices(scan, k=k)


def test_slices_have_x_before_y_and_hu_by_1000(scan):
    middle = slices(scan, k=1)[0, 1]  # (x, y): x to the left, y to the back
    x, y = (middle > 0.3).nonzero().float().mean(0).tolist()
    assert x == pytest.approx(112, abs=3) and y > 125  # the spine
    lung = (middle > -0.95) & (middle < -0.75)
    assert lung[:112].sum() > 1.3 * lung[112:].sum() > 0  # the larger lung is at x < 0
    assert middle.min() == -1 and 0.3 < middle.max() <= 1


def test_slices_are_what_the_model_expects(scan, tiny_classfine, monkeypatch):
    monkeypatch.setattr(ScaleCheck, "warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = CTCLIPMultiAbnormalityModel(tiny_classfine).eval()(slices(scan))
    assert logits.shape == (8, 18) and not ScaleCheck.warned


@pytest.fixture
def folder(tmp_path):
    """Two scans in nested folders, one that is cut short, a row without a file and a file without a row."""
    for seed, name in enumerate(("a/one.nii.gz", "b/TWO.nii", "three.nii.gz", "other.nii.gz")):
        write(tmp_path / "scans" / name, chest(seed=seed))
    three = tmp_path / "scans" / "three.nii.gz"
    three.write_bytes(three.read_bytes()[:2000])
    (tmp_path / "labels.csv").write_text("VolumeName,Nodule,Effusion\ntwo,0,1\nabsent,1,1\none,1,0\nthree,0,0\n")
    return tmp_path


def test_a_table_and_a_folder_become_volumes_with_labels(folder):
    dataset = LabelledVolumes(folder / "labels.csv", folder / "scans", SMALL, findings=("Effusion", "Nodule"))
    assert [volume.name for volume in dataset.volumes] == ["two", "one", "three"] and len(dataset) == 3
    volumes, labels = next(iter(DataLoader(dataset, batch_size=2)))
    paths = (folder / "scans" / name for name in ("b/TWO.nii", "a/one.nii.gz"))
    assert torch.equal(volumes, torch.stack([preprocess_volume(path, shape=SMALL) for path in paths]))
    assert labels.tolist() == [[1, 0], [0, 1]] and labels.dtype == torch.float32
    with pytest.raises(VolumeError, match="three.nii.gz: found .*truncated"):
        dataset[2]


def test_an_empty_cell_is_unknown_and_a_volume_without_a_known_label_is_left_out(folder):
    findings = "Nodule", "Effusion"
    (folder / "labels.csv").write_text("VolumeName,Nodule,Effusion\ntwo,,1\none,,\nthree,0,-1\n")
    with pytest.raises(CohortError, match="found other labels for 'three'"):
        LabelledVolumes(folder / "labels.csv", folder / "scans", SMALL, findings)
    dataset = LabelledVolumes(folder / "labels.csv", folder / "scans", SMALL, findings, minus_one_is_unknown=True)
    assert {v.name: v.labels.tolist() for v in dataset.volumes} == {"two": [UNKNOWN, 1], "three": [0, UNKNOWN]}
    assert dataset[0][1].tolist() == [UNKNOWN, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("VolumeName,Nodule\nnone,1\n", "found no file for any of the 1 volumes"),
        ("VolumeName,Nodule\none,0.5\n", "found other labels for 'one', expected 0, 1 or an empty cell"),
        ("VolumeName,Nodule\none,-1\n", "found other labels for 'one', expected 0, 1 or an empty cell"),
        ("VolumeName,Nodule\none,\ntwo,\n", "found no known label for any of the 2 volumes with a file"),
        ("VolumeName,Nodule\none,1\none,0\n", "found one again|with other values"),
        ("VolumeName,Effusion\none,1\n", "found no column 'Nodule'"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(folder, text, message):
    (folder / "labels.csv").write_text(text)
    with pytest.raises(CohortError, match=message) as caught:
        LabelledVolumes(folder / "labels.csv", folder / "scans", SMALL, findings=("Nodule",))
    assert "\n" not in str(caught.value)
