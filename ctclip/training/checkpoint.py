"""What a run leaves behind and goes on from: resume states and best weights, written so that no moment of being killed,
and no full disk, costs more than the time since the last save.

    <run>/state/0012-000340.pt    340 steps after epoch 12; the newest two are kept
    <run>/model.safetensors, config.json      the best weights so far, complete
"""

from __future__ import annotations

import errno
import math
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError

from ctclip.errors import UserError
from ctclip.fileio import DISK_FULL, replacing

KEEP = 2  # states: the one before the newest serves when the newest turns out damaged

# CRC-32 of anything followed by its own CRC-32, least significant byte first. States end in theirs.
INTACT = 0x2144DF1C


class StateError(UserError):
    """A state that cannot be written or read. One line: what was found, what was expected, what to do."""


class _Recorder:
    """A file that remembers its OSError, which torch.save turns into a RuntimeError without a reason, and the CRC-32
    of what was written."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None
        self.crc32 = 0

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(content: dict, path: Path) -> None:
    with open(path, "wb") as file:
        recorder = _Recorder(file)
        try:
            torch.save(content, recorder)
        except RuntimeError as error:
            raise recorder.error or error from error
        file.write(recorder.crc32.to_bytes(4, "little"))  # torch.load does not mind


def size_of(content: Any) -> int:
    """Bytes of all tensors in nested dicts and lists; the rest is small."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return sum(size_of(part) for part in parts if isinstance(part, (torch.Tensor, dict, list)))  # few of 20,000 names


def or_explain(folder: Path, what: str, size: int, write: Callable[[], None]) -> None:
    """Calls `write()`, which needs `size` bytes. A full disk becomes a StateError that says what is still usable and
    what to free."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number is None and (told := re.search(r"os error (\d+)", str(error))):
            number = int(told[1])
        if number not in DISK_FULL:
            raise
        free = shutil.disk_usage(folder).free
        kept = states(folder)
        good = f"the last good state is {kept[-1]}" if kept else "no state has been saved yet"
        reason = "a file-size limit is in force" if number == errno.EFBIG else f"{free / 1e6:,.0f} MB free"
        raise StateError(
            f"{what} could not be written to {folder} ({reason}), expected room for {math.ceil(size / 1e6):,} MB; "
            f"{good}. Free space there (old runs under {folder.parent}, caches) and go on with --resume {folder}"
        ) from error


def states(folder: Path) -> list[Path]:
    """Saved states of a run, oldest first."""
    return sorted((folder / "state").glob("*.pt"))


def save_state(folder: Path, epoch: int, step: int, content: dict) -> Path:
    """Writes the state of `step` steps after `epoch` whole epochs, then removes states too old to be needed."""
    path = folder / "state" / f"{epoch:04d}-{step:06d}.pt"

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            _save(content, temporary)

    or_explain(folder, "The training state", size_of(content), write)
    for old in (*states(folder)[:-KEEP], *path.parent.glob("*.tmp")):  # the latter from processes that were killed
        old.unlink()
    return path


def load_newest(folder: Path, report: Callable[[str], None]) -> dict | None:
    """The newest intact state, or None where none was saved yet. A damaged one is reported and the one before is used.

    Raises StateError when there are states and none is intact.
    """
    found = states(folder)
    for path in reversed(found):
        problem = _damage(path)
        if problem is None:
            return torch.load(path, map_location="cpu", weights_only=True)
        report(f"{path} is damaged ({problem}); using the state before it")
    if found:
        raise StateError(
            f"{folder / 'state'}: found {len(found)} states, all damaged, expected an intact one; start "
            "a new run: the code cache makes its frozen stage cheap"
        )
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a state file, or None. The checksums inside do not cover names, offsets and sizes."""
    crc32 = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                crc32 = zlib.crc32(chunk, crc32)
    except OSError as error:
        return str(error)
    return None if crc32 == INTACT else "wrong checksum"
