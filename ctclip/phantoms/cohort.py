"""A cohort of phantoms on disk, in CT-RATE's own layout: version-1 and version-2 files, tables, a listed head CT."""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from nibabel import orientations
from tqdm.auto import tqdm

from ctclip.config import SYNTHETIC_NOTE
from ctclip.data.ct_rate import PREVALENCE, labels_path, metadata_path, no_chest_path, volume_path
from ctclip.fileio import read_json, replacing
from ctclip.formatting import BAR
from ctclip.memory import available_cpus
from ctclip.phantoms.findings import draw_labels
from ctclip.phantoms.patient import AIR, Patient, Purpose, random_stream
from ctclip.phantoms.phantom import PHANTOM_VERSION, Geometry, PhantomError, draw_geometry, make_phantom
from ctclip_model import ABNORMALITIES

try:
    from isal import igzip  # three times as fast as zlib at the same size
except ImportError:
    igzip = None  # type: ignore[assignment]

MANIFEST = "phantom.json"


@dataclass(frozen=True)
class PlannedVolume:
    """One file to write: everything is decided before the first voxel, so workers and resumes cannot differ."""

    name: str
    seed: int
    scan: int = 0
    reconstruction: int = 0
    labels: tuple[int, ...] = (0,) * len(ABNORMALITIES)
    fixed: bool = True
    codes: str = "LPS"  # orientation of the stored axes, version 2
    intercept: int = -1024
    circle: bool = False  # outside of which a scanner stores 0
    head: bool = False  # CT of a head
    spacing: tuple[float, float, float] | None = None  # mm along x, y, z, in place of a drawn one

    @property
    def path(self) -> Path:
        return volume_path(self.name, self.fixed)

    @property
    def geometry(self) -> Geometry:
        """(shape, spacing) in x, y, z."""
        if self.head:
            return (72, 88, 44), (2.6, 2.6, 5.0)
        return draw_geometry(self.seed, self.scan, self.reconstruction, self.spacing)


