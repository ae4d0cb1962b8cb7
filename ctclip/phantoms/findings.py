"""CT-RATE's 18 findings, each painted as what it is: a nodule is a sphere, an effusion fills the dependent space,
emphysema is holes, a calcified artery carries bright plaques on its wall.

Cardiomegaly has no painter: a larger heart is another `Patient`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from ctclip.phantoms import anatomy
from ctclip.phantoms.anatomy import HILUM, NODE_STATIONS, Lungs, heart_layer, lumen_radius
from ctclip.phantoms.patient import AIR, FAT, SOFT, Patient, Purpose, cage_depth, muscle_front, random_stream, sternum_y
from ctclip.phantoms.scene import Point, Scene, perpendiculars, smooth_path
from ctclip_model import ABNORMALITIES

(
    MEDICAL, ARTERIAL, CARDIOMEGALY, PERICARDIAL, CORONARY, HERNIA, NODES, EMPHYSEMA, ATELECTASIS, NODULE, OPACITY,
    FIBROSIS, EFFUSION, MOSAIC, PERIBRONCHIAL, CONSOLIDATION, BRONCHIECTASIS, SEPTAL,
) = ABNORMALITIES  # fmt: skip
IN_LUNG = {EMPHYSEMA, ATELECTASIS, NODULE, OPACITY, FIBROSIS, EFFUSION, MOSAIC, CONSOLIDATION, SEPTAL}
METAL = 2800  # HU


@dataclass(frozen=True)
class Findings:
    """The findings of one scan, and the random numbers that shape each of them."""

    present: frozenset[str]
    seed: int
    scan: int

    def rng(self, name: str) -> np.random.Generator:
        """The finding's own stream, from its beginning."""
        return random_stream(self.seed, Purpose.FINDING + ABNORMALITIES.index(name), self.scan)

    def sides(self, name: str) -> tuple[int, ...]:
        """Where atelectasis or effusion lies: -1 right, 1 left, or both."""
        return ((-1,), (1,), (-1, 1))[int(self.rng(name).choice(3, p=[0.4, 0.35, 0.25]))]


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


def paint_mosaic_attenuation(s: Scene, lungs: Lungs, rng: np.random.Generator) -> None:
    """Lobules of air trapping beside lobules of normal or raised attenuation, with straight borders."""
    sites = lungs.sites
    seeds = sites.pick(rng, int(rng.integers(170, 300)), np.ones(len(sites.depth)))
    value = np.where(rng.random(len(seeds)) < rng.uniform(0.4, 0.6), rng.uniform(-935, -905), rng.uniform(-775, -730))
    where = np.flatnonzero(lungs.depth > -s.h)
    nearest = cKDTree(seeds).query(np.stack(s.coordinates_of(where), axis=1))[1]
    lungs.hu.reshape(-1)[where] = value[nearest]
    s.masks[MOSAIC].reshape(-1)[where] = value[nearest] < -850


def paint_emphysema(s: Scene, lungs: Lungs, rng: np.random.Generator) -> None:
    """Holes without walls, most in the upper lobes, and a few bullae under the pleura."""
    sites = lungs.sites
    upper = 0.10 + 1 / (1 + np.exp(-(sites.points[:, 2] - 10) / 18))
    centres = sites.pick(rng, int(rng.integers(600, 1300)), upper)
    centres = centres + rng.normal(0, 3, centres.shape)
    radii = np.clip(rng.lognormal(np.log(5.2), 0.35, len(centres)), 2.5, 12)
    s.paint(s.thin_balls(centres, radii), -978, lungs.hu, EMPHYSEMA)
    centres = sites.pick(rng, int(rng.integers(3, 10)), upper**2 * (sites.depth < 14))
    radii = rng.uniform(8, 18, len(centres))
    for centre, radius in zip(centres, radii, strict=True):
        s.paint(s.ellipsoid(centre, radius + 1.0), -700, lungs.hu)
        s.paint(s.ellipsoid(centre, radius), -985, lungs.hu, EMPHYSEMA)


