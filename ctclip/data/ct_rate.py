"""CT-RATE's facts: names, the hub's layout, prevalence, metadata columns.

    train_12_a_1.nii.gz     split train, patient train_12, scan train_12_a, its first reconstruction

Paths are relative to the cohort's folder (--data-dir), which has the layout of the hub's dataset.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from ctclip_model import ABNORMALITIES

SPLITS = ("train", "valid")
COHORT = "dataset"  # the folder in the cohort's that tables and volumes lie in
VOLUME_SUFFIX = ".nii.gz"
SUFFIX = re.compile(r"\.(nii(\.gz)?|mha|mhd|nrrd|hdr|img|dcm|npz|npy)$", re.IGNORECASE)  # of volume files
# Split, patient, scan, reconstruction. No looser: "chest_ct_scan_001" or "UKB_2020_007_1" mean something else.
NAME_FORM = re.compile(
    rf"((?P<scan>(?P<patient>(train|valid|test)_\d+)_[a-z]+)_\d+)({SUFFIX.pattern})?", re.IGNORECASE | re.ASCII
)
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
    """train_12_a_1.nii.gz -> train_12_a; a name of another form, without its suffix, is a scan of its own."""
    form = _form(name)
    return form["scan"].lower() if form else _without_suffix(name)


def patient_of(name: str) -> str:
    """train_12_a_1.nii.gz -> train_12; a name of another form, without its suffix, is a patient of its own."""
    form = _form(name)
    return form["patient"].lower() if form else _without_suffix(name)


def _form(name: str) -> re.Match[str] | None:
    if "/" in name or "\\" in name:
        name = name.replace("\\", "/").rpartition("/")[2]
    return NAME_FORM.fullmatch(name)


def _without_suffix(name: str) -> str:
    return SUFFIX.sub("", name.replace("\\", "/"))


def _with_suffix(name: str) -> str:
    return name if SUFFIX.search(name) else name + VOLUME_SUFFIX


def names_patient(name: str) -> bool:
    """Whether a name has CT-RATE's form, with or without folders and suffix. Any other says nothing about patients."""
    return _form(name) is not None


def volume_name(text: str) -> str:
    """The name in a table's cell: CT-RATE's as CT-RATE writes it, without folders, in lower case and with .nii.gz; any
    other as it is, since folders, case and suffix may tell scans apart."""
    text = text.strip()
    form = _form(text)
    return form[1].lower() + VOLUME_SUFFIX if form else text


def volume_path(name: str, fixed: bool) -> Path:
    """Where the hub keeps a volume: `fixed` chooses version 2 (already HU), else version 1 (raw stored values)."""
    folder, parts = split_of(name) + ("_fixed" if fixed else ""), PurePosixPath(_without_suffix(name)).name.split("_")
    return Path("dataset", folder, "_".join(parts[:2]), "_".join(parts[:3]), _with_suffix(name))


def plain_path(name: str, split: str) -> Path:
    """Where a volume in HU of a cohort of one's own lies: in the split's folder, by its name."""
    return Path("dataset", f"{split}_fixed", _with_suffix(name))


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


def streamed_path(split: str, shard: str = "") -> Path:
    """Manifest of the volumes of a split that were encoded and not kept, one JSON object per line; of several processes
    each has its own. `shard` may be a pattern."""
    return Path(f"streamed_{split}{shard and '.'}{shard}.jsonl")


def is_version_2(path: Path) -> bool | None:
    """Whether a volume lies where the hub keeps version 2 (split folder / patient / scan / file); None elsewhere."""
    folder = path.parents[2].name if len(path.parents) > 2 else ""
    return folder.endswith("_fixed") if folder.removesuffix("_fixed") in SPLITS else None
