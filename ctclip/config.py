"""Configuration of a training run and of an evaluation, the only owner of their defaults; and the flags of every script
that imports torch at its top.

Standard library only, like `ctclip.fileio`: --help and a mistyped flag are answered before the two seconds of torch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ctclip.cli import OneLineParser
from ctclip.errors import UserError
from ctclip.paths import CLASSFINE_PATH

# Printed with every result on phantoms, and kept with it: metrics.json, reports, figures, model cards, manifests.
SYNTHETIC_NOTE = "Synthetic data: not clinical performance."

# Peak rate of each head. A CT-CLIP latent has length 1, so its entries are small and the weights have far to go.
HEAD_LEARNING_RATE = {"ctclip": 3e-2, "slice backbones": 1e-3}


class TrainingError(UserError):
    """A run that cannot start or go on. One line: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that the weights of a run depend on; the only owner of the defaults. Stored in run.json."""

    mode: str = "full_train"
    data_dir: str | None = None
    train_volumes: int = 600  # built-in cohort only
    valid_volumes: int = 250
    limit: int | None = None
    tuning_fraction: float = 0.2
    cache_dir: str = "cache"
    augment: bool = False
    model: str = "ctclip"
    ctclip_path: str | None = None
    head: str = "linear"
    init_head: str = "file"
    dropout: float = 0.3
    use_attention: str = "none"
    pretrained: bool = True
    epochs: int = 22
    freeze_epochs: int = 20
    freeze_backbone: bool = False
    unfreeze_layers: int = 2
    patience: int = 3
    batch_size: int = 16
    learning_rate: float | None = None  # None: HEAD_LEARNING_RATE
    backbone_learning_rate: float = 3e-5
    layer_decay: float = 0.8
    weight_decay: float = 0.01
    warmup_fraction: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    loss_type: str = "focal"
    alpha: float = 0.35
    gamma: float = 2.0
    class_weights: bool = False
    seed: int = 0

    @property
    def head_learning_rate(self) -> float:
        kind = "ctclip" if self.model == "ctclip" else "slice backbones"
        return HEAD_LEARNING_RATE[kind] if self.learning_rate is None else self.learning_rate

    @property
    def frozen_epochs(self) -> int:
        return self.epochs if self.freeze_backbone else min(self.freeze_epochs, self.epochs)

    def open_layers(self, epoch: int, layers: int) -> int:
        """How many of the backbone's layers, counted from the output, move in this epoch."""
        if epoch < self.frozen_epochs:
            return 0
        return min(layers, self.unfreeze_layers * (epoch - self.frozen_epochs + 1)) if self.unfreeze_layers else layers

    def check(self) -> None:
        """Raises TrainingError for a value that makes no run."""
        bounds = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "freeze_epochs": (self.freeze_epochs >= 0, "at least 0"),
            "unfreeze_layers": (self.unfreeze_layers >= 0, "at least 0 (0: all layers at once)"),
            "patience": (self.patience >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and below 1"),
            "learning_rate": (self.head_learning_rate > 0, "above 0"),
            "backbone_learning_rate": (self.backbone_learning_rate >= 0, "at least 0"),
            "layer_decay": (0 < self.layer_decay <= 1, "above 0 and at most 1"),
            "ema_decay": (0 <= self.ema_decay < 1, "at least 0 (off) and below 1"),
            "tuning_fraction": (0 < self.tuning_fraction < 1, "between 0 and 1"),
            "alpha": (0 < self.alpha < 1, "between 0 and 1 (it weighs the negatives)"),
            "gamma": (0 <= self.gamma < math.inf, "a finite number of at least 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "clip_norm": (self.clip_norm > 0, "above 0"),
            "warmup_fraction": (0 <= self.warmup_fraction <= 1, "between 0 and 1"),
            "seed": (self.seed >= 0, "at least 0"),
            "limit": (self.limit is None or self.limit >= 2, "at least 2 volumes"),
        }
        for name, (good, expected) in bounds.items():
            if not good:
                raise TrainingError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected {expected}")


@dataclass(frozen=True)
class Machine:
    """How a run is carried out. May differ between a run and its continuation, and changes weights by rounding only."""

    device: str | None = None
    workers: int | None = None
    micro_batch: int | None = None
    gradient_checkpointing: str = "auto"
    save_minutes: float = 10.0
    tensorboard: bool = False

    def check(self) -> None:
        """Raises TrainingError for a value that makes no run."""
        if self.micro_batch is not None and self.micro_batch < 1:
            raise TrainingError(f"--micro-batch is {self.micro_batch}, expected at least 1")
        if not self.save_minutes >= 0:
            raise TrainingError(f"--save-minutes is {self.save_minutes}, expected at least 0 (0: after every step)")
        if self.tensorboard:
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError as error:
                raise TrainingError(f"--tensorboard needs a package ({error}); pip install tensorboard") from error


# What a continued run may be told anew: folders get mounted elsewhere. That content is the same is checked.
MOVABLE = ("data_dir", "cache_dir", "ctclip_path")

# What `--mode quick_test` changes: three epochs of which the last is unfrozen, on so many training and tuning volumes;
# the cohort is a little larger, because a split by patient cannot hit two numbers exactly.
QUICK_TEST = {"train_volumes": 270, "valid_volumes": 100, "epochs": 3, "freeze_epochs": 2}
QUICK_TEST_VOLUMES = (200, 50)


# What an evaluation can be asked for; the functions behind the names are in evaluation/calibration.py and tables.py.
OBJECTIVES = ("prevalence", "f1", "hamming", "youden", "crg")
DEFAULT_OBJECTIVE = "prevalence"  # the only one that neither over- nor under-predicts with a weak model (LOG.md)
METHODS = ("none", "temperature", "platt")  # from the simplest to the richest
UNITS = {
    "volume": "every reconstruction by itself, as the challenge counts",
    "scan": "mean of a scan's reconstructions",
    "patient": "mean of a scan's reconstructions, then the highest of a patient's scans",
}
RESAMPLES = 1000
CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Settings:
    """What an evaluation can be told; the only owner of the defaults. Stored in metrics.json.

    `prevalence` is {label: rate} of the cohort that calibration and thresholds are meant for, where it is known.
    """

    objective: str = DEFAULT_OBJECTIVE
    calibration: str = "auto"
    unit: str = "volume"
    prevalence: Mapping[str, float] | None = None
    resamples: int = RESAMPLES
    seed: int = 0
    allow_partial: bool = False


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of TrainingConfig, defaults from there, in groups. A flag left out is absent from the namespace."""
    default = TrainingConfig()

    def add(group, flag: str, text: str, **kwargs) -> None:
        value = getattr(default, flag.replace("-", "_"))
        shown = "" if value in (None, False) else f" (default {value})"
        if kwargs.get("action") is None:
            kwargs.setdefault("type", str)
        group.add_argument(f"--{flag}", default=argparse.SUPPRESS, help=text + shown, **kwargs)

    data = parser.add_argument_group("data")
    add(data, "data-dir", "folder in the hub's layout; left out: the built-in cohort of synthetic chests", metavar="D")
    add(data, "train-volumes", "size of the built-in cohort's training split", type=int, metavar="N")
    add(data, "valid-volumes", "size of the built-in cohort's unseen split", type=int, metavar="N")
    add(data, "limit", "use only the first N volumes of the training split", type=int, metavar="N")
    add(data, "tuning-fraction", "share of patients kept for choosing epoch and thresholds", type=float, metavar="F")
    add(data, "cache-dir", "what a frozen backbone makes of each volume is kept here, for all runs", metavar="C")
    text = "shift and rescale voxels in training, add noise; no cache for them: every frozen epoch encodes anew"
    add(data, "augment", text, action="store_true")
    model = parser.add_argument_group("model")
    add(model, "model", "'ctclip', or a timm name such as efficientnet_b0 for a slice classifier", metavar="NAME")
    add(model, "ctclip-path", f"CT-CLIP weights (default {CLASSFINE_PATH}; on phantoms the demo's)", metavar="FILE")
    text = "linear: ClassFine's; mlp: and a hidden layer; attention: pools the token grid per finding, for small ones"
    add(model, "head", text, choices=("linear", "mlp", "attention"))
    text = "of --head linear: what the file has, or new; prompts: at its zero-shot answers, made by its text tower"
    add(model, "init-head", text, choices=("file", "prompts"))
    add(model, "dropout", "share of the head's inputs dropped in training", type=float, metavar="F")
    add(model, "use-attention", "attention on a slice backbone's feature map", choices=("none", "cbam"))
    model.add_argument(
        "--no-pretrained",
        dest="pretrained",
        action="store_false",
        default=argparse.SUPPRESS,
        help="start a slice backbone from random weights instead of ImageNet's (much worse)",
    )
    plan = parser.add_argument_group("schedule")
    add(plan, "epochs", "passes over the training volumes", type=int, metavar="N")
    add(plan, "freeze-epochs", "of those, with a frozen backbone (cheap: read from the cache)", type=int, metavar="N")
    add(plan, "freeze-backbone", "never unfreeze", action="store_true")
    text = "layers opened per unfrozen epoch, from the output down; memory and time grow with them; 0: all at once"
    add(plan, "unfreeze-layers", text, type=int, metavar="N")
    text = "unfrozen: stop after N evaluations in a row below the best AUROC by more than its noise"
    add(plan, "patience", text, type=int, metavar="N")
    add(plan, "batch-size", "volumes per step, whatever the memory; gradients are accumulated", type=int, metavar="N")
    rates = ", ".join(f"{rate:g} for {kind}" for kind, rate in HEAD_LEARNING_RATE.items())
    add(plan, "learning-rate", f"peak rate of the head (default {rates})", type=float, metavar="R")
    add(plan, "backbone-learning-rate", "peak rate of the layer at the output, once open", type=float, metavar="R")
    add(plan, "layer-decay", "each layer further from the output has this times the rate", type=float, metavar="F")
    add(plan, "ema-decay", "evaluate and save an average of the weights (0: off; 0.999)", type=float, metavar="F")
    add(plan, "weight-decay", "AdamW's, on matrices only", type=float, metavar="R")
    add(plan, "warmup-fraction", "share of its epochs in which a rate rises", type=float, metavar="F")
    add(plan, "clip-norm", "largest gradient norm", type=float, metavar="R")
    add(plan, "seed", "of split, shuffling, dropout and new weights", type=int, metavar="N")
    loss = parser.add_argument_group("loss")
    add(loss, "loss-type", "focal; bce: cross-entropy; asl: asymmetric loss (timm's)", choices=("focal", "bce", "asl"))
    add(loss, "alpha", "focal: weight of the negatives; higher: fewer positive predictions", type=float, metavar="A")
    text = "weigh findings by how rare they are in the training labels; both sides alike, so rates do not rise"
    add(loss, "class-weights", text, action="store_true")
    add(loss, "gamma", "focal: higher leaves easy cases alone and flattens the probabilities", type=float, metavar="G")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    machine.add_argument("--workers", type=int, metavar="N", help="reading processes beside the main one")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    default = Machine()
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", metavar="DIR", help="folder of the run (default results/<time>_<model>)")
    group.add_argument(
        "--resume", nargs="?", const="", metavar="DIR", help="go on with an earlier run (default: the newest)"
    )
    group.add_argument("--plan", action="store_true", help="measure for a minute what the run will need, and stop")
    group.add_argument(
        "--save-minutes",
        type=float,
        default=default.save_minutes,
        metavar="M",
        help="save the state so often, beside every epoch's end (default %(default)g)",
    )
    group.add_argument(
        "--micro-batch", type=int, metavar="N", help="volumes per forward pass (default: by size; halved when too many)"
    )
    group.add_argument(
        "--gradient-checkpointing",
        choices=("auto", "on", "off"),
        default=default.gradient_checkpointing,
        help="unfrozen: recompute instead of keep, less than half the memory (default %(default)s: on CUDA)",
    )
    group.add_argument("--tensorboard", action="store_true", help="write TensorBoard events into the run's folder")


def machine_from_flags(args: argparse.Namespace) -> Machine:
    return Machine(**{field.name: getattr(args, field.name) for field in fields(Machine)})


def config_from_flags(args: argparse.Namespace) -> TrainingConfig:
    names = {field.name for field in fields(TrainingConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if given.get("mode") == "quick_test":
        given = QUICK_TEST | given
    return TrainingConfig(**given)


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that settings_from_flags reads, and --baseline, --metadata and --pictures."""
    fitted = parser.add_argument_group("calibration and thresholds, fitted on tuning patients")
    fitted.add_argument("--objective", metavar="NAME", default=Settings.objective,
                        help=f"what thresholds aim at: {', '.join(OBJECTIVES)} or sensitivity:X; prevalence keeps the "
                             "positive rate at the label rate, f1, youden and sensitivity over-predict with a weak "
                             "model, hamming under-predicts (default: %(default)s)")
    fitted.add_argument("--calibration", choices=("auto", *METHODS), default=Settings.calibration,
                        help="platt moves and stretches each label's logits, temperature only stretches them, auto "
                             "takes what has the lowest cross-validated log loss (default: %(default)s)")
    fitted.add_argument("--prevalence", metavar="ct-rate|JSON",
                        help="rates of the cohort that this is meant for, where they differ from the tuning patients'")
    counted = parser.add_argument_group("what is counted, and compared")
    counted.add_argument("--unit", choices=UNITS, default=Settings.unit,
                         help="; ".join(f"{unit}: {how}" for unit, how in UNITS.items()) + " (default: %(default)s)")
    counted.add_argument("--resamples", type=int, metavar="N", default=Settings.resamples,
                         help="bootstrap resamples of the patients, for intervals and p-values (default: %(default)s)")
    counted.add_argument("--allow-partial", action="store_true",
                         help="go on with the volumes that all tables hold; how many were left out is printed")
    counted.add_argument("--baseline", metavar="CSV", help="other predictions for the same volumes, compared here")
    counted.add_argument("--metadata", metavar="CSV",
                         help="table with PatientSex, PatientAge, Manufacturer or SliceThickness, for subgroups "
                              "(default: the cohort's own, where there is one)")
    counted.add_argument("--pictures", type=int, metavar="N", default=1,
                         help="volumes shown as slices on the page, of each label, missed and false alarms; each is "
                              "read once more; 0: none (default: %(default)s)")


def evaluation_flags() -> list[str]:
    """The flags of add_evaluation_flags, as the command line has them."""
    parser = argparse.ArgumentParser(add_help=False)
    add_evaluation_flags(parser)
    return ["--" + name.replace("_", "-") for name in vars(parser.parse_args([]))]


def given_evaluation_flags(args: argparse.Namespace) -> list[str]:
    """Flags of add_evaluation_flags that were given a value other than their default."""
    defaults = argparse.ArgumentParser()
    add_evaluation_flags(defaults)
    return [
        "--" + name.replace("_", "-") for name, value in vars(defaults.parse_args([])).items()
        if getattr(args, name) != value
    ]


def training_parser(description: str) -> OneLineParser:
    """Of ctclip_training.py."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mode",
        choices=("quick_test", "full_train"),
        default=argparse.SUPPRESS,
        help="quick_test: 200 training and 50 validation phantoms, 3 epochs; full_train (default): everything below",
    )
    add_run_flags(parser)
    add_training_flags(parser)
    add_machine_flags(parser)
    return parser


def evaluation_parser() -> OneLineParser:
    """Of ctclip_evaluation.py."""
    parser = OneLineParser(description="Evaluate predictions for CT-RATE's 18 abnormalities.")
    source = parser.add_argument_group("what to evaluate (default: the newest run under results/)")
    source.add_argument("--checkpoint", metavar="RUN", help="run folder; its tables, thresholds' patients and log")
    source.add_argument("--predictions", metavar="CSV", help="VolumeName and 18 probabilities; needs --labels")
    source.add_argument("--labels", metavar="CSV", help="CT-RATE's label table, of the same volumes")
    source.add_argument("--tuning-predictions", metavar="CSV",
                        help="other patients to fit on; without them, everything is cross-fitted by patient")
    source.add_argument("--tuning-labels", metavar="CSV", help="labels of the tuning patients")
    source.add_argument("--data-dir", metavar="DIR",
                        help="for a run: predict this cohort's valid split instead; for tables: their cohort")
    source.add_argument("--device", help="for predicting (default: cuda where there is one)")
    source.add_argument("--workers", type=int, metavar="N", help="reading processes beside the main one")
    source.add_argument("--apply", metavar="RUN|JSON",
                        help=f"no evaluation: write --predictions calibrated, and mapped for a cut at 0.5, by a run's "
                             f"{CALIBRATION_FILE}")
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
}


def task_parser(description: str) -> OneLineParser:
    """Of run_task2.py."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = "; ".join(f"{mode}: {what}" for mode, what in MODES.items())
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--mode", dest="task", choices=MODES, default="full", help=modes)
    task.add_argument("--export", choices=["onnx"], help="encoder and head as an ONNX graph, checked against the model")
    group = parser.add_argument_group("evaluate and predict")
    group.add_argument("--checkpoint", metavar="RUN", help="run folder, or for predict a CT-CLIP file")
    group.add_argument("--input", metavar="PATH",
                       help="scan to predict (.nii, .nii.gz, .mha, DICOM series), or a folder of scans, nested or not")
    group.add_argument("--output", metavar="FILE",
                       help=f"predict: .csv, a table (default {PREDICTIONS}), or .json, the challenge's results.json "
                       "with an answer for every input; export: the .onnx file")
    group.add_argument("--explain", metavar="LABEL[,LABEL]",
                       help="heat maps of these findings, or all: NIfTI on the scan's grid and PNG, beside the output; "
                       "doubles the time")
    group.add_argument("--prompts", metavar="TXT",
                       help="findings of your own, one on each line, for a CT-CLIP file with its text tower")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--map-thresholds", action="store_true",
                      help="values that cut at 0.5 as the tuned thresholds do, as the challenge needs them")
    form.add_argument("--uncalibrated", action="store_true", help="the model's own probabilities")
    add_evaluation_flags(parser)
    add_run_flags(parser)
    add_training_flags(parser)
    add_machine_flags(parser)
    return parser


