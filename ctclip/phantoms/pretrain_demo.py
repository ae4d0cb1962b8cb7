"""Pre-trains the small CT-CLIP of the built-in cohort, models/ctclip_demo.pt, from random weights, on phantoms only.

    python -m ctclip.phantoms.pretrain_demo

Four stages, all on phantoms whose seeds no cohort of this project uses. The masks of a phantom's findings
give every token 18 labels, which teach more per volume than the volume's own 18:
1. Patch embedding and feed-forwards on single patches, with the labels of the patch.
2. The whole tower without its quantiser, on the labels of every token and of the volume.
3. Codebook: k-means over the directions of tokens, half of them from patches with a finding.
4. Lengths of the codes, and the projection to the latent, on the labels of volumes.
The projection is the same at every place of the token grid: a few thousand phantoms are too few to learn 256 places
separately; fine-tuning may change that. The heads are not kept: the file has CT-CLIP's layout without a classifier, so
that the demo trains its own, as a user of the published weights does.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm, trange

from ctclip.cli import OneLineParser, run_cli
from ctclip.config import SYNTHETIC_NOTE
from ctclip.data.geometry import FIELD_OF_VIEW_MM
from ctclip.data.preprocessing import preprocess_volume
from ctclip.fileio import replacing
from ctclip.phantoms.phantom import make_phantom
from ctclip_model import ABNORMALITIES, DEMO_PATH, N_LABELS, CTCLIPMultiAbnormalityModel, TowerSizes, published_layout

SIZES = TowerSizes(
    dim=48, heads=2, dim_head=24, patch=6, temporal_patch=4, grid=16, spatial_depth=1, temporal_depth=1, codes=2048,
    latent=48, feedforward=192, bias_dim=48,
)  # fmt: skip
FIRST_SEED = 10_000_000  # training phantoms count up from here, validation phantoms from twice this
BATCH = 4
LATENT_GAIN = 8.0  # sqrt(latent): a unit latent times this has entries of order 1, good for the temporary head


class Samples(NamedTuple):
    volumes: Tensor  # (N, 1, D, H, W) float16
    labels: Tensor  # (N, 18)
    token_labels: Tensor  # (N, 18, T, h, w) bool: the findings drawn in each token's patch


def make_sample(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One phantom, through a file and the real preprocessing: volume, labels (18,), token labels (18, T, h, w)."""
    torch.set_num_threads(1)
    phantom = make_phantom(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "phantom.nii")
        step = np.array([-1, -1, 1]) * phantom.spacing
        nib.save(nib.Nifti1Image(phantom.hu, np.diag([*step, 1.0])), path)
        volume = preprocess_volume(path, shape=SIZES.input_shape)
    token_labels = np.zeros((N_LABELS, *[SIZES.grid] * 3), bool)
    for name, mask in phantom.masks.items():  # (x, y, z) in LPS
        position = (np.argwhere(mask) - (np.array(mask.shape) - 1) / 2) * phantom.spacing  # mm from the crop's centre
        token = np.floor((position / FIELD_OF_VIEW_MM + 0.5) * SIZES.grid).astype(int)
        x, y, z = token[((token >= 0) & (token < SIZES.grid)).all(1)].T
        token_labels[ABNORMALITIES.index(name), z, x, y] = True
    return volume.half().numpy(), phantom.labels, token_labels


def make_samples(first_seed: int, count: int) -> Samples:
    with ProcessPoolExecutor() as pool:
        made = pool.map(make_sample, range(first_seed, first_seed + count), chunksize=8)
        volumes, labels, token_labels = zip(*tqdm(made, total=count, desc="phantoms"), strict=True)
    return Samples(*(torch.from_numpy(np.stack(arrays)) for arrays in (volumes, labels, token_labels)))


class PretrainingModel(nn.Module):
    """The model with a second, temporary head on its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CTCLIPMultiAbnormalityModel(sizes=vars(SIZES), dropout=0.1)
        self.tower: Any = self.model.visual_transformer  # what a ModuleList holds has no type
        self.projection = nn.Linear(SIZES.dim, SIZES.latent, bias=False)  # to_visual_latent, the same at every place
        self.token_head = nn.Linear(SIZES.dim, N_LABELS)

    def logits(self, mean_token: Tensor) -> Tensor:
        """Mean tokens (B, dim) -> (B, 18)."""
        return self.model.head(F.normalize(self.projection(mean_token), dim=-1) * LATENT_GAIN)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """CT-CLIP's layout, the shared projection written out for every place of the token grid."""
        places = SIZES.grid**2
        self.model.to_visual_latent.weight.copy_(self.projection.weight.repeat(1, places) / places)
        return {key: value.contiguous() for key, value in published_layout(self.model, classifier=False).items()}


