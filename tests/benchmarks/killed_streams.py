"""Kills the processes of streams with SIGKILL at random moments, each while it is in work, goes on to the end, and
compares the cache with that of one undisturbed process: the same volumes, each once, with the same codes.

    python tests/benchmarks/killed_streams.py --kills 20

torchrun starts ctclip_setup.py in four processes against the tests' own hub and starts all again when one dies. Every
fifth kill hits torchrun itself: the same command is started again at once, while the four that it left are in work and
are killed next. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from helpers_hub import TOKEN  # noqa: E402
from helpers_stream import cache_of, disk_in_use, entries, volumes_in  # noqa: E402
from stream import serve  # noqa: E402

from ctclip.phantoms.cohort import write_phantom_cohort  # noqa: E402

PROCESSES, RESTARTS = 4, 3
WEIGHTS = TESTS / "fixtures" / "tiny_a_classfine.pt"
DISK_GB = 0.016  # of volumes of 1 MB, each process has room for three
LONGEST = 1.5  # seconds between the first process in work and a kill
OF_TORCHRUN = 5  # every fifth kill
PATIENCE = 180  # seconds without a process in work
SMALL_BLOCKS = """
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # small files arrive in blocks, as large ones
"""


def command(processes: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                f"--max-restarts={RESTARTS}"] if processes > 1 else []  # fmt: skip
    where = ["--data-dir", "D", "--cache-dir", "C", "--ctclip-path", str(WEIGHTS), "--device", "cpu"]
    limits = ["--disk-gb", str(DISK_GB)]
    script = str(TESTS.parent / "ctclip_setup.py")
    return [sys.executable, *launcher, script, "--data", "train", "--stream-cache", *where, *limits]


class Streams:
    """The streams in one folder: starts, workers, kills. `killed`: how many, "worker" or "torchrun"."""

    def __init__(self, folder: Path, generator: random.Random):
        self.folder, self.generator = folder, generator
        self.starts = 0
        self.killed: Counter[str] = Counter()
        self.first_seen: dict[int, float] = {}
        self.lost: dict[int, int] = {}  # workers whose launcher was killed: {process: rank}
        folder.mkdir()

    def start(self, processes: int) -> None:
        self.starts += 1
        with open(self.folder / "log.txt", "a") as log:
            self.launcher = subprocess.Popen(command(processes), stdout=log, stderr=log, cwd=self.folder)

    def workers(self) -> dict[int, int]:
        """{process: rank} of those at present: the ones that torchrun left, or else its own."""
        self.lost = {process: rank for process, rank in self.lost.items() if is_alive(process)}
        found = self.lost or children_with_ranks(self.launcher.pid)
        for process in found:
            self.first_seen.setdefault(process, time.time())
        return found

    def is_in_work(self, process: int, rank: int) -> bool:
        """Whether a file in its folder of files in transit is its own, not one that an earlier process left."""
        staging = self.folder / "D" / f".stream-{rank + 1}of{PROCESSES}"
        with suppress(FileNotFoundError):
            files = [path for path in staging.rglob("*") if path.is_file()]
            return any(path.stat().st_mtime > self.first_seen[process] for path in files) and is_alive(process)
        return False

    def kill_one(self) -> None:
        """Waits for a process in work and then for a random moment; kills one that is in work then, if the one chosen
        is. Starts the command again where it has ended."""
        end = time.monotonic() + PATIENCE
        while not any(self.is_in_work(*worker) for worker in self.workers().items()):
            if self.launcher.poll() == 0:
                raise SystemExit(f"the stream ended after {self.killed.total()} kills; raise --volumes")
            if self.launcher.poll() is not None:
                self.start(PROCESSES)
            if time.monotonic() > end:
                raise SystemExit(f"no process in work for {PATIENCE} s:\n{self.log()[-3000:]}")
            time.sleep(0.02)
        time.sleep(self.generator.uniform(0, LONGEST))
        workers = self.workers()
        in_work = [process for process, rank in workers.items() if self.is_in_work(process, rank)]
        if in_work and not self.lost and self.killed.total() % OF_TORCHRUN == OF_TORCHRUN - 1:
            self.launcher.kill()
            self.launcher.wait()
            self.killed["torchrun"] += 1
            self.lost = workers
            self.start(PROCESSES)
        elif in_work:
            os.kill(self.generator.choice(in_work), signal.SIGKILL)
            self.killed["worker"] += 1

    def finish(self) -> None:
        """On to the end, without kills."""
        for _ in range(20):
            if self.launcher.wait() == 0:
                return
            self.start(PROCESSES)
        raise SystemExit(f"did not end:\n{self.log()[-3000:]}")

    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def end(self) -> None:
        """Kills what is left, after an error."""
        for process in (*self.workers(), self.launcher.pid):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children_with_ranks(process: int) -> dict[int, int]:
    """{child: its RANK} of a torchrun process; none while it has not started them."""
    found = {}
    with suppress(FileNotFoundError, ProcessLookupError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):
                for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"RANK="):
                        found[int(child)] = int(variable.removeprefix(b"RANK="))
    return found


@contextmanager
def highest_disk_use(folder: Path):
    """Yields a list that holds, after the block, the most bytes on the disk, sampled, and the number of samples."""
    most, ended = [0, 0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.02):
            with suppress(FileNotFoundError):  # a manifest's folder that is not there yet
                most[:] = max(most[0], disk_in_use(folder)), most[1] + 1

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield most
    finally:
        ended.set()
        sampler.join()


def problems(folder: Path, undisturbed: Path, most: int) -> list[str]:
    """What is not as it must be, in a few words each."""
    expected, found = (entries(cache_of(each / "C", str(WEIGHTS))) for each in (undisturbed, folder))
    names = [json.loads(line)["name"] for path in (folder / "D").glob("*.jsonl") for line in path.open()]
    different = [name for name in expected if found.get(name) != expected[name]]
    staged = [*volumes_in(folder / "D"), *(str(path) for path in (folder / "D").rglob(".*"))]
    wrong = {
        f"{len(different)} volumes missing or with other codes": different,
        "volumes that are not of the stream": found.keys() - expected.keys(),
        "manifests that do not name each volume once": sorted(names) != sorted(expected),
        f"files left behind: {staged[:3]}": staged,
        f"{most / 1e6:.1f} MB on the disk": most > DISK_GB * 1e9,
    }
    return [what for what, is_wrong in wrong.items() if is_wrong]


def disturb(work: Path, kills: int, seed: int) -> int:
    began = time.monotonic()
    streams = Streams(work / "killed", random.Random(seed))
    with highest_disk_use(streams.folder) as most:
        streams.start(PROCESSES)
        try:
            while streams.killed.total() < kills:
                streams.kill_one()
            streams.finish()
        except BaseException:
            streams.end()
            raise
    wrong = problems(streams.folder, work / "undisturbed", most[0])
    refused = streams.log().count("another process is at work")
    print(f"{dict(streams.killed)} killed in {time.monotonic() - began:.0f} s (seed {seed})")
    print(f"{streams.starts} commands started; {refused} processes refused while others were in work")
    print(f"disk: {most[0] / 1e6:.1f} MB of {DISK_GB * 1e3:.0f} MB at most, {most[1]} samples")
    count = len(entries(cache_of(work / "undisturbed" / "C", str(WEIGHTS))))
    print("; ".join(wrong) if wrong else f"{count} volumes, codes equal to the bit to those of one process")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--volumes", type=int, default=240)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="default: drawn")
    args = parser.parse_args(argv)
    pause, addresses = multiprocessing.Value("d", 0.0), multiprocessing.Queue()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cohort = write_phantom_cohort(work / "hub", args.volumes, 2, progress=False)
        server = multiprocessing.Process(target=serve, args=(cohort, pause, addresses), daemon=True)
        server.start()
        (work / "sitecustomize.py").write_text(SMALL_BLOCKS)
        os.environ |= {"HF_ENDPOINT": addresses.get(), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1,localhost",
                       "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(work), "OMP_NUM_THREADS": "1"}  # fmt: skip
        one = Streams(work / "undisturbed", random.Random(0))
        one.start(1)
        if one.launcher.wait():
            raise SystemExit(one.log())
        pause.value = 0.05
        time.sleep(0.2)
        code = disturb(work, args.kills, args.seed)
        server.kill()
    return code


if __name__ == "__main__":
    sys.exit(main())
