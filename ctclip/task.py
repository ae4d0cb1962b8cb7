"""The modes of run_task2.py: train, evaluate on unseen patients, predict, export."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ctclip.config import PREDICTIONS, given_evaluation_flags
from ctclip.data.cohort import load_cohort
from ctclip.evaluation.command import evaluate_and_write, settings_from_flags
from ctclip.evaluation.metrics import EvaluationError
from ctclip.evaluation.run_folder import newest_run, results_folder
from ctclip.inference.run_predictions import run_inputs
from ctclip.inference.scans import check_output, labels_of, predict, rows_table, write_csv, write_predictions
from ctclip.training.loop import guarded, run_training


def predict_mode(args: argparse.Namespace) -> None:
    """`--mode predict`: a table of probabilities; unreadable scans are listed and named by the exit code."""
    if not args.input:
        raise EvaluationError("--mode predict needs --input, a scan (.nii, .nii.gz, .mha, a DICOM series) or a folder")
    prompts = None
    if args.prompts:
        from ctclip.inference.prompts import read_prompts

        prompts = read_prompts(args.prompts)
    checkpoint, output = Path(args.checkpoint) if args.checkpoint else newest_run(), Path(args.output or PREDICTIONS)
    labels = prompts.names if prompts else labels_of(checkpoint)
    check_output(output, labels)
    done: dict[str, np.ndarray] = {}
    try:
        table = predict(
            args.input,
            checkpoint,
            form="mapped" if args.map_thresholds else "uncalibrated" if args.uncalibrated else "calibrated",
            prompts=prompts,
            explain=args.explain,
            explain_dir=output.parent / f"{output.stem}_explain",
            device=args.device,
            workers=args.workers,
            on_scan=done.__setitem__,
        )
    except BaseException as error:
        if done:
            keep(done, labels, output)
        if isinstance(error, KeyboardInterrupt):
            print(f"\nInterrupted: {len(done)} scans were done", file=sys.stderr)
            raise SystemExit(130) from error
        raise
    write_predictions(output, table, checkpoint)
    failures, files = table.attrs["failures"], table.attrs["files"]
    rows = len(table.attrs["scans"]) if output.suffix == ".json" else len(table)
    print(f"Wrote {output}: {rows} scans, model {checkpoint}; {table.attrs['how']}")
    if table.attrs["note"]:
        print(table.attrs["note"])
    if files:
        print(f"Wrote {len(files)} heat maps and pictures to {files[0].parent}")
    if failures:
        print("\n".join(f"skipped: {name}: {reason}" for name, reason in failures), file=sys.stderr)
        instead = "are answered with the training prevalence" if output.suffix == ".json" else "are not in it"
        raise EvaluationError(f"{output}: {len(failures)} of {len(failures) + len(table)} scans could not be read and "
                              f"{instead}; they are named above")


def keep(done: dict[str, np.ndarray], labels: Sequence[str], output: Path) -> None:
    """What was answered before it ended early, as a table of its own."""
    part = output.with_name(f"{output.stem}.part.csv")
    write_csv(part, rows_table(done, labels))
    print(f"\nKept in {part}: {len(done)} scans; predict the others by themselves", file=sys.stderr)


def export(args: argparse.Namespace) -> None:
    """`--export onnx`: encoder and head as one graph, compared with the model."""
    from ctclip.inference.onnx_export import ExportError, export_run

    checkpoint = Path(args.checkpoint) if args.checkpoint else newest_run()
    default = checkpoint / "model.onnx" if checkpoint.is_dir() else checkpoint.with_suffix(".onnx")
    try:
        print("\n".join(export_run(checkpoint, args.output or default, args.device)))
    except ExportError as error:
        raise EvaluationError(str(error)) from error


def refuse_idle_flags(args: argparse.Namespace) -> None:
    """A flag that the mode would not look at is an error: it may have been meant for another mode."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise EvaluationError("found torchrun with run_task2.py, expected ctclip_training.py; evaluate afterwards")
    training = args.task in ("full", "train")
    for flag, given, belongs in (
        ("--input", args.input, args.task == "predict"),
        ("--output", args.output, args.task in ("predict", "export")),
        ("--map-thresholds", args.map_thresholds, args.task == "predict"),
        ("--uncalibrated", args.uncalibrated, args.task == "predict"),
        ("--prompts", args.prompts, args.task == "predict"),
        ("--explain", args.explain is not None, args.task == "predict"),
        ("--checkpoint", args.checkpoint, not training),
        ("--resume", args.resume is not None, training),
        ("--output-dir", args.output_dir, training),
        ("--plan", args.plan, training),
        *((flag, True, args.task in ("full", "evaluate")) for flag in given_evaluation_flags(args)),
    ):
        if given and not belongs:
            mode = "--export" if args.task == "export" else f"--mode {args.task}"
            raise EvaluationError(f"found {flag} with {mode}, which does not use it; leave one of them out")


def run(args: argparse.Namespace) -> int:
    """What the flags of run_task2.py ask for; -> the exit code."""
    start = time.perf_counter()
    args.task = "export" if args.export else args.task

    def action() -> None:
        refuse_idle_flags(args)
        settings = settings_from_flags(args)
        if args.task == "predict":
            return predict_mode(args)
        if args.task == "export":
            return export(args)
        if args.task == "evaluate":
            run = Path(args.checkpoint) if args.checkpoint else newest_run()
        else:
            if args.task == "full" and hasattr(args, "data_dir"):
                load_cohort(args.data_dir, "valid", limit=1)
            trained = run_training(args)
            if trained is None:  # --plan
                return
            run = trained
        if args.task != "train":
            data_dir = getattr(args, "data_dir", None) if args.task == "evaluate" else None
            folder = results_folder(run, data_dir)
            inputs = run_inputs(run, data_dir, args.device, args.workers, folder)
            evaluate_and_write(inputs, folder, settings, args.baseline, args.metadata, args.pictures)
        print(f"\nDone in {time.perf_counter() - start:.0f} s: {run}")

    return guarded(action)
