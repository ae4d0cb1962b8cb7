"""VLM3D Task 2 from one command: train, evaluate on unseen patients, predict.

    python run_task2.py                                   the whole job on the built-in cohort of synthetic chests
    python run_task2.py --data-dir D                      the same on CT-RATE, or on a private cohort in its layout
    python run_task2.py --mode evaluate --checkpoint results/RUN
    python run_task2.py --mode predict --checkpoint results/RUN --input SCANS --output probabilities.csv
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from ctclip_data import load_cohort
from ctclip_evaluation import add_evaluation_flags, given_evaluation_flags, report, settings_from_flags
from ctclip_folders import foreign_folder, newest_run, run_calibration, run_material
from ctclip_metrics import EvaluationError
from ctclip_model import OneLineParser
from ctclip_predict import predict_files
from ctclip_tables import write_table
from ctclip_training import add_machine_flags, add_run_flags, add_training_flags, guarded, run_training

MODES = {
    "full": "train, then evaluate on unseen patients (default)",
    "train": "fine-tune only",
    "evaluate": "evaluate the run named by --checkpoint, or the newest",
    "predict": "probabilities for the scans named by --input",
}


def predict(args: argparse.Namespace) -> None:
    """`--mode predict`: a table of probabilities; unreadable scans are listed and named by the exit code."""
    if not args.input:
        raise EvaluationError("--mode predict needs --input, a .nii or .nii.gz file or a folder of them")
    checkpoint = Path(args.checkpoint) if args.checkpoint else newest_run()
    output = Path(args.output)
    calibration = run_calibration(checkpoint) if checkpoint.is_dir() else None
    if args.map_thresholds and calibration is None:
        raise EvaluationError(f"{checkpoint}: found no tuning patients, expected some to fit the thresholds that "
                              "--map-thresholds puts on 0.5; name a run, or leave the flag out")
    names, probabilities, failures = predict_files(checkpoint, Path(args.input), args.device, args.workers)
    if args.map_thresholds:
        probabilities = calibration.map_to_half(probabilities)
        how = f"no probabilities any more: tuned cuts ({calibration.objective}) on 0.5"
    elif args.uncalibrated or calibration is None:
        how = "probabilities as the model gives them, not calibrated"
    else:
        probabilities = calibration.apply(probabilities)
        how = f"calibrated probabilities ({calibration.method}, {calibration.n_patients} tuning patients)"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_table(output, names, probabilities)
    print(f"Wrote {output}: {len(names)} scans, model {checkpoint}; {how}")
    if failures:
        raise EvaluationError(f"{len(failures)} scans could not be read and are not in {output}; they are named above")


def refuse_idle_flags(args: argparse.Namespace) -> None:
    """A flag that the mode would not look at is an error: it may have been meant for another mode."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise EvaluationError("found torchrun with run_task2.py, expected ctclip_training.py; evaluate afterwards")
    training = args.task in ("full", "train")
    for flag, given, belongs in (
        ("--input", args.input, args.task == "predict"),
        ("--map-thresholds", args.map_thresholds, args.task == "predict"),
        ("--uncalibrated", args.uncalibrated, args.task == "predict"),
        ("--checkpoint", args.checkpoint, not training),
        ("--resume", args.resume is not None, training),
        ("--output-dir", args.output_dir, training),
        ("--plan", args.plan, training),
        *((flag, True, args.task in ("full", "evaluate")) for flag in given_evaluation_flags(args)),
    ):
        if given and not belongs:
            raise EvaluationError(f"found {flag} with --mode {args.task}, which does not use it; leave one of them out")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = "; ".join(f"{mode}: {what}" for mode, what in MODES.items())
    parser.add_argument("--mode", dest="task", choices=MODES, default="full", help=modes)
    group = parser.add_argument_group("evaluate and predict")
    group.add_argument("--checkpoint", metavar="RUN", help="run folder, or for predict a CT-CLIP file with a head")
    group.add_argument("--input", metavar="PATH", help="scan or folder of scans to predict")
    group.add_argument("--output", metavar="CSV", default="results/predictions.csv", help="where predictions go")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--map-thresholds", action="store_true",
                      help="values that cut at 0.5 as the tuned thresholds do, as the challenge needs them")
    form.add_argument("--uncalibrated", action="store_true", help="the model's own probabilities")
    add_evaluation_flags(parser)
    add_run_flags(parser)
    add_training_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    args = parse(argv)

    def action() -> None:
        refuse_idle_flags(args)
        settings = settings_from_flags(args)
        if args.task == "predict":
            return predict(args)
        if args.task == "evaluate":
            run = Path(args.checkpoint) if args.checkpoint else newest_run()
        else:
            if args.task == "full" and hasattr(args, "data_dir"):
                load_cohort(args.data_dir, "valid", limit=1)
            run = run_training(args)
            if run is None:  # --plan
                return
        if args.task != "train":
            data_dir = getattr(args, "data_dir", None) if args.task == "evaluate" else None
            folder = foreign_folder(run, data_dir)
            material = run_material(run, data_dir, args.device, args.workers, folder)
            report(material, folder, settings, args.baseline, args.metadata, args.pictures)
        print(f"\nDone in {time.perf_counter() - start:.0f} s: {run}")

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
