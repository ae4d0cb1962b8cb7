"""A frozen epoch from the code cache at the published size: the training loop itself, on a cohort that has no voxels.

    python tests/benchmarks/frozen_epoch.py

Random weights of that size, and `--volumes` streamed volumes whose codes, random too, are in a cache in a temporary
folder, 28 KB each. `ctclip_training.train` runs on them: order, steps, losses, checks, tuning volumes (a tenth on top),
log, state. The seconds are those of its own log, of the fastest epoch after the first, which makes latents of the
codes. The attention head, which has no latents, trains on a `--share` of the volumes, and the rest is reckoned. Takes
about three minutes, 2.6 GB of memory and 1.5 GB of disk.
"""

from rows import Row, run  # puts the project and the tests' helpers on the path

# isort: split
import json
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
from helpers_model import PUBLISHED
from torch import Tensor, nn

from ctclip.config import Machine, TrainingConfig
from ctclip.data.cohort import Cohort, Volume
from ctclip.data.feature_cache import FeatureCache
from ctclip.data.hounsfield import HuDecision
from ctclip.data.loading import micro_batch_size
from ctclip.training import loop
from ctclip.training.run import Run, Split, TrainingJob
from ctclip.training.steps import frozen_inputs
from ctclip_model import N_LABELS, CTCLIPMultiAbnormalityModel, create_loss

GOAL_VOLUMES = 20_000  # that the goals, in seconds, are set for
GOALS = {"linear": 1.0, "attention": 180.0}
PLAIN = 3  # volumes; their tokens in float64 are 57 MB each
TOLERANCE = 1e-4  # of the loss, and of each parameter's largest gradient: float32 against float64


def random_cohort(count: int, folder: Path) -> list[Volume]:
    labels = (torch.rand(count, N_LABELS, generator=torch.Generator().manual_seed(1)) < 0.2).float().numpy()
    return [
        Volume(f"train_{i}_a_1.nii.gz", folder / f"train_{i}_a_1.nii.gz", labels[i], None, (1, f"{i:016x}"))
        for i in range(count)
    ]


def fill(cache: FeatureCache, volumes: list[Volume]) -> None:
    for start in range(0, len(volumes), 500):
        part = volumes[start : start + 500]
        codes = torch.randint(PUBLISHED.codes, (len(part), *cache.shape))
        cache.append(part, codes, [HuDecision("hu", "")] * len(part))
    cache.close()


def job_of(model: CTCLIPMultiAbnormalityModel, train: list[Volume], tuning: list[Volume], folder: Path) -> TrainingJob:
    """What `ctclip_training.prepare` makes of a cohort on disk."""
    config = TrainingConfig(data_dir=str(folder), cache_dir=str(folder / "cache"), epochs=4, freeze_backbone=True)
    of_job = Run(folder / "run", config, Machine(device="cpu", workers=0))
    of_job.micro_batch = micro_batch_size(model.input_shape, config.batch_size)
    criterion = create_loss(config.loss_type, config.alpha, config.gamma)
    cohort = Cohort([*train, *tuning])
    return TrainingJob(of_job, folder, False, cohort, Split(train), Split(tuning), model, criterion)


def epoch_seconds(job: TrainingJob) -> float:
    """Of the fastest epoch but the first, as the run's own log has it."""
    with patch.object(loop, "prepare", lambda *_: job):
        loop.train(job.run.config, job.run.folder)
    lines = [json.loads(line) for line in (job.run.folder / "log.jsonl").read_text().splitlines()]
    return min(line["seconds"] for line in lines[1:])


def plain_logits(model: CTCLIPMultiAbnormalityModel, codes: Tensor, head: dict[str, Tensor]) -> Tensor:
    """Straight from the definition in float64: every token of every volume by itself."""
    tokens = model.codebook.double()[codes]  # (B, T, h, w, C)
    if model.head_name == "linear":
        weight = model.to_visual_latent.weight.double()
        latents = nn.functional.normalize(tokens.mean(1).flatten(1) @ weight.T, dim=-1)
        return latents.relu() @ head["weight"].T + head["bias"]
    length = tokens.norm(dim=-1, keepdim=True)
    x = torch.cat([tokens / length, length.log10()], -1)
    hidden = nn.functional.gelu(x @ head["hidden.weight"].T + head["hidden.bias"]) / head["hidden.bias"].numel() ** 0.5
    position = head["depth"].T[:, None, None] + head["row"].T[:, None] + head["column"].T
    attention = (hidden @ head["query.weight"].T + position).flatten(1, 3).softmax(1)
    return (attention * (hidden @ head["evidence.weight"].T).flatten(1, 3)).sum(1) + head["evidence.bias"]


def largest_difference(job: TrainingJob) -> float:
    """Of loss and gradients, relative to each one's largest value, between the training path and the plain formula."""
    model, split = job.model.eval(), job.train  # no dropout
    names, parameters = zip(*model.classifier.named_parameters(), strict=True)
    with torch.no_grad():  # away from the start, where labels hardly differ and gradients cancel
        for parameter in parameters:
            parameter += 0.3 * torch.randn_like(parameter)
    labels = split.labels[:PLAIN]
    loss = job.criterion(model.head(frozen_inputs(job.run, model, split, range(PLAIN))), labels)
    found = [loss, *torch.autograd.grad(loss, parameters)]
    plain = {name: value.detach().double().requires_grad_() for name, value in zip(names, parameters, strict=True)}
    codes = job.run.cache.load(split.rows[:PLAIN]).long()
    expected_loss = job.criterion(plain_logits(model, codes, plain), labels)
    expected = [expected_loss, *torch.autograd.grad(expected_loss, list(plain.values()))]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def row(head: str, count: int, share: float, folder: Path) -> Row:
    """One frozen epoch with this head over `share` of `count` volumes, the seconds reckoned for GOAL_VOLUMES."""
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(PUBLISHED), head=head)
    model.freeze_backbone()
    train, tuning = round(count * share), round(count * share / 10)
    volumes = random_cohort(train + tuning, folder)
    fill(FeatureCache(folder / "cache", model), volumes)
    job = job_of(model, volumes[:train], volumes[train:], folder)
    seconds = epoch_seconds(job)
    difference = largest_difference(job)
    whole = seconds * GOAL_VOLUMES / train
    reckoned = "" if train == GOAL_VOLUMES else f", times {GOAL_VOLUMES / train:g}"
    return Row(
        what=f"frozen epoch, {head} head, {GOAL_VOLUMES:,} volumes, after the first pass",
        measured=whole,
        goal=GOALS[head],
        unit=" s",
        detail=f"{seconds:.3f} s with {train:,} training and {tuning:,} tuning volumes{reckoned}; batch "
        f"{job.run.config.batch_size}, {1e3 * seconds / train:.3f} ms per volume; writing state and log apart",
        checked=f"loss and gradients of {PLAIN} volumes against plain float64 formulas on their tokens: "
        f"{difference:.0e} of the largest value, at most {TOLERANCE:.0e}",
        sound=difference <= TOLERANCE,
    )


def measure(args: Namespace) -> list[Row]:
    rows = []
    for head, share in (("linear", 1.0), ("attention", args.share)):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(head, args.volumes, share, Path(folder)))
    return rows


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, volumes=GOAL_VOLUMES, share=0.05))
