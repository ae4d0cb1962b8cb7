"""Scans in, table out: NIfTI, .mha and DICOM -> calibrated probabilities, as a DataFrame, a CSV or a results.json.

    from run_task2 import predict
    table = predict("scans", "results/RUN")        # a DataFrame: one row for each scan, one column for each finding

`predict_scans` gives the table with what belongs to it: the scans that could not be read, the heat maps.
"""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

import ctclip
from ctclip.cli import OUT_OF_MEMORY
from ctclip.config import CALIBRATION_FILE, PHANTOM_ENCODER_NOTE, SYNTHETIC_NOTE
from ctclip.data.cohort import Volume
from ctclip.data.ct_rate import PREVALENCE
from ctclip.data.geometry import place_volume
from ctclip.data.loading import Batch, notes_of
from ctclip.data.preprocessing import PREPROCESSING_VERSION
from ctclip.data.tables import (
    CALIBRATED,
    CALL_PREFIX,
    MAPPED,
    NAME_COLUMN,
    SCALE_COLUMN,
    SCALES,
    SUMMARY_COLUMN,
    UNCALIBRATED,
    WARNING_COLUMN,
)
from ctclip.evaluation.calibration import Calibration, few_patients_note, load_calibration, parse_calibration
from ctclip.evaluation.metrics import EvaluationError
from ctclip.evaluation.run_folder import encoder_note, newest_run, run_calibration, run_record, run_tuning
from ctclip.evaluation.saved_ensemble import answer_digests, saved_ensemble
from ctclip.evaluation.tables import VolumeTable
from ctclip.evaluation.thresholds import label_rates
from ctclip.fileio import check_replaceable, replacing
from ctclip.inference.contributions import Contributions
from ctclip.inference.decisions import Decision, decide, decide_at, decision_columns
from ctclip.inference.fusion import FusedModels, load_models
from ctclip.inference.heat_maps import check_heat_maps, parse_labels, write_scan_heat_maps
from ctclip.inference.part_files import Failures, PartFiles, ScanRow
from ctclip.inference.scan_maps import scan_maps
from ctclip.inference.scan_page import ScanPage, is_scan_page
from ctclip.inference.scans import PredictionError, Scan, find_scans
from ctclip.memory import out_of_memory
from ctclip_model import ABNORMALITIES, PHANTOM_WEIGHTS, Prompts

