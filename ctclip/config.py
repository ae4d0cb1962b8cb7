"""Configuration of a training run and of an evaluation, the only owner of their defaults; and the scripts' flags.

Standard library only: --help and a mistyped flag are answered before the two seconds that torch takes to import.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ctclip.cli import OneLineParser, mode_among, refuse_unused
from ctclip.errors import UserError
from ctclip.fileio import read_json
from ctclip.paths import CLASSFINE_PATH
from ctclip.recipes import NOT_MEASURED, RECIPES

# Printed with every result on phantoms, and kept with it: metrics.json, reports, figures, model cards, manifests.
SYNTHETIC_NOTE = "Synthetic data: not clinical performance."

# The same where the patients' data are real and the encoder was the demo's.
PHANTOM_ENCODER_NOTE = "The encoder was trained on phantoms (the demo's weights): it has seen no CT scan."

# Printed where a run was interrupted.
RESUME_HINT = "what was saved last, if anything, is kept; a run that has begun goes on with --resume"

# Peak rate of each head. A CT-CLIP latent has length 1, so its entries are small and the weights have far to go.
HEAD_LEARNING_RATE = {"ctclip": 3e-2, "others": 1e-3}

VIDEO_MODELS = ("r3d_18", "mc3_18", "r2plus1d_18")  # torchvision's; every other --model but ctclip is a slice backbone


MOST_GAMMA = 100  # as in ctclip_model, for scripts that have not imported torch


class TrainingError(UserError):
    """A run that cannot start or go on. One line: what was found, what was expected, what to do."""


def _flag(default: Any, group: str, help: str, **options: Any) -> Any:
    """A field with a flag of its own: `group` and `help` as --help shows them, `options` of argparse."""
    return field(default=default, metadata={"group": group, "help": help, **options})


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that the weights of a run depend on; the only owner of the defaults. Stored in run.json."""

    mode: str = "full_train"

    # fmt: off
    data_dir: str | None = _flag(None, "data", "cohort in CT-RATE's layout (default: synthetic chests)", metavar="D")
    patients: str | None = _flag(
        None, "data", "table of VolumeName and PatientID (and ScanID), where names are not like CT-RATE's and labels "
        "and metadata have no such column", metavar="CSV")
    findings: str | None = _flag(
        None, "data", "columns of the label tables that are trained (default: CT-RATE's 18 where all are there, else "
        "every column of 0, 1 and empty cells; an empty cell is unknown)", metavar="NAME[,NAME]")
    minus_one_is_unknown: bool = _flag(False, "data", "-1 in the label tables means an empty cell")
    train_volumes: int = _flag(600, "data", "built-in cohort: number of training volumes")
    valid_volumes: int = _flag(250, "data", "built-in cohort: number of test volumes (other patients)")
    limit: int | None = _flag(None, "data", "use only the first N volumes of the training split")
    tuning_fraction: float = _flag(
        0.2, "data", "fraction of the training patients held out for validation: best epoch, calibration, thresholds")
    cache_dir: str = _flag(
        "cache", "data", "folder for the frozen backbone's features, shared by all runs: cached epochs take seconds; "
        "and for a video ResNet's resampled volumes", metavar="C")
    augment: bool = _flag(
        False, "data",
        "shift and rescale the voxels of training volumes, add noise; no cache: every frozen epoch encodes them again")
    window_jitter: float = _flag(
        0.0, "data", "video ResNet: move both ends of the HU window of training volumes, each by up to X HU; no cache "
        "in frozen epochs, as with --augment")

    model: str = _flag(
        "ctclip", "model", "'ctclip', or a slice backbone: a timm name (efficientnet_b0, ...), hf-hub:OWNER/NAME, or a "
        "folder of config.json and weights in timm's layout; or a video ResNet on crops of whole volumes: "
        f"{', '.join(VIDEO_MODELS)}", metavar="NAME")
    ctclip_path: str | None = _flag(
        None, "model", f"CT-CLIP checkpoint (default {CLASSFINE_PATH}; on the built-in cohort the demo's)",
        metavar="FILE")
    head: str = _flag(
        "linear", "model",
        "linear: ClassFine's, of a slice backbone on the mean over slices; mlp: with a hidden layer, CT-CLIP only; "
        "attention: a learned query per label pools the tokens, for small findings; max: the highest 5 tokens count, "
        "fitted before the first epoch, slice backbones only; for small findings with --feature-stride 16",
        choices=("linear", "mlp", "attention", "max"))
    tokens: str = _flag(
        "slice", "model", "what --head attention or max pools of a slice backbone; slice: one token of each (class "
        "token, or mean of the feature map); patch: every place of the map, in a cache as many times as large",
        choices=("slice", "patch"))
    init_head: str = _flag(
        "file", "model",
        "start of the head; file: the checkpoint's, or zeros; new: zeros, whatever head the file has; prompts: of the "
        "linear head, zero-shot weights from its text tower", choices=("file", "prompts", "new"))
    dropout: float = _flag(0.3, "model", "dropout rate in the head")
    use_attention: str = _flag("none", "model", "attention on a slice backbone's feature map", choices=("none", "cbam"))
    backbone_weights: str | None = _flag(
        None, "model", "weights for a slice backbone (.pth, .safetensors) instead of timm's from the hub; for a video "
        "ResNet, whose stem stays new, instead of torchvision's", metavar="FILE")
    windows: str | None = _flag(
        None, "model", "HU windows of a slice backbone's channels, commas between: lung, mediastinum, bone, LOW:HIGH "
        "or LOW:HIGH:MEAN:STD (for weights trained on CT); one: of three neighbouring slices; three: of the middle one "
        "(default: [-1000, 1000]); video ResNet: one (default -1000:200)", metavar="NAMES")
    slice_spacing: float | None = _flag(
        None, "model", "mm between the slices that a slice backbone takes (default: 8 slices over 360 mm), or of a "
        "video ResNet's volumes (default 3); time and memory grow with their number")
    slice_size: int | None = _flag(
        None, "model", "pixels along each side of a slice of 360 mm (default 224, of a video ResNet 240)")
    feature_stride: int | None = _flag(
        None, "model", "slice backbone, convolutional or hierarchical: the head takes the last feature map with a "
        "place for each N x N pixels, such as 16, and no later layer is kept or run (default: the last map, mostly "
        "32); finer, for small findings with --head max --tokens patch")
    stem_stride: int = _flag(
        2, "model", "video ResNet: kernel and stride of the first convolution; 4: an eighth of the time and memory",
        choices=(2, 4))
    crop: float = _flag(
        0.8, "model", "video ResNet: edge of a crop as a share of the volume's; training takes a random crop of each "
        "volume per epoch, evaluation the central one")
    test_crops: int = _flag(
        1, "model", "video ResNet: 8: evaluation takes the mean over crops at all corners, in eight times the time",
        choices=(1, 8))
    pretrained: bool = _flag(
        True, "model", "random weights for a slice backbone or video ResNet, not ImageNet's or Kinetics': much lower "
        "AUROC")

    epochs: int = _flag(22, "optimization", "passes over the training volumes, frozen and unfrozen")
    freeze_epochs: int = _flag(20, "optimization", "first epochs, with a frozen backbone (fast: features are cached)")
    freeze_backbone: bool = _flag(False, "optimization", "keep the backbone frozen in every epoch")
    adapt: str | None = _flag(
        None, "optimization", "what of the backbone is trained after the frozen epochs, all at once; none: nothing, as "
        "--freeze-backbone; lora: low-rank adapters of a vision transformer, its own weights stay; last:N: the last N "
        "layers; full: all (default: more layers with each epoch, --unfreeze-layers)", metavar="none|lora|last:N|full")
    lora_rank: int = _flag(8, "optimization", "LoRA: rank of the adapters")
    lora_alpha: float = _flag(16.0, "optimization", "LoRA: alpha; adapters are scaled by alpha / rank")
    lora_dropout: float = _flag(0.1, "optimization", "LoRA: dropout rate of what the adapters take")
    lora_targets: str = _flag(
        "attn.qkv,attn.proj,patch_embed.proj", "optimization", "LoRA: ends of the names of layers that get adapters",
        metavar="NAMES")
    train_slices: int | None = _flag(
        None, "optimization", "slice backbone that encodes volumes in training: N random slices of each per step, one "
        "from each of N equal parts (default: all); validation takes all")
    unfreeze_layers: int = _flag(
        2, "optimization", "layers unfrozen with each epoch after the frozen ones, from the output down; more take "
        "more memory and time; 0: all at once")
    patience: int = _flag(
        3, "optimization",
        "early stopping: unfrozen epochs in a row worse than the best AUROC by more than one standard error")
    batch_size: int = _flag(16, "optimization", "volumes per optimizer step, accumulated: memory does not limit it")
    learning_rate: float | None = _flag(  # None: HEAD_LEARNING_RATE
        None, "optimization", "peak learning rate of the head (default "
        f"{', '.join(f'{rate:g} for {kind}' for kind, rate in HEAD_LEARNING_RATE.items())})")
    backbone_learning_rate: float = _flag(3e-5, "optimization", "peak learning rate of the layer nearest to the output")
    adapter_learning_rate: float = _flag(5e-4, "optimization", "peak learning rate of adapters (--adapt lora)")
    layer_decay: float = _flag(0.8, "optimization", "factor on the learning rate per layer further from the output")
    weight_decay: float = _flag(0.01, "optimization", "AdamW's weight decay, on matrices only (not norms and biases)")
    warmup_fraction: float = _flag(0.05, "optimization", "share of the epochs with rising rates, before a cosine to 0")
    clip_norm: float = _flag(1.0, "optimization", "gradients are scaled down to at most this norm")
    average_epochs: str | None = _flag(
        None, "optimization", "mean of the weights after these epochs; kept where its macro AUROC on the validation "
        "patients is above that of every epoch", metavar="N,N[,N]")
    ema_decay: float = _flag(0.0, "optimization", "evaluate and save averaged weights (EMA); 0: off, typical: 0.999")
    loss_type: str = _flag(
        "focal", "loss",
        "focal: see --alpha and --gamma; bce: binary cross-entropy, probabilities fit the label rate; asl: timm's "
        "asymmetric loss, ranks well, probabilities are too high", choices=("focal", "bce", "asl"))
    alpha: float = _flag(0.35, "loss", "focal loss: weight of the negatives; higher gives fewer positive predictions")
    gamma: float = _flag(2.0, "loss", "focal loss: higher gives easy cases less weight and flattens the probabilities")
    class_weights: bool = _flag(
        False, "loss", "weight labels by inverse frequency (positives and negatives alike: positive rates stay)")
    seed: int = _flag(0, "optimization", "seed of split, shuffling, dropout and new weights")
    # fmt: on

    # Of a run that belongs to a study (training/folds.py): the fold whose patients it does not see, counted from 1; of
    # how many; the seed of the split, where it is not `seed`.
    fold: int | None = None
    fold_count: int | None = None
    split_seed: int | None = None

    @property
    def head_learning_rate(self) -> float:
        kind = "ctclip" if self.model == "ctclip" else "others"
        return HEAD_LEARNING_RATE[kind] if self.learning_rate is None else self.learning_rate

    @property
    def frozen_epochs(self) -> int:
        return self.epochs if self.stays_frozen else min(self.freeze_epochs, self.epochs)

    @property
    def is_video(self) -> bool:
        return self.model in VIDEO_MODELS

    @property
    def changes_voxels(self) -> bool:
        """Whether training volumes are never twice the same, so that even a frozen backbone encodes them anew."""
        return self.augment or self.window_jitter > 0

    @property
    def averaged_epochs(self) -> tuple[int, ...]:
        """Those of --average-epochs, the first being 1."""
        return tuple(int(number) for number in (self.average_epochs or "").split(",") if number)

    @property
    def stays_frozen(self) -> bool:
        return self.freeze_backbone or self.adapt == "none"

    def unfrozen_layers(self, epoch: int, layers: int) -> int:
        """How many of the backbone's layers, counted from the output, are trained in this epoch; adapters are the last
        layer."""
        if epoch < self.frozen_epochs:
            return 0
        if self.adapt is not None:
            return {"lora": 1, "full": layers}.get(self.adapt) or min(layers, int(self.adapt.removeprefix("last:")))
        return min(layers, self.unfreeze_layers * (epoch - self.frozen_epochs + 1)) if self.unfreeze_layers else layers

    def _averages_epochs(self) -> bool:
        if self.average_epochs is None:
            return True
        if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})+", self.average_epochs):
            return False
        epochs = self.averaged_epochs
        return list(epochs) == sorted(set(epochs)) and epochs[0] >= 1 and epochs[-1] <= self.epochs

    def less_memory(self) -> list[str]:
        """What to change where unfrozen epochs take too much memory; the last way has none."""
        flag, least = ("--unfreeze-layers 1", self.unfreeze_layers == 1)
        if self.adapt is not None:
            flag, least = ("--adapt last:1", self.adapt in ("lora", "last:1"))
        ways = [] if least else [f"unfreeze fewer layers ({flag})"]
        if self.is_video and self.stem_stride == 2:
            ways.append("take a larger stem (--stem-stride 4)")
        if self.model != "ctclip" and not self.is_video and self.train_slices != 1:
            ways.append("encode fewer slices per step (--train-slices)")
        frozen = "--freeze-backbone" if self.adapt is None else "--adapt none"
        return [*ways, f"keep the backbone frozen ({frozen})"]

    def check(self) -> None:
        """Raises UserError for a value out of range, and for a choice of model or head that would be ignored."""
        bounds = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "freeze_epochs": (self.freeze_epochs >= 0, "at least 0"),
            "adapt": (re.fullmatch("none|lora|last:0*[1-9][0-9]{0,5}|full", self.adapt or "none") is not None,
                      "none, lora, last:N or full, such as last:2"),
            "lora_rank": (self.lora_rank >= 1, "at least 1"),
            "lora_alpha": (0 < self.lora_alpha < math.inf, "above 0, and finite"),
            "lora_dropout": (0 <= self.lora_dropout < 1, "at least 0 and below 1"),
            "slice_spacing": (self.slice_spacing is None or 0.5 <= self.slice_spacing <= 180, "0.5 to 180 mm"),
            "slice_size": (self.slice_size is None or 16 <= self.slice_size <= 2048, "16 to 2048 pixels"),
            "feature_stride": (self.feature_stride is None or self.feature_stride >= 1, "at least 1 pixel"),
            "crop": (0 < self.crop <= 1, "above 0 and at most 1"),
            "window_jitter": (0 <= self.window_jitter < math.inf, "at least 0 HU, and finite"),
            "train_slices": (self.train_slices is None or self.train_slices >= 1, "at least 1"),
            "unfreeze_layers": (self.unfreeze_layers >= 0, "at least 0 (0: all layers at once)"),
            "patience": (self.patience >= 1, "at least 1"),
            "batch_size": (1 <= self.batch_size < 2**31, "at least 1 and below 2^31"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
            "learning_rate": (0 < self.head_learning_rate < math.inf, "above 0, and finite"),
            "backbone_learning_rate": (0 <= self.backbone_learning_rate < math.inf, "at least 0, and finite"),
            "adapter_learning_rate": (0 <= self.adapter_learning_rate < math.inf, "at least 0, and finite"),
            "layer_decay": (0 < self.layer_decay <= 1, "above 0 and at most 1"),
            "average_epochs": (self._averages_epochs(),
                               f"two or more of the epochs 1 to {self.epochs}, rising, commas between"),
            "ema_decay": (0 <= self.ema_decay < 1, "at least 0 (off) and below 1"),
            "tuning_fraction": (0 < self.tuning_fraction < 1, "between 0 and 1"),
            "alpha": (0 < self.alpha < 1, "between 0 and 1 (it weighs the negatives)"),
            "gamma": (0 <= self.gamma <= MOST_GAMMA, f"0 to {MOST_GAMMA}"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0, and finite"),
            "clip_norm": (self.clip_norm > 0, "above 0"),
            "warmup_fraction": (0 <= self.warmup_fraction <= 1, "between 0 and 1"),
            "seed": (0 <= self.seed < 2**32, "at least 0 and below 2^32"),
            "limit": (self.limit is None or self.limit >= 2, "at least 2 volumes"),
            "fold": (
                (self.fold is None) == (self.fold_count is None) and 0 < (self.fold or 1) <= (self.fold_count or 1),
                f"1 to fold_count, which is {self.fold_count}",
            ),
        }
        bounds |= {
            item.name: (getattr(self, item.name) in choices, " or ".join(map(str, choices)))
            for item in fields(self) if (choices := item.metadata.get("choices"))
        }  # fmt: skip
        for name, (good, expected) in bounds.items():
            if not good:
                raise TrainingError(f"{flag_of(name)} is {getattr(self, name)}, expected {expected}")
        if self.freeze_backbone and self.adapt is not None:
            raise TrainingError(f"found --freeze-backbone and --adapt {self.adapt}, expected one of them, because each "
                                "says what of the backbone is trained; leave one out")
        if self.head == "max" and (self.model == "ctclip" or self.is_video):
            raise TrainingError(f"found --head max with --model {self.model}, expected a slice backbone (--model "
                                "efficientnet_b0, ...); take --head attention, or linear for a video ResNet")
        if self.head == "max" and (self.frozen_epochs < 1 or self.augment):
            found = "--augment" if self.augment else "--freeze-epochs 0"
            raise TrainingError(f"found --head max with {found}, expected frozen epochs on cached features, to which "
                                f"this head is fitted first; leave {found} out")
        if self.adapt == "lora" and (self.model == "ctclip" or self.is_video):
            raise TrainingError(f"found --adapt lora with --model {self.model}, expected a vision transformer (--model "
                                "vit_...); take --adapt last:N or full")
        of_model = ("ctclip_path", "head", "tokens", "init_head", "use_attention", "backbone_weights",
                    "windows", "slice_spacing", "slice_size", "feature_stride", "stem_stride", "crop", "test_crops")
        changed = [name for name in of_model if getattr(self, name) != getattr(TrainingConfig, name)]
        refuse_unused([flag_of(name) for name in changed], training_flag_uses(self))
        if self.backbone_weights and not Path(self.backbone_weights).is_file():  # said before phantoms are made
            found = f"--backbone-weights: found no file {self.backbone_weights}"
            raise TrainingError(f"{found}, expected weights of {self.model}; check the path")


def mistyped(content: Mapping) -> list[str]:
    """Names of a run.json's configuration whose values are of another type than TrainingConfig's."""
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    types = {item.name: item.type.removesuffix(" | None") for item in fields(TrainingConfig)}
    optional = [item.name for item in fields(TrainingConfig) if item.type.endswith(" | None")]
    return [name for name, kind in types.items() if name in content and type(content[name]) not in kinds[kind]
            and not (content[name] is None and name in optional)]


TRACKERS = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}  # -> what is imported


