"""One unfrozen step of the tower at the published size: time against its matrix products, gradients, memory.

    python tests/benchmarks/unfrozen_step.py

Forward and backward of one volume, random weights, float32 on the CPU, with and without gradient checkpointing; of two
steps in succession, as in training, the first may have to wait until the machine gives it memory: the shorter counts.
The floor counts the products of a forward pass three times, with checkpointing four times. Gradients are compared with
those of the plain encoder, on a third of the volume, which is what that one has the memory for. Takes about five
minutes and 9 GB.
"""

from rows import Row, peak_memory, run, seconds  # puts the project and the tests' helpers on the path

# isort: split
import sys
from argparse import Namespace
from dataclasses import asdict

import plain_encoder
import torch
from encoder import floor, patchy_volume
from helpers_model import PUBLISHED
from torch import Tensor

from ctclip_model import CTCLIPMultiAbnormalityModel, published_layout

PLAIN_SLICES = 8 * PUBLISHED.temporal_patch
SHIFT = "spatial_rel_pos_bias.net.2.bias"  # shifts all similarities alike: its gradient is rounding


def step(model: CTCLIPMultiAbnormalityModel, volume: Tensor, direction: Tensor) -> None:
    (model.visual_transformer(volume) * direction).sum().backward()


def largest_difference(model: CTCLIPMultiAbnormalityModel, volume: Tensor) -> float:
    """Of the gradients of all the tower's parameters, as a share of the plain encoder's own norm."""
    state = {key: value.clone().requires_grad_() for key, value in published_layout(model, classifier=False).items()
             if value.is_floating_point()}  # fmt: skip
    plain = plain_encoder.tokens_before_codes(state, volume)
    direction = torch.randn_like(plain)
    (plain * direction).sum().backward()
    del plain
    worst = 0.0
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_gradient_checkpointing(checkpointing)
        step(model, volume, direction)
        for name, parameter in model.visual_transformer.named_parameters():
            if name == SHIFT:
                continue
            expected = state["visual_transformer." + name].grad
            worst = max(worst, ((parameter.grad - expected).norm() / expected.norm()).item())
    return worst


def measure(args: Namespace) -> list[Row]:
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(PUBLISHED))
    model.unfreeze_backbone()
    volume = patchy_volume(model.input_shape)
    grid = PUBLISHED.grid
    direction = torch.randn(1, grid, grid, grid, PUBLISHED.dim)
    peaks: dict[bool, float] = {}
    for checkpointing in (True, False):  # the one that needs less first: memory that was freed is not counted again
        model.set_gradient_checkpointing(checkpointing)
        with peak_memory() as peak:
            step(model, volume, direction)
        peaks[checkpointing] = peak[0] / 1e9
    peaks[False] = max(peaks.values())

    floors, times = [], {False: [], True: []}
    for _ in range(args.repeats):  # in turns: the machine may slow down meanwhile
        with torch.no_grad():
            floors.append(floor(model))
        for checkpointing, of_kind in times.items():
            model.set_gradient_checkpointing(checkpointing)
            of_kind += [seconds(lambda: step(model, volume, direction)) for _ in range(2)]
    least, difference = min(floors), largest_difference(model, volume[:, :, :PLAIN_SLICES])
    checked, sound = f"gradients of the tower differ from plain code's by at most {difference:.1e}", difference < 1e-4
    rows = []
    for checkpointing, often, how in ((False, 3, ""), (True, 4, ", checkpointing")):
        took = min(times[checkpointing])
        rows.append(
            Row(
                f"unfrozen step of the tower{how}, float32, against {often} x the forward products",
                took / (often * least), 1.25, "x",
                f"step {took:.2f} s, products {least:.2f} s; memory {peaks[checkpointing]:.2f} GB", checked, sound,
            )
        )  # fmt: skip
    memory = "one volume, with the gradients, beyond the weights"
    return [
        *rows,
        Row("its memory with checkpointing", peaks[True], 3.0, " GB", memory, checked, sound),
        Row("gradients against plain code's", difference, 1e-4, "", memory, checked, sound),
    ]


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, repeats=2))
