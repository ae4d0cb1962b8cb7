"""What a run will cost, measured in about a minute before anything is spent: `python ctclip_training.py ... --plan`.

Reader, encoder and training step are timed on this machine with a few of the cohort's own volumes; the rest is
arithmetic, and simplified: reading processes add up until every CPU has one (which may be half a core); every unfrozen
epoch takes as long as the last, which has the most layers open; saving and stopping early are left out.
"""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor

from ctclip_cache import FeatureCache, encoding
from ctclip_data import VolumeDataset
from ctclip_phantom import DISCLAIMER
from ctclip_run import Job, Machine, Run, TrainingConfig, TrainingError, prepare
from ctclip_state import KEEP
from ctclip_training import CACHED_PIECE, Moving, accumulate, out_of_memory

MOST_VOLUMES, READING_SECONDS = 8, 15  # read so many, at least 2, and stop after so long
LONG = 5  # seconds: what takes longer needs no warm-up
HEADROOM = 1.1  # on memory: fragmentation, and what other programs may take meanwhile
SMALL_FILES = 5_000_000  # bytes of figures, tables and logs in a run's folder


def plan(config: TrainingConfig, folder: Path, machine: Machine) -> None:
    """Measures, and prints what the run in `folder` would take. Writes nothing but a built-in cohort.

    Raises TrainingError where memory or disk do not suffice, and what `prepare` raises. Of several processes the main
    one measures, while the others wait and so leave it the machine.
    """
    job = prepare(config, folder, machine)
    ranks = job.run.ranks
    try:
        if ranks.is_main:
            job.run.say("Measuring disk, reader and model: about a minute")
            job.run.say(Probe(job).text())
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise lacking(job.run, None, "the frozen backbone", "use a device with more, or --device cpu") from error
    finally:
        ranks.barrier()


