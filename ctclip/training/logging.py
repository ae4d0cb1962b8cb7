"""What a run writes and prints about itself: run.json, log.jsonl, the lines on the screen."""

from __future__ import annotations

import json
import platform
import shlex
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from ctclip import __version__
from ctclip.config import SYNTHETIC_NOTE
from ctclip.data.loading import count_notes
from ctclip.errors import UserError
from ctclip.evaluation.figures import TRAINING_CURVES, write_training_figure
from ctclip.evaluation.run_folder import PAGE, encoder_note, writing
from ctclip.fileio import replacing
from ctclip.formatting import decimal, percent, plural, rate_text
from ctclip.memory import process_memory
from ctclip.paths import script
from ctclip.training.checkpoint import AveragedEpochs, TrainingState, full_disk_explained
from ctclip.training.run import SPLIT_NAMES, Run, TrainingJob, label_notes
from ctclip.training.steps import Validation
from ctclip_model import PHANTOM_WEIGHTS

SMALL = 10**6  # bytes; more than a run's record, log and curves take

# ------------------------------------------------------------------ the run's folder


def write_history(run: Run, history: list[dict]) -> None:
    if run.ranks.is_main:
        _write(run, "log.jsonl", "The log", "".join(json.dumps(line) + "\n" for line in history))


def _write(run: Run, name: str, what: str, text: str) -> None:
    path = run.folder / name
    with full_disk_explained(run.folder, what, SMALL), writing(run.folder, name), replacing(path) as temporary:
        temporary.write_text(text)


def write_curves(job: TrainingJob, history: list[dict]) -> None:
    """A picture that cannot be drawn ends no run: it is made of log.jsonl, which is there."""
    if not job.run.ranks.is_main:
        return
    try:
        folder, note = job.run.folder, SYNTHETIC_NOTE if job.phantom else None
        with full_disk_explained(folder, "The training curves", SMALL), writing(folder, TRAINING_CURVES):
            write_training_figure(history, folder / TRAINING_CURVES, note)
    except UserError:
        raise
    except Exception as error:
        job.run.log(f"{TRAINING_CURVES} could not be drawn ({type(error).__name__}: {error}); training goes on")


def write_run_file(job: TrainingJob, status: str, average: AveragedEpochs | None = None) -> None:
    """run.json: what was run on what with which versions, what became of each volume that was not used, and of an
    average of epochs."""
    run, splits = job.run, job.splits
    if not run.ranks.is_main:
        return
    skipped = [{"name": name, "reason": reason} for name, reason in (*job.cohort.skipped, *run.failures.items())]
    content = {
        "status": status,
        "config": asdict(run.config),
        "data_dir": str(job.data_dir),
        "working_folder": str(Path.cwd()),  # from which relative paths are seen
        "phantom": job.phantom,
        "phantom_encoder": job.model.derived_from == PHANTOM_WEIGHTS,
        "labels": list(job.model.labels),
        "device": str(run.device),
        "processes": run.ranks.world,
        "precision": run.precision,
        "micro_batch": run.micro_batch,
        "gradient_checkpointing": run.checkpointing,
        "volumes": {name: len(split.volumes) for name, split in splits.items()},
        "patients": {name: len(split.patients) for name, split in splits.items()},
        "tuning_patients": job.validation.patients,
        **({} if job.held_out is None else {"held_out_patients": job.held_out.patients}),
        "read_as": dict(Counter(run.readings.values())),
        "left_out": skipped,
        "versions": {
            "ctclip": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": version("timm"),  # importing it takes two seconds, and only its own backbones need it
        },
    }
    if average is not None and average.compared:
        content["average"] = {"epochs": average.epochs, "tuning_auroc_macro": average.auroc, "kept": average.kept}
    _write(run, "run.json", "The run's record", json.dumps(content, indent=2))


ADAPTERS = "adapters trained"  # a stage


def epoch_record(state: TrainingState, train_loss: float | None, validation: Validation, seconds: float) -> dict:
    """The epoch's line of log.jsonl."""
    metrics = validation.metrics
    unfrozen = ADAPTERS if state.trainable.config.adapt == "lora" else "unfrozen"
    return {
        "epoch": state.progress.epoch + 1,
        "stage": "frozen" if state.trainable.backbone_frozen else unfrozen,
        "open_layers": state.trainable.unfrozen,
        "train_loss": train_loss,
        "tuning_loss": metrics["loss"],
        "tuning_auroc_macro": metrics["auroc_macro"],
        "tuning_auroc_findings": metrics["auroc_findings"],  # of which it is the mean; the others have one class only
        "findings": validation.logits.shape[1],
        "positive_rate": metrics["positive_rate"],
        "label_rate": metrics["label_rate"],
        "learning_rate": state.trainable.optimizer.param_groups[0]["lr"],
        "skipped_steps": state.progress.skipped,
        "best": validation.score > state.best.score,
        "seconds": seconds,
    }


# ------------------------------------------------------------------ the screen


