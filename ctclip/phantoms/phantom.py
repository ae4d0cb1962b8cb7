"""Synthetic chest CTs with CT-RATE's 18 findings, and a cohort of them on disk in the hub's own layout.

A phantom is a body described in millimetres and painted onto any voxel grid: torso, abdomen, lungs with vessels and
airways, heart and great vessels, skeleton; then the findings, each as what it is (a nodule is a sphere, an effusion
fills the dependent space, emphysema is holes, a calcified artery carries bright plaques on its wall); then a scanner:
kernel, correlated noise, offset, pose, field of view. Edges are painted by the fraction of the voxel they cover.

Coordinates  patient millimetres, x to the left, y to posterior, z to superior (LPS); (0, 0, 0) lies between the lungs.
Arrays       inside this file (z, y, x), so that x runs fastest as in a NIfTI file; handed out as (x, y, z) views.

Synthetic data: results on phantoms are not clinical performance.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import multiprocessing
import os
import statistics
import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ctclip.config import SYNTHETIC_NOTE
from ctclip.data.preprocessing import PREVALENCE, labels_path, metadata_path, no_chest_path, volume_path
from ctclip.fileio import replacing
from ctclip_model import ABNORMALITIES

try:
    from isal import igzip  # three times as fast as zlib at the same size
except ImportError:
    igzip = None

PHANTOM_VERSION = 1  # part of the manifest: raise it whenever the same seed would give other voxels
MANIFEST = "phantom.json"

(
    MEDICAL,
    ARTERIAL,
    CARDIOMEGALY,
    PERICARDIAL,
    CORONARY,
    HERNIA,
    NODES,
    EMPHYSEMA,
    ATELECTASIS,
    NODULE,
    OPACITY,
    FIBROSIS,
    EFFUSION,
    MOSAIC,
    PERIBRONCHIAL,
    CONSOLIDATION,
    BRONCHIECTASIS,
    SEPTAL,
) = ABNORMALITIES
IN_LUNG = {EMPHYSEMA, ATELECTASIS, NODULE, OPACITY, FIBROSIS, EFFUSION, MOSAIC, CONSOLIDATION, SEPTAL}

# Hounsfield units
AIR, FAT, MUSCLE, SOFT, LIVER, MARROW, CORTEX, METAL = -1000, -100, 50, 40, 58, 190, 650, 2800

# Inner surface of the rib cage and outer surface of the muscles: half-width, half-depth and centre y at each z (mm).
CAGE_Z = (-260, -170, -120, -70, -20, 30, 70, 100, 120, 137)
CAGE_WIDTH = (128, 133, 136, 137, 133, 124, 106, 82, 56, 24)
CAGE_DEPTH = (86, 88, 88, 87, 83, 75, 63, 49, 35, 14)
CAGE_CENTRE = (-8, -6, -4, -2, 0, 2, 7, 13, 18, 22)
TORSO_Z = (-260, -120, -20, 30, 70, 100, 130, 160, 200)
TORSO_WIDTH = (150, 153, 156, 160, 166, 170, 162, 128, 86)
TORSO_DEPTH = (101, 105, 105, 103, 98, 92, 85, 75, 62)
TORSO_CENTRE = (0, 0, 0, 2, 6, 10, 13, 15, 15)
SPINE_Z, SPINE_Y = (-260, -150, -60, 30, 90, 140, 200), (45, 52, 60, 60, 52, 42, 36)  # thoracic kyphosis
RIB_PITCH = 24.0

HEART_AXES = np.array([(0.62, -0.50, -0.60), (0.55, 0.83, -0.12), (0.56, -0.26, 0.79)])  # rows: long axis first
HEART_RADII = np.array((62.0, 46.0, 42.0))
HEART_CENTRE = np.array((17.0, -22.0, -46.0))
CHAMBERS = (  # place and size in the heart's own frame (unit sphere, long axis first)
    ((0.15, 0.32, -0.12), (0.62, 0.40, 0.42)),
    ((0.05, -0.45, 0.18), (0.72, 0.36, 0.52)),
    ((-0.62, 0.35, -0.1), (0.30, 0.50, 0.58)),
    ((-0.55, -0.42, 0.1), (0.36, 0.42, 0.50)),
)

AORTA = np.array(
    [(4, -16, -12), (-8, -28, 8), (-13, -32, 32), (-8, -26, 52), (4, -8, 63), (16, 14, 62), (24, 30, 48), (25, 38, 22)]
    + [(24, 42, -20), (22, 44, -70), (15, 42, -120), (8, 36, -170), (3, 30, -230)],
    dtype=float,
)
AORTA_RADIUS = np.array((16, 17, 16.5, 15.5, 14.5, 14, 13.5, 13, 12.5, 12, 11.5, 11, 10.5))
TRACHEA = np.array([(1, -6, 150), (0, 0, 110), (-1, 8, 70), (-1, 14, 38)], dtype=float)
CARINA = np.array((-1.0, 14.0, 36.0))
HILUM = {-1: np.array((-38.0, 12.0, 10.0)), 1: np.array((40.0, 14.0, 14.0))}  # side: -1 right, +1 left
VENA_CAVA = np.array([(-26, -12, 75), (-29, -16, 40), (-30, -14, 0), (-28, -14, -30)], dtype=float)
OESOPHAGUS = np.array(
    [(3, 18, 150), (5, 26, 80), (4, 30, 30), (6, 30, -40), (12, 26, -85), (24, 10, -112)], dtype=float
)

NODE_STATIONS = np.array(
    [(-16, -2, 58), (-18, 2, 44), (23, -2, 42), (2, -38, 56), (3, 22, 16), (-2, 24, 2), (-42, 16, 4), (46, 14, 4)]
    + [(-118, -38, 88), (118, -38, 88), (-108, -24, 78), (108, -24, 78), (10, -44, 42), (-20, -24, 74)],
    dtype=float,
)


# ---------------------------------------------------------------------------------------------------- the patient


def _rng(seed: int, *purpose: int) -> np.random.Generator:
    """Independent stream per purpose, so that a finding changes no random number of anything else."""
    return np.random.Generator(np.random.SFC64([int(seed), *purpose]))


@dataclass(frozen=True)
class Patient:
    """What distinguishes one body from another; everything else follows from the coordinates."""

    size: np.ndarray  # (3,) scale of x, y, z against the reference body
    fat: float  # subcutaneous, mm
    female: bool
    age: int
    cardiothoracic: float  # heart width over inner chest width
    dome: tuple[float, float]  # z of the diaphragm's top, right and left
    lung_hu: float
    blood_hu: float
    marrow: float  # factor on trabecular bone
    node_radius: float  # normal lymph nodes, mm
    wobble: np.ndarray  # (12,) standard normal numbers for small shifts

    @staticmethod
    def draw(seed: int, scan: int) -> Patient:
        rng = _rng(seed, 0)
        female = bool(rng.random() < 0.45)
        scale = (0.93 if female else 1.0) + 0.045 * rng.standard_normal()
        contrast = _rng(seed, 1, scan)  # contrast belongs to the scan, not to the body
        return Patient(
            size=np.clip(scale * (1 + 0.03 * rng.standard_normal(3)), 0.82, 1.13),
            fat=float(rng.gamma(4.0, 3.5) + 4) if not female else float(rng.gamma(4.0, 4.5) + 5),
            female=female,
            age=int(np.clip(rng.normal(52, 17), 18, 96)),
            cardiothoracic=float(rng.uniform(0.40, 0.47)),
            dome=(float(rng.normal(-76, 6)), float(rng.normal(-90, 6))),
            lung_hu=float(rng.normal(-865, 14)),
            marrow=float(rng.uniform(0.7, 1.25)),
            node_radius=float(rng.uniform(2.0, 3.0)),
            wobble=rng.standard_normal(12),
            blood_hu=float(contrast.uniform(150, 300) if contrast.random() < 0.35 else contrast.uniform(36, 46)),
        )

    @property
    def enhanced(self) -> bool:
        return self.blood_hu > 100

    @cached_property
    def heart(self) -> tuple[np.ndarray, np.ndarray]:
        """Centre and 3 x 3 matrix (unit sphere -> patient mm) of the heart."""
        basis = HEART_AXES.T / np.linalg.norm(HEART_AXES.T, axis=0)
        plain = basis * HEART_RADII
        width = 2 * np.sqrt((plain[0] ** 2).sum())
        chest = 2 * np.interp(HEART_CENTRE[2], CAGE_Z, CAGE_WIDTH)
        grow = self.cardiothoracic * chest / width
        scale = np.array((grow, grow**0.55, grow**0.6))  # a big heart spreads sideways more than forward
        shift = np.array((22.0, 4.0, -4.0)) * (grow - 1.1)
        return HEART_CENTRE + shift, plain * scale[:, None]


def _along(at, nodes, values) -> np.ndarray:
    """np.interp in the precision of `at`: a stray float64 doubles the time of everything painted after it."""
    return np.interp(at, nodes, values).astype(at.dtype)


def dome_height(patient: Patient, x, y):
    """z of the diaphragm over (x, y): two domes with deep posterior sulci."""
    side = np.where(x < 0, -62.0, 62.0)
    top = _along(x, (-25, 25), patient.dome)
    lateral = ((x - side) / 72) ** 2 * np.where(np.abs(x) > 62, 46.0, 12.0)
    return (top - lateral - ((y + 12) / 82) ** 2 * np.where(y > -12, 70.0, 26.0)).astype(x.dtype)


def cage_depth(x, y, z, shift=0.0):
    """About how many mm a point lies inside the rib cage (negative outside); `shift` moves the cage forward."""
    half_width, half_depth, centre = (_along(z, CAGE_Z, nodes) for nodes in (CAGE_WIDTH, CAGE_DEPTH, CAGE_CENTRE))
    outside = y - (centre - shift)
    outside *= outside
    outside *= half_depth**-2.0
    outside += np.abs(x) ** 2.5 * half_width**-2.5
    np.subtract(1.0, outside, out=outside)
    outside *= 0.45 * half_depth
    if np.max(z) > CAGE_Z[-1]:
        outside = np.minimum(outside, (CAGE_Z[-1] - z) * 0.8)
    return outside


def lung_depth(patient: Patient, x, y, z, cage=None):
    """About how many mm a point lies inside a lung: within the cage, above the diaphragm, beside the mediastinum."""
    depth = cage_depth(x, y, z) if cage is None else cage.copy()
    np.minimum(depth, (z - dome_height(patient, x, y)) * 0.8, out=depth)
    midline = _along(y, (-90, -60, -40, -12, 12, 34, 48, 90), (3, 4, 9, 17, 19, 20, 22, 23))
    bulge = _along(z, (-60, 20, 60, 95, 120), (0, 3, 5, 8, 7))
    np.minimum(depth, np.abs(x - 2) - midline - bulge, out=depth)
    return depth


def _quasi_random(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 3) evenly spread points in the unit cube (additive recurrence with the plastic number's 3-D relative)."""
    g = 1.2207440846057596
    return (rng.random(3) + np.outer(np.arange(n), (1 / g, 1 / g**2, 1 / g**3))) % 1.0


