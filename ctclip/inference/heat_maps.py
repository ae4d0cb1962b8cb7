"""Heat maps of a scan's findings as files: NIfTI on the scan's own grid, pictures, and their numbers.

A map says which tokens moved this model's answer. It is not an outline of a finding: a token is 15 mm wide in the
published tower and has attended to all others before it is counted, and a wrong answer has a map too. How often the
highest point lies on the finding is measured on phantoms by tests/benchmarks/pointing_game.py.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ctclip.data.ct_rate import VOLUME_SUFFIX
from ctclip.data.geometry import Placement
from ctclip.data.inflate import GzipFile
from ctclip.data.tables import listed
from ctclip.data.windows import display_window
from ctclip.fileio import check_replaceable, replacing
from ctclip.inference.map_figure import (
    PLANES,
    is_picture,
    map_picture,
    overview_picture,
    write_picture,
)
from ctclip.inference.scan_maps import (
    ScanMaps,
    interpolate,
    millimetres_below_top,
    neighbours,
    slice_number,
    strongest_place,
)
from ctclip.inference.scans import HEAT_MAP_DESCRIPTION, PredictionError, nifti_description
from ctclip_model import ABNORMALITIES

LEVELS = 127  # steps of a map on either side of 0: in 255 levels it packs several times smaller than in 65,535
UNSAFE = re.compile(r"[^\w.-]+")  # in a file's name
NUMBERS, OVERVIEW = "maps.json", "overview.png"  # of a scan
NUMBERS_KEY = "values"  # first in NUMBERS, with HEAT_MAP_DESCRIPTION, by which it is known as ours
LONGEST_NAME = 80  # bytes of a label in a file's name, which ends at 255 on most disks


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


# ------------------------------------------------------------------------------------------- on the file's own voxels


def write_heat_map(
    values: np.ndarray, placement: Placement, path: str | Path, label: str = "", body: np.ndarray | None = None
) -> None:
    """values (T, h, w) over the model's cube -> a .nii.gz with the voxels, axes and affine of the scan's own file.

    Trilinear between token centres, 0 outside the cube and outside the `body` (d, h, w) over it. int16 with a slope, in
    at most 255 levels: rounding is 0.4 % of the highest value. Slices are made and packed one by one, so that memory is
    a few of them, whatever the file's size. Whole or not at all. On one machine the same values give the same bytes.
    """
    highest = float(np.abs(values).max())
    slope = highest / LEVELS or 1.0
    levels = np.asarray(values, np.float32).transpose(placement.axes) / np.float32(slope)  # file axes, fastest first
    inside = (np.ones((1, 1, 1), bool) if body is None else body).transpose(placement.axes)
    fast, middle, slow = placement.position
    columns, rows, slices = (np.clip((p * n).astype(int), 0, n - 1)
                             for p, n in zip(placement.position, inside.shape, strict=True))  # fmt: skip
    box = tuple(_covering(inside.any(axis=axes)[places] & (p >= 0) & (p <= 1))
                for axes, places, p in (((0, 2), rows, middle), ((1, 2), columns, fast)))  # fmt: skip

    @lru_cache(2)
    def tokens(number: int) -> np.ndarray:
        return interpolate(levels[:, :, number].T, middle[box[0]], fast[box[1]])

    @lru_cache(1)
    def shown(number: int) -> np.ndarray:
        return inside[:, :, number].T[:, columns[box[1]]][rows[box[0]]]

    stored = np.zeros((len(middle), len(fast)), "<i2")
    plane, other = np.empty((2, *stored[box].shape), np.float32)
    with (
        replacing(path) as temporary,
        temporary.open("wb") as raw,
        GzipFile("", "wb", 1, raw, mtime=0) as file,  # neither name nor time in the file
    ):
        file.write(_nifti_header(placement, slope, highest, label).binaryblock + bytes(4))
        for at, number, before, behind, part in zip(slow, slices, *neighbours(slow, levels.shape[2]), strict=True):
            np.multiply(tokens(before), 1 - part, out=plane)
            plane += np.multiply(tokens(behind), part, out=other)
            np.copyto(stored[box], np.rint(plane, out=plane), casting="unsafe")
            stored[box] *= shown(number) if 0 <= at <= 1 else np.False_
            file.write(stored.data)


def _covering(places: np.ndarray) -> slice:
    """From the first to the last that is True."""
    numbers = np.flatnonzero(places)
    return slice(numbers[0], numbers[-1] + 1) if len(numbers) else slice(0)


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


# --------------------------------------------------------------------------------------------------------- one scan


def write_scan_heat_maps(maps: ScanMaps, folder: Path, note: str | None = None) -> list[Path]:
    """Writes into the scan's folder, `<label>.nii.gz` and `<label>.png` of each label (see `_file_stems`), NUMBERS, and
    OVERVIEW; returns their paths. note: on the pictures, such as SYNTHETIC_NOTE."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    stems = _file_stems(maps.labels)
    for i, (label, stem) in enumerate(zip(maps.labels, stems, strict=True)):
        heat_map, picture = (folder / f"{stem}{suffix}" for suffix in (VOLUME_SUFFIX, ".png"))
        write_heat_map(maps.values[i], maps.placement, heat_map, label, maps.body)
        write_picture(map_picture(maps, i, note), picture)
        written += [heat_map, picture]
    numbers, overview = folder / NUMBERS, folder / OVERVIEW
    with replacing(numbers) as temporary:
        temporary.write_text(json.dumps(scan_numbers(maps, stems), indent=1, ensure_ascii=False), encoding="utf-8")
    write_picture(overview_picture(maps, note), overview)
    return [*written, numbers, overview]


