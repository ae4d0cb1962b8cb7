"""Predictions and labels as CSV tables: read, with faults named by file and line; joined; merged by scan or patient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ctclip.config import UNITS
from ctclip.data.ct_rate import patient_of, scan_of
from ctclip.data.tables import number, read_table, some
from ctclip.evaluation.metrics import EvaluationError, checked
from ctclip.fileio import replacing
from ctclip_model import ABNORMALITIES


@dataclass(frozen=True)
class VolumeTable:
    """Numbers by VolumeName and label, where they were read, and the line of each volume in that file."""

    frame: pd.DataFrame
    source: str = "a table given in memory"
    lines: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationInputs:
    """Tables as read_predictions and read_labels give them, and what is known about their origin.

    `tuning` is (predictions, labels) of patients who do not occur in `predictions`. `history` is log.jsonl's list of
    epochs. `data_dir` is the cohort's folder, where volumes and metadata are looked up; `record` is a run's run.json.
    `note` is a disclaimer shown with the results, where they are not of phantoms.
    """

    predictions: VolumeTable
    labels: VolumeTable
    tuning: tuple[VolumeTable, VolumeTable] | None = None
    history: list[dict] | None = None
    phantom: bool = False
    data_dir: Path | None = None
    record: Mapping = field(default_factory=dict)
    note: str | None = None


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
    return _read(path, lambda values: (values >= 0) & (values <= 1), "a probability in [0, 1]",
                 "write sigmoid outputs, not logits")


def read_labels(path: str | Path) -> VolumeTable:
    """`load_labels` with the table's origin, for messages."""
    table = _read(path, lambda values: np.isin(values, (0, 1)), "0 or 1", "correct the label or remove the row", True)
    return replace(table, frame=table.frame.astype(np.int8))


def _read(
    path: str | Path, valid: Callable[[np.ndarray], np.ndarray], expected: str, remedy: str, repeats: bool = False
) -> VolumeTable:
    """A table in which every row is whole. Training skips the others; here they would change what is measured."""
    table = read_table(path, ABNORMALITIES, error=EvaluationError)
    if faults := table.faults or (not repeats and table.repeated):
        raise EvaluationError(faults[0])
    if not table.rows:
        raise EvaluationError(f"{path}: found no rows below the header, expected at least one volume; add them")
    values = np.array([[number(cell) for cell in cells] for cells in table.rows.values()])  # NaN for other text
    bad, names = ~valid(values), list(table.rows)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        found = "no number" if np.isnan(values[row, column]) else f"{values[row, column]:g}"
        more = f" ({bad.sum()} such values)" if bad.sum() > 1 else ""
        raise EvaluationError(f"{path}, line {table.lines[names[row]]}: found {found} for {ABNORMALITIES[column]} of "
                              f"{names[row]}{more}, expected {expected}; {remedy}")
    return VolumeTable(_frame(names, values), str(path), table.lines)


