"""One scan as NIfTI, .mha and DICOM series is one tensor: files written by SimpleITK, read against nibabel's. Damaged
and hostile files are one line each, in bounded time and memory."""

from __future__ import annotations

import bz2
import gzip
import os
import struct
import sys
import zipfile
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from helpers_data import SMALL, affine_of, chest, reoriented, write
from helpers_dicom import write_series
from helpers_scans import as_itk, write_mha

from ctclip.data import metaimage, volume_file
from ctclip.data.geometry import place_volume
from ctclip.data.preprocessing import preprocess_volume
from ctclip.data.readers import open_volume
from ctclip.data.volume_file import VolumeError

SPACING = (7.5, 7.9, 12.25)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """(HU (x, y, z), RAS affine, the tensor of its .nii.gz)"""
    hu, affine = chest((46, 44, 21)), affine_of(SPACING)
    path = write(tmp_path_factory.mktemp("scan") / "a.nii.gz", hu, SPACING, affine)
    return hu, affine, preprocess_volume(path, None, SMALL)


# ------------------------------------------------------------------ one scan, three formats


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "LPI", "SAR", "PIR"])
@pytest.mark.parametrize("compressed", [False, True])
def test_meta_image_gives_the_tensor_of_the_nifti(tmp_path, scan, codes, compressed):
    hu, affine, expected = scan
    path = write_mha(tmp_path / "a.mha", *reoriented(hu, affine, codes), compressed)
    # axes in another order are interpolated in another order
    torch.testing.assert_close(preprocess_volume(path, None, SMALL), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", ["i2", "u2", "i4", "f4", "f8", "i8"])
@pytest.mark.parametrize("big_endian", [False, True])
def test_every_element_type_of_a_meta_image(tmp_path, dtype, big_endian):
    hu = np.clip(chest(), 0, None).astype(dtype)
    hu[:, :, ::2] -= 0 if dtype == "u2" else np.dtype(dtype).type(300)
    path = write_mha(tmp_path / "a.mha", hu, affine_of(SPACING))
    if big_endian:  # ITK writes the machine's order only
        head, mark, voxels = path.read_bytes().partition(b"LOCAL\n")
        head = head.replace(b"ByteOrderMSB = False", b"ByteOrderMSB = True")
        path.write_bytes(head + mark + np.frombuffer(voxels, dtype).byteswap().tobytes())
    with open_volume(path) as file:
        stored = np.concatenate([slices.copy() for _, slices in file.slabs()])
    np.testing.assert_array_equal(stored, hu.T)


def test_float_spacing_through_another_format_does_not_change_a_size(tmp_path):
    """0.6 mm in float32 is 0.600000024: 25 voxels of it are 15 mm, not a voxel more or less, in every format."""
    hu = chest((25, 25, 25))
    affine = affine_of(tuple(float(np.float32(0.6)) for _ in range(3)))
    paths = write(tmp_path / "a.nii.gz", hu, (0.6, 0.6, 0.6), affine), write_mha(tmp_path / "a.mha", hu, affine)
    nifti, meta = (preprocess_volume(path, None, (240, 240, 240), assume_hu=True) for path in paths)
    assert torch.equal(nifti, meta)


def test_meta_image_without_spacing_is_refused_and_with_it_is_taken_as_lps(tmp_path, scan):
    hu, affine, expected = scan
    path = write_mha(tmp_path / "a.mha", hu, affine)
    lines = path.read_bytes().split(b"\n", 20)
    kept = [line for line in lines if not line.startswith((b"TransformMatrix", b"Offset", b"CenterOf", b"Anatomical"))]
    path.write_bytes(b"\n".join(kept))
    assert torch.equal(preprocess_volume(path, None, SMALL), expected)
    path.write_bytes(b"\n".join(line for line in kept if not line.startswith(b"ElementSpacing")))
    with pytest.raises(VolumeError, match="blank header"):
        preprocess_volume(path, None, SMALL)


def test_zlib_stream_in_small_pieces(tmp_path, scan, monkeypatch):
    hu, affine, expected = scan
    path = write_mha(tmp_path / "a.mha", hu, affine, compressed=True)
    for slab in (1, 3000, 1 << 30):
        monkeypatch.setattr(volume_file, "SLAB_BYTES", slab)
        assert torch.equal(preprocess_volume(path, None, SMALL), expected)
    monkeypatch.setattr(metaimage, "decompressobj", zlib.decompressobj)
    assert torch.equal(preprocess_volume(path, None, SMALL), expected)


@pytest.mark.parametrize("place", [3, -1])
def test_element_size_beside_another_spacing_is_told_and_itk_s_rule_taken(tmp_path, scan, place):
    hu, affine, expected = scan
    path = write_mha(tmp_path / "a.mha", hu, affine)
    head, mark, stored = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
    lines = head.splitlines()
    for size, told in (("1 2 3", True), ("7.5 7.9 12.25", False), ("wide", False)):
        changed = [*lines[:place], f"ElementSize = {size}".encode(), *lines[place:], b""]
        path.write_bytes(b"\n".join(changed) + mark + stored)
        with open_volume(path) as file:
            notes = ["ElementSize 1.0 x 2.0 x 3.0 beside ElementSpacing 7.5 x 7.9 x 12.25 mm: taken as ElementSpacing "
                     "says, as ITK does"]
            assert file.notes == (notes if told else [])
            assert file.header.spacing == SimpleITK.ReadImage(path).GetSpacing()
        assert torch.equal(preprocess_volume(path, None, SMALL), expected)


@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (1, 2), (4, 1)])
@pytest.mark.parametrize("other, told", [("LPI", "sform RAS beside qform LPI: sform used"), ("RAS", ""),
                                         ("turned", "sform and qform 20 degrees apart: sform used")])
