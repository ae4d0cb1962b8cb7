"""A synthetic chest CT: a body with any of CT-RATE's 18 findings, painted in millimetres and scanned with noise.

The scanner gives each scan a kernel, correlated noise, an offset, a pose and a field of view. Arrays are (z, y, x)
inside this package and handed out as (x, y, z) views, LPS. Synthetic data: not clinical performance.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ctclip.data.ct_rate import PREVALENCE
from ctclip.errors import UserError
from ctclip.phantoms.findings import IN_LUNG, Findings, draw_labels, paint_body, with_findings
from ctclip.phantoms.patient import AIR, Patient, Purpose, random_stream, torso_outline
from ctclip.phantoms.scene import Scene
from ctclip_model import ABNORMALITIES

PHANTOM_VERSION = 1  # part of the manifest: raise it whenever the same seed would give other voxels
SLAB = 6  # slices at a time: they stay in the processor's cache
Geometry = tuple[tuple[int, int, int], tuple[float, float, float]]  # shape and spacing (mm), each x, y, z


class PhantomError(UserError):
    """Labels, parameters or a folder that make no phantoms. One line: what was found, what was expected, what to do."""


def blur(image: np.ndarray, amount: float, axis: int) -> np.ndarray:
    """Three-tap filter (amount, 1 - 2 amount, amount) along an axis; a negative amount sharpens."""
    out = image * np.float32(1 - 2 * amount)
    image = image * np.float32(amount)
    summed, shifted = np.moveaxis(out, axis, 0), np.moveaxis(image, axis, 0)
    summed[1:] += shifted[:-1]
    summed[:-1] += shifted[1:]
    summed[0] += shifted[0]
    summed[-1] += shifted[-1]
    return out


def scan_image(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """Painted HU -> int16 as a scanner gives it: table, kernel on image and noise alike, offset, floor at -1024."""
    if rng.random() < 0.75:  # with the table
        y = float(torso_outline(0)[1]) + s.patient.fat + 16
        plate = np.clip(1 - np.abs(s.y - y + 0.0006 * s.x**2) / max(s.h, 3), 0, 1) * min(1.0, 3 / s.h)
        plate *= np.abs(s.x) < 200
        rows = np.flatnonzero(plate.any(1))
        if len(rows):
            strip = s.hu[:, rows[0] : rows[-1] + 1]
            np.maximum(strip, AIR + 500 * plate[rows[0] : rows[-1] + 1], out=strip, where=strip < -600)
    sharp = rng.random() < 0.35
    noise = rng.uniform(16, 34) if sharp else rng.uniform(8, 20)
    noise *= math.sqrt(min(max(30 / s.voxel, 0.5), 3.0))  # thin slices and small voxels are noisier
    # Four uniform bytes: near enough to normal, and fast. These are rng.bytes(4 * size), in an eighth of its time.
    raw = rng.bit_generator.random_raw((s.hu.size + 1) // 2).astype("<u8", copy=False)
    grains = raw.view(np.uint8)[: 4 * s.hu.size].reshape(4, *s.shape)
    amount = rng.uniform(-0.07, -0.02) if sharp else rng.uniform(0.04, 0.14)
    offset = np.float32(rng.normal(0, 4))
    scanned = np.empty(s.shape, np.int16)
    for k in range(0, len(scanned), SLAB):
        image = grains[:, k : k + SLAB].sum(0, dtype=np.uint16).astype(np.float32)
        image -= 510
        image *= noise / 147.8
        image += s.hu[k : k + SLAB]
        for axis in (1, 2):
            image = blur(image, amount, axis)
        image += offset
        np.clip(image, -1024, 3071, out=image)
        scanned[k : k + SLAB] = np.rint(image, out=image)
    return scanned


@dataclass(eq=False)
class Phantom:
    """hu (x, y, z) int16, LPS; spacing (3,) mm; labels (18,) uint8; masks: {each present finding: where it was drawn,
    bool (x, y, z)}."""

    hu: np.ndarray
    spacing: tuple[float, float, float]
    labels: np.ndarray
    patient: Patient = field(repr=False)
    masks: dict[str, np.ndarray] = field(repr=False)


def draw_geometry(
    seed: int, scan: int = 0, reconstruction: int = 0, spacing: Sequence[float] | None = None
) -> Geometry:
    """(shape, spacing) in x, y, z; 300 to 420 mm in plane, along z the lungs and a margin. Demo size, or the same view
    with a `spacing` of one's own."""
    rng = random_stream(seed, Purpose.GEOMETRY, scan, reconstruction)
    wide, _, tall = Patient.draw(seed, scan).size
    n = int(rng.choice((96, 104, 112, 120, 128)))
    in_plane = float(np.clip(max(rng.uniform(300, 420), 295 * wide) / n, 2.8, 4.2))
    view = 325 * tall + rng.uniform(0, 45)
    dz = float(rng.choice([step for step in (4.0, 4.5, 5.0, 6.0, 7.0) if 48 <= view / step <= 80]))
    shape, drawn = (n, n, round(view / dz)), (round(in_plane, 4), round(in_plane, 4), dz)
    if spacing is None:
        return shape, drawn
    x, y, z = (max(round(count * step / new), 8) for count, step, new in zip(shape, drawn, spacing, strict=True))
    return (x, y, z), (float(spacing[0]), float(spacing[1]), float(spacing[2]))