def scan_numbers(maps: ScanMaps, stems: Sequence[str]) -> dict[str, Any]:
    """Content of NUMBERS: of each label what is told and what it was made of, in logits."""
    return {NUMBERS_KEY: HEAT_MAP_DESCRIPTION, "scan": maps.name, "findings": {
        label: _numbers(maps, i) | {"heat_map": f"{stem}{VOLUME_SUFFIX}", "picture": f"{stem}.png"}
        for i, (label, stem) in enumerate(zip(maps.labels, stems, strict=True))
    }}  # fmt: skip


def _numbers(maps: ScanMaps, label: int) -> dict[str, Any]:
    decision, all_values = maps.decisions[label], maps.contributions.values[label]
    place, placement = strongest_place(maps, label), maps.placement
    voxel = [int(np.abs(position - place[axis]).argmin())
             for position, axis in zip(placement.position, placement.axes, strict=True)]  # fmt: skip
    window = display_window(maps.labels[label])
    sums: dict[str, float] = {}
    for name, side in (("for", all_values > 0), ("against", all_values < 0)):
        total, beyond = (all_values[chosen].sum(dtype=float) for chosen in (side, side & ~maps.tokens_in_body))
        sums |= {f"contributions_{name}": float(total), f"outside_body_{name}": float(beyond)}
    return {
        "probability": decision.probability, "threshold": decision.threshold, "called": decision.positive,
        "logit_before_calibration": float(maps.contributions.logits[label]), **sums,
        "remainder": float(maps.contributions.remainder[label]),
        "highest_in_body": float(maps.highest[label]),
        "reached_share_of_scale": float(maps.reached[label]),
        "strongest": {
            "slice": {p.name.lower(): slice_number(placement, p.axis, place[p.axis])[0] for p in PLANES},
            "voxel": voxel,
            "ras_mm": None if placement.affine is None else (placement.affine @ [*voxel, 1])[:3].round(1).tolist(),
            "mm_below_top": round(millimetres_below_top(placement, place[0]), 1),
        },
        "window": {"level": window.level, "width": window.width},
    }  # fmt: skip


def check_heat_maps(folders: Sequence[Path], labels: Sequence[str]) -> None:
    """Raises UserError where `write_scan_heat_maps` would replace a file in one of `folders` that it did not write."""
    remedy = "move it, or name another --output"
    for folder in folders:
        for stem in _file_stems(labels):
            check_replaceable(folder / f"{stem}{VOLUME_SUFFIX}", _is_heat_map, remedy)
            check_replaceable(folder / f"{stem}.png", is_picture, remedy)
        check_replaceable(folder / OVERVIEW, is_picture, remedy)
        check_replaceable(folder / NUMBERS, _is_numbers, remedy)


def _is_heat_map(path: Path) -> bool:
    return HEAT_MAP_DESCRIPTION.encode() in nifti_description(path)


def _is_numbers(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'"{NUMBERS_KEY}": "{HEAT_MAP_DESCRIPTION}"' in file.read(1000)


def _file_stems(labels: Sequence[str]) -> list[str]:
    """Labels without unsafe signs, cut at LONGEST_NAME; a number behind where two would be one file, as they are, case
    apart, on the disks of Windows and macOS."""
    stems: dict[str, str] = {Path(name).stem: "" for name in (NUMBERS, OVERVIEW)}
    for label in labels:
        plain = UNSAFE.sub("_", label).encode()[:LONGEST_NAME].decode(errors="ignore")
        names = chain([plain], (f"{plain}_{number}" for number in count(2)))
        stem = next(stem for stem in names if stem.lower() not in stems)
        stems[stem.lower()] = stem
    return [stem for stem in stems.values() if stem]
