"""CT-RATE's tables -> the usable volumes of a split: labels, metadata and no-chest list joined, files looked for."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ctclip.data import ct_rate
from ctclip.data.ct_rate import GEOMETRY_COLUMNS, SUBGROUP_COLUMNS, VOLUME_SUFFIX, no_chest_path, volume_path
from ctclip.data.geometry import geometry_from_metadata
from ctclip.data.label_table import is_label, read_label_table, with_unknown
from ctclip.data.patients import (
    StatedIds,
    ids_in_table,
    merge_ids,
    own_patient_note,
    patient_and_scan,
    read_patients,
    without_patient,
)
from ctclip.data.tables import EMPTY, ID_COLUMNS, CohortError, CsvTable, join, read_table, shown, some
from ctclip.data.volume_file import VolumeError
from ctclip.formatting import plural
from ctclip_model import ABNORMALITIES, UNKNOWN

OF_VERSION_1 = " (needed by a version-1 file)"  # ends the reason for skipping one
METADATA_COLUMNS = f"VolumeName, {', '.join(GEOMETRY_COLUMNS)}"


@dataclass(frozen=True, eq=False)
class Volume:
    """One reconstruction: file, labels (L,) (float32, 0, 1 or UNKNOWN) and its metadata row (None if there is no usable
    one).

    `signature` is set where the file was streamed and is not on the disk any more: its size and its last 8 bytes in
    hex, by which `volume_key.cache_key` finds what was encoded of it. `path` is then where the file would be.
    `assume_hu`: voxels are HU by the header, whatever they look like. `ids`: its PatientID and ScanID, where a table
    states them.
    """

    name: str
    path: Path
    labels: np.ndarray
    metadata: Mapping[str, Any] | None = None
    signature: tuple[int, str] | None = None
    assume_hu: bool = False
    ids: tuple[str, str] | None = None

    @property
    def patient(self) -> str:
        return patient_and_scan(self.name, self.ids)[0]

    @property
    def scan(self) -> str:
        return patient_and_scan(self.name, self.ids)[1]


class Streamed(NamedTuple):
    """What is known of a file that was encoded and deleted; with a `reason`, of one that could not be read."""

    fixed: bool  # version 2
    size: int  # bytes
    tail: str  # its last 8 bytes in hex
    sha256: str | None
    reason: str | None


@dataclass
class Cohort:
    """Usable volumes, with labels of the `findings`; those skipped as (name, reason); and remarks about the tables as a
    whole."""

    volumes: list[Volume]
    findings: tuple[str, ...] = ABNORMALITIES
    skipped: list[tuple[str, str]] = field(default_factory=list)
    not_on_disk: int = 0
    folder: str = "dataset"  # where volumes were looked for
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.volumes)

    def reasons(self) -> dict[str, list[str]]:
        """{reason for skipping: names}, the most frequent first."""
        counts = Counter(reason for _, reason in self.skipped)
        return {reason: [name for name, why in self.skipped if why == reason] for reason, _ in counts.most_common()}

    def summary(self) -> str:
        """A few lines of text: counts, what was skipped by reason with its first names, remarks."""
        scans, patients = {v.scan for v in self.volumes}, {v.patient for v in self.volumes}
        lines = [f"{len(self)} volumes, {len(scans)} scans, {len(patients)} patients"]
        if self.findings != ABNORMALITIES:
            lines.append(f"findings: {len(self.findings)} ({', '.join(self.findings)})")
        if unknown := sum(int((volume.labels == UNKNOWN).sum()) for volume in self.volumes):
            total = len(self) * len(self.findings)
            lines.append(f"unknown labels: {unknown:,} of {total:,}, left out of loss and metrics")
        if self.not_on_disk:
            lines.append(f"not on disk: {self.not_on_disk} (listed in the labels, no file in {self.folder})")
        streamed = sum(volume.signature is not None for volume in self.volumes)
        if streamed:
            lines.append(f"without a file: {streamed} (streamed, known only by their cached codes)")
        if own := without_patient((v.name for v in self.volumes), ids_of(self.volumes)):
            lines.append(own_patient_note(own, len(self)))
        for reason, names in self.reasons().items():
            count = len(names)
            lines.append(f"skipped: {count} x {reason}: {', '.join(names[:3])}{', ...' if count > 3 else ''}")
        return "\n".join(lines + self.notes)


def ids_of(volumes: Iterable[Volume]) -> dict[str, tuple[str, str]]:
    """What tables state of the volumes' patients and scans."""
    return {volume.name: volume.ids for volume in volumes if volume.ids}