def hub_parser(description: str) -> OneLineParser:
    """Of `python -m ctclip.hub`."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="weights|card")
    weights = commands.add_parser("weights", help="the fingerprint of a weights file; a slim copy of it")
    weights.add_argument("weights", type=Path, metavar="FILE", help="a CT-CLIP file, .pt or .safetensors")
    weights.add_argument("--slim", action="store_true", help="replace the file by its tensors in use, as .safetensors")
    card = commands.add_parser("card", help="the model card of a run; with --push, the run on the Hugging Face hub")
    card.add_argument("run", metavar="RUN", help="run folder, such as results/RUN, or a copy of one from the hub")
    card.add_argument("--print", action="store_true", help="print the card, write nothing")
    card.add_argument("--push", metavar="USER/NAME", help="upload the weights, the card and the run's files that hold "
                      "no private data; needs a token with write access")
    card.add_argument("--public", action="store_true", help="with --push: everybody may see it (default: you alone)")
    card.add_argument("--cohort", metavar="NAME", help="what the training cohort is called, for the card; CT-RATE's "
                      "terms then bind the weights")
    return parser


def phantom_parser() -> OneLineParser:
    """Of `python -m ctclip.phantoms`."""
    parser = OneLineParser(description="Write a cohort of synthetic chest CTs. " + SYNTHETIC_NOTE)
    cohort = parser.add_argument_group("cohort")
    cohort.add_argument("--data-dir", type=Path, help="folder for the cohort; reused if it holds the same one")
    cohort.add_argument("--train", type=int, default=200, help="training volumes, about 1 MB each (default 200)")
    cohort.add_argument("--valid", type=int, default=50, help="validation volumes, other patients (default 50)")
    cohort.add_argument("--seed", type=int, default=0, help="another seed gives other patients (default 0)")
    cohort.add_argument("--workers", type=int, help="processes; changes the speed, not the files (default: all cores)")
    look = parser.add_argument_group("look")
    look.add_argument("--montage", type=Path, help="draw the 18 findings to this PNG instead of writing a cohort")
    return parser
