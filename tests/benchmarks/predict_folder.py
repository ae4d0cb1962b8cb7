"""Predicting a folder against the larger of reading it alone and computing it alone, at the published size.

    python tests/benchmarks/predict_folder.py

Random weights, `--volumes` files of 512 x 512 x 300. Reading takes more than one core (inflating beside resampling) and
computing all of them: where the processor time of both exceeds what the cores have in the larger one's time, no overlap
can reach the goal, and the detail says what could be reached. About two minutes, 3 GB of memory.
"""

from rows import Row, peak_memory, run  # puts the project and the tests' helpers on the path

# isort: split
import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from helpers_model import PUBLISHED
from preprocessing import SMALL, write_volume

from ctclip.data.cohort import Volume
from ctclip.data.loading import read_ahead
from ctclip.data.preprocessing import read_volume
from ctclip.inference.predictor import choose_workers, predict_volumes
from ctclip_model import N_LABELS, CTCLIPMultiAbnormalityModel

GOAL, MEMORY_GOAL, TOLERANCE = 1.15, 1000, 1e-5


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """(seconds, processor seconds of all threads)"""
    start, used = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - start, time.process_time() - used


def megabytes_beyond_weights(path: Path) -> float:
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(PUBLISHED)).eval()
    volumes = [Volume(f"scan_{i}.nii.gz", path, np.zeros(N_LABELS, np.float32)) for i in range(4)]
    with peak_memory() as peak:
        predict_volumes(model, volumes)
    return peak[0] / 1e6


def measure(args: argparse.Namespace) -> list[Row]:
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(PUBLISHED)).eval()
    torch.nn.init.normal_(model.classifier.weight, std=5.0)  # answers that differ
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scan.nii.gz")
        write_volume(path, SMALL)
        labels = np.zeros(N_LABELS, np.float32)
        volumes = [Volume(f"scan_{i}.nii.gz", path, labels) for i in range(args.volumes)]
        tensor = read_volume(volumes[0], model.input_shape)[0][None]

        def read() -> None:
            pieces = [[i] for i in range(len(volumes))]
            for _ in read_ahead(volumes, model.input_shape, pieces, max(1, choose_workers(None))):
                pass

        def compute() -> None:
            with torch.inference_mode():
                for _ in volumes:
                    model(tensor)

        with torch.inference_mode():
            alone = model(tensor)  # warm up, and the answer to compare with
        answers = []
        with get_context("spawn").Pool(1) as fresh:  # here, memory that was freed before would not count
            peak = fresh.apply(megabytes_beyond_weights, (path,))
        times = [[timed(action) for action in (read, compute, lambda: answers.append(predict_volumes(model, volumes)))]
                 for _ in range(args.repeats)]  # fmt: skip
    reading, computing, both = (min(of_one) for of_one in zip(*times, strict=True))
    difference = max((logits - alone).abs().max().item() for _, logits in answers)
    complete = all(found == list(range(len(volumes))) for found, _ in answers)
    sound = complete and difference <= TOLERANCE and alone.std().item() > 0.1
    larger = max(reading[0], computing[0])
    possible = max(larger, (reading[1] + computing[1]) / len(os.sched_getaffinity(0))) / larger
    detail = (
        f"{both[0]:.2f} s for {args.volumes}; reading {reading[0]:.2f} s ({reading[1]:.2f} of processor), computing "
        f"{computing[0]:.2f} s ({computing[1]:.2f}); the cores allow {possible:.2f}x"
    )
    checked = f"logits of one volume at a time: {difference:.1e} off"
    return [
        Row("Predicting a folder against its slower half", both[0] / larger, GOAL, "x", detail, checked, sound),
        Row("Memory of that beyond the weights", peak, MEMORY_GOAL, " MB", "four volumes, sampled", checked, sound),
    ]


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, volumes=4, repeats=2))
