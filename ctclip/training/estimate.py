"""What a run will cost, measured in about a minute before anything is spent: `python ctclip_training.py ... --plan`.

Reader, encoder and training step are timed on this machine with a few of the cohort's own volumes; the rest is
arithmetic, and simplified: reading processes add up until every CPU has one (which may be half a core); every unfrozen
epoch takes as long as the last, which has the most layers unfrozen; saving and stopping early are not counted.
"""

from __future__ import annotations

import copy
import random
import shutil
import tempfile
import time
from functools import partial
from math import ceil, inf, isfinite, prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ctclip.config import SYNTHETIC_NOTE, Machine, TrainingConfig, TrainingError
from ctclip.data.augmentation import Augmentation
from ctclip.data.cohort import Volume
from ctclip.data.feature_cache import FeatureCache, encoding
from ctclip.data.loading import VolumeDataset
from ctclip.data.volume_cache import VolumeCache
from ctclip.device_cost import Cost, available_memory, held_memory, measure_warm
from ctclip.fileio import nearest_existing
from ctclip.formatting import duration, plural, size_text
from ctclip.job_cost import Phase, Stage, cost_table, pace, read_rate, reading_and_computing
from ctclip.memory import available_cpus, local_world, out_of_memory
from ctclip.training.checkpoint import KEEP
from ctclip.training.optimization import TrainableParameters
from ctclip.training.run import TrainingJob, prepare
from ctclip.training.steps import CACHED_MICRO_BATCH, MicroBatch, accumulate_gradients, known_labels

MOST_VOLUMES, READING_SECONDS = 8, 15  # read so many, at least 2, and stop after so long
TRIED = 10  # seconds, up to which a micro-batch is tried; what takes longer is reckoned
HEADROOM = 1.1  # on memory: fragmentation, and what other programs may take meanwhile
SMALL_FILES = 5_000_000  # bytes of figures, tables and logs in a run's folder

in_bytes = partial(size_text, digits=1)


def print_estimate(config: TrainingConfig, folder: Path | None, machine: Machine) -> None:
    """Measures, and prints what the run in `folder` would take. Writes nothing but a built-in cohort.

    Raises TrainingError where memory or disk do not suffice, and what `prepare` raises. Of several processes the main
    one measures, while the others wait and so leave it the machine.
    """
    job = prepare(config, folder, machine)
    ranks = job.run.ranks
    try:
        if ranks.is_main:
            job.run.log("Measuring disk, reader and model: about a minute")
            plan = Plan(job)
            plan.measure()
            job.run.log(plan.text())
    finally:
        ranks.barrier()


class ReadingCost(NamedTuple):
    """Seconds to read a volume from its file and, where that is kept, to read it again; from how many, how many more
    could not be read, and one of them."""

    seconds: float
    again: float
    measured: int
    failed: int
    name: str
    volume: Tensor  # (1, D, H, W)
    labels: Tensor  # (18,)


