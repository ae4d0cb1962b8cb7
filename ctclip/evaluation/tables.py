"""Predictions and labels as CSV tables: read, with faults named by file and line; joined; merged by scan or patient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctclip.config import UNITS
from ctclip.data.ct_rate import names_patient, patient_of, scan_of
from ctclip.data.tables import Table, number, read_table, some
from ctclip.evaluation.metrics import EvaluationError, checked
from ctclip.fileio import replacing
from ctclip_model import ABNORMALITIES

if TYPE_CHECKING:
    import pandas as pd


def load_predictions(path: str | Path) -> pd.DataFrame:
    """Probabilities indexed by VolumeName, the 18 columns in ABNORMALITIES' order (matched by name, others ignored).

    Any fault of the file raises EvaluationError naming file, line and remedy. `attrs` keep the path as "source" and
    {name: line of the file} as "lines".
    """
    table = _read_table(path)
    if table.repeated:
        raise EvaluationError(table.repeated[0])
    frame = _frame(table)
    values = frame.to_numpy()
    bad = ~((values >= 0) & (values <= 1))  # NaN fails both comparisons
    _refuse_values(path, frame, bad, "a probability in [0, 1]", "write sigmoid outputs, not logits")
    return frame


def load_labels(path: str | Path) -> pd.DataFrame:
    """Labels 0/1 (int8) from a CSV with CT-RATE's header; otherwise like load_predictions. Identical rows of a volume
    count once, as in training."""
    frame = _frame(_read_table(path))
    bad = ~np.isin(frame.to_numpy(), (0, 1))
    _refuse_values(path, frame, bad, "0 or 1", "correct the label or remove the row")
    return frame.astype(np.int8)


def _read_table(path: str | Path) -> Table:
    """A table in which every row is whole. Training skips the others; here they would change what is measured."""
    table = read_table(path, ABNORMALITIES, error=EvaluationError)
    if table.faults:
        raise EvaluationError(table.faults[0])
    if not table.rows:
        raise EvaluationError(f"{path}: found no rows below the header, expected at least one volume; add them")
    return table


def _frame(table: Table) -> pd.DataFrame:
    """The 18 columns as floats; text that is no number becomes NaN."""
    import pandas as pd

    values = np.array([[number(cell) for cell in cells] for cells in table.rows.values()])
    frame = pd.DataFrame(values, index=pd.Index(table.rows, name="VolumeName"), columns=list(ABNORMALITIES))
    frame.attrs |= {"source": str(table.path), "lines": table.lines}
    return frame


def _refuse_values(
    path: str | Path, frame: pd.DataFrame, bad: np.ndarray, expected: str, remedy: str
) -> None:
    if not bad.any():
        return
    row, column = np.argwhere(bad)[0]
    value = frame.iat[row, column]
    found = "no number" if np.isnan(value) else f"{value:g}"
    more = f" ({bad.sum()} such values)" if bad.sum() > 1 else ""
    name = frame.index[row]
    raise EvaluationError(
        f"{path}, line {frame.attrs['lines'][name]}: found {found} for {frame.columns[column]} of {name}{more}, "
        f"expected {expected}; {remedy}"
    )


def write_table(path: str | Path, names: Sequence[str] | np.ndarray, values: np.ndarray) -> None:
    """VolumeName and the 18 columns, as predictions (probabilities) and labels (0/1) files have them."""
    import pandas as pd

    frame = pd.DataFrame(values, index=pd.Index(names, name="VolumeName"), columns=list(ABNORMALITIES))
    with replacing(path) as temporary:
        frame.to_csv(temporary)


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


def join(tables: Mapping[str, pd.DataFrame], allow_partial: bool = False) -> tuple[list[str], dict[str, int]]:
    """(volume names that all tables hold, in the first one's order; {table: how many of its volumes are left out}).

    Unless `allow_partial`, the tables must hold the same volumes: EvaluationError names the first that does not.
    """
    for table in tables.values():
        if not table.index.is_unique:
            twice = table.index[table.index.duplicated()][0]
            raise EvaluationError(f"{source_of(table)}: found {twice} again, expected one row per volume; remove one")
    first, *others = tables.values()
    names = set(first.index)
    for table in others:
        for has, lacks in ((first, table), (table, first)):
            missing = has.index.difference(lacks.index, sort=False)
            if len(missing) and not allow_partial:
                line = has.attrs.get("lines", {}).get(missing[0])
                raise EvaluationError(
                    f"{source_of(lacks)}: found no row for {len(missing)} of the {len(has)} volumes in "
                    f"{source_of(has)}, first {missing[0]}{f' (line {line})' if line else ''}, expected the same "
                    "volumes; add them, remove them there, or go on with those in both: --allow-partial"
                )
        names &= set(table.index)
    if not names:
        found = " and ".join(map(source_of, tables.values()))
        raise EvaluationError(f"{found}: found no volume in common, expected the same volumes; check VolumeName")
    skipped = {what: len(table) - len(names) for what, table in tables.items() if len(table) > len(names)}
    return [name for name in first.index if name in names], skipped


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
    tuning: tuple[pd.DataFrame, pd.DataFrame], unit: str = "volume", allow_partial: bool = False
) -> Rows:
    """Rows of (predictions, labels) of tuning patients."""
    volumes, skipped = join(dict(zip(("tuning predictions", "tuning labels"), tuning, strict=True)), allow_partial)
    return rows_of(*tuning, volumes, unit, skipped)


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
    """Volumes whose name is not of CT-RATE's form, so that patients_of may tell patients apart wrongly."""
    return sum(not names_patient(name) for name in names)


def scans_of(names: Sequence[str] | np.ndarray) -> np.ndarray:
    """Scan of each volume, read from its name: train_12_a_1.nii.gz and train_12_a_2.nii.gz are both train_12_a."""
    return np.array([scan_of(name) for name in names])


def row_keys(names: Sequence[str] | np.ndarray, unit: str) -> list[str]:
    """The row of that unit to which each volume belongs."""
    key_of: dict[str, Callable[..., np.ndarray]] = {"volume": np.array, "scan": scans_of, "patient": patients_of}
    return key_of[unit](names).tolist()


def source_of(frame: pd.DataFrame) -> str:
    """The file a table was read from."""
    return frame.attrs.get("source", "a table given in memory")
