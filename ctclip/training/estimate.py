"""What a run will cost, measured in about a minute before anything is spent: `python ctclip_training.py ... --plan`.

Reader, encoder and training step are timed on this machine with a few of the cohort's own volumes; the rest is
arithmetic, and simplified: reading processes add up until every CPU has one (which may be half a core); every unfrozen
epoch takes as long as the last, which has the most layers unfrozen; saving and stopping early are left out.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf, isfinite, nan, prod
from pathlib import Path

import torch
from torch import Tensor

from ctclip.config import SYNTHETIC_NOTE, Machine, TrainingConfig, TrainingError
from ctclip.data.feature_cache import FeatureCache, encoding, nearest_existing
from ctclip.data.loading import VolumeDataset
from ctclip.formatting import plural, size_text
from ctclip.memory import out_of_memory, process_memory, reset_peak_memory, system_memory
from ctclip.training.checkpoint import KEEP
from ctclip.training.optimization import TrainableParameters
from ctclip.training.run import TrainingJob, prepare
from ctclip.training.steps import CACHED_MICRO_BATCH, MicroBatch, accumulate_gradients

MOST_VOLUMES, READING_SECONDS = 8, 15  # read so many, at least 2, and stop after so long
LONG = 5  # seconds: what takes longer needs no warm-up
HEADROOM = 1.1  # on memory: fragmentation, and what other programs may take meanwhile
SMALL_FILES = 5_000_000  # bytes of figures, tables and logs in a run's folder

in_bytes = partial(size_text, digits=1)


def print_estimate(config: TrainingConfig, folder: Path, machine: Machine) -> None:
    """Measures, and prints what the run in `folder` would take. Writes nothing but a built-in cohort.

    Raises TrainingError where memory or disk do not suffice, and what `prepare` raises. Of several processes the main
    one measures, while the others wait and so leave it the machine.
    """
    job = prepare(config, folder, machine)
    ranks = job.run.ranks
    try:
        if ranks.is_main:
            job.run.log("Measuring disk, reader and model: about a minute")
            job.run.log(estimate_text(job, estimate(job)))
    finally:
        ranks.barrier()


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What the run will do, and the machine that it has: known before anything is measured."""

    world: int
    rank_batch: int  # volumes of a step, for each rank
    train: int  # volumes
    validation: int
    cached: int  # volumes that frozen epochs read from the cache
    missing: int  # of these, not in the cache yet
    frozen_epochs: int
    unfrozen_epochs: int
    layers: int
    unfrozen_layers: int  # in the last epoch
    trainable_bytes: int  # in the last epoch
    copies: int  # of the trainable parameters: AdamW's moments, the moving average
    cpus: float  # for each rank
    workers: int
    on_cpu: bool
    available: float  # bytes of memory, for each rank; inf: not known

    @property
    def readers(self) -> int:
        """Processes that read at the same time, for each rank; the main one where there are no others."""
        return max(1, min(self.workers, int(self.cpus)))

    def fits(self, need: float) -> bool:
        return not need > self.available  # nan, not known, fits


@dataclass(frozen=True)
class Disk:
    """Bytes needed and free, for the cache and for the run's folder."""

    cache_need: int
    cache_free: int
    run_need: int
    run_free: int


@dataclass(frozen=True)
class Reading:
    """Seconds to read a volume, from how many, how many more could not be read, and one of them."""

    seconds: float
    measured: int
    failed: int
    name: str
    volume: Tensor  # (1, D, H, W)
    labels: Tensor  # (18,)


@dataclass(frozen=True)
class Cost:
    """Seconds, and the most bytes that this process held on the device, weights included (nan: not known here)."""

    seconds: float
    peak: float


@dataclass
class Estimate:
    """Seconds of the stages of a run, and the bytes of memory of the largest. Stages that do not take place cost 0."""

    workload: Workload
    disk: Disk
    reading: Reading | None  # None: the volumes were streamed and have no file
    encode_volume: float = 0.0
    encode_all: float = 0.0
    encoding_is_read_bound: bool = False
    latents: float = 0.0  # once, from cached codes
    frozen_epoch: float = 0.0
    unfrozen_epoch: float = 0.0
    micro_batch: int = 0
    wanted_micro_batch: int = 0
    checkpointing: bool = False
    memory: list[float] = field(default_factory=list)  # bytes that each measured part needs, with headroom

    @property
    def total(self) -> float:
        epochs = self.workload.frozen_epochs * self.frozen_epoch + self.workload.unfrozen_epochs * self.unfrozen_epoch
        return self.encode_all + self.latents + epochs


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


