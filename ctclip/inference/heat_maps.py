"""Heat maps: what each token contributes to a label's logit, as a NIfTI on the scan's own grid and as a picture.

Legend   D H W voxels of the model's cube (z, x, y), T h w tokens of it, C width, L latent, S slices:
         as in ctclip_model. n labels.

A logit is, or nearly is, a sum over tokens. `token_contributions` splits it, `write_heat_map` resamples the parts onto
the file's own voxels, `draw_heat_map` shows them on the model's input, `write_scan_heat_maps` does it all for a scan.

A map says which tokens moved this model's answer. It is not an outline of a finding: a token is 15 mm wide in the
published tower and has attended to all others before it is counted, and a wrong answer has a map too. How often the
highest point lies on the finding is measured on phantoms by tests/benchmarks/pointing_game.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import torch

from ctclip.data.ct_rate import VOLUME_SUFFIX
from ctclip.data.geometry import FIELD_OF_VIEW_MM, Placement
from ctclip.data.inflate import GzipFile
from ctclip.data.tables import listed
from ctclip.data.windows import Window, display_window
from ctclip.evaluation.figures import GREY, INK, SOFTWARE, new_figure, write_figure
from ctclip.fileio import check_replaceable, replacing
from ctclip.inference.scans import HEAT_MAP_DESCRIPTION, PredictionError, nifti_description
from ctclip_model import (
    ABNORMALITIES,
    CTCLIPMultiAbnormalityModel,
    as_tokens,
    crop_starts,
    slice_triplets,
    slices_at_once,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from torch import Tensor

LEVELS = 127  # steps of a map on either side of 0: in 255 levels it packs several times smaller than in 65,535
SHOWN, APART_MM = 3, 20.0  # axial slices in a picture, and how far from each other
FAINT, OPAQUE = 0.2, 0.75  # share of the highest value below which nothing is drawn; opacity of the highest
MARGIN_MM = 6.0  # of air around the body in a picture
WIDTH, LEFT, GAP, HEAD, FOOT = 13.0, 0.15, 0.12, 1.15, 0.7  # inches: figure, its margin, between panels, above, below
PANEL = (WIDTH - 2 * LEFT - SHOWN * GAP) / (SHOWN + 1)
NUMBER_POINTS = 8.0
OUTLINE = "#4dd2ff"
UNSAFE = re.compile(r"[^\w.-]+")  # in a file's name
LONGEST_NAME = 80  # bytes of a label in a file's name, which ends at 255 on most disks
OUTSIDE_SHARE = 0.03  # share of the contributions outside the scan above which the caption gives it


def parse_labels(text: str, model_labels: Sequence[str] = ABNORMALITIES) -> list[str]:
    """Labels of the model, spelled as there and in the order asked for, from "emphysema, Lung nodule" or "all".

    A label with a comma of its own stands in double quotes. Raises PredictionError for a name that the model does not
    have.
    """
    known = {label.lower(): label for label in model_labels}
    try:
        parts = listed(text)
    except ValueError as fault:
        raise PredictionError(f"found --explain {fault}, expected labels, commas between; correct it") from fault
    if [part.lower() for part in parts] == ["all"]:
        return list(model_labels)
    if not parts:
        raise PredictionError("found no label for --explain, expected one or more, commas between; name them, or all")
    for part in parts:
        if part.lower() not in known:
            close = difflib.get_close_matches(part.lower(), known, n=3, cutoff=0.5)
            expected = f"perhaps {' or '.join(known[name] for name in close)}" if close else ", ".join(model_labels)
            raise PredictionError(
                f"found '{part}' among the labels of --explain, expected a label of this model ({expected}); "
                "correct it, or ask for all"
            )
    return list(dict.fromkeys(known[part.lower()] for part in parts))


# ----------------------------------------------------------------------------------------------------- the logit, split


@dataclass(frozen=True, eq=False)
class Contributions:
    """n logits, each split over the cube: logits = values.sum((1, 2, 3)) + remainder.

    values (n, T, h, w) float32, in logits, positive where a token raises the label's; a grid of T x h x w equal boxes
    over the model's cube, in the order of its axes (z, x, y). logits, remainder: (n,) float64.
    """

    values: np.ndarray
    logits: np.ndarray
    remainder: np.ndarray


def token_contributions(
    model: CTCLIPMultiAbnormalityModel, volume: Tensor, labels: Sequence[int], smooth: bool = True
) -> Contributions:
    """Volume (1, 1, D, H, W) -> what each token adds to the logits of `labels` (indices), in one pass of the tower.

    What a value is depends on the head; the model is in evaluation mode.
    - attention: attention weight times the token's score. Exact; the remainder is the bias.
    - linear, prompts: the token's share in the latent, through the classifier. The latent is a mean over tokens divided
      by its own length, then cut at 0 (not for prompts): length and cut are held at this volume's. The remainder is the
      bias. A token changed or taken away would change both, so that the values are exact as a sum, not as a forecast.
    - mlp: the same with the gradient of the logit in the classifier's place. First order: what the curve of the hidden
      layer leaves over is in the remainder, with the bias.
    - slice variant: class activation map of each slice triplet, after cbam if there is one, times its attention with
      that head (of a class token: one value for the whole slice). Exact; the remainder is the bias. Between the
      triplets' slices a map is interpolated, not seen.
    - video ResNet: class activation map of the crop, or the mean of the crops', laid over the volume by the share of
      each token that lies in each box; 0 where there was no crop. Exact; the remainder is the bias.

    `smooth`: 1-2-1 along each axis (in plane only for slices); the sums stay. Single tokens are noisy: on phantoms it
    takes the linear head's highest point to the finding in 70 of 100 cases in place of 59, and leaves the attention
    head's at 77. Subtracting a reference (other scans at the same place, or air) gained nothing.
    """
    if volume.ndim != 5 or volume.shape[0] != 1:
        raise ValueError(f"found a volume of shape {tuple(volume.shape)}, expected one scan (1, 1, D, H, W)")
    if model.training:
        raise ValueError("found a model in training mode, expected evaluation mode (dropout is random); call eval()")
    index = list(labels)
    with torch.no_grad():
        if model.is_video:
            values, logits = _video_contributions(model, volume, index)
        elif not model.is_ctclip:
            values, logits = _slice_contributions(model, volume, index)
        elif model.head_name == "attention":
            codes = model.features(volume)
            head: Any = model.classifier
            attention, scores = head.attend(codes, model.codebook)
            values, logits = (attention * scores)[0, index], model.head(codes)[0, index]
        else:
            values, logits = _latent_contributions(model, volume, index)
    parts, whole = values.float().cpu().numpy(), logits.double().cpu().numpy()
    if smooth:
        for axis in (1, 2, 3) if model.is_ctclip or model.is_video else (2, 3):
            parts = _smoothed(parts, axis)
    return Contributions(parts, whole, whole - parts.sum((1, 2, 3), dtype=np.float64))


def _latent_contributions(
    model: CTCLIPMultiAbnormalityModel, volume: Tensor, index: list[int]
) -> tuple[Tensor, Tensor]:
    """values (n, T, h, w), logits (n,) of a head on the latent. Each logit is taken back to the tokens as a direction,
    (L,) -> (h, w, C), in one reading of the projection: its 0.6 GB are never multiplied by the tokens."""
    tower, projection = model.visual_transformer, model.to_visual_latent
    tokens = tower.vq(tower(volume))  # (1, T, h, w, C)
    latent = projection(tokens.mean(1).flatten(1))  # (1, L)
    length = latent.norm().clamp(min=1e-12)
    with torch.inference_mode(False), torch.enable_grad():  # also where the caller has gradients switched off for good
        point = (latent / length).clone().requires_grad_()
        logits = model.head(point)[0]
        slopes = [torch.autograd.grad(logits[i], point, retain_graph=True)[0] for i in index]
    directions = (torch.cat(slopes) @ projection.weight).view(len(index), *tokens.shape[2:])  # (n, h, w, C)
    values = torch.einsum("thwc,nhwc->nthw", tokens[0], directions) / (tokens.shape[1] * length)
    return values, logits.detach()[index]


def _slice_contributions(model: CTCLIPMultiAbnormalityModel, volume: Tensor, index: list[int]) -> tuple[Tensor, Tensor]:
    """values (n, S, h, w), logits (n,). The head takes a mean over slices and places, so that it can be taken last; or
    one weighted by its attention."""
    head: Any = model.classifier
    if model.cache_format == "tokens" and model.tokens == "slice" and model.backbone.has_class_token:
        tokens = model.features(volume)  # (1, S, 1, 1, C)
        attention, evidence = head.attend(tokens)
        return (attention * evidence)[0, index], model.head(tokens)[0, index]
    parts = slice_triplets(volume, model.n_slices)[0].split(slices_at_once(volume.device))
    maps = model.attention(torch.cat([model.backbone(part) for part in parts]))  # (S, C, h, w)
    if model.head_name in ("attention", "max"):
        tokens = as_tokens(maps, model.tokens)[None]  # (1, S, h, w, C); a slice's is the mean of its places
        attention, _ = head.attend(tokens)
        places = maps.shape[2] * maps.shape[3] if model.tokens == "slice" else 1
        evidence = torch.einsum("schw,nc->nshw", maps, head.evidence.weight[index]) / places
        return attention[0, index] * evidence, head(tokens)[0, index]
    weight, bias = head.weight[index], head.bias[index]
    values = torch.einsum("schw,nc->nshw", maps, weight) / (maps.shape[0] * maps.shape[2] * maps.shape[3])
    return values, torch.nn.functional.linear(maps.mean((0, 2, 3)), weight, bias)


def _video_contributions(model: CTCLIPMultiAbnormalityModel, volume: Tensor, index: list[int]) -> tuple[Tensor, Tensor]:
    """values (n, T, h, w) over the whole volume in boxes about as large as tokens, logits (n,)."""
    head: Any = model.classifier
    weight, bias = head.weight[index], head.bias[index]
    shape, crops = volume.shape[2:], model.crops(volume)
    starts = crop_starts(shape, model.crop_shape, len(crops))
    values = logits = torch.zeros(())
    for crop, corner in zip(crops, starts, strict=True):
        maps = model.backbone(crop)[0]  # (C, t, h, w)
        tokens = torch.einsum("cthw,nc->nthw", maps, weight) / (maps[0].numel() * len(crops))
        logits = logits + torch.nn.functional.linear(maps.mean((1, 2, 3)), weight, bias) / len(crops)
        axes = (_shares(n, start, edge, size) for n, start, edge, size in
                zip(maps.shape[1:], corner, crop.shape[2:], shape, strict=True))  # fmt: skip
        depth, rows, columns = (share.to(tokens) for share in axes)
        values = values + torch.einsum("nthw,Tt,Hh,Ww->nTHW", tokens, depth, rows, columns)
    return values, logits


def _shares(tokens: int, start: int, edge: int, size: int) -> Tensor:
    """(boxes, tokens) of an axis: which share of each of the equal tokens of a crop [start, start + edge) lies in each
    of the equal boxes of [0, size)."""
    boxes = max(1, round(size * tokens / edge))
    ends = torch.arange(tokens + 1, dtype=torch.float64) * edge / tokens + start
    borders = torch.arange(boxes + 1, dtype=torch.float64) * size / boxes
    common = torch.minimum(ends[1:], borders[1:, None]) - torch.maximum(ends[:-1], borders[:-1, None])
    return common.clamp(min=0) / (edge / tokens)


def _smoothed(values: np.ndarray, axis: int) -> np.ndarray:
    """1-2-1 over neighbours; the outermost keep what they would give away, so that the sum stays."""
    padded = np.pad(values, [(1, 1) if i == axis else (0, 0) for i in range(values.ndim)], mode="edge")
    before, here, after = (padded.take(range(i, i + values.shape[axis]), axis) for i in range(3))
    return (before + 2 * here + after) / 4


# ------------------------------------------------------------------------------------------- on the file's own voxels


def _weights(position: np.ndarray, tokens: int) -> np.ndarray:
    """(voxels, tokens): linear interpolation between token centres, held outside the outermost; 0 outside the cube."""
    place = position * tokens - 0.5
    weights = np.stack([np.interp(place, np.arange(tokens), row) for row in np.eye(tokens)], axis=1)
    return weights.astype(np.float32) * ((position >= 0) & (position <= 1))[:, None]


def write_heat_map(values: np.ndarray, placement: Placement, path: str | Path, label: str = "") -> None:
    """values (T, h, w) over the model's cube -> a .nii.gz with the voxels, axes and affine of the scan's own file.

    Trilinear between token centres, 0 outside the cube. int16 with a slope, in at most 255 levels: rounding is 0.4 % of
    the highest value. Slices are made and packed one by one, so that memory is a few of them, whatever the file's size.
    Whole or not at all. On one machine the same values give the same bytes.
    """
    highest = float(np.abs(values).max())
    slope = highest / LEVELS or 1.0
    levels = np.asarray(values, np.float32).transpose(placement.axes) / np.float32(slope)  # file axes, fastest first
    fast, middle, slow = (_weights(p, n) for p, n in zip(placement.position, levels.shape, strict=True))
    header = _nifti_header(placement, slope, highest, label)
    plane = np.empty((len(middle), len(fast)), np.float32)
    stored = np.empty(plane.shape, "<i2")
    with (
        replacing(path) as temporary,
        temporary.open("wb") as raw,
        GzipFile("", "wb", 1, raw, mtime=0) as file,  # neither name nor time in the file
    ):
        file.write(header.binaryblock + bytes(4))
        for row in slow:  # levels @ row: tokens of this slice, (fastest axis, middle axis)
            np.matmul(middle @ (levels @ row).T, fast.T, out=plane)
            np.copyto(stored, np.rint(plane, out=plane), casting="unsafe")
            file.write(stored.data)


def _nifti_header(placement: Placement, slope: float, highest: float, label: str) -> nib.Nifti1Header:
    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype("<i2")
    header.set_data_shape(placement.shape)
    header.set_zooms(placement.spacing)
    if placement.affine is not None:
        header.set_sform(placement.affine, 1)
        header.set_qform(placement.affine, 1)  # as near as a rotation comes
        if not np.allclose(header.get_qform(), placement.affine, rtol=0, atol=1e-3):
            header["qform_code"] = 0  # a sheared grid has none
    header.set_xyzt_units("mm")
    header.set_slope_inter(slope, 0)
    header["cal_max"], header["vox_offset"] = highest, header.single_vox_offset
    header["descrip"] = f"{HEAT_MAP_DESCRIPTION}: {label}".encode("ascii", "replace")[:79]
    return header


# ------------------------------------------------------------------------------------------------------ as a picture


def strongest_token(values: np.ndarray) -> tuple[int, int, int]:
    """Of (T, h, w), the first of the highest."""
    return tuple(int(i) for i in np.unravel_index(values.argmax(), values.shape))  # type: ignore[return-value]


def strongest_levels(values: np.ndarray) -> list[int]:
    """Up to SHOWN rows of T by their highest value, each at least APART_MM from the others; from head to foot. Rows at
    -inf are not taken."""
    step, highest = FIELD_OF_VIEW_MM / len(values), values.max((1, 2))
    chosen: list[int] = []
    for row in np.argsort(-highest, kind="stable").tolist():
        apart = all(abs(row - other) * step >= APART_MM for other in chosen)
        if len(chosen) < SHOWN and apart and highest[row] > -np.inf:
            chosen.append(row)
    return sorted(chosen, reverse=True)


def _position(placement: Placement, cube_axis: int) -> np.ndarray:
    """Of the scan's voxels along an axis of the cube, as shares of its edge."""
    return placement.position[placement.axes.index(cube_axis)]


