"""A run's model, or those of an ensemble's partners, over volumes -> probabilities: one row for each volume, fused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ctclip.data.cohort import Volume
from ctclip.data.feature_cache import FeatureCache, backbone_key, encoder_digest
from ctclip.data.loading import Batch
from ctclip.data.patients import merge_ids
from ctclip.evaluation.ensemble import check_uncalibrated, combine, fit_on_tuning
from ctclip.evaluation.run_folder import run_tuning
from ctclip.evaluation.saved_ensemble import check_partners, save_ensemble, saved_ensemble
from ctclip.inference.contributions import Contributions
from ctclip.inference.predictor import chunks, load_model, predict_volumes
from ctclip_model import CTCLIPMultiAbnormalityModel, PromptError, Prompts

VOLUMES_AT_ONCE = 32  # go through all partners before the next ones; an interruption loses no more than these


@dataclass(frozen=True)
class FusedModels:
    """K models on one device, K = 1 for a run, with the same labels in orders of their own; `weights` (K, L) of
    `labels`, None where all count alike."""

    models: tuple[CTCLIPMultiAbnormalityModel, ...]
    labels: tuple[str, ...]
    weights: np.ndarray | None = None

    @property
    def dtype(self) -> np.dtype:
        """Of the probabilities that `predict` hands over."""
        return np.dtype(np.float32 if len(self.models) == 1 else np.float64)

    def predict(
        self,
        volumes: Sequence[Volume],
        *,
        workers: int | None = None,
        on_batch: Callable[[Batch], None] | None = None,
        on_answer: Callable[[int, np.ndarray, Tensor, Contributions | None], None] | None = None,
        on_failure: Callable[[int, Exception], object] | None = None,
        caches: Sequence[FeatureCache] | None = None,
        resample_on_device: bool = False,
        explain: Sequence[int] = (),
        batch_size: int = 4,
    ) -> tuple[list[int], np.ndarray]:
        """(indices of the volumes that every model answers, ascending; their probabilities (n, L)).

        One model's are its sigmoids, float32; several models' are `combine` of these. A volume is read once for each
        input shape among the models, or, with `caches`, one for each model, once for each model that has it not in its
        own. `on_answer` is called as (index, probabilities (L,), voxels, contributions) once the last model has
        answered, the other arguments are as in `predict_volumes`; `explain` is of one model only.
        """
        if explain and len(self.models) > 1:
            raise ValueError(f"found {len(self.models)} models to explain, expected one; each has maps of its own")
        passes = self._passes(caches)
        at_once = VOLUMES_AT_ONCE if len(passes) > 1 else max(1, len(volumes))
        rows: dict[int, np.ndarray] = {}
        for chunk in chunks(range(len(volumes)), at_once):
            left, answers = list(chunk), {index: np.zeros((len(self.models), len(self.labels))) for index in chunk}
            for each in passes:
                left = self._one_pass(
                    each, volumes, left, answers, on_batch=on_batch and _renumbered(on_batch, left, each is passes[0]),
                    on_answer=on_answer if each is passes[-1] else None, on_failure=on_failure, workers=workers,
                    resample_on_device=resample_on_device, explain=explain, batch_size=batch_size,
                )  # fmt: skip
            rows |= {index: self._fused(answers[index]) for index in left}
        read = sorted(rows)
        return read, np.stack([rows[index] for index in read]) if read else np.zeros((0, len(self.labels)))

    def _one_pass(
        self, each: _Pass, volumes: Sequence[Volume], indices: list[int], answers: dict[int, np.ndarray], *,
        on_answer: Callable[[int, np.ndarray, Tensor, Contributions | None], None] | None,
        on_failure: Callable[[int, Exception], object] | None, **options: Any,
    ) -> list[int]:
        """Fills `answers` {index: (K, L)} with what the models of one pass answer; -> the indices that have answers."""

        def keep(number: int, logits: Tensor) -> None:
            probabilities = logits.sigmoid().numpy().reshape(len(each.places), -1)
            for place, row in zip(each.places, probabilities, strict=True):
                order = [self.models[place].labels.index(name) for name in self.labels]
                answers[indices[number]][place] = row[order]

        def answered(number: int, voxels: Tensor, logits: Tensor, contributions: Contributions | None) -> None:
            keep(number, logits)
            if on_answer is not None:
                on_answer(indices[number], self._fused(answers[indices[number]]), voxels, contributions)

        failed = None if on_failure is None else lambda number, error: on_failure(indices[number], error)
        read, logits = predict_volumes(each.model, [volumes[index] for index in indices], cache=each.cache,
                                       on_answer=answered, on_failure=failed, **options)
        for number, row in zip(read, logits, strict=True):
            keep(number, row)
        return [indices[number] for number in read]

    def _fused(self, probabilities: np.ndarray) -> np.ndarray:
        """(K, L) -> (L,)"""
        if len(self.models) == 1:
            return probabilities[0].astype(self.dtype)
        return combine(probabilities[:, None], self.weights)[0]

    def _passes(self, caches: Sequence[FeatureCache] | None) -> list[_Pass]:
        if caches is not None or len(self.models) == 1:
            return [_Pass((k,), model, None if caches is None else caches[k]) for k, model in enumerate(self.models)]
        shapes = dict.fromkeys(model.input_shape for model in self.models)
        places = [tuple(k for k, model in enumerate(self.models) if model.input_shape == shape) for shape in shapes]
        return [_Pass(same, _Together([self.models[k] for k in same]), None) for same in places]


class _Pass(NamedTuple):
    """What reads volumes once: a model, or several of one input shape; their places among all models."""

    places: tuple[int, ...]
    model: Any
    cache: FeatureCache | None


class _Together(nn.Module):
    """Models of one input shape as one, whose logits (B, K * L) are theirs one after the other. Those with the same
    frozen encoder, such as folds trained on cached features, encode a volume once."""

    def __init__(self, models: Sequence[CTCLIPMultiAbnormalityModel]):
        super().__init__()
        self.models, self.input_shape = nn.ModuleList(models), models[0].input_shape
        self.labels = tuple(name for model in models for name in model.labels)
        self.same: dict[tuple, list[int]] = {}  # encoder -> places of the models that have it
        for k, model in enumerate(models):
            self.same.setdefault(_encoder_key(model), []).append(k)

    def forward(self, volumes: Tensor) -> Tensor:
        logits: dict[int, Tensor] = {}
        for places in self.same.values():
            first: Any = self.models[places[0]]
            if len(places) == 1:
                logits[places[0]] = first(volumes)
                continue
            stored = first.encode_for_cache(volumes)
            first.scale_check(volumes)
            for k in places:
                model: Any = self.models[k]
                logits[k] = model.head(model.features_from_cache(stored))
        return torch.cat([logits[k] for k in range(len(self.models))], 1)


def _encoder_key(model: CTCLIPMultiAbnormalityModel) -> tuple:
    """Equal for models whose `encode_for_cache` is the same function, as in a cache's key."""
    return model.cache_format, encoder_digest(model), "" if model.is_ctclip else repr(backbone_key(model))


