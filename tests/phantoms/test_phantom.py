"""The synthetic chests, against what they claim: same seed same voxels; a finding changes the image where and as it
should, and nothing else; label rates are CT-RATE's; the folder is the hub's layout, with version-1 and version-2 files
that nibabel reads back to the very voxels; a cohort that broke off is continued, another one is refused.
"""

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import draw_phantoms
import nibabel
import numpy as np
import pytest

from ctclip.data.ct_rate import PREVALENCE, labels_path, metadata_path, no_chest_path, patient_of, volume_path
from ctclip.phantoms import cohort as cohort_module
from ctclip.phantoms import findings, patient, phantom
from ctclip.phantoms.__main__ import main
from ctclip.phantoms.cohort import MANIFEST, plan_split, write_phantom_cohort, write_volume
from ctclip.phantoms.phantom import make_phantom
from ctclip_model import ABNORMALITIES

ROOT = Path(__file__).resolve().parents[2]
NONE = np.zeros(len(ABNORMALITIES), int)
SEED = 19  # a man scanned without contrast medium

# Mean change in HU that a finding makes where its mask says it was drawn, at demo size.
CHANGE = {
    findings.MEDICAL: (300, 3000),
    findings.ARTERIAL: (200, 900),
    findings.CARDIOMEGALY: (80, 600),
    findings.PERICARDIAL: (80, 700),
    findings.CORONARY: (200, 900),
    findings.HERNIA: (-900, 200),
    findings.NODES: (50, 500),
    findings.EMPHYSEMA: (-200, -30),
    findings.ATELECTASIS: (400, 1000),
    findings.NODULE: (400, 1000),
    findings.OPACITY: (120, 400),
    findings.FIBROSIS: (150, 900),
    findings.EFFUSION: (500, 1000),
    findings.MOSAIC: (-120, -10),
    findings.PERIBRONCHIAL: (80, 600),
    findings.CONSOLIDATION: (400, 1000),
    findings.BRONCHIECTASIS: (50, 500),
    findings.SEPTAL: (80, 500),
}


def only(name):
    labels = NONE.copy()
    labels[ABNORMALITIES.index(name)] = 1
    return labels


@pytest.fixture(scope="module")
def normal():
    return make_phantom(SEED, NONE)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    write_phantom_cohort(folder, 10, 5, seed=3, workers=1, progress=False)
    return folder


def plans_of(n_train=10, n_valid=5, seed=3):
    return plan_split("train", n_train, seed) + plan_split("valid", n_valid, seed)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class CountingPool:
    """In place of a ProcessPoolExecutor, which raises for more than 61 processes on Windows."""

    started: list[int] = []

    def __init__(self, workers, context, **options):
        self.started.append(workers)

    def map(self, function, *arguments):
        return iter(())

    def shutdown(self, **options):
        pass


def test_no_more_processes_than_windows_can_wait_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cohort_module, "ProcessPoolExecutor", CountingPool)
    monkeypatch.setattr(cohort_module, "available_cpus", lambda: 96.0)
    for platform, workers in (("win32", None), ("win32", 80), ("linux", None)):
        monkeypatch.setattr(cohort_module, "sys", SimpleNamespace(platform=platform))
        write_phantom_cohort(tmp_path / f"{platform}{workers}", 100, 5, workers=workers, progress=False)
    assert CountingPool.started == [61, 61, 96]


# ---- one phantom


def test_same_seed_same_voxels(normal):
    again, other = make_phantom(SEED, NONE), make_phantom(SEED + 1, NONE)
    assert np.array_equal(again.hu, normal.hu) and again.spacing == normal.spacing
    assert other.hu.shape != normal.hu.shape or not np.array_equal(other.hu, normal.hu)
    assert normal.hu.dtype == np.int16 and normal.masks == {} and not normal.labels.any()


def test_pinned_mean(normal):
    """One scalar that moves when the drawing does: raise PHANTOM_VERSION together with it."""
    assert phantom.PHANTOM_VERSION == 1
    assert float(normal.hu.mean()) == pytest.approx(-531.4, abs=0.5)