def balanced_loss(logits: Tensor, labels: Tensor, rate: Tensor) -> Tensor:
    """Cross-entropy in which positives and negatives of each finding weigh the same; rate: its share of positives."""
    weight = torch.where(labels > 0, 0.5 / rate, 0.5 / (1 - rate))
    return F.binary_cross_entropy_with_logits(logits, labels, weight=weight)


def optimize(optimizer: torch.optim.Optimizer, loss: Tensor, clip_norm: float = math.inf) -> float:
    """One step; the loss."""
    optimizer.zero_grad()
    loss.backward()
    if clip_norm < math.inf:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip_norm)
    optimizer.step()
    return loss.item()


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, warmup: int, total: int) -> None:
    """Linear warm-up, cosine decay to 0."""
    optimizer.param_groups[0]["lr"] = peak * min(1, step / warmup) * 0.5 * (1 + math.cos(math.pi * step / total))


def token_findings(data: Samples, rows: Tensor) -> Tensor:
    """(tokens of these volumes, 18) bool."""
    return data.token_labels[rows].movedim(1, -1).flatten(0, 3)


def balanced_rows(findings: Tensor, healthy: Tensor | bool = True) -> Tensor:
    """Indices of all rows with a finding (n, 18), and of as many drawn from the `healthy` ones (n,)."""
    ill = findings.any(1)
    others = torch.nonzero(healthy & ~ill)[:, 0]
    others = others[torch.randperm(len(others))[: int(ill.sum())]]
    return torch.cat([torch.nonzero(ill)[:, 0], others])


def fit_patches(trainee: PretrainingModel, data: Samples, steps: int, size: int = 2048, peak: float = 3e-3) -> None:
    """Stage 1: embedding and feed-forwards on single patches, without any neighbours.

    A thousand times cheaper per patch than the whole tower, of which most is air and healthy tissue. PEG and attention
    are set to add nothing, and start learning from there in stage 2.
    """
    transformers = trainee.tower.enc_spatial_transformer, trainee.tower.enc_temporal_transformer
    layers, norms = [t.layers[0] for t in transformers], [t.norm_out for t in transformers]
    for peg, attention, _, _ in layers:
        for tensor in (peg.dsconv.weight, peg.dsconv.bias, attention.to_out.weight):
            nn.init.zeros_(tensor)
    kept = []  # patches (n, voxels) with a finding, as many healthy ones of the body, and their findings (n, 18)
    for rows in torch.arange(len(data.volumes)).split(16):
        patches = trainee.tower.to_patch_emb[0](data.volumes[rows].float()).flatten(0, 3)
        found = token_findings(data, rows)
        chosen = balanced_rows(found, healthy=patches.mean(1) > -0.95)
        kept.append((patches[chosen].half(), found[chosen]))
    patches, findings = (torch.cat(parts) for parts in zip(*kept, strict=True))
    rate = findings.float().mean(0).clamp(min=1e-4)
    embed = trainee.tower.to_patch_emb[1:]
    modules = nn.ModuleList([embed, trainee.token_head, *norms, *(layer[3] for layer in layers)])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=peak, weight_decay=0.02)
    for step in (bar := trange(steps, desc=f"{len(patches)} patches")):
        set_learning_rate(optimizer, peak, step, 200, steps)
        rows = torch.randint(len(patches), (size,))
        x = embed(patches[rows].float())
        for layer, norm in zip(layers, norms, strict=True):
            x = norm(layer[3](x) + x)
        loss = optimize(optimizer, balanced_loss(trainee.token_head(x), findings[rows].float(), rate))
        bar.set_postfix(loss=f"{loss:.4f}, undecided 0.6931", refresh=False)


def fit_tower(trainee: PretrainingModel, data: Samples, epochs: int, peak: float = 2e-3) -> None:
    """Stage 2: all layers, on tokens and volumes."""
    # A nodule touches 6 of 1728 tokens, septal thickening 350: every finding counts the same, and so do its two sides.
    rate = torch.stack([rows.float().mean((0, 2, 3, 4)) for rows in data.token_labels.split(100)]).mean(0)
    rate = rate.clamp(min=1e-4).view(-1, 1, 1, 1)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=peak, weight_decay=0.05)
    trainee.train()
    steps, step = len(data.labels) // BATCH, 0
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(data.labels)).split(BATCH)[:steps]:
            step += 1
            set_learning_rate(optimizer, peak, step, 300, epochs * steps)
            volumes, labels, token_labels = (values[rows].float() for values in data)
            tokens = trainee.tower(volumes)
            loss = F.binary_cross_entropy_with_logits(trainee.logits(tokens.mean((1, 2, 3))), labels)
            loss = loss + balanced_loss(trainee.token_head(tokens).movedim(-1, 1), token_labels, rate)
            losses.append(optimize(optimizer, loss, clip_norm=1.0))
        print(f"tower {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}", flush=True)