def _renumbered(
    on_batch: Callable[[Batch], None], indices: Sequence[int], is_first: bool
) -> Callable[[Batch], None]:
    """`on_batch` with places among all volumes; of what is read again, failures only."""

    def called(batch: Batch) -> None:
        places = [indices[number] for number in batch.index.tolist()] if is_first else []
        if is_first or batch.failures:
            decisions = batch.decisions if is_first else []
            on_batch(replace(batch, index=torch.tensor(places, dtype=torch.int64), decisions=decisions))

    return called


def load_models(checkpoint: str | Path, device: str | None = None, prompts: Prompts | None = None) -> FusedModels:
    """Those of a saved ensemble, whose partners are checked, or `load_model`'s one."""
    ensemble = saved_ensemble(checkpoint)
    if ensemble is None:
        model = load_model(checkpoint, device, prompts)
        return FusedModels((model,), tuple(model.labels))
    if prompts is not None:
        raise PromptError(f"{checkpoint}: found an ensemble, which has no text tower, expected a CT-CLIP file for "
                          "prompts; name one with --checkpoint (models/ctclip_zeroshot.pt)")
    ensemble.check_partners()
    models = tuple(load_model(partner, device) for partner in ensemble.partners)
    return FusedModels(models, ensemble.findings, ensemble.weights)


@contextmanager
def runs_as_one(runs: Sequence[str | Path], method: str | None = None) -> Iterator[Path]:
    """The folder of one run; of several, that of an ensemble for the time of the block: weights, calibration and
    thresholds are fitted on patients who are tuning patients of all, as an evaluation would."""
    if len(runs) == 1:
        yield Path(runs[0])
        return
    findings, tunings = check_partners(runs), [run_tuning(Path(run)) for run in runs]
    tables = [table for tuning in tunings if tuning for table in tuning]
    check_uncalibrated(tables)
    ids = merge_ids([(table.source, table.ids) for table in tables],
                    dict.fromkeys(name for table in tables for name in table.frame.index))
    fit = fit_on_tuning(tunings, findings, method or "mean", ids, allow_partial=True)
    with tempfile.TemporaryDirectory(prefix="ctclip-") as folder:
        yield save_ensemble(Path(folder, "ensemble"), runs, fit.by_finding(findings), fit.fused).folder