def estimate(job: TrainingJob) -> Estimate:
    """Measures everything, the disk first: finding it too small needs no measuring. Uses the job up."""
    config = job.run.config
    cache = FeatureCache(config.cache_dir, job.model)
    # Without frozen epochs there is no cache; augmented training volumes have none.
    cached = [] if not config.frozen_epochs else list(job.validation.volumes)
    if config.frozen_epochs and not config.augment:
        cached = [*job.train.volumes, *cached]
    rows = cache.rows(cached)
    if problem := cache.missing_message(cached, rows):
        raise TrainingError(problem)
    workload = workload_of(job, len(cached), rows.count(None))
    job.run.ranks = copy.copy(job.run.ranks)
    job.run.ranks.world = 1  # the steps measured here must not wait for the other processes
    disk = check_disk(job, cache, workload)
    result = Estimate(workload, disk, measure_reading(job))
    stage = "frozen"
    try:
        encoder = measure_encoding(job, result)
        measure_frozen_stage(job, cache, result, encoder)
        stage = "unfrozen"
        measure_unfrozen_stage(job, result, encoder)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise memory_error(job, workload, inf, unfrozen=stage == "unfrozen") from error
    need = max(result.memory, default=0.0)
    if not workload.fits(need):
        raise memory_error(job, workload, need)
    return result


def workload_of(job: TrainingJob, cached: int, missing: int) -> Workload:
    run, config, model = job.run, job.run.config, job.model
    layers = model.layers()
    unfrozen_layers = config.unfrozen_layers(config.epochs - 1, len(layers))
    names = {name for layer in layers[len(layers) - unfrozen_layers :] for name in layer}
    head = {id(parameter) for parameter in model.head_parameters()}
    trainable = [p for name, p in model.named_parameters() if name in names or id(p) in head]
    return Workload(
        world=run.ranks.world,
        rank_batch=ceil(config.batch_size / run.ranks.world),
        train=len(job.train.volumes),
        validation=len(job.validation.volumes),
        cached=cached,
        missing=missing,
        frozen_epochs=config.frozen_epochs,
        unfrozen_epochs=config.epochs - config.frozen_epochs,
        layers=len(layers),
        unfrozen_layers=unfrozen_layers,
        trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
        copies=3 if config.ema_decay else 2,
        cpus=(os.cpu_count() or 1) / local_world(),
        workers=run.workers,
        on_cpu=run.device.type == "cpu",
        available=available_memory(run.device),
    )


def check_disk(job: TrainingJob, cache: FeatureCache, workload: Workload) -> Disk:
    """For the cache, and for the run at its fullest: while the next weights or the next state are written."""
    folder = job.run.folder
    cache_need, cache_free = cache.disk_space(workload.missing)
    if cache_need > cache_free:
        raise TrainingError(cache.disk_full_message(workload.missing, "too little room"))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in job.model.state_dict().values())
    state = (1 + workload.copies) * workload.trainable_bytes
    need = weights + KEEP * state + max(weights, state) + SMALL_FILES
    own, other = nearest_existing(folder), nearest_existing(cache.folder)
    free = shutil.disk_usage(own).free
    same = cache_need if own.stat().st_dev == other.stat().st_dev else 0
    if need + same > free:
        also = f", and {in_bytes(same)} for the cache" if same else ""
        raise TrainingError(
            f"{folder}: found {in_bytes(free)} free on its disk, expected {in_bytes(need)} for the weights and "
            f"{KEEP + 1} states of this run{also}; free that much on it, or choose an --output-dir elsewhere"
        )
    return Disk(cache_need, cache_free, need, free)


def measure_reading(job: TrainingJob) -> Reading | None:
    """Reads training volumes as the run will. Others each time: what was read before may come from memory.

    Where training volumes were streamed, what may have to be read is among the validation volumes; where all were,
    there is no reading and no encoding to measure.
    """
    on_disk = [[v for v in split.volumes if v.signature is None] for split in (job.train, job.validation)]
    readable = on_disk[0] or on_disk[1]
    if not readable:
        return None
    chosen = random.Random().sample(readable, min(MOST_VOLUMES, len(readable)))
    dataset = VolumeDataset(chosen, job.model.input_shape, 0 if job.run.config.augment else None)
    times, reasons = [], []
    example: tuple[str, Tensor, Tensor] | None = None
    for i in range(len(chosen)):
        start = time.perf_counter()
        _, volume, *rest = dataset[i]
        if volume is None:
            reasons.append(": ".join(rest))
            job.run.log(f"skipped (training): {reasons[-1]}")
            continue
        times.append(time.perf_counter() - start)
        example = chosen[i].name, volume, rest[0]
        if len(times) >= 2 and sum(times) > READING_SECONDS:
            break
    if example is None:
        raise TrainingError(
            f"{job.data_dir}: found {len(chosen)} of {len(chosen)} training volumes unreadable "
            f"({reasons[0]}), expected CT volumes; copy or download them again"
        )
    return Reading(sum(times) / len(times), len(times), len(reasons), *example)


