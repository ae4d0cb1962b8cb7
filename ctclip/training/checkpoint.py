"""What a run leaves behind and goes on from: resume states and best weights, written so that no moment of being killed,
and no full disk, costs more than the time since the last save.

    <run>/state/0012-000340.pt    340 steps after epoch 12; the newest two are kept
    <run>/model.safetensors, config.json      the best weights so far, complete
"""

from __future__ import annotations

import errno
import math
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ctclip.card_file import discard_card
from ctclip.config import TrainingError
from ctclip.data.cohort import ids_of
from ctclip.data.feature_cache import encoder_digest
from ctclip.errors import UserError
from ctclip.evaluation.run_folder import BEST_FILES, RECORDS, is_left_over, own_files, writing
from ctclip.evaluation.tables import write_table
from ctclip.fileio import DISK_FULL, replacing
from ctclip.training.optimization import TrainableParameters, rng_state, set_rng_state, swapped_in
from ctclip.training.run import TrainingJob
from ctclip_model import check_written

KEEP = 2  # states: the one before the newest serves when the newest turns out damaged
STATE_NAME = re.compile(r"\d{4}-\d{6}\.pt")
FORMAT = 3  # of the states

# CRC-32 of anything followed by its own CRC-32, least significant byte first. States end in theirs.
INTACT = 0x2144DF1C


class StateError(UserError):
    """A state that cannot be written or read. One line: what was found, what was expected, what to do."""


# ------------------------------------------------------------------ state files


class _Recorder:
    """A file that remembers its OSError, which torch.save turns into a RuntimeError without a reason, and the CRC-32
    of what was written."""

    def __init__(self, file: IO[bytes]):
        self.file, self.flush = file, file.flush
        self.error: OSError | None = None
        self.crc32 = 0

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def _save(content: dict, path: Path) -> None:
    with open(path, "wb") as file:
        recorder = _Recorder(file)
        try:
            torch.save(content, cast(IO[bytes], recorder))
        except RuntimeError as error:
            raise recorder.error or error from error
        file.write(recorder.crc32.to_bytes(4, "little"))  # torch.load does not mind