@dataclass(frozen=True)
class Pool:
    """Points inside the lungs with their depth (mm from the nearest surface), to place things at."""

    points: np.ndarray
    depth: np.ndarray

    @staticmethod
    def fill(patient: Patient, rng: np.random.Generator, n: int = 4000) -> Pool:
        points = np.array((-132, -92, -195)) + _quasi_random(n, rng) * np.array((264, 184, 332))
        depth = lung_depth(patient, *points.T)
        centre, matrix = patient.heart
        heart = np.linalg.norm((points - centre) @ np.linalg.inv(matrix).T, axis=1)
        depth = np.minimum(depth, (heart - 1.12) * 45)
        keep = depth > 0.5
        return Pool(points[keep], depth[keep])

    def pick(self, rng, n: int, weight) -> tuple[np.ndarray, np.ndarray]:
        """n different points (fewer if there are not as many) with probability proportional to `weight`."""
        weight = np.asarray(weight, float)
        n = min(n, int((weight > 0).sum()))
        if n == 0:
            return np.zeros((0, 3)), np.zeros(0)
        chosen = rng.choice(len(weight), size=n, replace=False, p=weight / weight.sum())
        return self.points[chosen], self.depth[chosen]


# ------------------------------------------------------------------------------------------------------- painting


def _smooth(points: np.ndarray, rounds: int = 2) -> np.ndarray:
    """Chaikin corner cutting of a polyline (n, k); the ends stay."""
    for _ in range(rounds):
        a, b = points[:-1], points[1:]
        middle = np.stack([0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b], axis=1).reshape(-1, points.shape[1])
        points = np.concatenate([points[:1], middle[1:-1], points[-1:]])
    return points


