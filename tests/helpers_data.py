"""Small CT-like volumes, NIfTI files of every kind, and the published preprocessing written out plainly."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from ctclip.data.cohort import Volume
from ctclip.data.ct_rate import labels_path, metadata_path, volume_path
from ctclip_model import ABNORMALITIES

SMALL = (24, 48, 48)  # 15 mm and 7.5 mm: the whole cube in 55 thousand voxels
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def chest(shape: tuple[int, int, int] = (48, 44, 20), seed: int = 0) -> np.ndarray:
    """HU as int16, axes (x, y, z): air, an elliptic body with fat, two lungs of different size, a spine; noise."""
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32).reshape(s) for n, s in zip(shape, SHAPES, strict=True))
    hu = np.full(shape, -1000, np.float32)
    hu[((x / 0.9) ** 2 + (y / 0.7) ** 2 + 0 * z) < 1] = -100
    hu[((x / 0.82) ** 2 + (y / 0.62) ** 2 + 0 * z) < 1] = 40
    hu[((x + 0.4) / 0.25) ** 2 + (y / 0.42) ** 2 + (z / 0.98) ** 2 < 1] = -850
    hu[((x - 0.4) / 0.18) ** 2 + (y / 0.36) ** 2 + (z / 0.95) ** 2 < 1] = -850
    hu[(x / 0.09) ** 2 + ((y - 0.48) / 0.09) ** 2 + 0 * z < 1] = 400
    hu += np.random.default_rng(seed).normal(0, 12, shape)
    return hu.round().clip(-1024, 3000).astype(np.int16)


SHAPES = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))


def affine_of(spacing: tuple[float, float, float], origin: tuple[float, float, float] = (11, -7, 300)) -> np.ndarray:
    """Index -> RAS mm of an array stored in LPS order."""
    affine = LPS @ np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def write(
    path: Path,
    voxels: np.ndarray,
    spacing: tuple[float, ...] = (8.0, 8.0, 12.0),
    affine: np.ndarray | None = None,
    codes: tuple[int, int] = (2, 0),
    scale: tuple[float, float] | None = None,
    big_endian: bool = False,
    kind: type = nib.Nifti1Image,
) -> Path:
    """Write voxels (x, y, z) as they are. `codes` are those of sform and qform; (0, 0) leaves no orientation."""
    dtype = voxels.dtype.newbyteorder(">" if big_endian else "<")
    affine = affine_of(spacing[:3]) if affine is None else affine
    header = kind.header_class(endianness=">" if big_endian else "<")
    header.set_data_dtype(dtype)
    header.set_data_shape(voxels.shape)
    header.set_zooms((*spacing, *[1.0] * (voxels.ndim - len(spacing)))[: voxels.ndim])
    header.set_sform(affine if codes[0] else None, codes[0])
    if codes[1]:
        header.set_qform(affine, codes[1])
    if scale:
        header.set_slope_inter(*scale)
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    block = header.binaryblock + bytes(header.single_vox_offset - len(header.binaryblock))
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = nib.openers.ImageOpener(str(path), "wb")
    with opener as file:
        file.write(block + voxels.astype(dtype).tobytes(order="F"))
    return path


def reoriented(voxels: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same scan, stored in another orientation."""
    change = ornt_transform(nib.io_orientation(affine), axcodes2ornt(codes))
    return nib.apply_orientation(voxels, change), affine @ inv_ornt_aff(change, voxels.shape)


def published(hu: np.ndarray, spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    """CT-CLIP's steps on HU (x, y, z), whole volume, float64 as nibabel gives it, by torch's own interpolation."""
    target = [360 / n for n in shape]
    current = spacing[2], spacing[0], spacing[1]
    volume = torch.from_numpy(np.clip(hu.astype(np.float64), -1000, 1000).transpose(2, 0, 1).copy())
    size = [int(n * (s / t)) for n, s, t in zip(volume.shape, current, target, strict=True)]
    volume = torch.nn.functional.interpolate(volume[None, None], size, mode="trilinear", align_corners=False)[0, 0]
    volume = (volume / 1000).float()
    for axis, want in enumerate(shape):
        start = max((volume.shape[axis] - want) // 2, 0)
        volume = volume.narrow(axis, start, min(want, volume.shape[axis]))
        missing = want - volume.shape[axis]
        before = [*volume.shape[:axis], missing // 2, *volume.shape[axis + 1 :]]
        after = [*volume.shape[:axis], missing - missing // 2, *volume.shape[axis + 1 :]]
        volume = torch.cat([torch.full(before, -1.0), volume, torch.full(after, -1.0)], axis)
    return volume[None].numpy()


def row(spacing: tuple[float, ...] = (8.0, 8.0, 12.0), slope: float = 1.0, intercept: float = -1024.0) -> dict:
    """A metadata row as the table gives it."""
    x, y, z = spacing
    return {"RescaleSlope": slope, "RescaleIntercept": intercept, "XYSpacing": f"[{x}, {y}]", "ZSpacing": z}


A, B, C = "valid_1_a_1.nii.gz", "valid_1_a_2.nii.gz", "valid_2_a_1.nii.gz"  # of the cohort of tests/data
HEADER = ",".join(["VolumeName", *ABNORMALITIES])
META_HEADER = "VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing"


def label_line(name: str, positive: tuple[int, ...] = ()) -> str:
    return ",".join([name, *("1" if i in positive else "0" for i in range(18))])


def meta_line(name: str, z_spacing: object = 12.0, intercept: float = -1024.0) -> str:
    return f'{name},1,{intercept},"[8.0, 8.0]",{z_spacing}'


def tables(data_dir: Path, labels: list[str], metadata: list[str] | None = None, no_chest: str | None = None) -> Path:
    """Write the valid split's tables; lines include the header."""
    for relative, lines in ((labels_path("valid"), labels), (metadata_path("valid"), metadata)):
        if lines is not None:
            (data_dir / relative).parent.mkdir(parents=True, exist_ok=True)
            (data_dir / relative).write_text("\n".join(lines) + "\n")
    if no_chest is not None:
        (data_dir / metadata_path("valid")).parent.joinpath("no_chest_valid.txt").write_text(no_chest)
    return data_dir


def put(data_dir: Path, name: str, fixed: bool, seed: int = 0) -> Path:
    """A chest in the hub's layout: version 2 as HU with geometry, version 1 raw with a blank header."""
    path = data_dir / volume_path(name, fixed)
    if fixed:
        return write(path, chest(seed=seed))
    return write(path, chest(seed=seed) + np.int16(1024), spacing=(1.0, 1.0, 1.0), codes=(2, 0), affine=np.eye(4))


def row_for(volume):
    """A version-2 file is HU: its row must not be applied."""
    return None if "valid_fixed" in volume.path.as_posix() else volume.metadata


def volume_of(path: Path, metadata: dict | None = None) -> Volume:
    """Any file as a volume of a cohort, without findings."""
    return Volume(path.name, path, np.zeros(18, np.float32), metadata)


# Scans of two real patients, where that variable names their folder.
REAL = os.environ.get("CTCLIP_REAL_CT")
REAL_FILES = ("thorax_lps_1.5mm.nii.gz", "torso_ras_3mm.nii.gz")
needs_real_ct = pytest.mark.skipif(not REAL, reason="CTCLIP_REAL_CT is not set: no scans of real patients here")


def real_scan(name: str) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """(voxels, affine, spacing)"""
    image = nib.load(Path(REAL, name))
    return np.asarray(image.dataobj), image.affine, tuple(float(str(z)) for z in image.header.get_zooms())
