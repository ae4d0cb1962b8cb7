"""Fine-tuning: the head on a frozen backbone first, then layer by layer into it, with states that a run continues from.

A frozen backbone gives the same features for a volume in every epoch, so a frozen epoch reads them from the cache of
`ctclip.data.feature_cache` and costs next to nothing. An unfrozen epoch reads and encodes every volume.

"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ctclip import __version__
from ctclip.card_file import discard_card
from ctclip.config import MOVABLE, Machine, TrainingConfig, TrainingError, config_from_flags, machine_from_flags
from ctclip.data.feature_cache import CacheError, encoder_digest
from ctclip.data.loading import volume_loader
from ctclip.data.tables import CohortError
from ctclip.data.volume_file import VolumeError
from ctclip.errors import UserError
from ctclip.evaluation.figures import TRAINING_CURVES, write_training_figure
from ctclip.evaluation.metrics import auroc_difference, compute_metrics
from ctclip.evaluation.run_folder import RESULT_FILES, newest_run, run_record
from ctclip.evaluation.tables import write_table
from ctclip.fileio import replacing
from ctclip.inference.predictor import chunks, predict_volumes
from ctclip.training.checkpoint import StateError, load_newest, or_explain, save_state
from ctclip.training.run import (
    CACHED_AT_ONCE,
    Interrupted,
    Job,
    Run,
    Split,
    frozen_inputs,
    load_features,
    prepare,
)
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel, ModelError

CACHED_PIECE = 32  # a cached volume needs less than this fraction of the memory of one that is encoded

TUNING_CHUNK = 128  # tuning volumes between two moments at which an evaluation can be saved

SMALL = 10**6  # bytes; more than a run's record, log and curves take

BAD_STEPS = 3  # steps in a row whose loss is not finite, after which a run ends


# ----------------------------------------------------------------------------------------------------------------------
# What moves: optimiser, averages, exchange between ranks
# ----------------------------------------------------------------------------------------------------------------------


def schedule(progress: float, start: float, end: float, warmup: float) -> float:
    """Share of the peak rate at `progress` (epochs): linear warm-up from `start`, times a cosine to 0 at `end`."""
    if progress < start:
        return 0.0
    done = (progress - start) / (end - start)
    rise = min(1.0, done / warmup) if warmup > 0 else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Averages:
    """Exponential moving average of the parameters that move (timm's ModelEmaV3), by name. Off with decay 0."""

    def __init__(self, decay: float):
        self.decay = decay
        self.steps = 0
        self.average = None
        self.live = nn.ParameterDict()

    def follow(self, parameters: dict[str, nn.Parameter]) -> None:
        """From now on average these; an average that exists goes on, a new one starts at the present value."""
        if not self.decay:
            return
        from timm.utils import ModelEmaV3

        before = self.tensors()
        self.live = nn.ParameterDict({name.replace(".", "/"): value for name, value in parameters.items()})
        self.average = ModelEmaV3(self.live, decay=self.decay, use_warmup=True)
        self.set({name: value for name, value in before.items() if name in parameters})

    def update(self) -> None:
        if self.average is not None:
            self.steps += 1
            self.average.update(self.live, step=self.steps)

    def tensors(self) -> dict[str, Tensor]:
        if self.average is None:
            return {}
        return {name.replace("/", "."): value.detach() for name, value in self.average.module.items()}

    @torch.no_grad()
    def set(self, tensors: dict[str, Tensor]) -> None:
        own = self.tensors()
        for name, value in tensors.items():
            own[name].copy_(value)


@contextmanager
def weights_of(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block the model has these tensors, by name; afterwards its own again."""
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in tensors}
    with torch.no_grad():
        before = {name: value.detach().clone() for name, value in own.items()}
        for name, value in own.items():
            value.copy_(tensors[name])
        try:
            yield
        finally:
            for name, value in own.items():
                value.copy_(before[name])


class GradientExchange(nn.Module):
    """Averages accumulated gradients over ranks with DistributedDataParallel, in one pass without data.

    Volumes go through the model itself, so that a rank may need more passes than another, run out of memory, or have
    nothing readable in a step, without leaving the others waiting inside a backward pass.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        super().__init__()
        self.open = nn.ParameterList(parameters)

    def forward(self) -> Tensor:
        return sum(parameter.sum() for parameter in self.open) * 0.0


class Moving:
    """The parameters that move at present, with optimiser, averages and the exchange between ranks."""

    def __init__(self, run: Run, model: CTCLIPMultiAbnormalityModel):
        self.run, self.model, self.config = run, model, run.config
        self.layers = model.layers()
        self.open = 0
        self.epoch = -1  # up to which `advance` has been called
        self.averages = Averages(self.config.ema_decay)
        self.exchange: nn.Module | None = None
        by_name = dict(model.named_parameters())
        head = {id(parameter) for parameter in model.head_parameters()}
        self.names = [name for name, parameter in by_name.items() if id(parameter) in head]
        self._parameters: dict[str, nn.Parameter] = {}  # those of `names`
        groups = self._groups("head", self.names, self.config.head_learning_rate, 0)
        # One operation in place of ten per tensor: most of what a step of a small head on the CPU takes.
        self.optimizer = torch.optim.AdamW(groups, fused=True if run.device.type == "cpu" else None)

    def _groups(self, title: str, names: Sequence[str], rate: float, start: int) -> list[dict]:
        """AdamW groups for these parameters; no weight decay on vectors (norms, scales, biases)."""
        parameters = dict(self.model.named_parameters())
        groups = []
        for decayed in (True, False):
            chosen = [parameters[name] for name in names if (parameters[name].ndim > 1) == decayed]
            decay = self.config.weight_decay if decayed else 0.0
            settings = {"title": title, "peak": rate, "start": start, "lr": 0.0, "weight_decay": decay}
            groups += [{"params": chosen} | settings] if chosen else []
        return groups

    def advance(self, epoch: int) -> None:
        """Opens the layers that are due up to this epoch, those nearest to the output first."""
        for at in range(self.config.frozen_epochs, epoch + 1):
            due = self.config.open_layers(at, len(self.layers))
            for below in range(self.open, due):  # layers between this one and the output
                names = self.layers[-1 - below]
                rate = self.config.backbone_learning_rate * self.config.layer_decay**below
                for group in self._groups(f"layer {len(self.layers) - below}", names, rate, at):
                    self.optimizer.add_param_group(group)
                self.names = [*self.names, *names]
                self._parameters = {}
            self.open = max(self.open, due)
        self.epoch = epoch
        if self.open:
            self.model.unfreeze_backbone(None if self.open == len(self.layers) else self.open)
        else:
            self.model.freeze_backbone()
        parameters = self.parameters()
        self.averages.follow(parameters)
        if self.run.ranks.world > 1:
            self.exchange = None  # before the next one hooks into the same parameters
            self.exchange = nn.parallel.DistributedDataParallel(GradientExchange(list(parameters.values())))

    def parameters(self) -> dict[str, nn.Parameter]:
        if not self._parameters:  # gathered once: a walk through the model costs more than a step
            everything = dict(self.model.named_parameters())
            self._parameters = {name: everything[name] for name in self.names}
        return self._parameters

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that may have moved: open parameters, and running statistics of an open slice backbone."""
        found = {name: value.detach() for name, value in self.parameters().items()}
        if self.open and not self.model.is_ctclip:  # CT-CLIP's buffers (codebook, zeros) are fixed
            found |= dict(self.model.named_buffers())
        saved = self.model.state_dict()
        return {name: value for name, value in found.items() if name in saved}

    def best_tensors(self) -> dict[str, Tensor]:
        """What is evaluated and saved: averages where there are any."""
        return self.tensors() | self.averages.tensors()

    def set_learning_rates(self, progress: float) -> None:
        for group in self.optimizer.param_groups:
            warmup, end = self.config.warmup_fraction, self.config.epochs
            group["lr"] = group["peak"] * schedule(progress, group["start"], end, warmup)

    def before_step(self) -> dict:
        """What passes through the model change before the optimiser's step: random numbers, running statistics."""
        statistics = [] if self.model.is_ctclip else [buffer.clone() for buffer in self.model.buffers()]
        return {"random": random_state(self.run), "statistics": statistics}

    def undo_step(self, before: dict) -> None:
        """Gives up a step that the optimiser has not taken yet."""
        self.optimizer.zero_grad(set_to_none=True)
        set_random_state(self.run, before["random"])
        for buffer, value in zip(self.model.buffers(), before["statistics"], strict=False):
            buffer.copy_(value)

    def step(self, progress: float) -> bool:
        """One optimiser step from the gradients of all ranks; False, and no step, if they are not finite. They stay."""
        scaler = self.run.scaler
        if self.exchange is not None:
            with warnings.catch_warnings():  # on the strides of an axis of length 1
                warnings.filterwarnings("ignore", message="Grad strides do not match")
                self.exchange().backward()
        moving = [parameter for parameter in self.parameters().values() if parameter.grad is not None]
        if not moving:
            return True  # nothing of this step could be read
        self.set_learning_rates(progress)
        scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in moving])
        finite, too_long = torch.stack([norm.isfinite(), norm > self.config.clip_norm]).tolist()
        if finite and too_long:
            nn.utils.clip_grads_with_norm_(moving, self.config.clip_norm, norm)
        if finite or scaler.is_enabled():  # on an overflow the scaler leaves the step out and lowers its scale
            scaler.step(self.optimizer)
            scaler.update()
        if finite:
            self.averages.update()
        # An overflow is part of loss scaling, until the scale has nowhere left to go.
        return finite or (scaler.is_enabled() and scaler.get_scale() >= 1)


