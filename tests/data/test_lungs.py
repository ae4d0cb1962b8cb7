"""What is said of a scan's lungs: little of them, or cut off at an end. On ellipsoids whose volume is known, a head,
and two scans of real patients, where CTCLIP_REAL_CT names their folder: a heart (from the aortic arch to the liver) and
an abdomen."""

from pathlib import Path

import numpy as np
import pytest
from helpers_data import REAL, SMALL, affine_of, chest, needs_real_ct, real_scan, reoriented, volume_of, write

from ctclip.data.loading import count_notes
from ctclip.data.lungs import CUT_OFF, lung_coverage
from ctclip.data.preprocessing import preprocess_volume, read_volume

SPACING = (8.0, 8.0, 12.0)
TOP, BASES = (
    "the upper lungs are not in the scan: the highest slice has",
    "the lung bases are not in the scan: the lowest",
)


def notes_of_file(path, hu, affine=None):
    affine = affine_of(SPACING) if affine is None else affine
    spacing = tuple(np.abs(affine[:3, :3]).sum(axis=0).tolist())
    return read_volume(volume_of(write(path, hu, spacing, affine)), (60, 120, 120))[1].notes


def test_lungs_are_measured_in_millilitres(tmp_path):
    """Ellipsoids of half axes 0.25, 0.42, 0.98 and 0.18, 0.36, 0.95 of half the scan's 376 x 344 x 228 mm."""
    tensor = preprocess_volume(write(tmp_path / "v.nii.gz", chest(), SPACING), shape=(60, 120, 120))
    coverage = lung_coverage(tensor)
    expected = 4 / 3 * np.pi * (0.25 * 0.42 * 0.98 + 0.18 * 0.36 * 0.95) * 376 * 344 * 228 / 8 / 1000
    assert coverage.volume_ml == pytest.approx(expected, rel=0.1)
    assert coverage.at_top < CUT_OFF and coverage.at_bottom < CUT_OFF


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LPI", "SAL"])
@pytest.mark.parametrize(("first", "last", "told"), [(6, 20, [BASES]), (0, 14, [TOP]), (5, 15, [TOP, BASES])])
def test_lungs_that_end_at_an_end_of_the_scan_are_told_by_which(tmp_path, codes, first, last, told):
    """Whatever the file's order, top is towards the head."""
    part, affine = reoriented(chest()[:, :, first:last], affine_of(SPACING), codes)
    notes = notes_of_file(tmp_path / "v.nii.gz", part, affine)
    assert len(notes) == len(told) and all(map(str.startswith, notes, told))


def test_what_lies_beyond_the_model_s_cube_is_not_said_to_be_beyond_the_scan(tmp_path):
    notes = notes_of_file(tmp_path / "v.nii.gz", chest((48, 44, 40)))  # of 480 mm
    assert [note.partition(":")[0] for note in notes] == [
        f"{part} are not in the 360 mm that the model sees" for part in ("the upper lungs", "the lung bases")
    ]


def test_a_scan_with_little_lung_is_read_with_a_note(tmp_path):
    hu = chest()
    hu[(hu < -600) & (np.abs(np.indices(hu.shape)[0] - 24) < 18) & (np.abs(np.indices(hu.shape)[1] - 22) < 12)] = 40
    assert notes_of_file(tmp_path / "v.nii.gz", hu) == (
        "little lung found (0% of lung and body, 0 mL): is this a chest?",
    )
    assert notes_of_file(tmp_path / "w.nii.gz", chest()) == ()


def test_a_head_is_read_with_the_same_question(tmp_path):
    """Skull, brain, an airway, air around."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (64, 64, 40)), indexing="ij")
    radius = np.sqrt((x / 0.72) ** 2 + (y / 0.85) ** 2 + (z / 1.2) ** 2)
    hu = np.select([radius < 0.84, radius < 0.93, radius < 1], [35, 900, 40], -1000).astype(np.int16)
    hu[(x / 0.1) ** 2 + ((y + 0.5) / 0.2) ** 2 + ((z + 0.5) / 0.3) ** 2 < 1] = -990
    hu += np.random.default_rng(0).normal(0, 12, hu.shape).astype(np.int16)
    _, decision = read_volume(volume_of(write(tmp_path / "v.nii.gz", hu, (3.8, 3.8, 5.0))), SMALL)
    assert decision.notes == ("little lung found (0% of lung and body, 0 mL): is this a chest?",)


@needs_real_ct
@pytest.mark.parametrize("shape", [(64, 96, 96), (120, 240, 240)])
def test_a_real_abdomen_has_little_lung_and_a_real_heart_no_upper_lungs(tmp_path, shape):
    def told(path):
        return [note.partition(":")[0] for note in read_volume(volume_of(path), shape)[1].notes]

    (question,) = told(Path(REAL, "torso_ras_3mm.nii.gz"))
    assert question.startswith("little lung found")
    upper, lower = (f"{part} are not in the scan" for part in ("the upper lungs", "the lung bases"))
    assert told(Path(REAL, "thorax_lps_1.5mm.nii.gz")) == [upper]
    hu, affine, spacing = real_scan("thorax_lps_1.5mm.nii.gz")  # stored upwards
    assert told(write(tmp_path / "upper.nii.gz", hu[:, :, 56:], spacing, affine)) == [upper, lower]


def test_warnings_of_a_cohort_are_counted_by_kind():
    """Numbers apart; a volume with two is counted twice."""
    notes = {
        "a": "little lung found (5% of lung, 90 mL)",
        "b": "little lung found (8% of lung, 7 mL); oblique",
        "c": "oblique",
    }
    assert count_notes(notes) == [
        "2 volumes with a warning, first a: little lung found (5% of lung, 90 mL)",
        "2 volumes with a warning, first b: oblique",
    ]
    assert count_notes({}) == []
