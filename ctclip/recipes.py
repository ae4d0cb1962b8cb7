"""Published ways to train on CT-RATE, as settings of TrainingConfig: `--recipe NAME`. Standard library only, and
imported by Python 3.8 as well, which setup answers with a line; as config.py.

What a source does not state is this project's choice, and `differs` says where the two part. None was measured here on
patients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NOT_MEASURED = "Not measured here on patients."


class Recipe(NamedTuple):
    what: str
    settings: Mapping[str, Any]  # of TrainingConfig
    source: str
    published: str  # macro AUROC of the 18, and the test set: two sets are never one test
    differs: str


_VIDEO = {
    "model": "r3d_18", "stem_stride": 2, "windows": "-1000:200", "slice_spacing": 3.0, "slice_size": 240, "crop": 0.8,
    "loss_type": "bce", "adapt": "full", "epochs": 5, "freeze_epochs": 0, "batch_size": 10, "learning_rate": 1e-4,
    "backbone_learning_rate": 1e-4, "layer_decay": 1.0, "weight_decay": 1e-4, "warmup_fraction": 0.0, "dropout": 0.0,
}  # fmt: skip
_DALE = {
    "model": "hf-hub:Kentucky-Open-Science/DALE-CT-2S", "windows": "-997:888:-142.39:360.97", "slice_size": 512,
    "slice_spacing": 3.0, "head": "attention", "tokens": "slice", "loss_type": "bce",
}  # fmt: skip
_DALE_SOURCE = "DALE-CT-2S, a ViT-L trained on CT slices (its model card; weights CC-BY-NC-SA-4.0)"

RECIPES = {
    "classfine": Recipe(
        "CT-CLIP ClassFine's training: a linear head on the frozen latent",
        {"model": "ctclip", "head": "linear", "adapt": "none", "loss_type": "bce", "batch_size": 8},
        "CT-CLIP's scripts/ct_lipro_train.py", "0.756, CT-RATE valid",
        "the published loss gives rare positives more weight, which predicts too many; rates and epochs are ours"),
    "video-resnet": Recipe(
        "a 3D ResNet-18 from Kinetics-400 weights on crops of whole volumes, trained end to end; a 24 GB GPU, a day",
        _VIDEO, "GreenRFM stage 1; MPS-CT has the same stem", "0.838 (MPS-CT), 0.848 (GreenRFM, after a text stage)",
        "rates fall to 0 instead of 1e-6, gradients are clipped; weight decay is on matrices only"),
    "video-resnet-light": Recipe(
        "video-resnet with a stem of stride 4; a 6 GB GPU, four hours",
        {**_VIDEO, "stem_stride": 4}, "GreenRFM, its light form", "none of its own", "as video-resnet"),
    "slice-lora": Recipe(
        "a 2D foundation ViT with LoRA on every slice, pooled by a learned query",
        {"model": "vit_large_patch14_dinov2.lvd142m", "slice_spacing": 3.0, "slice_size": 224, "head": "attention",
         "tokens": "slice", "loss_type": "bce", "adapt": "lora", "lora_rank": 8, "lora_alpha": 16.0,
         "train_slices": 32, "epochs": 5, "freeze_epochs": 1, "batch_size": 16},
        "AnyMC3D, winner of the challenge in 2025, as others report it", "0.882, \"CT-RATE 18\", second-hand",
        "a query for each finding instead of one; windows, spacing, epochs and rates are ours"),
    "dale-frozen": Recipe(
        "a frozen ViT trained on CT slices, pooled by a learned query", {**_DALE, "adapt": "none"}, _DALE_SOURCE,
        "0.825 with a multiple-instance head, n = 992", "head, spacing, epochs and rates are ours"),
    "dale-lora": Recipe(
        "dale-frozen's ViT with LoRA; 8 GB with gradient checkpointing, 45 GB without",
        {**_DALE, "adapt": "lora", "lora_rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.1, "train_slices": 64,
         "epochs": 3, "freeze_epochs": 0, "batch_size": 256, "learning_rate": 1e-4, "adapter_learning_rate": 5e-4,
         "weight_decay": 0.01},
        _DALE_SOURCE, "0.842, trained on 47,000 volumes",
        "a query over slices instead of two transformer layers, all slices of 3 mm, no weights on positives"),
}  # fmt: skip
