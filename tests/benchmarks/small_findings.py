"""Linear against attention head on phantoms, finding by finding, from one cache of code ids.

    python tests/benchmarks/small_findings.py [--cohort D] [--as-shipped]

The demo's tower with all codes brought to length 1: the lengths it ships with were fitted so that a mean over the
token grid works on phantoms, which no published weights were. `--as-shipped` leaves them as they are. A finding is
small where it touches at most 1.5 % of the tokens of a volume that has it. Phantoms: this speaks of the heads, not of
patients.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ctclip.data.cohort import load_cohort  # noqa: E402
from ctclip.data.feature_cache import FeatureCache, encode_missing  # noqa: E402
from ctclip.distributed import Ranks  # noqa: E402
from ctclip.inference.predictor import load_model  # noqa: E402
from ctclip.phantoms.cohort import write_phantom_cohort  # noqa: E402
from ctclip.training.loop import TrainingConfig, train  # noqa: E402
from ctclip_model import ABNORMALITIES, DEMO_PATH  # noqa: E402

CODES = "visual_transformer.vq._codebook.embed"
SMALL = 0.015  # of the tokens
CPU = torch.device("cpu")


def share_of_tokens(volumes: int) -> np.ndarray:
    """(18,) median share of the token grid that each finding touches, in phantoms that have it."""
    from ctclip.phantoms.pretrain_demo import FIRST_SEED, SIZES, make_sample

    touched = np.stack([make_sample(3 * FIRST_SEED + i)[2] for i in range(volumes)]).sum((2, 3, 4))
    return np.array([np.median(column[column > 0]) if column.any() else np.nan for column in touched.T]) / SIZES.grid**3


def aurocs(run: Path, cohort: Path, cache_dir: Path) -> np.ndarray:
    """(18,) AUROC on the unseen split."""
    model = load_model(run)
    volumes = load_cohort(cohort, "valid").volumes
    cache = FeatureCache(cache_dir, model)
    rows = encode_missing(model, cache, volumes, CPU, 0, Ranks())
    with torch.no_grad():
        logits = torch.cat([model.head(model.features_from_cache(cache.load([row]))) for row in rows]).numpy()
    labels = np.stack([volume.labels for volume in volumes])
    return np.array([roc_auc_score(labels[:, i], logits[:, i]) for i in range(len(ABNORMALITIES))])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohort", type=Path, help="phantom cohort in the hub's layout (default: 600 + 250 made anew)")
    parser.add_argument("--as-shipped", action="store_true", help="keep the lengths of the demo's codes")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        cohort = args.cohort or write_phantom_cohort(Path(work, "cohort"), 600, 250)
        state = torch.load(DEMO_PATH, weights_only=True)
        if not args.as_shipped:
            state[CODES] = F.normalize(state[CODES], dim=-1)
        weights = Path(work, "tower.pt")
        torch.save(state, weights)
        cache_dir = Path(work, "cache")
        found = {}
        for head in ("linear", "attention"):
            config = TrainingConfig(
                data_dir=str(cohort),
                ctclip_path=str(weights),
                cache_dir=str(cache_dir),
                head=head,
                freeze_backbone=True,
            )
            found[head] = aurocs(train(config, Path(work, head)), cohort, cache_dir)
        share = share_of_tokens(60)
    print(f"\n{'AUROC on unseen phantoms':36}{'tokens':>8}{'linear':>9}{'attention':>11}")
    for i in np.argsort(share):
        print(f"{ABNORMALITIES[i]:36}{share[i]:8.2%}{found['linear'][i]:9.3f}{found['attention'][i]:11.3f}")
    small = share <= SMALL
    means = {head: (values[small].mean(), values.mean()) for head, values in found.items()}
    for title, k in ((f"Mean of the {small.sum()} small ones", 0), ("Mean of all", 1)):
        print(f"{title:36}{'':8}{means['linear'][k]:9.3f}{means['attention'][k]:11.3f}")
    return 0 if means["attention"][0] > means["linear"][0] else 1


if __name__ == "__main__":
    sys.exit(main())
