"""Are the voxels of a file Hounsfield units of a chest CT? Decided here and nowhere else, by what the voxels are like.

CT-RATE's version 1 stores raw values under a blank header, HU by the slope and intercept of a metadata row; version 2
stores HU by its own header. The folder tells the two apart, but files get moved, and both look like a NIfTI. Other
people's files hold windows, 0 to 255, standardised values or masks. So the voxels decide: `decide_hu` chooses between
the two readings, `check_reading` refuses one that was asked for. Both rest on the same shares of tissue.
"""

from __future__ import annotations

from math import ceil, isfinite, prod, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctclip.data.volume_file import VolumeError, file_error

HU_MIN, HU_MAX = -1000, 1000  # clipping window, Hounsfield units
SOFT, AIR, DENSE, PADDING = (-200, 200), (-1100, -650), 900, -1100  # HU; DENSE: above all soft tissue
BODY, LUNG = -500, (-950, -500)  # HU: above the one lie body and table; LUNG: most voxels of a piece of lung
NARROWEST_RANGE = 500  # HU from the least to the greatest voxel
CUT_OFF = 0.005  # share of voxels at the greatest value, below 900 HU, from which they were cut off there (a window)
LEAST_AIR, LEAST_BODY, LEAST_SOFT, MOST_DENSE, MOST_BELOW = 0.02, 0.005, 0.3, 0.2, 0.1  # see TissueShares
LEAST_AIR_HU = -900  # the least voxel of any CT lies below
MOST_FILLED = 0.2  # of all voxels at one value of tissue; noise leaves 0.02, a circular field of view fills 0.21
SAMPLED_VOXELS = 250_000
MOST_SHIFT_MM = 15.0  # from its place, by air at one end; the depth of CT-CLIP's tokens
FEWEST_ORDERED = 12  # slices from which their order is judged
DISORDER = 1.15  # neighbours differ by so many times what they would in another order; in scans in order by 0.9 times
DISTANT = 0.8  # ... of what slices a quarter of the scan apart differ by; in scans in order 0.2 to 0.6
LARGEST_STORED = 1e9  # of a voxel, far beyond metal by any scale
MOST_EQUAL = 1 << 28  # voxels of one value, from the start, after which the rest is not waited for

Scale = tuple[float, float]  # slope, intercept


class TissueShares:
    """Where voxels lie if a reading is right. `padding` (all at the least value, below any HU) is a share of all,
    `air`, `body` and `below` (noise below any HU, where scaling moved air) of the rest, `soft` and `dense` of the body:
    in a wide field of view the body is small."""

    def __init__(self, hu: np.ndarray):
        lowest = float(hu.min())
        seen = hu[hu > lowest] if lowest < PADDING else hu
        body = seen[seen > BODY]

        def share(values: np.ndarray, low: float, high: float) -> float:
            return np.count_nonzero((values >= low) & (values <= high)) / max(values.size, 1)

        self.padding, self.body = 1 - seen.size / hu.size, body.size / max(seen.size, 1)
        self.air, self.below = share(seen, *AIR), share(seen, -np.inf, PADDING)
        self.soft, self.dense = share(body, *SOFT), share(body, DENSE, np.inf)
        self.low, self.high = (float(seen.min()), float(seen.max())) if seen.size else (lowest, lowest)
        self.at_low, self.at_high = share(seen, self.low, self.low), share(seen, self.high, self.high)
        between = np.unique(seen[(seen > BODY) & (seen < DENSE)], return_counts=True)
        self.filled = float(between[1].max()) / seen.size if between[1].size else 0.0
        self.filling = float(between[0][between[1].argmax()]) if between[1].size else 0.0

    @property
    def fault(self) -> str | None:
        """Why these are not the HU of a chest CT; None where they may be."""
        if self.padding > 0.98 or self.body < LEAST_BODY:
            return "no body"
        if self.high - self.low < NARROWEST_RANGE:
            return f"nothing but {self.low:g} to {self.high:g}"
        if self.air < LEAST_AIR:
            return "no air"
        if self.at_high > CUT_OFF and self.high < DENSE:
            return f"everything cut off at {self.high:g} (a window)"
        if self.at_low > CUT_OFF and self.low > LEAST_AIR_HU:
            return f"everything cut off at {self.low:g} (a window)"
        if self.filled > MOST_FILLED:
            return f"{self.filled:.0%} of all voxels exactly {self.filling:g} (filled in)"
        if self.below > MOST_BELOW or self.soft < LEAST_SOFT or self.dense > MOST_DENSE:
            return "tissue where none lies"
        return None

    def __str__(self) -> str:
        tissue = f"air {self.air:.0%}; of the body soft tissue {self.soft:.0%}, above {DENSE} HU {self.dense:.1%}"
        return f"{tissue}; {self.low:g} to {self.high:g}"


