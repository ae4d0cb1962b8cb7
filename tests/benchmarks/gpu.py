"""The encoder at the published size on a GPU: volumes per second, share of its products' rate, agreement with the CPU.

    python tests/benchmarks/gpu.py [--device cuda]

Random weights, random volumes. Float32, autocast for comparison (bf16 or fp16), and the seconds that torch.compile
needs before it pays. Not one of all.py's: needs a GPU.
"""

from rows import Row, best_of, run, seconds  # puts the project and the tests' helpers on the path

# isort: split
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict

import torch
from encoder import flops, patchy_volume, products
from helpers_model import PUBLISHED

from ctclip.inference.predictor import choose_precision
from ctclip_model import CTCLIPMultiAbnormalityModel

BATCH = 4


def measure(args: Namespace) -> list[Row]:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: found no CUDA device, expected one; run it on a machine with a GPU", file=sys.stderr)
        raise SystemExit(2)
    half = choose_precision(device) if device.type == "cuda" else torch.bfloat16
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, batches of {BATCH}")
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(PUBLISHED)).eval()
    torch.nn.init.normal_(model.classifier.weight, std=5.0)  # probabilities all over (0, 1)
    volumes = torch.cat([patchy_volume(model.input_shape) for _ in range(BATCH)])
    with torch.inference_mode():
        expected_ids, expected = model.code_ids(volumes), model(volumes).sigmoid()
    model, volumes = model.to(device), volumes.to(device)

    def waiting(action: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return timed

    rows = []
    for dtype in (torch.float32, half):
        context = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
        with torch.inference_mode(), context:
            model(volumes)  # warm up
            took = best_of(args.repeats, waiting(lambda: model(volumes)))[0] / BATCH
            ids, probabilities = model.code_ids(volumes).cpu(), model(volumes).float().sigmoid().cpu()
        rate = product_rate(model, dtype, device, waiting, args.repeats)
        agree, off = (ids == expected_ids).float().mean().item(), (probabilities - expected).abs().max().item()
        figures = (
            f"{1 / took:.1f} volumes/s, {flops(model) / took / rate:.0%} of {rate / 1e12:.1f} Tflop/s, "
            f"codes equal {agree:.4%}"
        )
        print(f"{dtype}: {figures}, probabilities within {off:.1e}")
        if dtype == torch.float32:  # what predicting and encoding use
            rows.append(Row("GPU, probabilities in float32", off, 5e-3, "", figures, "against the CPU", agree > 0.999))
    with torch.inference_mode():
        tower = torch.compile(model.visual_transformer)
        first = seconds(waiting(lambda: tower(volumes)))
        compiled, eager = best_of(
            args.repeats, waiting(lambda: tower(volumes)), waiting(lambda: model.visual_transformer(volumes))
        )
    print(f"torch.compile, float32: {first:.0f} s, then {compiled:.3f} s for {BATCH} volumes instead of {eager:.3f} s")
    return rows


def product_rate(
    model: CTCLIPMultiAbnormalityModel, dtype: torch.dtype, device: torch.device, waiting: Callable, repeats: int
) -> float:
    """Operations per second of plain products at the encoder's own shapes."""
    total, operations = 0.0, 0.0
    for rows, inner, columns, count in products(model):
        a, b = (torch.randn(n, inner, device=device, dtype=dtype) for n in (rows * BATCH, columns))
        total += count * best_of(repeats + 1, waiting(lambda: a @ b.T))[0]  # noqa: B023
        operations += 2 * count * rows * BATCH * inner * columns
    return operations / total


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, device="cuda", repeats=5))
