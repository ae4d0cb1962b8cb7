"""Files that are written whole or not at all, the way flags are read, the default weights' path.

Standard library only, so that a script knows its flags without the two seconds that torch takes to import.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renamed to `path` when the block ends well, removed when it does not.

    Both steps reach the disk before this returns, so that a machine that goes down leaves the old file or the new one.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name != "nt":  # Windows cannot open a folder
            _sync_folder(temporary.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network mounts have no such thing; the file itself is on the disk
            raise
    finally:
        os.close(handle)


class OneLineParser(argparse.ArgumentParser):
    """Wrong usage is one line and exit code 2; flags may be spelled with underscores, and are never guessed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see --help\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        args = sys.argv[1:] if args is None else args
        spelled = []
        for arg in args:  # --output_dir=x_y -> --output-dir=x_y: values stay as they are
            flag, equals, value = arg.partition("=")
            spelled.append(flag.replace("_", "-") + equals + value if arg.startswith("--") else arg)
        return super().parse_args(spelled, namespace)
