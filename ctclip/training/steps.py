"""One optimizer step and one validation: cached features or volumes in, gradients or logits out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctclip.config import TrainingConfig, TrainingError
from ctclip.data.augmentation import Augmentation
from ctclip.data.cohort import Volume
from ctclip.data.feature_cache import FeatureCache, encode_missing
from ctclip.data.loading import Batch, volume_loader
from ctclip.data.volume_key import cache_keys
from ctclip.evaluation.metrics import auroc_difference, compute_metrics, lacks_a_class
from ctclip.inference.predictor import chunks, predict_volumes
from ctclip.memory import out_of_memory
from ctclip.training.run import SPLIT_NAMES, Run, Split, TrainingJob
from ctclip_model import UNKNOWN, CTCLIPMultiAbnormalityModel

CACHED_CHUNK = 64  # volumes whose cached features are in memory at once
CACHED_MICRO_BATCH = 32  # times as many volumes: cached features take less than this fraction of an encoder's memory

# ------------------------------------------------------------------ the data, which may change on the disk meanwhile


def check_data(job: TrainingJob, known: Mapping[str, str]) -> dict[str, str]:
    """Digest of each volume's file and labels, by name. Raises TrainingError where one is not what is `known`: features
    of the frozen epochs, labels and voxels would be of different patients."""
    run = job.run
    volumes = run.ranks.shard([volume for split in job.splits.values() for volume in split.volumes])
    digests = {
        volume.name: hashlib.sha256(f"{key} {volume.labels.tolist()}".encode()).hexdigest()[:16]
        for volume, key in zip(volumes, cache_keys(volumes), strict=True)
        if key is not None  # reading it fails, and says why
    }
    found = {name: digest for part in run.ranks.all_gather(digests) for name, digest in part.items()}
    changed = sorted(name for name, digest in found.items() if known.get(name, digest) != digest)
    if changed:
        raise TrainingError(
            f"{job.data_dir}: found another file, metadata or labels than when the run began for {len(changed)} of "
            f"{len(found)} volumes (first {changed[0]}), expected the same data; bring it back, or start a new run"
        )
    return {**known, **found}


# ------------------------------------------------------------------ the head's inputs while the backbone is frozen


def load_features(job: TrainingJob) -> None:
    """Points both splits to their features in the cache, encoding what is missing; drops unreadable volumes."""
    run, model = job.run, job.model
    model.eval()
    run.cache = cache = FeatureCache(run.config.cache_dir, model)

    def on_batch(name: str, volumes: list[Volume], batch: Batch) -> None:
        run.record(name, volumes, batch)
        run.stop.check("what has been encoded is in the cache")

    for name, split in job.splits.items():
        if name == "train" and run.config.changes_voxels:
            flag = "--augment" if run.config.augment else "--window-jitter"
            run.log(f"{flag} changes voxels: no cache for training volumes, every frozen epoch encodes them anew")
            continue
        record = partial(on_batch, name)
        rows = encode_missing(model, cache, split.volumes, run.device, run.workers, run.ranks, record)
        split.volumes = [volume for volume, row in zip(split.volumes, rows, strict=True) if row is not None]
        split.rows = [row for row in rows if row is not None]
        if not split.volumes:
            which = f"{len(rows)} {SPLIT_NAMES[name]} volumes"
            raise TrainingError(f"none of the {which} could be read; see the lines above")
        run.readings |= dict(zip(split.names, cache.readings(split.rows), strict=True))
        if model.cache_format == "pooled" or (model.is_ctclip and model.head_name != "attention"):
            inputs = (frozen_inputs(run, model, split, chunk) for chunk in chunks(range(len(split.rows)), CACHED_CHUNK))
            split.features = torch.cat([chunk.cpu() for chunk in inputs])
    run.exchange_records()


@torch.no_grad()
def frozen_inputs(run: Run, model: CTCLIPMultiAbnormalityModel, split: Split, indices: Sequence[int]) -> Tensor:
    """The head's inputs for these volumes of the split, on the device."""
    if split.features is not None:
        return split.features.index_select(0, torch.tensor(indices, dtype=torch.long)).to(run.device)
    assert run.cache is not None and split.rows is not None
    return run.cache.head_inputs(model, [split.rows[i] for i in indices], run.device)


