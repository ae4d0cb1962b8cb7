"""An axial and a coronal slice of a scan as pictures: through the place that moved a model's answer most, where that is
known, or with the most lung; never beside the body.

Axes of every array: z, x, y (to the head, the left and the back) of the cube that the model sees.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import minimum_filter
from torch import Tensor
from torch.nn import functional

from ctclip.data.body import body_mask, tokens_within
from ctclip.data.cohort import Volume
from ctclip.data.geometry import FIELD_OF_VIEW_MM
from ctclip.data.hounsfield import BODY, HU_MAX, LUNG
from ctclip.data.windows import Window
from ctclip.errors import UserError
from ctclip.evaluation.figures import import_matplotlib

WIDTH = 400  # pixels of a slice
QUALITY = 80  # of the JPEG
LEAST_TISSUE = 0.25  # in a plane that is shown, of the largest area of tissue in one
MARGIN_MM = 6.0  # around the body


@dataclass(frozen=True)
class Evidence:
    """What a run's model bases its answers on. `of` reads a volume: (the model's input (1, D, H, W) in HU / 1000, what
    each of T x h x w equal boxes of the cube adds to the logits of n labels (n, T, h, w)). `run` is its folder."""

    run: Path
    of: Callable[[Volume, Sequence[str]], tuple[Tensor, np.ndarray]]


class EvidenceError(UserError):
    """A model that cannot be asked: weights that cannot be used, or too little memory."""


class Slice(NamedTuple):
    """A JPEG as radiologists look: the patient's right on the left, front or head at the top. `ring`: the place in it,
    as shares of its width and height from the left and the top; None where it is not known."""

    plane: str
    jpeg: bytes
    shape: tuple[int, int]
    ring: tuple[float, float] | None


class Place(NamedTuple):
    """Shares of the cube's edges, of the planes that are shown; `found`: along which axes evidence says so."""

    z: float
    x: float
    y: float
    found: tuple[bool, bool, bool]

    @property
    def meaning(self) -> str:
        """Which slices they are."""
        if all(self.found):
            return "through the strongest evidence (ring)"
        if any(self.found):
            return "axial through the strongest evidence, coronal with the most lung"
        return "with the most lung"


class Body(NamedTuple):
    """(d, w, h) bool over the cube, coarser than a volume: what lies in the body, and what of it is tissue, or lung."""

    inside: np.ndarray
    tissue: np.ndarray
    lung: np.ndarray


def find_body(volume: Tensor) -> Body | None:
    """Of (1, D, H, W) = (1, z, x, y); None where nothing is as dense as tissue."""
    inside = body_mask(volume[None])
    steps = [-(-size // n) for size, n in zip(volume.shape[1:], inside.shape, strict=True)]
    hu = volume[0, :: steps[0], :: steps[1], :: steps[2]].numpy() * HU_MAX
    tissue = inside & (hu > BODY)
    if not tissue.any():
        return None
    lung = minimum_filter((hu > LUNG[0]) & (hu < LUNG[1]), size=3, mode="constant")  # no shells of partial volumes
    return Body(inside, tissue, lung & inside)


def place_shown(body: Body, contributions: np.ndarray | None) -> Place:
    """The planes to show: through the highest of `contributions` (T, h, w) within the body, if it is positive; along
    other axes, and without any, those with the most lung in the body, or the most tissue where there is no lung. Axial
    and coronal planes have at least LEAST_TISSUE: none is black, whatever the window and the mask."""
    most, inside, shares = body.lung if body.lung.any() else body.tissue, body.inside.copy(), []
    for axis in range(3):
        others = tuple(i for i in range(3) if i != axis)
        area = body.tissue.sum(axis=others)
        shown = area >= (LEAST_TISSUE if axis != 1 else 0) * area.max()  # no sagittal plane is shown
        shares.append(float(np.where(shown, most.sum(axis=others), -1).argmax() + 0.5) / len(area))
        inside &= np.expand_dims(shown, others)
    peak = None if contributions is None else _highest_within(contributions, inside)
    if contributions is None or peak is None:
        return Place(shares[0], shares[1], shares[2], (False, False, False))
    for axis, (i, size) in enumerate(zip(peak, contributions.shape, strict=True)):
        if size > 1:  # a value for a whole slice says nothing of x and y
            shares[axis] = (i + 0.5) / size
    depth, width, height = contributions.shape
    return Place(shares[0], shares[1], shares[2], (depth > 1, width > 1, height > 1))


def _highest_within(contributions: np.ndarray, inside: np.ndarray) -> tuple[int, ...] | None:
    """Index of the highest of (T, h, w) whose box lies in the body; None where none is positive."""
    depth, width, height = contributions.shape
    values = np.where(tokens_within(inside, (depth, width, height)), contributions, -np.inf)
    peak = np.unravel_index(values.argmax(), values.shape)
    return tuple(map(int, peak)) if values[peak] > 0 else None


def draw_slices(volume: Tensor, body: Body, place: Place, window: Window) -> tuple[Slice, Slice]:
    """The axial and the coronal slice of (1, D, H, W) through a place, cut to the body, WIDTH pixels across."""
    hu = volume[0].float()
    z, y = (int(share * size) for share, size in ((place.z, hu.shape[0]), (place.y, hu.shape[2])))
    (z0, z1), (x0, x1), (y0, y1) = (_extent(body.inside, axis) for axis in range(3))
    ringed = all(place.found)
    axial = _drawn("Axial", hu[z].T, (x0, x1), (y0, y1), (place.x, place.y) if ringed else None, window)
    coronal = hu[:, :, y].flip(0)
    head_first = (place.x, 1 - place.z) if ringed else None
    return axial, _drawn("Coronal", coronal, (x0, x1), (1 - z1, 1 - z0), head_first, window)


def _extent(inside: np.ndarray, axis: int) -> tuple[float, float]:
    """(from, to) of the body and a margin, as shares of the cube's edge."""
    there = np.flatnonzero(inside.any(axis=tuple(i for i in range(3) if i != axis)))
    margin, size = MARGIN_MM / FIELD_OF_VIEW_MM, inside.shape[axis]
    return max(0.0, there[0] / size - margin), min(1.0, (there[-1] + 1) / size + margin)


def _drawn(
    plane: str, hu: Tensor, across: tuple[float, float], down: tuple[float, float],
    place: tuple[float, float] | None, window: Window,
) -> Slice:  # fmt: skip
    """A plane (down, across) of the cube, whose parts are given as shares of its edges."""
    rows, columns = (slice(int(start * size), max(int(start * size) + 1, round(end * size)))
                     for (start, end), size in zip((down, across), hu.shape, strict=True))  # fmt: skip
    low, high = window.limits(unit=1000)
    shape = round(WIDTH * (down[1] - down[0]) / (across[1] - across[0])), WIDTH
    shown = functional.interpolate(hu[rows, columns].clamp(low, high)[None, None], shape, mode="bilinear")[0, 0]
    import_matplotlib()
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, shown.numpy(), vmin=low, vmax=high, cmap="gray", format="jpg", pil_kwargs={"quality": QUALITY})
    (left, right), (top, bottom) = across, down
    ring = place and ((place[0] - left) / (right - left), (place[1] - top) / (bottom - top))
    return Slice(plane, file.getvalue(), shape, ring)
