"""Scans as other programs write them: MetaImage files and DICOM series, by SimpleITK."""

from __future__ import annotations

import locale
from pathlib import Path

import numpy as np
import SimpleITK

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def as_itk(voxels: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """(x, y, z) voxels with an index -> RAS mm affine."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.T))
    columns = RAS_TO_LPS @ affine[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((columns / spacing).ravel().tolist())
    image.SetOrigin((RAS_TO_LPS @ affine[:3, 3]).tolist())
    return image


def write_mha(path: Path, voxels: np.ndarray, affine: np.ndarray, compressed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(as_itk(voxels, affine), str(path), compressed)
    return path


def write_dicom(
    folder: Path,
    hu: np.ndarray,
    affine: np.ndarray,
    uid: str = "1.2.3.4.5",
    prefix: str = "IM",
    shear: float = 0.0,
    digits: int = 6,
    tags: dict[str, str] | None = None,
) -> Path:
    """One file per slice, stored as HU + 1024 with the rescale intercept -1024, named in another order than they lie.

    `shear` moves each slice so many mm along its rows, as a tilted gantry does; `digits` are those of positions; `tags`
    replace some.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = locale.setlocale(locale.LC_ALL)
    image = as_itk(hu, affine)  # ITK turns HU into what is stored
    row, column, normal = (np.array(image.GetDirection()).reshape(3, 3)[:, axis] for axis in range(3))
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    order = np.random.default_rng(0).permutation(hu.shape[2])
    for index in range(hu.shape[2]):
        piece = image[:, :, index]
        place = np.array(image.TransformIndexToPhysicalPoint((0, 0, index))) + shear * index * row
        number = int(order[index])
        fields = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{number + 1}",
            "0020|000d": "1.2.3.4",
            "0020|000e": uid,
            "0020|0011": uid.rsplit(".", 1)[-1],
            "0020|0013": str(number),
            "0020|0032": "\\".join(f"{value:.{digits}g}" for value in place),
            "0020|0037": "\\".join(f"{value:.6g}" for value in (*row, *column)),
            "0028|1052": "-1024",
            "0028|1053": "1",
        } | (tags or {})
        for tag, value in fields.items():
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{prefix}{number:04d}.dcm"))
        writer.Execute(piece)
    locale.setlocale(locale.LC_ALL, before)  # ITK's DICOM writer leaves the process in C, where text is ASCII
    return folder
