"""CT volume files -> preprocessed tensors, and CT-RATE's tables -> cohort -> batches.

Legend: x, y, z patient axes in LPS order (x to the left, y to the back, z to the head); D, H, W = z, x, y, the order
the network was trained on (in plane that is the transpose of the usual picture). Slices are resampled one by one as
`ctclip.data.readers` reads them: neither the file nor a float copy of it is ever held whole.

preprocess_volume reads one file the way it is told to (version 1: metadata row; version 2: header), read_volume
finds out which of the two a file is, place_volume tells where its voxels lie in the tensor, load_cohort joins the
tables, augment varies a tensor for training, volume_loader makes batches.
"""

from __future__ import annotations

import json
import os
import re
import signal
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from math import ceil, isfinite, log2, prod, sqrt
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from nibabel.orientations import io_orientation
from torch.utils.data import DataLoader, Dataset

from ctclip.data.readers import Header, VolumeError, file_error, open_volume, shape_text
from ctclip.errors import UserError
from ctclip_model import ABNORMALITIES

HU_MIN, HU_MAX = -1000, 1000  # clipping window, Hounsfield units
FIELD_OF_VIEW_MM = 360.0  # edge of the cube that every input covers, whatever its number of voxels
PUBLISHED_SHAPE = (240, 480, 480)  # (D, H, W) = (z, x, y)

# Raise it with every change here or in ctclip.data.readers that may alter a tensor or a HU decision, by a single bit:
# caches rest on it.
PREPROCESSING_VERSION = 1

# Share of positive volumes on CT-RATE's train split, in the order of ABNORMALITIES.
PREVALENCE = dict(
    zip(
        ABNORMALITIES,
        (0.123, 0.284, 0.113, 0.072, 0.255, 0.143, 0.259, 0.194, 0.260)
        + (0.454, 0.370, 0.267, 0.121, 0.077, 0.106, 0.176, 0.100, 0.079),
        strict=True,
    )
)

SPLITS = ("train", "valid")
VOLUME_SUFFIX = ".nii.gz"
GEOMETRY_COLUMNS = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")  # what a version-1 file needs
OPTIONAL_COLUMNS = ("PatientSex", "PatientAge", "Manufacturer")
SUBGROUP_COLUMNS = (*OPTIONAL_COLUMNS, "SliceThickness", "ZSpacing")
FETCH_COMMAND = "python ctclip_setup.py --data"  # and a split: what brings files back that were streamed and not kept


class CohortError(UserError):
    """A folder or table that gives no usable cohort: one line, same form as VolumeError."""


# ------------------------------------------------------------------ the hub's layout, relative to data_dir


def split_of(name: str) -> str:
    """train_12_a_1.nii.gz -> train."""
    return name.split("_")[0]


def scan_of(name: str) -> str:
    """train_12_a_1.nii.gz -> train_12_a."""
    return "_".join(PurePosixPath(name).name.removesuffix(VOLUME_SUFFIX).split("_")[:3])


def patient_of(name: str) -> str:
    """train_12_a_1.nii.gz -> train_12."""
    return "_".join(PurePosixPath(name).name.removesuffix(VOLUME_SUFFIX).split("_")[:2])


def volume_path(name: str, fixed: bool) -> Path:
    """Where the hub keeps a volume: `fixed` chooses version 2 (already HU), else version 1 (raw stored values)."""
    folder = split_of(name) + ("_fixed" if fixed else "")
    return Path("dataset", folder, patient_of(name), scan_of(name), name)


def labels_path(split: str) -> Path:
    """The 18 labels of each volume of a split ("train" or "valid")."""
    return Path("dataset", "multi_abnormality_labels", f"{split}_predicted_labels.csv")


def metadata_path(split: str) -> Path:
    """Slope, intercept and spacing of each volume of a split."""
    spelled = "validation" if split == "valid" else split  # the hub writes "validation" here and "valid" elsewhere
    return Path("dataset", "metadata", f"{spelled}_metadata.csv")


def no_chest_path(split: str) -> Path:
    """List of volumes that are not chests (head CTs), one per line."""
    return Path("dataset", "metadata", f"no_chest_{split}.txt")


def streamed_path(split: str) -> Path:
    """Manifest of the volumes of a split that were encoded and not kept, one JSON object per line."""
    return Path(f"streamed_{split}.jsonl")


# ------------------------------------------------------------------ what this file hands out


@dataclass(frozen=True, eq=False)
class Volume:
    """One reconstruction: file, 18 labels (float32, 0 or 1) and its metadata row (None if there is no usable one).

    `signature` is set where the file was streamed and is not on the disk any more: its size and its last 8 bytes in
    hex, by which `feature_cache.cache_key` finds what was encoded of it. `path` is then where the file would be.
    """

    name: str
    path: Path
    labels: np.ndarray
    metadata: Mapping[str, Any] | None = None
    signature: tuple[int, str] | None = None

    @property
    def patient(self) -> str:
        return patient_of(self.name)

    @property
    def scan(self) -> str:
        return scan_of(self.name)


@dataclass(frozen=True)
class Streamed:
    """What is known of a file that was encoded and deleted; with a `reason`, of one that could not be read.

    fixed: version 2; size in bytes; tail: its last 8 bytes in hex.
    """

    fixed: bool
    size: int
    tail: str
    sha256: str | None
    reason: str | None


@dataclass(frozen=True)
class HuDecision:
    """How a file's voxels were read ("hu": header, "stored": metadata row), why, and the figures behind it."""

    reading: str
    evidence: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass
class Cohort:
    """Usable volumes; those skipped as (name, reason); and remarks about the tables as a whole."""

    volumes: list[Volume]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    not_on_disk: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.volumes)

    def reasons(self) -> dict[str, list[str]]:
        """{reason for skipping: names}, the most frequent first."""
        counts = Counter(reason for _, reason in self.skipped)
        return {reason: [name for name, why in self.skipped if why == reason] for reason, _ in counts.most_common()}

    def summary(self) -> str:
        """A few lines of text: counts, what was skipped by reason with its first names, remarks."""
        scans, patients = {v.scan for v in self.volumes}, {v.patient for v in self.volumes}
        lines = [f"{len(self)} volumes, {len(scans)} scans, {len(patients)} patients"]
        if self.not_on_disk:
            lines.append(f"not on disk: {self.not_on_disk} (listed in the labels, no file)")
        streamed = sum(volume.signature is not None for volume in self.volumes)
        if streamed:
            lines.append(f"without a file: {streamed} (streamed, known only by their cached codes)")
        for reason, names in self.reasons().items():
            count = len(names)
            lines.append(f"skipped: {count} x {reason}: {', '.join(names[:3])}{', ...' if count > 3 else ''}")
        return "\n".join(lines + self.notes)


