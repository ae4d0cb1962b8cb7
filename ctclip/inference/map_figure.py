"""Pictures of a scan's maps, by numpy and Pillow: milliseconds each, where matplotlib takes a second.

`map_picture` shows one finding in three planes, plain and with its evidence in colour; `overview_picture` all of a
scan. As radiologists look: the patient's right on the left, front or head at the top; in sagittal planes the front on
the left.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import numpy as np

from ctclip.data.geometry import FIELD_OF_VIEW_MM
from ctclip.data.inflate import compress
from ctclip.data.windows import Window, display_window
from ctclip.evaluation.figures import SOFTWARE
from ctclip.fileio import replacing
from ctclip.inference.decisions import Decision
from ctclip.inference.scan_maps import (
    ScanMaps,
    interpolate,
    location_words,
    neighbours,
    scan_extent,
    slice_number,
    strongest_place,
)

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, LEFT, GAP, FINEST = 1120, 16, 8, 2.2  # pixels: picture, its margin, between panels; pixels per mm, at most
MARGIN_MM = 6.0  # of air around the body
MUCH_OUTSIDE = 1 / 3  # share of what speaks for a finding outside the body above which it is said
FAINT, OPAQUE = 0.2, 0.75  # share of the scale below which nothing is drawn; opacity at its upper end
# From the lower end of the scale to the upper one.
COLOURS = np.array([(60, 20, 120), (140, 20, 140), (210, 50, 90), (245, 120, 40), (255, 190, 40), (255, 250, 130)])
INK, GREY, PAPER, OUTLINE = (32, 36, 40), (95, 102, 110), (255, 255, 255), (77, 210, 255)
LINE = 19  # pixels of a line of text
PACKING = 1  # zlib's level


class Plane(NamedTuple):
    """A way to cut the cube, whose axes are 0 z (up), 1 x (to the left), 2 y (to the back): the axis it is cut across,
    those of rows and columns, what its slices are called and counted from, and letters at its left and right."""

    axis: int
    rows: int
    columns: int
    name: str
    first: str
    sides: str


PLANES = (
    Plane(0, 2, 1, "Axial", "head", "RL"),
    Plane(2, 0, 1, "Coronal", "front", "RL"),
    Plane(1, 0, 2, "Sagittal", "patient's right", "AP"),
)
COUNTED = "Slices count from 1: " + ", ".join(f"{p.name.lower()} from the {p.first}" for p in PLANES)


@lru_cache
def _font(size: int, bold: bool = False) -> Any:
    from PIL import ImageFont

    package = find_spec("matplotlib")  # for its fonts; importing it takes 0.2 s
    assert package is not None and package.origin is not None, "check_matplotlib was passed"
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    file = Path(package.origin).with_name("mpl-data") / "fonts" / "ttf" / name
    return ImageFont.truetype(str(file), size)


@lru_cache(64)  # most of a picture's lines are on every picture; drawing one takes a millisecond
def _letters(text: str, size: int, bold: bool) -> Image:
    from PIL import Image as PILImage
    from PIL import ImageDraw

    font = _font(size, bold)
    _, _, right, bottom = font.getbbox(text)
    image = PILImage.new("L", (int(right) + 1, int(bottom) + 1))
    ImageDraw.Draw(image).text((0, 0), text, 255, font)
    return image


def _write(image: Image, at: tuple[int, int], text: str, colour: tuple, size: int, bold: bool = False) -> None:
    letters = _letters(text, size, bold)
    image.paste(colour, (*at, at[0] + letters.width, at[1] + letters.height), letters)


@lru_cache
def _sign(text: str, size: int) -> Image:
    """White with a black edge, on nothing: drawn once, as strokes take a millisecond."""
    from PIL import Image as PILImage
    from PIL import ImageDraw

    image = PILImage.new("RGBA", (round(_font(size).getlength(text)) + 8, size + 8))
    ImageDraw.Draw(image).text((3, 2), text, PAPER, _font(size), stroke_width=2, stroke_fill=(0, 0, 0))
    return image


# -- A slice -----------------------------------------------------------------------------------------------------------


class _Slice:
    """One slice of a scan: `plain` (h, w) uint8 by the window, and what lies over it by place of each pixel."""

    def __init__(self, maps: ScanMaps, plane: Plane, at: float, box: Sequence[tuple[float, float]], per_mm: float):
        self.maps, self.plane, self.at, self.box, self.per_mm = maps, plane, at, box, per_mm
        self.rows, self.columns = self._shares(plane.rows), self._shares(plane.columns)
        if plane.rows == 0:
            self.rows = self.rows[::-1]

    def _shares(self, axis: int) -> np.ndarray:
        low, high = self.box[axis]
        count = max(1, round((high - low) * self.per_mm))
        return (low + (np.arange(count) + 0.5) * (high - low) / count) / FIELD_OF_VIEW_MM

    def _cut(self, cube: Any) -> Any:
        """(h, w): rows and columns of the slice of a cube (d, h, w)."""
        index: list[Any] = [slice(None)] * 3
        index[self.plane.axis] = min(int(self.at * cube.shape[self.plane.axis]), cube.shape[self.plane.axis] - 1)
        plane = cube[tuple(index)]
        return plane if self._is_upright else plane.T

    @property
    def _is_upright(self) -> bool:
        """Whether rows come before columns in the cube."""
        return self.plane.rows < self.plane.columns

    def plain(self, window: Window) -> np.ndarray:
        hu = self._cut(self.maps.voxels[0, 0]).float().cpu().numpy()
        black, white = window.limits(unit=1000)
        gray = (np.clip(hu, black, white) - black) * (255 / (white - black))
        return interpolate(gray, self.rows, self.columns).astype(np.uint8)

    def evidence(self, label: int) -> np.ndarray:
        """(h, w) of a label's map, 0 outside the body."""
        values = self.maps.values[label]
        (before,), (behind,), (part,) = neighbours(np.array([self.at]), values.shape[self.plane.axis])
        plane = values.take(before, self.plane.axis) * (1 - part) + values.take(behind, self.plane.axis) * part
        found = interpolate(plane if self._is_upright else plane.T, self.rows, self.columns)
        body = self._cut(self.maps.body)
        rows, columns = (self.rows * body.shape[0]).astype(int), (self.columns * body.shape[1]).astype(int)
        return found * body[np.ix_(rows, columns)]

    def overlaid(self, plain: np.ndarray, label: int) -> np.ndarray:
        """(h, w, 3): the evidence in colour, with a line at the middle of the scale."""
        shown, top = np.repeat(plain[..., None], 3, axis=2), self.maps.tops[label]
        if top <= 0:
            return shown
        share = self.evidence(label) * np.float32(1 / top)
        coloured = share > FAINT
        part = np.minimum(share[coloured], 1)[:, None]
        alpha = OPAQUE * (part - FAINT) / (1 - FAINT)
        shown[coloured] = plain[coloured, None] * (1 - alpha) + _colours(part[:, 0]) * alpha
        shown[_edge(share >= 0.5)] = 255
        return shown

    def outlined(self, picture: np.ndarray, outline: np.ndarray) -> None:
        """Draws on the picture where `outline` (D, H, W) crosses 0."""
        picture[_edge(interpolate(self._cut(outline), self.rows, self.columns) > 0)] = OUTLINE

    def pixel(self, axis: int, share: float) -> int:
        """Row or column at a place along that axis."""
        low, high = self.box[axis]
        number = int((share * FIELD_OF_VIEW_MM - low) * self.per_mm)
        return len(self.rows) - 1 - number if axis == 0 else number


