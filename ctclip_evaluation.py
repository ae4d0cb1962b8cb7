"""Predictions and labels -> metrics, calibration, thresholds, intervals, a report.

    python ctclip_evaluation.py                                        the newest run under results/
    python ctclip_evaluation.py --checkpoint results/RUN
    python ctclip_evaluation.py --predictions P.csv --labels L.csv [--baseline B.csv]
    python ctclip_evaluation.py --apply results/RUN --predictions NEW.csv
    python ctclip_evaluation.py --example                              a simulated classifier that over-predicts

In a script of your own: `from ctclip_evaluation import evaluate, fit_calibration, load_labels, load_predictions`.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # Ctrl-C during the imports is no traceback; `python -I` finds the suite
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import argparse
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from ctclip.cli import refuse_unused, run_cli
    from ctclip.config import evaluation_flags, evaluation_parser
    from ctclip.errors import UserError
except ImportError as error:  # uploaded without the package, or with one of another version
    if __name__ == "__main__":
        sys.stderr.write(f"error: {error}, expected the folder ctclip; add ctclip.zip, run python ctclip_setup.py\n")
        sys.exit(2)
    raise

if TYPE_CHECKING:
    from ctclip.config import Settings
    from ctclip.evaluation.calibration import fit_calibration, load_calibration
    from ctclip.evaluation.evaluate import evaluate
    from ctclip.evaluation.metrics import EvaluationError, compute_metrics, per_label_metrics
    from ctclip.evaluation.notebook import show
    from ctclip.evaluation.render import format_report
    from ctclip.evaluation.summary import format_summary
    from ctclip.evaluation.tables import EvaluationInputs, load_labels, load_predictions
    from ctclip.evaluation.thresholds import rescale_to_half

__all__ = [
    "EvaluationError", "Settings", "compute_metrics", "evaluate", "fit_calibration", "format_report",
    "format_summary", "load_calibration", "load_labels", "load_predictions", "per_label_metrics", "rescale_to_half",
    "show",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The names above, for scripts that import them; the command line answers --help without torch and pandas."""
    name = {"map_cuts_to_half": "rescale_to_half"}.get(name, name)  # its name before 0.7
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ctclip.evaluation import calibration, evaluate, metrics, notebook, render, summary, tables, thresholds

    modules = (evaluate, calibration, metrics, notebook, render, summary, tables, thresholds)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def main(argv: list[str] | None = None) -> int:
    args = evaluation_parser().parse_args(argv)
    return run_cli(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    check_flags(args)
    from ctclip.evaluation.command import apply_calibration, evaluate_and_write, settings_from_flags
    from ctclip.evaluation.render import check_report_parts

    if args.apply:
        output_dir = Path(args.output_dir or Path("results", "applied"))
        apply_calibration(args.apply, args.predictions, output_dir, args.patients)
        return
    settings = settings_from_flags(args)
    check_report_parts()
    inputs, folder, following = read_inputs(args)
    evaluate_and_write(inputs, folder, settings, args.baseline, args.metadata, args.pictures, args.verbose)
    print(f"Evaluation took {time.perf_counter() - started:.1f} s\n{following}")


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that the chosen source does not use, and for tables that lack their counterpart."""
    tables = {"--predictions": args.predictions, "--labels": args.labels,
              "--tuning-predictions": args.tuning_predictions, "--tuning-labels": args.tuning_labels}
    source = ("apply" if args.apply else "example" if args.example else "tables" if any(tables.values()) else "run")
    uses = {
        "--predictions": ("an evaluation of tables, or --apply,", source in ("tables", "apply")),
        **dict.fromkeys((*list(tables)[1:], "--findings", "--minus-one-is-unknown"),
                        ("an evaluation of tables", source == "tables")),
        **dict.fromkeys(("--checkpoint", "--device", "--workers"), ("an evaluation of a run", source == "run")),
        "--data-dir": ("an evaluation of a run or of tables", source in ("run", "tables")),
        "--patients": ("an evaluation of a run or of tables, or --apply,", source != "example"),
        "--example": ("an evaluation", source == "example"),
        **dict.fromkeys(evaluation_flags(), ("an evaluation", source != "apply")),
        "--pictures": ("an evaluation of a run or of tables", source in ("run", "tables")),
    }
    refuse_unused(args.given, uses)
    if source == "apply" and not args.predictions:
        raise UserError("found --apply without --predictions, expected both; add --predictions FILE.csv")
    if args.tuning_predictions and args.tuning_labels and not args.predictions:
        raise UserError("found tuning tables only, expected --predictions and --labels too; add them")
    for one, other in (("--predictions", "--labels"), ("--tuning-predictions", "--tuning-labels")):
        if source == "tables" and bool(tables[one]) != bool(tables[other]):
            has, lacks = (one, other) if tables[one] else (other, one)
            raise UserError(f"found {has} without {lacks}, expected both; add {lacks} FILE.csv")


def read_inputs(args: argparse.Namespace) -> tuple[EvaluationInputs, Path, str]:
    """(inputs, output folder, what to do next) of what the flags name: the example, tables, or a run."""
    from ctclip.data.label_table import listed_findings
    from ctclip.evaluation.command import EXAMPLE_TABLES, check_shared, example_inputs, next_step
    from ctclip.evaluation.run_folder import RESULT_FILES, check_output_folder, newest_run, results_folder, run_record
    from ctclip.evaluation.tables import EvaluationInputs, patients_of, read_labels, read_predictions
    from ctclip.fileio import make_folder
    from ctclip.inference.run_predictions import run_inputs
    from ctclip.phantoms.cohort import is_phantom_cohort

    if args.example:
        folder = Path(args.output_dir or Path("results", "example"))
        check_output_folder(folder, *RESULT_FILES, *EXAMPLE_TABLES)
        return example_inputs(make_folder(folder, "change --output-dir")), folder, next_step(folder, "example")
    if args.predictions:
        data_dir, given, tuning = Path(args.data_dir) if args.data_dir else None, Path(args.predictions), None
        labels = read_labels(args.labels, listed_findings(args.findings), args.minus_one_is_unknown)
        predictions = read_predictions(given, labels.findings)
        if args.tuning_predictions:
            tuning = (read_predictions(args.tuning_predictions, labels.findings),
                      read_labels(args.tuning_labels, labels.findings, args.minus_one_is_unknown))
        phantom = bool(run_record(given.parent).get("phantom"))  # a phantom run's tables are about phantoms anywhere
        phantom = phantom or (data_dir is not None and is_phantom_cohort(data_dir))
        folder = Path(args.output_dir or Path("results", "evaluation"))
        is_own = given.name == "predictions.csv"
        replaced = [] if is_own and given.parent.resolve() == folder.resolve() else ["predictions.csv"]
        check_output_folder(folder, *RESULT_FILES, *replaced, own=given.parent if is_own else None)
        patients = patients_of(args.patients, predictions)
        return EvaluationInputs(
            predictions, labels, tuning, phantom=phantom, data_dir=data_dir, patients=patients
        ), folder, next_step(folder, "tables")
    run = Path(args.checkpoint) if args.checkpoint else newest_run()
    if not args.checkpoint:
        print(f"Evaluating the newest run, {run} (choose another with --checkpoint)")
    folder = Path(args.output_dir or results_folder(run, args.data_dir))
    if run.is_dir():
        check_output_folder(folder, *RESULT_FILES, own=None if args.data_dir else run)

    check = partial(check_shared, baseline=args.baseline, metadata=args.metadata)
    inputs = run_inputs(run, args.data_dir, args.device, args.workers, folder, args.patients, check)
    return inputs, folder, next_step(run)


if __name__ == "__main__":
    sys.exit(main())
