"""preprocess_volume and read_volume, against four references.

1. The golden files: output of the published preprocessing on three small volumes (every seventh voxel and moments).
2. The published steps written out with torch's own interpolation (helpers_data.published), on random sizes.
3. Marker voxels and re-oriented copies for axes and directions.
4. Two scans of real patients, where CTCLIP_REAL_CT names their folder.
Also: every kind of bad file gives one line with its name, and memory stays at the output plus a few slices.
"""

import gzip
import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
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

from ctclip.data import nifti, preprocessing, resampling, volume_file
from ctclip.data.preprocessing import preprocess_volume, read_volume
from ctclip.data.volume_file import VolumeError

GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "volumes"
ROWS = pd.read_csv(GOLDEN / "metadata.csv").to_dict("records")


# ------------------------------------------------------------------ the numbers


def test_version_stands_for_these_very_bits():
    """Caches trust PREPROCESSING_VERSION: where this digest changes, raise the version and write both down anew."""
    volume = preprocess_volume(GOLDEN / ROWS[0]["VolumeName"], ROWS[0], shape=(24, 48, 48))
    digest = hashlib.sha256(volume.numpy().tobytes()).hexdigest()[:16]
    assert (preprocessing.PREPROCESSING_VERSION, digest) == (2, "cd4475ebd8492f85")


@pytest.mark.parametrize("record", ROWS, ids=lambda record: record["VolumeName"])
def test_equals_the_published_preprocessing(record):
    expected = np.load(GOLDEN / record["VolumeName"].replace(".nii.gz", "_expected.npz"))
    volume = preprocess_volume(GOLDEN / record["VolumeName"], record)
    assert volume.shape == (1, *expected["shape"]) and volume.dtype == torch.float32
    assert np.abs(volume[0, ::7, ::7, ::7].numpy() - expected["every_seventh"]).max() <= 2e-7
    values = volume.double()
    for found, name in ((values.mean(), "mean"), (values.std(correction=0), "std")):
        assert abs(found.item() - expected[name].item()) < 1e-8
    assert (values.min(), values.max()) == (expected["minimum"], expected["maximum"])


def test_there_are_three_goldens():
    assert len(ROWS) == 3


@pytest.mark.parametrize("seed", range(12))
def test_equals_torch_on_random_sizes(tmp_path, seed):
    """Every axis is cropped for some seeds and padded for others; sizes from 2 voxels up."""
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(2, 40, 3))
    spacing = tuple(float(s) for s in rng.uniform(4, 20, 3).round(3))
    shape = tuple(int(n) for n in rng.integers(5, 40, 3))
    hu = rng.integers(-1500, 1500, size).astype(np.int16)
    path = write(tmp_path / "v.nii.gz", hu, spacing)
    if min(n * s * t / 360 for n, s, t in zip(size, spacing, (shape[1], shape[2], shape[0]), strict=True)) < 1:
        with pytest.raises(VolumeError, match="at least one voxel"):
            preprocess_volume(path, None, shape, assume_hu=True)
    else:
        result = preprocess_volume(path, None, shape, assume_hu=True).numpy()
        assert np.abs(result - published(hu, spacing, shape)).max() < 3e-7


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("extent_mm", [200, 359, 360, 361, 700])
def test_crop_and_pad_on_each_axis(tmp_path, axis, extent_mm):
    spacing = [10.0, 10.0, 10.0]
    size = [36, 36, 36]
    size[axis], spacing[axis] = 50, extent_mm / 50
    hu = np.random.default_rng(1).integers(-1000, 1000, size).astype(np.int16)
    path = write(tmp_path / "v.nii.gz", hu, tuple(spacing))
    result = preprocess_volume(path, None, SMALL, assume_hu=True).numpy()
    assert np.abs(result - published(hu, tuple(spacing), SMALL)).max() < 3e-7


def test_size_is_the_published_one_where_rounding_decides(tmp_path):
    """80 x 0.6 mm / 0.75 mm is 64; in the published order of operations it is 63.99..., 63 voxels."""
    path = write(tmp_path / "v.nii.gz", np.full((80, 4, 4), 7, np.int16) + np.eye(4, dtype=np.int16), (0.6, 3, 3))
    inside = (preprocess_volume(path, assume_hu=True)[0] > -1).any(0).any(1).sum()
    assert inside == 63 == int(80 * (0.6 / 0.75))


