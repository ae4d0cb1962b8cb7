"""Placements of scans in the model's cube, and maps of one scan in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers_data import affine_of

from ctclip.data.geometry import Placement
from ctclip.inference.contributions import Contributions
from ctclip.inference.decisions import Decision
from ctclip.inference.scan_maps import ScanMaps, scan_maps


def cube(shape: tuple[int, int, int] = (96, 80, 70)) -> Placement:
    """Of a file stored as (x, y, z) that fills the cube exactly."""
    position = tuple((np.arange(n) + 0.5) / n for n in shape)
    spacing = tuple(360 / n for n in shape)
    return Placement(shape, spacing, affine_of(spacing), (1, 2, 0), position)


def within(z: tuple[float, float], x=(0.0, 1.0), y=(0.0, 1.0), shape=(96, 80, 70)) -> Placement:
    """Of a file stored as (x, y, z) whose voxels reach from, to along each axis of the cube."""
    sides = zip((x, y, z), shape, strict=True)
    return replace(cube(shape), position=tuple(a + (np.arange(n) + 0.5) / n * (b - a) for (a, b), n in sides))


def cylinder(shape: tuple[int, int, int] = (32, 48, 48), z=(0.0, 1.0)) -> torch.Tensor:
    """(1, 1, D, H, W): soft tissue over the inner three quarters of x and y, air around it, between two heights."""
    hu = torch.full((1, 1, *shape), -0.99)
    d, h, w = shape
    hu[..., h // 8 : h - h // 8, w // 8 : w - w // 8] = 0.04
    hu[:, :, : round(z[0] * d)] = hu[:, :, round(z[1] * d) :] = -1
    return hu


def page_blocks(path: Path) -> list[dict[str, Any]]:
    """What a page of predicted scans has of each."""
    found = re.findall(r'id="block-\d+">(.*)</script>', path.read_text(encoding="utf-8"))
    return [json.loads(block) for block in found]


def maps_of(
    values: np.ndarray, decisions: Sequence[tuple[str, float, float | None]] = (("Cardiomegaly", 0.8, 0.5),),
    placement: Placement | None = None, voxels: torch.Tensor | None = None, name: str = "scan",
) -> ScanMaps:  # fmt: skip
    """values (n, T, h, w) of the first n of the decisions (finding, probability, threshold)."""
    values = np.asarray(values, np.float32)
    logits = values.sum((1, 2, 3), dtype=np.float64) + 0.5
    told = [Decision(*decision) for decision in decisions]
    return scan_maps(
        name, placement or cube(), cylinder() if voxels is None else voxels,
        [decision.finding for decision in told[: len(values)]], told,
        Contributions(values, logits, np.full(len(values), 0.5)),
    )  # fmt: skip
