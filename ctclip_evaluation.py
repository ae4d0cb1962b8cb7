"""Predictions and labels -> metrics, calibration, thresholds, intervals, a report.

    python ctclip_evaluation.py                                        the newest run under results/
    python ctclip_evaluation.py --checkpoint results/RUN
    python ctclip_evaluation.py --predictions P.csv --labels L.csv [--baseline B.csv]
    python ctclip_evaluation.py --apply results/RUN --predictions NEW.csv
    python ctclip_evaluation.py --example                              from 97 % to honest, on simulated predictions

In a script of your own: `from ctclip_evaluation import evaluate, fit_calibration, load_labels, load_predictions`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ctclip.config import evaluation_parser

if TYPE_CHECKING:
    from ctclip.evaluation.calibration import fit_calibration, load_calibration, rescale_to_half
    from ctclip.evaluation.evaluate import EvaluationError, Settings, evaluate
    from ctclip.evaluation.metrics import compute_metrics, per_label_metrics
    from ctclip.evaluation.tables import load_labels, load_predictions
    from ctclip.evaluation.text_report import format_report

__all__ = [
    "EvaluationError", "Settings", "compute_metrics", "evaluate", "fit_calibration", "format_report",
    "load_calibration", "load_labels", "load_predictions", "rescale_to_half", "per_label_metrics",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The names above, for scripts that import them; the command line answers --help without torch and pandas."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ctclip.evaluation import evaluate

    return getattr(evaluate, name)


def main(argv: list[str] | None = None) -> int:
    args = evaluation_parser().parse_args(argv)
    from ctclip.evaluation.evaluate import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
