"""VLM3D Task 2 from one command: train, evaluate on unseen patients, predict.

    python run_task2.py                                   the whole job on the built-in cohort of synthetic chests
    python run_task2.py --data-dir D                      the same on CT-RATE, or on a private cohort in its layout
    python run_task2.py --mode evaluate --checkpoint results/RUN
    python run_task2.py --mode predict --checkpoint results/RUN --input SCANS --output probabilities.csv
    python run_task2.py --mode predict --input SCANS --output results.json --map-thresholds       for the challenge
    python run_task2.py --mode predict --input SCAN --explain "Pleural effusion"                  where it is seen
    python run_task2.py --mode predict --checkpoint models/ctclip_zeroshot.pt --prompts my.txt --input SCANS
    python run_task2.py --export onnx --checkpoint results/RUN --output model.onnx

In a script of your own: `from run_task2 import predict` (ctclip/inference/predictions.py says what it takes).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ctclip.config import task_parser

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
    from ctclip.task import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