def _colours(shares: np.ndarray) -> np.ndarray:
    """(n,) of the scale -> (n, 3), 0 to 255."""
    steps = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(shares, steps, channel) for channel in COLOURS.T], axis=1)


def _edge(inside: np.ndarray) -> np.ndarray:
    """Of (h, w) bool, the pixels inside that have a neighbour outside."""
    inner = inside.copy()
    inner[1:] &= inside[:-1]
    inner[:-1] &= inside[1:]
    inner[:, 1:] &= inside[:, :-1]
    inner[:, :-1] &= inside[:, 1:]
    return inside & ~inner


def shown_box(maps: ScanMaps) -> list[tuple[float, float]]:
    """(from, to) in mm of the cube along z, x, y: the body within the scan with a margin; along z all of the scan."""
    box = []
    for axis in range(3):
        low, high = np.clip(scan_extent(maps.placement, axis), 0, 1)
        if axis:
            places = np.flatnonzero(maps.body.any(axis=tuple({0, 1, 2} - {axis}))) / maps.body.shape[axis]
            margin, voxel = MARGIN_MM / FIELD_OF_VIEW_MM, 1 / maps.body.shape[axis]
            low, high = max(low, places[0] - margin), min(high, places[-1] + voxel + margin)
        box.append((low * FIELD_OF_VIEW_MM, high * FIELD_OF_VIEW_MM))
    return box


