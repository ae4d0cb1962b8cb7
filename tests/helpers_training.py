"""Training runs that take a second: 40 phantoms, each read from disk once, and a CT-CLIP of 93 thousand parameters."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctclip.config import TrainingConfig
from ctclip.data.preprocessing import read_volume
from ctclip.training import steps
from ctclip.training.loop import train
from ctclip.training.optimization import TrainableParameters

kept: dict[tuple, tuple] = {}


def read_once(volume, shape):
    """`read_volume`, from memory the second time; phantoms at a slice backbone's size are too large to keep."""
    if math.prod(shape) > 10**5:
        return read_volume(volume, shape)
    key = volume.path, tuple(shape)
    if key not in kept:
        kept[key] = read_volume(volume, shape)
    tensor, decision = kept[key]
    return tensor.clone(), decision


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def one_line(text: str) -> bool:
    """Apart from the line that ^C was typed on, and from a progress bar."""
    return text.endswith("\n") and "\n" not in text[:-1].removeprefix("\n")


def damage(path: Path) -> None:
    """Flips a byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def moved_between(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def rank_epochs(monkeypatch, *scores: float) -> None:
    """Has the evaluations of a run give these AUROCs, the last of them to an average of epochs."""
    original, given = steps.compute_metrics, iter(scores)
    monkeypatch.setattr(steps, "compute_metrics", lambda *args: original(*args) | {"auroc_macro": next(given)})


def train_until_step(config: TrainingConfig, folder: Path, number: int) -> None:
    """Trains a run until its process is told to stop in the `number`-th step."""
    step, done = TrainableParameters.clip_and_step, []

    def stopping(trainable):
        done.append(step(trainable))
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return done[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainableParameters, "clip_and_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(config, folder)
    assert len(done) == number
