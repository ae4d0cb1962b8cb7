"""A slice backbone that ends at an earlier feature map: against what timm's whole network computes on the way to its
last one; what is kept, cached and saved; which networks have no such map. Small timm networks with random weights."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from ctclip.data.feature_cache import FeatureCache
from ctclip_model import CTCLIPMultiAbnormalityModel, slice_triplets
from ctclip_training import main

NETWORKS = {"test_resnet": "layer3", "test_efficientnet": "blocks.3"}  # -> the part that ends at stride 16


def model_of(backbone: str, stride: int | None = 16, **options) -> CTCLIPMultiAbnormalityModel:
    torch.manual_seed(7)
    options = {"pretrained": False, "n_slices": 2, "head": "attention", "tokens": "patch"} | options
    model = CTCLIPMultiAbnormalityModel(None, backbone, feature_stride=stride, **options)
    with torch.no_grad():
        for parameter in model.head_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def volume() -> torch.Tensor:
    return torch.rand(1, 1, 8, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("backbone", NETWORKS)
@torch.no_grad()
def test_the_map_is_what_the_whole_network_has_there(backbone):
    model, whole, seen = model_of(backbone), model_of(backbone, None), []
    whole.backbone.net.load_state_dict(model.backbone.net.state_dict(), strict=False)
    whole.backbone.net.get_submodule(NETWORKS[backbone]).register_forward_hook(lambda *found: seen.append(found[2]))
    last = whole.features(volume())
    features = model.features(volume())
    assert features.shape == (1, 2, 4, 4, model.num_features) and last.shape[1:4] == (2, 2, 2)
    assert torch.equal(features[0], seen[0].movedim(1, -1)) and features.std() > 0
    assert torch.equal(model.backbone(slice_triplets(volume(), 2)[0]), seen[0])


@pytest.mark.parametrize("backbone", [*NETWORKS, "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_only_layers_that_lead_to_the_map_are_kept_and_trained(backbone):
    model, size = model_of(backbone, 8), 224 if "swin" in backbone else 64
    assert (
        sum(p.numel() for p in model.backbone_parameters())
        < sum(p.numel() for p in timm.create_model(backbone, num_classes=0).parameters()) / 2
    )
    names = [name for layer in model.layers() for name in layer]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters() if name.startswith("backbone."))
    model.unfreeze_backbone()
    model(torch.rand(1, 3, size, size) * 2 - 1).sum().backward()
    assert all(p.grad is not None for p in model.backbone_parameters())


@torch.no_grad()
def test_a_file_of_the_whole_network_gives_its_weights_and_a_saved_model_needs_none(tmp_path):
    net = timm.create_model("test_resnet", num_classes=5)
    save_file(net.state_dict(), tmp_path / "whole.safetensors")
    model = model_of("test_resnet", pretrained=True, backbone_weights=tmp_path / "whole.safetensors")
    own = model.backbone.net.state_dict()
    assert own and all(torch.equal(value, net.state_dict()[key]) for key, value in own.items())
    assert not any(key.startswith("layer4") for key in own) and any(key.startswith("layer3") for key in own)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["feature_stride"] == 16
    again = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(volume()), model(volume())) and model(volume()).any()


def test_each_stride_has_a_cache_of_its_own(tmp_path):
    """resnet18's map of stride 32 is its last, of the same tensors."""
    caches = [FeatureCache(tmp_path, model_of("resnet18", stride, head="linear")) for stride in (None, 32, 16, 8)]
    assert len({cache.folder for cache in caches}) == 4
    assert [cache.shape for cache in caches] == [(512,), (512,), (256,), (128,)]


@torch.no_grad()
def test_adapters_of_a_hierarchical_transformer():
    model, x = model_of("swin_tiny_patch4_window7_224", 4), torch.rand(1, 3, 224, 224) * 2 - 1
    before = model(x)
    model.add_lora(rank=2)
    assert torch.equal(model(x), before) and len(model.adapters()) == 5  # patches, and two layers of two blocks each
    for layer in model.adapters().values():
        layer.lora_b.normal_()
    changed = model(x)
    model.merge_lora()
    torch.testing.assert_close(model(x), changed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, changed, atol=1e-2)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model", "test_vit", "--feature-stride", "16"],
         "--model: found a feature stride of 16 for 'test_vit', which has feature maps of stride 16 only, expected a "
         "convolutional or hierarchical network"),
        (["--model", "test_resnet", "--feature-stride", "12"],
         "found a feature stride of 12 for 'test_resnet', expected 2, 4, 8, 16, 32; take one of these"),
        (["--feature-stride", "16"], "found --feature-stride, which goes with a slice backbone"),
        (["--model", "test_resnet", "--feature-stride", "0"], "--feature-stride is 0, expected at least 1"),
    ],
)  # fmt: skip
def test_strides_that_a_network_has_not_are_refused_in_one_line(phantoms, tmp_path, capsys, flags, line):
    where = ["--data-dir", str(phantoms), "--output-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "c")]
    options = ["--no-pretrained"] if "--model" in flags else []
    assert main([*flags, *options, *where]) == 2
    error = capsys.readouterr().err.strip()
    assert line in error and "\n" not in error and not list(tmp_path.glob("run/model*"))
