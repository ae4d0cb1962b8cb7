"""One body in millimetres: what distinguishes a patient from another, and the shapes that follow from it.

Coordinates: patient millimetres, x to the left, y to posterior, z to superior (LPS); (0, 0, 0) lies between the lungs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

# Hounsfield units
AIR, FAT, MUSCLE, SOFT, LIVER, MARROW, CORTEX = -1000, -100, 50, 40, 58, 190, 650

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


class Purpose(IntEnum):
    """What a stream of random numbers is for. The numbers are part of PHANTOM_VERSION."""

    BODY, CONTRAST, GEOMETRY, DIAPHRAGM, LABELS, POSE, NOISE, LUNG_SITES, TREES, SMALL_VESSELS = range(10)
    SPLIT = 20
    FINDING = 100  # and the finding's index


def random_stream(seed: int, *purpose: int) -> np.random.Generator:
    """Independent stream per purpose (a `Purpose`, then scan, reconstruction): a finding changes nothing else."""
    return np.random.Generator(np.random.SFC64([int(seed), *map(int, purpose)]))


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
        rng = random_stream(seed, Purpose.BODY)
        female = bool(rng.random() < 0.45)
        scale = (0.93 if female else 1.0) + 0.045 * rng.standard_normal()
        contrast = random_stream(seed, Purpose.CONTRAST, scan)  # contrast belongs to the scan, not to the body
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


def interpolate(at: np.ndarray | float, nodes: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """np.interp in the precision of `at`: a stray float64 doubles the time of everything painted after it."""
    return np.interp(np.asarray(at), nodes, values).astype(getattr(at, "dtype", float))


def torso_outline(z: np.ndarray | float) -> tuple[np.ndarray, ...]:
    """(half-width, half-depth, centre y) of the muscles' outer surface at z."""
    return tuple(interpolate(z, TORSO_Z, values) for values in (TORSO_WIDTH, TORSO_DEPTH, TORSO_CENTRE))


def muscle_front(x: float, z: float) -> float:
    """y of the muscle surface on the chest's front."""
    width, depth, centre = torso_outline(z)
    return float(centre - depth * np.sqrt(np.maximum(1 - (abs(x) / width) ** 2.8, 0.05)))


def sternum_y(z: np.ndarray | float) -> np.ndarray:
    return interpolate(z, CAGE_Z, CAGE_CENTRE) - interpolate(z, CAGE_Z, CAGE_DEPTH) - 6


def dome_height(patient: Patient, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """z of the diaphragm over (x, y): two domes with deep posterior sulci."""
    side = np.where(x < 0, -62.0, 62.0)
    top = interpolate(x, (-25, 25), patient.dome)
    lateral = ((x - side) / 72) ** 2 * np.where(np.abs(x) > 62, 46.0, 12.0)
    return (top - lateral - ((y + 12) / 82) ** 2 * np.where(y > -12, 70.0, 26.0)).astype(x.dtype)


def cage_depth(x: np.ndarray, y: np.ndarray, z: np.ndarray, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """About how many mm a point lies inside the rib cage (negative outside); `shift` moves the cage forward."""
    half_width, half_depth, centre = (interpolate(z, CAGE_Z, nodes) for nodes in (CAGE_WIDTH, CAGE_DEPTH, CAGE_CENTRE))
    outside = y - (centre - shift)
    outside *= outside
    outside *= half_depth**-2.0
    outside += np.abs(x) ** 2.5 * half_width**-2.5
    np.subtract(1.0, outside, out=outside)
    outside *= 0.45 * half_depth
    if np.max(z) > CAGE_Z[-1]:
        outside = np.minimum(outside, (CAGE_Z[-1] - z) * 0.8)
    return outside


def lung_depth(patient: Patient, x: np.ndarray, y: np.ndarray, z: np.ndarray, cage: np.ndarray) -> np.ndarray:
    """About how many mm a point lies inside a lung: within the cage (`cage_depth` of the same points), above the
    diaphragm, beside the mediastinum."""
    depth = np.minimum(cage, (z - dome_height(patient, x, y)) * 0.8)
    midline = interpolate(y, (-90, -60, -40, -12, 12, 34, 48, 90), (3, 4, 9, 17, 19, 20, 22, 23))
    bulge = interpolate(z, (-60, 20, 60, 95, 120), (0, 3, 5, 8, 7))
    np.minimum(depth, np.abs(x - 2) - midline - bulge, out=depth)
    return depth


@dataclass(frozen=True)
class LungSites:
    """Points inside the lungs with their depth (mm from the nearest surface), to place things at."""

    points: np.ndarray
    depth: np.ndarray

    @staticmethod
    def fill(patient: Patient, rng: np.random.Generator) -> LungSites:
        g = 1.2207440846057596  # the plastic number's 3-D relative: an additive recurrence spreads points evenly
        unit = (rng.random(3) + np.outer(np.arange(4000), (1 / g, 1 / g**2, 1 / g**3))) % 1.0
        points = np.array((-132, -92, -195)) + unit * np.array((264, 184, 332))
        x, y, z = points.T
        depth = lung_depth(patient, x, y, z, cage_depth(x, y, z))
        centre, matrix = patient.heart
        heart = np.linalg.norm((points - centre) @ np.linalg.inv(matrix).T, axis=1)
        depth = np.minimum(depth, (heart - 1.12) * 45)
        keep = depth > 0.5
        return LungSites(points[keep], depth[keep])

    def pick(self, rng: np.random.Generator, n: int, weight: np.ndarray) -> np.ndarray:
        """n different points (fewer if there are not as many), drawn in proportion to `weight`."""
        weight = np.asarray(weight, float)
        n = min(n, int((weight > 0).sum()))
        if n == 0:
            return np.zeros((0, 3))
        return self.points[rng.choice(len(weight), size=n, replace=False, p=weight / weight.sum())]
