"""Mutated inputs of a fixed seed: each gives the right answer or one line, in bounded time and memory.
`run.py` takes any seed and time, and `flips.py` any number of flips of a run's folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import GENERATORS

RUN, FLIPS = (Path(__file__).with_name(name) for name in ("run.py", "flips.py"))
COUNT, FLIPPED = 40, 20


@pytest.mark.parametrize("kinds", [("nifti", "metaimage", "dicom"), ("checkpoint", "json", "table")], ids=" ".join)
def test_mutated_inputs_are_read_right_or_refused(kinds):
    """In a process of its own: with limits of address space, and where a crash is a failure like any other."""
    done = subprocess.run(
        [sys.executable, RUN, "--seed", "0", "--count", str(COUNT), "--only", *kinds], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for kind in kinds:
        read, refused = map(int, re.search(rf"\b{kind}: (\d+) read, (\d+) refused", done.stdout).groups())
        assert read + refused == COUNT and min(read, refused) > COUNT // 10, "some that do harm, and some that do not"


def test_every_generator_is_among_the_tests():
    marks = test_mutated_inputs_are_read_right_or_refused.pytestmark
    assert {kind for kinds in marks[0].args[1] for kind in kinds} == set(GENERATORS)


def test_a_bit_flipped_in_a_run_s_folder_changes_no_answer_unsaid():
    """Weights, states, tables, JSON, of a finished run and of one that goes on."""
    done = subprocess.run(
        [sys.executable, FLIPS, "--seed", "0", "--count", str(FLIPPED)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for kind in ("unfinished", "finished"):
        same, refused = map(int, re.search(rf"\b{kind}: (\d+) the same, (\d+) refused", done.stdout).groups())
        assert same + refused == FLIPPED and min(same, refused) > 1
