"""What each token contributes to a label's logit, from the same pass of the tower that gives the logits.

Legend   B volumes, D H W voxels of the model's cube (z, x, y), T h w tokens of it, C width, L latent, S slices:
         as in ctclip_model. n labels.

A logit is, or nearly is, a sum over tokens; `logits_and_contributions` splits it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctclip_model import CTCLIPMultiAbnormalityModel, as_tokens, crop_starts, slice_triplets, slices_at_once


@dataclass(frozen=True, eq=False)
class Contributions:
    """n logits of a volume, each split over the cube: logits = values.sum((1, 2, 3)) + remainder.

    values (n, T, h, w) float32, in logits, positive where a token raises the label's; a grid of T x h x w equal boxes
    over the model's cube, in the order of its axes (z, x, y). logits, remainder: (n,) float64.
    """

    values: np.ndarray
    logits: np.ndarray
    remainder: np.ndarray


def token_contributions(
    model: CTCLIPMultiAbnormalityModel, volume: Tensor, labels: Sequence[int], smooth: bool = True
) -> Contributions:
    """`logits_and_contributions` of one volume (1, 1, D, H, W), without its logits."""
    if volume.ndim != 5 or volume.shape[0] != 1:
        raise ValueError(f"found a volume of shape {tuple(volume.shape)}, expected one scan (1, 1, D, H, W)")
    return logits_and_contributions(model, volume, labels, smooth)[1][0]


def logits_and_contributions(
    model: CTCLIPMultiAbnormalityModel, volumes: Tensor, labels: Sequence[int], smooth: bool = True
) -> tuple[Tensor, list[Contributions]]:
    """Volumes (B, 1, D, H, W) -> the logits of `model(volumes)`, bit by bit, and for each volume what its tokens add to
    those of `labels` (indices); in one pass of the tower.

    What a value is depends on the head; the model is in evaluation mode.
    - attention: attention weight times the token's score. Exact; the remainder is the bias.
    - linear, prompts: the token's share in the latent, through the classifier. The latent is a mean over tokens divided
      by its own length, then cut at 0 (not for prompts): length and cut are held at this volume's. The remainder is the
      bias. A token changed or taken away would change both, so that the values are exact as a sum, not as a forecast.
    - mlp: the same with the gradient of the logit in the classifier's place. First order: what the curve of the hidden
      layer leaves over is in the remainder, with the bias.
    - slice variant: class activation map of each slice triplet, after cbam if there is one, times its attention with
      that head (of a class token: one value for the whole slice). Exact; the remainder is the bias. Between the
      triplets' slices a map is interpolated, not seen.
    - video ResNet: class activation map of the crop, or the mean of the crops', laid over the volume by the share of
      each token that lies in each box; 0 where there was no crop. Exact; the remainder is the bias.

    `smooth`: 1-2-1 along each axis (in plane only for slices); the sums stay. Single tokens are noisy: on phantoms it
    takes the linear head's highest point to the finding in 70 of 100 cases in place of 59, and leaves the attention
    head's at 77. Subtracting a reference (other scans at the same place, or air) gained nothing.
    """
    if model.training:
        raise ValueError("found a model in training mode, expected evaluation mode (dropout is random); call eval()")
    index = list(labels)
    with torch.no_grad():
        if model.is_video:
            logits, values = _of_crops(model, volumes, index)
        elif not model.is_ctclip:
            logits, values = _of_slices(model, volumes, index)
        elif model.head_name == "attention":
            logits, values = _of_codes(model, model.features(volumes), index)
        else:
            logits, values = _of_tokens(model, model.visual_transformer(model._as_volume(volumes)), index)
        model.scale_check(volumes)
    whole, parts = logits[:, index].double().cpu().numpy(), values.float().cpu().numpy()
    if smooth:
        for axis in (2, 3, 4) if model.is_ctclip or model.is_video else (3, 4):
            parts = _smoothed(parts, axis)
    remainder = whole - parts.sum((2, 3, 4), dtype=np.float64)
    return logits, [Contributions(*of_one) for of_one in zip(parts, whole, remainder, strict=True)]


def _of_codes(model: CTCLIPMultiAbnormalityModel, codes: Tensor, index: list[int]) -> tuple[Tensor, Tensor]:
    """Code ids (B, T, h, w) -> logits (B, labels), values (B, n, T, h, w)."""
    head: Any = model.classifier
    attention, evidence = head.attend(codes, model.codebook)
    return model.head(codes), (attention * evidence)[:, index]


def _of_tokens(model: CTCLIPMultiAbnormalityModel, tokens: Tensor, index: list[int]) -> tuple[Tensor, Tensor]:
    """The tower's tokens (B, T, h, w, C) -> logits (B, labels), values (B, n, T, h, w) of a head on the latent. Each
    logit is taken back to the tokens as a direction, (L,) -> (h, w, C), in one reading of the projection: its 0.6 GB
    are never multiplied by the tokens."""
    projection, tokens = model.to_visual_latent, model.visual_transformer.vq(tokens)
    latents = projection(tokens.mean(1).flatten(1))  # (B, L)
    length, latents = latents.norm(dim=-1).clamp(min=1e-12), F.normalize(latents, dim=-1)  # as in model.project
    with torch.inference_mode(False), torch.enable_grad():  # also where the caller has gradients switched off for good
        points = latents.clone().requires_grad_()
        summed = model.head(points).sum(0)
        slopes = torch.stack([torch.autograd.grad(summed[i], points, retain_graph=True)[0] for i in index], 1)
    directions = (slopes.flatten(0, 1) @ projection.weight).view(*slopes.shape[:2], *tokens.shape[2:])
    values = torch.einsum("bthwc,bnhwc->bnthw", tokens, directions)
    return model.head(latents), values / (tokens.shape[1] * length.view(-1, 1, 1, 1, 1))


def _of_slices(model: CTCLIPMultiAbnormalityModel, volumes: Tensor, index: list[int]) -> tuple[Tensor, Tensor]:
    """logits (B, labels), values (B, n, S, h, w). The head takes a mean over slices and places, so that it can be taken
    last; or one weighted by its attention."""
    head: Any = model.classifier
    if model.cache_format == "tokens" and model.tokens == "slice" and model.backbone.has_class_token:
        tokens = model.features(volumes)  # (B, S, 1, 1, C)
        attention, evidence = head.attend(tokens)
        return model.head(tokens), (attention * evidence)[:, index]
    slices = slice_triplets(volumes, model.n_slices)
    parts = slices.flatten(0, 1).split(slices_at_once(volumes.device))
    maps = torch.cat([model.backbone(part) for part in parts]).unflatten(0, slices.shape[:2])  # (B, S, C, h, w)
    logits = model.head(model.features_of_maps(maps))
    maps = model.attention(maps.flatten(0, 1)).unflatten(0, slices.shape[:2])
    if model.head_name in ("attention", "max"):
        tokens = as_tokens(maps, model.tokens)  # (B, S, h, w, C); a slice's is the mean of its places
        attention, _ = head.attend(tokens)
        places = maps.shape[3] * maps.shape[4] if model.tokens == "slice" else 1
        evidence = torch.einsum("bschw,nc->bnshw", maps, head.evidence.weight[index]) / places
        return logits, attention[:, index] * evidence
    values = torch.einsum("bschw,nc->bnshw", maps, head.weight[index])
    return logits, values / (maps.shape[1] * maps.shape[3] * maps.shape[4])


def _of_crops(model: CTCLIPMultiAbnormalityModel, volumes: Tensor, index: list[int]) -> tuple[Tensor, Tensor]:
    """logits (B, labels), values (B, n, T, h, w) over the whole volume in boxes about as large as tokens."""
    head: Any = model.classifier
    shape, crops = volumes.shape[2:], model.crops(volumes)
    starts = crop_starts(shape, model.crop_shape, len(crops))
    pooled, values = [], torch.zeros(())
    for crop, corner in zip(crops, starts, strict=True):
        maps = model.backbone(crop)  # (B, C, t, h, w)
        pooled.append(maps.mean((2, 3, 4)))
        tokens = torch.einsum("bcthw,nc->bnthw", maps, head.weight[index]) / (maps[0, 0].numel() * len(crops))
        axes = (_shares(n, start, edge, size) for n, start, edge, size in
                zip(maps.shape[2:], corner, crop.shape[2:], shape, strict=True))  # fmt: skip
        depth, rows, columns = (share.to(tokens) for share in axes)
        values = values + torch.einsum("bnthw,Tt,Hh,Ww->bnTHW", tokens, depth, rows, columns)
    return model.head(torch.stack(pooled).mean(0)), values


def _shares(tokens: int, start: int, edge: int, size: int) -> Tensor:
    """(boxes, tokens) of an axis: which share of each of the equal tokens of a crop [start, start + edge) lies in each
    of the equal boxes of [0, size)."""
    boxes = max(1, round(size * tokens / edge))
    ends = torch.arange(tokens + 1, dtype=torch.float64) * edge / tokens + start
    borders = torch.arange(boxes + 1, dtype=torch.float64) * size / boxes
    common = torch.minimum(ends[1:], borders[1:, None]) - torch.maximum(ends[:-1], borders[:-1, None])
    return common.clamp(min=0) / (edge / tokens)


def _smoothed(values: np.ndarray, axis: int) -> np.ndarray:
    """1-2-1 over neighbours; the outermost keep what they would give away, so that the sum stays."""
    padded = np.pad(values, [(1, 1) if i == axis else (0, 0) for i in range(values.ndim)], mode="edge")
    before, here, after = (padded.take(range(i, i + values.shape[axis]), axis) for i in range(3))
    return (before + 2 * here + after) / 4
