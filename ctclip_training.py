"""Fine-tuning: the head on a frozen backbone first, then everything, with checkpoints that a run continues from.

A frozen backbone gives the same features for a volume in every epoch, so the frozen stage computes them once and trains
the head from memory. The unfrozen stage reads and encodes every volume in every epoch.

    python ctclip_training.py --mode quick_test
    python ctclip_training.py --mode full_train --data-dir D
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ctclip_data import (
    PUBLISHED_SHAPE,
    CohortError,
    Volume,
    VolumeError,
    load_cohort,
    split_by_patient,
    volume_loader,
)
from ctclip_evaluation import (
    EvaluationError,
    choose_device,
    choose_precision,
    choose_workers,
    compute_metrics,
    newest_run,
    predict_volumes,
    write_table,
)
from ctclip_model import (
    ABNORMALITIES,
    CLASSFINE_PATH,
    DEMO_PATH,
    CheckpointError,
    CTCLIPMultiAbnormalityModel,
    OneLineParser,
    PretrainedWeightsError,
    create_balanced_loss,
    replacing,
)
from ctclip_phantom import is_phantom_cohort, write_phantom_cohort

FEATURE_MEMORY = 4 * 2**30  # bytes of frozen features kept in memory; a larger cohort is encoded anew in every epoch

# Peak rate of a head. A CT-CLIP latent has length 1, so its entries are small and the head's weights have far to go.
HEAD_LEARNING_RATE = {"ctclip": 3e-2, "slice backbones": 1e-3}


class TrainingError(ValueError):
    """A run that cannot start or go on. One line: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class TrainingConfig:
    """Everything a run depends on; the only owner of the defaults. Stored in run.json."""

    mode: str = "full_train"
    data_dir: str | None = None
    train_volumes: int = 600  # built-in cohort only
    valid_volumes: int = 250
    limit: int | None = None
    tuning_fraction: float = 0.2
    model: str = "ctclip"
    ctclip_path: str | None = None
    use_attention: str = "none"
    pretrained: bool = True
    epochs: int = 22
    freeze_epochs: int = 20
    freeze_backbone: bool = False
    batch_size: int = 16
    learning_rate: float | None = None  # None: HEAD_LEARNING_RATE
    backbone_learning_rate: float = 3e-5
    weight_decay: float = 0.01
    warmup_fraction: float = 0.05
    clip_norm: float = 1.0
    loss_type: str = "focal"
    alpha: float = 0.35
    gamma: float = 2.0
    seed: int = 0

    @property
    def head_learning_rate(self) -> float:
        kind = "ctclip" if self.model == "ctclip" else "slice backbones"
        return HEAD_LEARNING_RATE[kind] if self.learning_rate is None else self.learning_rate

    @property
    def frozen_epochs(self) -> int:
        return self.epochs if self.freeze_backbone else min(self.freeze_epochs, self.epochs)

    def check(self) -> None:
        """Raises TrainingError for a value that makes no run."""
        bounds = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "freeze_epochs": (self.freeze_epochs >= 0, "at least 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "learning_rate": (self.head_learning_rate > 0, "above 0"),
            "backbone_learning_rate": (self.backbone_learning_rate >= 0, "at least 0"),
            "tuning_fraction": (0 < self.tuning_fraction < 1, "between 0 and 1"),
            "alpha": (0 < self.alpha < 1, "between 0 and 1 (it weighs the negatives)"),
            "gamma": (0 <= self.gamma < math.inf, "a finite number of at least 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "clip_norm": (self.clip_norm > 0, "above 0"),
            "warmup_fraction": (0 <= self.warmup_fraction <= 1, "between 0 and 1"),
            "seed": (self.seed >= 0, "at least 0"),
            "limit": (self.limit is None or self.limit >= 2, "at least 2 volumes"),
        }
        for name, (good, expected) in bounds.items():
            if not good:
                raise TrainingError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected {expected}")


# What `--mode quick_test` changes: three epochs of which the last is unfrozen, on so many training and tuning volumes;
# the cohort is a little larger, because a split by patient cannot hit two numbers exactly.
QUICK_TEST = {"train_volumes": 270, "valid_volumes": 100, "epochs": 3, "freeze_epochs": 2}
QUICK_TEST_VOLUMES = (200, 50)


# ----------------------------------------------------------------------------------------------------------------------
# Before the first step: data, model, features
# ----------------------------------------------------------------------------------------------------------------------


def built_in_cohort(n_train: int, n_valid: int, workers: int | None = None) -> Path:
    """Folder of the phantom cohort of this size, made on first use. Prints the one line that says what it is."""
    folder = Path("data", f"phantoms_{n_train}_{n_valid}")
    print(
        f"No --data-dir: using the built-in cohort of synthetic chests in {folder}. "
        "Its results speak of the pipeline, not of patients."
    )
    try:
        return write_phantom_cohort(folder, n_train, n_valid, workers=workers)
    except ValueError as error:  # a cohort of another version in that folder, or a size that makes none
        raise TrainingError(str(error)) from error


def build_model(config: TrainingConfig, phantom: bool) -> CTCLIPMultiAbnormalityModel:
    """The model that `--model` names: CT-CLIP from its weights file, or a timm backbone."""
    if config.model == "ctclip":
        if config.use_attention != "none":
            raise TrainingError(
                f"--use-attention {config.use_attention} is for slice backbones (--model efficientnet_b0, ...); "
                "CT-CLIP attends by itself: leave the flag out"
            )
        return CTCLIPMultiAbnormalityModel(config.ctclip_path or (DEMO_PATH if phantom else CLASSFINE_PATH))
    if config.ctclip_path:
        raise TrainingError(f"--ctclip-path goes with --model ctclip, found --model {config.model}: leave one out")
    attention = None if config.use_attention == "none" else config.use_attention
    try:
        return CTCLIPMultiAbnormalityModel(None, config.model, attention=attention, pretrained=config.pretrained)
    except ValueError as error:
        raise TrainingError(f"--model: {error}; or 'ctclip'") from error


def create_loss(config: TrainingConfig) -> torch.nn.Module:
    if config.loss_type == "focal":
        return create_balanced_loss(config.alpha, config.gamma)
    return torch.nn.BCEWithLogitsLoss()


@dataclass
class Split:
    """The volumes of one side of the split, and their features while the backbone is frozen."""

    volumes: list[Volume]
    features: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(np.stack([volume.labels for volume in self.volumes]))


@torch.no_grad()
def cache_features(model: CTCLIPMultiAbnormalityModel, splits: dict[str, Split], run: Run) -> None:
    """Fills `features` of every split and drops the volumes that cannot be read (reported, counted in the run).

    Left empty when the features of all volumes would not fit FEATURE_MEMORY.
    """
    model.eval()
    total = sum(len(split.volumes) for split in splits.values())
    for name, split in splits.items():
        rows: dict[int, Tensor] = {}
        size = piece_size(model.input_shape, run.batch_size)
        loader = volume_loader(split.volumes, model.input_shape, size, num_workers=run.workers)
        progress = tqdm(total=len(split.volumes), desc=f"encode {name}", unit="vol", delay=2)
        for batch in loader:
            run.record(name, split.volumes, batch)
            progress.update(len(batch.index) + len(batch.failures))
            if not len(batch.index):
                continue
            with run.autocast():
                features = model.features(batch.volumes.to(run.device))
            features = features.half() if features.ndim > 2 else features.float()  # maps are large, vectors are not
            rows |= dict(zip(batch.index.tolist(), features.cpu(), strict=True))
            if features[0].nbytes * total > FEATURE_MEMORY:
                progress.close()
                print(
                    f"Frozen features of {total} volumes need {features[0].nbytes * total / 2**30:.1f} GB: "
                    "not kept in memory, every frozen epoch encodes anew"
                )
                return
        progress.close()
        if not rows:
            raise TrainingError(f"none of the {len(split.volumes)} {name} volumes could be read; see the lines above")
        split.volumes = [split.volumes[i] for i in sorted(rows)]
        split.features = torch.stack([rows[i] for i in sorted(rows)])


class Run:
    """One run's folder, device and bookkeeping: which volumes were read how, and which failed."""

    def __init__(self, folder: Path, config: TrainingConfig, device: str | None, workers: int | None):
        self.folder = folder
        self.config = config
        self.batch_size = config.batch_size
        self.device = choose_device(device)
        self.workers = choose_workers(workers)
        self.dtype = choose_precision(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.failures: dict[str, str] = {}
        self.readings: dict[str, str] = {}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def record(self, role: str, volumes: list[Volume], batch) -> None:
        """Keeps the verdicts and failures of a batch; a failure is printed once."""
        for name, reason in batch.failures:
            if name not in self.failures:
                tqdm.write(f"left out ({role}): {name}: {reason}")
            self.failures[name] = reason
        for index, verdict in zip(batch.index.tolist(), batch.verdicts, strict=True):
            self.readings[volumes[index].name] = verdict.reading


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


def schedule(progress: float, start: float, end: float, warmup: float) -> float:
    """Share of the peak rate at `progress` (epochs): linear warm-up from `start`, times a cosine to 0 at `end`."""
    if progress < start:
        return 0.0
    done = (progress - start) / (end - start)
    rise = min(1.0, done / warmup) if warmup > 0 else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def create_optimizer(model: CTCLIPMultiAbnormalityModel, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over head and backbone; no weight decay on vectors (norms, scales, biases)."""
    groups = []
    for name, parameters, rate in (
        ("head", model.head_parameters(), config.head_learning_rate),
        ("backbone", model.backbone_parameters(), config.backbone_learning_rate),
    ):
        for decayed in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == decayed]
            decay = config.weight_decay if decayed else 0.0
            groups.append({"params": chosen, "name": name, "peak": rate, "lr": 0.0, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def set_learning_rates(optimizer: torch.optim.Optimizer, config: TrainingConfig, progress: float) -> None:
    for group in optimizer.param_groups:
        start = config.frozen_epochs if group["name"] == "backbone" else 0
        if start < config.epochs:
            group["lr"] = group["peak"] * schedule(progress, start, config.epochs, config.warmup_fraction)


def piece_size(shape: tuple[int, int, int], batch_size: int) -> int:
    """Volumes read and encoded at once: the largest divisor of the batch size within the voxels of two published ones.

    A batch of 16 published volumes would be 3.5 GB before the network sees it; its gradients are accumulated instead.
    """
    most = max(1, 2 * math.prod(PUBLISHED_SHAPE) // math.prod(shape))
    return max(size for size in range(1, batch_size + 1) if batch_size % size == 0 and size <= most)


def training_batches(
    split: Split, run: Run, shape: tuple[int, int, int], epoch: int
) -> Iterator[tuple[Tensor, Tensor, float, bool]]:
    """(input, labels, share, last) on the device, shuffled by seed and epoch: cached features where there are some,
    else volumes in pieces of a batch. `share` is the piece's part of its batch, `last` says that this completes it."""
    generator = torch.Generator().manual_seed(run.config.seed * 100_003 + epoch)
    order = torch.randperm(len(split.volumes), generator=generator)
    if split.features is not None:
        labels = split.labels
        for rows in tqdm(order.split(run.batch_size), desc=f"epoch {epoch + 1}", delay=2, leave=False):
            yield split.features[rows].to(run.device).float(), labels[rows].to(run.device), 1.0, True
        return
    volumes = [split.volumes[i] for i in order]
    size = piece_size(shape, run.batch_size)
    loader = volume_loader(volumes, shape, size, num_workers=run.workers)
    for i, batch in enumerate(tqdm(loader, desc=f"epoch {epoch + 1}", delay=2, leave=False)):
        run.record("train", volumes, batch)
        first = i * size // run.batch_size * run.batch_size
        whole = min(run.batch_size, len(volumes) - first)
        last = (i + 1) * size >= first + whole
        share = len(batch.index) / whole
        yield batch.volumes.to(run.device, non_blocking=True), batch.labels.to(run.device), share, last


@torch.no_grad()
def tune(model: CTCLIPMultiAbnormalityModel, split: Split, run: Run, criterion: torch.nn.Module) -> tuple[dict, Tensor]:
    """Metrics at 0.5 and loss on the tuning patients, and their logits (volumes that fail to read are dropped)."""
    model.eval()
    if split.features is not None:
        chunks = split.features.split(256)
        logits = torch.cat([model.head(rows.to(run.device).float()).float().cpu() for rows in chunks])
    else:
        read, logits = predict_volumes(
            model,
            split.volumes,
            batch_size=piece_size(model.input_shape, run.batch_size),
            workers=run.workers,
            on_batch=lambda batch: run.record("tuning", split.volumes, batch),
        )
        if not read:
            raise TrainingError("none of the tuning volumes could be read; see the lines above")
        split.volumes = [split.volumes[i] for i in read]
    metrics = compute_metrics(split.labels.numpy(), logits.sigmoid().numpy())
    return metrics | {"loss": criterion(logits, split.labels).item()}, logits


def train(config: TrainingConfig, folder: Path, device: str | None = None, workers: int | None = None) -> Path:
    """Runs, or continues, the training that `folder` belongs to. Returns the folder.

    Raises TrainingError, CohortError, CheckpointError, PretrainedWeightsError or FileNotFoundError with one line for
    the user, and KeyboardInterrupt after which the same call with `--resume` goes on from the last finished epoch.
    """
    config.check()
    torch.manual_seed(config.seed)
    run = Run(folder, config, device, workers)
    data_dir = Path(config.data_dir) if config.data_dir else built_in_cohort(config.train_volumes, config.valid_volumes)
    phantom = is_phantom_cohort(data_dir)
    start = time.perf_counter()
    model = build_model(config, phantom).to(run.device)
    cohort = load_cohort(data_dir, "train", limit=config.limit)
    train_volumes, tuning_volumes = split_by_patient(cohort.volumes, config.tuning_fraction, config.seed)
    if config.mode == "quick_test":
        train_volumes, tuning_volumes = train_volumes[: QUICK_TEST_VOLUMES[0]], tuning_volumes[: QUICK_TEST_VOLUMES[1]]
    splits = {"train": Split(train_volumes), "tuning": Split(tuning_volumes)}
    criterion = create_loss(config)
    optimizer = create_optimizer(model, config)
    print_head(run, model, cohort, splits, data_dir)

    folder.mkdir(parents=True, exist_ok=True)
    first, best, history = 0, -math.inf, []
    state = load_state(folder)
    if state is not None:
        first, best, history = state["epoch"], state["best"], state["history"]
        restore(state, run, model, optimizer, splits)
        print(f"Continuing after epoch {first} of {config.epochs}")
    write_run_file(run, data_dir, phantom, splits, cohort, "running")

    frozen = None
    trained_volumes = 0
    for epoch in range(first, config.epochs):
        # 1. Freeze or unfreeze.
        tick = time.perf_counter()
        if frozen != (epoch < config.frozen_epochs):
            frozen = epoch < config.frozen_epochs
            if frozen:
                model.freeze_backbone()
                cache_features(model, splits, run)
            else:
                model.unfreeze_backbone()
                for split in splits.values():
                    split.features = None

        # 2. One pass over the training volumes.
        model.train()
        loss_sum, seen = 0.0, 0
        steps = math.ceil(len(splits["train"].volumes) / config.batch_size)
        step, readable = 0, 0
        for inputs, labels, share, last in training_batches(splits["train"], run, model.input_shape, epoch):
            if len(labels):
                with run.autocast():
                    logits = model.head(inputs) if splits["train"].features is not None else model(inputs)
                loss = criterion(logits.float(), labels)
                run.scaler.scale(loss * share).backward()
                loss_sum += loss.item() * len(labels)
                readable += len(labels)
            if not math.isfinite(loss_sum):
                raise TrainingError(
                    f"the loss is {loss_sum} in epoch {epoch + 1}, expected a finite number; lower --learning-rate "
                    f"(now {config.head_learning_rate:g}). The last good state is in {folder}"
                )
            if not last or not readable:
                continue
            step += 1
            set_learning_rates(optimizer, config, epoch + step / steps)
            run.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            run.scaler.step(optimizer)
            run.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            seen, readable = seen + readable, 0
        if not seen:
            raise TrainingError("none of the training volumes could be read; see the lines above")
        trained_volumes += seen

        # 3. Tuning patients: is this the best so far?
        metrics, logits = tune(model, splits["tuning"], run, criterion)
        # With one class in every label there is no AUROC; the loss then decides.
        score = metrics["auroc_macro"] if metrics["auroc_macro"] is not None else -metrics["loss"]
        history.append(
            {
                "epoch": epoch + 1,
                "stage": "frozen" if frozen else "unfrozen",
                "train_loss": loss_sum / seen,
                "tuning_loss": metrics["loss"],
                "tuning_auroc_macro": metrics["auroc_macro"],
                "positive_rate": metrics["positive_rate"],
                "label_rate": metrics["label_rate"],
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - tick,
            }
        )
        print_epoch(history[-1], config.epochs, score > best)

        # 4. Save: the best weights only when they are the best, the resume state always.
        if score > best:
            best = score
            save_best(run, model, splits["tuning"], logits)
        save_state(run, model, optimizer, splits, epoch + 1, best, history, frozen)
        with replacing(folder / "log.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in history))

    write_run_file(run, data_dir, phantom, splits, cohort, "finished")
    print_tail(run, history, trained_volumes, time.perf_counter() - start)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# The run folder
# ----------------------------------------------------------------------------------------------------------------------


def save_best(run: Run, model: CTCLIPMultiAbnormalityModel, tuning: Split, logits: Tensor) -> None:
    """The weights and the tuning predictions that belong to them; what was computed from earlier weights is removed."""
    for name in ("predictions.csv", "labels.csv", "metrics.json", "per_label.csv"):
        (run.folder / name).unlink(missing_ok=True)
    for figure in run.folder.glob("*.png"):
        figure.unlink()
    model._save_pretrained(run.folder)
    names = [volume.name for volume in tuning.volumes]
    write_table(run.folder / "tuning_predictions.csv", names, logits.sigmoid().numpy())
    write_table(run.folder / "tuning_labels.csv", names, tuning.labels.numpy().astype(int))


def save_state(
    run: Run,
    model: CTCLIPMultiAbnormalityModel,
    optimizer: torch.optim.Optimizer,
    splits: dict[str, Split],
    epoch: int,
    best: float,
    history: list[dict],
    frozen: bool,
) -> None:
    """Everything that the next epoch depends on. While the backbone is frozen its weights are left out: they are those
    of the file that the run started from."""
    state = {
        "epoch": epoch,
        "best": best,
        "history": history,
        "model": model.head_state_dict() if frozen else model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
        "failures": run.failures,
        "readings": run.readings,
        "volumes": {name: [volume.name for volume in split.volumes] for name, split in splits.items()},
    }
    with replacing(run.folder / "resume.pt") as path:
        torch.save(state, path)


def load_state(folder: Path) -> dict | None:
    """What `save_state` wrote, or None for a run that has not finished its first epoch."""
    path = folder / "resume.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


def restore(
    state: dict,
    run: Run,
    model: CTCLIPMultiAbnormalityModel,
    optimizer: torch.optim.Optimizer,
    splits: dict[str, Split],
) -> None:
    """Puts back what `save_state` wrote, the volumes that turned out unreadable included."""
    expected = set(model.head_state_dict() if len(state["model"]) < len(model.state_dict()) else model.state_dict())
    if set(state["model"]) != expected:
        raise TrainingError(f"{run.folder}/resume.pt belongs to another model; start a new run without --resume")
    model.load_state_dict(state["model"], strict=False)  # the frozen backbone is that of the run's weights file
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and run.scaler.is_enabled():  # empty when the run began on a device without loss scaling
        run.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and run.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], run.device)
    run.failures, run.readings = state["failures"], state["readings"]
    for name, split in splits.items():
        kept = set(state["volumes"][name])
        split.volumes = [volume for volume in split.volumes if volume.name in kept]


def write_run_file(run: Run, data_dir: Path, phantom: bool, splits: dict[str, Split], cohort, status: str) -> None:
    """run.json: what was run on what with which versions, and what became of each volume that was not used."""
    import timm

    left_out = [{"name": name, "reason": reason} for name, reason in (*cohort.left_out, *run.failures.items())]
    content = {
        "status": status,
        "config": asdict(run.config),
        "data_dir": str(data_dir),
        "phantom": phantom,
        "labels": list(ABNORMALITIES),
        "device": str(run.device),
        "precision": str(run.dtype).removeprefix("torch."),
        "volumes": {name: len(split.volumes) for name, split in splits.items()},
        "patients": {name: len({v.patient for v in split.volumes}) for name, split in splits.items()},
        "tuning_patients": sorted({volume.patient for volume in splits["tuning"].volumes}),
        "read_as": dict(Counter(run.readings.values())),
        "left_out": left_out,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
    with replacing(run.folder / "run.json") as path:
        path.write_text(json.dumps(content, indent=2))


# ----------------------------------------------------------------------------------------------------------------------
# What is printed
# ----------------------------------------------------------------------------------------------------------------------


def print_head(run: Run, model: CTCLIPMultiAbnormalityModel, cohort, splits: dict[str, Split], data_dir: Path) -> None:
    config = run.config
    backbone = sum(p.numel() for p in model.backbone_parameters())
    head = sum(p.numel() for p in model.head_parameters())
    loss = f"focal (alpha {config.alpha:g}, gamma {config.gamma:g})" if config.loss_type == "focal" else "bce"
    parts = ", ".join(
        f"{len(split.volumes)} {name} volumes of {len({v.patient for v in split.volumes})} patients"
        for name, split in splits.items()
    )
    stages = f"{config.frozen_epochs} frozen, {config.epochs - config.frozen_epochs} unfrozen"
    print(cohort.summary())
    print(f"Split by patient: {parts}")
    print(f"Model:    {config.model}, backbone {backbone:,} parameters, head {head:,}, input {model.input_shape}")
    if model.load_report:
        print(f"Weights:  {model.load_report}")
    print(f"Training: {config.epochs} epochs ({stages}), batch {config.batch_size}, loss {loss}")
    print(f"Device:   {run.device} ({str(run.dtype).removeprefix('torch.')}), {run.workers} reading processes")
    print(f"Run:      {run.folder}", flush=True)


def print_epoch(line: dict, epochs: int, is_best: bool) -> None:
    auroc = "undefined" if line["tuning_auroc_macro"] is None else f"{line['tuning_auroc_macro']:.3f}"
    print(
        f"epoch {line['epoch']:>2}/{epochs}  backbone {line['stage']:<8}  train loss {line['train_loss']:.4f}  "
        f"validation loss {line['tuning_loss']:.4f}  AUROC {auroc}  "
        f"positive rate {line['positive_rate']:.3f} (labels {line['label_rate']:.3f})  {line['seconds']:.1f} s"
        f"{'  best' if is_best else ''}",
        flush=True,
    )


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB of GPU memory"
    try:
        import resource
    except ImportError:  # Windows
        return "not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GB"


def print_tail(run: Run, history: list[dict], trained_volumes: int, seconds: float) -> None:
    best = max(history, key=lambda line: line["tuning_auroc_macro"] or -math.inf)
    if best["tuning_auroc_macro"] is not None:
        print(f"Best epoch {best['epoch']}: macro AUROC {best['tuning_auroc_macro']:.3f} on the tuning patients")
    if run.failures:
        print(f"Left out while reading: {len(run.failures)} volumes, listed in {run.folder / 'run.json'}")
    rate = trained_volumes / seconds  # every volume counts in every epoch
    print(f"Training took {seconds:.0f} s, {rate:.0f} volumes per second, peak memory {peak_memory(run.device)}")


# ----------------------------------------------------------------------------------------------------------------------
# Script
# ----------------------------------------------------------------------------------------------------------------------


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of TrainingConfig, defaults from there, in groups. A flag left out is absent from the namespace."""
    default = TrainingConfig()

    def add(group, flag: str, text: str, **kwargs) -> None:
        value = getattr(default, flag.replace("-", "_"))
        shown = "" if value in (None, False) else f" (default {value})"
        if kwargs.get("action") is None:
            kwargs.setdefault("type", str)
        group.add_argument(f"--{flag}", default=argparse.SUPPRESS, help=text + shown, **kwargs)

    data = parser.add_argument_group("data")
    add(data, "data-dir", "folder in the hub's layout; left out: the built-in cohort of synthetic chests", metavar="D")
    add(data, "train-volumes", "size of the built-in cohort's training split", type=int, metavar="N")
    add(data, "valid-volumes", "size of the built-in cohort's unseen split", type=int, metavar="N")
    add(data, "limit", "use only the first N volumes of the training split", type=int, metavar="N")
    add(data, "tuning-fraction", "share of patients kept for choosing epoch and thresholds", type=float, metavar="F")
    model = parser.add_argument_group("model")
    add(model, "model", "'ctclip', or a timm name such as efficientnet_b0 for a slice classifier", metavar="NAME")
    add(model, "ctclip-path", f"CT-CLIP weights (default {CLASSFINE_PATH}; on phantoms the demo's)", metavar="FILE")
    add(model, "use-attention", "attention on a slice backbone's feature map", choices=("none", "cbam"))
    model.add_argument(
        "--no-pretrained",
        dest="pretrained",
        action="store_false",
        default=argparse.SUPPRESS,
        help="start a slice backbone from random weights instead of ImageNet's (much worse)",
    )
    plan = parser.add_argument_group("schedule")
    add(plan, "epochs", "passes over the training volumes", type=int, metavar="N")
    add(plan, "freeze-epochs", "of those, with a frozen backbone (cheap: encoded once)", type=int, metavar="N")
    add(plan, "freeze-backbone", "never unfreeze", action="store_true")
    add(plan, "batch-size", "volumes per step; large ones are encoded two at a time", type=int, metavar="N")
    rates = ", ".join(f"{rate:g} for {kind}" for kind, rate in HEAD_LEARNING_RATE.items())
    add(plan, "learning-rate", f"peak rate of the head (default {rates})", type=float, metavar="R")
    add(plan, "backbone-learning-rate", "peak rate once unfrozen", type=float, metavar="R")
    add(plan, "weight-decay", "AdamW's, on matrices only", type=float, metavar="R")
    add(plan, "warmup-fraction", "share of a stage with rising learning rate", type=float, metavar="F")
    add(plan, "clip-norm", "largest gradient norm", type=float, metavar="R")
    add(plan, "seed", "of split, shuffling, dropout and new weights", type=int, metavar="N")
    loss = parser.add_argument_group("loss")
    add(loss, "loss-type", "focal loss, or plain binary cross-entropy", choices=("focal", "bce"))
    add(loss, "alpha", "focal: weight of the negatives; higher: fewer positive predictions", type=float, metavar="A")
    add(loss, "gamma", "focal: higher leaves easy cases alone and flattens the probabilities", type=float, metavar="G")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    machine.add_argument("--workers", type=int, metavar="N", help="reading processes beside the main one")


def config_from_flags(args: argparse.Namespace) -> TrainingConfig:
    names = {field.name for field in fields(TrainingConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if given.get("mode") == "quick_test":
        given = QUICK_TEST | given
    return TrainingConfig(**given)


def run_folder(args: argparse.Namespace) -> tuple[Path, TrainingConfig]:
    """Folder and configuration of the run that the flags ask for: a new one, or with --resume an earlier one.

    A resumed run keeps its own configuration; a flag that says otherwise is refused rather than ignored.
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
    stored = TrainingConfig(**json.loads(file.read_text())["config"])
    known = asdict(stored)
    changed = [name for name in known if name != "mode" and getattr(args, name, known[name]) != known[name]]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise TrainingError(f"--resume goes on as {folder} began, found other values for {flags}; leave them out")
    return folder, stored


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", metavar="DIR", help="folder of the run (default results/<time>_<model>)")
    group.add_argument(
        "--resume", nargs="?", const="", metavar="DIR", help="go on with an earlier run (default: the newest)"
    )


USER_ERRORS = (
    TrainingError,
    CohortError,
    VolumeError,
    EvaluationError,
    CheckpointError,
    PretrainedWeightsError,
    OSError,
)


def guarded(action) -> int:
    """Runs `action()` and turns what a user can mend into one line and exit code 2; Ctrl-C into the way to go on."""
    try:
        action()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Finished epochs are saved; add --resume to go on.", file=sys.stderr)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mode",
        choices=("quick_test", "full_train"),
        default=argparse.SUPPRESS,
        help="quick_test: 200 training and 50 validation phantoms, 3 epochs; full_train (default): everything below",
    )
    add_run_flags(parser)
    add_training_flags(parser)
    add_machine_flags(parser)
    args = parser.parse_args(argv)

    def action() -> None:
        folder = train(*reversed(run_folder(args)), args.device, args.workers)
        print(f"Next: python ctclip_evaluation.py --checkpoint {folder}")

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
