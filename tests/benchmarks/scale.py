"""A stream of 47,149 volumes simulated, event by event, on 1 to 64 workers, beside the arithmetic of `--plan`.

    python tests/benchmarks/scale.py [--scenario cpu gpu-1g gpu-10g] [--volumes 47149] [--workers 1 4 16 64]

Each worker is what ctclip/hub/streaming.py and download.py make of a process: CONNECTIONS transfers at a time, in
order, while no more than AHEAD files, or --disk-gb of them, are held; one thread that reads the files as they arrive
and waits while one volume is ready; one volume that is encoded; its file goes then. All transfers share the site's
link evenly, none gets more than one connection does. A transfer that fails goes on from its last byte after the waits
of client.WAITS, and the link stands still now and then.

When a machine dies, what is on its scratch disk is gone. With torchrun (`elastic`) all processes start again once it
has been replaced, and what is left is divided anew: of the files that others hold, a process keeps those that are
among the first of its new part, as `clear_staging` does. With `--shard` only the dead one waits, and its part with it.

Own code, heapq only. Rates: what was measured on the machine of LOG.md, or what SCENARIOS says that it is.
"""

from __future__ import annotations

import rows  # noqa: F401  puts the project on the path

# isort: split
import argparse
import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, count
from math import inf, log

from ctclip.hub.client import WAITS
from ctclip.hub.download import AHEAD, CONNECTIONS
from ctclip.job_cost import Phase, Stage, reading_and_computing

HOUR = 3600.0
MB = 1e6


@dataclass(frozen=True)
class Rates:
    """Of one worker, and of the site where it says so. Sizes in bytes, times in seconds, rates in bytes per second."""

    size: float  # of a volume, mean
    spread: float  # of the logarithm of the sizes
    link: float  # of the site: all transfers together
    connection: float  # of one transfer
    read: float  # seconds for a volume of mean size; others in proportion
    encode: float
    start: float  # from the start of a process to its first transfer
    turn: float = 0.0  # of which one process after the other: reading the tables (`in_turn`)
    room: float = 10e9

    def ready(self, workers: int, elastic: bool) -> float:
        """Seconds until all processes that start together are at work; those of --shard have folders of their own."""
        return self.start + (self.turn * (workers - 1) if elastic else 0.0)

    def phase(self, volumes: int, workers: int, elastic: bool) -> Phase:
        """What `ctclip_setup.py --plan` would reckon from the same rates."""
        return Phase("", volumes, (
            Stage("link", "link", self.size / self.link, self.size, shared=True),
            Stage("connections", "connections", self.size / (CONNECTIONS * self.connection)),
            *reading_and_computing(self.read, self.encode, 1, 0.0),
        ), self.ready(workers, elastic))  # fmt: skip


@dataclass(frozen=True)
class Trouble:
    """What goes wrong: share of transfers that break off once, hours between two stalls of the link and seconds that
    one lasts on average, hours between two deaths of a machine and seconds until it is replaced."""

    failing: float = 0.0
    stall_hours: float = inf
    stall_seconds: float = 30.0
    death_hours: float = inf
    replaced: float = 300.0


@dataclass(eq=False)
class Transfer:
    """One attempt at what is left of a volume: `part` bytes come, of which `before` were there; then it `breaks`, or is
    over. `until`: where in the link's service that is."""

    worker: Worker
    volume: int
    before: float
    part: float
    attempt: int
    breaks: bool
    until: float = 0.0
    alive: bool = True


