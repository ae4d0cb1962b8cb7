"""CSV tables with a row for each volume: labels, metadata, predictions, patients. Read here, whoever needs them."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
import unicodedata
import zipfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from ctclip.data.ct_rate import GEOMETRY_COLUMNS, SUBGROUP_COLUMNS, SUFFIX, volume_name
from ctclip.errors import UserError
from ctclip.formatting import plural

NAME_COLUMN = "VolumeName"
# The last columns of a prediction's table: decisions (1 or 0) of each finding, those of a scan in words, its warning.
CALL_PREFIX, SUMMARY_COLUMN, WARNING_COLUMN = "Call: ", "Summary", "Warning"
# What the numbers of a prediction's table are, in each row: "uncalibrated", the model's own; "calibrated", with the
# name of the calibration; "mapped", rescaled to be cut at 0.5. A table without this column has the model's own.
SCALE_COLUMN = "Scale"
SCALES = UNCALIBRATED, CALIBRATED, MAPPED = "uncalibrated", "calibrated", "mapped"
PATIENT_COLUMN, SCAN_COLUMN = "PatientID", "ScanID"
ID_COLUMNS = (PATIENT_COLUMN, SCAN_COLUMN)
STATED_COLUMNS = (*ID_COLUMNS, SCALE_COLUMN)  # text that a table of labels or predictions may have and that is read
# Columns that a table of labels or predictions may have beside its own; "" and "Unnamed: 0" are row numbers.
KNOWN_COLUMNS = {NAME_COLUMN, *STATED_COLUMNS, *GEOMETRY_COLUMNS, *SUBGROUP_COLUMNS, SUMMARY_COLUMN, WARNING_COLUMN,
                 "", "Unnamed: 0"}
FORMULA_SIGNS = ("=", "+", "-", "@")
LONGEST_NAME = 255  # characters, of a volume
EMPTY = float("-inf")  # CsvTable.numbers, where a cell has nothing in it
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
SIGNATURES = (  # first bytes of what is named .csv and is none
    (b"\x1f\x8b", "a gzip file", "unpack it"), (b"BZh", "a bzip2 file", "unpack it"),
    (b"\xfd7zXZ", "an xz file", "unpack it"), (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook (.xls)", "save the sheet as CSV"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"), (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"%PDF", "a PDF", "export the table as CSV"), (b"PAR1", "a Parquet file", "export it as CSV"),
    (b"<", "an HTML or XML page", "download the file itself"), (b"{", "JSON", "convert it to CSV"),
    (b"version https://git-lfs", "a git-LFS pointer", "fetch the file itself: git lfs pull"),
)


class CohortError(UserError):
    """A folder or table that gives no usable cohort: one line, same form as VolumeError."""


@dataclass
class CsvTable:
    """The rows of a table by volume, each volume once, in the order of the file.

    `place` {volume: i}; of row i, `numbers[i]` has the columns `numeric` (N, K) (EMPTY for an empty cell, NaN for text
    that is no number), `texts[i]` the stripped cells of the columns `columns`, `lines[i]` the line of the file, from 1.

    Identical repetitions count once (`repeated` says where); a volume with two different rows is contradictory and has
    none. Rows that are too short are filled up with empty cells. `faults` has a line of text for each row that is
    contradictory, too short or without a name. `others` are the columns that were not asked for.
    """

    path: Path
    columns: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    place: dict[str, int] = field(default_factory=dict)
    numbers: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    texts: list[tuple[str, ...]] = field(default_factory=list)
    lines: Sequence[int] = ()
    contradictory: set[str] = field(default_factory=set)
    repeated: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    others: tuple[str, ...] = ()

    def row(self, name: str) -> dict[str, str]:
        """The text cells of a volume by column."""
        return dict(zip(self.columns, self.texts[self.place[name]], strict=True))


def read_table(
    path: str | Path,
    numeric: Sequence[str] | Callable[[Sequence[str]], Sequence[str]] = (),
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
    expected: str = "VolumeName and a column for each finding",
    error: type[UserError] = CohortError,
    name_column: str = NAME_COLUMN,
) -> CsvTable:
    """The volumes' names (`name_column`), the numeric columns, and as text the required ones and those of the optional
    ones that there are.

    Columns are found by name; a function chooses the numeric ones of a header. A table that trains must also evaluate:
    both read it here. A comma at the end of every
    row is no cell; any other cell beyond the header's may have shifted the columns, and is an error. Raises `error`,
    with what was `expected`, where the file is no CSV, or a column is missing or there twice.
    """
    remedy = f"give one with {expected}, separated by commas"
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise error(f"{path}: found a pipe or a device, expected a file, as tables are read more than once; write "
                        "it into a file first")
        if kind := _other_format(Path(path)):
            raise error(f"{path}: found {kind[0]}, expected a CSV; {kind[1]}")
        with open(path, newline="", encoding="utf-8-sig") as handle:  # -sig: spreadsheets put a byte order mark first
            return _read_rows(Path(path), handle, numeric, required, optional, expected, error, remedy, name_column)
    except OSError as fault:
        raise error(f"{path}: found no readable file ({fault.strerror}), expected a CSV; {remedy}") from fault
    except (UnicodeDecodeError, csv.Error) as fault:
        found = f"something that is not text in columns ({fault})"
        raise error(f"{path}: found {found}, expected a CSV in UTF-8; {remedy}") from fault


def _other_format(path: Path) -> tuple[str, str] | None:
    """(what the file is instead of a CSV, what to do), by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            names = []
        for part, kind in (("xl/", "an Excel workbook (.xlsx)"), ("content.xml", "an OpenDocument sheet (.ods)")):
            if any(name.startswith(part) for name in names):
                return kind, "save the sheet as CSV"
        return "a zip archive", "unpack it"
    for start, kind, remedy in SIGNATURES:
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(start):
            return kind, remedy
    if len(head) > 3 and max(head[::2].count(0), head[1::2].count(0)) > len(head) // 4:
        return "UTF-16 text", "save it as UTF-8"
    return None


