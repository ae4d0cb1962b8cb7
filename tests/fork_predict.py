"""run_task2 in forked processes, as helpers_fork has it.

Arguments: seconds that reading a scan takes longer, "shared" or "own" (each process then works in a folder of its own,
as on another machine's disk), then run_task2's.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers_fork import serve

import run_task2
from ctclip.data import loading
from ctclip.inference import commands  # noqa: F401

seconds, disks, *arguments = sys.argv[1:]
read_volume = loading.read_volume


def slowly(volume, shape):
    time.sleep(float(seconds))
    return read_volume(volume, shape)


def predict(rank):
    if disks == "own":
        os.makedirs(f"disk{rank}", exist_ok=True)
        os.chdir(f"disk{rank}")
    return run_task2.main(arguments)


loading.read_volume = slowly
serve(predict)
