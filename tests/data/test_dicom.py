"""DICOM series as tensors: files written by pydicom with what real exports have, read against the NIfTI of the same
voxels. What lies beside the slices is skipped and counted; what would give another picture is one line."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pydicom
import pytest
import torch
from helpers_data import SMALL, affine_of, chest, reoriented, write
from helpers_dicom import (
    CONVERTED_CT,
    CT,
    DICOMDIR,
    DOSE_REPORT,
    ENHANCED_CT,
    KEY_OBJECT,
    PRESENTATION,
    RAW_DATA,
    RTSTRUCT,
    SECONDARY_CAPTURE,
    add_pixels,
    new_file,
    to_jpeg_lossless,
    write_multiframe,
    write_other,
    write_series,
)
from helpers_scans import write_mha
from pydicom import dcmread
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ctclip.data import dicom
from ctclip.data.dicom import DicomSeries, is_dicom, read_folder, series_of
from ctclip.data.geometry import place_volume
from ctclip.data.preprocessing import preprocess_volume
from ctclip.data.readers import open_volume
from ctclip.data.volume_file import VolumeError
from ctclip.inference.scans import find_scans

SPACING = (7.5, 7.9, 12.25)
AFFINE = affine_of(SPACING)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """(HU (x, y, z), the tensor of its .nii.gz)"""
    hu = chest((46, 44, 21))
    path = write(tmp_path_factory.mktemp("scan") / "a.nii.gz", hu, SPACING, AFFINE)
    return hu, preprocess_volume(path, None, SMALL)


def voxels(path):
    with open_volume(path) as file:
        return np.concatenate([slices.copy() for _, slices in file.slabs()])


def notes(path):
    with open_volume(path) as file:
        return file.notes


def by_place(folder):
    """Files of a series from foot to head."""
    return sorted(folder.glob("IM*.dcm"), key=lambda file: dcmread(file).ImagePositionPatient[2])


# ------------------------------------------------------------------ the right tensor


@pytest.mark.parametrize("rotation", ["LPS", "LPI", "RAS"])
def test_a_series_gives_the_tensor_of_the_nifti(tmp_path, scan, rotation):
    """As scanned, feet first, prone: files in random order, named without order, HU from rescale values."""
    hu, expected = scan
    folder = write_series(tmp_path / "series", *reoriented(hu, AFFINE, rotation))
    assert torch.equal(preprocess_volume(folder, None, SMALL), expected)
    assert torch.equal(preprocess_volume(next(folder.iterdir()), None, SMALL), expected), "any file of the series"
    assert notes(folder) == []


@pytest.mark.parametrize(
    "encoding",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless],
)
def test_every_encoding_gives_the_same_voxels(tmp_path, encoding):
    hu = chest((40, 36, 4))
    if encoding == JPEGLosslessSV1:
        folder = write_series(tmp_path / "series", hu, AFFINE)
        for path in folder.iterdir():
            to_jpeg_lossless(path)
            assert dcmread(path).file_meta.TransferSyntaxUID == encoding
    elif encoding.is_compressed:
        folder = write_series(tmp_path / "series", hu, AFFINE, encoding=encoding)
    else:
        folder = write_series(tmp_path / "series", hu, AFFINE)
        for path in folder.iterdir():
            file = dcmread(path)
            if encoding == ExplicitVRBigEndian:
                file.PixelData = file.pixel_array.astype(">u2").tobytes()
                assert str(file), "every element is read before the file is taken for big-endian"
                file.set_original_encoding(False, False)
            file.file_meta.TransferSyntaxUID = encoding
            file.save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(voxels(folder), hu.T)


@pytest.mark.parametrize("implicit", [False, True])
def test_files_without_preamble_are_read(tmp_path, scan, implicit):
    hu, expected = scan
    folder = write_series(tmp_path / "series", hu, AFFINE)
    for path in folder.iterdir():
        file = dcmread(path)
        del file.file_meta, file.preamble
        path.unlink()
        file.save_as(path.with_suffix(""), implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert all(map(is_dicom, folder.iterdir()))
    assert torch.equal(preprocess_volume(folder, None, SMALL), expected)
    assert torch.equal(preprocess_volume(next(folder.iterdir()), None, SMALL), expected)
    assert [scan.name for scan in find_scans(folder)] == ["series"]


@pytest.mark.parametrize("sop_class", [ENHANCED_CT, CONVERTED_CT])
@pytest.mark.parametrize("encoding", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_multi_frame_files_are_read_by_their_functional_groups(tmp_path, scan, sop_class, encoding):
    hu, expected = scan
    path = write_multiframe(tmp_path / "multi" / "frames.dcm", hu, AFFINE, sop_class, encoding)
    assert torch.equal(preprocess_volume(path, None, SMALL), expected)
    assert torch.equal(preprocess_volume(path.parent, None, SMALL), expected)


def test_signed_values_of_twelve_bits_and_rescale_values_of_each_slice(tmp_path):
    hu = chest((20, 18, 6))

    def edit(file, index):
        factor = 2 if index % 2 else 1
        add_pixels(file, np.ascontiguousarray(hu[:, :, index].T * factor).astype(np.int16) & 0x0FFF)
        file.BitsStored, file.HighBit, file.PixelRepresentation = 12, 11, 1
        file.RescaleIntercept, file.RescaleSlope = "0", str(1 / factor)

    folder = write_series(tmp_path / "series", np.clip(hu, -1000, 1000), AFFINE, edit=edit)
    np.testing.assert_array_equal(voxels(folder), hu.T)


@pytest.mark.parametrize("encoding", [ExplicitVRLittleEndian, JPEGLSLossless])
def test_padding_is_no_tissue(tmp_path, encoding):
    """A corner of 63536, as unsigned files have it for -2000: 62512 HU by their rescale values."""
    hu = chest((20, 18, 4))

    def edit(file, index):
        stored = file.pixel_array.copy()
        stored[:3, :4] = 63536
        add_pixels(file, stored)

    folder = write_series(tmp_path / "a", hu, AFFINE, edit=edit, PixelPaddingValue=63536, encoding=encoding)
    expected = hu.T.astype(np.float32)
    expected[:, :3, :4] = -2000
    np.testing.assert_array_equal(voxels(folder), expected)
    usual = write_series(tmp_path / "b", hu, AFFINE, PixelPaddingValue=1064)  # 40 HU: soft tissue declared as padding
    np.testing.assert_array_equal(voxels(usual), hu.T)


@pytest.mark.parametrize(("spacing", "count"), [(1 / 3, 45), (0.7, 60), (0.625, 33)])
def test_slice_distance_is_the_number_that_other_formats_keep(tmp_path, spacing, count):
    """Positions are written rounded; their mean distance must not become a voxel more or less."""
    hu, affine = np.broadcast_to(chest((20, 18, 1)), (20, 18, count)), affine_of((9.0, 9.0, spacing), (11, -7, 3))
    folder = write_series(tmp_path / "series", hu, affine, digits=8)
    with open_volume(folder) as series, open_volume(write_mha(tmp_path / "a.mha", hu, affine)) as meta:
        assert series.header.spacing[2] == meta.header.spacing[2]
    np.testing.assert_allclose(place_volume(folder).affine, affine, atol=1e-3)


def test_unequal_distances_are_interpolated_where_slices_are_thick_enough(tmp_path):
    """Voxels of a ramp along z: at every position of the equal grid, the ramp."""
    places = np.array([0, 2, 4, 6, 7, 8, 10, 12, 14, 16.0])
    hu = np.broadcast_to(places * 10, (20, 18, len(places)))
    affine = affine_of((9.0, 9.0, 2.0))
    folder = write_series(tmp_path / "thick", hu, affine, places=places, SliceThickness="2.5")
    np.testing.assert_allclose(voxels(folder)[:, 0, 0], np.arange(0, 17, 2) * 10.0, atol=1e-4)
    assert notes(folder) == ["slices 1 to 2 mm apart: interpolated every 2 mm"]
    thin = write_series(tmp_path / "thin", hu, affine, places=places, SliceThickness="1")
    with pytest.raises(VolumeError, match=r"2 mm apart, .* none farther than their thickness, 1 mm"):
        open_volume(thin)


# ------------------------------------------------------------------ what else lies there


def test_other_objects_are_skipped_and_counted(tmp_path, scan):
    hu, expected = scan
    folder = write_series(tmp_path / "cd", hu, AFFINE)
    others = (RTSTRUCT, RTSTRUCT, KEY_OBJECT, PRESENTATION, DOSE_REPORT, RAW_DATA, SECONDARY_CAPTURE, DICOMDIR)
    for number, sop_class in enumerate(others):
        write_other(folder / f"OTHER{number}.dcm", sop_class, f"1.2.3.4.{90 + number}")
    write_other(folder / "SAME.dcm", RTSTRUCT, "1.2.3.4.5")  # under the CT's own series
    for name in ("INDEX.TXT", "viewer.exe", ".hidden", "Thumbs.db"):
        (folder / name).write_bytes(b"whatever")
    assert torch.equal(preprocess_volume(folder, None, SMALL), expected)
    (note,) = notes(folder)
    assert note.startswith("9 other DICOM objects skipped: 3 RT Structure Set, ")
    assert "1 X-Ray Radiation Dose SR" in note
    assert series_of(folder) == ({"cd": by_place(folder)[0].parent / "IM0000.dcm"}, note)


@pytest.mark.parametrize("name", ["INDEX", "INDEX.dcm"])
def test_a_vendor_s_objects_are_skipped_and_counted(tmp_path, scan, name):
    """Of a private SOP class and without a picture, with the CT's series, one of their own, or none."""
    hu, expected = scan
    folder = write_series(tmp_path / "series", hu, AFFINE)
    for number, series in enumerate(("1.2.3.4.5", "1.2.3.4.77", "")):
        write_other(folder / name.replace("X", f"X{number}"), "1.3.12.2.1107.5.9.1", series)
    assert torch.equal(preprocess_volume(folder, None, SMALL), expected)
    assert notes(folder) == ["3 other DICOM objects skipped: 3 of an unknown kind"]


