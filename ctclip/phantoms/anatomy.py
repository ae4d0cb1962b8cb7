"""Normal anatomy, painted onto a scene: torso, abdomen, lungs with vessels and airways, mediastinum, skeleton."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ctclip.phantoms import patient
from ctclip.phantoms.patient import AIR, FAT, LIVER, MUSCLE, RIB_PITCH, SOFT, LungSites, Patient, Purpose, random_stream
from ctclip.phantoms.scene import Piece, Point, Scene, intersection, perpendiculars, relative, smooth_path

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
AORTA_PATH, AORTA_PATH_RADIUS = smooth_path(AORTA, 1), smooth_path(AORTA_RADIUS[:, None], 1)[:, 0]
GREAT_VESSELS = (  # points, radii
    ([(20, -52, -14), (20, -42, 6), (18, -26, 18)], (13, 13, 13)),  # pulmonary trunk
    ([(18, -28, 18), (-4, -10, 16), (-26, 2, 12), (-40, 8, 10)], (11, 9.5, 9, 7.5)),  # right pulmonary artery
    ([(18, -28, 20), (30, -8, 26), (42, 10, 20)], (12, 10, 8)),  # left
    ([(-38, 2, -14), (0, 8, -14), (36, 4, -12)], (7, 10, 7)),  # pulmonary veins into the left atrium
    ([(-26, -12, 74), (-10, -30, 84), (28, -38, 96), (40, -34, 108)], (7, 6.5, 6.5, 6)),  # brachiocephalic veins
    ([(-26, -12, 74), (-34, -30, 100), (-44, -34, 112)], (7, 6.5, 6)),
    ([(-6, -22, 60), (-14, -20, 90), (-18, -10, 125)], (6.5, 6, 5)),  # arteries of the arch
    ([(6, -4, 64), (14, -6, 100), (18, -2, 130)], (4.5, 4.2, 4)),
    ([(14, 8, 64), (24, 8, 95), (40, 0, 118)], (5.5, 5, 5)),
)
TRACHEA = np.array([(1, -6, 150), (0, 0, 110), (-1, 8, 70), (-1, 14, 38)], dtype=float)
CARINA = np.array((-1.0, 14.0, 36.0))
HILUM = {-1: np.array((-38.0, 12.0, 10.0)), 1: np.array((40.0, 14.0, 14.0))}  # side: -1 right, +1 left
VENA_CAVA = np.array([(-26, -12, 75), (-29, -16, 40), (-30, -14, 0), (-28, -14, -30)], dtype=float)
OESOPHAGUS = np.array([(3, 18, 150), (5, 26, 80), (4, 30, 30), (6, 30, -40), (12, 26, -85), (24, 10, -112)], float)
NODE_STATIONS = np.array(
    [(-16, -2, 58), (-18, 2, 44), (23, -2, 42), (2, -38, 56), (3, 22, 16), (-2, 24, 2), (-42, 16, 4), (46, 14, 4)]
    + [(-118, -38, 88), (118, -38, 88), (-108, -24, 78), (108, -24, 78), (10, -44, 42), (-20, -24, 74)],
    dtype=float,
)


def paint_torso(s: Scene) -> None:
    """Subcutaneous fat, muscle, chest wall; breasts; the contents of the cage start as fat."""
    x, y, z = s.grid
    fat = s.patient.fat
    half_width, half_depth, centre = patient.torso_outline(z)
    half_width, half_depth = half_width + fat, half_depth + fat
    level = y - centre
    level *= level
    level *= half_depth**-2.0
    level += np.abs(x) ** 2.8 * half_width**-2.8
    np.subtract(1, level, out=level)
    level *= half_depth * (0.42 / s.h)  # now the depth below the skin, in voxels
    np.clip(level + 0.5, 0, 1, out=s.hu)
    s.hu *= FAT - AIR
    s.hu += AIR
    if s.patient.female:
        front = -float(patient.torso_outline(15)[1]) - fat * 0.6
        for side in (-1, 1):
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


def paint_cage_contents(s: Scene, cage: np.ndarray) -> None:
    """Fat inside the cage; under the diaphragm liver, stomach with its air, spleen. cage: `cage_depth` of the grid."""
    x, y, z = s.grid
    inside = np.clip(cage * (1 / s.h) + 0.5, 0, 1)
    s.hu += inside * (FAT + 5 - s.hu)
    dome = patient.dome_height(s.patient, x, y)
    top = int(np.searchsorted(s.z, float(dome.max()) + s.dz))  # nothing of this lies above the domes
    low = slice(0, min(max(top, 1), len(s.z))), slice(0, s.shape[1]), slice(0, s.shape[2])
    z, inside = z[low[0]], inside[low]
    below = inside * np.clip((dome - z) * (0.8 / s.h) + 0.5, 0, 1)
    s.paint((low, below), SOFT)
    below *= np.clip((dome - 4 - z) * (0.8 / s.h) + 0.5, 0, 1)
    s.paint((low, below), FAT)
    liver = below * np.clip((12 - 0.7 * y - 0.15 * np.abs(z + 150) - x) / s.h + 0.5, 0, 1).astype(np.float32)
    s.paint((low, liver), LIVER + (45 if s.patient.enhanced else 0))

    def under(piece: Piece) -> Piece:
        box = intersection(piece[0], low)
        return box, piece[1][relative(box, piece[0])] * below[box]

    left = s.patient.dome[1]
    s.paint(under(s.ellipsoid((88, 38, left - 48), (30, 40, 44))), 50 + (60 if s.patient.enhanced else 0))
    s.paint(under(s.ellipsoid((58, -18, left - 42), (42, 40, 36))), SOFT)
    box, cover = under(s.ellipsoid((58, -18, left - 42), (38, 36, 32)))
    s.paint((box, cover), 20)
    air = np.clip((-30 - 2 * s.patient.wobble[0] - s.coordinates(box)[1]) / s.h + 0.5, 0, 1)  # in front: lying patient
    s.paint((box, cover * air.astype(np.float32)), AIR)


def paint_skeleton(s: Scene, cage: np.ndarray) -> None:
    """Spine, ribs that slope forward and down, sternum, clavicles, shoulder blades."""
    marrow = patient.MARROW * s.patient.marrow
    nodes = np.stack([np.zeros(len(patient.SPINE_Z)), patient.SPINE_Y, patient.SPINE_Z], axis=1)
    span = (float(s.z[0]) - s.dz, float(s.z[-1]) + s.dz)
    s.paint(s.column(nodes + (0, 29, 0), 24, 14, span), MUSCLE)
    s.paint(s.column(nodes + (0, 27, 0), 15, 15, span), 380)
    s.paint(s.column(nodes + (0, 26, 0), 9, 8, span), 20)
    box, cover = s.column(nodes, 18, 14.5, span)
    s.paint((box, cover), patient.CORTEX)
    s.paint(s.column(nodes, 15.8, 12.3, span), marrow)
    phase = (s.z[box[0]] / RIB_PITCH) % 1.0
    disc = np.clip((0.12 - np.abs(phase - 0.5)) * RIB_PITCH / s.dz + 0.5, 0, 1).astype(np.float32)
    s.paint((box, cover * disc[:, None, None]), 85)
    z = np.arange(-9, 7) * RIB_PITCH  # spinous and transverse processes, one set per vertebra
    y, zero = np.interp(z, patient.SPINE_Z, patient.SPINE_Y), np.zeros(len(z))
    start, stop = [np.stack([zero, y + 36, z], 1)], [np.stack([zero, y + 60, z - 12], 1)]
    for side in (-1, 1):
        start.append(np.stack([zero + side * 14, y + 22, z], 1))
        stop.append(np.stack([zero + side * 36, y + 34, z + 2], 1))
    s.paint(s.thin_tubes(np.concatenate(start), np.concatenate(stop), 5.0, 4.5), 380)
    paint_ribs(s, cage)
    levels = np.array((-78.0, -40.0, 10.0, 60.0, 92.0))
    nodes = np.stack([np.zeros(5), patient.sternum_y(levels), levels], axis=1)
    s.paint(s.column(nodes, (8, 16, 17, 21, 25), 6), patient.CORTEX - 150)
    s.paint(s.column(nodes, (6, 13.5, 14.5, 18.5, 22), 3.8), marrow - 40)
    for side in (-1, 1):
        clavicle = [(side * 26, -52, 98), (side * 60, -56, 118), (side * 105, -30, 142), (side * 140, -5, 150)]
        s.paint(s.tube(smooth_path(np.array(clavicle), 1), 6.5), 450)
        a = np.array((side * 0.82, -0.57, 0.0))
        plate = np.stack([a * 34, np.cross(a, (0, 0, 1.0)) * 3.6, np.array((0, 0, 58.0))], axis=1)
        s.paint(s.ellipsoid((side * 104, 66, 62), matrix=plate), 480)
        s.paint(s.tube(np.array([(side * 96, 80, 104), (side * 138, 42, 122)]), 6), 400)


def paint_ribs(s: Scene, cage: np.ndarray) -> None:
    """Each rib runs around the cage and drops towards the front, where it turns into cartilage."""
    where = np.flatnonzero((cage > -13) & (cage < 1))
    x, y, z = s.coordinates_of(where)
    turn = np.arctan2(np.abs(x), y - 10) / np.pi  # 0 at the spine, 1 at the sternum
    height = z + 84 * turn**1.15
    number = np.round(height / RIB_PITCH)
    across = (height - number * RIB_PITCH) / 6.8
    through = (cage.ravel()[where] + 6.5) / 4.6
    square = across**2 + through**2
    cover = np.clip(0.5 - (square - 1) * (2.6 / s.h), 0, 1)
    cover *= (number * RIB_PITCH < 124) & (number * RIB_PITCH > np.where(turn > 0.65, -60, -190))
    cover *= (np.abs(x) > 20) | (y < 0)
    value = np.clip(230 + (patient.CORTEX - 230) * np.clip((square - 0.45) * 3, 0, 1), 0, patient.CORTEX)
    value = np.where(turn > 0.80, 110, value)
    flat = s.hu.reshape(-1)
    flat[where] += (cover * (value - flat[where])).astype(np.float32)


class Tree(NamedTuple):
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
        branches = []
        for level in range(depth):
            reach = 0.32 if level == 0 else 0.5
            node = parent + reach * (groups.mean(1) - parent)
            branches.append((parent, node, np.full(len(node), level)))
            axis = groups.var(1).argmax(1)
            order = np.take_along_axis(groups, axis[:, None, None], axis=2)[..., 0].argsort(1)
            groups = np.take_along_axis(groups, order[..., None], axis=1)
            groups = groups.reshape(2 ** (level + 1), -1, 3)
            parent = np.repeat(node, 2, axis=0)
        branches.append((parent, groups[:, 0], np.full(len(parent), depth)))
        start, stop, levels = (np.concatenate(arrays) for arrays in zip(*branches, strict=True))
        u, v = perpendiculars(stop - start)
        length = np.linalg.norm(stop - start, axis=1, keepdims=True)
        a, b = rng.normal(0, 0.1, (2, len(start), 1))
        return Tree(start, stop, levels, (a * u + b * v) * length)

    def take(self, keep: np.ndarray) -> Tree:
        return Tree(*(array[keep] for array in self))

    def join(self, other: Tree) -> Tree:
        return Tree(*map(np.concatenate, zip(self, other, strict=True)))


def artery_radius(level: np.ndarray) -> np.ndarray:
    return 5.8 * 0.79**level


def lumen_radius(level: np.ndarray) -> np.ndarray:
    return 4.6 * 0.79**level


class Lungs(NamedTuple):
    """Both lungs on a scene's grid. Their contents are painted apart, and laid into the chest when they are done."""

    hu: np.ndarray  # (nz, ny, nx) float32: the contents, on the whole grid
    depth: np.ndarray  # mm inside the lung, negative outside
    cover: np.ndarray  # fraction of each voxel that is lung
    sites: LungSites
    arteries: Tree
    veins: Tree
    bronchi: Tree


