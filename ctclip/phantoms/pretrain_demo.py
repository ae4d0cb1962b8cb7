"""Pre-trains the small CT-CLIP of the built-in cohort, models/ctclip_demo.pt, from nothing, on phantoms only.

    python -m ctclip.phantoms.pretrain_demo

Four stages, all on phantoms whose seeds no cohort of this project uses. A phantom knows where its findings are, which
teaches more per volume than 18 bits can:
1. Patch embedding and feed-forwards on single patches: which findings are drawn in this patch?
2. The whole tower without its quantiser, on the same question for every token, and on the 18 labels of a volume.
3. Codebook: k-means over the directions of tokens, half of them from patches with a finding.
4. Lengths of the codes, and the projection to the latent, on the labels of volumes.
The projection is the same at every place of the token grid: a few thousand phantoms are too few to learn 256 places
separately. Fine-tuning is free to tell them apart. The heads are thrown away: the file has CT-CLIP's layout without a
classifier, so that the demo trains its own, as a user of the published weights does.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ctclip.cli import OneLineParser
from ctclip.config import SYNTHETIC_NOTE
from ctclip.data.preprocessing import FIELD_OF_VIEW_MM, preprocess_volume
from ctclip.fileio import replacing
from ctclip.phantoms.phantom import make_phantom
from ctclip_model import (
    ABNORMALITIES,
    DEMO_PATH,
    N_LABELS,
    CTCLIPMultiAbnormalityModel,
    TowerSizes,
    asdict,
    published_layout,
)

SIZES = TowerSizes(
    dim=48,
    heads=2,
    dim_head=24,
    patch=6,
    temporal_patch=4,
    grid=16,
    spatial_depth=1,
    temporal_depth=1,
    codes=2048,
    latent=48,
    feedforward=192,
    bias_dim=48,
)
FIRST_SEED = 10_000_000  # training phantoms count up from here, validation phantoms from twice this
BATCH = 4
LATENT_GAIN = 8.0  # sqrt(latent): a unit latent times this has entries of order 1, good for the throw-away head


def token_truth(mask: np.ndarray, spacing: tuple[float, float, float], grid: int) -> np.ndarray:
    """Finding mask (x, y, z) in LPS -> (T, h, w) bool: the tokens whose patch of the 360 mm cube it touches."""
    touched = np.zeros((grid, grid, grid), bool)
    index = np.argwhere(mask)
    position = (index - (np.array(mask.shape) - 1) / 2) * spacing  # mm from the centre, where the crop is centred too
    token = np.floor((position / FIELD_OF_VIEW_MM + 0.5) * grid).astype(int)
    x, y, z = token[((token >= 0) & (token < grid)).all(1)].T
    touched[z, x, y] = True
    return touched


def make_sample(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One phantom, through a file and the real preprocessing: volume, labels (18,), token truth (18, T, h, w)."""
    torch.set_num_threads(1)
    phantom = make_phantom(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "phantom.nii")
        step = np.array([-1, -1, 1]) * phantom.spacing
        nib.save(nib.Nifti1Image(phantom.hu, np.diag([*step, 1.0])), path)
        volume = preprocess_volume(path, shape=SIZES.input_shape)
    truth = np.zeros((N_LABELS, *[SIZES.grid] * 3), bool)
    for name, mask in phantom.masks.items():
        truth[ABNORMALITIES.index(name)] = token_truth(mask, phantom.spacing, SIZES.grid)
    return volume.half().numpy(), phantom.labels, truth


