"""Mean of logits against weights fitted on tuning patients, on simulated predictions.

    python tests/benchmarks/ensemble.py [--cohorts 20]

18 findings at 2 to 35 %, two volumes per patient, 1,500 reported patients. Macro AUROC of the mean, then the change
with weights for each finding: held together as `fit_weights` does, and free. Last, the slope of the logits that
`fit_calibration` has calibrated on the same tuning patients, on reported ones: 1 where the weights cost no calibration.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ctclip.evaluation.calibration import fit_calibration  # noqa: E402
from ctclip.evaluation.ensemble import combine, fit_weights  # noqa: E402

RATES, REPORTED = np.linspace(0.02, 0.35, 18), 1500
FREE = 1e3  # WEIGHT_PRIOR_SD that holds nothing together
CASES = {  # distance of the classes (K, 18), correlation of the members' errors, scale of their logits (K,)
    "5 seeds": (np.full((5, 18), 0.95), 0.8, np.ones(5)),
    "2, one better": (np.outer([1.2, 0.5], np.ones(18)), 0.5, np.ones(2)),
    "2, logits 4 times as large": (np.full((2, 18), 0.95), 0.5, np.array([1, 4])),
    "3, each best in a third": (np.where(np.arange(18) % 3 == np.arange(3)[:, None], 1.3, 0.6), 0.5, np.ones(3)),
    "3, one useless": (np.outer([1, 1, 0], np.ones(18)), 0.3, np.ones(3)),
}


def simulate(
    rng: np.random.Generator, patients: int, distance: np.ndarray, correlation: float, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(labels (N, 18), probabilities (K, N, 18)), two volumes of each patient."""
    labels = np.repeat(rng.random((patients, 18)) < RATES, 2, axis=0).astype(np.int8)
    shared, own = rng.normal(size=(patients, 18)), rng.normal(size=(len(distance), patients, 18))
    errors = np.repeat(np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own, 2, axis=1)
    scores = distance[:, None] * (labels - 0.5) + errors + 0.05 * rng.normal(size=errors.shape)
    return labels, expit(scale[:, None, None] * scores)


def macro_auroc(labels: np.ndarray, values: np.ndarray) -> float:
    return float(np.mean([roc_auc_score(y, p) for y, p in zip(labels.T, values.T, strict=True)]))


def slope(labels: np.ndarray, calibrated: np.ndarray) -> float:
    return float(LogisticRegression(C=np.inf).fit(logit(calibrated).reshape(-1, 1), labels.ravel()).coef_[0, 0])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=20)
    cohorts = parser.parse_args(argv).cohorts
    print("members                     patients    mean  stacked    free   slope: mean  stacked")
    for name, case in CASES.items():
        for patients in (50, 150, 600):
            rows = []
            for cohort in range(cohorts):
                rng = np.random.default_rng(cohort)
                (labels, tuning), (truth, reported) = simulate(rng, patients, *case), simulate(rng, REPORTED, *case)
                who = np.arange(len(labels)) // 2
                row, slopes = [], []
                for weights in (None, fit_weights(labels, tuning, who), fit_weights(labels, tuning, who, FREE)):
                    together = combine(reported, weights)
                    row.append(macro_auroc(truth, together))
                    fitted = fit_calibration(labels, combine(tuning, weights), who, "platt")
                    slopes.append(slope(truth, fitted.apply(together)))
                rows.append([row[0], row[1] - row[0], row[2] - row[0], *slopes[:2]])
            mean, stacked, free, *of_slope = np.mean(rows, axis=0)
            print(f"{name:<27} {patients:>8}  {mean:.4f}  {stacked:+.4f} {free:+.4f}"
                  f"   {of_slope[0]:>11.3f}  {of_slope[1]:>7.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