def paint_septal_thickening(s: Scene, lungs: Lungs, rng: np.random.Generator) -> None:
    """Thickened walls of the lobules: a net of polygons near the pleura, most at the bases."""
    sites = lungs.sites
    seeds = sites.pick(rng, 900, sites.depth < 45)
    reach = float(rng.uniform(20, 30))
    where = np.flatnonzero((lungs.depth > -s.h) & (lungs.depth < reach))
    points = np.stack(s.coordinates_of(where), axis=1)
    near, index = cKDTree(seeds).query(points, k=2)
    apart = np.linalg.norm(seeds[index[:, 0]] - seeds[index[:, 1]], axis=1) + 1e-6
    to_wall = (near[:, 1] ** 2 - near[:, 0] ** 2) / (2 * apart)
    thick = float(rng.uniform(1.8, 2.6))
    cover = np.clip((thick / 2 - to_wall) / s.h + 0.5, 0, min(1.0, thick / s.h))
    fade = np.clip((reach - lungs.depth.ravel()[where]) / 10, 0, 1) * np.clip(0.75 - points[:, 2] / 200, 0.3, 1)
    cover *= fade
    flat = lungs.hu.reshape(-1)
    flat[where] += cover * (-60 - flat[where]) + fade * 25  # and a little fluid in the lobules
    s.masks[SEPTAL].reshape(-1)[where] = cover > 0.15


def paint_ground_glass(s: Scene, lungs: Lungs, rng: np.random.Generator) -> None:
    """Ground glass: hazy patches through which the vessels stay visible."""
    sites = lungs.sites
    for centre in sites.pick(rng, int(rng.integers(3, 8)), sites.depth > 4):
        box, cover = s.lump(centre, rng.uniform(17, 38) * rng.uniform(0.75, 1.25, 3), rng, rough=0.45, edge=13)
        if cover.size:
            s.paint((box, cover * 0.9), float(rng.uniform(-640, -480)), lungs.hu, OPACITY)


