"""How every command reads its flags and how it ends. Standard library only, so that --help answers at once."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ctclip import __version__
from ctclip.errors import UserError
from ctclip.fileio import DISK_FULL, naming
from ctclip.formatting import parse_number
from ctclip.memory import out_of_gpu_memory, out_of_memory, reader_lost

OUT_OF_MEMORY = "out of memory; end other programs, or use a machine that has more"
OUT_OF_GPU_MEMORY = "out of memory on the GPU; end other programs on it, or add --device cpu, which is slower"
READER_LOST = "a reading process was ended by the system, as when memory or shared memory runs out; add --workers 0"
MODULE_MISSING = "expected every file and package of the suite; run python ctclip_setup.py, which mends or names them"
FILE_REMEDIES = {  # by errno
    **dict.fromkeys(DISK_FULL, "free space on its disk, raise the limit, or write to another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or name another place"),
}
ALIKE = 0.7  # of a flag that may be a mistyped other (difflib's ratio)
INTERRUPTED = "the same command starts again; every file is whole, old or new"


class OneLineParser(argparse.ArgumentParser):
    """Wrong usage is one line and exit code 2; flags may be spelled with underscores, and are never guessed. A flag
    without a value is not taken for one that is not given; `type=int` and `type=float` take decimal numbers only.

    The namespace has `given`: the flags on the command line, as the parser spells them.

    Args:
        usual: the flags that --help shows; --help-all shows every one. Without it --help does.
        options: ArgumentParser's.
    """

    def __init__(self, usual: Collection[str] = (), **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.usual = usual
        self.register("type", int, whole_number)
        self.register("type", float, finite_number)
        self.add_argument("--version", action="version", version=f"ctclip {__version__}")
        if usual:
            self.usage = "%(prog)s [flags]"
            self.epilog = "More flags: --help-all shows every one."
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every flag and exit")

    def format_help(self) -> str:
        """The usual flags, and --help-all."""
        shown = {*self.usual, "--help", "--help-all"}
        hidden = [action for action in self._actions if self.usual and not shown & set(action.option_strings)]
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for action, text in zip(hidden, texts, strict=True):
                action.help = text

    def format_all(self) -> str:
        """Every flag."""
        return super().format_help().replace(f"\n{self.epilog}\n", "") if self.usual else super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}{self._meant(message)}; see --help\n")

    def _meant(self, message: str) -> str:
        """" (did you mean --epochs?)", where argparse's message is about flags that are hardly known otherwise."""
        if not message.startswith("unrecognized arguments: "):
            return ""
        known = [flag for parser in (self, *self._parsers()) for flag in parser._option_string_actions]
        wrong = (word.partition("=")[0] for word in message.split() if word.startswith("-"))
        near = [difflib.get_close_matches(f"--{word.lstrip('-').lower()}", known, 1, ALIKE) for word in wrong]
        meant = dict.fromkeys(flag for found in near for flag in found)
        return f" (did you mean {' and '.join(meant)}?)" if meant else ""

    def _parsers(self) -> list[argparse.ArgumentParser]:
        """Those of its commands, where it has commands."""
        commands = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return [parser for action in commands for parser in action.choices.values()]

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status if flushed() else PIPE_CLOSED, message)

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        escape_unprintable()  # before --help and what is wrong with the flags
        spelled = []
        for arg in sys.argv[1:] if args is None else args:  # --output_dir=x_y -> --output-dir=x_y: values stay
            flag, equals, value = arg.partition("=")
            spelled.append(flag.replace("_", "-") + equals + value if arg.startswith("--") else arg)
        for before, arg in zip(["", *spelled], spelled, strict=False):
            flag, equals, value = arg.partition("=") if arg.startswith("--") else (before, "=", arg)
            if equals and not value.strip():
                found = f"{flag} without a value" if flag.startswith("--") else "an empty argument"
                self.error(f"found {found} (an unset shell variable?), expected one; set it, or leave it out")
        parsed = super().parse_args(spelled, namespace)
        flags = [arg.partition("=")[0] for arg in spelled if arg.startswith("--")]
        if flags.count("--input") > 1:  # of other flags the last one counts, as wrappers of commands rely on
            self.error("found --input more than once, expected one scan, or a folder of scans")
        parsed.given = tuple(flags)
        return parsed


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        parser._print_message(parser.format_all(), sys.stdout)
        parser.exit()


def whole_number(text: str) -> int:
    """int() for what people write; it also takes 1_0 and digits of other scripts."""
    if re.fullmatch(r"[+-]?[0-9]{1,30}", text.strip()):
        return int(text)
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, such as 10")


def finite_number(text: str) -> float:
    try:
        return parse_number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a finite number, such as 0.5") from None


