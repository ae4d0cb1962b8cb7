"""Files that are written whole or not at all. Standard library only."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctclip.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errno of a write for which there is no room


@contextmanager
def replacing(path: str | os.PathLike, temporary: Path | None = None) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renamed to `path` when the block ends well, removed when it does not.

    Both steps reach the disk before this returns, so that a machine that goes down leaves the old file or the new one.
    `temporary`: the name, where one that a kill left is to be overwritten; otherwise it has the process's number.
    """
    temporary = temporary or Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name != "nt":  # Windows cannot open a folder
            _sync_folder(temporary.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: str | os.PathLike, remedy: str) -> Path:
    """The folder, made where there is none. Raises UserError, which ends with `remedy`, where it cannot be made."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: found a place that cannot be written ({error.strerror}), expected a folder; {remedy}"
        ) from error
    return folder


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network mounts have no such thing; the file itself is on the disk
            raise
    finally:
        os.close(handle)