@dataclass
class Batch:
    """volumes (B, 1, D, H, W) float32 in [-1, 1]; labels (B, 18); index (B,) int64 into the list given; B counts the
    readable ones only, the others are in failures as (name, reason); decisions has one entry per readable one."""

    volumes: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    failures: list[tuple[str, str]]
    decisions: list[HuDecision]

    def pin_memory(self) -> Batch:
        """For DataLoader: from page-locked memory a GPU takes the volumes while the CPU goes on."""
        return replace(self, volumes=self.volumes.pin_memory(), labels=self.labels.pin_memory())


# ------------------------------------------------------------------ a reading: voxels -> HU, file axes -> patient axes


@dataclass(frozen=True)
class _Reading:
    """Per file axis, fastest first: spacing (mm), the LPS axis it runs along (x 0, y 1, z 2), and whether backwards."""

    slope: float
    intercept: float
    spacing: tuple[float, ...]
    axes: tuple[int, ...] = (0, 1, 2)
    backwards: tuple[bool, ...] = (False, False, False)


def _number(metadata: Mapping[str, Any], column: str, name: str) -> float:
    try:
        value = float(metadata[column])
    except (KeyError, TypeError, ValueError):
        value = float("nan")
    if not isfinite(value):
        shown = repr(metadata[column]) if column in metadata else "nothing"
        raise VolumeError(f"{name}: found {shown} as {column}, expected a number; correct the metadata table")
    return value


def _pair(metadata: Mapping[str, Any], name: str) -> tuple[float, float]:
    """XYSpacing: text such as "[0.34, 0.34]" or a sequence."""
    value = metadata.get("XYSpacing")
    parts = re.findall(r"[^\s,\[\]()]+", value) if isinstance(value, str) else value
    try:
        x, y = (float(part) for part in parts)
    except (TypeError, ValueError):
        expected = "two numbers such as [0.7, 0.7]"
        message = f"{name}: found {value!r} as XYSpacing, expected {expected}; correct the metadata table"
        raise VolumeError(message) from None
    return x, y


def _metadata_reading(metadata: Mapping[str, Any], name: str) -> _Reading:
    """Version 1: everything from the metadata row, voxels in stored order, header ignored."""
    slope, intercept = _number(metadata, "RescaleSlope", name), _number(metadata, "RescaleIntercept", name)
    spacing = (*_pair(metadata, name), _number(metadata, "ZSpacing", name))
    if slope <= 0:
        raise VolumeError(f"{name}: found RescaleSlope {slope:g}, expected more than 0; correct the metadata table")
    _check_spacing(spacing, name, "the metadata row")
    return _Reading(slope, intercept, spacing)


def _check_spacing(spacing: Sequence[float], name: str, where: str) -> None:
    if not all(isfinite(s) and s > 0 for s in spacing):
        found = f"found spacing {shape_text(spacing)} mm in {where}"
        raise VolumeError(f"{name}: {found}, expected three positive numbers; correct it or leave the volume out")


def _header_reading(header: Header, path: Path) -> _Reading:
    """Version 2: scaling, spacing and orientation from the header; without orientation the stored order is LPS."""
    _check_spacing(header.spacing, path.name, "the header")
    if header.blank:
        remedy = "pass metadata with RescaleSlope, RescaleIntercept, XYSpacing and ZSpacing"
        raise file_error(path, "a blank header (no orientation, 1 mm)", "spacing in the header or metadata", remedy)
    if header.affine is None:
        return _Reading(header.slope, header.intercept, header.spacing)
    if np.isnan(header.affine).any():
        raise file_error(path, "a singular orientation matrix", "an invertible one", "write the header again")
    lengths = np.linalg.norm(header.affine[:3, :3], axis=0)
    if not np.allclose(lengths, header.spacing, rtol=0.01):
        found = f"spacing {shape_text(header.spacing)} mm beside an orientation of {shape_text(lengths.round(4))} mm"
        raise file_error(path, found, "the same twice", "write the header again")
    axes, signs = io_orientation(header.affine).T  # RAS axis of each file axis, +1 towards right, front, head
    towards_lps = (-1, -1, 1)
    backwards = tuple(bool(sign != towards_lps[int(axis)]) for axis, sign in zip(axes, signs, strict=True))
    return _Reading(header.slope, header.intercept, header.spacing, tuple(int(a) for a in axes), backwards)


# ------------------------------------------------------------------ resampling


@dataclass(frozen=True)
class _Taps:
    """One axis of the output box that survives the crop: value = (1 - weight) * [low] + weight * [high]."""

    box: slice  # where the values go in the output
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    @property
    def span(self) -> slice:
        """The stretch of input that is used at all."""
        used = np.concatenate([self.low, self.high])
        return slice(int(used.min()), int(used.max()) + 1)


def _taps(size: int, spacing: float, target_size: int, backwards: bool) -> _Taps | None:
    """Where each output voxel lies between the inputs; None if the axis is too short to give a single voxel."""
    fit = _fit(size, spacing, target_size)
    if fit.resampled < 1:
        return None
    count = min(fit.resampled, target_size)
    # torch's align_corners=False source index: the grid follows from the sizes. In float64, as published (nibabel's
    # arrays are); a float32 grid is up to 4e-6 off in the result.
    source = np.maximum((np.arange(fit.first, fit.first + count) + 0.5) * (size / fit.resampled) - 0.5, 0)
    low = np.minimum(source.astype(np.intp), size - 1)
    high = np.minimum(low + 1, size - 1)
    weight = np.clip(source - low, 0, 1).astype(np.float32)
    if backwards:  # only the look-up is turned round, so every orientation gives the same arithmetic
        low, high = size - 1 - low, size - 1 - high
    return _Taps(slice(fit.before, fit.before + count), low, high, weight)


@dataclass(frozen=True)
class _Fit:
    """One axis laid into the cube: its resampled voxels, of which those before `first` are cropped, or before which
    `before` are padded."""

    resampled: int
    first: int
    before: int


