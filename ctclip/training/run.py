"""Sets up a training run: command line, device, cohort, split, model and loss."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ctclip.cli import refuse_unused
from ctclip.config import (
    MOVABLE,
    QUICK_TEST_VOLUMES,
    RESUME_HINT,
    SYNTHETIC_NOTE,
    Machine,
    TrainingConfig,
    TrainingError,
    config_from_flags,
    flag_of,
    machine_from_flags,
    recipe_lines,
    training_flag_uses,
)
from ctclip.data.cohort import Cohort, Volume, load_cohort, patient_folds, split_by_patient
from ctclip.data.ct_rate import FETCH_COMMAND, labels_path
from ctclip.data.feature_cache import FeatureCache
from ctclip.data.label_table import listed_findings
from ctclip.data.loading import Batch, micro_batch_size, notes_of
from ctclip.data.tables import CohortError
from ctclip.data.volume_cache import VolumeCache
from ctclip.distributed import Ranks
from ctclip.evaluation.metrics import lacks_a_class, names_where
from ctclip.evaluation.run_folder import (
    LOCK,
    foreign_files,
    from_working_folder,
    newest_run,
    run_record,
)
from ctclip.evaluation.saved_ensemble import saved_ensemble
from ctclip.fileio import check_writable, locked, make_folder, naming
from ctclip.formatting import plural
from ctclip.inference.predictor import choose_device, choose_precision, choose_workers
from ctclip.inference.run_predictions import UNSEEN_NOT_CHECKED, check_unseen
from ctclip.memory import torchrun_number
from ctclip.phantoms.cohort import is_phantom_cohort, write_phantom_cohort
from ctclip_model import (
    ABNORMALITIES,
    CLASSFINE_PATH,
    DEMO_PATH,
    UNKNOWN,
    CheckpointError,
    CTCLIPMultiAbnormalityModel,
    Prompts,
    balanced_label_weights,
    create_loss,
    existing_weights,
)

SLICES = 128  # of a micro-batch to begin with
VIDEO_PLACES = 48 * 96 * 96  # of a published crop behind the stem: 2 GB of activations in float32
VIDEO_CROPS = {"cuda": 10, "cpu": 2}  # the same for video ResNets, of published crops; ten are a published step
SPLIT_NAMES = {"train": "training", "tuning": "validation", "held_out": "held-out"}  # as in files -> in words

# ------------------------------------------------------------------ signals, which end a run early


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised where nothing is lost; `run_cli` reads `exit_code`."""

    def __init__(self, number: int, saved: str):
        super().__init__(f"{saved}; go on with --resume")
        self.exit_code = 128 + number