def test_fewer_slices_than_the_headers_state_are_told(tmp_path, scan):
    hu, _ = scan
    stated = {"AcquisitionNumber": "3", "ImagesInAcquisition": "21"}
    whole = write_series(tmp_path / "whole", hu, AFFINE, **stated)
    assert notes(whole) == []
    shutil.copytree(whole, tmp_path / "cut")
    for file in by_place(tmp_path / "cut")[13:]:  # at an end, where no distance shows it
        file.unlink()
    assert notes(tmp_path / "cut") == ["13 of 21 slices found (ImagesInAcquisition): is the series whole?"]
    shutil.copy(by_place(tmp_path / "cut")[0], tmp_path / "cut" / "copy.dcm")
    assert "13 of 21 slices found (ImagesInAcquisition): is the series whole?" in notes(tmp_path / "cut")


def test_slices_are_not_missed_that_another_series_of_the_acquisition_has(tmp_path, scan):
    hu, _ = scan
    for number, part in enumerate((hu[:, :, :13], hu[:, :, 13:])):
        write_series(tmp_path / "a", part, AFFINE, f"1.2.3.4.{number}", f"S{number}_", AcquisitionNumber="3",
                     ImagesInAcquisition="21")  # fmt: skip
    assert notes(tmp_path / "a" / "S0_0000.dcm") == []
    own = write_series(tmp_path / "b", hu[:, :, :13], AFFINE, ImagesInAcquisition="21", AcquisitionNumber="1")
    write_series(own, hu, AFFINE, "1.2.3.4.9", "T", AcquisitionNumber="2")
    assert notes(own / "IM0000.dcm") == ["13 of 21 slices found (ImagesInAcquisition): is the series whole?"]


