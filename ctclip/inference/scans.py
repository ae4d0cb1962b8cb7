"""Scans among files and folders: NIfTI, .mha and DICOM series, and what each is called."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ctclip.data.dicom import SERIES_PREFIX, is_dicom, series_of
from ctclip.data.readers import FILE_SUFFIXES
from ctclip.data.volume_file import VolumeError
from ctclip.errors import UserError


class PredictionError(UserError):
    """Scans, findings or an output that prediction cannot work with."""


@dataclass(frozen=True)
class Scan:
    """An input: its name, and its file or one file of its DICOM series."""

    name: str
    path: Path

    @property
    def short(self) -> str:
        """The name without folders; a series that shares its folder with others keeps that one."""
        parts = self.name.split("/")
        return "/".join(parts[-2:] if parts[-1].startswith(SERIES_PREFIX) else parts[-1:])

    @property
    def stem(self) -> str:
        """The name without its suffix: what the challenge calls a scan."""
        suffix = max((s for s in FILE_SUFFIXES if self.name.lower().endswith(s)), key=len, default="")
        return self.name[: len(self.name) - len(suffix)]


def find_scans(
    sources: str | Path | Sequence[str | Path], on_note: Callable[[str], object] = lambda note: None
) -> list[Scan]:
    """The scans that files and folders hold, folders with all below them, in the order of their names.

    .nii, .nii.gz and .mha files, and the CT series among a folder's DICOM files; hidden files are left alone. `on_note`
    gets a line for each folder with other DICOM objects, which are skipped. No scan is opened, so that one that cannot
    be read is found as well. A scan is called as its file or, for DICOM, its folder; where two would be called alike,
    all are called by their paths below the folder that was given.

    Raises PredictionError where there is none, or two of one name all the same.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    scans = [scan for source in sources for scan in _scans_of(Path(source), on_note)]
    if not scans:
        where = ", ".join(map(str, sources)) or "an empty list"
        raise PredictionError(f"{where}: found no .nii, .nii.gz or .mha file and no DICOM series, expected a scan or a "
                              "folder of scans")
    short = [replace(scan, name=scan.short) for scan in scans]
    if len({scan.stem for scan in short}) == len(short):
        return short
    paths: dict[str, Path] = {}
    for scan in scans:
        if scan.stem in paths:
            both = f"{paths[scan.stem]} and {scan.path}"
            raise PredictionError(f"{both}: found two scans that are both called {scan.stem}, expected each name once; "
                                  "rename one, or keep them in folders of their own")
        paths[scan.stem] = scan.path
    return scans


def _scans_of(source: Path, on_note: Callable[[str], object]) -> Iterator[Scan]:
    if not source.exists():
        raise PredictionError(f"{source}: found no such file or folder, expected a scan or a folder of scans; check "
                              "the path")
    if source.is_file() and (source.name.lower().endswith(FILE_SUFFIXES) or is_dicom(source)):
        yield Scan(printable(source.name), source)
        return

    def refuse(error: OSError) -> None:
        raise PredictionError(f"{error.filename}: found a folder that cannot be listed ({error.strerror}), expected "
                              "one to look for scans in; check its permissions") from error

    seen: set[str] = set()
    for folder, below, files in os.walk(source, onerror=refuse, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:  # links may lead round in circles
            below.clear()
            continue
        seen.add(real)
        others = []
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(folder, name)
            if name.lower().endswith(FILE_SUFFIXES):
                yield Scan(printable(path.relative_to(source).as_posix()), path)
            else:
                others.append(path)
        if any(is_dicom(path) for path in others):
            yield from _series_in(Path(folder), source, on_note)


def _series_in(folder: Path, source: Path, on_note: Callable[[str], object]) -> Iterator[Scan]:
    above = folder.relative_to(source).parent.as_posix()
    try:
        found, note = series_of(folder)
    except VolumeError:  # no pydicom: a scan, for which reading gives the reason
        found, note = {folder.resolve().name: folder}, None
    if note:
        on_note(f"{folder}: {note}")
    for name, path in found.items():
        yield Scan(printable(name if above == "." else f"{above}/{name}"), path)


def printable(name: str) -> str:
    """A name for tables and lines of text: what is no UTF-8 and what ends a line is spelled out."""
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)
