"""The start of head "max": directions fitted to the training volumes before the first step.

Which token shows a finding is not stated, and gradients from one start stay where they began: at a token that tells
nothing. So each label begins at many tokens of its positive volumes, and two steps alternate, as a latent SVM is
trained (Felzenszwalb et al. 2010): each volume gives the mean of its k highest tokens along the direction; a logistic
regression on these means gives the next direction. The start that ranks the training volumes best is kept. Tokens are
whitened for it, because their largest differences are those of anatomy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip.evaluation.metrics import drawn_once, ranking_columns
from ctclip.training.run import TrainingJob
from ctclip.training.steps import frozen_inputs
from ctclip_model import UNKNOWN, MaxHead

STARTS, KEPT = 24, 6  # of each label: at first, and after PROBED rounds
ROUNDS, PROBED = 10, 4
MIXED = 0.4  # of a round's direction
COST = 0.01  # weight of a volume's loss beside half the squared length of a direction
SHRINKAGE = 0.02  # of the mean variance, added to each in the whitening
MOST_AXES = 128  # principal axes of the tokens, those of the largest variance; a round takes their number cubed
MOST_VOLUMES = 1024  # whose tokens are read in each round

Tokens = Callable[[int], Tensor]  # number of a volume -> its tokens (N, C)


def start_max_head(job: TrainingJob) -> None:
    """Fits the head of a new run to the cached features of its training volumes; on every rank the same."""
    run, model, generator = job.run, job.model, torch.Generator().manual_seed(job.run.config.seed)
    chosen = torch.randperm(len(job.train.volumes), generator=generator)[:MOST_VOLUMES].tolist()

    @torch.no_grad()
    def tokens(number: int) -> Tensor:
        found = model._pooled(frozen_inputs(run, model, job.train, [chosen[number]]))
        return found[0].float().flatten(0, 2)

    head = model.classifier
    assert isinstance(head, MaxHead)
    run.log(f"Head: fitting {STARTS} starts of each label to {len(chosen)} training volumes")
    aurocs = fit_max_head(head, tokens, job.train.labels[chosen].to(run.device), generator)
    run.ranks.broadcast(head.parameters())
    run.log(f"Head: macro AUROC {aurocs.nanmean():.3f} on these volumes")


@torch.no_grad()
def fit_max_head(head: MaxHead, tokens: Tokens, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Gives `head` the best directions for the `labels` (V, L) of volumes 0 to V - 1; returns their AUROC on these
    (L,), NaN for a label without positives or negatives, whose logit stays 0."""
    mean, whitening = moments(tokens, len(labels))
    aurocs, weights, biases = torch.full((labels.shape[1],), math.nan), head.evidence.weight, head.evidence.bias
    both = [i for i, column in enumerate(labels.T) if (column == 1).any() and (column == 0).any()]
    if not both:
        return aurocs
    wanted = labels[:, both].T.float()  # (L, V)

    def whitened(number: int) -> Tensor:
        return (tokens(number) - mean) @ whitening

    directions = starts(whitened, wanted, generator)
    for number in range(ROUNDS):
        means = highest_means(whitened, directions, len(labels), head.tokens)
        if number == PROBED:
            best = ranking((means * directions[:, :, None]).sum(-1), wanted).topk(KEPT, 1).indices
            directions, means = (
                torch.stack([of_label[chosen] for of_label, chosen in zip(values, best, strict=True)])
                for values in (directions, means)
            )
        new = F.normalize(logistic_weights(means, wanted), dim=-1)
        directions = F.normalize((1 - MIXED) * directions + MIXED * new, dim=-1)
    means = highest_means(whitened, directions, len(labels), head.tokens)
    scores = (means * directions[:, :, None]).sum(-1)  # (L, KEPT, V)
    ranked = ranking(scores, wanted)
    for row, (label, best) in enumerate(zip(both, ranked.argmax(1).tolist(), strict=True)):
        slope, offset = line_through(scores[row, best], wanted[row])
        weights[label] = slope * whitening @ directions[row, best]
        biases[label] = offset - weights[label] @ mean
        aurocs[label] = ranked[row, best]
    return aurocs


