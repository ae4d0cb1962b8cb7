"""From file axes to the cube that every model sees: spacing and orientation of a file, crop and padding of each axis.

x, y, z are patient axes in LPS order (x to the left, y to the back, z to the head); D, H, W = z, x, y, the order the
network was trained on (in plane that is the transpose of the usual picture). A file's own axes are called fast, middle
and slow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import acos, asin, degrees, isfinite, radians, sin
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation

import ctclip_model
from ctclip.data.readers import open_volume
from ctclip.data.volume_file import Header, VolumeError, file_error, shape_text
from ctclip.formatting import parse_number

FIELD_OF_VIEW_MM = ctclip_model.FIELD_OF_VIEW_MM
SPACING_MM = 0.05, 20.0  # of neighbouring voxels
SMALLEST_MM, FEWEST_VOXELS = 30.0, 8  # along every axis; of each but the one with fewest
SMALL_MM = 80.0  # below which in two directions it is asked whether the spacing is right
LARGEST_MM = 2200.0  # a whole body; spacings ten times too large make more of a chest
TILT = 1.0  # degrees off a right angle up to which axes are taken for square
NEARER = 0.1  # sum of the cosines, by which the nearest axes must be nearer than others: 2 degrees from halfway
OBLIQUE = 10.0  # degrees off the patient's axes above which it is said that these are taken
PUBLISHED_SHAPE = (240, 480, 480)  # (D, H, W) = (z, x, y)


def check_shape(shape: Sequence[int]) -> None:
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"found shape {tuple(shape)}, expected three positive numbers (D, H, W)")


@dataclass(frozen=True)
class FileGeometry:
    """How a file's voxels are taken: HU = slope * stored + intercept; and for each file axis, fastest first, the
    spacing (mm), the LPS axis it runs along (x 0, y 1, z 2), and whether backwards."""

    slope: float
    intercept: float
    spacing: tuple[float, ...]
    axes: tuple[int, ...] = (0, 1, 2)
    backwards: tuple[bool, ...] = (False, False, False)

    @property
    def cube_axes(self) -> tuple[int, ...]:
        """Axis of (D, H, W) = (z, x, y) for each file axis."""
        return tuple((1, 2, 0)[axis] for axis in self.axes)


def geometry_from_metadata(metadata: Mapping[str, Any], name: str) -> FileGeometry:
    """Version 1: everything from the metadata row, voxels in stored order, header ignored. Raises VolumeError."""
    slope, intercept = _number(metadata, "RescaleSlope", name), _number(metadata, "RescaleIntercept", name)
    in_plane: Any = metadata.get("XYSpacing")  # text such as "[0.34, 0.34]" or a sequence
    try:
        parts = re.findall(r"[^\s,\[\]()]+", in_plane) if isinstance(in_plane, str) else in_plane
        x, y = (parse_number(str(part)) for part in parts)
    except (TypeError, ValueError):
        found = f"{name}: found {in_plane!r} as XYSpacing, expected two numbers such as [0.7, 0.7]"
        raise VolumeError(f"{found}; correct the metadata table") from None
    spacing = x, y, _number(metadata, "ZSpacing", name)
    if slope <= 0:
        raise VolumeError(f"{name}: found RescaleSlope {slope:g}, expected more than 0; correct the metadata table")
    _check_spacing(spacing, name, "the metadata row")
    return FileGeometry(slope, intercept, spacing)


def geometry_from_header(header: Header, path: Path) -> FileGeometry:
    """Version 2: scaling, spacing and orientation from the header; without orientation the stored order is LPS.

    An oblique scan is taken along the nearest axes. Raises VolumeError.
    """
    _check_spacing(header.spacing, path.name, "the header")
    if header.blank:
        expected = "spacing in the header, or a metadata row (RescaleSlope, RescaleIntercept, XYSpacing, ZSpacing)"
        raise file_error(path, "a blank header (no orientation, 1 mm)", expected, "write both into the header")
    if header.affine is None:
        return FileGeometry(header.slope, header.intercept, header.spacing)
    if np.isnan(header.affine).any():
        raise file_error(path, "a singular orientation matrix", "an invertible one", "write the header again")
    lengths = np.linalg.norm(header.affine[:3, :3], axis=0)
    if not np.allclose(lengths, header.spacing, rtol=0.01):
        found = f"spacing {shape_text(header.spacing)} mm beside an orientation of {shape_text(lengths.round(4))} mm"
        raise file_error(path, found, "the same twice", "write the header again")
    directions = header.affine[:3, :3] / lengths
    _check_square(directions, path)
    _check_nearest(directions, path)
    axes, signs = io_orientation(header.affine).T  # RAS axis of each file axis, +1 towards right, front, head
    towards_lps = (-1, -1, 1)
    backwards = tuple(bool(sign != towards_lps[int(axis)]) for axis, sign in zip(axes, signs, strict=True))
    return FileGeometry(header.slope, header.intercept, header.spacing, tuple(int(a) for a in axes), backwards)


def geometry_notes(header: Header, geometry: FileGeometry) -> list[str]:
    """What was assumed of a file's geometry, and what may be wrong with it, a line each."""
    notes, extents = [], [n * s for n, s in zip(header.shape, geometry.spacing, strict=True)]
    if sorted(extents)[1] < SMALL_MM:
        notes.append(f"only {_extent_text(extents)} mm: is its spacing right?")
    if header.affine is None and not header.blank:
        notes.append("no orientation in the header: voxels taken in the order left, back, head (LPS)")
    elif header.affine is not None and np.isfinite(header.affine).all():
        directions = np.abs(header.affine[:3, :3]) / np.linalg.norm(header.affine[:3, :3], axis=0)
        turned = degrees(acos(min(float(directions.max(axis=0).min()), 1.0)))
        if turned > OBLIQUE:
            notes.append(f"axes {turned:.0f} degrees off the patient's: taken along the nearest")
    return notes


