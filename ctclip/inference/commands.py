"""The commands of run_task2.py that apply a model: `--mode predict` and `--export onnx`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ctclip.config import PREDICTIONS
from ctclip.evaluation.run_folder import newest_run
from ctclip.inference.onnx_export import describe, export_run
from ctclip.inference.predictions import (
    Predictions,
    check_output,
    labels_of,
    predict_scans,
    rows_table,
    write_predictions,
)
from ctclip.inference.prompts import read_prompts
from ctclip.inference.scans import PredictionError


def predict_command(args: argparse.Namespace) -> None:
    """`--mode predict`: a table of probabilities; scans that cannot be read are listed, and named by the exit code."""
    if not args.input:
        raise PredictionError("--mode predict needs --input, a scan (.nii, .nii.gz, .mha, a DICOM series) or a folder")
    prompts = read_prompts(args.prompts) if args.prompts else None
    checkpoint, output = Path(args.checkpoint) if args.checkpoint else newest_run(), Path(args.output or PREDICTIONS)
    labels = prompts.names if prompts else labels_of(checkpoint)
    check_output(output, labels)
    with PartialTable(output.with_name(f"{output.stem}.part.csv"), labels) as part:
        predictions = predict_scans(
            args.input,
            checkpoint,
            form="mapped" if args.map_thresholds else "uncalibrated" if args.uncalibrated else "calibrated",
            prompts=prompts,
            explain=args.explain,
            explain_dir=output.parent / f"{output.stem}_explain",
            device=args.device,
            workers=args.workers,
            assume_hu=args.assume_hu,
            on_scan=part.append,
            on_note=print_warning,
        )
        write_predictions(output, predictions, checkpoint)
    print_summary(predictions, output, checkpoint)


def print_warning(note: str) -> None:
    """On stderr, above a progress bar."""
    tqdm.write(f"warning: {note}", file=sys.stderr)


class PartialTable:
    """The rows that are done, on the disk at once, so that an interruption loses none; removed when the output has been
    written. In a `with` block: where it ends early, says what is kept. What an earlier command kept under that name
    stays: this one's file then has a number."""

    def __init__(self, path: Path, labels: Sequence[str]):
        numbered = (path.with_name(f"{path.stem}{number}{path.suffix}") for number in count(2))
        self.path = next(name for name in chain([path], numbered) if not name.exists())
        self.labels, self.rows = labels, 0

    def append(self, name: str, row: np.ndarray) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            rows_table({name: row}, self.labels).to_csv(file, header=self.rows == 0)
            file.flush()
            os.fsync(file.fileno())
        self.rows += 1

    def __enter__(self) -> PartialTable:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self.rows:
            return
        kept = f"kept in {self.path}: {self.rows} scans; predict the others by themselves"
        if error is None:
            self.path.unlink()
        elif isinstance(error, KeyboardInterrupt):
            error.args = (kept,)  # what run_cli prints
        else:
            print(f"\nK{kept[1:]}", file=sys.stderr)


def print_summary(predictions: Predictions, output: Path, checkpoint: Path) -> None:
    """What was written; raises PredictionError where scans could not be read."""
    json, failures = output.suffix == ".json", predictions.failures
    rows = len(predictions.scans) if json else len(predictions.table)
    print(f"Wrote {output}: {rows} scans, model {checkpoint}; {predictions.description}")
    if predictions.note:
        print(predictions.note)
    if predictions.heat_maps:
        print(f"Wrote {len(predictions.heat_maps)} heat maps and pictures to {predictions.heat_maps[0].parent}")
    if failures:
        print("\n".join(f"skipped: {name}: {reason}" for name, reason in failures), file=sys.stderr)
        instead = "are answered with the training prevalence" if json else "are not in it"
        raise PredictionError(
            f"{output}: {len(failures)} of {len(predictions.table) + len(failures)} scans could not be read and "
            f"{instead}; they are named above"
        )


def export_command(args: argparse.Namespace) -> None:
    """`--export onnx`: encoder and head as one graph, compared with the model."""
    checkpoint = Path(args.checkpoint) if args.checkpoint else newest_run()
    default = checkpoint / "model.onnx" if checkpoint.is_dir() else checkpoint.with_suffix(".onnx")
    export = export_run(checkpoint, args.output or default, args.device)
    print("\n".join(describe(export, checkpoint)))
