"""Slices of the most wrong volumes: where they lie by marker voxels; never the table or air, whatever its density; the
ring where the evidence is; and that a run's evidence is its heat maps'."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctclip.data.cohort import load_cohort
from ctclip.data.preprocessing import read_volume
from ctclip.data.windows import SOFT_TISSUE_WINDOW, Window
from ctclip.evaluation.case_slices import WIDTH, EvidenceError, Slice, draw_slices, find_body, place_shown
from ctclip.inference.contributions import token_contributions
from ctclip.inference.run_predictions import run_evidence
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel

SIZE = 72  # voxels along an axis
LUNG, BACK = -0.8, 0.8  # HU / 1000; as a share of the cube from front to back


def chest(size: int = SIZE, table: float = 0.1) -> torch.Tensor:
    """(1, D, H, W) = (1, z, x, y): a body of water from 0.2 to BACK, shorter to the feet; two lungs; the back lies on a
    table of the lungs' density, so thick, in a plane of which there is more of it than of them."""
    z, x, y = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 3, indexing="ij")
    hu = np.full((size,) * 3, -1.0, np.float32)
    hu[((x - 0.5) / 0.4) ** 2 + ((y - 0.5) / 0.3) ** 2 < np.where(z > 0.15, 1, 0.02)] = 0
    for side in (0.32, 0.68):
        hu[((x - side) / 0.12) ** 2 + ((y - 0.45) / 0.16) ** 2 + ((z - 0.55) / 0.3) ** 2 < 1] = LUNG
    hu[(y > BACK) & (y < BACK + table) & (np.abs(x - 0.5) < 0.45)] = LUNG
    return torch.from_numpy(hu)[None]


def pixels(shown: Slice) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(shown.jpeg)).convert("L"))


def marked(contributions_at: dict[tuple[float, float, float], float], grid=(8, 8, 8)) -> np.ndarray:
    """Contributions of 0.1 everywhere but at the places (z, x, y), shares of the cube."""
    values = np.full(grid, 0.1, np.float32)
    for place, value in contributions_at.items():
        values[tuple(int(share * n) for share, n in zip(place, grid, strict=True))] = value
    return values


def test_lung_is_looked_for_in_the_body_alone():
    body = find_body(chest())
    assert body.lung.any() and not (body.lung & ~body.inside).any()
    y = np.flatnonzero(body.inside.any((0, 1))) / SIZE
    assert (y.min(), y.max()) == pytest.approx((0.2, 0.8), abs=0.03)
    assert find_body(torch.full((1, 40, 40, 40), -1.0)) is None


@pytest.mark.parametrize("window", [SOFT_TISSUE_WINDOW, Window(-600, 1500)])
@pytest.mark.parametrize("table", [0.1, 0.19])  # the thicker one is taken for a part of the body
def test_without_evidence_the_most_lung_in_the_body_is_shown(window, table):
    """By density alone the coronal plane with the most lung is the table's, which is black for soft tissue."""
    volume = chest(table=table)
    lung_like = ((volume[0] > -0.95) & (volume[0] < -0.5)).sum((0, 1))
    assert lung_like.argmax() / SIZE > BACK
    body = find_body(volume)
    place = place_shown(body, None)
    assert place.found == (False, False, False) and place.meaning == "with the most lung"
    assert (place.z, place.y) == pytest.approx((0.55, 0.45), abs=0.03)
    for shown in draw_slices(volume, body, place, window):
        assert shown.ring is None and (pixels(shown) > 60).mean() > 0.3


def test_slices_go_through_the_strongest_evidence_within_the_body():
    body = find_body(chest())
    outside = {(0.55, 0.5, 0.95): 9.0, (0.55, 0.01, 0.5): 8.0, (0.05, 0.5, 0.5): 7.0}  # table, air, a thin end
    place = place_shown(body, marked({**outside, (0.7, 0.7, 0.55): 3.0}))
    assert (place.z, place.x, place.y) == (5.5 / 8, 5.5 / 8, 4.5 / 8) and all(place.found)
    nothing = place_shown(body, -marked({(0.7, 0.7, 0.55): 3.0}))
    assert nothing == place_shown(body, None)
    whole_slices = place_shown(body, marked({(0.7, 0, 0): 3.0}, (8, 1, 1)))
    assert whole_slices.z == 5.5 / 8 and whole_slices.found == (True, False, False)
    assert (whole_slices.x, whole_slices.y) == (nothing.x, nothing.y)
    assert draw_slices(chest(), body, whole_slices, SOFT_TISSUE_WINDOW)[0].ring is None


def test_slices_are_turned_as_radiologists_look_and_the_ring_is_at_the_place():
    """Axes (z, x, y) in LPS: the patient's right lies to the left, the front and the head at the top."""
    volume, bone = chest(144), 1.5
    at = int(0.6875 * 144), int(0.3125 * 144), int(0.4375 * 144)  # left of the middle in the picture, above it
    volume[0][tuple(slice(i - 3, i + 4) for i in at)] = bone
    place = place_shown(body := find_body(volume), marked({(0.6875, 0.3125, 0.4375): 5.0}))
    axial, coronal = draw_slices(volume, body, place, Window(0, 2000))
    assert (axial.plane, coronal.plane) == ("Axial", "Coronal")
    for shown in (axial, coronal):
        image, (left, top) = pixels(shown), shown.ring
        assert image.shape == shown.shape and image.shape[1] == WIDTH >= 380
        rows, columns = np.nonzero(image > 230)
        assert (columns.mean() / WIDTH, rows.mean() / image.shape[0]) == pytest.approx((left, top), abs=0.02)
        assert left < 0.45 and top < 0.5


def test_evidence_of_a_run_is_what_its_heat_maps_are_made_of(phantoms, tiny_classfine, tmp_path):
    assert run_evidence(tmp_path) is None  # an ensemble, or a run without weights
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    model.save_pretrained(tmp_path)
    evidence, volume = run_evidence(tmp_path, "cpu"), load_cohort(phantoms, "valid").volumes[0]
    tensor, values = evidence.of(volume, ["Lung nodule", "Emphysema"])
    expected, _ = read_volume(volume, model.input_shape)
    index = [ABNORMALITIES.index(label) for label in ("Lung nodule", "Emphysema")]
    assert torch.equal(tensor, expected)
    assert np.array_equal(values, token_contributions(model.eval(), expected[None], index).values)
    weights = Path(tmp_path, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(EvidenceError, match=r"model\.safetensors"):
        run_evidence(tmp_path, "cpu").of(volume, ["Emphysema"])
