"""One fixed phantom: what fingerprints of weights are computed on, and exported graphs are compared on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel
import numpy as np
from torch import Tensor

from ctclip.data.preprocessing import preprocess_volume
from ctclip.phantoms.phantom import make_phantom
from ctclip_model import N_LABELS

SEED, SHAPE, SPACING = 2026, (180, 180, 90), (2.0, 2.0, 4.0)  # x, y, z; mm


def fixed_phantom(shape: tuple[int, int, int]) -> Tensor:
    """(1, 1, D, H, W), every second finding present; by way of a file, so that reading is part of it."""
    x, y, z = SPACING
    phantom = make_phantom(SEED, np.arange(N_LABELS) % 2, SPACING, SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "phantom.nii")
        nibabel.save(nibabel.Nifti1Image(phantom.hu, np.diag([-x, -y, z, 1])), path)
        return preprocess_volume(path, shape=shape)[None]
