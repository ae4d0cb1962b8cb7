"""Files that are written whole or not at all, and JSON as people edit it. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from ctclip.errors import UserError

MOST_NESTED = 50  # levels of JSON; no file of ours has a tenth
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errno of a write for which there is no room


@contextmanager
def replacing(path: str | os.PathLike, temporary: Path | None = None) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renamed to `path` when the block ends well, removed when it does not.

    Both steps reach the disk before this returns, so that a machine that goes down leaves the old file or the new one.
    `temporary`: the name, where one that a kill left is to be overwritten; otherwise it has the process's number.
    """
    temporary = temporary or Path(f"{path}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
        with temporary.open("rb+") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name != "nt":  # Windows cannot open a folder
            _sync_folder(temporary.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Names the file in an OSError that names none: a write that fails does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def open_lines(path: Path) -> io.FileIO:
    """A file of lines, for appending, without a buffer, and made where there is none; a line torn by a kill ends."""
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    file = open(path, "ab", buffering=0)  # noqa: SIM115  the caller closes it
    if torn:
        file.write(b"\n")
    return file


def write_all(file: IO[bytes], data: bytes) -> None:
    """All of it, to the disk. An unbuffered write may take only a part, as it does when the disk is nearly full."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())


def make_folder(path: str | os.PathLike, remedy: str) -> Path:
    """The folder, made where there is none. Raises UserError, which ends with `remedy`, where it cannot be made."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error.strerror, remedy) from error
    return folder


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file in UTF-8. Raises OSError, or ValueError that says in a few words what it is not."""
    return parse_json(Path(path).read_text(encoding="utf-8-sig"))  # -sig: Windows' editor puts a byte order mark first


def parse_json(text: str) -> Any:
    """json.loads, whose only error is ValueError: of a key that is there twice, of which the last would count, and of
    text nested beyond MOST_NESTED, which would exhaust whoever walks over it."""
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level, deep = [content], 0
    while level:
        if deep == MOST_NESTED:
            raise ValueError("nested too deep")
        deep += 1
        level = [part for value in level if isinstance(value, (dict, list))
                 for part in (value.values() if isinstance(value, dict) else value)]
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:60]!r} twice")
    return content


def check_writable(path: str | os.PathLike, remedy: str) -> None:
    """Raises UserError, which ends with `remedy`, where a folder cannot be written to, or cannot be made."""
    there = nearest_existing(Path(path))
    if not there.is_dir():
        raise _unwritable(path, os.strerror(errno.ENOTDIR), remedy)
    if not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(path, os.strerror(errno.EACCES), remedy)


def check_replaceable(path: Path, is_ours: Callable[[Path], bool], remedy: str) -> None:
    """Raises UserError, which ends with `remedy`, where a file is there that holds something and is not `is_ours`: it
    would be replaced."""
    if path.is_file() and path.stat().st_size and not is_ours(path):
        raise UserError(f"{path}: found a file that this command did not write, expected none, as it would be "
                        f"replaced; {remedy}")


def _unwritable(path: str | os.PathLike, reason: str | None, remedy: str) -> UserError:
    return UserError(f"{path}: found a place that cannot be written ({reason}), expected a folder; {remedy}")


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def move_aside(path: Path) -> Path:
    """Gives a file that is about to be replaced, and may be a person's own, another name; -> that name."""
    stem, _, suffix = path.name.partition(".")
    names = (path.with_name(f"{stem}.before{number or ''}.{suffix}") for number in count())
    return path.rename(next(name for name in names if not name.exists()))


class LockedError(UserError):
    """Another process holds a lock."""


_HELD: set[Path] = set()  # locks of this process
BUSY = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # what the system says of a lock that another process has


@contextmanager
def locked(path: Path, busy: str = "locked") -> Iterator[None]:
    """Keeps other processes, those of other users too, out of the block that lock the same file, which is made for it
    and goes again. Raises LockedError(busy) where another one is in it, OSError where no such file can be made.

    The system ends a lock with its process, however that ends. A disk that knows no locks, as some network mounts, is
    locked in the temporary folder.
    """
    if path in _HELD:  # the system would let this process in again, and then forget the lock
        raise LockedError(busy)
    file, descriptor = _lock(path, busy)
    _HELD.add(path)
    try:
        yield
    finally:
        _HELD.remove(path)
        with suppress(OSError):  # another user's folder; on Windows, as long as it is open
            file.unlink()
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process is in a block of `locked(path)` now. Of one on another machine, as beside a shared disk, this
    may not be known: False."""
    if path in _HELD:  # not opened: closing it would end the lock
        return True
    for file in (path, _elsewhere(path)):
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            _try_lock(descriptor, False)
        except OSError as error:
            if error.errno in BUSY:
                return True
        finally:
            os.close(descriptor)
    return False


def _elsewhere(path: Path) -> Path:
    """Where a file is locked whose disk knows no locks."""
    return Path(tempfile.gettempdir(), f"ctclip-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.lock")


def _lock(path: Path, busy: str) -> tuple[Path, int]:
    """-> (the lock file, its descriptor), locked."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor, writable = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
            with suppress(OSError):  # another user's
                os.chmod(path, 0o666)
        except PermissionError:
            if not path.exists():
                raise
            descriptor, writable = os.open(path, os.O_RDONLY), False
        try:
            _try_lock(descriptor, writable)
            with suppress(FileNotFoundError):  # the one before removed it meanwhile: then this is not its lock
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return path, descriptor
            os.close(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in BUSY:
                raise LockedError(busy) from None
            if path.parent == Path(tempfile.gettempdir()):
                raise
            return _lock(_elsewhere(path), busy)


def _try_lock(descriptor: int, writable: bool) -> None:
    """Raises OSError where another process has it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        # Unlike flock's, not held by forked processes, which may outlive a killed run; but exclusive only if writable.
        fcntl.lockf(descriptor, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network mounts have no such thing; the file itself is on the disk
            raise
    finally:
        os.close(handle)
