"""How well fetching, reading and encoding overlap: a stream's time against that of its parts, in the same run.

    python tests/benchmarks/stream.py [--volumes 40]

The hub is the tests' own, in a process of its own, slowed down until fetching takes about as long as encoding: there a
sequence would take twice the time of the slower part, and a perfect overlap once.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
DEMO = TESTS.parent / "models" / "ctclip_demo.pt"


def serve(folder: Path, pause, addresses) -> None:
    from helpers_hub import Hub

    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files = {path.replace("dataset/train/", "dataset/train_fixed/"): content for path, content in files.items()}
    with Hub(files) as hub:
        hub.fault = lambda verb, path, n: "slow" if verb == "GET" else None
        addresses.put(hub.url)
        while True:
            hub.pause = pause.value
            time.sleep(0.05)


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=40)
    args = parser.parse_args()
    from helpers_hub import TOKEN

    from ctclip.phantoms.cohort import write_phantom_cohort

    pause, addresses = multiprocessing.Value("d", 0.0), multiprocessing.Queue()
    with tempfile.TemporaryDirectory() as folder:
        cohort = write_phantom_cohort(Path(folder, "hub"), args.volumes, 2, progress=False)
        server = multiprocessing.Process(target=serve, args=(cohort, pause, addresses), daemon=True)
        server.start()
        os.environ |= {"HF_ENDPOINT": addresses.get(), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1,localhost"}
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = False
        measure(Path(folder), pause)
        server.kill()


def measure(folder: Path, pause) -> None:
    import torch

    from ctclip.data.cohort import load_cohort
    from ctclip.data.feature_cache import FeatureCache, encode_missing
    from ctclip.distributed import Ranks
    from ctclip.hub.download import Selection, download_volumes
    from ctclip.hub.streaming import StreamOptions, stream
    from ctclip_model import CTCLIPMultiAbnormalityModel

    model = CTCLIPMultiAbnormalityModel(str(DEMO)).eval()
    unthrottled = seconds(download_volumes, Selection("train"), folder / "files")
    volumes = load_cohort(folder / "files", "train").volumes
    cache = FeatureCache(folder / "cache_of_files", model)
    encoding = seconds(encode_missing, model, cache, volumes, torch.device("cpu"), 0, Ranks())
    blocks = sum(volume.path.stat().st_size for volume in volumes) / 2**16
    pause.value = 3 * max(encoding - unthrottled, 0) / blocks  # three transfers at a time
    time.sleep(0.2)
    fetching = seconds(download_volumes, Selection("train"), folder / "again")
    options = StreamOptions(folder / "streamed", folder / "cache", DEMO)
    streaming = seconds(stream, Selection("train"), options)
    count = len(volumes)
    print(f"{count} phantoms, {torch.get_num_threads()} threads, encoder {DEMO.name}; seconds")
    print(f"fetch {fetching:.1f}, read and encode {encoding:.1f}, stream {streaming:.1f}")
    print(f"stream / slower part {streaming / max(fetching, encoding):.2f} (1: perfect overlap)")
    print(f"stream / both, one after the other {streaming / (fetching + encoding):.2f}")


if __name__ == "__main__":
    main()
