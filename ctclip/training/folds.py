"""Cross-validation by patient (--folds) and runs that differ by seed (--seeds).

Nothing that steers a fold has seen the patients who are scored in it: its training and validation patients (best epoch,
early stopping, and the calibration and thresholds of the fold as a run) come from the other folds. What is fitted for
the pooled predictions is cross-fitted by the evaluation, because one fold's validation patients are scored in another.
"""

from __future__ import annotations

import csv
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctclip.config import Settings, TrainingConfig, TrainingError
from ctclip.data.ct_rate import metadata_path, names_patient
from ctclip.evaluation.command import evaluate_and_write
from ctclip.evaluation.ensemble import combined_inputs, combined_table, mean_and_spread
from ctclip.evaluation.metrics import compute_metrics, per_label_metrics
from ctclip.evaluation.run_folder import is_finished, run_record, run_tuning, writing
from ctclip.evaluation.saved_ensemble import save_ensemble
from ctclip.evaluation.tables import EvaluationInputs, VolumeTable
from ctclip.fileio import replacing
from ctclip.formatting import decimal, percent
from ctclip.inference.run_predictions import run_inputs
from ctclip.paths import script
from ctclip.training.loop import train_epochs
from ctclip.training.run import Interrupted, claimed_folder, prepare
from ctclip.training.study import SAME_COMMAND, Study

SEEN_BY_ENCODER = (
    "The patients are named as CT-RATE's. If they are its training patients, CT-CLIP's encoder (and ClassFine's head) "
    "was trained on them: only the valid split is unseen by all parts of the model."
)
SEEDS_TABLE, FUSED = "seeds.csv", "fused"


def members_of(study: Study) -> dict[str, TrainingConfig]:
    """{name of the sub-folder: configuration} of a study's runs."""
    config, numbers = study.config, range(1, study.count + 1)
    if study.kind == "folds":
        return {f"fold_{number}": replace(config, fold=number, fold_count=study.count) for number in numbers}
    return {f"seed_{seed}": replace(config, seed=seed, split_seed=config.seed)
            for seed in range(config.seed, config.seed + study.count)}


def train_members(study: Study) -> list[Path]:
    """Trains what is not finished yet; of folds, each then predicts its held-out patients. -> the runs' folders."""
    folders, members = [], members_of(study)
    for config in members.values():
        config.check()
    for number, (name, config) in enumerate(members.items(), 1):
        folder = study.folder / name
        folders.append(folder)
        if not is_finished(folder):
            print(f"\n{name} ({number} of {study.count})", flush=True)
            try:
                train_member(study, config, folder)
            except Interrupted as error:
                error.args = (f"{str(error).partition(';')[0]}; {SAME_COMMAND} with {name}",)
                raise
        if study.kind == "folds":
            held_out_inputs(study, folder)
    return folders


def train_member(study: Study, config: TrainingConfig, folder: Path) -> None:
    """`loop.train`, after which a signal that came too late to end the run ends the study."""
    start = time.perf_counter()
    job = prepare(config, folder, study.machine)
    with claimed_folder(job.run):
        train_epochs(job, start)
    job.run.stop.check(f"{folder.name} is trained")


def held_out_inputs(study: Study, folder: Path) -> EvaluationInputs:
    """Predictions and labels of the patients that a fold has not seen, made now where they are not there yet."""
    return run_inputs(folder, device=study.machine.device, workers=study.machine.workers)


# ------------------------------------------------------------------ --folds


def run_folds(study: Study) -> None:
    """Trains the folds, evaluates all held-out predictions as one table, and fuses the models."""
    with study.claimed():
        study.write("running")
        folders = train_members(study)
        check_one_cohort(folders)
        members = [held_out_inputs(study, folder) for folder in folders]
        rows = [fold_row(folder, member) for folder, member in zip(folders, members, strict=True)]
        pooled = combined_inputs(members, "pooled")
        fuse(study, folders, (pooled.predictions, pooled.labels))
    print(f"\nPredictions of the patients that each of {study.count} folds has not seen, as one table")
    evaluate_and_write(pooled, study.folder, Settings(), None, training_metadata(pooled), pictures=1)
    spread = mean_and_spread([row["auroc_macro"] for row in rows])
    print(f"\n{folds_table(rows, spread)}")
    names = pooled.predictions.frame.index
    seen = not pooled.phantom and study.config.model == "ctclip" and all(map(names_patient, names))
    if seen:
        print(SEEN_BY_ENCODER)
    study.write("finished", folds=rows, auroc_macro=spread, note=SEEN_BY_ENCODER if seen else None)
    print(next_step(study))


def check_one_cohort(folders: Sequence[Path]) -> None:
    """Raises TrainingError where the folds are not of one cohort: volumes have come or gone between them."""
    records = [run_record(folder) for folder in folders]
    held_out = [patient for record in records for patient in record["held_out_patients"]]
    for folder, record in zip(folders, records, strict=True):
        if not sum(record["patients"].values()) == len(held_out) == len(set(held_out)):
            raise TrainingError(
                f"{folder}: found {sum(record['patients'].values())} patients, and {len(set(held_out))} whom the folds "
                f"hold out ({len(held_out)} with repeats), expected the same in every fold; the cohort has changed "
                "since the first: start with another --output-dir"
            )


