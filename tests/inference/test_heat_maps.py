"""Heat maps as files: that a written map lies where the model saw it, for every way a file can store its axes, and not
outside the body; names, numbers and labels.

Checked against torch's own interpolation, and nibabel reading what was written."""

import json
import tracemalloc
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_data import affine_of, reoriented, write
from helpers_maps import cube, cylinder, maps_of, within
from PIL import Image

from ctclip.data.geometry import place_volume
from ctclip.data.preprocessing import preprocess_volume
from ctclip.data.tables import listing
from ctclip.errors import UserError
from ctclip.inference import heat_maps
from ctclip.inference.scans import PredictionError
from ctclip_model import ABNORMALITIES

# ------------------------------------------------------------------ labels


def test_labels_are_read_as_people_write_them():
    assert heat_maps.parse_labels("lung nodule, EMPHYSEMA ,Lung nodule") == ["Lung nodule", "Emphysema"]
    assert heat_maps.parse_labels(" All ") == list(ABNORMALITIES)
    assert heat_maps.parse_labels("b", ("A", "B")) == ["B"]


def test_a_label_with_a_comma_stands_in_quotes():
    own = ("Nodule, solid", "Nodule")
    assert heat_maps.parse_labels("all", own) == heat_maps.parse_labels(listing(own), own) == list(own)
    with pytest.raises(PredictionError, match="found 'solid'"):
        heat_maps.parse_labels("Nodule, solid", own)


@pytest.mark.parametrize(
    "text, said",
    [
        ("Emphysem", "found 'Emphysem' .* expected .*perhaps Emphysema.*; correct it"),
        ("Emphysema,effusion", "found 'effusion' .*Pleural effusion"),
        ("Emphysema,all", "found 'all'"),
        ("xyz", "Medical material, Arterial"),
        (" , ", "found no label"),
        ('"Emphysema', "a quote or a line has no end"),
    ],
)
def test_unknown_labels_are_one_line(text, said):
    with pytest.raises(PredictionError, match=said) as caught:
        heat_maps.parse_labels(text)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ on the file's own voxels