def _read_no_chest(path: Path) -> set[str]:
    """Volume names of the list (one per line, bare or as a path), if there is one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return set()
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError(f"{path.name}: found an unreadable list ({error}), expected text; replace it") from None
    names = {PurePosixPath(line.strip().replace("\\", "/")).name for line in lines if line.strip()}
    return {ct_rate.volume_name(name if ct_rate.SUFFIX.search(name) else name + VOLUME_SUFFIX) for name in names}


def read_metadata(path: str | Path) -> dict[str, dict[str, str]]:
    """{volume: its row as text}, of those SUBGROUP_COLUMNS and ID_COLUMNS that there are; contradictory rows are
    skipped. Raises CohortError where the table cannot be read or has none of them."""
    table = read_table(path, optional=(*SUBGROUP_COLUMNS, *ID_COLUMNS), expected="VolumeName")
    if not table.columns:
        wanted = ", ".join(SUBGROUP_COLUMNS)
        raise CohortError(f"{path}: found none of {wanted}, expected at least one; add one, or drop the table")
    return {name: table.row(name) for name in table.place}


_TEXT = (str, type(None))
STREAMED_TYPES: dict[str, Any] = {"fixed": bool, "size": int, "tail": str, "sha256": _TEXT, "reason": _TEXT}


def read_streamed(data_dir: str | Path, split: str) -> dict[tuple[str, bool], Streamed]:
    """{(volume, whether version 2): what is known of that file} from a split's manifests, {} where there are none.

    The last line of a file counts, by its time where several processes wrote some; one that a kill has torn, or that is
    anything else, is ignored. Raises CohortError where a manifest cannot be read.
    """
    several = sorted(Path(data_dir).glob(str(ct_rate.streamed_path(split, "*of*"))))
    entries: list[tuple[float, str, Streamed]] = []
    for path in (Path(data_dir, ct_rate.streamed_path(split)), *several):
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            continue
        except OSError as error:
            found = f"{path.name}: found an unreadable manifest ({error.strerror})"
            raise CohortError(f"{found}, expected a file; check its permissions") from None
        for line in lines:
            try:
                content = json.loads(line)
                name, values = content["name"], {key: content[key] for key in STREAMED_TYPES}
                when = float(content.get("time", 0))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            if isinstance(name, str) and all(isinstance(values[key], kind) for key, kind in STREAMED_TYPES.items()):
                entries.append((when, name, Streamed(**values)))
    entries.sort(key=lambda entry: entry[0])  # stable: lines without a time stay in their file's order, before others
    return {(name, entry.fixed): entry for _, name, entry in entries}


class CohortBuilder:
    """Joins label rows, metadata rows, the no-chest list, the disk and the manifest, one volume at a time."""

    def __init__(
        self, data_dir: Path, split: str, patients: str | Path | None = None, findings: Sequence[str] | None = None,
        minus_one_is_unknown: bool = False,
    ):
        self.data_dir, self.split = data_dir, split
        label_table = read_label_table(data_dir / ct_rate.labels_path(split), findings, minus_one_is_unknown)
        self.cohort = Cohort([], label_table.findings, folder=f"dataset/{split}_fixed or {split}")
        notes = self.cohort.notes
        self.labels, self.label_values = label_table.table, label_table.values
        metadata_file = data_dir / ct_rate.metadata_path(split)
        if metadata_file.exists():
            self.metadata = read_table(metadata_file, (), GEOMETRY_COLUMNS, (*ct_rate.OPTIONAL_COLUMNS, *ID_COLUMNS),
                                       METADATA_COLUMNS)
        else:
            self.metadata = CsvTable(metadata_file, GEOMETRY_COLUMNS)
        self.no_chest = _read_no_chest(data_dir / no_chest_path(split))
        self.streamed = read_streamed(data_dir, split)
        self.taken: dict[str, str] = {}  # file: the row that it belongs to
        for table, what in ((self.labels, "label"), (self.metadata, "metadata")):
            if table.repeated:
                notes.append(f"duplicate {what} rows with the same content, counted once: {len(table.repeated)}")
            if table.faults:
                notes.append(f"{plural(len(table.faults), f'faulty {what} row')}: {table.faults[0]}")
        if unused := label_table.unused:
            notes.append(f"not used: {some(unused)} of {self.labels.path.name}, not among the findings")
        notes += label_table.doubtful
        self.labelled = [*self.labels.place, *sorted(self.labels.contradictory)]
        if hidden := [name for name in (*self.labels.place, *self.metadata.place) if not name.isprintable()]:
            notes.append(f"names with a letter that cannot be seen, which may match no file: {len(hidden)}, first "
                         f"{shown(hidden[0])}")
        listed = (*self.metadata.place, *sorted(self.metadata.contradictory))
        self.metadata_name = join(self.labelled, listed)
        taken = set(self.metadata_name.values())
        self.unlabelled = [name for name in self.metadata.place if name not in taken]
        self.ids = self._ids(patients, split)

    def _ids(self, patients: str | Path | None, split: str) -> StatedIds:
        sources = [(str(table.path), ids_in_table(table)) for table in (self.labels, self.metadata)]
        if patients is not None:
            stated = read_patients(patients)
            if split == "train" and not join(self.labelled, stated):
                raise CohortError(f"{patients}: found no row for any of the {len(self.labelled)} volumes, expected "
                                  "rows named as they are; check VolumeName")
            sources.append((str(patients), stated))
        return merge_ids(sources, self.labelled)

    def places(self, name: str) -> list[tuple[Path, bool]]:
        """(path in data_dir, whether version 2) of where a volume's file may be, in the order they are looked for."""
        of_the_hub = [(volume_path(name, fixed), fixed) for fixed in (True, False)]
        of_ones_own = [(ct_rate.plain_path(name, self.split), True)]
        return of_the_hub + of_ones_own if ct_rate.names_patient(name) else of_ones_own + of_the_hub

    def find(self, name: str) -> tuple[Path, bool, Streamed | None] | None:
        """(path, whether version 2, None) of the file, version 2 first: it is the corrected one. Without a file, where
        it would be and what the manifest says of it."""
        plain = ct_rate.plain_path(name, self.split)
        if plain.is_absolute() or ".." in plain.parts:
            raise CohortError(f"{self.labels.path}: found {name!r}, expected a name within the cohort's folder; "
                              "correct it")
        for place, fixed in self.places(name):
            path = self.data_dir / place
            if os.path.exists(path):  # False also where a folder may not be entered
                return path, fixed, None
        known = [entry for fixed in (True, False) if (entry := self.streamed.get((name, fixed)))]
        streamed = next((entry for entry in known if entry.reason is None), known[0] if known else None)
        if streamed is None:
            return None
        return self.data_dir / volume_path(name, streamed.fixed), streamed.fixed, streamed

    def add(self, name: str, path: Path, fixed: bool, streamed: Streamed | None) -> None:
        """Adds the volume, or its name and the reason for skipping it."""
        known = name in self.labels.place
        labels = self.label_values[self.labels.place[name]] if known else np.zeros(0)
        row, missing = self._metadata_row(name)
        reasons = (  # the first that holds
            (streamed is not None and streamed.reason is not None, f"quarantined: {streamed and streamed.reason}"),
            (name in self.no_chest, "not a chest (no-chest list)"),
            (name in self.labels.contradictory, "contradictory label rows"),
            (not known, "no label row"),
            (not is_label(labels).all(), "labels other than 0 and 1"),
            ((labels == EMPTY).all(), "no known label"),
            (missing and not fixed, f"{missing}{OF_VERSION_1}"),
        )
        reason = next((reason for holds, reason in reasons if holds), None)
        if reason is not None:
            self.cohort.skipped.append((name, reason))
        else:
            if (other := self.taken.setdefault(os.path.abspath(path), name)) != name:
                raise CohortError(f"{self.labels.path}: found {other!r} and {name!r} for one file, {path}, expected "
                                  "one row; remove the other")
            signature = (streamed.size, streamed.tail) if streamed else None
            self.cohort.volumes.append(Volume(
                name, path, with_unknown(labels).astype(np.float32), row, signature, ids=self.ids.get(name)
            ))

    def note_missing_tables(self) -> None:
        """Notes the optional tables that are missed: of metadata, where volumes are skipped for want of them, and the
        no-chest list, where volumes are named as CT-RATE's."""
        notes, metadata = self.cohort.notes, self.data_dir / ct_rate.metadata_path(self.split)
        if not metadata.exists() and any(reason.endswith(OF_VERSION_1) for _, reason in self.cohort.skipped):
            notes.append(f"no {metadata.name}, without which raw volumes (version 1) are skipped")
        no_chest = self.data_dir / no_chest_path(self.split)
        if not no_chest.exists() and any(map(ct_rate.names_patient, self.labelled)):
            notes.append(f"no {no_chest.name}, an optional list of volumes to skip")

    def _metadata_row(self, name: str) -> tuple[dict[str, Any] | None, str | None]:
        """(usable metadata row, None) or (None, what is wrong with it)."""
        there = self.metadata_name.get(name, name)
        if there in self.metadata.contradictory:
            return None, "contradictory metadata rows"
        if there not in self.metadata.place:
            return None, "no metadata row"
        row = self.metadata.row(there)
        empty = [column for column in GEOMETRY_COLUMNS if not row[column]]
        if empty:
            return None, f"no {' and no '.join(empty)} in its metadata row"
        try:
            geometry_from_metadata(row, name)
        except VolumeError as error:
            return None, str(error).removeprefix(f"{name}: ")
        return row | {column: float(row[column]) for column in ("RescaleSlope", "RescaleIntercept", "ZSpacing")}, None


