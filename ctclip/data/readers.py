"""Volume files as they are stored: NIfTI, MetaImage (.mha), DICOM series -> a header, then slices from front to back.

A file stores three axes, the fastest first, so its slices lie along the third. They are read, and inflated where they
are compressed, a few at a time while the ones before are worked on: no file is ever held whole, and no size that a
header claims is believed before the file could hold it. Whatever is wrong with a file is a VolumeError of one line.
"""

from __future__ import annotations

import os
import re
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, repeat
from math import isfinite, prod
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO

import nibabel as nib
import numpy as np

from ctclip.errors import UserError
from ctclip.formatting import plural

try:  # inflates about twice as fast as zlib, and checks the same checksums
    from isal.igzip import IGzipFile as GzipFile
    from isal.isal_zlib import IsalError as InflateError
    from isal.isal_zlib import decompressobj
except ImportError:
    from gzip import GzipFile
    from zlib import decompressobj

    InflateError = zlib.error

NIFTI_SUFFIXES = (".nii", ".nii.gz")
META_SUFFIX = ".mha"
FILE_SUFFIXES = (*NIFTI_SUFFIXES, META_SUFFIX)

RECOPY = "copy or download the file again"
CONVERT = "convert it to a 3-D NIfTI of numbers"
DEFLATE_LIMIT = 1032  # deflate cannot shrink anything by more than this
SLAB_BYTES = 4 << 20  # read and inflated at a time
SLABS_AHEAD = 3  # with a single one, reading and work on it wait for each other in turns
MOST_PLANE = 4096 * 4096  # voxels of a slice: 16 times those of a fine CT
MOST_VOXELS = 1 << 33  # five times those of CT-RATE's largest volume
# NIfTI code -> stored type
NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8"}
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])



class VolumeError(UserError):
    """A volume file that cannot be used: one line naming what was found, what was expected, what to do."""


def file_error(path: Path, found: str, expected: str, remedy: str) -> VolumeError:
    return VolumeError(f"{path.name}: found {found}, expected {expected}; {remedy}")


def shape_text(shape: Sequence[float]) -> str:
    return " x ".join(str(n) for n in shape)


def shortest_decimal(value: float) -> float:
    """The shortest decimal of the same float32: 0.699999988 mm is 0.7. A size, in voxels, may hang on it, and one
    scan must not be a voxel longer in a format that keeps more digits."""
    with np.errstate(over="ignore"):  # to infinity, which is refused as such
        return float(str(np.float32(value)))