def test_the_headers_of_a_folder_are_read_once_for_all_its_series(tmp_path, scan, monkeypatch):
    hu, _ = scan
    for number in range(3):
        write_series(tmp_path / "many", hu, AFFINE, f"1.2.3.4.{number}", f"S{number}_")
    interpreted, headers, planes = [], [], []

    def count(owner, name, calls):
        whole = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: (calls.append(args[0]), whole(*args, **options))[1])

    count(pydicom, "dcmread", interpreted)
    count(dicom, "read_header", headers)
    count(np, "fromfile", planes)
    scans = find_scans(tmp_path / "many")
    for found in scans:
        preprocess_volume(found.path, None, SMALL)
    assert len(scans) == 3 and len({found.series for found in scans}) == 3
    assert len(headers) == 3 * 21 and len(interpreted) == 3, "each header once; one of each series by pydicom"
    assert len(planes) == len(set(planes)) == 3 * 21, "each slice's pixels once"
    (tmp_path / "many" / "S1_0004.dcm").unlink()
    assert len(read_folder(tmp_path / "many").series["1.2.3.4.1"]) == 20, "a folder that has changed is read again"


def test_a_slice_of_another_intercept_is_told(tmp_path):
    """Its voxels are 1024 HU higher than its neighbours': HU all the same, as far as the whole series shows."""

    def edit(file, index):
        file.RescaleIntercept = "0" if index == 7 else "-1024"

    folder = write_series(tmp_path / "series", chest((46, 44, 21)), AFFINE, edit=edit)
    assert notes(folder) == ["RescaleIntercept -1024 to 0 in one series (damaged?)"]


