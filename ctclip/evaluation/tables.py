"""Predictions and labels as CSV tables: read, with faults named by file and line; joined; merged by scan or patient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.config import UNITS
from ctclip.data.ct_rate import names_patient, patient_of, scan_of
from ctclip.data.tables import CsvTable, number, read_table, some
from ctclip.evaluation.metrics import EvaluationError, checked
from ctclip.fileio import replacing
from ctclip_model import ABNORMALITIES


@dataclass(frozen=True)
class VolumeTable:
    """Numbers by VolumeName and label, where they were read, and the line of each volume in that file."""

    frame: pd.DataFrame
    source: str = "a table given in memory"
    lines: Mapping[str, int] = field(default_factory=dict)


def load_predictions(path: str | Path) -> pd.DataFrame:
    """Probabilities indexed by VolumeName, the 18 columns in ABNORMALITIES' order (matched by name, others ignored).

    Any fault of the file raises EvaluationError naming file, line and remedy.
    """
    return read_predictions(path).frame


def load_labels(path: str | Path) -> pd.DataFrame:
    """Labels 0/1 (int8) from a CSV with CT-RATE's header; otherwise like load_predictions. Identical rows of a volume
    count once, as in training."""
    return read_labels(path).frame


def read_predictions(path: str | Path) -> VolumeTable:
    """`load_predictions` with the table's origin, for messages."""
    table = _read_whole_rows(path)
    if table.repeated:
        raise EvaluationError(table.repeated[0])
    values = _numbers(table)
    bad = ~((values >= 0) & (values <= 1))  # NaN fails both comparisons
    _check_values(table, values, bad, "a probability in [0, 1]", "write sigmoid outputs, not logits")
    return VolumeTable(_frame(list(table.rows), values), str(path), table.lines)


def read_labels(path: str | Path) -> VolumeTable:
    """`load_labels` with the table's origin, for messages."""
    table = _read_whole_rows(path)
    values = _numbers(table)
    _check_values(table, values, ~np.isin(values, (0, 1)), "0 or 1", "correct the label or remove the row")
    return VolumeTable(_frame(list(table.rows), values.astype(np.int8)), str(path), table.lines)


def _read_whole_rows(path: str | Path) -> CsvTable:
    """A table in which every row is whole. Training skips the others; here they would change what is measured."""
    table = read_table(path, ABNORMALITIES, error=EvaluationError)
    if table.faults:
        raise EvaluationError(table.faults[0])
    if not table.rows:
        raise EvaluationError(f"{path}: found no rows below the header, expected at least one volume; add them")
    return table


def _numbers(table: CsvTable) -> np.ndarray:
    """The 18 columns as floats; text that is no number becomes NaN."""
    return np.array([[number(cell) for cell in cells] for cells in table.rows.values()])


def _check_values(table: CsvTable, values: np.ndarray, bad: np.ndarray, expected: str, remedy: str) -> None:
    if not bad.any():
        return
    row, column = np.argwhere(bad)[0]
    value, name = values[row, column], list(table.rows)[row]
    found = "no number" if np.isnan(value) else f"{value:g}"
    more = f" ({bad.sum()} such values)" if bad.sum() > 1 else ""
    raise EvaluationError(
        f"{table.path}, line {table.lines[name]}: found {found} for {ABNORMALITIES[column]} of {name}{more}, "
        f"expected {expected}; {remedy}"
    )


