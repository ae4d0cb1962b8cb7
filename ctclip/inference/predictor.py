"""A model over volumes -> logits: the device, the weights, the loop that reads and computes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from ctclip.data.cohort import Volume
from ctclip.data.feature_cache import FeatureCache, encoding
from ctclip.data.geometry import PUBLISHED_SHAPE
from ctclip.data.loading import Batch, read_ahead
from ctclip.data.volume_cache import VolumeCache
from ctclip.data.volume_key import cache_keys
from ctclip.errors import UserError
from ctclip.evaluation.run_folder import RunError
from ctclip.evaluation.saved_ensemble import saved_ensemble
from ctclip.formatting import BAR
from ctclip.inference.contributions import Contributions, logits_and_contributions
from ctclip.memory import available_cpus, local_world, torchrun_number
from ctclip_model import CheckpointError, CTCLIPMultiAbnormalityModel, PromptError, Prompts, check_no_other_folder

Items = TypeVar("Items", bound=Sequence)
NO_NUMBER = "found an answer that is no number, expected a logit for each label; check the weights and the scan"


class MachineError(UserError):
    """A device or a number of workers that cannot be had here."""


def choose_device(name: str | None = None) -> torch.device:
    """By default a GPU where there is one, of torchrun's processes on a machine to each its own; with its number, as
    torch.cuda.set_device wants it."""
    if name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{torchrun_number('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.ones(1, device=device).item()  # a meta device, which has shapes only, gives no number
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        found = f"--device {name or 'cuda'}: not usable here ({reason})"
        raise MachineError(f"{found}, expected cpu, cuda or cuda:N") from error
    return device


def choose_precision(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, fp16 on older cards (T4), float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def choose_workers(workers: int | None) -> int:
    """Reading processes of training: as asked for, else up to 8, one for each CPU that it has to itself; none on
    two, where they only compete."""
    if workers is not None and workers < 0:
        raise MachineError(f"--workers is {workers}, expected at least 0")
    cpus = int(available_cpus() / local_world())
    return workers if workers is not None else min(8, cpus) if cpus > 2 else 0


def load_model(
    checkpoint: str | Path, device: str | None = None, prompts: Prompts | None = None
) -> CTCLIPMultiAbnormalityModel:
    """The model of a run folder, or of a CT-CLIP file that brings its head, or a text tower to make one of; in
    evaluation mode, on the device. With `prompts` the file's text tower makes a head for these findings."""
    checkpoint = Path(checkpoint)
    model = _load_run(checkpoint, prompts) if checkpoint.is_dir() else _load_file(checkpoint, prompts)
    return model.to(choose_device(device)).eval()


def load_encoder(checkpoint: str | Path, device: str | None = None) -> CTCLIPMultiAbnormalityModel:
    """As `load_model`, of a CT-CLIP file without a head too: whatever head a file has is left out."""
    path = Path(checkpoint)
    if path.is_dir():
        return load_model(path, device)
    _check_file(path)
    return CTCLIPMultiAbnormalityModel(path, head="linear", new_head=True).to(choose_device(device)).eval()


def _load_run(folder: Path, prompts: Prompts | None) -> CTCLIPMultiAbnormalityModel:
    if prompts is not None:
        raise PromptError(
            f"{folder}: found a run, which has no text tower, expected a CT-CLIP file for prompts; name one with "
            "--checkpoint (models/ctclip_zeroshot.pt)"
        )
    if (ensemble := saved_ensemble(folder)) is not None:
        raise RunError(f"{folder}: found an ensemble of {ensemble.names}, expected one run; name one of them")
    if not (folder / "model.safetensors").is_file():
        check_no_other_folder(folder)
        raise RunError(f"{folder}: found no model.safetensors, expected a run with a finished epoch")
    return CTCLIPMultiAbnormalityModel.from_pretrained(folder)


def _check_file(path: Path) -> None:
    if not path.suffix and not path.exists():
        raise RunError(f"{path}: found no such folder, expected a run's, or a CT-CLIP file; check --checkpoint")


def _load_file(path: Path, prompts: Prompts | None) -> CTCLIPMultiAbnormalityModel:
    _check_file(path)
    model = CTCLIPMultiAbnormalityModel(path, head=None if prompts is None else "prompts", prompts=prompts)
    report = model.load_report
    if report is None or not report.new:
        return model
    reason = report.no_prompts_reason  # there is one: a file without a head gets the prompt head where it can be made
    raise CheckpointError(f"{path} has no classification head, and none can be made from prompts: {reason}")