# ----------------------------------------------------------------------------------------------------------------------
# One step, one evaluation
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a rank saw in one step: the sum of its losses, how many volumes, and those whose loss is not finite."""

    loss_sum: float = 0.0
    seen: int = 0
    bad: list[str] = field(default_factory=list)


def batches_of(split: Split, run: Run, epoch: int) -> list[list[int]]:
    """Indices of the volumes of every step of an epoch, for all ranks together; the same for every call."""
    generator = torch.Generator().manual_seed(run.config.seed * 100_003 + epoch)
    order = torch.randperm(len(split.volumes), generator=generator)
    return [batch.tolist() for batch in order.split(run.config.batch_size)]


def pieces_of(
    run: Run, model: CTCLIPMultiAbnormalityModel, split: Split, batches: Sequence[list[int]], epoch: int
) -> Iterator[tuple[Tensor, Tensor, list[str], bool]]:
    """(input, labels, names, last) of this rank, on the device, in pieces of a step. Every step has a last piece, even
    where nothing in it could be read."""
    pieces, ends = [], []
    for batch in batches:
        mine = run.ranks.shard(batch)
        size = run.micro_batch * (1 if split.rows is None else CACHED_PIECE)
        cut = chunks(mine, size) or [[]]
        pieces += cut
        ends += [False] * (len(cut) - 1) + [True]
    if split.rows is not None:
        labels, names = split.labels, split.names
        for piece, last in zip(pieces, ends, strict=True):
            inputs = frozen_inputs(run, model, split, piece) if piece else torch.empty(0)
            own = labels.index_select(0, torch.tensor(piece, dtype=torch.long))
            yield inputs, own.to(run.device), [names[i] for i in piece], last
        return
    seed = run.config.seed * 100_003 + epoch if run.config.augment else None
    loader = volume_loader(
        split.volumes, model.input_shape, micro_batches=pieces, num_workers=run.workers, augment_seed=seed,
        pin=run.device.type == "cuda",
    )  # fmt: skip
    for batch, last in zip(loader, ends, strict=True):
        run.record("train", split.volumes, batch)
        names = [split.volumes[i].name for i in batch.index.tolist()]
        volumes, labels = (x.to(run.device, non_blocking=True) for x in (batch.volumes, batch.labels))
        yield volumes, labels, names, last


def accumulate(
    run: Run,
    model: CTCLIPMultiAbnormalityModel,
    criterion: nn.Module,
    stream: Iterator[tuple[Tensor, Tensor, list[str], bool]],
    whole: int,
    cached: bool,
) -> Outcome:
    """Adds this rank's gradients of one step, of `whole` volumes over all ranks, piece by piece."""
    outcome = Outcome()
    for inputs, labels, names, last in stream:
        if len(labels):
            if cached:
                logits = model.head(inputs)
            else:
                with run.autocast():
                    logits = model(inputs)
            loss = criterion(logits.float(), labels)
            value = loss.item()
            if math.isfinite(value):
                # Gradients are averaged over ranks, and each rank only has its share of the step.
                share = len(labels) / whole * run.ranks.world
                run.scaler.scale(loss * share).backward()
                outcome.loss_sum += value * len(labels)
                outcome.seen += len(labels)
            else:
                finite = logits.isfinite().all(1).tolist()
                culprits = [name for name, good in zip(names, finite, strict=True) if not good]
                outcome.bad += culprits or names
        if last or run.stop.number:  # a step may take minutes, and a signal gives seconds
            return outcome
    raise AssertionError("a step without a last piece")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the CPU (whose allocator raises a plain RuntimeError)."""
    told = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in told)


def random_state(run: Run) -> dict[str, Tensor]:
    on_gpu = {"cuda": torch.cuda.get_rng_state(run.device)} if run.device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | on_gpu


def set_random_state(run: Run, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and run.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], run.device)


@torch.no_grad()
def tune(model: CTCLIPMultiAbnormalityModel, split: Split, run: Run, chosen: list[int]) -> dict[int, Tensor | None]:
    """Logits (18,) of these tuning volumes, in float32 in every stage; None for one that cannot be read.

    Every rank computes its share; all get the whole.
    """
    model.eval()
    mine = run.ranks.shard(chosen)
    read, logits = mine, torch.zeros(0, len(ABNORMALITIES))
    if mine and split.rows is not None:
        inputs = (frozen_inputs(run, model, split, part) for part in chunks(mine, CACHED_AT_ONCE))
        logits = torch.cat([model.head(part).float().cpu() for part in inputs])
    elif mine:
        read, logits = encode_and_predict(model, split, run, mine)
    found: dict[int, Tensor | None] = dict.fromkeys(chosen)
    for indices, rows in run.ranks.all_gather((read, logits)):
        found |= {i: row.clone() for i, row in zip(indices, rows, strict=True)}
    return found


def encode_and_predict(
    model: CTCLIPMultiAbnormalityModel, split: Split, run: Run, mine: list[int]
) -> tuple[list[int], Tensor]:
    """Indices, of those given, of the volumes that could be read, and their logits."""
    volumes = [split.volumes[i] for i in mine]

    def on_batch(batch) -> None:
        run.record("tuning", volumes, batch)
        run.stop.check("the epoch's steps are saved")

    while True:
        try:
            read, logits = predict_volumes(model, volumes, run.micro_batch, run.workers, on_batch)
            return [mine[i] for i in read], logits
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or run.micro_batch == 1:
                raise
        run.use_less_memory(model)


def judge(
    split: Split, run: Run, criterion: nn.Module, tuned: dict[int, Tensor | None]
) -> tuple[dict, list[str], Tensor]:
    """(metrics at 0.5 and loss, names, logits) of the tuning volumes that could be read."""
    read = sorted(i for i, row in tuned.items() if row is not None)
    if not read:
        raise TrainingError("none of the tuning volumes could be read; see the lines above")
    logits, labels = torch.stack([tuned[i] for i in read]), split.labels[read]
    metrics = compute_metrics(labels.numpy(), logits.sigmoid().numpy())
    metrics["loss"] = criterion(logits.to(run.device), labels.to(run.device)).item()
    return metrics, [split.volumes[i].name for i in read], logits


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Position:
    """Where a run is, and what the epoch in progress has added up so far."""

    epoch: int = 0
    step: int = 0  # of this epoch
    loss_sum: float = 0.0
    seen: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    bad_names: list[str] = field(default_factory=list)
    seconds: float = 0.0
    tuned: dict[int, Tensor | None] = field(default_factory=dict)  # tuning volumes that are evaluated already
    falls: int = 0  # evaluations in a row that were worse than the best by more than the noise
    stopped: str = ""  # why the run ended before its last epoch


@dataclass
class Best:
    """The best evaluation so far. `tensors` holds its weights until they are written to the run's folder."""

    score: float = -math.inf
    epoch: int = 0
    names: list[str] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.zeros(0, len(ABNORMALITIES)))  # of these volumes
    tensors: dict[str, Tensor] = field(default_factory=dict)