# ------------------------------------------------------------------ a step


class MicroBatch(NamedTuple):
    """What goes through the model at once."""

    inputs: Tensor  # volumes (n, 1, D, H, W), or the head's inputs where the backbone's features are cached
    labels: Tensor  # (n, 18)
    names: list[str]
    cached: bool
    last: bool  # of its step


@dataclass
class StepResult:
    """What a rank saw in one step: the sum of its losses, of how many known labels of how many volumes, and the volumes
    whose loss is not finite."""

    loss_sum: float = 0.0
    known: int = 0
    seen: int = 0
    not_finite: list[str] = field(default_factory=list)
    out_of_memory: bool = False


def shuffled_batches(split: Split, config: TrainingConfig, epoch: int) -> list[list[int]]:
    """Indices of the volumes of every step of an epoch, for all ranks together; the same for every call."""
    generator = torch.Generator().manual_seed(_epoch_seed(config, epoch))
    order = torch.randperm(len(split.volumes), generator=generator)
    return [batch.tolist() for batch in order.split(config.batch_size)]


def _epoch_seed(config: TrainingConfig, epoch: int) -> int:
    return config.seed * 100_003 + epoch


def epoch_augmentation(
    config: TrainingConfig, model: CTCLIPMultiAbnormalityModel, epoch: int
) -> Augmentation | None:
    """What is done to training volumes that are read in this epoch."""
    seed = _epoch_seed(config, epoch)
    if not model.is_video:
        return Augmentation(seed) if config.augment else None
    low, high = model.backbone.window[:2].tolist()
    return Augmentation(seed, config.augment, model.crop_shape, config.window_jitter, (low, high))


def read_micro_batches(job: TrainingJob, batches: Sequence[list[int]], epoch: int) -> Iterator[MicroBatch]:
    """This rank's share of these steps, on the device. Every step has a last micro-batch, even where nothing in it
    could be read."""
    run, split = job.run, job.train
    cached = split.rows is not None
    size = run.micro_batch * (CACHED_MICRO_BATCH if cached else 1)
    indices, last = [], []
    for batch in batches:
        of_step = chunks(run.ranks.shard(batch), size) or [[]]
        indices += of_step
        last += [False] * (len(of_step) - 1) + [True]
    if cached:
        labels, names = split.labels, split.names
        for chunk, is_last in zip(indices, last, strict=True):
            inputs = frozen_inputs(run, job.model, split, chunk) if chunk else torch.empty(0)
            own = labels.index_select(0, torch.tensor(chunk, dtype=torch.long))
            yield MicroBatch(inputs, own.to(run.device), [names[i] for i in chunk], True, is_last)
        return
    loader = volume_loader(
        split.volumes, job.model.input_shape, micro_batches=indices, num_workers=run.workers,
        augmentation=epoch_augmentation(run.config, job.model, epoch), pin=run.device.type == "cuda",
        cache=run.volume_cache,
    )  # fmt: skip
    for batch, is_last in zip(loader, last, strict=True):
        run.record("train", split.volumes, batch)
        names = [split.volumes[i].name for i in batch.index.tolist()]
        volumes, labels = (x.to(run.device, non_blocking=True) for x in (batch.volumes, batch.labels))
        yield MicroBatch(volumes, labels, names, False, is_last)


def known_labels(labels: Tensor) -> int:
    return int((labels != UNKNOWN).sum())


def accumulate_gradients(job: TrainingJob, micro_batches: Iterator[MicroBatch], known: int) -> StepResult:
    """Adds up this rank's gradients of one step, of volumes with `known` labels over all ranks."""
    run, result = job.run, StepResult()
    for inputs, labels, names, cached, last in micro_batches:
        if len(labels):
            if cached:
                logits = job.model.head(inputs)
            else:
                with run.autocast():
                    logits = job.model(inputs)
            loss = job.criterion(logits.float(), labels)
            value = loss.item()
            if math.isfinite(value):
                # Gradients are averaged over ranks, and each rank only has its share of the step.
                own = known_labels(labels)
                run.scaler.scale(loss * (own / known * run.ranks.world)).backward()
                result.loss_sum += value * own
                result.known += own
                result.seen += len(labels)
            else:
                finite = logits.isfinite().all(1).tolist()
                culprits = [name for name, good in zip(names, finite, strict=True) if not good]
                result.not_finite += culprits or names
        if last or run.stop.number:  # a step may take minutes, and a signal gives seconds
            return result
    raise AssertionError("a step without a last micro-batch")


