"""How long a script takes to answer --help, against the interpreter alone, in the same run.

    python tests/benchmarks/startup.py

Warm: each script has run before, so that its files are in memory and compiled.
"""

import argparse
import os
import subprocess
import sys

from rows import BENCHMARKS, Row, best_of, run

ROOT = BENCHMARKS.parents[1]
GOAL = 0.5  # seconds
SCRIPTS = ("run_task2", "ctclip_training", "ctclip_evaluation", "ctclip_setup", "ctclip.hub", "ctclip.phantoms")
FLAGS = {  # one of each of a script's groups, the last one too
    "run_task2": ("--mode", "--explain", "--resume", "--data-dir", "--head", "--epochs", "--loss-type"),
    "ctclip_training": ("--mode", "--resume", "--data-dir", "--head", "--epochs", "--loss-type"),
    "ctclip_evaluation": ("--checkpoint", "--objective", "--baseline", "--output-dir"),
    "ctclip.hub": ("weights", "card"),
    "ctclip.phantoms": ("--data-dir", "--train", "--workers"),
    "ctclip_setup": ("--dev", "--model", "--data"),
}  # fmt: skip


def output(*command: str) -> str:
    environment = os.environ | {"COLUMNS": "120"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measure(args: argparse.Namespace) -> list[Row]:
    rows = []
    for script in SCRIPTS:
        start = ["-m", script] if "." in script else [f"{script}.py"]
        text = output(*start, "--help")
        missing = [flag for flag in FLAGS[script] if flag not in text]
        empty, ours = best_of(args.repeats, lambda: output("-c", "pass"), lambda: output(*start, "--help"))  # noqa: B023
        detail = f"{ours:.3f} s; python -c pass {empty:.3f} s: {ours / empty:.0f} times; best of {args.repeats}, warm"
        checked = f"{len(FLAGS[script])} flags, of every group, in the text" + (f"; missing: {missing}" * bool(missing))
        rows.append(Row(f"python {' '.join(start)} --help", ours, GOAL, " s", detail, checked, not missing))
    return rows


def main() -> int:
    return run(__doc__, measure, repeats=5)


if __name__ == "__main__":
    sys.exit(main())
