"""Predictions and labels -> metrics, calibration, thresholds, intervals, a report.

    python ctclip_evaluation.py                                        the newest run under results/
    python ctclip_evaluation.py --checkpoint results/RUN
    python ctclip_evaluation.py --predictions P.csv --labels L.csv [--baseline B.csv]
    python ctclip_evaluation.py --predictions A.csv B.csv --labels L.csv    their mean
    python ctclip_evaluation.py --checkpoint RUN1 RUN2 [--save-ensemble NAME]    the same of runs, kept as one
    python ctclip_evaluation.py --apply results/RUN --predictions NEW.csv [--results-json results.json]
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
    from ctclip.evaluation.notebook import show, show_scan
    from ctclip.evaluation.render import format_report
    from ctclip.evaluation.summary import format_summary
    from ctclip.evaluation.tables import EvaluationInputs, load_labels, load_predictions
    from ctclip.evaluation.thresholds import rescale_to_half

__all__ = [
    "EvaluationError", "Settings", "compute_metrics", "evaluate", "fit_calibration", "format_report",
    "format_summary", "load_calibration", "load_labels", "load_predictions", "per_label_metrics", "rescale_to_half",
    "show",
    "show_scan",
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
    source = check_flags(args)
    from ctclip.evaluation.command import (
        apply_calibration,
        check_ensemble,
        ensemble_to_save,
        evaluate_and_write,
        save_evaluated,
        settings_from_flags,
    )
    from ctclip.evaluation.render import check_report_parts

    if args.results_json:
        from ctclip.evaluation.run_folder import newest_run
        from ctclip.inference.results_json import check_results_json, check_thresholds, results_from_evaluation

        runs = (args.checkpoint or [newest_run()]) if source == "run" else []
        check_results_json(args.results_json, args.unit, runs)
        if source in ("apply", "map"):
            print(results_of_table(args))
            return
    if args.apply:
        output_dir = Path(args.output_dir or Path("results", "applied"))
        apply_calibration(args.apply, args.predictions, output_dir, args.patients, args.label_map)
        return
    settings = settings_from_flags(args)
    check_report_parts()
    check_ensemble(args.ensemble, args.predictions or args.checkpoint)
    saved = ensemble_to_save(args.save_ensemble, args.checkpoint, args.ensemble, args.data_dir, args.output_dir)
    inputs, folder, following = read_inputs(args, saved)
    if args.results_json:
        check_thresholds(inputs)
    evaluation = evaluate_and_write(
        inputs, folder, settings, args.baseline, args.metadata, args.pictures, args.verbose
    )
    if saved:
        print(save_evaluated(saved, args.checkpoint, inputs))
    if args.results_json:
        print(results_from_evaluation(args.results_json, evaluation))
    print(f"Evaluation took {time.perf_counter() - started:.1f} s\n{following}")


def check_flags(args: argparse.Namespace) -> str:
    """The source that the flags name: "apply", "map" (tables without labels, for --results-json alone), "example",
    "tables" or "run". Raises UserError for flags that it does not use, and for tables that lack their counterpart."""
    tables = {"--predictions": args.predictions, "--labels": args.labels,
              "--tuning-predictions": args.tuning_predictions, "--tuning-labels": args.tuning_labels}
    maps = args.results_json and args.predictions and not args.labels
    source = ("apply" if args.apply else "example" if args.example else "map" if maps else
              "tables" if any(tables.values()) else "run")
    evaluates, only_json = source not in ("apply", "map"), bool(args.results_json) and source in ("apply", "map")
    fits = only_json and bool(args.apply or args.tuning_predictions)
    uses = {
        "--predictions": ("an evaluation of tables, or --apply,", source in ("tables", "apply", "map")),
        **dict.fromkeys(("--labels", "--findings"), ("an evaluation of tables", source == "tables")),
        "--label-map": ("an evaluation of tables, or --apply without --results-json,",
                        source == "tables" or (source == "apply" and not only_json)),
        **dict.fromkeys(("--tuning-predictions", "--tuning-labels", "--minus-one-is-unknown"),
                        ("an evaluation of tables", source in ("tables", "map"))),
        **dict.fromkeys(("--checkpoint", "--device", "--workers"), ("an evaluation of a run", source == "run")),
        "--data-dir": ("an evaluation of a run or of tables", source in ("run", "tables")),
        "--save-ensemble": ("an evaluation of several runs", source == "run"),
        "--patients": ("an evaluation of a run or of tables, or --apply without --results-json,",
                       source != "example" and not only_json),
        "--example": ("an evaluation", source == "example"),
        "--results-json": ("an evaluation of a run or of tables, or --apply,", source != "example"),
        "--output-dir": ("an evaluation, or --apply without --results-json,", not only_json),
        **dict.fromkeys(set(evaluation_flags()) - {"--save-ensemble"}, ("an evaluation", evaluates)),
        **dict.fromkeys(("--objective", "--prevalence"),
                        ("an evaluation, or thresholds fitted for --results-json,", evaluates or fits)),
        "--pictures": ("an evaluation of a run or of tables", source in ("run", "tables")),
    }
    refuse_unused(args.given, uses)
    if source == "apply" and not args.predictions:
        raise UserError("found --apply without --predictions, expected both; add --predictions FILE.csv")
    if args.tuning_predictions and args.tuning_labels and not args.predictions:
        raise UserError("found tuning tables only, expected --predictions and --labels too; add them")
    pairs = (("--predictions", "--labels"), ("--tuning-predictions", "--tuning-labels"))
    for one, other in {"tables": pairs, "map": pairs[1:]}.get(source, ()):
        if bool(tables[one]) != bool(tables[other]):
            has, lacks = (one, other) if tables[one] else (other, one)
            raise UserError(f"found {has} without {lacks}, expected both; add {lacks} FILE.csv")
    if args.tuning_predictions and args.ensemble == "pooled":
        raise UserError("found --tuning-predictions with --ensemble pooled, expected none, as tuning patients of one "
                        "fold are reported of another; leave them out to cross-fit")
    if args.tuning_predictions and len(args.tuning_predictions) != len(args.predictions):
        raise UserError(f"found {len(args.tuning_predictions)} --tuning-predictions for {len(args.predictions)} "
                        "--predictions, expected one for each, in the same order; add what is missing")
    return source


def results_of_table(args: argparse.Namespace) -> str:
    """--results-json of a table of predictions without labels; -> what to print."""
    from ctclip.evaluation.command import chosen_from_flags, read_applied
    from ctclip.evaluation.tables import read_labels, read_predictions
    from ctclip.inference.results_json import results_from_table, stored_thresholds, tuned_thresholds
    from ctclip_model import ABNORMALITIES

    chosen = chosen_from_flags(args)
    if args.apply:
        calibration = stored_thresholds(args.apply, chosen)
        table = read_applied(args.apply, args.predictions, ABNORMALITIES)
        return results_from_table(args.results_json, table, calibration)
    if len(args.predictions) > 1:
        raise UserError(f"found {len(args.predictions)} --predictions with --results-json alone, expected one; "
                        "evaluate the ensemble with --labels first, then name its folder with --apply")
    table, fitted = read_predictions(args.predictions[0], ABNORMALITIES), None
    if args.tuning_predictions:
        labels = read_labels(args.tuning_labels, ABNORMALITIES, args.minus_one_is_unknown)
        fitted = tuned_thresholds((read_predictions(args.tuning_predictions[0], ABNORMALITIES), labels), chosen)
    return results_from_table(args.results_json, table, fitted)


def read_inputs(args: argparse.Namespace, saved: Path | None = None) -> tuple[EvaluationInputs, Path, str]:
    """(inputs, output folder, what to do next) of what the flags name: the example, tables, or runs, which are kept as
    one in the folder `saved`."""
    from ctclip.evaluation.command import (
        EXAMPLE_TABLES,
        check_shared,
        ensemble_folder,
        example_inputs,
        next_step,
        table_inputs,
    )
    from ctclip.evaluation.run_folder import RESULT_FILES, check_output_folder, newest_run, results_folder
    from ctclip.fileio import make_folder
    from ctclip.inference.run_predictions import ensemble_of_runs, run_inputs

    if args.example:
        folder = Path(args.output_dir or Path("results", "example"))
        check_output_folder(folder, *RESULT_FILES, *EXAMPLE_TABLES)
        return example_inputs(make_folder(folder, "change --output-dir")), folder, next_step(folder, "example")
    if args.predictions:
        inputs, folder = table_inputs(args)
        return inputs, folder, next_step(folder, "tables", inputs.ensemble, inputs.label_map)
    runs = [Path(run) for run in args.checkpoint or [newest_run()]]
    if not args.checkpoint:
        print(f"Evaluating the newest run in results/, {runs[0]} (choose another with --checkpoint)")
    check = partial(check_shared, baseline=args.baseline, metadata=args.metadata)
    source = args.data_dir, args.device, args.workers
    if len(runs) > 1:
        folder = saved or ensemble_folder(args.output_dir, args.ensemble)
        inputs = ensemble_of_runs(runs, args.ensemble, args.allow_partial, *source, args.patients, check)
        return inputs, folder, next_step(folder) if saved else next_step(folder, "tables", inputs.ensemble)
    folder = Path(args.output_dir or results_folder(runs[0], args.data_dir))
    if runs[0].is_dir():
        check_output_folder(folder, *RESULT_FILES, own=None if args.data_dir else runs[0])
    return run_inputs(runs[0], *source, folder, args.patients, check), folder, next_step(runs[0])


if __name__ == "__main__":
    sys.exit(main())
