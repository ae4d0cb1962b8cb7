"""Heat maps: that the parts of a logit add up, for every head; that a written map lies where the model saw it, for
every way a file can store its axes; pictures by their markers; and on phantoms that maps point at what is there.

Checked against sums written out token by token, torch's own interpolation, and nibabel reading what was written."""

import sys
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_data import affine_of, reoriented, write
from helpers_model import OTHER_SIZES
from PIL import Image
from safetensors.torch import load_file

from ctclip.data.geometry import Placement, place_volume
from ctclip.data.preprocessing import preprocess_volume
from ctclip.data.tables import listing
from ctclip.data.windows import SOFT_TISSUE_WINDOW
from ctclip.inference import heat_maps
from ctclip.inference.scans import PredictionError
from ctclip_model import ABNORMALITIES, HEADS, CTCLIPMultiAbnormalityModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import pointing_game

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
ALL = range(18)
QUERY = ("resnet10t query", "resnet10t query patch", "resnet10t query patch stride", "resnet10t max patch",
         "resnet10t query cbam", "test_vit query", "test_vit query patch")  # fmt: skip
EXACT = ("linear", "attention", "prompts", "resnet10t", "resnet10t cbam", *QUERY)  # those whose remainder is the bias


def model_of(name: str) -> CTCLIPMultiAbnormalityModel:
    """A small model with that head, or on that backbone; its head away from zero so that every parameter matters."""
    torch.manual_seed(7)
    if name.startswith(("resnet10t", "test_vit")):
        model = CTCLIPMultiAbnormalityModel(
            None, name.split()[0], attention="cbam" if "cbam" in name else None, pretrained=False, n_slices=3,
            head="attention" if "query" in name else "max" if "max" in name else None,
            tokens="patch" if "patch" in name else "slice",
            feature_stride=16 if "stride" in name else None,
        )  # fmt: skip
    elif name == "prompts":  # a text tower makes it, and is not here
        model = CTCLIPMultiAbnormalityModel(sizes=asdict(OTHER_SIZES), head=name)
    else:
        model = CTCLIPMultiAbnormalityModel(str(FIXTURES / "tiny_a_classfine.pt"), head=name)
    with torch.no_grad():
        for parameter in model.head_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def volume_for(model: CTCLIPMultiAbnormalityModel) -> torch.Tensor:
    shape = model.input_shape if model.is_ctclip else (12, 64, 64)
    if shape != (20, 40, 40):
        return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with np.load(FIXTURES / "tiny_a_expected.npz") as file:
        return torch.from_numpy(file["volume"])[:1]


def cube(shape=(96, 80, 70)) -> Placement:
    """Of a file stored as (x, y, z) that fills the cube exactly."""
    position = tuple((np.arange(n) + 0.5) / n for n in shape)
    spacing = tuple(360 / n for n in shape)
    return Placement(shape, spacing, affine_of(spacing), (1, 2, 0), position)


# ------------------------------------------------------------------ the logit, split


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", [*HEADS, "resnet10t", "resnet10t cbam", *QUERY])
def test_the_parts_add_up_to_the_logit(name, smooth):
    model = model_of(name)
    volume = volume_for(model)
    with torch.no_grad():
        logits = model(volume)[0].numpy()
    found = heat_maps.token_contributions(model, volume, ALL, smooth)
    assert found.values.dtype == np.float32 and found.values.shape[0] == 18
    np.testing.assert_allclose(found.logits, logits, atol=1e-6)
    np.testing.assert_allclose(found.values.sum((1, 2, 3)) + found.remainder, logits, atol=1e-5)
    assert np.abs(found.values).min((1, 2, 3)).max() < np.abs(found.values).max()  # not the same everywhere
    if name in EXACT:
        bias = model.classifier.evidence.bias if model.head_name in ("attention", "max") else model.classifier.bias
        np.testing.assert_allclose(found.remainder, bias.detach().numpy(), atol=1e-5)


