"""The most wrong volumes of each label, with slices of the scan where it can be read."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ctclip.data.cohort import Volume, load_cohort
from ctclip.data.ct_rate import FETCH_COMMAND, is_version_2, labels_path
from ctclip.data.patients import StatedIds
from ctclip.data.preprocessing import read_volume
from ctclip.data.tables import listing
from ctclip.data.volume_file import VolumeError
from ctclip.data.windows import Window, display_window
from ctclip.evaluation.calibration import FittedThresholds
from ctclip.evaluation.case_slices import Evidence, EvidenceError, Slice, draw_slices, find_body, place_shown
from ctclip.evaluation.tables import Rows, row_keys
from ctclip.formatting import BAR

LISTED = 3  # volumes of each label and kind
PICTURE_SHAPE = (200, 400, 400)  # voxels over the 360 mm cube: 0.9 mm in plane


@dataclass(frozen=True)
class Picture:
    """Slices in a window; `through` says which. `command` makes the heat map, "" where there is none."""

    slices: tuple[Slice, ...]
    window: Window
    through: str
    command: str


@dataclass(frozen=True)
class Case:
    """A wrong decision: `kind` is "false negative" or "false positive", `probability` and `threshold` calibrated."""

    label: str
    kind: str
    name: str
    probability: float
    threshold: float
    picture: Picture | None = None


def worst_cases(rows: Rows, fitted: FittedThresholds) -> list[Case]:
    """Up to LISTED false negatives and false positives of each label, the most wrong first."""
    positive, calibrated = rows.probabilities >= fitted.thresholds, fitted.calibrated
    thresholds = np.broadcast_to(fitted.calibrated_thresholds, calibrated.shape)
    cases = []
    for j, label in enumerate(rows.findings):
        for kind, wrong, order in (
            ("false negative", (rows.labels[:, j] == 1) & ~positive[:, j], calibrated[:, j]),
            ("false positive", (rows.labels[:, j] == 0) & positive[:, j], -calibrated[:, j]),
        ):
            chosen = np.flatnonzero(wrong)
            for i in chosen[np.argsort(order[chosen], kind="stable")][:LISTED]:
                cases.append(Case(label, kind, str(rows.names[i]), float(calibrated[i, j]), float(thresholds[i, j])))
    return cases


def with_pictures(
    cases: Sequence[Case], unit: str, data_dir: Path, most: int, ids: StatedIds | None = None,
    evidence: Evidence | None = None,
) -> tuple[list[Case], list[tuple[str, str]]]:
    """(the cases, the first `most` of each label and kind with a picture; what could not be read, as (name, reason)).

    Volumes are those of the unseen split; of the training split where the cases are none of them (cross-validation). A
    row of volumes merged as `ids` states them shows the first of them. Slices go through what the model of `evidence`
    bases its answer on, in one pass for each volume; without it, or where it cannot be had, which is then among the
    reasons, through the most lung. Volumes that were streamed and have no file are counted under one reason. Raises
    CohortError where `data_dir` has no usable cohort.
    """
    volumes = _volumes_by_row(cases, unit, data_dir, ids)
    wanted: dict[str, list[int]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for place, case in enumerate(cases):
        seen[case.label, case.kind] += 1
        if seen[case.label, case.kind] <= most:
            wanted.setdefault(case.name, []).append(place)
    done, failures = list(cases), []
    if streamed := {name for name in wanted if name in volumes and volumes[name].signature is not None}:
        failures.append((f"{len(streamed)} volumes",
                         f"streamed, and their files not kept; {FETCH_COMMAND} valid fetches them"))
    for name, places in tqdm(wanted.items(), desc="pictures", unit=" volumes", bar_format=BAR, delay=2, leave=False):
        if name in streamed:
            continue
        try:
            if name not in volumes:
                raise VolumeError(f"not in {data_dir}")
            labels = list(dict.fromkeys(cases[place].label for place in places))
            try:
                pictures = _pictures(volumes[name], labels, data_dir, evidence)
            except EvidenceError as error:
                failures.append(("evidence", str(error)))
                evidence = None
                pictures = _pictures(volumes[name], labels, data_dir, None)
            for place in places:
                done[place] = replace(cases[place], picture=pictures[cases[place].label])
        except (VolumeError, OSError, MemoryError) as error:
            failures.append((name, str(error) or type(error).__name__))
    return done, failures


def _volumes_by_row(
    cases: Sequence[Case], unit: str, data_dir: Path, ids: StatedIds | None
) -> dict[str, Volume]:
    def of_split(split: str) -> dict[str, Volume]:
        cohort = load_cohort(data_dir, split).volumes[::-1]  # so that the first volume of a row stays
        return dict(zip(row_keys([volume.name for volume in cohort], unit, ids).tolist(), cohort, strict=True))

    volumes = of_split("valid")
    if all(case.name not in volumes for case in cases) and (data_dir / labels_path("train")).is_file():
        volumes = of_split("train")
    return volumes


def _pictures(
    volume: Volume, labels: Sequence[str], data_dir: Path, evidence: Evidence | None
) -> dict[str, Picture]:
    """One for each label. Raises VolumeError where the volume cannot be read, or shows no body."""
    tensor, contributions = evidence.of(volume, labels) if evidence else (torch.empty(1, 0, 0, 0), [None] * len(labels))
    if any(size < wanted for size, wanted in zip(tensor.shape[1:], PICTURE_SHAPE, strict=True)):
        tensor, _ = read_volume(volume, PICTURE_SHAPE)
    if (body := find_body(tensor)) is None:
        raise VolumeError(f"{volume.path}: found nothing as dense as a body, expected a chest; look at the volume")
    pictures = {}
    for label, values in zip(labels, contributions, strict=True):
        place, window = place_shown(body, values), display_window(label)
        pictures[label] = Picture(
            draw_slices(tensor, body, place, window), window, place.meaning,
            _heat_map_command(evidence.run, volume, label, data_dir) if evidence else "",
        )
    return pictures


def _heat_map_command(run: Path, volume: Volume, label: str, data_dir: Path) -> str:
    """Without where folders lie that were named by absolute paths: reports are handed on. "" for a file of version 1,
    which cannot be read without its row of the metadata table."""
    if is_version_2(volume.path) is False and volume.metadata is not None:
        return ""
    cohort, folder = (Path(path.name) if path.is_absolute() else path for path in (data_dir, run))
    flags = {"--checkpoint": folder.as_posix(), "--input": (cohort / volume.path.relative_to(data_dir)).as_posix(),
             "--explain": listing([label])}
    given = " ".join(f"{flag} {shlex.quote(value)}" for flag, value in flags.items())
    return f"python run_task2.py --mode predict {given}"