class Probe:
    """The measurements and what follows from them, one line of the plan after the other."""

    def __init__(self, job: Job):
        self.job, self.run, self.config, self.model = job, job.run, job.run.config, job.model
        self.world = self.run.ranks.world
        self.run.ranks = copy.copy(self.run.ranks)
        self.run.ranks.world = 1  # the steps measured here must not wait for the other processes
        self.train, self.tuning = (job.splits[name].volumes for name in ("train", "tuning"))
        self.share = ceil(self.config.batch_size / self.world)  # of a step, for each process
        self.frozen = self.config.frozen_epochs
        self.unfrozen = self.config.epochs - self.frozen
        self.layers = self.model.layers()
        self.opened = self.config.open_layers(self.config.epochs - 1, len(self.layers))
        names = {name for layer in self.layers[len(self.layers) - self.opened :] for name in layer}
        head = {id(parameter) for parameter in self.model.head_parameters()}
        moving = [p for name, p in self.model.named_parameters() if name in names or id(p) in head]
        self.moving_bytes = sum(p.numel() * p.element_size() for p in moving)  # at the end
        self.copies = 2 + bool(self.config.ema_decay)  # of what moves: AdamW's moments, the average
        self.seconds = 0.0  # of the whole run
        self.needs: list[int | None] = []  # bytes of memory of everything that has been measured

    def text(self) -> str:
        """Everything that is printed. The disk comes first: it needs no measuring to be found too small."""
        run = self.run
        self.available = available_memory(run.device)
        cache = FeatureCache(self.config.cache_dir, self.model)
        # Without frozen epochs there is no cache; augmented training volumes have none.
        cached = [] if not self.frozen else self.tuning if self.config.augment else [*self.train, *self.tuning]
        missing = cache.rows(cached).count(None)
        disk = self.disk(cache, missing)
        self.reader = read_some(self.job)
        lines = {
            "Device": self.device(),
            "Volumes": f"{len(self.train)} train, {len(self.tuning)} tuning, {missing} not in the cache yet",
            "Reading": self.reading(),
            "Encoding": self.encoding(missing),
            "Frozen": self.frozen_stage(cache, len(cached)),
            "Unfrozen": self.unfrozen_stage(),
        }
        lines["Memory"] = "not known on this system"
        if self.available is not None and None not in self.needs:
            need = max(self.needs)
            if need > self.available:
                raise lacking(run, need, "the frozen backbone", "use a device with more, or --device cpu")
            lines["Memory"] = f"{size_text(need)} of {size_text(self.available)}"
        lines |= {"Disk": disk, "Total": f"about {duration(self.seconds)}"}
        failed = f", {self.reader.failed} more could not be read" if self.reader.failed else ""
        written = "nothing" if self.config.data_dir else "nothing but the built-in cohort"
        text = f"Plan (measured on {self.reader.read} volumes{failed}; {written} has been written)\n"
        text += "\n".join(f"  {name:<12} {line}" for name, line in lines.items())
        # Without --data-dir, `prepare` has said so already.
        return f"{text}\n{DISCLAIMER}" if self.job.phantom and self.config.data_dir else text

    def device(self) -> str:
        run = self.run
        on_gpu = run.device.type == "cuda"
        name = torch.cuda.get_device_name(run.device) if on_gpu else f"{torch.get_num_threads()} threads"
        free = "free memory not known" if self.available is None else f"{size_text(self.available)} free"
        precision = str(run.dtype).removeprefix("torch.") + " with loss scaling" * run.scaler.is_enabled()
        number = f"{self.world} processes, this one on " if self.world > 1 else ""
        return f"{number}{run.device}, {name}, {free}; {precision}"

    def reading(self) -> str:
        readers = reading_processes(self.run)
        rate = readers * self.world / self.reader.seconds
        who = f"and process, {readers * self.world} processes" if self.run.workers else "by the main process"
        return f"{duration(self.reader.seconds)} per volume {who}: {rate:.1f} volumes/s"

    def encoding(self, missing: int) -> str:
        """Once, in float32. In the precision of training too, where that is another one: `self.forward`."""
        run, model = self.run, self.model
        volume = self.reader.volume[None].to(run.device)
        with encoding(model, run.device):
            encoder = self.forward = measure_warm(run, lambda: model.compact(volume))
        self.needs.append(self.with_headroom(encoder.peak, run.micro_batch))
        if run.dtype != torch.float32 and (self.unfrozen or self.config.augment):
            with torch.no_grad(), run.autocast():
                self.forward = measure_warm(run, lambda: model.eval()(volume))
        if not missing:
            return "nothing left to encode" if self.frozen else "none: no frozen epochs"
        seconds = missing * pace(run, self.reader.seconds, encoder.seconds) / self.world
        self.seconds += seconds
        slower = "reading" if self.reader.seconds / reading_processes(run) > encoder.seconds else "computing"
        return f"{duration(encoder.seconds)} per volume (float32), once: {duration(seconds)}, most of it {slower}"

    def frozen_stage(self, cache: FeatureCache, cached: int) -> str:
        """Steps of the head on random features, for the training volumes and, as an upper bound, for the others."""
        if not self.frozen:
            return "none"
        run, model, labels = self.run, self.model, self.job.splits["train"].labels
        size = min(self.share, run.micro_batch * CACHED_PIECE, len(labels))
        shape = (size, *cache.shape)
        codes = model.compact_kind == "codes"
        compact = (torch.randint(model.sizes.codes, shape) if codes else torch.rand(shape)).to(run.device)
        with torch.no_grad():
            features = measure_warm(run, lambda: model.from_compact(compact))
            inputs = model.from_compact(compact)
        moving = Moving(run, model)
        moving.advance(0)
        model.train()

        def step() -> None:
            stream = iter([(inputs, labels[:size].to(run.device), [], True)])
            accumulate(run, model, self.job.criterion, stream, size, cached=True)
            moving.step(0.0)

        head = measure_warm(run, step)
        self.needs += [self.with_headroom(cost.peak, 0) for cost in (features, head)]
        epoch = (len(self.train) + len(self.tuning)) * head.seconds / size / self.world
        if self.config.augment:  # no cache for these
            epoch += len(self.train) * pace(run, self.reader.seconds, self.forward.seconds) / self.world
        once = cached * features.seconds / size  # each process makes all of them
        self.seconds += once + self.frozen * epoch
        return f"{self.frozen} epochs x {duration(epoch)}" + (
            f", after {duration(once)} of latents" if once > 1 else ""
        )

    def unfrozen_stage(self) -> str:
        if not self.unfrozen:
            return "none"
        run, reading = self.run, self.reader.seconds
        wanted = min(run.micro_batch, self.share)
        size, step = self.training_step(wanted)
        epoch = len(self.train) * pace(run, reading, step.seconds) + len(self.tuning) * pace(
            run, reading, self.forward.seconds
        )
        self.seconds += self.unfrozen * epoch / self.world
        return (
            f"{self.unfrozen} epochs x {duration(epoch / self.world)}, {self.opened} of {len(self.layers)} layers open "
            f"at the end, micro-batch {size}, {ceil(self.share / size)} accumulation steps, batch "
            f"{self.config.batch_size}, checkpointing {'on' if run.checkpointing else 'off'}"
            + (f"; add --micro-batch {size}: {wanted} do not fit" if size < wanted else "")
        )

    def training_step(self, wanted: int) -> tuple[int, Cost]:
        """The micro-batch, `wanted` or a half, a quarter, ... of it, whose pass fits, and seconds per volume.

        Raises TrainingError when a single volume does not fit.
        """
        run, model = self.run, self.model
        model.unfreeze_backbone(self.opened)
        model.train()
        for parameter in model.parameters():  # as from the second pass of a step on: gradients are there to be added to
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        later = self.copies * self.moving_bytes
        before = held_memory(run.device)
        one = self.measure_pass(1)
        need, size = None, wanted
        while one is not None and size:
            cost = Cost(one.seconds * size, one.peak and one.peak + (size - 1) * (one.peak - before))
            need = self.with_headroom(cost.peak, size, later)
            if self.fits(need):
                if cost.seconds <= 2 * LONG:  # else the prediction has to do
                    cost = self.measure_pass(size)
                need = None if cost is None else self.with_headroom(cost.peak, size, later)
                if cost is not None and self.fits(need):
                    self.needs.append(need)
                    return size, Cost(cost.seconds / size, cost.peak)
            size //= 2
        remedies = ["open fewer layers (--unfreeze-layers 1)"] if self.config.unfreeze_layers != 1 else []
        remedies += [] if run.checkpointing else ["add --gradient-checkpointing on"]
        remedies += ["keep the backbone frozen (--freeze-backbone)", "use a larger GPU"]
        what = f"one volume at a time with {self.opened} of {len(self.layers)} layers open"
        raise lacking(run, need, what, ", or ".join(remedies))

    def measure_pass(self, size: int) -> Cost | None:
        """Forward and backward of so many volumes; None: out of memory."""
        run, reader = self.run, self.reader

        def act() -> None:
            volumes = torch.stack([reader.volume] * size).to(run.device)
            labels = torch.stack([reader.labels] * size).to(run.device)
            stream = iter([(volumes, labels, [reader.name], True)])
            if accumulate(run, self.model, self.job.criterion, stream, size, cached=False).bad:
                raise TrainingError(
                    f"{reader.name}: found a loss that is not finite, expected a number; look at this volume"
                )

        try:
            return measure(run, act)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def with_headroom(self, peak: int | None, size: int, later: int = 0) -> int | None:
        """Bytes to have for `peak` bytes, `later` ones, and on the CPU the volumes that are read ahead."""
        if peak is None:
            return None
        volume = 4 * prod(self.model.input_shape)
        ahead = self.run.workers * size * volume if self.run.device.type == "cpu" else 0
        return int(HEADROOM * (peak + later + ahead))

    def fits(self, need: int | None) -> bool:
        return need is None or self.available is None or need <= self.available

    def disk(self, cache: FeatureCache, missing: int) -> str:
        """Bytes for the cache, and for the run at its fullest: while the next weights or the next state are written."""
        folder = self.run.folder
        cache_need, cache_free = cache.room(missing)
        if cache_need > cache_free:
            raise TrainingError(cache.no_room(missing, "too little room"))
        weights = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        state = (1 + self.copies) * self.moving_bytes
        need = weights + KEEP * state + max(weights, state) + SMALL_FILES
        own, other = existing(folder), existing(cache.folder)
        free = shutil.disk_usage(own).free
        shared = cache_need if own.stat().st_dev == other.stat().st_dev else 0
        if need + shared > free:
            also = f", and {size_text(shared)} for the cache" if shared else ""
            raise TrainingError(
                f"{folder}: found {size_text(free)} free on its disk, expected {size_text(need)} for the weights and "
                f"{KEEP + 1} states of this run{also}; free that much on it, or choose an --output-dir elsewhere"
            )
        return (
            f"cache {size_text(cache_need)} of {size_text(cache_free)} free in {self.config.cache_dir}; "
            f"run {size_text(need)} of {size_text(free)} free in {folder.parent}"
        )


