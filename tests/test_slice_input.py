"""What a slice backbone is made of and what it is given: networks from folders in timm's layout, against timm's own;
channels, HU windows, sizes and spacing of the slices, against values worked by hand."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from helpers_hub import PUBLIC, Hub
from huggingface_hub import constants
from safetensors.torch import save_file

from ctclip.data.feature_cache import FeatureCache, encoder_digest
from ctclip_model import (
    CheckpointError,
    CTCLIPMultiAbnormalityModel,
    PretrainedWeightsError,
    parse_window,
    slice_triplets,
)

CT_SCALING = "-997:888:-142.39:360.97"  # DALE-CT-2S: (clip(HU, -997, 888) + 142.39) / 360.97
ONE_CHANNEL = {"in_chans": 1, "img_size": 96, "patch_size": 16}


def write_folder(folder: Path, architecture: str = "test_vit", weights: str = "model.safetensors", trained=None,
                 **arguments) -> tuple[str, torch.nn.Module]:  # fmt: skip
    """A folder as timm's save_for_hf writes it, with a classifier of 5 classes; -> its path, and timm's own network."""
    torch.manual_seed(3)
    net = timm.create_model(architecture, num_classes=5, **arguments).eval()
    folder.mkdir(parents=True, exist_ok=True)
    content = {"architecture": architecture, "num_classes": 5, "model_args": arguments,
               "pretrained_cfg": {"classifier": net.pretrained_cfg["classifier"]} | (trained or {})}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    if weights.endswith(".safetensors"):
        save_file(net.state_dict(), folder / weights, metadata={"format": "pt"})
    elif weights:
        torch.save(net.state_dict(), folder / weights)
    return str(folder), net


def model_of(backbone: str, **options) -> CTCLIPMultiAbnormalityModel:
    torch.manual_seed(7)
    return CTCLIPMultiAbnormalityModel(None, backbone, **({"n_slices": 2} | options)).eval()


def triplet(size: int = 96) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# -- networks from folders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@torch.no_grad()
def test_a_folder_gives_architecture_arguments_scaling_and_weights(tmp_path, weights):
    trained = {"mean": [0.4], "std": [0.2], "input_size": [1, 96, 96]}
    path, net = write_folder(tmp_path / "net", weights=weights, trained=trained, **ONE_CHANNEL)
    x = triplet()
    expected = net.forward_features(((x[:, 1:2] + 1) / 2 - 0.4) / 0.2)
    for name in (path, f"local-dir:{path}"):
        model = model_of(name, head="attention")
        assert torch.equal(model.features(x).flatten(1), expected[:, 0])  # the class token
        assert model.derived_from == "other" and "loaded" in str(model.load_report)
        assert model.load_report.dropped == {"timm's classifier": 2}
    theirs = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0, global_pool="")
    ours = model.backbone.net.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.state_dict().items()) and ours

    model.save_pretrained(tmp_path / "saved")
    os.rename(path, tmp_path / "elsewhere")  # a saved model needs no folder, and names none
    assert path not in (tmp_path / "saved" / "config.json").read_text()
    again = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.features(x), model.features(x)) and encoder_digest(again) == encoder_digest(model)


@torch.no_grad()
def test_a_repository_of_the_hub_is_read_from_the_clients_cache(tmp_path, monkeypatch):
    folder = tmp_path / "models--Owner--Name"
    path, net = write_folder(folder / "snapshots" / "abc", **ONE_CHANNEL, trained={"mean": [0.5], "std": [0.5]})
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = model_of("hf-hub:Owner/Name").features(triplet())
    assert torch.equal(found, model_of(path).features(triplet()))
    (folder / "snapshots" / "abc" / "model.safetensors").rename(tmp_path / "gone")
    with pytest.raises(PretrainedWeightsError, match="'hf-hub:Owner/Name' could not be fetched") as error:
        model_of("hf-hub:Owner/Name")
    assert "\n" not in str(error.value) and "name a folder of its config.json and weights" in str(error.value)
    model_of("hf-hub:Owner/Name", pretrained=False)  # needs its configuration only


@torch.no_grad()
def test_a_repository_is_fetched_once(tmp_path, monkeypatch):
    """From the tests' own hub, by the real client; weights of either name."""
    path, _ = write_folder(tmp_path / "net", weights="pytorch_model.bin", trained={"mean": [0.5], "std": [0.5]},
                           **ONE_CHANNEL)  # fmt: skip
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Hub({file.name: file.read_bytes() for file in Path(path).iterdir()}) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        found = [model_of(f"hf-hub:{PUBLIC}").features(triplet()) for _ in range(2)]
        assert hub.count("GET", "pytorch_model.bin") == hub.count("GET", "config.json") == 1
        with pytest.raises(PretrainedWeightsError, match="'hf-hub:Owner/Name' could not be fetched "):
            model_of("hf-hub:Owner/Name")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers: the cache serves
    found.append(model_of(f"hf-hub:{PUBLIC}").features(triplet()))
    assert all(torch.equal(features, model_of(path).features(triplet())) for features in found)


