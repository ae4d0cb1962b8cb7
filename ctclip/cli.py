"""How every command reads its flags and how it ends. Standard library only, so that --help answers at once."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ctclip import __version__
from ctclip.errors import UserError
from ctclip.fileio import DISK_FULL
from ctclip.memory import out_of_memory

OUT_OF_MEMORY = "out of memory; end other programs, or use a machine (with --device: a GPU) that has more"
FILE_REMEDIES = {  # by errno
    **dict.fromkeys(DISK_FULL, "free space on its disk, raise the limit, or write to another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or name another place"),
}
INTERRUPTED = "the same command starts again; every file is whole, old or new"


class OneLineParser(argparse.ArgumentParser):
    """Wrong usage is one line and exit code 2; flags may be spelled with underscores, and are never guessed.

    The namespace has `given`: the flags on the command line, as the parser spells them.
    """

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--version", action="version", version=f"ctclip {__version__}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        spelled = []
        for arg in sys.argv[1:] if args is None else args:  # --output_dir=x_y -> --output-dir=x_y: values stay
            flag, equals, value = arg.partition("=")
            spelled.append(flag.replace("_", "-") + equals + value if arg.startswith("--") else arg)
        parsed = super().parse_args(spelled, namespace)
        parsed.given = tuple(dict.fromkeys(arg.partition("=")[0] for arg in spelled if arg.startswith("--")))
        return parsed


def refuse_unused(given: Sequence[str], uses: Mapping[str, tuple[str, bool]]) -> None:
    """Raises UserError for a flag that the command would not look at: another mode was meant, or a flag is missing.

    Args:
        given: flags on the command line (`OneLineParser.parse_args(...).given`).
        uses: flag -> (what it goes with, whether that is so). A flag that is always looked at is not in it.
    """
    for flag in given:
        goes_with, used = uses.get(flag, ("", True))
        if not used:
            raise UserError(f"found {flag}, which goes with {goes_with} only; leave it out, or add what it goes with")


def _text_of(error: Exception) -> str:
    """Of a file that the operating system does not let us write or read: what to do about it as well."""
    if isinstance(error, OSError) and error.filename and error.errno in FILE_REMEDIES:
        return f"{error.filename}: {error.strerror}; {FILE_REMEDIES[error.errno]}"
    return str(error)


def run_cli(action: Callable[[], int | None], interrupted: str = INTERRUPTED) -> int:
    """Runs a command's `action` and returns its exit code; every command ends through here.

    0 or what `action` returns; 2 where the user can mend it (an exception with `exit_code`, or of the operating
    system, or a failed allocation), after one line on stderr; 130 after Ctrl-C, with the way to go on (training, which
    also catches SIGTERM, raises its own code). Any other exception is a defect: it passes, with its traceback and
    Python's exit code 1.
    """
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""  # torchrun's
    try:
        return action() or 0
    except KeyboardInterrupt as error:
        print(f"\n{rank}Interrupted: {str(error) or interrupted}", file=sys.stderr)
        return getattr(error, "exit_code", 128 + signal.SIGINT)
    except Exception as error:
        lacking = out_of_memory(error)
        code = 2 if lacking or isinstance(error, OSError) else getattr(error, "exit_code", None)
        if code is None:
            raise
        line = OUT_OF_MEMORY if lacking else " ".join(_text_of(error).split())
        print(f"{rank}error: {line}", file=sys.stderr)
        return code
