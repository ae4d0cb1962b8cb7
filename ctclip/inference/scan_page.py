"""Predictions as one page that fetches nothing: a row for each scan, its slices in three planes, evidence over them.

`ScanPage.add` takes the scans one by one and keeps none in memory; `ScanPage.finish` writes the file. Axes on the page
are (z from the head, y from the front, x from the patient's right), so that nothing is turned there.
"""

from __future__ import annotations

import base64
import io
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from torch import Tensor

from ctclip import __version__
from ctclip.data.geometry import FIELD_OF_VIEW_MM, Placement
from ctclip.data.hounsfield import HU_MAX, HU_MIN
from ctclip.data.windows import LUNG_AND_SOFT_TISSUE_WINDOW, Window, display_window
from ctclip.errors import UserError
from ctclip.evaluation.figures import check_matplotlib
from ctclip.evaluation.render import page_template
from ctclip.fileio import replacing
from ctclip.inference.decisions import Decision, called
from ctclip.inference.map_figure import COLOURS, FAINT, MUCH_OUTSIDE, OPAQUE
from ctclip.inference.scan_maps import (
    ScanMaps,
    location_words,
    scan_extent,
    slice_number,
    strongest_place,
)
from ctclip.memory import available_cpus
from ctclip_model import WINDOWS

TEMPLATE = Path(__file__).with_name("scan_page.html")
GENERATOR = "CT-CLIP scan page"  # by which a page is known as ours
PAGE_AXES = (0, 2, 1)  # of the cube (z, x, y), whose z is counted from the head on the page
# HU of these levels of the 8 bits; linear between: steps of 12 HU in lungs, 3.2 in soft tissue, 12.7 above.
KNOTS = {0: HU_MIN, 70: -160, 195: 240, 255: HU_MAX}
SOFT_TISSUE_HU = (-160, 240)
MOST_BYTES = 10_000_000  # of a scan's images, a third more as text: a page of one scan stays below 15 MB
QUALITIES = (88, 84, 80, 75, 70, 60, 50, 40, 30, 20, 10, 5)  # of JPEG, where PNG, which loses nothing, is larger
SAMPLED = 16  # slices from which a scan's size and error are estimated
HIGHEST = 3  # findings in a scan's row where none is decided
WINDOW_NAMES = {**{name.capitalize(): Window(*window) for name, window in WINDOWS.items()},
                "Wide": LUNG_AND_SOFT_TISSUE_WINDOW}  # fmt: skip
NO_MAPS = "No evidence is shown: every model of an ensemble has its own."

HU_OF_LEVEL = np.interp(np.arange(256), list(KNOTS), list(KNOTS.values())).astype(np.float32)
_LEVEL_OF_HU = np.rint(np.interp(np.arange(HU_MIN, HU_MAX + 1), list(KNOTS.values()), list(KNOTS))).astype(np.uint8)


# -- Voxels ------------------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Axial slices as files in a row, and what was lost: {"soft tissue": HU, "elsewhere": HU} within which 95 % of
    `SAMPLED` slices' voxels are, of those there are any."""

    mime: str
    files: list[bytes]
    error: dict[str, float]


def levels_of(voxels: Tensor, box: Sequence[tuple[int, int]]) -> np.ndarray:
    """voxels (1, 1, D, H, W) = (z up, x, y), HU / 1000, of which `box` (from, to) -> uint8 (z down, y, x)."""
    (low, high), (left, right), (front, back) = box
    slabs = voxels[0, 0, low:high, left:right, front:back].flip(0)
    levels = np.empty((high - low, back - front, right - left), np.uint8)
    for number, slab in enumerate(slabs):
        hu = (slab.float() * HU_MAX).round_().clamp_(HU_MIN, HU_MAX).short().cpu().numpy()
        levels[number] = _LEVEL_OF_HU[hu.T - HU_MIN]
    return levels