# ------------------------------------------------------------------ the reader


@dataclass(frozen=True)
class Reader:
    """Seconds per volume in one process, from how many volumes, and one of those: (1, D, H, W), labels (18,)."""

    seconds: float
    read: int
    failed: int
    name: str
    volume: Tensor
    labels: Tensor


def read_some(job: Job) -> Reader:
    """Reads training volumes as the run will. Others each time: a file read before may come from memory, not disk."""
    volumes = job.splits["train"].volumes
    chosen = random.Random().sample(volumes, min(MOST_VOLUMES, len(volumes)))
    dataset = VolumeDataset(chosen, job.model.input_shape, 0 if job.run.config.augment else None)
    times, reasons = [], []
    for i in range(len(chosen)):
        start = time.perf_counter()
        index, volume, *rest = dataset[i]
        if volume is None:
            reasons.append(": ".join(rest))
            job.run.say(f"left out (train): {reasons[-1]}")
            continue
        times.append(time.perf_counter() - start)
        good = chosen[index].name, volume, rest[0]
        if len(times) >= 2 and sum(times) > READING_SECONDS:
            break
    if not times:
        raise TrainingError(
            f"{job.data_dir}: found none of {len(chosen)} training volumes readable ({reasons[0]}), expected most; "
            "copy or download them again"
        )
    return Reader(sum(times) / len(times), len(times), len(reasons), *good)


