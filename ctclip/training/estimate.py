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
from math import ceil, inf, isfinite, nan, prod
from pathlib import Path

import torch

from ctclip.config import SYNTHETIC_NOTE
from ctclip.data.feature_cache import FeatureCache, encoding, existing
from ctclip.data.loading import VolumeDataset
from ctclip.training.checkpoint import KEEP
from ctclip.training.loop import CACHED_PIECE, Moving, accumulate, out_of_memory
from ctclip.training.run import Job, Machine, TrainingConfig, TrainingError, prepare

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
    finally:
        ranks.barrier()


class Probe:
    """The measurements and what follows from them, one line of the plan after the other. Uses the job up."""

    def __init__(self, job: Job):
        self.job, self.run, self.config, self.model = job, job.run, job.run.config, job.model
        self.world = self.run.ranks.world
        self.run.ranks = copy.copy(self.run.ranks)
        self.run.ranks.world = 1  # the steps measured here must not wait for the other processes
        self.share = ceil(self.config.batch_size / self.world)  # of a step, for each process
        self.train, self.tuning = (job.splits[name].volumes for name in ("train", "tuning"))
        self.frozen = self.config.frozen_epochs
        self.unfrozen = self.config.epochs - self.frozen
        layers = self.model.layers()
        self.layers, self.opened = len(layers), self.config.open_layers(self.config.epochs - 1, len(layers))
        names = {name for layer in layers[self.layers - self.opened :] for name in layer}
        head = {id(parameter) for parameter in self.model.head_parameters()}
        moving = [p for name, p in self.model.named_parameters() if name in names or id(p) in head]
        self.moving_bytes = sum(p.numel() * p.element_size() for p in moving)  # at the end
        self.copies = 2 + bool(self.config.ema_decay)  # of what moves: AdamW's moments, the average
        self.cpus = (os.cpu_count() or 1) / local_world()  # of a rank
        self.readers = max(1, min(self.run.workers, int(self.cpus)))  # the main process where there are no others
        self.available = available_memory(self.run.device)
        self.needs: list[float] = []  # bytes of memory of everything that has been measured
        self.seconds = 0.0  # of the whole run

    def text(self) -> str:
        """Everything that is printed. The disk comes first: finding it too small needs no measuring."""
        lines = {}
        try:
            cache = FeatureCache(self.config.cache_dir, self.model)
            # Without frozen epochs there is no cache; augmented training volumes have none.
            cached = [] if not self.frozen else self.tuning if self.config.augment else [*self.train, *self.tuning]
            rows = cache.rows(cached)
            missing = rows.count(None)
            if problem := cache.missing_message(cached, rows):
                raise TrainingError(problem)
            disk = self.disk(cache, missing)
            self.read_some()
            lines |= {
                "Device": self.device(),
                "Volumes": f"{len(self.train)} train, {len(self.tuning)} tuning, {missing} not in the cache yet",
                "Reading": self.reading(),
                "Encoding": self.encoding(missing),
                "Frozen": self.frozen_stage(cache, len(cached)),
            }
            lines["Unfrozen"] = self.unfrozen_stage()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise self.lacking(inf, unfrozen="Frozen" in lines) from error
        need = max(self.needs)
        if not self.fits(need):
            raise self.lacking(need)
        known = isfinite(sum(self.needs) + self.available)
        lines["Memory"] = f"{size_text(need)} of {size_text(self.available)}" if known else "not known on this system"
        lines |= {"Disk": disk, "Total": f"about {duration(self.seconds)}"}
        failed = f", {self.failed} more could not be read" if self.failed else ""
        written = "nothing" if self.config.data_dir else "nothing but the built-in cohort"
        text = f"Plan (measured on {self.measured} volumes{failed}; {written} has been written)\n"
        text += "\n".join(f"  {name:<12} {line}" for name, line in lines.items())
        # Without --data-dir, `prepare` has said so already.
        return f"{text}\n{SYNTHETIC_NOTE}" if self.job.phantom and self.config.data_dir else text

    # -- the lines -----------------------------------------------------------------------------------------------------

    def disk(self, cache: FeatureCache, missing: int) -> str:
        """Bytes for the cache, and for the run at its fullest: while the next weights or the next state are written."""
        folder = self.run.folder
        cache_need, cache_free = cache.disk_space(missing)
        if cache_need > cache_free:
            raise TrainingError(cache.disk_full_message(missing, "too little room"))
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self.model.state_dict().values())
        state = (1 + self.copies) * self.moving_bytes
        need = weights + KEEP * state + max(weights, state) + SMALL_FILES
        own, other = existing(folder), existing(cache.folder)
        free = shutil.disk_usage(own).free
        same = cache_need if own.stat().st_dev == other.stat().st_dev else 0
        if need + same > free:
            also = f", and {size_text(same)} for the cache" if same else ""
            raise TrainingError(
                f"{folder}: found {size_text(free)} free on its disk, expected {size_text(need)} for the weights and "
                f"{KEEP + 1} states of this run{also}; free that much on it, or choose an --output-dir elsewhere"
            )
        return (
            f"cache {size_text(cache_need)} of {size_text(cache_free)} free in {self.config.cache_dir}; "
            f"run {size_text(need)} of {size_text(free)} free in {folder.parent}"
        )

    def read_some(self) -> None:
        """Reads training volumes as the run will. Others each time: what was read before may come from memory.

        Where training volumes were streamed, what may have to be read is among the tuning volumes; where all were,
        `measured` stays 0, and there is no reading and no encoding to measure.
        """
        self.measured = self.failed = 0
        on_disk = [[volume for volume in side if volume.signature is None] for side in (self.train, self.tuning)]
        readable = on_disk[0] or on_disk[1]
        if not readable:
            return
        chosen = random.Random().sample(readable, min(MOST_VOLUMES, len(readable)))
        dataset = VolumeDataset(chosen, self.model.input_shape, 0 if self.config.augment else None)
        times, reasons = [], []
        for i in range(len(chosen)):
            start = time.perf_counter()
            _, volume, *rest = dataset[i]
            if volume is None:
                reasons.append(": ".join(rest))
                self.run.say(f"skipped (train): {reasons[-1]}")
                continue
            times.append(time.perf_counter() - start)
            self.name, self.volume, self.labels = chosen[i].name, volume, rest[0]  # (1, D, H, W), (18,)
            if len(times) >= 2 and sum(times) > READING_SECONDS:
                break
        if not times:
            raise TrainingError(
                f"{self.job.data_dir}: found {len(chosen)} of {len(chosen)} training volumes unreadable "
                f"({reasons[0]}), expected CT volumes; copy or download them again"
            )
        self.measured, self.failed, self.reading_seconds = len(times), len(reasons), sum(times) / len(times)

    def device(self) -> str:
        run, threads = self.run, torch.get_num_threads()
        name = f"{threads} thread{'s' * (threads > 1)}"
        if run.device.type == "cuda":
            name = torch.cuda.get_device_name(run.device)
        free = f"{size_text(self.available)} free" if isfinite(self.available) else "free memory not known"
        precision = str(run.dtype).removeprefix("torch.") + " with loss scaling" * run.scaler.is_enabled()
        number = f"{self.world} processes, the first on " if self.world > 1 else ""
        return f"{number}{run.device}, {name}, {free}; {precision}"

    def reading(self) -> str:
        if not self.measured:
            return "not measured: the volumes were streamed and have no file"
        readers = self.readers * self.world
        who = f"and process, {readers} processes" if self.run.workers else "by the main process"
        return f"{duration(self.reading_seconds)} per volume {who}: {readers / self.reading_seconds:.1f} volumes/s"

    def encoding(self, missing: int) -> str:
        """Encoding, once, and evaluating are in float32; passes over augmented voxels in the precision of training."""
        if not self.measured:
            return "nothing left to encode"
        run, model = self.run, self.model
        volume = self.volume[None].to(run.device)
        with encoding(model, run.device):
            encoder = self.encoder = self.forward = measure_warm(run.device, lambda: model.encode_for_cache(volume))
        self.needs.append(self.with_headroom(encoder.peak, run.micro_batch))
        if run.dtype != torch.float32 and self.config.augment:
            with torch.no_grad(), run.autocast():
                self.forward = measure_warm(run.device, lambda: model.eval()(volume))
        if not missing:
            return "nothing left to encode" if self.frozen else "none"
        seconds = missing * self.pace(encoder) / self.world
        self.seconds += seconds
        slower = "reading" if self.reading_seconds / self.readers > encoder.seconds else "computing"
        return f"{duration(encoder.seconds)} per volume (float32), once: {duration(seconds)}, most of it {slower}"

    def frozen_stage(self, cache: FeatureCache, cached: int) -> str:
        """Steps of the head on random features, for training volumes and, as an upper bound, for tuning volumes."""
        if not self.frozen:
            return "none"
        run, model, labels = self.run, self.model, self.job.splits["train"].labels
        size = min(self.share, run.micro_batch * CACHED_PIECE, len(labels))
        shape = (size, *cache.shape)
        codes = model.cache_format == "codes"
        stored = (torch.randint(model.sizes.codes, shape) if codes else torch.rand(shape)).to(run.device)
        with torch.no_grad():
            features = measure_warm(run.device, lambda: model.features_from_cache(stored))
            inputs = model.features_from_cache(stored)
        moving = Moving(run, model)
        moving.advance(0)
        model.train()

        def step() -> None:
            stream = iter([(inputs, labels[:size].to(run.device), [], True)])
            accumulate(run, model, self.job.criterion, stream, size, cached=True)
            moving.step(0.0)

        head = measure_warm(run.device, step)
        self.needs += [self.with_headroom(cost.peak, 0) for cost in (features, head)]
        epoch = (len(self.train) + len(self.tuning)) * head.seconds / size / self.world
        if self.config.augment:
            epoch += len(self.train) * self.pace(self.forward) / self.world
        once = cached * features.seconds / size  # for CT-CLIP's latents; each process makes all of them
        self.seconds += once + self.frozen * epoch
        before = f", after {duration(once)} for latents" if once > 1 else ""
        return f"{self.frozen} epochs x {duration(epoch)}{before}"

    def unfrozen_stage(self) -> str:
        if not self.unfrozen:
            return "none"
        wanted = min(self.run.micro_batch, self.share)
        size, step = self.training_pass(wanted)
        epoch = (len(self.train) * self.pace(step) + len(self.tuning) * self.pace(self.encoder)) / self.world
        self.seconds += self.unfrozen * epoch
        return (
            f"{self.unfrozen} epochs x {duration(epoch)}, {self.opened} of {self.layers} layers open at the end, batch "
            f"{self.config.batch_size}, micro-batch {size}, accumulation {ceil(self.share / size)}, checkpointing "
            + ("on" if self.run.checkpointing else "off")
            + (f"; add --micro-batch {size}: {wanted} do not fit" if size < wanted else "")
        )

    def training_pass(self, wanted: int) -> tuple[int, Cost]:
        """The micro-batch, `wanted` or a half, a quarter, ... of it, whose pass fits, and its cost per volume.

        Raises TrainingError where a single volume does not fit.
        """
        self.model.unfreeze_backbone(self.opened)
        self.model.train()
        for parameter in self.model.parameters():  # as from a step's second pass on: gradients are added to
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        before = held_memory(self.run.device)
        one, later = self.measure_pass(1), self.copies * self.moving_bytes
        size = wanted
        while size:
            cost = Cost(size * one.seconds, before + size * (one.peak - before))
            need = self.with_headroom(cost.peak + later, size)
            # The prediction is an upper bound. On the CPU, trying more than there is would end this process.
            if cost.seconds <= 2 * LONG and (self.run.device.type == "cuda" or self.fits(need)):
                cost = self.measure_pass(size)
                need = self.with_headroom(cost.peak + later, size)
            if isfinite(cost.seconds) and self.fits(need):
                self.needs.append(need)
                return size, Cost(cost.seconds / size, cost.peak)
            size //= 2
        raise self.lacking(need, unfrozen=True)

    def measure_pass(self, size: int) -> Cost:
        """Forward and backward of so many volumes; infinite when out of memory."""

        def one_pass() -> None:
            volumes = torch.stack([self.volume] * size).to(self.run.device)
            labels = torch.stack([self.labels] * size).to(self.run.device)
            stream = iter([(volumes, labels, [self.name], True)])
            if accumulate(self.run, self.model, self.job.criterion, stream, size, cached=False).bad:
                raise TrainingError(f"{self.name}: found a loss that is not finite, expected a number; see the scan")

        try:
            return measure(self.run.device, one_pass)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if self.run.device.type == "cuda":
            torch.cuda.empty_cache()
        return Cost(inf, inf)

    # -- what they rest on ---------------------------------------------------------------------------------------------

    def pace(self, computing: Cost) -> float:
        """Seconds per volume on one rank.

        Reading processes work while the device computes; on the CPU they take the time for it from computing. Without
        any, one comes after the other.
        """
        if not self.run.workers:
            return self.reading_seconds + computing.seconds
        taken = self.reading_seconds / self.cpus if self.run.device.type == "cpu" else 0.0
        return max(self.reading_seconds / self.readers, computing.seconds + taken)

    def with_headroom(self, peak: float, size: int) -> float:
        """Bytes to have for `peak` bytes and, on the CPU, for the volumes that are read ahead."""
        ahead = self.run.workers * size * 4 * prod(self.model.input_shape) if self.run.device.type == "cpu" else 0
        return HEADROOM * (peak + ahead)

    def fits(self, need: float) -> bool:
        """Whether there are so many bytes of memory, as far as is known."""
        return not need > self.available

    def lacking(self, need: float, unfrozen: bool = False) -> TrainingError:
        """The one line for too little memory."""
        what, remedies = "the frozen backbone", ["use a device with more"]
        if unfrozen:
            what = f"one volume at a time with {self.opened} of {self.layers} layers open"
            remedies = ["open fewer layers (--unfreeze-layers 1)"] * (self.config.unfreeze_layers != 1)
            if not self.run.checkpointing and self.run.set_checkpointing(self.model, True):  # not every model can
                remedies.append("add --gradient-checkpointing on")
            remedies += ["keep the backbone frozen (--freeze-backbone)", "use a larger GPU"]
        found = f"{size_text(self.available)} of memory" if isfinite(self.available) else "too little memory"
        expected = size_text(need) if isfinite(need) else "more"
        remedy = ", or ".join(remedies)
        return TrainingError(f"{self.run.device}: found {found}, expected {expected} for {what}; {remedy}")


