"""The commands of run_task2.py that apply a model: `--mode predict`, `--export onnx`, `--export features`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

from tqdm.auto import tqdm

from ctclip import __version__
from ctclip.cli import refuse_unused
from ctclip.config import PREDICTIONS
from ctclip.data.label_table import listed_findings
from ctclip.data.tables import CALIBRATED, MAPPED, UNCALIBRATED, formula_note, listing
from ctclip.evaluation.command import chosen_from_flags
from ctclip.evaluation.figures import check_matplotlib
from ctclip.evaluation.run_folder import from_working_folder, list_names, newest_run, run_record
from ctclip.evaluation.saved_ensemble import labels_of, saved_ensemble
from ctclip.fileio import check_writable
from ctclip.formatting import plural, size_text
from ctclip.inference.answers import check_answers_output, is_answers, write_answers
from ctclip.inference.decisions import decision_lines
from ctclip.inference.feature_export import Source, cohort_items, export_features, scan_items
from ctclip.inference.feature_export import export_lines as feature_lines
from ctclip.inference.fusion import runs_as_one
from ctclip.inference.heat_maps import parse_labels
from ctclip.inference.onnx_export import check_onnx_path, export_lines, export_run
from ctclip.inference.part_files import PartFiles, part_path
from ctclip.inference.predictions import (
    Predictions,
    check_output,
    predict_scans,
    thresholds_beside,
    write_predictions,
)
from ctclip.inference.prompts import read_prompts
from ctclip.inference.run_predictions import cache_folder
from ctclip.inference.scan_page import PageFacts, ScanPage
from ctclip.inference.scans import PredictionError, find_scans
from ctclip.memory import torchrun_number
from ctclip.paths import script
from ctclip.shard import Shard

MOST_LISTED = 10  # scans whose decisions are printed

def predict_command(args: argparse.Namespace) -> None:
    """`--mode predict`: a table of probabilities; scans that cannot be read are listed, and named by the exit code."""
    if not args.input:
        raise PredictionError("--mode predict needs --input, a scan (.nii, .nii.gz, .mha, a DICOM series) or a folder")
    if args.ensemble == "pooled":
        raise PredictionError("found --ensemble pooled with --mode predict, expected mean or stacked, as all runs "
                              "predict all scans; choose one")
    runs = args.checkpoint or [newest_run()]
    if args.explain and len(runs) > 1:
        raise PredictionError(f"found --explain with {len(runs)} runs, expected one, as each has heat maps of its own; "
                              "name one with --checkpoint")
    with runs_as_one(runs, args.ensemble) as checkpoint:
        _predict(args, checkpoint, " ".join(map(str, runs)))


def _predict(args: argparse.Namespace, checkpoint: Path, named: str) -> None:
    """`predict_command` with the run, or the ensemble, that `--checkpoint` names as `named`."""
    prompts, chosen = read_prompts(args.prompts) if args.prompts else None, chosen_from_flags(args)
    output = Path(args.output or PREDICTIONS)
    labels = prompts.names if prompts else labels_of(checkpoint)
    if is_answers(output):
        check_answers_output(output)
    else:
        check_output(output, labels)
    _check_chosen(args, output)
    _check_several(args.shard, output)
    explain_dir = explain_folder(output)
    if args.explain:
        check_matplotlib()
        check_writable(explain_dir, "name another --output")
        parse_labels(args.explain, labels)
    shard = Shard.named(args.shard)
    making = ScanPage(output) if output.suffix == ".html" else nullcontext()
    with _part_files(output, shard) as parts, making as page:
        predictions = predict_scans(
            args.input,
            checkpoint,
            form=MAPPED if args.map_thresholds else UNCALIBRATED if args.uncalibrated else CALIBRATED,
            objective=chosen.get("objective"),
            calibration=chosen.get("method"),
            prevalence=chosen.get("prevalence"),
            prompts=prompts,
            explain=args.explain,
            explain_dir=explain_dir,
            page=page,
            device=args.device,
            workers=args.workers,
            assume_hu=args.assume_hu,
            parts=parts,
            on_note=print_warning,
        )
        if shard.ranks.is_main and not shard.named_by_hand:
            _write(output, predictions, checkpoint, named, page)
    shard.ranks.destroy()
    if shard.named_by_hand:
        _print_part(parts, predictions, named)
    elif shard.ranks.is_main:
        print_predictions(predictions, _table_of(output), named)
        if saved_ensemble(checkpoint) is None and not args.explain and not prompts:
            _print_next(args.input, checkpoint, output, predictions, labels)


def _check_several(shard: str | None, output: Path) -> None:
    """Raises PredictionError for an output that several processes cannot make together."""
    if output.suffix == ".html" and (shard or torchrun_number("WORLD_SIZE", 1) > 1):
        raise PredictionError(f"{output}: found a page for several processes, expected one, as a page holds the slices "
                              "of every scan; predict a .csv with them, and a page of the scans to show with one")
    if shard and output.suffix != ".csv":
        raise PredictionError(f"{output}: found --shard {shard} for a {output.suffix}, expected a .csv, into which the "
                              "parts are merged; name one (results.json is made of it: ctclip_evaluation.py "
                              "--predictions TABLE --results-json FILE)")


def _part_files(output: Path, shard: Shard) -> PartFiles:
    if output.suffix == ".html":
        return PartFiles(output, shard, False, f"a page begins anew, --output {_table_of(output)} goes on from there")
    return PartFiles(output, shard)


def _table_of(output: Path) -> Path:
    """The output, or the table beside a page."""
    return output.with_suffix(".csv") if output.suffix == ".html" else output


def _write(output: Path, predictions: Predictions, checkpoint: Path, named: str, page: ScanPage | None) -> None:
    table = _table_of(output)
    if is_answers(output):
        write_answers(output, predictions, checkpoint)
    else:
        write_predictions(table, predictions, checkpoint)
    if page is not None:
        size = page.finish(_page_facts(predictions, table, named))
        print(f"Wrote {output}: {plural(len(page.rows), 'scan')}, {size_text(size)}; open it in a browser")


def _print_next(
    scans: str, checkpoint: Path, output: Path, predictions: Predictions, labels: Sequence[str]
) -> None:
    if _table_of(output).suffix == ".csv" and len(predictions.table):
        highest = predictions.table[list(labels)].mean().idxmax()
        flags = {"--checkpoint": str(checkpoint), "--input": scans, "--explain": listing([highest])}
        given = " ".join(f"{flag} {shlex.quote(value)}" for flag, value in flags.items())
        print(f"Next: python {script('run_task2.py')} --mode predict {given}")


def _print_part(parts: PartFiles, predictions: Predictions, named: str) -> None:
    """What --shard has written, and how it becomes a table; raises PredictionError where scans could not be read."""
    shard = parts.shard
    part = f"part {shard.index + 1} of {shard.count}, model {named}"
    print(f"Wrote {parts.path}: {plural(len(predictions.table), 'scan')}, {part}; {predictions.description}")
    others = (part_path(parts.output, f"{part}of{shard.count}") for part in range(1, shard.count + 1))
    paths = " ".join(shlex.quote(str(path)) for path in (parts.output, *others))
    print(f"Next, with all parts at hand: python -m ctclip.inference.merge {paths}")
    _raise_failures(parts.path, predictions, "have no row in it")


def _page_facts(predictions: Predictions, table: Path, checkpoint: str) -> PageFacts:
    facts = [("Model", checkpoint), ("Numbers", predictions.description)]
    if predictions.calibration is not None:
        facts.append(("Cuts", f"tuned for {predictions.calibration.objective}"))
    facts.append(("Written", f"{datetime.now():%Y-%m-%d %H:%M}, ctclip {__version__}"))
    return PageFacts(facts, predictions.note, predictions.failures, table.name)


def explain_folder(output: Path) -> Path:
    """Where heat maps lie, in a folder for each scan."""
    return output.parent / f"{output.stem}_explain"


def _check_chosen(args: argparse.Namespace, output: Path) -> None:
    """Raises UserError for flags on calibration and thresholds that would change nothing of what is written."""
    calibrated, table = not (args.map_thresholds or args.uncalibrated), output.suffix != ".json" or is_answers(output)
    used = args.map_thresholds or (calibrated and table)
    refuse_unused(args.given, {
        "--map-thresholds": ("a .csv or the challenge's .json, as a page and an answers.json have the cuts,",
                             output.suffix != ".html" and not is_answers(output)),
        "--objective": ("--map-thresholds, or a table of calibrated probabilities,", used),
        "--calibration": ("calibrated probabilities (no --map-thresholds, no --uncalibrated)", calibrated),
        "--prevalence": ("calibrated probabilities or --map-thresholds", not args.uncalibrated),
    })  # fmt: skip


def print_warning(note: str) -> None:
    """On stderr, above a progress bar."""
    tqdm.write(f"warning: {note}", file=sys.stderr)


def print_predictions(predictions: Predictions, output: Path, checkpoint: str) -> None:
    """What was written; raises PredictionError where scans could not be read."""
    if output.suffix == ".csv" and (formulas := formula_note(predictions.table.index)):
        print_warning(formulas)
    json = output.suffix == ".json" and not is_answers(output)
    rows = len(predictions.scans) if json else len(predictions.table)
    print(f"Wrote {output}: {plural(rows, 'scan')}, model {checkpoint}; {predictions.description}")
    if output.suffix == ".csv" and predictions.scale not in (MAPPED, UNCALIBRATED):
        print(f"Wrote {thresholds_beside(output)}: its calibration, and thresholds on both scales")
    if not json and len(predictions.table):
        undecided = f"No finding is called yes or no: {checkpoint} has no tuning patients who chose thresholds"
        lines = decision_lines(predictions.decisions, MOST_LISTED, predictions.warnings)
        print("\n".join(lines) or undecided)
    if predictions.note:
        print(predictions.note)
    if predictions.heat_maps:
        print(f"Wrote {len(predictions.heat_maps)} files of heat maps to {explain_folder(output)}")
    _raise_failures(output, predictions, "are answered with the training prevalence" if json else "are not in it")


def _raise_failures(output: Path, predictions: Predictions, instead: str) -> None:
    if failures := predictions.failures:
        print("\n".join(f"skipped: {name}: {reason}" for name, reason in failures), file=sys.stderr)
        raise PredictionError(
            f"{output}: {len(failures)} of {len(predictions.table) + len(failures)} scans could not be read and "
            f"{instead}; they are named above"
        )


def export_onnx_command(args: argparse.Namespace) -> None:
    """`--export onnx`: encoder and head as one graph, compared with the model."""
    checkpoint = Path(args.checkpoint[0]) if args.checkpoint else newest_run()
    default = checkpoint / "model.onnx" if checkpoint.is_dir() else checkpoint.with_suffix(".onnx")
    output = Path(args.output or default)
    check_onnx_path(output)
    if not args.output and checkpoint.is_dir():  # training removes it with the weights that it was made of
        list_names(checkpoint, output.name)
    export = export_run(checkpoint, output, args.device)
    print("\n".join(export_lines(export, checkpoint)))


def export_features_command(args: argparse.Namespace) -> None:
    """`--export features`: of scans, of a cohort, or of the run's own."""
    checkpoint = Path(args.checkpoint[0]) if args.checkpoint else newest_run()
    beside = checkpoint.name if checkpoint.is_dir() else checkpoint.stem
    output = Path(args.output or checkpoint.with_name(f"{beside}_features"))
    record = run_record(checkpoint) if checkpoint.is_dir() else {}
    export = export_features(
        _volumes_to_export(args, record), checkpoint, output, args.export_tokens,
        getattr(args, "cache_dir", None) or cache_folder(record), args.device, args.workers,
    )  # fmt: skip
    print("\n".join(feature_lines(export, checkpoint)))
    if export.note:
        print(export.note)
    if export.failures:
        total = export.volumes + len(export.failures)
        raise PredictionError(f"{output}: {len(export.failures)} of {total} volumes could not be read and are not in "
                              "it; they are named above")  # fmt: skip


def _volumes_to_export(args: argparse.Namespace, record: Mapping) -> Source:
    of_cohort = dict.fromkeys(("--data-dir", "--patients", "--findings", "--minus-one-is-unknown", "--cache-dir"),
                              ("a cohort (no --input)", not args.input))  # fmt: skip
    refuse_unused(args.given, {**of_cohort, "--assume-hu": ("--input", bool(args.input))})
    if args.input:
        scans = find_scans(args.input, print_warning)
        return scan_items(scans, args.assume_hu)
    config, given = record.get("config", {}), vars(args)
    own = given.get("data_dir") is None
    data_dir = given.get("data_dir") or from_working_folder(record, record.get("data_dir"))
    if data_dir is None:
        raise PredictionError("--export features of a model without a cohort of its own needs --data-dir, a cohort, "
                              "or --input, scans")  # fmt: skip
    named = listed_findings(given.get("findings")) or (record.get("labels") if own else None)
    patients = given.get("patients") or (from_working_folder(record, config.get("patients")) if own else None)
    unknown = given.get("minus_one_is_unknown") or bool(own and config.get("minus_one_is_unknown"))
    return cohort_items(data_dir, patients, named, unknown)