def paint_consolidation(s: Scene, lungs: Lungs, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Airless lung of normal volume, up to the pleura; returns start and stop (n, 3) of the bronchi in it that still
    hold air."""
    sites = lungs.sites
    bronchograms = []
    for _ in range(int(rng.choice([1, 2], p=[0.7, 0.3]))):
        (centre,) = sites.pick(rng, 1, (sites.depth > 12) & (sites.points[:, 2] < 60))
        radii = rng.uniform(27, 42) * rng.uniform(0.85, 1.2, 3)
        s.paint(s.lump(centre, radii, rng, rough=0.3, edge=3), float(rng.uniform(25, 50)), lungs.hu, CONSOLIDATION)
        away = centre - HILUM[int(np.sign(centre[0]))]
        entry = centre - away / np.linalg.norm(away) * radii.min() * 0.9
        ends = centre + rng.normal(0, 0.5, (8, 3)) * radii
        bronchograms.append((np.repeat(entry[None], 8, 0), ends))
    return bronchograms


def paint_atelectasis(s: Scene, lungs: Lungs, sides: Sequence[int], rng: np.random.Generator) -> None:
    """Collapsed lung behind and below (its diaphragm already stands high), and plates of airless lung."""
    for side in sides:
        top = s.patient.dome[0 if side < 0 else 1]
        normal = np.array((-side * rng.uniform(0.25, 0.45), 0.78, -rng.uniform(0.35, 0.55)))
        normal /= np.linalg.norm(normal)
        place = np.array((side * 55, rng.uniform(38, 50), top - 14))
        box = s.box((min(0, side * 140), 0, top - 120), (max(0, side * 140), 100, top + 90))
        xx, yy, zz = s.coordinates(box)
        deep = ((xx - place[0]) * normal[0] + (yy - place[1]) * normal[1]) + (zz - place[2]) * normal[2]
        s.paint((box, np.clip(deep / s.h + 0.5, 0, 1).astype(np.float32)), 48, lungs.hu, ATELECTASIS)
        for _ in range(int(rng.integers(1, 4))):
            centre = np.array((side * rng.uniform(55, 95), rng.uniform(-45, 30), top + rng.uniform(6, 34)))
            tilt = np.array((rng.normal(0, 0.3), rng.choice((-1, 1)) * rng.uniform(0.5, 1.1), 1.0))
            tilt /= np.linalg.norm(tilt)
            u, v = perpendiculars(tilt[None])
            thick = rng.uniform(2.2, 3.4)
            plate = np.stack([u[0] * rng.uniform(20, 30), v[0] * rng.uniform(30, 46), tilt * thick], axis=1)
            s.paint(s.ellipsoid(centre, matrix=plate), 30, lungs.hu, ATELECTASIS)


def paint_nodules(s: Scene, lungs: Lungs, rng: np.random.Generator) -> None:
    """Solid spheres, 10 to 30 mm across."""
    sites = lungs.sites
    for i in range(int(rng.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.2, 0.1]))):
        radius = min(rng.uniform(7, 15) if i == 0 else rng.uniform(5, 11), float(sites.depth.max()) - 2)
        (centre,) = sites.pick(rng, 1, sites.depth >= radius + 2)
        s.paint(s.ellipsoid(centre, radius), float(rng.uniform(25, 60)), lungs.hu, NODULE)


def paint_fibrosis(s: Scene, lungs: Lungs, rng: np.random.Generator) -> None:
    """Old scarring: apical caps with strands drawn towards the hilum, or a basal band of reticulation and cysts."""
    sites = lungs.sites
    apical = rng.random() < 0.65
    for side in [(-1,), (1,), (-1, 1)][int(rng.integers(3))]:
        here = sites.points[:, 0] * side > 0
        if apical:
            focus = np.array((side * rng.uniform(38, 50), rng.uniform(0, 24), rng.uniform(92, 112)))
        else:
            near = here & (sites.points[:, 2] < -60) & (sites.points[:, 1] > 20) & (sites.depth < 12)
            focus = sites.pick(rng, 1, near)
            focus = focus[0] if len(focus) else np.array((side * 80.0, 50, -70))
        away = np.linalg.norm(sites.points - focus, axis=1)
        rim = sites.pick(rng, 40, here & (away < 48) & (sites.depth < 7))
        inner = sites.pick(rng, 40, here & (away < 58) & (sites.depth > 8))
        n = min(len(rim), len(inner))
        if n == 0:
            continue
        for centre in rim[::4]:  # thickened, retracted pleura
            s.paint(s.lump(centre, rng.uniform(6, 11), rng, rough=0.5), 20, lungs.hu, FIBROSIS)
        rim, inner = rim[:n], inner[:n]
        stop = rim + (inner - rim) * rng.uniform(0.5, 1.0, (n, 1))
        s.paint(s.thin_tubes(rim, stop, 2.3, 0.9, rng.normal(0, 2, (n, 3))), 10, lungs.hu, FIBROSIS)
        net = sites.pick(rng, 80, here & (away < 45))
        m = len(net) // 2
        s.paint(s.thin_tubes(net[:m], net[m : 2 * m], 1.1, 0.9), -60, lungs.hu, FIBROSIS)
        cysts = sites.pick(rng, 30, here & (away < 40) & (sites.depth < 14))
        if len(cysts):
            radii = rng.uniform(2.0, 4.5, len(cysts))
            s.paint(s.thin_balls(cysts, radii + 1.3), -150, lungs.hu, FIBROSIS)
            s.paint(s.thin_balls(cysts, radii), -960, lungs.hu)
        long_band = np.stack([focus, HILUM[side] + (side * 12, 0, 12)])
        s.paint(s.thin_tubes(long_band[:1], long_band[1:], 3.5, 1.5, rng.normal(0, 5, (1, 3))), 25, lungs.hu, FIBROSIS)


def paint_effusion(s: Scene, lungs: Lungs, sides: Sequence[int], rng: np.random.Generator) -> None:
    """Free fluid in the patient on the back: a crescent behind the lung, thickest at the base."""
    for side in sides:
        thick, top = float(rng.uniform(20, 60)), float(rng.uniform(10, 85))
        depth = np.clip((top - s.z) / (top + 90), 0, 1) ** 0.8 * thick
        box = s.box((min(0, side * 145), -60, -220), (max(0, side * 145), 100, top))
        if any(part.stop == part.start for part in box):
            continue
        xx, yy, zz = s.coordinates(box)
        inner = cage_depth(xx, yy, zz, shift=depth[box[0]][:, None, None])
        cover = np.clip(0.5 - (inner - 1.5) / s.h, 0, 1) * np.clip((yy + 10) / 25, 0, 1) * np.clip(side * xx / 6, 0, 1)
        cover *= (depth[box[0]] > 0.5)[:, None, None]
        s.paint((box, cover.astype(np.float32)), float(rng.uniform(2, 18)), lungs.hu, EFFUSION)


def paint_peribronchial_thickening(s: Scene, lungs: Lungs, rng: np.random.Generator) -> None:
    """Walls of the bronchi two to four times as thick as normal, visible further out."""
    tree = lungs.bronchi.take((lungs.bronchi.level >= 1) & (lungs.bronchi.level <= 6))
    wall = float(rng.uniform(2.2, 3.2)) * 0.93 ** (tree.level - 1)
    anatomy.paint_bronchi(s, lungs, tree, lumen_radius(tree.level), wall, PERIBRONCHIAL)


def paint_bronchiectasis(s: Scene, lungs: Lungs, rng: np.random.Generator) -> None:
    """Bronchi wider than the artery beside them (signet ring), not tapering, out to the pleura; some end in cysts."""
    for _ in range(int(rng.integers(2, 4))):
        tree = lungs.bronchi.take(lungs.bronchi.level >= 3)
        middle = (tree.start + tree.stop) / 2
        focus = middle[rng.choice(np.flatnonzero((tree.level == 5) & (middle[:, 2] < 70)))]
        tree = tree.take(np.linalg.norm(middle - focus, axis=1) < 42)
        lumen = np.where(tree.level >= 6, 3.0, 4.2) * rng.uniform(0.85, 1.5, len(tree.level))
        anatomy.paint_bronchi(s, lungs, tree, lumen, 1.5, BRONCHIECTASIS)
        ends = tree.stop[tree.level >= 5]
        radii = rng.uniform(4.0, 8.0, len(ends))
        s.paint(s.thin_balls(ends, radii + 1.5), 0, lungs.hu, BRONCHIECTASIS)
        s.paint(s.thin_balls(ends, radii), AIR + 10, lungs.hu)


def paint_lymph_nodes(s: Scene, rng: np.random.Generator) -> None:
    """Enlarged lymph nodes, 12 to 28 mm, at their stations."""
    weight = np.where(np.abs(NODE_STATIONS[:, 0]) > 90, 0.6, 1.4)
    for station in rng.choice(NODE_STATIONS, int(rng.integers(7, 13)), replace=False, p=weight / weight.sum()):
        centre = station + rng.normal(0, 2.5, 3)
        radii = rng.uniform(8, 14) * rng.uniform(0.85, 1.2, 3)
        s.paint(s.ellipsoid(centre, radii), float(rng.uniform(35, 55)), mark=NODES)


def paint_hernia(s: Scene, rng: np.random.Generator) -> None:
    """Stomach behind the heart, above the diaphragm: wall, fluid, and air in front."""
    radii = np.array((rng.uniform(26, 40), rng.uniform(19, 26), rng.uniform(24, 38)))
    centre = np.array((rng.uniform(0, 16), rng.uniform(30, 36), -62 + rng.normal(0, 6)))
    s.paint(s.ellipsoid(centre, radii + 3), FAT)
    s.paint(s.ellipsoid(centre, radii), 48, mark=HERNIA)
    box, cover = s.ellipsoid(centre, radii - 4)
    s.paint((box, cover), float(rng.uniform(5, 30)))
    level = centre[1] - radii[1] * rng.uniform(-0.1, 0.35)
    air = np.clip((level - s.coordinates(box)[1]) / s.h + 0.5, 0, 1).astype(np.float32)
    s.paint((box, cover * air), AIR + 20)


def paint_pericardial_effusion(s: Scene, rng: np.random.Generator) -> None:
    """Fluid between heart and pericardium, most behind and below; the heart painted over it is not in the mask."""
    thick = float(rng.uniform(8, 18))
    sag = np.array((1.0, 0.35 * thick, -0.2 * thick))
    s.paint(heart_layer(s, thick + 8, sag), FAT)
    s.paint(heart_layer(s, thick + 5.5, sag), SOFT)
    s.paint(heart_layer(s, thick + 4, sag), float(rng.uniform(5, 20)), mark=PERICARDIAL)
    s.paint(heart_layer(s, 3.5), FAT + 20)
    box, heart = heart_layer(s, 0)
    s.masks[PERICARDIAL][box] &= heart <= 0.25


def paint_coronary_calcification(s: Scene, paths: list[np.ndarray], rng: np.random.Generator) -> None:
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


def paint_arterial_calcification(s: Scene, rng: np.random.Generator) -> None:
    """Plaques on the wall of arch and descending aorta: thin curved plates of 500 to 1200 HU."""
    line, radius = anatomy.AORTA_PATH, anatomy.AORTA_PATH_RADIUS
    travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    points, volumes, n = [], [], 500
    for _ in range(int(rng.integers(14, 34))):
        middle = rng.uniform(55, travelled[-1] - 40)
        length, arc, thick = rng.uniform(5, 22), rng.uniform(0.4, 1.7), rng.uniform(1.8, 3.2)
        along = middle + length * (rng.random(n) - 0.5)
        angle = rng.uniform(0, 6.3) + arc * (rng.random(n) - 0.5)
        at = np.stack([np.interp(along, travelled, line[:, k]) for k in range(3)], axis=1)
        ahead = np.stack([np.interp(along + 1, travelled, line[:, k]) for k in range(3)], axis=1)
        u, v = perpendiculars(ahead - at)
        r = (np.interp(along, travelled, radius) + thick * (rng.random(n) - 0.7))[:, None]
        points.append(at + r * (np.cos(angle)[:, None] * u + np.sin(angle)[:, None] * v))
        volumes.append(np.full(n, length * arc * 13 * thick / n))
    s.paint(s.splat(np.concatenate(points), np.concatenate(volumes)), float(rng.uniform(750, 1150)), mark=ARTERIAL)


def paint_medical_material(s: Scene, rng: np.random.Generator) -> None:
    """Pacemaker with its lead, port with its catheter, or sternal wires with a valve ring."""

    def line(points: list[Point], radius: float, value: float) -> None:
        path = smooth_path(np.array(points, float))
        s.paint(s.thin_tubes(path[:-1], path[1:], radius, radius), value, mark=MEDICAL)

    kind = int(rng.choice(3, p=[0.4, 0.3, 0.3]))
    centre, matrix = s.patient.heart
    if kind == 0:
        x, z = 78.0 * (-1 if rng.random() < 0.15 else 1), float(rng.uniform(55, 72))
        y = muscle_front(x, z) - min(4.0, s.patient.fat * 0.3)
        s.paint(s.ellipsoid((x, y, z), (25, 6.0, 22)), METAL, mark=MEDICAL)
        apex = centre + matrix @ (0.55, -0.55, 0.2)
        entry = [(x, y, z + 12), (x * 0.75, y + 14, 104), (x * 0.45, -42, 108), (-8 + 0.1 * x, -30, 90)]
        line([*entry, (-26, -14, 72), (-29, -16, 40), (-29, -16, -5), (-24, -26, -30), apex], 1.7, METAL)
    elif kind == 1:
        x, z = -72.0, float(rng.uniform(48, 70))
        y = muscle_front(x, z) - min(6.0, s.patient.fat * 0.4)
        s.paint(s.ellipsoid((x, y, z), (15, 8, 15)), 2100, mark=MEDICAL)
        entry = [(x, y, z + 10), (-62, y + 14, 102), (-44, -38, 110), (-30, -24, 88)]
        line([*entry, (-27, -13, 70), (-29, -16, 30), (-29, -15, 8)], 1.9, 2000)
    else:
        for z in np.linspace(72, -52, int(rng.integers(5, 8))):
            turn = np.linspace(0, 2 * np.pi, 20)
            width = (15 + 6 * (z > 50)) * np.cos(turn)
            ring = np.stack([width, sternum_y(z) + 8 * np.sin(turn), z + 2 * np.sin(turn * 2)], axis=1)
            s.paint(s.thin_tubes(ring[:-1], ring[1:], 1.4, 1.4), METAL, mark=MEDICAL)
        turn = np.linspace(0, 2 * np.pi, 24)[:, None]
        u, v = perpendiculars(np.array([(-0.4, -0.4, 0.8)]))
        ring = centre + matrix @ (-0.62, -0.05, 0.1) + 13 * (np.cos(turn) * u + np.sin(turn) * v)
        s.paint(s.thin_tubes(ring[:-1], ring[1:], 2.0, 2.0), 2400, mark=MEDICAL)


def with_findings(healthy: Patient, findings: Findings) -> Patient:
    """The body with what findings change of it: a larger heart, a diaphragm that stands high under collapsed lung."""
    patient = healthy
    if CARDIOMEGALY in findings.present:
        patient = replace(patient, cardiothoracic=float(findings.rng(CARDIOMEGALY).uniform(0.57, 0.67)))
    if ATELECTASIS in findings.present:
        sides = findings.sides(ATELECTASIS)
        lift = float(random_stream(findings.seed, Purpose.DIAPHRAGM, findings.scan).uniform(16, 32))
        right, left = patient.dome
        patient = replace(patient, dome=(right + lift * (-1 in sides), left + lift * (1 in sides)))
    return patient


def paint_body(s: Scene, healthy: Patient, findings: Findings) -> np.ndarray:
    """The whole body with its findings, each over what it hides; returns the mask of the lungs (nz, ny, nx)."""

    def add(name: str, painter: Callable, *of: Any) -> Any:
        return painter(s, *of, findings.rng(name)) if name in findings.present else None

    anatomy.paint_torso(s)
    cage = cage_depth(*s.grid)
    anatomy.paint_cage_contents(s, cage)
    lungs = anatomy.make_lungs(s, cage, healthy, findings.seed)
    add(MOSAIC, paint_mosaic_attenuation, lungs)
    add(EMPHYSEMA, paint_emphysema, lungs)
    add(OPACITY, paint_ground_glass, lungs)
    add(SEPTAL, paint_septal_thickening, lungs)
    anatomy.paint_lung_vessels(s, lungs, random_stream(findings.seed, Purpose.SMALL_VESSELS))
    add(FIBROSIS, paint_fibrosis, lungs)
    bronchograms = add(CONSOLIDATION, paint_consolidation, lungs) or []
    add(ATELECTASIS, paint_atelectasis, lungs, findings.sides(ATELECTASIS))
    normal = lungs.bronchi.take(lungs.bronchi.level <= 4)
    anatomy.paint_bronchi(s, lungs, normal, lumen_radius(normal.level), 0.5 + 0.1 * lumen_radius(normal.level))
    add(PERIBRONCHIAL, paint_peribronchial_thickening, lungs)
    add(BRONCHIECTASIS, paint_bronchiectasis, lungs)
    rng = findings.rng(CONSOLIDATION)
    for start, stop in bronchograms:
        s.paint(s.thin_tubes(start, stop, 2.7, 1.7, rng.normal(0, 3, start.shape)), AIR + 40, lungs.hu)
    add(NODULE, paint_nodules, lungs)
    add(EFFUSION, paint_effusion, lungs, findings.sides(EFFUSION))
    s.hu += lungs.cover * (lungs.hu - s.hu)

    anatomy.paint_mediastinal_fat(s)
    add(NODES, paint_lymph_nodes)
    anatomy.paint_epicardial_fat(s, pericardium=PERICARDIAL not in findings.present)
    add(PERICARDIAL, paint_pericardial_effusion)
    box, heart = anatomy.paint_heart(s)
    if CARDIOMEGALY in findings.present:
        s.masks[CARDIOMEGALY][box] |= heart > 0.5
    add(CORONARY, paint_coronary_calcification, anatomy.paint_coronary_arteries(s))
    add(HERNIA, paint_hernia)
    anatomy.paint_vessels_and_airways(s)
    add(ARTERIAL, paint_arterial_calcification)
    anatomy.paint_skeleton(s, cage)
    add(MEDICAL, paint_medical_material)
    return lungs.cover > 0.4
