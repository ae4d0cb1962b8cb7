"""What a scan shows of the lungs, measured on the tensor that the model sees: how much, and whether they end inside."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from ctclip.data.geometry import FIELD_OF_VIEW_MM
from ctclip.data.hounsfield import BODY, HU_MAX, HU_MIN, LUNG

FINEST = 60  # voxels along an axis that are looked at: 6 mm of the 360 mm cube
FEWEST = 20  # voxels of a piece of lung in a slice
LEAST_LUNG = 0.08  # of lung and body: 1,217 of 1,220 phantom chests have more, a torso to the pelvis has 0.05
CUT_OFF = 0.2  # of the largest area: lungs with more at an end of the scan are cut off there (LOG.md)


@dataclass(frozen=True)
class LungCoverage:
    """Of one scan. `share`: lung as a share of lung and body; `volume_ml`: of lung, air and tissue in it together.
    `at_top` and `at_bottom`: area of lung in the highest and in the lowest axial slice, as shares of its largest area
    in any; `beyond_cube`: whether the scan goes on there, outside the cube (above, below)."""

    share: float = 0.0
    volume_ml: float = 0.0
    at_top: float = 0.0
    at_bottom: float = 0.0
    beyond_cube: tuple[bool, bool] = (False, False)

    @property
    def notes(self) -> list[str]:
        """What a reader of the answers should know, a line each."""
        if self.share < LEAST_LUNG:
            return [f"little lung found ({self.share:.0%} of lung and body, {self.volume_ml:.0f} mL): is this a chest?"]
        ends = (("the upper lungs", "highest", self.at_top), ("the lung bases", "lowest", self.at_bottom))
        notes = []
        for (part, slice_name, area), beyond in zip(ends, self.beyond_cube, strict=True):
            if area > CUT_OFF:
                where = f"the {FIELD_OF_VIEW_MM:g} mm that the model sees" if beyond else "the scan"
                notes.append(f"{part} are not in {where}: the {slice_name} slice has {area:.0%} of their largest area")
        return notes


def lung_coverage(volume: torch.Tensor) -> LungCoverage:
    """Of a tensor of `preprocess_volume`, (1, D, H, W), D upwards. Lung is air of its density that is not joined,
    within its slice, to the air around the body. On every few voxels: 6 ms at the published size."""
    from scipy import ndimage  # 0.1 s

    steps = [max(1, size // FINEST) for size in volume.shape[1:]]
    voxels = volume[0, :: steps[0], :: steps[1], :: steps[2]].float().cpu().numpy() * HU_MAX
    seen = voxels > HU_MIN  # the scan itself, in plane without its faces, which are mixed with padding
    inside = [np.flatnonzero(seen.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    inside[1:] = (places[1:-1] for places in inside[1:])
    if min(map(len, inside)) == 0:
        return LungCoverage()
    beyond_cube = bool(inside[0][-1] == len(voxels) - 1), bool(inside[0][0] == 0)
    voxels = voxels[np.ix_(*(range(places[0], places[-1] + 1) for places in inside))]
    joined = np.zeros((3, 3, 3), bool)
    joined[1] = ndimage.generate_binary_structure(2, 1)
    parts, count = ndimage.label(voxels < LUNG[1], joined)
    sizes, dense = (np.bincount(parts[of], minlength=count + 1) for of in (parts > 0, voxels > LUNG[0]))
    is_lung = (sizes > FEWEST) & (2 * dense > sizes)
    is_lung[0] = False
    areas = np.count_nonzero(is_lung[parts], axis=(1, 2))  # of the slices, upwards
    lung, largest = int(areas.sum()), max(1, int(areas.max()))
    voxel_ml = prod(FIELD_OF_VIEW_MM / size * step for size, step in zip(volume.shape[1:], steps, strict=True)) / 1000
    share = lung / max(1, lung + int(np.count_nonzero(voxels > BODY)))
    return LungCoverage(share, lung * voxel_ml, float(areas[-1] / largest), float(areas[0] / largest), beyond_cube)
