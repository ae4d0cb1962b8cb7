"""1,000 resamples of the patients of CT-RATE's valid split, against scikit-learn on the rows drawn, in the same run.

    python tests/benchmarks/bootstrap.py

3,039 volumes of 1,304 patients, 18 labels, simulated predictions. scikit-learn is timed on some of the resamples; its
AUROCs there must be the same to 1e-12.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ctclip.data.ct_rate import PREVALENCE  # noqa: E402
from ctclip.evaluation.bootstrap import draw  # noqa: E402
from ctclip.evaluation.metrics import resampled_decisions, resampled_ranking  # noqa: E402

PATIENTS, VOLUMES = 1304, 3039


def cohort(decimals: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(labels, probabilities, patients); few decimals make ties."""
    rng = np.random.default_rng(seed)
    patients = np.concatenate([np.arange(PATIENTS), rng.integers(0, PATIENTS, VOLUMES - PATIENTS)])
    labels = (rng.random((PATIENTS, 18)) < list(PREVALENCE.values()))[patients].astype(np.int8)
    score = 0.95 * labels + rng.normal(size=labels.shape)
    return labels, np.round(1 / (1 + np.exp(-score)), decimals), patients


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--checked", type=int, default=10, help="resamples that scikit-learn computes too")
    args = parser.parse_args()
    for decimals, what in ((12, "no ties"), (2, "ties")):
        labels, probabilities, patients = cohort(decimals)
        started = time.perf_counter()
        resamples = draw(patients, args.resamples)
        _, columns = resampled_ranking(labels, probabilities, resamples)
        resampled_decisions(labels, probabilities >= 0.5, resamples)
        ours = time.perf_counter() - started
        started, worst = time.perf_counter(), 0.0
        for b in range(args.checked):
            drawn = np.repeat(np.arange(len(labels)), resamples.counts[b].astype(int)[resamples.group])
            for j in range(18):
                auroc = roc_auc_score(labels[drawn, j], probabilities[drawn, j])
                worst = max(worst, abs(auroc - columns["auroc"][b, j]))
        theirs = (time.perf_counter() - started) / args.checked * args.resamples
        if worst > 1e-12:
            raise SystemExit(f"AUROC differs from scikit-learn's by {worst:.1e}")
        print(f"{what:>8}: {args.resamples} resamples x 18 labels x {VOLUMES} volumes, AUROC, average precision, micro "
              f"AUROC and decisions {ours:.1f} s; scikit-learn, AUROC alone {theirs:.0f} s: {theirs / ours:.0f} times; "
              f"largest difference {worst:.0e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
