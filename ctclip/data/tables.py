"""CSV tables with a row for each volume: labels, metadata, predictions. Read here, whoever needs them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ctclip.data.ct_rate import volume_name
from ctclip.errors import UserError

NAME_COLUMN = "VolumeName"
WARNING_COLUMN = "Warning"  # the last one of a prediction's table, where a scan has a warning


class CohortError(UserError):
    """A folder or table that gives no usable cohort: one line, same form as VolumeError."""


@dataclass
class CsvTable:
    """The cells of `columns` as stripped text, by volume, each volume once, in the order of the file.

    Identical repetitions count once (`repeated` says where); a volume with two different rows is contradictory and has
    none. Rows that are too short are filled up with empty cells. `faults` has a line of text for each row that is
    contradictory, too short or without a name.
    """

    path: Path
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)  # of the file, from 1; of the first row of each volume
    contradictory: set[str] = field(default_factory=set)
    repeated: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_table(
    path: str | Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    expected: str = "VolumeName and the 18 abnormalities",
    error: type[UserError] = CohortError,
) -> CsvTable:
    """VolumeName, the required columns and those of the optional ones that there are, found by name.

    A table that trains must also evaluate: both read it here. Cells beyond the header's are dropped: a comma at the end
    of every row must not shift the columns. Raises `error`, with what was `expected`, where the file cannot be read as
    CSV or a column is missing or there twice.
    """
    remedy = f"give one with {expected}, separated by commas"
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:  # -sig: spreadsheets put a byte order mark first
            reader = csv.reader(handle, strict=True, skipinitialspace=True)
            records = [(reader.line_num, record) for record in reader if any(cell.strip() for cell in record)]
    except OSError as fault:
        raise error(f"{path}: found no readable file ({fault.strerror}), expected a CSV; {remedy}") from fault
    except (UnicodeDecodeError, csv.Error) as fault:
        found = f"something that is not text in columns ({fault})"
        raise error(f"{path}: found {found}, expected a CSV; {remedy}") from fault
    if not records:
        raise error(f"{path}: found an empty file, expected a header and a row per volume; {remedy}")
    header = [cell.strip() for cell in records[0][1]]
    wanted = (NAME_COLUMN, *required, *(column for column in optional if column in header))
    missing = [column for column in wanted if column not in header]
    if missing:
        found = f"no column {some(missing)}, expected {expected}"
        raise error(f"{path}: found {found}; check the spelling and that commas separate the columns")
    twice = [column for column in wanted if header.count(column) > 1]
    if twice:
        raise error(f"{path}: found column {some(twice)} twice, expected it once; remove one of the two")
    places = [header.index(column) for column in wanted]
    table = CsvTable(Path(path), wanted[1:])
    for line, record in records[1:]:
        where = f"{path}, line {line}: found"
        if len(record) < len(header):
            table.faults.append(f"{where} {len(record)} values, expected {len(header)} as in the header; repair it")
            record = [*record, *[""] * (len(header) - len(record))]
        name, *cells = (record[place].strip() for place in places)
        name = volume_name(name)
        if not name:
            table.faults.append(f"{where} no VolumeName, expected one; name the volume")
        elif name not in table.lines:
            table.rows[name], table.lines[name] = tuple(cells), line
        else:
            first = f"one row per volume (first on line {table.lines[name]})"
            if table.rows.get(name) == tuple(cells):
                table.repeated.append(f"{where} {name} again, expected {first}; remove one of the two")
            else:
                table.rows.pop(name, None)
                table.contradictory.add(name)
                table.faults.append(f"{where} {name} with other values, expected {first}; remove the wrong one")
    return table


def number(cell: str) -> float:
    """NaN where the text is no number; infinity stays, to be named."""
    try:
        return float(cell) if cell.isascii() and "_" not in cell else float("nan")
    except ValueError:
        return float("nan")


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, quoted, and how many more there are."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