class Plan:
    """What a run will do and the machine that it has; once measured, what its stages cost. Uses the job up."""

    reading: ReadingCost | None = None  # None: the volumes were streamed and have no file
    encoder = Cost(0.0, 0.0)  # of one volume, in float32
    latents = frozen_epoch = unfrozen_epoch = 0.0  # seconds; the first once, from cached codes
    head = 0.0  # seconds of a frozen step, per volume
    augmented = step = encoder  # of a volume that frozen epochs encode anew, and of one in an unfrozen step
    file_size, disk_rate = 0.0, inf  # bytes of a volume's file; bytes per second that the data's disk gives
    micro_batch = 0

    def __init__(self, job: TrainingJob):
        run, config, model = job.run, job.run.config, job.model
        self.job, self.run, self.config, self.model, self.device = job, run, config, model, run.device
        self.world = run.ranks.world
        self.rank_batch = ceil(config.batch_size / self.world)  # volumes of a step, for each rank
        self.train, self.validation = len(job.train.volumes), len(job.validation.volumes)
        self.absent = 0 if config.limit else job.cohort.not_on_disk  # volumes of the label table without a file here
        self.unfrozen_epochs = config.epochs - config.frozen_epochs
        self.layers = len(model.layers())
        self.unfrozen = config.unfrozen_layers(config.epochs - 1, self.layers)  # in the last epoch
        groups = [group for group in model.parameter_groups(1.0, 1.0) if group["layer"] <= self.unfrozen]
        self.trainable_bytes = sum(parameter.nbytes for group in groups for parameter in group["params"])
        self.copies = 3 if config.ema_decay else 2  # of the trainable parameters: AdamW's moments, the moving average
        self.workers = run.workers
        self.cpus = available_cpus() / local_world()  # for each rank, and so is the memory
        self.available = available_memory(run.device)
        self.memory: list[float] = []  # bytes that each measured part needs, with headroom
        # Without frozen epochs there is no cache; augmented training volumes have none.
        self.cache = FeatureCache(config.cache_dir, model)
        splits = [job.validation] if config.changes_voxels else [job.train, job.validation]
        cached = [volume for split in splits for volume in split.volumes if config.frozen_epochs]
        rows = self.cache.rows(cached)
        if problem := self.cache.missing_message(cached, rows):
            raise TrainingError(problem)
        self.cached, self.missing = len(cached), rows.count(None)
        kept, every = run.volume_cache, [volume for split in job.splits.values() for volume in split.volumes]
        self.keeps = kept is not None and kept.folder is not None
        self.unkept = kept.missing(every) if kept is not None and self.keeps else (0, 0)  # volumes, bytes
        run.ranks = copy.copy(run.ranks)
        run.ranks.world = 1  # the steps measured here must not wait for the other processes

    @property
    def trained(self) -> str:
        return "adapters" if self.config.adapt == "lora" else f"{self.unfrozen} of {self.layers} layers unfrozen"

    @property
    def readers(self) -> int:
        """Processes that read at the same time, for each rank; the main one where there are no others."""
        return max(1, min(self.workers, int(self.cpus)))

    @property
    def encode_all(self) -> float:
        return self.missing * self.seconds_per_volume(self.encoder) / self.world if self.missing else 0.0

    def seconds_per_volume(self, computing: Cost, again: bool = False) -> float:
        """On one rank, of a volume that is read from its file or, in an epoch, `again`. Reading processes work while
        the device computes; on the CPU they take the time for it from computing. Without any, one comes after the
        other."""
        return pace(self.stages(computing, again))

    def stages(self, computing: Cost, again: bool = False, name: str = "encode") -> tuple[Stage, Stage]:
        """Reading and computing of a volume on one rank."""
        assert self.reading is not None
        reading = self.reading.again if again else self.reading.seconds
        taken = reading / self.cpus if self.device.type == "cpu" else 0.0
        return reading_and_computing(
            reading, computing.seconds, self.readers if self.workers else 0, taken, ("read", name)
        )

    @property
    def keep_all(self) -> float:
        """Seconds to read, for the first time, the volumes that a video ResNet will keep."""
        if self.reading is None or not (self.unfrozen_epochs or self.config.changes_voxels):
            return 0.0
        return self.unkept[0] * (self.reading.seconds - self.reading.again) / self.readers / self.world

    def with_headroom(self, peak: float, size: int = 0) -> float:
        """Bytes to have for `peak` bytes and, on the CPU, for micro-batches of `size` volumes that are read ahead."""
        ahead = self.workers * size * 4 * prod(self.model.input_shape) if self.device.type == "cpu" else 0
        return HEADROOM * (peak + ahead)

    # ------------------------------------------------------------------ measuring

    def measure(self) -> None:
        """The disk first: finding it too small needs no measuring."""
        self.check_disk()
        self.reading = self.measure_reading()
        unfrozen = False
        try:
            if self.reading is not None:  # one volume, encoded as the cache and validation do
                volume = self.reading.volume[None].to(self.device)
                with encoding(self.model, self.device):
                    self.encoder = measure_warm(self.device, lambda: self.model.encode_for_cache(volume))
                self.memory.append(self.with_headroom(self.encoder.peak, self.run.micro_batch))
            self.measure_frozen_stage()
            unfrozen = True
            self.measure_unfrozen_stage()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise self.memory_error(inf, unfrozen) from error
        need = max(self.memory, default=0.0)
        if need > self.available:  # nan, not known, fits
            raise self.memory_error(need)

    def check_disk(self) -> None:
        """For the cache, and for the run at its fullest: while the next weights or the next state are written."""
        folder = self.run.folder
        self.cache_need, self.cache_free = self.cache.disk_space(self.missing)
        if self.cache_need > self.cache_free:
            raise TrainingError(self.cache.disk_full_message(self.missing, "too little room"))
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        state = (1 + self.copies) * self.trainable_bytes
        self.run_need = weights + KEEP * state + max(weights, state) + SMALL_FILES
        own, other = nearest_existing(folder), nearest_existing(self.cache.folder)
        self.run_free = shutil.disk_usage(own).free
        same = self.cache_need if own.stat().st_dev == other.stat().st_dev else 0
        if self.run_need + same > self.run_free:
            also = f", and {in_bytes(same)} for the cache" if same else ""
            raise TrainingError(
                f"{folder}: found {in_bytes(self.run_free)} free on its disk, expected {in_bytes(self.run_need)} for "
                f"the weights and {KEEP + 1} states of this run{also}; free that much on it, or choose an --output-dir "
                "elsewhere"
            )

    def measure_reading(self) -> ReadingCost | None:
        """Reads training volumes as the run will. Others each time: what was read before may come from memory.

        Where training volumes were streamed, what may have to be read is among the validation volumes; where all were,
        there is no reading and no encoding to measure.
        """
        on_disk = [[v for v in split.volumes if v.signature is None] for split in self.job.splits.values()]
        readable = on_disk[0] or on_disk[1]
        if not readable:
            return None
        chosen = random.Random().sample(readable, min(MOST_VOLUMES, len(readable)))
        dataset = VolumeDataset(chosen, self.model.input_shape, Augmentation(0) if self.config.augment else None)
        times, reasons, read, example = [], [], [], None
        for i in range(len(chosen)):
            start = time.perf_counter()
            _, volume, *rest = dataset[i]
            if volume is None:
                reasons.append(": ".join(rest))
                self.run.log(f"skipped (training): {reasons[-1]}")
                continue
            times.append(time.perf_counter() - start)
            read.append(chosen[i].path)
            example = chosen[i].name, volume, rest[0]
            last = chosen[i]
            if len(times) >= 2 and sum(times) > READING_SECONDS:
                break
        if example is None:
            raise TrainingError(
                f"{self.job.data_dir}: found {len(chosen)} of {len(chosen)} training volumes unreadable "
                f"({reasons[0]}), expected CT volumes; copy or download them again"
            )
        self.file_size = sum(path.stat().st_size for path in read) / len(read)
        self.disk_rate = read_rate(read[:2])
        seconds = sum(times) / len(times)
        again = self.measure_again(last) if self.keeps else seconds
        return ReadingCost(seconds, again, len(times), len(reasons), *example)

    def measure_again(self, volume: Volume) -> float:
        """Seconds to read a volume that is kept."""
        with tempfile.TemporaryDirectory() as folder:
            cache = VolumeCache(folder, self.model.input_shape)
            cache.read(volume)
            start = time.perf_counter()
            cache.read(volume)
            return time.perf_counter() - start

    def measure_frozen_stage(self) -> None:
        """Steps of the head on random features, for training volumes and, as an upper bound, for validation volumes."""
        run, model, labels = self.run, self.model, self.job.train.labels
        if not self.config.frozen_epochs:
            return
        size = min(self.rank_batch, run.micro_batch * CACHED_MICRO_BATCH, len(labels))
        shape = (size, *self.cache.shape)
        stored = torch.rand(shape) if model.sizes is None else torch.randint(model.sizes.codes, shape)
        stored = stored.to(self.device)
        with torch.no_grad():
            features = measure_warm(self.device, lambda: model.features_from_cache(stored))
            inputs = model.features_from_cache(stored)
        trainable = TrainableParameters(run, model)
        trainable.unfreeze(0)
        model.train()
        micro_batch = MicroBatch(inputs, labels[:size].to(self.device), [], cached=True, last=True)

        def step() -> None:
            accumulate_gradients(self.job, iter([micro_batch]), known_labels(micro_batch.labels))
            trainable.set_learning_rates(0.0)
            trainable.clip_and_step()

        head = measure_warm(self.device, step)
        self.memory += [self.with_headroom(cost.peak) for cost in (features, head)]
        self.head = head.seconds / size
        epoch = (self.train + self.validation) * self.head
        if self.config.changes_voxels and self.reading is not None:  # every training volume is encoded anew
            forward = self.encoder
            if run.dtype != torch.float32:
                volume = self.reading.volume[None].to(self.device)
                with torch.no_grad(), run.autocast():
                    forward = measure_warm(self.device, lambda: model.eval()(volume))
            self.augmented = forward
            epoch += self.train * self.seconds_per_volume(forward, again=True)
        self.frozen_epoch = epoch / self.world
        self.latents = self.cached * features.seconds / size  # each process makes all of them

    def measure_unfrozen_stage(self) -> None:
        if not self.unfrozen_epochs or self.reading is None:  # without files, `prepare` has refused unfrozen epochs
            return
        self.step = self.fit_micro_batch(min(self.run.micro_batch, self.rank_batch))
        training = self.train * self.seconds_per_volume(self.step, again=True)
        validation = self.validation * self.seconds_per_volume(self.encoder, again=True)
        self.unfrozen_epoch = (training + validation) / self.world

    def fit_micro_batch(self, wanted: int) -> Cost:
        """Sets the micro-batch: `wanted` or a half, a quarter, ... of it, whose pass fits. Returns its cost per volume.

        Raises TrainingError where a single volume does not fit.
        """
        self.model.unfreeze_backbone(self.unfrozen)
        self.model.train()
        for parameter in self.model.parameters():  # as from a step's second pass on: gradients are added to
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        before = held_memory(self.device)
        one, later = self.measure_pass(1), self.copies * self.trainable_bytes
        self.wanted = self.micro_batch = wanted
        while self.micro_batch:
            size = self.micro_batch
            cost = Cost(size * one.seconds, before + size * (one.peak - before))
            need = self.with_headroom(cost.peak + later, size)
            # The prediction is an upper bound. On the CPU, trying more than there is would end this process.
            if cost.seconds <= TRIED and (self.device.type == "cuda" or not need > self.available):
                cost = self.measure_pass(size)
                need = self.with_headroom(cost.peak + later, size)
            if isfinite(cost.seconds) and not need > self.available:
                self.memory.append(need)
                return Cost(cost.seconds / size, cost.peak)
            self.micro_batch //= 2
        raise self.memory_error(need, unfrozen=True)

    def measure_pass(self, size: int) -> Cost:
        """Forward and backward of so many volumes; infinite when out of memory."""
        reading = self.reading
        assert reading is not None

        def one_pass() -> None:
            volumes = torch.stack([reading.volume] * size).to(self.device)
            labels = torch.stack([reading.labels] * size).to(self.device)
            micro_batch = MicroBatch(volumes, labels, [reading.name], cached=False, last=True)
            if accumulate_gradients(self.job, iter([micro_batch]), known_labels(micro_batch.labels)).not_finite:
                raise TrainingError(f"{reading.name}: found a loss that is not finite, expected a number; see the scan")

        try:
            return measure_warm(self.device, one_pass)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return Cost(inf, inf)

    def memory_error(self, need: float, unfrozen: bool = False) -> TrainingError:
        """The one line for too little memory."""
        what, remedies = "the frozen backbone", ["use a device with more"]
        if unfrozen:
            what, remedies = f"one volume at a time with {self.trained}", self.config.less_memory()
            if not self.run.checkpointing and self.run.enable_checkpointing(self.model):  # not every model can
                remedies.insert(-1, "add --gradient-checkpointing on")
            remedies.append("use a larger GPU")
        found = f"{in_bytes(self.available)} of memory" if isfinite(self.available) else "too little memory"
        expected = in_bytes(need) if isfinite(need) else "more"
        return TrainingError(f"{self.device}: found {found}, expected {expected} for {what}; {', or '.join(remedies)}")

    # ------------------------------------------------------------------ the whole job, by workers

    def phases(self) -> list[Phase]:
        """The job on every volume that the label table lists, for workers like this process."""
        share = 1 + self.absent / (self.train + self.validation)
        train, validation = round(share * self.train), round(share * self.validation)
        frozen, unfrozen = self.config.frozen_epochs, self.unfrozen_epochs
        head = Stage("head", "device", self.head, self.cache.record_bytes)
        heads = Phase("frozen", (train + validation) * frozen, (head,), share * self.latents)
        if self.reading is None:
            return [heads]
        disk = (Stage("data disk", "disk", self.file_size / self.disk_rate, self.file_size, shared=True),)
        again = () if self.keeps else disk
        more, augmented = self.absent, 0
        if self.config.changes_voxels:  # only validation volumes are cached
            more, augmented = validation - self.validation, train * frozen
        return [
            Phase("cache", self.missing + more if frozen else 0, (*disk, *self.stages(self.encoder))),
            Phase("frozen", augmented, (*again, *self.stages(self.augmented, again=True))),
            heads,
            Phase("unfrozen", train * unfrozen, (*again, *self.stages(self.step, again=True, name="step"))),
            Phase("validation", validation * unfrozen, (*again, *self.stages(self.encoder, again=True))),
        ]

    def whole_job(self) -> str:
        """Its table, what it rests on, and what is assumed."""
        here = self.train + self.validation
        title = f"Whole job: {plural(here + self.absent, 'volume')} listed, {here} of them usable here"
        disk = f", data disk {in_bytes(self.disk_rate)} per second" if isfinite(self.disk_rate) else ""
        return "\n".join([
            f"{title}; by workers, each a process with a device and CPUs like these",
            *(f"  {line}" for line in cost_table(self.phases())),
            f"Measured with one process here: seconds per volume{disk}. Assumed: the other volumes and workers are "
            "alike, one data disk serves all workers, and what they exchange takes no time.",
        ])

    # ------------------------------------------------------------------ printing

    def text(self) -> str:
        """Everything that is printed."""
        config, reading, known = self.config, self.reading, isfinite(self.available)
        name = plural(torch.get_num_threads(), "thread")
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        free = f"{in_bytes(self.available)} free" if known else "free memory not known"
        scaling = " with loss scaling" if self.run.scaler.is_enabled() else ""
        frozen = unfrozen = "none"
        if config.frozen_epochs:
            before = f", after {duration(self.latents)} for latents" if self.latents > 1 else ""
            frozen = f"{config.frozen_epochs} epochs x {duration(self.frozen_epoch)}{before}"
        if self.unfrozen_epochs:
            unfrozen = (
                f"{self.unfrozen_epochs} epochs x {duration(self.unfrozen_epoch)}, {self.trained} at the end, "
                f"batch {config.batch_size}, micro-batch {self.micro_batch}, accumulation "
                f"{ceil(self.rank_batch / self.micro_batch)}, checkpointing {'on' if self.run.checkpointing else 'off'}"
            )
            if self.micro_batch < self.wanted:
                unfrozen += f"; add --micro-batch {self.micro_batch}: {self.wanted} do not fit"
        need, memory = max(self.memory, default=0.0), "not known on this system"
        if isfinite(need) and known:
            memory = f"{in_bytes(need)} of {in_bytes(self.available)}"
        total = self.encode_all + self.keep_all + self.latents + config.frozen_epochs * self.frozen_epoch
        lines = {
            "Device": f"{f'{self.world} processes, the first on ' if self.world > 1 else ''}{self.device}, {name}, "
            f"{free}; {self.run.precision}{scaling}",
            "Volumes": f"{self.train} training, {self.validation} validation, {self.missing} not in the cache yet",
            "Reading": self._reading_text(),
            "Encoding": self._encoding_text(),
            "Frozen": frozen,
            "Unfrozen": unfrozen,
            "Memory": memory,
            "Disk": f"cache {in_bytes(self.cache_need)}{self._kept_text()} of {in_bytes(self.cache_free)} free in "
            f"{config.cache_dir}; "
            f"run {in_bytes(self.run_need)} of {in_bytes(self.run_free)} free in {self.run.folder.parent}",
            "Total": f"about {duration(total + self.unfrozen_epochs * self.unfrozen_epoch)}",
        }
        failed = f", {reading.failed} more could not be read" if reading and reading.failed else ""
        written = "nothing" if config.data_dir else "nothing but the built-in cohort"
        text = f"Plan (measured on {reading.measured if reading else 0} volumes{failed}; {written} has been written)\n"
        text += "\n".join(f"  {name:<12} {line}" for name, line in lines.items())
        text += f"\n{self.whole_job()}"
        # Without --data-dir, `prepare` has said so already.
        return f"{text}\n{SYNTHETIC_NOTE}" if self.job.phantom and config.data_dir else text

    def _reading_text(self) -> str:
        if self.reading is None:
            return "not measured: the volumes were streamed and have no file"
        readers = self.readers * self.world
        again = f"; {duration(self.reading.again)} again" if self.keeps else ""
        who = f"and process, {readers} processes" if self.workers else "by the main process"
        seconds = self.reading.seconds
        return f"{duration(seconds)} per volume {who}: {readers / seconds:.1f} volumes/s{again}"

    def _kept_text(self) -> str:
        return f" and about {in_bytes(self.unkept[1])} for volumes" if self.keeps else ""

    def _encoding_text(self) -> str:
        if not self.missing:
            return "nothing left to encode" if self.config.frozen_epochs else "none"
        assert self.reading is not None
        slower = "reading" if self.reading.seconds / self.readers > self.encoder.seconds else "computing"
        each, whole = duration(self.encoder.seconds), duration(self.encode_all)
        return f"{each} per volume (float32), once: {whole}, most of it {slower}"
