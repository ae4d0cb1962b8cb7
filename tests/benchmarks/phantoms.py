"""Generation of the built-in cohort: volumes per second and core, at demo size, from the plan to the files.

    python tests/benchmarks/phantoms.py

`write_phantom_cohort` on all cores, its processes' start and the tables included, the faster of two rounds; then the
same volumes one by one in this process, whose voxels and headers the files must have. Takes half a minute.
"""

import gzip
import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from rows import Row, best_of, run

from ctclip.phantoms.cohort import plan_split, write_phantom_cohort, write_volume

GOAL = 8.0  # volumes per second and core
SEED = 0


def measure(args: Namespace) -> list[Row]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    plans = plan_split("train", args.volumes, SEED) + plan_split("valid", 1, SEED)
    with tempfile.TemporaryDirectory() as name:
        folders = (Path(name, str(i)) for i in range(2))
        (seconds,) = best_of(
            2, lambda: write_phantom_cohort(next(folders), args.volumes, 1, SEED, workers=cores, progress=False)
        )
        apart = Path(name, "apart")
        (alone,) = best_of(1, lambda: [write_volume(apart, plan) for plan in plans])
        pairs = [
            [gzip.decompress((folder / p.path).read_bytes()) for folder in (Path(name, "0"), apart)] for p in plans
        ]
        size = sum((apart / plan.path).stat().st_size for plan in plans) / len(plans)
    equal = sum(together == by_itself for together, by_itself in pairs)
    kinds = f"{sum(not p.fixed for p in plans)} of version 1, {sum(p.head for p in plans)} without a chest"
    return [
        Row(
            what=f"generating phantoms, {cores} processes",
            measured=len(plans) / seconds / cores,
            goal=GOAL,
            unit=" volumes per second and core",
            detail=f"{len(plans)} volumes in {seconds:.2f} s; one process without any start: {len(plans) / alone:.1f} "
            f"per second; {size / 1e6:.2f} MB each",
            checked=f"voxels and headers of {equal} of {len(plans)} files ({kinds}) equal those made one by one",
            sound=equal == len(plans) > 0,
            at_least=True,
        )
    ]


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, volumes=60))
