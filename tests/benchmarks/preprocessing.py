"""Preprocessing a compressed volume against isal's own inflating of the same file: time, and memory beyond the output.

    python tests/benchmarks/preprocessing.py

Two int16 volumes of smooth anatomy-like shapes plus noise, in files of realistic entropy (half their raw size): 512 x
512 x 300, and 1024 x 1024 x `--huge-slices`, a stand-in for CT-RATE's largest of 1617, of which one compressed slab is
repeated as gzip members (1617 makes a file of 1.7 GB). About a minute, 1 GB of memory, 1 GB of disk.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from isal import igzip
from rows import Row, best_of, peak_memory, run

from ctclip.data.geometry import PUBLISHED_SHAPE
from ctclip.data.preprocessing import preprocess_volume

RATIO_GOAL, MEMORY_GOAL = 1.5, 100  # MB beyond the output
TOLERANCE = 2e-6
SMALL, HUGE = (512, 512, 300), (1024, 1024)
SPACING = {512: (0.7, 0.7, 1.2), 1024: (0.35, 0.35, 0.25)}
SLAB = 50  # slices in each gzip member


def write_volume(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """A file of gzip members, the same slab over and over; returns the slab (SLAB, middle axis, fastest axis)."""
    generator = np.random.default_rng(0)
    z, y, x = np.ogrid[-1 : 1 : SLAB * 1j, -1 : 1 : shape[1] * 1j, -1 : 1 : shape[0] * 1j]
    lungs = (abs(x) - 0.4) ** 2 + y**2 + 0.02 * z < 0.08
    slab = np.where(lungs, -850.0, np.where(x**2 + 1.4 * y**2 < 0.7, 40.0, -1000.0))
    slab += generator.normal(0, 20, slab.shape)
    slab = slab.round().astype("<i2")
    image = nib.Nifti1Image(np.empty(shape, "<i2"), np.diag([-SPACING[shape[0]][0], -SPACING[shape[0]][1],
                                                            SPACING[shape[0]][2], 1]))  # fmt: skip
    header = image.header
    header.set_slope_inter(1, 0)
    header["vox_offset"] = 352
    with path.open("wb") as file:
        file.write(igzip.compress(header.binaryblock + bytes(4)))
        member = igzip.compress(slab.tobytes())
        for _ in range(shape[2] // SLAB):
            file.write(member)
    return slab


def inflate(path: Path) -> None:
    buffer = bytearray(4 << 20)
    with igzip.open(path) as stream:
        while stream.readinto(buffer):
            pass


def published(slab: np.ndarray, shape: tuple[int, int, int]) -> torch.Tensor:
    """(D, H, W) by torch's own interpolation in float64, as the published code has it; for volumes that are padded or
    cropped symmetrically and by whole voxels."""
    whole = np.concatenate([slab] * (shape[2] // SLAB)).transpose(0, 2, 1)  # (z, x, y)
    spacing = [SPACING[shape[0]][axis] for axis in (2, 0, 1)]
    size = [int(n * (s / (360 / t))) for n, s, t in zip(whole.shape, spacing, PUBLISHED_SHAPE, strict=True)]
    volume = torch.from_numpy(whole.clip(-1000, 1000).astype(np.float64))[None, None]
    resampled = torch.nn.functional.interpolate(volume, size=size, mode="trilinear", align_corners=False)[0, 0] / 1000
    out = torch.full(PUBLISHED_SHAPE, -1.0, dtype=torch.float64)
    fits = [((n - t) // 2 if n > t else 0, (t - n) // 2 if n < t else 0, min(n, t))
            for n, t in zip(size, PUBLISHED_SHAPE, strict=True)]  # fmt: skip
    inner = tuple(slice(before, before + count) for _, before, count in fits)
    out[inner] = resampled[tuple(slice(first, first + count) for first, _, count in fits)]
    return out


def megabytes_beyond_output(path: Path) -> float:
    with peak_memory() as peak:
        tensor = preprocess_volume(path)
    return (peak[0] - tensor.numpy().nbytes) / 1e6


def rows_of(path: Path, shape: tuple[int, int, int], repeats: int, slab: np.ndarray | None) -> list[Row]:
    """`slab`: what the file repeats, where there is the memory to resample it in float64; else a second reading."""
    with get_context("spawn").Pool(1) as fresh:  # here, memory that an earlier reading freed would not count
        beyond = fresh.apply(megabytes_beyond_output, (path,))
    tensor = preprocess_volume(path)
    if slab is not None:
        difference = (tensor[0].double() - published(slab, shape)).abs().max().item()
        checked, sound = f"torch's interpolation in float64: {difference:.1e} off", difference <= TOLERANCE
    else:
        checked, sound = "a second reading: equal", torch.equal(tensor, preprocess_volume(path))
    del tensor
    ours, isal = best_of(repeats, lambda: preprocess_volume(path), lambda: inflate(path))
    name = " x ".join(map(str, shape))
    detail = f"{ours:.3f} s, isal {isal:.3f} s, best of {repeats} in turns; {path.stat().st_size / 1e6:.0f} MB file"
    return [
        Row(f"Preprocessing {name} against inflating it", ours / isal, RATIO_GOAL, "x", detail, checked, sound),
        Row(f"Memory of that beyond its output, {name}", beyond, MEMORY_GOAL, " MB", "peak, sampled", checked, sound),
    ]


def measure(args: argparse.Namespace) -> list[Row]:
    huge = (*HUGE, args.huge_slices // SLAB * SLAB)
    with tempfile.TemporaryDirectory() as folder:
        small_path, huge_path = Path(folder, "small.nii.gz"), Path(folder, "huge.nii.gz")
        slab = write_volume(small_path, SMALL)
        rows = rows_of(small_path, SMALL, args.repeats, slab)
        thin = (*HUGE, 2 * SLAB)
        slab = write_volume(huge_path, thin)
        found = preprocess_volume(huge_path, assume_hu=True)[0].double()  # of 25 mm: too thin for a chest
        difference = (found - published(slab, thin)).abs().max().item()
        write_volume(huge_path, huge)
        return rows + [
            replace(row, checked=f"{row.checked}; of {thin[2]} slices: {difference:.1e} off torch's interpolation",
                    sound=row.sound and difference <= TOLERANCE)
            for row in rows_of(huge_path, huge, 2, None)
        ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, repeats=7, huge_slices=800))
