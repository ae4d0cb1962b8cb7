"""Pointing game: how often the strongest point of a heat map lies on the finding, in phantoms, where that is known.

    python tests/benchmarks/pointing_game.py [--phantoms 400] [--heads tests/fixtures/demo_heads.safetensors]

The demo's tower with a linear and an attention head, trained here on 600 phantoms, or read from --heads. Per finding,
over phantoms that have it: a hit is a strongest token whose centre lies within 15 mm of a voxel that the finding was
drawn on (a token of the demo is 22.5 mm wide, one of the published tower 15 mm). Beside it two ways to hit without
looking: "chance", the share of tokens in the body that would be hits, and "same place", the share of hits when the
map comes from a phantom without the finding (it knows where findings of that kind lie, and nothing of this phantom).
Phantoms: this speaks of the maps, not of patients.

The tests read tests/fixtures/demo_heads.safetensors: with another models/ctclip_demo.pt, --save-heads writes it anew.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.spatial import cKDTree
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ctclip.config import SYNTHETIC_NOTE  # noqa: E402
from ctclip.data.body import body_mask, tokens_within  # noqa: E402
from ctclip.data.geometry import Placement, place_volume  # noqa: E402
from ctclip.data.preprocessing import preprocess_volume  # noqa: E402
from ctclip.evaluation.figures import BLUE, GREY, INK, LIGHT, ORANGE, new_figure, write_figure  # noqa: E402
from ctclip.inference.contributions import token_contributions  # noqa: E402
from ctclip.inference.decisions import Decision  # noqa: E402
from ctclip.inference.map_figure import map_picture, write_picture  # noqa: E402
from ctclip.inference.scan_maps import scan_maps, strongest_token  # noqa: E402
from ctclip.phantoms.cohort import write_phantom_cohort  # noqa: E402
from ctclip.phantoms.phantom import Phantom, make_phantom  # noqa: E402
from ctclip.training.loop import TrainingConfig, train  # noqa: E402
from ctclip_model import ABNORMALITIES, DEMO_PATH, CTCLIPMultiAbnormalityModel  # noqa: E402

HEADS = ("linear", "attention")
FIRST_SEED = 30_000_000  # of phantoms that neither the tower nor the heads have seen
WITHIN_MM = 15.0
EXAMPLE = (30_000_036, "Consolidation")
N_LABELS = len(ABNORMALITIES)


@dataclass(frozen=True, eq=False)
class Case:
    """A phantom as the model sees it. volume (1, D, H, W) half; labels (18,); on the token grid (T, h, w): for each
    finding it has, whether a token's centre would be a hit; and which tokens lie in the body, as a map shows them."""

    volume: torch.Tensor
    labels: np.ndarray
    hits: dict[str, np.ndarray]
    body: np.ndarray


def read_phantom(phantom: Phantom, voxels: np.ndarray, shape: Sequence[int]) -> tuple[torch.Tensor, Placement]:
    """Voxels on the phantom's grid, by way of a file: (1, D, H, W), and where the file's voxels are in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "phantom.nii")
        affine = np.diag([*np.array([-1, -1, 1]) * phantom.spacing, 1.0])
        nib.save(nib.Nifti1Image(voxels, affine), path)
        return preprocess_volume(path, shape=shape, assume_hu=True), place_volume(path, shape)  # masks, too


def make_case(seed: int, shape: Sequence[int], grid: tuple[int, int, int]) -> Case:
    torch.set_num_threads(1)
    phantom = make_phantom(seed)
    volume, placement = read_phantom(phantom, phantom.hu, shape)
    # The file's voxel nearest to each token's centre, in mm along the file's axes (x, y, z).
    at = []
    for position, axis, spacing in zip(placement.position, placement.axes, phantom.spacing, strict=True):
        centres = (np.arange(grid[axis]) + 0.5) / grid[axis]
        at.append(np.abs(position[:, None] - centres).argmin(0) * spacing)
    centres = np.stack(np.meshgrid(*at, indexing="ij"), -1).transpose(2, 0, 1, 3)  # (T, h, w, 3): LPS is x, y, z
    hits = {}
    for name, mask in phantom.masks.items():
        if mask.any():
            distance, _ = cKDTree(np.argwhere(mask) * phantom.spacing).query(centres.reshape(-1, 3))
            hits[name] = distance.reshape(grid) <= WITHIN_MM
    body = tokens_within(body_mask(volume[None]), grid)
    return Case(volume.half(), phantom.labels, hits, body)


def make_cases(seeds: Sequence[int], shape: Sequence[int], grid: tuple[int, int, int], workers: int = 2) -> list[Case]:
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(make_case, seeds, [shape] * len(seeds), [grid] * len(seeds), chunksize=4))


def strongest(
    model: CTCLIPMultiAbnormalityModel, cases: Sequence[Case], smooth: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(N, 18, 3) the strongest token of every map; (N, 18) logits."""
    found = [token_contributions(model, case.volume.float()[None], range(N_LABELS), smooth) for case in cases]
    peaks = np.array([[strongest_token(np.where(case.body, values, -np.inf)) for values in contributions.values]
                      for case, contributions in zip(cases, found, strict=True)])  # fmt: skip
    return peaks, np.array([contributions.logits for contributions in found])


