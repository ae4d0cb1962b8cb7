"""DICOM: the CT slices among whatever else lies in a folder that a scanner, an archive or a CD left.

What a file is, its SOP class says: slices (one in a file, or many in a multi-frame file) are read, other objects are
counted and skipped. The headers of a series are alike: pydicom interprets one of each kind; of the others the bytes are
compared, and what they have of their own is read (`dicom_header`).

Plain pixels are read from where the header ends, or, where that is not as usual, by pydicom, as are run-length coded
ones; the other codes by SimpleITK, which is the faster and refuses a slice that is cut short. Both packages are
optional.
"""

from __future__ import annotations

import filecmp
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ctclip.data.dicom_header import (
    DEFLATED,
    HEADER_BYTES,
    NEEDED_TAGS,
    SliceHeader,
    StoredPixels,
    read_header,
)
from ctclip.data.volume_file import (
    LPS_TO_RAS,
    MOST_PLANE,
    MOST_VOXELS,
    RECOPY,
    Header,
    VolumeError,
    VolumeFile,
    content_suffix,
    file_error,
    in_order,
    inflated,
    shape_text,
    shortest_decimal,
    three_axes,
)
from ctclip.formatting import comma_separated, parse_number, plural

CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
CT_CLASS_IN_BYTES = re.compile(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.2(\.[12])?[^.\d]")  # CT, enhanced, converted
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")  # what claims to be DICOM by its name
OLDEST_ITK = (2, 5, 4)  # whose GDCM refuses a slice that is cut short
LAST_TAGS = (0x7FE00010, 0xFFFAFFFA, 0xFFFCFFFC)  # pixels; behind them only signatures and padding
SERIES_PREFIX = "series_"  # before its number, in the name of a series that shares its folder
JITTER = 0.1  # of the slice distance: how far a slice may lie from its place; a missing one is ten times that off
STRAIGHT = 1.0  # degrees between the slices' normal and the way from slice to slice, up to which that is the normal
PROJECTIONS = ("MIP", "MINIP")  # over thick slabs: other values than those of slices
SCOUTS = 3  # slices of another orientation than the rest of their series, at most, that are taken for localizers
DECODERS = 2  # threads; a second one takes 0.6 of the time for JPEG 2000
DECODED_AHEAD = 4  # slices
KEPT_FOLDERS = 16  # whose headers are kept: 1 KB for each slice
PADDING_HU = -2000.0
MOST_SHIFT = 100.0  # HU between the rescale intercepts of a series, above which it is told
OTHER_QUANTITIES = ("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT")  # RescaleType of what is no HU; US is unspecified
SCANNED_HU = (-1000.0, 3071.0)  # 12 bits of HU: what scanners store
HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "PatientID", "ImageType", "Modality", "SeriesInstanceUID", "SeriesNumber",
    "SliceThickness", "AcquisitionNumber", "ImagesInAcquisition",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "NumberOfFrames",
    "SamplesPerPixel", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelRepresentation",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
# Where a multi-frame file keeps what a single slice has at the top of its header.
FUNCTIONAL_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence", "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence", "SliceThickness": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence", "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence", "FrameType": "CTImageFrameTypeSequence",
}  # fmt: skip


def is_dicom(path: Path) -> bool:
    """Whether a regular file begins as DICOM does (with or without its preamble), or is named like a DICOM file."""
    return os.path.isfile(path) and (path.suffix.lower() in DICOM_SUFFIXES or begins_as_dicom(beginning(path)))


def begins_as_dicom(start: bytes) -> bool:
    """128 bytes of anything and DICM; or, without this preamble, a first element of group 2 or 8, little-endian."""
    if start[128:132] == b"DICM":
        return True
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    implicit = start[6:8] == b"\0\0"
    return start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0" and (explicit or implicit) and len(start) > 16


