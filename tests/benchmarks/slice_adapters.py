"""What a training step of a vision transformer on slices costs by what is adapted: CPU seconds, and the most memory.

    python tests/benchmarks/slice_adapters.py [--model vit_small_patch16_224]

Random weights, random voxels, 2 volumes of 8 slices a step; a process of its own for each row. Speed and memory only.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ROWS = ("forward only", "last:1", "lora", "lora, checkpointing", "lora, 4 of 8 slices", "full", "full, checkpointing")
STEPS = 3  # timed, after one


def measure(name: str, row: str) -> str:
    import torch

    from ctclip_model import CTCLIPMultiAbnormalityModel

    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(None, name, pretrained=False, head="attention")
    model.freeze_backbone()
    if row.startswith("lora"):
        model.add_lora()
    elif not row.startswith("forward"):
        model.unfreeze_backbone(1 if row == "last:1" else None)
    model.train_slices = 4 if "4 of 8" in row else None
    model.set_gradient_checkpointing("checkpointing" in row)
    optimizer = torch.optim.AdamW(model.train().parameter_groups())
    x = torch.rand(2, 1, 24, 224, 224) * 2 - 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(STEPS + 1):
        if step == 1:
            start = time.process_time()
        with torch.set_grad_enabled(not row.startswith("forward")):
            loss = model(x).square().mean()
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    seconds = (time.process_time() - start) / STEPS
    moved = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    return f"| {row} | {moved:.2f} M | {seconds:.2f} s | {memory:.2f} GB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--row", choices=ROWS)
    args = parser.parse_args()
    if args.row:
        print(measure(args.model, args.row))
        return
    print("| adapted | trained | step, of both cores | memory above the weights |\n|---|---|---|---|")
    for row in ROWS:
        command = [sys.executable, __file__, "--model", args.model, "--row", row]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


if __name__ == "__main__":
    main()
