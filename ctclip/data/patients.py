"""Which patient, and which scan, a volume is of: the one rule, for training, evaluation and predictions.

CT-RATE's names say it (ct_rate.NAME_FORM). Any other name is a patient and a scan of its own, unless a PatientID
column, and a ScanID beside it, in labels, metadata, predictions or the table of --patients says more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from ctclip.data.ct_rate import names_patient, patient_of, scan_of
from ctclip.data.tables import (
    ID_COLUMNS,
    NAME_COLUMN,
    PATIENT_COLUMN,
    SCAN_COLUMN,
    CohortError,
    CsvTable,
    join,
    read_table,
)

StatedIds: TypeAlias = "Mapping[str, tuple[str, str]]"  # volume -> (PatientID, ScanID, or "" where there is no column)


def read_patients(path: str | Path) -> dict[str, tuple[str, str]]:
    """The table of --patients: VolumeName, PatientID and, where there is more than one volume of a scan, ScanID."""
    table = read_table(path, (), (PATIENT_COLUMN,), (SCAN_COLUMN,), f"{NAME_COLUMN}, {PATIENT_COLUMN}")
    if table.faults:
        raise CohortError(table.faults[0])
    return ids_in_table(table)


def ids_in_table(table: CsvTable) -> dict[str, tuple[str, str]]:
    """What a table's PatientID and ScanID columns state. Raises CohortError for an empty cell."""
    columns = {column: at for at, column in enumerate(table.columns) if column in ID_COLUMNS}
    if not columns:
        return {}
    return stated_ids(table.place, {name: [row[at] for row in table.texts] for name, at in columns.items()},
                      str(table.path))


def stated_ids(
    names: Iterable[str], columns: Mapping[str, Sequence[str]], source: str
) -> dict[str, tuple[str, str]]:
    """{volume: (PatientID, ScanID or "")} of the columns that there are. Raises CohortError for an empty cell."""
    if PATIENT_COLUMN not in columns:
        if SCAN_COLUMN in columns:
            raise CohortError(f"{source}: found {SCAN_COLUMN} without {PATIENT_COLUMN}, expected both; add "
                              f"{PATIENT_COLUMN}, or leave {SCAN_COLUMN} out")
        return {}
    names = list(names)
    for column, cells in columns.items():
        empty = [name for name, cell in zip(names, cells, strict=True) if not cell]
        if empty:
            raise CohortError(f"{source}: found no {column} in {len(empty)} of {len(names)} rows, first {empty[0]}, "
                              "expected one in each; fill it in, or leave the column out")
    scans = columns.get(SCAN_COLUMN, [""] * len(names))
    return dict(zip(names, zip(columns[PATIENT_COLUMN], scans, strict=True), strict=True))


def merge_ids(sources: Iterable[tuple[str, StatedIds]], names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """What all sources, (where it is from, what it states), say of the named volumes.

    Raises CohortError where two of them name different patients or scans of a volume, and where some volumes of a
    patient of CT-RATE's have a PatientID and others have none: they would count as two patients.
    """
    names, merged, origin = list(names), dict[str, tuple[str, str]](), dict[str, str]()
    for source, stated in sources:
        for name, other in join(names, stated).items() if stated else ():
            new, old = stated[other], merged.get(name, ("", ""))
            if any(a and b and a != b for a, b in zip(new, old, strict=True)):
                what = " ".join(filter(None, new))
                raise CohortError(f"{source}: found patient {what} for {name}, expected {' '.join(filter(None, old))} "
                                  f"as in {origin[name]}; correct one of the two")
            merged[name], origin[name] = (new[0], new[1] or old[1]), source
    if merged:
        known = {patient_of(name) for name in merged if names_patient(name)}
        for name in names:
            if name not in merged and patient_of(name) in known and names_patient(name):
                raise CohortError(f"{name}: found no {PATIENT_COLUMN}, expected one as for other volumes of "
                                  f"{patient_of(name)}; fill it in, or leave the column out")
    return merged


def patient_and_scan(name: str, stated: tuple[str, str] | None = None) -> tuple[str, str]:
    """(patient, scan) of a volume, from what is stated of it and otherwise from its name."""
    if stated is None:
        return patient_of(name), scan_of(name)
    patient, scan = stated
    return patient, f"{patient}/{scan}" if scan else scan_of(name)


def id_columns(names: Iterable[str], ids: StatedIds) -> dict[str, list[str]]:
    """PatientID, and ScanID, to be written beside these volumes; {} where nothing is stated of them."""
    names = [str(name) for name in names]
    stated = [ids.get(name) for name in names]
    if not any(stated):
        return {}
    columns = {PATIENT_COLUMN: [patient_and_scan(name, each)[0] for name, each in zip(names, stated, strict=True)]}
    if any(each and each[1] for each in stated):
        columns[SCAN_COLUMN] = [each[1] if each and each[1] else scan_of(name)
                                for name, each in zip(names, stated, strict=True)]
    return columns


def without_patient(names: Iterable[str], ids: StatedIds) -> int:
    """How many volumes are patients of their own because nothing says whose they are."""
    return sum(name not in ids and not names_patient(name) for name in names)


def own_patient_note(count: int, total: int) -> str:
    """One line for a cohort or a table of which so many names say nothing about patients."""
    return (f"{count:,} of {total:,} names are not like train_12_a_1.nii.gz and have no {PATIENT_COLUMN}: each counts "
            "as a patient of its own; where patients have several volumes, add that column or --patients CSV")