@pytest.mark.parametrize("copied", [1, 21])
def test_copies_of_slices_are_skipped(tmp_path, scan, copied):
    """As a CD that is copied twice leaves them."""
    hu, expected = scan
    folder = write_series(tmp_path / "series", hu, AFFINE)
    for path in sorted(folder.iterdir())[:copied]:
        shutil.copy(path, path.with_name(f"{path.stem} (1).dcm"))
    assert torch.equal(preprocess_volume(folder, None, SMALL), expected)
    assert notes(folder) == [f"{copied} {'copy' if copied == 1 else 'copies'} of its slices skipped"]


def test_a_folder_without_ct_is_no_scan(tmp_path):
    write_other(tmp_path / "cd" / "DICOMDIR", DICOMDIR)
    assert series_of(tmp_path / "cd") == ({}, "1 other DICOM object skipped: 1 Media Storage Directory")
    with pytest.raises(VolumeError, match="0 DICOM series of CT slices in the folder"):
        open_volume(tmp_path / "cd")


@pytest.mark.parametrize("case", ["by its type", "turned"])
def test_a_localizer_under_the_series_own_identity_is_skipped(tmp_path, scan, case):
    hu, expected = scan
    folder = write_series(tmp_path / "series", hu, AFFINE)
    other = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]} if case == "by its type" else {}
    scout, affine = (chest((60, 50, 1)), AFFINE) if other else reoriented(chest((20, 1, 22)), AFFINE, "LIP")
    write_series(folder, scout, affine, prefix="A", **other)
    assert torch.equal(preprocess_volume(folder, None, SMALL), expected)
    assert len(notes(folder)) == 1 and "localizer" in notes(folder)[0]


def test_series_are_named_by_folder_and_number(tmp_path):
    small = chest((20, 18, 3))
    write_series(tmp_path / "one", small, AFFINE)
    assert list(series_of(tmp_path / "one")[0]) == ["one"]
    for number in range(4):  # of one number, and one last part of the identity
        write_series(tmp_path / "many", small, AFFINE, f"1.2.{number}.4.7", f"s{number}")
    assert list(series_of(tmp_path / "many")[0]) == [f"many/series_7{end}" for end in ("", "_2", "_3", "_4")]


