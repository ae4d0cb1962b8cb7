"""A figure of the 18 findings, each beside the same slice of the same patient without it."""

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
from ctclip.data.windows import BONE_WINDOW, LUNG_WINDOW, NARROW_LUNG_WINDOW, SOFT_TISSUE_WINDOW, Window
from ctclip.fileio import replacing
from ctclip.phantoms import findings
from ctclip.phantoms.phantom import make_phantom
from ctclip_model import ABNORMALITIES

VIEWS = {  # finding -> (window, thickness in mm of a maximum projection, seed of the patient shown)
    findings.MEDICAL: (BONE_WINDOW, 120, 24),
    findings.ARTERIAL: (SOFT_TISSUE_WINDOW, 15, 19),
    findings.CARDIOMEGALY: (SOFT_TISSUE_WINDOW, 0, 13),
    findings.PERICARDIAL: (SOFT_TISSUE_WINDOW, 0, 14),
    findings.CORONARY: (SOFT_TISSUE_WINDOW, 20, 31),
    findings.HERNIA: (SOFT_TISSUE_WINDOW, 0, 16),
    findings.NODES: (SOFT_TISSUE_WINDOW, 0, 17),
    findings.EMPHYSEMA: (NARROW_LUNG_WINDOW, 0, 25),
    findings.ATELECTASIS: (LUNG_WINDOW, 0, 19),
    findings.NODULE: (LUNG_WINDOW, 0, 20),
    findings.OPACITY: (LUNG_WINDOW, 0, 21),
    findings.FIBROSIS: (LUNG_WINDOW, 0, 22),
    findings.EFFUSION: (SOFT_TISSUE_WINDOW, 0, 23),
    findings.MOSAIC: (LUNG_WINDOW, 0, 24),
    findings.PERIBRONCHIAL: (LUNG_WINDOW, 0, 25),
    findings.CONSOLIDATION: (LUNG_WINDOW, 0, 26),
    findings.BRONCHIECTASIS: (LUNG_WINDOW, 0, 27),
    findings.SEPTAL: (LUNG_WINDOW, 0, 28),
}
SHOWN_CORONAL = {findings.MEDICAL}
SHOWN_AT_THE_MIDDLE = {findings.PERICARDIAL, findings.ATELECTASIS, findings.SEPTAL}  # not where it is largest
NO_FINDINGS = (0,) * len(ABNORMALITIES)
LEGEND = """Synthetic phantoms.
Each pair: the same patient
and slice without and with
the finding.
Right side of the patient
on the left, front up."""


def draw_montage(path: Path, progress: bool = True, spacing: Sequence[float] = (1.5, 1.5, 2.0)) -> None:
    """PNG of the 18 findings and of a normal chest, in the radiological convention: right on the left, anterior up."""
    shape = tuple(round(mm / step) for mm, step in zip((360, 276, 336), spacing, strict=True))
    figure = Figure(figsize=(17, 9.3), facecolor="black")
    axes = figure.subplots(5, 8)
    figure.subplots_adjust(left=0.003, right=0.997, bottom=0.03, top=0.975, wspace=0.02, hspace=0.13)
    for panel in axes.ravel():
        panel.axis("off")
    for k, name in enumerate(tqdm(ABNORMALITIES, desc="montage", unit="finding", disable=not progress)):
        pair = axes[k // 4, 2 * (k % 4) : 2 * (k % 4) + 2]
        show_finding(name, pair, shape, spacing)
    normal = make_phantom(29, NO_FINDINGS, spacing, shape).hu
    for panel, window in zip(axes[4, 4:6], (LUNG_WINDOW, SOFT_TISSUE_WINDOW), strict=True):
        show_slice(panel, normal[:, :, round(0.46 * shape[2])], window, "No finding")
    show_slice(axes[4, 6], normal[:, shape[1] // 2, ::-1], LUNG_WINDOW, "No finding, coronal", spacing[2] / spacing[0])
    axes[4, 7].text(
        0.5, 0.5, LEGEND, color="white", fontsize=10, ha="center", va="center", transform=axes[4, 7].transAxes
    )
    figure.text(0.5, 0.008, SYNTHETIC_NOTE, color="white", ha="center", fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110, facecolor="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.open(buffer).convert("L").quantize(64).save(temporary, "PNG", optimize=True)


def show_finding(name: str, pair: Sequence[Axes], shape: Sequence[int], spacing: Sequence[float]) -> None:
    """The slice, or the slab's maximum projection, where the finding is largest: without it, and with it."""
    window, thickness, seed = VIEWS[name]
    shown = make_phantom(seed, [name == other for other in ABNORMALITIES], spacing, shape)
    axis = 1 if name in SHOWN_CORONAL else 2
    half = int(thickness / spacing[axis] / 2)
    area = np.convolve(shown.masks[name].sum((0, 3 - axis)), np.ones(2 * half + 1), "same")
    at = int(np.searchsorted(area.cumsum(), area.sum() / 2)) if name in SHOWN_AT_THE_MIDDLE else int(area.argmax())
    without = make_phantom(seed, NO_FINDINGS, spacing, shape)
    for panel, phantom, title in zip(pair, (without, shown), ("without", name), strict=True):
        slab = phantom.hu.take(range(max(at - half, 0), min(at + half + 1, phantom.hu.shape[axis])), axis)
        image = slab.max(axis)
        if axis == 1:  # z points up
            show_slice(panel, image[:, ::-1], window, title, spacing[2] / spacing[0])
        else:
            show_slice(panel, image, window, title)


def show_slice(
    panel: Axes, image: np.ndarray, window: Window, title: str, aspect: float = 1.0
) -> None:
    """image: (columns, rows), HU."""
    low, high = window.limits()
    panel.imshow(image.T, cmap="gray", vmin=low, vmax=high, aspect=aspect)
    panel.set_title(title, color="white", fontsize=9, pad=3)