def beginning(path: Path, count: int = 2048) -> bytes:
    """The first bytes of a file; nothing where they cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(count)
    except OSError:
        return b""


def import_pydicom(path: Path) -> ModuleType:
    """pydicom, quiet; VolumeError where it is not installed."""
    try:
        import pydicom
    except ImportError:
        raise file_error(path, "DICOM", "the package pydicom to read it", "pip install pydicom SimpleITK") from None
    warnings.filterwarnings("ignore", module="pydicom")  # values out of the standard are judged here
    return pydicom


def import_simple_itk(path: Path) -> ModuleType:
    """SimpleITK, quiet; VolumeError where it is not installed, or so old that it reads a cut slice as a whole one."""
    try:
        import SimpleITK
    except ImportError:
        expected = "the package SimpleITK to decode it"
        raise file_error(path, "compressed pixels", expected, "pip install SimpleITK") from None
    if tuple(map(int, SimpleITK.__version__.split(".")[:3])) < OLDEST_ITK:
        found = f"DICOM and SimpleITK {SimpleITK.__version__}, which takes a slice that is cut short for a whole one"
        expected = "SimpleITK " + ".".join(map(str, OLDEST_ITK))
        raise file_error(path, found, f"{expected} or newer", "pip install --upgrade SimpleITK")
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


# ------------------------------------------------------------------ headers


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice of a series. Position and directions (along rows, along columns) are LPS, mm; spacing and size along
    rows, then columns."""

    path: Path
    instance: str  # SOPInstanceUID
    frame: int | None  # of a multi-frame file
    patient: str
    encoding: str  # transfer syntax
    size: tuple[int, int]
    spacing: tuple[float, float]
    position: np.ndarray
    directions: np.ndarray  # (2, 3)
    decimals: int  # of the position as it is written
    slope: float
    intercept: float
    thickness: float | None
    padding: tuple[float, float] | None  # HU that are no part of the picture, lowest and highest
    acquisition: str  # its number
    declared: int  # ImagesInAcquisition; 0: not stated
    pixels: StoredPixels | None = None  # None: pydicom or SimpleITK finds them

    def like(self, other: Slice) -> bool:
        spacing = np.allclose(self.spacing, other.spacing, rtol=1e-4)
        return self.size == other.size and spacing and not self.turned(other)

    def turned(self, other: Slice, most: float = 1e-3) -> bool:
        return bool(np.abs(self.directions - other.directions).max() > most)


@dataclass
class DicomFolder:
    """What lies in a folder: CT slices by their series, a fault for each series that has an unusable one ("": one
    whose series is unknown, so that any may lack it), and how many other DICOM objects there are of each kind."""

    series: dict[str, list[Slice]] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    faults: dict[str, VolumeError] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    unknown: dict[str, Path] = field(default_factory=dict)  # by series, an object whose kind is unknown
    alike: dict[tuple, tuple[str, Slice]] = field(default_factory=dict)  # by what they share: series, a slice

    def series_with(self, name: str) -> dict[str, list[Slice]]:
        """The series that a file of the folder belongs to."""
        return {
            identity: slices
            for identity, slices in self.series.items()
            if name in {each.path.name for each in slices}
            or (identity in self.faults and str(self.faults[identity]).startswith(f"{name}: "))
        }

    def note(self) -> str | None:
        """One line about what was skipped; None where nothing was."""
        if not self.skipped:
            return None
        kinds = comma_separated(f"{count} {kind}" for kind, count in self.skipped.most_common())
        return f"{plural(self.skipped.total(), 'other DICOM object')} skipped: {kinds}"