def load_cohort(
    data_dir: str | Path, split: str, limit: int | None = None, patients: str | Path | None = None,
    findings: Sequence[str] | None = None, minus_one_is_unknown: bool = False,
) -> Cohort:
    """Volumes of one split in the hub's layout under data_dir, in the order of the label table.

    Joins labels, metadata and the no-chest list by VolumeName; a volume present in both versions is taken from the
    `_fixed` folder, one present in neither from the manifest of streamed ones, with its `signature`. `limit` stops
    after that many usable volumes. `patients` is a table as of `read_patients`. `findings` are the columns of the label
    table that count, by default those of label_table.py. Paths are built from names, the tree is never listed. Raises
    CohortError where a table or a column is missing or nothing usable is left.
    """
    data_dir = Path(data_dir)
    if split not in ct_rate.SPLITS:
        raise CohortError(f"found split {split!r}, expected one of {', '.join(ct_rate.SPLITS)}; choose one")
    if not data_dir.is_dir():
        raise CohortError(f"found no folder {data_dir}, expected the cohort's; check --data-dir")
    if not (data_dir / "dataset").is_dir():
        raise CohortError(f"found no folder {data_dir / 'dataset'}, expected the cohort's tables and volumes in it; "
                          "name the folder above it with --data-dir")
    builder = CohortBuilder(data_dir, split, patients, findings, minus_one_is_unknown)
    cohort = builder.cohort
    labelled = dict.fromkeys(builder.labelled)
    example = None
    for name in [*labelled, *builder.unlabelled]:
        if limit is not None and len(cohort) >= limit:
            break
        found = builder.find(name)
        if found is None:
            cohort.not_on_disk += name in labelled
            example = example or builder.places(name)[0][0]
        else:
            builder.add(name, *found)
    builder.note_missing_tables()
    if not cohort.volumes:
        reasons = "; ".join(cohort.summary().splitlines()[1:]) or "an empty label table"
        places = " or ".join(str(data_dir / "dataset" / folder) for folder in (f"{split}_fixed", split))
        such_as = f", such as {data_dir / example}" if example else ""
        raise CohortError(f"{data_dir}: found no usable {split} volume ({reasons}), expected at least one in {places}; "
                          f"add volumes{such_as}")
    return cohort


