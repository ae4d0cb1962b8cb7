"""DICOM: a series of CT slices in a folder, read by SimpleITK (optional)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from types import ModuleType

import numpy as np

from ctclip.data.volume_file import (
    LPS_TO_RAS,
    MOST_PLANE,
    RECOPY,
    Header,
    VolumeFile,
    file_error,
    shape_text,
    shortest_decimal,
    three_axes,
)

ORIENTATION, POSITION, MODALITY, SERIES_NUMBER = "0020|0037", "0020|0032", "0008|0060", "0020|0011"
OLDEST_ITK = (2, 5, 4)  # whose GDCM refuses a slice that is cut short
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
    """SimpleITK, quiet; VolumeError where it is not installed, or so old that it reads a cut slice as a whole one."""
    try:
        import SimpleITK
    except ImportError:
        raise file_error(path, "DICOM", "the package SimpleITK to read it", "pip install SimpleITK") from None
    if tuple(map(int, SimpleITK.__version__.split(".")[:3])) < OLDEST_ITK:
        found = f"DICOM and SimpleITK {SimpleITK.__version__}, which takes a slice that is cut short for a whole one"
        expected = "SimpleITK " + ".".join(map(str, OLDEST_ITK))
        raise file_error(path, found, f"{expected} or newer", "pip install --upgrade SimpleITK")
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
            number = read_tags(itk, first)[1].get(SERIES_NUMBER, "").strip() or str(len(found) + 1)
            name = f"{folder.name}/{SERIES_PREFIX}{number}"
            alike = (f"{name}_{count}" for count in range(2, len(identities) + 1))
            name = next(other for other in (name, *alike) if other not in found)
        found[name] = first
    return found


def read_tags(itk: ModuleType, path: Path) -> tuple[tuple[int, ...], dict[str, str]]:
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
        slices = [SliceHeader(file, *read_tags(self.itk, file)) for file in files]
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
        shape = three_axes((columns, rows, len(slices)), path)
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

    def _step(self, slices: Sequence[SliceHeader], normal: np.ndarray) -> float:
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
        return _fewest_digits(float(step), 10.0 ** -max(each.decimals for each in slices) / (len(slices) - 1))

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


def _fewest_digits(value: float, tolerance: float) -> float:
    """The decimal number with the fewest digits within the tolerance: positions are written rounded, and the mean of
    their distances would be 0.70003 in place of the 0.7 that other formats keep."""
    rounded = (round(value, digits) for digits in range(1, 8))
    return next((number for number in rounded if abs(number - value) <= tolerance), value)


class SliceHeader:
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

    def check(self, other: SliceHeader) -> None:
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
