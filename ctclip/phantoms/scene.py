"""Painting: a voxel grid over a patient, and shapes in millimetres that cover parts of it.

Arrays are (z, y, x), so that x runs fastest as in a NIfTI file. A shape outside the grid is an empty `Piece`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ctclip.phantoms.patient import AIR, Patient

Box = tuple[slice, slice, slice]  # z, y, x
Piece = tuple[Box, np.ndarray]  # and the covered fraction of each voxel in the box, float32
Point = Sequence[float] | np.ndarray  # x, y, z
Numbers = float | Sequence[float] | np.ndarray  # one for all, or one each


def intersection(a: Box, b: Box) -> Box:
    """Where two boxes overlap; empty along an axis where they do not."""
    starts = [max(p.start, q.start) for p, q in zip(a, b, strict=True)]
    z, y, x = (slice(n, max(n, min(p.stop, q.stop))) for n, p, q in zip(starts, a, b, strict=True))
    return z, y, x


def relative(part: Box, box: Box) -> Box:
    """A part of the grid, counted from the corner of a box around it."""
    z, y, x = (slice(p.start - q.start, p.stop - q.start) for p, q in zip(part, box, strict=True))
    return z, y, x


def smooth_path(points: np.ndarray, rounds: int = 2) -> np.ndarray:
    """Chaikin corner cutting of a polyline (n, k); the ends stay."""
    for _ in range(rounds):
        a, b = points[:-1], points[1:]
        middle = np.stack([0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b], axis=1).reshape(-1, points.shape[1])
        points = np.concatenate([points[:1], middle[1:-1], points[-1:]])
    return points


def perpendiculars(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors perpendicular to each direction (n, 3)."""
    x, y, z = direction.T / np.maximum(np.linalg.norm(direction, axis=1), 1e-9)
    upright = np.abs(z) < 0.8  # the helper is then (0, 0, 1), else (1, 0, 0)
    u = np.stack([y * upright, z * ~upright - x * upright, -y * ~upright])
    u /= np.linalg.norm(u, axis=0)
    v = np.stack([y * u[2] - z * u[1], z * u[0] - x * u[2], x * u[1] - y * u[0]])
    return u.T, v.T


def covered(level: np.ndarray, slope: float | np.ndarray) -> np.ndarray:
    """Fraction of each voxel inside the surface where `level` is 1, which it overwrites; `slope` per voxel there."""
    level -= 1
    level *= slope
    level += 0.5
    return np.clip(level, 0, 1, out=level)


