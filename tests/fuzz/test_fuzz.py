"""Mutated inputs of a fixed seed: each gives the right answer or one line, in bounded time and memory.
`run.py` takes any seed and time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import GENERATORS

RUN = Path(__file__).with_name("run.py")
COUNT = 60


@pytest.mark.parametrize("kind", GENERATORS)
def test_mutated_inputs_are_read_right_or_refused(kind):
    """In a process of its own: with limits of address space, and where a crash is a failure like any other."""
    done = subprocess.run(
        [sys.executable, RUN, "--seed", "0", "--count", str(COUNT), "--only", kind], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    read, refused = map(int, re.search(rf"{kind}: (\d+) read, (\d+) refused", done.stdout).groups())
    assert read + refused == COUNT and min(read, refused) > COUNT // 10, "mutations that do harm, and some that do not"
