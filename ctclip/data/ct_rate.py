"""CT-RATE's facts: names, the hub's layout, prevalence, metadata columns.

    train_12_a_1.nii.gz     split train, patient train_12, scan train_12_a, its first reconstruction

Paths are relative to the cohort's folder (--data-dir), which has the layout of the hub's dataset.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from ctclip_model import ABNORMALITIES

SPLITS = ("train", "valid")
VOLUME_SUFFIX = ".nii.gz"
NAME_FORM = re.compile(r"[^\W_]+_[^\W_]+_[^\W_]+_\d+")  # split, patient, scan, reconstruction
GEOMETRY_COLUMNS = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")  # what a version-1 file needs
OPTIONAL_COLUMNS = ("PatientSex", "PatientAge", "Manufacturer")
SUBGROUP_COLUMNS = (*OPTIONAL_COLUMNS, "SliceThickness", "ZSpacing")
FETCH_COMMAND = "python ctclip_setup.py --data"  # and a split: what brings files back that were streamed and not kept

# Share of positive volumes on CT-RATE's train split, in the order of ABNORMALITIES.
PREVALENCE = dict(
    zip(
        ABNORMALITIES,
        (0.123, 0.284, 0.113, 0.072, 0.255, 0.143, 0.259, 0.194, 0.260)
        + (0.454, 0.370, 0.267, 0.121, 0.077, 0.106, 0.176, 0.100, 0.079),
        strict=True,
    )
)


def split_of(name: str) -> str:
    """train_12_a_1.nii.gz -> train."""
    return name.split("_")[0]


def scan_of(name: str) -> str:
    """train_12_a_1.nii.gz -> train_12_a."""
    return "_".join(_parts(name)[:3])


def patient_of(name: str) -> str:
    """train_12_a_1.nii.gz -> train_12."""
    return "_".join(_parts(name)[:2])


def _parts(name: str) -> list[str]:
    return PurePosixPath(name).name.removesuffix(VOLUME_SUFFIX).split("_")


def names_patient(name: str) -> bool:
    """Whether a name has CT-RATE's form. Any other name may tell patients apart wrongly."""
    return NAME_FORM.fullmatch(PurePosixPath(name).name.removesuffix(VOLUME_SUFFIX)) is not None


def volume_name(text: str) -> str:
    """The name in a table's cell: CT-RATE's without folders; any other as it is, since folders may tell scans apart."""
    text = text.strip()
    return PurePosixPath(text).name if names_patient(text) else text


def volume_path(name: str, fixed: bool) -> Path:
    """Where the hub keeps a volume: `fixed` chooses version 2 (already HU), else version 1 (raw stored values)."""
    folder = split_of(name) + ("_fixed" if fixed else "")
    return Path("dataset", folder, patient_of(name), scan_of(name), name)


def labels_path(split: str) -> Path:
    """The 18 labels of each volume of a split ("train" or "valid")."""
    return Path("dataset", "multi_abnormality_labels", f"{split}_predicted_labels.csv")


def metadata_path(split: str) -> Path:
    """Slope, intercept and spacing of each volume of a split."""
    spelled = "validation" if split == "valid" else split  # the hub writes "validation" here and "valid" elsewhere
    return Path("dataset", "metadata", f"{spelled}_metadata.csv")


def no_chest_path(split: str) -> Path:
    """List of volumes that are not chests (head CTs), one per line."""
    return Path("dataset", "metadata", f"no_chest_{split}.txt")


def streamed_path(split: str) -> Path:
    """Manifest of the volumes of a split that were encoded and not kept, one JSON object per line."""
    return Path(f"streamed_{split}.jsonl")


def is_version_2(path: Path) -> bool | None:
    """Whether a volume lies where the hub keeps version 2 (split folder / patient / scan / file); None elsewhere."""
    folder = path.parents[2].name if len(path.parents) > 2 else ""
    return folder.endswith("_fixed") if folder.removesuffix("_fixed") in SPLITS else None
