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
    from ctclip.errors import UserError
    from ctclip.evaluation.run_folder import run_calibration
    from ctclip.inference.scans import check_output, predict, write_predictions
    from ctclip_model import CheckpointError

    try:
        check_output(OUTPUT)
        form = "uncalibrated" if run_calibration(MODEL) is None else "mapped"
        table = predict(INPUT, MODEL, form=form, workers=1)  # a thread: the container's shared memory holds no volume
        write_predictions(OUTPUT, table, MODEL)
    except (UserError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {OUTPUT}: {len(table.attrs['scans'])} scans; {table.attrs['how']}")
    for name, reason in table.attrs["failures"]:
        print(f"warning: answered with the prevalence: {name}: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # where the modules are in a checkout; in the image they are beside this file
    sys.exit(main())