def _fit(size: int, spacing: float, target_size: int) -> _Fit:
    # Published arithmetic, to the bit where it decides a size: 0.6 mm must not become one voxel more or less.
    resampled = int(size * (spacing / (FIELD_OF_VIEW_MM / target_size)))
    return _Fit(resampled, max((resampled - target_size) // 2, 0), max((target_size - resampled) // 2, 0))


LINE = 16  # float32 values in a cache line


class _Rows:
    """Interpolates along the first axis of a (rows, n) plane, into a buffer of its own."""

    def __init__(self, taps: _Taps, columns: int):
        self.low, self.high = taps.low - taps.span.start, taps.high - taps.span.start
        self.weight = taps.weight[:, None]
        self.value, self.step = (np.empty((len(taps.low), columns), np.float32) for _ in range(2))

    def __call__(self, plane: np.ndarray) -> np.ndarray:
        np.take(plane, self.low, axis=0, out=self.value, mode="clip")  # "clip" only spares numpy a copy
        np.take(plane, self.high, axis=0, out=self.step, mode="clip")
        return _lerp(self.value, self.step, self.weight, out=self.step)


def _lerp(low: np.ndarray, high: np.ndarray, weight: np.ndarray | np.float32, out: np.ndarray) -> np.ndarray:
    """low + weight * (high - low). Exact where low and high are equal, unlike a weighted sum. `out` may be `high`."""
    np.subtract(high, low, out=out)
    np.multiply(out, weight, out=out)
    return np.add(low, out, out=out)


class _Plan:
    """What to do with the slices of a file, whatever does it: which are wanted, what is cut out of each, which output
    slices are due after it, and where these go."""

    def __init__(self, header: Header, reading: _Reading, out: torch.Tensor, path: Path):
        self.reading, self.out = reading, out
        shape = tuple(out.shape[1:])
        target = _cube_axes(reading)
        taps = [
            _taps(size, spacing, shape[axis], backwards)
            for size, spacing, axis, backwards in zip(
                header.shape, reading.spacing, target, reading.backwards, strict=True
            )
        ]
        if None in taps:
            found = f"{shape_text(header.shape)} voxels of {shape_text(reading.spacing)} mm"
            raise file_error(path, found, f"at least one voxel of the {shape_text(shape)} input", "check the spacing")
        self.fast, self.middle, self.slow = taps
        self.crop = self.middle.span, self.fast.span
        self.rows, self.columns = (span.stop - span.start for span in self.crop)
        turned = out[0].permute(target[2], target[0], target[1])
        self.target = turned[self.slow.box, self.fast.box, self.middle.box]
        self.due: dict[int, list[int]] = {}
        for position, (low, high) in enumerate(zip(self.slow.low, self.slow.high, strict=True)):
            self.due.setdefault(int(max(low, high)), []).append(position)
        self.wanted = {*self.slow.low.tolist(), *self.slow.high.tolist()}
        # float32 holds these sums exactly; anything else is scaled in float64, one slice at a time.
        self.exact = header.dtype.kind in "iu" and reading.slope == 1 and reading.intercept.is_integer()

    def add(self, index: int, stored: np.ndarray) -> None:
        """One slice (middle axis, fastest axis) as stored; all of them, in file order."""
        raise NotImplementedError

    def finish(self) -> None:
        """After the last slice."""


class _Resampler(_Plan):
    """Writes output slices as soon as they are due; holds two input slices at a time."""

    def __init__(self, header: Header, reading: _Reading, out: torch.Tensor, path: Path):
        super().__init__(header, reading, out, path)
        # Rows an odd number of cache lines long, the last voxels unused: those of a column would share a few places in
        # the cache if they were a power of two apart, and turning a plane would take six times as long.
        padded = (ceil(self.columns / LINE) | 1) * LINE
        count = len(self.middle.low)
        self.along_middle, self.along_fast = _Rows(self.middle, padded), _Rows(self.fast, count)
        self.turned = np.empty((self.columns, count), np.float32)
        self.planes = np.zeros((2, self.rows, padded), np.float32)  # neighbours differ in parity
        self.mixed = np.empty((self.rows, padded), np.float32)
        self.finished = self.target.numpy()

    def add(self, index: int, stored: np.ndarray) -> None:
        if index in self.wanted:
            self._window(stored[self.crop], self.planes[index % 2])
        for position in self.due.get(index, ()):
            self._finish(position)

    def _window(self, stored: np.ndarray, plane: np.ndarray) -> None:
        used = plane[:, : self.columns]
        if self.exact:
            np.copyto(used, stored, casting="unsafe")  # what follows is four times faster without gaps between rows
            np.add(plane, np.float32(self.reading.intercept), out=plane)
            np.clip(plane, HU_MIN, HU_MAX, out=plane)
        else:
            scaled = stored.astype(np.float64) * self.reading.slope + self.reading.intercept
            np.clip(scaled, HU_MIN, HU_MAX, out=scaled)
            np.copyto(used, scaled, casting="unsafe")

    def _finish(self, position: int) -> None:
        low, high = (self.planes[index[position] % 2] for index in (self.slow.low, self.slow.high))
        _lerp(low, high, self.slow.weight[position], out=self.mixed)
        np.copyto(self.turned, self.along_middle(self.mixed)[:, : self.columns].T)
        plane = self.along_fast(self.turned)
        np.divide(plane, np.float32(HU_MAX), out=plane)
        np.clip(plane, -1, 1, out=self.finished[position])  # float32 rounding can step past the window by one bit


class _DeviceResampler(_Plan):
    """The same on `out`'s device, straight from the stored integers: 2 bytes of a voxel travel, not 4 of the result.

    Slices are gathered in page-locked memory, STACK at a time; an upload ends before the next slice is gathered.
    """

    STACK = 16

    def __init__(self, header: Header, reading: _Reading, out: torch.Tensor, path: Path):
        super().__init__(header, reading, out, path)
        self.device = out.device
        self.kind = header.dtype.newbyteorder("=")
        if self.kind.kind == "u" and self.kind.itemsize > 1:  # torch computes with unsigned bytes only
            self.kind = np.dtype("i4" if self.kind.itemsize == 2 else "f8")
        blank = torch.from_numpy(np.empty((self.STACK, self.rows, self.columns), self.kind))
        self.stack = blank.pin_memory() if self.device.type == "cuda" else blank
        self.in_plane = [self._on_device(taps, taps.span.start) for taps in (self.middle, self.fast)]
        self.indices: list[int] = []  # of the slices in the stack
        self.last: tuple[int, torch.Tensor] | None = None  # the plane before it, which its first slice may need

    def add(self, index: int, stored: np.ndarray) -> None:
        if index not in self.wanted:
            return
        np.copyto(self.stack[len(self.indices)].numpy(), stored[self.crop], casting="unsafe")
        self.indices.append(index)
        if len(self.indices) == self.STACK:
            self.finish()

    def finish(self) -> None:
        if not self.indices:
            return
        planes, indices = self._window(self.stack[: len(self.indices)].to(self.device)), self.indices
        positions = [position for index in indices for position in self.due.get(index, ())]
        if self.last is not None:
            indices, planes = [self.last[0], *indices], torch.cat([self.last[1], planes])
        if positions:
            row = {index: number for number, index in enumerate(indices)}
            low, high = ([row[int(of[position])] for position in positions] for of in (self.slow.low, self.slow.high))
            due = _Taps(self.slow.box, np.array(low), np.array(high), self.slow.weight[positions])
            mixed = planes
            for axis, taps in enumerate((self._on_device(due), *self.in_plane)):
                mixed = self._between(mixed, axis, *taps)
            finished = (mixed / HU_MAX).clamp_(-1, 1).transpose(1, 2)
            self.target[torch.tensor(positions, device=self.device)] = finished
        self.last = indices[-1], planes[-1:].clone()
        self.indices = []

    def _on_device(self, taps: _Taps, first: int = 0) -> tuple[torch.Tensor, ...]:
        arrays = (taps.low - first, taps.high - first, taps.weight)
        return tuple(torch.from_numpy(array).to(self.device) for array in arrays)

    def _window(self, stored: torch.Tensor) -> torch.Tensor:
        if self.exact:
            return (stored.float() + self.reading.intercept).clamp_(HU_MIN, HU_MAX)
        return (stored.double() * self.reading.slope + self.reading.intercept).clamp_(HU_MIN, HU_MAX).float()

    @staticmethod
    def _between(
        planes: torch.Tensor, axis: int, low: torch.Tensor, high: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """_lerp along an axis of (slices, middle, fast)."""
        below, above = planes.index_select(axis, low), planes.index_select(axis, high)
        return below + weight.view([-1 if i == axis else 1 for i in range(3)]) * (above - below)


# ------------------------------------------------------------------ evidence: which reading is it?

SOFT, AIR, ABOVE, PADDING = (-200, 200), (-1100, -650), 900, -1100  # HU
SAMPLE = 1_000_000  # voxels looked at


class _Evidence:
    """Minimum and maximum of all voxels and a regular sample of them, as stored."""

    def __init__(self, header: Header, path: Path):
        self.path = path
        self.step = ceil(sqrt(max(1, prod(header.shape) / SAMPLE)))
        self.low, self.high = float("inf"), float("-inf")
        self.sample: list[np.ndarray] = []

    def add(self, index: int, stored: np.ndarray) -> None:
        low, high = float(stored.min()), float(stored.max())
        if not (isfinite(low) and isfinite(high)):
            raise file_error(self.path, f"NaN or infinite voxels (slice {index})", "numbers", "leave the volume out")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.sample.append(stored[:: self.step, :: self.step].astype(np.float32).ravel())

    def values(self) -> np.ndarray:
        return np.concatenate(self.sample)

    def check(self) -> None:
        if self.low == self.high:
            raise file_error(self.path, f"every voxel equal to {self.low:g}", "a picture", "leave the volume out")


def _shares(hu: np.ndarray) -> dict[str, float]:
    """Where voxels lie if `hu` were Hounsfield units; padding is a share of all, the others of what is not padding."""
    seen = hu[hu >= PADDING]
    share = {"padding": 1 - seen.size / max(hu.size, 1)}
    for name, low, high in (("air", *AIR), ("soft", *SOFT), ("above", ABOVE, np.inf)):
        share[name] = float(np.count_nonzero((seen >= low) & (seen <= high)) / max(seen.size, 1))
    return share


def _plausible(share: Mapping[str, float]) -> bool:
    """Soft tissue where it belongs and next to nothing above bone.

    Raw values with offset 1024 read as HU put lung and air into the soft window, so that share alone misleads; but
    then all soft tissue lies above 900, and nothing is left where air should be.
    """
    above = 0.08 if share["air"] >= 0.02 else 0.03
    return share["padding"] <= 0.98 and share["soft"] >= 0.05 and share["above"] <= above


def _percent(share: Mapping[str, float]) -> str:
    return (
        f"air {share['air']:.0%}, soft tissue {share['soft']:.0%}, above {ABOVE} HU {share['above']:.1%}"
        + f", padding {share['padding']:.0%}"
    )


def decide_reading(
    values: np.ndarray,
    header_scale: tuple[float, float] = (1.0, 0.0),
    metadata_scale: tuple[float, float] | None = None,
    fixed_folder: bool | None = None,
    blank_header: bool = False,
    name: str = "volume",
) -> HuDecision:
    """Decide whether stored values are HU by the header's (slope, intercept) or by the metadata row's.

    `values` is a sample of voxels as stored. Voxels decide; the folder (None: unknown) and the header are recorded
    and a contradiction is said. Raises VolumeError where the readings differ and neither or both look like a CT, or
    where there is no metadata row and the header's reading does not look like one.
    """
    shares = {"hu": _shares(values * header_scale[0] + header_scale[1])}
    if metadata_scale is not None:
        shares["stored"] = _shares(values * metadata_scale[0] + metadata_scale[1])
    fits = [reading for reading, share in shares.items() if _plausible(share)]
    if metadata_scale is not None and tuple(metadata_scale) == tuple(header_scale):
        by_row = fixed_folder is False or (fixed_folder is None and blank_header)
        reading, why = "stored" if by_row else "hu", "both readings are the same"
    elif len(fits) == 1:
        reading, why = fits[0], "the other does not look like a CT" if metadata_scale else "no metadata row"
    else:
        described = "; ".join(f"as {reading}: {_percent(share)}" for reading, share in shares.items())
        found = f"{'both readings' if fits else 'no reading'} plausible ({described})"
        remedy = "check its RescaleIntercept" if metadata_scale else "add its metadata row"
        raise VolumeError(f"{name}: ambiguous, found {found}, expected exactly one; {remedy} or leave it out")
    folder = {None: "folder unknown", True: "version-2 folder", False: "version-1 folder"}[fixed_folder]
    if fixed_folder is not None and fixed_folder != (reading == "hu"):
        folder += " (contradicted by the voxels)"
    facts = [folder, "blank header" if blank_header else "header with geometry", f"minimum {values.min():g}"]
    facts += [f"as {r}: {_percent(share)}" for r, share in shares.items()] + [f"read as {reading}: {why}"]
    numbers = {f"{r}_{key}": value for r, share in shares.items() for key, value in share.items()}
    return HuDecision(reading, "; ".join(facts), {"minimum": float(values.min()), **numbers})


# ------------------------------------------------------------------ file -> tensor


def _load(
    path: Path,
    shape: Sequence[int],
    choose: Callable[[Header, _Evidence], _Reading],
    device: torch.device | None = None,
) -> tuple[torch.Tensor, Header, _Evidence]:
    """One pass over a file: evidence on everything, resampling of what survives the crop, by `device` if one is given.

    `choose` gives the reading, from the header and the evidence of the first slab.
    """
    with open_volume(path) as file, closing(file.slabs()) as slabs:
        evidence = _Evidence(file.header, path)
        start, slab = next(slabs)
        for offset, stored in enumerate(slab):
            evidence.add(start + offset, stored)
        reading = choose(file.header, evidence)
        out = torch.full((1, *shape), -1.0, device=device)
        resampler = (_Resampler if device is None else _DeviceResampler)(file.header, reading, out, path)
        for first, stack in chain([(start, slab)], slabs):
            for index, stored in enumerate(stack, first):
                if first != start:
                    evidence.add(index, stored)
                resampler.add(index, stored)
        resampler.finish()
    evidence.check()
    return out, file.header, evidence


def preprocess_volume(
    path: str | Path, metadata: Mapping[str, Any] | None = None, shape: Sequence[int] = PUBLISHED_SHAPE
) -> torch.Tensor:
    """NIfTI, .mha or DICOM series -> (1, D, H, W) = (1, z, x, y) float32 in [-1, 1], HU / 1000, as CT-CLIP had it.

    metadata: a mapping with RescaleSlope, RescaleIntercept, XYSpacing and ZSpacing for version-1 files, whose voxels
    are then taken in stored order; None for files whose header is right, which are brought to LPS. `shape` sets the
    grid, always over a cube of 360 mm. Raises VolumeError (one line) for anything that is not a usable volume, also
    where the voxels clearly contradict the reading asked for.
    """
    # 1. Inflate slice by slice, voxels as stored. A slab at a time: the file can be larger than the output.
    # 2. Output sizes from the *whole* scan, then only the box that survives the crop: the published grid follows from
    #    sizes, so cropping first and resampling after would give another grid.
    # 3. Slope and intercept, clip to [-1000, 1000] HU. Before resampling, or one metal voxel would bleed into its
    #    neighbours (the published training code and inference code differ here; this is inference).
    # 4. Trilinear as three passes, slices first (fewest values to touch), then the two axes in plane.
    # 5. / 1000, into the centre of a tensor of -1 (air) in the order (z, x, y).
    path = Path(path)
    _check_shape(shape)
    if metadata is not None:
        reading = _metadata_reading(metadata, path.name)
        out, header, evidence = _load(path, shape, lambda header, evidence: reading)
        _refuse_scaling_hu(header, reading, evidence)
    else:
        out, header, evidence = _load(path, shape, lambda header, evidence: _header_reading(header, path))
        _refuse_raw(header, evidence)
    return out


@dataclass(frozen=True)
class Placement:
    """Where a file's voxels lie in the cube that a model sees.

    shape: voxels along the file's axes, fastest first; spacing: in mm; affine (4, 4): file index -> RAS mm, None where
    the file states no orientation (then it is read as LPS); axes: for each file axis, which axis of (D, H, W) it runs
    along; position: for each file axis, each voxel's place along that axis of the cube, in (0, 1) inside, outside below
    0 or above 1.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, ...]
    affine: np.ndarray | None
    axes: tuple[int, int, int]
    position: tuple[np.ndarray, ...]


def place_volume(path: str | Path, shape: Sequence[int] = PUBLISHED_SHAPE) -> Placement:
    """Where the voxels of a file with a right header lie in `preprocess_volume(path, shape=shape)`; reads the header
    only. Raises VolumeError."""
    path = Path(path)
    _check_shape(shape)
    with open_volume(path) as file:
        header = file.header
    reading = _header_reading(header, path)
    axes = _cube_axes(reading)
    places = zip(header.shape, reading.spacing, axes, reading.backwards, strict=True)
    position = tuple(_positions(size, spacing, shape[axis], turned) for size, spacing, axis, turned in places)
    return Placement(header.shape, header.spacing, header.affine, axes, position)


def _positions(size: int, spacing: float, target_size: int, backwards: bool) -> np.ndarray:
    """Centres of the voxels of a file axis, as a share of the cube's edge: _taps, looked up the other way round."""
    fit = _fit(size, spacing, target_size)
    resampled = (np.arange(size) + 0.5) * (fit.resampled / size)
    position = (resampled - fit.first + fit.before) / target_size
    return position[::-1].copy() if backwards else position


def _cube_axes(reading: _Reading) -> tuple[int, int, int]:
    """Axis of (D, H, W) = (z, x, y) for each file axis."""
    return tuple((1, 2, 0)[axis] for axis in reading.axes)


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"found shape {tuple(shape)}, expected three positive numbers (D, H, W)")


def _refuse_scaling_hu(header: Header, reading: _Reading, evidence: _Evidence) -> None:
    """A metadata row applied to a file that is HU already puts most voxels below -1000: the published mistake."""
    if (header.slope, header.intercept) == (reading.slope, reading.intercept):
        return
    values = evidence.values()
    as_hu = _shares(values * header.slope + header.intercept)
    as_stored = _shares(values * reading.slope + reading.intercept)
    # Air must be visible as air: raw values of a nearly empty picture would pass as soft tissue otherwise.
    if _plausible(as_hu) and as_hu["air"] >= 0.02 and not _plausible(as_stored):
        found = f"voxels that are HU already ({_percent(as_hu)})"
        raise file_error(evidence.path, found, "raw stored values for this metadata", "pass metadata=None")


def _refuse_raw(header: Header, evidence: _Evidence) -> None:
    values = evidence.values() * header.slope + header.intercept
    lowest = min(end * header.slope + header.intercept for end in (evidence.low, evidence.high))
    high = float((values > 700).mean())
    if lowest >= 0 and high > 0.2:
        found = f"raw stored values (no voxel below 0, {high:.0%} above 700)"
        raise file_error(evidence.path, found, "HU", "pass metadata with RescaleSlope and RescaleIntercept")


def read_volume(
    volume: Volume, shape: Sequence[int] = PUBLISHED_SHAPE, device: torch.device | None = None
) -> tuple[torch.Tensor, HuDecision]:
    """(tensor as from preprocess_volume, how the file was read and why). Raises VolumeError, also for ambiguous files.

    With a `device` the tensor is made there, equal but for rounding; what goes into a cache is made without.
    The file is read once: the first slab decides, the whole file confirms. Only if it does not confirm, a second time.
    """
    _check_shape(shape)
    path, fixed = volume.path, _in_fixed_folder(volume.path)
    if volume.signature is not None and not os.path.exists(path):
        expected = "its features in the cache of this encoder"
        fetch = f"fetch the file with {FETCH_COMMAND} {split_of(volume.name)}"
        remedy = f"train with --freeze-backbone on that cache, or {fetch}"
        raise file_error(path, "no file (it was streamed)", expected, remedy)
    row = None if volume.metadata is None else _metadata_reading(volume.metadata, path.name)

    def judge(header: Header, evidence: _Evidence) -> HuDecision:
        scale = None if row is None else (row.slope, row.intercept)
        own = header.slope, header.intercept
        return decide_reading(evidence.values(), own, scale, fixed, header.blank, path.name)

    def reading_of(decision: str, header: Header) -> _Reading:
        if decision == "stored" and row is not None:
            return row
        if header.blank and row is not None:  # HU that lost its header: the row still knows the spacing
            return _Reading(header.slope, header.intercept, row.spacing)
        return _header_reading(header, path)

    used: list[_Reading] = []

    def provisional(header: Header, evidence: _Evidence) -> _Reading:
        try:
            used.append(reading_of(judge(header, evidence).reading, header))
        except VolumeError:  # the first slab may be padding only: go on with what the folder says
            used.append(reading_of("hu" if fixed else "stored", header))
        return used[-1]

    out, header, evidence = _load(path, shape, provisional, device)
    decision = judge(header, evidence)
    final = reading_of(decision.reading, header)
    if final != used[-1]:
        del out
        out, _, _ = _load(path, shape, lambda header, evidence: final, device)
    return out, decision


def _in_fixed_folder(path: Path) -> bool | None:
    """True and False in the hub's layout (split folder / patient / scan / file), None elsewhere."""
    folder = path.parents[2].name if len(path.parents) > 2 else ""
    return folder.endswith("_fixed") if folder.removesuffix("_fixed") in SPLITS else None


# ------------------------------------------------------------------ tables -> cohort


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV as text cells, columns found by name. CohortError where it or one of the columns is missing."""
    try:
        with warnings.catch_warnings():
            # index_col=False: a cell too many at the end of the rows must not shift every column by one; it is dropped
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            table = pd.read_csv(path, dtype=str, encoding="utf-8-sig", skipinitialspace=True, index_col=False)
    except FileNotFoundError:
        raise CohortError(f"found no {path}, expected a table; check --data-dir or download the table") from None
    except (OSError, UnicodeDecodeError, pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        reason = str(error).splitlines()[0]
        raise CohortError(f"{path.name}: found an unreadable table ({reason}), expected CSV; replace it") from None
    table.columns = [str(column).strip() for column in table.columns]
    missing = [column for column in columns if column not in table.columns]
    if missing:
        found = ", ".join(table.columns[:4])
        expected = f"column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        raise CohortError(f"{path.name}: found columns {found}, ..., expected {expected}; rename or add them")
    table["VolumeName"] = [PurePosixPath(str(name).strip()).name for name in table["VolumeName"]]
    return table


@dataclass
class _UniqueRows:
    """Rows of a table by volume name, each volume once."""

    rows: dict[str, tuple]
    contradictory: set[str]
    repeated: int


def _unique(table: pd.DataFrame, columns: Sequence[str]) -> _UniqueRows:
    """Identical duplicates count once; a volume with two different rows is contradictory and has none."""
    rows: dict[str, tuple] = {}
    contradictory, repeated = set(), 0
    cells = table[list(columns)].fillna("")
    for name, *row in zip(table["VolumeName"], *(cells[c].str.strip() for c in columns), strict=True):
        if name not in rows:
            rows[name] = tuple(row)
        elif rows[name] == tuple(row):
            repeated += 1
        else:
            contradictory.add(name)
    return _UniqueRows({n: r for n, r in rows.items() if n not in contradictory}, contradictory, repeated)


def _labels(row: Sequence[str]) -> np.ndarray | None:
    """18 cells -> float32 vector of 0 and 1, or None."""
    try:
        labels = np.array([float(cell) for cell in row], np.float32)
    except ValueError:
        return None
    return labels if np.isin(labels, (0, 1)).all() else None


def _no_chest(path: Path) -> set[str] | None:
    """Volume names of the list (one per line, bare or as a path); None if there is no list."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError(f"{path.name}: found an unreadable list ({error}), expected text; replace it") from None
    names = {PurePosixPath(line.strip().replace("\\", "/")).name for line in lines if line.strip()}
    return {name if name.endswith(VOLUME_SUFFIX) else name + VOLUME_SUFFIX for name in names}


def read_metadata(path: str | Path) -> dict[str, dict[str, str]]:
    """{volume: its row as text}, of those SUBGROUP_COLUMNS that there are.

    Raises CohortError where the table cannot be read or has none of them. Contradictory rows are skipped.
    """
    path = Path(path)
    table = _table(path, ("VolumeName",))
    columns = [column for column in SUBGROUP_COLUMNS if column in table.columns]
    if not columns:
        wanted = ", ".join(SUBGROUP_COLUMNS)
        raise CohortError(f"{path.name}: found none of {wanted}, expected at least one; add one, or drop the table")
    return {name: dict(zip(columns, row, strict=True)) for name, row in _unique(table, columns).rows.items()}


STREAMED_TYPES = {
    "fixed": bool,
    "size": int,
    "tail": str,
    "sha256": (str, type(None)),
    "reason": (str, type(None)),
}


def read_streamed(data_dir: str | Path, split: str) -> dict[tuple[str, bool], Streamed]:
    """{(volume, whether version 2): what is known of that file} from a split's manifest, {} where there is none.

    The last line of a file counts; one that a kill has torn, or that is anything else, is ignored. Raises CohortError
    where the manifest cannot be read.
    """
    path = Path(data_dir, streamed_path(split))
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        found = f"an unreadable manifest ({error.strerror})"
        raise CohortError(f"{path.name}: found {found}, expected a file; check its permissions") from None
    streamed = {}
    for line in lines:
        try:
            content = json.loads(line)
            name, values = content["name"], {key: content[key] for key in STREAMED_TYPES}
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(name, str) and all(isinstance(values[key], kind) for key, kind in STREAMED_TYPES.items()):
            streamed[name, values["fixed"]] = Streamed(**values)
    return streamed


class _Joiner:
    """Joins label rows, metadata rows, the no-chest list, the disk and the manifest, one volume at a time."""

    def __init__(self, data_dir: Path, split: str):
        self.data_dir = data_dir
        self.labels = _unique(_table(data_dir / labels_path(split), ("VolumeName", *ABNORMALITIES)), ABNORMALITIES)
        self.notes = []
        self.columns = GEOMETRY_COLUMNS
        self.metadata = _UniqueRows({}, set(), 0)
        metadata_file = data_dir / metadata_path(split)
        if metadata_file.exists():
            table = _table(metadata_file, ("VolumeName", *GEOMETRY_COLUMNS))
            self.columns = (*GEOMETRY_COLUMNS, *(c for c in OPTIONAL_COLUMNS if c in table.columns))
            self.metadata = _unique(table, self.columns)
        else:
            self.notes.append(f"no {metadata_file.name}: version-1 volumes are skipped")
        no_chest = _no_chest(data_dir / no_chest_path(split))
        if no_chest is None:
            self.notes.append(f"no {no_chest_path(split).name}: scans of other body parts are not skipped")
        self.no_chest = no_chest or set()
        self.streamed = read_streamed(data_dir, split)
        for source, what in ((self.labels, "label"), (self.metadata, "metadata")):
            if source.repeated:
                self.notes.append(f"duplicate {what} rows with the same content, counted once: {source.repeated}")

    def find(self, name: str) -> tuple[Path, bool, Streamed | None] | None:
        """(path, whether version 2, None) of the file, version 2 first: it is the corrected one. Without a file, where
        it would be and what the manifest says of it."""
        for fixed in (True, False):
            path = self.data_dir / volume_path(name, fixed)
            if os.path.exists(path):  # False also where a folder may not be entered
                return path, fixed, None
        known = [entry for fixed in (True, False) if (entry := self.streamed.get((name, fixed)))]
        streamed = next((entry for entry in known if entry.reason is None), known[0] if known else None)
        return streamed and (self.data_dir / volume_path(name, streamed.fixed), streamed.fixed, streamed)

    def join(self, name: str, path: Path, fixed: bool, streamed: Streamed | None) -> Volume | str:
        """The volume, or the reason for leaving it out."""
        if streamed is not None and streamed.reason is not None:
            return f"quarantined: {streamed.reason}"
        if name in self.no_chest:
            return "not a chest (no-chest list)"
        if name in self.labels.contradictory:
            return "contradictory label rows"
        if name not in self.labels.rows:
            return "no label row"
        labels = _labels(self.labels.rows[name])
        if labels is None:
            return "labels other than 0 and 1"
        row, problem = self.row(name)
        if problem and not fixed:
            return f"{problem} (needed by a version-1 file)"
        return Volume(name, path, labels, row, streamed and (streamed.size, streamed.tail))

    def row(self, name: str) -> tuple[dict[str, Any] | None, str | None]:
        """(usable metadata row, None) or (None, what is wrong with it)."""
        if name in self.metadata.contradictory:
            return None, "contradictory metadata rows"
        if name not in self.metadata.rows:
            return None, "no metadata row"
        row = dict(zip(self.columns, self.metadata.rows[name], strict=True))
        empty = [column for column in GEOMETRY_COLUMNS if not row[column]]
        if empty:
            return None, f"no {' and no '.join(empty)} in its metadata row"
        try:
            _metadata_reading(row, name)
        except VolumeError as error:
            return None, str(error).removeprefix(f"{name}: ")
        return row | {column: float(row[column]) for column in ("RescaleSlope", "RescaleIntercept", "ZSpacing")}, None


def load_cohort(data_dir: str | Path, split: str, limit: int | None = None) -> Cohort:
    """Volumes of one split in the hub's layout under data_dir, in the order of the label table.

    Joins labels, metadata and the no-chest list by VolumeName; a volume present in both versions is taken from the
    `_fixed` folder, one present in neither from the manifest of streamed ones, with its `signature`. `limit` stops
    after that many usable volumes. Paths are built from names, the tree is never listed. Raises CohortError where a
    table or a column is missing or nothing usable is left.
    """
    data_dir = Path(data_dir)
    if split not in SPLITS:
        raise CohortError(f"found split {split!r}, expected one of {', '.join(SPLITS)}; choose one")
    if not data_dir.is_dir():
        raise CohortError(f"found no folder {data_dir}, expected the cohort's; check --data-dir")
    joiner = _Joiner(data_dir, split)
    cohort = Cohort([], notes=joiner.notes)
    labelled = {**joiner.labels.rows, **dict.fromkeys(sorted(joiner.labels.contradictory))}
    unlabelled = [name for name in joiner.metadata.rows if name not in labelled]
    for name in [*labelled, *unlabelled]:
        if limit is not None and len(cohort) >= limit:
            break
        found = joiner.find(name)
        if found is None:
            cohort.not_on_disk += name in labelled
            continue
        result = joiner.join(name, *found)
        if isinstance(result, Volume):
            cohort.volumes.append(result)
        else:
            cohort.skipped.append((name, result))
    if not cohort.volumes:
        found = "; ".join(cohort.summary().splitlines()[1:]) or "an empty label table"
        raise CohortError(f"{data_dir}: found no usable {split} volume ({found}), expected at least one; add volumes")
    return cohort


def listed_volumes(data_dir: str | Path, split: str, fixed: bool) -> Cohort:
    """Every usable volume that the tables of a split list, whether its file is here or not; `fixed`: as version 2.

    For choosing what to fetch. Raises CohortError where a table or a column is missing.
    """
    data_dir = Path(data_dir)
    joiner = _Joiner(data_dir, split)
    cohort = Cohort([], notes=joiner.notes)
    for name in (*joiner.labels.rows, *sorted(joiner.labels.contradictory)):
        result = joiner.join(name, data_dir / volume_path(name, fixed), fixed, None)
        if isinstance(result, Volume):
            cohort.volumes.append(result)
        else:
            cohort.skipped.append((name, result))
    return cohort


def split_by_patient(volumes: Sequence[Volume], fraction: float, seed: int) -> tuple[list[Volume], list[Volume]]:
    """(rest, held out): about `fraction` of the patients held out, label rates kept alike on both sides.

    Same volumes and seed, same split. Raises CohortError with fewer than two patients.
    """
    groups: dict[str, list[Volume]] = {}
    for volume in volumes:
        groups.setdefault(volume.patient, []).append(volume)
    if len(groups) < 2 or not 0 < fraction < 1:
        found = f"{len(groups)} patient(s) and fraction {fraction}"
        raise CohortError(f"found {found}, expected at least 2 patients and a fraction in (0, 1); change either")
    patients = sorted(groups)
    # Per patient: positives per label, volumes, and 1, each scaled so that all of them weigh alike.
    rows = np.array([[*np.sum([v.labels for v in groups[p]], axis=0), len(groups[p]), 1] for p in patients])
    rows = rows / np.sqrt(np.maximum((rows**2).sum(axis=0), 1))
    wanted = min(max(round(fraction * len(patients)), 1), len(patients) - 1)
    generator = np.random.default_rng(seed)
    tries = [_deal(rows, wanted, generator.permutation(len(patients))) for _ in range(max(1, 2000 // len(patients)))]
    _, chosen = min(tries, key=lambda imbalance_and_places: imbalance_and_places[0])
    held = {patients[i] for i in chosen}
    return [v for v in volumes if v.patient not in held], [v for v in volumes if v.patient in held]


def _deal(rows: np.ndarray, wanted: int, order: np.ndarray) -> tuple[float, list[int]]:
    """Deal rows in the order given, each to the side that keeps every column closest to its share of `wanted`."""
    share, balance, held = wanted / len(rows), np.zeros(rows.shape[1]), []
    for place, i in enumerate(order):
        taken, given = balance + (1 - share) * rows[i], balance - share * rows[i]
        left, still = len(order) - place, wanted - len(held)
        take = still == left or (still > 0 and taken @ taken < given @ given)
        balance = taken if take else given
        if take:
            held.append(int(i))
    return float(balance @ balance), held


# ------------------------------------------------------------------ augmentation

SHIFT = 0.03  # of each axis: how a patient lies on the table
GAIN, OFFSET = 0.05, 0.02  # of HU / 1000: how scanners are calibrated, how much contrast medium there is
NOISE = 0.02  # largest standard deviation, HU / 1000: dose and kernel


def augment(volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Another plausible scan of the same patient: `volume` (1, D, H, W) float32 in [-1, 1], changed in place.

    Moved by up to SHIFT of each axis (whole voxels, -1 = air moves in), HU times 1 +- GAIN plus +- OFFSET, Gaussian
    noise of a deviation drawn from [0, NOISE], clipped to [-1, 1]. Never mirrored: left and right are findings (situs,
    aortic arch, liver). Works slice by slice, so it needs the memory of two slices.
    """
    shifts = [_draw(round(SHIFT * size), generator) for size in volume.shape[1:]]
    gain = 1 + GAIN * (2 * torch.rand((), generator=generator).item() - 1)
    offset = OFFSET * (2 * torch.rand((), generator=generator).item() - 1)
    sigma = NOISE * torch.rand((), generator=generator).item()
    depth, rows, columns = volume.shape[1:]
    (to_row, from_row), (to_column, from_column) = _moved(rows, shifts[1]), _moved(columns, shifts[2])
    moved, noise = torch.empty(rows, columns), torch.empty(rows, columns)
    order = range(depth) if shifts[0] < 0 else reversed(range(depth))  # a slice is read before it is overwritten
    for k in order:
        moved.fill_(-1)
        if 0 <= k - shifts[0] < depth:
            moved[to_row, to_column] = volume[0, k - shifts[0], from_row, from_column]
        moved.mul_(gain).add_(offset).add_(noise.normal_(generator=generator), alpha=sigma)
        torch.clamp(moved, -1, 1, out=volume[0, k])
    return volume


def _draw(most: int, generator: torch.Generator) -> int:
    """A whole number from -most to most."""
    return int(torch.randint(-most, most + 1, (), generator=generator))


def _moved(size: int, by: int) -> tuple[slice, slice]:
    """Where to and where from along an axis that is moved."""
    return slice(max(by, 0), size + min(by, 0)), slice(max(-by, 0), size + min(-by, 0))


# ------------------------------------------------------------------ batches


class VolumeDataset(Dataset):
    """Item i: (i, tensor, labels, decision), or (i, None, name, reason) for a file that cannot be used.

    With `augment_seed` the tensors are augmented. What is drawn for a volume follows from the seed and its name alone:
    one seed per epoch gives the epoch's tensors again, in any order, worker or resumed run. `device` is read_volume's.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        shape: Sequence[int] = PUBLISHED_SHAPE,
        augment_seed: int | None = None,
        device: torch.device | None = None,
    ):
        _check_shape(shape)
        self.volumes, self.shape, self.augment_seed = list(volumes), tuple(shape), augment_seed
        self.device = device

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> tuple:
        volume = self.volumes[index]
        try:
            try:
                on_device = {} if self.device is None else {"device": self.device}
                tensor, decision = read_volume(volume, self.shape, **on_device)
            except (OSError, MemoryError, torch.OutOfMemoryError):
                # A network mount, a full moment, a full GPU; a second failure counts.
                tensor, decision = read_volume(volume, self.shape)
                tensor = tensor.to(self.device or "cpu")
        except (VolumeError, OSError, MemoryError) as error:  # one bad file never stops the others
            reason = str(error) or type(error).__name__
            return index, None, volume.name, reason.removeprefix(f"{volume.path.name}: ")
        if self.augment_seed is not None:
            seed = zlib.crc32(f"{self.augment_seed} {volume.name}".encode())  # hash() differs between processes
            augment(tensor, torch.Generator().manual_seed(seed))
        return index, tensor, torch.from_numpy(np.asarray(volume.labels, np.float32)), decision

    def collate(self, items: Sequence[tuple]) -> Batch:
        """Items -> Batch; with no readable item the tensors have length 0."""
        good = [item for item in items if item[1] is not None]
        failures = [(name, reason) for _, tensor, name, reason in items if tensor is None]
        if len(good) == 1:  # not copied: it may be 221 MB
            volumes = good[0][1][None]
        else:
            volumes = torch.stack([item[1] for item in good]) if good else torch.empty(0, 1, *self.shape)
        return Batch(
            volumes=volumes,
            labels=torch.stack([item[2] for item in good]) if good else torch.empty(0, len(ABNORMALITIES)),
            index=torch.tensor([item[0] for item in good], dtype=torch.int64),
            failures=failures,
            decisions=[item[3] for item in good],
        )


def micro_batch_size(shape: Sequence[int], batch_size: int) -> int:
    """Volumes to hold at once to begin with: the largest power of two within the voxels of two published volumes.

    A batch of 16 published volumes would be 3.5 GB before the network sees it; its gradients are accumulated instead.
    """
    most = max(1, 2 * prod(PUBLISHED_SHAPE) // prod(shape))
    return 1 << int(log2(min(most, batch_size)))


def volume_loader(
    volumes: Sequence[Volume],
    shape: Sequence[int] = PUBLISHED_SHAPE,
    batch_size: int = 1,
    shuffle: bool = False,
    num_workers: int = 0,
    generator: torch.Generator | None = None,
    augment_seed: int | None = None,
    pieces: Sequence[Sequence[int]] | None = None,
    pin: bool = False,
) -> DataLoader:
    """DataLoader of Batch. `generator` makes a shuffle repeatable; `augment_seed` is VolumeDataset's; `pieces` gives
    the indices of every batch, in order, empty ones too, in place of `batch_size` and `shuffle`; `pin` leaves batches
    in page-locked memory, for a GPU.

    Each worker prepares one batch ahead in shared memory: 221 MB per volume at the published shape. Where shared memory
    is small (containers give 64 or 128 MB) use num_workers=0.
    """
    dataset = VolumeDataset(volumes, shape, augment_seed)
    if not shuffle:  # DataLoader draws a seed for its workers: reading must not disturb the random numbers of training
        generator = torch.Generator()
    ahead = {"persistent_workers": True, "prefetch_factor": 1} if num_workers else {}
    batches = {"batch_size": batch_size, "shuffle": shuffle} if pieces is None else {"batch_sampler": pieces}
    return DataLoader(
        dataset,
        **batches,
        num_workers=num_workers,
        generator=generator,
        collate_fn=dataset.collate,
        worker_init_fn=_leave_stopping_to_the_main_process,
        pin_memory=pin,
        **ahead,
    )


def read_ahead(
    volumes: Sequence[Volume],
    shape: Sequence[int],
    pieces: Sequence[Sequence[int]],
    readers: int = 1,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """A Batch for each of `pieces` (indices into volumes), in order; while one is worked on, threads read the next.

    Reading spends its time where Python's lock is released. Unlike volume_loader's processes, threads need no shared
    memory, of which a container may have 64 MB; at most `readers` volumes, or the next piece, wait in memory, that of
    the `device` if one is given (see read_volume).
    """
    dataset = VolumeDataset(volumes, shape, device=device)
    waiting: deque[list] = deque()
    pool = ThreadPoolExecutor(max(1, readers))
    try:
        for piece in pieces:
            waiting.append([pool.submit(dataset.__getitem__, index) for index in piece])
            if sum(map(len, list(waiting)[1:])) >= readers:
                yield dataset.collate([item.result() for item in waiting.popleft()])
        while waiting:
            yield dataset.collate([item.result() for item in waiting.popleft()])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_stopping_to_the_main_process(worker: int) -> None:
    """Ctrl-C, `timeout` and the shell's `kill %1` signal every process of a group. The main one decides when to stop,
    and a step in flight still needs its batch: workers ignore Ctrl-C and leave the group.

    SIGTERM stays as torch has set it in a worker, in place of any handler of the main process: ended by that process it
    exits with 0. With the default action instead, torch would report a killed worker whenever a run ends early.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