def read_folder(folder: Path) -> DicomFolder:
    """The headers of all DICOM files that lie in this very folder. VolumeError where pydicom is missing.

    Those of the last folders are kept as long as no file changes: what lists the series of a folder and what then reads
    each of them need the headers once.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    states = [(path.name, path.stat()) for path in paths]
    return _read_files(folder, tuple((name, state.st_mtime_ns, state.st_size) for name, state in states))


@lru_cache(KEPT_FOLDERS)
def _read_files(folder: Path, files: tuple[tuple[str, int, int], ...]) -> DicomFolder:
    pydicom = import_pydicom(folder)
    content, names, strangers = DicomFolder(), set(), []
    tags = NEEDED_TAGS | {pydicom.datadict.tag_for_keyword(keyword) for keyword in HEADER_TAGS}
    for path, size in ((folder / name, size) for name, _, size in files):
        start = beginning(path, HEADER_BYTES)
        if not begins_as_dicom(start):
            strangers.append(path)
        elif _add_file(content, path, start[:2048], read_header(start, size, tags), pydicom):
            names.add(_name_form(path))
    for path in strangers:  # an empty or overwritten slice, at an end of the series, would not be missed by the others
        if _name_form(path) in names or path.suffix.lower() in DICOM_SUFFIXES:
            start = beginning(path)
            suffix = content_suffix(inflated(start) or start)
            other = "a file that is not DICOM" if path.stat().st_size else "an empty file"
            found = f"the content of a {suffix} file" if suffix else other
            remedy = f"end its name in {suffix}, or move it away" if suffix else RECOPY
            content.faults.setdefault("", file_error(path, found, "a slice like those beside it", remedy))
    for identity, path in content.unknown.items():
        if identity in content.series:
            found = "an object of an unknown kind in a series of CT slices"
            content.faults.setdefault(identity, file_error(path, found, "slices only", "copy it again or move it away"))
    return content


def _name_form(path: Path) -> str:
    """What the names of a series have in common: the suffix, or, without one, all but the numbers."""
    suffix = path.suffix.lower()
    return suffix if re.search("[a-z]", suffix) else re.sub(r"\d+", "#", path.name.lower())


def _add_file(
    content: DicomFolder, path: Path, start: bytes, own: SliceHeader | None, pydicom: ModuleType
) -> bool:
    """Sorts one DICOM file in; whether it is a CT slice, usable or not. `own`: its header by `read_header`."""
    if own is not None and own.shared in content.alike:
        _add_alike(content, path, own)
        return True
    identity, sop_class = "", None
    try:
        if own is None and DEFLATED in start:  # it would be inflated whole, whatever it holds
            raise file_error(path, "a deflated DICOM file", "pixels plain or compressed one by one", "convert it first")
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=HEADER_TAGS)
        named = header.get("SOPClassUID"), header.file_meta.get("MediaStorageSOPClassUID")
        sop_class = next((each for each in named if each in CT_CLASSES), named[0] or named[1])
        if not sop_class:
            raise ValueError("no SOP class")
        if sop_class not in CT_CLASSES:
            uid = pydicom.uid.UID(str(sop_class))
            if uid == uid.name and header.get("Rows"):  # a private picture, or a slice whose kind is damaged
                content.unknown.setdefault(str(header.get("SeriesInstanceUID", "")), path)
            content.skipped["of an unknown kind" if uid == uid.name else uid.name.removesuffix(" Storage")] += 1
            return False
        identity = str(header.get("SeriesInstanceUID", ""))
        content.numbers.setdefault(identity, str(header.get("SeriesNumber") or "").strip())
        slices = list(_slices_of(path, header))
    except Exception as error:  # pydicom's own are of any type, for bytes that make no sense
        if not sop_class and not CT_CLASS_IN_BYTES.search(start):
            content.skipped["unreadable DICOM file"] += 1
            return False
        if not isinstance(error, VolumeError):
            found = f"an unreadable CT slice ({type(error).__name__}: {error})"[:160]
            error = file_error(path, re.sub(r"\s+", " ", found), "a readable one", RECOPY)
        content.faults.setdefault(identity, error)
        if identity:
            content.series.setdefault(identity, [])
        return True
    if not slices:
        content.skipped["localizer"] += 1
        return False
    if own is not None and slices[0].frame is None:
        slices = [replace(slices[0], pixels=own.pixels)]
        content.alike[own.shared] = identity, slices[0]
    content.series.setdefault(identity, []).extend(slices)
    return True


def _add_alike(content: DicomFolder, path: Path, own: SliceHeader) -> None:
    """Adds a slice whose header is that of one already read but for what `own` has."""
    identity, other = content.alike[own.shared]
    try:
        position = _numbers(path, own.position, "ImagePositionPatient", 3)
    except VolumeError as error:
        content.faults.setdefault(identity, error)
        return
    content.series[identity].append(
        replace(other, path=path, instance=own.instance, position=position, decimals=_decimals(own.position),
                pixels=own.pixels)
    )  # fmt: skip


def _slices_of(path: Path, header: Any) -> Iterator[Slice]:
    """The slices of a CT file but its localizers. Raises VolumeError for one that is unusable."""
    frames = _integer(path, header, "NumberOfFrames", 1)
    groups = header.get("PerFrameFunctionalGroupsSequence")
    if groups is None and frames == 1:
        if _is_slice(path, header.get("ImageType")):
            yield _read_slice(path, header, [header], None)
        return
    if groups is None or len(groups) != frames:
        found = f"{plural(frames, 'frame')} and the geometry of {len(groups or ())}"
        raise file_error(path, found, "one for each", RECOPY)
    shared = header.get("SharedFunctionalGroupsSequence") or [None]
    for index, group in enumerate(groups):
        kinds = [found[0].get("FrameType") for place in (group, shared[0]) if place is not None
                 and (found := place.get(FUNCTIONAL_GROUPS["FrameType"]))]
        if _is_slice(path, kinds[0] if kinds else None):
            yield _read_slice(path, header, [group, shared[0]], index)


def _is_slice(path: Path, kinds: Sequence[str] | str | None) -> bool:
    """Whether an ImageType or FrameType is that of a slice, not of a localizer. Raises VolumeError for projections."""
    names = [kinds] if isinstance(kinds, str) else [str(kind).upper() for kind in kinds or ()]
    if projection := next((name for name in names if name in PROJECTIONS), None):
        found = f"a projection (ImageType {projection})"
        raise file_error(path, found, "slices as reconstructed", "leave the series out")
    return "LOCALIZER" not in names


def _read_slice(path: Path, header: Any, places: Sequence[Any], frame: int | None) -> Slice:
    """One slice from a file's header and, for a frame, its own and the shared functional groups."""
    samples, kind = header.get("SamplesPerPixel", 1), header.get("PhotometricInterpretation", "MONOCHROME2")
    if (samples, kind) != (1, "MONOCHROME2"):
        found = f"{samples} values of {kind} in each voxel"
        raise file_error(path, found, "MONOCHROME2", "leave the series out")

    def look_up(keyword: str) -> Any:
        for place in places:
            inside = place
            if frame is not None and place is not None:
                inside = (place.get(FUNCTIONAL_GROUPS[keyword]) or [None])[0]
            if inside is not None and keyword in inside:
                return inside
        return None

    def numbers(keyword: str, count: int) -> np.ndarray:
        return _numbers(path, _text(look_up(keyword), keyword), keyword, count)

    cosines, position = numbers("ImageOrientationPatient", 6), numbers("ImagePositionPatient", 3)
    directions = cosines.reshape(2, 3)
    if abs(np.linalg.norm(directions, axis=1) - 1).max() > 1e-2 or abs(directions[0] @ directions[1]) > 1e-2:
        raise file_error(path, f"orientation {cosines.tolist()}", "two unit vectors, square", "leave the series out")
    slope, intercept = numbers("RescaleSlope", 1)[0], numbers("RescaleIntercept", 1)[0]
    if slope <= 0:
        raise file_error(path, f"RescaleSlope {slope:g}", "more than 0", "correct it or leave the series out")
    typed = look_up("RescaleType")
    unit = "" if typed is None else str(typed.RescaleType or "").strip()
    if unit in OTHER_QUANTITIES:
        raise file_error(path, f"values in {unit} (RescaleType)", "HU", "leave the series out")
    size = _integer(path, header, "Columns"), _integer(path, header, "Rows")
    if size[0] * size[1] > MOST_PLANE:
        raise file_error(path, f"{shape_text(size)} voxels", f"at most {MOST_PLANE} in a slice", RECOPY)
    rows, columns = numbers("PixelSpacing", 2)  # between rows, then between columns
    thick = look_up("SliceThickness")
    text = _text(look_up("ImagePositionPatient"), "ImagePositionPatient") or ""
    return Slice(
        path,
        str(header.get("SOPInstanceUID", "")),
        frame,
        str(header.get("PatientID") or ""),
        _encoding(header),
        size,
        (float(columns), float(rows)),
        position,
        directions,
        _decimals(text),
        float(slope),
        float(intercept),
        float(_numbers(path, _text(thick, "SliceThickness"), "SliceThickness", 1)[0])
        if thick is not None and thick.SliceThickness
        else None,
        _padding(header, float(slope), float(intercept)),
        _text(header, "AcquisitionNumber") or "",
        _declared(header),
    )