def make_lungs(s: Scene, cage: np.ndarray, healthy: Patient, seed: int) -> Lungs:
    """Parenchyma, and trees of arteries with bronchi beside them and of veins that fill both lungs.

    cage: `cage_depth` of the grid. healthy: this body without its findings, in whose shape the trees are grown.
    """
    depth = patient.lung_depth(s.patient, *s.grid, cage=cage)
    cover = np.clip(depth * np.float32(1 / s.h) + np.float32(0.5), 0, 1)
    hu = np.empty(s.shape, np.float32)
    hu[:] = s.patient.lung_hu + 0.45 * s.y  # gravity: denser behind
    rng = random_stream(seed, Purpose.TREES)
    healthy_sites = LungSites.fill(healthy, rng)
    arteries, veins = [], []
    for side in (-1, 1):
        here = (healthy_sites.points[:, 0] * side > 0) & (healthy_sites.depth > 3)
        arteries.append(Tree.grow(HILUM[side] + (0, -4, 4), healthy_sites.pick(rng, 128, here), rng))
        veins.append(Tree.grow(np.array((side * 30.0, 2, -14)), healthy_sites.pick(rng, 128, here), rng))
    artery = arteries[0].join(arteries[1])
    beside = np.outer(artery_radius(artery.level) + lumen_radius(artery.level) + 0.8, (0.25, 0.85, 0.35))
    return Lungs(
        hu=hu,
        depth=depth,
        cover=cover,
        sites=LungSites.fill(s.patient, random_stream(seed, Purpose.LUNG_SITES)),
        arteries=artery,
        veins=veins[0].join(veins[1]),
        bronchi=artery._replace(start=artery.start + beside, stop=artery.stop + beside),
    )