@dataclass(frozen=True)
class Machine:
    """How a run is carried out. May differ between a run and its continuation, and changes weights by rounding only."""

    # fmt: off
    device: str | None = _flag(None, "machine", "cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    workers: int | None = _flag(None, "machine", "reading processes (default: up to 8; none on two cores)")
    micro_batch: int | None = _flag(None, "machine", "volumes per pass (default: by size); halved if memory runs out")
    volume_cache: bool = _flag(
        True, "machine", "video ResNet: keep no resampled volumes in --cache-dir (about 6 MB each): every epoch reads "
        "the files, which takes longer")
    gradient_checkpointing: str = _flag(
        "auto", "machine", "recompute the activations of unfrozen layers: less than half the memory, slower; auto: on "
        "CUDA", choices=("auto", "on", "off"))
    save_minutes: float = _flag(10.0, "run", "minutes between saved states, besides every epoch's end; 0: every step")
    report_to: str = _flag(
        "none", "run", "show each epoch's values elsewhere too: tensorboard (events in the run's folder), trackio or "
        "wandb; each needs its package", choices=("none", *TRACKERS))
    # fmt: on

    def check(self) -> None:
        """Raises TrainingError for a value that makes no run."""
        if self.micro_batch is not None and self.micro_batch < 1:
            raise TrainingError(f"--micro-batch is {self.micro_batch}, expected at least 1")
        if not self.save_minutes >= 0:
            raise TrainingError(f"--save-minutes is {self.save_minutes}, expected at least 0 (0: after every step)")
        choices = ("none", *TRACKERS)
        if self.report_to not in choices:
            raise TrainingError(f"--report-to is {self.report_to}, expected {' or '.join(choices)}")
        if self.report_to != "none":
            try:
                importlib.import_module(TRACKERS[self.report_to])
            except ImportError as error:
                needs = f"--report-to {self.report_to} needs a package ({error})"
                raise TrainingError(f"{needs}; pip install {self.report_to}") from error


# Options that may change on --resume: folders get mounted elsewhere. Their contents are verified.
MOVABLE = ("data_dir", "cache_dir", "ctclip_path", "backbone_weights", "patients")

# What `--mode quick_test` changes: three epochs of which the last is unfrozen, on so many training and validation
# volumes; the cohort is a little larger, because a split by patient cannot hit two numbers exactly.
QUICK_TEST = {"train_volumes": 270, "valid_volumes": 100, "epochs": 3, "freeze_epochs": 2}
QUICK_TEST_VOLUMES = (200, 50)


def flag_of(name: str) -> str:
    """Of a field of TrainingConfig or Machine; a switch that is on by default has the flag that turns it off."""
    return f"--{'no-' if name in ('pretrained', 'volume_cache') else ''}{name.replace('_', '-')}"


def training_flag_uses(config: TrainingConfig) -> dict[str, tuple[str, bool]]:
    """Flag -> (what it goes with, whether `config` has that), for `refuse_unused`. All other flags always count."""
    is_ctclip, is_linear, is_video = config.model == "ctclip", config.head == "linear", config.is_video
    is_slices = not (is_ctclip or is_video)
    unfrozen = config.frozen_epochs < config.epochs
    flags = {
        ("the built-in cohort (no --data-dir)", config.data_dir is None): ("--train-volumes", "--valid-volumes"),
        ("a cohort of your own (--data-dir)", config.data_dir is not None): (
            "--patients", "--findings", "--minus-one-is-unknown",
        ),
        ("--model ctclip", is_ctclip): ("--ctclip-path",),
        (
            "--model ctclip or a slice backbone" if is_video else "--model ctclip, where it is mlp,",
            is_ctclip or is_linear or (is_slices and config.head != "mlp"),
        ): ("--head",),
        ("a slice backbone and --head attention or max", is_slices and config.head in ("attention", "max")): (
            "--tokens",
        ),
        ("another head than max", config.head != "max"): ("--dropout",),
        ("--model ctclip and --head linear", is_ctclip and (is_linear or config.init_head == "new")): ("--init-head",),
        ("a slice backbone (--model efficientnet_b0, ...)", is_slices): ("--use-attention", "--feature-stride"),
        ("a slice backbone (--model efficientnet_b0, ...) or video ResNet", not is_ctclip): (
            "--backbone-weights", "--windows", "--slice-spacing", "--slice-size",
        ),
        ("a slice backbone or video ResNet without --backbone-weights", not (is_ctclip or config.backbone_weights)): (
            "--no-pretrained",
        ),
        (f"a video ResNet (--model {', '.join(VIDEO_MODELS)})", is_video): (
            "--stem-stride", "--crop", "--test-crops", "--window-jitter",
        ),
        ("frozen epochs (--freeze-epochs above 0) or a video ResNet", config.frozen_epochs > 0 or is_video): (
            "--cache-dir",
        ),
        ("a video ResNet with unfrozen epochs or --augment", is_video and (unfrozen or config.changes_voxels)): (
            "--no-volume-cache",
        ),
        ("a backbone that is unfrozen later (no --freeze-backbone)", not config.stays_frozen): ("--freeze-epochs",),
        ("unfrozen epochs (--epochs above --freeze-epochs)", unfrozen): ("--patience", "--gradient-checkpointing"),
        ("unfrozen epochs, or as none,", unfrozen or config.stays_frozen): ("--adapt",),
        ("unfrozen epochs without --adapt", unfrozen and config.adapt is None): ("--unfreeze-layers",),
        ("unfrozen epochs of the backbone's own layers (no --adapt lora)", unfrozen and config.adapt != "lora"): (
            "--backbone-learning-rate", "--layer-decay",
        ),
        ("--adapt lora", config.adapt == "lora"): (
            "--lora-rank", "--lora-alpha", "--lora-dropout", "--lora-targets", "--adapter-learning-rate",
        ),
        ("a slice backbone with unfrozen epochs or --augment", is_slices and (unfrozen or config.augment)): (
            "--train-slices",
        ),
        ("--loss-type focal", config.loss_type == "focal"): ("--alpha", "--gamma"),
    }  # fmt: skip
    return {flag: goes_with for goes_with, of_these in flags.items() for flag in of_these}


# What an evaluation can be asked for; the functions behind the names are in evaluation/calibration.py and tables.py.
OBJECTIVES = ("prevalence", "f1", "hamming", "youden", "crg")
DEFAULT_OBJECTIVE = "prevalence"  # the only one that neither over- nor under-predicts with a weak model (LOG.md)
METHODS = ("none", "temperature", "platt")  # from the simplest to the richest
ENSEMBLES = {
    "mean": "mean of the logits",
    "stacked": "mean weighted for each finding, fitted on tuning patients of all",
    "pooled": "folds, each of which predicts patients of its own, put together",
}
UNITS = {
    "volume": "every reconstruction by itself, as the challenge counts",
    "scan": "mean of a scan's reconstructions",
    "patient": "mean of a scan's reconstructions, then the highest of a patient's scans",
}
RESAMPLES = 1000
FITTED, COUNTED = "calibration and thresholds, fitted on tuning patients", "what is counted, and compared"
CALIBRATION_FILE = "calibration.json"
CHOSEN_AT_PREDICTION = ("--objective", "--calibration", "--prevalence")  # default: as for the run's evaluation


@dataclass(frozen=True)
class Settings:
    """What an evaluation can be told; the only owner of the defaults. Stored in metrics.json.

    `prevalence` is {label: rate} of the cohort that calibration and thresholds are meant for, where it is known.
    """

    # fmt: off
    objective: str = _flag(
        DEFAULT_OBJECTIVE, FITTED, f"what thresholds aim at: {', '.join(OBJECTIVES)} or sensitivity:X; prevalence "
        "keeps the positive rate at the label rate, f1, youden and sensitivity over-predict with a weak model, hamming "
        "under-predicts", metavar="NAME")
    calibration: str = _flag(
        "auto", FITTED, "platt moves and stretches each label's logits, temperature only stretches them, auto takes "
        "the one with the lowest cross-validated log loss", choices=("auto", *METHODS))
    unit: str = _flag("volume", COUNTED, "; ".join(f"{unit}: {how}" for unit, how in UNITS.items()), choices=UNITS)
    prevalence: Mapping[str, float] | None = _flag(
        None, FITTED, "rates of the cohort that this is meant for, where they differ from the tuning patients'",
        metavar="ct-rate|JSON")
    resamples: int = _flag(RESAMPLES, COUNTED, "bootstrap resamples of the patients, for intervals and p-values")
    seed: int = 0
    reference_standard: str | None = _flag(
        None, COUNTED, "what the labels are (who read what, and how), in your words: stands in the report",
        metavar="TEXT")
    allow_partial: bool = _flag(False, COUNTED, "go on with the volumes that all tables hold; skipped ones are counted")
    # fmt: on


def _add_settings(parser: argparse.ArgumentParser, settings: type, suppress: bool) -> None:
    """A flag for each field, by its metadata; with `suppress`, one that is not given is absent from the namespace."""
    groups = {group.title: group for group in parser._action_groups}
    for item in fields(settings):
        if not item.metadata:
            continue
        options = dict(item.metadata)
        title = options.pop("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if isinstance(item.default, bool):
            options["action"] = "store_false" if item.default else "store_true"
        else:
            options["type"] = {"int": int, "float": float}.get(item.type.removesuffix(" | None"), str)
            options["help"] += "" if item.default is None else f" (default {item.default})"
            if options["type"] is not str:
                options["metavar"] = "N" if options["type"] is int else "X"
        default = argparse.SUPPRESS if suppress else item.default
        groups[title].add_argument(flag_of(item.name), dest=item.name, default=default, **options)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Where the run is, whether it goes on or is only estimated, and the flags of Machine and TrainingConfig.

    One of TrainingConfig that is not given is absent from the namespace: a continued run keeps what it had.
    """
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", metavar="DIR", help="folder of the run (default results/<time>_<model>)")
    group.add_argument("--name", metavar="NAME", help="name of the run, whose folder is then results/NAME")
    group.add_argument("--resume", nargs="?", const="", metavar="DIR",
                       help="continue an earlier run (default: the newest)")
    group.add_argument("--config", metavar="RUN|JSON",
                       help="settings of an earlier run (its folder), or {\"setting\": value, ...}; other flags win")
    names = "; ".join(f"{name}: {recipe.what}" for name, recipe in RECIPES.items())
    group.add_argument("--recipe", choices=RECIPES, metavar="NAME",
                       help=f"settings of a published recipe, other flags win (docs/flags.md); {names}")
    group.add_argument("--plan", action="store_true",
                       help="measure for a minute, print the time, memory and disk needed, and stop")
    _add_settings(parser, Machine, suppress=False)
    _add_settings(parser, TrainingConfig, suppress=True)


def machine_from_flags(args: argparse.Namespace) -> Machine:
    return Machine(**{field.name: getattr(args, field.name) for field in fields(Machine)})


def config_from_flags(args: argparse.Namespace) -> TrainingConfig:
    names = {field.name for field in fields(TrainingConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if given.get("mode") == "quick_test":
        given = QUICK_TEST | given
    if args.config and args.recipe:
        raise TrainingError(f"found --config and --recipe {args.recipe}, expected one of them, because each sets what "
                            "other flags do not; leave one out")
    base = dict(RECIPES[args.recipe].settings) if args.recipe else {}
    return TrainingConfig(**(read_settings(Path(args.config)) if args.config else base) | given)


def recipe_lines(name: str) -> list[str]:
    """What a run prints of its recipe."""
    recipe = RECIPES[name]
    return [f"Recipe:   {name}, {recipe.what}. Source: {recipe.source}. Published: macro AUROC {recipe.published}. "
            f"{NOT_MEASURED} Differs: {recipe.differs}.",
            f"Flags:    {' '.join(flags_of(recipe.settings))}"]


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings of TrainingConfig as words of a command line; of switches, those that are not as by default."""
    words = []
    for name, value in settings.items():
        flag, text = flag_of(name), str(value)
        if isinstance(value, bool):
            words.append(flag)
        else:  # what begins with - would be taken for a flag
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of TrainingConfig from a run's folder, from its run.json, or from a JSON object of them."""
    path = path / "run.json" if path.is_dir() else path
    if path.name == "config.json" and (path.parent / "run.json").is_file():  # the model's; the run's are beside it
        path = path.parent / "run.json"
    expected = 'expected a run\'s folder, or a JSON file such as {"epochs": 8, "head": "mlp"}'
    try:
        content = read_json(path)
    except OSError as error:
        raise TrainingError(f"--config {path}: {error.strerror}, {expected}") from error
    except ValueError as error:
        raise TrainingError(f"--config {path}: found no JSON ({error}), {expected}") from error
    settings = content.get("config", content) if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise TrainingError(f"--config {path}: found no settings, {expected}")
    names = [item.name for item in fields(TrainingConfig)]
    if unknown := [name for name in settings if name not in names]:
        raise TrainingError(f"--config {path}: found {unknown[0]!r}, expected settings as in a run's run.json: "
                            f"{', '.join(names)}")
    if empty := [name for name, value in settings.items() if value == ""]:
        raise TrainingError(f"--config {path}: found '' for {empty[0]}, expected a value; give one, or leave it out")
    if wrong := mistyped(settings):
        raise TrainingError(f"--config {path}: found {settings[wrong[0]]!r} for {wrong[0]}, expected another type; "
                            f"see {flag_of(wrong[0])} in --help-all")
    return settings


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of Settings, and --ensemble, --save-ensemble, --baseline, --metadata, --pictures and --verbose."""
    _add_settings(parser, Settings, suppress=False)
    counted = next(group for group in parser._action_groups if group.title == COUNTED)
    ways = "; ".join(f"{name}: {how}" for name, how in ENSEMBLES.items())
    counted.add_argument("--ensemble", choices=ENSEMBLES,
                         help=f"how several predictions or runs are evaluated like one (default mean); {ways}")
    counted.add_argument("--save-ensemble", metavar="NAME",
                         help="keep several runs as one: results/NAME, or a folder, with the results, can be named "
                              "wherever a run can")
    counted.add_argument("--baseline", metavar="CSV|RUN",
                         help="other predictions for the same volumes, or the run that made them, compared here")
    counted.add_argument("--metadata", metavar="CSV",
                         help="table with PatientSex, PatientAge, Manufacturer or SliceThickness, for subgroups "
                              "(default: the cohort's own, where there is one)")
    counted.add_argument("--pictures", type=int, metavar="N", default=1,
                         help="volumes shown as slices per label, of false negatives and of false positives; each is "
                              "read once more and goes through the run's model; 0: none (default %(default)s)")
    counted.add_argument("--verbose", action="store_true", help="print the whole report, not only its summary")


def evaluation_flags() -> list[str]:
    """The flags of add_evaluation_flags, as the command line has them."""
    parser = argparse.ArgumentParser(add_help=False)
    add_evaluation_flags(parser)
    return ["--" + name.replace("_", "-") for name in vars(parser.parse_args([]))]


def add_study_flags(parser: argparse.ArgumentParser) -> None:
    """--folds, --seeds and --search: several runs as one study."""
    group = parser.add_argument_group("several runs (one of these; the same command goes on after an interruption)")
    group.add_argument("--folds", type=int, metavar="N",
                       help="cross-validation by patient on the training split: N runs, each of which predicts the "
                       "patients that it has not seen; all predictions are evaluated as one table")
    group.add_argument("--seeds", type=int, metavar="N", help="N runs on one split that differ by seed: mean, spread")
    group.add_argument("--search", type=int, metavar="N",
                       help="random search on a frozen backbone: N settings of head, loss, learning rate, weight decay "
                       "and dropout, compared on the validation patients; flags that are given stay fixed")


# What --help shows; --help-all shows the rest as well.
USUAL_TRAINING_FLAGS = (
    "--data-dir", "--recipe", "--model", "--head", "--epochs", "--freeze-backbone", "--batch-size", "--learning-rate",
    "--loss-type", "--cache-dir", "--output-dir", "--resume",
)  # fmt: skip
USUAL_EVALUATION_FLAGS = (
    "--checkpoint", "--predictions", "--labels", "--tuning-predictions", "--tuning-labels", "--data-dir", "--apply",
    "--results-json", "--example", "--objective", "--baseline", "--output-dir",
)  # fmt: skip


TRAINING_MODES = ("quick_test", "full_train")


def training_parser(description: str) -> OneLineParser:
    """Of ctclip_training.py."""
    parser = OneLineParser(
        ("--mode", *USUAL_TRAINING_FLAGS), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=TRAINING_MODES, default=argparse.SUPPRESS,
                        type=mode_among(TRAINING_MODES, MODES, "run_task2.py"),
                        help="quick_test: 3 epochs on 200 training and 50 validation phantoms; full_train (default): "
                        "as set below")
    add_training_flags(parser)
    add_study_flags(parser)
    return parser


def evaluation_parser() -> OneLineParser:
    """Of ctclip_evaluation.py."""
    parser = OneLineParser(USUAL_EVALUATION_FLAGS, description="Evaluate predictions of findings in chest CT.")
    source = parser.add_argument_group("what to evaluate (default: the newest run under results/)")
    source.add_argument("--checkpoint", metavar="RUN", nargs="+",
                        help="run folder; its tables, thresholds' patients and log; of several, see --ensemble")
    source.add_argument("--predictions", metavar="CSV", nargs="+",
                        help="VolumeName and a probability for each finding; needs --labels; of several, see "
                        "--ensemble")
    source.add_argument("--labels", metavar="CSV",
                        help="table of labels of the same volumes, whose findings are evaluated; an empty cell is "
                        "unknown, and left out")
    source.add_argument("--findings", metavar="NAME[,NAME]",
                        help="columns of --labels that are evaluated (default: CT-RATE's 18 where all are there, else "
                        "every column of 0, 1 and empty cells)")
    source.add_argument("--minus-one-is-unknown", action="store_true", help="-1 in --labels means an empty cell")
    source.add_argument("--label-map", metavar="NAME|JSON",
                        help="labels of another data set, brought with the predictions to findings that both have: "
                        "rad-chestct (16 findings), or a file of your own (docs/evaluation.md)")
    source.add_argument("--tuning-predictions", metavar="CSV", nargs="+",
                        help="other patients to fit on; without them, everything is cross-fitted by patient")
    source.add_argument("--tuning-labels", metavar="CSV", help="labels of the tuning patients")
    source.add_argument("--data-dir", metavar="DIR",
                        help="for a run: predict this cohort's valid split instead; for tables: their cohort")
    source.add_argument("--patients", metavar="CSV",
                        help="table of VolumeName and PatientID (and ScanID), where names are not like CT-RATE's and "
                        "no other table says whose volumes they are")
    source.add_argument("--device", help="for predicting (default: cuda where there is one)")
    source.add_argument("--workers", type=int, metavar="N", help="reading processes beside the main one")
    source.add_argument("--apply", metavar="RUN|JSON",
                        help=f"no evaluation: write --predictions calibrated, and mapped for a cut at 0.5, by a run's "
                             f"{CALIBRATION_FILE}")
    source.add_argument("--results-json", metavar="JSON",
                        help="also write the challenge's results.json, with tuned thresholds at 0.5; without --labels "
                        "nothing else, by the thresholds of --apply or of the tuning tables")
    source.add_argument("--example", action="store_true",
                        help="a simulated classifier that says positive 97 %% of the time, and what becomes of it")
    add_evaluation_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", metavar="DIR", help="default: the run folder, or one under results/")
    return parser


PREDICTIONS = "results/predictions.csv"
MODES = {
    "full": "train, then evaluate on unseen patients (default)",
    "train": "fine-tune only",
    "evaluate": "evaluate the run named by --checkpoint, or the newest",
    "predict": "probabilities for the scans named by --input",
    "runs": "list all runs of results/, and compare them on a page",
}
EXPORTS = {
    "onnx": "encoder and head as an ONNX graph, checked against the model",
    "features": "latents of a cohort's volumes (--data-dir, or the run's own) or of scans (--input), as safetensors "
    "files and a table",
}
RUN_COLUMNS = ("name", "date", "status", "data", "model", "head", "loss", "epochs", "auroc", "f1", "positive_rate",
               "crg")  # fmt: skip


def task_parser(description: str) -> OneLineParser:
    """Of run_task2.py."""
    usual = ("--mode", "--checkpoint", "--input", "--output", "--explain", *USUAL_TRAINING_FLAGS)
    parser = OneLineParser(usual, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = "; ".join(f"{mode}: {what}" for mode, what in MODES.items())
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--mode", dest="task", choices=MODES, default="full", help=modes,
                      type=mode_among(MODES, TRAINING_MODES, "ctclip_training.py"))
    task.add_argument("--export", choices=EXPORTS, help="; ".join(f"{name}: {what}" for name, what in EXPORTS.items()))
    group = parser.add_argument_group("evaluate and predict")
    group.add_argument("--checkpoint", metavar="RUN", nargs="+",
                       help="run folder, or for predict and export a CT-CLIP file; evaluate and predict take several "
                       "runs, see --ensemble")
    group.add_argument("--input", metavar="PATH",
                       help="predict, export features: scan (.nii, .nii.gz, .mha, DICOM series), or a folder of "
                       "scans, nested or not; runs: folder of the runs (default results)")
    group.add_argument("--sort", choices=RUN_COLUMNS, default="date",
                       help="runs: order of the list, the highest or newest first (default %(default)s)")
    group.add_argument("--output", metavar="FILE",
                       help=f"predict: .csv, a table (default {PREDICTIONS}), .html, a page with the scans and their "
                       "evidence beside a table, .answers.json, for other systems, or .json, the challenge's "
                       "results.json with an answer for every input; export: the .onnx file, or the folder of the "
                       "features (default beside the checkpoint); runs: the page (default index.html among the runs)")
    group.add_argument("--export-tokens", choices=("codes", "grid", "slice", "patch"),
                       help="export features: tokens too; of CT-CLIP codes (ids, with their codebook) or grid (the "
                       "quantised tokens, 28 MB a volume); of a slice backbone, in place of their mean, slice (class "
                       "token or mean of each slice) or patch (every place of its feature map)")
    group.add_argument("--explain", metavar="LABEL[,LABEL]",
                       help="heat maps of these findings, or all: NIfTI on the scan's grid, pictures and numbers, in a "
                       "folder for each scan beside the output")
    group.add_argument("--shard", metavar="I/N",
                       help="predict: only the I-th of N parts of the scans, for N machines without torchrun; "
                       "python -m ctclip.inference.merge makes a table of all parts")
    group.add_argument("--assume-hu", action="store_true",
                       help="take voxels for HU by the header, whatever they look like: the answer may be wrong")
    group.add_argument("--prompts", metavar="TXT",
                       help="findings of your own, one on each line, for a CT-CLIP file with its text tower")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--map-thresholds", action="store_true",
                      help="values that cut at 0.5 as the tuned thresholds do, as the challenge needs them")
    form.add_argument("--uncalibrated", action="store_true", help="the model's own probabilities")
    add_evaluation_flags(parser)
    add_training_flags(parser)
    return parser


def task_flag_uses(task: str, plan: bool = False) -> dict[str, tuple[str, bool]]:
    """Of run_task2.py, flag -> (the modes that it goes with, whether `task` is one of them), for `refuse_unused`.

    A flag that every mode looks at is not in it.
    """
    settings = (flag_of(item.name) for item in (*fields(TrainingConfig), *fields(Machine)) if item.metadata)
    training = (*settings, "--output-dir", "--name", "--resume", "--plan", "--config", "--recipe")
    modes: dict[str, tuple[str, ...]] = dict.fromkeys(training, ("full", "train"))
    modes |= dict.fromkeys(evaluation_flags(), ("full", "evaluate"))
    modes |= dict.fromkeys((*CHOSEN_AT_PREDICTION, "--ensemble"), ("full", "evaluate", "predict"))
    predicting = ("--prompts", "--explain", "--map-thresholds", "--uncalibrated", "--shard")
    modes |= dict.fromkeys(predicting, ("predict",))
    modes |= {
        "--assume-hu": ("predict", "features"),
        "--input": ("predict", "features", "runs"),
        "--sort": ("runs",),
        "--output": ("predict", *EXPORTS, "runs"),
        "--export-tokens": ("features",),
        "--checkpoint": ("evaluate", "predict", *EXPORTS),
        **dict.fromkeys(("--data-dir", "--patients"), ("full", "train", "evaluate", "features")),
        **dict.fromkeys(("--findings", "--minus-one-is-unknown", "--cache-dir"), ("full", "train", "features")),
        "--workers": ("full", "train", "evaluate", "predict", "features"),
    }
    modes["--device"] = tuple(mode for mode in (*MODES, *EXPORTS) if mode != "runs")
    spelled = {mode: f"--mode {mode}" for mode in MODES} | {name: f"--export {name}" for name in EXPORTS}
    uses = {flag: (" or ".join(spelled[mode] for mode in those), task in those) for flag, those in modes.items()}
    if plan:  # which stops before there is anything to evaluate
        uses |= dict.fromkeys(evaluation_flags(), ("an evaluation, not --plan,", False))
    return uses