def reading_processes(run: Run) -> int:
    """How many of a rank's reading processes have a CPU; the main process reads where there are none beside it."""
    return max(1, min(run.workers, (os.cpu_count() or 1) // local_world()))


def local_world() -> int:
    """Ranks on this machine, which share its CPUs and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def pace(run: Run, reading: float, computing: float) -> float:
    """Seconds per volume on one rank.

    Reading processes work while the device computes; on the CPU they take the time for it from computing. Without any,
    one comes after the other.
    """
    if not run.workers:
        return reading + computing
    taken = reading * local_world() / (os.cpu_count() or 1) if run.device.type == "cpu" else 0.0
    return max(reading / reading_processes(run), computing + taken)


# ------------------------------------------------------------------ time, memory, disk


@dataclass(frozen=True)
class Cost:
    """Seconds, and the most bytes that this process held on the device, weights included (None: not known here)."""

    seconds: float
    peak: int | None


def measure(run: Run, action: Callable[[], object]) -> Cost:
    on_gpu = run.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(run.device)
        torch.cuda.reset_peak_memory_stats(run.device)
    known = on_gpu or reset_high_water_mark()
    start = time.perf_counter()
    action()
    if on_gpu:
        torch.cuda.synchronize(run.device)
    seconds = time.perf_counter() - start
    return Cost(seconds, held_memory(run.device, most=True) if known else None)


def measure_warm(run: Run, action: Callable[[], object]) -> Cost:
    first = measure(run, action)
    return first if first.seconds > LONG else measure(run, action)


def linux_table(file: str, name: str) -> int | None:
    """Bytes that a line such as `VmHWM:  1234 kB` tells; None where there is no such table."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def reset_high_water_mark() -> bool:
    """Lets Linux forget the most memory that this process has held; False elsewhere."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def held_memory(device: torch.device, most: bool = False) -> int | None:
    """Bytes that this process holds on the device, or the most since it was last forgotten; None: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if most else torch.cuda.memory_allocated(device)
    return linux_table("/proc/self/status", "VmHWM" if most else "VmRSS")


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can have on the device, with those that it holds already; None: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free, held = linux_table("/proc/meminfo", "MemAvailable"), held_memory(device)
    if free is None or held is None:
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.exists() else "max"
    return free // local_world() + held if text == "max" else min(free // local_world() + held, int(text))


def lacking(run: Run, need: int | None, what: str, remedy: str) -> TrainingError:
    available = available_memory(run.device)
    found = "too little memory" if available is None else f"{size_text(available)} of memory"
    expected = "more than that" if need is None else size_text(need)
    return TrainingError(f"{run.device}: found {found}, expected {expected} for {what}; {remedy}")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 1e-3):.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size_text(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
