"""Kills training runs with SIGKILL at random moments, resumes them, and compares what they end with to an undisturbed
run: weights, tuning predictions and log have to be equal bit for bit.

    python tests/benchmarks/killed_runs.py --kills 20
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "ctclip_training.py"
SAVE_MINUTES = "0.005"  # often within an epoch, but not at every step: some steps have to be done again
KILL_WINDOW = 0.2  # of an undisturbed run: on a busy machine a process gets as far in it as on an idle one
# Half of it unfrozen; everything that draws random numbers, and everything that has a state of its own.
SETTINGS = ["--epochs=12", "--freeze-epochs=6", "--batch-size=8", "--augment", "--ema-decay=0.9", "--patience=100"]


def arguments(folder: Path, flags: list[str], resume: bool) -> list[str]:
    where = ["--resume", str(folder)] if resume else ["--output-dir", str(folder), *flags]
    return [*where, "--save-minutes", SAVE_MINUTES]


def start(folder: Path, flags: list[str], resume: bool) -> subprocess.Popen:
    """A training process; its output is appended to `<folder>.log`."""
    command = [sys.executable, str(SCRIPT), *arguments(folder, flags, resume)]
    with open(f"{folder}.log", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder.parent)


class Forked:
    """`start` without imports: a process forked from a server that has made them."""

    def __init__(self, folder: Path, flags: list[str], resume: bool):
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["ctclip_training", "ctclip.training.loop"])
        self.process = server.Process(target=_train, args=(folder, arguments(folder, flags, resume)))
        self.process.start()
        self.kill = self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def _train(folder: Path, argv: list[str]) -> None:
    from ctclip_training import main

    os.chdir(folder.parent)
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(main(argv))


def starts(folder: Path) -> int:
    """How often a process has printed its head into the log: its first step is next."""
    log = Path(f"{folder}.log")
    return log.read_text().count("\nRun: ") if log.is_file() else 0


def run_with_kills(
    folder: Path, flags: list[str], kills: int, seed: int, longest: float, start: Callable = start
) -> int:
    """Runs to the end, killed up to `kills` times, each within `longest` seconds of its head. Returns how many kills
    hit it."""
    generator = random.Random(seed)
    hit = before = 0
    while True:
        process = start(folder, flags, resume=(folder / "run.json").is_file())
        if hit < kills:
            while process.poll() is None and starts(folder) == before:
                time.sleep(0.01)
            before = starts(folder)
            time.sleep(generator.uniform(0, longest))
            process.kill()
        code = process.wait()
        if code == 0:
            return hit
        if code > 0:
            raise RuntimeError(f"{SCRIPT.name} ended with {code}:\n{Path(f'{folder}.log').read_text()}")
        hit += 1


def result(folder: Path) -> dict[str, bytes | list]:
    """What must not depend on kills. Seconds do."""
    history = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = {name: (folder / name).read_bytes() for name in ("model.safetensors", "tuning_predictions.csv")}
    return kept | {"log.jsonl": [{k: v for k, v in row.items() if k != "seconds"} for row in history]}


def differences(first: Path, second: Path) -> list[str]:
    a, b = result(first), result(second)
    return [name for name in a if a[name] != b[name]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from ctclip.phantoms.cohort import write_phantom_cohort

    # In memory where possible: a save waits for the disk, and a killed process loses nothing that the disk has not got.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as work:
        cohort = write_phantom_cohort(Path(work, "cohort"), 40, 16, seed=5, progress=False)
        tiny = ROOT / "tests" / "fixtures" / "tiny_a_classfine.pt"
        flags = ["--data-dir", str(cohort), "--ctclip-path", str(tiny), *SETTINGS]
        began = time.perf_counter()
        run_with_kills(undisturbed := Path(work, "undisturbed"), flags, 0, args.seed, 0)
        longest = KILL_WINDOW * (time.perf_counter() - began)
        print(f"undisturbed: {longest / KILL_WINDOW:.0f} s; kills up to {longest:.1f} s after a start", flush=True)
        left, runs = args.kills, 0
        while left > 0:
            folder = Path(work, f"killed_{runs}")
            hit = run_with_kills(folder, flags, left, args.seed + runs, longest)
            different = differences(undisturbed, folder)
            print(f"run {runs + 1}: killed {hit} times, {'equal' if not different else f'DIFFERENT: {different}'}")
            if different:
                return 1
            left, runs = left - hit, runs + 1
    print(f"{args.kills} kills over {runs} runs: every run ended bit-identical to the undisturbed one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
