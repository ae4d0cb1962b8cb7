"""Predictions and labels as CSV tables: read, with faults named by file and line; joined; merged by scan or patient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ctclip.config import UNITS
from ctclip.data.ct_rate import volume_name
from ctclip.data.label_map import LabelMap, any_label
from ctclip.data.label_table import (
    LabelTable,
    is_label,
    is_probability,
    read_label_columns,
    read_label_table,
    read_probability_table,
    table_findings,
    with_unknown,
)
from ctclip.data.patients import (
    StatedIds,
    id_columns,
    ids_in_table,
    merge_ids,
    patient_and_scan,
    read_patients,
    stated_ids,
)
from ctclip.data.tables import (
    EMPTY,
    ID_COLUMNS,
    NAME_COLUMN,
    SCALE_COLUMN,
    SCALES,
    STATED_COLUMNS,
    UNCALIBRATED,
    column_name,
    how_names_differ,
    join,
    number_text,
    shown,
    some,
    unknown_columns,
)
from ctclip.evaluation.case_slices import Evidence
from ctclip.evaluation.metrics import EvaluationError, checked
from ctclip.fileio import replacing
from ctclip_model import ABNORMALITIES, UNKNOWN, check_written


@dataclass(frozen=True)
class VolumeTable:
    """Numbers by VolumeName and finding, and PatientID, ScanID and Scale where they are stated; where they were read,
    the line of each row in that file, the columns there that nothing uses, and of those that may be meant for findings
    what keeps them out. Labels are 0, 1 or UNKNOWN."""

    frame: pd.DataFrame
    source: str = "a table given in memory"
    lines: Sequence[int] = ()
    unused: Sequence[str] = ()
    doubtful: Sequence[str] = ()

    @property
    def findings(self) -> tuple[str, ...]:
        return tuple(column for column in self.frame if column not in STATED_COLUMNS)

    def select(self, findings: Sequence[str]) -> VolumeTable:
        """The table with these findings, in their order; EvaluationError where it lacks one."""
        if missing := [name for name in findings if name not in self.frame]:
            raise EvaluationError(
                f"{self.source}: found no column {some(missing)}, expected all {len(findings)} findings that are "
                "evaluated; add the column, or name those that are in all tables with --findings"
            )
        stated = [column for column in STATED_COLUMNS if column in self.frame]
        others = [name for name in self.findings if name not in findings]
        return replace(self, frame=self.frame[[*findings, *stated]], unused=(*self.unused, *others))

    @property
    def ids(self) -> StatedIds:
        columns = {column: self.frame[column].tolist() for column in ID_COLUMNS if column in self.frame}
        return stated_ids(self.frame.index, columns, self.source)

    @property
    def scale(self) -> str:
        """What the numbers are: the column Scale where it is there, UNCALIBRATED without it. Raises EvaluationError
        where rows are on different scales, or on one that is none of SCALES."""
        stated = list(dict.fromkeys(self.frame[SCALE_COLUMN])) if SCALE_COLUMN in self.frame else [UNCALIBRATED]
        if len(stated) > 1:
            raise EvaluationError(f"{self.source}: found rows with {stated[0]!r} and rows with {stated[1]!r} in the "
                                  f"column {SCALE_COLUMN}, expected one scale; put them into two tables")
        if stated[0].partition(" ")[0] not in SCALES:
            raise EvaluationError(f"{self.source}: found {stated[0]!r} in the column {SCALE_COLUMN}, expected "
                                  f"{', '.join(SCALES)}; correct it, or give another column another name")
        return stated[0]

    def where(self, name: str) -> str:
        """" (line 3)", where that is known."""
        return f" (line {self.lines[self.frame.index.get_loc(name)]})" if len(self.lines) else ""


@dataclass(frozen=True)
class EvaluationInputs:
    """Tables as read_predictions and read_labels give them, and what is known about their origin.

    `tuning` is (predictions, labels) of patients who do not occur in `predictions`. `history` is log.jsonl's list of
    epochs. `data_dir` is the cohort's folder, where volumes and metadata are looked up; `record` is a run's run.json.
    `note` is a disclaimer shown with the results, where they are not of phantoms. `patients` is what the table of
    --patients states. `members` are the inputs that these were made of, where they are several models' (ensemble.py),
    and `ensemble` says how. `label_map` is what made the findings of all tables. `evidence` is of the run's model.
    """

    predictions: VolumeTable
    labels: VolumeTable
    tuning: tuple[VolumeTable, VolumeTable] | None = None
    history: list[dict] | None = None
    phantom: bool = False
    data_dir: Path | None = None
    record: Mapping = field(default_factory=dict)
    note: str | None = None
    patients: StatedIds = field(default_factory=dict)
    members: Sequence[EvaluationInputs] = ()
    ensemble: Mapping[str, Any] = field(default_factory=dict)
    label_map: LabelMap | None = None
    evidence: Evidence | None = None


def load_predictions(path: str | Path) -> pd.DataFrame:
    """Probabilities indexed by VolumeName, a column for each finding (the 18 in ABNORMALITIES' order where they are
    there; see ctclip/data/label_table.py), then PatientID, ScanID and Scale where the file has them.

    Any fault of the file raises EvaluationError naming file, line and remedy.
    """
    return read_predictions(path).frame


def load_labels(path: str | Path) -> pd.DataFrame:
    """Labels 0/1 (int8), UNKNOWN (-1) for an empty cell; otherwise like load_predictions. Identical rows of a volume
    count once, as in training."""
    return read_labels(path).frame


def read_predictions(
    path: str | Path, findings: Sequence[str] | None = None, label_map: LabelMap | None = None
) -> VolumeTable:
    """`load_predictions` with the table's origin, for messages; of `findings`, by default the table's own. With
    `label_map`, its findings: the highest probability of those that make one."""
    check_written(Path(path))
    if label_map:
        findings = label_map.chosen(findings, EvaluationError)
        groups = {name: list(label_map.predictions[name]) for name in findings}
        table = read_predictions(path, list(dict.fromkeys(name for group in groups.values() for name in group)))
        return _mapped(table, {name: table.frame[group].max(axis=1) for name, group in groups.items()})
    found = read_probability_table(path, findings, EvaluationError)
    return _whole(found, found.values, is_probability(found.values), "a probability in [0, 1]",
                  "write sigmoid outputs, not logits", found.table.repeated)


def read_labels(
    path: str | Path, findings: Sequence[str] | None = None, minus_one_is_unknown: bool = False,
    label_map: LabelMap | None = None,
) -> VolumeTable:
    """`load_labels` with the table's origin, for messages; of `findings`, by default the table's own. With
    `minus_one_is_unknown`, -1 means the same as an empty cell. With `label_map`, its findings, of its columns (see
    any_label); the table's other columns are not named as unused."""
    check_written(Path(path))
    groups: dict[str, list[str]] = {}
    if label_map:
        names = label_map.chosen(findings, EvaluationError)

        def columns(header: Sequence[str]) -> list[str]:
            groups.update(zip(names, label_map.label_columns(header, names, path, EvaluationError), strict=True))
            return list(dict.fromkeys(column for group in groups.values() for column in group))

        found = read_label_columns(path, columns, label_map.name_column, minus_one_is_unknown, EvaluationError)
    else:
        found = read_label_table(path, findings, minus_one_is_unknown, EvaluationError)
    valid = is_label(found.values)
    remedy = "correct the label or remove the row"
    if (found.values == -1).any():
        remedy = "empty the cells that are unknown, or say so with --minus-one-is-unknown"
    table = _whole(found, with_unknown(np.where(valid, found.values, 0)), valid, "0, 1 or an empty cell", remedy)
    if label_map:
        made = {name: any_label(table.frame[group].to_numpy()) for name, group in groups.items()}
        return replace(_mapped(table, made), unused=())
    return table