def _without_nul(handle: TextIO) -> Iterator[str]:
    for number, line in enumerate(handle, 1):
        if "\0" in line:
            raise csv.Error(f"a zero byte in line {number}")
        yield line


def _read_rows(
    path: Path, handle: TextIO, choose: Sequence[str] | Callable[[Sequence[str]], Sequence[str]],
    required: Sequence[str], optional: Sequence[str], expected: str, error: type[UserError], remedy: str,
    name_column: str,
) -> CsvTable:
    reader = csv.reader(_without_nul(handle), strict=True, skipinitialspace=True)
    header = [column_name(cell) for cell in next((record for record in reader if any(map(str.strip, record))), [])]
    if not header:
        raise error(f"{path}: found an empty file, expected a header and a row per volume; {remedy}")
    columns = (*required, *(column for column in optional if column in header))
    _check_header(path, header, (name_column,), expected, error, name_column)
    numeric = tuple(choose(header) if callable(choose) else choose)
    wanted = (name_column, *numeric, *columns)
    _check_header(path, header, wanted, expected, error, name_column)
    others = tuple(column for column in header if column and column not in wanted)
    table = CsvTable(path, columns, numeric, others=others)
    name_at, width, longest = header.index(name_column), len(header), 0
    numbers_at, texts_at = [header.index(name) for name in numeric], [header.index(name) for name in columns]
    names: dict[str, int] = {}  # of all rows that count, contradictory ones too
    flat, lines = array("d"), array("q")
    for record in reader:
        count = len(record)
        if count != width:
            if not any(map(str.strip, record)):
                continue
            longest = longest or max(count, width)
            if count < width:
                found = f"{count} values, expected {width} as in the header; repair it"
                table.faults.append(f"{path}, line {reader.line_num}: found {found}")
                record += [""] * (width - count)
            elif count != longest or any(map(str.strip, record[width:])):
                raise error(f"{path}, line {reader.line_num}: found {count} values, expected {width} as in the header; "
                            "name every column there, one of row names too, and quote cells that have commas")
        longest = longest or width
        name = volume_name(record[name_at])
        if not name or len(name) > LONGEST_NAME or "\n" in name or "\r" in name:
            if any(map(str.strip, record)):
                found = f"a {name_column} of several lines or without end" if name else f"no {name_column}"
                table.faults.append(f"{path}, line {reader.line_num}: found {found}, expected one; name the volume")
            continue
        values = _numbers([record[at] for at in numbers_at])
        if count < width:  # what is not there is no empty cell
            values = [value if at < count else float("nan") for value, at in zip(values, numbers_at, strict=True)]
        texts = tuple([record[at].strip() for at in texts_at]) if texts_at else ()
        if name not in names:
            names[name] = len(lines)
            lines.append(reader.line_num)
            flat.fromlist(values)
            table.texts.append(texts)
            continue
        at, size = names[name], len(numeric)
        where = f"{path}, line {reader.line_num}: found {name}"
        first = f"one row per volume (first on line {lines[at]})"
        same = array("d", values).tobytes() == flat[at * size : (at + 1) * size].tobytes() and texts == table.texts[at]
        if same and name not in table.contradictory:
            table.repeated.append(f"{where} again, expected {first}; remove one of the two")
        else:
            table.contradictory.add(name)
            table.faults.append(f"{where} with other values, expected {first}; remove the wrong one")
    table.numbers = np.frombuffer(flat).reshape(-1, len(numeric)) if flat else np.zeros((len(lines), len(numeric)))
    table.place, table.lines = names, lines
    if table.contradictory:
        kept = [at for name, at in names.items() if name not in table.contradictory]
        table.place = {name: at for at, name in enumerate(name for name in names if name not in table.contradictory)}
        table.numbers, table.lines = table.numbers[kept], [lines[at] for at in kept]
        table.texts = [table.texts[at] for at in kept]
    return table