def _check_square(directions: np.ndarray, path: Path) -> None:
    """Refuses axes (3, 3; unit columns) that are sheared: slices of a tilted gantry, stacked as they come."""
    cosine = max(abs(directions[:, one] @ directions[:, other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    if cosine > sin(radians(TILT)):
        found = f"axes {degrees(asin(min(cosine, 1.0))):.1f} degrees off a right angle (gantry tilt)"
        raise file_error(path, found, "axes square to each other", "convert it with a tool that corrects the tilt")


def _check_nearest(directions: np.ndarray, path: Path) -> None:
    """Refuses axes (3, 3; unit columns) for which rounding would decide which of the patient's is the nearest."""
    orders = permutations(range(3))
    *_, second, best = sorted(float(np.abs(directions)[order, range(3)].sum()) for order in map(list, orders))
    if best - second < NEARER:
        found = "axes halfway between two of the patient's (45 degrees off)"
        raise file_error(path, found, "a nearest one for each", "resample it along the patient's axes")


def _number(metadata: Mapping[str, Any], column: str, name: str) -> float:
    try:
        value = parse_number(str(metadata[column]))
    except (KeyError, ValueError):
        value = float("nan")
    if not isfinite(value):
        shown = repr(metadata[column]) if column in metadata else "nothing"
        raise VolumeError(f"{name}: found {shown} as {column}, expected a number; correct the metadata table")
    return value


def _check_spacing(spacing: Sequence[float], name: str, where: str) -> None:
    least, most = SPACING_MM
    if not all(least <= s <= most for s in spacing):  # False for NaN too
        found = f"found spacing {shape_text(spacing)} mm in {where}"
        raise VolumeError(f"{name}: {found}, expected {least} to {most} each; correct it or leave the volume out")


def check_extent(shape: Sequence[int], spacing: Sequence[float], path: Path) -> None:
    """Refuses what is too small or too large to be a chest. Raises VolumeError."""
    extents = [n * s for n, s in zip(shape, spacing, strict=True)]
    small = min(extents) < SMALLEST_MM or sorted(shape)[1] < FEWEST_VOXELS
    if small or max(extents) > LARGEST_MM:
        found = f"{shape_text(shape)} voxels, {_extent_text(extents)} mm"
        expected = f"at least {SMALLEST_MM:g} and at most {LARGEST_MM:g} mm each way"
        remedy = "name the whole scan, or correct its spacing" if small else "correct its spacing"
        raise file_error(path, found, expected, remedy)


def _extent_text(extents: Sequence[float]) -> str:
    return " x ".join(f"{extent:.0f}" for extent in extents)


@dataclass(frozen=True)
class CropPad:
    """One axis laid centred into the cube: its `resampled` voxels, of which the first `crop` are cropped, or before
    which `pad` are padded."""

    resampled: int
    crop: int
    pad: int

    @classmethod
    def of(cls, size: int, spacing: float, target_size: int) -> CropPad:
        # Published arithmetic, to the bit where it decides a size: 0.6 mm must not become one voxel more or less.
        resampled = int(size * (spacing / (FIELD_OF_VIEW_MM / target_size)))
        return cls(resampled, max((resampled - target_size) // 2, 0), max((target_size - resampled) // 2, 0))


@dataclass(frozen=True)
class Placement:
    """Where a file's voxels lie in the cube that a model sees. Everything by file axis, fastest first."""

    shape: tuple[int, int, int]
    spacing: tuple[float, ...]  # mm
    affine: np.ndarray | None  # (4, 4) file index -> RAS mm; None where the file states no orientation: read as LPS
    axes: tuple[int, ...]  # which axis of (D, H, W) it runs along
    position: tuple[np.ndarray, ...]  # each voxel's place along that axis of the cube: 0 to 1 inside, else outside


def place_volume(path: str | Path, shape: Sequence[int] = PUBLISHED_SHAPE) -> Placement:
    """Where the voxels of a file with a right header lie in `preprocess_volume(path, shape=shape)`; reads the header
    only. Raises VolumeError."""
    path = Path(path)
    check_shape(shape)
    with open_volume(path) as file:
        header = file.header
    geometry = geometry_from_header(header, path)
    axes = geometry.cube_axes
    positions = []
    for size, spacing, axis, backwards in zip(header.shape, geometry.spacing, axes, geometry.backwards, strict=True):
        fit = CropPad.of(size, spacing, shape[axis])  # InterpolationWeights the other way round
        resampled = (np.arange(size) + 0.5) * (fit.resampled / size)
        position = (resampled - fit.crop + fit.pad) / shape[axis]
        positions.append(position[::-1].copy() if backwards else position)
    return Placement(header.shape, header.spacing, header.affine, axes, tuple(positions))
