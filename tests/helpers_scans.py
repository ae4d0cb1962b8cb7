"""Scans as other programs write them: MetaImage files, by SimpleITK."""

from __future__ import annotations

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
