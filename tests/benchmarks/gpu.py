"""The encoder at the published size on a GPU: volumes per second, share of its rate in halves, agreement with float32.

    python tests/benchmarks/gpu.py [--device cuda]

Random weights, random volumes. Float32, products in halves (bf16 or fp16, see `ctclip_model.halves_product`), plain
autocast for comparison, and the seconds that torch.compile needs before it pays. Not one of all.py's: needs a GPU.
"""

from rows import Row, best_of, run, seconds  # makes the rooms and the tests' helpers importable

# isort: split
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict

import torch
from encoder import flops, patchy_volume, products
from helpers_model import PUBLISHED
from torch import Tensor

from ctclip_model import CTCLIPMultiAbnormalityModel
from ctclip_predict import choose_precision

BATCH = 4


def measure(args: Namespace) -> list[Row]:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: found no CUDA device, expected one; run it on a machine with a GPU", file=sys.stderr)
        raise SystemExit(2)
    half = choose_precision(device) if device.type == "cuda" else torch.bfloat16
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {half}, batches of {BATCH}")
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(PUBLISHED)).eval().to(device)
    torch.nn.init.normal_(model.classifier.weight, std=5.0)  # probabilities all over (0, 1)
    volumes = torch.cat([patchy_volume(model.input_shape) for _ in range(BATCH)]).to(device)

    def waiting(action: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return timed

    def answers(name: str) -> tuple[float, Tensor, Tensor]:
        """Seconds per volume, code ids, probabilities."""
        model.multiply_in_halves(half if name == "halves" else None)
        autocast = torch.autocast(device.type, half) if name == "autocast" else nullcontext()
        with torch.inference_mode(), autocast:
            model(volumes)  # warm up
            took = best_of(args.repeats, waiting(lambda: model(volumes)))[0] / BATCH
            return took, model.code_ids(volumes).cpu(), model(volumes).float().sigmoid().cpu()

    results = {name: answers(name) for name in ("float32", "halves", "autocast")}
    model.multiply_in_halves(None)
    rate = rate_in_halves(model, half, device, waiting, args.repeats)
    exact = results["float32"]
    rows = []
    for name, (took, ids, probabilities) in results.items():
        agree = (ids == exact[1]).float().mean().item()
        off = (probabilities - exact[2]).abs().max().item()
        share = flops(model) / took / rate
        figures = (
            f"{1 / took:.1f} volumes/s, {share:.0%} of {rate / 1e12:.1f} Tflop/s in {half}, codes equal {agree:.4%}"
        )
        print(f"{name:9} {figures}, probabilities within {off:.1e}")
        if name == "halves":
            rows.append(Row("GPU, probabilities in halves", off, 5e-3, "", figures, "against float32", agree > 0.999))
    with torch.inference_mode():
        tower = torch.compile(model.visual_transformer)
        first = seconds(waiting(lambda: tower(volumes)))
        compiled, eager = best_of(
            args.repeats, waiting(lambda: tower(volumes)), waiting(lambda: model.visual_transformer(volumes))
        )
    print(f"torch.compile, float32: {first:.0f} s, then {compiled:.3f} s for {BATCH} volumes instead of {eager:.3f} s")
    return rows


def rate_in_halves(
    model: CTCLIPMultiAbnormalityModel, half: torch.dtype, device: torch.device, waiting: Callable, repeats: int
) -> float:
    """Operations per second of plain products in `half` at the encoder's own shapes."""
    total, operations = 0.0, 0.0
    for rows, inner, columns, count in products(model):
        a, b = (torch.randn(n, inner, device=device, dtype=half) for n in (rows * BATCH, columns))
        total += count * best_of(repeats + 1, waiting(lambda: a @ b.T))[0]  # noqa: B023
        operations += 2 * count * rows * BATCH * inner * columns
    return operations / total


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, device="cuda", repeats=5))
