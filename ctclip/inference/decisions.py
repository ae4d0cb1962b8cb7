"""A scan's answers as decisions: probability, threshold, yes or no, and how sure the threshold is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from ctclip.data.tables import CALL_PREFIX, SUMMARY_COLUMN
from ctclip.evaluation.bootstrap import LEVEL
from ctclip.evaluation.calibration import Calibration

DIGITS = 4  # of a probability, or of its distance from 1, in a table
NONE_CALLED = "no finding called"


class OperatingPoint(NamedTuple):
    """How a threshold divided the tuning patients, who chose it: of other patients a little better than it will be."""

    true_positives: int
    positives: int
    true_negatives: int
    negatives: int

    @property
    def words(self) -> str:
        return (f"yes for {self.true_positives} of {self.positives} with it, no for {self.true_negatives} of "
                f"{self.negatives} without")

    def content(self) -> dict[str, Any]:
        """The shares with Wilson's intervals and the numbers that they are of, for JSON."""
        return {"sensitivity": share(self.true_positives, self.positives),
                "specificity": share(self.true_negatives, self.negatives)}


def share(number: int, of: int) -> dict[str, Any] | None:
    """A share with its interval (Wilson, Journal of the American Statistical Association 1927); None of nobody."""
    if not of:
        return None
    interval = binomtest(number, of).proportion_ci(LEVEL, method="wilson")
    return {"value": number / of, "number": number, "of": of, "interval": [interval.low, interval.high]}


@dataclass(frozen=True)
class Decision:
    """One finding of one scan. `probability` and `threshold` are on one scale, the calibrated one where there is a
    calibration; `threshold` is None where no tuning patients chose one, `point` too where they are not known."""

    finding: str
    probability: float
    threshold: float | None
    point: OperatingPoint | None = None

    @property
    def positive(self) -> bool | None:
        """Whether the finding is called; None without a threshold."""
        return None if self.threshold is None else self.probability >= self.threshold

    @property
    def word(self) -> str:
        """yes, no, or "not decided" without a threshold."""
        return {True: "yes", False: "no", None: "not decided"}[self.positive]

    @property
    def numbers(self) -> str:
        """Such as "0.81, cut 0.36"; more digits where these would decide otherwise."""
        if self.threshold is None:
            return f"{self.probability:.2f}"
        if self.threshold > 1:
            return f"{self.probability:.2f}, cut above 1"
        digits = next((n for n in range(2, 16) if self.agrees(float(f"{self.probability:.{n}f}"),
                                                              float(f"{self.threshold:.{n}f}"))), 16)
        return f"{self.probability:.{digits}f}, cut {self.threshold:.{digits}f}"

    def agrees(self, probability: float, threshold: float) -> bool:
        """Whether rounded numbers decide as these do."""
        return (probability >= threshold) == self.positive

    def rounded(self, digits: int = DIGITS) -> float:
        """The probability for a table: so many digits of it, or of its distance from 1, and more where fewer would
        decide otherwise."""
        nearest = min(self.probability, 1 - self.probability)
        places = max(digits, digits - 1 - floor(log10(nearest))) if nearest > 0 else digits
        while places < 17:
            value = round(self.probability, places)
            if self.threshold is None or self.agrees(value, self.threshold):
                return value
            places += 1
        return self.probability


def decide(labels: Sequence[str], probabilities: np.ndarray, calibration: Calibration | None) -> list[Decision]:
    """Of one scan's probabilities (n,) of `labels`, calibrated by `calibration`, if any, whose thresholds decide."""
    thresholds = None if calibration is None else calibration.select(labels).calibrated_thresholds
    return decide_at(labels, probabilities, thresholds, calibration)


def decide_at(
    labels: Sequence[str], values: np.ndarray, thresholds: np.ndarray | None, calibration: Calibration | None
) -> list[Decision]:
    """`decide` on another scale: `thresholds` (n,) are those of `calibration` there."""
    if thresholds is None or calibration is None:
        return [Decision(label, float(value), None) for label, value in zip(labels, values, strict=True)]
    counts = calibration.select(labels).counts
    points = [None] * len(labels) if counts is None else [OperatingPoint(*row) for row in counts.tolist()]
    rows = zip(labels, values, thresholds, points, strict=True)
    return [Decision(label, float(value), float(cut), point) for label, value, cut, point in rows]


def called(decisions: Sequence[Decision]) -> list[Decision]:
    """Those that are positive, the farthest above its threshold first."""
    positive = [decision for decision in decisions if decision.positive]
    return sorted(positive, key=lambda decision: (decision.threshold or 0) - decision.probability)


def summary(decisions: Sequence[Decision]) -> str:
    """A scan in a line: "Pleural effusion (0.81, cut 0.36), Cardiomegaly (0.52, cut 0.44)"; empty where nothing was
    decided."""
    if all(decision.positive is None for decision in decisions):
        return ""
    return ", ".join(f"{each.finding} ({each.numbers})" for each in called(decisions)) or NONE_CALLED


def digits_for(of_finding: Sequence[Decision]) -> int:
    """DIGITS, or more where these would make equal what differs: each probability may become equal to those of a
    thousandth of the scans, so that an AUROC changes by a thousandth at most where half of the scans are negative."""
    different = {each.probability: each for each in of_finding}.values()
    for digits in range(DIGITS, 17):
        most = max(Counter(each.rounded(digits) for each in different).values())
        if most <= 1 + len(of_finding) // 1000:
            return digits
    return 17


def decision_columns(decisions: Mapping[str, Sequence[Decision]]) -> pd.DataFrame:
    """{scan: its decisions} -> a row for each scan: its probabilities, rounded; of decided ones CALL_PREFIX columns, 1
    or 0, and SUMMARY_COLUMN."""
    rows: dict[str, dict[str, Any]] = {}
    digits = [digits_for(of_finding) for of_finding in zip(*decisions.values(), strict=True)]
    for name, of_scan in decisions.items():
        row: dict[str, Any] = {each.finding: each.rounded(n) for each, n in zip(of_scan, digits, strict=True)}
        if text := summary(of_scan):
            row |= {CALL_PREFIX + each.finding: int(bool(each.positive)) for each in of_scan} | {SUMMARY_COLUMN: text}
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def decision_lines(
    decisions: Mapping[str, Sequence[Decision]], most: int, warnings: Mapping[str, str] | None = None
) -> list[str]:
    """What to print: of a single scan a table of its findings, the farthest above its threshold first; of several a
    line for each, of `most`, with its warning."""
    if len(decisions) == 1:
        ((name, of_scan),) = decisions.items()
        told = [f"  warning: {warnings[name]}"] if warnings and name in warnings else []
        return [*finding_lines(of_scan), *told] if summary(of_scan) else []
    more = {name: f"; warning: {text}" for name, text in (warnings or {}).items()}
    lines = [f"  {name}  {text}{more.get(name, '')}" for name, of_scan in decisions.items()
             if (text := summary(of_scan))]  # fmt: skip
    left = [f"  and {len(lines) - most} more in the table"] if len(lines) > most else []
    return lines[:most] + left


def finding_lines(of_scan: Sequence[Decision]) -> list[str]:
    """A scan's findings as a table."""
    wide = max(len(each.finding) for each in of_scan)
    lines = [f"  {'':<{wide}}  probability, cut        of the tuning patients, who chose the cut"]
    for each in sorted(of_scan, key=lambda each: (each.threshold or 0) - each.probability):
        sure = "" if each.point is None else each.point.words
        lines.append(f"  {each.finding:<{wide}}  {each.word:<3}  {each.numbers:<18} {sure}".rstrip())
    return lines