def test_clips_before_resampling(tmp_path):
    """Metal of 3000 HU beside air counts as 1000: half-way between them is 0, not 1000."""
    hu = np.full((8, 8, 8), -1000, np.int16)
    hu[4:] = 3000
    path = write(tmp_path / "v.nii.gz", hu, (15.0, 15.0, 15.0))
    profile = preprocess_volume(path, None, (24, 48, 24), assume_hu=True)[0, 12, :, 12]  # 2 voxels per input voxel
    assert profile[20:28].tolist() == pytest.approx([-1, -1, -1, -0.5, 0.5, 1, 1, 1])


def test_air_stays_exactly_minus_one_and_range_holds(tmp_path):
    hu = np.random.default_rng(0).choice(np.array([-1000, 1000], np.int16), (31, 29, 27))
    volume = preprocess_volume(write(tmp_path / "v.nii.gz", hu, (7.1, 6.3, 9.7)), None, (40, 60, 50), assume_hu=True)
    assert volume.min() == -1 and volume.max() == 1


# ------------------------------------------------------------------ axes and orientations


@pytest.mark.parametrize("axis", range(3))
def test_marker_voxel_lands_on_its_axis(tmp_path, axis):
    """(x, y, z) of the file becomes (z, x, y) of the tensor. 36 voxels of 10 mm into 36: nothing moves."""
    hu = np.zeros((36, 36, 36), np.int16)
    index = [5, 5, 5]
    index[axis] = 30
    hu[tuple(index)] = 1000
    x, y, z = index
    raw = write(tmp_path / "raw.nii.gz", hu, (1.0, 1.0, 1.0), affine=np.eye(4))
    version_1 = preprocess_volume(raw, row((10, 10, 10), intercept=0), (36, 36, 36), assume_hu=True)
    version_2 = preprocess_volume(write(tmp_path / "hu.nii.gz", hu, (10, 10, 10)), None, (36, 36, 36), assume_hu=True)
    for volume in (version_1, version_2):
        assert [int(i) for i in (volume[0] == 1).nonzero()[0]] == [z, x, y] and (volume[0] == 1).sum() == 1


@pytest.mark.parametrize("codes", ["RAS", "LAS", "RPS", "LPI", "RAI", "PIL", "SAR", "ILP", "ASL", "PSR"])
@pytest.mark.parametrize("form", ["sform", "qform"])
def test_same_scan_in_another_orientation_gives_the_same_tensor(tmp_path, codes, form):
    hu, spacing = chest((41, 36, 23)), (7.3, 8.1, 13.7)
    expected = preprocess_volume(write(tmp_path / "lps.nii.gz", hu, spacing), None, SMALL, assume_hu=True)
    turned, affine = reoriented(hu, affine_of(spacing), codes)
    zooms = tuple(np.linalg.norm(affine[:3, :3], axis=0).round(4))
    path = write(tmp_path / "turned.nii.gz", turned, zooms, affine, (2, 0) if form == "sform" else (0, 1))
    found = preprocess_volume(path, None, SMALL, assume_hu=True)
    assert (found - expected).abs().max() < 1e-6
    if nib.aff2axcodes(affine)[2] in "SI" and nib.aff2axcodes(affine)[0] in "LR":  # flips only
        assert torch.equal(found, expected)


def test_oblique_scan_takes_the_nearest_axes(tmp_path):
    hu, spacing, angle = chest(), (8.0, 8.0, 12.0), np.deg2rad(12)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = affine_of(spacing)
    affine[:3, :3] = tilt @ affine[:3, :3]
    expected = preprocess_volume(write(tmp_path / "a.nii.gz", hu, spacing), None, SMALL)
    path = write(tmp_path / "b.nii.gz", hu, spacing, affine)
    assert torch.equal(preprocess_volume(path, None, SMALL), expected)
    assert read_volume(volume_of(path), SMALL)[1].notes == (
        "axes 12 degrees off the patient's: taken along the nearest",
    )  # fmt: skip
    assert read_volume(volume_of(tmp_path / "a.nii.gz"), SMALL)[1].notes == ()


