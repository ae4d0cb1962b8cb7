"""Predictions of a run on its cohort's unseen split: read where they are there, made with its model where not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain, count
from pathlib import Path

import numpy as np
from torch import Tensor

from ctclip.cli import OUT_OF_MEMORY
from ctclip.config import TrainingConfig
from ctclip.data.cohort import Cohort, Volume, ids_of, load_cohort
from ctclip.data.ct_rate import FETCH_COMMAND, labels_path
from ctclip.data.feature_cache import FeatureCache
from ctclip.data.label_table import columns_among, listed_findings
from ctclip.data.loading import Batch, count_notes, notes_of
from ctclip.data.preprocessing import read_volume
from ctclip.data.tables import SCALE_COLUMN, UNCALIBRATED, CohortError, some
from ctclip.evaluation.case_slices import Evidence, EvidenceError
from ctclip.evaluation.ensemble import combined_inputs
from ctclip.evaluation.run_folder import (
    ELSEWHERE,
    TABLES,
    RunError,
    alone_in,
    check_output_folder,
    from_working_folder,
    read_history,
    results_folder,
    run_record,
    run_tuning,
    writing,
)
from ctclip.evaluation.saved_ensemble import saved_ensemble
from ctclip.evaluation.tables import EvaluationInputs, patients_of, read_labels, read_predictions, write_table
from ctclip.fileio import make_folder, naming
from ctclip.formatting import plural
from ctclip.inference.contributions import token_contributions
from ctclip.inference.fusion import load_models
from ctclip.inference.predictions import rows_table
from ctclip.inference.predictor import MachineError, load_model, print_failures
from ctclip.memory import out_of_memory
from ctclip.phantoms.cohort import is_phantom_cohort, plan_split
from ctclip_model import ModelError

UNSEEN_NOT_CHECKED = "Not checked whether patients of the unseen split are trained on"


def run_inputs(
    run_dir: str | Path,
    data_dir: str | Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    tables: str | Path | None = None,
    patients: str | None = None,
    check: Callable[[Sequence[str]], None] = lambda volumes: None,
) -> EvaluationInputs:
    """The inputs of an evaluation, from a run folder.

    Predictions that are not there yet are made with the run's model, on the validation split of the run's cohort. With
    `data_dir` they are made anew on that cohort, and kept in the folder `tables`, apart from the run's own. `patients`
    is a table as of `read_patients`. `check` is called with the names of the volumes before any is predicted.
    """
    run = existing_run(run_dir)
    tables = run if data_dir is None else Path(tables or results_folder(run, data_dir))
    present = (tables / "predictions.csv").is_file() and (tables / "labels.csv").is_file()
    if data_dir is not None or not present:
        predict_run(run, data_dir, device, workers, tables, patients, check)
    record = run_record(run)
    phantom = bool(record.get("phantom", False)) if data_dir is None else is_phantom_cohort(data_dir)
    cohort = data_dir or from_working_folder(record, record.get("data_dir"))
    predictions = read_predictions(tables / "predictions.csv", record.get("labels"))  # more than the 18 they may be
    labelled = columns_among(tables / "labels.csv", predictions.findings)
    labels = read_labels(tables / "labels.csv", predictions.findings if data_dir is None else labelled)
    history = read_history(run / "log.jsonl")
    folder = Path(cohort) if cohort else None
    stated = patients_of(patients, predictions)
    return EvaluationInputs(
        predictions, labels, run_tuning(run), history, phantom, folder, record, patients=stated,
        evidence=run_evidence(run, device),
    )  # fmt: skip


def run_evidence(run: Path, device: str | None = None) -> Evidence | None:
    """What the model of a run bases its answers on; None for an ensemble, and without weights. The model is loaded when
    it is first asked for."""
    if not (run / "model.safetensors").is_file():
        return None
    model = cache(partial(load_model, run, device))

    def of(volume: Volume, labels: Sequence[str]) -> tuple[Tensor, np.ndarray]:
        try:
            net = model()
            tensor, _ = read_volume(volume, net.input_shape)
            index = [net.labels.index(label) for label in labels]
            found = token_contributions(net, tensor[None].to(next(net.parameters()).device), index)
        except (ModelError, MachineError) as error:
            raise EvidenceError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise EvidenceError(OUT_OF_MEMORY) from error
        return tensor, found.values

    return Evidence(run, of)


def existing_run(run_dir: str | Path) -> Path:
    """The folder; RunError where there is none."""
    if not Path(run_dir).is_dir():
        raise RunError(f"{run_dir}: found no such folder, expected a run folder; list results/ for its name")
    return Path(run_dir)


def ensemble_of_runs(
    runs: Sequence[str | Path], method: str | None, allow_partial: bool, data_dir: str | Path | None,
    device: str | None, workers: int | None, patients: str | None, check: Callable[[Sequence[str]], None],
) -> EvaluationInputs:
    """The inputs of an evaluation of several runs together (`combined_inputs`; by default the mean of their logits);
    each run's own predictions are read or made as in `run_inputs`, and stay in its folder."""
    folders = [existing_run(run) for run in runs]  # all of them before any work
    members = [run_inputs(run, data_dir, device, workers, None, patients, check) for run in folders]
    return combined_inputs(members, method or "mean", allow_partial, of_runs=True)


