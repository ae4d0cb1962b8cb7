"""Random changes of a volume for training."""

from __future__ import annotations

import torch

SHIFT = 0.03  # of each axis: how a patient lies on the table
GAIN, OFFSET = 0.05, 0.02  # of HU / 1000: how scanners are calibrated, how much contrast medium there is
NOISE = 0.02  # largest standard deviation, HU / 1000: dose and kernel


def augment(volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Another plausible scan of the same patient: `volume` (1, D, H, W) float32 in [-1, 1], changed in place.

    Moved by up to SHIFT of each axis (whole voxels, -1 = air moves in), HU times 1 +- GAIN plus +- OFFSET, Gaussian
    noise of a deviation drawn from [0, NOISE], clipped to [-1, 1]. Never mirrored: left and right are findings (situs,
    aortic arch, liver). Works slice by slice, so it needs the memory of two slices.
    """
    most = [round(SHIFT * size) for size in volume.shape[1:]]
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