def test_values_of_the_linear_head_token_by_token():
    model = model_of("linear")
    volume = volume_for(model)
    with torch.no_grad():
        tokens = model.visual_transformer.vq(model.visual_transformer(volume))[0]  # (T, h, w, C)
        z = model.to_visual_latent(tokens.mean(0).flatten())
        T, h, w, C = tokens.shape
        projection = model.to_visual_latent.weight.view(-1, h, w, C)
        expected = torch.zeros(T, h, w)
        for t, i, j in np.ndindex(T, h, w):
            share = projection[:, i, j] @ tokens[t, i, j] / T / z.norm()
            expected[t, i, j] = model.classifier.weight[4] @ (share * (z > 0))
    found = heat_maps.token_contributions(model, volume, [9, 4], smooth=False).values[1]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_an_mlp_head_whose_branch_is_closed_is_the_linear_head():
    mlp, linear = model_of("mlp"), model_of("linear")
    with torch.no_grad():
        mlp.classifier.out.weight.zero_()
        linear.classifier.weight.copy_(mlp.classifier.weight)
    volume = volume_for(mlp)
    of_mlp, of_linear = (heat_maps.token_contributions(model, volume, ALL).values for model in (mlp, linear))
    np.testing.assert_allclose(of_mlp, of_linear, atol=1e-6)
    assert np.abs(heat_maps.token_contributions(model_of("mlp"), volume, ALL).values - of_linear).max() > 1e-3