# ------------------------------------------------------------------ validation


@dataclass
class Validation:
    """Metrics at 0.5 and loss of the validation volumes that could be read, with their names and logits (n, 18)."""

    metrics: dict
    names: list[str]
    logits: Tensor

    @property
    def score(self) -> float:
        """Higher is better. With one class in every label there is no AUROC; the loss then decides."""
        auroc = self.metrics["auroc_macro"]
        return auroc if auroc is not None else -self.metrics["loss"]


@torch.no_grad()
def predict_validation(job: TrainingJob, indices: list[int]) -> dict[int, Tensor | None]:
    """Logits (18,) of these validation volumes, in float32 in every stage; None for one that cannot be read.

    Every rank computes its share; all get the whole.
    """
    run, model, split = job.run, job.model, job.validation
    model.eval()
    mine = run.ranks.shard(indices)
    volumes = [split.volumes[i] for i in mine]

    def on_batch(batch: Batch) -> None:
        run.record("tuning", volumes, batch)
        run.stop.check("the epoch's steps are saved")

    read, logits = mine, torch.zeros(0, len(model.labels))
    if mine and split.rows is not None:
        inputs = (frozen_inputs(run, model, split, chunk) for chunk in chunks(mine, CACHED_CHUNK))
        logits = torch.cat([model.head(chunk).float().cpu() for chunk in inputs])
    while mine and split.rows is None:
        try:
            places, logits = predict_volumes(
                model, volumes, run.micro_batch, run.workers, on_batch, volume_cache=run.volume_cache
            )
            read = [mine[place] for place in places]
            break
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or run.micro_batch == 1:
                raise
        run.use_less_memory(model)
    found: dict[int, Tensor | None] = dict.fromkeys(indices)
    for of_rank, rows in run.ranks.all_gather((read, logits)):
        found |= {i: row.clone() for i, row in zip(of_rank, rows, strict=True)}
    return found


def validation_metrics(job: TrainingJob, predicted: dict[int, Tensor | None]) -> Validation:
    """`predicted` is {index: logits} of all validation volumes."""
    split = job.validation
    read = {i: row for i, row in sorted(predicted.items()) if row is not None}
    if not read:
        raise TrainingError("none of the validation volumes could be read; see the lines above")
    logits, labels = torch.stack(list(read.values())), split.labels[list(read)]
    if not bool(torch.isfinite(logits).all()):
        raise TrainingError(
            "the answers for the validation volumes are not finite, expected numbers: training has diverged; lower "
            f"--learning-rate (now {job.run.config.head_learning_rate:g}) or --weight-decay"
        )
    metrics = compute_metrics(labels.numpy(), logits.sigmoid().numpy())
    metrics["auroc_findings"] = len(job.model.labels) - int(lacks_a_class(labels.numpy()).sum())
    metrics["loss"] = job.criterion(logits.to(job.run.device), labels.to(job.run.device)).item()
    return Validation(metrics, [split.volumes[i].name for i in read], logits)


def is_significantly_worse(validation: Validation, names: Sequence[str], logits: Tensor, split: Split) -> bool:
    """Whether its macro AUROC is below that of `logits` by more than the standard error of the difference.

    On the volumes that both evaluations could read.
    """
    now, before = dict(zip(validation.names, validation.logits, strict=True)), dict(zip(names, logits, strict=True))
    both = [volume for volume in split.volumes if volume.name in now and volume.name in before]
    if not both:
        return False
    first, second = (torch.stack([rows[v.name] for v in both]).sigmoid().numpy() for rows in (before, now))
    labels = np.stack([volume.labels for volume in both])
    change = auroc_difference(labels, first, second, [volume.patient for volume in both])
    return change is not None and change[0] > change[1]
