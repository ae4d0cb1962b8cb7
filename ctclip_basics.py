"""What every room uses: the 18 names, files that are whole or not there, the way flags are read, the model's errors.

Standard library only, so that a script knows its flags, and a table its columns, without the two seconds that torch
takes to import. `ctclip_model` hands all of it on.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ABNORMALITIES = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
N_LABELS = len(ABNORMALITIES)

CLASSFINE_PATH = "models/ctclip_classfine.pt"
DEMO_PATH = str(Path(__file__).resolve().parent / "models" / "ctclip_demo.pt")  # ships with the code


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


class CheckpointError(ValueError):
    """A weights file that cannot be used. One line: what was found, what was expected, what to do."""


class MisfitError(CheckpointError, RuntimeError):
    """A saved model's two files that do not fit each other: torch's RuntimeError, in one line."""


class PretrainedWeightsError(RuntimeError):
    """ImageNet weights of a slice backbone that cannot be had. One line, naming the way on."""