def test_sform_and_qform_that_contradict_are_told_and_nibabel_s_rule_taken(tmp_path, scan, codes, other, told):
    hu, affine, expected = scan
    voxels, sform = reoriented(hu, affine, "RAS")
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(a := np.radians(20)), -np.sin(a)], [np.sin(a), np.cos(a)]]
    qform = turn @ sform if other == "turned" else sform @ np.diag([*(1.0 if c in "RAS" else -1.0 for c in other), 1.0])
    path = tmp_path / "a.nii.gz"
    spacing = tuple(np.linalg.norm(sform[:3, :3], axis=0))
    image = nib.Nifti1Image(voxels, sform)
    image.set_sform(sform, codes[0])
    image.header.set_qform(qform, codes[1])
    assert np.allclose(image.header.get_zooms(), spacing)
    nib.Nifti1Image(voxels, None, image.header).to_filename(path)
    with open_volume(path) as file:
        assert file.notes == ([told] if told and codes[0] != 4 else [])
        np.testing.assert_allclose(file.header.affine, nib.load(path).affine, atol=1e-4)
    torch.testing.assert_close(preprocess_volume(path, None, SMALL), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("offset, values, told", [
    (280, [float("nan")] * 12, "an unusable sform or qform: the other one used"),
    (256, [1.0] * 3, "an unusable qform beside the sform: sform used"),
])  # fmt: skip
def test_an_unusable_one_of_sform_and_qform_is_told(tmp_path, scan, offset, values, told):
    hu, affine, expected = scan
    path = write(tmp_path / "a.nii", hu, SPACING, affine, codes=(1, 1))
    data = bytearray(path.read_bytes())
    data[offset : offset + 4 * len(values)] = struct.pack(f"<{len(values)}f", *values)
    path.write_bytes(data)
    with open_volume(path) as file:
        assert file.notes == [told]
    torch.testing.assert_close(preprocess_volume(path, None, SMALL), expected, rtol=0, atol=5e-7)


# ------------------------------------------------------------------ files with another's name


@pytest.mark.parametrize("made, named", [
    ("a.nii.gz", "b.mha"), ("a.nii", "b.mha"), ("a.mha", "b.nii.gz"), ("a.mha", "b.nii"), ("a.nii.gz", "b.nii"),
    ("a.nii", "b.nii.gz"), ("a.mha", "B.MHA"),
])  # fmt: skip
def test_nifti_and_meta_image_are_read_under_each_other_s_names(tmp_path, scan, made, named):
    hu, affine, expected = scan
    path = tmp_path / made
    write_mha(path, hu, affine) if made.endswith(".mha") else write(path, hu, SPACING, affine)
    path.rename(tmp_path / named)
    assert torch.equal(preprocess_volume(tmp_path / named, None, SMALL), expected)


UNPACK, NAME_IT = "unpack it, and name", "end its name in"
OTHER_CONTENT = {  # of a file with the name of a scan: its bytes, its ending, the remedy
    "MetaImage by gzip": (lambda scan: gzip.compress(scan["mha"]), ".mha.gz", UNPACK),
    "text by gzip": (lambda scan: gzip.compress(b"text " * 99), ".gz", UNPACK),
    "DICOM": (lambda scan: scan["dcm"], ".dcm", f"{NAME_IT} .dcm"),
    "DICOM without preamble": (lambda scan: scan["dcm"][132:], ".dcm", f"{NAME_IT} .dcm"),
    "DICOM by gzip": (lambda scan: gzip.compress(scan["dcm"]), ".dcm.gz", UNPACK),
    "NRRD": (lambda scan: scan["nrrd"], ".nrrd", f"{NAME_IT} .nrrd"),
    "zip": (lambda scan: scan["zip"], ".zip", UNPACK),
    "bzip2": (lambda scan: bz2.compress(scan["mha"]), ".bz2", UNPACK),
    "numpy": (lambda scan: scan["npy"], ".npy", "name the scan that it was made of"),
}


@pytest.fixture(scope="module")
def stored_bytes(tmp_path_factory):
    """One scan in other formats."""
    root, affine = tmp_path_factory.mktemp("stored"), affine_of(SPACING)
    write_mha(root / "a.mha", chest(), affine)
    SimpleITK.WriteImage(as_itk(chest(), affine), root / "a.nrrd")
    np.save(root / "a.npy", chest())
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        archive.write(root / "a.mha")
    next(write_series(root / "a", chest((30, 28, 2)), affine).iterdir()).rename(root / "a.dcm")
    return {kind: (root / f"a.{kind}").read_bytes() for kind in ("mha", "nrrd", "npy", "zip", "dcm")}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha"])
@pytest.mark.parametrize("case", OTHER_CONTENT)
def test_what_a_file_is_that_has_the_name_of_a_scan_is_said(tmp_path, stored_bytes, case, name):
    make, suffix, remedy = OTHER_CONTENT[case]
    (tmp_path / name).write_bytes(make(stored_bytes))
    with pytest.raises(VolumeError) as caught:
        preprocess_volume(tmp_path / name, None, SMALL)
    if case == "text by gzip" and name != "a.mha":
        assert "found first bytes b'text', expected a NIfTI header" in str(caught.value)
    else:
        assert str(caught.value).startswith(f"{name}: found the content of a {suffix} file, expected .nii, ")
        assert f"; {remedy}" in str(caught.value)


@pytest.mark.parametrize("name", ["a.dcm", "a.ima"])
@pytest.mark.parametrize("suffix", [".nii", ".mha"])
def test_what_a_file_is_that_is_named_like_dicom_is_said(tmp_path, suffix, name):
    path = tmp_path / f"b{suffix}"
    write_mha(path, chest(), affine_of(SPACING)) if suffix == ".mha" else write(path, chest())
    path.rename(tmp_path / name)
    with pytest.raises(VolumeError, match=f"{name}: found the content of a {suffix} file, expected"):
        preprocess_volume(tmp_path / name, None, SMALL)


# ------------------------------------------------------------------ where a voxel lies in the cube


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "LPI", "SAR"])
@pytest.mark.parametrize("spacing", [(6.0, 5.0, 9.0), (14.0, 12.0, 19.0)])  # smaller and larger than the cube
def test_placement_finds_the_marker_again(tmp_path, codes, spacing):
    """A bright voxel's place says where in the tensor it is bright."""
    hu, mark = np.full((40, 36, 24), -1000, np.int16), (22, 15, 14)
    hu[10:30, 10:26, 8:18] = 0
    hu[mark] = 1000
    voxels, affine = reoriented(hu, affine_of(spacing), codes)
    path = write(tmp_path / "a.nii.gz", voxels, tuple(np.linalg.norm(affine[:3, :3], axis=0)), affine)
    shape = (48, 96, 96)
    tensor, placement = preprocess_volume(path, None, shape, assume_hu=True)[0], place_volume(path, shape)
    np.testing.assert_allclose(placement.affine, affine, atol=1e-4)
    found = np.argwhere(voxels == 1000)[0]
    brightest = np.unravel_index(int(tensor.argmax()), shape)
    for axis, index in enumerate(found):
        cube_axis = placement.axes[axis]
        step = abs(np.diff(placement.position[axis][:2])[0])
        assert abs(placement.position[axis][index] - (brightest[cube_axis] + 0.5) / shape[cube_axis]) <= step / 2 + 1e-6


