"""The encoder at the published size: its time against its matrix products, its codes against plain code, its memory.

    python tests/benchmarks/encoder.py

Random weights and a random volume of that size, float32 on the CPU, one volume. Takes about two minutes and 5 GB.
"""

from rows import Row, best_of, peak_memory, run, seconds  # puts the project and the tests' helpers on the path

# isort: split
import math
import sys
from argparse import Namespace
from dataclasses import asdict

import plain_encoder
import torch
import torch.nn.functional as F
from helpers_model import PUBLISHED
from torch import Tensor

from ctclip_model import CTCLIPMultiAbnormalityModel, published_layout

NEAR_TIE = 1e-5  # of cosine similarity


def products(model: CTCLIPMultiAbnormalityModel) -> list[tuple[int, int, int, int]]:
    """(rows, inner, columns, how often) of every matrix product with weights in a forward pass, attention's apart."""
    s = model.sizes
    tokens, inner = s.grid**3, s.heads * s.dim_head
    layers = s.spatial_depth + s.temporal_depth
    of_a_layer = [
        (s.dim, inner),
        (s.dim, 2 * inner),
        (inner, s.dim),
        (s.dim, 2 * s.feedforward),
        (s.feedforward, s.dim),
    ]
    shapes = [(tokens, s.temporal_patch * s.patch**2, s.dim, 1), (tokens, s.dim, s.codes, 1)]
    return shapes + [(tokens, rows, columns, layers) for rows, columns in of_a_layer]


def attentions(model: CTCLIPMultiAbnormalityModel) -> list[tuple[int, int, int, int]]:
    """(sequences times heads, tokens, head width, how often): two products of tokens x tokens x width each."""
    s, plane = model.sizes, model.sizes.grid**2
    return [
        (s.grid * s.heads, plane, s.dim_head, s.spatial_depth),
        (plane * s.heads, s.grid, s.dim_head, s.temporal_depth),
    ]


def flops(model: CTCLIPMultiAbnormalityModel) -> float:
    in_layers = sum(2 * math.prod(shape) for shape in products(model))
    return in_layers + sum(4 * n * t * t * k * count for n, t, k, count in attentions(model))


def floor(model: CTCLIPMultiAbnormalityModel) -> float:
    """Seconds that this machine's matrix products take at all these shapes, each by itself: by the faster of the two
    libraries that torch has, operands laid out as it likes them."""
    total = 0.0
    for rows, inner, columns, count in products(model):
        a, b, out = torch.randn(rows, inner), torch.randn(columns, inner), torch.empty(rows, columns)
        ways = [lambda: torch.mm(a, b.T, out=out)]  # noqa: B023
        if torch.backends.mkldnn.is_available():
            packed = a.to_mkldnn(), b.to_mkldnn()
            ways.append(lambda: F.linear(*packed))  # noqa: B023
        total += count * min(best_of(2, *ways))
    for n, tokens, width, count in attentions(model):
        q, out = torch.randn(n, tokens, width), torch.empty(n, tokens, width)
        scores = torch.empty(n, tokens, tokens)
        for action in (lambda: torch.bmm(q, q.mT, out=scores), lambda: torch.bmm(scores, q, out=out)):  # noqa: B023
            total += count * min(best_of(2, action))
    return total


def flipped(tokens: Tensor, codebook: Tensor, ids: Tensor, true_ids: Tensor) -> tuple[int, float]:
    """How many ids differ, and the largest margin in cosine similarity, in float64, among those."""
    where = (ids != true_ids).nonzero(as_tuple=True)
    rows = plain_encoder.cosines(tokens[where].double(), codebook.double())
    margin = rows.gather(-1, true_ids[where][:, None]) - rows.gather(-1, ids[where][:, None])
    return len(where[0]), margin.abs().max().item() if len(margin) else 0.0


def patchy_volume(shape: tuple[int, int, int]) -> Tensor:
    """(1, 1, D, H, W) in [-1, 1]: noise on every scale, since white noise alone gives tokens that are all alike."""
    volume = torch.zeros(1, 1, *shape)
    for step in (1, 4, 16, 48):
        noise = torch.randn(1, 1, *(math.ceil(size / step) for size in shape))
        volume += F.interpolate(noise, shape, mode="nearest")
    return volume.tanh_()


@torch.inference_mode()
def measure(args: Namespace) -> list[Row]:
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(PUBLISHED)).eval()
    volume = patchy_volume(model.input_shape)
    model.encode(volume[:, :, : PUBLISHED.temporal_patch])  # warm up
    with peak_memory() as peak:
        model.encode(volume)

    floors, times = [], []
    for _ in range(args.repeats):  # in turns: the machine may slow down meanwhile
        floors.append(floor(model))
        times.append(seconds(lambda: model.encode(volume)))
    least, took, work = min(floors), min(times), flops(model)

    ids, latents = model.code_ids(volume), model.encode(volume)
    state = published_layout(model, classifier=False)
    plain = {}
    plain_took = seconds(lambda: plain.update(zip(("tokens", "ids", "latents"), plain_encoder.encode(state, volume))))  # noqa: B905
    count, margin = flipped(plain["tokens"], model.visual_transformer.vq._codebook.embed[0], ids, plain["ids"])
    agree = 1 - count / ids.numel()
    off = (model.visual_transformer(volume) - plain["tokens"]).abs().max().item()
    difference = (latents - plain["latents"]).abs().max().item()
    distinct = len(ids.unique())
    sound = agree >= 0.9999 and margin < NEAR_TIE and off < 1e-3 and difference < 1e-4 and distinct > 1000
    checked = (
        f"{count} of {ids.numel()} code ids differ (margin {margin:.1e}; {distinct} distinct), tokens by {off:.1e} "
        f"of up to {plain['tokens'].abs().max():.1f}, latents by {difference:.1e}"
    )
    rate = f"{work / 1e9:.0f} GFLOP at {work / least / 1e9:.0f} GFLOP/s"
    return [
        Row(
            "encoder, published size, float32, against its matrix products", took / least, 1.2, "x",
            f"encoder {took:.2f} s, products {least:.2f} s ({rate}); plain code {plain_took:.1f} s", checked, sound,
        ),
        Row("code ids that differ from plain code's", 100 * (1 - agree), 0.01, " %", rate, checked, sound),
        Row("encoder, memory beyond weights and input", peak[0] / 1e9, 0.8, " GB", "one volume", checked, sound),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, repeats=3))