def plan_split(split: str, n: int, seed: int, spacing: tuple[float, float, float] | None = None) -> list[PlannedVolume]:
    """n chest volumes and one head CT. Findings are spread so that each label's rate is PREVALENCE as closely as n
    scans allow; one volume in five is version 1."""
    rng = random_stream(seed, Purpose.SPLIT, ("train", "valid").index(split))
    reconstructions = draw_reconstructions(rng, n)
    patients = reconstructions[-1][0]
    scans = sorted({(patient, scan) for patient, scan, _ in reconstructions})
    ranks = draw_labels(rng, len(scans)).argsort(0).argsort(0)
    present_below = [PREVALENCE[name] * len(scans) for name in ABNORMALITIES]
    present = ranks + rng.random(len(ABNORMALITIES)) < present_below  # a share of one scan is rounded by chance
    labels = {scan: tuple(int(v) for v in row) for scan, row in zip(scans, present, strict=True)}
    seeds = rng.integers(1 << 48, size=patients + 2)
    version_1 = rng.permutation(n) < max(n // 5, n > 1)
    plans = []
    for (patient, scan, reconstruction), raw in zip(reconstructions, version_1, strict=True):
        name = f"{split}_{patient}_{'ab'[scan]}_{reconstruction + 1}.nii.gz"
        intercept = int(rng.choice((-1024, -8192), p=(0.5, 0.5)))
        codes = str(rng.choice(("LPS", "RAS", "LAS", "LPI", "RPS"), p=(0.6, 0.12, 0.1, 0.1, 0.08)))
        stored = not raw, codes, intercept, bool(rng.random() < 0.4), False, spacing
        plans.append(PlannedVolume(name, int(seeds[patient]), scan, reconstruction, labels[patient, scan], *stored))
    head_ct = PlannedVolume(f"{split}_{patients + 1}_a_1.nii.gz", int(seeds[patients + 1]), head=True)
    return [*plans, head_ct]


def draw_reconstructions(rng: np.random.Generator, n: int) -> list[tuple[int, int, int]]:
    """n of (patient, scan, reconstruction): a few patients have a second scan or a second reconstruction."""
    drawn: list[tuple[int, int, int]] = []
    patient = 0
    while len(drawn) < n:
        patient += 1
        u, left = rng.random(), n - len(drawn)
        drawn.append((patient, 0, 0))
        if left >= 2 and (u < 0.15 or (patient == 1 and n >= 10)):
            drawn.append((patient, 0, 1))  # two reconstructions of one scan
        elif left >= 2 and u < 0.20:
            drawn.append((patient, 1, 0))  # two scans
    return drawn


def head_image(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """A skull with its brain, (x, y, z) int16: what the no-chest lists are there to keep out."""
    x, y, z = np.meshgrid(*(np.linspace(-1.15, 1.15, n) for n in shape), indexing="ij")
    radius = np.sqrt((x / 0.85) ** 2 + y**2 + (z * 0.9) ** 2)
    image = np.select([radius < 0.85, radius < 0.93, radius < 1], [35.0, 1100.0, 20.0], AIR)
    image += random_stream(seed, Purpose.NOISE).normal(0, 8, shape)
    return np.clip(image, -1024, 3071).astype(np.int16)


def write_volume(data_dir: Path, plan: PlannedVolume) -> None:
    """One .nii.gz in the hub's layout, by way of a temporary name. The bytes depend on the plan (and on whether isal
    compresses, which changes no voxel)."""
    shape, spacing = plan.geometry
    if plan.head:
        hu = head_image(shape, plan.seed)
    else:
        hu = make_phantom(plan.seed, plan.labels, spacing, shape, scan=plan.scan, reconstruction=plan.reconstruction).hu
    if plan.circle:
        across = [(np.arange(n) - (n - 1) / 2) / (n / 2) for n in shape[:2]]
        hu[np.hypot(across[0][:, None], across[1]) > 1] = plan.intercept
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    if plan.fixed:  # version 2: HU and its geometry, in the orientation `plan.codes`
        step = np.array((-1, -1, 1)) * spacing  # NIfTI's world axes point right, anterior, superior
        affine = np.diag([*step, 1.0])
        affine[:3, 3] = -step * (np.array(shape) - 1) / 2
        turn = orientations.ornt_transform(orientations.axcodes2ornt("LPS"), orientations.axcodes2ornt(plan.codes))
        voxels = orientations.apply_orientation(hu, turn)
        affine = affine @ orientations.inv_ornt_aff(turn, shape)
        header.set_data_shape(voxels.shape)
        header.set_zooms(np.sqrt((affine[:3, :3] ** 2).sum(0)))
        header.set_sform(affine, 1)
        header.set_qform(affine, 1)
        header.set_xyzt_units("mm")
        header["scl_slope"], header["scl_inter"] = 1, 0
    else:  # version 1: as stored by the scanner, and a header without geometry
        voxels = hu - np.int16(plan.intercept)
        header.set_data_shape(voxels.shape)
        header["pixdim"] = 1
    header["vox_offset"] = 352
    raw = header.binaryblock + bytes(4) + voxels.tobytes(order="F")
    write_file(data_dir / plan.path, (igzip or gzip).compress(raw, 1, mtime=0))


def is_phantom_cohort(data_dir: str | os.PathLike) -> bool:
    """Whether a cohort was written here: it carries the manifest."""
    return (Path(data_dir) / MANIFEST).is_file()


def write_file(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _write_tables(data_dir: Path, split: str, plans: list[PlannedVolume]) -> None:
    """Labels, metadata and no-chest list of one split, as the hub has them."""
    columns = "VolumeName,Manufacturer,SliceThickness,PatientSex,PatientAge,RescaleIntercept,RescaleSlope,"
    metadata = [columns + "XYSpacing,ZSpacing,NumberofSlices,Rows,Columns\n"]
    labels = [",".join(["VolumeName", *ABNORMALITIES]) + "\n"]
    for plan in plans:
        labels.append(",".join([plan.name, *map(str, plan.labels)]) + "\n")
        (nx, ny, nz), (sx, sy, sz) = plan.geometry
        patient = Patient.draw(plan.seed, plan.scan)
        maker = ("Siemens Healthineers", "Philips", "PNMS")[plan.seed % 3]
        person = f"{'F' if patient.female else 'M'},{patient.age:03d}Y"
        metadata.append(f'{plan.name},{maker},{sz},{person},{plan.intercept},1,"[{sx}, {sy}]",{sz},{nz},{ny},{nx}\n')
    write_file(data_dir / labels_path(split), "".join(labels))
    write_file(data_dir / metadata_path(split), "".join(metadata))
    write_file(data_dir / no_chest_path(split), "".join(p.name + "\n" for p in plans if p.head))


def shown_spacing(spacing: Sequence[float] | None) -> str:
    return "drawn" if spacing is None else " x ".join(f"{step:g}" for step in spacing) + " mm"


def _check_manifest(data_dir: Path, wanted: dict) -> bool:
    """True where this very cohort is complete; PhantomError where the folder holds something else."""
    manifest = data_dir / MANIFEST
    if data_dir.exists() and not data_dir.is_dir():
        raise PhantomError(f"found a file at {data_dir}, expected a folder or nothing; choose another --data-dir")
    if not manifest.exists():
        if (data_dir / "dataset").exists():
            found = f"a dataset folder without {MANIFEST} in {data_dir}"
            remedy = "phantoms would overwrite its tables: choose another --data-dir"
            raise PhantomError(f"found {found}, expected an empty folder or a phantom cohort; {remedy}")
        return False
    try:
        content = read_json(manifest)
        parameters = {key: ({"spacing": shown_spacing(None)} | content).get(key) for key in wanted}
    except (OSError, ValueError, TypeError) as error:
        raise PhantomError(f"found an unreadable {manifest} ({error}), expected JSON; delete the folder") from error
    if parameters != wanted:
        have, want = (", ".join(f"{key} {value}" for key, value in each.items()) for each in (parameters, wanted))
        remedy = "choose another --data-dir, or delete the folder to make it anew"
        raise PhantomError(f"found a phantom cohort with {have} in {data_dir}, expected {want}; {remedy}")
    return bool(content.get("complete"))


def write_phantom_cohort(
    data_dir: str | os.PathLike,
    n_train: int,
    n_valid: int,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    spacing: Sequence[float] | None = None,
) -> Path:
    """Write n_train + n_valid chest volumes with labels and metadata in the hub's layout; returns data_dir.

    A finished cohort with the same parameters is used as it is; an interrupted one is continued; another one in the
    same folder is a PhantomError. The voxels depend on the parameters only, not on `workers` (processes, default: all).
    `spacing`: mm along x, y, z, in place of the drawn 2.8 to 4.2 in plane and 4 to 7 between slices.
    """
    data_dir = Path(data_dir)
    if n_train < 1 or n_valid < 1 or seed < 0:
        raise PhantomError(f"found train {n_train}, valid {n_valid}, seed {seed}, expected at least 1, 1 and 0")
    if spacing is not None and (len(spacing) != 3 or not all(0.5 <= step <= 20 for step in spacing)):
        raise PhantomError(f"found a spacing of {shown_spacing(spacing)}, expected three numbers of 0.5 to 20 mm; "
                           "correct it, or leave it out to have it drawn")  # fmt: skip
    own = None if spacing is None else (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    wanted = {"version": PHANTOM_VERSION, "spacing": shown_spacing(own), "train": int(n_train), "valid": int(n_valid),
              "seed": int(seed)}  # fmt: skip
    if _check_manifest(data_dir, wanted):
        return data_dir
    manifest = {**wanted, "complete": False, "note": SYNTHETIC_NOTE}
    write_file(data_dir / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    plans = {split: plan_split(split, n, seed, own) for split, n in (("train", n_train), ("valid", n_valid))}
    for split, of_split in plans.items():
        _write_tables(data_dir, split, of_split)
    missing = [plan for of_split in plans.values() for plan in of_split if not (data_dir / plan.path).exists()]
    most = 61 if sys.platform == "win32" else len(missing)  # processes that Windows can wait for
    workers = min(workers or max(1, int(available_cpus())), len(missing), most)
    with contextlib.ExitStack() as stack:
        if workers <= 1:
            done: Iterator[None] = map(write_volume, [data_dir] * len(missing), missing)
        else:
            # A forked worker starts at once and never touches torch; elsewhere each imports this file afresh.
            method = "fork" if sys.platform == "linux" else "spawn"
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            ignored = signal.SIGINT, signal.SIG_IGN  # Ctrl-C reaches every process; this one ends the others
            context = multiprocessing.get_context(method)
            pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=ignored)
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            done = pool.map(write_volume, [data_dir] * len(missing), missing)
        shown = {"unit": " volumes", "bar_format": BAR, "disable": not progress, "mininterval": 0.5}
        for _ in tqdm(done, "phantoms", len(missing), **shown):
            pass
    write_file(data_dir / MANIFEST, json.dumps({**manifest, "complete": True}, indent=1) + "\n")
    return data_dir