TURNED = [(40, False), (44, True), (45, True), (46, True), (50, False), (135, True)]  # degrees, refused


@pytest.mark.parametrize("degrees, refused", TURNED)
@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (2, 0)])
def test_axes_halfway_between_two_of_the_patient_s_are_refused(tmp_path, axes, degrees, refused):
    """Which of them is the nearest, rounding would decide."""
    angle, turn, affine = np.deg2rad(degrees), np.eye(4), affine_of((8.0, 8.0, 12.0))
    turn[np.ix_(axes, axes)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    path = write(tmp_path / "a.nii.gz", chest(), (8.0, 8.0, 12.0), turn @ affine)
    if refused:
        with pytest.raises(VolumeError, match="found axes halfway between two of the patient's"):
            read_volume(volume_of(path), SMALL)
    else:
        assert "taken along the nearest" in read_volume(volume_of(path), SMALL)[1].notes[0]


def test_without_orientation_the_stored_order_is_lps(tmp_path):
    hu, spacing = chest(), (8.0, 8.0, 12.0)
    expected = preprocess_volume(write(tmp_path / "a.nii.gz", hu, spacing), None, SMALL)
    none = write(tmp_path / "b.nii.gz", hu, spacing, codes=(0, 0))
    identity = write(tmp_path / "c.nii.gz", hu, spacing, np.eye(4))
    for path in (none, identity):
        found, decision = read_volume(volume_of(path), SMALL)
        assert torch.equal(found, expected) and torch.equal(preprocess_volume(path, None, SMALL), expected)
        assert decision.notes == ("no orientation in the header: voxels taken in the order left, back, head (LPS)",)


def test_metadata_overrides_header_geometry(tmp_path):
    """A version-1 file is taken in stored order whatever its header says, even nonsense."""
    raw, spacing = chest() + np.int16(1024), (8.0, 8.0, 12.0)
    expected = published(chest(), spacing, SMALL)
    turned = write(tmp_path / "a.nii.gz", raw, (3.0, 3.0, 3.0), np.diag([3.0, 3.0, -3.0, 1]))
    broken = write(tmp_path / "b.nii.gz", raw, spacing, np.zeros((4, 4)))
    for path in (turned, broken):
        assert np.abs(preprocess_volume(path, row(spacing), SMALL).numpy() - expected).max() < 3e-7
    sequence = row(spacing) | {"XYSpacing": [8.0, 8.0]}
    assert np.abs(preprocess_volume(turned, pd.Series(sequence), SMALL).numpy() - expected).max() < 3e-7


def test_a_scan_of_a_few_centimetres_is_read_with_a_question(tmp_path):
    """A cut out nodule, or millimetres that are centimetres."""
    path = write(tmp_path / "v.nii.gz", chest((60, 56, 40)), (0.8, 0.8, 1.0))
    assert "only 48 x 45 x 40 mm: is its spacing right?" in read_volume(volume_of(path), SMALL)[1].notes


def test_header_spacing_is_the_shortest_decimal(tmp_path):
    """6.8 as float32 is 6.80000019; 75 x 6.8 / 7.5 is exactly 68 with the decimal, and must not depend on that tail."""
    hu = chest((75, 30, 20))
    path = write(tmp_path / "v.nii.gz", hu, (6.8, 8.0, 12.0))
    expected = published(hu, (6.8, 8.0, 12.0), SMALL)
    assert np.abs(preprocess_volume(path, None, SMALL, assume_hu=True).numpy() - expected).max() < 3e-7


# ------------------------------------------------------------------ storage


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_storage_gives_the_same_numbers(tmp_path, dtype, big_endian, suffix):
    """The same 100 grey values, 20 HU apart, through the header's slope and intercept."""
    grey = np.random.default_rng(3).integers(0, 100, (20, 24, 22))
    path = write(tmp_path / f"v{suffix}", grey.astype(dtype), scale=(20.0, -1000.0), big_endian=big_endian)
    expected = published(grey * 20.0 - 1000, (8.0, 8.0, 12.0), SMALL)
    assert np.abs(preprocess_volume(path, None, SMALL, assume_hu=True).numpy() - expected).max() < 3e-7


def test_integer_path_equals_float_path(tmp_path):
    hu = chest()
    as_integers = preprocess_volume(write(tmp_path / "a.nii.gz", hu), None, SMALL)
    as_floats = preprocess_volume(write(tmp_path / "b.nii.gz", hu.astype(np.float32)), None, SMALL)
    unsigned = (hu.astype(np.int32) + 1024).astype(np.uint16)
    raw = preprocess_volume(write(tmp_path / "c.nii.gz", unsigned), row(), SMALL)
    assert torch.equal(as_integers, as_floats) and torch.equal(as_integers, raw)


def test_nifti_2_and_a_fourth_axis_of_one_are_fine(tmp_path):
    hu = chest()
    expected = preprocess_volume(write(tmp_path / "a.nii.gz", hu), None, SMALL)
    second = write(tmp_path / "b.nii.gz", hu, kind=nib.Nifti2Image)
    fourth = write(tmp_path / "c.nii.gz", hu[..., None])
    for path in (second, fourth):
        assert torch.equal(preprocess_volume(path, None, SMALL), expected)


def _as_stored(path, **patches):
    """The scan of `write`'s defaults with bytes of its header replaced: {"b76": bytes} puts them at 76."""
    data = bytearray(path.read_bytes())
    for place, value in patches.items():
        data[int(place[1:]) : int(place[1:]) + len(value)] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("unit", "factor"), [(0, 1.0), (1, 0.001), (2, 1.0), (3, 1000.0)])
