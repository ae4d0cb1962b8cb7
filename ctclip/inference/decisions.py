"""A scan's answers as decisions: probability, threshold, yes or no, and how sure the threshold is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ctclip.evaluation.calibration import Calibration


@dataclass(frozen=True)
class Decision:
    """One finding of one scan. `probability` and `threshold` are on one scale, the calibrated one where there is a
    calibration; `threshold` is None where no tuning patients chose one."""

    finding: str
    probability: float
    threshold: float | None

    @property
    def positive(self) -> bool | None:
        """Whether the finding is called; None without a threshold."""
        return None if self.threshold is None else self.probability >= self.threshold

    @property
    def word(self) -> str:
        """yes, no, or "not decided" without a threshold."""
        return {True: "yes", False: "no", None: "not decided"}[self.positive]


def decide(labels: Sequence[str], probabilities: np.ndarray, calibration: Calibration | None) -> list[Decision]:
    """Of one scan's probabilities (n,) of `labels`, as its reader is told them: calibrated by `calibration`, if any,
    whose thresholds decide."""
    thresholds = [None] * len(labels) if calibration is None else calibration.select(labels).calibrated_thresholds
    rows = zip(labels, probabilities, thresholds, strict=True)
    return [Decision(label, float(p), None if cut is None else float(cut)) for label, p, cut in rows]