def test_tissues_have_their_hounsfield_units(normal):
    """Peaks of air, lung, fat, soft tissue; axes in LPS: heart on the left, spine behind, liver below."""
    hu = normal.hu
    nx, ny, nz = hu.shape
    assert np.median(hu[:3, :3]) < -980
    assert 0.02 < ((hu > -920) & (hu < -780)).mean() < 0.5
    assert ((hu > 0) & (hu < 100)).mean() > 0.05
    middle = hu[:, :, nz // 2]
    bone = np.argwhere(hu > 350).mean(0)
    assert bone[1] > ny / 2, "the spine lies behind"
    lung = (hu > -950) & (hu < -700)
    heart = (middle > 0) & (middle < 80)
    left, right = heart[nx // 2 + 6 : nx // 2 + 20].mean(), heart[nx // 2 - 20 : nx // 2 - 6].mean()
    assert left > right, "the heart lies on the left, where x grows"
    assert lung[..., nz // 2 :].sum() > 0.4 * lung.sum() and hu[nx // 4, ny // 2, 2] > -150, "liver below"


def test_same_body_on_another_grid():
    """The anatomy is in millimetres: half the voxel size, the same litres of lung."""
    litres = []
    for spacing in ((4.0, 4.0, 6.0), (2.5, 2.5, 4.0)):
        p = make_phantom(SEED, NONE, spacing=spacing)
        assert p.spacing == spacing
        litres.append(((p.hu < -700) & (p.hu > -960)).sum() * np.prod(spacing) / 1e6)
    assert litres[0] == pytest.approx(litres[1], rel=0.15)
    assert make_phantom(SEED, NONE, spacing=(4, 4, 6), shape=(60, 50, 40)).hu.shape == (60, 50, 40)


def test_second_reconstruction_shows_the_same_findings(normal):
    a, b = (make_phantom(SEED, None, (4, 4, 6), (90, 80, 56), reconstruction=r) for r in (0, 1))
    assert np.array_equal(a.labels, b.labels) and not np.array_equal(a.hu, b.hu)
    assert np.corrcoef(a.hu.ravel(), b.hu.ravel())[0, 1] > 0.98
    assert make_phantom(SEED, NONE, reconstruction=1).spacing != normal.spacing


@pytest.mark.parametrize("name", ABNORMALITIES)
def test_finding_changes_the_image_where_it_was_drawn(name, normal):
    shown = make_phantom(SEED, only(name))
    assert list(shown.masks) == [name]
    mask = shown.masks[name]
    assert mask.shape == shown.hu.shape == normal.hu.shape and mask.any()
    change = shown.hu.astype(int) - normal.hu
    low, high = CHANGE[name]
    assert low < change[mask].mean() < high
    assert np.abs(change[mask]).mean() > 8 * np.abs(change[~mask]).mean() + 5, "and hardly anywhere else"


def test_findings_are_what_they_are(normal):
    nx, ny, nz = normal.hu.shape

    def shown(name):
        p = make_phantom(SEED, only(name))
        return p, p.masks[name], np.argwhere(p.masks[name])

    lung = np.argwhere((normal.hu < -750) & (normal.hu > -950) & (np.arange(nx)[:, None, None] > 0))
    _, _, at = shown(findings.EFFUSION)
    assert at[:, 1].mean() > lung[:, 1].mean() + 5, "fluid lies behind"
    emphysema, mask, at = shown(findings.EMPHYSEMA)
    assert at[:, 2].mean() > np.argwhere((normal.hu < -780) & (normal.hu > -930))[:, 2].mean(), "upper lobes"
    assert np.percentile(emphysema.hu[mask], 25) < -920
    enlarged, mask, _ = shown(findings.CARDIOMEGALY)
    width = np.ptp(np.flatnonzero(mask.any((1, 2)))) * enlarged.spacing[0]
    chest = 2 * np.interp(patient.HEART_CENTRE[2], patient.CAGE_Z, patient.CAGE_WIDTH) * enlarged.patient.size[0]
    assert width / chest > 0.52
    hernia, mask, at = shown(findings.HERNIA)
    assert (hernia.hu[mask] < -500).any() and (hernia.hu[mask] > -50).any(), "air and fluid"
    air, fluid = (at[values][:, 1].mean() for values in (hernia.hu[mask] < -500, hernia.hu[mask] > -50))
    assert air < fluid, "air in front"
    _, mask, at = shown(findings.NODULE)
    consolidated, mask, _ = shown(findings.CONSOLIDATION)
    assert np.median(consolidated.hu[mask]) > -50
    glass, mask, _ = shown(findings.OPACITY)
    assert -760 < np.median(glass.hu[mask]) < -450


def test_high_diaphragm_with_atelectasis():
    for seed in (1, 2, 3):
        healthy, collapsed = make_phantom(seed, NONE).patient, make_phantom(seed, only(findings.ATELECTASIS)).patient
        assert max(b - a for a, b in zip(healthy.dome, collapsed.dome, strict=True)) > 15


@pytest.mark.parametrize("labels", [[1, 0], np.full(18, 2), np.zeros((1, 18)), ["Lung nodule"]])
def test_wrong_labels_are_refused(labels):
    with pytest.raises(ValueError, match="expected 18 numbers 0 or 1"):
        make_phantom(0, labels)


# ---- label rates


def test_label_rates_are_the_datasets():
    drawn = np.array([phantom.resolve_labels(None, seed, 0) for seed in range(3000)])
    for rate, name in zip(drawn.mean(0), ABNORMALITIES, strict=True):
        p = PREVALENCE[name]
        assert abs(rate - p) < 4.5 * np.sqrt(p * (1 - p) / len(drawn)), name
    together = np.corrcoef(
        drawn[:, ABNORMALITIES.index(findings.ARTERIAL)], drawn[:, ABNORMALITIES.index(findings.CORONARY)]
    )
    assert together[0, 1] > 0.1, "arteries calcify together"


@pytest.mark.parametrize(("split", "n"), [("train", 200), ("valid", 50)])
def test_cohort_rates_are_exact(split, n):
    plans = [plan for plan in plan_split(split, n, 0) if not plan.head]
    assert len(plans) == n == len({plan.name for plan in plans})
    scans = {plan.name.rsplit("_", 1)[0]: plan.labels for plan in plans}
    rates = np.mean(list(scans.values()), axis=0)
    assert np.abs(rates - [PREVALENCE[name] for name in ABNORMALITIES]).max() <= 1 / len(scans)
    assert all(plan.labels == scans[plan.name.rsplit("_", 1)[0]] for plan in plans), "reconstructions share labels"
    assert sum(not plan.fixed for plan in plans) == n // 5
    assert 0.7 * n < len({patient_of(plan.name) for plan in plans}) < n


@pytest.mark.parametrize("n", range(10, 14))
def test_a_second_reconstruction_is_always_there(n):
    names = [plan.name for plan in plan_split("valid", n, n) if not plan.head]
    assert len(names) == n and any(name.endswith("_2.nii.gz") for name in names)


def test_splits_share_no_body():
    assert not {p.seed for p in plan_split("train", 40, 0)} & {p.seed for p in plan_split("valid", 40, 0)}


# ---- the folder


def test_layout_and_tables(cohort):
    files = sorted(path.relative_to(cohort).as_posix() for path in cohort.rglob("*.nii.gz"))
    assert files == sorted(plan.path.as_posix() for plan in plans_of()) and len(files) == 17
    assert not list(cohort.rglob("*.tmp"))
    for split, n in (("train", 10), ("valid", 5)):
        labels, metadata = rows(cohort / labels_path(split)), rows(cohort / metadata_path(split))
        assert list(labels[0]) == ["VolumeName", *ABNORMALITIES]
        assert [row["VolumeName"] for row in labels] == [row["VolumeName"] for row in metadata]
        assert len(labels) == n + 1, "one listed head besides"
        assert {value for row in labels for key, value in row.items() if key != "VolumeName"} == {"0", "1"}
        heads = (cohort / no_chest_path(split)).read_text().split()
        assert len(heads) == 1 and heads[0] in [row["VolumeName"] for row in labels]
        for row in metadata:
            xy = json.loads(row["XYSpacing"])
            assert len(xy) == 2 and 2.5 < xy[0] == xy[1] < 4.3 and 3.9 < float(row["ZSpacing"]) < 7.1
            assert row["RescaleIntercept"] in ("-1024", "-8192") and row["RescaleSlope"] == "1"
            assert row["PatientSex"] in "FM" and row["PatientAge"].endswith("Y") and len(row["PatientAge"]) == 4


def test_files_hold_the_voxels_of_make_phantom(cohort):
    """Version 2 through its header, in whatever orientation; version 1 through slope, intercept and spacing."""
    plans = [plan for plan in plans_of() if not plan.head]
    assert {plan.fixed for plan in plans} == {True, False}
    assert len({plan.codes for plan in plans if plan.fixed}) > 1
    lps = nibabel.orientations.axcodes2ornt("LPS")
    for plan in plans:
        image = nibabel.load(cohort / plan.path)
        stored = np.asarray(image.dataobj)
        p = make_phantom(plan.seed, plan.labels, scan=plan.scan, reconstruction=plan.reconstruction)
        assert stored.dtype == np.int16
        if plan.fixed:
            assert "".join(nibabel.aff2axcodes(image.affine)) == plan.codes
            turn = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(image.affine), lps)
            hu = nibabel.orientations.apply_orientation(stored, turn)
            assert np.allclose(image.header.get_zooms(), p.spacing, atol=1e-4)
        else:
            assert image.header["qform_code"] == image.header["sform_code"] == 0
            assert np.allclose(image.header["pixdim"][1:4], 1)
            hu = stored.astype(int) + plan.intercept
            assert stored.min() >= 0
        padded = hu != p.hu
        assert (hu[padded] == plan.intercept).all() and padded.any() <= plan.circle
        assert padded.mean() < 0.25
    assert any(plan.circle for plan in plans) and any(plan.intercept == -8192 for plan in plans)


def test_interrupted_cohort_is_continued_not_redone(cohort):
    def state():
        files = list(cohort.rglob("*.nii.gz"))
        return {path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}

    before = state()
    write_phantom_cohort(cohort, 10, 5, seed=3, progress=False)
    assert state() == before, "a finished cohort is used as it is"
    lost = sorted(before)[3:5]
    for path in lost:
        path.unlink()
    manifest = cohort / MANIFEST
    manifest.write_text(manifest.read_text().replace("true", "false"))
    write_phantom_cohort(cohort, 10, 5, seed=3, workers=2, progress=False)
    after = state()
    assert after.keys() == before.keys()
    assert {path for path in after if after[path][0] != before[path][0]} == set(lost)
    assert all(after[path][1] == before[path][1] for path in after), "same bytes, though two processes wrote them"
    assert json.loads(manifest.read_text())["complete"] is True


def test_another_cohort_in_the_folder_is_refused(cohort, tmp_path):
    with pytest.raises(ValueError, match="train 10, valid 5, seed 3 .* expected .* train 11, valid 5, seed 3"):
        write_phantom_cohort(cohort, 11, 5, seed=3)
    (tmp_path / "dataset").mkdir()
    with pytest.raises(ValueError, match="would overwrite its tables"):
        write_phantom_cohort(tmp_path, 1, 1)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="unreadable"):
        write_phantom_cohort(tmp_path, 1, 1)
    with pytest.raises(ValueError, match="expected at least 1"):
        write_phantom_cohort(tmp_path, 0, 1)


def test_a_cohort_with_voxels_of_ones_own(cohort, tmp_path):
    spacing = (9.0, 9.0, 12.0)
    write_phantom_cohort(tmp_path, 1, 1, workers=1, progress=False, spacing=spacing)
    plan = plan_split("train", 1, 0, spacing)[0]
    image, drawn = nibabel.load(tmp_path / plan.path), plan_split("train", 1, 0)[0].geometry
    assert image.header.get_zooms() == spacing
    view, own = np.multiply(*drawn), np.multiply(image.shape, spacing)
    assert np.abs(view - own).max() <= max(spacing) / 2, "the same view in other voxels"
    row = rows(tmp_path / metadata_path("train"))[0]
    assert (row["XYSpacing"], row["ZSpacing"]) == ("[9.0, 9.0]", "12.0")
    with pytest.raises(ValueError, match="spacing 9 x 9 x 12 mm, .* expected .* spacing drawn"):
        write_phantom_cohort(tmp_path, 1, 1)
    with pytest.raises(ValueError, match="0.1 x 1 x 1 mm, expected three numbers of 0.5 to 20"):
        write_phantom_cohort(tmp_path, 1, 1, spacing=(0.1, 1, 1))


def test_zlib_gives_the_same_voxels(cohort, tmp_path, monkeypatch):
    plan = plans_of()[0]
    monkeypatch.setattr(cohort_module, "igzip", None)
    write_volume(tmp_path, plan)
    a, b = (np.asarray(nibabel.load(folder / plan.path).dataobj) for folder in (cohort, tmp_path))
    assert np.array_equal(a, b)


# ---- the script


def run(*arguments):
    command = [sys.executable, "-m", "ctclip.phantoms", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_script_writes_a_cohort_and_says_what_it_is(tmp_path):
    done = run("--data_dir", tmp_path / "d", "--train", 2, "--valid=1", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "2 training and 1 validation phantoms" in done.stdout
    assert done.stdout.rstrip().endswith("not clinical performance.")
    assert (tmp_path / "d" / volume_path("train_1_a_1.nii.gz", True)).exists() or (
        tmp_path / "d" / volume_path("train_1_a_1.nii.gz", False)
    ).exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["--data-dir", "nowhere", "--train", "0"], ["--data-dir", __file__], ["--data-dir", "d", "--trian", "3"]],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_montage_shows_every_finding(tmp_path, monkeypatch):
    """Each finding has its patient; the picture is written (at a coarse grid here) and stays small."""
    assert set(draw_phantoms.SEEDS) == set(ABNORMALITIES)
    monkeypatch.setattr(draw_phantoms, "SPACING", (5.0, 5.0, 6.0))
    draw_phantoms.draw_montage(tmp_path / "m.png")
    assert 10_000 < (tmp_path / "m.png").stat().st_size < 900_000
