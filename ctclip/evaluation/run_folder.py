"""A run's folder: which run is the newest, what its files hold, and which files an evaluation leaves there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctclip.config import CALIBRATION_FILE, PHANTOM_ENCODER_NOTE, flag_of, mistyped
from ctclip.data.cohort import read_metadata
from ctclip.data.ct_rate import metadata_path
from ctclip.errors import UserError
from ctclip.evaluation.calibration import Calibration, counts_at, fit_calibration, load_calibration
from ctclip.evaluation.figures import EVALUATION_FIGURES, TRAINING_CURVES
from ctclip.evaluation.tables import VolumeTable, read_labels, read_predictions, tuning_rows
from ctclip.fileio import check_writable, locked, naming, parse_json, read_json
from ctclip_model import (
    WRITTEN,
    CheckpointError,
    check_written,
    list_written,
    listing,
    saved_config,
    written_files,
)

# What an evaluation leaves in its folder. Training removes them when the weights that they are about are replaced.
APPLIED_FILES = ("predictions_calibrated.csv", "predictions_mapped.csv")
PAGE = "report.html"
REPORT_TEXT = "report.txt"
PICTURES = (PAGE, *EVALUATION_FIGURES)
RESULT_FILES = ("metrics.json", REPORT_TEXT, "per_label.csv", CALIBRATION_FILE, *APPLIED_FILES, *PICTURES)
TABLES = ("predictions.csv", "labels.csv")
# What training leaves; the best weights with the tables that belong to them.
BEST_FILES = ("model.safetensors", "config.json", "tuning_predictions.csv", "tuning_labels.csv")
RECORDS = ("run.json", "log.jsonl")
ELSEWHERE = "change --output-dir (of ctclip_evaluation.py)"  # which evaluates a run for every other command too
LOCK = ".lock"  # held by the process that trains, or writes an evaluation


RECORD_TYPES = {
    "config": (dict,), "data_dir": (str, type(None)), "phantom": (bool,), "phantom_encoder": (bool,),
    "published": (bool,), "volumes": (dict,), "patients": (dict,), "versions": (dict,), "read_as": (dict,),
    "left_out": (int, list), "ensemble": (dict,), "labels": (list,), "held_out_patients": (list,),
}  # fmt: skip


class RunError(UserError):
    """A run's folder that is missing, damaged, or not to be written to."""


def newest_run() -> Path:
    """The run folder under results/ that was written to last, by the times of its log.jsonl and run.json. What another
    program calls run.json makes no run."""
    runs = [path.parent for path in Path("results").glob("*/run.json") if is_run(path.parent)]
    written = [run / name for run in runs for name in RECORDS if (run / name).is_file()]
    if not written:
        raise RunError("results: found no run, expected a folder with run.json; train one with "
                       "'python ctclip_training.py --mode quick_test', name one elsewhere with --checkpoint, or give "
                       "--predictions and --labels")
    return max(written, key=lambda path: path.stat().st_mtime).parent


def is_run(folder: Path) -> bool:
    """Whether its run.json is training's: listed as such or, before 0.7, with keys that all versions wrote."""
    if "run.json" in written_files(folder):
        return True
    with suppress(OSError, ValueError):
        record = read_json(folder / "run.json")
        return isinstance(record, dict) and isinstance(record.get("config"), dict) and "phantom" in record
    return False


def check_output_folder(folder: Path, *names: str, own: Path | None = None) -> None:
    """Raises, before any work, where these files cannot be written to a folder: a run's other than `own`, whose tables
    must not be replaced by others; files of the same names that are the user's; a place that cannot be written."""
    if (folder / "run.json").is_file() and (own is None or own.resolve() != folder.resolve()):
        raise RunError(f"{folder}: found a run, whose tables others would replace, expected another folder; "
                       f"{ELSEWHERE}")
    check_writable(folder, ELSEWHERE)
    check_names(folder, *names)


def own_files(folder: Path) -> dict[str, str]:
    """{name: SHA-256 or ""} of a folder's files that this project wrote. Versions before 0.7 kept no list: what then
    goes by the name of a run's or an evaluation's file is one."""
    if (folder / WRITTEN).is_file():
        return written_files(folder)
    names: tuple[str, ...] = ()
    if (folder / "run.json").is_file():
        names = (*RECORDS, *BEST_FILES, *TABLES, *RESULT_FILES, TRAINING_CURVES)
    elif all((folder / name).is_file() for name in ("metrics.json", "per_label.csv", CALIBRATION_FILE, PAGE)):
        names = (*RESULT_FILES, TRAINING_CURVES)
    with suppress(CheckpointError):
        saved_config(folder)
        names = (*names, *BEST_FILES[:2])
    return {name: "" for name in names if (folder / name).exists()}