def hit_rate(cases: Sequence[Case], peaks: np.ndarray, name: str) -> tuple[float, float, float, int]:
    """(share of hits, chance, share of hits by maps of phantoms without the finding, phantoms that have it)."""
    label = ABNORMALITIES.index(name)
    rows = [i for i, case in enumerate(cases) if name in case.hits]
    without = [i for i, case in enumerate(cases) if not case.labels[label]]
    hits = [cases[i].hits[name][tuple(peaks[i, label])] for i in rows]
    chance = [cases[i].hits[name][cases[i].body].mean() for i in rows]
    same_place = [cases[i].hits[name][tuple(peaks[without, label].T)].mean() for i in rows]
    return float(np.mean(hits)), float(np.mean(chance)), float(np.mean(same_place)), len(rows)


def with_head(name: str, state: dict[str, torch.Tensor]) -> CTCLIPMultiAbnormalityModel:
    """The demo with a head whose tensors are stored as `<name>.<tensor>`."""
    model = CTCLIPMultiAbnormalityModel(DEMO_PATH, head=name)
    start = f"{name}."
    model.classifier.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
    return model.eval()


def trained_heads(work: Path) -> dict[str, torch.Tensor]:
    cohort = write_phantom_cohort(work / "cohort", 600, 20)
    state = {}
    for head in HEADS:
        files = {"data_dir": str(cohort), "ctclip_path": DEMO_PATH, "cache_dir": str(work / "cache")}
        run = train(TrainingConfig(**files, head=head, freeze_backbone=True), work / head)
        model = CTCLIPMultiAbnormalityModel.from_pretrained(run)
        state |= {f"{head}.{key}": value for key, value in model.classifier.state_dict().items()}
    return state


def figure_of(table: dict[str, dict[str, tuple]], path: Path) -> None:
    """Per finding: both heads' share of hits beside the two ways to hit without looking."""
    names = sorted(ABNORMALITIES, key=lambda name: table["attention"][name][0])
    places = np.arange(len(names))
    figure = new_figure(9, 6)
    ax = figure.subplots()
    column = {head: np.array([table[head][name] for name in names]) for head in HEADS}
    ax.hlines(places, column["linear"][:, 0] * 100, column["attention"][:, 0] * 100, color=LIGHT, linewidth=2, zorder=1)
    tick = {"marker": "|", "s": 150, "linewidths": 2.4, "zorder": 2}
    ax.scatter(column["linear"][:, 1] * 100, places, color=INK, label="Chance", **tick)
    ax.scatter(column["attention"][:, 2] * 100, places, color=GREY, label="Same place (attention)", **tick | {"s": 60})
    for head, colour, order in (("linear", ORANGE, 3), ("attention", BLUE, 4)):
        ax.scatter(column[head][:, 0] * 100, places, s=46, color=colour, label=f"Head {head}", zorder=order)
    ax.set_yticks(places, [f"{name} ({table['linear'][name][3]})" for name in names], fontsize=9)
    ax.set(xlim=(-2, 102), ylim=(-0.7, len(names) - 0.3), xlabel="Strongest point within 15 mm of the finding, %")
    means = " and ".join(f"{100 * column[head][:, 0].mean():.0f} % ({head})" for head in HEADS)
    ax.set_title(f"Pointing game, mean {means}", loc="left", fontsize=11, pad=24)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=9, borderaxespad=0.1)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(length=3, color=GREY)
    write_figure(figure, path, SYNTHETIC_NOTE)


