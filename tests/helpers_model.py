"""Sizes unlike those of any checkpoint in tests/fixtures."""

from ctclip_model import TowerSizes

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
