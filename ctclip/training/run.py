"""A run before its first step: what it is told (configuration, machine), what it works on (cohort, split, model, loss),
and where the features of a frozen backbone come from (the cache)."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ctclip.config import QUICK_TEST_VOLUMES, SYNTHETIC_NOTE, Machine, TrainingConfig, TrainingError
from ctclip.data.cohort import Cohort, Volume, load_cohort
from ctclip.data.ct_rate import FETCH_COMMAND
from ctclip.data.feature_cache import FeatureCache, encode_missing
from ctclip.data.loading import micro_batch_size
from ctclip.data.splits import split_by_patient
from ctclip.distributed import Ranks
from ctclip.inference.predictor import choose_device, choose_precision, choose_workers, chunks
from ctclip.inference.prompts import load_with_prompts
from ctclip.phantoms.cohort import is_phantom_cohort, write_phantom_cohort
from ctclip_model import (
    CLASSFINE_PATH,
    DEMO_PATH,
    CTCLIPMultiAbnormalityModel,
    balanced_label_weights,
    create_loss,
)

CACHED_AT_ONCE = 64  # volumes whose cached codes are on the device at a time


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised where nothing is lost. `code` is the exit code."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


# ----------------------------------------------------------------------------------------------------------------------
# Before the first step: data, model, cached features
# ----------------------------------------------------------------------------------------------------------------------


def built_in_folder(config: TrainingConfig) -> Path:
    return Path("data", f"phantoms_{config.train_volumes}_{config.valid_volumes}")


def make_built_in_cohort(config: TrainingConfig) -> None:
    """The phantom cohort of this size, made on first use. Prints the one line that says what it is."""
    folder = built_in_folder(config)
    print(f"No --data-dir: using the built-in cohort of phantoms in {folder}. {SYNTHETIC_NOTE}")
    try:
        write_phantom_cohort(folder, config.train_volumes, config.valid_volumes)
    except ValueError as error:  # a cohort of another version in that folder, or a size that makes none
        raise TrainingError(str(error)) from error


def build_model(config: TrainingConfig, phantom: bool) -> CTCLIPMultiAbnormalityModel:
    """The model that `--model` names: CT-CLIP from its weights file, or a timm backbone.

    With `--init-head prompts` its head is the one that answers zero-shot, to be trained on from there.
    """
    if config.init_head != "file" and (config.model, config.head) != ("ctclip", "linear"):
        raise TrainingError(
            f"--init-head {config.init_head} goes with --model ctclip and --head linear, found --model {config.model} "
            f"and --head {config.head}: leave it out"
        )
    if config.model == "ctclip":
        if config.use_attention != "none":
            raise TrainingError(
                f"--use-attention {config.use_attention} is for slice backbones (--model efficientnet_b0, ...); "
                "CT-CLIP attends by itself: leave the flag out, or choose --head attention"
            )
        path = config.ctclip_path or (DEMO_PATH if phantom else CLASSFINE_PATH)
        head = "prompts" if config.init_head == "prompts" else config.head
        return load_with_prompts(path, head=head, dropout=config.dropout)
    for flag, given in (("--ctclip-path", config.ctclip_path), ("--head", config.head != "linear" and config.head)):
        if given:
            raise TrainingError(f"{flag} goes with --model ctclip, found --model {config.model}: leave one out")
    attention = None if config.use_attention == "none" else config.use_attention
    try:
        return CTCLIPMultiAbnormalityModel(
            None, config.model, attention=attention, pretrained=config.pretrained, dropout=config.dropout
        )
    except ValueError as error:
        raise TrainingError(f"--model: {error}; or 'ctclip'") from error


@dataclass
class Split:
    """The volumes of one side of the split and, while the backbone is frozen, where their features are."""

    volumes: list[Volume]
    rows: list[int] | None = None  # in the cache
    features: Tensor | None = None  # in memory, where they are small: what the head takes, (N, ...)

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(np.stack([volume.labels for volume in self.volumes]))

    @property
    def names(self) -> list[str]:
        return [volume.name for volume in self.volumes]

    def keep(self, indices: Sequence[int]) -> None:
        self.volumes = [self.volumes[i] for i in indices]


class StopRequest:
    """Ctrl-C, SIGTERM and a closed terminal, remembered until the state is saved. A second Ctrl-C ends at once."""

    NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __init__(self):
        self.number = 0
        self.before: dict = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self.before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def check(self, message: str) -> None:
        if self.number:
            raise Interrupted(self.number, message)


class Run:
    """One run's folder, device and bookkeeping: which volumes were read how, and which failed."""

    def __init__(self, folder: Path, config: TrainingConfig, machine: Machine):
        self.folder = folder
        self.config = config
        self.machine = machine
        name = machine.device
        if name in (None, "cuda") and torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # with its number, as torch.cuda.set_device wants it
        self.device = choose_device(name)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.ranks = Ranks(self.device)
        self.workers = choose_workers(machine.workers)
        self.dtype = choose_precision(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=self.device))  # sets it up; a rank's first step may have no volume
        self.micro_batch = 0  # volumes per forward pass; set by `prepare`
        self.checkpointing = False
        self.stop = StopRequest()
        self.failures: dict[str, str] = {}
        self.readings: dict[str, str] = {}
        self.cache: FeatureCache | None = None

    def say(self, text: str) -> None:
        if self.ranks.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def record(self, role: str, volumes: list[Volume], batch) -> None:
        """Keeps the decisions and failures of a batch; a failure is printed once."""
        for name, reason in batch.failures:
            if name not in self.failures:
                tqdm.write(f"skipped ({role}): {name}: {reason}")
            self.failures[name] = reason
        for index, decision in zip(batch.index.tolist(), batch.decisions, strict=True):
            self.readings[volumes[index].name] = decision.reading

    def exchange_records(self) -> None:
        for failures, readings in self.ranks.all_gather((self.failures, self.readings)):
            self.failures |= failures
            self.readings |= readings

    def set_checkpointing(self, model: CTCLIPMultiAbnormalityModel, enabled: bool) -> bool:
        """False where it cannot be done: some slice backbones have no such mode."""
        try:
            model.set_gradient_checkpointing(enabled)
        except ValueError:
            return False
        self.checkpointing = enabled
        return True

    def use_less_memory(self, model: CTCLIPMultiAbnormalityModel) -> None:
        """After an allocation failed: half the micro-batch, or recomputed activations; same effective batch."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.micro_batch > 1:
            self.micro_batch //= 2
            what = f"{self.micro_batch} volume{'s' * (self.micro_batch > 1)} at a time"
        elif not self.checkpointing and self.set_checkpointing(model, True):
            what = "gradient checkpointing"
        else:
            tried = "one volume at a time" + " and gradient checkpointing" * self.checkpointing
            raise TrainingError(
                f"out of memory on {self.device} with {tried}; open fewer layers (--unfreeze-layers 1), keep the "
                "backbone frozen (--freeze-backbone), or use a larger device"
            )
        self.say(f"Out of memory on {self.device}: going on with {what}; a step still sees {self.config.batch_size}")


def load_features(run: Run, model: CTCLIPMultiAbnormalityModel, splits: dict[str, Split]) -> None:
    """Points every split to its features in the cache, encoding what is missing, and drops unreadable volumes."""
    model.eval()
    run.cache = FeatureCache(run.config.cache_dir, model)
    for name, split in splits.items():
        if name == "train" and run.config.augment:
            run.say("--augment changes voxels: no cache for training volumes, every frozen epoch encodes them anew")
            continue

        def on_batch(volumes: list[Volume], batch, name: str = name) -> None:
            run.record(name, volumes, batch)
            run.stop.check("what has been encoded is in the cache")

        rows = encode_missing(model, run.cache, split.volumes, run.device, run.workers, run.ranks, on_batch)
        split.keep([i for i, row in enumerate(rows) if row is not None])
        split.rows = [row for row in rows if row is not None]
        if not split.volumes:
            raise TrainingError(f"none of the {len(rows)} {name} volumes could be read; see the lines above")
        run.readings |= dict(zip(split.names, run.cache.readings(split.rows), strict=True))
        if model.cache_format == "pooled" or (model.is_ctclip and model.head_name != "attention"):
            parts = chunks(range(len(split.rows)), CACHED_AT_ONCE)
            split.features = torch.cat([frozen_inputs(run, model, split, part).cpu() for part in parts])
    run.exchange_records()


@torch.no_grad()
def frozen_inputs(run: Run, model: CTCLIPMultiAbnormalityModel, split: Split, chosen: Sequence[int]) -> Tensor:
    """What the head takes for these volumes of the split, on the device."""
    if split.features is not None:
        return split.features.index_select(0, torch.tensor(chosen, dtype=torch.long)).to(run.device)
    return run.cache.head_inputs(model, [split.rows[i] for i in chosen], run.device)


def refuse_lost_voxels(config: TrainingConfig, data_dir: Path, volumes: Sequence[Volume]) -> None:
    """Raises TrainingError where the run would read voxels of volumes that were streamed and have no file any more."""
    wanted = {}
    if config.frozen_epochs < config.epochs:
        wanted["unfrozen epochs"] = "add --freeze-backbone"
    if config.augment:
        wanted["--augment"] = "leave --augment out"
    lost = sum(volume.signature is not None for volume in volumes)
    if lost and wanted:
        raise TrainingError(
            f"{data_dir}: found {lost} of {len(volumes)} volumes without a file (streamed, only their codes are left), "
            f"expected files, because {' and '.join(wanted)} read voxels; {' and '.join(wanted.values())}, or fetch "
            f"the files with {FETCH_COMMAND} train"
        )


@dataclass
class Job:
    """What is known before the first step."""

    run: Run
    data_dir: Path
    phantom: bool
    cohort: Cohort
    splits: dict[str, Split]
    model: CTCLIPMultiAbnormalityModel
    criterion: nn.Module

    @property
    def note(self) -> str | None:
        """Disclaimer shown with the results of this run."""
        return SYNTHETIC_NOTE if self.phantom else None


def prepare(config: TrainingConfig, folder: Path, machine: Machine) -> Job:
    """Cohort, split, model and loss of a run; nothing is written but the built-in cohort."""
    config.check()
    machine.check()
    torch.manual_seed(config.seed)
    run = Run(folder, config, machine)
    run.folder = run.ranks.all_gather(folder)[0]  # its default name is the time, which may differ
    data_dir = Path(config.data_dir) if config.data_dir else built_in_folder(config)
    if config.data_dir is None and run.ranks.is_main:
        make_built_in_cohort(config)
    run.ranks.barrier()
    phantom = is_phantom_cohort(data_dir)
    model = build_model(config, phantom).to(run.device)
    cohort = load_cohort(data_dir, "train", limit=config.limit)
    refuse_lost_voxels(config, data_dir, cohort.volumes)
    train_volumes, tuning_volumes = split_by_patient(cohort.volumes, config.tuning_fraction, config.seed)
    if config.mode == "quick_test":
        train_volumes, tuning_volumes = train_volumes[: QUICK_TEST_VOLUMES[0]], tuning_volumes[: QUICK_TEST_VOLUMES[1]]
    splits = {"train": Split(train_volumes), "tuning": Split(tuning_volumes)}
    weights = balanced_label_weights(splits["train"].labels) if config.class_weights else None
    criterion = create_loss(config.loss_type, config.alpha, config.gamma, weights).to(run.device)
    run.micro_batch = machine.micro_batch or micro_batch_size(model.input_shape, config.batch_size)
    wanted = machine.gradient_checkpointing
    enabled = wanted == "on" or (wanted == "auto" and run.device.type == "cuda")
    if enabled and not run.set_checkpointing(model, True):
        if wanted == "on":
            raise TrainingError(f"--gradient-checkpointing on: {config.model} has no such mode; leave it out")
        run.say(f"{config.model} has no gradient checkpointing: going on without")
    return Job(run, data_dir, phantom, cohort, splits, model, criterion)