TRAINED_ON_PHANTOMS = f"Model trained on phantoms. {SYNTHETIC_NOTE}"
Transform = Callable[[np.ndarray], np.ndarray]  # the model's probabilities (N, labels) -> the answers


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for some scans, and what became of each scan."""

    table: pd.DataFrame  # (scans that could be read, labels), index VolumeName
    scans: list[Scan]  # all that were found, in order
    failures: list[tuple[str, str]]  # (name, reason) of those that have no answer, and of folders not looked into
    warnings: dict[str, str]  # {name: what a reader of its answer should know}, of scans that were read
    heat_maps: list[Path]  # files that were written: .nii.gz, .png and .json
    description: str  # what the numbers are
    scale: str  # what SCALE_COLUMN says of them
    calibration: Calibration | None  # by which they were made of the model's own
    decisions: dict[str, list[Decision]]  # of each scan in the table, on its scale
    note: str | None  # disclaimer to show with them


def predict(
    scans: str | Path | Sequence[str | Path], checkpoint: str | Path | None = None, **options: Any
) -> pd.DataFrame:
    """The table of `predict_scans`, whose options it takes: probabilities (scans, labels), indexed by VolumeName.

    A scan that cannot be read has no row. Which, why, and what else should be known about a scan is warned of, and in
    the result of `predict_scans`.
    """
    told: list[str] = []
    predictions = predict_scans(scans, checkpoint, on_note=told.append, **options)
    for note in (*told, *(f"{name}: {reason}" for name, reason in predictions.failures)):
        warnings.warn(note, stacklevel=2)
    return predictions.table


def predict_scans(
    scans: str | Path | Sequence[str | Path],
    checkpoint: str | Path | None = None,
    *,
    form: str = CALIBRATED,
    objective: str | None = None,
    calibration: str | None = None,
    prevalence: Mapping[str, float] | None = None,
    prompts: Prompts | None = None,
    explain: str | None = None,
    explain_dir: str | Path = "results/explain",
    page: ScanPage | None = None,
    device: str | None = None,
    workers: int | None = None,
    assume_hu: bool = False,
    parts: PartFiles | None = None,
    on_start: Callable[[list[Scan], str], object] = lambda scans, scale: None,
    on_scan: Callable[[str, np.ndarray], object] = lambda name, row: None,
    on_note: Callable[[str], object] = lambda note: None,
) -> Predictions:
    """Probabilities of scans; one volume in memory while the next is read. A scan that fails costs only itself. They
    go through the model one by one: an answer does not depend on which others there are.

    Args:
        scans: .nii, .nii.gz or .mha files, DICOM series (a folder, or any file of one), or folders of all these. Voxels
            in HU, spacing and orientation in the header. `find_scans` says what they are called.
        checkpoint: the folder of a run or of a saved ensemble (default: the newest under results/), or a CT-CLIP file
            with a head or a text tower.
        form: "calibrated" (the run's calibration, where it has one), "uncalibrated", or "mapped" (not probabilities:
            rescaled so that the run's tuned thresholds lie at 0.5; the order of scans is kept).
        objective, calibration, prevalence: of Settings, where thresholds and calibration are to be fitted anew on the
            run's tuning patients; None: as they were chosen for the run's evaluation.
        prompts: findings of your own (`ctclip.inference.prompts.read_prompts`), for a CT-CLIP file with its text tower.
        explain: labels separated by commas, or "all": heat maps of them go to `explain_dir`.
        page: gets every scan that has an answer, with the evidence for all findings, but of an ensemble.
        device: cpu, cuda, cuda:1, ...; default cuda where there is one.
        workers: threads that read ahead.
        assume_hu: take voxels for HU by the header, whatever they look like.
        parts: keeps each row on the disk at once, takes up those of an earlier start, and divides the scans among the
            processes of its shard; each of a group's gets what all have done, one of --shard its own part.
        on_start: called with all scans, and what SCALE_COLUMN says of their answers, once the model is loaded.
        on_scan: called with each scan's name and row as soon as there is one.
        on_note: called with a line for each scan that has a warning, for what was skipped in folders, and for a
            calibration fitted on few patients.

    Raises:
        UserError, CheckpointError, PromptError, FileNotFoundError: one line each, before anything is computed.
    """
    if form not in SCALES:
        raise ValueError(f"form is {form!r}, expected one of {', '.join(SCALES)}")
    failures: Failures = []
    is_main = parts is None or parts.shard.ranks.is_main
    note_once = on_note if is_main else lambda note: None
    found = find_scans(scans, note_once, lambda folder, reason: failures.append((folder, reason)))
    checkpoint = Path(checkpoint) if checkpoint else newest_run()
    if explain is not None:
        check_explainable(checkpoint)
    chosen = {"objective": objective, "method": calibration, "prevalence": prevalence}
    fitted = _calibration_for(form, checkpoint, {key: value for key, value in chosen.items() if value is not None})
    model = load_models(checkpoint, device, prompts)
    labels = [] if explain is None else parse_labels(explain, model.labels)
    check_heat_maps([Path(explain_dir, scan.stem) for scan in found], labels)
    note = model_note(checkpoint, *(each.derived_from for each in model.models))
    answers = AnswerForm.of(form, None if fitted is None or prompts else fitted.select(model.labels))
    left = found
    if parts is not None:
        settings = {"assume_hu": assume_hu, "heat_maps": labels, "prompts": prompts and asdict(prompts), "note": note}
        left = parts.start(settings | model_identity(checkpoint, model) | answers.content(form), found)
    heat_maps = _HeatMaps(model, labels, Path(explain_dir), answers, note, page)
    on_row = None if parts is None else parts.append
    predictor = _ScanPredictor(left, assume_hu, answers, heat_maps, on_scan, on_note, failures, on_row)
    on_start(found, answers.scale)
    if answers.calibration is not None and (few := few_patients_note(answers.calibration.n_patients)):
        note_once(few)
    with heat_maps:
        predictor.predict(model, workers)
    rows = predictor.rows
    if parts is not None:
        rows, failures = parts.gather(found, failures)
    return predictions_of(rows, found, failures, model.labels, answers, note)


def model_identity(checkpoint: Path, model: FusedModels) -> dict[str, Any]:
    """What a model's probabilities follow from, beside the scan, for JSON; and what the run or file is called."""
    return {
        "checkpoint": checkpoint.resolve().name,
        "model": answer_digests(checkpoint),
        "findings": list(model.labels),
        "dtype": model.dtype.name,
        "device": next(model.models[0].parameters()).device.type,
        "software": [ctclip.__version__, PREPROCESSING_VERSION],
    }


def predictions_of(
    rows: Mapping[str, ScanRow], scans: list[Scan], failures: Failures, labels: Sequence[str], answers: AnswerForm,
    note: str | None,
) -> Predictions:  # fmt: skip
    """What `rows` of `scans`, in their order, say as `answers`."""
    place = {scan.name: number for number, scan in enumerate(scans)}
    given = {name: answers.transform(row.probabilities[None])[0] for name, row in rows.items()}
    return Predictions(
        table=rows_table(given, labels),
        scans=scans,
        failures=sorted(failures, key=lambda failure: place.get(failure[0], -1)),  # folders first
        warnings={name: row.warning for name, row in rows.items() if row.warning},
        heat_maps=[Path(path) for row in rows.values() for path in row.heat_maps],
        description=answers.description,
        scale=answers.scale,
        calibration=answers.calibration,
        decisions={name: answers.decide(labels, row) for name, row in given.items()},
        note=note,
    )


def model_note(checkpoint: Path, *derived_from: str | None) -> str | None:
    """The disclaimer to show with what a model gives; `derived_from` is the model's, or those of an ensemble's."""
    record = run_record(checkpoint) if checkpoint.is_dir() else {}
    of_demo = PHANTOM_ENCODER_NOTE if PHANTOM_WEIGHTS in derived_from else None
    return TRAINED_ON_PHANTOMS if record.get("phantom") else encoder_note(record) or of_demo


def rows_table(rows: Mapping[str, np.ndarray], labels: Sequence[str]) -> pd.DataFrame:
    """{name of a scan: its row} as a table, in that order."""
    values = np.stack(list(rows.values())) if rows else np.zeros((0, len(labels)))
    return pd.DataFrame(values, index=pd.Index(list(rows), name=NAME_COLUMN), columns=list(labels))


def _calibration_for(form: str, checkpoint: Path, chosen: Mapping[str, Any]) -> Calibration | None:
    calibration = run_calibration(checkpoint, **chosen) if checkpoint.is_dir() else None
    if calibration is None and (form == MAPPED or chosen):
        flag = "--map-thresholds" if form == MAPPED else "--objective, --calibration and --prevalence"
        raise PredictionError(f"{checkpoint}: found no tuning patients, expected some to fit calibration and "
                              f"thresholds on; name a run, or leave {flag} out")
    return calibration


class AnswerForm(NamedTuple):
    """What makes the answers of the model's probabilities, what the answers are, for people and for SCALE_COLUMN, what
    makes those that heat maps show, which are never rescaled, and the run's calibration with its thresholds (labels,)
    on the answers' scale, where there are any."""

    transform: Transform
    description: str
    scale: str
    shown: Transform
    fitted: Calibration | None
    thresholds: np.ndarray | None

    @property
    def calibration(self) -> Calibration | None:
        """By which the answers were made of the model's own."""
        return None if self.scale == UNCALIBRATED else self.fitted

    @classmethod
    def of(cls, form: str, fitted: Calibration | None) -> AnswerForm:
        if fitted is None or form == UNCALIBRATED:
            thresholds = None if fitted is None else fitted.thresholds
            return cls(_unchanged, "uncalibrated probabilities", UNCALIBRATED, _unchanged, fitted, thresholds)
        if form == MAPPED:
            description = f"not probabilities: rescaled so that the tuned thresholds ({fitted.objective}) lie at 0.5"
            half = np.full(len(fitted.findings), 0.5)
            return cls(fitted.rescale_to_half, description, MAPPED, fitted.apply, fitted, half)
        description = f"calibrated probabilities ({fitted.method}, {fitted.n_patients} tuning patients)"
        return cls(fitted.apply, description, fitted.calibrated_scale, fitted.apply, fitted,
                   fitted.calibrated_thresholds)

    def content(self, form: str) -> dict[str, Any]:
        """From which `parse` makes the same, for JSON; `form` is what it was made with."""
        return {"form": form, "calibration": None if self.fitted is None else self.fitted.content()}

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> AnswerForm:
        fitted = content["calibration"]
        return cls.of(content["form"], None if fitted is None else parse_calibration(fitted))

    def decide(self, labels: Sequence[str], answers: np.ndarray) -> list[Decision]:
        """Of one scan's answers (labels,)."""
        return decide_at(labels, answers, self.thresholds, self.fitted)

    def decide_shown(self, labels: Sequence[str], probabilities: np.ndarray) -> list[Decision]:
        """Of one scan's probabilities by the model (1, labels), as heat maps show them."""
        shown = self.shown(probabilities)[0]
        return self.decide(labels, shown) if self.calibration is None else decide(labels, shown, self.calibration)


def _unchanged(probabilities: np.ndarray) -> np.ndarray:
    return probabilities


class _HeatMaps:
    """Writes the heat maps of each scan that has an answer, if labels are given, and puts it on the page, if there is
    one: in a thread, while the next scan is computed. In a `with` block, at whose end all are written; what fails there
    is raised by `write`, or then."""

    def __init__(
        self, model: FusedModels, labels: list[str], folder: Path, answers: AnswerForm, note: str | None,
        page: ScanPage | None,
    ):  # fmt: skip
        self.findings, self.labels, self.folder, self.answers, self.note = model.labels, labels, folder, answers, note
        self.page = page
        self.mapped = list(model.labels) if page is not None and len(model.models) == 1 else labels
        self.explain = [model.labels.index(label) for label in self.mapped]
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[object] | None = None

    def __enter__(self) -> _HeatMaps:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.thread.shutdown()
        if error is None:
            self._wait()

    def write(
        self, scan: Scan, voxels: torch.Tensor, row: ScanRow, contributions: Contributions | None,
        on_row: Callable[[ScanRow], object],
    ) -> None:  # fmt: skip
        """Calls `on_row` with the row and its files, once they are written. `contributions` are of `mapped`. Waits for
        the scan before: no more than one volume is held."""
        if contributions is None and self.page is None:
            on_row(row)
            return
        self._wait()
        self.pending = self.thread.submit(
            lambda: on_row(replace(row, heat_maps=tuple(map(str, self._write(scan, voxels, row, contributions)))))
        )

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
        self.pending = None

    def _write(
        self, scan: Scan, voxels: torch.Tensor, row: ScanRow, contributions: Contributions | None
    ) -> list[Path]:
        placement = place_volume(scan.path, voxels.shape[2:])
        decisions = self.answers.decide_shown(self.findings, row.probabilities[None])
        maps = None
        if contributions is not None:
            maps = scan_maps(scan.stem, placement, voxels, self.mapped, decisions, contributions)
        if self.page is not None:
            self.page.add(scan.name, placement, voxels, decisions, maps, row.warning)
        if maps is None or not self.labels:
            return []
        return write_scan_heat_maps(maps.select(self.labels), self.folder / scan.stem, self.note)


class _ScanPredictor:
    """What becomes of each scan: its row, or why it has none."""

    def __init__(
        self,
        scans: list[Scan],
        assume_hu: bool,
        answers: AnswerForm,
        heat_maps: _HeatMaps,
        on_scan: Callable[[str, np.ndarray], object],
        on_note: Callable[[str], object],
        failures: Failures,
        on_row: Callable[[str, ScanRow], object] | None,
    ):
        self.scans, self.answers, self.heat_maps, self.failures = scans, answers, heat_maps, failures
        self.on_scan, self.on_note, self.on_row = on_scan, on_note, on_row
        no_labels = np.zeros(len(ABNORMALITIES), np.float32)
        self.volumes = [Volume(scan.name, scan.path, no_labels, assume_hu=assume_hu) for scan in scans]
        self.rows: dict[str, ScanRow] = {}
        self.warnings: dict[str, str] = {}

    def predict(self, model: FusedModels, workers: int | None) -> None:
        model.predict(
            self.volumes,
            workers=workers,
            on_batch=self._on_batch,
            on_answer=self._on_answer,
            on_failure=self._on_failure,
            resample_on_device=True,
            explain=self.heat_maps.explain,
            batch_size=1,
        )

    def _on_batch(self, batch: Batch) -> None:
        self.failures.extend(batch.failures)
        told = notes_of(self.volumes, batch)
        for scan in (self.scans[index] for index in batch.index.tolist()):
            if note := "; ".join(filter(None, (scan.note, told.get(scan.name)))):
                self.warnings[scan.name] = note
                self.on_note(f"{scan.name}: {note}")

    def _on_failure(self, index: int, error: Exception) -> None:
        found_error = f"found {type(error).__name__} while it was computed ({' '.join(str(error).split())[:160]})"
        reason = OUT_OF_MEMORY if out_of_memory(error) else f"{found_error}, expected an answer; predict it by itself"
        self.failures.append((self.scans[index].name, reason))

    def _on_answer(
        self, index: int, answer: np.ndarray, voxels: torch.Tensor, contributions: Contributions | None
    ) -> None:
        scan = self.scans[index]
        given = self.answers.transform(answer[None])[0]
        if not np.isfinite(given).all():
            reason = "found an answer that is no number, expected probabilities; leave it out"
            self.failures.append((scan.name, reason))
            return

        def on_row(row: ScanRow) -> None:
            self.rows[scan.name] = row
            if self.on_row is not None:
                self.on_row(scan.name, row)
            self.on_scan(scan.name, given)

        row = ScanRow(answer, self.warnings.get(scan.name, ""))
        self.heat_maps.write(scan, voxels, row, contributions, on_row)


# ------------------------------------------------------------------ files


def check_explainable(checkpoint: str | Path) -> None:
    """Raises PredictionError for an ensemble, whose heat maps would be its partners'."""
    if (ensemble := saved_ensemble(checkpoint)) is not None:
        raise PredictionError(f"{checkpoint}: found --explain with an ensemble, expected one run, as every partner has "
                              f"heat maps of its own; name one of {ensemble.names} with --checkpoint")


def check_output(path: str | Path, labels: Sequence[str] = ABNORMALITIES) -> None:
    """Refuses, before anything is computed, a place or a form that cannot be written, and to replace another file than
    an earlier command's predictions."""
    path = Path(path)
    if path.suffix not in (".csv", ".json", ".html"):
        raise PredictionError(f"{path}: found the ending {path.suffix or 'none'}, expected .csv (a table), .html (a "
                              "page, with a table beside it), .answers.json (for other systems) or .json (the "
                              "challenge's results.json); rename it")
    if path.suffix == ".json" and tuple(labels) != ABNORMALITIES:
        raise PredictionError(f"{path}: found labels of your own, expected the challenge's 18 in a "
                              "results.json; write a .csv")
    check_place(path)
    is_table = partial(_is_table, labels=labels)
    is_ours: dict[str, Callable[[Path], bool]] = {".csv": is_table, ".json": _is_results_file, ".html": is_scan_page}
    check_replaceable(path, is_ours[path.suffix], "name another output, or remove it")
    if path.suffix == ".html":
        check_output(path.with_suffix(".csv"), labels)
    if path.suffix == ".csv":
        check_replaceable(thresholds_beside(path), _is_calibration, "name another output, or remove it")


def check_place(path: Path) -> None:
    """Raises PredictionError where no file can be written."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise PredictionError(f"{path}: found a folder, expected a file or none; move it, or name another output")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise PredictionError(f"{path}: found a place that cannot be written ({folder}), expected a file's name in a "
                              "folder of yours; name another")


def thresholds_beside(table: Path) -> Path:
    """The file of the calibration and thresholds of a table of calibrated probabilities."""
    return table.with_name(f"{table.stem}.{CALIBRATION_FILE}")


def _is_calibration(path: Path) -> bool:
    with suppress(EvaluationError):
        return bool(load_calibration(path))
    return False


def _is_results_file(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return "".join(file.read(1000).split()).startswith("".join(ResultsFile.HEAD.split()))


def _is_table(path: Path, labels: Sequence[str]) -> bool:
    """Whether a file has the header of such predictions, and other numbers than a table of labels."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.reader(file)
        header, first = next(rows, []), next(rows, None)
    columns = [NAME_COLUMN, *labels]
    known = [SCALE_COLUMN, *(CALL_PREFIX + label for label in labels), SUMMARY_COLUMN, WARNING_COLUMN]
    more = header[len(columns) :]
    return header[: len(columns)] == columns and more == [name for name in known if name in more] and (
        first is None or not {*first[1 : len(columns)]} <= {"0", "1", "0.0", "1.0"}
    )


def write_predictions(path: str | Path, predictions: Predictions, checkpoint: str | Path) -> None:
    """A CSV of the scans that could be read, with their scale, decisions where there are thresholds, and warnings, and
    the thresholds for calibrated ones in a file beside it; or a results.json of all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = predictions.table
    if path.suffix == ".json":
        answers = dict(zip(table.index, table[list(ABNORMALITIES)].to_numpy(), strict=True))
        ResultsFile(path, predictions.scans, prevalence(Path(checkpoint)), answers).close()
        return
    decided = decision_columns(predictions.decisions).reindex(table.index)
    more = [column for column in decided if column not in table]
    told = [predictions.warnings.get(name, "") for name in table.index]
    if len(table) and predictions.scale != MAPPED:  # where four digits would hide differences
        table = decided[list(table.columns)]
    parts = [table, pd.DataFrame({SCALE_COLUMN: predictions.scale}, table.index), decided[more]]
    with replacing(path) as temporary:
        pd.concat(parts, axis=1).assign(**{WARNING_COLUMN: told}).rename_axis(NAME_COLUMN).to_csv(temporary)
    if predictions.calibration is not None and predictions.scale != MAPPED:
        predictions.calibration.save(thresholds_beside(path))
    else:
        thresholds_beside(path).unlink(missing_ok=True)  # of an earlier table of that name


class ResultsFile:
    """The challenge's results.json: every scan exactly once, in the order found, with `substitute` (18,) for one that
    has no answer, because a scan that is missing makes the evaluation fail.

    Numbers are all of one width: an answer that comes later overwrites its place, so that the file is valid JSON and
    has all answers at every moment, also after SIGKILL, and each costs the same however many scans there are.
    """

    HEAD = (
        '{\n "name": "Generated probabilities",\n "type": "Abnormality Classification",\n'
        ' "version": {"major": 1, "minor": 0},\n "predictions": ['
    )

    def __init__(
        self, path: Path, scans: Sequence[Scan], substitute: np.ndarray, answers: Mapping[str, np.ndarray] | None = None
    ):
        answers = answers or {}
        self.places: dict[str, tuple[int, Scan]] = {}
        parts = [self.HEAD]
        length = len(self.HEAD)
        for number, scan in enumerate(scans):
            entry = self._entry(scan, answers.get(scan.name, substitute))
            separator = ",\n" if number else "\n"
            self.places[scan.name] = length + len(separator), scan
            parts += [separator, entry]
            length += len(separator) + len(entry)
        with replacing(path) as temporary:
            temporary.write_bytes("".join([*parts, "\n ]\n}\n"]).encode("ascii"))
        self.file = open(path, "r+b", buffering=0)  # noqa: SIM115  closed in close()

    @staticmethod
    def _entry(scan: Scan, answer: np.ndarray) -> str:
        assert np.isfinite(answer).all()
        bounded = np.clip(answer, 0, 1)  # rounding may go a little beyond
        numbers = (f"{json.dumps(label)}: {value:.16f}" for label, value in zip(ABNORMALITIES, bounded, strict=True))
        return f'  {{"input_image_name": {json.dumps(scan.stem)}, "probabilities": {{{", ".join(numbers)}}}}}'

    def answer(self, name: str, row: np.ndarray) -> None:
        place, scan = self.places[name]
        self.file.seek(place)
        self.file.write(self._entry(scan, row).encode("ascii"))

    def close(self) -> None:
        """With everything on the disk."""
        os.fsync(self.file.fileno())
        self.file.close()


def prevalence(checkpoint: Path) -> np.ndarray:
    """(18,) share of positive volumes among a run's tuning patients, who are drawn like its training patients; without
    them, and for a weights file, in CT-RATE's train split."""
    tuning = run_tuning(checkpoint) if checkpoint.is_dir() else None
    return np.array(list(PREVALENCE.values())) if tuning is None else known_rates(tuning[1])


def known_rates(labels: VolumeTable) -> np.ndarray:
    """(18,) share of positive volumes among those whose label is known."""
    return label_rates(labels.select(ABNORMALITIES).frame[list(ABNORMALITIES)].to_numpy())
