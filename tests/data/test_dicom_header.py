"""Headers that are compared as bytes against the same files read by pydicom alone: equal voxels, geometry and notes, or
the same one line, also where bytes are damaged."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_data import affine_of, chest
from helpers_dicom import write_series
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from ctclip.data import dicom, dicom_header
from ctclip.data.readers import open_volume
from ctclip.data.volume_file import VolumeError

AFFINE = affine_of((7.5, 7.9, 12.25))
FLIPS = 25  # in each encoding


def _with_sequences(file, _):
    """Sequences of undefined and defined length in each other, private elements, a character set, a long text."""
    inner, outer, code = Dataset(), Dataset(), Dataset()
    inner.CodeValue, inner.CodeMeaning = "1", "chest"
    code.ProcedureCodeSequence = Sequence([inner, inner])
    code["ProcedureCodeSequence"].is_undefined_length = True
    outer.PurposeOfReferenceCodeSequence, outer.ReferencedSOPInstanceUID = Sequence([inner]), "1.2.3"
    inner.is_undefined_length_sequence_item = outer.is_undefined_length_sequence_item = True
    file.RequestAttributesSequence, file.SourceImageSequence = Sequence([code]), Sequence([outer, outer])
    for name in ("RequestAttributesSequence", "SourceImageSequence"):
        file[name].is_undefined_length = True
    file.SpecificCharacterSet, file.PatientID, file.TextComments = "ISO_IR 100", "Müller", "x" * 5000
    file.WindowCenter, file.ImagesInAcquisition = ["40", "-600"], "3"


def series(folder, encoding=ExplicitVRLittleEndian, edit=_with_sequences, **changes):
    write_series(folder, chest((20, 18, 3)), AFFINE, edit=edit, **changes)
    for path in folder.iterdir():
        file = dcmread(path)
        if encoding == RLELossless:
            file.compress(encoding)
        file.file_meta.TransferSyntaxUID = encoding
        file.save_as(path, implicit_vr=encoding == ImplicitVRLittleEndian, little_endian=True)
    return folder


def outcome(folder):
    """(voxels, header, notes), or the line that says why not."""
    dicom._read_files.cache_clear()
    try:
        with open_volume(folder) as file:
            voxels = np.concatenate([slices.copy() for _, slices in file.slabs()])
            return voxels.tobytes(), str(file.header), file.notes
    except VolumeError as error:
        return str(error)


def both(folder):
    """What comes of a folder, and what pydicom alone makes of it."""
    own = outcome(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dicom, "read_header", lambda *_: None)
        return own, outcome(folder)


def headers(folder):
    """What is read of the files here; None where pydicom reads one."""
    tags = {*dicom_header.STORED_TAGS, dicom_header.INSTANCE, dicom_header.POSITION, dicom_header.PHOTOMETRIC}
    return [dicom_header.read_header(path.read_bytes(), path.stat().st_size, tags) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("encoding", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_damaged_headers_give_what_pydicom_makes_of_them(tmp_path, encoding):
    folder = series(tmp_path / "series", encoding)
    own, by_pydicom = both(folder)
    assert own == by_pydicom and not isinstance(own, str)
    found = headers(folder)
    assert all(found) and len({header.shared for header in found}) == 1
    assert all((header.pixels is None) == (encoding == RLELossless) for header in found)
    path = sorted(folder.iterdir())[1]
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    outcomes = []
    for at in random.integers(132, whole.index(b"\xe0\x7f\x10\0") + 12, FLIPS):
        damaged = bytearray(whole)
        damaged[at] = random.choice([0, 1, 255, damaged[at] ^ 1 << int(random.integers(8))])
        path.write_bytes(bytes(damaged))
        own, by_pydicom = both(folder)
        assert own == by_pydicom, f"byte {at}"
        outcomes.append(own)
    assert len(set(map(str, outcomes))) > 2, "some that do harm, and some that do not"


@pytest.mark.parametrize(
    "case",
    ["behind", "short", "no preamble", "another slope", "high bit", "no stored bits", "no photometric interpretation"],
)
def test_what_is_not_plain_goes_through_pydicom(tmp_path, case):
    folder = series(tmp_path / "series")
    path = sorted(folder.iterdir())[1]
    if case in ("behind", "short", "no preamble"):
        data = path.read_bytes()
        path.write_bytes({"behind": data + bytes(range(16)), "short": data[:-9], "no preamble": data[132:]}[case])
    else:
        file = dcmread(path)
        if case == "another slope":
            file.RescaleSlope = "2"
        elif case == "high bit":
            file.HighBit = 11
        else:
            del file["BitsStored" if case == "no stored bits" else "PhotometricInterpretation"]
        file.save_as(path)
    own, by_pydicom = both(folder)
    assert own == by_pydicom
    assert isinstance(own, str) == (case not in ("no preamble", "another slope", "high bit"))
    if case == "high bit":
        assert [header.pixels is None for header in headers(folder)] == [False, True, False]


def test_unused_bits_are_taken_for_the_sign(tmp_path):
    """12 bits with a sign, whatever lies above them; what SimpleITK and pydicom make of such files."""
    hu = chest((20, 18, 3))

    def edit(file, index):
        stored = np.ascontiguousarray(hu[:, :, index].T).astype(np.int16)
        file.PixelData = (stored & 0x0FFF | (0x5000 if index else 0)).astype("<u2").tobytes()
        file.BitsStored, file.HighBit, file.PixelRepresentation, file.RescaleIntercept = 12, 11, 1, "0"

    folder = series(tmp_path / "series", edit=edit)
    assert all(header.pixels.unused == 4 for header in headers(folder))
    own, by_pydicom = both(folder)
    assert own == by_pydicom
    np.testing.assert_array_equal(np.frombuffer(own[0], "f4"), hu.T.astype("f4").ravel())


def test_sequences_nested_without_end_are_left_to_pydicom():
    start = b"\x08\0\x15\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\xff\xff\xff\xff"
    meta = b"\x02\0\x10\0UI\x14\x00" + dicom_header.EXPLICIT + b"\0"
    data = bytes(128) + b"DICM" + meta + start * 1500
    assert dicom_header.read_header(data, len(data), frozenset()) is None