def _frame(names: Sequence[str] | np.ndarray, values: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(values, index=pd.Index(names, name="VolumeName"), columns=list(ABNORMALITIES))


def write_table(path: str | Path, names: Sequence[str] | np.ndarray, values: np.ndarray) -> None:
    """VolumeName and the 18 columns, as predictions (probabilities) and labels (0/1) files have them."""
    with replacing(path) as temporary:
        _frame(names, values).to_csv(temporary)


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


def common_volumes(tables: Mapping[str, VolumeTable], allow_partial: bool = False) -> tuple[list[str], dict[str, int]]:
    """(volume names that all tables hold, in the first one's order; {table: how many of its volumes are skipped}).

    Unless `allow_partial`, the tables must hold the same volumes: EvaluationError names the first that does not.
    """
    for table in tables.values():
        twice = table.frame.index[table.frame.index.duplicated()]
        if len(twice):
            raise EvaluationError(f"{table.source}: found {twice[0]} again, expected one row per volume; remove one")
    first, *others = tables.values()
    names = set(first.frame.index)
    for other in others:
        for table, whole in ((other, first), (first, other)) if not allow_partial else ():
            missing = whole.frame.index.difference(table.frame.index, sort=False)
            if len(missing):
                line = f" (line {whole.lines[missing[0]]})" if missing[0] in whole.lines else ""
                raise EvaluationError(
                    f"{table.source}: found no row for {len(missing)} of the {len(whole.frame)} volumes in "
                    f"{whole.source}, first {missing[0]}{line}, expected the same volumes; add them, remove them "
                    "there, or go on with those in both: --allow-partial"
                )
        names &= set(other.frame.index)
    if not names:
        found = " and ".join(table.source for table in tables.values())
        raise EvaluationError(f"{found}: found no volume in common, expected the same volumes; check VolumeName")
    skipped = {what: len(table.frame) - len(names) for what, table in tables.items() if len(table.frame) > len(names)}
    return [name for name in first.frame.index if name in names], skipped


def rows_of(
    predictions: pd.DataFrame, labels: pd.DataFrame | None, names: Sequence[str], unit: str = "volume",
    skipped: dict[str, int] | None = None,
) -> Rows:
    """The named volumes of both tables, merged to `unit`; without `labels`, all of them are 0."""
    columns = list(ABNORMALITIES)
    p = predictions.loc[names, columns].to_numpy()
    y, p = checked(np.zeros(p.shape) if labels is None else labels.loc[names, columns].to_numpy(), p)
    rows = Rows(np.array(names), row_keys(names, "patient"), y, p, len(names), skipped=skipped or {})
    if unit not in UNITS:
        raise EvaluationError(f"found unit {unit!r}, expected one of {', '.join(UNITS)}")
    if unit != "volume":
        rows = _merged(rows, "scan")
    return _merged(rows, "patient") if unit == "patient" else rows


def tuning_rows(tuning: tuple[VolumeTable, VolumeTable], unit: str = "volume", allow_partial: bool = False) -> Rows:
    """Rows of (predictions, labels) of tuning patients."""
    predictions, labels = tuning
    volumes, skipped = common_volumes({"tuning predictions": predictions, "tuning labels": labels}, allow_partial)
    return rows_of(predictions.frame, labels.frame, volumes, unit, skipped)


def _merged(rows: Rows, unit: str) -> Rows:
    """One row per scan or patient, in order of first appearance; probabilities by their mean over a scan's volumes,
    the maximum over a patient's scans, labels by any."""
    keys = row_keys(rows.names, unit)
    where = pd.factorize(keys)[0]
    _, first, sizes = np.unique(where, return_index=True, return_counts=True)
    probabilities = np.zeros((len(first), rows.labels.shape[1]))
    positives = np.zeros_like(probabilities)
    np.add.at(positives, where, rows.labels)
    (np.add if unit == "scan" else np.maximum).at(probabilities, where, rows.probabilities)
    if unit == "scan":
        probabilities /= sizes[:, None]
    differ = ((positives > 0) & (positives < sizes[:, None])).any(axis=1)
    return replace(rows, names=keys[first], patients=rows.patients[first], labels=(positives > 0).astype(np.int8),
                   probabilities=probabilities, unit=unit, conflicts=rows.conflicts + int(differ.sum()))


def check_no_overlap(reported: np.ndarray, tuning: np.ndarray, source: str) -> None:
    """EvaluationError where tuning patients are among the reported ones."""
    shared = sorted(set(reported.tolist()) & set(tuning.tolist()))
    if shared:
        raise EvaluationError(
            f"{source}: found {len(shared)} tuning patients among the reported ones ({some(shared)}), expected none; "
            "remove them from either table, or give no tuning tables to cross-fit"
        )


def row_keys(names: Iterable[str], unit: str) -> np.ndarray:
    """The row of that unit to which each volume belongs, read from its name: train_12_a_1.nii.gz and
    train_12_a_2.nii.gz are both of the scan train_12_a and of the patient train_12."""
    key_of: dict[str, Callable[[str], str]] = {"volume": str, "scan": scan_of, "patient": patient_of}
    return np.array([key_of[unit](name) for name in names])