@torch.no_grad()
def build_codebook(trainee: PretrainingModel, data: Samples, most: int = 150_000) -> None:
    """Stage 3: k-means on the directions of `most` tokens, since the quantiser compares cosines. Half are healthy ones,
    of the others as many of each finding, or septal thickening would own most of the codes and nodules none.

    The length of a code is free for the same reason, and carries what a mean over the grid needs: codes of healthy
    patches are made short, so that the few tokens of a small finding are not drowned by the thousand others. Lengths
    start at the largest share of a finding among a code's tokens and are fitted in `fit_codes`.
    """
    trainee.eval()
    kept = []
    for rows in torch.randperm(len(data.volumes)).split(16):
        found = token_findings(data, rows)
        chosen = balanced_rows(found)
        kept.append((trainee.tower(data.volumes[rows].float()).flatten(0, 3)[chosen], found[chosen]))
    tokens, findings = (torch.cat(parts) for parts in zip(*kept, strict=True))
    rarity = (findings / findings.float().mean(0)).sum(1)
    ill, healthy = torch.nonzero(rarity > 0)[:, 0], torch.nonzero(rarity == 0)[:, 0]
    drawn = np.random.default_rng(0).choice(len(ill), most // 2, p=(rarity[ill] / rarity[ill].sum()).numpy())
    keep = torch.cat([ill[drawn], healthy[torch.randperm(len(healthy))[: most // 2]]])
    directions, findings = F.normalize(tokens[keep], dim=-1), findings[keep].float()
    means = MiniBatchKMeans(SIZES.codes, batch_size=8192, n_init=1, random_state=0).fit(directions.numpy())
    code_of = torch.from_numpy(means.labels_).long()
    counts = torch.bincount(code_of, minlength=SIZES.codes)[:, None]
    share = torch.zeros(SIZES.codes, N_LABELS).index_add_(0, code_of, findings) / (counts + 1)
    codes = F.normalize(torch.from_numpy(means.cluster_centers_).float(), dim=-1)
    trainee.tower.vq._codebook.embed[0] = codes * (share.amax(1, keepdim=True) + 0.02)


@torch.no_grad()
def code_histograms(trainee: PretrainingModel, volumes: Tensor) -> Tensor:
    """(N, 1, D, H, W) -> (N, codes): the share of each code among a volume's tokens."""
    ids = torch.cat([trainee.model.code_ids(batch.float()).flatten(1) for batch in volumes.split(16)])
    return torch.stack([torch.bincount(one, minlength=SIZES.codes).float() / len(one) for one in ids])


def fit_codes(trainee: PretrainingModel, data: Samples, validation: Samples, epochs: int = 150) -> None:
    """Stage 4: lengths of the codes and the projection to the latent, on the labels of volumes; the tower stays."""
    trainee.eval()
    embed = trainee.tower.vq._codebook.embed
    directions, lengths = F.normalize(embed[0], dim=-1), nn.Parameter(embed[0].norm(dim=-1).log())
    known, unseen = code_histograms(trainee, data.volumes), code_histograms(trainee, validation.volumes)
    parameters = [lengths, *trainee.projection.parameters(), *trainee.model.classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-3)
    trainee.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(known)).split(64):
            logits = trainee.logits(known[rows] @ (directions * lengths.exp()[:, None]))
            optimize(optimizer, F.binary_cross_entropy_with_logits(logits, data.labels[rows].float()))
    trainee.eval()
    with torch.no_grad():
        embed[0] = directions * lengths.exp()[:, None]
        auroc = roc_auc_score(validation.labels, trainee.logits(unseen @ embed[0]), average=None)
    lowest = ABNORMALITIES[np.argmin(auroc)]
    print(f"macro AUROC {np.mean(auroc):.3f} on unseen phantoms, lowest {lowest} {min(auroc):.2f}")


def pretrain(volumes: int, patch_steps: int, epochs: int, output: str) -> None:
    """All four stages, and the file."""
    torch.manual_seed(0)
    validation = make_samples(2 * FIRST_SEED, 300)
    data = make_samples(FIRST_SEED, volumes)
    trainee = PretrainingModel()
    fit_patches(trainee, data, patch_steps)
    fit_tower(trainee, data, epochs)
    build_codebook(trainee, data)
    fit_codes(trainee, data, validation)
    with replacing(output) as path:
        torch.save(trainee.weights(), path)
    print(f"Wrote {output}: {Path(output).stat().st_size / 1e6:.2f} MB. {SYNTHETIC_NOTE}")


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=2400, help="training phantoms (default %(default)s)")
    parser.add_argument("--patch-steps", type=int, default=12000, help="of stage 1 (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="of stage 2 (default %(default)s)")
    parser.add_argument("--output", default=DEMO_PATH, help="where the weights go")
    args = parser.parse_args(argv)
    return run_cli(lambda: pretrain(args.volumes, args.patch_steps, args.epochs, args.output))


if __name__ == "__main__":
    sys.exit(main())