def _extent(placement: Placement, cube_axis: int) -> tuple[float, float]:
    """(from, to) of the scan along an axis of the cube, as shares of its edge: to the outer sides of its voxels."""
    position, spacing = _position(placement, cube_axis), placement.spacing[placement.axes.index(cube_axis)]
    voxel = abs(position[1] - position[0]) if len(position) > 1 else spacing / FIELD_OF_VIEW_MM
    return float(position.min() - voxel / 2), float(position.max() + voxel / 2)


def tokens_within(placement: Placement, grid: tuple[int, int, int]) -> np.ndarray:
    """(T, h, w) bool: which tokens have their centre within the scan; the others saw padding, or mostly. Along an axis
    on which no centre lies within, the nearest does."""
    sides = []
    for axis, tokens in enumerate(grid):
        low, high = _extent(placement, axis)
        centres = (np.arange(tokens) + 0.5) / tokens
        within = (low <= centres) & (centres <= high)
        within[np.abs(centres - (low + high) / 2).argmin()] = True  # adds one only where there is none
        sides.append(within)
    return np.einsum("t,h,w->thw", *sides)


def draw_heat_map(
    volume: Tensor,
    values: np.ndarray,
    placement: Placement,
    title: str,
    window: Window,
    caption: str = "",
    outline: np.ndarray | None = None,
) -> Figure:
    """The axial slices of the highest contributions, head first, and the coronal slice through the highest (ringed).

    volume (1, 1, D, H, W) is the model's input; values (T, h, w). Slices and ring are chosen among `tokens_within`.
    Colour: positive contributions, transparent below FAINT of the highest within the scan; negative ones are not drawn.
    Radiological convention: the patient's right on the left, front or head at the top. `outline` (D, H, W), if any, is
    drawn where it crosses 0.
    """
    hu = volume[0, 0].float().cpu().numpy()
    within = np.where(tokens_within(placement, values.shape), values, -np.inf)
    peak, levels, highest = strongest_token(within), strongest_levels(within), float(within.max())
    z, x, y = (_centre(placement, axis, i, n) for axis, (i, n) in enumerate(zip(peak, values.shape, strict=True)))
    (x0, x1), (y0, y1), (z0, z1) = _shown_mm(hu, placement)
    figure, axial, coronal, footer = _panels(len(levels), x1 - x0, y1 - y0, z1 - z0)

    def draw(ax: Axes, axis: int, at: float, name: str, ringed: bool = True) -> AxesImage:
        image = _draw_slice(ax, axis, at, hu, values, outline, window, highest)
        ax.set(xlim=(x0, x1), ylim=(z0, z1) if axis else (y1, y0))
        position = _position(placement, axis)  # the file's own slice there, as viewers count that start at 0
        index = f"slice {'ijk'[placement.axes.index(axis)]} = {np.abs(position - at).argmin()}"
        ax.set_title(f"{name}\n{index} (0 to {len(position) - 1})", fontsize=9, loc="left", color=INK, linespacing=1.4)
        if ringed and highest > 0:
            place = x * FIELD_OF_VIEW_MM, (z if axis else y) * FIELD_OF_VIEW_MM
            for colour, width in (("black", 2.6), ("white", 1.2)):
                ax.scatter(*place, s=170, facecolors="none", edgecolors=colour, linewidths=width)
        return image

    colours = draw(coronal, 2, y, "Coronal, through the ring" if highest > 0 else "Coronal")
    for number, (ax, row) in enumerate(zip(axial, levels, strict=True), 1):
        at = _centre(placement, 0, row, len(values))
        below = f"{(_extent(placement, 0)[1] - at) * FIELD_OF_VIEW_MM:.0f} mm below the top of the scan"
        draw(ax, 0, at, f"{number}. Axial, {below}", row == peak[0])
        _number(coronal, at * FIELD_OF_VIEW_MM, number)
    left, height = LEFT / WIDTH, figure.get_figheight()
    figure.suptitle(title, x=left, y=1 - 0.14 / height, ha="left", va="top", fontsize=13, color=INK, weight="bold")
    figure.text(left, 1 - 0.44 / height, caption, fontsize=9, color=GREY, va="top")
    _colour_bar(figure, footer, colours, highest)
    return figure