def _frame(names: Sequence[str] | np.ndarray, values: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(values, index=pd.Index(names, name="VolumeName"), columns=list(ABNORMALITIES))


def write_table(path: str | Path, names: Sequence[str] | np.ndarray, values: np.ndarray) -> None:
    """VolumeName and the 18 columns, as predictions (probabilities) and labels (0/1) files have them."""
    with replacing(path) as temporary:
        _frame(names, values).to_csv(temporary)


# ------------------------------------------------------------------------------------------------ from tables to rows

@dataclass(frozen=True)
class Rows:
    """What is evaluated, row by row: names and patients (N,), labels (N, 18) int8, probabilities (N, 18) float64.

    Made of `n_volumes` volumes. `unit` is a key of UNITS. `skipped` counts, by table, the volumes that others lack
    (only where that was allowed); `conflicts` the rows whose volumes were merged though their labels differ (a finding
    counts if any of them has it).
    """

    names: np.ndarray
    patients: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    n_volumes: int
    unit: str = "volume"
    skipped: dict[str, int] = field(default_factory=dict)
    conflicts: int = 0

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_patients(self) -> int:
        return len(np.unique(self.patients))


def common_volumes(
    tables: Mapping[str, VolumeTable], allow_partial: bool = False
) -> tuple[list[str], dict[str, int]]:
    """(volume names that all tables hold, in the first one's order; {table: how many of its volumes are skipped}).

    Unless `allow_partial`, the tables must hold the same volumes: EvaluationError names the first that does not.
    """
    for table in tables.values():
        index = table.frame.index
        if not index.is_unique:
            twice = index[index.duplicated()][0]
            raise EvaluationError(f"{table.source}: found {twice} again, expected one row per volume; remove one")
    first, *others = tables.values()
    names = set(first.frame.index)
    for other in others:
        if not allow_partial:
            _check_holds_all(other, first)
            _check_holds_all(first, other)
        names &= set(other.frame.index)
    if not names:
        found = " and ".join(table.source for table in tables.values())
        raise EvaluationError(f"{found}: found no volume in common, expected the same volumes; check VolumeName")
    skipped = {what: len(table.frame) - len(names) for what, table in tables.items() if len(table.frame) > len(names)}
    return [name for name in first.frame.index if name in names], skipped


def _check_holds_all(table: VolumeTable, other: VolumeTable) -> None:
    missing = other.frame.index.difference(table.frame.index, sort=False)
    if len(missing):
        line = other.lines.get(missing[0])
        raise EvaluationError(
            f"{table.source}: found no row for {len(missing)} of the {len(other.frame)} volumes in {other.source}, "
            f"first {missing[0]}{f' (line {line})' if line else ''}, expected the same volumes; add them, remove them "
            "there, or go on with those in both: --allow-partial"
        )


def rows_of(
    predictions: pd.DataFrame,
    labels: pd.DataFrame | None,
    names: Sequence[str],
    unit: str = "volume",
    skipped: dict[str, int] | None = None,
) -> Rows:
    """The named volumes of both tables, merged to `unit`; without `labels`, all of them are 0."""
    columns = list(ABNORMALITIES)
    p = predictions.loc[names, columns].to_numpy()
    y, p = checked(np.zeros(p.shape) if labels is None else labels.loc[names, columns].to_numpy(), p)
    rows = Rows(np.array(names), patients_of(names), y, p, len(names), skipped=skipped or {})
    if unit not in UNITS:
        raise EvaluationError(f"found unit {unit!r}, expected one of {', '.join(UNITS)}")
    if unit != "volume":
        rows = _merged(rows, "scan", scans_of(rows.names), "mean")
    return _merged(rows, "patient", rows.patients, "max") if unit == "patient" else rows


def tuning_rows(
    tuning: tuple[VolumeTable, VolumeTable], unit: str = "volume", allow_partial: bool = False
) -> Rows:
    """Rows of (predictions, labels) of tuning patients."""
    predictions, labels = tuning
    volumes, skipped = common_volumes({"tuning predictions": predictions, "tuning labels": labels}, allow_partial)
    return rows_of(predictions.frame, labels.frame, volumes, unit, skipped)


def _merged(rows: Rows, unit: str, keys: np.ndarray, how: str) -> Rows:
    """One row per key, in order of first appearance; probabilities by their mean or maximum, labels by any."""
    _, first, inverse, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    where, n = place[inverse], len(order)
    probabilities = np.zeros((n, rows.labels.shape[1]))
    any_label, all_labels = np.zeros_like(probabilities, np.int8), np.ones_like(probabilities, np.int8)
    np.maximum.at(any_label, where, rows.labels)
    np.minimum.at(all_labels, where, rows.labels)
    if how == "mean":
        np.add.at(probabilities, where, rows.probabilities)
        probabilities /= sizes[order][:, None]
    else:
        np.maximum.at(probabilities, where, rows.probabilities)
    conflicts = rows.conflicts + int((any_label != all_labels).any(axis=1).sum())
    return replace(rows, names=np.asarray(keys)[first[order]], patients=rows.patients[first[order]], labels=any_label,
                   probabilities=probabilities, unit=unit, conflicts=conflicts)


def check_no_overlap(reported: np.ndarray, tuning: np.ndarray, source: str) -> None:
    """EvaluationError where tuning patients are among the reported ones."""
    shared = sorted(set(reported.tolist()) & set(tuning.tolist()))
    if shared:
        raise EvaluationError(
            f"{source}: found {len(shared)} tuning patients among the reported ones ({some(shared)}), expected none; "
            "remove them from either table, or give no tuning tables to cross-fit"
        )


def patients_of(names: Sequence[str] | np.ndarray) -> np.ndarray:
    """Patient of each volume, read from its name: train_12_a_1.nii.gz and train_12_b_2.nii.gz are both train_12."""
    return np.array([patient_of(name) for name in names])


def count_unnamed(names: Sequence[str] | np.ndarray) -> int:
    """Volumes whose name is not of CT-RATE's form, so that patients_of may be wrong."""
    return sum(not names_patient(name) for name in names)


def scans_of(names: Sequence[str] | np.ndarray) -> np.ndarray:
    """Scan of each volume, read from its name: train_12_a_1.nii.gz and train_12_a_2.nii.gz are both train_12_a."""
    return np.array([scan_of(name) for name in names])


def row_keys(names: Sequence[str] | np.ndarray, unit: str) -> list[str]:
    """The row of that unit to which each volume belongs."""
    key_of: dict[str, Callable[..., np.ndarray]] = {"volume": np.array, "scan": scans_of, "patient": patients_of}
    return key_of[unit](names).tolist()
