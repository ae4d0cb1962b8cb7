"""A model over volumes -> logits: the device, the weights, the loop that reads and computes, files of a user's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip_metrics import N_LABELS, EvaluationError
from ctclip_model import CheckpointError

if TYPE_CHECKING:
    import torch

    from ctclip_cache import FeatureCache
    from ctclip_data import Batch, Volume
    from ctclip_model import CTCLIPMultiAbnormalityModel


def choose_device(name: str | None = None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EvaluationError(f"--device {name}: not usable here ({reason}), expected cpu, cuda or cuda:N") from error
    return device


def choose_precision(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, fp16 on older cards (T4), float32 elsewhere."""
    import torch

    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def choose_workers(workers: int | None) -> int:
    """Reading processes: what was asked for, else up to 8; none on two cores, where they only compete."""
    if workers is not None and workers < 0:
        raise EvaluationError(f"--workers is {workers}, expected at least 0")
    cpus = os.cpu_count() or 1
    return workers if workers is not None else min(8, cpus) if cpus > 2 else 0


def load_model(checkpoint: str | Path, device: str | None = None) -> CTCLIPMultiAbnormalityModel:
    """The model of a run folder, or of a CT-CLIP file that brings its head, in evaluation mode on the device."""
    from safetensors import SafetensorError

    from ctclip_model import CTCLIPMultiAbnormalityModel

    checkpoint = Path(checkpoint)
    if checkpoint.is_dir():
        if not (checkpoint / "model.safetensors").is_file():
            raise EvaluationError(f"{checkpoint}: found no model.safetensors, expected a run with a finished epoch")
        try:
            model = CTCLIPMultiAbnormalityModel.from_pretrained(checkpoint)
        except SafetensorError as error:
            raise CheckpointError(f"{checkpoint}/model.safetensors: found a damaged file ({error}), expected a run's "
                                  "weights; resume the run, or copy the file again") from error
    else:
        model = CTCLIPMultiAbnormalityModel(str(checkpoint))
        if model.load_report.new:
            raise CheckpointError(
                f"{checkpoint} has no classification head: its answers would all be 0.5. Expected a ClassFine file or "
                "a run folder; fine-tune first with python ctclip_training.py --ctclip-path"
            )
    return model.to(choose_device(device)).eval()


def predict_volumes(
    model: CTCLIPMultiAbnormalityModel,
    volumes: Sequence[Volume],
    batch_size: int = 4,
    workers: int | None = None,
    on_batch: Callable[[Batch], None] | None = None,
    title: str = "predict",
    cache: FeatureCache | None = None,
) -> tuple[list[int], torch.Tensor]:
    """Runs `model`, in evaluation mode, over volumes; each is read once, and not at all if `cache` has it.

    In float32 on every device: in half precision some codes flip, and reading a volume costs more than encoding it.
    Returns the indices of the volumes that could be read, ascending, and their logits (n, 18) float32 on the CPU.
    `on_batch` sees every batch that is read, with the failures and verdicts in it. `cache` is one of this model, from
    which logits are the same but for rounding (and 1e-3 off with maps, kept in half precision); nothing is added to it.
    """
    import torch
    from tqdm import tqdm

    from ctclip_cache import encoding, sources_of
    from ctclip_data import volume_loader

    device = next(model.parameters()).device
    entries: list[int | None] = [None] * len(volumes)
    if cache is not None:
        entries, _ = cache.intact(sources_of(volumes))
    stored = _pieces([i for i, entry in enumerate(entries) if entry is not None], batch_size)
    unread = _pieces([i for i, entry in enumerate(entries) if entry is None], batch_size)
    readers = choose_workers(workers) if unread else 0
    loader = volume_loader(volumes, model.input_shape, pieces=unread, num_workers=readers)
    rows: dict[int, torch.Tensor] = {}
    with encoding(model, device), tqdm(total=len(volumes), desc=title, unit="vol", delay=2, leave=False) as progress:
        for piece in stored:
            logits = model.head(cache.head_inputs(model, [entries[i] for i in piece], device))
            rows |= dict(zip(piece, logits.cpu(), strict=True))
            progress.update(len(piece))
        for batch in loader:
            if on_batch is not None:
                on_batch(batch)
            progress.update(len(batch.index) + len(batch.failures))
            if not len(batch.index):
                continue
            logits = model(batch.volumes.to(device))
            rows |= dict(zip(batch.index.tolist(), logits.cpu(), strict=True))
    read = sorted(rows)
    return read, torch.stack([rows[i] for i in read]) if read else torch.zeros(0, N_LABELS)


def _pieces(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def predict_files(
    checkpoint: str | Path, source: str | Path, device: str | None = None, workers: int | None = None
) -> tuple[list[str], np.ndarray, list[tuple[str, str]]]:
    """(names, probabilities (N, 18), failures as (name, reason)) for a .nii or .nii.gz file, or a folder of them.

    Files hold Hounsfield units with spacing and orientation in the header.
    """
    from ctclip_data import Volume

    source = Path(source)
    files = [source] if source.is_file() else sorted(source.rglob("*.nii*"))
    files = [file for file in files if file.name.endswith((".nii", ".nii.gz"))]
    if not files:
        raise EvaluationError(f"{source}: found no .nii or .nii.gz file, expected a scan or a folder of scans")
    root = source if source.is_dir() else source.parent
    blank = np.zeros(N_LABELS, np.float32)
    volumes = [Volume(str(file.relative_to(root)), file, blank) for file in files]
    failures: list[tuple[str, str]] = []
    model = load_model(checkpoint, device)
    read, logits = predict_volumes(
        model, volumes, workers=workers, on_batch=lambda batch: (print_failures(batch), failures.extend(batch.failures))
    )
    return [volumes[i].name for i in read], logits.sigmoid().numpy(), failures


def print_failures(batch: Batch) -> None:
    from tqdm import tqdm

    for name, reason in batch.failures:
        tqdm.write(f"left out: {name}: {reason}", file=sys.stderr)