def _panels(n_axial: int, across: float, deep: float, tall: float) -> tuple[Figure, list[Axes], Axes, Axes]:
    """Figure, axial panels, the coronal panel beside them, and the room below the axial ones. Lengths in mm: panels are
    equally wide, so that all have one scale."""
    axial_inches, coronal_inches = (PANEL * size / across for size in (deep, tall))
    body = max(axial_inches + FOOT, coronal_inches + 0.1)
    figure = new_figure(WIDTH, HEAD + body, layout=None)
    grid = figure.add_gridspec(
        2, SHOWN + 1, left=LEFT / WIDTH, right=1 - LEFT / WIDTH, top=body / (HEAD + body), bottom=0,
        wspace=GAP / PANEL, hspace=0, height_ratios=(axial_inches, body - axial_inches),
    )  # fmt: skip
    axial = [figure.add_subplot(grid[0, column]) for column in range(n_axial)]
    coronal = figure.add_subplot(grid[:, max(n_axial, 2)])  # the colour bar takes two columns
    return figure, axial, coronal, figure.add_subplot(grid[1, :2])


def _centre(placement: Placement, cube_axis: int, token: int, tokens: int) -> float:
    """Centre of a token, as a share of the cube's edge; the nearest voxel's where it lies outside the scan."""
    position = _position(placement, cube_axis)
    return float(np.clip((token + 0.5) / tokens, position.min(), position.max()))