def make_samples(first_seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    with ProcessPoolExecutor() as pool:
        made = pool.map(make_sample, range(first_seed, first_seed + count), chunksize=8)
        volumes, labels, truth = zip(*tqdm(made, total=count, desc="phantoms"), strict=True)
    return tuple(torch.from_numpy(np.stack(arrays)) for arrays in (volumes, labels, truth))


class Trainee(nn.Module):
    """The model with a second, throw-away head on its tokens."""

    def __init__(self):
        super().__init__()
        self.model = CTCLIPMultiAbnormalityModel(sizes=asdict(SIZES), dropout=0.1)
        self.projection = nn.Linear(SIZES.dim, SIZES.latent, bias=False)  # to_visual_latent, the same at every place
        self.token_head = nn.Linear(SIZES.dim, N_LABELS)
        self.register_buffer("token_rate", torch.full((N_LABELS, 1, 1, 1), 0.5))

    def forward(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """-> logits (B, 18), token logits (B, 18, T, h, w); without the quantiser"""
        tokens = self.model.visual_transformer(volume)
        latents = F.normalize(self.projection(tokens.mean((1, 2, 3))), dim=-1)
        return self.model.head(latents * LATENT_GAIN), self.token_head(tokens).movedim(-1, 1)

    @torch.no_grad()
    def finished(self) -> dict[str, Tensor]:
        """CT-CLIP's layout, the shared projection written out for every place of the token grid."""
        places = SIZES.grid**2
        self.model.to_visual_latent.weight.copy_(self.projection.weight.repeat(1, places) / places)
        return {key: value.contiguous() for key, value in published_layout(self.model, classifier=False).items()}

    def loss(self, volume: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
        logits, token_logits = self(volume)
        per_volume = F.binary_cross_entropy_with_logits(logits, labels)
        weight = torch.where(truth > 0, 0.5 / self.token_rate, 0.5 / (1 - self.token_rate))
        per_token = F.binary_cross_entropy_with_logits(token_logits, truth, weight=weight)
        return per_volume + per_token


@torch.no_grad()
def patches_and_findings(trainee: Trainee, data: tuple) -> tuple[Tensor, Tensor]:
    """Patches (n, voxels) float16 with a finding, as many healthy ones of the body, and their findings (n, 18)."""
    volumes, _, truth = data
    patchify = trainee.model.visual_transformer.to_patch_emb[0]
    kept, findings = [], []
    for rows in torch.arange(len(volumes)).split(16):
        patches = patchify(volumes[rows].float()).flatten(0, 3)
        found = truth[rows].movedim(1, -1).flatten(0, 3)
        ill = found.any(1)
        healthy = torch.nonzero(~ill & (patches.mean(1) > -0.95))[:, 0]
        healthy = healthy[torch.randperm(len(healthy))[: int(ill.sum())]]
        chosen = torch.cat([torch.nonzero(ill)[:, 0], healthy])
        kept.append(patches[chosen].half())
        findings.append(found[chosen])
    return torch.cat(kept), torch.cat(findings)


def fit_patches(trainee: Trainee, data: tuple, steps: int, size: int = 2048, peak: float = 3e-3) -> None:
    """Stage 1: embedding and feed-forwards on single patches, without any neighbours.

    A thousand times cheaper per patch than the whole tower, of which most is air and healthy tissue. PEG and attention
    are set to add nothing, and start learning from there in stage 2.
    """
    tower = trainee.model.visual_transformer
    layers = [tower.enc_spatial_transformer.layers[0], tower.enc_temporal_transformer.layers[0]]
    for peg, attention, _, _ in layers:
        for tensor in (peg.dsconv.weight, peg.dsconv.bias, attention.to_out.weight):
            nn.init.zeros_(tensor)
    norms = [tower.enc_spatial_transformer.norm_out, tower.enc_temporal_transformer.norm_out]
    patches, findings = patches_and_findings(trainee, data)
    rate = findings.float().mean(0).clamp(min=1e-4)
    print(f"{len(patches)} patches, {', '.join(f'{r:.3f}' for r in rate.tolist())} of them with each finding")
    embed = tower.to_patch_emb[1:]
    modules = nn.ModuleList([embed, trainee.token_head, *norms, *(layer[3] for layer in layers)])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=peak, weight_decay=0.02)
    losses = []
    for step in tqdm(range(steps), desc="patches"):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, step / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(len(patches), (size,))
        x, truth = embed(patches[rows].float()), findings[rows].float()
        for layer, norm in zip(layers, norms, strict=True):
            x = norm(layer[3](x) + x)
        weight = torch.where(truth > 0, 0.5 / rate, 0.5 / (1 - rate))
        loss = F.binary_cross_entropy_with_logits(trainee.token_head(x), truth, weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 1000 == 999:
            tqdm.write(f"patches {step + 1}/{steps}: loss {np.mean(losses[-1000:]):.4f} (undecided: 0.6931)")


def auroc_per_label(labels: Tensor, scores: Tensor) -> list[float]:
    from sklearn.metrics import roc_auc_score

    return [roc_auc_score(labels[:, i], scores[:, i]) for i in range(N_LABELS)]


def described(auroc: list[float]) -> str:
    lowest = int(np.argmin(auroc))
    return f"macro AUROC {np.mean(auroc):.3f} on unseen phantoms, lowest {ABNORMALITIES[lowest]} {auroc[lowest]:.2f}"


def fit_tower(trainee: Trainee, data: tuple, validation: tuple, epochs: int, peak: float = 2e-3) -> None:
    """Stage 2. Reports two scores of unseen phantoms: the volume head's, and the highest token's."""
    volumes, labels, truth = data
    # A nodule touches 6 of 1728 tokens, septal thickening 350: every finding counts the same, and so do its two sides.
    rate = torch.stack([rows.float().mean((0, 2, 3, 4)) for rows in truth.split(100)]).mean(0)
    trainee.token_rate.copy_(rate.clamp(min=1e-4).view(-1, 1, 1, 1))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=peak, weight_decay=0.05)
    total, step = epochs * (len(labels) // BATCH), 0
    for epoch in range(epochs):
        trainee.train()
        start, losses = time.perf_counter(), []
        for rows in torch.randperm(len(labels)).split(BATCH)[: len(labels) // BATCH]:
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, step / 300) * 0.5 * (1 + math.cos(math.pi * step / total))
            loss = trainee.loss(volumes[rows].float(), labels[rows].float(), truth[rows].float())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        trainee.eval()
        with torch.no_grad():
            outputs = [trainee(rows.float()) for rows in validation[0].split(16)]
        highest = torch.cat([tokens.flatten(2).amax(2) for _, tokens in outputs])
        auroc = auroc_per_label(validation[1], torch.cat([logits for logits, _ in outputs]))
        print(
            f"tower {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}, {described(auroc)}; by the highest token "
            f"{np.mean(auroc_per_label(validation[1], highest)):.3f}; {time.perf_counter() - start:.0f} s",
            flush=True,
        )


@torch.no_grad()
def build_codebook(trainee: Trainee, data: tuple, most: int = 150_000) -> None:
    """k-means on directions, since the quantiser compares cosines: half healthy tokens, and of the others as many of
    each finding, or septal thickening would own most of the codes and nodules none.

    The length of a code is free for the same reason, and carries what a mean over the grid needs: codes of healthy
    patches are made short, so that the few tokens of a small finding are not drowned by the thousand others. Lengths
    start at the largest share of a finding among a code's tokens and are fitted in `fit_codes`.
    """
    from sklearn.cluster import MiniBatchKMeans

    trainee.eval()
    volumes, _, truth = data
    tokens, findings = [], []
    for rows in torch.randperm(len(volumes)).split(16):
        found = truth[rows].movedim(1, -1).flatten(0, 3)  # (tokens, 18)
        ill = found.any(1)
        healthy = torch.nonzero(~ill)[:, 0]
        chosen = torch.cat([torch.nonzero(ill)[:, 0], healthy[torch.randperm(len(healthy))[: int(ill.sum())]]])
        tokens.append(trainee.model.visual_transformer(volumes[rows].float()).flatten(0, 3)[chosen])
        findings.append(found[chosen])
    tokens, findings = torch.cat(tokens), torch.cat(findings)
    rarity = (findings / findings.float().mean(0)).sum(1)
    found, healthy = torch.nonzero(rarity > 0)[:, 0], torch.nonzero(rarity == 0)[:, 0]
    drawn = np.random.default_rng(0).choice(len(found), most // 2, p=(rarity[found] / rarity[found].sum()).numpy())
    keep = torch.cat([found[drawn], healthy[torch.randperm(len(healthy))[: most // 2]]])
    directions, findings = F.normalize(tokens[keep], dim=-1), findings[keep].float()
    means = MiniBatchKMeans(SIZES.codes, batch_size=8192, n_init=1, random_state=0).fit(directions.numpy())
    owner = torch.from_numpy(means.labels_).long()
    counts = torch.bincount(owner, minlength=SIZES.codes)[:, None]
    share = torch.zeros(SIZES.codes, N_LABELS).index_add_(0, owner, findings) / (counts + 1)
    codes = F.normalize(torch.from_numpy(means.cluster_centers_).float(), dim=-1)
    embed = trainee.model.visual_transformer.vq._codebook.embed
    embed[0] = codes * (share.amax(1, keepdim=True) + 0.02)


@torch.no_grad()
def code_histograms(trainee: Trainee, volumes: Tensor) -> Tensor:
    """(N, 1, D, H, W) -> (N, codes): the share of each code among a volume's tokens."""
    trainee.eval()
    rows = []
    for batch in tqdm(volumes.split(16), desc="codes"):
        ids = trainee.model.code_ids(batch.float()).flatten(1)
        rows += [torch.bincount(one, minlength=SIZES.codes).float() / ids.shape[1] for one in ids]
    return torch.stack(rows)


def fit_codes(trainee: Trainee, data: tuple, validation: tuple, epochs: int = 150) -> None:
    """Lengths of the codes and the projection to the latent, on the labels of volumes; the tower stays as it is."""
    codes = trainee.model.visual_transformer.vq._codebook.embed[0].clone()
    directions, lengths = F.normalize(codes, dim=-1), nn.Parameter(codes.norm(dim=-1).log())
    known, unseen = code_histograms(trainee, data[0]), code_histograms(trainee, validation[0])
    labels, unseen_labels = data[1].float(), validation[1].float()

    def logits(histograms: Tensor) -> Tensor:
        mean_token = histograms @ (directions * lengths.exp()[:, None])
        latents = F.normalize(trainee.projection(mean_token), dim=-1)
        return trainee.model.head(latents * LATENT_GAIN)

    parameters = [lengths, *trainee.projection.parameters(), *trainee.model.classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-3)
    for epoch in range(epochs):
        trainee.train()
        for rows in torch.randperm(len(labels)).split(64):
            loss = F.binary_cross_entropy_with_logits(logits(known[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 25 == 24:
            trainee.eval()
            with torch.no_grad():
                auroc = auroc_per_label(unseen_labels, logits(unseen))
            print(f"codes {epoch + 1}/{epochs}: loss {loss.item():.4f}, {described(auroc)}", flush=True)
    trainee.model.visual_transformer.vq._codebook.embed[0] = (directions * lengths.exp()[:, None]).detach()


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--volumes", type=int, default=2400, help="training phantoms (default %(default)s)")
    parser.add_argument("--patch-steps", type=int, default=12000, help="of stage 1 (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="of stage 2 (default %(default)s)")
    parser.add_argument("--output", default=DEMO_PATH, help="where the weights go")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    validation = make_samples(2 * FIRST_SEED, 300)
    data = make_samples(FIRST_SEED, args.volumes)
    trainee = Trainee()
    fit_patches(trainee, data, args.patch_steps)
    fit_tower(trainee, data, validation, args.epochs)
    build_codebook(trainee, data)
    fit_codes(trainee, data, validation)
    with replacing(args.output) as path:
        torch.save(trainee.finished(), path)
    print(f"Wrote {args.output}: {Path(args.output).stat().st_size / 1e6:.2f} MB. {SYNTHETIC_NOTE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
