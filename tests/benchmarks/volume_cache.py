"""A crop of a kept volume against reading its file again, as every epoch of a video ResNet would without the cache.

    python tests/benchmarks/volume_cache.py [--phantoms 6]

The published shape and crop. On the real scans of CTCLIP_REAL_CT where that is set, on phantoms, and on one file of
512 x 512 x 300 voxels at realistic entropy. Files are in memory (warm), so that a disk or network is left out of both.
Half a minute.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from preprocessing import SMALL, write_volume
from rows import Row, best_of, run

from ctclip.data.augmentation import Augmentation
from ctclip.data.cohort import Volume, load_cohort
from ctclip.data.loading import VolumeDataset
from ctclip.data.volume_cache import VolumeCache
from ctclip.phantoms.cohort import write_phantom_cohort
from ctclip_model import N_LABELS

SHAPE, CROP = (120, 240, 240), (96, 192, 192)
GOAL = 0.5  # of the time


def row(what: str, volumes: list[Volume], folder: Path, repeats: int) -> Row:
    change = Augmentation(0, False, CROP)
    kept, files = VolumeCache(folder / "cache", SHAPE), VolumeCache(None, SHAPE)
    from_cache, from_files = (VolumeDataset(volumes, SHAPE, change, cache=cache) for cache in (kept, files))
    equal = all(torch.equal(from_cache[i][1], from_files[i][1]) for i in range(len(volumes)))  # fills the cache
    equal &= all(torch.equal(from_cache[i][1], from_files[i][1]) for i in range(len(volumes)))
    ours, theirs = best_of(repeats, *(lambda data=data: [data[i] for i in range(len(volumes))]
                                      for data in (from_cache, from_files)))  # fmt: skip
    sizes = [sum(path.stat().st_size for path in paths) / len(volumes) / 1e6 for paths in
             ([path for path in kept.folder.rglob("*") if path.name != "key.json" and path.is_file()],
              [volume.path for volume in volumes])]  # fmt: skip
    milliseconds = [1000 * time / len(volumes) for time in (ours, theirs)]
    detail = (f"{milliseconds[0]:.0f} ms a volume, its file {milliseconds[1]:.0f} ms, best of {repeats} in turns; "
              f"{sizes[0]:.1f} MB kept, file {sizes[1]:.1f} MB")  # fmt: skip
    title = f"A crop from the volume cache against reading its file, {what}"
    return Row(title, ours / theirs, GOAL, "x", detail, "crops equal to the bit", equal)


def measure(args: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(1)
    labels, rows = torch.zeros(N_LABELS).numpy(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_volume(folder / "large.nii.gz", SMALL)
        large = Volume("large.nii.gz", folder / "large.nii.gz", labels, assume_hu=True)
        rows.append(row("512 x 512 x 300", [large], folder / "a", args.repeats))
        cohort = write_phantom_cohort(folder / "phantoms", max(2, args.phantoms), 1, progress=False)
        phantoms = load_cohort(cohort, "train").volumes[: args.phantoms]
        rows.append(row(f"{len(phantoms)} phantoms", phantoms, folder / "b", args.repeats))
        if real := os.environ.get("CTCLIP_REAL_CT"):
            scans = [Volume(path.name, path, labels) for path in sorted(Path(real).glob("*.nii.gz"))]
            rows += [row(scan.name, [scan], folder / f"c{i}", args.repeats) for i, scan in enumerate(scans)]
    return rows


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, repeats=3, phantoms=6))