def encode(levels: np.ndarray, most_bytes: int = MOST_BYTES) -> Images:
    """uint8 (z, y, x) -> one image a slice: without loss where that fits into `most_bytes`, else the best JPEG that
    does."""
    sample = levels[:: -(-len(levels) // SAMPLED)]
    with ThreadPoolExecutor(max(1, int(available_cpus()))) as pool:
        for quality in (None, *QUALITIES):
            packed = partial(_image, quality=quality)
            tried = list(pool.map(packed, sample))
            if sum(map(len, tried)) * len(levels) <= most_bytes * len(sample) or quality == QUALITIES[-1]:
                files = list(pool.map(packed, levels))
                if sum(map(len, files)) <= most_bytes or quality == QUALITIES[-1]:
                    break
    return Images("image/png" if quality is None else "image/jpeg", files, _error(sample, tried))


def _image(levels: np.ndarray, quality: int | None) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    image = Image.fromarray(levels)
    if quality is None:
        image.save(file, "png", compress_level=6)
    else:
        image.save(file, "jpeg", quality=quality, optimize=True)
    return file.getvalue()


def _error(levels: np.ndarray, files: Sequence[bytes]) -> dict[str, float]:
    """Beyond what 8 bits lose of themselves, which is at most half a step."""
    from PIL import Image

    decoded = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    hu, low, high = HU_OF_LEVEL[levels], *SOFT_TISSUE_HU
    lost = np.abs(HU_OF_LEVEL[decoded] - hu)
    soft = (hu >= low) & (hu <= high)
    return {name: float(np.percentile(lost[part], 95))
            for name, part in (("soft tissue", soft), ("elsewhere", ~soft & (hu > HU_MIN))) if part.any()}


def _fidelity(images: Images) -> str:
    steps = "Stored in steps of 12 HU in lungs and 3.2 HU in soft tissue"
    if images.mime == "image/png":
        return f"{steps}."
    lost = ", ".join(f"{hu:.0f} HU ({name})" for name, hu in images.error.items())
    return f"{steps}, as JPEG: 95 % of voxels are off by at most {lost}."


# -- One scan ----------------------------------------------------------------------------------------------------------


def _box(placement: Placement, shape: Sequence[int]) -> list[tuple[int, int]]:
    """(from, to) along z, x, y of the model's voxels that the scan fills."""
    box = []
    for axis, size in enumerate(shape):
        low, high = (round(float(np.clip(side, 0, 1)) * size) for side in scan_extent(placement, axis))
        low = min(low, size - 1)
        box.append((low, max(high, low + 1)))
    return box


def _on_page(values: Any) -> Any:
    """(..., z, x, y) -> (..., z from the head, y, x)"""
    return values[..., ::-1, :, :].swapaxes(-1, -2)


def _place_on_page(place: Sequence[float]) -> list[float]:
    z, x, y = place
    return [1 - z, y, x]


def _deflated(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 9)).decode()


def scan_block(
    name: str, placement: Placement, voxels: Tensor, decisions: Sequence[Decision], maps: ScanMaps | None = None
) -> dict[str, Any]:
    """What the page shows of one scan, as JSON. voxels (1, 1, D, H, W), HU / 1000, as the model has seen them;
    `decisions` on all its findings, `maps` of some or all of them."""
    shape = voxels.shape[2:]
    box = _box(placement, shape)
    images = encode(levels_of(voxels, box))
    numbers = [
        [slice_number(placement, axis, (index + 0.5) / shape[axis])[0] for index in range(*box[axis])][:: -1 if not axis
        else 1] for axis in PAGE_AXES
    ]  # fmt: skip
    extents = [scan_extent(placement, axis) for axis in PAGE_AXES]
    begins = [1 - extents[0][1], extents[1][0], extents[2][0]]
    return {
        "name": name,
        "size": [shape[axis] for axis in PAGE_AXES],
        "from": [shape[0] - box[0][1], box[2][0], box[1][0]],
        "shape": [box[axis][1] - box[axis][0] for axis in PAGE_AXES],
        "begins": begins,
        "numbers": numbers,
        "of": [slice_number(placement, axis, 0.5)[1] for axis in PAGE_AXES],
        "mime": images.mime,
        "images": [base64.b64encode(file).decode() for file in images.files],
        "fidelity": _fidelity(images),
        "findings": [_finding(decision, maps) for decision in decisions],
        "maps": None if maps is None else _maps(maps),
    }


def _finding(decision: Decision, maps: ScanMaps | None) -> dict[str, Any]:
    window = display_window(decision.finding)
    told = {"name": decision.finding, "probability": decision.probability, "threshold": decision.threshold,
            "word": decision.word, "numbers": decision.numbers, "window": list(WINDOW_NAMES.values()).index(window),
            "point": "" if decision.point is None else decision.point.words}  # fmt: skip
    if maps is None or decision.finding not in maps.labels:
        return told
    label = maps.labels.index(decision.finding)
    words = "Nothing in the body speaks for it."
    if maps.highest[label] > 0:
        words = f"Strongest {location_words(maps, label)}."
    if decision.positive is not False and maps.outside[label] > MUCH_OUTSIDE:
        share = f"{100 * maps.outside[label]:.0f} %"
        words += f" {share} of what speaks for it lies outside the body, where nothing is shown."
    return told | {"map": label, "reached": float(maps.reached[label]), "words": words,
                   "place": _place_on_page(strongest_place(maps, label))}  # fmt: skip


def _maps(maps: ScanMaps) -> dict[str, Any]:
    """Each label's values as 255ths of its highest; the body as bytes of 0 and 1."""
    tops = np.maximum(maps.highest, np.finfo(np.float32).tiny)[:, None, None, None]
    shares = np.rint(255 * np.clip(maps.values / tops, 0, 1)).astype(np.uint8)
    grid, body = _on_page(shares), _on_page(maps.body.astype(np.uint8))
    return {"grid": grid.shape[1:], "values": _deflated(grid), "body": body.shape, "inside": _deflated(body)}


# -- The page ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PageFacts:
    """What a page says of all its scans. `facts`: (name, value); `note`: disclaimer; `failures`: (name, reason) of
    scans without an answer; `table`: name of the file of the same numbers beside it."""

    facts: Sequence[tuple[str, str]]
    note: str | None = None
    failures: Sequence[tuple[str, str]] = ()
    table: str = ""


class ScanPage:
    """A page in the making. In a `with` block: what was added lies in an unnamed file, and is gone when it ends."""

    def __init__(self, path: Path):
        if not TEMPLATE.is_file():
            raise UserError(f"{TEMPLATE}: found no such file, expected the page; copy the folder ctclip again")
        check_matplotlib()  # which brings Pillow
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = path, list[dict[str, Any]]()
        self.blocks = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  closed in __exit__

    def __enter__(self) -> ScanPage:
        return self

    def __exit__(self, *error: object) -> None:
        self.blocks.close()

    def add(
        self, name: str, placement: Placement, voxels: Tensor, decisions: Sequence[Decision],
        maps: ScanMaps | None = None, warning: str = "",
    ) -> None:  # fmt: skip
        """A scan; arguments as for `scan_block`."""
        block = htmlsafe_json_dumps(scan_block(name, placement, voxels, decisions, maps), separators=(",", ":"))
        number = len(self.rows)
        self.blocks.write(f'<script type="application/json" id="block-{number}">{block}</script>\n'.encode())
        self.rows.append({"name": name, "warning": warning, "shown": foremost(decisions),
                          "findings": {d.finding: [d.probability, d.threshold, d.positive] for d in decisions}})

    def finish(self, facts: PageFacts) -> int:
        """Writes the page, whole or not at all; -> its bytes."""
        findings = list(self.rows[0]["findings"]) if self.rows else []
        index = {
            "rows": [{"name": row["name"], "warning": row["warning"], "values": list(row["findings"].values()),
                      "called": sum(bool(positive) for *_, positive in row["findings"].values())} for row in self.rows],
            "findings": findings, "noMaps": NO_MAPS,
            "windows": [{"name": name, "level": w.level, "width": w.width} for name, w in WINDOW_NAMES.items()],
            "hu": [round(float(hu), 2) for hu in HU_OF_LEVEL], "field": FIELD_OF_VIEW_MM,
            "colours": COLOURS.tolist(), "faint": FAINT, "opaque": OPAQUE,
        }  # fmt: skip
        text = page_template(TEMPLATE.name, TEMPLATE.parent).render(
            generator=GENERATOR, version=__version__, facts=facts, rows=self.rows, findings=findings, index=index,
            decided=any(threshold is not None for row in self.rows[:1] for _, threshold, _ in row["findings"].values()),
        )  # fmt: skip
        head, tail = text.split("<!-- scans -->\n")
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            file.write(head.encode())
            self.blocks.seek(0)
            shutil.copyfileobj(self.blocks, file)
            file.write(tail.encode())
        return self.path.stat().st_size


def foremost(decisions: Sequence[Decision]) -> list[Decision]:
    """The findings that are called, the farthest above its threshold first; without thresholds the most probable."""
    if all(decision.threshold is None for decision in decisions):
        return sorted(decisions, key=lambda d: d.probability, reverse=True)[:HIGHEST]
    return called(decisions)


def is_scan_page(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'<meta name="generator" content="{GENERATOR}' in file.read(2000)
