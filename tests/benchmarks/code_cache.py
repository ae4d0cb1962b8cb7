"""Cost of a frozen epoch from cached codes against encoding anew, at the size of the published CT-CLIP.

    python tests/benchmarks/code_cache.py

Random weights of that size, one phantom as the volume that is encoded for real, and a cache of `--volumes` entries, all
but that one filled with random codes. Exit code 1 where the goal is missed or the latents from the cache are not those
of `model.encode`. Takes about a minute and 2.5 GB of memory.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from helpers_model import PUBLISHED  # noqa: E402

from ctclip.data.cohort import Volume, load_cohort  # noqa: E402
from ctclip.data.feature_cache import FeatureCache, encode_missing  # noqa: E402
from ctclip.data.hounsfield import HuDecision  # noqa: E402
from ctclip.data.preprocessing import read_volume  # noqa: E402
from ctclip.distributed import Ranks  # noqa: E402
from ctclip.phantoms.cohort import write_phantom_cohort  # noqa: E402
from ctclip_model import N_LABELS, CTCLIPMultiAbnormalityModel, create_balanced_loss  # noqa: E402

BATCH_SIZE = 16
GOAL = 1000  # times less than encoding, reading not counted
TOLERANCE = 1e-6


def timed(action: Callable, *arguments) -> tuple[float, Any]:
    """(seconds, result)"""
    start = time.perf_counter()
    result = action(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def train_epoch(model: CTCLIPMultiAbnormalityModel, features_of: Callable[[list[int]], Tensor], count: int) -> None:
    """One pass of the head over `count` volumes in random order; `features_of` gives what the head takes for some."""
    criterion = create_balanced_loss()
    optimizer = torch.optim.AdamW(model.head_parameters())
    for chosen in torch.randperm(count).split(BATCH_SIZE):
        features = features_of(chosen.tolist())
        loss = criterion(model.head(features), torch.zeros(len(chosen), N_LABELS, device=features.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def cached_costs(model: CTCLIPMultiAbnormalityModel, cache: FeatureCache, rows: list[int]) -> tuple[float, float]:
    """Seconds per volume of the first epoch, which makes latents of the codes and keeps them, and of a later one."""
    device = next(model.parameters()).device
    latents = torch.zeros(len(rows), model.sizes.latent, device=device)

    def from_disk(chosen: list[int]) -> Tensor:
        with torch.no_grad():
            latents[chosen] = model.features_from_cache(cache.load([rows[i] for i in chosen]).to(device))
        return latents[chosen]

    train_epoch(model, latents.__getitem__, len(rows))  # warm up: an optimizer's first step imports a good deal
    first, _ = timed(train_epoch, model, from_disk, len(rows))
    later = [timed(train_epoch, model, latents.__getitem__, len(rows))[0] for _ in range(10)]
    return first / len(rows), sum(later) / len(later) / len(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=64, help="entries in the cache (default 64)")
    parser.add_argument("--epochs", type=int, default=20, help="frozen epochs that the mean is over (default 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(PUBLISHED)).to(device).eval()
    model.freeze_backbone()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}, float32")

    with tempfile.TemporaryDirectory() as folder:
        data = write_phantom_cohort(Path(folder, "phantoms"), 1, 1, progress=False)
        volume = load_cohort(data, "train").volumes[0]
        read, (x, _) = timed(read_volume, volume, model.input_shape)
        x = x[None].to(device)
        with torch.no_grad():
            model.encode(x[:, :, : PUBLISHED.temporal_patch])  # warm up
            encoded, latent = timed(model.encode, x)
        print(f"read one volume          {read:8.3f} s  a small phantom; a clinical CT takes longer")
        print(f"encode one volume        {encoded:8.3f} s")

        opened, cache = timed(FeatureCache, Path(folder, "cache"), model)
        stored, rows = timed(encode_missing, model, cache, [volume], device, 0, Ranks(device))
        print(f"open an empty cache      {opened:8.3f} s  hashes the encoder")
        print(f"read, encode, store one  {stored:8.3f} s")
        with torch.no_grad():
            difference = (model.features_from_cache(cache.load(rows).to(device)) - latent).abs().max().item()

        others = [Volume(f"train_{i}_z_1.nii.gz", volume.path, volume.labels) for i in range(1, args.volumes)]
        codes = torch.randint(PUBLISHED.codes, (len(others), *cache.shape))
        cache.append(others, codes, [HuDecision("hu", "")] * len(others))
        cache.close()
        cache = FeatureCache(Path(folder, "cache"), model)  # as a later run finds it
        first, later = cached_costs(model, cache, cache.rows([volume, *others]))
        kilobytes = cache.record_bytes / 1e3

    mean = (first + (args.epochs - 1) * later) / args.epochs
    print(f"\nSeconds per volume and frozen epoch, linear head, {args.volumes} volumes of {kilobytes:.1f} kB on disk")
    print(f"{'':34}{'seconds':>12}{'encoding costs':>16}{'with reading':>16}")
    for name, seconds in (
        ("cached, first epoch (codes)", first),
        ("cached, later epochs (latents)", later),
        (f"cached, mean of {args.epochs} epochs", mean),
    ):
        print(f"{name:34}{seconds:12.6f}{encoded / seconds:15,.0f}x{(encoded + read) / seconds:15,.0f}x")
    enough, equal = encoded / mean >= GOAL, difference <= TOLERANCE
    print(f"\nMean of {args.epochs} epochs: {encoded / mean:,.0f}x, goal {GOAL}x: {'reached' if enough else 'MISSED'}")
    print(f"Latent from the cache against model.encode: {difference:.1e}, at most {TOLERANCE:.0e}: ", end="")
    print("equal" if equal else "DIFFERENT")
    return 0 if enough and equal else 1


if __name__ == "__main__":
    sys.exit(main())
