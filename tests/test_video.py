"""Video ResNets: weights from a file in torchvision's layout, crops, window, heat maps. References: torchvision's own
network with the same blocks, sums by hand."""

import json

import pytest
import torch
from helpers_video import Narrow, small_video  # noqa: F401
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.models import get_model, get_model_weights

import ctclip.config
import ctclip_model
from ctclip.data.augmentation import Augmentation, jitter_window, random_box
from ctclip.hub.model_card import Facts, licence_of
from ctclip.inference.contributions import token_contributions
from ctclip_model import (
    VIDEO_MODELS,
    CheckpointError,
    CTCLIPMultiAbnormalityModel,
    PretrainedWeightsError,
    crop_starts,
)

SMALL = {"slice_spacing": 12.0, "slice_size": 40}  # volumes of 30 x 40 x 40, crops of 24 x 32 x 32


def video(name: str = "mc3_18", **options) -> CTCLIPMultiAbnormalityModel:
    torch.manual_seed(0)
    return CTCLIPMultiAbnormalityModel(None, name, **({"pretrained": False} | SMALL | options)).eval()


def volumes(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def moved_from_start(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value + 0.01 * torch.rand(value.shape) if value.is_floating_point() else value
            for key, value in state.items()}  # fmt: skip


@pytest.mark.parametrize("name", ["mc3_18", "r2plus1d_18"])  # whose stems differ; r3d_18 has the former's
def test_kinetics_weights_are_loaded_for_all_but_stem_and_classifier(name, tmp_path):
    """A file as torchvision saves one. Features behind the stem are those of its network."""
    torch.manual_seed(3)
    published = get_model(name, weights=None).eval()
    published.load_state_dict(state := moved_from_start(published.state_dict()))
    torch.save(state, tmp_path / "weights.pth")
    model = video(name, backbone_weights=tmp_path / "weights.pth", pretrained=True)
    own = model.backbone.net.state_dict()
    kept = {key for key in state if not key.startswith(("stem.", "fc."))}
    assert own.keys() - kept == {key for key in own if key.startswith("stem.")}
    assert all(torch.equal(own[key], state[key]) for key in kept)
    assert own["stem.0.weight"].shape == (64, 1, 2, 2, 2)
    report = model.load_report
    stem = sum(key.startswith("stem.") for key in state)
    assert (report.loaded, report.dropped) == (len(kept), {"of its stem": stem, "of its classifier": 2})
    assert repr(report).endswith("head: linear, new; stem: new, of one channel") and model.derived_from == "other"
    with torch.no_grad():
        x = model.backbone.net.stem(model.backbone.scaled(volumes(1, 1, 16, 16, 16)))
        expected = published.layer4(published.layer3(published.layer2(published.layer1(x))))
        torch.testing.assert_close(model.features(volumes(1, 1, 16, 16, 16)), expected.mean((2, 3, 4)))


@pytest.mark.usefixtures("small_video")
def test_other_files_are_refused_and_nothing_is_loaded(tmp_path):
    state = Narrow().state_dict()
    net = ctclip_model.VideoBackbone("mc3_18", 2, "-1000:200")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    last = "layer4.0.conv2.0.weight"
    for content, found in (
        ({key: value for key, value in state.items() if key != last}, f"1 missing: {last}"),
        (state | {"layer9.weight": torch.zeros(1)}, "1 unexpected: layer9.weight"),
        (state | {last: torch.zeros(1)}, f"1 wrong shape or type: {last} is (1,)"),
    ):
        save_file(content, tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError, match="does not fit torchvision's 'mc3_18'") as error:
            net.load("mc3_18", tmp_path / "weights.safetensors")
        assert found in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    with pytest.raises(CheckpointError, match="found no such file"):
        net.load("mc3_18", tmp_path / "nothing.pth")


@pytest.mark.usefixtures("small_video")
def test_kinetics_weights_come_from_torch_hubs_cache_or_not_at_all(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(ctclip_model, "urlopen", refuse)
    with pytest.raises(PretrainedWeightsError, match="no network.*--backbone-weights.*--no-pretrained"):
        video(pretrained=True)
    state = moved_from_start(Narrow().state_dict())
    (tmp_path / "checkpoints").mkdir()
    name = get_model_weights("mc3_18")["KINETICS400_V1"].url.rpartition("/")[2]
    torch.save(state, tmp_path / "checkpoints" / name)
    model = video(pretrained=True)
    assert torch.equal(model.backbone.net.layer4[0].conv2[0].weight, state["layer4.0.conv2.0.weight"])
    assert model.derived_from == "kinetics400"
    licence = licence_of(model, Facts())
    assert licence.name == "unknown" and "torchvision's `mc3_18` with Kinetics-400 weights" in licence.says


def test_the_published_sizes_are_the_defaults():
    with torch.device("meta"):
        model = CTCLIPMultiAbnormalityModel(None, "r3d_18", pretrained=False)
    assert (model.input_shape, model.crop_shape) == ((120, 240, 240), (96, 192, 192))
    assert ctclip.config.VIDEO_MODELS == VIDEO_MODELS


def test_layers_are_the_stem_and_each_block():
    with torch.device("meta"):
        model = CTCLIPMultiAbnormalityModel(None, "r2plus1d_18", pretrained=False)
    layers = model.layers()
    assert len(layers) == 9 and all(name.startswith("backbone.net.stem.") for name in layers[0])
    assert sorted(name for names in layers for name in names) == sorted(
        name for name, _ in model.named_parameters() if name.startswith("backbone.")
    )


@pytest.mark.usefixtures("small_video")
def test_the_window_goes_to_minus_one_and_one_in_whole_hu():
    backbone = video().backbone
    hu = torch.tensor([-1000.0, -999.6, -400, 99.4, 200, 900])
    expected = (torch.tensor([-1000.0, -1000, -400, 99, 200, 200]) + 400) / 600
    torch.testing.assert_close(backbone.scaled(hu / 1000), expected)
    x = (hu / 1000).requires_grad_()
    backbone.scaled(x).sum().backward()
    assert x.grad[3] == pytest.approx(1000 / 600, abs=1e-3), "rounding has the gradient of no rounding"
    named = video(windows=["-997:888:-142.39:360.97"]).backbone
    torch.testing.assert_close(named.scaled(torch.tensor([0.1, 0.9])), torch.tensor([242.39, 1030.39]) / 360.97)


@pytest.mark.usefixtures("small_video")
@torch.no_grad()
def test_evaluation_takes_the_central_crop_or_the_mean_of_eight():
    volume = volumes(1, 1, 30, 40, 40)
    central, eight = video(), video(test_crops=8)
    torch.testing.assert_close(central(volume), central(volume[:, :, 3:27, 4:36, 4:36]))
    corners = [volume[:, :, i : i + 24, j : j + 32, k : k + 32] for i in (0, 6) for j in (0, 8) for k in (0, 8)]
    torch.testing.assert_close(eight.features(volume), torch.cat([central.features(x) for x in corners]).mean(0)[None])
    assert crop_starts((30, 40, 40), (24, 32, 32), 1) == [(3, 4, 4)] and len(eight.crops(volume)) == 8
    assert len(eight.train().crops(volume)) == 1
    for x in (volume[:, :, :20], volume):  # smaller than a crop, and at the borders of one
        assert central(x).shape == (1, 18)
    with pytest.raises(ValueError, match="a video ResNet takes volumes"):
        central(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"head": "attention"}, "found head='attention' and attention=None with the video ResNet"),
        ({"attention": "cbam"}, "expected head='linear'"),
        ({"stem_stride": 3}, "stem_stride is 3, expected 2 or 4"),
        ({"test_crops": 2}, "test_crops is 2, expected 1 or 8"),
        ({"crop": 0.0}, "crop is 0.0, expected a share above 0"),
        ({"crop": 0.1}, "found crops of 3 x 4 x 4 voxels, expected at least 2 each way, and more than 16"),
        ({"windows": ["lung", "bone"]}, "found 2 windows for a video ResNet, expected one"),
    ],
)
def test_what_a_video_resnet_does_not_take_is_refused(options, found):
    with pytest.raises(ValueError) as error:
        video(**options)
    assert found in str(error.value)


