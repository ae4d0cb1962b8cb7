"""Are the voxels of a file Hounsfield units? Decided here and nowhere else, by what the voxels are like.

CT-RATE's version 1 stores raw values under a blank header, HU by the slope and intercept of a metadata row; version 2
stores HU by its own header. The folder tells the two apart, but files get moved, and both look like a NIfTI. So the
voxels decide: `decide_hu` chooses between the two readings, `check_reading` refuses one that was asked for and that
they contradict. Both rest on the same shares of tissue and the same limits.
"""

from __future__ import annotations

from math import ceil, isfinite, prod, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctclip.data.volume_file import Header, VolumeError, file_error

HU_MIN, HU_MAX = -1000, 1000  # clipping window, Hounsfield units
SOFT, AIR, DENSE, PADDING = (-200, 200), (-1100, -650), 900, -1100  # HU; DENSE: above all soft tissue
AIR_VISIBLE = 0.02  # share from which air is seen to lie where it should
MOST_DENSE, MOST_DENSE_BESIDE_AIR = 0.03, 0.08  # of what is not padding
SAMPLED_VOXELS = 1_000_000

Scale = tuple[float, float]  # slope, intercept


class TissueShares:
    """Where voxels lie if a reading is right: `padding` is a share of all, the others of what is not padding."""

    def __init__(self, hu: np.ndarray):
        seen = hu[hu >= PADDING]
        ranges = (AIR, SOFT, (DENSE, np.inf))
        shares = [np.count_nonzero((seen >= low) & (seen <= high)) / max(seen.size, 1) for low, high in ranges]
        self.padding, (self.air, self.soft, self.dense) = 1 - seen.size / max(hu.size, 1), shares
        self.air_visible = self.air >= AIR_VISIBLE
        # More above DENSE than bone, metal and contrast medium give. Where air is seen, they may give more.
        self.too_dense = self.dense > (MOST_DENSE_BESIDE_AIR if self.air_visible else MOST_DENSE)
        # Soft tissue where it belongs and next to nothing above bone. Raw values with offset 1024 read as HU put lung
        # and air into the soft window, so that share alone misleads; but then all soft tissue is DENSE, and nothing is
        # left where air should be.
        self.plausible = self.padding <= 0.98 and self.soft >= 0.05 and not self.too_dense

    def __str__(self) -> str:
        tissue = f"air {self.air:.0%}, soft tissue {self.soft:.0%}, above {DENSE} HU {self.dense:.1%}"
        return f"{tissue}, padding {self.padding:.0%}"


class VoxelStatistics:
    """Minimum and maximum of all voxels of a file and a regular sample of them, as stored."""

    def __init__(self, shape: tuple[int, ...], path: Path):
        self.path = path
        self.step = ceil(sqrt(max(1, prod(shape) / SAMPLED_VOXELS)))
        self.minimum, self.maximum = float("inf"), float("-inf")
        self._sample: list[np.ndarray] = []

    def add(self, index: int, stored: np.ndarray) -> None:
        """One slice. Raises VolumeError where a voxel is no number."""
        low, high = float(stored.min()), float(stored.max())
        if not (isfinite(low) and isfinite(high)):
            raise file_error(self.path, f"NaN or infinite voxels (slice {index})", "numbers", "leave the volume out")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self._sample.append(stored[:: self.step, :: self.step].astype(np.float32).ravel())

    def shares(self, header_scale: Scale, metadata_scale: Scale | None) -> dict[str, TissueShares]:
        """Where the voxels lie by each reading."""
        scales = {"hu": header_scale} | ({} if metadata_scale is None else {"stored": metadata_scale})
        values = np.concatenate(self._sample)
        return {reading: TissueShares(values * slope + intercept) for reading, (slope, intercept) in scales.items()}

    def check_varied(self) -> None:
        """After the last slice: raises VolumeError where all voxels are equal."""
        if self.minimum == self.maximum:
            raise file_error(self.path, f"every voxel equal to {self.minimum:g}", "a picture", "leave the volume out")


class HuDecision(NamedTuple):
    """How a file's voxels are read ("hu": by the header, "stored": by the metadata row), and folder and reason."""

    reading: str
    evidence: str


def decide_hu(
    statistics: VoxelStatistics,
    header_scale: Scale = (1.0, 0.0),
    metadata_scale: Scale | None = None,
    version_2: bool | None = None,
    blank_header: bool = False,
) -> HuDecision:
    """Whether stored values are HU by the header's scale or by the metadata row's.

    The voxels decide; the folder (`version_2`; None: unknown) is recorded, and a contradiction is said. Raises
    VolumeError where the readings differ and neither or both look like a CT, or where there is no metadata row and the
    header's reading does not look like one.
    """
    shares = statistics.shares(header_scale, metadata_scale)
    plausible = [reading for reading, share in shares.items() if share.plausible]
    if metadata_scale is not None and tuple(metadata_scale) == tuple(header_scale):
        by_row = version_2 is False or (version_2 is None and blank_header)
        reading, why = "stored" if by_row else "hu", "both readings are the same"
    elif len(plausible) == 1:
        reading, why = plausible[0], "the other does not look like a CT" if metadata_scale else "no metadata row"
    else:
        described = "; ".join(f"as {reading}: {share}" for reading, share in shares.items())
        found = f"{'both readings' if plausible else 'no reading'} plausible ({described})"
        remedy = "check its RescaleIntercept" if metadata_scale else "add its metadata row"
        name = statistics.path.name
        raise VolumeError(f"{name}: ambiguous, found {found}, expected exactly one; {remedy} or leave it out")
    folder = {None: "folder unknown", True: "version-2 folder", False: "version-1 folder"}[version_2]
    if version_2 is not None and version_2 != (reading == "hu"):
        folder += " (contradicted by the voxels)"
    return HuDecision(reading, f"{folder}; read as {reading}: {why}")


def check_reading(statistics: VoxelStatistics, header: Header, metadata_scale: Scale | None) -> None:
    """Raises VolumeError where the voxels clearly contradict how a file is read: by the metadata row's scale, or by
    the header's where that is None.

    Less than `decide_hu` asks for, which must choose: a picture that is no chest may be read as it was asked for.
    """
    header_scale = header.slope, header.intercept
    if metadata_scale == header_scale:
        return
    shares = statistics.shares(header_scale, metadata_scale)
    as_hu = shares["hu"]
    if metadata_scale is None:
        if as_hu.too_dense and not as_hu.air_visible:
            found, remedy = f"raw stored values ({as_hu})", "pass metadata with RescaleSlope and RescaleIntercept"
            raise file_error(statistics.path, found, "HU", remedy)
    # Air must be visible: raw values of a nearly empty picture would pass as soft tissue otherwise.
    elif as_hu.plausible and as_hu.air_visible and not shares["stored"].plausible:
        found = f"voxels that are HU already ({as_hu})"
        raise file_error(statistics.path, found, "raw stored values for this metadata", "pass metadata=None")
