"""The challenge container's one command: /input/*.mha -> /output/results.json.

Exit code 0 whenever results.json has an answer for every scan: one that could not be read is answered with the
findings' prevalence, because a scan that is missing makes the whole submission fail. Which ones, and why, is on stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
INPUT = Path(os.environ.get("CTCLIP_INPUT", "/input"))
OUTPUT = Path(os.environ.get("CTCLIP_OUTPUT", "/output")) / "results.json"
MODEL = Path(os.environ.get("CTCLIP_MODEL", HERE / "model"))


def main() -> int:
    from ctclip.cli import run_cli

    return run_cli(answer_all)


def answer_all() -> None:
    from ctclip.evaluation.run_folder import run_calibration
    from ctclip.inference.predictions import check_output, predict_scans, write_predictions

    check_output(OUTPUT)
    form = "uncalibrated" if run_calibration(MODEL) is None else "mapped"
    # A thread reads ahead: the container's shared memory holds no volume.
    predictions = predict_scans(INPUT, MODEL, form=form, workers=1)
    write_predictions(OUTPUT, predictions, MODEL)
    print(f"Wrote {OUTPUT}: {len(predictions.scans)} scans; {predictions.description}")
    for name, reason in predictions.failures:
        print(f"warning: answered with the prevalence: {name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # where the modules are in a checkout; in the image they are beside this file
    sys.exit(main())