# -- A finding ---------------------------------------------------------------------------------------------------------


def map_picture(maps: ScanMaps, label: int, note: str | None = None, outline: np.ndarray | None = None) -> Image:
    """The three planes through the strongest evidence of a label: plain slices above, and below them the same with
    evidence, unless none is to be seen; RGB.

    `outline` (D, H, W), if any, is drawn where it crosses 0. `note`: below all, such as SYNTHETIC_NOTE.
    """
    from PIL import Image as PILImage

    place, box, window = strongest_place(maps, label), shown_box(maps), display_window(maps.labels[label])
    lengths = [high - low for low, high in box]
    across = sum(lengths[plane.columns] for plane in PLANES)
    per_mm = min(FINEST, (WIDTH - 2 * LEFT - 2 * GAP) / across)
    slices = [_Slice(maps, plane, place[plane.axis], box, per_mm) for plane in PLANES]
    tall = max(len(each.rows) for each in slices)
    head = [maps.name, *_sentences(maps, label)]
    foot = [f"{_window_text(window)}. {COUNTED}.", *([note] if note else [])]
    above, rows = 40 + LINE * len(head) + 8, 2 if _is_coloured(maps, label) or outline is not None else 1
    y = above + rows * (tall + LINE + GAP) + 4
    image = PILImage.new("RGB", (WIDTH, y + 62 + LINE * len(foot)), PAPER)
    _write(image, (LEFT, 10), title_of(maps.decisions[label]), INK, 21, bold=True)
    for number, line in enumerate(head):
        _write(image, (LEFT, 42 + LINE * number), line, GREY if number == 0 else INK, 14)
    x = LEFT
    for each in slices:
        number, count = slice_number(maps.placement, each.plane.axis, each.at)
        _write(image, (x, above), f"{each.plane.name}, slice {number} of {count}", INK, 13)
        pixels = [each.plain(window)]
        if rows == 2:
            pixels.append(each.overlaid(pixels[0], label))
            if outline is not None:
                each.outlined(pixels[1], outline)
        for row, panel in enumerate(pixels):
            at = x, above + LINE + row * (tall + LINE + GAP)
            image.paste(PILImage.fromarray(panel), at)
            _draw_signs(image, each, *at, place, ring=row == 1 and _is_ringed(maps, label))
        x += len(each.columns) + GAP
    _draw_scale(image, maps, label, y)
    for number, line in enumerate(foot):
        _write(image, (LEFT, y + 58 + LINE * number), line, GREY, 13)
    return image


def title_of(decision: Decision) -> str:
    """Cardiomegaly: no (0.01, cut 0.36)"""
    return f"{decision.finding}: {decision.word} ({decision.numbers})"