@pytest.mark.usefixtures("small_video")
def test_lora_is_refused_and_checkpointing_changes_no_gradient():
    model = video()
    with pytest.raises(ValueError, match="LoRA is for vision transformers"):
        model.add_lora()
    gradients = []
    for enabled in (False, True):
        model.train().set_gradient_checkpointing(enabled)
        model.zero_grad()
        F.mse_loss(model.features(volumes(2, 1, 24, 32, 32)), torch.ones(2, 64)).backward()
        gradients.append([p.grad.clone() for p in model.backbone.parameters()])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.usefixtures("small_video")
def test_a_saved_model_is_the_same_model(tmp_path):
    model = video(stem_stride=4, crop=0.9, test_crops=8, windows=["-1000:400"])
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "saved")
    again = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["crop"] == 0.9
    assert again.crop_shape == (27, 36, 36) and again.test_crops == 8
    with torch.no_grad():
        x = volumes(1, 1, 30, 40, 40)
        assert torch.equal(model(x), again(x)) and model(x).std() > 0
    state = model.encoder_state()
    other = video(stem_stride=4, crop=1.0, test_crops=8, windows=["-1000:200"]).encoder_state()
    assert {key for key in state if not torch.equal(state[key], other[key])} == {"backbone.window", "backbone.crops"}