def _shown_mm(hu: np.ndarray, placement: Placement) -> list[tuple[float, float]]:
    """(from, to) in mm of the cube along x, y, z: the body within the scan. All of the scan where there is no body."""
    shown = []
    for axis in (1, 2, 0):
        low, high = np.clip(_extent(placement, axis), 0, 1)
        others = tuple(i for i in range(3) if i != axis)
        body = np.flatnonzero((hu > -0.5).mean(others) > 0.005)  # the table and a wire are thinner
        if axis and len(body):
            margin = MARGIN_MM / FIELD_OF_VIEW_MM
            low = max(low, body[0] / hu.shape[axis] - margin)
            high = min(high, (body[-1] + 1) / hu.shape[axis] + margin)
        shown.append((low * FIELD_OF_VIEW_MM, high * FIELD_OF_VIEW_MM))
    return shown


def _draw_slice(
    ax: Axes, axis: int, at: float, hu: np.ndarray, values: np.ndarray, outline: np.ndarray | None, window: Window,
    highest: float,
) -> AxesImage:  # fmt: skip
    """The slice at that share of the cube, over the whole cube, the first row at 0 mm: axis 0 axial (y down), 2 coronal
    (z down). hu and outline (D, H, W); values (T, h, w), coloured up to `highest`. Returns the coloured image."""
    k = min(int(at * hu.shape[axis]), hu.shape[axis] - 1)
    weights = [_weights((np.arange(d) + 0.5) / d, n) for d, n in zip(hu.shape, values.shape, strict=True)]
    through = weights.pop(axis)[k]
    colour = weights[0] @ np.tensordot(through, values, (0, axis)) @ weights[1].T
    turned = np.transpose if axis == 0 else np.asarray
    gray, colour = turned(hu.take(k, axis)), turned(colour)
    black, white = window.limits(unit=1000)
    whole_cube: dict[str, Any] = {"extent": (0, FIELD_OF_VIEW_MM, FIELD_OF_VIEW_MM, 0), "interpolation": "bilinear"}
    ax.imshow(gray, cmap="gray", vmin=black, vmax=white, **whole_cube)
    scale = highest if highest > 0 else 1.0
    share = np.clip((colour / scale - FAINT) / (1 - FAINT), 0, 1) * (highest > 0)
    image = ax.imshow(colour, cmap="plasma", vmin=0, vmax=scale, alpha=OPAQUE * share**0.7, **whole_cube)
    if outline is not None:
        inside = turned(outline.take(k, axis))
        rows, columns = (FIELD_OF_VIEW_MM * (np.arange(n) + 0.5) / n for n in inside.shape)
        if inside.min() < 0 < inside.max():
            ax.contour(columns, rows, inside, levels=[0], colors=[OUTLINE], linewidths=1.2)
    ax.set(xticks=[], yticks=[], facecolor="black", anchor="N")
    ax.spines[:].set_visible(False)
    for x, side, text in ((0.02, "left", "R"), (0.98, "right", "L")):
        ax.text(x, 0.97, text, ha=side, va="top", transform=ax.transAxes, **_on_picture(10))
    return image


