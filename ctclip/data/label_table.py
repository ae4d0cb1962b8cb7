"""Which findings a table of labels or predictions is about, and its numbers: the one rule, for training and evaluation.

The findings are the table's own: the 18 of CT-RATE where all of them are columns; otherwise those of the 18 that are,
in their order, and every other column whose cells are all valid (labels: 0, 1 or empty), in the header's order. A
column that is kept out by less than half of its cells is named with the first of these. An empty cell of a label is
unknown.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctclip.data.tables import (
    EMPTY,
    STATED_COLUMNS,
    CohortError,
    CsvTable,
    cell_text,
    is_known_column,
    listed,
    read_table,
    unknown_columns,
)
from ctclip.errors import UserError
from ctclip_model import ABNORMALITIES, UNKNOWN

ALIKE = 0.85  # two names of which one may be a mistyped other (difflib's ratio)


@dataclass(frozen=True)
class LabelTable:
    """Of a `table`, its `findings`, their `values` (N, L) and the columns that nothing uses.

    Values are as they stand, valid or not: EMPTY for an empty cell, NaN for text that is no number. `doubtful` has a
    line for each unused column that has cells of a finding mostly, with the first cell that keeps it out.
    """

    table: CsvTable
    findings: tuple[str, ...]
    values: np.ndarray
    unused: tuple[str, ...]
    doubtful: tuple[str, ...] = ()


def listed_findings(text: str | None) -> list[str] | None:
    """The names of --findings, as tables.listed reads them; None without it. Raises CohortError for none, or one that
    is twice."""
    if text is None:
        return None
    expected = "expected columns, each once, commas between, a name with a comma in double quotes; correct it"
    try:
        names = listed(text)
    except ValueError as fault:
        raise CohortError(f"found --findings {fault}, {expected}") from fault
    if not names or len(set(names)) < len(names):
        raise CohortError(f"found --findings {text!r}, {expected}")
    return names


def is_label(values: np.ndarray) -> np.ndarray:
    """Which of LabelTable.values are 0, 1 or unknown."""
    return np.isin(values, (0, 1, EMPTY))


def is_probability(values: np.ndarray) -> np.ndarray:
    """Which of LabelTable.values are in [0, 1]."""
    return (values >= 0) & (values <= 1)


def with_unknown(values: np.ndarray) -> np.ndarray:
    """Valid values of labels as int8, with UNKNOWN for the empty cells."""
    return np.where(values == EMPTY, UNKNOWN, values).astype(np.int8)


def read_label_table(
    path: str | Path, findings: Sequence[str] | None = None, minus_one: bool = False,
    error: type[UserError] = CohortError,
) -> LabelTable:
    """A table of labels. `findings`: the columns that are wanted, by default those of the rule above. With `minus_one`,
    -1 is read as an empty cell."""
    return _read(path, findings, is_label, error, minus_one)


def read_label_columns(
    path: str | Path, columns: Callable[[Sequence[str]], Sequence[str]], name_column: str, minus_one: bool,
    error: type[UserError],
) -> LabelTable:
    """A table of labels of another data set: what `columns` chooses of its header; `name_column` names the volumes."""
    expected = f"{name_column} and the columns of the label map"
    table = read_table(path, columns, (), STATED_COLUMNS, expected, error, name_column)
    return LabelTable(table, table.numeric, _values(table, minus_one), ())


def read_probability_table(
    path: str | Path, findings: Sequence[str] | None = None, error: type[UserError] = CohortError
) -> LabelTable:
    """A table of predictions; `findings` as in read_label_table."""
    return _read(path, findings, is_probability, error)


def _read(
    path: str | Path, findings: Sequence[str] | None, valid: Callable[[np.ndarray], np.ndarray],
    error: type[UserError], minus_one: bool = False,
) -> LabelTable:
    def candidates(header: Sequence[str]) -> Sequence[str]:
        return _candidates(path, header, error)

    table = read_table(path, findings or candidates, optional=STATED_COLUMNS, error=error)
    values, doubtful = _values(table, minus_one), []
    if findings is None:
        chosen = _are_findings(table.numeric, values, valid)
        doubtful = _doubtful(table, values, chosen, valid)
        findings, values = [name for name, own in zip(table.numeric, chosen, strict=True) if own], values[:, chosen]
        if doubtful and not findings:
            raise error(doubtful[0])
        _check_some(path, findings, error)
    others = [column for column in (*table.numeric, *table.others) if column not in findings]
    return LabelTable(table, tuple(findings), values, tuple(unknown_columns(others)), tuple(doubtful))


def _doubtful(
    table: CsvTable, values: np.ndarray, chosen: np.ndarray, valid: Callable[[np.ndarray], np.ndarray]
) -> list[str]:
    """LabelTable.doubtful."""
    lines, labels = [], valid is is_label
    for column in np.flatnonzero(~chosen & (values != EMPTY).any(axis=0)):
        good, name = valid(values[:, column]), table.numeric[column]
        wrong, filled = np.flatnonzero(~good), values[:, column] != EMPTY
        if not len(wrong) or 2 * (good & filled).sum() < filled.sum():
            continue
        line, first = table.lines[wrong[0]], values[wrong[0], column]
        more = f" ({len(wrong):,} such cells)" if len(wrong) > 1 else ""
        expected = "0, 1 or an empty cell" if labels else "a probability in [0, 1]"
        remedy = "say that -1 is unknown (--minus-one-is-unknown)" if labels and first == -1 else "correct it"
        found = cell_text(table.path, line, name)
        lines.append(f"{table.path}, line {line}: found {found!r} for {name}{more}, expected {expected} as in a "
                     f"finding's column; {remedy}, or name the columns that count with --findings")
    return lines


def _values(table: CsvTable, minus_one: bool) -> np.ndarray:
    return np.where(table.numbers == -1, EMPTY, table.numbers) if minus_one else table.numbers


def columns_among(path: str | Path, findings: Sequence[str], error: type[UserError] = CohortError) -> list[str]:
    """Those of `findings` that are columns of a table, in their order. Raises `error` for a column that looks like one
    of the others, mistyped."""
    def named(header: Sequence[str]) -> list[str]:
        present, others = _named(path, header, findings, error)
        return present

    return list(read_table(path, named, error=error).numeric)


def table_findings(
    source: str, header: Sequence[str], is_finding: Callable[[str], bool], error: type[UserError]
) -> list[str]:
    """The findings of a table in memory, by the same rule; `is_finding` says whether all cells of a column are valid
    and one says something."""
    findings = [name for name in _candidates(source, header, error) if name in ABNORMALITIES or is_finding(name)]
    _check_some(source, findings, error)
    return findings


def _check_some(path: str | Path, findings: Sequence[str], error: type[UserError]) -> None:
    if not findings:
        raise error(f"{path}: found no column of findings, expected VolumeName and a column for each, such as "
                    f"{ABNORMALITIES[0]!r}; name them in the header")


def _candidates(path: str | Path, header: Sequence[str], error: type[UserError]) -> list[str]:
    """Columns of a header that may be findings. Raises `error` for one that looks like one of the 18, mistyped."""
    named, others = _named(path, header, ABNORMALITIES, error, ", or name the columns that count with --findings")
    return named if len(named) == len(ABNORMALITIES) else [*named, *dict.fromkeys(others)]


def _named(
    path: str | Path, header: Sequence[str], findings: Sequence[str], error: type[UserError], remedy: str = ""
) -> tuple[list[str], list[str]]:
    """(those of `findings` that are in a header, its other columns that may be findings)."""
    missing = [name for name in findings if name not in header]
    others = [column for column in header if not is_known_column(column) and column not in findings]
    for column in others if missing else ():
        if near := mistyped(column, missing):
            raise error(f"{path}: found column {column!r}, expected {near!r} or a name that is unlike it; check the "
                        f"spelling{remedy}")
    return [name for name in findings if name in header], others


def mistyped(name: str, names: Sequence[str] = ABNORMALITIES) -> str | None:
    """Which of `names` a name may be meant for that is none of them."""
    folded = {other.casefold(): other for other in names}
    near = difflib.get_close_matches(" ".join(name.casefold().split()), folded, 1, ALIKE)
    return folded[near[0]] if near and name not in names else None


def _are_findings(
    names: Sequence[str], values: np.ndarray, valid: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """(K,) mask: columns that say something and, of other names than the 18, in valid cells only."""
    if not len(values):
        return np.isin(names, ABNORMALITIES)
    says_something = (values != EMPTY).any(axis=0)
    return says_something & (np.isin(names, ABNORMALITIES) | valid(values).all(axis=0))