def resolve_labels(labels: Sequence[int] | np.ndarray | None, seed: int, scan: int) -> np.ndarray:
    """(18,) uint8; drawn at PREVALENCE where they are None. PhantomError for anything but 18 numbers 0 or 1."""
    if labels is None:
        bar = [statistics.NormalDist().inv_cdf(PREVALENCE[name]) for name in ABNORMALITIES]
        return (draw_labels(random_stream(seed, Purpose.LABELS, scan), 1)[0] < bar).astype(np.uint8)
    values = np.asarray(labels)
    if values.shape != (len(ABNORMALITIES),) or not np.isin(values, (0, 1)).all():
        expected = f"{len(ABNORMALITIES)} numbers 0 or 1 in the order of ABNORMALITIES"
        raise PhantomError(f"found labels of shape {values.shape}, expected {expected}; pass None to have them drawn")
    return values.astype(np.uint8)


def make_phantom(
    seed: int,
    labels: Sequence[int] | np.ndarray | None = None,
    spacing: Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
    *,
    scan: int = 0,
    reconstruction: int = 0,
) -> Phantom:
    """One chest CT. Same arguments, same voxels.

    labels   (18,) 0/1 in ABNORMALITIES order; None draws them at PREVALENCE. They change only what they name: the
             body, its pose and its noise stay those of `seed`.
    spacing  mm along x, y, z; shape voxels along x, y, z. Where one is None it is drawn, or chosen to keep the view.
    scan     another examination of the same body: new pose, contrast and findings.
    reconstruction   the same examination again: new grid, kernel and noise.
    """
    truth = resolve_labels(labels, seed, scan)
    drawn_shape, drawn_spacing = draw_geometry(seed, scan, reconstruction, spacing)
    if shape is None:
        shape = drawn_shape
    if spacing is None:
        view = np.multiply(drawn_shape, drawn_spacing)
        spacing = drawn_spacing if tuple(shape) == drawn_shape else tuple(view / np.asarray(shape))
    findings = Findings(frozenset(itertools.compress(ABNORMALITIES, truth)), seed, scan)
    healthy = Patient.draw(seed, scan)
    patient = with_findings(healthy, findings)
    pose_rng = random_stream(seed, Purpose.POSE, scan)
    pose = np.append(pose_rng.normal(0, (6, 7, 5)), pose_rng.normal(0, 0.05)) + (0, 0, 28 * patient.size[2], 0)
    scene = Scene(patient, shape, spacing, pose)
    lung = paint_body(scene, healthy, findings)
    painted = {name: scene.masks[name] for name in ABNORMALITIES if name in findings.present}
    masks = {name: (mask & lung if name in IN_LUNG else mask).transpose(2, 1, 0) for name, mask in painted.items()}
    image = scan_image(scene, random_stream(seed, Purpose.NOISE, scan, reconstruction))
    dx, dy, dz = map(float, spacing)
    return Phantom(image.transpose(2, 1, 0), (dx, dy, dz), truth, patient, masks)