def check_names(folder: Path, *names: str) -> None:
    """Raises RunError where a file of that name is there that this project has not written."""
    own = own_files(folder)
    if folders := [name for name in names if (folder / name).is_dir()]:
        raise RunError(f"{folder / folders[0]}: found a folder, expected a file or none, as a file is written there; "
                       "move it, or choose another folder")
    if foreign := [name for name in names if name not in own and os.path.lexists(folder / name)]:
        raise RunError(f"{folder}: found {', '.join(foreign[:3])}, which no run or evaluation wrote, expected no such "
                       "file, as it would be replaced; move what is yours, or choose another folder")


@contextmanager
def writing(folder: Path, *names: str) -> Iterator[None]:
    """Around writing, replacing or removing these files of a folder: only names in the folder's list ever are. They
    are listed with the digest by which readers know that nothing has changed them since. Raises RunError as
    `check_names`, before anything is written."""
    check_names(folder, *names)
    with naming(folder / WRITTEN):
        list_names(folder)
        with listing(folder, *names):
            yield


def list_names(folder: Path, *names: str) -> None:
    """Lists names without a digest, as ours to replace; and what a version that kept no list has left."""
    earlier = {} if (folder / WRITTEN).is_file() else own_files(folder)
    if entries := earlier | dict.fromkeys(names, ""):
        list_written(folder, dict(entries))


def alone_in(folder: Path) -> AbstractContextManager[None]:
    """Around an evaluation's writing: two at once would leave files of both, and one beside training those of weights
    that are replaced meanwhile. Raises UserError where another process trains or evaluates in the folder."""
    busy = f"{folder}: found another process that trains or evaluates in it, expected none; wait for its end"
    return locked(folder / LOCK, f"{busy}, or choose another --output-dir")


def foreign_files(folder: Path) -> list[str]:
    """Names in a folder that is to become a run's, or was about to, which this project has not written."""
    own = {*own_files(folder), WRITTEN, LOCK}
    names = [path.name for path in folder.iterdir() if path.name not in own and not is_left_over(path, own)]
    return sorted(name for name in names if name[0] != ".")  # .gitkeep, .DS_Store: no name of ours begins so


def is_left_over(path: Path, own: Collection[str]) -> bool:
    """Whether a process was killed while it wrote one of these files under this temporary name."""
    return (found := re.fullmatch(r"(.+)\.\d+\.tmp", path.name)) is not None and found[1] in own


def results_folder(run: Path, data_dir: str | Path | None) -> Path:
    """Where results of a run go by default: into its folder; on a cohort other than its own, into a folder in there."""
    return run if data_dir is None else run / f"on_{Path(data_dir).resolve().name}"


def run_record(run: Path) -> dict:
    """Content of a run's run.json, or {} where there is none. What is read of it has the types that were written."""
    path = run / "run.json"
    if not path.is_file():
        return {}
    check_written(path)
    try:
        record = read_json(path)
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: found no JSON object ({error}), expected a run's record; restore it") from error
    if not record.keys() & RECORD_TYPES.keys():
        raise RunError(f"{path}: found another program's record, expected a run's; name a folder that training wrote")
    wrong = [key for key, kinds in RECORD_TYPES.items() if key in record and type(record[key]) not in kinds]
    if wrong := wrong or mistyped(record.get("config", {})):
        found = f"{path}: found a value of another kind for {wrong[0]}"
        raise RunError(f"{found}, expected what training wrote; restore it")
    return record


def encoder_note(record: Mapping) -> str | None:
    """What to say of a run whose encoder was trained on phantoms, on data that are none."""
    return PHANTOM_ENCODER_NOTE if record.get("phantom_encoder") and not record.get("phantom") else None


def differing_settings(this: tuple[str, Mapping], other: tuple[str, Mapping]) -> dict[str, list[str]]:
    """{what: [of this run, of the other]} of two runs, each as (its table of predictions, run.json): their names, and
    the flags whose values differ. Of paths only the last part: reports are handed on."""
    configs = [record.get("config", {}) for _, record in (this, other)]
    names = [Path(source).parent.name for source, _ in (this, other)]
    found = {"run": names} if all(names) else {}
    for name in dict.fromkeys(name for config in configs for name in config if name != "cache_dir"):
        values = [config.get(name) for config in configs]
        if values[0] != values[1]:
            found[flag_of(name)] = [_setting_text(value) for value in values]
    return found