def _on_picture(size: float) -> dict:
    from matplotlib.patheffects import withStroke

    return {"color": "white", "fontsize": size, "path_effects": [withStroke(linewidth=2, foreground="black")]}


def _number(ax: Axes, z: float, number: int) -> None:
    """A line across the coronal panel with its number: above the line, or below it where the title would be."""
    (x0, x1), top = ax.get_xlim(), ax.get_ylim()[1]
    ax.axhline(z, color="white", linewidth=0.6, linestyle=(0, (4, 4)), alpha=0.7)
    number_mm = NUMBER_POINTS * 1.5 / 72 * (x1 - x0) / PANEL
    side = "bottom" if z + number_mm <= top else "top"
    ax.text(x0 + 0.09 * (x1 - x0), z, str(number), va=side, **_on_picture(NUMBER_POINTS))  # beside the R


def _colour_bar(figure: Figure, footer: Axes, image: AxesImage, highest: float) -> None:
    inch = 1 / (footer.get_position().height * figure.get_figheight())
    footer.set_axis_off()
    if highest <= 0:
        text = "No positive contribution within the scan: nothing is coloured"
        footer.text(0, 1 - 0.2 * inch, text, fontsize=9, color=GREY, va="top")
        return
    ax = footer.inset_axes((0, 1 - 0.3 * inch, 0.8, 0.11 * inch))
    bar: Any = figure.colorbar(image, cax=ax, orientation="horizontal")
    bar.set_ticks([0, highest / 2, highest], labels=["0", f"{highest / 2:.2g}", f"{highest:.2g}"])
    ax.tick_params(labelsize=8, length=2, color=GREY)
    ax.set_xlabel("Contribution to the logit, per token; scaled to the highest within the scan", fontsize=8, color=GREY)
    bar.solids.set_alpha(1)
    bar.outline.set_visible(False)