class VoxelStatistics:
    """Minimum and maximum of all voxels of a file and a regular sample of them, as stored."""

    def __init__(self, shape: tuple[int, ...], path: Path):
        self.path = path
        self.step = ceil(sqrt(max(1, prod(shape) / SAMPLED_VOXELS)))
        self.minimum, self.maximum = float("inf"), float("-inf")
        self.seen = 0
        self.gaps = self._equal = 0  # slices of one value between others; since the last other
        self._sample: list[np.ndarray] = []

    def add(self, index: int, stored: np.ndarray) -> None:
        """One slice. Raises VolumeError where a voxel is no number, or hundreds of slices are all of one value."""
        low, high = float(stored.min()), float(stored.max())
        if not (isfinite(low) and isfinite(high)):
            raise file_error(self.path, f"NaN or infinite voxels (slice {index})", "numbers", "leave the volume out")
        if max(-low, high) > LARGEST_STORED:
            found = f"a voxel of {low if -low > high else high:g} (slice {index})"
            raise file_error(self.path, found, f"at most {LARGEST_STORED:g}", "leave the volume out")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if low < high:
            self.gaps, self._equal = self.gaps + self._equal, 0
        elif self.minimum < self.maximum:
            self._equal += 1
        self.seen += stored.size
        if self.seen > MOST_EQUAL:
            self.check_varied()
        self._sample.append(stored[:: self.step, :: self.step].astype(np.float32))

    def shares(self, header_scale: Scale, metadata_scale: Scale | None) -> dict[str, TissueShares]:
        """Where the voxels lie by each reading."""
        scales = {"hu": header_scale} | ({} if metadata_scale is None else {"stored": metadata_scale})
        values = np.stack(self._sample).ravel()
        with np.errstate(over="ignore"):  # to infinity, which is no tissue
            return {reading: TissueShares(values * slope + intercept) for reading, (slope, intercept) in scales.items()}

    def planes(self, axis: int) -> tuple[np.ndarray, int]:
        """(the sample's planes along a file axis, fastest first: (n, voxels), as stored; every how many it has)."""
        sample = np.moveaxis(np.stack(self._sample), 2 - axis, 0)
        return sample.reshape(len(sample), -1), 1 if axis == 2 else self.step

    def check_varied(self) -> None:
        """Raises VolumeError where all voxels so far are equal."""
        if self.minimum == self.maximum:
            raise file_error(self.path, f"every voxel equal to {self.minimum:g}", "a picture", "leave the volume out")


class HuDecision(NamedTuple):
    """How a file's voxels are read ("hu": by the header, "stored": by the metadata row), folder and reason, and what a
    reader of the answers should know about the scan."""

    reading: str
    evidence: str
    notes: tuple[str, ...] = ()


def decide_hu(
    statistics: VoxelStatistics,
    header_scale: Scale = (1.0, 0.0),
    metadata_scale: Scale | None = None,
    version_2: bool | None = None,
    blank_header: bool = False,
) -> HuDecision:
    """Whether stored values are HU by the header's scale or by the metadata row's.

    The voxels decide; the folder (`version_2`; None: unknown) is recorded, and a contradiction is said. Raises
    VolumeError where neither reading looks like a chest CT, or two different ones do.
    """
    if metadata_scale is None:
        check_reading(statistics, header_scale, None)
        reading, why = "hu", "no metadata row"
    elif metadata_scale == header_scale:
        by_row = version_2 is False or (version_2 is None and blank_header)
        reading, why = "stored" if by_row else "hu", "both readings are the same"
        check_reading(statistics, header_scale, None)
    else:
        shares = statistics.shares(header_scale, metadata_scale)
        plausible = [reading for reading, share in shares.items() if share.fault is None]
        if len(plausible) != 1:
            described = "; ".join(f"as {each}: {share}" for each, share in shares.items())
            found = f"{'both readings' if plausible else 'no reading'} plausible ({described})"
            raise VolumeError(f"{statistics.path.name}: ambiguous, found {found}, expected exactly one; check its "
                              "RescaleIntercept or leave it out")
        reading, why = plausible[0], "the other does not look like a CT"
    folder = {None: "folder unknown", True: "version-2 folder", False: "version-1 folder"}[version_2]
    if version_2 is not None and version_2 != (reading == "hu"):
        folder += " (contradicted by the voxels)"
    return HuDecision(reading, f"{folder}; read as {reading}: {why}")