def moments(tokens: Tokens, count: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) of all tokens and the matrix (C, up to MOST_AXES) after which their covariance is about the
    identity."""
    first = tokens(0)
    total, products, seen = first.new_zeros(first.shape[1]).double(), first.new_zeros(()).double(), 0
    for number in range(count):
        of_volume = tokens(number).double()
        total, products, seen = total + of_volume.sum(0), products + of_volume.T @ of_volume, seen + len(of_volume)
    mean = total / seen
    variances, axes = torch.linalg.eigh(products / seen - torch.outer(mean, mean))
    variances = variances.clamp(min=0)
    whitening = axes / (variances + SHRINKAGE * variances.mean() + 1e-12).sqrt()
    return mean.float(), whitening[:, -MOST_AXES:].float()  # of rising variance


def starts(tokens: Tokens, labels: Tensor, generator: torch.Generator) -> Tensor:
    """labels (L, V) -> directions (L, STARTS, C), of length 1: random tokens of volumes that have the label."""
    found = []
    for of_label in labels:
        positive = torch.nonzero(of_label == 1)[:, 0].tolist()
        for _ in range(STARTS):
            of_volume = tokens(positive[int(torch.randint(len(positive), (1,), generator=generator))])
            found.append(of_volume[int(torch.randint(len(of_volume), (1,), generator=generator))])
    return F.normalize(torch.stack(found), dim=-1).view(len(labels), STARTS, -1)


def highest_means(tokens: Tokens, directions: Tensor, count: int, most: int) -> Tensor:
    """directions (L, R, C) -> (L, R, V, C): of each volume the mean of the `most` tokens highest along a direction."""
    flat, found = directions.flatten(0, 1), []
    for number in range(count):
        of_volume = tokens(number)
        chosen = (of_volume @ flat.T).topk(min(most, len(of_volume)), dim=0).indices  # (most, L * R)
        found.append(of_volume[chosen].mean(0))
    return torch.stack(found, 1).unflatten(0, directions.shape[:2])


def logistic_weights(inputs: Tensor, labels: Tensor, steps: int = 6) -> Tensor:
    """inputs (L, R, V, C), labels (L, V) -> weights (L, R, C) of ridge logistic regressions, by Newton's steps; both
    classes weigh the same, an unknown label nothing."""
    positive, known = (labels == 1).float(), (labels != UNKNOWN).float()
    share = (positive.sum(1) / known.sum(1))[:, None]
    volumes = known * torch.where(positive > 0, 0.5 / share, 0.5 / (1 - share)) * COST  # (L, V)
    ones = torch.ones_like(inputs[..., :1])
    padded = torch.cat([inputs, ones], -1)
    weights = padded.new_zeros(*inputs.shape[:2], padded.shape[-1])
    ridge = torch.ones(padded.shape[-1], device=padded.device)
    ridge[-1] = 1e-6  # the bias is free
    for label in range(len(labels)):
        rows, weight = padded[label], volumes[label]
        for _ in range(steps):
            p = torch.einsum("rvc,rc->rv", rows, weights[label]).sigmoid()
            gradient = torch.einsum("rvc,rv->rc", rows, weight * (p - positive[label])) + ridge * weights[label]
            curvature = torch.einsum("rvc,rv,rvd->rcd", rows, weight * p * (1 - p), rows) + torch.diag(ridge)
            weights[label] -= torch.linalg.solve(curvature, gradient)
    return weights[..., :-1]


def ranking(scores: Tensor, labels: Tensor) -> Tensor:
    """scores (L, R, V), labels (L, V) -> AUROC (L, R)."""
    found = []
    for of_label, wanted in zip(scores.cpu().numpy(), labels.cpu().numpy(), strict=True):
        repeated = np.repeat(wanted[:, None], len(of_label), 1)
        found.append(ranking_columns(repeated, of_label.T, drawn_once(repeated), ap=False)["auroc"][0])
    return torch.from_numpy(np.stack(found)).to(scores)


def line_through(scores: Tensor, labels: Tensor, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Slope, above 0, and offset of a ridge logistic regression of labels (V,) on scores (V,), scaled to deviation 1:
    scores that separate the classes keep a finite slope."""
    known = labels != UNKNOWN
    middle, deviation = scores[known].mean(), scores[known].std().clamp(min=1e-6)
    scaled = (scores[known] - middle) / deviation
    x, ridge = torch.stack([scaled, torch.ones_like(scaled)], 1), torch.eye(2, device=scores.device)
    weights = x.new_zeros(2)
    for _ in range(steps):
        p = (x @ weights).sigmoid()
        curvature = (x.T * (p * (1 - p))) @ x + ridge
        weights = weights - torch.linalg.solve(curvature, x.T @ (p - labels[known]) + ridge @ weights)
    slope = weights[0].clamp(min=1e-3) / deviation
    return slope, weights[1] - slope * middle
