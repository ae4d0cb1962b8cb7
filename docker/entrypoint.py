"""The challenge container's one command: /input/*.mha -> /output/results.json.

The file is there, with an answer for every scan, from the moment that the model is loaded: the findings' prevalence
until a scan's own answer takes its place, so that a time limit loses nothing that was computed. Exit code 0 whenever
all scans were tried: one that could not be read keeps the prevalence, because a scan that is missing makes the whole
submission fail. Which ones, and why, is on stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctclip.inference.scans import Scan

HERE = Path(__file__).resolve().parent
INPUT = Path(os.environ.get("CTCLIP_INPUT") or "/input")  # an empty variable is none
OUTPUT = Path(os.environ.get("CTCLIP_OUTPUT") or "/output") / "results.json"
MODEL = Path(os.environ.get("CTCLIP_MODEL") or HERE / "model")


def main() -> int:
    from ctclip.cli import run_cli

    return run_cli(answer_all)


def answer_all() -> None:
    from ctclip.evaluation.run_folder import run_calibration
    from ctclip.evaluation.saved_ensemble import labels_of
    from ctclip.fileio import make_folder
    from ctclip.inference.commands import print_warning
    from ctclip.inference.predictions import ResultsFile, check_output, predict_scans, prevalence
    from ctclip.inference.scans import PredictionError

    make_folder(OUTPUT.parent, "mount a folder there that can be written")
    check_output(OUTPUT, labels_of(MODEL))
    form = "uncalibrated" if run_calibration(MODEL) is None else "mapped"
    files: list[ResultsFile] = []

    def on_start(scans: list[Scan], scale: str) -> None:
        files.append(ResultsFile(OUTPUT, scans, prevalence(MODEL)))

    # A thread reads ahead: the container's shared memory holds no volume.
    try:
        predictions = predict_scans(
            INPUT, MODEL, form=form, workers=1, on_start=on_start, on_note=print_warning,
            on_scan=lambda name, row: files[0].answer(name, row),
        )  # fmt: skip
    except PredictionError:  # no scan: nothing is the right answer, and the line says so
        on_start([], form)
        raise
    files[0].close()
    print(f"Wrote {OUTPUT}: {len(predictions.scans)} scans; {predictions.description}")
    for name, reason in predictions.failures:
        print(f"warning: answered with the prevalence: {name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # where the modules are in a checkout; in the image they are beside this file
    sys.exit(main())
