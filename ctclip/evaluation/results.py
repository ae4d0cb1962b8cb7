"""What an evaluation is made of and what it gives: typed, between the modules that compute, print and draw.

`Evaluation.metrics` is the content of metrics.json, whose keys scripts rely on; everything else keeps its arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ctclip.evaluation.bootstrap import interval
from ctclip.evaluation.calibration import Calibration
from ctclip.evaluation.tables import Rows, VolumeTable
from ctclip_model import ABNORMALITIES

TUNING, CROSS_FITTED = "tuning patients", "cross-fitted by patient"  # FittedThresholds.fitted_on


@dataclass(frozen=True)
class EvaluationInputs:
    """Tables as read_predictions and read_labels give them, and what is known about their origin.

    `tuning` is (predictions, labels) of patients who do not occur in `predictions`. `history` is log.jsonl's list of
    epochs. `data_dir` is the cohort's folder, where volumes and metadata are looked up; `record` is a run's run.json.
    `note` is a disclaimer shown with the results, where they are not of phantoms.
    """

    predictions: VolumeTable
    labels: VolumeTable
    tuning: tuple[VolumeTable, VolumeTable] | None = None
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
class Scores:
    """One way to decide: metrics of all labels, (L,) of each, and both in B resamples of the patients.

    The keys are those of metrics.json. In `per_label_resampled` labels with too few cases are NaN.
    """

    summary: dict[str, float | None]
    per_label: dict[str, np.ndarray]
    resampled: dict[str, np.ndarray]
    per_label_resampled: dict[str, np.ndarray]

    def intervals(self) -> dict[str, list[float] | None]:
        return {key: interval(values) for key, values in self.resampled.items()}

    def label_intervals(self) -> dict[str, dict[str, list[float] | None]]:
        """{label: {metric: interval}}."""
        columns = self.per_label_resampled
        return {
            name: {key: interval(column[:, j]) for key, column in columns.items()}
            for j, name in enumerate(ABNORMALITIES)
        }


@dataclass(frozen=True)
class CalibrationScores:
    """Errors of one table of probabilities as such: `per_label` has "brier", "ece" and "mean" (L,)."""

    per_label: dict[str, np.ndarray]
    ece_if_calibrated: float
    brier_resampled: np.ndarray  # (B, L)

    @property
    def summary(self) -> dict[str, float]:
        """Means over the labels."""
        means = {key: float(column.mean()) for key, column in self.per_label.items()}
        return means | {"ece_if_calibrated": self.ece_if_calibrated}

    def intervals(self) -> dict[str, list[float] | None]:
        return {"brier": interval(self.brier_resampled.mean(axis=1))}

    def label_intervals(self) -> dict[str, list[float] | None]:
        """{label: interval of its Brier score}."""
        return {name: interval(self.brier_resampled[:, j]) for j, name in enumerate(ABNORMALITIES)}


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: `metrics` as stored in metrics.json, and the arrays that files, figures and the page draw from."""

    metrics: dict
    rows: Rows
    fitted: FittedThresholds
    inputs: EvaluationInputs
