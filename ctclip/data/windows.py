"""How chest CT is displayed: windows in HU, and the one that each finding is read in."""

from __future__ import annotations

from typing import NamedTuple

from ctclip_model import ABNORMALITIES, WINDOWS


class Window(NamedTuple):
    """Level and width in HU: black at level - width / 2, white at level + width / 2."""

    level: float
    width: float

    def limits(self, unit: float = 1.0) -> tuple[float, float]:
        """Black and white, in HU; unit=1000: in HU / 1000, as the model's volumes are."""
        return (self.level - self.width / 2) / unit, (self.level + self.width / 2) / unit


LUNG_WINDOW, SOFT_TISSUE_WINDOW = (Window(*WINDOWS[name]) for name in ("lung", "mediastinum"))
LUNG_AND_SOFT_TISSUE_WINDOW = Window(-300, 1500)  # lung dark, mediastinum not yet white
LUNG_AND_SOFT_TISSUE_LABELS = frozenset(("Atelectasis", "Consolidation"))  # which reach up to the mediastinum
SOFT_TISSUE_LABELS = frozenset((*ABNORMALITIES[:7], "Pleural effusion"))  # devices, vessels, heart, hernia, lymph nodes


def display_window(label: str) -> Window:
    """The window in which a finding is looked at."""
    if label in LUNG_AND_SOFT_TISSUE_LABELS:
        return LUNG_AND_SOFT_TISSUE_WINDOW
    return SOFT_TISSUE_WINDOW if label in SOFT_TISSUE_LABELS else LUNG_WINDOW