class Link:
    """The transfers under way, which share the site's bandwidth evenly.

    `served` is the bytes that a transfer would have got since the beginning: all get the same, so that each is over at
    a fixed value of it, and the next one is at the top of a heap.
    """

    def __init__(self, rates: Rates):
        self.rates = rates
        self.served = self.moment = self.moved = 0.0
        self.active = 0
        self.stalled = False
        self.heap: list[tuple[float, int, Transfer]] = []
        self.number = count()

    @property
    def rate(self) -> float:
        if self.stalled or not self.active:
            return 0.0
        return min(self.rates.connection, self.rates.link / self.active)

    def advance(self, now: float) -> None:
        step = (now - self.moment) * self.rate
        self.served += step
        self.moved += step * self.active
        self.moment = now

    def add(self, now: float, transfer: Transfer) -> None:
        self.advance(now)
        transfer.until = self.served + transfer.part
        heapq.heappush(self.heap, (transfer.until, next(self.number), transfer))
        self.active += 1

    def drop(self, transfer: Transfer) -> float:
        """Ends it; -> bytes of the volume that have come."""
        transfer.alive = False
        self.active -= 1
        return transfer.before + min(transfer.part, transfer.part - (transfer.until - self.served))

    def next_end(self) -> float:
        """When the next transfer is over, if nothing changes until then."""
        while self.heap and not self.heap[0][2].alive:
            heapq.heappop(self.heap)
        if not self.heap or not self.rate:
            return inf
        return self.moment + max(self.heap[0][0] - self.served, 0.0) / self.rate

    def pop(self) -> Transfer:
        transfer = heapq.heappop(self.heap)[2]
        self.active -= 1
        return transfer


@dataclass
class Worker:
    """One process. `life` counts its starts: an event of an earlier one is void."""

    index: int
    life: int = 0
    waiting: deque[int] = field(default_factory=deque)
    staged: dict[int, float] = field(default_factory=dict)  # volume -> bytes of it on the scratch disk
    transfers: list[Transfer] = field(default_factory=list)
    pausing: int = 0  # transfers between two attempts
    arrived: deque[int] = field(default_factory=deque)
    reading: int | None = None  # being read, or read and kept by the thread while another one is ready
    has_read: bool = False
    ready: int | None = None
    encoding: int | None = None
    since: float = 0.0  # when that began
    held: int = 0
    held_bytes: float = 0.0

    def clear(self) -> None:
        self.waiting.clear()
        self.arrived.clear()
        self.transfers, self.pausing = [], 0
        self.reading = self.ready = self.encoding = None
        self.has_read = False
        self.held, self.held_bytes = 0, 0.0


@dataclass
class Result:
    hours: float
    idle: float  # share of the devices' time in which they did not encode
    deaths: int
    fetched_twice: float  # bytes
    encoded_twice: float  # hours of a device
    retries: int