def unseen_names(config: TrainingConfig) -> list[str]:
    """Names of the volumes that a run will be evaluated on; the built-in cohort's are known before it is written."""
    if config.data_dir is None:
        return [plan.name for plan in plan_split("valid", config.valid_volumes, 0)]
    return [volume.name for volume in unseen_cohort(config, config.data_dir).volumes]


def unseen_cohort(config: TrainingConfig, data_dir: str | Path, limit: int | None = None) -> Cohort:
    """The split that a run on `data_dir` will be evaluated on, with the findings that it will train."""
    named, minus_one = listed_findings(config.findings), config.minus_one_is_unknown
    findings = load_cohort(data_dir, "train", 1, config.patients, named, minus_one).findings
    return load_cohort(data_dir, "valid", limit, config.patients, findings, minus_one)


def check_unseen(cohort: Cohort, trained: Cohort) -> None:
    """Raises RunError where patients of the split that is reported are among those that a run trained on."""
    seen = {volume.patient for volume in trained.volumes}
    if shared := sorted({volume.patient for volume in cohort.volumes} & seen):
        raise RunError(
            f"found {plural(len(shared), 'patient')} of the unseen split among the training patients ({some(shared)}), "
            "expected none; correct the tables of labels or of patients, and train again"
        )


def cache_folder(record: Mapping) -> Path:
    """The folder of a run's feature cache, by its record; {}: the default one."""
    cache = record.get("config", {}).get("cache_dir", TrainingConfig.cache_dir)
    return Path(from_working_folder(record, cache) or cache)


def reported_cohort(record: Mapping, data_dir: str | Path, own_cohort: bool, patients: str | None) -> Cohort:
    """What a run is to predict of a cohort: the validation split; of its own, where the run is one of cross-validation,
    the patients that it has not seen. Raises RunError where a run has trained on patients of its unseen split."""
    config = record.get("config", {})
    findings = record.get("labels")
    if findings and not own_cohort:  # of another cohort, those that it has
        findings = columns_among(Path(data_dir, labels_path("valid")), findings)
        _check_common(data_dir, findings, record["labels"])
    options = patients, findings, bool(config.get("minus_one_is_unknown", False))
    held_out = set(record.get("held_out_patients", ())) if own_cohort else set()
    if held_out:
        cohort = load_cohort(data_dir, "train", config.get("limit"), *options)
        return replace(cohort, volumes=[volume for volume in cohort.volumes if volume.patient in held_out])
    cohort = load_cohort(data_dir, "valid", None, *options)
    if own_cohort:
        try:
            trained = load_cohort(data_dir, "train", config.get("limit"), *options)
        except CohortError as error:
            print(f"{UNSEEN_NOT_CHECKED}: {error}")
        else:
            check_unseen(cohort, trained)
    return cohort


def _check_common(data_dir: str | Path, common: Sequence[str], findings: Sequence[str]) -> None:
    """Raises RunError where the label table of another cohort has none of a run's findings."""
    if not common:
        raise RunError(f"{data_dir}: found none of the run's findings ({some(findings)}) in its label table, "
                       "expected at least one; name the columns as the run's")