@pytest.mark.usefixtures("small_video")
@pytest.mark.parametrize("test_crops", [1, 8])
def test_heat_maps_sum_to_the_logit_and_lie_where_the_crop_was(test_crops):
    model = video(test_crops=test_crops)
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.classifier.bias)
    volume = volumes(1, 1, 30, 40, 40)
    plain, smooth = (token_contributions(model, volume, [2, 5], smooth) for smooth in (False, True))
    with torch.no_grad():
        logits = model(volume)[0, [2, 5]]
    torch.testing.assert_close(torch.from_numpy(plain.logits).float(), logits)
    torch.testing.assert_close(torch.from_numpy(plain.remainder).float(), model.classifier.bias[[2, 5]].detach())
    assert smooth.values.sum((1, 2, 3)) == pytest.approx(plain.values.sum((1, 2, 3)), rel=1e-4)
    assert plain.values.shape == (2, 15, 2, 2)  # tokens of 2 x 16 x 16 voxels
    outside = plain.values[:, 0]  # slices 0 and 1, of which the central crop sees none
    assert not outside.any() if test_crops == 1 else outside.any()


def test_random_crops_reach_every_place_and_follow_from_the_seed():
    boxes = [random_box((5, 4, 3), (3, 4, 4), torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert {box[0].start for box in boxes} == {0, 1, 2} and all(box[0].stop == box[0].start + 3 for box in boxes)
    assert all(box[1:] == (slice(0, 4), slice(0, 4)) for box in boxes)
    view = Augmentation(7, False, (3, 2, 2))
    draws = {name: [view.box((6, 6, 6), view.generator(name)) for _ in range(2)] for name in "abc"}
    assert all(first == again for first, again in draws.values()) and len({str(box) for box in draws.values()}) > 1


def test_jitter_shows_what_lay_in_another_window():
    """Of 50 draws of both ends: a ramp through the window, moved back by hand, lies where it lay."""
    ramp = torch.linspace(-1, 1, 2001)[None]
    ends = []
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        after = jitter_window(ramp.clone(), (-800.0, 200.0), 100.0, generator)[0]
        inside = (after > -0.79) & (after < 0.19)
        (first, last), (low, high) = ramp[0, inside][[0, -1]], after[inside][[0, -1]]
        slope = (last - first) / (high - low)
        ends.append([1000 * (first + slope * (end - low)).item() for end in (-0.8, 0.2)])
        assert after.min() >= -1 and after.max() <= 1
    low, high = torch.tensor(ends).T
    for end, centre in ((low, -800), (high, 200)):
        assert (end - centre).abs().max() < 100.1 and (end - centre).min() < -60 and (end - centre).max() > 60
    assert abs(torch.corrcoef(torch.stack([low, high]))[0, 1]) < 0.5, "each end is drawn for itself"