def size_of(content: Any) -> int:
    """Bytes of all tensors in nested dicts and lists; the rest is small."""
    if isinstance(content, Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return sum(size_of(part) for part in parts if isinstance(part, (Tensor, dict, list)))  # few of 20,000 names


@contextmanager
def full_disk_explained(folder: Path, what: str, size: int) -> Iterator[None]:
    """Around writing `size` bytes: a full disk becomes a StateError that says what is kept and what to free."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number is None and (found := re.search(r"os error (\d+)", str(error))):
            number = int(found[1])
        if number not in DISK_FULL:
            raise
        free = f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB free"
        reason = "a file-size limit is in force" if number == errno.EFBIG else free
        kept = states(folder)
        good = f"the last good state is {kept[-1]}" if kept else "no state has been saved yet"
        raise StateError(
            f"{what} could not be written to {folder} ({reason}), expected room for {math.ceil(size / 1e6):,} MB; "
            f"{good}. Free space there (old runs under {folder.parent}, caches) and go on with --resume {folder}"
        ) from error


def states(folder: Path) -> list[Path]:
    """Saved states of a run, oldest first."""
    return sorted(path for path in (folder / "state").glob("*.pt") if STATE_NAME.fullmatch(path.name))


def save_state(folder: Path, epoch: int, step: int, content: dict) -> Path:
    """Writes the state of `step` steps after `epoch` whole epochs, then removes states too old to be needed."""
    path = folder / "state" / f"{epoch:04d}-{step:06d}.pt"
    with full_disk_explained(folder, "The training state", size_of(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            _save(content, temporary)
    for old in states(folder)[:-KEEP]:
        old.unlink()
    return path


def load_newest(folder: Path, report: Callable[[str], None]) -> dict | None:
    """The newest intact state, or None where none was saved yet. A damaged one is reported and the one before is used.

    Raises StateError when there are states and none is intact.
    """
    found = states(folder)
    for path in reversed(found):
        problem, crc32 = "wrong checksum", 0  # the checksums inside do not cover names, offsets and sizes
        try:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    crc32 = zlib.crc32(chunk, crc32)
        except OSError as error:
            problem = str(error)
        if crc32 == INTACT:
            return torch.load(path, map_location="cpu", weights_only=True)
        report(f"{path} is damaged ({problem}); using the state before it")
    if found:
        raise StateError(
            f"{folder / 'state'}: found {len(found)} states, all damaged, expected an intact one; start "
            "a new run: the code cache makes its frozen stage cheap"
        )
    return None


# ------------------------------------------------------------------ the state of a run


@dataclass
class Progress:
    """Where a run is, and what the epoch in progress has added up so far."""

    epoch: int = 0
    step: int = 0  # of this epoch
    loss_sum: float = 0.0
    known: int = 0  # labels that they are of
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    skipped_names: list[str] = field(default_factory=list)  # volumes of these
    seconds: float = 0.0
    predicted: dict[int, Tensor | None] = field(default_factory=dict)  # validation volumes, index -> logits
    bad_epochs: int = 0  # in a row, significantly worse than the best
    stopped: str = ""  # why the run ended before its last epoch


@dataclass
class BestEpoch:
    """The best epoch so far. `tensors` holds its weights until they are written to the run's folder."""

    score: float = -math.inf
    epoch: int = 0
    names: list[str] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # of these validation volumes
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class AveragedEpochs:
    """Mean of the weights after the epochs of --average-epochs that are over."""

    epochs: list[int] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    compared: bool = False  # with the best epoch, on the validation patients
    auroc: float | None = None  # macro, there; None where no finding has both classes
    kept: bool = False  # as the run's weights

    def add(self, epoch: int, tensors: dict[str, Tensor]) -> None:
        """`tensors`: the same names for every epoch. What is no floating-point number, BatchNorm's counts, is the last
        epoch's."""
        self.epochs.append(epoch)
        for name, value in tensors.items():
            new = value.detach().cpu()
            mean = self.tensors.setdefault(name, new.clone())
            mean.copy_(torch.lerp(mean, new, 1 / len(self.epochs)) if mean.is_floating_point() else new)


@dataclass
class TrainingState:
    """All that changes while a run trains. With the fields that are for this process only at the end."""

    trainable: TrainableParameters
    initial_encoder_digest: str  # of the weights that the run began with
    sources: dict[str, str] = field(default_factory=dict)  # volume -> digest of its file and labels: `steps.check_data`
    progress: Progress = field(default_factory=Progress)
    best: BestEpoch = field(default_factory=BestEpoch)
    average: AveragedEpochs = field(default_factory=AveragedEpochs)
    history: list[dict] = field(default_factory=list)  # lines of log.jsonl

    epoch_start: float = field(default_factory=time.perf_counter)
    last_save: float = field(default_factory=time.perf_counter)
    trained_volumes: int = 0

    def save_is_due(self, job: TrainingJob) -> bool:
        """On the main rank, whose clock counts."""
        minutes = (time.perf_counter() - self.last_save) / 60
        return job.run.ranks.is_main and minutes >= job.run.machine.save_minutes


def save_checkpoint(job: TrainingJob, state: TrainingState) -> None:
    """Everything that the next step depends on. Of the model, what training has changed; the rest is in the weights
    file that the run began with."""
    run, trainable, progress = job.run, state.trainable, state.progress
    progress.seconds = time.perf_counter() - state.epoch_start
    loss_sum, known = run.ranks.all_reduce_sum(progress.loss_sum, progress.known)
    rng_states = run.ranks.all_gather(rng_state(run.device))
    run.exchange_records()
    if run.ranks.is_main:
        content = {
            "format": FORMAT,
            "initial_encoder_digest": state.initial_encoder_digest,
            "sources": state.sources,
            "progress": asdict(progress) | {"loss_sum": loss_sum, "known": known},
            "best": dict(vars(state.best)),
            "average": dict(vars(state.average)),
            "history": state.history,
            "unfrozen_for_epoch": trainable.epoch,
            "tensors": trainable.tensors(),
            "optimizer": trainable.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "ema": {"steps": trainable.ema.steps, "tensors": trainable.ema.averages},
            "rng": rng_states,
            "micro_batch": run.micro_batch,
            "checkpointing": run.checkpointing,
            "criterion": job.criterion.state_dict(),
            "failures": run.failures,
            "readings": run.readings,
            "volumes": {name: split.names for name, split in job.splits.items()},
        }
        save_state(run.folder, progress.epoch, progress.step, content)
    state.last_save = time.perf_counter()


def resume_or_start(job: TrainingJob) -> TrainingState:
    """The newest intact state of the run's folder, restored, or that of a new run."""
    run, folder = job.run, job.run.folder
    state = TrainingState(TrainableParameters(run, job.model), encoder_digest(job.model))
    if run.ranks.is_main:
        _remove_left_overs(folder)
        for name in BEST_FILES:
            check_written(folder / name)
    content = load_newest(folder, run.log)
    if content is not None and content.get("format") != FORMAT:
        raise StateError(
            f"{folder}: found states of format {content.get('format', 1)}, expected {FORMAT}; finish this run with "
            "the version that began it, or start a new one"
        )
    found = None if content is None else (content["progress"]["epoch"], content["progress"]["step"])
    if len(set(run.ranks.all_gather(found))) > 1:
        raise TrainingError(f"{folder} holds different states on different machines; put it on a shared file system")
    if content is not None:
        restore(content, job, state)
        progress = state.progress
        going_on = f"going on after epoch {progress.epoch} of {run.config.epochs} and {progress.step} steps"
        if progress.epoch == run.config.epochs:
            going_on = f"all {progress.epoch} epochs are done"
        run.log(f"State found: {progress.stopped or going_on}")
        return state
    torch.manual_seed(run.config.seed + run.ranks.rank)  # every rank has its own dropout masks
    if (folder / "run.json").is_file():
        run.log("No state has been saved yet: starting from the beginning")
    return state


def _remove_left_overs(folder: Path) -> None:
    """What processes that were killed while saving have left, under names of their own."""
    own = own_files(folder)
    for path in (*folder.glob("*.tmp"), *folder.glob("state/*.tmp")):
        if is_left_over(path, own) or (path.parent != folder and STATE_NAME.match(path.name)):
            path.unlink()


def restore(content: dict, job: TrainingJob, state: TrainingState) -> None:
    """Puts back what `save_checkpoint` wrote."""
    run, trainable = job.run, state.trainable
    if content["initial_encoder_digest"] != state.initial_encoder_digest:
        raise TrainingError(
            f"--resume: the backbone's weights are not those that {run.folder} began with; expected the same file "
            "(--ctclip-path names it); or start a new run"
        )
    state.progress, state.best = Progress(**content["progress"]), BestEpoch(**content["best"])
    state.average = AveragedEpochs(**content.get("average", {}))
    state.sources = content["sources"]
    if state.best.epoch and not state.best.tensors and not (run.folder / BEST_FILES[0]).is_file():
        raise StateError(
            f"{run.folder}: found no {BEST_FILES[0]}, expected the weights of epoch {state.best.epoch}, the best so "
            "far; bring them back, or start a new run"
        )
    state.history = content["history"]
    _restore_split(content["volumes"], job)
    job.criterion.load_state_dict(content["criterion"])
    trainable.unfreeze(content["unfrozen_for_epoch"])
    model_tensors = job.model.state_dict(keep_vars=True)
    with torch.no_grad():
        for own, saved in ((model_tensors, content["tensors"]), (trainable.ema.averages, content["ema"]["tensors"])):
            for name, value in saved.items():
                own[name].copy_(value)
    trainable.ema.steps = content["ema"]["steps"]
    trainable.optimizer.load_state_dict(content["optimizer"])
    if content["scaler"] and run.scaler.is_enabled():  # empty when the run began on a device without loss scaling
        run.scaler.load_state_dict(content["scaler"])
    set_rng_state(run.device, content["rng"][run.ranks.rank % len(content["rng"])])
    if run.machine.micro_batch is None:
        run.micro_batch = content["micro_batch"]
    if run.machine.gradient_checkpointing == "auto" and content["checkpointing"]:
        run.enable_checkpointing(job.model)
    run.failures, run.readings = content["failures"], content["readings"]
    if not run.ranks.is_main:  # the sums of the epoch in progress are those of all ranks
        state.progress.loss_sum, state.progress.known = 0.0, 0


def _restore_split(volumes: dict[str, list[str]], job: TrainingJob) -> None:
    """The split by name, whatever the folder has gained or lost by now: split anew, a cohort with one volume more or
    less would put most patients elsewhere."""
    here = {volume.name: volume for volume in job.cohort.volumes}
    wanted = [name for names in volumes.values() for name in names]
    gone = [name for name in wanted if name not in here]
    if gone:
        raise TrainingError(
            f"--resume: found {len(wanted) - len(gone)} of the {len(wanted)} volumes of {job.run.folder} in "
            f"{job.data_dir} (first missing: {gone[0]}), expected all; bring them back, or start a new run"
        )
    for name, split in job.splits.items():
        split.volumes = [here[each] for each in volumes[name]]


def save_best(job: TrainingJob, best: BestEpoch) -> None:
    """The best weights and the validation predictions that belong to them, complete; `best` no longer has to carry
    them. What was computed from earlier weights is removed, before the weights are replaced."""
    folder, model = job.run.folder, job.model
    tensors, best.tensors = best.tensors, {}
    if not job.run.ranks.is_main:
        return
    stale = [name for name in own_files(folder) if name not in (*RECORDS, *BEST_FILES)]
    labels = {volume.name: volume.labels for volume in job.validation.volumes}
    table, ids = np.stack([labels[name] for name in best.names]).astype(int), ids_of(job.validation.volumes)
    explained = full_disk_explained(folder, "The best weights", size_of(model.state_dict()))
    with explained, writing(folder, *BEST_FILES, *stale):
        for name in (*stale, "tuning_predictions.csv"):
            (folder / name).unlink(missing_ok=True)
        discard_card(folder)
        with swapped_in(model, tensors):
            model._save_pretrained(folder)
        for name, values in (("tuning_labels.csv", table), ("tuning_predictions.csv", best.logits.sigmoid().numpy())):
            write_table(folder / name, best.names, values, ids, findings=model.labels)