def test_placement_beyond_the_cube(tmp_path):
    inside = place_volume(write(tmp_path / "a.nii.gz", chest((40, 40, 20)), (6.0, 6.0, 12.0)), SMALL)
    outside = place_volume(write(tmp_path / "b.nii.gz", chest((40, 40, 24)), (12.0, 12.0, 19.0)), SMALL)
    assert all(place.min() > 0 and place.max() < 1 for place in inside.position)
    assert all(place.min() < 0 and place.max() > 1 for place in outside.position)
    assert inside.shape == (40, 40, 20) and inside.axes == (1, 2, 0)


# ------------------------------------------------------------------ bad meta images: one line each


def _field(path, name, value):
    head, mark, voxels = write_mha(path, chest(), affine_of(SPACING)).read_bytes().partition(b"LOCAL\n")
    lines = [line for line in head.split(b"\n") if not line.startswith(name.encode() + b" ")]
    lines.insert(2, f"{name} = {value}".encode())
    path.write_bytes(b"\n".join(lines) + mark + voxels)


def _cut(path, compressed, keep=0.6):
    data = write_mha(path, chest(), affine_of(SPACING), compressed).read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


def _flipped(path):
    data = bytearray(write_mha(path, chest(), affine_of(SPACING), compressed=True).read_bytes())
    data[-200] ^= 255
    path.write_bytes(data)