STORED = ("LPS", "RAS", "LAS", "LPI", "SPL", "ASR", "PIR")
SCANS = {  # shape and spacing along x, y, z
    "smaller": ((50, 40, 30), (5.0, 5.0, 7.0)),
    "larger": ((110, 100, 52), (4.5, 4.7, 9.0)),
    "mixed": ((64, 90, 60), (3.1, 4.8, 10.3)),
}


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("codes", STORED)
def test_a_map_lies_where_the_model_saw_it(tmp_path, codes, scan):
    """A bright block in air goes through the real preprocessing; a map whose only token is the one that the block fills
    must be highest inside the block, in mm as nibabel reads them from the written file."""
    shape, spacing = SCANS[scan]
    hu = np.full(shape, -1000, np.int16)
    start = np.array([round(n * share) for n, share in zip(shape, (0.36, 0.62, 0.45), strict=True)])
    stop = start + np.ceil(45 / np.array(spacing)).astype(int)
    hu[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = 1000
    affine = affine_of(spacing, (31, -7, 300))
    voxels, turned = reoriented(hu, affine, codes)
    path = write(tmp_path / "scan.nii.gz", voxels, tuple(np.linalg.norm(turned[:3, :3], axis=0)), turned)
    seen = preprocess_volume(path, shape=(48, 48, 48), assume_hu=True)
    filled = F.avg_pool3d(seen[None], 3)[0, 0].numpy()
    assert filled.max() > 0.999
    values = np.zeros((16, 16, 16), np.float32)
    values[np.unravel_index(filled.argmax(), filled.shape)] = 0.3

    placement = place_volume(path, (48, 48, 48))
    heat_maps.write_heat_map(values, placement, tmp_path / "map.nii.gz", "Cardiomegaly")
    source, image = nib.load(path), nib.load(tmp_path / "map.nii.gz")
    assert image.shape == source.shape == voxels.shape and image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(image.affine.astype(np.float32), source.affine.astype(np.float32))
    np.testing.assert_allclose(image.get_qform(), image.affine, atol=1e-3)
    assert image.header.get_xyzt_units()[0] == "mm" and b"Cardiomegaly" in image.header["descrip"].item()
    found = image.get_fdata()
    assert 0.15 < found.max() <= 0.3 + 1e-6 and found.min() == 0 and len(np.unique(found)) <= 255
    at = image.affine @ [*np.unravel_index(found.argmax(), found.shape), 1]
    corners = np.sort(np.stack([affine @ [*(start - 0.5), 1], affine @ [*(stop - 0.5), 1]]), axis=0)[:, :3]
    assert (corners[0] < at[:3]).all() and (at[:3] < corners[1]).all()


def test_a_map_is_interpolated_between_token_centres_and_ends_with_the_cube(tmp_path):
    values = np.random.default_rng(3).normal(size=(4, 6, 5)).astype(np.float32)
    placement = cube()
    heat_maps.write_heat_map(values, placement, tmp_path / "map.nii.gz")
    found = nib.load(tmp_path / "map.nii.gz").get_fdata()
    expected = F.interpolate(torch.from_numpy(values)[None, None], (70, 96, 80), mode="trilinear")[0, 0].numpy()
    step = np.abs(values).max() / 127
    np.testing.assert_allclose(found, expected.transpose(1, 2, 0), atol=0.51 * step)

    wide = tuple(np.linspace(-0.5, 1.5, n) for n in placement.shape)
    heat_maps.write_heat_map(values, replace(placement, affine=None, position=wide), tmp_path / "wide.nii.gz")
    image = nib.load(tmp_path / "wide.nii.gz")
    inside = [(p >= 0) & (p <= 1) for p in wide]
    assert not image.get_fdata()[~np.logical_and.outer(np.logical_and.outer(inside[0], inside[1]), inside[2])].any()
    assert image.get_fdata()[np.ix_(*inside)].any() and image.header["sform_code"] == image.header["qform_code"] == 0


def test_a_map_is_whole_repeatable_and_small(tmp_path):
    """Also one of zeros, and over a file of the same name; no temporary file stays."""
    values = np.random.default_rng(3).normal(size=(4, 6, 5)).astype(np.float32)
    first, second = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    second.write_bytes(b"old")
    for path in (first, second):
        heat_maps.write_heat_map(values, cube(), path, "Ä" * 100)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 96 * 80 * 70 * 2 / 4
    heat_maps.write_heat_map(np.zeros((4, 6, 5), np.float32), cube(), first)
    assert not nib.load(first).get_fdata().any()
    assert {path.name for path in tmp_path.iterdir()} == {"a.nii.gz", "b.nii.gz"}


def test_a_sheared_grid_keeps_its_affine(tmp_path):
    """As a CT with a tilted gantry has it: no rotation says that, the matrix does."""
    placement = cube()
    sheared = placement.affine.copy()
    sheared[1, 2] = 2.0
    heat_maps.write_heat_map(np.ones((2, 2, 2)), replace(placement, affine=sheared), tmp_path / "m.nii.gz")
    image = nib.load(tmp_path / "m.nii.gz")
    np.testing.assert_allclose(image.affine, sheared, atol=1e-5)
    assert image.header["qform_code"] == 0 and image.header["sform_code"] == 1


def test_memory_is_a_few_slices(tmp_path):
    """50 slices of 512 x 512: 26 MB as stored, 52 MB as float32."""
    values = np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32)
    placement = cube((512, 512, 50))
    tracemalloc.start()
    heat_maps.write_heat_map(values, placement, tmp_path / "map.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert nib.load(tmp_path / "map.nii.gz").shape == (512, 512, 50)



def test_nothing_is_shown_outside_the_body(tmp_path):
    """Of an oblong scan stored head first, with the highest token outside: the file's voxels there are 0."""
    placement = within(z=(0.2, 0.8), shape=(61, 51, 41))
    placement = replace(placement, position=(*placement.position[:2], placement.position[2][::-1].copy()))
    maps = maps_of(np.ones((1, 8, 12, 12)), placement=placement, voxels=cylinder(z=(0.2, 0.8)))
    heat_maps.write_heat_map(maps.values[0], placement, tmp_path / "map.nii.gz", body=maps.body)
    found = nib.load(tmp_path / "map.nii.gz").get_fdata()
    x, y, _ = (np.abs(position - 0.5) < 0.375 for position in placement.position)
    assert found[np.ix_(x, y)].min() > 0 and not found[~x].any() and not found[:, ~y].any()


# ------------------------------------------------------------------ all of a scan


def test_names_of_files_are_not_alike_and_not_too_long():
    labels = ["Lung nodule", "Lung/nodule", "LUNG NODULE", "Lung nodule 2", "x" * 300, "x" * 299, "肺" * 90, "Maps"]
    stems = heat_maps._file_stems(labels)
    assert stems[:4] == ["Lung_nodule", "Lung_nodule_2", "LUNG_NODULE_3", "Lung_nodule_2_2"]
    assert stems[4:] == ["x" * 80, "x" * 80 + "_2", "肺" * 26, "Maps_2"]  # maps.json has that name
    assert len({stem.lower() for stem in stems}) == len(labels)


VALUES = np.random.default_rng(5).normal(size=(2, 8, 12, 12)).astype(np.float32)
TOLD = (("Emphysema", 0.8, 0.5), ("Lung/nodule", 0.1, 0.4), ("Cardiomegaly", 0.7, 0.5))


def test_everything_of_one_scan(tmp_path):
    maps = maps_of(VALUES, TOLD)
    written = heat_maps.write_scan_heat_maps(maps, tmp_path / "new" / "a", "a note")
    names = ["Emphysema.nii.gz", "Emphysema.png", "Lung_nodule.nii.gz", "Lung_nodule.png", "maps.json", "overview.png"]
    assert [path.name for path in written] == names and set(written) == {*(tmp_path / "new" / "a").iterdir()}
    assert b"Lung/nodule" in nib.load(written[2]).header["descrip"].item()
    assert all(min(Image.open(path).size) > 100 for path in written if path.suffix == ".png")
    again = heat_maps.write_scan_heat_maps(maps, tmp_path / "b", "a note")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
    plain = heat_maps.write_scan_heat_maps(maps, tmp_path / "c")
    assert all(plain[i].read_bytes() != written[i].read_bytes() for i in (1, 3, 5))
    heat_maps.check_heat_maps([tmp_path / "b", tmp_path / "none"], maps.labels)  # its own files, and none


def test_numbers_are_those_of_the_logit(tmp_path):
    """Also of evidence outside the body, which no picture shows; the file is read by the names of its findings."""
    values = np.zeros((1, 8, 12, 12), np.float32)
    values[0, 2, 5, 7], values[0, 3, 6, 6], values[0, 4, 0, 6], values[0, 5, 11, 6] = 3, -1, 8, -2
    maps = maps_of(values, TOLD[:1])
    heat_maps.write_scan_heat_maps(maps, tmp_path)
    numbers = json.loads((tmp_path / "maps.json").read_text(encoding="utf-8"))["findings"]["Emphysema"]
    assert (numbers["probability"], numbers["threshold"], numbers["called"]) == (0.8, 0.5, True)
    assert numbers["logit_before_calibration"] == pytest.approx(8.5) and numbers["remainder"] == 0.5
    assert [numbers[f"contributions_{side}"] for side in ("for", "against")] == [11, -3]
    assert [numbers[f"outside_body_{side}"] for side in ("for", "against")] == [8, -2]
    assert numbers["highest_in_body"] == 3 and numbers["reached_share_of_scale"] == pytest.approx(0.8 * 3 / 8)
    assert numbers["strongest"]["voxel"] == [43, 49, 21] and numbers["strongest"]["mm_below_top"] == 247.5
    assert numbers["strongest"]["ras_mm"] == pytest.approx(cube().affine[:3] @ [43, 49, 21, 1], abs=0.06)
    assert numbers["strongest"]["slice"] == {"axial": 49, "coronal": 50, "sagittal": 44}


@pytest.mark.parametrize("name", ["Emphysema.nii.gz", "Emphysema.png", "maps.json", "overview.png"])
def test_no_file_of_the_user_s_is_replaced(tmp_path, name):
    (tmp_path / name).write_bytes(b"my own")
    with pytest.raises(UserError, match=f"{name}: found a file that this command did not write"):
        heat_maps.check_heat_maps([tmp_path], ["Emphysema"])