@pytest.mark.parametrize("codes", [(2, 0), (0, 1), (0, 0)])
def test_spacing_in_metres_or_micrometres_is_the_same_scan(tmp_path, unit, factor, codes):
    hu, spacing = chest((46, 44, 21)), (7.5, 7.9, 12.25)
    expected = preprocess_volume(write(tmp_path / "a.nii", hu, spacing), None, SMALL)
    affine = affine_of(spacing)
    affine[:3] *= factor
    path = write(tmp_path / "b.nii", hu, tuple(s * factor for s in spacing), affine, codes)
    assert torch.equal(preprocess_volume(_as_stored(path, b123=bytes([unit])), None, SMALL), expected)


def test_what_nibabel_and_itk_read_is_read(tmp_path):
    """Headers that other software writes: no qfac, negative spacings beside an sform, an origin that is no number."""
    expected = preprocess_volume(write(tmp_path / "a.nii", chest()), None, SMALL)
    number = struct.Struct("<f").pack
    headers = {
        "no qfac beside a qform": ((0, 1), {"b76": number(0)}),
        "a negative spacing beside an sform": ((2, 0), {"b80": number(-8)}),
        "an origin of NaN in a qform": ((0, 1), {"b268": number(float("nan"))}),
        "an origin of infinity in an sform": ((2, 0), {"b292": number(float("inf"))}),
    }
    for name, (codes, patches) in headers.items():
        path = _as_stored(write(tmp_path / f"{name}.nii", chest(), codes=codes), **patches)
        assert torch.equal(preprocess_volume(path, None, SMALL), expected), name
    plain = write(tmp_path / "b.nii", chest()).rename(tmp_path / "not compressed.nii.gz")
    assert torch.equal(preprocess_volume(plain, None, SMALL), expected)


def test_slab_size_and_inflater_do_not_matter(tmp_path, monkeypatch):
    path = write(tmp_path / "a.nii.gz", chest((30, 31, 33)))
    expected = preprocess_volume(path, None, SMALL)
    monkeypatch.setattr(nifti, "GzipFile", gzip.GzipFile)
    for slab in (1, 5000, 1 << 30):
        monkeypatch.setattr(volume_file, "SLAB_BYTES", slab)
        assert torch.equal(preprocess_volume(path, None, SMALL), expected)


