"""Which reading of a file's voxels is HU, on files of both kinds in folders of both, mixtures of tissue, and two scans
of real patients, where CTCLIP_REAL_CT names their folder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import (
    REAL,
    REAL_FILES,
    SMALL,
    affine_of,
    chest,
    needs_real_ct,
    published,
    put,
    real_scan,
    reoriented,
    row,
    volume_of,
    write,
)

from ctclip.data import volume_file
from ctclip.data.cohort import load_cohort
from ctclip.data.hounsfield import VoxelStatistics, decide_hu
from ctclip.data.preprocessing import preprocess_volume, read_volume
from ctclip.data.volume_file import VolumeError


@pytest.mark.parametrize("fixed_folder", [True, False])
@pytest.mark.parametrize("intercept", [-1024, -8192])
@pytest.mark.parametrize("content", ["hu", "stored"])
def test_voxels_decide_whatever_the_folder(tmp_path, content, intercept, fixed_folder):
    path = put(tmp_path, "valid_1_a_1.nii.gz", fixed_folder)
    hu = chest()
    hu[:6] = -8192 if content == "hu" else hu[:6]  # out-of-view padding, as version 2 has it
    if content == "hu":
        write(path, hu)
    else:
        write(path, hu - np.int16(intercept), (1.0, 1.0, 1.0), np.eye(4))
    volume, decision = read_volume(volume_of(path, row(intercept=intercept)), SMALL)
    assert decision.reading == content
    assert ("contradicted" in decision.evidence) == (fixed_folder != (content == "hu"))
    assert np.abs(volume.numpy() - published(hu, (8.0, 8.0, 12.0), SMALL)).max() < 3e-7


def test_hu_that_lost_its_header_takes_the_row_s_spacing(tmp_path):
    path = write(tmp_path / "v.nii.gz", chest(), (1.0, 1.0, 1.0), np.eye(4))
    volume, decision = read_volume(volume_of(path, row()), SMALL)
    assert decision.reading == "hu"
    assert np.abs(volume.numpy() - published(chest(), (8.0, 8.0, 12.0), SMALL)).max() < 3e-7


def test_equal_readings_are_not_ambiguous(tmp_path):
    _, decision = read_volume(volume_of(write(tmp_path / "v.nii.gz", chest()), row(intercept=0)), SMALL)
    assert decision.reading == "hu" and "the same" in decision.evidence


def test_without_a_row_the_header_must_be_plausible(tmp_path):
    _, decision = read_volume(volume_of(write(tmp_path / "hu.nii.gz", chest())), SMALL)
    assert decision.reading == "hu" and "no metadata row" in decision.evidence


# Pictures that are no HU, made of a chest's HU, and what is found.
NO_HU = {
    "0 to 1": (lambda hu: (np.clip(hu, -1000, 1000) + 1000) / 2000, "nothing but 0 to"),
    "-1 to 1": (lambda hu: np.clip(hu, -1000, 1000) / 1000, "nothing but -1 to"),
    "HU / 1000": (lambda hu: hu / 1000, "nothing but -1."),
    "standardised": (lambda hu: (hu - hu.mean()) / hu.std(), "nothing but -"),
    "0 to 255": (lambda hu: ((np.clip(hu, -1000, 1000) + 1000) / 2000 * 255).astype(np.uint8), "nothing but 0 to"),
    "0 to 65535": (lambda hu: ((np.clip(hu, -1000, 1000) + 1000) / 2000 * 65535).astype(np.uint16), "no air"),
    "soft window": (lambda hu: np.clip(hu, -160, 240), "nothing but -160 to 240"),
    "cut off below": (lambda hu: np.clip(hu, -700, None), "cut off at -700 (a window)"),
    "background filled in": (lambda hu: np.where(hu < -930, 0, hu).astype(np.int16), "exactly 0 (filled in)"),
    "lung window": (lambda hu: np.clip(hu, -1350, 150), "cut off at 150 (a window)"),
    "mask": (lambda hu: (hu < -500).astype(np.uint8), "nothing but 0 to 1"),
    "raw": (lambda hu: hu + np.int16(1024), "no air"),
    "shifted twice": (lambda hu: hu - np.int16(1024), "no body"),
    "negative": (lambda hu: -hu.astype(np.int16), "HU: "),
    "ten times": (lambda hu: (hu.astype(np.int32) * 10).astype(np.int16), "HU: "),
    "noise": (lambda hu: np.random.default_rng(0).integers(-3000, 3000, hu.shape).astype(np.int16), "where none lies"),
    "padding": (lambda hu: np.where(np.indices(hu.shape).sum(0) < 9, hu, -8192).astype(np.int16), "no body"),
}


@pytest.mark.parametrize("case", NO_HU)
def test_what_is_no_hu_is_refused_by_every_reader_unless_it_is_asked_for(tmp_path, case):
    change, told = NO_HU[case]
    path = write(tmp_path / "v.nii.gz", change(chest()))
    for read in (lambda: read_volume(volume_of(path), SMALL), lambda: preprocess_volume(path, None, SMALL),
                 lambda: read_volume(volume_of(path, row(intercept=0)), SMALL)):
        with pytest.raises(VolumeError, match="found voxels that are not HU") as caught:
            read()
        assert told in str(caught.value)
    asked, _ = read_volume(replace(volume_of(path), assume_hu=True), SMALL)
    assert torch.equal(asked, preprocess_volume(path, None, SMALL, assume_hu=True))


@pytest.mark.parametrize("wide", [2, 4])
def test_a_small_patient_in_a_wide_field_of_view_is_hu(tmp_path, wide):
    """Body and lungs are 9 and 2 % of the picture."""
    hu = np.full((48 * wide, 44 * wide, 20), -1000, np.int16)
    x, y = (24 * (wide - 1), 22 * (wide - 1))
    hu[x : x + 48, y : y + 44] = chest()
    volume, decision = read_volume(volume_of(write(tmp_path / "v.nii.gz", hu, (5.0, 5.0, 12.0))), SMALL)
    assert decision.reading == "hu" and decision.notes == ()


def test_slices_of_one_value_between_others_are_told(tmp_path):
    """As a copy leaves them whose bytes never came; at the ends they are padding."""
    for places, told in (([7, 8, 12], 3), ([0, 1, 19], 0)):
        hu = chest()
        hu[:, :, places] = -1024
        _, decision = read_volume(volume_of(write(tmp_path / "v.nii.gz", hu)), SMALL)
        notes = [note for note in decision.notes if "of one value" in note]
        assert notes == ([f"{told} slices of one value between others (damaged?)"] if told else [])


PADDED = {  # value, slices at the foot and at the head -> the note
    "0 HU": (0, 0, 4, "the last 4 of 24 slices hold one value, 0: padding?"),
    "one slice": (0, 1, 0, "the first of 21 slices holds one value, 0: padding?"),
    "fat": (-100, 2, 2, "the first 2 of 24 slices hold one value, -100: padding?; the last 2 of 24"),
    "air, which moves the anatomy": (-1024, 0, 4, "hold one value, -1024: padding? It moves the anatomy by 24 mm"),
    "air, more of it at one end": (-1000, 6, 2, "the first 6 of 28 slices hold one value, -1000: padding? It moves"),
    "air on both sides, as preprocessing pads": (-1000, 4, 5, ""),
}


@pytest.mark.parametrize("codes", ["LPS", "LPI", "SAR"])
@pytest.mark.parametrize("case", PADDED)
def test_slices_of_one_value_at_an_end_are_told_where_they_change_the_tensor(tmp_path, case, codes):
    value, before, after, told = PADDED[case]
    hu = np.pad(chest(), ((0, 0), (0, 0), (before, after)), constant_values=value)
    voxels, affine = reoriented(hu, affine_of((8.0, 8.0, 12.0)), codes)
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0))
    _, decision = read_volume(volume_of(write(tmp_path / "v.nii.gz", voxels, spacing, affine)), SMALL)
    notes = "; ".join(decision.notes)
    assert (codes == "LPI" or told in notes) and bool(notes) == bool(told)


def test_air_on_both_sides_leaves_the_tensor_as_it_was(tmp_path):
    """Preprocessing pads with it itself: what PADDED keeps silent about."""
    hu = chest()
    paths = [write(tmp_path / "a.nii.gz", hu), write(tmp_path / "b.nii.gz", np.pad(hu, ((0, 0), (0, 0), (5, 5)),
                                                                               constant_values=-1000))]
    alone, padded = (read_volume(volume_of(path), SMALL)[0][0, 5:-5] for path in paths)
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-5)


ORDERS = {
    "text": lambda count: sorted(range(count), key=str),
    "text from 1": lambda count: sorted(range(count), key=lambda number: str(number + 1)),
    "every other one first": lambda count: [*range(0, count, 2), *range(1, count, 2)],
    "two interleaved": lambda count: np.argsort([*range(0, count, 2), *range(1, count, 2)]),
    "no order": lambda count: np.random.default_rng(0).permutation(count),
}


def order_notes(path, hu, spacing):
    _, decision = read_volume(replace(volume_of(write(path, hu, spacing)), assume_hu=True), SMALL)
    return [note for note in decision.notes if "neighbouring slices" in note]


@pytest.mark.parametrize("count", [20, 35])
@pytest.mark.parametrize("order", ORDERS)
def test_slices_stacked_in_another_order_than_they_lie_are_told(tmp_path, order, count):
    hu, spacing = chest((48, 44, count)), (8.0, 8.0, 240 / count)
    assert order_notes(tmp_path / "v.nii.gz", hu, spacing) == []
    (note,) = order_notes(tmp_path / "v.nii.gz", hu[:, :, ORDERS[order](count)], spacing)
    assert ("as text (1, 10, 11, ..., 2)?" in note) == order.startswith("text")


def test_slices_in_order_are_not_told(phantoms):
    """As the phantoms are, in both versions."""
    volumes = load_cohort(phantoms, "valid").volumes
    assert len(volumes) == 16
    for volume in volumes:
        assert not [note for note in read_volume(volume, SMALL)[1].notes if "slices" in note], volume.name


@needs_real_ct
@pytest.mark.parametrize("name", REAL_FILES)
def test_slices_of_real_scans_are_told_only_where_they_are_out_of_order(tmp_path, name):
    hu, _, spacing = real_scan(name)
    noise = np.random.default_rng(0).normal(0, 60, hu.shape)
    for case, times in ((hu, 1), (hu[:, :, ::-1], 1), (hu[:, :, ::6], 6), (hu[:, :, :14], 1), (hu + noise, 1)):
        assert order_notes(tmp_path / "v.nii", case, (*spacing[:2], times * spacing[2])) == []
    for order in ORDERS.values():
        assert order_notes(tmp_path / "v.nii", hu[:, :, order(hu.shape[2])], spacing)


def test_undecidable_files_are_refused_by_name(tmp_path):
    noise = np.random.default_rng(0).integers(3000, 6000, (20, 20, 20)).astype(np.int16)
    with pytest.raises(VolumeError, match="v.nii.gz: ambiguous, found no reading"):
        read_volume(volume_of(write(tmp_path / "v.nii.gz", noise), row()), SMALL)
    with pytest.raises(VolumeError, match="ambiguous, found both readings"):
        read_volume(volume_of(write(tmp_path / "w.nii.gz", chest()), row(intercept=-30)), SMALL)


def test_first_slab_can_mislead_without_harm(tmp_path, monkeypatch):
    """Nothing but padding in the first slices, in a folder that says the wrong version."""
    hu = chest((40, 40, 30))
    hu[:, :, :8] = -1024
    path = tmp_path / "train" / "train_1" / "train_1_a" / "train_1_a_1.nii.gz"
    monkeypatch.setattr(volume_file, "SLAB_BYTES", 4 * 40 * 40 * 2)
    volume, decision = read_volume(volume_of(write(path, hu), row()), SMALL)
    assert decision.reading == "hu"
    assert np.abs(volume.numpy() - published(hu, (8.0, 8.0, 12.0), SMALL)).max() < 3e-7


def test_a_file_is_inflated_once(tmp_path, monkeypatch):
    opened = []
    original = volume_file.StreamFile.__init__
    monkeypatch.setattr(volume_file.StreamFile, "__init__", lambda s, p: (opened.append(p), original(s, p))[1])
    read_volume(volume_of(put(tmp_path, "valid_1_a_1.nii.gz", False), row()), SMALL)
    assert len(opened) == 1


@pytest.mark.parametrize("body", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("air", [0.0, 0.3, 0.8])
def test_decision_over_the_mixtures_scans_are_made_of(body, air):
    """Share of body in the picture and of the rest that is air (else lung), with and without an offset."""
    rng = np.random.default_rng(0)
    n = 20000
    tissue = np.concatenate([rng.normal(-100, 20, n), rng.normal(45, 25, 2 * n), rng.normal(600, 250, n // 8)])
    rest = np.where(rng.random(n) < air, rng.normal(-1000, 15, n), rng.normal(-850, 70, n))
    hu = np.concatenate([rng.choice(tissue, int(n * body)), rest[: int(n * (1 - body))]]).round()
    for intercept in (-1024, -8192):
        assert decide_hu(_statistics(hu), metadata_scale=(1, intercept)).reading == "hu"
        assert decide_hu(_statistics(hu - intercept), metadata_scale=(1, intercept)).reading == "stored"


def _statistics(values):
    statistics = VoxelStatistics((values.size, 1, 1), Path("v.nii.gz"))
    statistics.add(0, values[None])
    return statistics


@pytest.mark.parametrize("body", [0.08, 0.15, 0.5])
def test_raw_values_in_a_wide_field_of_view_are_refused_by_both(tmp_path, body):
    """Under a valid header: little body and much air, which raw values with offset 1024 put into the soft window."""
    rng = np.random.default_rng(0)
    tissue = rng.choice([-100, 40, 60, 600], (60, 60, 30), p=[0.3, 0.3, 0.3, 0.1])
    hu = np.where(rng.random(tissue.shape) < body, tissue, -1000) + rng.integers(0, 20, tissue.shape)
    good, raw = (write(tmp_path / f"{name}.nii.gz", (hu + offset).astype(np.int16))
                 for name, offset in (("good", 0), ("raw", 1024)))
    assert torch.equal(read_volume(volume_of(good), SMALL)[0], preprocess_volume(good, None, SMALL))
    for read in (lambda: read_volume(volume_of(raw), SMALL), lambda: preprocess_volume(raw, None, SMALL)):
        with pytest.raises(VolumeError, match="not HU: no air"):
            read()


@needs_real_ct
@pytest.mark.parametrize("name", REAL_FILES)
def test_real_scans_are_hu_and_their_raw_copies_are_not(tmp_path, name):
    voxels, affine, spacing = real_scan(name)
    expected, decision = read_volume(volume_of(Path(REAL, name), row(spacing)), SMALL)
    assert decision.reading == "hu"
    lps, _ = reoriented(voxels, affine, "LPS")
    assert np.abs(expected.numpy() - published(lps, spacing, SMALL)).max() < 3e-7
    assert torch.equal(preprocess_volume(Path(REAL, name), None, SMALL), expected)
    for offset in (1024, 8192):
        path = write(tmp_path / f"raw{offset}.nii.gz", (lps + offset).astype(np.int16), (1.0, 1.0, 1.0), np.eye(4))
        volume, decision = read_volume(volume_of(path, row(spacing, intercept=-offset)), SMALL)
        assert decision.reading == "stored" and torch.equal(volume, expected)
        with pytest.raises(VolumeError, match="metadata=None"):
            preprocess_volume(Path(REAL, name), row(spacing, intercept=-offset), SMALL)


def test_slices_that_are_there_twice_are_told(tmp_path):
    hu = chest((48, 44, 40)) + np.random.default_rng(0).normal(0, 20, (48, 44, 40))
    twice = hu[:, :, np.repeat(np.arange(20), 2)]
    for case, told in ((twice, ("20 of 40 slices equal the one before: repeated?",)), (hu, ())):
        volume = replace(volume_of(write(tmp_path / "v.nii", case, (8.0, 8.0, 6.0))), assume_hu=True)
        assert tuple(note for note in read_volume(volume, SMALL)[1].notes if "equal" in note) == told