def predict_run(
    run: Path, data_dir: str | Path | None, device: str | None, workers: int | None, tables: Path,
    patients: str | None = None, check: Callable[[Sequence[str]], None] = lambda volumes: None,
) -> None:
    """Writes predictions.csv and labels.csv of `reported_cohort` into `tables`; rows that are done are kept there when
    it is interrupted.

    What the run's cache has of the volumes is taken from there; streamed volumes are nowhere else.
    """
    record, own_cohort = run_record(run), data_dir is None
    data_dir = data_dir or from_working_folder(record, record.get("data_dir"))
    if data_dir is None or not ((run / "model.safetensors").is_file() or saved_ensemble(run)):
        raise RunError(
            f"{run}: found no predictions.csv with labels.csv, expected them or a finished epoch to make them with; "
            "let training go on (--resume), or give --predictions and --labels"
        )
    check_output_folder(tables, *TABLES, own=run)
    patients = patients or from_working_folder(record, record.get("config", {}).get("patients"))
    stored = record.get("config", {})
    cohort = reported_cohort(record, data_dir, own_cohort, patients)
    check([volume.name for volume in cohort.volumes])
    model = load_models(run, device)
    common = [name for name in cohort.findings if name in model.labels]
    _check_common(data_dir, common, model.labels)
    held_out = own_cohort and stored.get("fold")
    which = f"patients of {data_dir} that fold {held_out} has not seen" if held_out else f"unseen split of {data_dir}"
    print(f"Predicting the {which}\n{cohort.summary()}")
    if others := [name for name in cohort.findings if name not in common]:
        print(f"Not evaluated, as the model does not predict it: {', '.join(others)}")
    cache_dir = cache_folder(record)
    caches = [FeatureCache(cache_dir, each) for each in model.models] if cache_dir.is_dir() else None
    volumes = cohort.volumes
    streamed = all(volume.signature is not None for volume in volumes)
    empty = [cache for cache in caches or () if all(row is None for row in cache.rows(volumes))] if streamed else []
    if streamed and (caches is None or empty):
        where = f"{cache_dir} (no such folder)" if caches is None else empty[0].folder
        raise RunError(
            f"{data_dir}: found none of the {len(cohort)} volumes on disk (they were streamed) and none in {where}, "
            "expected them in the cache of this encoder; evaluate a run that was trained with --freeze-backbone on the "
            f"cache they were streamed into, or fetch the files with {FETCH_COMMAND} valid"
        )
    notes: dict[str, str] = {}

    def on_batch(batch: Batch) -> None:
        print_failures(batch)
        notes.update(notes_of(volumes, batch))

    make_folder(tables, ELSEWHERE)
    part_table = PartialTable(tables / "predictions.part.csv", model.labels)
    with alone_in(tables), part_table as part:
        read, probabilities = model.predict(
            volumes, workers=workers, on_batch=on_batch, caches=caches,
            on_answer=lambda index, answer, *_: part.append(volumes[index].name, answer),
        )  # fmt: skip
        for line in count_notes(notes):
            print(line)
        if not read:
            raise RunError(f"{data_dir}: none of the {len(cohort)} volumes of its valid split could be read")
        names, ids = [volumes[i].name for i in read], ids_of(volumes)
        chosen = [cohort.findings.index(name) for name in common]
        labels = np.stack([volumes[i].labels for i in read])[:, chosen].astype(int)
        with writing(tables, *TABLES):
            write_table(tables / "labels.csv", names, labels, ids, common)
            write_table(tables / "predictions.csv", names, probabilities, ids, model.labels)


class PartialTable:
    """The rows that are done, on the disk at once, so that an interruption loses none; removed when the tables have
    been written. In a `with` block: where it ends early, says what is kept. What an earlier command kept under that
    name stays: this one's file then has a number."""

    def __init__(self, path: Path, labels: Sequence[str]):
        numbered = (path.with_name(f"{path.stem}{number}{path.suffix}") for number in count(2))
        self.path = next(name for name in chain([path], numbered) if not name.exists())
        self.labels, self.rows = labels, 0

    def append(self, name: str, row: np.ndarray) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            rows_table({name: row}, self.labels).assign(**{SCALE_COLUMN: UNCALIBRATED}).to_csv(
                file, header=self.rows == 0
            )
            file.flush()
            os.fsync(file.fileno())
        self.rows += 1

    def __enter__(self) -> PartialTable:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self.rows:
            return
        kept = f"kept in {self.path}: {self.rows} scans; evaluate them with --predictions"
        if error is None:
            self.path.unlink()
        elif isinstance(error, KeyboardInterrupt):
            error.args = (kept,)  # what run_cli prints
        else:
            print(f"\nK{kept[1:]}", file=sys.stderr)