def measure_encoding(job: TrainingJob, result: Estimate) -> Cost:
    """Encodes one volume in float32, as the cache and validation do."""
    run, model, workload = job.run, job.model, result.workload
    if result.reading is None:
        return Cost(0.0, 0.0)
    volume = result.reading.volume[None].to(run.device)
    with encoding(model, run.device):
        encoder = measure_warm(run.device, lambda: model.encode_for_cache(volume))
    result.memory.append(with_headroom(job, workload, encoder.peak, run.micro_batch))
    result.encode_volume = encoder.seconds
    result.encode_all = workload.missing * seconds_per_volume(workload, result.reading, encoder) / workload.world
    result.encoding_is_read_bound = result.reading.seconds / workload.readers > encoder.seconds
    return encoder


def measure_frozen_stage(job: TrainingJob, cache: FeatureCache, result: Estimate, encoder: Cost) -> None:
    """Steps of the head on random features, for training volumes and, as an upper bound, for validation volumes."""
    run, model, workload, labels = job.run, job.model, result.workload, job.train.labels
    if not workload.frozen_epochs:
        return
    size = min(workload.rank_batch, run.micro_batch * CACHED_MICRO_BATCH, len(labels))
    shape = (size, *cache.shape)
    codes = model.sizes.codes if model.sizes is not None and model.cache_format == "codes" else None
    stored = (torch.rand(shape) if codes is None else torch.randint(codes, shape)).to(run.device)
    with torch.no_grad():
        features = measure_warm(run.device, lambda: model.features_from_cache(stored))
        inputs = model.features_from_cache(stored)
    trainable = TrainableParameters(run, model)
    trainable.unfreeze(0)
    model.train()
    micro_batch = MicroBatch(inputs, labels[:size].to(run.device), [], cached=True, last=True)

    def step() -> None:
        accumulate_gradients(job, iter([micro_batch]), size)
        trainable.set_learning_rates(0.0)
        trainable.clip_and_step()

    head = measure_warm(run.device, step)
    result.memory += [with_headroom(job, workload, cost.peak, 0) for cost in (features, head)]
    epoch = (workload.train + workload.validation) * head.seconds / size
    if run.config.augment and result.reading is not None:
        forward = measure_forward(job, result.reading, encoder)
        epoch += workload.train * seconds_per_volume(workload, result.reading, forward)
    result.frozen_epoch = epoch / workload.world
    result.latents = workload.cached * features.seconds / size  # each process makes all of them


def measure_forward(job: TrainingJob, reading: Reading, encoder: Cost) -> Cost:
    """Of an augmented training volume in a frozen epoch: in the precision of training."""
    run, model = job.run, job.model
    if run.dtype == torch.float32:
        return encoder
    volume = reading.volume[None].to(run.device)
    with torch.no_grad(), run.autocast():
        return measure_warm(run.device, lambda: model.eval()(volume))


def measure_unfrozen_stage(job: TrainingJob, result: Estimate, encoder: Cost) -> None:
    workload, reading = result.workload, result.reading
    if not workload.unfrozen_epochs or reading is None:  # without files, `prepare` has refused unfrozen epochs
        return
    result.wanted_micro_batch = min(job.run.micro_batch, workload.rank_batch)
    result.micro_batch, step, need = fitting_micro_batch(job, workload, reading, result.wanted_micro_batch)
    result.memory.append(need)
    training = workload.train * seconds_per_volume(workload, reading, step)
    validation = workload.validation * seconds_per_volume(workload, reading, encoder)
    result.unfrozen_epoch = (training + validation) / workload.world
    result.checkpointing = job.run.checkpointing


