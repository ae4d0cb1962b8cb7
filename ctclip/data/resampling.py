"""Trilinear resampling of a file's slices as they come, into the cube: by numpy on the CPU, or by torch on a device.

Neither the file nor a float copy of it is ever held whole. `ResamplingPlan` says what happens to which slice; both
resamplers take the slices in file order by `add`, and end with `finish`.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ctclip.data.geometry import CropPad, FileGeometry
from ctclip.data.hounsfield import HU_MAX, HU_MIN
from ctclip.data.volume_file import Header, file_error, shape_text

CACHE_LINE = 16  # float32 values


class InterpolationWeights(NamedTuple):
    """One axis of the output box that survives the crop: value = (1 - weight) * [low] + weight * [high]."""

    box: slice  # where the values go in the output
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, size: int, spacing: float, target_size: int, backwards: bool) -> InterpolationWeights | None:
        """Where each output voxel lies between the inputs; None if the axis is too short to give a single voxel."""
        fit = CropPad.of(size, spacing, target_size)
        if fit.resampled < 1:
            return None
        count = min(fit.resampled, target_size)
        # torch's align_corners=False source index: the grid follows from the sizes. In float64, as published (nibabel's
        # arrays are); a float32 grid is up to 4e-6 off in the result.
        source = np.maximum((np.arange(fit.crop, fit.crop + count) + 0.5) * (size / fit.resampled) - 0.5, 0)
        low = np.minimum(source.astype(np.intp), size - 1)
        high = np.minimum(low + 1, size - 1)
        weight = np.clip(source - low, 0, 1).astype(np.float32)
        if backwards:  # only the look-up is turned round, so every orientation gives the same arithmetic
            low, high = size - 1 - low, size - 1 - high
        return cls(slice(fit.pad, fit.pad + count), low, high, weight)

    @property
    def span(self) -> slice:
        """The stretch of input that is used at all."""
        used = np.concatenate([self.low, self.high])
        return slice(int(used.min()), int(used.max()) + 1)


class ResamplingPlan:
    """Which slices of a file are needed, what is cut out of each, which output slices it completes, where these go."""

    def __init__(self, header: Header, geometry: FileGeometry, out: torch.Tensor, path: Path):
        shape, axes = tuple(out.shape[1:]), geometry.cube_axes
        each = zip(header.shape, geometry.spacing, axes, geometry.backwards, strict=True)
        weights = [InterpolationWeights.of(size, mm, shape[axis], backwards) for size, mm, axis, backwards in each]
        fast, middle, slow = weights
        if fast is None or middle is None or slow is None:
            found = f"{shape_text(header.shape)} voxels of {shape_text(geometry.spacing)} mm"
            expected = f"at least one voxel of the {shape_text(shape)} input"
            raise file_error(path, found, expected, "check the spacing")
        self.fast, self.middle, self.slow = fast, middle, slow
        self.crop = self.middle.span, self.fast.span
        self.rows, self.columns = (span.stop - span.start for span in self.crop)
        self.target = out[0].permute(axes[2], axes[0], axes[1])[self.slow.box, self.fast.box, self.middle.box]
        self.completes: dict[int, list[int]] = {}  # index of a slice -> output slices that wait for no other
        for position, (low, high) in enumerate(zip(self.slow.low, self.slow.high, strict=True)):
            self.completes.setdefault(int(max(low, high)), []).append(position)
        self.needed = {*self.slow.low.tolist(), *self.slow.high.tolist()}
        self.slope, self.intercept = geometry.slope, geometry.intercept
        # float32 holds these sums exactly; anything else is scaled in float64, one slice at a time.
        whole = header.dtype.kind in "iu" and self.intercept.is_integer()
        self.exact = self.slope == 1 and (whole or (header.dtype.itemsize <= 4 and self.intercept == 0))


class NumpyResampler:
    """Writes output slices as soon as they are complete; holds two input slices at a time."""

    def __init__(self, header: Header, geometry: FileGeometry, out: torch.Tensor, path: Path):
        self.plan = plan = ResamplingPlan(header, geometry, out, path)
        # Rows an odd number of cache lines long, the last voxels unused: those of a column would share a few places in
        # the cache if they were a power of two apart, and transposing a plane would take six times as long.
        padded = (ceil(plan.columns / CACHE_LINE) | 1) * CACHE_LINE
        count = len(plan.middle.low)
        self.along_middle, self.along_fast = RowInterpolator(plan.middle, padded), RowInterpolator(plan.fast, count)
        self.transposed = np.empty((plan.columns, count), np.float32)
        self.planes = np.zeros((2, plan.rows, padded), np.float32)  # in HU; neighbours differ in parity
        self.between = np.empty((plan.rows, padded), np.float32)
        self.output = plan.target.numpy()

    def add(self, index: int, stored: np.ndarray) -> None:
        """One slice (middle axis, fastest axis) as stored; all of them, in file order."""
        if index in self.plan.needed:
            self._to_hu(stored[self.plan.crop], self.planes[index % 2])
        for position in self.plan.completes.get(index, ()):
            self._write(position)

    def finish(self) -> None:
        """After the last slice."""

    def _to_hu(self, stored: np.ndarray, plane: np.ndarray) -> None:
        used = plane[:, : self.plan.columns]
        if self.plan.exact:
            np.copyto(used, stored, casting="unsafe")  # what follows is four times faster without gaps between rows
            if self.plan.intercept:
                np.add(plane, np.float32(self.plan.intercept), out=plane)
            np.clip(plane, HU_MIN, HU_MAX, out=plane)
        else:
            scaled = stored.astype(np.float64) * self.plan.slope + self.plan.intercept
            np.clip(scaled, HU_MIN, HU_MAX, out=scaled)
            np.copyto(used, scaled, casting="unsafe")

    def _write(self, position: int) -> None:
        slow = self.plan.slow
        low, high = (self.planes[index[position] % 2] for index in (slow.low, slow.high))
        lerp(low, high, slow.weight[position], out=self.between)
        np.copyto(self.transposed, self.along_middle(self.between)[:, : self.plan.columns].T)
        plane = self.along_fast(self.transposed)
        np.divide(plane, np.float32(HU_MAX), out=plane)
        np.clip(plane, -1, 1, out=self.output[position])  # float32 rounding can step past the window by one bit


class RowInterpolator:
    """Interpolates along the first axis of a (rows, n) plane, into a buffer of its own."""

    def __init__(self, weights: InterpolationWeights, columns: int):
        self.low, self.high = weights.low - weights.span.start, weights.high - weights.span.start
        # Whole planes of weights: numpy multiplies by a column of them at half the speed.
        self.weight = np.repeat(weights.weight[:, None], columns, axis=1)
        self.below, self.above = (np.empty((len(weights.low), columns), np.float32) for _ in range(2))

    def __call__(self, plane: np.ndarray) -> np.ndarray:
        np.take(plane, self.low, axis=0, out=self.below, mode="clip")  # "clip" only spares numpy a copy
        np.take(plane, self.high, axis=0, out=self.above, mode="clip")
        return lerp(self.below, self.above, self.weight, out=self.above)


def lerp(low: np.ndarray, high: np.ndarray, weight: np.ndarray | np.float32, out: np.ndarray) -> np.ndarray:
    """low + weight * (high - low). Exact where low and high are equal, unlike a weighted sum. `out` may be `high`."""
    np.subtract(high, low, out=out)
    np.multiply(out, weight, out=out)
    return np.add(low, out, out=out)


class DeviceResampler:
    """The same on `out`'s device, straight from the stored integers: 2 bytes of a voxel travel, not 4 of the result.

    Slices are gathered in page-locked memory, STACK at a time; an upload ends before the next slice is gathered.
    """

    STACK = 16

    def __init__(self, header: Header, geometry: FileGeometry, out: torch.Tensor, path: Path):
        self.plan = plan = ResamplingPlan(header, geometry, out, path)
        self.device = out.device
        dtype = header.dtype.newbyteorder("=")
        if dtype.kind == "u" and dtype.itemsize > 1:  # torch computes with unsigned bytes only
            dtype = np.dtype("i4" if dtype.itemsize == 2 else "f8")
        empty = torch.from_numpy(np.empty((self.STACK, plan.rows, plan.columns), dtype))
        self.stack = empty.pin_memory() if self.device.type == "cuda" else empty
        self.in_plane = [self._upload(weights, weights.span.start) for weights in (plan.middle, plan.fast)]
        self.indices: list[int] = []  # of the slices in the stack
        self.last: tuple[int, torch.Tensor] | None = None  # the plane before it, which its first slice may need

    def add(self, index: int, stored: np.ndarray) -> None:
        """One slice (middle axis, fastest axis) as stored; all of them, in file order."""
        if index not in self.plan.needed:
            return
        np.copyto(self.stack[len(self.indices)].numpy(), stored[self.plan.crop], casting="unsafe")
        self.indices.append(index)
        if len(self.indices) == self.STACK:
            self.finish()

    def finish(self) -> None:
        """Works on the slices in the stack; to be called after the last one."""
        if not self.indices:
            return
        planes, indices = self._to_hu(self.stack[: len(self.indices)].to(self.device)), self.indices
        positions = [position for index in indices for position in self.plan.completes.get(index, ())]
        if self.last is not None:
            indices, planes = [self.last[0], *indices], torch.cat([self.last[1], planes])
        if positions:
            slow, row = self.plan.slow, {index: number for number, index in enumerate(indices)}
            low, high = ([row[int(of[position])] for position in positions] for of in (slow.low, slow.high))
            here = InterpolationWeights(slow.box, np.array(low), np.array(high), slow.weight[positions])
            values = planes
            for axis, (below, above, weight) in enumerate((self._upload(here), *self.in_plane)):  # `lerp` along each
                base = values.index_select(axis, below)
                along = weight.view([-1 if i == axis else 1 for i in range(3)])
                values = base + along * (values.index_select(axis, above) - base)
            output = (values / HU_MAX).clamp_(-1, 1).transpose(1, 2)
            self.plan.target[torch.tensor(positions, device=self.device)] = output
        self.last = indices[-1], planes[-1:].clone()
        self.indices = []

    def _upload(self, weights: InterpolationWeights, first: int = 0) -> tuple[torch.Tensor, ...]:
        arrays = (weights.low - first, weights.high - first, weights.weight)
        return tuple(torch.from_numpy(array).to(self.device) for array in arrays)

    def _to_hu(self, stored: torch.Tensor) -> torch.Tensor:
        if self.plan.exact:
            return (stored.float() + self.plan.intercept).clamp_(HU_MIN, HU_MAX)
        return (stored.double() * self.plan.slope + self.plan.intercept).clamp_(HU_MIN, HU_MAX).float()