# --------------------------------------------------------------------------------------------------------- one scan


def write_scan_heat_maps(
    model: CTCLIPMultiAbnormalityModel,
    volume: Tensor,
    placement: Placement,
    labels: Sequence[str],
    folder: Path,
    name: str,
    probabilities: np.ndarray,
    note: str | None = None,
) -> list[Path]:
    """Writes `<name>_<label>.nii.gz` and `.png` of each label into `folder`; returns their paths. See `_file_stems`.

    volume: (1, 1, D, H, W) of that scan on the model's device. placement: of its file, for `model.input_shape`. labels:
    of `model.labels`. probabilities: one for each of `model.labels`, as the user is told them. note: on the picture,
    such as SYNTHETIC_NOTE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = [model.labels.index(label) for label in labels]
    found = token_contributions(model, volume, index)
    written = []
    for i, (label, stem) in enumerate(zip(labels, _file_stems(name, labels), strict=True)):
        heat_map, picture = (folder / f"{stem}{suffix}" for suffix in (VOLUME_SUFFIX, ".png"))
        write_heat_map(found.values[i], placement, heat_map, label)
        title = f"{label}: probability {probabilities[index[i]]:.2f}"
        caption = f"{name}    {_caption(found.values[i], found.remainder[i], found.logits[i], placement)}"
        figure = draw_heat_map(volume, found.values[i], placement, title, display_window(label), caption)
        write_figure(figure, picture, note)
        written += [heat_map, picture]
    return written


def check_heat_maps(folder: Path, names: Sequence[str], labels: Sequence[str]) -> None:
    """Raises UserError where `write_scan_heat_maps` would replace a file in `folder` that it did not write."""
    for stem in (stem for name in names for stem in _file_stems(name, labels)):
        for suffix, is_ours in ((VOLUME_SUFFIX, _is_heat_map), (".png", _is_picture)):
            check_replaceable(folder / f"{stem}{suffix}", is_ours, "move it, or name another --output")


def _is_heat_map(path: Path) -> bool:
    return HEAT_MAP_DESCRIPTION.encode() in nifti_description(path)


def _is_picture(path: Path) -> bool:
    with path.open("rb") as file:
        return f"Software\0{SOFTWARE}".encode() in file.read(1024)


def _file_stems(name: str, labels: Sequence[str]) -> list[str]:
    """`<name>_<label>` without unsafe signs, cut at LONGEST_NAME; a number behind where two would be one file, as they
    are, case apart, on the disks of Windows and macOS."""
    stems: dict[str, str] = {}
    for label in labels:
        plain = UNSAFE.sub("_", label).encode()[:LONGEST_NAME].decode(errors="ignore")
        names = chain([plain], (f"{plain}_{number}" for number in count(2)))
        stem = next(stem for stem in names if stem.lower() not in stems)
        stems[stem.lower()] = f"{name}_{stem}"
    return list(stems.values())


def _caption(values: np.ndarray, remainder: float, logit: float, placement: Placement) -> str:
    outside = ~tokens_within(placement, values.shape)
    sums = []
    for side, name in ((values > 0, "positive contributions"), (values < 0, "negative")):
        total, beyond = values[side].sum(), values[side & outside].sum()
        text = f"{name} {total:+.2f}"
        if beyond / (total or 1) > OUTSIDE_SHARE:
            text += f" (of which outside the scan {beyond:+.2f})"
        sums.append(text)
    return f"Logit {logit:+.2f} before calibration: {', '.join(sums)}, remainder {remainder:+.2f}"