BAD_META = {
    "missing": (lambda p: None, "no such file"),
    "a folder": (lambda p: p.mkdir(), "unreadable"),
    "empty": (lambda p: p.write_bytes(b""), "after 0 lines, no header"),
    "text": (lambda p: p.write_text("<html>Access denied</html>"), "no header"),
    "text with equals": (lambda p: p.write_text("a = b\n" * 999), "no header"),
    "one long line": (lambda p: p.write_bytes(b"x" * 9_000_000), "no header"),
    "cut": (lambda p: _cut(p, False), "truncated"),
    "cut, compressed": (lambda p: _cut(p, True), "truncated"),
    "cut in the checksum": (lambda p: _cut(p, True, 0.99999), "damaged data (the stream ends early)"),
    "cut in the header": (lambda p: _cut(p, False, 0.001), "no header"),
    "damaged": (_flipped, "damaged"),
    "absurd size": (lambda p: _field(p, "DimSize", "60000 60000 60000"), "at most"),
    "astronomic size": (lambda p: _field(p, "DimSize", "1e300 2 2"), "DimSize"),
    "half a voxel": (lambda p: _field(p, "DimSize", "4 4 2.5"), "DimSize"),
    "negative size": (lambda p: _field(p, "DimSize", "48 -44 20"), "axes of 48 x -44 x 20"),
    "two sizes": (lambda p: _field(p, "DimSize", "48 44"), "3 whole numbers"),
    "two axes": (lambda p: (_field(p, "NDims", "2"), _replace(p, b"= 48 44 20", b"= 48 880")), "2 axes"),
    "no axes": (lambda p: _field(p, "NDims", "many"), "as NDims"),
    "NaN spacing": (lambda p: _field(p, "ElementSpacing", "nan 1 1"), "as ElementSpacing"),
    "an underscore": (lambda p: _field(p, "ElementSpacing", "1_0 1 1"), "as ElementSpacing"),
    "digits of another script": (lambda p: _field(p, "ElementSpacing", "٧ 1 1"), "as ElementSpacing"),
    "zero spacing": (lambda p: _field(p, "ElementSpacing", "0 0 0"), "spacing 0.0"),
    "endless spacing": (lambda p: _field(p, "ElementSpacing", "1e39 1 1"), "spacing inf"),
    "singular matrix": (lambda p: _field(p, "TransformMatrix", "1 0 0 1 0 0 0 0 1"), "singular"),
    "NaN matrix": (lambda p: _field(p, "TransformMatrix", "nan 0 0 1 0 0 0 0 1"), "as TransformMatrix"),
    "scaled matrix": (lambda p: _field(p, "TransformMatrix", "3 0 0 0 3 0 0 0 3"), "beside an orientation"),
    "voxels elsewhere": (lambda p: _field(p, "ElementDataFile", "/etc/passwd"), "LOCAL, in this file"),
    "vectors": (lambda p: _field(p, "ElementNumberOfChannels", "3"), "one number"),
    "strange type": (lambda p: _field(p, "ElementType", "MET_STRING"), "MET_STRING"),
    "text voxels": (lambda p: _field(p, "BinaryData", "False"), "as text"),
    "strange flag": (lambda p: _field(p, "CompressedData", "perhaps"), "'perhaps' as CompressedData"),
    "scaled voxels": (lambda p: _field(p, "ElementToIntensityFunctionSlope", "2"), "HU as stored"),
    "a pipe": (lambda p: os.mkfifo(p), "a pipe or device"),
    "a size twice": (lambda p: (_field(p, "NDims", "3"), _replace(p, b"NDims", b"DimSize = 2\nNDims")), "twice"),
    "far voxels": (lambda p: _field(p, "HeaderSize", "99999999999"), "HeaderSize"),
}