def train(config: TrainingConfig, folder: Path, machine: Machine | None = None) -> Path:
    """Runs, or continues, the training that `folder` belongs to. Returns the folder.

    Raises one of USER_ERRORS or FileNotFoundError with one line for the user, and Interrupted (a KeyboardInterrupt)
    after Ctrl-C or SIGTERM, when the state is saved: the same call goes on from there.
    """
    job = prepare(config, folder, machine or Machine())
    start = time.perf_counter()
    run, model, splits, criterion = job.run, job.model, job.splits, job.criterion
    print_head(job)
    position, best, history = Position(), Best(), []
    moving = Moving(run, model)
    began_with = encoder_digest(model)
    folder = run.folder
    if run.ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("*.tmp"):  # by a process that was killed while saving
            left_over.unlink()
    state = load_newest(folder, run.say)
    found = None if state is None else (state["position"]["epoch"], state["position"]["step"])
    if len(set(run.ranks.all_gather(found))) > 1:
        raise TrainingError(f"{folder} holds different states on different machines; put it on a shared file system")
    if state is not None:
        try:
            position, best, history = restore(state, job, moving, began_with)
        except (KeyError, TypeError) as error:
            raise TrainingError(f"{folder}: its state is of another version ({error!r}); start a new run") from error
        left = position.stopped or f"going on after epoch {position.epoch} of {config.epochs} and {position.step} steps"
        run.say(f"State found: {left}")
        write_history(run, history)  # the last line may be missing, after a kill between state and log
    else:
        torch.manual_seed(config.seed + run.ranks.rank)  # ranks drop other units
        if (folder / "run.json").is_file():
            run.say("No state has been saved yet: starting from the beginning")
    or_explain(folder, "The run's record", SMALL, lambda: write_run_file(job, "running"))
    writer = open_tensorboard(run, position)
    saved = time.perf_counter()
    trained = 0

    def save_is_due() -> bool:
        return run.ranks.is_main and time.perf_counter() - saved >= 60 * run.machine.save_minutes

    def save() -> None:
        nonlocal saved
        position.seconds = time.perf_counter() - tick
        save_all(job, moving, position, best, history, began_with)
        saved = time.perf_counter()

    with run.stop:
        while position.epoch < config.epochs and not position.stopped:
            # 1. Freeze, or open the layers that are due.
            tick = time.perf_counter() - position.seconds
            epoch = position.epoch
            moving.advance(epoch)
            frozen = moving.open == 0
            if frozen and splits["tuning"].rows is None:
                load_features(run, model, splits)
            elif not frozen:
                for split in splits.values():
                    split.rows = split.features = None
            train_split = splits["train"]
            cached = train_split.rows is not None

            # 2. One pass over the training volumes, from wherever the last one was interrupted.
            model.train()
            batches = batches_of(train_split, run, epoch)
            stream = None
            with tqdm(
                total=len(batches), initial=position.step, desc=f"epoch {epoch + 1}", unit="step", delay=2, leave=False,
                disable=not run.ranks.is_main,
            ) as progress:  # fmt: skip
                while position.step < len(batches):
                    if stream is None:
                        stream = pieces_of(run, model, train_split, batches[position.step :], epoch)
                    before = moving.before_step()
                    outcome, lacking = Outcome(), False
                    try:
                        outcome = accumulate(run, model, criterion, stream, len(batches[position.step]), cached)
                    except (RuntimeError, MemoryError) as error:
                        lacking = out_of_memory(error)
                        if not lacking and not (run.stop.number and "DataLoader worker" in str(error)):
                            raise  # the same signal may have ended a reading process
                    lacking, bad, save_due, stopping = run.ranks.all_reduce_max(
                        lacking, bool(outcome.bad), save_is_due(), run.stop.number
                    )
                    if stopping or lacking:  # as if this step had not begun
                        moving.undo_step(before)
                        stream = None  # closes its reading processes before new ones start
                        if stopping:
                            break
                        run.use_less_memory(model)
                        continue
                    position.step += 1
                    progress.update()
                    finite = False
                    if not bad:
                        finite = moving.step(epoch + (position.step - 0.5) / len(batches))
                    moving.optimizer.zero_grad(set_to_none=True)
                    if finite:
                        position.loss_sum += outcome.loss_sum
                        position.seen += outcome.seen
                        trained += outcome.seen
                    count_bad_step(run, position, outcome, finite)
                    if save_due:
                        save()
            (stopping,) = run.ranks.all_reduce_max(run.stop.number)  # a signal may reach one rank only
            if stopping and best.tensors:
                save_best(run, model, splits["tuning"], best)
            if not frozen or stopping:
                save()
            if stopping:
                run.stop.number = int(stopping)
                run.stop.check(f"saved after step {position.step} of {len(batches)} of epoch {epoch + 1}")
            totals = run.ranks.all_gather((position.loss_sum, position.seen))
            loss_sum, seen = (sum(values) for values in zip(*totals, strict=True))
            if not seen and not position.skipped:
                raise TrainingError("none of the training volumes could be read; see the lines above")
            run.ranks.broadcast(model.buffers())  # running statistics of slice backbones

            # 3. Tuning patients: is this the best so far?
            left = [i for i in range(len(splits["tuning"].volumes)) if i not in position.tuned]
            size = len(left) if frozen else TUNING_CHUNK * run.ranks.world
            for first in range(0, len(left), size):
                with weights_of(model, moving.averages.tensors()):
                    position.tuned |= tune(model, splits["tuning"], run, left[first : first + size])
                if run.ranks.all_reduce_max(save_is_due())[0]:
                    save()
            metrics, names, logits = judge(splits["tuning"], run, criterion, position.tuned)
            run.exchange_records()
            # With one class in every label there is no AUROC; the loss then decides.
            score = metrics["auroc_macro"] if metrics["auroc_macro"] is not None else -metrics["loss"]
            is_best = score > best.score
            history.append(
                {
                    "epoch": epoch + 1,
                    "stage": "frozen" if frozen else "unfrozen",
                    "open_layers": moving.open,
                    "train_loss": loss_sum / seen if seen else None,
                    "tuning_loss": metrics["loss"],
                    "tuning_auroc_macro": metrics["auroc_macro"],
                    "positive_rate": metrics["positive_rate"],
                    "label_rate": metrics["label_rate"],
                    "learning_rate": moving.optimizer.param_groups[0]["lr"],
                    "skipped_steps": position.skipped,
                    "best": is_best,
                    "seconds": time.perf_counter() - tick,
                }
            )
            run.say(epoch_line(history[-1], config.epochs))
            log(writer, history[-1])
            falls = 0
            if is_best:
                tensors = {name: value.detach().cpu().clone() for name, value in moving.best_tensors().items()}
                best = Best(score, epoch + 1, names, logits, tensors)
            elif not frozen and fell(best, splits["tuning"], names, logits):
                falls = position.falls + 1
            stopped = ""
            if falls >= config.patience:
                stopped = (
                    f"AUROC of the tuning patients below the best ({best.score:.3f}) by more than its noise "
                    f"{falls} times in a row: back to the weights of epoch {best.epoch}, training ends"
                )
                run.say(stopped)

            # 4. Save. While the backbone is frozen the best weights wait in the state, where they are small.
            position = Position(
                epoch + 1,
                falls=falls,
                stopped=stopped,
                bad_in_a_row=position.bad_in_a_row,
                bad_names=position.bad_names,
            )
            milestone = not frozen or epoch + 1 in (1, config.frozen_epochs, config.epochs)
            if best.tensors and milestone:
                save_best(run, model, splits["tuning"], best)
            tick = time.perf_counter()  # of the next epoch
            save()
            or_explain(folder, "The log", SMALL, lambda: write_history(run, history))
            if milestone and run.ranks.is_main:
                write_training_figure(history, folder / TRAINING_CURVES, job.note)

    seconds = time.perf_counter() - start
    stopped = position.stopped
    or_explain(folder, "The run's record", SMALL, lambda: finish(job, history, best, stopped, trained, seconds))
    if writer is not None:
        writer.close()
    moving.exchange = None
    run.ranks.destroy()
    return folder