def chunks(items: Items, size: int) -> list[Items]:
    """A sequence in pieces of `size`, the last perhaps shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]  # type: ignore[misc]


def predict_volumes(
    model: CTCLIPMultiAbnormalityModel,
    volumes: Sequence[Volume],
    batch_size: int = 4,
    workers: int | None = None,
    on_batch: Callable[[Batch], None] | None = None,
    cache: FeatureCache | None = None,
    on_answer: Callable[[int, torch.Tensor, torch.Tensor, Contributions | None], None] | None = None,
    on_failure: Callable[[int, Exception], object] | None = None,
    resample_on_device: bool = False,
    volume_cache: VolumeCache | None = None,
    explain: Sequence[int] = (),
) -> tuple[list[int], torch.Tensor]:
    """Runs `model`, in evaluation mode, over volumes; each is read once, and not at all if `cache` has it.

    While some are computed, `workers` threads read the next (default: one on two cores, else up to 8). In float32 on
    every device: in half precision some codes flip, and reading a volume costs more than encoding it.
    A volume whose logits are not all finite counts as one that could not be read.
    Returns the indices of the volumes that could be read, ascending, and their logits (n, labels) float32 on the CPU.
    `on_batch` sees every batch that is read, with the failures and decisions in it; `on_answer` every volume in it, as
    (index, voxels (1, 1, D, H, W) on the device, logits (labels,), contributions). These are of the labels `explain`
    (indices), from the same pass of the tower; None without any. With `on_failure`, called as (index, error), a volume
    that cannot be computed costs only itself. `cache` is one of this model, from which logits are the same but for
    rounding (and 1e-3 off with maps, kept in half precision); nothing is added to it.
    `resample_on_device`: on a GPU from the stored integers, equal but for rounding; each reading thread then needs some
    0.5 GB of the GPU's memory. `volume_cache`: where volumes are read from and kept.
    """
    device = next(model.parameters()).device
    entries = [None] * len(volumes) if cache is None else cache.intact(cache_keys(volumes))[0]
    stored = {i: entry for i, entry in enumerate(entries) if entry is not None}
    held = max(1, min(batch_size, prod(PUBLISHED_SHAPE) // prod(model.input_shape)))  # no more voxels than one of those
    unread = chunks([i for i in range(len(volumes)) if i not in stored], held)
    there = device if resample_on_device and device.type == "cuda" else None
    loader = read_ahead(volumes, model.input_shape, unread, max(1, choose_workers(workers)), there, volume_cache)
    rows: dict[int, torch.Tensor] = {}

    def keep(indices: Sequence[int], logits: torch.Tensor) -> None:
        finite = logits.isfinite().all(1).tolist()
        rows.update((i, row) for i, row, good in zip(indices, logits, finite, strict=True) if good)
        bad = [(volumes[i].name, NO_NUMBER) for i, good in zip(indices, finite, strict=True) if not good]
        if bad and on_batch is not None:
            none = torch.empty(0, dtype=torch.int64)
            on_batch(Batch(none, none, none, bad, []))

    shown = {"delay": 2, "leave": False, "disable": torchrun_number("RANK", 0) > 0}
    bar = tqdm(total=len(volumes), desc="predict", unit=" volumes", bar_format=BAR, **shown)
    with encoding(model, device), bar as progress:
        for chunk in chunks(list(stored), batch_size):
            assert cache is not None
            logits = model.head(cache.head_inputs(model, [stored[i] for i in chunk], device))
            keep(chunk, logits.cpu())
            progress.update(len(chunk))
        for batch in loader:
            if on_batch is not None:
                on_batch(batch)
            progress.update(len(batch.index) + len(batch.failures))
            if not len(batch.index):
                continue
            answers = _answers(model, batch.volumes, batch.index.tolist(), on_failure, explain)
            del batch  # before the next one is handed over
            while answers:
                number, voxels, logits, contributions = answers.pop(0)
                keep([number], logits[None])
                if on_answer is not None and number in rows:
                    on_answer(number, voxels, logits, contributions)
                del voxels
    read = sorted(rows)
    return read, torch.stack([rows[i] for i in read]) if read else torch.zeros(0, len(model.labels))


def _answers(
    model: CTCLIPMultiAbnormalityModel,
    volumes: torch.Tensor,
    index: Sequence[int],
    on_failure: Callable[[int, Exception], object] | None,
    explain: Sequence[int],
) -> list[tuple[int, torch.Tensor, torch.Tensor, Contributions | None]]:
    """(index, voxels, logits, contributions) of each volume of a batch; one by one where it fails as a whole."""
    contributions: Sequence[Contributions | None]
    try:
        voxels = volumes.to(next(model.parameters()).device)
        if explain:
            logits, contributions = logits_and_contributions(model, voxels, explain)
        else:
            logits, contributions = model(voxels), [None] * len(index)
        return list(zip(index, voxels.split(1), logits.cpu(), contributions, strict=True))
    except Exception as error:
        if on_failure is None:
            raise
        if len(index) == 1:
            on_failure(index[0], error)
            return []
    singles = zip(volumes.split(1), index, strict=True)
    return [answer for one, number in singles for answer in _answers(model, one, [number], on_failure, explain)]


def print_failures(batch: Batch) -> None:
    for name, reason in batch.failures:
        tqdm.write(f"skipped: {name}: {reason}", file=sys.stderr)