def paint_lung_vessels(s: Scene, lungs: Lungs, rng: np.random.Generator) -> None:
    """Vessels and fissures."""
    both = lungs.arteries.join(lungs.veins)
    radius = np.concatenate([artery_radius(lungs.arteries.level), 0.9 * artery_radius(lungs.veins.level)])
    s.paint(s.thin_tubes(both.start, both.stop, radius, radius * 0.82, both.bow), s.patient.blood_hu, lungs.hu)
    if s.h < 2:  # small vessels that a coarser grid would not show
        leaf = both.take(both.level == both.level.max())
        start = np.repeat(leaf.start + 0.7 * (leaf.stop - leaf.start), 5, axis=0)
        heading = np.repeat(leaf.stop - leaf.start, 5, axis=0)
        heading = heading / np.linalg.norm(heading, axis=1, keepdims=True) + 0.7 * rng.standard_normal(start.shape)
        s.paint(s.thin_tubes(start, start + heading * rng.uniform(8, 18, (len(start), 1)), 0.75, 0.45), 0, lungs.hu)
    n = int(230 / s.h)
    a, b = np.meshgrid((np.arange(n) + 0.5) / n, (np.arange(n) + 0.5) / n)
    for side in (-1, 1):  # oblique fissures
        z = 62 + 4 * s.patient.wobble[1 + side] - 150 * b.ravel() + 10 * np.sin(a.ravel() * 3)
        points = np.stack([side * (12 + 120 * a.ravel()), 80 - 160 * b.ravel(), z], axis=1)
        s.paint(s.splat(points, 0.7 * (120 / n) * np.hypot(160, 150) / n), -250, lungs.hu)