def _sentences(maps: ScanMaps, label: int) -> list[str]:
    """What is true of a map, in a reader's words."""
    finding, decision = _in_sentence(maps.labels[label]), maps.decisions[label]
    if maps.highest[label] <= 0:
        return [f"Nothing in the body speaks for {finding}: no colours. The slices run through the middle of the body."]
    sentences = [f"Evidence for {finding} is strongest {location_words(maps, label)}."]
    if decision.threshold is not None:
        reached = f"brightest evidence reaches {int(100 * maps.reached[label])} % of the scale"  # below 50 stays so
        seen = "." if _is_coloured(maps, label) else f"; nothing is coloured below {100 * FAINT:.0f} %."
        sentences.append(f"{'Called' if decision.positive else 'Not called'}; {reached}{seen}")
    if decision.positive is not False and maps.outside[label] > MUCH_OUTSIDE:
        share = f"{100 * maps.outside[label]:.0f} %"
        sentences.append(f"{share} of what speaks for it lies outside the body, where nothing is shown: this map "
                         "explains the answer in part only.")  # fmt: skip
    return sentences


def _is_coloured(maps: ScanMaps, label: int) -> bool:
    return bool(maps.reached[label] > FAINT)


def _in_sentence(label: str) -> str:
    """A label within a sentence: "CT sign" and "COVID-19" stay as they are."""
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]


def _is_ringed(maps: ScanMaps, label: int) -> bool:
    return bool(maps.highest[label] > 0) and maps.decisions[label].positive is not False


def _window_text(window: Window) -> str:
    return f"W {window.width:g} L {window.level:g}"


