"""The inputs of the head while the backbone is frozen: features that the cache of `ctclip.data.feature_cache` holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctclip.config import TrainingError
from ctclip.data.cohort import Volume
from ctclip.data.feature_cache import FeatureCache, encode_missing
from ctclip.data.loading import Batch
from ctclip.inference.predictor import chunks
from ctclip.training.run import SPLIT_NAMES, Run, Split, TrainingJob
from ctclip_model import CTCLIPMultiAbnormalityModel

CHUNK = 64  # volumes whose features are in memory at once


def load_features(job: TrainingJob) -> None:
    """Points both splits to their features in the cache, encoding what is missing; drops unreadable volumes."""
    run, model = job.run, job.model
    model.eval()
    run.cache = cache = FeatureCache(run.config.cache_dir, model)
    for name, split in job.splits.items():
        if name == "train" and run.config.augment:
            run.log("--augment changes voxels: no cache for training volumes, every frozen epoch encodes them anew")
        else:
            _load_split(job, cache, name, split)
    run.exchange_records()


def _load_split(job: TrainingJob, cache: FeatureCache, name: str, split: Split) -> None:
    run, model = job.run, job.model
    on_batch = _batch_callback(run, name)
    rows = encode_missing(model, cache, split.volumes, run.device, run.workers, run.ranks, on_batch)
    split.keep([i for i, row in enumerate(rows) if row is not None])
    split.rows = [row for row in rows if row is not None]
    if not split.volumes:
        raise TrainingError(f"none of the {len(rows)} {SPLIT_NAMES[name]} volumes could be read; see the lines above")
    run.readings |= dict(zip(split.names, cache.readings(split.rows), strict=True))
    if model.cache_format == "pooled" or (model.is_ctclip and model.head_name != "attention"):
        inputs = (frozen_inputs(run, model, split, chunk) for chunk in chunks(range(len(split.rows)), CHUNK))
        split.features = torch.cat([chunk.cpu() for chunk in inputs])


def _batch_callback(run: Run, split: str) -> Callable[[list[Volume], Batch], None]:
    def on_batch(volumes: list[Volume], batch: Batch) -> None:
        run.record(split, volumes, batch)
        run.stop.check("what has been encoded is in the cache")

    return on_batch


def drop_features(job: TrainingJob) -> None:
    """The backbone is about to be trained: from now on every volume is read and encoded."""
    for split in job.splits.values():
        split.rows = split.features = None


@torch.no_grad()
def frozen_inputs(run: Run, model: CTCLIPMultiAbnormalityModel, split: Split, indices: Sequence[int]) -> Tensor:
    """The head's inputs for these volumes of the split, on the device."""
    if split.features is not None:
        return split.features.index_select(0, torch.tensor(indices, dtype=torch.long)).to(run.device)
    assert run.cache is not None and split.rows is not None
    return run.cache.head_inputs(model, [split.rows[i] for i in indices], run.device)