def fitting_micro_batch(
    job: TrainingJob, workload: Workload, reading: Reading, wanted: int
) -> tuple[int, Cost, float]:
    """The micro-batch, `wanted` or a half, a quarter, ... of it, whose pass fits; its cost per volume and its bytes.

    Raises TrainingError where a single volume does not fit.
    """
    job.model.unfreeze_backbone(workload.unfrozen_layers)
    job.model.train()
    for parameter in job.model.parameters():  # as from a step's second pass on: gradients are added to
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    on_gpu = job.run.device.type == "cuda"
    before = held_memory(job.run.device)
    one, later = measure_pass(job, reading, 1), workload.copies * workload.trainable_bytes
    size = wanted
    while size:
        cost = Cost(size * one.seconds, before + size * (one.peak - before))
        need = with_headroom(job, workload, cost.peak + later, size)
        # The prediction is an upper bound. On the CPU, trying more than there is would end this process.
        if cost.seconds <= 2 * LONG and (on_gpu or workload.fits(need)):
            cost = measure_pass(job, reading, size)
            need = with_headroom(job, workload, cost.peak + later, size)
        if isfinite(cost.seconds) and workload.fits(need):
            return size, Cost(cost.seconds / size, cost.peak), need
        size //= 2
    raise memory_error(job, workload, need, unfrozen=True)


def measure_pass(job: TrainingJob, reading: Reading, size: int) -> Cost:
    """Forward and backward of so many volumes; infinite when out of memory."""
    device = job.run.device

    def one_pass() -> None:
        volumes = torch.stack([reading.volume] * size).to(device)
        labels = torch.stack([reading.labels] * size).to(device)
        micro_batch = MicroBatch(volumes, labels, [reading.name], cached=False, last=True)
        if accumulate_gradients(job, iter([micro_batch]), size).not_finite:
            raise TrainingError(f"{reading.name}: found a loss that is not finite, expected a number; see the scan")

    try:
        return measure(device, one_pass)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Cost(inf, inf)


def seconds_per_volume(workload: Workload, reading: Reading, computing: Cost) -> float:
    """On one rank. Reading processes work while the device computes; on the CPU they take the time for it from
    computing. Without any, one comes after the other."""
    if not workload.workers:
        return reading.seconds + computing.seconds
    taken = reading.seconds / workload.cpus if workload.on_cpu else 0.0
    return max(reading.seconds / workload.readers, computing.seconds + taken)


def with_headroom(job: TrainingJob, workload: Workload, peak: float, size: int) -> float:
    """Bytes to have for `peak` bytes and, on the CPU, for micro-batches of `size` volumes that are read ahead."""
    ahead = workload.workers * size * 4 * prod(job.model.input_shape) if job.run.device.type == "cpu" else 0
    return HEADROOM * (peak + ahead)