def _draw_signs(image: Image, each: _Slice, x: int, y: int, place: Sequence[float], ring: bool) -> None:
    """On a panel at (x, y): its sides, a bar of 5 cm, where the other planes cut it, and the ring."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(image)
    height, width = len(each.rows), len(each.columns)
    for text, left in zip(each.plane.sides, (x + 5, x + width - 18), strict=True):
        image.paste(sign := _sign(text, 14), (left, y + 2), sign)
    bar = round(50 * each.per_mm)
    draw.line((x + 7, y + height - 9, x + 9 + bar, y + height - 9), (0, 0, 0), 4)
    draw.line((x + 8, y + height - 9, x + 8 + bar, y + height - 9), PAPER, 2)
    image.paste(sign := _sign("5 cm", 12), (x + 12 + bar, y + height - 20), sign)
    column, row = x + each.pixel(each.plane.columns, place[each.plane.columns]), y + each.pixel(
        each.plane.rows, place[each.plane.rows])  # fmt: skip
    for line in ((column, y, column, y + 7), (column, y + height - 8, column, y + height - 1),
                 (x, row, x + 7, row), (x + width - 8, row, x + width - 1, row)):  # fmt: skip
        draw.line(line, OUTLINE, 1)
    if ring:
        for colour, radius in (((0, 0, 0), 15), (PAPER, 14)):
            draw.ellipse((column - radius, row - radius, column + radius, row + radius), outline=colour, width=2)


def _draw_scale(image: Image, maps: ScanMaps, label: int, y: int) -> None:
    from PIL import Image as PILImage
    from PIL import ImageDraw

    if maps.highest[label] <= 0:
        return
    width = 360
    faint = np.clip((np.linspace(0, 1, width) - FAINT) / FAINT, 0, 1)[:, None]
    bar = (_colours(np.linspace(0, 1, width)) * faint + 235 * (1 - faint)).astype(np.uint8)
    image.paste(PILImage.fromarray(np.repeat(bar[None], 14, axis=0)), (LEFT, y))
    middle = LEFT + width // 2
    ImageDraw.Draw(image).line((middle, y - 2, middle, y + 16), INK, 2)
    for at, text in ((LEFT, "0 %"), (middle - 14, "50 %"), (LEFT + width - 36, "100 %")):
        _write(image, (at, y + 18), text, GREY, 12)
    if maps.decisions[label].threshold is None:
        text = "Colours are scaled to this scan: without a cut, strongest evidence is at 100 %."
    else:
        text = "The strongest evidence is as bright as the answer is high; 50 % (white line) is the cut."
    _write(image, (LEFT + width + 16, y - 2), text, INK, 13)
    meaning = "Colour says what moved the model's answer; it does not outline a finding."
    _write(image, (LEFT + width + 16, y + 16), meaning, GREY, 13)


# -- A scan ------------------------------------------------------------------------------------------------------------

THUMBNAILS, SMALL = 4, 264  # in a row; pixels across, and at most down


def overview_picture(maps: ScanMaps, note: str | None = None) -> Image:
    """The axial slice of the strongest evidence of each finding that is called; the others as text; RGB."""
    from PIL import Image as PILImage

    called = [i for i, decision in enumerate(maps.decisions) if decision.positive]
    box = shown_box(maps)
    per_mm = min(FINEST, SMALL / max(box[axis][1] - box[axis][0] for axis in (1, 2)))
    tiles = []
    for label in called:
        place = strongest_place(maps, label)
        each = _Slice(maps, PLANES[0], place[0], box, per_mm)
        tiles.append((label, each, each.overlaid(each.plain(display_window(maps.labels[label])), label)))
    text = _others_text(maps, called)
    tall = max((len(each.rows) for _, each, _ in tiles), default=0) + 2 * LINE + 14
    lines = -(-len(tiles) // THUMBNAILS)
    foot = [note] if note else []
    image = PILImage.new("RGB", (WIDTH, 48 + lines * tall + LINE * (len(text) + len(foot)) + 24), PAPER)
    _write(image, (LEFT, 10), maps.name, INK, 19, bold=True)
    for number, (label, each, pixels) in enumerate(tiles):
        x, y = LEFT + (number % THUMBNAILS) * (SMALL + GAP), 48 + number // THUMBNAILS * tall
        decision, (at, count) = maps.decisions[label], slice_number(maps.placement, 0, each.at)
        _write(image, (x, y), _fitting(decision.finding, SMALL, 14), INK, 14, bold=True)
        _write(image, (x, y + LINE - 2), f"{decision.numbers}; axial slice {at} of {count}", GREY, 12)
        image.paste(PILImage.fromarray(pixels), (x, y + 2 * LINE))
        image.paste(sign := _sign("R", 14), (x + 5, y + 2 * LINE + 2), sign)
    y = 48 + lines * tall
    for number, line in enumerate(text):
        _write(image, (LEFT, y + LINE * number), line, INK, 14)
    for number, line in enumerate(foot):
        _write(image, (LEFT, y + LINE * (len(text) + number) + 8), line, GREY, 13)
    return image


def _others_text(maps: ScanMaps, called: Sequence[int]) -> list[str]:
    """Lines on all decisions that have no slice in the overview."""
    shown = {maps.labels[label] for label in called}
    others = [decision for decision in (*maps.decisions, *maps.others) if decision.finding not in shown]
    lines: list[str] = []
    for title, positive in (("Called, without a map", True), ("Not called", False), ("Not decided", None)):
        if group := [decision for decision in others if decision.positive is positive]:
            named = ", ".join(f"{decision.finding} ({decision.numbers})" for decision in group)
            lines += _wrapped(f"{title}: {named}", WIDTH - 2 * LEFT, 14)
    return lines


def _wrapped(text: str, width: int, size: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if _font(size).getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _fitting(text: str, width: int, size: int) -> str:
    """The text, cut where it is wider."""
    while _font(size, bold=True).getlength(text) > width:
        text = f"{text[:-2].rstrip()}…"
    return text


# -- Files -------------------------------------------------------------------------------------------------------------


def write_picture(image: Image, path: Path) -> None:
    """An RGB picture as a PNG, whole or not at all; in a third of Pillow's time, which tries five filters per row."""
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0], rows[:, 1:] = 2, pixels.reshape(height, -1)  # filter 2: less the row above
    rows[1:, 1:] -= pixels.reshape(height, -1)[:-1]
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of 3 colours
    origin, packed = f"Software\0{SOFTWARE}".encode(), compress(rows.tobytes(), PACKING)
    chunks = ((b"IHDR", head), (b"tEXt", origin), (b"IDAT", packed), (b"IEND", b""))
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in chunks:
            file.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc32(kind + content)))


def is_picture(path: Path) -> bool:
    """Whether this project drew a PNG."""
    with path.open("rb") as file:
        return f"Software\0{SOFTWARE}".encode() in file.read(1024)