def _check_header(
    path: Path, header: list[str], wanted: Sequence[str], expected: str, error: type[UserError], name_column: str
) -> None:
    missing = [column for column in wanted if column not in header]
    if missing and name_column in missing:
        for mark, kind in SEPARATORS.items():
            if name_column in (cell.strip(' "') for cell in ",".join(header).split(mark)):
                raise error(f"{path}: found columns separated by {kind}, expected {expected}; save it so that commas "
                            "separate the columns and points the decimals")
    if missing:
        alike = {_seen(column).casefold(): column for column in header}
        near = alike.get(_seen(missing[0]).casefold())
        found = f"no column {some(missing)}" + (f" (but {near!r})" if near else "")
        start = f" (the header begins with {header[0][:40]!r})" if name_column in missing and not near else ""
        raise error(f"{path}: found {found}, expected {expected}; check the spelling{start} and that commas separate "
                    "the columns")
    twice = [column for column in wanted if header.count(column) > 1]
    if twice:
        raise error(f"{path}: found column {some(twice)} twice, expected it once; remove one of the two")


def cell_text(path: str | Path, line: int, column: str) -> str:
    """The text of a cell of a table that `read_table` has read; `line` as in CsvTable.lines."""
    with open(path, newline="", encoding="utf-8-sig") as handle:
        reader = csv.reader(handle, skipinitialspace=True)
        at = [column_name(cell) for cell in next(record for record in reader if any(map(str.strip, record)))]
        record = next((record for record in reader if reader.line_num == line), [])
    return dict(zip(at, record, strict=False)).get(column, "").strip()


def _numbers(cells: list[str]) -> list[float]:
    """`number` of each cell, ten times as fast where all are numbers."""
    text = "".join(cells)
    if text.isascii() and not {"_", "n", "N"} & {*text}:  # neither 1_0 nor nan and inf
        try:
            return [*map(float, cells)]
        except ValueError:
            pass
    return [number(cell) for cell in cells]


def number(cell: str) -> float:
    """EMPTY where there is no text, NaN where it is no number; infinity stays, to be named."""
    try:
        value = float(cell) if cell.isascii() and "_" not in cell else float("nan")
    except ValueError:
        return float("nan") if cell.strip() else EMPTY
    return value if value != EMPTY else float("nan")