def _setting_text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {True: "on", False: "off", None: "default"}[value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def is_finished(run: Path) -> bool:
    """Whether a run has come to its end, the last epoch or early stopping: nothing is left to be resumed."""
    return run_record(run).get("status", "running") != "running"


def from_working_folder(
    record: Mapping, path: str | None, exists: Callable[[Path], bool] = Path.exists
) -> str | None:
    """A path of a run's record, which is as it was given: where there is nothing here, as seen from the folder that the
    run was started in, if there is something."""
    there = Path(str(record.get("working_folder") or ""), path or "")
    return str(there) if path and not exists(Path(path)) and exists(there) else path


def read_history(path: str | Path) -> list[dict] | None:
    """Epochs of a log.jsonl, or None where there is none; a last line cut off by an interrupted run is skipped."""
    path = Path(path)
    if not path.is_file():
        return None
    check_written(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: found no text ({error}), expected a line for each epoch; restore it") from error
    epochs = []
    for number, line in enumerate(lines, 1):
        try:
            epoch = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise RunError(f"{path}, line {number}: found no JSON ({error}), expected one epoch; remove that "
                           "line") from error
        if not isinstance(epoch, dict) or (wrong := [key for key in epoch if not _fits_history(key, epoch[key])]):
            found = f"a value of another kind for {wrong[0]}" if isinstance(epoch, dict) else "no JSON object"
            raise RunError(f"{path}, line {number}: found {found}, expected one epoch; remove that line")
        epochs.append(epoch)
    return epochs


def _fits_history(key: str, value: object) -> bool:
    """Whether an epoch may have this: numbers, which curves are drawn of, and the name of its stage."""
    if key in ("stage", "best"):
        return isinstance(value, str if key == "stage" else bool)
    if key == "epoch":
        return type(value) is int and 0 < value < 10**6
    return value is None or (isinstance(value, (int, float)) and not abs(value) > 1e300)


def run_calibration(run: Path, **chosen: Any) -> Calibration | None:
    """The calibration stored with a run, for single volumes; None where it has neither one nor tuning patients.

    It is fitted now, on the run's tuning patients, where there is none yet, where the stored one is for merged scans
    or patients (`--unit`), and where `chosen` names a method, objective or prevalence, as in fit_calibration; what is
    not chosen now is as it was chosen for the stored one. Raises RunError where that cannot be done.
    """
    path = run / CALIBRATION_FILE
    stored = load_calibration(path) if path.is_file() else None
    if stored and stored.unit == "volume" and not chosen:
        return stored if stored.counts is not None else _counted(stored, run_tuning(run))
    if (tuning := run_tuning(run)) is None:
        if chosen:
            raise RunError(f"{run}: found no tuning_predictions.csv, expected the tuning patients of a run to fit "
                           f"{', '.join(chosen)} on; name the run where it was trained")
        return None
    kept = stored.chosen if stored else {}
    if stored and stored.prevalence is None and stored.shift.any() and "prevalence" not in chosen:
        raise RunError(f"{path}: found a calibration for another prevalence that an earlier version did not store, "
                       "expected it to fit thresholds anew; evaluate the run again")
    rows = tuning_rows(tuning)
    return fit_calibration(rows.labels, rows.probabilities, rows.patients, findings=rows.findings, **(kept | chosen))


def _counted(stored: Calibration, tuning: tuple[VolumeTable, VolumeTable] | None) -> Calibration:
    """With the counts that an earlier version did not store, where the tuning patients are there."""
    if tuning is None:
        return stored
    rows = tuning_rows((tuning[0].select(stored.findings), tuning[1].select(stored.findings)))
    return replace(stored, counts=counts_at(rows.labels, rows.probabilities, stored.thresholds))


def run_tuning(run: Path) -> tuple[VolumeTable, VolumeTable] | None:
    """(predictions, labels) of a run's tuning patients, or None."""
    if not (run / "tuning_predictions.csv").is_file():
        return None
    predictions = read_predictions(run / "tuning_predictions.csv", run_record(run).get("labels"))
    return predictions, read_labels(run / "tuning_labels.csv", predictions.findings)


def run_metadata(data_dir: str | Path | None) -> dict[str, dict[str, str]] | None:
    """Rows of the metadata table of a cohort's unseen split, for subgroups; None where there is none."""
    if data_dir is None or not (path := Path(data_dir, metadata_path("valid"))).is_file():
        return None
    return read_metadata(path)
