"""Sizes of towers: unlike those of any checkpoint in tests/fixtures, and those of the published one; random weights."""

from dataclasses import asdict

import torch

from ctclip_model import CTCLIPMultiAbnormalityModel, TowerSizes, published_layout

OTHER_SIZES = TowerSizes(
    dim=24,
    heads=3,
    dim_head=4,
    patch=6,
    temporal_patch=2,
    grid=5,
    spatial_depth=1,
    temporal_depth=2,
    codes=40,
    latent=12,
    feedforward=64,
    bias_dim=10,
)

PUBLISHED = TowerSizes(
    dim=512,
    heads=8,
    dim_head=32,
    patch=20,
    temporal_patch=10,
    grid=24,
    spatial_depth=4,
    temporal_depth=4,
    codes=8192,
    latent=512,
    feedforward=1365,
    bias_dim=512,
)


def create_ctclip_checkpoint(sizes: TowerSizes, seed: int = 0, classifier: bool = False) -> dict[str, torch.Tensor]:
    """Random weights in the published layout (CT-CLIP's, or ClassFine's with `classifier`), without the text tower."""
    torch.manual_seed(seed)
    return published_layout(CTCLIPMultiAbnormalityModel(sizes=asdict(sizes)), classifier)