def number_text(value: float) -> str:
    """A number of a table in a message: 1.5, 2, and 1.0000001 to the last digit."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def shown(name: str) -> str:
    """A name in a message; what cannot be seen in it (no-break space, zero-width space) as \\u...."""
    return name if name.isprintable() else repr(name)


def _seen(name: str) -> str:
    """What can be seen of a name."""
    return "".join(letter for letter in name if letter.isprintable() and not letter.isspace())


def formula_note(names: Iterable[str]) -> str | None:
    """What to say of names that a spreadsheet program would compute; they stay as they are, or no table could be
    joined with another."""
    found = [name for name in names if name.startswith(FORMULA_SIGNS)]
    if not found:
        return None
    return (f"{plural(len(found), 'name')} like {found[0]}: begins as a formula does, and spreadsheet programs compute "
            f"it; import {NAME_COLUMN} as text")


def listed(text: str) -> list[str]:
    """The names of a list with commas between, as people type it; one with a comma of its own stands in double quotes.
    Raises ValueError where a quote has no end."""
    try:
        cells = next(csv.reader([text], strict=True, skipinitialspace=True), [])
    except csv.Error as fault:
        raise ValueError(f"{text!r}, in which a quote or a line has no end") from fault
    return [name.strip() for name in cells if name.strip()]


def listing(names: Iterable[str]) -> str:
    """What `listed` reads as these names."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(names)
    return text.getvalue()


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, quoted, and how many more there are."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def column_name(text: str) -> str:
    """A column as it is called here: stripped, and "patient_id" or "Patient ID" is PatientID, as exports spell it."""
    spelled = {column.lower(): column for column in ID_COLUMNS}
    return spelled.get(re.sub(r"[\s_]", "", text).lower(), text.strip())


def unknown_columns(columns: Iterable[str]) -> list[str]:
    """Those that nothing here reads; a user who wrote them may think otherwise, so they are named."""
    return [column for column in columns if not is_known_column(column)]


def is_known_column(name: str) -> bool:
    """Whether a column is none of findings, by its name alone."""
    return name in KNOWN_COLUMNS or name.startswith(CALL_PREFIX)


# ------------------------------------------------------------------ names of one volume in two tables


def join(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """{name: the one of `others` that is the same volume}, of those that have one.

    That is the same name, or the only one that differs in suffix, case, kind of slash, or in how many folders it tells:
    "p1/scan.nii.gz" is "SCAN" and "data\\p1\\scan.mha", but not "p2/scan.nii.gz".
    """
    names, there = list(names), dict.fromkeys(others)
    joined = {name: name for name in names if name in there}
    if len(joined) == len(names) or len(joined) == len(there):
        return joined
    by_stem = defaultdict(list)
    for other in there:
        by_stem[_parts(other)[-1]].append(other)
    alike = {}
    for name in names:
        parts = _parts(name)
        found = [other for other in by_stem.get(parts[-1], ()) if _tails_agree(parts, _parts(other))]
        if name not in joined and len(found) == 1:
            alike[name] = found[0]
    taken = Counter([*joined.values(), *alike.values()])
    return joined | {name: other for name, other in alike.items() if taken[other] == 1}


def _parts(name: str) -> list[str]:
    text = SUFFIX.sub("", unicodedata.normalize("NFC", name).replace("\\", "/"))
    return [part for part in text.casefold().split("/") if part not in ("", ".")] or [""]


def _tails_agree(first: list[str], second: list[str]) -> bool:
    length = min(len(first), len(second))
    return first[-length:] == second[-length:]


def how_names_differ(names: Sequence[str], others: Sequence[str]) -> str:
    """What tells `names` from the `others`, which `join` left without one: " (all 5 names lack the suffix .nii.gz)"."""
    if not len(names) or not len(others):
        return ""
    seen = {_seen(name): name for name in others}
    if same := next((name for name in names if _seen(name) in seen), None):
        unlike = sorted({*same} ^ {*seen[_seen(same)]})
        letters = " and ".join(f"{ascii(letter)} ({unicodedata.name(letter, 'unnamed')})" for letter in unlike[:3])
        return f" (it has {same!r}, which differs in {letters or 'spaces'} only)"
    if {_parts(name)[-1] for name in names} & {_parts(other)[-1] for other in others}:
        ours, theirs = ({match[0] if (match := SUFFIX.search(name)) else "" for name in some}
                        for some in (names, others))
        if ours == {""} and "" not in theirs:
            return f" (all {len(names)} names lack the suffix {' or '.join(sorted(theirs))})"
        if theirs == {""} and "" not in ours:
            return f" (all {len(names)} names have the suffix {' or '.join(sorted(ours))}, none there)"
    return f" (its names are like {names[0]!r})"