def test_memory_is_the_output_and_a_few_slices(tmp_path):
    """A file of 151 MB and an output of 14 MB: the peak must hold neither the file nor a float copy of it."""
    path = write(tmp_path / "v.nii", np.broadcast_to(chest((512, 512, 1)), (512, 512, 288)), (0.7, 0.7, 1.2))
    script = (
        "import resource, sys, ctclip.data.preprocessing\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ctclip.data.preprocessing.preprocess_volume(sys.argv[1], None, (96, 192, 192))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux only")
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", script, path], cwd=root, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 60 * 1024, "KiB above what importing takes"


# ------------------------------------------------------------------ bad files: one line each


def _truncated(path):
    data = write(path, chest()).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _damaged(path):
    data = bytearray(write(path, chest()).read_bytes())
    data[-6] ^= 255  # the checksum
    path.write_bytes(data)


def _patched(path, offset, value):
    """An otherwise good file with some header bytes replaced."""
    data = bytearray(gzip.decompress(write(path, chest()).read_bytes()))
    data[offset : offset + len(value)] = value
    path.write_bytes(gzip.compress(bytes(data)))


def _spacing(path, value):
    _patched(path, 80, struct.pack("<f", value))


def _voxel(path, value):
    voxels = chest().astype(np.float32)
    voxels[3, 4, 5] = value
    write(path, voxels)


def _huge_nifti_2(path):
    data = bytearray(gzip.decompress(write(path, chest(), kind=nib.Nifti2Image).read_bytes()))
    data[16:48] = struct.pack("<4q", 3, 60000, 60000, 60000)
    path.write_bytes(gzip.compress(bytes(data)))


