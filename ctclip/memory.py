"""Memory and CPUs of this machine, of the cgroup around this process (a container, a Slurm job) and of the process.

From Linux's /proc and /sys; None where the system does not say. Standard library only.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ctclip.errors import UserError

# In messages of errors that have no class of their own: on a GPU; on the CPU torch's, oneDNN's, C++'s and Rust's.
GPU_ALLOCATION_FAILED = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC")
ALLOCATION_FAILED = (
    "DefaultCPUAllocator", "could not create a primitive", "could not create a memory", "std::bad_alloc",
    "can't start new thread", f"os error {errno.ENOMEM})",
)  # fmt: skip


def out_of_gpu_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError, by its name, or what CUDA's libraries say."""
    return type(error).__name__ == "OutOfMemoryError" or _says(error, GPU_ALLOCATION_FAILED)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return out_of_gpu_memory(error) or _says(error, ALLOCATION_FAILED)


def reader_lost(error: BaseException) -> bool:
    """Whether a DataLoader's process was ended, as the system does when memory or shared memory runs out."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def _says(error: BaseException, texts: tuple[str, ...]) -> bool:
    return isinstance(error, Exception) and any(text in str(error) for text in texts)


@dataclass(frozen=True)
class SystemMemory:
    """Bytes that a process here can have: of the machine, or of its cgroup where that is less."""

    available: int
    total: int


def system_memory(root: Path = Path("/")) -> SystemMemory | None:
    """`root` is where proc/ and sys/ are."""
    table = root / "proc/meminfo"
    total, available = _bytes_in(table, "MemTotal"), _bytes_in(table, "MemAvailable")
    if total is None or available is None:
        return None
    limit, left = _cgroup_memory(root) or (total, available)
    return SystemMemory(max(min(available, left), 0), min(total, limit))


def process_memory(peak: bool = False) -> int | None:
    """Bytes that this process holds, or the most that it held since `reset_peak_memory`."""
    return _bytes_in(Path("/proc/self/status"), "VmHWM" if peak else "VmRSS")


def reset_peak_memory() -> bool:
    """Starts a new peak of `process_memory`; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def torchrun_number(name: str, default: int) -> int:
    """A number that torchrun sets for its processes (RANK, WORLD_SIZE, ...). Raises UserError where it is none."""
    text = os.environ.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}={text[:20]!r} in the environment: found no whole number, expected what torchrun sets; "
                        f"start with torchrun, or unset {name}")
    return int(text)


def local_world() -> int:
    """Processes of torchrun on this machine, which share its CPUs and memory."""
    return max(1, torchrun_number("LOCAL_WORLD_SIZE", 1))


def available_cpus(root: Path = Path("/")) -> float:
    """CPUs that this process may use, with those of `local_world`: of its affinity and its cgroup's quota the less."""
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for version, folder in _cgroups(root, "cpu"):
        try:
            quota, period = (
                (folder / "cpu.max").read_text().split() if version == 2
                else [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
            )  # fmt: skip
            if float(quota) > 0:  # version 1 has -1 for no limit, version 2 "max"
                cpus = min(cpus, float(quota) / float(period))
        except (OSError, ValueError):
            continue
    return cpus


def _cgroups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's cgroup for the controller, and of those above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers and controller not in controllers.split(","):
            continue
        if controllers:  # version 1
            mount /= controller
        parts = PurePosixPath(path).parts[1:]
        for depth in range(len(parts) + 1):
            yield 1 if controllers else 2, mount.joinpath(*parts[:depth])


def _cgroup_memory(root: Path) -> tuple[int, int] | None:
    """(limit, bytes left under it) of this process's cgroup or one above it, whichever leaves least; None: no limit."""
    limits = []
    for version, folder in _cgroups(root, "memory"):
        limit_file, usage_file, cache = "memory.max", "memory.current", "inactive_file"
        if version == 1:
            limit_file, usage_file, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        limit, usage = _number_in(folder / limit_file), _number_in(folder / usage_file)
        if limit is not None and usage is not None:
            reclaimable = _number_in(folder / "memory.stat", cache) or 0  # page cache
            limits.append((limit, limit - usage + reclaimable))
    return min(limits, key=lambda pair: pair[1], default=None)


def _number_in(path: Path, name: str = "") -> int | None:
    """The number in a file, or in its line `name`; None where there is none ("max", no such file)."""
    try:
        found = re.search(rf"^{name}:?\s*(\d+)\b", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _bytes_in(path: Path, name: str) -> int | None:
    """Of a line such as `MemAvailable:  1234 kB`."""
    kilobytes = _number_in(path, name)
    return None if kilobytes is None else kilobytes * 1024
