"""The modes of run_task2.py: train, evaluate on unseen patients, predict, export."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from ctclip.cli import run_cli
from ctclip.config import given_evaluation_flags
from ctclip.data.cohort import load_cohort
from ctclip.evaluation.command import evaluate_and_write, settings_from_flags
from ctclip.evaluation.metrics import EvaluationError
from ctclip.evaluation.run_folder import newest_run, results_folder
from ctclip.inference.commands import export_command, predict_command
from ctclip.inference.run_predictions import run_inputs
from ctclip.training.estimate import print_estimate
from ctclip.training.loop import train
from ctclip.training.run import RESUME_HINT, run_from_flags


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
            return predict_command(args)
        if args.task == "export":
            return export_command(args)
        if args.task == "evaluate":
            run = Path(args.checkpoint) if args.checkpoint else newest_run()
        else:
            if args.task == "full" and hasattr(args, "data_dir"):
                load_cohort(args.data_dir, "valid", limit=1)
            config, run, machine = run_from_flags(args)
            if args.plan:
                print_estimate(config, run, machine)
                return
            run = train(config, run, machine)
        if args.task != "train":
            data_dir = getattr(args, "data_dir", None) if args.task == "evaluate" else None
            folder = results_folder(run, data_dir)
            inputs = run_inputs(run, data_dir, args.device, args.workers, folder)
            evaluate_and_write(inputs, folder, settings, args.baseline, args.metadata, args.pictures)
        print(f"\nDone in {time.perf_counter() - start:.0f} s: {run}")

    return run_cli(action, RESUME_HINT)