# ------------------------------------------------------------------ time, memory, disk


def local_world() -> int:
    """Ranks on this machine, which share its CPUs and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@dataclass(frozen=True)
class Cost:
    """Seconds, and the most bytes that this process held on the device, weights included (nan: not known here)."""

    seconds: float
    peak: float


def measure(device: torch.device, action: Callable[[], object]) -> Cost:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    known = on_gpu or reset_high_water_mark()
    start = time.perf_counter()
    action()
    if on_gpu:
        torch.cuda.synchronize(device)
    return Cost(time.perf_counter() - start, held_memory(device, most=True) if known else nan)


def measure_warm(device: torch.device, action: Callable[[], object]) -> Cost:
    first = measure(device, action)
    return first if first.seconds > LONG else measure(device, action)


def linux_table(file: str, name: str) -> float:
    """Bytes that a line such as `VmHWM:  1234 kB` tells; nan where there is no such table."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE)
    except OSError:
        return nan
    return int(found[1]) * 1024 if found else nan


def reset_high_water_mark() -> bool:
    """Lets Linux forget the most memory that this process has held; False elsewhere."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def held_memory(device: torch.device, most: bool = False) -> float:
    """Bytes that this process holds on the device, or the most since that was last reset; nan: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if most else torch.cuda.memory_allocated(device)
    return linux_table("/proc/self/status", "VmHWM" if most else "VmRSS")


def available_memory(device: torch.device) -> float:
    """Bytes that this process can have on the device, with those that it holds already; nan: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.exists() else "max"
    most = inf if text == "max" else int(text) / local_world()
    return min(linux_table("/proc/meminfo", "MemAvailable") / local_world() + held_memory(device), most)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 1e-3):.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size_text(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
