"""Loading a checkpoint of the published size: peak memory, and time against one plain read of the bytes that are used.

    python tests/benchmarks/loading.py

Random weights under the published keys, with as many bytes of a text tower as the published file has; made anew, which
needs 3.2 GB of disk and 3 GB of memory. Each measurement is in a process of its own, with torch imported before; the
file is in memory (warm), because it was read before. Memory is what is resident, pages of mapped files included. The
plain read fills as many bytes of fresh memory, as torch gives it, from the same file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import Row, peak_memory, run, seconds

PEAK_GOAL, TIME_GOAL = 0.9, 2.0  # GB; times the plain read
TEXT_TOWER = 110_000_000  # parameters


def write_files(folder: Path) -> dict[str, Path]:
    """The same weights as the hub's .pt, as a slim copy, and as a run's folder."""
    import torch
    from helpers_model import PUBLISHED, create_ctclip_checkpoint
    from safetensors.torch import save_file

    from ctclip_model import CTCLIPMultiAbnormalityModel

    state = create_ctclip_checkpoint(PUBLISHED, classifier=True)
    extra = {"text_transformer.x": torch.rand(TEXT_TOWER), "to_visual_latent_extra.weight":
             state["trained_model.to_visual_latent.weight"].clone()}  # fmt: skip
    files = {what: folder / name for what, name in (("the hub's file", "full.pt"), ("a slim copy", "slim.safetensors"))}
    torch.save(state | {f"trained_model.{key}": value for key, value in extra.items()}, files["the hub's file"])
    save_file(state, files["a slim copy"])
    del state, extra
    files["a run"] = folder / "run"
    CTCLIPMultiAbnormalityModel(str(files["a slim copy"])).save_pretrained(files["a run"])
    return files


def load(path: Path):
    from ctclip_model import CTCLIPMultiAbnormalityModel

    return (
        CTCLIPMultiAbnormalityModel.from_pretrained(path) if path.is_dir() else CTCLIPMultiAbnormalityModel(str(path))
    )


def weights_of(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def plain_read(path: Path, size: int) -> None:
    import torch

    left = memoryview(torch.empty(size, dtype=torch.uint8).numpy())
    with open(weights_of(path), "rb", buffering=0) as file:
        while left:
            left = left[file.readinto(left) :]


def reference(path: Path) -> dict:
    """The file's tensors as torch or safetensors load them, under the model's names."""
    import torch
    from safetensors.torch import load_file

    file = weights_of(path)
    state = torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
    return {key.removeprefix("trained_model."): value for key, value in state.items()}


def child(what: str, path: Path) -> None:
    """One measurement, printed as JSON."""
    import torch

    import ctclip_model  # noqa: F401  (imported before, as torch is)

    if what == "peak":
        with peak_memory() as peak:
            model = load(path)
        found = {"peak": peak[0]}
    elif what == "time":
        found = {"seconds": seconds(lambda: load(path))}
    else:
        model = load(path)
        own, expected = model.state_dict(), reference(path)
        size = sum(value.nbytes for value in own.values())
        same = all(torch.equal(value, expected[key]) for key, value in own.items())
        found = {"size": size, "tensors": len(own), "same": same}
    print(json.dumps(found))


def ask(what: str, path: Path, *more: object) -> dict:
    command = [sys.executable, __file__, "--child", what, str(path), *map(str, more)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what, path in write_files(Path(folder)).items():
            right = ask("check", path)
            peak = ask("peak", path)["peak"] / 1e9
            times = [(ask("time", path)["seconds"], ask("read", path, right["size"])["seconds"])
                     for _ in range(args.repeats)]  # fmt: skip
            ours, plain = (min(column) for column in zip(*times, strict=True))
            size, checked = (
                right["size"] / 1e9,
                f"{right['tensors']} tensors, all equal to torch.load's or load_file's",
            )
            detail = f"{size:.2f} GB of tensors in use, of {weights_of(path).stat().st_size / 1e9:.2f} GB on disk"
            rows.append(Row(f"peak memory, {what}", peak, PEAK_GOAL, " GB", detail, checked, right["same"]))
            detail = f"{ours:.2f} s; one read of {size:.2f} GB {plain:.2f} s; best of {args.repeats}, file in memory"
            rows.append(Row(f"time, {what}", ours / plain, TIME_GOAL, " times", detail, checked, right["same"]))
    return rows


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        what, path = sys.argv[2], Path(sys.argv[3])
        if what == "read":
            import torch  # noqa: F401

            print(json.dumps({"seconds": seconds(lambda: plain_read(path, int(sys.argv[4])))}))
        else:
            child(what, path)
        return 0
    return run(__doc__, measure, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