def test_a_class_activation_map_is_where_its_slice_lies():
    """Only the lowest third differs from air: what the two other slice triplets add is the same in both."""
    model = model_of("resnet10t")
    air = torch.full((1, 1, 12, 64, 64), -1.0)
    low = air.clone()
    low[:, :, :4] = volume_for(model)[:, :, :4]
    a, b = (heat_maps.token_contributions(model, volume, ALL).values for volume in (air, low))
    assert a.shape[:2] == (18, 3)
    np.testing.assert_array_equal(a[:, 1:], b[:, 1:])
    assert np.abs(a[:, 0] - b[:, 0]).max() > 1e-4


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 5), (7, 2, 3)])
def test_smoothing_keeps_the_sum(shape):
    values = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    smooth = values
    for axis in (1, 2, 3):
        smooth = heat_maps._smoothed(smooth, axis)
    np.testing.assert_allclose(smooth.sum((1, 2, 3)), values.sum((1, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(heat_maps._smoothed(np.float32([[0, 0, 4, 0]]), 1), [[0, 1, 2, 1]])


def test_repeatable_and_the_same_where_gradients_are_switched_off():
    model = model_of("linear")
    volume = volume_for(model)
    first = heat_maps.token_contributions(model, volume, [3])
    with torch.inference_mode():
        second = heat_maps.token_contributions(model, volume.clone(), [3])
    np.testing.assert_array_equal(first.values, second.values)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_explained():
    model = model_of("linear")
    with pytest.raises(ValueError, match=r"found a volume of shape \(2, 1"):
        heat_maps.token_contributions(model, volume_for(model).repeat(2, 1, 1, 1, 1), ALL)
    with pytest.raises(ValueError, match="training mode"):
        heat_maps.token_contributions(model.train(), volume_for(model), ALL)


# ------------------------------------------------------------------ labels


def test_labels_are_read_as_people_write_them():
    assert heat_maps.parse_labels("lung nodule, EMPHYSEMA ,Lung nodule") == ["Lung nodule", "Emphysema"]
    assert heat_maps.parse_labels(" All ") == list(ABNORMALITIES)
    assert heat_maps.parse_labels("b", ("A", "B")) == ["B"]


def test_a_label_with_a_comma_stands_in_quotes():
    own = ("Nodule, solid", "Nodule")
    assert heat_maps.parse_labels("all", own) == heat_maps.parse_labels(listing(own), own) == list(own)
    with pytest.raises(PredictionError, match="found 'solid'"):
        heat_maps.parse_labels("Nodule, solid", own)


@pytest.mark.parametrize(
    "text, said",
    [
        ("Emphysem", "found 'Emphysem' .* expected .*perhaps Emphysema.*; correct it"),
        ("Emphysema,effusion", "found 'effusion' .*Pleural effusion"),
        ("Emphysema,all", "found 'all'"),
        ("xyz", "Medical material, Arterial"),
        (" , ", "found no label"),
        ('"Emphysema', "a quote or a line has no end"),
    ],
)
def test_unknown_labels_are_one_line(text, said):
    with pytest.raises(PredictionError, match=said) as caught:
        heat_maps.parse_labels(text)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ on the file's own voxels

STORED = ("LPS", "RAS", "LAS", "LPI", "SPL", "ASR", "PIR")
SCANS = {  # shape and spacing along x, y, z
    "smaller": ((50, 40, 30), (5.0, 5.0, 7.0)),
    "larger": ((110, 100, 52), (4.5, 4.7, 9.0)),
    "mixed": ((64, 90, 60), (3.1, 4.8, 10.3)),
}


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("codes", STORED)
def test_a_map_lies_where_the_model_saw_it(tmp_path, codes, scan):
    """A bright block in air goes through the real preprocessing; a map whose only token is the one that the block fills
    must be highest inside the block, in mm as nibabel reads them from the written file."""
    shape, spacing = SCANS[scan]
    hu = np.full(shape, -1000, np.int16)
    start = np.array([round(n * share) for n, share in zip(shape, (0.36, 0.62, 0.45), strict=True)])
    stop = start + np.ceil(45 / np.array(spacing)).astype(int)
    hu[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = 1000
    affine = affine_of(spacing, (31, -7, 300))
    voxels, turned = reoriented(hu, affine, codes)
    path = write(tmp_path / "scan.nii.gz", voxels, tuple(np.linalg.norm(turned[:3, :3], axis=0)), turned)
    seen = preprocess_volume(path, shape=(48, 48, 48), assume_hu=True)
    filled = F.avg_pool3d(seen[None], 3)[0, 0].numpy()
    assert filled.max() > 0.999
    values = np.zeros((16, 16, 16), np.float32)
    values[np.unravel_index(filled.argmax(), filled.shape)] = 0.3

    placement = place_volume(path, (48, 48, 48))
    heat_maps.write_heat_map(values, placement, tmp_path / "map.nii.gz", "Cardiomegaly")
    source, image = nib.load(path), nib.load(tmp_path / "map.nii.gz")
    assert image.shape == source.shape == voxels.shape and image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(image.affine.astype(np.float32), source.affine.astype(np.float32))
    np.testing.assert_allclose(image.get_qform(), image.affine, atol=1e-3)
    assert image.header.get_xyzt_units()[0] == "mm" and b"Cardiomegaly" in image.header["descrip"].item()
    found = image.get_fdata()
    assert 0.15 < found.max() <= 0.3 + 1e-6 and found.min() == 0 and len(np.unique(found)) <= 255
    at = image.affine @ [*np.unravel_index(found.argmax(), found.shape), 1]
    corners = np.sort(np.stack([affine @ [*(start - 0.5), 1], affine @ [*(stop - 0.5), 1]]), axis=0)[:, :3]
    assert (corners[0] < at[:3]).all() and (at[:3] < corners[1]).all()


def test_a_map_is_interpolated_between_token_centres_and_ends_with_the_cube(tmp_path):
    values = np.random.default_rng(3).normal(size=(4, 6, 5)).astype(np.float32)
    placement = cube()
    heat_maps.write_heat_map(values, placement, tmp_path / "map.nii.gz")
    found = nib.load(tmp_path / "map.nii.gz").get_fdata()
    expected = F.interpolate(torch.from_numpy(values)[None, None], (70, 96, 80), mode="trilinear")[0, 0].numpy()
    step = np.abs(values).max() / 127
    np.testing.assert_allclose(found, expected.transpose(1, 2, 0), atol=0.51 * step)

    wide = tuple(np.linspace(-0.5, 1.5, n) for n in placement.shape)
    heat_maps.write_heat_map(values, replace(placement, affine=None, position=wide), tmp_path / "wide.nii.gz")
    image = nib.load(tmp_path / "wide.nii.gz")
    inside = [(p >= 0) & (p <= 1) for p in wide]
    assert not image.get_fdata()[~np.logical_and.outer(np.logical_and.outer(inside[0], inside[1]), inside[2])].any()
    assert image.get_fdata()[np.ix_(*inside)].any() and image.header["sform_code"] == image.header["qform_code"] == 0


def test_a_map_is_whole_repeatable_and_small(tmp_path):
    """Also one of zeros, and over a file of the same name; no temporary file stays."""
    values = np.random.default_rng(3).normal(size=(4, 6, 5)).astype(np.float32)
    first, second = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    second.write_bytes(b"old")
    for path in (first, second):
        heat_maps.write_heat_map(values, cube(), path, "Ä" * 100)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 96 * 80 * 70 * 2 / 4
    heat_maps.write_heat_map(np.zeros((4, 6, 5), np.float32), cube(), first)
    assert not nib.load(first).get_fdata().any()
    assert {path.name for path in tmp_path.iterdir()} == {"a.nii.gz", "b.nii.gz"}


def test_a_sheared_grid_keeps_its_affine(tmp_path):
    """As a CT with a tilted gantry has it: no rotation says that, the matrix does."""
    placement = cube()
    sheared = placement.affine.copy()
    sheared[1, 2] = 2.0
    heat_maps.write_heat_map(np.ones((2, 2, 2)), replace(placement, affine=sheared), tmp_path / "m.nii.gz")
    image = nib.load(tmp_path / "m.nii.gz")
    np.testing.assert_allclose(image.affine, sheared, atol=1e-5)
    assert image.header["qform_code"] == 0 and image.header["sform_code"] == 1


def test_memory_is_a_few_slices(tmp_path):
    """160 slices of 512 x 512: 84 MB as stored, 168 MB as float32."""
    values = np.random.default_rng(0).normal(size=(24, 24, 24)).astype(np.float32)
    placement = cube((512, 512, 160))
    tracemalloc.start()
    heat_maps.write_heat_map(values, placement, tmp_path / "map.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert nib.load(tmp_path / "map.nii.gz").shape == (512, 512, 160)


# ------------------------------------------------------------------ as a picture


def test_levels_are_the_strongest_and_apart_from_head_to_foot():
    values = np.zeros((24, 2, 2), np.float32)  # 15 mm each
    values[[3, 4, 5, 12, 20], 0, 0] = 5, 9, 8, 1, 7
    assert heat_maps.strongest_levels(values) == [20, 12, 4]  # 3 and 5 are neighbours of 4
    assert heat_maps.strongest_levels(values[:1]) == [0]
    values[5:] = values[0] = -np.inf
    assert heat_maps.strongest_levels(values) == [4, 1]
    assert heat_maps.strongest_token(values) == (4, 0, 0)


def test_the_picture_is_turned_as_radiologists_look():
    """A marker at the patient's right, front and head, and the strongest token on it."""
    hu = torch.full((1, 1, 40, 60, 60), 0.04)
    hu[0, 0, 30:35, 6:12, 12:18] = 1
    values = np.full((8, 10, 10), -0.1, np.float32)
    values[6, 1, 2] = 2.0
    figure = heat_maps.draw_heat_map(hu, values, cube(), "title", SOFT_TISSUE_WINDOW, "caption")
    *axial, coronal = [ax for ax in figure.axes if len(ax.images) == 2]
    assert len(axial) == 3
    peak = next(ax for ax in axial if ax.collections)
    for ax, place in ((peak, (54, 90)), (coronal, (54, 292.5))):
        assert all((circle.get_offsets() == place).all() for circle in ax.collections)
        gray, colour = (image.get_array() for image in ax.images)
        assert all(image.get_extent() == [0, 360, 360, 0] for image in ax.images)
        row, column = int(place[1] / 360 * gray.shape[0]), int(place[0] / 360 * gray.shape[1])
        assert gray[row, column] == 1 and gray[-1 - row, column] < 0.1 and gray[row, -1 - column] < 0.1
        assert colour[row, column] > 0.8 * colour.max() > 0
        assert ax.get_xlim() == pytest.approx((0, 360))  # the first column, the patient's right, is on the left
        assert [text.get_text() for text in ax.texts][:2] == ["R", "L"]
    assert peak.get_ylim() == pytest.approx((360, 0))  # front at the top
    assert coronal.get_ylim() == pytest.approx((0, 360))  # head at the top
    assert "68 mm below the top" in peak.get_title("left") and "k = 56 (0 to 69)" in peak.get_title("left")
    assert "j = 20 (0 to 79)" in coronal.get_title("left")


def test_negative_contributions_are_not_coloured():
    negative = np.full((3, 4, 4), -1.0)
    figure = heat_maps.draw_heat_map(torch.zeros(1, 1, 12, 20, 20), negative, cube(), "t", SOFT_TISSUE_WINDOW)
    pictures = [ax for ax in figure.axes if len(ax.images) == 2]
    assert pictures and not any(ax.images[1].get_alpha().any() or ax.collections for ax in pictures)
    assert any("No positive contribution within the scan" in text.get_text() for ax in figure.axes for text in ax.texts)


def within(z: tuple[float, float], x=(0.0, 1.0), y=(0.0, 1.0), shape=(96, 80, 70)) -> Placement:
    """Of a file stored as (x, y, z) whose voxels reach from, to along each axis of the cube."""
    sides = zip((x, y, z), shape, strict=True)
    return replace(cube(shape), position=tuple(a + (np.arange(n) + 0.5) / n * (b - a) for (a, b), n in sides))


def panels(figure) -> list:
    return [ax for ax in figure.axes if len(ax.images) == 2]


def test_slices_and_ring_lie_within_the_scan():
    """The strongest tokens are padding: below the scan, above it, and behind it on a level that the scan has."""
    placement = within(z=(0.25, 0.8125), y=(0.2, 0.8))
    tokens = heat_maps.tokens_within(placement, (16, 10, 10))
    assert np.flatnonzero(tokens.any((1, 2))).tolist() == list(range(4, 13))  # 0.28 to 0.78; the last by half a voxel
    assert np.flatnonzero(tokens.any((0, 1))).tolist() == list(range(2, 8)) and tokens.any((0, 2)).all()
    values = np.zeros((16, 10, 10), np.float32)
    values[[0, 14, 8], [2, 2, 2], [5, 5, 9]] = 9, 8, 7
    values[[12, 6, 10], [3, 3, 3], [4, 4, 4]] = 1, 2, 1.5
    figure = heat_maps.draw_heat_map(torch.zeros(1, 1, 32, 40, 40), values, placement, "t", SOFT_TISSUE_WINDOW)
    *axial, coronal = panels(figure)
    titles = [ax.get_title("left") for ax in axial]
    below = [round((0.8125 - (row + 0.5) / 16) * 360) for row in (12, 10, 6)]
    assert [title.split("Axial, ")[1].split(" mm")[0] for title in titles] == [str(mm) for mm in below]
    assert all("slice k = " in title for title in titles)
    assert [bool(ax.collections) for ax in axial] == [False, False, True]
    assert coronal.collections[0].get_offsets()[0].tolist() == pytest.approx([3.5 * 36, 6.5 * 22.5])
    assert coronal.get_title("left").startswith("Coronal, through the ring\nslice j = ")
    assert coronal.images[1].get_clim() == (0, 2)  # the colours', too


def test_half_a_voxel_at_the_ends_is_scan():
    thick = within(z=(0.46, 0.70), shape=(96, 80, 3))  # centres of voxels: 0.50, 0.58, 0.66
    assert np.flatnonzero(heat_maps.tokens_within(thick, (16, 1, 1))).tolist() == [7, 8, 9, 10]  # from 0.469
    assert np.flatnonzero(heat_maps.tokens_within(thick, (17, 1, 1))).tolist() == [8, 9, 10, 11]  # to 0.676


@pytest.mark.parametrize("slices", [1, 2])
def test_a_scan_between_two_tokens_is_shown_where_it_is(slices):
    thin = replace(within(z=(0.51, 0.52), shape=(96, 80, slices)), spacing=(4, 4, 3.6 / slices))
    tokens = heat_maps.tokens_within(thin, (4, 10, 10))
    assert np.flatnonzero(tokens.any((1, 2))).tolist() == [2]
    values = np.zeros((4, 10, 10), np.float32)
    values[0, 0, 0], values[2, 5, 5] = 5, 1
    ax, coronal = panels(heat_maps.draw_heat_map(torch.zeros(1, 1, 40, 40, 40), values, thin, "t", SOFT_TISSUE_WINDOW))
    assert f"(0 to {slices - 1})" in ax.get_title("left") and ax.collections
    low, high = coronal.get_ylim()
    assert low <= coronal.collections[0].get_offsets()[0, 1] <= high


def test_what_lies_outside_the_scan_is_said():
    placement = within(z=(0.25, 0.75))
    values = np.zeros((4, 10, 10), np.float32)
    values[[1, 1], [2, 3], [2, 3]] = 2, -1
    assert "outside" not in heat_maps._caption(values, 0.1, 1.1, placement)
    values[[0, 3], [2, 3], [2, 3]] = 0.02, -0.25
    said = "positive contributions +2.02, negative -1.25 (of which outside the scan -0.25), remainder +0.10"
    assert heat_maps._caption(values, 0.1, 0.87, placement) == f"Logit +0.87 before calibration: {said}"
    values[0, 2, 2] = 0.12
    caption = heat_maps._caption(values, 0.1, 0.97, placement)
    assert "positive contributions +2.12 (of which outside the scan +0.12)," in caption


@pytest.mark.parametrize("z", [(0.0, 1.0), (0.2, 0.71), (0.45, 0.55), (0.499, 0.501)])
def test_numbers_are_not_printed_over_titles(z):
    values = np.ones((16, 10, 10), np.float32)
    values[[15, 11, 8]] = 2
    figure = heat_maps.draw_heat_map(torch.zeros(1, 1, 32, 40, 40), values, within(z), "t", SOFT_TISSUE_WINDOW)
    figure.draw_without_rendering()
    coronal = panels(figure)[-1]
    numbers = [text for text in coronal.texts if text.get_text().isdigit()]
    assert numbers and len(numbers) == len(panels(figure)) - 1
    for number in numbers:
        box = number.get_window_extent()
        assert not any(box.overlaps(other.get_window_extent()) for other in (coronal._left_title, coronal.texts[0]))


def test_where_nothing_speaks_for_it_no_ring_is_spoken_of():
    values = np.full((8, 10, 10), -1.0, np.float32)
    values[0, 5, 5] = 3  # outside the scan
    figure = heat_maps.draw_heat_map(torch.zeros(1, 1, 12, 20, 20), values, within((0.3, 0.7)), "t", SOFT_TISSUE_WINDOW)
    assert panels(figure) and panels(figure)[-1].get_title("left").startswith("Coronal\nslice j")
    assert not any(ax.images[1].get_alpha().any() or ax.collections for ax in panels(figure))


def test_names_of_files_are_not_alike_and_not_too_long():
    labels = ["Lung nodule", "Lung/nodule", "LUNG NODULE", "Lung nodule 2", "x" * 300, "x" * 299, "肺" * 90]
    stems = heat_maps._file_stems("scan", labels)
    assert stems[:4] == ["scan_Lung_nodule", "scan_Lung_nodule_2", "scan_LUNG_NODULE_3", "scan_Lung_nodule_2_2"]
    assert stems[4:] == ["scan_" + "x" * 80, "scan_" + "x" * 80 + "_2", "scan_" + "肺" * 26]
    assert len({stem.lower() for stem in stems}) == len(labels)


def test_labels_that_name_one_file_are_both_written(tmp_path):
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(OTHER_SIZES), head="prompts").eval()
    model.labels = ("Lung nodule", "Lung/nodule", "n" * 300, *model.labels[3:])
    written = heat_maps.write_scan_heat_maps(
        model, volume_for(model), cube((9, 8, 7)), model.labels[:3], tmp_path, "scan", np.zeros(18)
    )
    assert len(set(written)) == 6 and set(written) == set(tmp_path.iterdir())
    assert nib.load(written[0]).header["descrip"] != nib.load(written[2]).header["descrip"]


def test_the_title_is_of_its_own_label(tmp_path, monkeypatch):
    titles = []
    draw = heat_maps.draw_heat_map
    monkeypatch.setattr(heat_maps, "draw_heat_map", lambda *args: titles.append((args[3], args[5])) or draw(*args))
    model = model_of("linear")
    labels = [ABNORMALITIES[11], ABNORMALITIES[4]]
    probabilities = np.linspace(0.1, 0.95, 18)
    heat_maps.write_scan_heat_maps(model, volume_for(model), cube(), labels, tmp_path, "scan", probabilities)
    with torch.no_grad():
        logits = model(volume_for(model))[0]
    for (title, caption), label in zip(titles, labels, strict=True):
        index = ABNORMALITIES.index(label)
        assert title == f"{label}: probability {probabilities[index]:.2f}"
        assert caption.startswith(f"scan    Logit {logits[index]:+.2f} ")


def test_everything_of_one_scan(tmp_path):
    model = model_of("linear")
    probabilities = np.linspace(0, 1, 18)
    labels = ["Emphysema", "Arterial wall calcification"]
    given = (model, volume_for(model), cube(), labels)
    written = heat_maps.write_scan_heat_maps(*given, tmp_path / "new" / "a", "scan", probabilities, "a note")
    assert [path.name for path in written] == [
        "scan_Emphysema.nii.gz",
        "scan_Emphysema.png",
        "scan_Arterial_wall_calcification.nii.gz",
        "scan_Arterial_wall_calcification.png",
    ]
    # Of both labels: of one alone, some processors round otherwise.
    both = heat_maps.token_contributions(model, volume_for(model), [ABNORMALITIES.index(label) for label in labels])
    found = both.values[0]
    heat_maps.write_heat_map(found, cube(), tmp_path / "same.nii.gz", "Emphysema")
    assert written[0].read_bytes() == (tmp_path / "same.nii.gz").read_bytes()
    assert min(Image.open(written[1]).size) > 300
    again = heat_maps.write_scan_heat_maps(*given, tmp_path / "b", "scan", probabilities, "a note")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
    plain = heat_maps.write_scan_heat_maps(*given, tmp_path / "c", "scan", probabilities)
    assert plain[1].read_bytes() != written[1].read_bytes()


# ------------------------------------------------------------------ pointing game

# Findings that the demo sees well. Of the others, nodules and coronary plaques are at chance: see the benchmark.
SEEN = ("Medical material", "Cardiomegaly", "Hiatal hernia", "Atelectasis", "Pleural effusion", "Consolidation")


@pytest.mark.parametrize("head", pointing_game.HEADS)
def test_maps_point_at_what_is_there(cases, head):
    model = pointing_game.with_head(head, load_file(FIXTURES / "demo_heads.safetensors"))
    peaks, _ = pointing_game.strongest(model, cases)
    rates = np.array([pointing_game.hit_rate(cases, peaks, name) for name in SEEN])
    assert rates[:, 3].min() >= 2
    hits, chance, same_place = rates[:, :3].mean(0)
    assert hits > 0.75 and chance < 0.1 and same_place < 0.5, (hits, chance, same_place)


@pytest.fixture(scope="module")
def cases():
    seeds = range(pointing_game.FIRST_SEED, pointing_game.FIRST_SEED + 40)
    return [pointing_game.make_case(seed, (64, 96, 96), (16, 16, 16)) for seed in seeds]