@dataclass(frozen=True)
class Header:
    """What a file says of itself. Three file axes, fastest first; spacing in mm.

    `affine` (4, 4), file index -> RAS mm, is None where no orientation is stated and NaN where an unusable one is.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    slope: float
    intercept: float
    spacing: tuple[float, ...]
    affine: np.ndarray | None

    @property
    def blank(self) -> bool:
        """No orientation and unit spacing: what a writer leaves when it was told nothing (CT-RATE version 1)."""
        return self.affine is None and set(self.spacing) == {1.0}


class VolumeFile:
    """An open volume, read once from front to back. Every fault raises VolumeError."""

    path: Path
    header: Header

    def __enter__(self) -> VolumeFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        pass

    def error(self, found: str, expected: str, remedy: str) -> VolumeError:
        return file_error(self.path, found, expected, remedy)

    def read(self, slices: np.ndarray, first: int) -> None:
        """Fill (n, middle axis, fastest axis) with the slices from `first` on; called in order, all of them."""
        raise NotImplementedError

    def check_end(self) -> None:
        """After the last slice."""

    def slabs(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first index, slices as stored (n, middle axis, fastest axis)). Valid until the next one is asked for.

        While one slab is being worked on, a thread reads up to SLABS_AHEAD others.
        """
        fast, middle, slow = self.header.shape
        step = min(slow, max(1, SLAB_BYTES // (fast * middle * self.header.dtype.itemsize)))
        starts = range(0, slow, step)
        buffers = [np.empty((step, middle, fast), self.header.dtype) for _ in range(SLABS_AHEAD + 1)]
        slabs = [buffers[i % len(buffers)][: min(step, slow - start)] for i, start in enumerate(starts)]
        tasks = chain(zip(repeat(self.read), slabs, starts), [(self.check_end,)])
        reader = ThreadPoolExecutor(1)
        try:
            pending = deque(reader.submit(*task) for task in islice(tasks, SLABS_AHEAD))
            for start, slab in zip(starts, slabs, strict=True):
                pending.popleft().result()
                pending.extend(reader.submit(*task) for task in islice(tasks, 1))
                yield start, slab
            pending.popleft().result()
        finally:
            reader.shutdown(cancel_futures=True)


def open_volume(path: str | Path) -> VolumeFile:
    """A .nii, .nii.gz or .mha file; a folder with one DICOM series, or any file of a series."""
    path = Path(path)
    if path.name.lower().endswith(META_SUFFIX):
        return MetaFile(path)
    if not path.name.lower().endswith(NIFTI_SUFFIXES) and (path.is_dir() or is_dicom(path)):
        return DicomSeries(path)
    return NiftiFile(path)


# ------------------------------------------------------------------ files that are one stream of bytes


class StreamFile(VolumeFile):
    """A header, then the voxels, in one file. Subclasses set `stream`, where the voxels come from, and the header."""

    stream: IO[bytes]

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise self.error("a pipe or device", "a file", "name the file itself")  # opening it might never return
        try:
            self.raw = open(path, "rb")  # noqa: SIM115  closed in close()
        except FileNotFoundError:
            raise file_error(path, "no such file", "a volume", "check the path or download it") from None
        except OSError as error:
            raise file_error(path, f"unreadable ({error.strerror})", "a file", "check its permissions") from None
        try:
            self.open()
        except OSError as error:
            self.close()
            raise file_error(path, f"unreadable ({error.strerror or error})", "a file", RECOPY) from None
        except BaseException:
            self.close()
            raise

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.raw.close()

    def read(self, slices: np.ndarray, first: int) -> None:
        self.fill(slices.reshape(-1).view(np.uint8))

    def fill(self, buffer: np.ndarray) -> None:
        """Fill a uint8 array from the stream, to the last byte."""
        view, done = memoryview(buffer), 0
        try:
            while done < len(view):
                count = self.stream.readinto(view[done:])
                if not count:
                    raise EOFError
                done += count
        except EOFError:
            raise self.error("a truncated file", "as many voxels as its header declares", RECOPY) from None
        except (OSError, zlib.error, InflateError) as error:
            raise self.error(f"damaged data ({error})", "a readable file", RECOPY) from None

    def skip(self, count: int) -> None:
        scratch = np.empty(min(count, SLAB_BYTES), np.uint8)
        while count > 0:
            self.fill(scratch[: min(count, len(scratch))])
            count -= len(scratch)

    def check_end(self) -> None:
        """Reading past the last voxel makes gzip compare its checksum; bytes after the voxels are tolerated."""
        try:
            self.stream.read(1)
        except EOFError:
            raise self.error("damaged data (the stream ends early)", "a readable file", RECOPY) from None
        except (OSError, zlib.error, InflateError) as error:
            raise self.error(f"damaged data ({error})", "a readable file", RECOPY) from None

    def check_size(self, header: Header, offset: int) -> None:
        """Refuse a size that the file cannot hold, before allocating anything of that size."""
        voxels = prod(header.shape)
        declared = offset + voxels * header.dtype.itemsize
        at_most = os.fstat(self.raw.fileno()).st_size * (DEFLATE_LIMIT if self.stream is not self.raw else 1)
        if declared > at_most:
            found = f"{shape_text(header.shape)} voxels declared, {declared} bytes"
            raise self.error(found, f"at most {at_most} bytes in a file of this size (truncated?)", RECOPY)
        if voxels > MOST_VOXELS or prod(header.shape[:2]) > MOST_PLANE:
            expected = f"at most {MOST_PLANE} in a slice and {MOST_VOXELS} in all"
            raise self.error(f"{shape_text(header.shape)} voxels", expected, "resample it to a finite size first")


class NiftiFile(StreamFile):
    """NIfTI-1 or -2, plain or gzip."""

    def open(self) -> None:
        magic = self.raw.read(2)
        self.raw.seek(0)
        self.stream = self.raw
        if magic == b"\x1f\x8b":
            self.stream = GzipFile(fileobj=self.raw, mode="rb")
        elif self.path.suffix == ".gz":
            found = f"first bytes {magic!r}" if magic else "an empty file"
            raise self.error(found, "gzip data (b'\\x1f\\x8b')", RECOPY)
        block = np.zeros(540, np.uint8)
        self.fill(block[:348])
        size = block[:4].tobytes()
        kind = nib.Nifti1Header
        if int.from_bytes(size, "little") == 540 or int.from_bytes(size, "big") == 540:
            kind = nib.Nifti2Header
            self.fill(block[348:])
        elif 348 not in (int.from_bytes(size, "little"), int.from_bytes(size, "big")):
            raise self.error(f"first bytes {size!r}", "a NIfTI header", CONVERT)
        header = kind(block[: kind.sizeof_hdr].tobytes(), check=False)
        self.header, offset = _parse_nifti(header, self.path)
        self.check_size(self.header, offset)
        self.skip(offset - kind.sizeof_hdr)  # extensions, at least four bytes


def _parse_nifti(header: nib.Nifti1Header, path: Path) -> tuple[Header, int]:
    """(what it says, byte at which the voxels begin)"""
    if header["magic"].item().rstrip(b"\0") not in (b"n+1", b"n+2", b"n+2\0\r\n\x1a\n"):
        magic = header["magic"].item()
        raise file_error(path, f"magic {magic!r}", "b'n+1' (header and voxels in one file)", CONVERT)
    dims = [int(n) for n in header["dim"]]
    shape = _three_axes(dims[1 : 1 + dims[0]] if 0 < dims[0] <= 7 else dims, path)
    code = int(header["datatype"])
    if code not in NIFTI_TYPES:
        raise file_error(path, f"voxels of NIfTI type {code}", "integers or floats", CONVERT)
    dtype = np.dtype(header.endianness + NIFTI_TYPES[code])
    offset = float(header["vox_offset"]) or float(header.single_vox_offset)  # some writers leave it 0
    if not header.sizeof_hdr <= offset < 1e9:  # False for NaN too
        raise file_error(path, f"voxels at byte {offset}", f"at least {header.sizeof_hdr}", CONVERT)
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not isfinite(slope) or slope == 0:  # the standard's way of saying "not scaled"
        slope, intercept = 1.0, 0.0
    spacing = tuple(shortest_decimal(p) for p in header["pixdim"][1:4])
    intercept = intercept if isfinite(intercept) else 0.0
    return Header(shape, dtype, slope, intercept, spacing, _nifti_affine(header)), int(offset)


def _three_axes(shape: Sequence[int], path: Path) -> tuple[int, int, int]:
    if len(shape) < 3 or any(n > 1 for n in shape[3:]) or min(shape[:3]) < 2:
        expected = "3 axes of at least 2 voxels"
        raise file_error(path, f"{len(shape)} axes of {shape_text(shape)} voxels", expected, CONVERT)
    return tuple(shape[:3])


def _nifti_affine(header: nib.Nifti1Header) -> np.ndarray | None:
    """From sform, else qform; None also if all it says is the identity.

    NaN is no fault as long as the metadata row gives the geometry.
    """
    stated = False
    for code, get in (("sform_code", header.get_sform), ("qform_code", header.get_qform)):
        if header[code] == 0:
            continue
        stated = True
        try:
            affine = np.asarray(get(), float)
        except (ValueError, nib.spatialimages.HeaderDataError):  # an impossible quaternion
            continue
        if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9:
            return None if np.array_equal(affine, np.eye(4)) else affine
    return np.full((4, 4), np.nan) if stated else None


class _ZlibStream:
    """What a zlib stream inflates to, read like a file."""

    def __init__(self, raw: IO[bytes]):
        self.raw, self.inflater, self.waiting = raw, decompressobj(), b""

    def readinto(self, view: memoryview) -> int:
        while not self.inflater.eof:
            data = self.waiting or self.raw.read(1 << 18)
            piece = self.inflater.decompress(data, len(view))
            self.waiting = self.inflater.unconsumed_tail
            if piece:
                view[: len(piece)] = piece
                return len(piece)
            if not data:
                raise EOFError
        return 0

    def read(self, count: int) -> bytes:
        buffer = bytearray(count)
        return bytes(buffer[: self.readinto(memoryview(buffer))])


class MetaFile(StreamFile):
    """MetaImage with its voxels in the same file (.mha), plain or zlib. Read here rather than by ITK, which holds a
    compressed file whole."""

    MOST_LINES, LINE_BYTES = 200, 4096

    def open(self) -> None:
        fields = self._fields()
        compressed = _flag(fields, "CompressedData", self.path)
        self.header = _parse_meta(fields, self.path)
        skip = _numbers(fields, "HeaderSize", 1, self.path, "0", whole=True)[0]
        size = os.fstat(self.raw.fileno()).st_size
        if skip == -1:  # the voxels are the last bytes of the file
            skip = size - self.raw.tell() - prod(self.header.shape) * self.header.dtype.itemsize
        if not 0 <= skip <= size:
            raise self.error(f"HeaderSize {skip:g}", "0", RECOPY)
        self.stream = self.raw
        self.skip(int(skip))
        if compressed:
            self.stream = _ZlibStream(self.raw)
        self.check_size(self.header, self.raw.tell())

    def _fields(self) -> dict[str, str]:
        """The lines of the header, up to and with ElementDataFile, after which the voxels begin."""
        fields: dict[str, str] = {}
        for _ in range(self.MOST_LINES):
            line = self.raw.readline(self.LINE_BYTES)
            key, equals, value = line.decode("latin-1").partition("=")
            if line.strip() and not equals or not line:
                break
            fields[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":
                if value.strip().upper() != "LOCAL":
                    raise self.error(f"voxels in {value.strip()[:60]!r}", "LOCAL, in this file", CONVERT)
                return fields
        found = f"{line[:20]!r}" if line else f"the end of the file after {plural(len(fields), 'line')}"
        raise self.error(f"{found}, no header that ends in ElementDataFile", "a MetaImage", RECOPY)


def _parse_meta(fields: Mapping[str, str], path: Path) -> Header:
    axes = int(_numbers(fields, "NDims", 1, path, whole=True)[0])
    if not 1 <= axes <= 8:
        raise file_error(path, f"{axes} axes", "3 axes of at least 2 voxels", CONVERT)
    shape = _three_axes([int(n) for n in _numbers(fields, "DimSize", axes, path, whole=True)], path)
    kind = fields.get("ElementType", "nothing")
    channels = _numbers(fields, "ElementNumberOfChannels", 1, path, "1")[0]
    if kind not in META_TYPES or channels != 1:
        raise file_error(path, f"{channels:g} values of {kind[:40]} for each voxel", "one number", CONVERT)
    if not _flag(fields, "BinaryData", path, "True"):
        raise file_error(path, "voxels written as text", "BinaryData = True", CONVERT)
    for name, neutral in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        if _numbers(fields, name, 1, path, str(neutral))[0] != neutral:
            raise file_error(path, f"{name} {fields[name]}", f"{neutral}: HU as stored", CONVERT)
    big_endian = _flag(fields, "BinaryDataByteOrderMSB", path) or _flag(fields, "ElementByteOrderMSB", path)
    dtype = np.dtype((">" if big_endian else "<") + META_TYPES[kind])
    stated = next((name for name in ("ElementSpacing", "ElementSize") if name in fields), None)
    if stated is None:
        return Header(shape, dtype, 1.0, 0.0, (1.0, 1.0, 1.0), None)
    spacing = _numbers(fields, stated, axes, path)[:3]
    affine = _meta_affine(fields, axes, spacing, path)
    return Header(shape, dtype, 1.0, 0.0, tuple(map(shortest_decimal, spacing)), affine)


def _meta_affine(fields: Mapping[str, str], axes: int, spacing: Sequence[float], path: Path) -> np.ndarray:
    """File index -> RAS mm. The file gives, in LPS, one direction per axis (a row of its matrix) and the origin."""

    def field(names: Sequence[str], count: int, default: str) -> list[float]:
        name = next((name for name in names if name in fields), names[0])
        return _numbers(fields, name, count, path, default)

    identity = " ".join(str(int(n)) for n in np.eye(axes).ravel())
    directions = np.reshape(field(("TransformMatrix", "Rotation", "Orientation"), axes * axes, identity), (axes, axes))
    affine = np.eye(4)
    affine[:3, :3] = directions[:3, :3].T * spacing
    affine[:3, 3] = field(("Offset", "Position", "Origin"), axes, " ".join("0" * axes))[:3]
    affine = LPS_TO_RAS @ affine
    usable = np.isfinite(affine).all() and abs(np.linalg.det(directions[:3, :3])) > 1e-6
    return affine if usable else np.full((4, 4), np.nan)


def _numbers(
    fields: Mapping[str, str], name: str, count: int, path: Path, default: str | None = None, whole: bool = False
) -> list[float]:
    text = fields.get(name, default)
    try:
        numbers = [float(part) for part in (text or "").split()]
    except ValueError:
        numbers = []
    if len(numbers) != count or (whole and not all(abs(n) < 1e10 and n == int(n) for n in numbers)):
        found = "nothing" if text is None else repr(text[:60])
        expected = plural(count, "whole number" if whole else "number")
        raise file_error(path, f"{found} as {name}", expected, RECOPY)
    return numbers


def _flag(fields: Mapping[str, str], name: str, path: Path, default: str = "False") -> bool:
    value = fields.get(name, default).lower()
    if value[:1] not in ("t", "y", "1", "f", "n", "0"):  # ITK, too, looks at the first letter only
        raise file_error(path, f"{value[:20]!r} as {name}", "True or False", RECOPY)
    return value[:1] in ("t", "y", "1")


# ------------------------------------------------------------------ DICOM series

ORIENTATION, POSITION, SERIES, MODALITY, SERIES_NUMBER = "0020|0037", "0020|0032", "0020|000e", "0008|0060", "0020|0011"
SERIES_PREFIX = "series_"  # before its number, in the name of a series that shares its folder
CT_STORAGE = b"1.2.840.10008.5.1.4.1.1.2"  # CT Image Storage, and as a beginning its enhanced kinds
SLOPE, INTERCEPT, SAMPLES, PHOTOMETRIC = "0028|1053", "0028|1052", "0028|0002", "0028|0004"
JITTER = 0.1  # of the slice distance: how far a slice may lie from its place; a missing one is ten times that off
TILT = 1.0  # degrees between the slices' normal and the way from slice to slice


def is_dicom(path: Path) -> bool:
    """Whether a regular file begins as DICOM files do (128 bytes of anything, then DICM)."""
    return path.is_file() and _beginning(path)[128:132] == b"DICM"


def _beginning(path: Path) -> bytes:
    """The first 2 KB of a file; nothing where that cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(2048)
    except OSError:
        return b""


def simple_itk(path: Path) -> ModuleType:
    """SimpleITK, quiet; VolumeError where it is not installed."""
    try:
        import SimpleITK
    except ImportError:
        raise file_error(path, "DICOM", "the package SimpleITK to read it", "pip install SimpleITK") from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def series_of(folder: Path) -> dict[str, Path]:
    """{name: its first file} of the DICOM series whose files lie in this very folder.

    A series that is alone has the folder's name; others have their series number put behind a slash.
    """
    folder = folder.resolve()  # "." has no name
    itk = simple_itk(folder)
    found: dict[str, Path] = {}
    identities = itk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    for identity in identities:
        first = Path(itk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), identity)[0])
        name = folder.name
        if len(identities) > 1:
            number = _information(itk, first)[1].get(SERIES_NUMBER, "").strip() or str(len(found) + 1)
            name = f"{folder.name}/{SERIES_PREFIX}{number}"
            alike = (f"{name}_{count}" for count in range(2, len(identities) + 1))
            name = next(other for other in (name, *alike) if other not in found)
        found[name] = first
    return found


def _information(itk: ModuleType, path: Path) -> tuple[tuple[int, ...], dict[str, str]]:
    """(size, {tag: text}) of one DICOM file, without its voxels."""
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:120]
        raise file_error(path, f"an unreadable DICOM file ({reason})", "a slice of a series", RECOPY) from None
    return tuple(reader.GetSize()), {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}


class DicomSeries(VolumeFile):
    """One CT series, a file for each slice; HU by the slices' own rescale values. Needs SimpleITK.

    The headers are read by GDCM inside of it, which believes the lengths in them: a hostile one can take much memory.
    """

    def __init__(self, path: Path):
        self.path = path
        self.itk = simple_itk(path)
        files = self._files()
        slices = [_Slice(file, *_information(self.itk, file)) for file in files]
        for each in slices:
            each.check(slices[0])
        normal = np.cross(*slices[0].directions)
        slices.sort(key=lambda each: float(each.position @ normal))
        step = self._step(slices, normal)
        self.files = [each.path for each in slices]
        columns, rows = slices[0].size[:2]
        in_plane = slices[0].spacing
        affine = np.eye(4)
        affine[:3, :3] = np.stack([*slices[0].directions, normal], axis=1) * (*in_plane, step)
        affine[:3, 3] = slices[0].position
        spacing = tuple(map(shortest_decimal, (*in_plane, step)))
        shape = _three_axes((columns, rows, len(slices)), path)
        self.header = Header(shape, np.dtype("f4"), 1.0, 0.0, spacing, LPS_TO_RAS @ affine)

    def _files(self) -> list[Path]:
        """The files of the series that the path names: a folder's only one, or the one that a file belongs to."""
        folder = self.path if self.path.is_dir() else self.path.parent
        names = self.itk.ImageSeriesReader
        grouped = {
            identity: [Path(name) for name in names.GetGDCMSeriesFileNames(str(folder), identity)]
            for identity in names.GetGDCMSeriesIDs(str(folder))
        }
        known = {file.name for files in grouped.values() for file in files}
        lost = [file for file in sorted(folder.iterdir()) if file.name not in known and is_dicom(file)]
        lost = [file for file in lost if CT_STORAGE in _beginning(file)]  # not directories, reports, segmentations
        if lost:  # ITK passes over what it cannot read: a shorter series would be read without a word
            raise file_error(lost[0], "an unreadable CT slice", f"a slice like the {len(known)} beside it", RECOPY)
        if not self.path.is_dir():
            grouped = {key: files for key, files in grouped.items() if self.path.name in {file.name for file in files}}
        if len(grouped) != 1:
            where = "in the folder" if self.path.is_dir() else "with this file"
            remedy = "name a file of the series that is meant"
            raise self.error(f"{len(grouped)} DICOM series {where}", "one", remedy)
        return next(iter(grouped.values()))

    def _step(self, slices: Sequence[_Slice], normal: np.ndarray) -> float:
        """Distance of neighbouring slices (mm), the same everywhere and square to the slices."""
        if len(slices) < 2:
            raise self.error("a single slice", "a series of slices", "name the folder with the whole series")
        places = np.array([float(each.position @ normal) for each in slices])
        step = (places[-1] - places[0]) / (len(places) - 1)
        gaps = np.diff(places)
        if step <= 0 or gaps.min() < JITTER * step:
            raise self.error("two slices at one place", "one series of one pass", "sort the files into passes")
        if abs(gaps - step).max() > JITTER * step:
            at = int(abs(gaps - np.median(gaps)).argmax())
            found = f"slices {np.median(gaps):g} mm apart, but {gaps[at]:g} mm after {slices[at].path.name}"
            raise self.error(found, "equal distances (is one missing?)", "copy the series again")
        way = slices[-1].position - slices[0].position
        tilt = np.degrees(np.arccos(np.clip(way @ normal / np.linalg.norm(way), -1, 1)))
        if tilt > TILT:
            found = f"slices tilted by {tilt:.1f} degrees (gantry tilt)"
            raise self.error(found, "slices square to the table", "convert it with a tool that corrects tilt")
        return _simplest(float(step), 10.0 ** -max(each.decimals for each in slices) / (len(slices) - 1))

    def read(self, slices: np.ndarray, first: int) -> None:
        reader = self.itk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetOutputPixelType(self.itk.sitkFloat32)  # rescale values may differ, and be fractions, slice by slice
        for place, file in enumerate(self.files[first : first + len(slices)]):
            reader.SetFileName(str(file))
            try:
                image = reader.Execute()
            except RuntimeError as error:
                reason = re.sub(r"\s+", " ", str(error)).strip()[-120:]
                raise self.error(f"damaged data in {file.name} ({reason})", "a readable slice", RECOPY) from None
            slices[place] = self.itk.GetArrayViewFromImage(image)[0]  # a view lives no longer than its image


def _simplest(value: float, tolerance: float) -> float:
    """The decimal number with the fewest digits within the tolerance: positions are written rounded, and the mean of
    their distances would be 0.70003 in place of the 0.7 that other formats keep."""
    rounded = (round(value, digits) for digits in range(1, 8))
    return next((number for number in rounded if abs(number - value) <= tolerance), value)


class _Slice:
    """Header of one DICOM slice. Directions and position are LPS, mm; spacing and size along rows, then columns."""

    def __init__(self, path: Path, size: tuple[int, ...], tags: Mapping[str, str]):
        self.path, self.size = path, size
        self.modality = tags.get(MODALITY, "").strip()
        cosines, self.position = self._vector(tags, ORIENTATION, 6), self._vector(tags, POSITION, 3)
        self.directions = cosines[:3], cosines[3:]
        self.decimals = max(len(part.strip().partition(".")[2]) for part in tags[POSITION].split("\\"))
        self._refuse_other_voxels(tags)
        rows, columns = self._vector(tags, "0028|0030", 2)  # between rows, then between columns
        self.spacing = float(columns), float(rows)
        if abs(np.linalg.norm(np.cross(*self.directions)) - 1) > 1e-2:
            found = f"orientation {tags[ORIENTATION].strip()}"
            raise file_error(path, found, "two unit vectors", "leave the series out")

    def _refuse_other_voxels(self, tags: Mapping[str, str]) -> None:
        """One grey value for each voxel, bright for dense, with usable rescale values: ITK makes up what it lacks."""
        samples, kind = tags.get(SAMPLES, "1").strip(), tags.get(PHOTOMETRIC, "MONOCHROME2").strip()
        if (samples, kind) != ("1", "MONOCHROME2"):
            found = f"{samples} values of {kind} in each voxel"
            raise file_error(self.path, found, "MONOCHROME2", "leave the series out")
        slope, _ = self._vector(tags, SLOPE, 1)[0], self._vector(tags, INTERCEPT, 1)
        if slope <= 0:
            raise file_error(self.path, f"RescaleSlope {slope:g}", "more than 0", "correct it or leave the series out")

    def _vector(self, tags: Mapping[str, str], tag: str, count: int) -> np.ndarray:
        try:
            values = np.array([float(part) for part in tags.get(tag, "").split("\\")])
        except ValueError:
            values = np.array([])
        if len(values) != count or not np.isfinite(values).all():
            found = f"{tags[tag].strip()[:40]!r} as" if tag in tags else "no"
            expected = f"{count} numbers (one slice in each file)"
            raise file_error(self.path, f"{found} ({tag.replace('|', ',')})", expected, "convert it to NIfTI first")
        return values

    def check(self, other: _Slice) -> None:
        """One modality, one size and one orientation through the whole series."""
        if self.modality != "CT":
            raise file_error(self.path, f"modality {self.modality or 'unknown'}", "CT", "leave the series out")
        if prod(self.size[:2]) > MOST_PLANE:
            raise file_error(self.path, f"{shape_text(self.size)} voxels", f"at most {MOST_PLANE} in a slice", RECOPY)
        alike = self.size == other.size and len(self.size) >= 2 and prod(self.size[2:]) == 1
        turned = bool(np.abs(np.subtract(self.directions, other.directions)).max() > 1e-3)
        if not alike or turned or not np.allclose(self.spacing, other.spacing, rtol=1e-4):
            own, others = (f"{shape_text(s.size)} voxels of {shape_text(s.spacing)} mm" for s in (self, other))
            found = f"{own} beside {others}{' (turned)' if turned else ''}"
            raise file_error(self.path, found, "slices that are alike", "leave the series out (a localizer?)")