BAD = {
    "missing": (lambda p: None, "no such file"),
    "a folder": (lambda p: p.mkdir(), "unreadable"),
    "empty": (lambda p: p.write_bytes(b""), "empty file"),
    "text": (lambda p: p.write_text("<html>Access denied</html>"), "a NIfTI header"),
    "gzip of text": (lambda p: p.write_bytes(gzip.compress(b"no header" * 99)), "NIfTI header"),
    "short gzip": (lambda p: p.write_bytes(gzip.compress(b"short")), "first bytes"),
    "truncated": (_truncated, "truncated"),
    "damaged": (_damaged, "damaged"),
    "wrong magic": (lambda p: _patched(p, 344, b"xyz\0"), "magic"),
    "header of a pair": (lambda p: _patched(p, 344, b"ni1\0"), "magic"),
    "complex voxels": (lambda p: _patched(p, 70, struct.pack("<h", 32)), "NIfTI type 32"),
    "unknown voxels": (lambda p: _patched(p, 70, struct.pack("<h", 999)), "NIfTI type 999"),
    "two axes": (lambda p: write(p, chest()[:, :, 0]), "2 axes"),
    "one slice": (lambda p: write(p, chest()[:, :, :1]), "at least 2 voxels"),
    "four axes": (lambda p: write(p, np.stack([chest()] * 2, -1)), "4 axes"),
    "nine axes": (lambda p: _patched(p, 40, struct.pack("<h", 9)), "axes"),
    "negative size": (lambda p: _patched(p, 42, struct.pack("<h", -5536)), "axes"),  # 60000 in 16 bits
    "declares more": (lambda p: _patched(p, 46, struct.pack("<h", 60)), "truncated"),
    "absurd size": (lambda p: _patched(p, 42, struct.pack("<3h", 32000, 32000, 32000)), "at most"),
    "absurd size, NIfTI-2": (_huge_nifti_2, "60000 x 60000 x 60000"),
    "bad offset": (lambda p: _patched(p, 108, struct.pack("<f", float("nan"))), "byte nan"),
    "NaN intercept": (lambda p: _patched(p, 112, struct.pack("<2f", 1, float("nan"))), "slope 1 beside intercept nan"),
    "zero spacing": (lambda p: _spacing(p, 0.0), "spacing 0.0"),
    "NaN spacing": (lambda p: _spacing(p, float("nan")), "spacing nan"),
    "negative spacing": (lambda p: _spacing(p, -2.0), "beside an orientation"),
    "infinite spacing": (lambda p: _spacing(p, float("inf")), "spacing inf"),
    "spacing in metres": (lambda p: write(p, chest(), (0.008, 0.008, 0.012)), "0.05 to 20.0"),
    "spacing in an unknown unit": (lambda p: _patched(p, 123, b"\5"), "spacing in unit 5"),
    "millimetres called metres": (lambda p: _patched(p, 123, b"\1"), "spacing 8000.0"),
    "spacings of eight centimetres": (lambda p: write(p, chest((30, 28, 20)), (80.0, 80.0, 12.0)), "0.05 to 20.0"),
    "spacings ten times too large": (lambda p: write(p, chest((200, 190, 20)), (17.0, 17.0, 10.0)), "at most 2200 mm"),
    "spacings ten times too small": (lambda p: write(p, chest(), (0.8, 0.8, 1.2)), "at least 30 and at most 2200 mm"),
    "four voxels each way": (lambda p: write(p, chest((4, 4, 4)), (20.0, 20.0, 20.0)), "4 x 4 x 4 voxels"),
    "spacing contradicts sform": (lambda p: _spacing(p, 3.0), "3.0"),
    "singular sform": (lambda p: write(p, chest(), affine=np.zeros((4, 4))), "singular"),
    "blank header": (lambda p: write(p, chest(), (1.0, 1.0, 1.0), np.eye(4)), "blank header"),
    "all zero": (lambda p: write(p, np.zeros((20, 20, 20), np.int16)), "equal to 0"),
    "constant": (lambda p: write(p, np.full((20, 20, 20), -1000, np.int16)), "equal to -1000"),
    "NaN voxel": (lambda p: _voxel(p, np.nan), "NaN or infinite"),
    "infinite voxel": (lambda p: _voxel(p, np.inf), "NaN or infinite"),
    "a voxel of no data": (lambda p: _voxel(p, np.finfo(np.float32).min), "a voxel of -3.40282e+38 (slice 5)"),
    "a pointer of git-lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec"), "download the file"),
    "raw without metadata": (lambda p: write(p, chest() + np.int16(1024)), "voxels that are not HU: no air"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_gives_one_line(tmp_path, case):
    make, told = BAD[case]
    path = tmp_path / "bad_1_a_1.nii.gz"
    make(path)
    with pytest.raises(VolumeError) as caught:
        preprocess_volume(path, None, SMALL)
    message = str(caught.value)
    assert message.startswith(f"{path.name}: found ") and told in message and "expected" in message
    assert "\n" not in message and len(message) < 250


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(VolumeError, match="v.nii.gz: found unreadable .Permission denied."):
        preprocess_volume(tmp_path / "v.nii.gz")


def test_random_headers_never_give_anything_but_a_volume_error(tmp_path):
    good = gzip.decompress(write(tmp_path / "good.nii.gz", chest((9, 8, 7))).read_bytes())
    rng, path = np.random.default_rng(0), tmp_path / "v.nii"
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for position in rng.integers(0, 348, 3):
            data[position] = rng.integers(256)
        path.write_bytes(data)
        try:
            preprocess_volume(path, None, (6, 6, 6))
        except VolumeError as error:
            refused += "\n" not in str(error)
    assert refused > 50


METADATA = {
    "no column": (lambda r: r.pop("ZSpacing"), "ZSpacing"),
    "empty cell": (lambda r: r.update(ZSpacing=float("nan")), "ZSpacing"),
    "not a number": (lambda r: r.update(RescaleIntercept="n/a"), "RescaleIntercept"),
    "an intercept of NaN": (lambda r: r.update(RescaleIntercept="nan"), "RescaleIntercept"),
    "a number with an underscore": (lambda r: r.update(RescaleIntercept="-1_024"), "RescaleIntercept"),
    "digits of another script": (lambda r: r.update(ZSpacing="١"), "ZSpacing"),
    "spacings with an underscore": (lambda r: r.update(XYSpacing="[1_0, 7]"), "XYSpacing"),
    "slope 0": (lambda r: r.update(RescaleSlope=0), "RescaleSlope 0"),
    "one spacing": (lambda r: r.update(XYSpacing="[0.7]"), "XYSpacing"),
    "spacing words": (lambda r: r.update(XYSpacing="[a, b]"), "XYSpacing"),
    "spacing None": (lambda r: r.update(XYSpacing=None), "XYSpacing"),
    "zero spacing": (lambda r: r.update(XYSpacing="[0.0, 0.7]"), "spacing 0.0"),
    "negative spacing": (lambda r: r.update(ZSpacing=-1), "-1.0"),
    "micrometres": (lambda r: r.update(ZSpacing=1500), "1500.0"),
}


@pytest.mark.parametrize("case", METADATA)
def test_bad_metadata_names_the_column(tmp_path, case):
    change, told = METADATA[case]
    record = row()
    change(record)
    with pytest.raises(VolumeError, match=told) as caught:
        preprocess_volume(write(tmp_path / "v.nii.gz", chest() + np.int16(1024)), record, SMALL)
    assert "expected" in str(caught.value)


def test_hu_file_is_not_scaled_twice(tmp_path):
    """The published loader applies the table to version-2 files and ruins them without a word."""
    path = write(tmp_path / "v.nii.gz", chest())
    for intercept in (-1024.0, -8192.0):
        with pytest.raises(VolumeError, match="metadata=None"):
            preprocess_volume(path, row(intercept=intercept), SMALL)
    preprocess_volume(path, row(intercept=0), SMALL)  # both readings are the same


@pytest.mark.parametrize("shape", [(240, 480), (0, 4, 4), (4, 4, 4.5)])
def test_bad_shape(tmp_path, shape):
    with pytest.raises(ValueError, match="three positive numbers"):
        preprocess_volume(write(tmp_path / "v.nii.gz", chest()), None, shape)


@needs_real_ct
@pytest.mark.parametrize("name", REAL_FILES)
@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "PIL"])
def test_real_scan_in_another_orientation(tmp_path, name, codes):
    voxels, affine, spacing = real_scan(name)
    turned, turned_affine = reoriented(voxels, affine, codes)
    path = write(tmp_path / "t.nii.gz", turned, spacing, turned_affine)
    expected = preprocess_volume(Path(REAL, name), None, (60, 120, 120))
    assert (preprocess_volume(path, None, (60, 120, 120)) - expected).abs().max() < 1e-6