def _decimals(position: str) -> int:
    return max(len(part.strip().partition(".")[2]) for part in position.split("\\"))


def _declared(header: Any) -> int:
    text = _text(header, "ImagesInAcquisition") or ""
    return int(text) if re.fullmatch(r" *[0-9]{1,6} *", text) else 0


def _padding(header: Any, slope: float, intercept: float) -> tuple[float, float] | None:
    """HU of the values that fill the corners of a picture. Only such as no scanner gives for tissue or air: some files
    declare a value of their own tissue."""
    value = header.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = header.get("PixelPaddingRangeLimit", value)
    low, high = sorted(slope * end + intercept for end in (value, limit if isinstance(limit, int) else value))
    return None if low <= SCANNED_HU[1] and high >= SCANNED_HU[0] else (low - slope / 2, high + slope / 2)


def _encoding(header: Any) -> str:
    """The transfer syntax; of a file without preamble by how its header is written."""
    named = header.file_meta.get("TransferSyntaxUID")
    if named is None:
        implicit, little = header.original_encoding
        named = "1.2.840.10008.1.2" if implicit else f"1.2.840.10008.1.2.{1 if little else 2}"
    return str(named)


def _text(dataset: Any, keyword: str) -> str | None:
    """An element as it is written; None where there is none."""
    element = None if dataset is None else dataset.get_item(keyword)
    if element is None or element.value is None:
        return None
    value = element.value
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip(" \0")
    return "\\".join(map(str, value)) if isinstance(value, (list, tuple)) or hasattr(value, "append") else str(value)