def print_setup(job: TrainingJob) -> None:
    run, model, config = job.run, job.model, job.run.config
    backbone, head = (sum(p.numel() for p in of()) for of in (model.backbone_parameters, model.head_parameters))
    focal = f" (alpha {config.alpha:g}, gamma {config.gamma:g})" if config.loss_type == "focal" else ""
    counted = ", ".join(
        f"{len(split.volumes)} {SPLIT_NAMES[name]} volumes of {plural(len(split.patients), 'patient')}"
        for name, split in job.splits.items()
    )
    stages = f"{config.frozen_epochs} frozen, {config.epochs - config.frozen_epochs} unfrozen"
    processes = f"{run.ranks.world} processes, " if run.ranks.world > 1 else ""
    kind = f"{config.model}, head {model.head_name}"
    crops = f", crops {model.crop_shape}" if model.is_video else ""
    run.log(job.cohort.summary())
    run.log(f"Split by patient: {counted}")
    for note in label_notes(job):
        run.log(note)
    run.log(f"Model:    {kind}; backbone {backbone:,} parameters, head {head:,}, input {model.input_shape}{crops}")
    if model.load_report:
        run.log(f"Weights:  {model.load_report!r}")
    if of_encoder := _encoder_note(job):
        run.log(of_encoder)
    if config.freeze_epochs > config.epochs and not config.stays_frozen:
        run.log(f"No epoch is unfrozen: --freeze-epochs is {config.freeze_epochs}, --epochs {config.epochs}")
    run.log(f"Training: {config.epochs} epochs ({stages}), batch {config.batch_size}, loss {config.loss_type}{focal}")
    run.log(f"Device:   {processes}{run.device} ({run.precision}), {run.workers} reading processes")
    run.log(f"Cache:    {config.cache_dir}")
    if run.volume_cache is not None and run.ranks.is_main and (config.changes_voxels or not config.stays_frozen):
        volumes = [volume for split in job.splits.values() for volume in split.volumes]
        run.log(f"Volumes:  {run.volume_cache.summary(volumes)}")
    run.log(f"Run:      {run.folder}")


def _encoder_note(job: TrainingJob) -> str | None:
    return encoder_note({"phantom_encoder": job.model.derived_from == PHANTOM_WEIGHTS, "phantom": job.phantom})


def print_finished(run: Run) -> None:
    """Instead of training a run that has come to its end."""
    page = run.folder / PAGE
    todo = f"evaluate it: python {script('ctclip_evaluation.py')} --checkpoint {shlex.quote(str(run.folder))}"
    run.log(f"{run.folder} is already finished; {f'report: {page}' if page.is_file() else todo}")


def epoch_line(record: dict, epochs: int) -> str:
    auroc, loss = decimal(record["tuning_auroc_macro"], 3), decimal(record["train_loss"])
    unfrozen = plural(record["open_layers"], "layer")
    stage = {"frozen": "backbone frozen", ADAPTERS: ADAPTERS}.get(record["stage"], f"{unfrozen} unfrozen")
    return (
        f"epoch {record['epoch']:>2}/{epochs}  {stage:<18}  train loss {loss}  "
        f"validation loss {record['tuning_loss']:.4f}  AUROC {auroc}{_of_findings(record)}  "
        f"positive rate {percent(record['positive_rate'])} (labels {percent(record['label_rate'])})  "
        f"{record['seconds']:.1f} s"
        f"{'  best' if record['best'] else ''}"
    )


def _of_findings(record: dict) -> str:
    """What a macro AUROC is the mean of, where that is not all findings; before 0.7 log.jsonl does not say."""
    count, findings = record.get("tuning_auroc_findings"), record.get("findings")
    return f" over {count} of {findings} findings" if count and count != findings else ""


def print_summary(job: TrainingJob, state: TrainingState, seconds: float) -> None:
    """The last lines of a run that this process has trained for `seconds`."""
    run, best, history = job.run, state.best, state.history
    (trained,) = run.ranks.all_reduce_sum(state.trained_volumes)
    record = next((record for record in history if record["epoch"] == best.epoch), {})
    if (auroc := record.get("tuning_auroc_macro")) is not None:
        run.log(f"Best epoch {best.epoch}: macro AUROC {auroc:.3f}{_of_findings(record)} on the validation patients")
    if (average := state.average).compared:
        of, auroc = ", ".join(map(str, average.epochs)), decimal(average.auroc, 3)
        run.log(f"Average of epochs {of}: macro AUROC {auroc}, {'kept' if average.kept else 'not kept'}")
    if note := _encoder_note(job):
        run.log(note)
    skipped = sum(record["skipped_steps"] for record in history)
    if skipped:
        run.log(f"Steps skipped because they were not finite: {skipped}")
    if run.failures:
        run.log(f"Volumes that could not be read: {len(run.failures)}, listed in {run.folder / 'run.json'}")
    for line in count_notes(run.notes):
        run.log(line)
    peak = process_memory(peak=True)
    memory = "not known on this system" if peak is None else f"{peak / 1e9:.1f} GB"
    if run.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(run.device) / 1e9:.1f} GB of GPU memory"
    rate = rate_text(trained / seconds, "volume")  # every volume counts in every epoch
    run.log(f"Training took {seconds:.0f} s, {rate}, peak memory {memory}")