# ------------------------------------------------------------------ on a device, from the stored integers


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAI", "PIL", "SAR"])
@pytest.mark.parametrize("dtype, scale, big_endian", [
    ("i2", (1.0, 0.0), False), ("i2", (1.0, 0.0), True), ("u2", (1.0, -1024.0), False), ("u4", (1.0, -1024.0), True),
    ("i2", (0.5, 3.0), False), ("f4", (1.0, 0.0), False), ("u1", (20.0, -1000.0), False),
])  # fmt: skip
def test_a_device_resamples_to_the_same_tensor(tmp_path, monkeypatch, codes, dtype, scale, big_endian):
    """On the CPU, where torch's operations on the stored voxels are compared with numpy's, in stacks of odd sizes."""
    stored = np.clip((chest((41, 36, 33)) - scale[1]) / scale[0], 0 if dtype[0] == "u" else -2000, 2000).round()
    if dtype == "u1":
        stored = stored.clip(0, 255)
    spacing = (7.3, 8.1, 13.7)
    turned, affine = reoriented(stored, affine_of(spacing), codes)
    zooms = tuple(np.linalg.norm(affine[:3, :3], axis=0).round(4))
    folder = put(tmp_path, "valid_1_a_1.nii.gz", True).parent
    path = write(folder / "valid_1_a_1.nii.gz", turned.astype(dtype), zooms, affine, scale=scale, big_endian=big_endian)
    expected, decision = read_volume(volume_of(path), SMALL)
    for stack in (16, 3, 1):
        monkeypatch.setattr(resampling.DeviceResampler, "STACK", stack)
        found, same = read_volume(volume_of(path), SMALL, torch.device("cpu"))
        assert (found - expected).abs().max() < 1e-6 and same == decision