class Simulation:
    def __init__(self, rates: Rates, trouble: Trouble, volumes: int, workers: int, elastic: bool = True, seed: int = 0):
        self.rates, self.trouble, self.elastic = rates, trouble, elastic
        self.random = random.Random(seed)
        mean = log(rates.size) - rates.spread**2 / 2
        self.sizes = [self.random.lognormvariate(mean, rates.spread) for _ in range(volumes)]
        self.done = bytearray(volumes)
        self.left = volumes
        self.workers = [Worker(index) for index in range(workers)]
        self.link, self.link_plan = Link(rates), 0
        self.events: list[tuple] = []
        self.number = count()
        self.now = self.busy = self.lost_bytes = self.lost_seconds = 0.0
        self.deaths = self.retries = 0

    # ---- events

    def after(self, seconds: float, action: Callable, *arguments: object) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.number), action, arguments))

    def run(self) -> Result:
        self.start_all(self.rates.ready(len(self.workers), self.elastic))
        if self.trouble.stall_hours < inf:
            self.after(self.random.expovariate(1 / (HOUR * self.trouble.stall_hours)), self.stall)
        if self.trouble.death_hours < inf:
            self.after(self.random.expovariate(1 / (HOUR * self.trouble.death_hours)), self.die)
        while self.left:
            self.now, _, action, arguments = heapq.heappop(self.events)
            action(*arguments)
        hours = self.now / HOUR
        idle = 1 - self.busy / (self.now * len(self.workers))
        return Result(hours, idle, self.deaths, self.lost_bytes, self.lost_seconds / HOUR, self.retries)

    def of_life(self, worker: Worker, life: int, action: Callable) -> None:
        if worker.life == life:
            action(worker)

    def later(self, seconds: float, worker: Worker, action: Callable) -> None:
        self.after(seconds, self.of_life, worker, worker.life, action)

    # ---- start, division of what is left

    def start_all(self, seconds: float) -> None:
        left = [volume for volume, done in enumerate(self.done) if not done]
        for worker in self.workers:
            self.begin(worker, left[worker.index :: len(self.workers)], seconds)

    def begin(self, worker: Worker, part: list[int], seconds: float) -> None:
        """A process that starts on its part: of what lies on its disk it keeps the first volumes, as many as fit."""
        totals = accumulate(self.sizes[volume] for volume in part)
        kept = {volume for volume, total in zip(part, totals, strict=True) if total <= self.rates.room}
        self.lost_bytes += sum(size for volume, size in worker.staged.items() if volume not in kept)
        worker.staged = {volume: size for volume, size in worker.staged.items() if volume in kept}
        worker.life += 1
        worker.clear()
        worker.waiting.extend(part)
        self.later(seconds, worker, self.fetch)

    # ---- a worker's pipeline

    def fetch(self, worker: Worker) -> None:
        """Starts transfers while a connection is free and the next file has room."""
        while worker.waiting and len(worker.transfers) + worker.pausing < CONNECTIONS:
            size = self.sizes[worker.waiting[0]]
            if worker.held >= AHEAD or worker.held_bytes + size > self.rates.room:
                break
            volume = worker.waiting.popleft()
            worker.held += 1
            worker.held_bytes += size
            self.attempt(worker, volume, 0)
        self.plan_link()

    def attempt(self, worker: Worker, volume: int, number: int) -> None:
        before = worker.staged.get(volume, 0.0)
        part, breaks = self.sizes[volume] - before, False
        if part > 0 and self.random.random() < self.trouble.failing:
            part, breaks = part * self.random.random(), True
        transfer = Transfer(worker, volume, before, part, number, breaks)
        worker.transfers.append(transfer)
        self.link.add(self.now, transfer)

    def plan_link(self) -> None:
        """The next end of a transfer, anew whenever their number has changed; what was planned before is void."""
        self.link.advance(self.now)
        self.link_plan += 1
        if (end := self.link.next_end()) < inf:
            heapq.heappush(self.events, (end, next(self.number), self.end_transfer, (self.link_plan,)))

    def end_transfer(self, plan: int) -> None:
        if plan != self.link_plan:
            return
        self.link.advance(self.now)
        transfer = self.link.pop()
        worker, volume = transfer.worker, transfer.volume
        worker.transfers.remove(transfer)
        if transfer.breaks:
            worker.staged[volume] = transfer.before + transfer.part
            self.retries += 1
            worker.pausing += 1
            # One whose attempts are used up would be left out, and the run end with an error; with 1 % that does not
            # happen in a thousand such cohorts.
            pause, number = WAITS[transfer.attempt], transfer.attempt + 1
            self.later(pause, worker, lambda worker: self.go_on(worker, volume, number))
        else:
            worker.staged[volume] = self.sizes[volume]
            worker.arrived.append(volume)
            self.read(worker)
        self.fetch(worker)

    def go_on(self, worker: Worker, volume: int, number: int) -> None:
        """With the rest, from its last byte."""
        worker.pausing -= 1
        self.attempt(worker, volume, number)
        self.plan_link()

    def read(self, worker: Worker) -> None:
        """The thread takes the next file, unless it reads one or keeps one that it has read."""
        if worker.reading is None and worker.arrived:
            worker.reading, worker.has_read = worker.arrived.popleft(), False
            seconds = self.rates.read * self.sizes[worker.reading] / self.rates.size
            self.later(seconds, worker, self.end_read)

    def end_read(self, worker: Worker) -> None:
        worker.has_read = True
        self.hand_over(worker)

    def hand_over(self, worker: Worker) -> None:
        """From the thread to the queue of one, and from there to the device."""
        if worker.has_read and worker.ready is None:
            worker.ready, worker.reading, worker.has_read = worker.reading, None, False
            self.read(worker)
        if worker.ready is not None and worker.encoding is None:
            worker.encoding, worker.ready, worker.since = worker.ready, None, self.now
            self.later(self.rates.encode, worker, self.end_encoding)
            self.hand_over(worker)

    def end_encoding(self, worker: Worker) -> None:
        volume, worker.encoding = worker.encoding, None
        assert volume is not None
        self.busy += self.rates.encode
        self.done[volume] = 1
        self.left -= 1
        del worker.staged[volume]
        worker.held -= 1
        worker.held_bytes -= self.sizes[volume]
        self.hand_over(worker)
        self.fetch(worker)

    # ---- trouble

    def stall(self) -> None:
        self.link.advance(self.now)
        self.link.stalled = True
        self.plan_link()
        self.after(self.random.expovariate(1 / self.trouble.stall_seconds), self.end_stall)

    def end_stall(self) -> None:
        self.link.advance(self.now)
        self.link.stalled = False
        self.plan_link()
        self.after(self.random.expovariate(1 / (HOUR * self.trouble.stall_hours)), self.stall)

    def die(self) -> None:
        """A machine, drawn at random. Hours in which one dies while another is being replaced do occur."""
        self.deaths += 1
        dead = self.random.choice(self.workers)
        for worker in self.workers if self.elastic else [dead]:
            self.stop(worker)
        self.lost_bytes += sum(dead.staged.values())
        dead.staged = {}
        down = self.trouble.replaced
        if self.elastic:
            self.start_all(down + self.rates.ready(len(self.workers), True))
        else:
            part = [volume for volume in range(dead.index, len(self.done), len(self.workers)) if not self.done[volume]]
            self.begin(dead, part, down + self.rates.ready(1, False))
        self.plan_link()
        self.after(self.random.expovariate(1 / (HOUR * self.trouble.death_hours)), self.die)

    def stop(self, worker: Worker) -> None:
        """What had come of files stays on its disk; what it was encoding is done again."""
        self.link.advance(self.now)
        for transfer in worker.transfers:
            worker.staged[transfer.volume] = self.link.drop(transfer)
        if worker.encoding is not None:
            self.lost_seconds += self.now - worker.since
        worker.life += 1
        worker.clear()