def paint_bronchi(
    s: Scene, lungs: Lungs, tree: Tree, lumen: np.ndarray, wall: np.ndarray | float, mark: str | None = None
) -> None:
    """Wall, then the air in it. lumen, wall: mm, (n,); wall may be one number."""
    box, wall_cover = s.thin_tubes(tree.start, tree.stop, lumen + wall, (lumen + wall) * 0.85, tree.bow)
    inner_box, lumen_cover = s.thin_tubes(tree.start, tree.stop, lumen, lumen * 0.85, tree.bow)
    if not lumen_cover.size:  # outside the grid
        return
    air = np.zeros_like(wall_cover)
    common = intersection(box, inner_box)
    air[relative(common, box)] = lumen_cover[relative(common, inner_box)]
    np.minimum(air, wall_cover, out=air)
    target = lungs.hu[box]
    target += wall_cover * (30 - target) + air * (AIR - 30 + 10)  # together: wall where only the outer tube covers
    if mark is not None:
        s.masks[mark][box] |= wall_cover > 0.25


def paint_mediastinal_fat(s: Scene) -> None:
    """Fat at the hila and around the great vessels, with lymph nodes of normal size."""
    for side in (-1, 1):
        s.paint(s.ellipsoid(HILUM[side] + (-side * 8, -4, -4), (16, 16, 26)), FAT)
    s.paint(s.ellipsoid((2, -26, 44), (30, 40, 46)), FAT)
    normal = NODE_STATIONS[:6] + (0, 0, 10)
    s.paint(s.thin_balls(normal, np.full(len(normal), s.patient.node_radius)), SOFT)