def fold_row(folder: Path, member: EvaluationInputs) -> dict[str, Any]:
    """A fold as the table shows it; `validation_auroc_macro` is that of its best epoch, chosen by it."""
    metrics = metrics_of(member.predictions, member.labels)
    return {
        "name": folder.name, "volumes": len(member.predictions.frame),
        "patients": len(member.record["held_out_patients"]),
        "validation_auroc_macro": metrics_of(*member.tuning)["auroc_macro"] if member.tuning else None,
        **{key: metrics[key] for key in ("auroc_macro", "positive_rate", "label_rate")},
    }


def metrics_of(predictions: VolumeTable, labels: VolumeTable) -> dict:
    findings = list(labels.findings)
    return compute_metrics(labels.frame[findings].to_numpy(),
                           predictions.frame.loc[labels.frame.index, findings].to_numpy())


def folds_table(rows: Sequence[Mapping], spread: Mapping) -> str:
    lines = [f"{'':<10}{'held out':>22}  {'validation':>10}  {'AUROC':>7}  positive at 0.5 (labels)"]
    for row in rows:
        count = f"{row['volumes']} of {row['patients']} patients"
        lines.append(f"{row['name']:<10}{count:>22}  {decimal(row['validation_auroc_macro'], 3):>10}  "
                     f"{decimal(row['auroc_macro'], 3):>7}  {percent(row['positive_rate'])} "
                     f"({percent(row['label_rate'])})")
    return "\n".join([*lines, f"AUROC of the folds: mean {decimal(spread['mean'], 3)}, SD {decimal(spread['sd'], 3)}"])


def training_metadata(inputs: EvaluationInputs) -> str | None:
    """The metadata table of the training split, for subgroups, where there is one."""
    path = inputs.data_dir and inputs.data_dir / metadata_path("train")
    return str(path) if path and path.is_file() else None


def fuse(study: Study, folders: Sequence[Path], tuning: tuple[VolumeTable, VolumeTable]) -> None:
    """Saves the runs as one ensemble, the mean of their logits, where that was not done before. Calibration and
    thresholds are fitted on `tuning`."""
    folder = study.folder / FUSED
    if not (folder / "run.json").is_file():
        save_ensemble(folder, folders, tuning=tuning)


def next_step(study: Study) -> str:
    """The evaluation of the ensemble on the unseen split."""
    folder = shlex.quote(str(study.folder / FUSED))
    return f"Next, on the unseen split: python {script('ctclip_evaluation.py')} --checkpoint {folder}"


# ------------------------------------------------------------------ --seeds


def run_seeds(study: Study) -> None:
    """Trains the runs, and says how far seeds alone move what they come to."""
    with study.claimed():
        study.write("running")
        folders = train_members(study)
        tables = [tuning for folder in folders if (tuning := run_tuning(folder))]
        predictions, labels = [table for table, _ in tables], tables[0][1]
        names, findings = list(labels.frame.index), labels.findings
        together = combined_table(predictions, names, findings, None, labels.ids)
        fuse(study, folders, (together, labels))
        rows = seed_rows([*predictions, together], labels)
        write_seeds(study.folder, [folder.name for folder in folders], rows)
        study.write("finished", validation_auroc=rows["macro"])
    macro = rows["macro"]
    for folder, value in zip(folders, macro["alone"], strict=True):
        print(f"{folder.name:<12}validation AUROC {decimal(value, 3)}")
    print(f"mean {decimal(macro['mean'], 3)}, SD {decimal(macro['sd'], 3)}; together {decimal(macro['together'], 3)} "
          f"(each finding: {study.folder / SEEDS_TABLE}). Best epochs were chosen on these patients, so all are a "
          "little too high.")
    print(next_step(study))


def seed_rows(predictions: Sequence[VolumeTable], labels: VolumeTable) -> dict[str, dict[str, Any]]:
    """{"macro" and each finding: AUROC of each run alone, their mean and sd, and AUROC of all together, the last of
    `predictions`}."""
    findings, found = list(labels.findings), []
    truth = labels.frame[findings].to_numpy()
    for table in predictions:
        each = per_label_metrics(truth, table.frame.loc[labels.frame.index, findings].to_numpy(), findings=findings)
        macro = {"macro": metrics_of(table, labels)["auroc_macro"]}
        found.append(macro | {name: row["auroc"] for name, row in each.items()})
    *alone, together = found
    rows: dict[str, dict[str, Any]] = {}
    for name in together:
        values = [each[name] for each in alone]
        rows[name] = {"alone": values, **mean_and_spread(values), "together": together[name]}
    return rows


def write_seeds(folder: Path, names: Sequence[str], rows: Mapping[str, Mapping]) -> None:
    with writing(folder, SEEDS_TABLE), replacing(folder / SEEDS_TABLE) as temporary, temporary.open("w") as file:
        table = csv.writer(file)
        table.writerow(["finding", *names, "mean", "sd", "together"])
        for name, row in rows.items():
            table.writerow([name, *row["alone"], row["mean"], row["sd"], row["together"]])