def _replace(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize("case", BAD_META)
def test_bad_meta_image_gives_one_line(tmp_path, case):
    make, told = BAD_META[case]
    path = tmp_path / "bad.mha"
    make(path)
    with pytest.raises(VolumeError) as caught:
        preprocess_volume(path, None, SMALL)
    message = str(caught.value)
    assert message.startswith("bad.mha: found ") and told in message and "expected" in message
    assert "\n" not in message and len(message) < 250


def test_header_before_the_voxels_is_skipped(tmp_path, scan):
    hu, affine, expected = scan
    path = write_mha(tmp_path / "a.mha", hu, affine)
    head, mark, voxels = path.read_bytes().partition(b"LOCAL\n")
    for size, between in ((b"7", b"padding"), (b"-1", b"whatever is here")):
        path.write_bytes(head.replace(b"NDims", b"HeaderSize = " + size + b"\nNDims") + mark + between + voxels)
        assert torch.equal(preprocess_volume(path, None, SMALL), expected)


@pytest.mark.parametrize("form", ["a.mha", "a.nii.gz"])
def test_a_compressed_stream_with_a_piece_twice_is_refused(tmp_path, form):
    """It inflates without an error to more bytes than there are voxels: only the checksum at its end tells."""
    path = tmp_path / form

    def deflated(data):
        blocks = [data[start : start + 10_000] for start in range(0, len(data), 10_000)]
        stored = [struct.pack("<BHH", 0, len(block), len(block) ^ 0xFFFF) + block for block in blocks]
        return b"".join([stored[0], stored[1], *stored[1:], struct.pack("<BHH", 1, 0, 0xFFFF)])

    if form == "a.mha":
        head, mark, voxels = write_mha(path, chest(), affine_of(SPACING)).read_bytes().partition(b"LOCAL\n")
        head = head.replace(b"CompressedData = False", b"CompressedData = True")
        path.write_bytes(head + mark + b"\x78\x01" + deflated(voxels) + struct.pack(">L", zlib.adler32(voxels)))
    else:
        data = gzip.decompress(write(path, chest(), SPACING).read_bytes())
        end = struct.pack("<LL", zlib.crc32(data), len(data))
        path.write_bytes(gzip.compress(b"")[:10] + deflated(data) + end)
    with pytest.raises(VolumeError, match="damaged data|more bytes than its voxels"):
        preprocess_volume(path, None, SMALL)


def test_other_ways_to_write_a_flag_and_blank_lines_are_read(tmp_path, scan):
    hu, affine, expected = scan
    path = write_mha(tmp_path / "a.mha", hu, affine)
    data = path.read_bytes().replace(b"= True", b"= T").replace(b"= False", b"= no")
    path.write_bytes(data.replace(b"\n", b"\n\n", 3))
    assert torch.equal(preprocess_volume(path, None, SMALL), expected)


def test_a_few_bytes_that_inflate_to_a_huge_slice_are_refused_unread(tmp_path):
    """4 MB, deflated, could hold two slices of 30000 x 30000: the size is refused, not tried."""
    block = bytearray(gzip.decompress(write(tmp_path / "good.nii.gz", chest((9, 8, 7))).read_bytes())[:352])
    block[42:48] = struct.pack("<3h", 30000, 30000, 2)
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(bytes(block) + np.random.default_rng(0).bytes(4_000_000)))
    with pytest.raises(VolumeError, match="30000 x 30000 x 2 voxels of 2 bytes, expected at most 16777216 in a slice"):
        preprocess_volume(path, None, SMALL)