class Scene:
    """A voxel grid laid over the patient; `hu` (nz, ny, nx) float32 is being painted, edges by the covered fraction.

    Shape methods (`ellipsoid`, `tube`, ...) return a `Piece`, which `paint` blends into `hu` or another array. `masks`:
    where each finding was painted, (nz, ny, nx) bool.
    """

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
        self.grid = self.x, self.y, self.z[:, None, None]  # patient mm of every voxel, to be broadcast
        self.masks: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(self.shape, bool))

    def coordinates(self, box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`grid` within a box."""
        return self.x[box[1:]], self.y[box[1:]], self.z[box[0]][:, None, None]

    def coordinates_of(self, voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y, z of flat voxel indices (n,), each (n,)."""
        plane = self.shape[1] * self.shape[2]
        return self.x.ravel()[voxels % plane], self.y.ravel()[voxels % plane], self.z[voxels // plane]

    def to_index(self, points: np.ndarray) -> np.ndarray:
        """Patient mm (n, 3) -> fractional (k, j, i)."""
        x, y = points[:, 0] * self.scale[0], points[:, 1] * self.scale[1]
        u, v = self.cos * x - self.sin * y, self.sin * x + self.cos * y
        k = (points[:, 2] - self.bottom) / self.dz
        return np.stack([k, (v - self.origin[1]) / self.step[1], (u - self.origin[0]) / self.step[0]]).T

    def box(self, low: Point, high: Point) -> Box:
        """Slices (z, y, x) of the voxels that a patient-space box touches."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        sx, sy, _ = self.scale
        x, y, dx, dy = (x0 + x1) / 2 * sx, (y0 + y1) / 2 * sy, (x1 - x0) / 2 * sx, (y1 - y0) / 2 * sy
        c, n = abs(self.cos), abs(self.sin)
        around = (
            ((z0 + z1) / 2 - self.bottom, (z1 - z0) / 2, self.dz),
            (self.sin * x + self.cos * y - self.origin[1], n * dx + c * dy, self.step[1]),
            (self.cos * x - self.sin * y - self.origin[0], c * dx + n * dy, self.step[0]),
        )
        box: list[slice] = []
        for (middle, reach, step), size in zip(around, self.shape, strict=True):
            start = max(int((middle - reach) // step), 0)
            box.append(slice(start, max(start, min(int((middle + reach) // step) + 2, size))))
        return box[0], box[1], box[2]

    def paint(self, piece: Piece, value: float, into: np.ndarray | None = None, mark: str | None = None) -> None:
        """Blends `value` by coverage into `hu` or `into`; `mark`: the finding whose mask this belongs to."""
        box, cover = piece
        target = (self.hu if into is None else into)[box]
        target += cover * (value - target)
        if mark is not None:
            self.masks[mark][box] |= cover > 0.25

    def ellipsoid(self, centre: Point, radii: Numbers = 1.0, matrix: np.ndarray | None = None) -> Piece:
        """Axis-parallel with `radii`, or the image of the unit sphere under `matrix`."""
        cx, cy, cz = (float(c) for c in centre)
        if matrix is None:
            rx, ry, rz = (float(r) for r in np.broadcast_to(radii, 3))
            reach = (rx, ry, rz)
        else:
            reach = np.sqrt((matrix**2).sum(1)).tolist()
        ex, ey, ez = (r + self.h for r in reach)
        box = self.box((cx - ex, cy - ey, cz - ez), (cx + ex, cy + ey, cz + ez))
        x, y, z = self.coordinates(box)
        x, y, z = x - cx, y - cy, z - cz
        if matrix is None:
            mean = (rx * ry * rz) ** (1 / 3)
            square = ((x / rx) ** 2 + (y / ry) ** 2) + (z / rz) ** 2
        else:
            mean = abs(float(np.linalg.det(matrix))) ** (1 / 3)
            square = np.zeros((), np.float32)
            for a, b, c in np.linalg.inv(matrix).tolist():
                part = (a * x + b * y) + c * z
                part *= part
                square = square + part
        return box, covered(square, -mean / (2 * self.h))

    def lump(
        self, centre: np.ndarray, radii: Numbers, rng: np.random.Generator, rough: float = 0.3, edge: float = 0.0
    ) -> Piece:
        """Ellipsoid with an uneven surface; `edge` mm of soft border."""
        radii = np.broadcast_to(radii, 3)
        mean = float(radii.prod() ** (1 / 3))
        waves = (rng.normal(0, 1, (4, 3)) * 2.6 / mean).tolist(), rng.uniform(0, 6.3, 4).tolist()
        reach = radii * (1 + rough) + edge + self.h
        box = self.box(centre - reach, centre + reach)
        x, y, z = (a - float(c) for a, c in zip(self.coordinates(box), centre, strict=True))
        rx, ry, rz = radii.tolist()
        radius = np.sqrt((x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2)
        for wave, phase in zip(*waves, strict=True):
            ripple = (wave[0] * x + wave[1] * y + phase) + wave[2] * z
            radius += (rough / 2.5) * np.sin(ripple, out=ripple)
        return box, covered(radius, -mean / max(self.h, edge))

    def column(
        self, nodes: np.ndarray, rx: Numbers, ry: Numbers | None = None, z_range: tuple[float, float] | None = None
    ) -> Piece:
        """Upright tube: centre x, y as functions of z through `nodes` (n, 3); rx, ry are numbers or arrays (n,)."""
        order = np.argsort(nodes[:, 2])
        nodes = nodes[order]
        rx, ry = (np.broadcast_to(np.asarray(r, float), len(order))[order] for r in (rx, rx if ry is None else ry))
        low, high = z_range or (nodes[0, 2], nodes[-1, 2])
        reach = np.array((rx.max(), ry.max(), 0)) + self.h
        box = self.box(np.append(nodes[:, :2].min(0), low) - reach, np.append(nodes[:, :2].max(0), high) + reach)
        x, y, z = self.coordinates(box)
        at = [np.interp(z, nodes[:, 2], c).astype(np.float32) for c in (nodes[:, 0], nodes[:, 1], rx, ry)]
        square = ((x - at[0]) / at[2]) ** 2 + ((y - at[1]) / at[3]) ** 2
        cover = covered(square, np.minimum(at[2], at[3]) * (-0.5 / self.h))
        return box, cover * np.clip(np.minimum(z - low, high - z) / self.dz + 0.5, 0, 1).astype(np.float32)

    def tube(self, points: np.ndarray, radii: Numbers) -> Piece:
        """Round tube along a polyline, by distance: for radii of about a voxel and more."""
        radius = np.broadcast_to(np.asarray(radii, float), len(points)).tolist()
        reach = max(radius) + self.h
        box = self.box((points.min(0) - reach).tolist(), (points.max(0) + reach).tolist())
        path = points.tolist()
        cover = np.zeros([s.stop - s.start for s in box], np.float32)
        for a, b, ra, rb in zip(path[:-1], path[1:], radius[:-1], radius[1:], strict=True):
            margin = max(ra, rb) + self.h
            low = [min(p, q) - margin for p, q in zip(a, b, strict=True)]
            high = [max(p, q) + margin for p, q in zip(a, b, strict=True)]
            part = intersection(self.box(low, high), box)
            x, y, z = (c - o for c, o in zip(self.coordinates(part), a, strict=True))
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
            view = cover[relative(part, box)]
            np.maximum(view, square, out=view)
        return box, np.clip(cover, 0, 1, out=cover)

    def splat(self, points: np.ndarray, volumes: Numbers) -> Piece:
        """Coverage by a cloud of points, each standing for `volumes` mm3: for anything thinner than a voxel."""
        index = self.to_index(points).T  # rows of each axis: numpy is slow over a last axis of three
        base = np.floor(index).astype(np.int64)
        inside = ((base >= 0) & (base < np.array(self.shape)[:, None] - 1)).all(0)
        if not inside.any():
            return (slice(0, 0), slice(0, 0), slice(0, 0)), np.zeros((0, 0, 0), np.float32)
        part = (index - base).astype(np.float32)
        weight = np.asarray(volumes, np.float32) * np.ones(len(points), np.float32)
        if not inside.all():
            base, part, weight = base[:, inside], part[:, inside], weight[inside]
        weight = weight * (1.1 / self.voxel)
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
        z, y, x = (slice(int(a), int(a + d)) for a, d in zip(low, dims, strict=True))
        return (z, y, x), cover

    def thin_tubes(
        self, start: np.ndarray, stop: np.ndarray, r0: Numbers, r1: Numbers, bow: np.ndarray | None = None
    ) -> Piece:
        """Many tapering tubes at once, (n, 3) start and stop, (n,) radii; `bow` (n, 3) bends them sideways."""
        start, stop = np.atleast_2d(start).astype(float), np.atleast_2d(stop).astype(float)
        r0, r1 = (np.broadcast_to(np.asarray(r, float), len(start)) for r in (r0, r1))
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
        u, v = (vectors.T.take(owner, 1) for vectors in perpendiculars(along))
        points[:, wide] = points[:, wide] + rho * np.cos(angle) * u + rho * np.sin(angle) * v
        volumes = np.pi * radius**2 * (length / count)[tube] / per_disc
        return self.splat(points.T, volumes[disc])

    def thin_balls(self, centres: np.ndarray, radii: np.ndarray) -> Piece:
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