def _mapped(table: VolumeTable, made: Mapping[str, Any]) -> VolumeTable:
    """The table with these columns instead of its findings."""
    stated = [column for column in STATED_COLUMNS if column in table.frame]
    return replace(table, frame=pd.DataFrame(made, index=table.frame.index).join(table.frame[stated]))


def _whole(
    found: LabelTable, values: np.ndarray, valid: np.ndarray, expected: str, remedy: str, repeated: Sequence[str] = ()
) -> VolumeTable:
    """A table in which every row is whole. Training skips the others; here they would change what is measured."""
    table, path = found.table, found.table.path
    if faults := [*table.faults, *repeated]:
        raise EvaluationError(faults[0])
    if not table.place:
        raise EvaluationError(f"{path}: found no rows below the header, expected at least one volume; add them")
    if not valid.all():
        row, column = np.argwhere(~valid)[0]
        value = found.values[row, column]
        said = "no number" if np.isnan(value) or value == EMPTY else number_text(value)
        more = f" ({(~valid).sum()} such values)" if (~valid).sum() > 1 else ""
        raise EvaluationError(f"{path}, line {table.lines[row]}: found {said} for {found.findings[column]} of "
                              f"{list(table.place)[row]}{more}, expected {expected}; {remedy}")
    ids_in_table(table)  # raises where a cell is empty
    columns = {column: [row[at] for row in table.texts] for at, column in enumerate(table.columns)}
    frame = _frame(list(table.place), values, found.findings, columns)
    return VolumeTable(frame, str(path), table.lines, found.unused, found.doubtful)


