"""From the files of a scan to the published input, against SimpleITK's reading alone of the same files, in turns.

    python tests/benchmarks/readers.py

512 x 512 x 300 voxels of 0.7 x 0.7 x 1.2 mm: a chest of plain shapes with the noise of a CT (25 HU, correlated in the
slice), 50 slices over and over; as a DICOM series, plain and JPEG 2000 lossless, and as a compressed .mha. SimpleITK:
ImageSeriesReader over GetGDCMSeriesFileNames, and ReadImage. Memory is that beyond the output. Three minutes.
"""

from rows import Row, best_of, run  # puts the project and the tests' helpers on the path

# isort: split
import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import SimpleITK
from helpers_data import affine_of, chest, write
from helpers_dicom import write_series
from helpers_scans import write_mha
from preprocessing import megabytes_beyond_output
from pydicom.uid import JPEG2000Lossless
from scipy.ndimage import gaussian_filter

from ctclip.data import dicom
from ctclip.data.preprocessing import preprocess_volume

RATIO_GOAL, MEMORY_GOAL = 1.0, 100  # MB beyond the output
SHAPE, SLAB, SPACING, NOISE = (512, 512, 300), 50, (0.7, 0.7, 1.2), 25


def scan() -> np.ndarray:
    """HU (x, y, z)."""
    hu = chest((*SHAPE[:2], SLAB)).astype(np.float32)
    noise = gaussian_filter(np.random.default_rng(0).normal(size=hu.shape).astype(np.float32), (0.7, 0.7, 0))
    hu = (hu + noise * (NOISE / noise.std())).round().clip(-1024, 3000).astype(np.int16)
    return np.concatenate([hu] * (SHAPE[2] // SLAB), axis=2)


def read_series(folder: Path) -> SimpleITK.Image:
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def read_image(path: Path) -> SimpleITK.Image:
    return SimpleITK.ReadImage(str(path))


def first_reading(path: Path) -> np.ndarray:
    """The tensor, as an array; no header is kept from a reading before."""
    dicom._read_files.cache_clear()
    return preprocess_volume(path).numpy()


def processor_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def rows_of(name: str, path: Path, theirs: Callable[[Path], SimpleITK.Image], repeats: int, apart: Path) -> list[Row]:
    with get_context("spawn").Pool(1) as fresh:
        beyond = fresh.apply(megabytes_beyond_output, (path,))
    voxels = SimpleITK.GetArrayFromImage(theirs(path)).T  # (x, y, z), as ITK read them
    reference = preprocess_volume(write(apart, voxels.astype(np.int16), SPACING, affine_of(SPACING)))
    sound = bool(np.array_equal(first_reading(path), reference.numpy()))
    ours, itk = best_of(repeats, lambda: first_reading(path), lambda: theirs(path))
    processor = [processor_seconds(lambda: first_reading(path)), processor_seconds(lambda: theirs(path))]
    checked = "preprocessing of the voxels that SimpleITK read: equal to the bit"
    detail = f"{ours:.2f} s, SimpleITK {itk:.2f} s, best of {repeats} in turns; processor {processor[0]:.2f} and "
    detail += f"{processor[1]:.2f} s; one thread resamples, one reads, {dicom.DECODERS} decode compressed slices"
    return [
        Row(f"Preprocessing {name} against SimpleITK's reading", ours / itk, RATIO_GOAL, "x", detail, checked, sound),
        Row(f"Memory of that beyond its output, {name}", beyond, MEMORY_GOAL, " MB", "peak, sampled", checked, sound),
    ]


def measure(args: argparse.Namespace) -> list[Row]:
    hu, affine = scan(), affine_of(SPACING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, jpeg = folder / "plain", folder / "jpeg"
        write_series(plain, hu, affine)
        write_series(jpeg, hu, affine, encoding=JPEG2000Lossless)
        meta = write_mha(folder / "a.mha", hu, affine, compressed=True)
        del hu
        apart = folder / "apart.nii"
        return [
            *rows_of("a DICOM series", plain, read_series, args.repeats, apart),
            *rows_of("a JPEG 2000 series", jpeg, read_series, 2, apart),
            *rows_of("a compressed .mha", meta, read_image, args.repeats, apart),
        ]


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, repeats=7))