def _numbers(path: Path, text: str | None, keyword: str, count: int) -> np.ndarray:
    try:
        values = np.array([parse_number(part) for part in (text or "").split("\\")])
    except ValueError:
        values = np.array([])
    if len(values) != count:
        found = f"{text[:40]!r} as" if text is not None else "no"
        raise file_error(path, f"{found} {keyword}", plural(count, "number"), "convert it to NIfTI first")
    return values


def _integer(path: Path, header: Any, keyword: str, default: int | None = None) -> int:
    try:
        value = int(header[keyword].value) if keyword in header else default or 0
    except Exception:  # pydicom converts here, and has errors of its own
        value = 0
    if value < 1:
        raise file_error(path, f"no usable {keyword}", "a whole number from 1 on", RECOPY)
    return value


# ------------------------------------------------------------------ a series


def series_of(folder: Path) -> tuple[dict[str, Path], str | None]:
    """({name: one of its files} of the CT series whose files lie in this very folder, a note on other objects there).

    A series that is alone has the folder's name; others have their series number put behind a slash. A folder whose
    slices are all unreadable is a series, for which reading gives the reason.
    """
    folder = folder.resolve()  # "." has no name
    content = read_folder(folder)
    found: dict[str, Path] = {}
    for identity, slices in content.series.items():
        name = folder.name
        if len(content.series) > 1:
            name = f"{folder.name}/{SERIES_PREFIX}{content.numbers.get(identity) or len(found) + 1}"
            alike = (f"{name}_{count}" for count in range(2, len(content.series) + 1))
            name = next(other for other in (name, *alike) if other not in found)
        found[name] = slices[0].path if slices else folder / content.faults[identity].args[0].partition(": found ")[0]
    if not found and content.faults:
        found[folder.name] = folder
    return found, content.note()


def series_identity(path: Path) -> str:
    """SeriesInstanceUID of a file of a CT series; "" where it is unknown."""
    return next(iter(read_folder(path.parent).series_with(path.name)), "")