def count_bad_step(run: Run, position: Position, outcome: Outcome, finite: bool) -> None:
    """Counts a step that was left out because its loss or gradient is not finite; too many in a row end the run."""
    if finite:
        position.bad_in_a_row, position.bad_names = 0, []
        return
    names = sorted({name for part in run.ranks.all_gather(outcome.bad) for name in part})
    position.skipped += 1
    position.bad_in_a_row += 1
    position.bad_names = [*position.bad_names, *names]
    shown = ", ".join(names) or "gradient"
    run.say(f"Step {position.step} of epoch {position.epoch + 1} skipped: not finite ({shown})")
    if position.bad_in_a_row >= BAD_STEPS:
        listed = ", ".join(dict.fromkeys(position.bad_names)) or "none by itself: the gradients overflow"
        raise TrainingError(
            f"{BAD_STEPS} steps in a row were not finite, expected numbers (volumes: {listed}); look at these volumes, "
            f"or lower --learning-rate (now {run.config.head_learning_rate:g}). The last good state is in {run.folder}"
        )


def fell(best: Best, tuning: Split, names: list[str], logits: Tensor) -> bool:
    """Whether the macro AUROC of these logits is below the best one by more than the standard error of the difference.

    On the volumes that both evaluations could read.
    """
    volumes = {volume.name: volume for volume in tuning.volumes}
    before, now = (dict(zip(*pair, strict=True)) for pair in ((best.names, best.logits), (names, logits)))
    both = [name for name in names if name in before]
    if not both:
        return False
    first, second = (torch.stack([rows[name] for name in both]).sigmoid().numpy() for rows in (before, now))
    labels = np.stack([volumes[name].labels for name in both])
    change = auroc_difference(labels, first, second, [volumes[name].patient for name in both])
    return change is not None and change[0] > change[1]