def heart_layer(s: Scene, mm: float, shift: Point = (0, 0, 0)) -> Piece:
    """The heart grown by `mm` on all sides and shifted."""
    centre, matrix = s.patient.heart
    return s.ellipsoid(centre + shift, matrix=matrix * (1 + mm / patient.HEART_RADII))


def paint_epicardial_fat(s: Scene, pericardium: bool) -> None:
    """Fat around the heart, and the pericardium, which is thinner than a voxel, unless fluid will lift it off."""
    centre, matrix = s.patient.heart
    s.paint(heart_layer(s, 8, (-1, -2, 0)), FAT)
    s.paint(s.ellipsoid(centre + matrix @ (0.75, 0, 0) + (4, -6, -2), (26, 20, 18)), FAT)  # fat pad at the apex
    if pericardium:
        s.paint(heart_layer(s, 5.0, (-1, -1, 0)), -20)
        s.paint(heart_layer(s, 3.8, (-1, -1, 0)), FAT)


def paint_heart(s: Scene) -> Piece:
    """Muscle and chambers; returns the whole heart."""
    centre, matrix = s.patient.heart
    blood, enhanced = s.patient.blood_hu, s.patient.enhanced
    heart = heart_layer(s, 0)
    s.paint(heart, 105 if enhanced else 42)
    for place, size in CHAMBERS:
        s.paint(s.ellipsoid(centre + matrix @ place, matrix=matrix * size), blood if enhanced else 36)
    return heart


def paint_coronary_arteries(s: Scene) -> list[np.ndarray]:
    """Left anterior descending, circumflex, right coronary artery, in the fat on the heart's surface; their paths."""
    t = np.linspace(0, 1, 14)
    centre, matrix = s.patient.heart
    paths = []
    for angle, along in (  # around the heart's long axis; position along it, -1 base, 1 apex
        (-1.25 + 0.35 * t + np.pi, -0.45 + 1.25 * t),
        (np.pi - 1.25 - 2.2 * t, -0.42 + 0.1 * np.sin(3 * t)),
        (np.pi - 0.75 + 2.6 * t, -0.38 + 0.1 * np.sin(3 * t)),
    ):
        ring = np.sqrt(1 - along**2)
        path = centre + 1.06 * np.stack([along, ring * np.cos(angle), ring * np.sin(angle)], axis=1) @ matrix.T
        s.paint(s.thin_tubes(path[:-1], path[1:], 5.0, 5.0), FAT)
        s.paint(s.thin_tubes(path[:-1], path[1:], 1.9, 1.6), s.patient.blood_hu)
        paths.append(path)
    return paths


def paint_vessels_and_airways(s: Scene) -> None:
    """Oesophagus, great vessels, trachea and main bronchi, thyroid."""
    blood = s.patient.blood_hu
    s.paint(s.tube(OESOPHAGUS, 6.5), SOFT)
    s.paint(s.tube(OESOPHAGUS[:3], 2.0), -300)
    s.paint(s.column(VENA_CAVA, 8.5), blood)
    for points, radius in GREAT_VESSELS:
        path = smooth_path(np.array(points, float), 1)
        width = np.interp(np.linspace(0, 1, len(path)), np.linspace(0, 1, len(radius)), radius)
        s.paint(s.tube(path, width), blood)
    s.paint(s.tube(AORTA_PATH, AORTA_PATH_RADIUS), blood)
    for wall, value in ((1.8, 20), (0.0, AIR + 5)):
        s.paint(s.column(TRACHEA, 8.2 + wall, 8.8 + wall), value)
        for side in (-1, 1):
            s.paint(s.tube(np.stack([CARINA + (0, 0, 3), HILUM[side] + (0, 2, 2)]), 6.0 + wall), value)
    s.paint(s.ellipsoid((-16, -10, 128), (10, 13, 24)), 95)
    s.paint(s.ellipsoid((15, -10, 128), (10, 13, 24)), 95)
