"""Draws docs/images/phantom_findings.png: the 18 findings, each beside the same slice of the same patient without it.

    python -m docs.draw_phantoms
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from ctclip.config import SYNTHETIC_NOTE
from ctclip.data.windows import LUNG_WINDOW, SOFT_TISSUE_WINDOW, Window, display_window
from ctclip.fileio import replacing
from ctclip.phantoms import findings
from ctclip.phantoms.phantom import make_phantom
from ctclip_model import ABNORMALITIES

SPACING = (1.5, 1.5, 2.0)  # mm along x, y, z
SEEDS = dict(  # of the patient shown with each finding
    zip(ABNORMALITIES, (24, 19, 13, 14, 31, 16, 17, 25, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28), strict=True)
)
WINDOWS = {findings.MEDICAL: Window(500, 2400), findings.EMPHYSEMA: Window(-750, 700)}
PROJECTED_MM = {findings.MEDICAL: 120, findings.ARTERIAL: 15, findings.CORONARY: 20}  # as a maximum projection
SHOWN_CORONAL = {findings.MEDICAL}
SHOWN_AT_THE_MIDDLE = {findings.PERICARDIAL, findings.ATELECTASIS, findings.SEPTAL}  # not where it is largest
TARGET = Path(__file__).with_name("images") / "phantom_findings.png"
NO_FINDINGS = (0,) * len(ABNORMALITIES)
LEGEND = """Synthetic phantoms.
Each pair: the same patient
and slice without and with
the finding.
Right side of the patient
on the left, front up."""


def draw_montage(path: Path) -> None:
    """PNG of the 18 findings and of a normal chest, in the radiological convention: right on the left, anterior up."""
    shape = tuple(round(mm / step) for mm, step in zip((360, 276, 336), SPACING, strict=True))
    figure = Figure(figsize=(17, 9.3), facecolor="black")
    axes = figure.subplots(5, 8)
    figure.subplots_adjust(left=0.003, right=0.997, bottom=0.03, top=0.975, wspace=0.02, hspace=0.13)
    for panel in axes.ravel():
        panel.axis("off")
    for k, name in enumerate(tqdm(ABNORMALITIES, desc="montage", unit="finding")):
        show_finding(name, axes[k // 4, 2 * (k % 4) : 2 * (k % 4) + 2], shape)
    normal = make_phantom(29, NO_FINDINGS, SPACING, shape).hu
    for panel, window in zip(axes[4, 4:6], (LUNG_WINDOW, SOFT_TISSUE_WINDOW), strict=True):
        show_slice(panel, normal[:, :, round(0.46 * shape[2])], window, "No finding")
    show_slice(axes[4, 6], normal[:, shape[1] // 2, ::-1], LUNG_WINDOW, "No finding, coronal", SPACING[2] / SPACING[0])
    at = {"ha": "center", "va": "center", "transform": axes[4, 7].transAxes}
    axes[4, 7].text(0.5, 0.5, LEGEND, color="white", fontsize=10, **at)
    figure.text(0.5, 0.008, SYNTHETIC_NOTE, color="white", ha="center", fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110, facecolor="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.open(buffer).convert("L").quantize(64).save(temporary, "PNG", optimize=True)


def show_finding(name: str, pair: Sequence[Axes], shape: Sequence[int]) -> None:
    """The slice, or the slab's maximum projection, where the finding is largest: without it, and with it."""
    window = WINDOWS.get(name) or display_window(name)
    shown = make_phantom(SEEDS[name], [name == other for other in ABNORMALITIES], SPACING, shape)
    axis = 1 if name in SHOWN_CORONAL else 2
    half = int(PROJECTED_MM.get(name, 0) / SPACING[axis] / 2)
    area = np.convolve(shown.masks[name].sum((0, 3 - axis)), np.ones(2 * half + 1), "same")
    at = int(np.searchsorted(area.cumsum(), area.sum() / 2)) if name in SHOWN_AT_THE_MIDDLE else int(area.argmax())
    without = make_phantom(SEEDS[name], NO_FINDINGS, SPACING, shape)
    for panel, phantom, title in zip(pair, (without, shown), ("without", name), strict=True):
        slab = phantom.hu.take(range(max(at - half, 0), min(at + half + 1, phantom.hu.shape[axis])), axis)
        image = slab.max(axis)
        if axis == 1:  # z points up
            show_slice(panel, image[:, ::-1], window, title, SPACING[2] / SPACING[0])
        else:
            show_slice(panel, image, window, title)


def show_slice(panel: Axes, image: np.ndarray, window: Window, title: str, aspect: float = 1.0) -> None:
    """image: (columns, rows), HU."""
    low, high = window.limits()
    panel.imshow(image.T, cmap="gray", vmin=low, vmax=high, aspect=aspect)
    panel.set_title(title, color="white", fontsize=9, pad=3)


if __name__ == "__main__":
    draw_montage(TARGET)