# ----------------------------------------------------------------------------------------------------------------------
# The run folder
# ----------------------------------------------------------------------------------------------------------------------


def save_best(run: Run, model: CTCLIPMultiAbnormalityModel, tuning: Split, best: Best) -> None:
    """The best weights and the tuning predictions that belong to them, complete; `best` no longer has to carry them.

    What was computed from earlier weights is removed, before the weights are replaced.
    """
    tensors, best.tensors = best.tensors, {}
    if not run.ranks.is_main:
        return
    stale = ("predictions.csv", "labels.csv", "tuning_predictions.csv", *RESULT_FILES)
    for path in (*(run.folder / name for name in stale), *run.folder.glob("*.png")):
        path.unlink(missing_ok=True)
    discard_card(run.folder)
    size = sum(value.nbytes for value in model.state_dict().values())
    labels = {volume.name: volume.labels for volume in tuning.volumes}
    table = np.stack([labels[name] for name in best.names]).astype(int)

    def write() -> None:
        with weights_of(model, tensors):
            model._save_pretrained(run.folder)
        write_table(run.folder / "tuning_labels.csv", best.names, table)
        write_table(run.folder / "tuning_predictions.csv", best.names, best.logits.sigmoid().numpy())

    or_explain(run.folder, "The best weights", size, write)


