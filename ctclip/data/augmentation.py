"""Random changes of a volume for training."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SHIFT = 0.03  # of each axis: how a patient lies on the table
GAIN, OFFSET = 0.05, 0.02  # of HU / 1000: how scanners are calibrated, how much contrast medium there is
NOISE = 0.02  # largest standard deviation, HU / 1000: dose and kernel

Box = tuple[slice, slice, slice]  # along D, H, W


@dataclass(frozen=True)
class Augmentation:
    """How training volumes are changed. What is drawn for a volume follows from `seed` and its name alone: one seed per
    epoch gives the epoch's tensors again, in any order, worker or resumed run.

    scanner: `augment`. crop: (D, H, W) of a random crop, which also takes the shift's place. jitter: each end of the
    `window` (low, high) is moved by up to so many HU.
    """

    seed: int
    scanner: bool = True
    crop: tuple[int, int, int] | None = None
    jitter: float = 0.0
    window: tuple[float, float] = (-1000.0, 1000.0)

    def generator(self, name: str) -> torch.Generator:
        """To be given to `box`, then to `change`."""
        seed = zlib.crc32(f"{self.seed} {name}".encode())  # hash() differs between processes
        return torch.Generator().manual_seed(seed)

    def box(self, shape: Sequence[int], generator: torch.Generator) -> Box | None:
        """The crop of a volume of `shape` (D, H, W); None for all of it."""
        return None if self.crop is None else random_box(shape, self.crop, generator)

    def change(self, volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(1, D, H, W) float32 in [-1, 1], in place."""
        if self.scanner:
            augment(volume, generator, SHIFT if self.crop is None else 0.0)
        return jitter_window(volume, self.window, self.jitter, generator) if self.jitter else volume


def random_box(shape: Sequence[int], crop: Sequence[int], generator: torch.Generator) -> Box:
    """A random place for a crop of a volume, for indexing; along an axis that is shorter than it, all of that."""
    room = [max(0, size - edge) for size, edge in zip(shape, crop, strict=True)]
    starts = [int(torch.randint(0, most + 1, (), generator=generator)) for most in room]
    depth, rows, columns = (slice(start, start + edge) for start, edge in zip(starts, crop, strict=True))
    return depth, rows, columns


def jitter_window(
    volume: torch.Tensor, window: tuple[float, float], most: float, generator: torch.Generator
) -> torch.Tensor:
    """Each end of `window` (HU) moved by up to `most`: `volume`, HU / 1000 in [-1, 1], changed in place so that what a
    model sees in `window` afterwards lay in the moved one before. `most` is below half of the window's width."""
    low, high = (end / 1000 for end in window)
    moved_low, moved_high = (
        end + most / 1000 * (2 * torch.rand((), generator=generator).item() - 1) for end in (low, high)
    )
    factor = (high - low) / (moved_high - moved_low)
    return volume.sub_(moved_low).mul_(factor).add_(low).clamp_(-1, 1)


def augment(volume: torch.Tensor, generator: torch.Generator, shift: float = SHIFT) -> torch.Tensor:
    """Another plausible scan of the same patient: `volume` (1, D, H, W) float32 in [-1, 1], changed in place.

    Moved by up to `shift` of each axis (whole voxels, -1 = air moves in), HU times 1 +- GAIN plus +- OFFSET, Gaussian
    noise of a deviation drawn from [0, NOISE], clipped to [-1, 1]. Never mirrored: left and right are findings (situs,
    aortic arch, liver). Works slice by slice, so it needs the memory of two slices.
    """
    most = [round(shift * size) for size in volume.shape[1:]]
    shifts = [int(torch.randint(-n, n + 1, (), generator=generator)) for n in most]
    gain = 1 + GAIN * (2 * torch.rand((), generator=generator).item() - 1)
    offset = OFFSET * (2 * torch.rand((), generator=generator).item() - 1)
    sigma = NOISE * torch.rand((), generator=generator).item()
    depth, rows, columns = volume.shape[1:]
    (to_row, from_row), (to_column, from_column) = _moved(rows, shifts[1]), _moved(columns, shifts[2])
    moved, noise = torch.empty(rows, columns), torch.empty(rows, columns)
    for k in range(depth) if shifts[0] < 0 else reversed(range(depth)):  # a slice is read before it is overwritten
        moved.fill_(-1)
        if 0 <= k - shifts[0] < depth:
            moved[to_row, to_column] = volume[0, k - shifts[0], from_row, from_column]
        moved.mul_(gain).add_(offset).add_(noise.normal_(generator=generator), alpha=sigma)
        torch.clamp(moved, -1, 1, out=volume[0, k])
    return volume


def _moved(size: int, by: int) -> tuple[slice, slice]:
    """Where to and where from along an axis that is moved."""
    return slice(max(by, 0), size + min(by, 0)), slice(max(-by, 0), size + min(-by, 0))