def test_a_folder_with_weights_elsewhere_or_none(tmp_path):
    path, net = write_folder(tmp_path / "net", weights="", trained={"mean": [0.5], "std": [0.5]}, **ONE_CHANNEL)
    with pytest.raises(CheckpointError, match=r"found no model.safetensors and no pytorch_model.bin, expected weights"):
        model_of(path)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    model = model_of(path, backbone_weights=tmp_path / "w.pth")
    assert torch.equal(model.backbone.net.cls_token, net.cls_token)
    assert model_of(path, pretrained=False).load_report is None


def test_arguments_that_would_read_other_files_are_passed_over(tmp_path):
    path, _ = write_folder(tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    config["model_args"] = {"num_classes": 5, "checkpoint_path": str(tmp_path / "x.pth"), "pretrained": True}
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    model = model_of(path)
    assert model.backbone.net.num_classes == 0
    model.save_pretrained(tmp_path / "saved")
    assert "x.pth" not in (tmp_path / "saved" / "config.json").read_text()


def test_folders_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    bad, _ = write_folder(tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text('{"model_args": {}}')
    other, _ = write_folder(tmp_path / "other", "test_resnet")
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"architecture": "test_vit"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    odd, _ = write_folder(tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text()) | {"model_args": {"wings": 2}}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    for path, line in (
        (str(tmp_path / "empty"), "found no config.json of timm's"),
        (bad, "found no config.json of timm's .KeyError: 'architecture'."),
        (other, "does not fit timm's 'test_vit'"),
        (odd, "'test_vit' does not take model_args {'wings': 2}"),
        (str(tmp_path / "nowhere"), "is not a timm model"),
    ):
        with pytest.raises(ValueError, match=line) as error:
            model_of(path)
        assert "\n" not in str(error.value)


# -- windows and channels --------------------------------------------------------------------------------------------


def test_windows_in_hu():
    assert parse_window("lung") == (-1350, 150, None, None) and parse_window("mediastinum") == (-160, 240, None, None)
    assert parse_window("bone") == (-500, 1300, None, None) and parse_window("-1000:200") == (-1000, 200, None, None)
    assert parse_window(CT_SCALING) == (-997, 888, -142.39, 360.97)
    for text in ("liver", "1:2:3", "200:-1000", "a:b", "0:1:2:0", "nan:1", ""):
        with pytest.raises(ValueError, match="expected lung, mediastinum, bone, LOW:HIGH or LOW:HIGH:MEAN:STD in HU"):
            parse_window(text)


@torch.no_grad()
def test_what_the_network_takes_worked_by_hand(tmp_path):
    hu = torch.tensor([-1000.0, -600, -142.39, 40, 240, 1000]).view(1, 1, 1, 6)
    x = torch.cat([hu / 1000 - 0.001, hu / 1000, hu / 1000 + 0.001], 1)  # the middle slice is the one
    path, _ = write_folder(tmp_path / "one", trained={"mean": [0.5, 0.5, 0.5], "std": [0.25] * 3}, **ONE_CHANNEL)
    ct = model_of(path, windows=[CT_SCALING]).backbone.scaled(x)
    expected = (hu.clamp(-997, 888) + 142.39) / 360.97
    torch.testing.assert_close(ct, expected, rtol=0, atol=1e-5)
    assert ct[0, 0, 0, 2].item() == pytest.approx(0, abs=1e-5)
    plain = model_of(path).backbone.scaled(x)  # [-1000, 1000], equal means stand for one
    torch.testing.assert_close(plain, ((hu + 1000) / 2000 - 0.5) / 0.25, rtol=0, atol=1e-5)

    network = model_of("test_resnet", pretrained=False, windows=["lung", "mediastinum", "bone"]).backbone
    mean, std = network.mean.view(3), network.std.view(3)
    for channel, (low, high) in enumerate(((-1350, 150), (-160, 240), (-500, 1300))):
        wanted = ((hu[0, 0].clamp(low, high) - low) / (high - low) - mean[channel]) / std[channel]
        torch.testing.assert_close(network.scaled(x)[:, channel], wanted[None, 0].view(1, 1, 6), rtol=0, atol=1e-5)
    network = model_of("test_resnet", pretrained=False, windows=["-1000:200"]).backbone  # of three neighbours
    wanted = ((x * 1000).clamp(-1000, 200) + 1000) / 1200
    torch.testing.assert_close(network.scaled(x), (wanted - network.mean) / network.std, rtol=0, atol=1e-5)
    x = x.clamp(-1, 1)
    whole = model_of("test_resnet", pretrained=False, windows=["-1000:1000"]).backbone.scaled(x)
    torch.testing.assert_close(whole, model_of("test_resnet", pretrained=False).backbone.scaled(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "windows", "line"),
    [
        ({}, ["lung", "bone"], "found 2 windows for a backbone of 3 channels, expected none, one or 3"),
        ({"in_chans": 1}, ["lung", "bone"], "found 2 windows for a backbone of 1 channels, expected none or one"),
        ({"in_chans": 2}, None, "found 0 windows for a backbone of 2 channels, expected one or 2"),
        ({"in_chans": 1}, None, "found a mean of 3 channels for a backbone of 1, expected one of each; give the"),
    ],
)
def test_windows_that_do_not_fit_the_channels_are_refused(tmp_path, arguments, windows, line):
    trained = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    path, _ = write_folder(tmp_path / "net", "test_resnet", trained=trained, **arguments)
    with pytest.raises(ValueError, match=line):
        model_of(path, windows=windows)


# -- sizes and spacing -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_another_size_resamples_position_embeddings_once(tmp_path):
    path, net = write_folder(tmp_path / "net", trained={"mean": [0.5] * 3, "std": [0.5] * 3})
    model = model_of(path, slice_size=224)
    assert model.input_shape == (120, 224, 224) and model.backbone.size == (224, 224)
    assert net.pos_embed.shape[1] == 101 and model.backbone.net.pos_embed.shape[1] == 197
    assert model.backbone(triplet(224)).shape[2:] == (14, 14)
    model.save_pretrained(tmp_path / "saved")
    again = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "saved")
    assert again.input_shape == model.input_shape and torch.equal(again(triplet(224)), model(triplet(224)))
    assert model_of("test_resnet", pretrained=False, slice_size=96).input_shape == (120, 96, 96)
    with pytest.raises(ValueError, match="found slices of 225 pixels, expected a multiple of 16, .*; take 224"):
        model_of("test_vit", pretrained=False, slice_size=225)


@torch.no_grad()
def test_grids_that_are_not_square(tmp_path):
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    path, _ = write_folder(tmp_path / "any", dynamic_img_size=True, trained={"mean": [0.5] * 3, "std": [0.5] * 3})
    model = model_of(path)
    maps = model.backbone(x)
    assert model.backbone.size is None and maps.shape[2:] == (4, 6)
    tokens = model.backbone.net.forward_features(x)[:, 1:]  # mean and deviation 0.5: the input as it is
    torch.testing.assert_close(maps[:, :, 1, 2], tokens[:, 1 * 6 + 2], rtol=0, atol=1e-5)
    path, _ = write_folder(tmp_path / "wide", img_size=[64, 96], trained={"mean": [0.5] * 3, "std": [0.5] * 3})
    assert model_of(path).backbone(triplet(64)).shape[2:] == (4, 6)  # resized to what it takes


@torch.no_grad()
def test_slices_at_a_spacing():
    model = model_of("test_resnet", pretrained=False, slice_spacing=1.5, slice_size=32)
    assert (model.n_slices, model.input_shape) == (240, (240, 32, 32))
    assert model_of("test_resnet", pretrained=False, slice_spacing=6).input_shape == (120, 224, 224)
    assert model_of("test_resnet", pretrained=False, slice_spacing=6).n_slices == 60
    volume = torch.rand(1, 1, *model.input_shape) * 2 - 1
    centres = slice_triplets(volume, 240)[0, :, 1]
    assert torch.equal(centres[1:-1], volume[0, 0, 1:-1])  # every slice once, but for the outermost
    with torch.enable_grad():
        whole = model.features(volume)  # at once; without gradients 64 at a time
    torch.testing.assert_close(model.features(volume), whole.detach(), rtol=0, atol=1e-6)
    for spacing in (0.4, 181.0):
        with pytest.raises(ValueError, match="mm apart, expected 0.5 to 180"):
            model_of("test_resnet", pretrained=False, slice_spacing=spacing)


def test_the_cache_is_keyed_by_all_of_it(tmp_path):
    path, _ = write_folder(tmp_path / "net", trained={"mean": [0.5] * 3, "std": [0.5] * 3})
    args, _ = write_folder(tmp_path / "args", trained={"mean": [0.5] * 3, "std": [0.5] * 3}, class_token=True)
    kinds = [{}, {"windows": ["lung"]}, {"windows": ["bone"]}, {"slice_spacing": 90}, {"slice_size": 96}]
    folders = [FeatureCache(tmp_path / "cache", model_of(path, **options)).folder for options in kinds]
    folders.append(FeatureCache(tmp_path / "cache", model_of(args)).folder)
    folders.append(FeatureCache(tmp_path / "cache", model_of(path, head="attention")).folder)
    folders.append(FeatureCache(tmp_path / "cache", model_of(path, head="attention", tokens="patch")).folder)
    assert len(set(folders)) == len(folders)