def save_all(job: Job, moving: Moving, position: Position, best: Best, history: list[dict], began_with: str) -> None:
    """Everything that the next step depends on. Of the model, what has moved; the rest is in the run's weights file,
    whose digest is `began_with`."""
    run = job.run
    totals = run.ranks.all_gather((position.loss_sum, position.seen))
    random = run.ranks.all_gather(random_state(run))
    run.exchange_records()
    if not run.ranks.is_main:
        return
    loss_sum, seen = (sum(values) for values in zip(*totals, strict=True))
    content = {
        "began_with": began_with,
        "position": asdict(position) | {"loss_sum": loss_sum, "seen": seen},
        "best": dict(vars(best)),
        "history": history,
        "advanced": moving.epoch,
        "tensors": moving.tensors(),
        "optimizer": moving.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "averages": {"steps": moving.averages.steps, "tensors": moving.averages.tensors()},
        "random": random,
        "micro_batch": run.micro_batch,
        "checkpointing": run.checkpointing,
        "criterion": job.criterion.state_dict(),
        "failures": run.failures,
        "readings": run.readings,
        "volumes": {name: split.names for name, split in job.splits.items()},
    }
    save_state(run.folder, position.epoch, position.step, content)


def restore(state: dict, job: Job, moving: Moving, began_with: str) -> tuple[Position, Best, list[dict]]:
    """Puts back what `save_all` wrote: the split too, whatever the folder has gained or lost by now."""
    run = job.run
    position, best = Position(**state["position"]), Best(**state["best"])
    if state["began_with"] != began_with:
        raise TrainingError(
            f"--resume: the backbone's weights are not those that {run.folder} began with; expected the same file "
            "(--ctclip-path names it); or start a new run"
        )
    restore_split(state["volumes"], job)
    job.criterion.load_state_dict(state["criterion"])
    moving.advance(state["advanced"])
    own = moving.model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in state["tensors"].items():
            own[name].copy_(value)
    moving.optimizer.load_state_dict(state["optimizer"])
    moving.averages.follow(moving.parameters())
    moving.averages.steps = state["averages"]["steps"]
    moving.averages.set(state["averages"]["tensors"])
    if state["scaler"] and run.scaler.is_enabled():  # empty when the run began on a device without loss scaling
        run.scaler.load_state_dict(state["scaler"])
    set_random_state(run, state["random"][run.ranks.rank % len(state["random"])])
    if run.machine.micro_batch is None:
        run.micro_batch = state["micro_batch"]
    if run.machine.gradient_checkpointing == "auto" and state["checkpointing"]:
        run.set_checkpointing(moving.model, True)
    run.failures, run.readings = state["failures"], state["readings"]
    if not run.ranks.is_main:  # the sums of the epoch in progress are those of all ranks
        position.loss_sum, position.seen = 0.0, 0
    return position, best, state["history"]