def _frames(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors perpendicular to each direction (n, 3)."""
    x, y, z = direction.T / np.maximum(np.linalg.norm(direction, axis=1), 1e-9)
    upright = np.abs(z) < 0.8  # the helper is then (0, 0, 1), else (1, 0, 0)
    u = np.stack([y * upright, z * ~upright - x * upright, -y * ~upright])
    u /= np.linalg.norm(u, axis=0)
    v = np.stack([y * u[2] - z * u[1], z * u[0] - x * u[2], x * u[1] - y * u[0]])
    return u.T, v.T


class Scene:
    """A voxel grid laid over the patient: `hu` and `air` (lung contents) are (nz, ny, nx) float32 being painted."""

    def __init__(self, patient: Patient, shape: Sequence[int], spacing: Sequence[float], pose: np.ndarray):
        """shape, spacing: x, y, z. pose: shift x, y, z (mm) and in-plane rotation (radians)."""
        self.patient = patient
        nx, ny, nz = (int(n) for n in shape)
        sx, sy, sz = (float(s) for s in spacing)
        u = (np.arange(nx) - (nx - 1) / 2) * sx - pose[0]
        v = (np.arange(ny) - (ny - 1) / 2) * sy - pose[1]
        self.cos, self.sin = math.cos(pose[3]), math.sin(pose[3])
        self.origin, self.step = (float(u[0]), float(v[0])), (sx, sy)
        self.scale = size = tuple(float(v) for v in patient.size)
        self.x = ((self.cos * u[None, :] + self.sin * v[:, None]) / size[0]).astype(np.float32)
        self.y = ((-self.sin * u[None, :] + self.cos * v[:, None]) / size[1]).astype(np.float32)
        self.z = (((np.arange(nz) - (nz - 1) / 2) * sz - pose[2]) / size[2]).astype(np.float32)
        self.dz, self.bottom = sz / size[2], float(self.z[0])
        self.h = math.sqrt(sx * sy / (size[0] * size[1]))  # in-plane voxel, reference mm: width of a painted edge
        self.voxel = self.h**2 * self.dz
        self.shape = (nz, ny, nx)
        self.hu = np.full(self.shape, AIR, np.float32)
        self.air = self.hu
        self.marks: dict[str, list] = {}

    @property
    def grid(self):
        return self.x, self.y, self.z[:, None, None]

    def local(self, box):
        return self.x[box[1:]], self.y[box[1:]], self.z[box[0]][:, None, None]

    def to_index(self, points: np.ndarray) -> np.ndarray:
        """Patient mm (n, 3) -> fractional (k, j, i)."""
        x, y = points[:, 0] * self.scale[0], points[:, 1] * self.scale[1]
        u, v = self.cos * x - self.sin * y, self.sin * x + self.cos * y
        k = (points[:, 2] - self.bottom) / self.dz
        return np.stack([k, (v - self.origin[1]) / self.step[1], (u - self.origin[0]) / self.step[0]]).T

    def box(self, low, high):
        """Slices (z, y, x) of the voxels that a patient-space box touches, or None outside the grid."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        sx, sy, _ = self.scale
        x, y, dx, dy = (x0 + x1) / 2 * sx, (y0 + y1) / 2 * sy, (x1 - x0) / 2 * sx, (y1 - y0) / 2 * sy
        c, n = abs(self.cos), abs(self.sin)
        around = (
            ((z0 + z1) / 2 - self.bottom, (z1 - z0) / 2, self.dz),
            (self.sin * x + self.cos * y - self.origin[1], n * dx + c * dy, self.step[1]),
            (self.cos * x - self.sin * y - self.origin[0], c * dx + n * dy, self.step[0]),
        )
        box = []
        for (middle, reach, step), size in zip(around, self.shape, strict=True):
            start, stop = max(int((middle - reach) // step), 0), min(int((middle + reach) // step) + 2, size)
            if stop <= start:
                return None
            box.append(slice(start, stop))
        return tuple(box)

    def paint(self, piece, value, into=None, mark: str | None = None) -> None:
        """Blend `value` by coverage; piece = (box, coverage) as the shape functions below return it, or None."""
        if piece is None:
            return
        box, cover = piece
        target = (self.hu if into is None else into)[box]
        target += cover * (value - target)
        if mark is not None:
            self.mark(mark, box, cover > 0.25)

    def mark(self, name: str, box, where: np.ndarray) -> None:
        self.marks.setdefault(name, []).append((box, where))

    # shapes -> (box, coverage)

    def ellipsoid(self, centre, radii=None, matrix=None):
        """Axis-parallel with `radii`, or the image of the unit sphere under `matrix`."""
        cx, cy, cz = (float(c) for c in centre)
        if matrix is None:
            rx, ry, rz = (float(r) for r in np.broadcast_to(radii, 3))
            reach = (rx, ry, rz)
        else:
            reach = np.sqrt((matrix**2).sum(1)).tolist()
        ex, ey, ez = (r + self.h for r in reach)
        box = self.box((cx - ex, cy - ey, cz - ez), (cx + ex, cy + ey, cz + ez))
        if box is None:
            return None
        x, y, z = self.local(box)
        x, y, z = x - cx, y - cy, z - cz
        if matrix is None:
            mean = (rx * ry * rz) ** (1 / 3)
            square = ((x / rx) ** 2 + (y / ry) ** 2) + (z / rz) ** 2
        else:
            mean = abs(float(np.linalg.det(matrix))) ** (1 / 3)
            square = 0
            for a, b, c in np.linalg.inv(matrix).tolist():
                part = (a * x + b * y) + c * z
                part *= part
                square = square + part
        square -= 1
        square *= -mean / (2 * self.h)
        square += 0.5
        return box, np.clip(square, 0, 1, out=square)

    def lump(self, centre, radii, rng, rough=0.3, edge=0.0):
        """Ellipsoid with an uneven surface; `edge` mm of soft border."""
        radii = np.broadcast_to(radii, 3)
        mean = float(radii.prod() ** (1 / 3))
        waves = (rng.normal(0, 1, (4, 3)) * 2.6 / mean).tolist(), rng.uniform(0, 6.3, 4).tolist()
        reach = radii * (1 + rough) + edge + self.h
        box = self.box(centre - reach, centre + reach)
        if box is None:
            return None
        x, y, z = (a - float(c) for a, c in zip(self.local(box), centre, strict=True))
        rx, ry, rz = radii.tolist()
        radius = np.sqrt((x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2)
        for wave, phase in zip(*waves, strict=True):
            ripple = (wave[0] * x + wave[1] * y + phase) + wave[2] * z
            radius += (rough / 2.5) * np.sin(ripple, out=ripple)
        radius -= 1
        radius *= -mean / max(self.h, edge)
        radius += 0.5
        return box, np.clip(radius, 0, 1, out=radius)

    def column(self, nodes: np.ndarray, rx, ry=None, z_range=None):
        """Upright tube: centre x, y as functions of z through `nodes` (n, 3); rx, ry are numbers or arrays (n,)."""
        order = np.argsort(nodes[:, 2])
        nodes = nodes[order]
        rx = (np.asarray(rx, float) * np.ones(len(nodes)))[order]
        ry = rx if ry is None else (np.asarray(ry, float) * np.ones(len(nodes)))[order]
        low, high = z_range or (nodes[0, 2], nodes[-1, 2])
        reach = np.array((rx.max(), ry.max(), 0)) + self.h
        box = self.box(np.append(nodes[:, :2].min(0), low) - reach, np.append(nodes[:, :2].max(0), high) + reach)
        if box is None:
            return None
        x, y, z = self.local(box)
        at = [np.interp(z, nodes[:, 2], c).astype(np.float32) for c in (nodes[:, 0], nodes[:, 1], rx, ry)]
        square = ((x - at[0]) / at[2]) ** 2 + ((y - at[1]) / at[3]) ** 2
        square -= 1
        square *= np.minimum(at[2], at[3]) * (-0.5 / self.h)
        square += 0.5
        cover = np.clip(square, 0, 1, out=square)
        return box, cover * np.clip(np.minimum(z - low, high - z) / self.dz + 0.5, 0, 1).astype(np.float32)

    def tube(self, points: np.ndarray, radii):
        """Round tube along a polyline, by distance: for radii of about a voxel and more."""
        radii = (np.asarray(radii, float) * np.ones(len(points))).tolist()
        reach = max(radii) + self.h
        box = self.box((points.min(0) - reach).tolist(), (points.max(0) + reach).tolist())
        if box is None:
            return None
        points = points.tolist()
        offset = [s.start for s in box]
        cover = np.zeros([s.stop - s.start for s in box], np.float32)
        for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            margin = max(ra, rb) + self.h
            low = [min(p, q) - margin for p, q in zip(a, b, strict=True)]
            part = self.box(low, [max(p, q) + margin for p, q in zip(a, b, strict=True)])
            if part is None:
                continue
            part = tuple(slice(max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(part, box, strict=True))
            x, y, z = (c - o for c, o in zip(self.local(part), a, strict=True))
            d = [q - p for p, q in zip(a, b, strict=True)]
            length = sum(v * v for v in d) + 1e-9
            t = (x * (d[0] / length) + y * (d[1] / length)) + z * (d[2] / length)
            np.clip(t, 0, 1, out=t)
            square = (x - t * d[0]) ** 2
            square += (y - t * d[1]) ** 2
            square += (z - t * d[2]) ** 2
            np.sqrt(square, out=square)
            t *= rb - ra
            square -= t + ra
            square *= -1 / self.h
            square += 0.5
            view = cover[tuple(slice(s.start - o, s.stop - o) for s, o in zip(part, offset, strict=True))]
            np.maximum(view, square, out=view)
        return box, np.clip(cover, 0, 1, out=cover)

    def splat(self, points: np.ndarray, volumes: np.ndarray, gain: float = 1.1):
        """Coverage by a cloud of points, each standing for `volumes` mm3: for anything thinner than a voxel."""
        index = self.to_index(points).T  # rows of each axis: numpy is slow over a last axis of three
        base = np.floor(index).astype(np.int64)
        inside = ((base >= 0) & (base < np.array(self.shape)[:, None] - 1)).all(0)
        if not inside.any():
            return None
        part = (index - base).astype(np.float32)
        weight = np.asarray(volumes, np.float32) * np.ones(len(points), np.float32)
        if not inside.all():
            base, part, weight = base[:, inside], part[:, inside], weight[inside]
        weight = weight * (gain / self.voxel)
        low = base.min(1)
        dims = base.max(1) + 2 - low
        flat = ((base[0] - low[0]) * dims[1] + base[1] - low[1]) * dims[2] + base[2] - low[2]
        shares = tuple(zip(1 - part, part, strict=True))  # of the lower and the upper neighbour along each axis
        steps, weights = np.empty((8, len(flat)), np.int64), np.empty((8, len(flat)))
        for k in (0, 1):
            wk = weight * shares[0][k]
            for j in (0, 1):
                wj = wk * shares[1][j]
                for i in (0, 1):
                    corner = 4 * k + 2 * j + i
                    np.multiply(wj, shares[2][i], out=weights[corner])
                    np.add(flat, (k * dims[1] + j) * dims[2] + i, out=steps[corner])
        total = np.bincount(steps.ravel(), weights.ravel(), minlength=int(dims.prod()))
        cover = np.minimum(total, 1).astype(np.float32).reshape(dims)
        return tuple(slice(int(a), int(a + d)) for a, d in zip(low, dims, strict=True)), cover

    def thin_tubes(self, start, stop, r0, r1, bow=None):
        """Many tapering tubes at once, (n, 3) start and stop, (n,) radii; `bow` (n, 3) bends them sideways."""
        start, stop = np.atleast_2d(start).astype(float), np.atleast_2d(stop).astype(float)
        r0, r1 = r0 * np.ones(len(start)), r1 * np.ones(len(start))
        along = stop - start
        length = np.linalg.norm(along, axis=1)
        count = np.maximum(np.ceil(length / (0.7 * min(self.h, self.dz))), 1).astype(int)
        tube = np.repeat(np.arange(len(start)), count)
        t = (np.arange(len(tube)) - np.repeat(np.cumsum(count) - count, count) + 0.5) / count[tube]
        radius = r0[tube] + (r1 - r0)[tube] * t
        centre = start.T.take(tube, 1) + t * along.T.take(tube, 1)  # (3, discs)
        if bow is not None:
            centre += np.sin(np.pi * t) * bow.T.take(tube, 1)
        per_disc = np.maximum(np.round(np.pi * radius**2 / (0.65 * self.h) ** 2), 1).astype(int)
        disc = np.repeat(np.arange(len(tube)), per_disc)
        q = np.arange(len(disc)) - np.repeat(np.cumsum(per_disc) - per_disc, per_disc)
        points = centre.take(disc, 1)
        wide = np.flatnonzero(per_disc[disc] > 1)  # a disc of one point has it in the middle
        q, disc_of = q[wide], disc[wide]
        rho = radius[disc_of] * np.sqrt((q + 0.5) / per_disc[disc_of])
        angle = q * 2.399963 + disc_of * 1.3
        owner = tube[disc_of]
        u, v = (vectors.T.take(owner, 1) for vectors in _frames(along))
        points[:, wide] = points[:, wide] + rho * np.cos(angle) * u + rho * np.sin(angle) * v
        volumes = np.pi * radius**2 * (length / count)[tube] / per_disc
        return self.splat(points.T, volumes[disc])

    def thin_balls(self, centres: np.ndarray, radii: np.ndarray):
        """Many balls at once."""
        volume = 4 / 3 * np.pi * radii**3
        count = np.maximum(np.ceil(volume / self.voxel * 6), 4).astype(int)
        ball = np.repeat(np.arange(len(centres)), count)
        q = np.arange(len(ball)) - np.repeat(np.cumsum(count) - count, count)
        share = (q + 0.5) / count[ball]
        polar = 1 - 2 * ((q * 0.6180339887) % 1.0)
        angle = q * 2.399963 * 1.7
        ring = np.sqrt(1 - polar**2)
        unit = np.stack([ring * np.cos(angle), ring * np.sin(angle), polar]) * np.cbrt(share)
        return self.splat((centres.T.take(ball, 1) + radii[ball] * unit).T, (volume / count)[ball])


# ------------------------------------------------------------------------------------------------- normal anatomy


def draw_torso(s: Scene) -> None:
    """Subcutaneous fat, muscle, chest wall; breasts; the contents of the cage start as fat."""
    x, y, z = s.grid
    fat = s.patient.fat
    half_width, half_depth = _along(z, TORSO_Z, TORSO_WIDTH) + fat, _along(z, TORSO_Z, TORSO_DEPTH) + fat
    level = y - _along(z, TORSO_Z, TORSO_CENTRE)
    level *= level
    level *= half_depth**-2.0
    level += np.abs(x) ** 2.8 * half_width**-2.8
    np.subtract(1, level, out=level)
    level *= half_depth * (0.42 / s.h)  # now the depth below the skin, in voxels
    np.clip(level + 0.5, 0, 1, out=s.hu)
    s.hu *= FAT - AIR
    s.hu += AIR
    if s.patient.female:
        for side in (-1, 1):
            front = -float(np.interp(15, TORSO_Z, TORSO_DEPTH)) - fat * 0.6
            s.paint(s.ellipsoid((side * 84, front + 24, 5), (66, 30 + fat * 0.5, 58)), FAT)
            s.paint(s.ellipsoid((side * 84, front + 6, 2), (32, 9 + fat * 0.3, 30)), -10)
    level -= fat / s.h - 0.5
    cover = np.clip(level, 0, 1)
    s.hu += cover * (MUSCLE - s.hu)
    # fat between the muscle layers, so that the chest wall is not one grey ring
    level -= 13 / s.h
    np.abs(level, out=level)
    np.subtract(1, level, out=level)
    np.clip(level, 0, 1, out=level)
    level *= 100 * min(1.0, 2.5 / s.h)
    s.hu -= level


def draw_cage_contents(s: Scene) -> None:
    """Fat inside the cage; under the diaphragm liver, stomach with its air, spleen."""
    x, y, z = s.grid
    s.cage = cage_depth(x, y, z)
    inside = np.clip(s.cage * (1 / s.h) + 0.5, 0, 1)
    s.hu += inside * (FAT + 5 - s.hu)
    dome = dome_height(s.patient, x, y)
    top = int(np.searchsorted(s.z, float(dome.max()) + s.dz))  # nothing of this lies above the domes
    low = (slice(0, max(top, 1)), slice(None), slice(None))
    z, inside = z[low[0]], inside[low]
    below = inside * np.clip((dome - z) * (0.8 / s.h) + 0.5, 0, 1)
    s.paint((low, below), SOFT)
    below *= np.clip((dome - 4 - z) * (0.8 / s.h) + 0.5, 0, 1)
    s.paint((low, below), FAT)
    liver = below * np.clip((12 - 0.7 * y - 0.15 * np.abs(z + 150) - x) / s.h + 0.5, 0, 1).astype(np.float32)
    s.paint((low, liver), LIVER + (45 if s.patient.enhanced else 0))

    def under(piece):
        if piece is None or piece[0][0].start >= low[0].stop:
            return None
        box, cover = piece
        box = (slice(box[0].start, min(box[0].stop, low[0].stop)), *box[1:])
        return box, cover[: box[0].stop - box[0].start] * below[box]

    left = s.patient.dome[1]
    s.paint(under(s.ellipsoid((88, 38, left - 48), (30, 40, 44))), 50 + (60 if s.patient.enhanced else 0))
    s.paint(under(s.ellipsoid((58, -18, left - 42), (42, 40, 36))), SOFT)
    stomach = under(s.ellipsoid((58, -18, left - 42), (38, 36, 32)))
    s.paint(stomach, 20)
    if stomach is not None:  # the patient lies on the back: air in front
        box, cover = stomach
        air = np.clip((-30 - 2 * s.patient.wobble[0] - s.local(box)[1]) / s.h + 0.5, 0, 1)
        s.paint((box, cover * air.astype(np.float32)), AIR)


def draw_skeleton(s: Scene) -> None:
    """Spine, ribs that slope forward and down, sternum, clavicles, shoulder blades."""
    marrow = MARROW * s.patient.marrow
    nodes = np.stack([np.zeros(len(SPINE_Z)), SPINE_Y, SPINE_Z], axis=1)
    span = (float(s.z[0]) - s.dz, float(s.z[-1]) + s.dz)
    s.paint(s.column(nodes + (0, 29, 0), 24, 14, span), MUSCLE)
    s.paint(s.column(nodes + (0, 27, 0), 15, 15, span), 380)
    s.paint(s.column(nodes + (0, 26, 0), 9, 8, span), 20)
    body = s.column(nodes, 18, 14.5, span)
    s.paint(body, CORTEX)
    s.paint(s.column(nodes, 15.8, 12.3, span), marrow)
    if body is not None:
        box, cover = body
        phase = (s.z[box[0]] / RIB_PITCH) % 1.0
        disc = np.clip((0.12 - np.abs(phase - 0.5)) * RIB_PITCH / s.dz + 0.5, 0, 1).astype(np.float32)
        s.paint((box, cover * disc[:, None, None]), 85)
    z = np.arange(-9, 7) * RIB_PITCH  # spinous and transverse processes, one set per vertebra
    y, zero = np.interp(z, SPINE_Z, SPINE_Y), np.zeros(len(z))
    start, stop = [np.stack([zero, y + 36, z], 1)], [np.stack([zero, y + 60, z - 12], 1)]
    for side in (-1, 1):
        start.append(np.stack([zero + side * 14, y + 22, z], 1))
        stop.append(np.stack([zero + side * 36, y + 34, z + 2], 1))
    s.paint(s.thin_tubes(np.concatenate(start), np.concatenate(stop), 5.0, 4.5), 380)
    draw_ribs(s)
    levels = np.array((-78.0, -40.0, 10.0, 60.0, 92.0))
    front = np.interp(levels, CAGE_Z, CAGE_CENTRE) - np.interp(levels, CAGE_Z, CAGE_DEPTH) - 6
    nodes = np.stack([np.zeros(5), front, levels], axis=1)
    s.paint(s.column(nodes, (8, 16, 17, 21, 25), 6), CORTEX - 150)
    s.paint(s.column(nodes, (6, 13.5, 14.5, 18.5, 22), 3.8), marrow - 40)
    for side in (-1, 1):
        clavicle = np.array(
            [(side * 26, -52, 98), (side * 60, -56, 118), (side * 105, -30, 142), (side * 140, -5, 150)]
        )
        s.paint(s.tube(_smooth(clavicle, 1), 6.5), 450)
        a = np.array((side * 0.82, -0.57, 0.0))
        plate = np.stack([a * 34, np.cross(a, (0, 0, 1.0)) * 3.6, np.array((0, 0, 58.0))], axis=1)
        s.paint(s.ellipsoid((side * 104, 66, 62), matrix=plate), 480)
        s.paint(s.tube(np.array([(side * 96, 80, 104), (side * 138, 42, 122)]), 6), 400)


def draw_ribs(s: Scene) -> None:
    """Each rib runs around the cage and drops towards the front, where it turns into cartilage."""
    where = np.flatnonzero((s.cage > -13) & (s.cage < 1))
    plane = s.shape[1] * s.shape[2]
    x, y, z = s.x.ravel()[where % plane], s.y.ravel()[where % plane], s.z[where // plane]
    turn = np.arctan2(np.abs(x), y - 10) / np.pi  # 0 at the spine, 1 at the sternum
    height = z + 84 * turn**1.15
    number = np.round(height / RIB_PITCH)
    across = (height - number * RIB_PITCH) / 6.8
    through = (s.cage.ravel()[where] + 6.5) / 4.6
    square = across**2 + through**2
    cover = np.clip(0.5 - (square - 1) * (2.6 / s.h), 0, 1)
    cover *= (number * RIB_PITCH < 124) & (number * RIB_PITCH > np.where(turn > 0.65, -60, -190))
    cover *= (np.abs(x) > 20) | (y < 0)
    value = np.clip(230 + (CORTEX - 230) * np.clip((square - 0.45) * 3, 0, 1), 0, CORTEX)
    value = np.where(turn > 0.80, 110, value)
    flat = s.hu.reshape(-1)
    flat[where] += (cover * (value - flat[where])).astype(np.float32)


@dataclass(frozen=True)
class Tree:
    """Branches as arrays: start and stop (n, 3), level (n,), bow (n, 3)."""

    start: np.ndarray
    stop: np.ndarray
    level: np.ndarray
    bow: np.ndarray

    @staticmethod
    def grow(root: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> Tree:
        """Binary tree from the hilum that reaches 2**k target points: each branch heads for the middle of its share."""
        depth = int(np.log2(len(targets)))
        groups, parent = targets[None, : 2**depth], root[None]
        starts, stops, levels = [], [], []
        for level in range(depth):
            reach = 0.32 if level == 0 else 0.5
            node = parent + reach * (groups.mean(1) - parent)
            starts.append(parent), stops.append(node), levels.append(np.full(len(node), level))
            axis = groups.var(1).argmax(1)
            order = np.take_along_axis(groups, axis[:, None, None], axis=2)[..., 0].argsort(1)
            groups = np.take_along_axis(groups, order[..., None], axis=1)
            groups = groups.reshape(2 ** (level + 1), -1, 3)
            parent = np.repeat(node, 2, axis=0)
        starts.append(parent), stops.append(groups[:, 0]), levels.append(np.full(len(parent), depth))
        start, stop, level = np.concatenate(starts), np.concatenate(stops), np.concatenate(levels)
        u, v = _frames(stop - start)
        length = np.linalg.norm(stop - start, axis=1, keepdims=True)
        a, b = rng.normal(0, 0.1, (2, len(start), 1))
        return Tree(start, stop, level, (a * u + b * v) * length)

    def take(self, keep: np.ndarray) -> Tree:
        return Tree(self.start[keep], self.stop[keep], self.level[keep], self.bow[keep])

    def shifted(self, by: np.ndarray) -> Tree:
        return replace(self, start=self.start + by, stop=self.stop + by)

    @staticmethod
    def join(trees: Iterable[Tree]) -> Tree:
        trees = list(trees)
        return Tree(*(np.concatenate([getattr(t, name) for t in trees]) for name in ("start", "stop", "level", "bow")))


def artery_radius(level):
    return 5.8 * 0.79**level


def lumen_radius(level):
    return 4.6 * 0.79**level


def grow_trees(s: Scene, healthy: Patient, rng: np.random.Generator) -> None:
    """Arteries with bronchi beside them, and veins, filling both lungs. Grown in the healthy shape of this body."""
    pool = Pool.fill(healthy, rng)
    arteries, veins = [], []
    for side in (-1, 1):
        here = (pool.points[:, 0] * side > 0) & (pool.depth > 3)
        arteries.append(Tree.grow(HILUM[side] + (0, -4, 4), pool.pick(rng, 128, here)[0], rng))
        veins.append(Tree.grow(np.array((side * 30.0, 2, -14)), pool.pick(rng, 128, here)[0], rng))
    s.arteries, s.veins = Tree.join(arteries), Tree.join(veins)
    beside = artery_radius(s.arteries.level) + lumen_radius(s.arteries.level) + 0.8
    s.bronchi = s.arteries.shifted(np.outer(beside, (0.25, 0.85, 0.35)))


def draw_lung_vessels(s: Scene, twigs: np.random.Generator) -> None:
    """Vessels and fissures into the lung contents."""
    both = Tree.join([s.arteries, s.veins])
    radius = np.concatenate([artery_radius(s.arteries.level), 0.9 * artery_radius(s.veins.level)])
    s.paint(s.thin_tubes(both.start, both.stop, radius, radius * 0.82, both.bow), s.patient.blood_hu, s.air)
    if s.h < 2:  # twigs that a coarser grid would not show
        leaf = both.take(both.level == both.level.max())
        start = np.repeat(leaf.start + 0.7 * (leaf.stop - leaf.start), 5, axis=0)
        heading = np.repeat(leaf.stop - leaf.start, 5, axis=0)
        heading = heading / np.linalg.norm(heading, axis=1, keepdims=True) + 0.7 * twigs.standard_normal(start.shape)
        s.paint(s.thin_tubes(start, start + heading * twigs.uniform(8, 18, (len(start), 1)), 0.75, 0.45), 0, s.air)
    n = int(230 / s.h)
    a, b = np.meshgrid((np.arange(n) + 0.5) / n, (np.arange(n) + 0.5) / n)
    for side in (-1, 1):  # oblique fissures
        x = side * (12 + 120 * a.ravel())
        y = 80 - 160 * b.ravel()
        z = 62 + 4 * s.patient.wobble[1 + side] - 150 * b.ravel() + 10 * np.sin(a.ravel() * 3)
        points = np.stack([x, y, z], axis=1)
        s.paint(s.splat(points, 0.7 * (120 / n) * np.hypot(160, 150) / n), -250, s.air)


def draw_airway(s: Scene, tree: Tree, lumen, wall, mark=None) -> None:
    """Bronchi: wall, then the air in it. lumen and wall in mm, numbers or (n,)."""
    outer = s.thin_tubes(tree.start, tree.stop, lumen + wall, (lumen + wall) * 0.85, tree.bow)
    inner = s.thin_tubes(tree.start, tree.stop, lumen, lumen * 0.85, tree.bow)
    if outer is None or inner is None:
        return
    box, wall_cover = outer
    air = np.zeros_like(wall_cover)
    inner_box, lumen_cover = inner
    common = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, inner_box, strict=True)]
    if all(start < stop for start, stop in common):
        here, there = (
            tuple(slice(start - s.start, stop - s.start) for (start, stop), s in zip(common, of, strict=True))
            for of in (box, inner_box)
        )
        air[here] = lumen_cover[there]
    np.minimum(air, wall_cover, out=air)
    target = s.air[box]
    target += wall_cover * (30 - target) + air * (AIR - 30 + 10)  # together: wall where only the outer tube covers
    if mark is not None:
        s.mark(mark, box, wall_cover > 0.25)


def draw_mediastinum(s: Scene, findings: set[str], rng) -> None:
    """Heart, great vessels, trachea, oesophagus, each over what lies around it."""
    blood = s.patient.blood_hu
    centre, matrix = s.patient.heart
    for side in (-1, 1):  # hilar fat
        s.paint(s.ellipsoid(HILUM[side] + (-side * 8, -4, -4), (16, 16, 26)), FAT)
    s.paint(s.ellipsoid((2, -26, 44), (30, 40, 46)), FAT)
    normal = NODE_STATIONS[:6] + (0, 0, 10)
    s.paint(s.thin_balls(normal, np.full(len(normal), s.patient.node_radius)), SOFT)
    if NODES in findings:
        draw_nodes(s, rng(NODES))
    draw_heart(s, centre, matrix, findings, rng)
    if HERNIA in findings:
        draw_hernia(s, rng(HERNIA))
    s.paint(s.tube(OESOPHAGUS, 6.5), SOFT)
    s.paint(s.tube(OESOPHAGUS[:3], 2.0), -300)
    s.paint(s.column(VENA_CAVA, 8.5), blood)
    trunk = _smooth(np.array([(20, -52, -14), (20, -42, 6), (18, -26, 18)], float), 1)
    s.paint(s.tube(trunk, 13), blood)
    for path, radius in (
        ([(18, -28, 18), (-4, -10, 16), (-26, 2, 12), (-40, 8, 10)], (11, 9.5, 9, 7.5)),  # right pulmonary artery
        ([(18, -28, 20), (30, -8, 26), (42, 10, 20)], (12, 10, 8)),  # left
        ([(-38, 2, -14), (0, 8, -14), (36, 4, -12)], (7, 10, 7)),  # pulmonary veins into the left atrium
        ([(-26, -12, 74), (-10, -30, 84), (28, -38, 96), (40, -34, 108)], (7, 6.5, 6.5, 6)),  # brachiocephalic veins
        ([(-26, -12, 74), (-34, -30, 100), (-44, -34, 112)], (7, 6.5, 6)),
        ([(-6, -22, 60), (-14, -20, 90), (-18, -10, 125)], (6.5, 6, 5)),  # arteries of the arch
        ([(6, -4, 64), (14, -6, 100), (18, -2, 130)], (4.5, 4.2, 4)),
        ([(14, 8, 64), (24, 8, 95), (40, 0, 118)], (5.5, 5, 5)),
    ):
        line = _smooth(np.array(path, float), 1)
        width = np.interp(np.linspace(0, 1, len(line)), np.linspace(0, 1, len(radius)), radius)
        s.paint(s.tube(line, width), blood)
    s.aorta = _smooth(np.concatenate([AORTA, AORTA_RADIUS[:, None]], axis=1), 1)
    s.paint(s.tube(s.aorta[:, :3], s.aorta[:, 3]), blood)
    for wall, value in ((1.8, 20), (0.0, AIR + 5)):
        s.paint(s.column(TRACHEA, 8.2 + wall, 8.8 + wall), value)
        for side in (-1, 1):
            s.paint(s.tube(np.stack([CARINA + (0, 0, 3), HILUM[side] + (0, 2, 2)]), 6.0 + wall), value)
    s.paint(s.ellipsoid((-16, -10, 128), (10, 13, 24)), 95)  # thyroid
    s.paint(s.ellipsoid((15, -10, 128), (10, 13, 24)), 95)


def _heart_path(patient: Patient, angles, along, lift=1.0) -> np.ndarray:
    """Points on the heart's surface: angle around its long axis, position along it (-1 base, 1 apex)."""
    centre, matrix = patient.heart
    along = np.asarray(along, float)
    ring = np.sqrt(1 - along**2)
    unit = np.stack([along, ring * np.cos(angles), ring * np.sin(angles)], axis=1)
    return centre + (lift * unit) @ matrix.T


def coronary_paths(patient: Patient) -> list[np.ndarray]:
    """Left anterior descending, circumflex, right coronary artery, in the fat on the heart's surface."""
    t = np.linspace(0, 1, 14)
    descending = _heart_path(patient, -1.25 + 0.35 * t + np.pi, -0.45 + 1.25 * t, 1.06)
    circumflex = _heart_path(patient, np.pi - 1.25 - 2.2 * t, -0.42 + 0.1 * np.sin(3 * t), 1.06)
    right = _heart_path(patient, np.pi - 0.75 + 2.6 * t, -0.38 + 0.1 * np.sin(3 * t), 1.06)
    return [descending, circumflex, right]


def draw_heart(s: Scene, centre, matrix, findings, rng) -> None:
    def grown(mm, shift=(0, 0, 0)):
        return s.ellipsoid(centre + shift, matrix=matrix * (1 + mm / HEART_RADII))

    blood, enhanced = s.patient.blood_hu, s.patient.enhanced
    s.paint(grown(8, (-1, -2, 0)), FAT)
    s.paint(s.ellipsoid(centre + matrix @ (0.75, 0, 0) + (4, -6, -2), (26, 20, 18)), FAT)  # fat pad at the apex
    if PERICARDIAL in findings:
        r = rng(PERICARDIAL)
        thick = float(r.uniform(8, 18))
        sag = np.array((1.0, 0.35 * thick, -0.2 * thick))  # fluid gathers behind and below
        s.paint(grown(thick + 8, sag), FAT)
        s.paint(grown(thick + 5.5, sag), SOFT)
        s.paint(grown(thick + 4, sag), float(r.uniform(5, 20)), mark=PERICARDIAL)
        s.paint(grown(3.5), FAT + 20)
    else:
        s.paint(grown(5.0, (-1, -1, 0)), -20)  # pericardium, thinner than a voxel
        s.paint(grown(3.8, (-1, -1, 0)), FAT)
    whole = grown(0)
    s.paint(whole, 105 if enhanced else 42)
    if PERICARDIAL in findings and whole is not None:  # the fluid's mask is the shell, not the heart in it
        s.mark("-" + PERICARDIAL, whole[0], whole[1] > 0.25)
    if CARDIOMEGALY in findings and whole is not None:
        s.mark(CARDIOMEGALY, whole[0], whole[1] > 0.5)
    for place, size in CHAMBERS:
        chamber = s.ellipsoid(centre + matrix @ np.array(place), matrix=matrix * np.array(size))
        s.paint(chamber, blood if enhanced else 36)
    groove = coronary_paths(s.patient)
    for path in groove:
        s.paint(s.thin_tubes(path[:-1], path[1:], 5.0, 5.0), FAT)
        s.paint(s.thin_tubes(path[:-1], path[1:], 1.9, 1.6), blood)
    if CORONARY in findings:
        draw_coronary_calcification(s, groove, rng(CORONARY))


# ------------------------------------------------------------------------------------------------------- findings


def draw_mosaic(s: Scene, rng, pool: Pool) -> None:
    """Lobules of air trapping beside lobules of normal or raised attenuation, with straight borders."""
    from scipy.spatial import cKDTree

    seeds, _ = pool.pick(rng, int(rng.integers(170, 300)), np.ones(len(pool.depth)))
    value = np.where(rng.random(len(seeds)) < rng.uniform(0.4, 0.6), rng.uniform(-935, -905), rng.uniform(-775, -730))
    where = np.flatnonzero(s.depth > -s.h)
    plane = s.shape[1] * s.shape[2]
    points = np.stack([s.x.ravel()[where % plane], s.y.ravel()[where % plane], s.z[where // plane]], axis=1)
    nearest = cKDTree(seeds).query(points)[1]
    s.air.reshape(-1)[where] = value[nearest]
    mark = np.zeros(s.shape, bool)
    mark.reshape(-1)[where] = value[nearest] < -850
    s.mark(MOSAIC, (slice(None),) * 3, mark)


def draw_emphysema(s: Scene, rng, pool: Pool) -> None:
    """Holes without walls, most in the upper lobes, and a few bullae under the pleura."""
    n = int(rng.integers(600, 1300))
    upper = 0.10 + 1 / (1 + np.exp(-(pool.points[:, 2] - 10) / 18))
    centres, _ = pool.pick(rng, n, upper)
    centres = centres + rng.normal(0, 3, centres.shape)
    radii = np.clip(rng.lognormal(np.log(5.2), 0.35, len(centres)), 2.5, 12)
    s.paint(s.thin_balls(centres, radii), -978, s.air, EMPHYSEMA)
    centres, _ = pool.pick(rng, int(rng.integers(3, 10)), upper**2 * (pool.depth < 14))
    radii = rng.uniform(8, 18, len(centres))
    for centre, radius in zip(centres, radii, strict=True):
        s.paint(s.ellipsoid(centre, radius + 1.0), -700, s.air)
        s.paint(s.ellipsoid(centre, radius), -985, s.air, EMPHYSEMA)


def draw_septal(s: Scene, rng, pool: Pool) -> None:
    """Thickened walls of the lobules: a net of polygons near the pleura, most at the bases."""
    from scipy.spatial import cKDTree

    seeds, _ = pool.pick(rng, 900, pool.depth < 45)
    reach = float(rng.uniform(20, 30))
    where = np.flatnonzero((s.depth > -s.h) & (s.depth < reach))
    plane = s.shape[1] * s.shape[2]
    points = np.stack([s.x.ravel()[where % plane], s.y.ravel()[where % plane], s.z[where // plane]], axis=1)
    near, index = cKDTree(seeds).query(points, k=2)
    apart = np.linalg.norm(seeds[index[:, 0]] - seeds[index[:, 1]], axis=1) + 1e-6
    to_wall = (near[:, 1] ** 2 - near[:, 0] ** 2) / (2 * apart)
    thick = float(rng.uniform(1.8, 2.6))
    cover = np.clip((thick / 2 - to_wall) / s.h + 0.5, 0, min(1.0, thick / s.h))
    fade = np.clip((reach - s.depth.ravel()[where]) / 10, 0, 1) * np.clip(0.75 - points[:, 2] / 200, 0.3, 1)
    cover *= fade
    flat = s.air.reshape(-1)
    flat[where] += cover * (-60 - flat[where]) + fade * 25  # and a little fluid in the lobules
    mark = np.zeros(s.shape, bool)
    mark.reshape(-1)[where] = cover > 0.15
    s.mark(SEPTAL, (slice(None),) * 3, mark)


def draw_opacity(s: Scene, rng, pool: Pool) -> None:
    """Ground glass: hazy patches through which the vessels stay visible."""
    centres, _ = pool.pick(rng, int(rng.integers(3, 8)), pool.depth > 4)
    for centre in centres:
        piece = s.lump(centre, rng.uniform(17, 38) * rng.uniform(0.75, 1.25, 3), rng, rough=0.45, edge=13)
        if piece is not None:
            s.paint((piece[0], piece[1] * 0.9), float(rng.uniform(-640, -480)), s.air, OPACITY)


def draw_consolidation(s: Scene, rng, pool: Pool) -> None:
    """Airless lung of normal volume, up to the pleura, with the bronchi still holding air."""
    s.bronchograms = []
    for _ in range(int(rng.choice([1, 2], p=[0.7, 0.3]))):
        (centre,), _ = pool.pick(rng, 1, (pool.depth > 12) & (pool.points[:, 2] < 60))
        radii = rng.uniform(27, 42) * rng.uniform(0.85, 1.2, 3)
        s.paint(s.lump(centre, radii, rng, rough=0.3, edge=3), float(rng.uniform(25, 50)), s.air, CONSOLIDATION)
        hilum = HILUM[int(np.sign(centre[0]))]
        away = centre - hilum
        entry = centre - away / np.linalg.norm(away) * radii.min() * 0.9
        ends = centre + rng.normal(0, 0.5, (8, 3)) * radii
        s.bronchograms.append((np.repeat(entry[None], 8, 0), ends))


def draw_bronchograms(s: Scene, rng) -> None:
    for start, stop in s.bronchograms:
        bow = rng.normal(0, 3, start.shape)
        s.paint(s.thin_tubes(start, stop, 2.7, 1.7, bow), AIR + 40, s.air)


def draw_atelectasis(s: Scene, rng, sides: Sequence[int]) -> None:
    """Collapsed lung behind and below (its diaphragm already stands high), and plates of airless lung."""
    x, y, z = s.grid
    for side in sides:
        top = s.patient.dome[0 if side < 0 else 1]
        normal = np.array((-side * rng.uniform(0.25, 0.45), 0.78, -rng.uniform(0.35, 0.55)))
        normal /= np.linalg.norm(normal)
        place = np.array((side * 55, rng.uniform(38, 50), top - 14))
        box = s.box((min(0, side * 140), 0, top - 120), (max(0, side * 140), 100, top + 90))
        if box is not None:
            xx, yy, zz = s.local(box)
            deep = ((xx - place[0]) * normal[0] + (yy - place[1]) * normal[1]) + (zz - place[2]) * normal[2]
            s.paint((box, np.clip(deep / s.h + 0.5, 0, 1).astype(np.float32)), 48, s.air, ATELECTASIS)
        for _ in range(int(rng.integers(1, 4))):
            centre = np.array((side * rng.uniform(55, 95), rng.uniform(-45, 30), top + rng.uniform(6, 34)))
            tilt = np.array((rng.normal(0, 0.3), rng.choice((-1, 1)) * rng.uniform(0.5, 1.1), 1.0))
            tilt /= np.linalg.norm(tilt)
            u, v = _frames(tilt[None])
            thick = rng.uniform(2.2, 3.4)
            plate = np.stack([u[0] * rng.uniform(20, 30), v[0] * rng.uniform(30, 46), tilt * thick], axis=1)
            s.paint(s.ellipsoid(centre, matrix=plate), 30, s.air, ATELECTASIS)


def draw_nodules(s: Scene, rng, pool: Pool) -> None:
    """Solid spheres, 10 to 30 mm across."""
    for i in range(int(rng.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.2, 0.1]))):
        radius = float(rng.uniform(7, 15) if i == 0 else rng.uniform(5, 11))
        radius = min(radius, float(pool.depth.max()) - 2)
        (centre,), _ = pool.pick(rng, 1, pool.depth >= radius + 2)
        s.paint(s.ellipsoid(centre, radius), float(rng.uniform(25, 60)), s.air, NODULE)


def draw_fibrosis(s: Scene, rng, pool: Pool) -> None:
    """Old scarring: apical caps with strands drawn towards the hilum, or a basal band of reticulation and cysts."""
    apical = rng.random() < 0.65
    sides = [(-1,), (1,), (-1, 1)][int(rng.integers(3))]
    for side in sides:
        here = pool.points[:, 0] * side > 0
        if apical:
            focus = np.array((side * rng.uniform(38, 50), rng.uniform(0, 24), rng.uniform(92, 112)))
        else:
            near = here & (pool.points[:, 2] < -60) & (pool.points[:, 1] > 20) & (pool.depth < 12)
            focus, _ = pool.pick(rng, 1, near)
            focus = focus[0] if len(focus) else np.array((side * 80.0, 50, -70))
        away = np.linalg.norm(pool.points - focus, axis=1)
        rim, _ = pool.pick(rng, 40, here & (away < 48) & (pool.depth < 7))
        inner, _ = pool.pick(rng, 40, here & (away < 58) & (pool.depth > 8))
        n = min(len(rim), len(inner))
        if n == 0:
            continue
        for centre in rim[::4]:  # thickened, retracted pleura
            s.paint(s.lump(centre, rng.uniform(6, 11), rng, rough=0.5), 20, s.air, FIBROSIS)
        rim, inner = rim[:n], inner[:n]
        stop = rim + (inner - rim) * rng.uniform(0.5, 1.0, (n, 1))
        s.paint(s.thin_tubes(rim, stop, 2.3, 0.9, rng.normal(0, 2, (n, 3))), 10, s.air, FIBROSIS)
        net, _ = pool.pick(rng, 80, here & (away < 45))
        m = len(net) // 2
        s.paint(s.thin_tubes(net[:m], net[m : 2 * m], 1.1, 0.9), -60, s.air, FIBROSIS)
        cysts, _ = pool.pick(rng, 30, here & (away < 40) & (pool.depth < 14))
        if len(cysts):
            radii = rng.uniform(2.0, 4.5, len(cysts))
            s.paint(s.thin_balls(cysts, radii + 1.3), -150, s.air, FIBROSIS)
            s.paint(s.thin_balls(cysts, radii), -960, s.air)
        long_band = np.stack([focus, HILUM[side] + (side * 12, 0, 12)])
        s.paint(s.thin_tubes(long_band[:1], long_band[1:], 3.5, 1.5, rng.normal(0, 5, (1, 3))), 25, s.air, FIBROSIS)


def draw_effusion(s: Scene, rng, sides: Sequence[int]) -> None:
    """Free fluid in the patient on the back: a crescent behind the lung, thickest at the base."""
    x, y, z = s.grid
    for side in sides:
        thick, top = float(rng.uniform(20, 60)), float(rng.uniform(10, 85))
        depth = np.clip((top - s.z) / (top + 90), 0, 1) ** 0.8 * thick
        box = s.box((min(0, side * 145), -60, -220), (max(0, side * 145), 100, top))
        if box is None:
            continue
        xx, yy, zz = s.local(box)
        inner = cage_depth(xx, yy, zz, shift=depth[box[0]][:, None, None])
        cover = np.clip(0.5 - (inner - 1.5) / s.h, 0, 1) * np.clip((yy + 10) / 25, 0, 1) * np.clip(side * xx / 6, 0, 1)
        cover *= (depth[box[0]] > 0.5)[:, None, None]
        s.paint((box, cover.astype(np.float32)), float(rng.uniform(2, 18)), s.air, EFFUSION)


def draw_peribronchial(s: Scene, rng) -> None:
    """Walls of the bronchi two to four times as thick as normal, visible further out."""
    tree = s.bronchi.take((s.bronchi.level >= 1) & (s.bronchi.level <= 6))
    wall = float(rng.uniform(2.2, 3.2)) * 0.93 ** (tree.level - 1)
    draw_airway(s, tree, lumen_radius(tree.level), wall, PERIBRONCHIAL)


def draw_bronchiectasis(s: Scene, rng) -> None:
    """Bronchi wider than the artery beside them (signet ring), not tapering, out to the pleura; some end in cysts."""
    for _ in range(int(rng.integers(2, 4))):
        tree = s.bronchi.take(s.bronchi.level >= 3)
        middle = (tree.start + tree.stop) / 2
        focus = middle[rng.choice(np.flatnonzero((tree.level == 5) & (middle[:, 2] < 70)))]
        tree = tree.take(np.linalg.norm(middle - focus, axis=1) < 42)
        lumen = np.where(tree.level >= 6, 3.0, 4.2) * rng.uniform(0.85, 1.5, len(tree.level))
        draw_airway(s, tree, lumen, 1.5, BRONCHIECTASIS)
        ends = tree.stop[tree.level >= 5]
        radii = rng.uniform(4.0, 8.0, len(ends))
        s.paint(s.thin_balls(ends, radii + 1.5), 0, s.air, BRONCHIECTASIS)
        s.paint(s.thin_balls(ends, radii), AIR + 10, s.air)


def draw_nodes(s: Scene, rng) -> None:
    """Enlarged lymph nodes, 12 to 28 mm, at their stations."""
    n = int(rng.integers(7, 13))
    stations = NODE_STATIONS[rng.choice(len(NODE_STATIONS), n, replace=False, p=_station_weights())]
    for station in stations:
        centre = station + rng.normal(0, 2.5, 3)
        radii = rng.uniform(8, 14) * rng.uniform(0.85, 1.2, 3)
        s.paint(s.ellipsoid(centre, radii), float(rng.uniform(35, 55)), mark=NODES)


def _station_weights() -> np.ndarray:
    weight = np.where(np.abs(NODE_STATIONS[:, 0]) > 90, 0.6, 1.4)
    return weight / weight.sum()


def draw_hernia(s: Scene, rng) -> None:
    """Stomach behind the heart, above the diaphragm: wall, fluid, and air in front."""
    radii = np.array((rng.uniform(26, 40), rng.uniform(19, 26), rng.uniform(24, 38)))
    centre = np.array((rng.uniform(0, 16), rng.uniform(30, 36), -62 + rng.normal(0, 6)))
    s.paint(s.ellipsoid(centre, radii + 3), FAT)
    s.paint(s.ellipsoid(centre, radii), 48, mark=HERNIA)
    content = s.ellipsoid(centre, radii - 4)
    s.paint(content, float(rng.uniform(5, 30)))
    if content is not None:
        box, cover = content
        level = centre[1] - radii[1] * rng.uniform(-0.1, 0.35)
        air = np.clip((level - s.local(box)[1]) / s.h + 0.5, 0, 1).astype(np.float32)
        s.paint((box, cover * air), AIR + 20)


def draw_coronary_calcification(s: Scene, paths, rng) -> None:
    """Bright specks and short tracks along the coronary arteries."""
    starts, stops = [], []
    for path in paths:
        for _ in range(int(rng.integers(2, 6))):
            first = int(rng.integers(0, len(path) - 3))
            last = min(first + int(rng.integers(1, 4)), len(path) - 1)
            starts += list(path[first:last])
            stops += list(path[first + 1 : last + 1])
    radii = rng.uniform(1.8, 3.0, len(starts))
    s.paint(s.thin_tubes(np.array(starts), np.array(stops), radii, radii), float(rng.uniform(700, 1100)), mark=CORONARY)


def draw_arterial_calcification(s: Scene, rng) -> None:
    """Plaques on the wall of arch and descending aorta: thin curved plates of 500 to 1200 HU."""
    line, radius = s.aorta[:, :3], s.aorta[:, 3]
    travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    points, volumes = [], []
    for _ in range(int(rng.integers(14, 34))):
        middle = rng.uniform(55, travelled[-1] - 40)
        length, arc, thick = rng.uniform(5, 22), rng.uniform(0.4, 1.7), rng.uniform(1.8, 3.2)
        n = 500
        along = middle + length * (rng.random(n) - 0.5)
        angle = rng.uniform(0, 6.3) + arc * (rng.random(n) - 0.5)
        at = np.stack([np.interp(along, travelled, line[:, k]) for k in range(3)], axis=1)
        ahead = np.stack([np.interp(along + 1, travelled, line[:, k]) for k in range(3)], axis=1)
        u, v = _frames(ahead - at)
        r = (np.interp(along, travelled, radius) + thick * (rng.random(n) - 0.7))[:, None]
        points.append(at + r * (np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * v))
        volumes.append(np.full(n, length * arc * 13 * thick / n))
    piece = s.splat(np.concatenate(points), np.concatenate(volumes))
    s.paint(piece, float(rng.uniform(750, 1150)), mark=ARTERIAL)


def _skin_front(patient: Patient, x: float, z: float) -> float:
    """y of the muscle surface on the chest's front."""
    width, depth = np.interp(z, TORSO_Z, TORSO_WIDTH), np.interp(z, TORSO_Z, TORSO_DEPTH)
    return float(np.interp(z, TORSO_Z, TORSO_CENTRE) - depth * np.sqrt(max(1 - (abs(x) / width) ** 2.8, 0.05)))


def draw_medical_material(s: Scene, rng) -> None:
    """Pacemaker with its lead, port with its catheter, or sternal wires with a valve ring."""

    def line(points, radius, value):
        path = _smooth(np.array(points, float))
        s.paint(s.thin_tubes(path[:-1], path[1:], radius, radius), value, mark=MEDICAL)

    kind = int(rng.choice(3, p=[0.4, 0.3, 0.3]))
    centre, matrix = s.patient.heart
    if kind == 0:
        x, z = 78 * (-1 if rng.random() < 0.15 else 1), float(rng.uniform(55, 72))
        y = _skin_front(s.patient, x, z) - min(4.0, s.patient.fat * 0.3)
        s.paint(s.ellipsoid((x, y, z), (25, 6.0, 22)), METAL, mark=MEDICAL)
        apex = centre + matrix @ (0.55, -0.55, 0.2)
        entry = [(x, y, z + 12), (x * 0.75, y + 14, 104), (x * 0.45, -42, 108), (-8 + 0.1 * x, -30, 90)]
        line([*entry, (-26, -14, 72), (-29, -16, 40), (-29, -16, -5), (-24, -26, -30), apex], 1.7, METAL)
    elif kind == 1:
        x, z = -72.0, float(rng.uniform(48, 70))
        y = _skin_front(s.patient, x, z) - min(6.0, s.patient.fat * 0.4)
        s.paint(s.ellipsoid((x, y, z), (15, 8, 15)), 2100, mark=MEDICAL)
        entry = [(x, y, z + 10), (-62, y + 14, 102), (-44, -38, 110), (-30, -24, 88)]
        line([*entry, (-27, -13, 70), (-29, -16, 30), (-29, -15, 8)], 1.9, 2000)
    else:
        for z in np.linspace(72, -52, int(rng.integers(5, 8))):
            front = np.interp(z, CAGE_Z, CAGE_CENTRE) - np.interp(z, CAGE_Z, CAGE_DEPTH) - 6
            turn = np.linspace(0, 2 * np.pi, 20)
            x = (15 + 6 * (z > 50)) * np.cos(turn)
            ring = np.stack([x, front + 8 * np.sin(turn), z + 2 * np.sin(turn * 2)], axis=1)
            s.paint(s.thin_tubes(ring[:-1], ring[1:], 1.4, 1.4), METAL, mark=MEDICAL)
        turn = np.linspace(0, 2 * np.pi, 24)[:, None]
        u, v = _frames(np.array([(-0.4, -0.4, 0.8)]))
        ring = centre + matrix @ (-0.62, -0.05, 0.1) + 13 * (np.cos(turn) * u + np.sin(turn) * v)
        s.paint(s.thin_tubes(ring[:-1], ring[1:], 2.0, 2.0), 2400, mark=MEDICAL)


# -------------------------------------------------------------------------------------------------------- scanner


def _blur(image: np.ndarray, amount: float, axis: int) -> np.ndarray:
    """Three-tap filter (amount, 1 - 2 amount, amount) along an axis; a negative amount sharpens."""
    out = image * np.float32(1 - 2 * amount)
    ahead = [slice(None)] * 3
    behind = [slice(None)] * 3
    ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
    image = image * np.float32(amount)
    out[tuple(ahead)] += image[tuple(behind)]
    out[tuple(behind)] += image[tuple(ahead)]
    edge = [slice(None)] * 3
    for end in (0, -1):
        edge[axis] = slice(end, None) if end else slice(0, 1)
        out[tuple(edge)] += image[tuple(edge)]
    return out


SLAB = 6  # slices at a time: they stay in the processor's cache


def scan_image(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """Painted HU -> int16 as a scanner gives it: table, kernel on image and noise alike, offset, floor at -1024."""
    table = rng.random() < 0.75
    if table:
        y = float(np.interp(0, TORSO_Z, TORSO_DEPTH)) + s.patient.fat + 16
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
            image = _blur(image, amount, axis)
        image += offset
        np.clip(image, -1024, 3071, out=image)
        scanned[k : k + SLAB] = np.rint(image, out=image)
    return scanned


# -------------------------------------------------------------------------------------------------------- phantom


@dataclass(eq=False)
class Phantom:
    """hu (x, y, z) int16, LPS; spacing (3,) mm; labels (18,) uint8; masks: where each present finding was drawn."""

    hu: np.ndarray
    spacing: tuple[float, float, float]
    labels: np.ndarray
    patient: Patient = field(repr=False)
    _marks: dict = field(repr=False)
    _lung: np.ndarray = field(repr=False)

    @cached_property
    def masks(self) -> dict[str, np.ndarray]:
        """label -> bool array (x, y, z) for every label that is present."""
        masks = {}
        for name, present in zip(ABNORMALITIES, self.labels, strict=True):
            if not present:
                continue
            whole = np.zeros(self._lung.shape, bool)
            for box, where in self._marks.get(name, []):
                whole[box] |= where
            for box, where in self._marks.get("-" + name, []):
                whole[box] &= ~where
            if name in IN_LUNG:
                whole &= self._lung
            masks[name] = whole.transpose(2, 1, 0)
        return masks


def draw_labels(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, 18) numbers whose ranks decide: finding k is present where the number lies below its prevalence.

    Correlated as patients' findings are: vessels age together, fluid and collapse come together, airways too.
    """
    groups = (
        ({ARTERIAL: 0.6, CORONARY: 0.6, CARDIOMEGALY: 0.4, EMPHYSEMA: 0.25, HERNIA: 0.2, MEDICAL: 0.35}),
        ({EFFUSION: 0.6, ATELECTASIS: 0.4, PERICARDIAL: 0.4, SEPTAL: 0.4, CONSOLIDATION: 0.3, CARDIOMEGALY: 0.3}),
        ({OPACITY: 0.4, CONSOLIDATION: 0.4, NODES: 0.25}),
        ({BRONCHIECTASIS: 0.4, PERIBRONCHIAL: 0.5, MOSAIC: 0.3, FIBROSIS: 0.25}),
    )
    loading = np.array([[group.get(name, 0.0) for group in groups] for name in ABNORMALITIES])
    own = np.sqrt(1 - (loading**2).sum(1))
    return rng.standard_normal((n, len(groups))) @ loading.T + own * rng.standard_normal((n, len(ABNORMALITIES)))


def draw_geometry(seed: int, scan: int = 0, reconstruction: int = 0):
    """Demo size: (shape, spacing) in x, y, z; 300 to 420 mm in plane, along z the lungs and a margin."""
    rng = _rng(seed, 2, scan, reconstruction)
    wide, _, tall = Patient.draw(seed, scan).size
    n = int(rng.choice((96, 104, 112, 120, 128)))
    in_plane = float(np.clip(max(rng.uniform(300, 420), 295 * wide) / n, 2.8, 4.2))
    view = 325 * tall + rng.uniform(0, 45)
    dz = float(rng.choice([step for step in (4.0, 4.5, 5.0, 6.0, 7.0) if 48 <= view / step <= 80]))
    return (n, n, round(view / dz)), (round(in_plane, 4), round(in_plane, 4), dz)


def _as_labels(labels, seed: int, scan: int) -> np.ndarray:
    if labels is None:
        bar = [statistics.NormalDist().inv_cdf(PREVALENCE[name]) for name in ABNORMALITIES]
        return (draw_labels(_rng(seed, 4, scan), 1)[0] < bar).astype(np.uint8)
    values = np.asarray(labels)
    if values.shape != (len(ABNORMALITIES),) or not np.isin(values, (0, 1)).all():
        raise ValueError(
            f"found labels of shape {values.shape}, expected {len(ABNORMALITIES)} numbers 0 or 1 in the order of "
            "ABNORMALITIES; pass None to have them drawn"
        )
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
    truth = _as_labels(labels, seed, scan)
    drawn_shape, drawn_spacing = draw_geometry(seed, scan, reconstruction)
    view = np.multiply(drawn_shape, drawn_spacing)
    if shape is None:
        shape = drawn_shape if spacing is None else np.maximum(np.round(view / np.asarray(spacing)), 8).astype(int)
    if spacing is None:
        spacing = drawn_spacing if tuple(shape) == drawn_shape else tuple(view / np.asarray(shape))
    findings = {name for name, present in zip(ABNORMALITIES, truth, strict=True) if present}

    def rng(name: str) -> np.random.Generator:
        return _rng(seed, 100 + ABNORMALITIES.index(name), scan)

    healthy = Patient.draw(seed, scan)
    patient = healthy
    if CARDIOMEGALY in findings:
        patient = replace(patient, cardiothoracic=float(rng(CARDIOMEGALY).uniform(0.57, 0.67)))
    collapsed = _sides(rng(ATELECTASIS))
    if ATELECTASIS in findings:
        lift = float(_rng(seed, 3, scan).uniform(16, 32))
        right, left = patient.dome
        patient = replace(patient, dome=(right + lift * (-1 in collapsed), left + lift * (1 in collapsed)))
    pose_rng = _rng(seed, 5, scan)
    pose = np.append(pose_rng.normal(0, (6, 7, 5)), pose_rng.normal(0, 0.05)) + (0, 0, 28 * patient.size[2], 0)
    scene = Scene(patient, shape, spacing, pose)

    draw_torso(scene)
    draw_cage_contents(scene)
    draw_lungs(scene, healthy, findings, rng, seed, collapsed)
    draw_mediastinum(scene, findings, rng)
    if ARTERIAL in findings:
        draw_arterial_calcification(scene, rng(ARTERIAL))
    draw_skeleton(scene)
    if MEDICAL in findings:
        draw_medical_material(scene, rng(MEDICAL))
    image = scan_image(scene, _rng(seed, 6, scan, reconstruction))
    return Phantom(image.transpose(2, 1, 0), tuple(float(v) for v in spacing), truth, patient, scene.marks, scene.lung)


def _sides(rng: np.random.Generator) -> tuple[int, ...]:
    return ((-1,), (1,), (-1, 1))[int(rng.choice(3, p=[0.4, 0.35, 0.25]))]


def draw_lungs(s: Scene, healthy: Patient, findings: set[str], rng, seed: int, collapsed) -> None:
    """Parenchyma, what is wrong with it, vessels, airways; painted apart and laid into the cavity at the end."""
    patient = s.patient
    s.depth = lung_depth(patient, *s.grid, cage=s.cage)
    cover = np.clip(s.depth * np.float32(1 / s.h) + np.float32(0.5), 0, 1)
    s.lung = cover > 0.4
    s.air = np.empty(s.shape, np.float32)
    s.air[:] = patient.lung_hu + 0.45 * s.y  # gravity: denser behind
    pool = Pool.fill(patient, _rng(seed, 7))
    grow_trees(s, healthy, _rng(seed, 8))
    hazy = {MOSAIC: draw_mosaic, EMPHYSEMA: draw_emphysema, OPACITY: draw_opacity, SEPTAL: draw_septal}
    for name, draw in hazy.items():
        if name in findings:
            draw(s, rng(name), pool)
    draw_lung_vessels(s, _rng(seed, 9))
    if FIBROSIS in findings:
        draw_fibrosis(s, rng(FIBROSIS), pool)
    if CONSOLIDATION in findings:
        draw_consolidation(s, rng(CONSOLIDATION), pool)
    if ATELECTASIS in findings:
        draw_atelectasis(s, rng(ATELECTASIS), collapsed)
    normal = s.bronchi.take(s.bronchi.level <= 4)
    draw_airway(s, normal, lumen_radius(normal.level), 0.5 + 0.1 * lumen_radius(normal.level))
    if PERIBRONCHIAL in findings:
        draw_peribronchial(s, rng(PERIBRONCHIAL))
    if BRONCHIECTASIS in findings:
        draw_bronchiectasis(s, rng(BRONCHIECTASIS))
    if CONSOLIDATION in findings:
        draw_bronchograms(s, rng(CONSOLIDATION))
    if NODULE in findings:
        draw_nodules(s, rng(NODULE), pool)
    if EFFUSION in findings:
        draw_effusion(s, rng(EFFUSION), _sides(rng(EFFUSION)))
    s.hu += cover * (s.air - s.hu)


# --------------------------------------------------------------------------------------------------------- cohort


@dataclass(frozen=True)
class Plan:
    """One file to write: everything is decided before the first voxel, so workers and resumes cannot differ."""

    name: str
    seed: int
    scan: int
    reconstruction: int
    labels: tuple[int, ...]
    fixed: bool
    codes: str  # orientation of the stored axes, version 2
    intercept: int
    circle: bool
    head: bool = False

    @property
    def path(self) -> Path:
        return volume_path(self.name, self.fixed)

    @property
    def geometry(self):
        """(shape, spacing) in x, y, z."""
        if self.head:
            return (72, 88, 44), (2.6, 2.6, 5.0)
        return draw_geometry(self.seed, self.scan, self.reconstruction)


def plan_split(split: str, n: int, seed: int) -> list[Plan]:
    """n chest volumes and one head CT. Findings are spread so that each label's rate is PREVALENCE as closely as n
    scans allow; one volume in five is version 1."""
    rng = _rng(seed, 20, ("train", "valid").index(split))
    groups: list[tuple[int, int, int]] = []  # (patient, scan, reconstruction)
    patient = 0
    while len(groups) < n:
        patient += 1
        u, room = rng.random(), n - len(groups)
        if room >= 2 and (u < 0.15 or (patient == 1 and n >= 10)):
            groups += [(patient, 0, 0), (patient, 0, 1)]  # two reconstructions of one scan
        elif room >= 2 and u < 0.20:
            groups += [(patient, 0, 0), (patient, 1, 0)]  # two scans
        else:
            groups += [(patient, 0, 0)]
    scans = sorted({(p, s) for p, s, _ in groups})
    ranks = draw_labels(rng, len(scans)).argsort(0).argsort(0)
    bar = [PREVALENCE[name] * len(scans) for name in ABNORMALITIES]
    present = ranks + rng.random(len(ABNORMALITIES)) < bar  # a share of one scan is rounded up or down by chance
    labels = {scan: tuple(int(v) for v in row) for scan, row in zip(scans, present, strict=True)}
    seeds = rng.integers(1 << 48, size=patient + 2)
    version_1 = rng.permutation(n) < max(n // 5, n > 1)
    plans = []
    for (p, scan, reconstruction), raw in zip(groups, version_1, strict=True):
        intercept = int(rng.choice((-1024, -8192), p=(0.5, 0.5)))
        plans.append(
            Plan(
                name=f"{split}_{p}_{'ab'[scan]}_{reconstruction + 1}.nii.gz",
                seed=int(seeds[p]),
                scan=scan,
                reconstruction=reconstruction,
                labels=labels[p, scan],
                fixed=not raw,
                codes=str(rng.choice(("LPS", "RAS", "LAS", "LPI", "RPS"), p=(0.6, 0.12, 0.1, 0.1, 0.08))),
                intercept=intercept,
                circle=bool(rng.random() < 0.4),
            )
        )
    head = f"{split}_{patient + 1}_a_1.nii.gz"
    plans.append(Plan(head, int(seeds[patient + 1]), 0, 0, (0,) * len(ABNORMALITIES), True, "LPS", -1024, False, True))
    return plans


def head_image(shape, seed: int) -> np.ndarray:
    """A skull with its brain, (x, y, z) int16: what the no-chest lists are there to keep out."""
    x, y, z = np.meshgrid(*(np.linspace(-1.15, 1.15, n) for n in shape), indexing="ij")
    radius = np.sqrt((x / 0.85) ** 2 + y**2 + (z * 0.9) ** 2)
    image = np.select([radius < 0.85, radius < 0.93, radius < 1], [35.0, 1100.0, 20.0], AIR)
    image += _rng(seed, 6).normal(0, 8, shape)
    return np.clip(image, -1024, 3071).astype(np.int16)


def write_volume(data_dir: Path, plan: Plan) -> None:
    """One .nii.gz in the hub's layout, by way of a temporary name. The bytes depend on the plan (and on whether isal
    compresses, which changes no voxel)."""
    import nibabel

    shape, spacing = plan.geometry
    if plan.head:
        hu = head_image(shape, plan.seed)
    else:
        hu = make_phantom(plan.seed, plan.labels, spacing, shape, scan=plan.scan, reconstruction=plan.reconstruction).hu
    if plan.circle:  # outside the reconstruction circle a scanner stores 0
        across = [(np.arange(n) - (n - 1) / 2) / (n / 2) for n in shape[:2]]
        hu[np.hypot(across[0][:, None], across[1]) > 1] = plan.intercept
    header = nibabel.Nifti1Header()
    if plan.fixed:
        step = np.array((-1, -1, 1)) * spacing  # NIfTI's world axes point right, anterior, superior
        affine = np.diag([*step, 1.0])
        affine[:3, 3] = -step * (np.array(shape) - 1) / 2
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("LPS"), nibabel.orientations.axcodes2ornt(plan.codes)
        )
        voxels = nibabel.orientations.apply_orientation(hu, turn)
        affine = affine @ nibabel.orientations.inv_ornt_aff(turn, shape)
        header.set_data_shape(voxels.shape)
        header.set_data_dtype(np.int16)
        header.set_zooms(np.sqrt((affine[:3, :3] ** 2).sum(0)))
        header.set_sform(affine, 1)
        header.set_qform(affine, 1)
        header.set_xyzt_units("mm")
        header["scl_slope"], header["scl_inter"] = 1, 0
    else:  # version 1: as stored by the scanner, and a header that knows nothing
        voxels = hu - np.int16(plan.intercept)
        header.set_data_shape(voxels.shape)
        header.set_data_dtype(np.int16)
        header["pixdim"] = 1
    header["vox_offset"] = 352
    raw = header.binaryblock + bytes(4) + voxels.tobytes(order="F")
    packed = igzip.compress(raw, 1, mtime=0) if igzip is not None else gzip.compress(raw, 1, mtime=0)
    _write(data_dir / plan.path, packed)


def is_phantom_cohort(data_dir: str | os.PathLike) -> bool:
    """Whether a cohort is one of this file's: it carries the manifest."""
    return (Path(data_dir) / MANIFEST).is_file()


def _write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _write_tables(data_dir: Path, split: str, plans: list[Plan]) -> None:
    """Labels, metadata and no-chest list of one split, as the hub has them."""
    labels = ["VolumeName," + ",".join(ABNORMALITIES)]
    columns = "VolumeName,Manufacturer,SliceThickness,PatientSex,PatientAge,RescaleIntercept,RescaleSlope,"
    metadata = [columns + "XYSpacing,ZSpacing,NumberofSlices,Rows,Columns"]
    makers = ("Siemens Healthineers", "Philips", "PNMS")
    for plan in plans:
        labels.append(",".join([plan.name, *map(str, plan.labels)]))
        (nx, ny, nz), (sx, sy, sz) = plan.geometry
        patient = Patient.draw(plan.seed, plan.scan)
        fields = (
            plan.name,
            makers[plan.seed % 3],
            sz,
            "F" if patient.female else "M",
            f"{patient.age:03d}Y",
            plan.intercept,
            1,
            f'"[{sx}, {sy}]"',
            sz,
            nz,
            ny,
            nx,
        )
        metadata.append(",".join(map(str, fields)))
    _write(data_dir / labels_path(split), "\n".join(labels) + "\n")
    _write(data_dir / metadata_path(split), "\n".join(metadata) + "\n")
    _write(data_dir / no_chest_path(split), "".join(p.name + "\n" for p in plans if p.head))


def _check_manifest(data_dir: Path, wanted: dict) -> bool:
    """True where this very cohort is complete; ValueError where the folder holds something else."""
    manifest = data_dir / MANIFEST
    if data_dir.exists() and not data_dir.is_dir():
        raise ValueError(f"found a file at {data_dir}, expected a folder or nothing; choose another --data-dir")
    if not manifest.exists():
        if (data_dir / "dataset").exists():
            raise ValueError(
                f"found a dataset folder without {MANIFEST} in {data_dir}, expected an empty folder or a phantom "
                "cohort; phantoms would overwrite its tables: choose another --data-dir"
            )
        return False
    try:
        found = json.loads(manifest.read_text())
        parameters = {key: found.get(key) for key in wanted}
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"found an unreadable {manifest} ({error}), expected JSON; delete the folder") from error
    if parameters != wanted:
        raise ValueError(
            f"found a phantom cohort with {_spell(parameters)} in {data_dir}, expected {_spell(wanted)}; "
            "choose another --data-dir, or delete the folder to make it anew"
        )
    return bool(found.get("complete"))


def _spell(parameters: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in parameters.items())


def write_phantom_cohort(
    data_dir: str | os.PathLike,
    n_train: int,
    n_valid: int,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write n_train + n_valid chest volumes with labels and metadata in the hub's layout; returns data_dir.

    A finished cohort with the same parameters is used as it is; an interrupted one is continued; another one in the
    same folder is a ValueError. The voxels depend on the parameters only, not on `workers` (processes, default: all).
    """
    data_dir = Path(data_dir)
    if n_train < 1 or n_valid < 1 or seed < 0:
        raise ValueError(f"found train {n_train}, valid {n_valid}, seed {seed}, expected at least 1, 1 and 0")
    wanted = {"version": PHANTOM_VERSION, "train": int(n_train), "valid": int(n_valid), "seed": int(seed)}
    if _check_manifest(data_dir, wanted):
        return data_dir
    manifest = {**wanted, "complete": False, "note": SYNTHETIC_NOTE}
    _write(data_dir / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    plans = {split: plan_split(split, n, seed) for split, n in (("train", n_train), ("valid", n_valid))}
    for split, of_split in plans.items():
        _write_tables(data_dir, split, of_split)
    missing = [plan for of_split in plans.values() for plan in of_split if not (data_dir / plan.path).exists()]
    _write_all(data_dir, missing, workers or os.cpu_count() or 1, progress)
    _write(data_dir / MANIFEST, json.dumps({**manifest, "complete": True}, indent=1) + "\n")
    return data_dir


def _write_all(data_dir: Path, plans: list[Plan], workers: int, progress: bool) -> None:
    from tqdm import tqdm

    workers = max(1, min(workers, len(plans)))
    with contextlib.ExitStack() as stack:
        if workers == 1:
            done = map(write_volume, [data_dir] * len(plans), plans)
        else:
            # A forked worker starts at once and never touches torch; elsewhere each imports this file afresh.
            method = "fork" if sys.platform == "linux" else "spawn"
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method))
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            done = pool.map(write_volume, [data_dir] * len(plans), plans)
        for _ in tqdm(done, total=len(plans), desc="phantoms", unit="volume", disable=not progress, mininterval=0.5):
            pass


# -------------------------------------------------------------------------------------------------------- montage

LUNG_WINDOW, NARROW_WINDOW, SOFT_WINDOW, BONE_WINDOW = (-600, 1500), (-750, 700), (40, 400), (500, 2400)
VIEWS = {  # finding -> (window, thickness in mm of a maximum projection, seed of the patient shown)
    MEDICAL: (BONE_WINDOW, 120, 24),
    ARTERIAL: (SOFT_WINDOW, 15, 19),
    CARDIOMEGALY: (SOFT_WINDOW, 0, 13),
    PERICARDIAL: (SOFT_WINDOW, 0, 14),
    CORONARY: (SOFT_WINDOW, 20, 31),
    HERNIA: (SOFT_WINDOW, 0, 16),
    NODES: (SOFT_WINDOW, 0, 17),
    EMPHYSEMA: (NARROW_WINDOW, 0, 25),
    ATELECTASIS: (LUNG_WINDOW, 0, 19),
    NODULE: (LUNG_WINDOW, 0, 20),
    OPACITY: (LUNG_WINDOW, 0, 21),
    FIBROSIS: (LUNG_WINDOW, 0, 22),
    EFFUSION: (SOFT_WINDOW, 0, 23),
    MOSAIC: (LUNG_WINDOW, 0, 24),
    PERIBRONCHIAL: (LUNG_WINDOW, 0, 25),
    CONSOLIDATION: (LUNG_WINDOW, 0, 26),
    BRONCHIECTASIS: (LUNG_WINDOW, 0, 27),
    SEPTAL: (LUNG_WINDOW, 0, 28),
}

CORONAL = {MEDICAL}
MIDDLE = {PERICARDIAL, ATELECTASIS, SEPTAL}  # shown at the middle of the finding, not where it is largest


def draw_montage(path: Path, progress: bool = True, spacing: Sequence[float] = (1.5, 1.5, 2.0)) -> None:
    """PNG of the 18 findings, each beside the same slice of the same patient without it, and a normal chest.

    Radiological convention: the patient's right is on the left, anterior up.
    """
    import matplotlib

    matplotlib.use("Agg")
    from io import BytesIO

    from matplotlib import pyplot
    from PIL import Image
    from tqdm import tqdm

    shape = tuple(round(mm / step) for mm, step in zip((360, 276, 336), spacing, strict=True))
    figure, axes = pyplot.subplots(5, 8, figsize=(17, 9.3), facecolor="black")
    figure.subplots_adjust(left=0.003, right=0.997, bottom=0.03, top=0.975, wspace=0.02, hspace=0.13)
    none = np.zeros(len(ABNORMALITIES), int)

    def show(panel, image, window, title, coronal=False):
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
        image = image[:, ::-1] if coronal else image  # z points up
        panel.imshow(image.T, cmap="gray", vmin=low, vmax=high, aspect=spacing[2] / spacing[0] if coronal else 1)
        panel.set_title(title, color="white", fontsize=9, pad=3)

    for panel in axes.ravel():
        panel.axis("off")
    for k, name in enumerate(tqdm(ABNORMALITIES, desc="montage", unit="finding", disable=not progress)):
        window, thickness, seed = VIEWS[name]
        only = none.copy()
        only[k] = 1
        without = make_phantom(seed, none, spacing, shape).hu
        shown = make_phantom(seed, only, spacing, shape)
        axis = 1 if name in CORONAL else 2
        half = int(thickness / spacing[axis] / 2)
        area = np.convolve(shown.masks[name].sum((0, 3 - axis)), np.ones(2 * half + 1), "same")
        at = int(np.searchsorted(area.cumsum(), area.sum() / 2)) if name in MIDDLE else int(area.argmax())
        pair = axes[k // 4, 2 * (k % 4) : 2 * (k % 4) + 2]
        for panel, hu, title in ((pair[0], without, "without"), (pair[1], shown.hu, name)):
            slab = hu.take(range(max(at - half, 0), min(at + half + 1, hu.shape[axis])), axis)
            show(panel, slab.max(axis), window, title, axis == 1)
    normal = make_phantom(29, none, spacing, shape).hu
    for panel, window in zip(axes[4, 4:6], (LUNG_WINDOW, SOFT_WINDOW), strict=True):
        show(panel, normal[:, :, round(0.46 * shape[2])], window, "No finding")
    show(axes[4, 6], normal[:, shape[1] // 2], LUNG_WINDOW, "No finding, coronal", True)
    legend = (
        "Synthetic phantoms.\nEach pair: the same patient\nand slice without and with\nthe finding.\n"
        "Right side of the patient\non the left, front up."
    )
    centred = {"ha": "center", "va": "center", "transform": axes[4, 7].transAxes}
    axes[4, 7].text(0.5, 0.5, legend, color="white", fontsize=10, **centred)
    figure.text(0.5, 0.008, SYNTHETIC_NOTE, color="white", ha="center", fontsize=11)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110, facecolor="black")
    pyplot.close(figure)
    picture = Image.open(buffer).convert("L").quantize(64)
    packed = BytesIO()
    picture.save(packed, "PNG", optimize=True)
    _write(path, packed.getvalue())


# --------------------------------------------------------------------------------------------------------- script


def run(options: argparse.Namespace) -> int:
    """`python -m ctclip.phantoms`: a cohort, a montage or both."""
    try:
        if options.data_dir is not None:
            write_phantom_cohort(options.data_dir, options.train, options.valid, options.seed, options.workers)
            print(f"{options.data_dir}: {options.train} training and {options.valid} validation phantoms")
        if options.montage is not None:
            draw_montage(options.montage)
            print(f"{options.montage}: the 18 findings")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues where this one ended", file=sys.stderr)
        return 1
    print(SYNTHETIC_NOTE)
    return 0
