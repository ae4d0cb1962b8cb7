"""A volume file -> the tensor that every model takes. One order of steps for training, evaluation and prediction.

`preprocess_volume` reads a file the way it is told to (version 1: metadata row; version 2: header), `read_volume` finds
out which of the two a file is. Slices are resampled one by one as `ctclip.data.readers` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctclip.data.cohort import Volume
from ctclip.data.ct_rate import FETCH_COMMAND, is_version_2, split_of
from ctclip.data.geometry import (
    PUBLISHED_SHAPE,
    FileGeometry,
    check_extent,
    check_shape,
    geometry_from_header,
    geometry_from_metadata,
    geometry_notes,
)
from ctclip.data.hounsfield import (
    HuDecision,
    VoxelStatistics,
    check_reading,
    decide_hu,
    slice_notes,
)
from ctclip.data.lungs import lung_coverage
from ctclip.data.readers import open_volume
from ctclip.data.resampling import DeviceResampler, NumpyResampler
from ctclip.data.volume_file import Header, VolumeError, file_error
from ctclip.formatting import plural

# Raise it with every change to this package that may alter a tensor or the HU decision of read_volume, by a single bit:
# caches rest on it.
PREPROCESSING_VERSION = 2


def preprocess_volume(
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    shape: Sequence[int] = PUBLISHED_SHAPE,
    assume_hu: bool = False,
) -> torch.Tensor:
    """NIfTI, .mha or DICOM series -> (1, D, H, W) = (1, z, x, y) float32 in [-1, 1], HU / 1000, as CT-CLIP had it.

    metadata: a mapping with RescaleSlope, RescaleIntercept, XYSpacing and ZSpacing for version-1 files, whose voxels
    are then taken in stored order; None for files whose header is right, which are brought to LPS. `shape` sets the
    grid, always over a cube of 360 mm. Raises VolumeError (one line) for anything that is not a usable volume, also
    where it does not look like a chest CT in HU; with `assume_hu` it is taken for one.
    """
    # 1. Inflate slice by slice, voxels as stored. A slab at a time: the file can be larger than the output.
    # 2. Output sizes from the *whole* scan, then only the box that survives the crop: the published grid follows from
    #    sizes, so cropping first and resampling after would give another grid.
    # 3. Slope and intercept, clip to [-1000, 1000] HU. Before resampling, or one metal voxel would bleed into its
    #    neighbours (the published training code and inference code differ here; this is inference).
    # 4. Trilinear as three passes, slices first (fewest values to touch), then the two axes in plane.
    # 5. / 1000, into the centre of a tensor of -1 (air) in the order (z, x, y).
    path = Path(path)
    check_shape(shape)
    row = None if metadata is None else geometry_from_metadata(metadata, path.name)
    choose = lambda header, _: row or geometry_from_header(header, path)  # noqa: E731
    out, header, statistics = _resample_file(path, shape, choose, assume_hu=assume_hu)
    if not assume_hu:
        check_reading(statistics, (header.slope, header.intercept), (row.slope, row.intercept) if row else None)
    return out


def read_volume(
    volume: Volume, shape: Sequence[int] = PUBLISHED_SHAPE, device: torch.device | None = None
) -> tuple[torch.Tensor, HuDecision]:
    """(tensor as from preprocess_volume, how the file was read and why). Raises VolumeError, also for ambiguous files.

    With a `device` the tensor is made there, equal but for rounding; what goes into a cache is made without.
    The file is read once: the first slab decides, the whole file confirms. Only if it does not confirm, a second time.
    """
    check_shape(shape)
    path, version_2 = volume.path, is_version_2(volume.path)
    if volume.signature is not None and not os.path.exists(path):
        expected = "its features in the cache of this encoder"
        fetch = f"fetch the file with {FETCH_COMMAND} {split_of(volume.name)}"
        remedy = f"train with --freeze-backbone on that cache, or {fetch}"
        raise file_error(path, "no file (it was streamed)", expected, remedy)
    row = None if volume.metadata is None else geometry_from_metadata(volume.metadata, path.name)

    def decide(header: Header, statistics: VoxelStatistics) -> HuDecision:
        own, of_row = (header.slope, header.intercept), (row.slope, row.intercept) if row else None
        if volume.assume_hu:
            return HuDecision("hu", "as asked for")
        return decide_hu(statistics, own, of_row, version_2, header.blank)

    def geometry_of(reading: str, header: Header) -> FileGeometry:
        if reading == "stored" and row is not None:
            return row
        if header.blank and row is not None:  # HU that lost its header: the row still knows the spacing
            return FileGeometry(header.slope, header.intercept, row.spacing)
        return geometry_from_header(header, path)

    used: list[FileGeometry] = []

    def provisional(header: Header, statistics: VoxelStatistics) -> FileGeometry:
        try:
            used.append(geometry_of(decide(header, statistics).reading, header))
        except VolumeError:  # the first slab may be padding only: go on with what the folder says
            used.append(geometry_of("hu" if version_2 else "stored", header))
        return used[-1]

    notes: list[str] = []
    out, header, statistics = _resample_file(path, shape, provisional, device, notes, volume.assume_hu)
    decision = decide(header, statistics)
    final = geometry_of(decision.reading, header)
    if final != used[-1]:
        del out
        out, _, _ = _resample_file(path, shape, lambda *_: final, device, None, volume.assume_hu)
    if final is not row:
        notes += geometry_notes(header, final)
    if statistics.gaps:
        notes.append(f"{plural(statistics.gaps, 'slice')} of one value between others (damaged?)")
    axial = final.axes.index(2)
    notes += slice_notes(statistics, axial, final.spacing[axial], (final.slope, final.intercept))
    notes += lung_coverage(out).notes
    return out, decision._replace(notes=tuple(notes))


def _resample_file(
    path: Path,
    shape: Sequence[int],
    choose: Callable[[Header, VoxelStatistics], FileGeometry],
    device: torch.device | None = None,
    notes: list[str] | None = None,
    assume_hu: bool = False,
) -> tuple[torch.Tensor, Header, VoxelStatistics]:
    """One pass over a file: statistics of everything, resampling of what survives the crop, by `device` if one is
    given. `choose` gives scale and geometry, from the header and the statistics of the first slab; `notes` gets the
    reader's; with `assume_hu` it may be too small to be a chest."""
    with open_volume(path) as file, closing(file.slabs()) as slabs:
        if notes is not None:
            notes += file.notes
        statistics = VoxelStatistics(file.header.shape, path)
        start, slab = next(slabs)
        for offset, stored in enumerate(slab):
            statistics.add(start + offset, stored)
        geometry = choose(file.header, statistics)
        if not assume_hu:
            check_extent(file.header.shape, geometry.spacing, path)
        if device is None:  # numpy asks for huge pages, torch does not: a fifth of the time
            out = torch.from_numpy(np.full((1, *shape), -1, np.float32))
        else:
            out = torch.full((1, *shape), -1.0, device=device)
        resampler = (NumpyResampler if device is None else DeviceResampler)(file.header, geometry, out, path)
        for first, stack in chain([(start, slab)], slabs):
            for index, stored in enumerate(stack, first):
                if first != start:
                    statistics.add(index, stored)
                resampler.add(index, stored)
        resampler.finish()
    statistics.check_varied()
    return out, file.header, statistics
