"""Memory of this machine, of the cgroup around this process (a container, a Slurm job) and of the process itself.

From Linux's /proc and /sys; None where the system does not say. Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ALLOCATION_FAILED = (  # in messages of torch's errors that have no class of their own
    "DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU (torch.OutOfMemoryError, by its name) or on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATION_FAILED)


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


def _cgroup_memory(root: Path) -> tuple[int, int] | None:
    """(limit, bytes left under it) of this process's cgroup or one above it, whichever leaves least; None: no limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if not controllers:  # version 2
            limit_file, usage_file, cache = "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount /= "memory"
            limit_file, usage_file, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        parts = PurePosixPath(path).parts[1:]
        for depth in range(len(parts) + 1):
            folder = mount.joinpath(*parts[:depth])
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
