"""Predicting with three heat maps against predicting without, by the command: the demo and the published size.

    python tests/benchmarks/maps.py

The demo's tower over `--phantoms` phantoms, and random weights of the published size over `--volumes` files of
512 x 512 x 300. A ratio of wall times; processor times, which other work on the machine disturbs less, are in the
detail. Both tables must be the same to the last byte. Four minutes on two cores, 6 GB of memory, 1 GB of disk.
"""

from rows import Row, run  # puts the project and the tests' helpers on the path

# isort: split
import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from helpers_model import PUBLISHED
from preprocessing import SMALL, write_volume

from ctclip.phantoms.phantom import make_phantom
from ctclip_model import DEMO_PATH, CTCLIPMultiAbnormalityModel

GOAL, LABELS = 1.3, "Cardiomegaly,Pleural effusion,Consolidation"
ROOT = Path(__file__).resolve().parents[2]


def saved(model: CTCLIPMultiAbnormalityModel, folder: Path) -> Path:
    """With answers that differ."""
    torch.manual_seed(0)
    torch.nn.init.normal_(model.classifier.weight, std=5.0)
    model.save_pretrained(folder)
    return folder


def predicted(model: Path, scans: Path, output: Path, *flags: str) -> tuple[float, float]:
    """(seconds, processor seconds) of the command."""
    command = [sys.executable, "run_task2.py", "--mode", "predict", "--checkpoint", model, "--input", scans,
               "--output", output, "--assume-hu", *flags]  # fmt: skip
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def row(what: str, model: Path, scans: Path, repeats: int) -> Row:
    output = scans.with_name(f"{scans.name}.csv")
    plain, explained, tables = [], [], []
    for _ in range(repeats):
        for times, flags in ((plain, ()), (explained, ("--explain", LABELS))):
            times.append(predicted(model, scans, output, *flags))
            tables.append(output.read_bytes())
    (wall, cpu), (wall_maps, cpu_maps) = (map(min, zip(*times, strict=True)) for times in (plain, explained))
    detail = (f"{wall_maps:.1f} s with, {wall:.1f} s without; processor {cpu_maps:.1f} and {cpu:.1f} s "
              f"({cpu_maps / cpu:.2f}x)")  # fmt: skip
    pictures = len(list(scans.with_name(f"{scans.name}_explain").glob("*/*.png")))
    sound = len({*tables}) == 1 and pictures == 4 * len(list(scans.iterdir()))
    return Row(what, wall_maps / wall, GOAL, "x", detail, "the tables, byte by byte; every picture is there", sound)


def measure(args: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        demo, published = work / "phantoms", work / "published"
        for folder in (demo, published):
            folder.mkdir()
        for number in range(args.phantoms):
            phantom = make_phantom(40_000_000 + number)
            affine = np.diag([*np.array([-1, -1, 1]) * phantom.spacing, 1.0])
            nib.save(nib.Nifti1Image(phantom.hu, affine), demo / f"{number:02}.nii.gz")
        for number in range(args.volumes):
            write_volume(published / f"{number}.nii.gz", SMALL)
        small = saved(CTCLIPMultiAbnormalityModel(DEMO_PATH, head="linear"), work / "small")
        large = saved(CTCLIPMultiAbnormalityModel(sizes=asdict(PUBLISHED)), work / "large")
        return [
            row(f"Three maps of {args.phantoms} phantoms, demo", small, demo, args.repeats),
            row(f"Three maps of {args.volumes} volumes, published size", large, published, args.repeats),
        ]


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, phantoms=12, volumes=3, repeats=2))
