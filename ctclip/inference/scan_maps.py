"""The maps of one scan in memory, as every writer takes them: the scan, its decisions, and its evidence in the body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor

from ctclip.data.body import body_mask, tokens_within
from ctclip.data.geometry import FIELD_OF_VIEW_MM, Placement
from ctclip.inference.contributions import Contributions
from ctclip.inference.decisions import Decision

MIDLINE_MM = 20.0  # on either side


@dataclass(frozen=True, eq=False)
class ScanMaps:
    """n labels of a scan.

    name: of the scan, without suffix. placement: of its file in the model's cube. voxels (1, 1, D, H, W): what the
    model has seen, HU / 1000, on its device. decisions: as its reader is told them; others: those of the findings
    without a map. contributions: of the n logits. body: bool (d, h, w) over the cube, coarser than the voxels.
    """

    name: str
    placement: Placement
    voxels: Tensor
    labels: tuple[str, ...]
    decisions: tuple[Decision, ...]
    others: tuple[Decision, ...]
    contributions: Contributions
    body: np.ndarray

    @cached_property
    def tokens_in_body(self) -> np.ndarray:
        """(T, h, w) bool"""
        return tokens_within(self.body, self.contributions.values.shape[1:])

    @cached_property
    def values(self) -> np.ndarray:
        """(n, T, h, w) float32: the contributions of tokens in the body, 0 elsewhere."""
        return np.where(self.tokens_in_body, self.contributions.values, np.float32(0))

    @cached_property
    def highest(self) -> np.ndarray:
        """(n,) the highest value of each map; 0 where no token in the body raises the logit."""
        return self.values.max((1, 2, 3))

    def select(self, labels: Sequence[str]) -> ScanMaps:
        """The same of some of its labels."""
        index = [self.labels.index(label) for label in labels]
        left = tuple(d for label, d in zip(self.labels, self.decisions, strict=True) if label not in labels)
        made = self.contributions
        return replace(
            self, labels=tuple(labels), decisions=tuple(self.decisions[i] for i in index), others=left + self.others,
            contributions=Contributions(made.values[index], made.logits[index], made.remainder[index]),
        )  # fmt: skip

    @property
    def tops(self) -> np.ndarray:
        """(n,) value at the upper end of each map's colours, which begin at 0: the highest contribution, wherever it
        lies, is as bright as the answer is high (`brightness`). Not above 0 where nothing raises the logit."""
        return self.contributions.values.max((1, 2, 3)) / [brightness(decision) for decision in self.decisions]

    @cached_property
    def reached(self) -> np.ndarray:
        """(n,) share of the scale that the brightest point of each map reaches: less than `brightness` where the
        highest contribution lies outside the body."""
        return np.divide(self.highest, self.tops, out=np.zeros(len(self.labels)), where=self.highest > 0)

    @cached_property
    def outside(self) -> np.ndarray:
        """(n,) share of what raises each logit that lies outside the body, 0 where nothing does."""
        raising = np.maximum(self.contributions.values, 0)
        beyond, total = (raising * ~self.tokens_in_body).sum((1, 2, 3)), raising.sum((1, 2, 3))
        return np.divide(beyond, total, out=np.zeros(len(self.labels)), where=total > 0)


def brightness(decision: Decision) -> float:
    """Of a map's highest contribution, as a share of the colour scale: 0.5 at the threshold, in proportion to the
    probability down to 0.001 and up to 1. 1 without a threshold.

    The highest contributions themselves make no such scale: where they are the same in every scan, 19 % of the true
    positives of a linear head on phantoms, and 52 % of an attention head's, stand out from 95 % of the negatives.
    """
    p, cut = decision.probability, decision.threshold
    if cut is None:
        return 1.0
    if p < cut:
        return max(0.5 * p / cut, 0.001)
    return 0.5 + 0.5 * (p - cut) / (1 - cut) if cut < 1 else 1.0


def scan_maps(
    name: str,
    placement: Placement,
    voxels: Tensor,
    labels: Sequence[str],
    decisions: Sequence[Decision],
    contributions: Contributions,
) -> ScanMaps:
    """`decisions`: on all findings of the model; `contributions`: of `labels`, in that order."""
    of_label = {decision.finding: decision for decision in decisions}
    others = tuple(decision for decision in decisions if decision.finding not in labels)
    return ScanMaps(
        name,
        placement,
        voxels,
        tuple(labels),
        tuple(of_label[label] for label in labels),
        others,
        contributions,
        body_mask(voxels),
    )


def neighbours(shares: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of places on an axis of `size` equal boxes, as shares of its edge: the boxes whose centres lie before and behind,
    and the weight of the one behind, for linear interpolation; beyond the outermost centres it is held."""
    place = np.clip(shares * size - 0.5, 0, size - 1)
    before = place.astype(int)
    return before, np.minimum(before + 1, size - 1), (place - before).astype(np.float32)