class DicomSeries(VolumeFile):
    """One CT series: a folder that holds no other, or any file of it. HU by the slices' own rescale values.

    Unusual headers are read by pydicom, which believes the lengths in them: a hostile one can take much memory.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._pydicom = import_pydicom(path)
        slices = self._without_scouts(self._without_copies(self._own_slices()))
        for each in slices:
            if not each.like(slices[0]):
                own, others = (
                    f"{shape_text(s.size)} voxels of {shape_text(s.spacing)} mm" for s in (each, slices[0])
                )
                found = f"{own} beside {others}{' (turned)' if each.turned(slices[0]) else ''}"
                raise file_error(each.path, found, "slices that are alike", "leave the series out (a localizer?)")
        intercepts = [each.intercept for each in slices]
        if max(intercepts) - min(intercepts) > MOST_SHIFT:
            self.notes.append(f"RescaleIntercept {min(intercepts):g} to {max(intercepts):g} in one series (damaged?)")
        if len(patients := {each.patient for each in slices}) > 1:
            raise self.error(f"slices of {len(patients)} patients in one series", "one patient's", "sort them apart")
        normal = np.cross(*slices[0].directions)
        slices.sort(key=lambda each: float(each.position @ normal))
        self.slices = slices
        self.places = np.array([float(each.position @ normal) for each in slices])
        self.step, self.targets = self._grid()
        way = self._way(normal)
        spacing = (*slices[0].spacing, self.step * float(np.linalg.norm(way)))
        affine = np.eye(4)
        affine[:3, :3] = np.stack([*slices[0].directions, way], axis=1) * (*slices[0].spacing, self.step)
        affine[:3, 3] = slices[0].position
        count = len(slices) if self.targets is None else len(self.targets)
        shape = three_axes((*slices[0].size, count), path)
        if shape[0] * shape[1] * shape[2] > MOST_VOXELS:
            raise self.error(f"{shape_text(shape)} voxels", f"at most {MOST_VOXELS}", "resample it first")
        rounded = tuple(map(shortest_decimal, spacing))
        self.header = Header(shape, np.dtype("f4"), 1.0, 0.0, rounded, LPS_TO_RAS @ affine)
        self._stream = self._hu() if self.targets is None else self._interpolated(self.targets)

    def _own_slices(self) -> list[Slice]:
        """The slices of the series that the path names: a folder's only one, or the one that a file belongs to."""
        is_folder = self.path.is_dir()
        content = read_folder(self.path if is_folder else self.path.parent)
        if note := content.note():
            self.notes.append(note)
        if "" in content.faults:
            raise VolumeError(*content.faults[""].args)  # a new one: the content is kept, with no traceback
        series = content.series if is_folder else content.series_with(self.path.name)
        if len(series) != 1:
            where = "in the folder" if is_folder else "with this file"
            found = f"{len(series)} DICOM series of CT slices {where}"
            found += f" ({note})" if note and not series else ""
            raise self.error(found, "one", "name a file of the series that is meant")
        identity, slices = next(iter(series.items()))
        if identity in content.faults:
            raise VolumeError(*content.faults[identity].args)
        self._check_count(slices, content)
        return slices

    def _check_count(self, slices: list[Slice], content: DicomFolder) -> None:
        """Notes slices that are missing by what their headers state, unless another series of the folder has images of
        the same acquisition. Some scanners state the images of all acquisitions of a series: the largest is taken."""
        single = [each for each in slices if each.frame is None]
        declared = max((each.declared for each in single), default=0)
        found = len({each.instance or each.path for each in single})
        acquisitions = {each.acquisition for each in single}
        shared = any(each.acquisition in acquisitions for series in content.series.values() if series is not slices
                     for each in series)
        if found + content.skipped["localizer"] < declared and not shared:
            self.notes.append(f"{found} of {declared} slices found (ImagesInAcquisition): is the series whole?")

    def _without_copies(self, slices: list[Slice]) -> list[Slice]:
        """Without files that are copies of another one in the folder."""
        once: dict[tuple, Slice] = {}
        kept = []
        for each in slices:
            first = once.setdefault((each.instance, each.frame, *each.position.tolist()), each)
            if first is each or not filecmp.cmp(first.path, each.path, shallow=False):
                kept.append(each)
        if len(kept) < len(slices):
            self.notes.append(f"{plural(len(slices) - len(kept), 'copy', 'copies')} of its slices skipped")
        return kept

    def _without_scouts(self, slices: list[Slice]) -> list[Slice]:
        """Without a few that lie across the rest: localizers under the series' own identity."""
        turned = [[each for each in slices if each.turned(slices[index], 0.3)] for index in (0, -1)]
        scouts = min(turned, key=len)
        if 0 < len(scouts) <= SCOUTS and len(slices) - len(scouts) > 2 * SCOUTS:
            self.notes.append(f"{plural(len(scouts), 'slice')} of another orientation skipped (localizer)")
            return [each for each in slices if not any(each is scout for scout in scouts)]
        return slices

    def _grid(self) -> tuple[float, np.ndarray | None]:
        """(distance of neighbouring slices in mm, positions to interpolate at; None where they are equally distant)."""
        if len(self.slices) < 2:
            raise self.error("a single slice", "a series of slices", "name the folder with the whole series")
        places, count = self.places, len(self.places)
        gaps = np.diff(places)
        step = (places[-1] - places[0]) / (count - 1)
        if step <= 0 or gaps.min() < JITTER * step:
            raise self.error("two slices at one place", "one series of one pass", "sort the files into passes")
        if abs(gaps - step).max() <= JITTER * step:
            return _fewest_digits(float(step), 10.0 ** -max(each.decimals for each in self.slices) / (count - 1)), None
        step, widest = float(np.median(gaps)), int(gaps.argmax())
        thickness = min(each.thickness or 0.0 for each in self.slices)
        if gaps[widest] > thickness * (1 + JITTER):
            found = f"slices {step:g} mm apart, but {gaps[widest]:g} mm after {self.slices[widest].path.name}"
            expected = f"none farther than their thickness, {thickness:g} mm" if thickness else "equal distances"
            raise self.error(found, f"{expected} (is one missing?)", "copy the series again")
        step = _fewest_digits(step, 10.0 ** -max(each.decimals for each in self.slices))
        self.notes.append(f"slices {gaps.min():g} to {gaps.max():g} mm apart: interpolated every {step:g} mm")
        return step, places[0] + step * np.arange(int((places[-1] - places[0]) / step + 1e-6) + 1)

    def _way(self, normal: np.ndarray) -> np.ndarray:
        """What a millimetre along the normal moves from slice to slice: the normal, but for a tilted gantry."""
        offsets = np.stack([each.position for each in self.slices]) - self.slices[0].position
        along = offsets @ normal
        way = offsets[-1] / along[-1]
        if np.linalg.norm(offsets - along[:, None] * way, axis=1).max() > max(self.slices[0].spacing):
            raise self.error("slices that do not lie above each other", "one straight series", "leave the series out")
        return way if np.degrees(np.arctan(np.linalg.norm(way - normal))) > STRAIGHT else normal

    # -------------------------------------------------------------- voxels

    def read(self, slices: np.ndarray, first: int) -> None:
        for plane in slices:
            plane[...] = next(self._stream)

    def close(self) -> None:
        self._stream.close()

    def _interpolated(self, targets: np.ndarray) -> Generator[np.ndarray, None, None]:
        """Slices at the positions `targets`, between the two that lie around each."""
        planes = self._hu()
        below, above, index = next(planes), next(planes), 1
        for target in targets:
            while self.places[index] < target and index + 1 < len(self.places):
                below, above, index = above, next(planes), index + 1
            weight = np.float32((target - self.places[index - 1]) / (self.places[index] - self.places[index - 1]))
            yield below + (above - below) * min(weight, np.float32(1))

    def _hu(self) -> Generator[np.ndarray, None, None]:
        """The slices in order, (rows, columns) float32 HU."""
        files = [list(group) for _, group in groupby(self.slices, key=lambda each: each.path)]
        multi_frame, plain = len(files) < len(self.slices), all(each.pixels for each in self.slices)
        if multi_frame or plain:
            yield from chain.from_iterable(map(self._planes, files))
            return
        tasks: Iterator[Callable[[], list[np.ndarray]]] = (partial(list, self._planes(slices)) for slices in files)
        with closing(in_order(tasks, DECODERS, DECODED_AHEAD)) as decoded:
            for (plane,) in decoded:
                yield plane

    def _planes(self, slices: Sequence[Slice]) -> Iterator[np.ndarray]:
        """Those of one file."""
        path = slices[0].path
        try:
            for each, plane in zip(slices, self._decoded(path, slices), strict=True):
                if plane.shape != each.size[::-1]:
                    raise ValueError(f"{shape_text(plane.shape)} voxels")
                if each.padding is not None:
                    plane[(plane >= each.padding[0]) & (plane <= each.padding[1])] = PADDING_HU
                yield plane
        except VolumeError:
            raise
        except Exception as error:  # decoders raise what they like
            reason = re.sub(r"\(0x[0-9a-f]+\)|\s+", " ", str(error)).strip()[-120:]  # without places in memory
            raise self.error(f"damaged data in {path.name} ({reason})", "a readable slice", RECOPY) from None

    def _decoded(self, path: Path, slices: Sequence[Slice]) -> Iterator[np.ndarray]:
        """The planes of one file, HU."""
        if slices[0].pixels is not None:
            yield _to_hu(_plain_plane(slices[0], slices[0].pixels), slices[0])
            return
        pydicom = self._pydicom
        encoding = pydicom.uid.UID(slices[0].encoding)
        native = not encoding.is_compressed or encoding == pydicom.uid.RLELossless
        if slices[0].frame is None and not native:
            yield _decoded_by_itk(path)
            return
        source = pydicom.dcmread(path, force=True, defer_size=None if slices[0].frame is None else 1 << 16)
        tags = list(source.keys())
        if tags != sorted(tags) or tags[-1] not in LAST_TAGS:
            raise ValueError("bytes behind the pixels that are no DICOM elements")  # so the pixels may be shifted
        source.file_meta.TransferSyntaxUID = encoding  # which a file without preamble does not name
        source = path if slices[0].frame is not None and beginning(path)[128:132] == b"DICM" else source
        indices, plugin = [each.frame or 0 for each in slices], "" if native else "gdcm"
        planes = pydicom.pixels.iter_pixels(source, indices=indices, raw=True, decoding_plugin=plugin)
        for each, plane in zip(slices, planes, strict=True):
            yield _to_hu(plane, each)


