"""VLM3D Task 2 from one command: train, evaluate on unseen patients, predict.

    python run_task2.py                                   the whole job on the built-in cohort of synthetic chests
    python run_task2.py --data-dir D                      the same on CT-RATE, or on a private cohort in its layout
    python run_task2.py --mode evaluate --checkpoint results/RUN
    python run_task2.py --mode evaluate --checkpoint results/RUN1 results/RUN2 --save-ensemble NAME    kept as one
    python run_task2.py --mode predict --checkpoint results/RUN --input SCANS --output probabilities.csv
    python run_task2.py --mode predict --input SCANS --output results.json --map-thresholds       for the challenge
    torchrun --nproc-per-node=4 run_task2.py --mode predict --input SCANS --output out.csv        by several processes
    python run_task2.py --mode predict --input SCAN --explain "Pleural effusion"                  where it is seen
    python run_task2.py --mode predict --checkpoint models/ctclip_zeroshot.pt --prompts my.txt --input SCANS
    python run_task2.py --mode runs --sort auroc                                                   all runs in results/
    python run_task2.py --export onnx --checkpoint results/RUN --output model.onnx
    python run_task2.py --export features --checkpoint results/RUN --output features          for other tools

In a script of your own: `from run_task2 import predict` (ctclip/inference/predictions.py says what it takes).
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # Ctrl-C during the imports is no traceback; `python -I` finds the suite
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import argparse
import shlex
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from ctclip.cli import INTERRUPTED, refuse_unused, run_cli
    from ctclip.config import RESUME_HINT, evaluation_flags, task_flag_uses, task_parser
    from ctclip.errors import UserError
    from ctclip.memory import torchrun_number
    from ctclip.paths import script
except ImportError as error:  # uploaded without the package, or with one of another version
    if __name__ == "__main__":
        sys.stderr.write(f"error: {error}, expected the folder ctclip; add ctclip.zip, run python ctclip_setup.py\n")
        sys.exit(2)
    raise

if TYPE_CHECKING:
    from ctclip.inference.predictions import predict

__all__ = ["main", "predict"]


def __getattr__(name: str) -> Any:
    """`predict`, for scripts that import it; the command line answers --help without torch."""
    if name != "predict":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ctclip.inference.predictions import predict

    return predict


def main(argv: list[str] | None = None) -> int:
    args = task_parser(__doc__).parse_args(argv)
    trains = args.task in ("full", "train") and not args.export
    return run_cli(lambda: run(args), RESUME_HINT if trains else INTERRUPTED)


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    task = args.export or args.task
    if task != "predict" and torchrun_number("WORLD_SIZE", 1) > 1:
        raise UserError("found torchrun with run_task2.py, expected --mode predict, or ctclip_training.py to train; "
                        "evaluate afterwards")
    refuse_unused(args.given, task_flag_uses(task, args.plan))
    from ctclip.evaluation.command import (
        check_ensemble,
        check_shared,
        ensemble_folder,
        ensemble_to_save,
        evaluate_and_write,
        next_step,
        save_evaluated,
        settings_from_flags,
    )
    from ctclip.evaluation.render import check_report_parts  # torch takes two seconds
    from ctclip.evaluation.run_folder import RESULT_FILES, check_output_folder, newest_run, results_folder
    from ctclip.evaluation.runs import runs_command
    from ctclip.inference.commands import export_features_command, export_onnx_command, predict_command
    from ctclip.inference.run_predictions import ensemble_of_runs, run_inputs

    if task not in ("evaluate", "predict") and len(args.checkpoint or ()) > 1:
        raise UserError(f"found {len(args.checkpoint)} runs after --checkpoint, expected one; only --mode evaluate "
                        "and --mode predict take several")
    check_ensemble(args.ensemble, args.checkpoint)
    saved = ensemble_to_save(args.save_ensemble, args.checkpoint, args.ensemble, getattr(args, "data_dir", None))
    settings = settings_from_flags(args)  # what is wrong with them is said before any work
    if task == "runs":
        runs_command(args.input, args.output, args.sort)
        return
    applying = {"predict": predict_command, "onnx": export_onnx_command, "features": export_features_command}
    if task in applying:
        applying[task](args)
        return
    if task != "train":
        check_report_parts()
    data_dir = patients = None
    if task == "evaluate":
        folder = Path(args.checkpoint[0] if args.checkpoint else newest_run())
        data_dir, patients = getattr(args, "data_dir", None), getattr(args, "patients", None)
    else:
        trained = train_run(args)
        if trained is None:  # --plan, or nothing is left to do
            return
        folder = trained
    following = f"Next: python {script('ctclip_evaluation.py')} --checkpoint {shlex.quote(str(folder))}"
    if task != "train":  # predicts the unseen split, or that of another cohort, where that was not done yet
        check = partial(check_shared, baseline=args.baseline, metadata=args.metadata)
        source = data_dir, args.device, args.workers
        if several := task == "evaluate" and len(args.checkpoint or ()) > 1:
            folder = results = saved or ensemble_folder(None, args.ensemble)
            inputs = ensemble_of_runs(args.checkpoint, args.ensemble, args.allow_partial, *source, patients, check)
        else:
            results = results_folder(folder, data_dir)
            if folder.is_dir():
                check_output_folder(results, *RESULT_FILES, own=folder)
            inputs = run_inputs(folder, *source, results, patients, check)
        evaluate_and_write(inputs, results, settings, args.baseline, args.metadata, args.pictures, args.verbose)
        if saved:
            print(save_evaluated(saved, args.checkpoint, inputs))
        following = next_step(folder, "tables", inputs.ensemble) if several and not saved else next_step(folder)
    print(f"Done in {time.perf_counter() - started:.0f} s: {folder}\n{following}")


def train_run(args: argparse.Namespace) -> Path | None:
    """The folder of the run that is now trained; None with --plan, which only says what it would take, and where
    --resume names a run that is finished and evaluated, if no flag asks for another evaluation."""
    from ctclip.evaluation.command import check_shared
    from ctclip.evaluation.run_folder import PAGE, RESULT_FILES, check_output_folder, is_finished
    from ctclip.inference.run_predictions import unseen_cohort, unseen_names
    from ctclip.training.estimate import print_estimate
    from ctclip.training.loop import train
    from ctclip.training.run import run_from_flags

    run = run_from_flags(args)
    if args.task == "full" and hasattr(args, "data_dir"):
        unseen_cohort(run[0], args.data_dir, limit=1)  # there must be something to evaluate on
    if args.baseline or args.metadata:
        check_shared(unseen_names(run[0]), args.baseline, args.metadata)
    if args.task == "full" and run[1] is not None and run[1].is_dir():
        check_output_folder(run[1], *RESULT_FILES, own=run[1])
    if args.plan:
        print_estimate(*run)
        return None
    finished = run[1] is not None and is_finished(run[1])
    folder = train(*run)
    evaluated = (folder / PAGE).is_file() and not set(args.given) & set(evaluation_flags())
    return None if finished and (evaluated or args.task == "train") else folder


if __name__ == "__main__":
    sys.exit(main())
