"""One form for every benchmark: what was measured, against what, and whether the goal is met.

A script gives its rows to `run`; `python tests/benchmarks/all.py` collects those of every script in one table.
"""

import argparse
import json
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCHMARKS.parents[1]), str(BENCHMARKS.parent)]  # the project's modules, the tests' helpers


@dataclass(frozen=True)
class Row:
    """One line of the table.

    measured: a ratio, or a figure in `unit`; goal: its bound, from below where `at_least`; detail: the figures behind
    it, both times of a ratio; checked: which outputs were compared, and how; sound: whether they were as they must be.
    """

    what: str
    measured: float
    goal: float
    unit: str
    detail: str
    checked: str
    sound: bool
    at_least: bool = False

    @property
    def passes(self) -> bool:
        return self.sound and (self.measured >= self.goal if self.at_least else self.measured <= self.goal)

    @property
    def bound(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.goal:g}{self.unit}"

    @property
    def verdict(self) -> str:
        return "pass" if self.passes else "FAIL" if self.sound else "WRONG OUTPUT"

    def text(self) -> str:
        figures = f"{self.measured:.3g}{self.unit}, goal {self.bound}: {self.verdict}"
        return f"{self.what}\n    {figures}\n    {self.detail}\n    checked: {self.checked}"


def run(description: str, measure: Callable[[argparse.Namespace], list[Row]], **defaults: Any) -> int:
    """The script of a benchmark: its rows as text, or as JSON for all.py. Exit code 1 where one does not pass.

    `defaults` become flags of the same names: --volumes 64.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"default: {default}")
    args = parser.parse_args()
    print(machine())
    rows = measure(args)
    for row in rows:
        print(row.text())
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows]))
    return 0 if all(row.passes for row in rows) else 1


def machine() -> str:
    """The processor, by its own name, and how many cores there are."""
    name, cores = platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
        cores = f", {sum(key.strip() == 'processor' for key, _, _ in lines)} cores"
    return f"{name}{cores}, {platform.system()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def best_of(repeats: int, *actions: Callable[[], Any]) -> list[float]:
    """The shortest time of each, taken in turns, so that a machine that slows down slows them all down."""
    times = [[seconds(action) for action in actions] for _ in range(repeats)]
    return [min(of_one) for of_one in zip(*times, strict=True)]


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yields a list that holds, after the block, the bytes by which resident memory rose above its start (Linux).

    Sampled every millisecond; what lasts shorter is missed. Pages of mapped files count as the process' own.
    """
    peak, ended = [0], threading.Event()
    start = resident()

    def watch() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], resident() - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
        peak[0] = max(peak[0], resident() - start)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