def restore_split(volumes: dict[str, list[str]], job: Job) -> None:
    """The split by name: split anew, a cohort with one volume more or less would put most patients elsewhere."""
    here = {volume.name: volume for volume in job.cohort.volumes}
    wanted = [name for names in volumes.values() for name in names]
    gone = [name for name in wanted if name not in here]
    if gone:
        raise TrainingError(
            f"--resume: found {len(wanted) - len(gone)} of the {len(wanted)} volumes of {job.run.folder} in "
            f"{job.data_dir} (first missing: {gone[0]}), expected all; bring them back, or start a new run"
        )
    for name, split in job.splits.items():
        split.volumes = [here[each] for each in volumes[name]]


def write_history(run: Run, history: list[dict]) -> None:
    if run.ranks.is_main:
        with replacing(run.folder / "log.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in history))


def write_run_file(job: Job, status: str) -> None:
    """run.json: what was run on what with which versions, and what became of each volume that was not used."""
    import timm

    run, splits = job.run, job.splits
    if not run.ranks.is_main:
        return
    left_out = [{"name": name, "reason": reason} for name, reason in (*job.cohort.skipped, *run.failures.items())]
    content = {
        "status": status,
        "config": asdict(run.config),
        "data_dir": str(job.data_dir),
        "phantom": job.phantom,
        "labels": list(ABNORMALITIES),
        "device": str(run.device),
        "processes": run.ranks.world,
        "precision": str(run.dtype).removeprefix("torch."),
        "micro_batch": run.micro_batch,
        "gradient_checkpointing": run.checkpointing,
        "volumes": {name: len(split.volumes) for name, split in splits.items()},
        "patients": {name: len({v.patient for v in split.volumes}) for name, split in splits.items()},
        "tuning_patients": sorted({volume.patient for volume in splits["tuning"].volumes}),
        "read_as": dict(Counter(run.readings.values())),
        "left_out": left_out,
        "versions": {"ctclip": __version__, "python": platform.python_version(), "torch": torch.__version__,
                     "timm": timm.__version__},
    }
    with replacing(run.folder / "run.json") as path:
        path.write_text(json.dumps(content, indent=2))


def open_tensorboard(run: Run, position: Position):
    """A SummaryWriter on `<run>/tensorboard` when asked for, else None; a continued run goes on in the same curves."""
    if not run.machine.tensorboard or not run.ranks.is_main:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run.folder / "tensorboard"), purge_step=position.epoch + 1)


def log(writer, line: dict) -> None:
    if writer is not None:
        for key, value in line.items():
            if isinstance(value, (int, float)) and key != "epoch":
                writer.add_scalar(key, value, line["epoch"])
        writer.flush()


def finish(job: Job, history: list[dict], best: Best, stopped: str, trained: int, seconds: float) -> None:
    run = job.run
    trained = sum(run.ranks.all_gather(trained))
    write_run_file(job, stopped or "finished")
    if not run.ranks.is_main:
        return
    write_training_figure(history, run.folder / TRAINING_CURVES, job.note)
    line = next((line for line in history if line["epoch"] == best.epoch), None)
    if line is not None and line["tuning_auroc_macro"] is not None:
        print(f"Best epoch {best.epoch}: macro AUROC {line['tuning_auroc_macro']:.3f} on the tuning patients")
    skipped = sum(line["skipped_steps"] for line in history)
    if skipped:
        print(f"Steps skipped because they were not finite: {skipped}")
    if run.failures:
        print(f"Left out while reading: {len(run.failures)} volumes, listed in {run.folder / 'run.json'}")
    rate = trained / seconds  # every volume counts in every epoch
    print(f"Training took {seconds:.0f} s, {rate:.0f} volumes per second, peak memory {peak_memory(run.device)}")


# ----------------------------------------------------------------------------------------------------------------------
# What is printed
# ----------------------------------------------------------------------------------------------------------------------


