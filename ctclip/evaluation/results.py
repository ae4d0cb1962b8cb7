"""What an evaluation is made of and what it gives: typed, between the modules that compute, print and draw.

`Evaluation.metrics` is the content of metrics.json, whose keys scripts rely on; everything else keeps its arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.evaluation.calibration import Calibration
from ctclip.evaluation.tables import Rows

TUNING, CROSS_FITTED = "tuning patients", "cross-fitted by patient"  # FittedThresholds.fitted_on


@dataclass(frozen=True)
class EvaluationInputs:
    """Tables as load_predictions and load_labels give them, and what is known about their origin.

    `tuning` is (predictions, labels) of patients who do not occur in `predictions`. `history` is log.jsonl's list of
    epochs. `data_dir` is the cohort's folder, where volumes and metadata are looked up; `record` is a run's run.json.
    `note` is a disclaimer shown with the results, where they are not of phantoms.
    """

    predictions: pd.DataFrame
    labels: pd.DataFrame
    tuning: tuple[pd.DataFrame, pd.DataFrame] | None = None
    history: list[dict] | None = None
    phantom: bool = False
    data_dir: Path | None = None
    record: Mapping = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class FittedThresholds:
    """Calibration and thresholds of the reported rows, fitted on other patients.

    `calibration` is for new patients. The reported rows have `calibrated` (N, L) probabilities; positive means
    probability >= `thresholds` or, with one for all labels, `global_thresholds`; both broadcast to (N, L).
    `calibrated_thresholds` are `thresholds` on the calibrated scale. `fitted_on` is TUNING or CROSS_FITTED, `n_volumes`
    the number of volumes fitted on. `used_global_threshold` names the labels with one class there; `skipped` counts
    the volumes of the tuning tables that one of them lacks.
    """

    calibration: Calibration
    fitted_on: str
    n_volumes: int
    used_global_threshold: list[str]
    skipped: dict[str, int]
    calibrated: np.ndarray
    thresholds: np.ndarray
    calibrated_thresholds: np.ndarray
    global_thresholds: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: `metrics` as stored in metrics.json, and the arrays that files, figures and the page draw from."""

    metrics: dict
    rows: Rows
    fitted: FittedThresholds
    inputs: EvaluationInputs