def listed_volumes(data_dir: str | Path, split: str, fixed: bool) -> Cohort:
    """Every usable volume that the tables of a split list, whether its file is here or not; `fixed`: as version 2.

    For choosing what to fetch. Raises CohortError where a table or a column is missing.
    """
    data_dir = Path(data_dir)
    builder = CohortBuilder(data_dir, split)
    for name in builder.labelled:
        builder.add(name, data_dir / volume_path(name, fixed), fixed, None)
    builder.note_missing_tables()
    return builder.cohort


def split_by_patient(volumes: Sequence[Volume], fraction: float, seed: int) -> tuple[list[Volume], list[Volume]]:
    """(rest, held out): about `fraction` of the patients held out, label rates kept alike on both sides.

    Same volumes and seed, same split. Raises CohortError with fewer than two patients.
    """
    groups: dict[str, list[Volume]] = {}
    for volume in volumes:
        groups.setdefault(volume.patient, []).append(volume)
    if len(groups) < 2 or not 0 < fraction < 1:
        found = f"{plural(len(groups), 'patient')} and fraction {fraction}"
        raise CohortError(f"found {found}, expected at least 2 patients and a fraction in (0, 1); change either")
    patients = sorted(groups)
    # Per patient: positives per label, volumes, and 1, each scaled so that all of them weigh alike.
    rows = np.array([[*np.sum([v.labels == 1 for v in groups[p]], axis=0), len(groups[p]), 1] for p in patients])
    rows = rows / np.sqrt(np.maximum((rows**2).sum(axis=0), 1))
    count = min(max(round(fraction * len(patients)), 1), len(patients) - 1)
    share, generator, best, held_out = count / len(rows), np.random.default_rng(seed), np.inf, set[str]()
    for _ in range(max(1, 2000 // len(patients))):
        balance, held = np.zeros(rows.shape[1]), list[str]()
        # In a drawn order each patient goes to the side that keeps every column closest to its share.
        for remaining, i in zip(range(len(rows), 0, -1), generator.permutation(len(rows)), strict=True):
            if_held, if_not = balance + (1 - share) * rows[i], balance - share * rows[i]
            missing = count - len(held)
            hold = missing == remaining or (missing > 0 and if_held @ if_held < if_not @ if_not)
            balance = if_held if hold else if_not
            held += [patients[i]] if hold else []
        if balance @ balance < best:
            best, held_out = float(balance @ balance), set(held)
    return [v for v in volumes if v.patient not in held_out], [v for v in volumes if v.patient in held_out]


def patient_folds(volumes: Sequence[Volume], folds: int, seed: int) -> list[list[Volume]]:
    """The volumes in `folds` parts, each patient in one of them, label rates and numbers of patients kept alike.

    Same volumes and seed, same folds. Raises CohortError with fewer patients than folds.
    """
    if (patients := len({volume.patient for volume in volumes})) < folds:
        raise CohortError(f"found {plural(patients, 'patient')} for {folds} folds, expected at least one for each; "
                          "choose fewer folds")
    rest, found = list(volumes), []
    for left in range(folds, 1, -1):
        rest, held_out = split_by_patient(rest, 1 / left, seed)
        found.append(held_out)
    return [*found, rest]