def test_an_unusable_series_leaves_the_other_one_readable(tmp_path):
    hu = chest((20, 18, 8))
    write_series(tmp_path / "two", hu, AFFINE)
    write_series(tmp_path / "two", hu, AFFINE, "1.2.3.4.6", "other", RescaleSlope="0")
    found, _ = series_of(tmp_path / "two")
    np.testing.assert_array_equal(voxels(found["two/series_5"]), hu.T)
    with pytest.raises(VolumeError, match="RescaleSlope 0"):
        open_volume(found["two/series_6"])


# ------------------------------------------------------------------ one line


def _series(folder, **changes):
    return write_series(folder, chest((20, 18, 8)), AFFINE, **changes)


def _damage(place, content):
    def make(folder):
        victim = by_place(_series(folder))[place]
        victim.write_bytes(content if isinstance(content, bytes) else victim.read_bytes()[:content])

    return make


def _two(folder, **changes):
    _series(folder)
    return write_series(folder, chest((20, 18, 8)), AFFINE, prefix="other", **changes)


def _of_a_private_kind(path):
    file = dcmread(path)
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.3.12.2.1107.5.9.2"
    file.save_as(path)


def _of_another_pass(file, index):
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.5.{index}"


def _another(shape, spacing=SPACING, codes="LPS"):
    def make(folder):
        _series(folder)
        write_series(folder, *reoriented(chest(shape), affine_of(spacing), codes), prefix="other")

    return make


def _all_cut(folder):
    for file in _series(folder).iterdir():
        file.write_bytes(file.read_bytes()[:450])


def _moved_aside(file, index):
    if index == 4:
        file.ImagePositionPatient = [file.ImagePositionPatient[0] + 40, *file.ImagePositionPatient[1:]]


def _of_two_patients(file, index):
    file.PatientID = str(index % 2)


def _cut_compressed(folder):
    file = by_place(write_series(folder, chest((20, 18, 8)), AFFINE, encoding=JPEGLSLossless))[7]
    file.write_bytes(file.read_bytes()[:-40])