def _sparse_nifti(path, kind, voxels=(1024, 1024, 2048)):
    """A header, then zeros that take no room on the disk."""
    header = bytearray(write(path, chest((9, 8, 7)), (0.5, 0.5, 0.5)).read_bytes()[:352])
    header[42:48], header[70:74] = struct.pack("<3h", *voxels), struct.pack("<2h", kind, {64: 64, 4: 16}[kind])
    path.write_bytes(header)
    os.truncate(path, 352 + np.prod(voxels) * {64: 8, 4: 2}[kind])
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes")
def test_sixteen_gigabytes_of_zeros_are_refused_by_their_header(tmp_path, monkeypatch):
    path = _sparse_nifti(tmp_path / "a.nii", 64)
    packed = tmp_path / "a.nii.gz"
    with path.open("rb") as file:
        packed.write_bytes(gzip.compress(file.read(352) + np.random.default_rng(0).bytes(18_000_000), 1))
    monkeypatch.setattr(volume_file.VolumeFile, "slabs", lambda self: pytest.fail("read"))
    for each in (path, packed):
        with pytest.raises(VolumeError, match="1024 x 1024 x 2048 voxels of 8 bytes, expected at most"):
            preprocess_volume(each, None, SMALL)


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes")
def test_gigabytes_of_zeros_are_not_read_to_their_end(tmp_path, monkeypatch):
    read, fill = [], volume_file.StreamFile.fill
    monkeypatch.setattr(volume_file.StreamFile, "fill", lambda self, view: (read.append(len(view)), fill(self, view)))
    with pytest.raises(VolumeError, match="every voxel equal to 0"):
        preprocess_volume(_sparse_nifti(tmp_path / "a.nii", 4), None, SMALL)
    assert sum(read) < 600e6, "of 4.3e9 bytes"


def test_a_tilted_gantry_is_refused_with_the_same_words_in_every_format(tmp_path):
    """Slices of 12 mm, each 4 mm beside the one below: as if straight, probabilities move by up to 0.45."""
    affine = affine_of((8.0, 8.0, 12.0))
    sheared = affine.copy()
    sheared[0, 2] += 4
    spacing = tuple(np.linalg.norm(sheared[:3, :3], axis=0))
    paths = [
        write(tmp_path / "a.nii.gz", chest(), spacing, sheared),
        write_mha(tmp_path / "a.mha", chest(), sheared),
        write_series(tmp_path / "a", chest(), affine, shear=4.0),
    ]
    told = set()
    for path in paths:
        with pytest.raises(VolumeError) as caught:
            preprocess_volume(path, None, SMALL)
        told.add(str(caught.value).removeprefix(path.name))
    assert told == {": found axes 18.4 degrees off a right angle (gantry tilt), expected axes square to each other; "
                    "convert it with a tool that corrects the tilt"}


@pytest.mark.parametrize("name", ["a.nrrd", "a.mhd", "a.hdr", "a.img", "a.zip", "a.nii.zip", "a.tar.gz", "a.png"])
def test_a_file_of_another_kind_is_named_by_its_suffix_with_a_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"NRRD0005 and so on")
    with pytest.raises(VolumeError, match="ends in .*, expected .nii, .nii.gz, .mha or DICOM; (convert|unpack|name)"):
        open_volume(tmp_path / name)


def test_itk_reads_back_what_the_tests_write(tmp_path):
    """The helpers' geometry is the NIfTI one: otherwise the comparisons above would compare two mistakes."""
    import nibabel
    import SimpleITK

    hu, affine = reoriented(chest(), affine_of(SPACING), "RAS")
    SimpleITK.WriteImage(as_itk(hu, affine), str(tmp_path / "itk.nii.gz"))
    image = nibabel.load(tmp_path / "itk.nii.gz")
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(image.dataobj), hu)
