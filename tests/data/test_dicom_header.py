"""Headers that are compared as bytes against the same files read by pydicom alone: equal voxels, geometry and notes, or
the same one line, also where bytes are damaged."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from helpers_data import affine_of, chest
from helpers_dicom import write_series
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from ctclip.data import dicom, dicom_header, volume_file
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
    tags, paths = dicom_header.NEEDED_TAGS, sorted(folder.iterdir())
    return [dicom_header.read_header(path.read_bytes(), path.stat().st_size, tags) for path in paths]


@pytest.mark.parametrize("encoding", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_damaged_headers_give_what_pydicom_makes_of_them(tmp_path, encoding):
    folder = series(tmp_path / "series", encoding)
    own, by_pydicom = both(folder)
    assert own == by_pydicom and not isinstance(own, str)
    found = headers(folder)
    assert all(found) and len({header.shared for header in found}) == 1
    assert all((header.pixels is None) == (encoding == RLELossless) for header in found)
    random = np.random.default_rng(0)
    outcomes = []
    paths = sorted(folder.iterdir())
    end = paths[0].read_bytes().index(b"\xe0\x7f\x10\0") + 12
    for number, at in enumerate(random.integers(132, end, FLIPS)):
        path = paths[number % 2]  # pydicom interprets the first
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[at] = random.choice([0, 1, 255, damaged[at] ^ 1 << int(random.integers(8))])
        path.write_bytes(bytes(damaged))
        own, by_pydicom = both(folder)
        assert own == by_pydicom, f"byte {at}"
        outcomes.append(own)
        path.write_bytes(whole)
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


@pytest.mark.parametrize("padding", [(b"", b"\n"), (b"\t", b""), (b"\0", b""), (b"", b"\0"), (b"", b" ")])
def test_copies_are_found_however_their_uid_is_padded(tmp_path, padding):
    folder = series(tmp_path / "series")
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        at = data.index(b"\x08\0\x18\0UI") + 6
        end = at + 2 + int.from_bytes(data[at : at + 2], "little")
        uid = padding[0] + data[at + 2 : end].rstrip(b"\0") + padding[1]
        path.write_bytes(data[:at] + len(uid).to_bytes(2, "little") + uid + data[end:])
    for path in sorted(folder.iterdir())[:2]:
        (folder / f"Z{path.name}").write_bytes(path.read_bytes())
    own, by_pydicom = both(folder)
    assert own == by_pydicom and "2 copies of its slices skipped" in own[2]


@pytest.mark.parametrize("name", ["a name that is longer", "x", ""])
def test_files_that_change_between_header_and_pixels_are_refused(tmp_path, name):
    folder = series(tmp_path / "series")
    with open_volume(folder) as file:
        for path in folder.iterdir():
            changed = dcmread(path)
            changed.PatientID = name
            changed.save_as(path)
        with pytest.raises(VolumeError, match=r"the file has changed since its header was read.* copy or download"):
            list(file.slabs())


def test_a_reading_thread_ends_with_the_file_though_slabs_are_left_in_the_midst(tmp_path, monkeypatch):
    folder = series(tmp_path / "series", RLELossless)
    monkeypatch.setattr(volume_file, "SLAB_BYTES", 1)
    for _ in range(10):
        dicom._read_files.cache_clear()
        before = threading.active_count()
        with pytest.raises(KeyError, match="mine"), open_volume(folder) as file:
            slabs = file.slabs()
            next(slabs)
            raise KeyError("mine")
        assert threading.active_count() == before


def test_sequences_nested_without_end_are_left_to_pydicom():
    start = b"\x08\0\x15\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\xff\xff\xff\xff"
    meta = b"\x02\0\x10\0UI\x14\x00" + dicom_header.EXPLICIT + b"\0"
    data = bytes(128) + b"DICM" + meta + start * 1500
    assert dicom_header.read_header(data, len(data), frozenset()) is None
