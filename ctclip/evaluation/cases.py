"""The most wrong volumes of each label, with slices of the scan where it can be read."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import minimum_filter
from tqdm.auto import tqdm

from ctclip.data.cohort import Volume, load_cohort
from ctclip.data.ct_rate import FETCH_COMMAND, labels_path
from ctclip.data.patients import StatedIds
from ctclip.data.preprocessing import read_volume
from ctclip.data.volume_file import VolumeError
from ctclip.data.windows import Window, display_window
from ctclip.evaluation.calibration import FittedThresholds
from ctclip.evaluation.figures import import_matplotlib
from ctclip.evaluation.tables import Rows, row_keys
from ctclip.formatting import BAR

LISTED = 3  # volumes of each label and kind
PICTURE_SHAPE = (200, 200, 200)  # voxels of 1.8 mm over the 360 mm cube; a slice is as many pixels
LUNG_DENSITY = (-0.95, -0.5)  # HU / 1000


@dataclass(frozen=True)
class Case:
    """A wrong decision: `kind` is "false negative" or "false positive", `probability` and `threshold` are calibrated,
    `picture` is a JPEG, an axial beside a coronal slice, or None."""

    label: str
    kind: str
    name: str
    probability: float
    threshold: float
    picture: bytes | None = None


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
    cases: Sequence[Case], unit: str, data_dir: Path, most: int, ids: StatedIds | None = None
) -> tuple[list[Case], list[tuple[str, str]]]:
    """(the cases, the first `most` of each label and kind with a picture; what could not be read, as (name, reason)).

    Volumes are those of the unseen split; of the training split where the cases are none of them (cross-validation). A
    row of volumes merged as `ids` states them shows the first of them. Each volume is read once; those that were
    streamed and have no file are counted under one reason. Raises CohortError where `data_dir` has no usable cohort.
    """

    def by_row(split: str) -> dict[str, Volume]:
        cohort = load_cohort(data_dir, split).volumes[::-1]  # so that the first volume of a row stays
        return dict(zip(row_keys([volume.name for volume in cohort], unit, ids).tolist(), cohort, strict=True))

    volumes = by_row("valid")
    if all(case.name not in volumes for case in cases) and (data_dir / labels_path("train")).is_file():
        volumes = by_row("train")
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
        try:
            if name not in volumes:
                failures.append((name, f"not in {data_dir}"))
            elif name not in streamed:
                tensor, _ = read_volume(volumes[name], PICTURE_SHAPE)
                for place in places:
                    done[place] = replace(cases[place], picture=picture(tensor, display_window(cases[place].label)))
        except (VolumeError, OSError, MemoryError) as error:
            failures.append((name, str(error) or type(error).__name__))
    return done, failures


def picture(volume: torch.Tensor, window: Window) -> bytes:
    """JPEG of (1, D, H, W) = (1, z, x, y), HU / 1000: the axial and the coronal slice with the most lung in them.

    As radiologists look: the patient's right on the left, front or head at the top.
    """
    import_matplotlib()
    from matplotlib.image import imsave

    hu = volume[0].numpy()
    lung = (hu > LUNG_DENSITY[0]) & (hu < LUNG_DENSITY[1])
    lung = minimum_filter(lung, size=5, mode="wrap")  # eroded: without the thin shells that partial volumes make
    axial = hu[lung.sum(axis=(1, 2)).argmax()].T
    coronal = hu[::-1, :, lung.sum(axis=(0, 1)).argmax()]
    shown, (low, high) = np.concatenate([axial, coronal], axis=1), window.limits(unit=1000)
    file = io.BytesIO()
    imsave(file, shown, vmin=low, vmax=high, cmap="gray", format="jpg", pil_kwargs={"quality": 80})
    return file.getvalue()