def memory_error(job: TrainingJob, workload: Workload, need: float, unfrozen: bool = False) -> TrainingError:
    """The one line for too little memory."""
    what, remedies = "the frozen backbone", ["use a device with more"]
    if unfrozen:
        what = f"one volume at a time with {workload.unfrozen_layers} of {workload.layers} layers unfrozen"
        remedies = []
        if job.run.config.unfreeze_layers != 1:
            remedies.append("unfreeze fewer layers (--unfreeze-layers 1)")
        if not job.run.checkpointing and job.run.set_checkpointing(job.model, True):  # not every model can
            remedies.append("add --gradient-checkpointing on")
        remedies += ["keep the backbone frozen (--freeze-backbone)", "use a larger GPU"]
    found = f"{in_bytes(workload.available)} of memory" if isfinite(workload.available) else "too little memory"
    expected = in_bytes(need) if isfinite(need) else "more"
    return TrainingError(
        f"{job.run.device}: found {found}, expected {expected} for {what}; {', or '.join(remedies)}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Time and memory of an action
# ----------------------------------------------------------------------------------------------------------------------


def measure(device: torch.device, action: Callable[[], object]) -> Cost:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    known = on_gpu or reset_peak_memory()
    start = time.perf_counter()
    action()
    if on_gpu:
        torch.cuda.synchronize(device)
    return Cost(time.perf_counter() - start, held_memory(device, peak=True) if known else nan)


def measure_warm(device: torch.device, action: Callable[[], object]) -> Cost:
    first = measure(device, action)
    return first if first.seconds > LONG else measure(device, action)


def local_world() -> int:
    """Ranks on this machine, which share its CPUs and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def held_memory(device: torch.device, peak: bool = False) -> float:
    """Bytes that this process holds on the device, or the most since that was last reset; nan: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    held = process_memory(peak)
    return nan if held is None else held


def available_memory(device: torch.device) -> float:
    """Bytes that this process can have on the device, with those that it holds already; nan: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    memory = system_memory()
    return nan if memory is None else memory.available / local_world() + held_memory(device)


# ----------------------------------------------------------------------------------------------------------------------
# Printing
# ----------------------------------------------------------------------------------------------------------------------


def estimate_text(job: TrainingJob, result: Estimate) -> str:
    """Everything that is printed."""
    workload, reading = result.workload, result.reading
    volumes = f"{workload.train} training, {workload.validation} validation, {workload.missing} not in the cache yet"
    need, available = max(result.memory, default=0.0), workload.available
    memory = "not known on this system"
    if isfinite(sum(result.memory) + available):
        memory = f"{in_bytes(need)} of {in_bytes(available)}"
    disk = result.disk
    lines = {
        "Device": _device_text(job, workload),
        "Volumes": volumes,
        "Reading": _reading_text(workload, reading),
        "Encoding": _encoding_text(result),
        "Frozen": _frozen_text(result),
        "Unfrozen": _unfrozen_text(job.run.config, result),
        "Memory": memory,
        "Disk": f"cache {in_bytes(disk.cache_need)} of {in_bytes(disk.cache_free)} free in "
        f"{job.run.config.cache_dir}; run {in_bytes(disk.run_need)} of {in_bytes(disk.run_free)} free in "
        f"{job.run.folder.parent}",
        "Total": f"about {duration(result.total)}",
    }
    failed = f", {reading.failed} more could not be read" if reading and reading.failed else ""
    written = "nothing" if job.run.config.data_dir else "nothing but the built-in cohort"
    measured = reading.measured if reading else 0
    text = f"Plan (measured on {measured} volumes{failed}; {written} has been written)\n"
    text += "\n".join(f"  {name:<12} {line}" for name, line in lines.items())
    # Without --data-dir, `prepare` has said so already.
    return f"{text}\n{SYNTHETIC_NOTE}" if job.phantom and job.run.config.data_dir else text


def _device_text(job: TrainingJob, workload: Workload) -> str:
    run = job.run
    name = plural(torch.get_num_threads(), "thread")
    if run.device.type == "cuda":
        name = torch.cuda.get_device_name(run.device)
    known = isfinite(workload.available)
    free = f"{in_bytes(workload.available)} free" if known else "free memory not known"
    precision = str(run.dtype).removeprefix("torch.") + (" with loss scaling" if run.scaler.is_enabled() else "")
    number = f"{workload.world} processes, the first on " if workload.world > 1 else ""
    return f"{number}{run.device}, {name}, {free}; {precision}"


def _reading_text(workload: Workload, reading: Reading | None) -> str:
    if reading is None:
        return "not measured: the volumes were streamed and have no file"
    readers = workload.readers * workload.world
    who = f"and process, {readers} processes" if workload.workers else "by the main process"
    return f"{duration(reading.seconds)} per volume {who}: {readers / reading.seconds:.1f} volumes/s"


def _encoding_text(result: Estimate) -> str:
    if not result.workload.missing:
        return "nothing left to encode" if result.workload.frozen_epochs else "none"
    slower = "reading" if result.encoding_is_read_bound else "computing"
    each, whole = duration(result.encode_volume), duration(result.encode_all)
    return f"{each} per volume (float32), once: {whole}, most of it {slower}"


def _frozen_text(result: Estimate) -> str:
    if not result.workload.frozen_epochs:
        return "none"
    before = f", after {duration(result.latents)} for latents" if result.latents > 1 else ""
    return f"{result.workload.frozen_epochs} epochs x {duration(result.frozen_epoch)}{before}"


def _unfrozen_text(config: TrainingConfig, result: Estimate) -> str:
    workload, size = result.workload, result.micro_batch
    if not workload.unfrozen_epochs:
        return "none"
    text = (
        f"{workload.unfrozen_epochs} epochs x {duration(result.unfrozen_epoch)}, {workload.unfrozen_layers} of "
        f"{workload.layers} layers unfrozen at the end, batch {config.batch_size}, micro-batch {size}, accumulation "
        f"{ceil(workload.rank_batch / size)}, checkpointing {'on' if result.checkpointing else 'off'}"
    )
    too_large = f"; add --micro-batch {size}: {result.wanted_micro_batch} do not fit"
    return text + (too_large if size < result.wanted_micro_batch else "")


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 1e-3):.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
