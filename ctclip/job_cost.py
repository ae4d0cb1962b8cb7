"""Hours and gigabytes of a job that volumes pass through in stages, for one worker or many, and which stage limits it.

A worker is one process with its own device and readers: a GPU with its share of a machine, or a machine. A stage keeps
one resource busy for so many seconds per volume. Stages of one resource take turns, so that their seconds add up; those
of different resources overlap, so that the resource with the most seconds sets the pace. Most resources are each
worker's own: N workers have N of them. A shared one (the network link of a site, what the hub gives, a disk that all
see) stays one. Phases follow one another. Nothing here measures anything but a disk. Standard library only.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from math import ceil, inf
from pathlib import Path
from typing import NamedTuple

from ctclip.formatting import duration, plural

WORKERS = (1, 4, 32)  # that a plan's table speaks of
TRIAL_BYTES = 64_000_000  # written to a disk to measure it; smaller than what most disks hold back in memory, so synced
BLOCK = 1 << 20


class Stage(NamedTuple):
    """What a volume goes through: its name, the resource that is busy, for how many seconds, with how many bytes moved;
    `shared`: all workers have one of that resource."""

    name: str
    resource: str
    seconds: float
    size: float = 0.0
    shared: bool = False


class Phase(NamedTuple):
    """`volumes` passes of a volume through the stages, after `start` seconds that no number of workers shortens."""

    name: str
    volumes: int
    stages: Sequence[Stage]
    start: float = 0.0

    def busy(self, stage: Stage, workers: int) -> float:
        """Seconds that the stage takes in all, on the worker with the most volumes."""
        return (self.volumes if stage.shared else ceil(self.volumes / workers)) * stage.seconds

    def _slowest(self, workers: int) -> tuple[str, float]:
        """The busiest resource, and for how long it is busy."""
        busy = _by_resource((stage, self.busy(stage, workers)) for stage in self.stages)
        return max(busy.items(), key=lambda item: item[1])

    def seconds(self, workers: int) -> float:
        """The start, the busiest resource, and one volume's time in the others: nothing overlaps before the first
        volume has come through them."""
        if not self.volumes:
            return 0.0
        slowest, busy = self._slowest(workers)
        return self.start + busy + sum(stage.seconds for stage in self.stages if stage.resource != slowest)

    def bottleneck(self, workers: int) -> Stage:
        """The longest stage of the busiest resource."""
        slowest, _ = self._slowest(workers)
        return max((s for s in self.stages if s.resource == slowest), key=lambda s: self.busy(s, workers))

    def label(self, stage: Stage) -> str:
        return f"{self.name}: {stage.name}" if self.name else stage.name


def reading_and_computing(
    reading: float, computing: float, readers: int, taken: float, names: tuple[str, str] = ("read", "encode")
) -> tuple[Stage, Stage]:
    """The two stages of a worker with so many reading processes or threads (0: it reads by itself, and computes
    afterwards). Where both use the same CPUs, reading takes `taken` seconds per volume from computing."""
    if not readers:
        return Stage(names[0], "device", reading), Stage(names[1], "device", computing)
    return Stage(names[0], "readers", reading / readers), Stage(names[1], "device", computing + taken)


def pace(stages: Iterable[Stage]) -> float:
    """Seconds per volume of one worker, once the pipeline is full."""
    return max(_by_resource((stage, stage.seconds) for stage in stages).values(), default=0.0)


def _by_resource(busy: Iterable[tuple[Stage, float]]) -> dict[str, float]:
    """Seconds of the stages, added up by what they keep busy."""
    seconds: dict[str, float] = {}
    for stage, of_stage in busy:
        seconds[stage.resource] = seconds.get(stage.resource, 0.0) + of_stage
    return seconds


def total_seconds(phases: Iterable[Phase], workers: int) -> float:
    return sum(phase.seconds(workers) for phase in phases)


def limiting(phases: Iterable[Phase], workers: int) -> tuple[Phase, Stage]:
    """The phase that takes longest, and the stage that limits it. ValueError without any volume."""
    longest = max((phase for phase in phases if phase.volumes), key=lambda phase: phase.seconds(workers))
    return longest, longest.bottleneck(workers)


def cost_table(phases: Iterable[Phase], workers: Sequence[int] = WORKERS) -> list[str]:
    """Lines of a table: time of every stage, of the whole job and its bottleneck, for so many workers; and GB moved."""
    phases = [phase for phase in phases if phase.volumes]
    rows = [("", *(plural(count, "worker") for count in workers), "GB moved")]
    for phase in phases:
        for stage in phase.stages:
            hours = [duration(phase.busy(stage, count)) for count in workers]
            shared = " (one for all)" if stage.shared else ""
            moved = phase.volumes * stage.size / 1e9
            size = f"{moved:,.0f}" if moved >= 10 else f"{moved:.2g}"
            rows.append((phase.label(stage) + shared, *hours, size if moved else ""))
    rows.append(("whole job", *(duration(total_seconds(phases, count)) for count in workers), ""))
    found = [limiting(phases, count) for count in workers]
    rows.append(("bottleneck", *(phase.label(stage) for phase, stage in found), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    first, *others = widths
    lines = (
        "  ".join([f"{row[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    )
    return [line.rstrip() for line in lines]


# ---- the disk


def write_rate(folder: Path) -> float:
    """Bytes per second that the disk of `folder` takes, from a file of TRIAL_BYTES that is gone afterwards. Raises
    OSError where nothing can be written."""
    block = os.urandom(BLOCK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        for _ in range(TRIAL_BYTES // BLOCK):
            file.write(block)
        os.fsync(file.fileno())
        return TRIAL_BYTES // BLOCK * BLOCK / max(time.perf_counter() - start, 1e-9)


def read_rate(paths: Iterable[Path]) -> float:
    """Bytes per second that a disk gives, from the content of files, which the system first drops from its memory where
    it can (Linux). inf where they are empty."""
    size, seconds = 0, 0.0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while block := file.read(BLOCK):
                size += len(block)
            seconds += time.perf_counter() - start
    return size / seconds if size and seconds else inf