class StopRequest:
    """Ctrl-C, SIGTERM and a closed terminal, remembered until the state is saved. A second Ctrl-C ends at once."""

    NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

    def __init__(self) -> None:
        self.number = 0
        self.before: dict = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            heard = [number for number in self.NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's
            self.before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt(RESUME_HINT)
        self.number = number

    def check(self, saved: str) -> None:
        """Raises Interrupted after a signal; `saved` says what is."""
        if self.number:
            raise Interrupted(self.number, saved)


# ------------------------------------------------------------------ a run and what it works on


@dataclass
class Split:
    """The volumes of one side of the split and, while the backbone is frozen, where their features are."""

    volumes: list[Volume]
    rows: list[int] | None = None  # in the cache
    features: Tensor | None = None  # in memory, where they are small: the head's inputs, (N, ...)

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(np.stack([volume.labels for volume in self.volumes]))

    @property
    def names(self) -> list[str]:
        return [volume.name for volume in self.volumes]

    @property
    def patients(self) -> list[str]:
        return sorted({volume.patient for volume in self.volumes})


class Run:
    """One run's folder, device and records: how each volume was read, and which could not be."""

    def __init__(self, folder: Path | None, config: TrainingConfig, machine: Machine):
        self.is_named = folder is not None
        self.folder = folder or default_folder(config)
        self.config = config
        self.machine = machine
        self.device = choose_device(machine.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.ranks = Ranks(self.device)
        self.workers = choose_workers(machine.workers)
        self.dtype = choose_precision(self.device)
        self.precision = str(self.dtype).removeprefix("torch.")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=self.device))  # sets it up; a rank's first step may have no volume
        self.micro_batch = 0  # volumes per forward pass; set by `prepare`
        self.checkpointing = False
        self.stop = StopRequest()
        self.failures: dict[str, str] = {}
        self.readings: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.cache: FeatureCache | None = None
        self.volume_cache: VolumeCache | None = None  # of a video ResNet, which takes whole HU

    def log(self, text: str) -> None:
        """Prints on the main rank, above a progress bar."""
        if self.ranks.is_main:
            with naming("standard output"):  # on a disk that is full, perhaps
                tqdm.write(text)
                sys.stdout.flush()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def record(self, split: str, volumes: list[Volume], batch: Batch) -> None:
        """Keeps a batch's decisions on units and its failures; a failure is printed once, by the rank that met it."""
        for name, reason in batch.failures:
            if name not in self.failures:
                tqdm.write(f"skipped ({SPLIT_NAMES[split]}): {name}: {reason}")
            self.failures[name] = reason
        for index, decision in zip(batch.index.tolist(), batch.decisions, strict=True):
            self.readings[volumes[index].name] = decision.reading
        self.notes |= notes_of(volumes, batch)

    def exchange_records(self) -> None:
        for failures, readings, notes in self.ranks.all_gather((self.failures, self.readings, self.notes)):
            self.failures |= failures
            self.readings |= readings
            self.notes |= notes

    def enable_checkpointing(self, model: CTCLIPMultiAbnormalityModel) -> bool:
        """Turns gradient checkpointing on; False where the model has none: some slice backbones."""
        try:
            model.set_gradient_checkpointing(True)
        except ValueError:
            return False
        self.checkpointing = True
        return True

    def use_less_memory(self, model: CTCLIPMultiAbnormalityModel) -> None:
        """After a failed allocation: halves the micro-batch, then checkpoints gradients; the batch size stays."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.micro_batch > 1:
            self.micro_batch //= 2
            what = f"{plural(self.micro_batch, 'volume')} at a time"
        elif not self.checkpointing and self.enable_checkpointing(model):
            what = "gradient checkpointing"
        else:
            tried = "one volume at a time" + (" and gradient checkpointing" if self.checkpointing else "")
            raise TrainingError(
                f"out of memory on {self.device} with {tried}; {', or '.join(self.config.less_memory())}, or use a "
                "larger device"
            )
        self.log(f"Out of memory on {self.device}: going on with {what}; a step still sees {self.config.batch_size}")


@dataclass
class TrainingJob:
    """A run with its data, model and loss: all that is known before the first step."""

    run: Run
    data_dir: Path
    phantom: bool
    cohort: Cohort
    train: Split
    validation: Split
    model: CTCLIPMultiAbnormalityModel
    criterion: nn.Module
    held_out: Split | None = None  # of a run of cross-validation: the patients that nothing of it may see

    @property
    def splits(self) -> dict[str, Split]:
        """By their names in files."""
        own = {"train": self.train, "tuning": self.validation}
        return own if self.held_out is None else own | {"held_out": self.held_out}


# ------------------------------------------------------------------ the run's folder


@contextmanager
def claimed_folder(run: Run) -> Iterator[None]:
    """The run's folder, made where there is none, is this process's alone inside the block. A name that nobody has
    given gets a number where another run has it.

    Raises TrainingError where the folder holds other files, or a run of another configuration, and UserError where
    another process trains in it.
    """
    with ExitStack() as stack:
        if run.ranks.is_main:
            if not run.is_named:
                run.folder = new_folder(run.folder)
            make_folder(run.folder, "change --output-dir")
            check_run_folder(run.folder)
            busy = f"{run.folder}: found another process that trains in it, expected none; wait for its end, or choose"
            stack.enter_context(locked(run.folder / LOCK, f"{busy} another --output-dir"))
            is_run = (run.folder / "run.json").is_file()
            if is_run and (changed := changed_flags(_stored(run.folder), asdict(run.config))):
                raise TrainingError(f"{_holds_a_run(run.folder)} (it has other values for {', '.join(changed)})")
        run.folder = run.ranks.all_gather(run.folder)[0]
        yield


def default_folder(config: TrainingConfig) -> Path:
    """Named by time and model."""
    name = re.split(r"[/\\:]", config.model.rstrip("/\\"))[-1]  # of a folder or a hub's repository
    return Path("results", f"{time.strftime('%Y%m%d-%H%M%S')}_{name}")


def new_folder(wanted: Path) -> Path:
    """Makes it, with a number behind its name where there is one of that name."""
    make_folder(wanted.parent, "run this in a folder you may write to, or name an --output-dir")
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}_{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("unreachable")


def check_run_folder(folder: Path) -> None:
    """Raises TrainingError where a folder is neither a run's, nor empty, nor absent: what is the user's in it might go
    by the name of a file that a run replaces or removes."""
    if folder.is_dir() and not (folder / "run.json").is_file() and (foreign := foreign_files(folder)):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise TrainingError(
            f"{folder}: found a folder with other files ({', '.join(foreign[:3])}{more}), expected one that is absent, "
            "empty or a run; choose another --output-dir"
        )


def _holds_a_run(folder: Path) -> str:
    return f"{folder} holds a run already; add --resume {folder}, or choose another --output-dir"


def _stored(folder: Path) -> TrainingConfig:
    """The configuration of the run in a folder."""
    try:
        return TrainingConfig(**run_record(folder)["config"])
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{folder / 'run.json'} is of another version ({error}); start a new run") from error


def changed_flags(stored: TrainingConfig, given: dict) -> list[str]:
    """Flags of the given values that are not those of the run and may not change."""
    return [flag_of(name) for name, value in given.items() if name not in MOVABLE and value != getattr(stored, name)]


# ------------------------------------------------------------------ from the command line to a TrainingJob


def run_from_flags(args: argparse.Namespace) -> tuple[TrainingConfig, Path | None, Machine]:
    """Configuration, folder (None: a new one under results/) and machine of the run that the flags ask for: a new one,
    or an earlier one with --resume.

    A resumed run keeps its own configuration; a flag with another value is an error, except for folders, which may have
    moved. So is a flag that has no effect.
    """
    if args.resume is None:
        config = config_from_flags(args)
        folder = named_folder(args)
        if folder is not None:
            if (folder / "run.json").is_file():
                raise TrainingError(_holds_a_run(folder))
            check_run_folder(folder)
            check_writable(folder, "change --output-dir")
    else:
        config, folder = _earlier_run(args)
    refuse_unused(args.given, training_flag_uses(config))
    if "--freeze-epochs" in args.given and config.freeze_epochs > config.epochs:
        found = f"found --freeze-epochs {config.freeze_epochs} with --epochs {config.epochs}"
        raise TrainingError(f"{found}, expected at most as many; raise --epochs, or take "
                            "--freeze-backbone for frozen epochs only")
    if args.recipe and torchrun_number("RANK", 0) == 0:
        print(*recipe_lines(args.recipe), sep="\n")
    return config, folder, machine_from_flags(args)


def named_folder(args: argparse.Namespace) -> Path | None:
    """The folder that --output-dir or --name asks for; None for one named by time and model."""
    if args.name is None:
        return Path(args.output_dir) if args.output_dir else None
    if args.output_dir:
        raise TrainingError("found --name and --output-dir, expected one of them; --name NAME is --output-dir "
                            "results/NAME")
    if not args.name.strip() or args.name[0] == "." or Path(args.name).name != args.name or "\\" in args.name:
        raise TrainingError(f"found --name {args.name!r}, expected a name without slashes that begins with no dot; "
                            "change it")
    return Path("results", args.name)


def _earlier_run(args: argparse.Namespace) -> tuple[TrainingConfig, Path]:
    for flag, given in (("--output-dir", args.output_dir), ("--name", args.name)):
        if given:
            raise TrainingError(f"--resume goes on in the run's own folder, found {flag} too; leave it out")
    for flag, value in (("--config", args.config), ("--recipe", args.recipe)):
        if value:
            own = "--resume goes on with the run's own settings"
            raise TrainingError(f"{own}, found {flag} too; leave one of them out")
    folder = newest_run() if args.resume == "" else Path(args.resume)
    if not (folder / "run.json").is_file():
        raise TrainingError(f"--resume: no run.json in {folder}; expected the folder of an earlier run")
    if (ensemble := saved_ensemble(folder)) is not None:
        raise TrainingError(f"--resume {folder}: found an ensemble of {ensemble.names}, expected a run; name one of "
                            "them")
    stored = _stored(folder)
    given = {name: getattr(args, name) for name in asdict(stored) if hasattr(args, name)}
    if changed := changed_flags(stored, given):
        flags = ", ".join(changed)
        raise TrainingError(f"--resume goes on as {folder} began, found other values for {flags}; leave them out")
    return replace(stored, **_folders_seen_from_here(folder, stored) | given), folder


def _folders_seen_from_here(run: Path, stored: TrainingConfig) -> dict[str, str | None]:
    """MOVABLE of a run, where they were given as seen from another working folder."""
    record = run_record(run)
    weights = CLASSFINE_PATH if stored.model == "ctclip" and not record.get("phantom") else None
    names = {
        "data_dir": stored.data_dir or record.get("data_dir"), "cache_dir": stored.cache_dir,
        "ctclip_path": stored.ctclip_path or weights, "backbone_weights": stored.backbone_weights,
        "patients": stored.patients,
    }  # fmt: skip
    found = {
        name: from_working_folder(record, path, lambda each: existing_weights(each).exists())
        for name, path in names.items()
    }
    return {name: path for name, path in found.items() if path != names[name]}


def prepare(config: TrainingConfig, folder: Path | None, machine: Machine) -> TrainingJob:
    """Cohort, split, model and loss of a run; nothing is written but the built-in cohort. `folder`: None for a new one
    under results/, which `claimed_folder` makes."""
    config.check()
    machine.check()
    torch.manual_seed(config.seed)
    run = Run(folder, config, machine)
    check_places(run)
    data_dir = Path(config.data_dir or f"data/phantoms_{config.train_volumes}_{config.valid_volumes}")
    built_in = config.data_dir is None
    if built_in:
        run.log(f"No --data-dir: using the built-in cohort of phantoms in {data_dir}. {SYNTHETIC_NOTE}")
    elif not data_dir.is_dir():  # said before weights are missed that a phantom cohort does not need
        raise TrainingError(f"found no folder {data_dir}, expected the data of the run; name it with --data-dir")
    phantom = built_in or is_phantom_cohort(data_dir)
    model = build_model(config, phantom)  # weights that cannot be had are missed before a cohort is written, or read
    if built_in and run.ranks.is_main:
        write_phantom_cohort(data_dir, config.train_volumes, config.valid_volumes)
    run.ranks.barrier()
    cohort = load_training_cohort(run, data_dir)
    check_patients(run, data_dir, cohort)
    model = with_head_for(config, phantom, model, cohort.findings)
    model.to(run.device)
    if model.is_video:
        run.volume_cache = VolumeCache(config.cache_dir if machine.volume_cache else None, model.input_shape)
    if config.is_video and config.unfrozen_layers(0, layers := len(model.layers())) < layers:
        run.log(f"{config.model}'s stem is new and random, and not trained in every epoch; to train everything from "
                "the start, as published: --freeze-epochs 0 --adapt full")
    check_voxels_available(config, data_dir, cohort.volumes)
    train, validation, held_out = split_cohort(config, cohort.volumes)
    if config.mode == "quick_test":
        for split, count in zip((train, validation), QUICK_TEST_VOLUMES, strict=True):
            split.volumes = split.volumes[:count]
    if len(values := train.labels[train.labels != UNKNOWN].unique()) == 1:
        every = f"{int(values)} for every finding of all {plural(len(train.volumes), 'training volume')}"
        raise TrainingError(f"{data_dir}: found the label {every}, expected both 0 and 1; correct the label table")
    run.micro_batch = machine.micro_batch or first_micro_batch(config, model, run.device)
    choice = machine.gradient_checkpointing
    enabled = choice == "on" or (choice == "auto" and run.device.type == "cuda")
    if enabled and not run.enable_checkpointing(model):
        if choice == "on":
            raise TrainingError(f"--gradient-checkpointing on: {config.model} has no such mode; leave it out")
        run.log(f"{config.model} has no gradient checkpointing: going on without")
    criterion = create_criterion(config, train, run.device)
    return TrainingJob(run, data_dir, phantom, cohort, train, validation, model, criterion, held_out)


def split_cohort(config: TrainingConfig, volumes: Sequence[Volume]) -> tuple[Split, Split, Split | None]:
    """(training, validation, held out by the run's fold, if it is one of several)."""
    seed = config.seed if config.split_seed is None else config.split_seed
    held_out: list[Volume] = []
    if config.fold is not None and config.fold_count is not None:
        held_out = patient_folds(volumes, config.fold_count, seed)[config.fold - 1]
    unseen = {volume.patient for volume in held_out}
    rest = [volume for volume in volumes if volume.patient not in unseen]
    train, validation = split_by_patient(rest, config.tuning_fraction, seed)
    return Split(train), Split(validation), Split(held_out) if held_out else None


def create_criterion(config: TrainingConfig, train: Split, device: torch.device) -> nn.Module:
    """The loss that the flags ask for."""
    weights = balanced_label_weights(train.labels) if config.class_weights else None
    return create_loss(config.loss_type, config.alpha, config.gamma, weights).to(device)


def first_micro_batch(config: TrainingConfig, model: CTCLIPMultiAbnormalityModel, device: torch.device) -> int:
    """Volumes of a micro-batch to begin with, by the size of what passes through the backbone."""
    if model.is_video:
        places = prod(model.crop_shape) // config.stem_stride**3
        return max(1, min(config.batch_size, VIDEO_CROPS.get(device.type, 10) * VIDEO_PLACES // places))
    size = micro_batch_size(model.input_shape, config.batch_size)
    return size if model.is_ctclip else max(1, min(size, SLICES // (model.train_slices or model.n_slices)))


def load_training_cohort(run: Run, data_dir: Path) -> Cohort:
    """The cohort's training split, with the findings that the run trains: of one that has begun, those that it has."""
    config, record = run.config, run_record(run.folder) if run.folder else {}
    findings = record.get("labels") or listed_findings(config.findings)
    return load_cohort(data_dir, "train", config.limit, config.patients, findings, config.minus_one_is_unknown)


def with_head_for(
    config: TrainingConfig, phantom: bool, model: CTCLIPMultiAbnormalityModel, findings: tuple[str, ...]
) -> CTCLIPMultiAbnormalityModel:
    """The model with a head for these findings: rows of the file's where it has them, new ones for the others; with
    `--init-head prompts`, the zero-shot weights of their names."""
    if findings == model.labels:
        return model
    if model.head_name == "prompts" or config.init_head == "prompts":
        return build_model(config, phantom, findings)
    model.select_labels(findings)
    return model


def check_patients(run: Run, data_dir: Path, cohort: Cohort) -> None:
    """Raises RunError where the run would train on patients of the cohort's unseen split, if it has one."""
    if not (data_dir / labels_path("valid")).is_file():
        return
    try:
        unseen = load_cohort(data_dir, "valid", patients=run.config.patients, findings=cohort.findings,
                             minus_one_is_unknown=run.config.minus_one_is_unknown)
    except CohortError as error:
        run.log(f"{UNSEEN_NOT_CHECKED}: {error}")
    else:
        check_unseen(unseen, cohort)


def label_notes(job: TrainingJob) -> list[str]:
    """A line for the findings that cannot be learned, one for those that cannot be measured, where there are any."""
    lines = []
    for split, kind, so in ((job.train, "training", "they cannot be learned"),
                            (job.validation, "validation", "their AUROC is undefined")):  # fmt: skip
        if names := names_where(job.model.labels, lacks_a_class(split.labels.numpy())):
            which = f"{len(names)} of {len(job.model.labels)} findings are all 0 or all 1"
            lines.append(f"{which} in the {len(split.volumes)} {kind} volumes; {so}: {', '.join(names)}")
    return lines


def check_places(run: Run) -> None:
    """Raises UserError where the run's folder or its cache could not be written to in the end."""
    check_writable(run.folder, "run this in a folder you may write to, or name an --output-dir")
    wanted = run.config.frozen_epochs or (run.config.is_video and run.machine.volume_cache)
    if wanted and not Path(run.config.cache_dir).is_dir():  # one that is complete is only read
        check_writable(run.config.cache_dir, "change --cache-dir")


def build_model(
    config: TrainingConfig, phantom: bool, findings: Sequence[str] = ABNORMALITIES
) -> CTCLIPMultiAbnormalityModel:
    """The model that `--model` names: CT-CLIP from its checkpoint, a timm slice backbone or a video ResNet. `findings`
    are those of a prompt head; other heads have the 18.

    `--init-head prompts` starts the head as the zero-shot classifier, `new` leaves the file's head aside.
    """
    if config.model == "ctclip":
        path = config.ctclip_path or (DEMO_PATH if phantom else CLASSFINE_PATH)
        head = "prompts" if config.init_head == "prompts" else config.head
        new = config.init_head == "new"
        try:
            prompts = Prompts.from_names(findings) if head == "prompts" else None
            return CTCLIPMultiAbnormalityModel(path, head=head, dropout=config.dropout, new_head=new, prompts=prompts)
        except FileNotFoundError as error:
            remedy = f"or name another file with --ctclip-path ({DEMO_PATH} tries the pipeline)"
            raise TrainingError(f"{error}; {remedy}") from error
    attention = None if config.use_attention == "none" else config.use_attention
    try:
        model = CTCLIPMultiAbnormalityModel(
            None, config.model, attention=attention, pretrained=config.pretrained, dropout=config.dropout,
            backbone_weights=config.backbone_weights, head=config.head, tokens=config.tokens,
            windows=config.windows and [name.strip() for name in config.windows.split(",")],
            slice_spacing=config.slice_spacing, slice_size=config.slice_size, feature_stride=config.feature_stride,
            stem_stride=config.stem_stride, crop=config.crop, test_crops=config.test_crops,
        )  # fmt: skip
    except CheckpointError:
        raise
    except ValueError as error:
        raise TrainingError(f"--model: {error}; or 'ctclip'") from error
    if config.adapt == "lora":
        targets = [name.strip() for name in config.lora_targets.split(",")]
        try:
            model.add_lora(config.lora_rank, config.lora_alpha, config.lora_dropout, targets)
        except ValueError as error:
            raise TrainingError(f"--adapt lora: {error}, such as --adapt last:2") from error
    if model.is_video:
        low, high = model.backbone.window[:2].tolist()
        if config.window_jitter >= (high - low) / 2:
            raise TrainingError(f"--window-jitter is {config.window_jitter:g}, expected below {(high - low) / 2:g} HU, "
                                f"half of the window from {low:g} to {high:g}")  # fmt: skip
        return model
    if (wanted := config.train_slices) is not None and wanted > model.n_slices:
        raise TrainingError(f"--train-slices is {wanted}, expected at most {model.n_slices}, which a volume has")
    model.train_slices = wanted
    return model


def check_voxels_available(config: TrainingConfig, data_dir: Path, volumes: Sequence[Volume]) -> None:
    """Raises TrainingError where the run would read voxels of volumes that were streamed and have no file any more."""
    wanted = {}
    if config.frozen_epochs < config.epochs:
        wanted["unfrozen epochs"] = "add --freeze-backbone"
    for flag, given in (("--augment", config.augment), ("--window-jitter", config.window_jitter)):
        if given:
            wanted[flag] = f"leave {flag} out"
    lost = sum(volume.signature is not None for volume in volumes)
    if lost and wanted:
        raise TrainingError(
            f"{data_dir}: found {lost} of {len(volumes)} volumes without a file (streamed, only their codes are left), "
            f"expected files, because {' and '.join(wanted)} read voxels; {' and '.join(wanted.values())}, or fetch "
            f"the files with {FETCH_COMMAND} train"
        )