def example(model: CTCLIPMultiAbnormalityModel, path: Path) -> None:
    """One map, with the finding as it was drawn."""
    seed, label = EXAMPLE
    phantom = make_phantom(seed)
    volume, placement = read_phantom(phantom, phantom.hu, model.input_shape)
    drawn, _ = read_phantom(phantom, np.where(phantom.masks[label], 1000, -1000).astype(np.int16), model.input_shape)
    contributions = token_contributions(model, volume[None], [ABNORMALITIES.index(label)])
    decision = Decision(label, float(1 / (1 + np.exp(-contributions.logits[0]))), 0.5)
    maps = scan_maps(f"Phantom {seed}", placement, volume[None], [label], [decision], contributions)
    note = f"Blue line: where the finding was drawn. {SYNTHETIC_NOTE}"
    write_picture(map_picture(maps, 0, note, drawn[0].numpy()), path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phantoms", type=int, default=400, help="to play with (default %(default)s)")
    parser.add_argument("--heads", type=Path, help="trained heads, as --save-heads writes them (default: trained anew)")
    parser.add_argument("--save-heads", type=Path, help="write the heads here")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="folder of the figures")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        state = trained_heads(Path(work)) if args.heads is None else load_file(args.heads)
    if args.save_heads:
        save_file(state, args.save_heads)
    models = {head: with_head(head, state) for head in HEADS}
    sizes = models["linear"].sizes
    seeds = range(FIRST_SEED, FIRST_SEED + args.phantoms)
    cases = make_cases(seeds, sizes.input_shape, (sizes.grid,) * 3)
    labels = np.stack([case.labels for case in cases])
    table, aurocs, raw = {}, {}, {}
    for head, model in models.items():
        peaks, logits = strongest(model, cases)
        table[head] = {name: hit_rate(cases, peaks, name) for name in ABNORMALITIES}
        aurocs[head] = [roc_auc_score(labels[:, i], logits[:, i]) for i in range(N_LABELS)]
        peaks, _ = strongest(model, cases, smooth=False)
        raw[head] = np.mean([hit_rate(cases, peaks, name)[0] for name in ABNORMALITIES])
    print(f"\n{'':49}{'linear':>9}{'':16}{'attention':>9}")
    columns = f"{'hits':>9}{'same pl.':>9}{'AUROC':>7}" * 2
    print(f"{'Strongest point on the finding':36}{'n':>5}{'chance':>8}{columns}")
    for i, name in enumerate(ABNORMALITIES):
        columns = "".join(f"{table[h][name][0]:9.2f}{table[h][name][2]:9.2f}{aurocs[h][i]:7.2f}" for h in HEADS)
        print(f"{name:36}{table['linear'][name][3]:5}{table['linear'][name][1]:8.2f}{columns}")
    means = {head: np.mean([table[head][name] for name in ABNORMALITIES], axis=0) for head in HEADS}
    columns = "".join(f"{means[h][0]:9.2f}{means[h][2]:9.2f}{np.mean(aurocs[h]):7.2f}" for h in HEADS)
    print(f"{'Mean':36}{'':5}{means['linear'][1]:8.2f}{columns}")
    print("Without smoothing: " + ", ".join(f"{head} {raw[head]:.2f}" for head in HEADS))
    figure_of(table, args.images / "pointing_game.png")
    example(models["attention"], args.images / "explain_example.png")
    return 0 if all(means[head][0] > means[head][1] for head in HEADS) else 1


if __name__ == "__main__":
    sys.exit(main())