def print_head(job: Job) -> None:
    run, model, config, splits = job.run, job.model, job.run.config, job.splits
    backbone = sum(p.numel() for p in model.backbone_parameters())
    head = sum(p.numel() for p in model.head_parameters())
    loss = (
        f"focal (alpha {config.alpha:g}, gamma {config.gamma:g})" if config.loss_type == "focal" else config.loss_type
    )
    counted = ", ".join(
        f"{len(split.volumes)} {name} volumes of {len({v.patient for v in split.volumes})} patients"
        for name, split in splits.items()
    )
    stages = f"{config.frozen_epochs} frozen, {config.epochs - config.frozen_epochs} unfrozen"
    precision = str(run.dtype).removeprefix("torch.")
    processes = f"{run.ranks.world} processes, " if run.ranks.world > 1 else ""
    kind = f"{config.model}, head {model.head_name}" if model.is_ctclip else config.model
    run.say(job.cohort.summary())
    run.say(f"Split by patient: {counted}")
    run.say(f"Model:    {kind}; backbone {backbone:,} parameters, head {head:,}, input {model.input_shape}")
    if model.load_report:
        run.say(f"Weights:  {model.load_report}")
    run.say(f"Training: {config.epochs} epochs ({stages}), batch {config.batch_size}, loss {loss}")
    run.say(f"Device:   {processes}{run.device} ({precision}), {run.workers} reading processes")
    run.say(f"Cache:    {config.cache_dir}")
    run.say(f"Run:      {run.folder}")


def epoch_line(line: dict, epochs: int) -> str:
    auroc = "undefined" if line["tuning_auroc_macro"] is None else f"{line['tuning_auroc_macro']:.3f}"
    loss = "undefined" if line["train_loss"] is None else f"{line['train_loss']:.4f}"
    stage = "frozen" if line["stage"] == "frozen" else f"unfrozen ({line['open_layers']} layers)"
    return (
        f"epoch {line['epoch']:>2}/{epochs}  backbone {stage}  train loss {loss}  "
        f"validation loss {line['tuning_loss']:.4f}  AUROC {auroc}  "
        f"positive rate {line['positive_rate']:.3f} (labels {line['label_rate']:.3f})  {line['seconds']:.1f} s"
        f"{'  best' if line['best'] else ''}"
    )


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory"
    try:
        import resource
    except ImportError:  # Windows
        return "not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"


# ----------------------------------------------------------------------------------------------------------------------
# Script
# ----------------------------------------------------------------------------------------------------------------------


def run_folder(args: argparse.Namespace) -> tuple[Path, TrainingConfig]:
    """Folder and configuration of the run that the flags ask for: a new one, or with --resume an earlier one.

    A resumed run keeps its own configuration; a flag that says otherwise is refused rather than ignored, except for
    folders, which may have moved.
    """
    config = config_from_flags(args)
    if args.resume is None:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}_{config.model}"
        folder = Path(args.output_dir) if args.output_dir else Path("results") / name
        if (folder / "run.json").is_file():
            raise TrainingError(f"{folder} holds a run already; add --resume {folder}, or choose another --output-dir")
        return folder, config
    if args.output_dir:
        raise TrainingError("--resume goes on in the run's own folder, found --output-dir too; leave it out")
    folder = newest_run() if args.resume == "" else Path(args.resume)
    file = folder / "run.json"
    if not file.is_file():
        raise TrainingError(f"--resume: no run.json in {folder}; expected the folder of an earlier run")
    try:
        stored = TrainingConfig(**run_record(folder)["config"])
    except (KeyError, TypeError) as error:
        raise TrainingError(f"--resume: {file} is of another version ({error}); start a new run") from error
    known = asdict(stored)
    moved = {name: getattr(args, name) for name in MOVABLE if hasattr(args, name)}
    changed = [
        name for name in known if name not in ("mode", *MOVABLE) and getattr(args, name, known[name]) != known[name]
    ]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise TrainingError(f"--resume goes on as {folder} began, found other values for {flags}; leave them out")
    return folder, replace(stored, **moved)


def run_training(args: argparse.Namespace) -> Path | None:
    """Trains as the flags say and returns the run's folder; with --plan only says what that would need."""
    folder, config = run_folder(args)
    if args.plan:
        from ctclip.training.estimate import plan

        plan(config, folder, machine_from_flags(args))
        return None
    return train(config, folder, machine_from_flags(args))


USER_ERRORS = (
    TrainingError,
    CacheError,
    StateError,
    CohortError,
    VolumeError,
    UserError,
    ModelError,
    OSError,
)


def guarded(action) -> int:
    """Runs `action()` and turns what a user can mend into one line and exit code 2; Ctrl-C and SIGTERM, by which
    nothing is lost, into the way to go on."""
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    try:
        action()
    except USER_ERRORS as error:
        print(f"{rank}error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        way = "--resume on a larger device, or begin a run that opens fewer layers (--unfreeze-layers 1)"
        print(f"{rank}error: out of memory; {way}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        what = str(error) or "what was saved last, if anything, is kept"
        print(f"\n{rank}Interrupted: {what}. A run that has begun goes on with --resume.", file=sys.stderr)
        return error.code if isinstance(error, Interrupted) else 128 + signal.SIGINT
    return 0