def check_reading(statistics: VoxelStatistics, header_scale: Scale, metadata_scale: Scale | None) -> None:
    """Raises VolumeError where the voxels are no HU of a chest CT by the scale that was asked for: the metadata row's,
    or the header's where that is None."""
    shares = statistics.shares(header_scale, metadata_scale)
    asked = shares["hu" if metadata_scale is None else "stored"]
    if asked.fault is None:
        return
    if metadata_scale is not None and shares["hu"].fault is None:
        found = f"voxels that are HU already ({shares['hu']})"
        raise file_error(statistics.path, found, "raw stored values for this metadata", "pass metadata=None")
    found = f"voxels that are not HU: {asked.fault} ({asked})"
    remedy = "convert it (raw values need their metadata row); prediction takes it as it is with --assume-hu"
    raise file_error(statistics.path, found, "a chest CT's HU", remedy)


def slice_notes(statistics: VoxelStatistics, axis: int, spacing: float, scale: Scale) -> list[str]:
    """What may be wrong with the axial slices, which follow each other along that file axis (fastest first), a line
    each: slices of one value at an end, and neighbours that are not alike."""
    planes, step = statistics.planes(axis)
    with np.errstate(over="ignore", invalid="ignore"):  # a scale that is no HU, taken as asked for
        hu = (planes * scale[0] + scale[1]).astype(np.float32)
    varied = np.flatnonzero(hu.min(axis=1) < hu.max(axis=1))
    if not varied.size:
        return []
    count, first, last = len(hu), int(varied[0]), int(len(hu) - 1 - varied[-1])
    shift = abs(first - last) * step * spacing / 2
    notes = []
    for name, number, value in (("first", first, hu[0, 0]), ("last", last, hu[-1, 0])):
        if not number:
            continue
        which = f"{name} of {count} slices holds" if number == step == 1 else (
            f"{name} {number * step} of {count * step} slices hold")
        found = f"the {which} one value, {value:g}: padding?"
        if value > HU_MIN:  # else they are what preprocessing pads with itself, and may only move the anatomy
            notes.append(found)
        elif shift > MOST_SHIFT_MM and number == max(first, last):
            notes.append(f"{found} It moves the anatomy by {shift:.0f} mm")
    # Only neighbours tell: where slices run across the file's slowest axis, a large file's sample has not all of them.
    if step == 1:
        stored = planes[varied]
        if repeated := int((stored[1:] == stored[:-1]).all(axis=1).sum()):
            notes.append(f"{repeated} of {count} slices equal the one before: repeated?")
        if disorder := _disorder(np.clip(hu[varied], HU_MIN, HU_MAX)):
            notes.append(disorder)
    return notes


def _disorder(slices: np.ndarray) -> str | None:
    """What says that slices (n, voxels) do not lie in their order; None where nothing does."""
    count = len(slices)
    if count < FEWEST_ORDERED:
        return None

    def apart(places: int, ordered: np.ndarray = slices) -> float:
        return float(np.abs(ordered[places:] - ordered[:-places]).mean())

    neighbours = apart(1)
    for start in (0, 1):
        order = sorted(range(start, start + count), key=str)  # numbers of the slices as stored
        if neighbours > DISORDER * apart(1, slices[np.argsort(order)]):
            return "neighbouring slices are little alike: stacked in the order of names as text (1, 10, 11, ..., 2)?"
    halves = np.r_[0:count:2, 1:count:2]
    others = (apart(1, slices[order]) for order in (halves, np.argsort(halves)))
    if neighbours > DISORDER * min(others) or (neighbours > DISTANT * apart(count // 4) and _shuffled(slices)):
        return "neighbouring slices are no more alike than others: stacked out of order?"
    return None


def _shuffled(slices: np.ndarray) -> bool:
    """Whether slices have others that are more alike than their neighbours; those of one shape and noise have none."""
    nearest, neighbours = [], []
    for index in range(len(slices) - 1):
        differences = np.abs(slices - slices[index]).mean(axis=1)
        neighbours.append(differences[index + 1])
        nearest.append(np.delete(differences, index).min())
    return float(np.mean(neighbours)) > DISORDER * float(np.mean(nearest))