def _frame(
    names: Sequence[str] | np.ndarray, values: np.ndarray, findings: Sequence[str],
    columns: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    frame = pd.DataFrame(values, copy=False, index=pd.Index(names, name=NAME_COLUMN), columns=list(findings))
    return frame.assign(**columns) if columns else frame


def write_table(
    path: str | Path, names: Sequence[str] | np.ndarray, values: np.ndarray, ids: StatedIds | None = None,
    findings: Sequence[str] = ABNORMALITIES, scale: str | None = None,
) -> None:
    """VolumeName and a column for each finding, as predictions (probabilities) and labels (whole numbers: 0, 1, and
    UNKNOWN, an empty cell) files have them, PatientID and ScanID where `ids` states them, and Scale where it is
    given."""
    stated = {} if scale is None else {SCALE_COLUMN: [scale] * len(names)}
    frame = _frame(names, values, findings, id_columns(names, ids or {}) | stated)
    if np.issubdtype(np.asarray(values).dtype, np.integer) and (np.asarray(values) == UNKNOWN).any():
        frame = frame.replace({name: {UNKNOWN: ""} for name in findings})
    with replacing(path) as temporary:
        frame.to_csv(temporary)


def as_table(table: Any) -> VolumeTable:
    """A DataFrame given in memory, with names as files have them: its index, or its column VolumeName."""
    if isinstance(table, VolumeTable):
        return table
    if not isinstance(table, pd.DataFrame):
        raise EvaluationError(f"found a {type(table).__name__} as a table, expected a DataFrame; read files with "
                              "load_predictions and load_labels")
    frame = table.set_index(NAME_COLUMN) if NAME_COLUMN in table else table
    frame = frame.rename(columns=lambda column: column_name(column) if isinstance(column, str) else column)
    names = frame.index.tolist()
    if other := [name for name in names if not isinstance(name, str)]:
        raise EvaluationError(f"found {other[0]!r} as the name of a volume in a DataFrame, expected text; put the "
                              f"names into a column {NAME_COLUMN}, or into its index")
    if not frame.columns.is_unique:
        raise EvaluationError("found a column twice in a DataFrame, expected each finding once; check its columns")
    named = [str(column) for column in frame if isinstance(column, str)]
    findings = table_findings("a DataFrame", named, lambda column: _in_range(frame[column]), EvaluationError)
    if wrong := [column for column in findings if not pd.api.types.is_numeric_dtype(frame[column])]:
        raise EvaluationError(f"found text in column {some(wrong)} of a DataFrame, expected numbers; convert it")
    unused = unknown_columns(str(column) for column in frame if column not in findings)
    ids = {column: ["" if pd.isna(cell) else str(cell).strip() for cell in frame[column]]
           for column in STATED_COLUMNS if column in frame}
    index = pd.Index([volume_name(name) for name in names], name=NAME_COLUMN)
    return VolumeTable(frame[list(findings)].set_axis(index).assign(**ids), unused=unused)


def _in_range(column: pd.Series) -> bool:
    """Whether a DataFrame's column may be a finding's: numbers from 0 to 1, or unknown."""
    if not pd.api.types.is_numeric_dtype(column):
        return False
    known = column[column.notna() & (column != UNKNOWN)]
    return bool(len(known) and known.between(0, 1).all())


def joined(tables: Mapping[str, VolumeTable]) -> dict[str, VolumeTable]:
    """The tables, with one name for a volume in all of them: that of the first (see `join`)."""
    (key, first), *others = tables.items()
    result = {key: first}
    for key, table in others:
        names = {other: name for name, other in join(first.frame.index, table.frame.index).items() if other != name}
        result[key] = replace(table, frame=table.frame.rename(index=names)) if names else table
    return result


@dataclass(frozen=True)
class Rows:
    """What is evaluated, row by row: names and patients (N,), labels (N, L) int8, probabilities (N, L) float64, of the
    `findings` (L,).

    Made of `n_volumes` volumes. `unit` is a key of UNITS. `skipped` counts, by table, the volumes that others lack
    (only where that was allowed), `unlabelled` those without a known label, which are no rows; `conflicts` the rows
    whose volumes were merged though their labels differ (a finding counts if any of them has it). `ids`: what tables
    state of the volumes' patients and scans.
    """

    names: np.ndarray
    patients: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    findings: tuple[str, ...]
    n_volumes: int
    unit: str = "volume"
    skipped: dict[str, int] = field(default_factory=dict)
    unlabelled: int = 0
    conflicts: int = 0
    ids: StatedIds = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_patients(self) -> int:
        return len(np.unique(self.patients))

    @property
    def row_ids(self) -> StatedIds:
        """`ids` by the rows' names, where volumes were merged: of the patient alone."""
        if self.unit == "volume" or not self.ids:
            return self.ids
        return {str(name): (str(patient), "") for name, patient in zip(self.names, self.patients, strict=True)}


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
                differ = how_names_differ(table.frame.index.difference(whole.frame.index, sort=False), missing)
                partial = ", or go on with those in both: --allow-partial" if len(missing) < len(whole.frame) else ""
                raise EvaluationError(
                    f"{table.source}: found no row for {len(missing)} of the {len(whole.frame)} volumes in "
                    f"{whole.source}, first {shown(missing[0])}{whole.where(missing[0])}{differ}, expected the same "
                    f"volumes; add them, {'' if partial else 'or '}remove them there{partial}"
                )
        names &= set(other.frame.index)
    if not names:
        found = " and ".join(table.source for table in tables.values())
        differ = how_names_differ(others[0].frame.index, first.frame.index) if others else ""
        raise EvaluationError(f"{found}: found no volume in common{differ}, expected the same volumes; check "
                              "VolumeName")
    skipped = {what: len(table.frame) - len(names) for what, table in tables.items() if len(table.frame) > len(names)}
    return [name for name in first.frame.index if name in names], skipped


def rows_of(
    predictions: pd.DataFrame, labels: pd.DataFrame | None, names: Sequence[str], unit: str = "volume",
    skipped: dict[str, int] | None = None, ids: StatedIds | None = None,
) -> Rows:
    """The named volumes of both tables, merged to `unit`; without `labels`, all of them are 0. Findings are those of
    the labels, else of the predictions; patients as `ids` states them, by default the predictions' own columns."""
    findings = VolumeTable(predictions if labels is None else labels).findings
    columns = list(findings)
    p = predictions.loc[names, columns].to_numpy()
    y, p = checked(np.zeros(p.shape) if labels is None else labels.loc[names, columns].to_numpy(), p)
    labelled = (y != UNKNOWN).any(axis=1)
    if not labelled.any():
        raise EvaluationError(f"found no known label of any of the {len(names)} volumes, expected some; fill in the "
                              "table of labels")
    ids = VolumeTable(predictions).ids if ids is None else ids
    of = np.array(names)[labelled]
    rows = Rows(of, row_keys(of, "patient", ids), y[labelled], p[labelled], findings, len(of),
                skipped=skipped or {}, unlabelled=int((~labelled).sum()), ids=ids)
    if unit not in UNITS:
        raise EvaluationError(f"found unit {unit!r}, expected one of {', '.join(UNITS)}")
    if unit != "volume":
        rows = _merged(rows, row_keys(of, "scan", ids), "scan")
    return _merged(rows, rows.patients, "patient") if unit == "patient" else rows


def tuning_rows(
    tuning: tuple[VolumeTable, VolumeTable], unit: str = "volume", allow_partial: bool = False,
    ids: StatedIds | None = None,
) -> Rows:
    """Rows of (predictions, labels) of tuning patients, by default as their own columns state them."""
    both = joined({"tuning predictions": tuning[0], "tuning labels": tuning[1]})
    predictions, labels = both.values()
    volumes, skipped = common_volumes(both, allow_partial)
    if ids is None:
        ids = merge_ids([(table.source, table.ids) for table in both.values()], predictions.frame.index)
    return rows_of(predictions.frame, labels.frame, volumes, unit, skipped, ids)


def _merged(rows: Rows, keys: np.ndarray, unit: str) -> Rows:
    """One row per scan or patient, which `keys` (N,) name, in order of first appearance; probabilities by their mean
    over a scan's volumes, the maximum over a patient's scans, labels by any. Where none is positive, a scan's label is
    0 if any of its volumes is, as they show the same; a patient's is unknown if any of the scans' is."""
    where = pd.factorize(keys)[0]
    _, first, sizes = np.unique(where, return_index=True, return_counts=True)
    probabilities = np.zeros((len(first), rows.labels.shape[1]))
    positives = np.zeros_like(probabilities)
    negatives = np.zeros_like(positives)
    np.add.at(positives, where, rows.labels == 1)
    np.add.at(negatives, where, rows.labels == 0)
    (np.add if unit == "scan" else np.maximum).at(probabilities, where, rows.probabilities)
    if unit == "scan":
        probabilities /= sizes[:, None]
    differ = ((positives > 0) & (negatives > 0)).any(axis=1)
    negative = negatives > 0 if unit == "scan" else negatives == sizes[:, None]
    labels = np.select([positives > 0, negative], [1, 0], UNKNOWN).astype(np.int8)
    return replace(rows, names=keys[first], patients=rows.patients[first], labels=labels,
                   probabilities=probabilities, unit=unit, conflicts=rows.conflicts + int(differ.sum()))


def patients_of(path: str | None, predictions: VolumeTable) -> StatedIds:
    """What the table of --patients states, {} without one; raises where it is about other volumes."""
    stated = read_patients(path) if path else {}
    if path and not join(predictions.frame.index, stated):
        raise EvaluationError(f"{path}: found no row for any of the {len(predictions.frame)} volumes, expected rows "
                              "named as they are; check VolumeName")
    return stated


def check_no_overlap(reported: np.ndarray, tuning: np.ndarray, source: str) -> None:
    """EvaluationError where tuning patients are among the reported ones."""
    shared = sorted(join(set(tuning.tolist()), set(reported.tolist())))
    if shared:
        raise EvaluationError(
            f"{source}: found {len(shared)} tuning patients among the reported ones ({some(shared)}), expected none; "
            "remove them from either table, or give no tuning tables to cross-fit"
        )


def row_keys(names: Iterable[str], unit: str, ids: StatedIds | None = None) -> np.ndarray:
    """The row of that unit to which each volume belongs (see data/patients.py): train_12_a_1.nii.gz and
    train_12_a_2.nii.gz are both of the scan train_12_a and of the patient train_12."""
    if unit == "volume":
        return np.array(list(names))
    stated, place = ids or {}, ("patient", "scan").index(unit)
    return np.array([patient_and_scan(name, stated.get(name))[place] for name in names])