def interpolate(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(h, w) over the cube at those shares of its edges, linearly: (len(rows), len(columns)). By indexing: planes are
    too small for BLAS, whose threads spend five times as long on waiting."""
    before, behind, part = neighbours(rows, values.shape[0])
    values = values[before] * (1 - part[:, None]) + values[behind] * part[:, None]
    before, behind, part = neighbours(columns, values.shape[1])
    between, other = values[:, before], values[:, behind]
    between *= 1 - part
    other *= part
    between += other
    return between


def strongest_token(values: np.ndarray) -> tuple[int, int, int]:
    """Of (T, h, w), the first of the highest."""
    return tuple(int(i) for i in np.unravel_index(values.argmax(), values.shape))  # type: ignore[return-value]


def scan_position(placement: Placement, cube_axis: int) -> np.ndarray:
    """Of the scan's voxels along an axis of the cube, as shares of its edge."""
    return placement.position[placement.axes.index(cube_axis)]


def scan_extent(placement: Placement, cube_axis: int) -> tuple[float, float]:
    """(from, to) of the scan along an axis of the cube, as shares of its edge: to the outer sides of its voxels."""
    position, spacing = scan_position(placement, cube_axis), placement.spacing[placement.axes.index(cube_axis)]
    voxel = abs(position[1] - position[0]) if len(position) > 1 else spacing / FIELD_OF_VIEW_MM
    return float(position.min() - voxel / 2), float(position.max() + voxel / 2)


def strongest_place(maps: ScanMaps, label: int) -> tuple[float, float, float]:
    """(z, x, y), as shares of the cube's edges, of a label's strongest evidence: the centre of its token. The middle of
    the body where there is none."""
    if maps.highest[label] <= 0:
        sides = (np.flatnonzero(maps.body.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
        shares = [(side[0] + side[-1] + 1) / 2 / size for side, size in zip(sides, maps.body.shape, strict=True)]
    else:
        grid = maps.values.shape[1:]
        shares = [(i + 0.5) / n for i, n in zip(strongest_token(maps.values[label]), grid, strict=True)]
    positions = (scan_position(maps.placement, axis) for axis in range(3))
    z, x, y = (float(np.clip(at, p.min(), p.max())) for at, p in zip(shares, positions, strict=True))
    return z, x, y


def slice_number(placement: Placement, cube_axis: int, at: float) -> tuple[int, int]:
    """(number, of how many) of the file's slice nearest to a place, counted from 1: from the head, the patient's right,
    or the front, whatever the order in the file."""
    position = scan_position(placement, cube_axis)
    nearest = position[np.abs(position - at).argmin()]
    before = position > nearest if cube_axis == 0 else position < nearest
    return int(before.sum()) + 1, len(position)


def millimetres_below_top(placement: Placement, at: float) -> float:
    return (scan_extent(placement, 0)[1] - at) * FIELD_OF_VIEW_MM


def location_words(maps: ScanMaps, label: int) -> str:
    """Where a label's strongest evidence lies, as far as that is known: side, depth and height."""
    z, x, y = strongest_place(maps, label)
    below = f"{millimetres_below_top(maps.placement, z):.0f} mm below the top of the scan"
    level = maps.body[min(int(z * len(maps.body)), len(maps.body) - 1)]
    x_side, y_side = np.flatnonzero(level.any(1)), np.flatnonzero(level.any(0))
    if not len(x_side):
        return below
    low, high = x_side[0] / level.shape[0], (x_side[-1] + 1) / level.shape[0]
    offset = (x - (low + high) / 2) * FIELD_OF_VIEW_MM
    scan_low, scan_high = np.clip(scan_extent(maps.placement, 1), 0, 1)
    is_whole = min(low - scan_low, scan_high - high) > 0.5 / level.shape[0]  # else its middle is not the patient's
    side = "on the patient's" if is_whole else "towards the patient's"
    side = f"{side} {'left' if offset > 0 else 'right'}"
    if abs(offset) < MIDLINE_MM:
        side = "near the midline" if is_whole else "in the middle of the scan"
    depth = (y * level.shape[1] - y_side[0]) / (y_side[-1] + 1 - y_side[0])
    third = ("anterior", "middle", "posterior")[min(2, max(0, int(3 * depth)))]
    return f"{side}, in the {third} third of the body, {below}"