def _to_hu(stored: np.ndarray, each: Slice) -> np.ndarray:
    hu = np.multiply(stored, np.float32(each.slope), dtype=np.float32)
    return np.add(hu, np.float32(each.intercept), out=hu)


def _plain_plane(each: Slice, pixels: StoredPixels) -> np.ndarray:
    """Plain pixels as stored, (rows, columns). Raises ValueError where they lie elsewhere than when the header was
    read."""
    columns, rows = each.size
    with open(each.path, "rb", buffering=0) as file:
        file.seek(pixels.offset - len(pixels.start))
        same = file.read(len(pixels.start)) == pixels.start
        stored = np.fromfile(file, pixels.dtype, rows * columns + 1)
    if not same or stored.size != rows * columns:
        raise ValueError("the file has changed since its header was read")
    stored = stored.reshape(rows, columns)
    if pixels.unused:  # whatever they hold, the sign is that of the highest bit in use
        np.left_shift(stored, pixels.unused, out=stored)
        np.right_shift(stored, pixels.unused, out=stored)
    return stored


def _decoded_by_itk(path: Path) -> np.ndarray:
    """The plane of a file with a single slice, HU."""
    itk = import_simple_itk(path)
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetOutputPixelType(itk.sitkFloat32)  # rescale values may differ, and be fractions, slice by slice
    reader.SetFileName(str(path))
    return itk.GetArrayFromImage(reader.Execute())[0]


def _fewest_digits(value: float, tolerance: float) -> float:
    """The decimal number with the fewest digits within the tolerance: positions are written rounded, and the mean of
    their distances would be 0.70003 in place of the 0.7 that other formats keep."""
    rounded = (round(value, digits) for digits in range(1, 8))
    return next((number for number in rounded if abs(number - value) <= tolerance), value)
