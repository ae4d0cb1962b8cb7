"""For training loops of one's own: slices of a volume, and a Dataset of (volume, labels)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ctclip.data.cohort import Volume
from ctclip.data.geometry import PUBLISHED_SHAPE
from ctclip.data.label_table import is_label, read_label_table, with_unknown
from ctclip.data.loading import VolumeDataset
from ctclip.data.preprocessing import preprocess_volume
from ctclip.data.readers import FILE_SUFFIXES
from ctclip.data.tables import EMPTY, CohortError, join, some
from ctclip.data.volume_file import VolumeError
from ctclip_model import ABNORMALITIES, SLICE_INPUT_SHAPE, slice_triplets


def slices(path: str | Path, k: int = 8, metadata: Mapping[str, Any] | None = None) -> torch.Tensor:
    """A volume file -> (k, 3, 224, 224) float32 in [-1, 1], HU / 1000, as the model takes them: `k` evenly spaced axial
    slices between their two neighbours, 3 mm apart, over the 360 mm that every volume is brought to.

    In-plane axes are x then y: the transpose of the usual image. `metadata` and errors are those of preprocess_volume.
    """
    if type(k) is not int or not 1 <= k <= SLICE_INPUT_SHAPE[0]:
        raise ValueError(f"k is {k!r}, expected a whole number of 1 to {SLICE_INPUT_SHAPE[0]} slices")
    volume = preprocess_volume(path, metadata, shape=SLICE_INPUT_SHAPE)
    return slice_triplets(volume[None], k)[0]


class LabelledVolumes(Dataset):
    """Item i: (volume (1, D, H, W) float32 in [-1, 1], labels (n,) float32, 0, 1 or UNKNOWN) of the table's i-th volume
    with a file and a known label.

    Args:
        labels: a CSV with VolumeName and a column of 0, 1 and, where it is not known, an empty cell for each of
            `findings`. This package's losses leave UNKNOWN (-1) out; mask it in a loss of your own.
        folder: of the files, nested or not; names may differ from the table's as in all tables (suffix, folders, case).
        shape: of the volumes; a model's is `model.input_shape`.
        minus_one_is_unknown: -1 in the table means an empty cell.

    Raises CohortError for a table that cannot be used, or where no volume has a file. An item whose file cannot be used
    raises VolumeError. CT-RATE's version-1 files need their metadata: VolumeDataset(load_cohort(...).volumes).
    """

    def __init__(
        self,
        labels: str | Path,
        folder: str | Path,
        shape: Sequence[int] = PUBLISHED_SHAPE,
        findings: Sequence[str] = ABNORMALITIES,
        minus_one_is_unknown: bool = False,
    ):
        if isinstance(findings, str) or not findings or len(set(findings)) < len(tuple(findings)):
            raise CohortError(f"found findings {findings!r}, expected a list of different names")
        if not Path(folder).is_dir():
            raise CohortError(f"found no folder {folder}, expected one of volumes")
        labelled = read_label_table(labels, findings, minus_one_is_unknown)
        table, values = labelled.table, labelled.values
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*"))
                 if path.name.lower().endswith(FILE_SUFFIXES)}  # fmt: skip
        found = join(table.place, paths)
        rows = {name: values[at] for name, at in table.place.items() if name in found}
        wrong = [name for name, row in rows.items() if not is_label(row).all()]
        if table.faults:
            raise CohortError(table.faults[0])
        if wrong:
            raise CohortError(f"{labels}: found other labels for {some(wrong)}, expected 0, 1 or an empty cell; "
                              "correct these rows")
        rows = {name: with_unknown(row).astype(np.float32) for name, row in rows.items() if (row != EMPTY).any()}
        if found and not rows:
            raise CohortError(f"{labels}: found no known label for any of the {len(found)} volumes with a file, "
                              "expected 0 or 1 for some; fill them in")
        if not rows:
            found_none = f"no file for any of the {len(table.place)} volumes of {labels}"
            raise CohortError(f"{folder}: found {found_none}, expected files named as in VolumeName; check the folder")
        self.volumes = [Volume(name, paths[found[name]], row) for name, row in rows.items()]
        self._read = VolumeDataset(self.volumes, shape)

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        _, tensor, labels, reason = self._read[index]
        if tensor is None:
            raise VolumeError(f"{self.volumes[index].path}: {reason}")
        return tensor, labels