def mode_among(own: Iterable[str], others: Iterable[str], script: str) -> Callable[[str], str]:
    """Of --mode: refuses a mode of another script by the name of that script."""
    own, others = list(own), list(others)

    def check(text: str) -> str:
        near = difflib.get_close_matches(text.replace("-", "_"), others, 1, 0.8)
        if text not in own and near:
            raise argparse.ArgumentTypeError(f"found {text!r}, a mode of {script}, expected one of {', '.join(own)}; "
                                             f"run python {script} --mode {near[0]}")
        return text

    return check


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


PIPE_CLOSED = 141  # exit code of a command whose output nobody reads any more (`| head -1`), as shells have it


def escape_unprintable() -> None:
    """What the terminal's encoding lacks is printed as \\u...: no path and no label ends a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flushed() -> bool:
    """Whether all output has left; False where its reader is gone (`| head -1`): the rest goes nowhere."""
    read = True
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            if hasattr(select, "poll"):  # a write that failed without a buffer has left nothing to flush
                poll = select.poll()
                poll.register(stream.fileno(), 0)
                if any(event & select.POLLERR for _, event in poll.poll(0)):
                    raise BrokenPipeError
        except (AttributeError, ValueError):  # none (pythonw), closed, or in memory
            pass
        except OSError as error:  # no reader, or a full disk, which was said
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # the interpreter flushes once more
            read = read and not isinstance(error, BrokenPipeError)
    return read


def check_endpoint() -> None:
    """Raises UserError where HF_ENDPOINT is no address: huggingface_hub may not import. It may hold a password."""
    try:
        address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        good = address.scheme in ("http", "https") and address.hostname and (address.port or True)
    except ValueError:
        good = False
    if not good:
        found = "found something else than an address in HF_ENDPOINT, expected https://HOST"
        raise UserError(f"{found}; correct it, or unset it for the hub itself")


def check_working_folder() -> None:
    """Raises UserError where it is gone: torch does not load there, and ends the process."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"found no working folder ({error.strerror}), expected one; cd into a folder") from error


def check_progress_bars() -> None:
    """Raises UserError for variables that tqdm cannot use; it would fail wherever it is imported, or draws a bar."""
    if not (names := sorted(name for name in os.environ if name.startswith("TQDM_"))):
        return
    try:
        from tqdm import tqdm

        with open(os.devnull, "w") as nowhere:
            tqdm(range(1), file=nowhere).close()
    except ImportError:  # ctclip_setup.py installs it
        pass
    except Exception as error:
        raise UserError(f"found {', '.join(names)} with a value that progress bars cannot use ({error}), expected one "
                        "as in tqdm's documentation; correct it, or unset it") from error


def run_cli(action: Callable[[], int | None], interrupted: str = INTERRUPTED) -> int:
    """Runs a command's `action` and returns its exit code; every command ends through here.

    0 or what `action` returns; 2 where the user can mend it (an exception with `exit_code`, or of the operating
    system, or a failed allocation), after one line on stderr; 130 after Ctrl-C, with the way to go on (training, which
    also catches SIGTERM, raises its own code); PIPE_CLOSED, without a word, where nobody reads the output any more. Any
    other exception is a defect: it passes, with its traceback and Python's exit code 1.
    """
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""  # torchrun's
    escape_unprintable()
    try:
        check_working_folder()
        check_endpoint()
        check_progress_bars()
        code = action() or 0
        if sys.stdout:
            with naming("standard output"):
                sys.stdout.flush()
    except KeyboardInterrupt as error:
        code = getattr(error, "exit_code", 128 + signal.SIGINT)
        line = f"\n{rank}Interrupted: {str(error) or interrupted}"
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not flushed():  # else it is another pipe
            return PIPE_CLOSED
        text = _line_of(error)
        if text is None:
            raise
        code, line = getattr(error, "exit_code", 2), f"{rank}error: {text}"
    else:
        return code if flushed() else PIPE_CLOSED
    flushed()  # what was printed stands before the line
    print(line, file=sys.stderr)
    return code


def _line_of(error: Exception) -> str | None:
    """The one line for what the user can mend; None for a defect."""
    if out_of_memory(error):
        return OUT_OF_GPU_MEMORY if out_of_gpu_memory(error) else OUT_OF_MEMORY
    if reader_lost(error):
        return READER_LOST
    if isinstance(error, OSError) and error.filename and error.errno in FILE_REMEDIES:
        return f"{error.filename}: {error.strerror}; {FILE_REMEDIES[error.errno]}"
    if isinstance(error, ModuleNotFoundError):
        return f"{error}, {MODULE_MISSING}"
    known = isinstance(error, OSError) or hasattr(error, "exit_code")
    return " ".join(str(error).split()) if known else None