# ---- scenarios

# Measured on two cores of an AMD EPYC (LOG.md): reading 0.67 s for 87.7 MB, 7.1 s per volume of streaming, start-up and
# its part in turn for 47,149 volumes. Published (CT-CLIP): 0.5 s per volume on a GPU. Assumed: 225 MB per volume, the
# spread of the sizes, links, and 40 MB/s for one connection to the hub.
SITE = {"size": 225 * MB, "spread": 0.5, "connection": 40 * MB, "read": 0.67 * 225 / 87.7, "start": 30.0, "turn": 8.4}
SCENARIOS = {
    "cpu": ("workers of two CPU cores (measured), link of 1 Gbit/s", Rates(link=125 * MB, encode=7.1, **SITE)),
    "gpu-1g": ("workers with a GPU (published), link of 1 Gbit/s", Rates(link=125 * MB, encode=0.5, **SITE)),
    "gpu-10g": ("workers with a GPU (published), link of 10 Gbit/s", Rates(link=1250 * MB, encode=0.5, **SITE)),
}
# Assumed: 1 % of transfers break off, the link stalls for 30 s each hour, a machine dies each hour and is replaced
# after five minutes.
ALL = Trouble(failing=0.01, stall_hours=1.0, death_hours=1.0)
COLUMNS = "workers  arithmetic  simulated  limited by   | torchrun     idle  fetched twice  deaths | --shard      idle"


def row(rates: Rates, volumes: int, workers: int) -> str:
    phase = rates.phase(volumes, workers, elastic=True)
    free = Simulation(rates, Trouble(), volumes, workers).run()
    elastic, shard = (Simulation(rates, ALL, volumes, workers, way).run() for way in (True, False))
    return (
        f"{workers:7}  {phase.seconds(workers) / HOUR:8.1f} h  {free.hours:7.1f} h  {phase.bottleneck(workers).name:11}"
        f"  | {elastic.hours:6.1f} h  {elastic.idle:6.0%}  {elastic.fetched_twice / 1e9:10,.0f} GB  {elastic.deaths:6}"
        f" | {shard.hours:5.1f} h  {shard.idle:6.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--volumes", type=int, default=47_149)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    args = parser.parse_args()
    for name in args.scenario:
        title, rates = SCENARIOS[name]
        print(f"{title}; {args.volumes:,} volumes\n{COLUMNS}")
        for workers in args.workers:
            print(row(rates, args.volumes, workers), flush=True)


if __name__ == "__main__":
    main()
