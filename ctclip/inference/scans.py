"""Scans among files and folders: NIfTI, .mha and DICOM series, and what each is called."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

from ctclip.data.dicom import SERIES_PREFIX, beginning, is_dicom, series_identity, series_of
from ctclip.data.metaimage import META_SUFFIX
from ctclip.data.readers import FILE_SUFFIXES, other_file, other_suffix
from ctclip.data.volume_file import VolumeError, inflated
from ctclip.errors import UserError
from ctclip.formatting import comma_separated, plural

HEAT_MAP_FOLDER = "explain"  # ends the name of the folder
HEAT_MAP_DESCRIPTION = "Logits per token"  # how the description in a heat map's header begins


class PredictionError(UserError):
    """Scans, findings or an output that prediction cannot work with."""


@dataclass(frozen=True)
class Scan:
    """An input: its name, its file or one file of its DICOM series, what the challenge calls it: its name without the
    suffix; the identity of its series, and what a reader of its answer should know."""

    name: str
    path: Path
    stem: str = ""
    series: str = ""
    note: str = ""

    @property
    def short(self) -> str:
        """The name without folders; a series that shares its folder with others keeps that one."""
        parts = self.name.split("/")
        return "/".join(parts[-2:] if parts[-1].startswith(SERIES_PREFIX) else parts[-1:])


def _without_suffix(name: str) -> str:
    suffix = max((s for s in FILE_SUFFIXES if name.lower().endswith(s)), key=len, default="")
    return name[: len(name) - len(suffix)]


def _refuse(folder: str, reason: str) -> None:
    raise PredictionError(f"{folder}: {reason}")


def find_scans(
    sources: str | Path | Sequence[str | Path],
    on_note: Callable[[str], object] = lambda note: None,
    on_fault: Callable[[str, str], object] = _refuse,
) -> list[Scan]:
    """The scans that files and folders hold, folders with all below them, in the order of their names.

    .nii, .nii.gz and .mha files, and the CT series among a folder's DICOM files; hidden files are left alone. No scan
    has to open, so that one that cannot be read is found as well. A scan is called as its file or, for DICOM, its
    folder; where two in different folders would be called alike, suffix aside, all are called by their paths below the
    folder that was given. Names and stems occur once: the stems of a.mha beside a.nii.gz are a and a.nii.gz.

    `on_note` gets a line for what was skipped: files of other kinds, heat maps of earlier predictions, folders with
    DICOM but no CT. `on_fault` gets a folder that cannot be listed, and why; by default it raises PredictionError. So
    does finding no scan at all.
    """
    given = [Path(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
    notes: list[str] = []
    faults: list[str] = []

    def fault(folder: str, reason: str) -> None:
        faults.append(f"{folder}: {reason}")
        on_fault(folder, reason)

    above = [os.path.dirname(os.path.abspath(source)) for source in given]
    base = os.path.commonpath(above) if len(given) > 1 else None
    found: dict[str, Scan] = {}
    for source in given:
        for scan in _scans_of(source, base, notes.append, fault):
            found.setdefault(os.path.abspath(scan.path), scan)
    scans = list(found.values())
    if not scans:
        where = ", ".join(map(str, given)) or "an empty list"
        skipped = f" ({'; '.join([*faults, *notes])})" if faults or notes else ""
        raise PredictionError(f"{where}: found no .nii, .nii.gz or .mha file and no DICOM series{skipped}, expected a "
                              "scan or a folder of scans")
    for note in notes:
        on_note(note)
    short = [replace(scan, name=scan.short) for scan in scans]
    different, by_path = (len({_without_suffix(scan.name) for scan in those}) for those in (short, scans))
    return _noted(_each_once(short if different == by_path else scans))


def _noted(scans: list[Scan]) -> list[Scan]:
    """With a note on each scan whose series lies in several folders: some exports put so many files into each."""
    folders = Counter(scan.series for scan in scans if scan.series)
    note = "its series lies in {} folders: if it is divided, put its files into one"
    return [replace(s, note=note.format(folders[s.series])) if folders[s.series] > 1 else s for s in scans]


def _each_once(scans: list[Scan]) -> list[Scan]:
    """With stems, and with a number in a name or a stem that another scan has."""
    names: set[str] = set()
    stems: set[str] = set()
    scans = [replace(scan, name=_free(names, scan.name)) for scan in scans]
    of_name = {
        scan.name: _free(stems, _without_suffix(scan.name), scan.name)
        for scan in sorted(scans, key=lambda scan: not scan.name.lower().endswith(META_SUFFIX))  # the challenge's own
    }
    return [replace(scan, stem=of_name[scan.name]) for scan in scans]


def scans_of_table(names: Sequence[str]) -> list[Scan]:
    """Scans that only a table names, each once, with stems as `find_scans` gives them."""
    return _each_once([Scan(name, Path(name)) for name in names])


def _free(taken: set[str], *wanted: str) -> str:
    """The first that is not taken, else the last with a number; it is taken now."""
    numbered = (f"{wanted[-1]}_{number}" for number in count(2))
    name = next(name for name in chain(wanted, numbered) if name not in taken)
    taken.add(name)
    return name


def _scans_of(
    source: Path, base: str | None, on_note: Callable[[str], object], on_fault: Callable[[str, str], object]
) -> Iterator[Scan]:
    """Called by their paths below `base`; None: below the folder `source`, or by the file's name."""
    if not source.exists():
        raise PredictionError(f"{source}: found no such file or folder, expected a scan or a folder of scans; check "
                              "the path")
    if not source.is_dir():
        if not (source.name.lower().endswith(FILE_SUFFIXES) or is_dicom(source)):
            found, expected, remedy = other_file(source)
            raise PredictionError(f"{source}: found {found}, expected {expected}; {remedy}")
        yield Scan(_name(source, base or source.parent), source)
        return

    def fault(error: OSError) -> None:
        on_fault(printable(str(error.filename)), f"found a folder that cannot be listed ({error.strerror}), expected "
                                                 "one to look for scans in; check its permissions")

    seen: set[str] = set()
    skipped: Counter[str] = Counter()
    heat_maps = 0
    for folder, below, files in os.walk(source, onerror=fault, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:  # links may lead round in circles
            below.clear()
            continue
        seen.add(real)
        has_dicom = False
        for path in (Path(folder, name) for name in sorted(files) if not name.startswith(".")):
            suffix = other_suffix(path)
            if _is_heat_map(path, files):
                heat_maps += 1
            elif path.name.lower().endswith(FILE_SUFFIXES):
                yield Scan(_name(path, base or source), path)
            elif (suffix or not has_dicom) and is_dicom(path):
                has_dicom = True
            elif suffix:
                skipped[suffix] += 1
        if has_dicom:
            yield from _series_in(Path(folder), base or source, on_note)
    if skipped:
        kinds = comma_separated(f"{number} {suffix}" for suffix, number in skipped.most_common())
        on_note(f"{printable(str(source))}: {plural(skipped.total(), 'file')} of other kinds skipped: {kinds}")
    if heat_maps:
        on_note(f"{printable(str(source))}: {plural(heat_maps, 'heat map')} of earlier predictions skipped")


def _is_heat_map(path: Path, beside: Sequence[str]) -> bool:
    """Whether --explain wrote a file, by its header; only files are opened that lie beside a picture of the same name,
    as heat maps do, or below a folder named for them."""
    stem = path.name.removesuffix(".nii.gz")
    named = any(folder.name.endswith(HEAT_MAP_FOLDER) for folder in path.parents)
    if stem == path.name or not (f"{stem}.png" in beside or named):
        return False
    return HEAT_MAP_DESCRIPTION.lower().encode() in nifti_description(path).lower()  # earlier versions ended so


def nifti_description(path: Path) -> bytes:
    """descrip in the NIfTI-1 header of a .nii.gz file; b"" of another file."""
    return (inflated(beginning(path)) or b"")[148:228]


def _series_in(folder: Path, base: str | Path, on_note: Callable[[str], object]) -> Iterator[Scan]:
    try:
        found, note = series_of(folder)
    except (VolumeError, OSError):  # no pydicom: a scan, for which reading gives the reason
        found, note = {folder.resolve().name: folder}, None
    if note and not found:  # else reading the series says it
        on_note(f"{printable(str(folder))}: {note}")
    above = os.path.relpath(folder, base)
    for name, path in found.items():
        identity = series_identity(path) if path.is_file() else ""
        yield Scan(printable(Path(above).parent.joinpath(name).as_posix()), path, series=identity)


def _name(path: Path, base: str | Path) -> str:
    return printable(Path(os.path.relpath(path, base)).as_posix())


def printable(name: str) -> str:
    """A name for tables and lines of text: what is no UTF-8 and what ends a line is spelled out."""
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)
