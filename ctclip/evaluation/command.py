"""What the commands that evaluate share: settings from flags; an evaluation printed and written; `--apply`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ctclip.config import CALIBRATION_FILE, Settings
from ctclip.data.cohort import read_metadata
from ctclip.data.tables import CohortError
from ctclip.errors import UserError
from ctclip.evaluation.calibration import load_calibration, read_prevalence
from ctclip.evaluation.cases import with_pictures, worst_cases
from ctclip.evaluation.evaluate import evaluate_tables
from ctclip.evaluation.output import write_calibrated, write_results
from ctclip.evaluation.render import format_report
from ctclip.evaluation.results import EvaluationInputs
from ctclip.evaluation.run_folder import APPLIED_FILES, PAGE, check_output_folder, run_metadata
from ctclip.evaluation.tables import read_predictions, rows_of
from ctclip.evaluation.thresholds import objective_score
from ctclip.fileio import make_folder
from ctclip.formatting import percent

RESAMPLES_BETWEEN = 100, 10_000  # fewer say nothing, more need more memory than they are worth


def settings_from_flags(args: argparse.Namespace) -> Settings:
    """The Settings that the flags of add_evaluation_flags ask for; raises for a wrong value before any work."""
    objective_score(args.objective)
    low, high = RESAMPLES_BETWEEN
    if not low <= args.resamples <= high:
        raise UserError(f"found --resamples {args.resamples}, expected {low} to {high:,}; 1000 are usual")
    if args.pictures < 0:
        raise UserError(f"found --pictures {args.pictures}, expected 0 or more; 0 shows none")
    if args.baseline:
        read_predictions(args.baseline)
    if args.metadata:
        read_metadata(args.metadata)
    return Settings(
        args.objective, args.calibration, args.unit, read_prevalence(args.prevalence) if args.prevalence else None,
        args.resamples, allow_partial=args.allow_partial,
    )


def evaluate_and_write(
    inputs: EvaluationInputs,
    output_dir: Path,
    settings: Settings | None = None,
    baseline: str | None = None,
    metadata: str | None = None,
    pictures: int = 1,
) -> None:
    """Evaluates, prints the report, writes the files.

    `baseline` and `metadata` are files; `pictures` says how many of the most wrong volumes of each label and kind are
    shown as slices on the page.
    """
    other = read_predictions(baseline) if baseline else None
    groups = read_metadata(metadata) if metadata else run_metadata(inputs.data_dir)
    volumes = inputs.predictions.frame.index
    if metadata and not set(groups or ()) & set(volumes):
        raise UserError(f"{metadata}: found no row for any of the {len(volumes)} volumes, expected rows named as they "
                        "are; check VolumeName")
    evaluation = evaluate_tables(inputs, settings or Settings(), other, groups)
    print(format_report(evaluation.metrics))
    cases = worst_cases(evaluation.rows, evaluation.fitted)
    unread: list[tuple[str, str]] = []
    if inputs.data_dir is not None and pictures:
        try:
            cases, unread = with_pictures(cases, evaluation.rows.unit, inputs.data_dir, pictures)
        except CohortError as error:  # the volumes may be elsewhere; the metrics need none of them
            unread = [("any volume", str(error))]
    write_results(output_dir, evaluation, cases)
    print(f"\nWrote {output_dir}: {PAGE}, metrics.json, tables (*.csv), {CALIBRATION_FILE}, figures (*.png)")
    for name, reason in unread:
        print(f"No picture of {name}: {reason}")


def apply_calibration(source: str, predictions: str, output_dir: Path) -> None:
    """`--apply`: other predictions, calibrated and rescaled by a stored calibration, as two tables in `output_dir`."""
    path = Path(source)
    calibration = load_calibration(path / CALIBRATION_FILE if path.is_dir() else path)
    frame = read_predictions(predictions).frame
    rows = rows_of(frame, None, list(frame.index), calibration.unit)
    check_output_folder(make_folder(output_dir, "change --output-dir"))
    write_calibrated(output_dir, calibration, rows.names, rows.probabilities)
    positive = (rows.probabilities >= calibration.thresholds).mean()
    print(f"{len(rows):,} {rows.unit}s; calibration {calibration.method}, thresholds for {calibration.objective}: "
          f"positive rate {percent((rows.probabilities >= 0.5).mean())} at 0.5 uncalibrated, {percent(positive)} tuned")
    print(f"Wrote {output_dir}: {APPLIED_FILES[0]} (calibrated probabilities), {APPLIED_FILES[1]} (tuned thresholds "
          "rescaled to 0.5)")