BAD = {
    "a slice is missing": (lambda f: by_place(_series(f))[3].unlink(), "is one missing"),
    "one slice": (lambda f: write_series(f, chest((20, 18, 1)), AFFINE), "single slice"),
    "a picture of an unknown kind": (lambda f: _of_a_private_kind(by_place(_series(f))[0]), "an unknown kind"),
    "magnetic resonance": (lambda f: _series(f, SOPClassUID="1.2.840.10008.5.1.4.1.1.4"), "0 DICOM series of CT"),
    "all at one place": (lambda f: _series(f, ImagePositionPatient=["0", "0", "0"]), "two slices at one place"),
    "tilted gantry": (lambda f: _series(f, shear=3.0), "gantry tilt"),
    "a slice moved aside": (lambda f: _series(f, edit=_moved_aside), "do not lie above each other"),
    "two series": (lambda f: _two(f, series="1.2.3.4.6"), "2 DICOM series"),
    "two passes": (lambda f: _two(f, edit=_of_another_pass), "two slices at one place"),
    "two passes of one identity": (lambda f: _two(f, RescaleIntercept="-1020"), "two slices at one place"),
    "another size": (_another((30, 18, 1)), "slices that are alike"),
    "another spacing": (_another((20, 18, 1), (9.0, 9.0, 9.0)), "slices that are alike"),
    "dark for dense": (lambda f: _series(f, PhotometricInterpretation="MONOCHROME1"), "MONOCHROME1"),
    "projections": (lambda f: _series(f, ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"]), "projection"),
    "lowest values": (lambda f: _series(f, ImageType=["DERIVED", "SECONDARY", "MINIP"]), "ImageType MINIP"),
    "two patients": (lambda f: _series(f, edit=_of_two_patients), "of 2 patients"),
    "no slope": (lambda f: _series(f, RescaleSlope="0"), "RescaleSlope 0"),
    "no slope at all": (lambda f: _series(f, edit=lambda file, _: delattr(file, "RescaleSlope")), "no RescaleSlope"),
    "iodine": (lambda f: _series(f, RescaleType="MGML"), "values in MGML"),
    "no orientation": (lambda f: _series(f, ImageOrientationPatient=["1", "0", "0", "1", "0", "0"]), "unit vectors"),
    "an empty first slice": (_damage(0, b""), "an empty file"),
    "a last slice of zeros": (_damage(-1, bytes(5000)), "a file that is not DICOM"),
    "a last slice that is a page": (_damage(-1, b"<html>Not found</html>"), "a file that is not DICOM"),
    "a slice cut in its header": (_damage(4, 450), "expected"),
    "a last slice cut in its pixels": (_damage(-1, -300), "damaged data"),
    "a compressed slice cut short": (_cut_compressed, "damaged data"),
    "nothing but cut files": (_all_cut, "expected"),
    "no series": (lambda f: f.mkdir(), "0 DICOM series"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_series_gives_one_line(tmp_path, case):
    make, told = BAD[case]
    make(tmp_path / "bad")
    with pytest.raises(VolumeError) as caught:
        preprocess_volume(tmp_path / "bad", None, SMALL)
    message = str(caught.value)
    assert told in message and "expected" in message and "\n" not in message and len(message) < 300


@pytest.mark.parametrize("frames", [1, 7, 9])
def test_frames_without_geometry_are_refused(tmp_path, frames):
    path = write_multiframe(tmp_path / "a.dcm", chest((20, 18, 8)), AFFINE)
    file = dcmread(path)
    file.NumberOfFrames = frames
    file.save_as(path)
    with pytest.raises(VolumeError, match="geometry of 8"):
        open_volume(path)


def test_projections_in_a_multi_frame_file_are_refused_as_in_single_ones(tmp_path):
    path = write_multiframe(tmp_path / "a.dcm", chest((20, 18, 8)), AFFINE)
    file = dcmread(path)
    kind = file.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence[0]
    kind.FrameType = ["DERIVED", "SECONDARY", "VOLUME", "MIP"]
    file.save_as(path)
    with pytest.raises(VolumeError, match="a projection"):
        open_volume(path)


def test_a_slice_without_a_position_names_the_file(tmp_path):
    folder = _series(tmp_path / "series")
    file = new_file(CT, "1.2.3.5", "1.2.3.4.5")
    file.save_as(folder / "EMPTY.dcm", enforce_file_format=True)
    with pytest.raises(VolumeError, match=r"EMPTY.dcm: found no ImageOrientationPatient, expected 6 numbers"):
        DicomSeries(folder)


@pytest.mark.parametrize("missing", ["pydicom", "SimpleITK"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing):
    folder = write_series(tmp_path / "series", chest((20, 18, 4)), AFFINE, encoding=JPEGLSLossless)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(VolumeError, match=f"pip install {missing}"):
        preprocess_volume(folder, None, SMALL)


def test_simple_itk_that_takes_a_cut_slice_for_a_whole_one_is_refused(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "series", chest((20, 18, 4)), AFFINE, encoding=JPEGLSLossless)
    monkeypatch.setattr(pytest.importorskip("SimpleITK"), "__version__", "2.5.3")
    with pytest.raises(VolumeError, match=r"SimpleITK 2\.5\.3, .* expected SimpleITK 2\.5\.4 or newer"):
        preprocess_volume(folder, None, SMALL)


def test_series_whose_files_have_no_suffix(tmp_path, scan):
    """As archives name them: by numbers or identities. A README is not one of them; what is named like them is."""
    hu, expected = scan
    folder = write_series(tmp_path / "a", hu, AFFINE)
    for path in list(folder.iterdir()):
        path.rename(folder / f"1.2.840.113.{path.stem[2:]}")
    (folder / "README").write_text("A CD.")
    assert torch.equal(preprocess_volume(folder, None, SMALL), expected)
    shutil.copy(folder / "README", folder / "1.2.840.113.0099")
    with pytest.raises(VolumeError, match="not DICOM"):
        open_volume(folder)
    assert read_folder(folder).skipped == {}
