"""Heads and what they are fed from, layers and their unfreezing, checkpointing, losses by name, atomic files: against
the plain definitions (written out here token by token) and against `encode` on the golden weights."""

import errno
import math
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_model import OTHER_SIZES
from torch import nn

import ctclip_model
from ctclip.fileio import replacing
from ctclip_model import (
    AttentionHead,
    CheckpointError,
    CTCLIPMultiAbnormalityModel,
    balanced_label_weights,
    create_loss,
    read_checkpoint,
)

FIXTURES = Path(__file__).parent / "fixtures"
CLIP, CLASSFINE = str(FIXTURES / "tiny_a_clip.pt"), str(FIXTURES / "tiny_a_classfine.pt")
HEADS = ("linear", "mlp", "attention")


@pytest.fixture(scope="module")
def volume():
    with np.load(FIXTURES / "tiny_a_expected.npz") as file:
        return torch.from_numpy(file["volume"])


def ctclip(head: str, path: str = CLIP) -> CTCLIPMultiAbnormalityModel:
    """In evaluation mode, its new head away from zero so that every parameter matters."""
    torch.manual_seed(7)
    model = CTCLIPMultiAbnormalityModel(path, head=head)
    scatter(model)
    return model.eval()


def scatter(model: CTCLIPMultiAbnormalityModel) -> None:
    with torch.no_grad():
        for parameter in model.head_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def slices(backbone: str, attention: str | None = None) -> CTCLIPMultiAbnormalityModel:
    torch.manual_seed(7)
    return CTCLIPMultiAbnormalityModel(None, backbone, attention=attention, pretrained=False, n_slices=2)


def gradients(model: CTCLIPMultiAbnormalityModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- heads: start, choice, files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_new_heads_give_logits_of_exactly_zero(head, volume):
    model = CTCLIPMultiAbnormalityModel(CLIP, head=head).eval()
    assert model.head_name == head
    assert torch.equal(model(volume), torch.zeros(2, 18))
    new = {key for key in model.state_dict() if key.startswith("classifier.")}
    assert new and set(model.load_report.new) == new
    assert len(model.head_parameters()) == len(new)


@torch.no_grad()
def test_mlp_starts_at_the_answers_of_classfine(volume):
    linear, mlp = CTCLIPMultiAbnormalityModel(CLASSFINE), CTCLIPMultiAbnormalityModel(CLASSFINE, head="mlp")
    assert torch.equal(mlp.eval()(volume), linear.eval()(volume)) and mlp(volume).any()
    assert isinstance(mlp.classifier, nn.Linear)
    branch = {"hidden.weight", "hidden.bias", "out.weight", "out.bias"}
    assert set(mlp.load_report.new) == {f"classifier.{name}" for name in branch}
    assert linear.load_report.new == () and mlp.load_report.loaded == linear.load_report.loaded


def test_attention_drops_classfines_head_and_says_so():
    report = CTCLIPMultiAbnormalityModel(CLASSFINE, head="attention").load_report
    assert report.dropped["ClassFine's linear head"] == 2 and "2 ClassFine's linear head" in str(report)
    assert report.loaded + sum(report.dropped.values()) == len(read_checkpoint(CLASSFINE))


def test_half_a_linear_head_is_an_error_for_the_mlp_too(tmp_path):
    state = read_checkpoint(CLASSFINE)
    del state["classifier.bias"]
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(CheckpointError, match="half a head: classifier.bias is missing"):
        CTCLIPMultiAbnormalityModel(str(tmp_path / "half.pt"), head="mlp")


def test_unknown_heads_and_heads_on_slice_backbones_are_refused():
    with pytest.raises(ValueError, match="head='tree' is not known; expected one of linear, mlp, attention"):
        CTCLIPMultiAbnormalityModel(CLIP, head="tree")
    with pytest.raises(ValueError, match="is for CT-CLIP") as error:
        CTCLIPMultiAbnormalityModel(None, "resnet10t", pretrained=False, head="mlp")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_save_and_load_keep_the_head(head, volume, tmp_path):
    model = ctclip(head)
    model.save_pretrained(tmp_path)
    again = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path).eval()
    assert again.head_name == head and torch.equal(again(volume), model(volume)) and model(volume).any()


def test_a_model_saved_before_there_were_heads_loads_as_linear(tmp_path):
    import json

    ctclip("linear").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("head") == "linear"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path).head_name == "linear"


# -- the attention head against its definition -------------------------------------------------------------------------


def attention_head(codes: int = 50, dim: int = 12, grid=(3, 4, 5)) -> tuple[AttentionHead, torch.Tensor]:
    torch.manual_seed(1)
    head = AttentionHead(dim, grid, hidden=8).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    return head, torch.randn(codes, dim) * torch.rand(codes, 1).exp()


@torch.no_grad()
def test_attention_equals_its_definition_token_by_token_and_the_histogram_over_codes():
    head, codebook = attention_head()
    ids = torch.randint(0, 50, (2, 3, 4, 5))
    tokens = codebook[ids]  # (B, T, h, w, C)
    inputs = torch.cat([F.normalize(tokens, dim=-1), tokens.norm(dim=-1, keepdim=True).log10()], -1)
    hidden = F.gelu(inputs @ head.hidden.weight.T + head.hidden.bias) / math.sqrt(8)
    for label in (0, 7, 17):
        score = hidden @ head.query.weight[label]
        evidence = hidden @ head.evidence.weight[label]
        for t in range(3):
            for i in range(4):
                for j in range(5):
                    score[:, t, i, j] += head.depth[label, t] + head.row[label, i] + head.column[label, j]
        share = score.flatten(1).softmax(1)
        expected = (share * evidence.flatten(1)).sum(1) + head.evidence.bias[label]
        logits = head(ids, codebook)[:, label]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

        attention, _ = head.attend(ids, codebook)
        histogram = torch.zeros(2, 50).scatter_add_(1, ids.flatten(1), attention[:, label].flatten(1))
        table = head._table(codebook)[:, 18 + label]
        torch.testing.assert_close(logits, histogram @ table + head.evidence.bias[label], rtol=0, atol=1e-5)


def test_codes_and_tokens_give_the_same_logits_and_head_gradients():
    head, codebook = attention_head()
    ids = torch.randint(0, 50, (2, 3, 4, 5))
    found = []
    for x in (ids, ids.int(), codebook[ids]):
        head.zero_grad()
        logits = head(x, codebook)
        (logits * torch.arange(36.0).view(2, 18).cos()).sum().backward()
        found.append((logits.detach(), [p.grad.clone() for p in head.parameters()]))
    for logits, grads in found[1:]:
        torch.testing.assert_close(logits, found[0][0], rtol=0, atol=1e-5)
        for one, other in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            assert one.any()


@torch.no_grad()
def test_attend_gives_shares_and_evidence_that_add_up_to_the_logits():
    head, codebook = attention_head()
    ids = torch.randint(0, 50, (2, 3, 4, 5))
    attention, evidence = head.attend(ids, codebook)
    assert attention.shape == evidence.shape == (2, 18, 3, 4, 5)
    torch.testing.assert_close(attention.sum((2, 3, 4)), torch.ones(2, 18))
    logits = (attention * evidence).sum((2, 3, 4)) + head.evidence.bias
    assert torch.equal(logits, head(ids, codebook))


@torch.no_grad()
def test_another_depth_interpolates_the_depth_table():
    head, codebook = attention_head()
    doubled = head._position(6, 4, 5) - head.row.T[:, None] - head.column.T  # (6, h, w, 18), the depth's part
    expected = F.interpolate(head.depth[None], 6, mode="linear")[0].T
    torch.testing.assert_close(doubled[:, 0, 0], expected)
    torch.testing.assert_close(doubled[:, 3, 4], expected)
    assert head(torch.randint(0, 50, (1, 6, 4, 5)), codebook).shape == (1, 18)
    assert head(torch.randint(0, 50, (1, 1, 4, 5)), codebook).shape == (1, 18)


def test_attention_head_is_bit_identical_from_run_to_run_with_two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(3)
        head, codebook = AttentionHead(16, (12, 12, 12)), torch.randn(256, 16)
        ids = torch.randint(0, 256, (8, 12, 12, 12))
        nn.init.normal_(head.evidence.weight)
        results = []
        for _ in range(4):
            torch.manual_seed(4)  # dropout
            head.zero_grad()
            logits = head.train()(ids, codebook)
            logits.square().sum().backward()
            results.append([logits.detach(), *(p.grad.clone() for p in head.parameters())])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@torch.no_grad()
def test_half_precision_around_the_attention_head_does_not_reach_it():
    head, codebook = attention_head()
    ids = torch.randint(0, 50, (2, 3, 4, 5))
    outside = head(ids, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(ids, codebook), outside)


def test_attention_finds_a_token_of_many_that_the_mean_over_depth_drowns():
    """One token of 500 says whether the finding is there; 400 cases to learn it from, 200 to show it."""
    torch.manual_seed(0)
    sizes = asdict(OTHER_SIZES)
    model = {head: CTCLIPMultiAbnormalityModel(sizes=sizes, head=head, dropout=0.0) for head in ("linear", "attention")}
    model["attention"].load_state_dict(
        {k: v for k, v in model["linear"].state_dict().items() if not k.startswith("classifier.")}, strict=False
    )
    codes = torch.randint(1, 40, (600, 20, 5, 5))
    labels = (torch.arange(600) % 2).float()
    where = torch.randint(0, 500, (600,))
    codes.flatten(1)[torch.arange(600), where] = torch.where(labels > 0, 0, codes.flatten(1)[torch.arange(600), where])
    area = {}
    for name, one in model.items():
        one.freeze_backbone()
        with torch.no_grad():
            features = one.features_from_cache(codes)
        optimizer = torch.optim.AdamW(one.head_parameters(), lr=3e-2)
        for _ in range(200):
            rows = torch.randperm(400)[:64]
            loss = F.binary_cross_entropy_with_logits(one.head(features[rows])[:, 0], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits = one.head(features[400:])[:, 0]
        positive, negative = logits[labels[400:] > 0], logits[labels[400:] == 0]
        area[name] = (positive[:, None] > negative).float().mean().item()
    assert area["attention"] > 0.95 and area["linear"] < 0.75, area


# -- features, to the cache and back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("path", [CLASSFINE, "tiny"])
@torch.no_grad()
def test_codes_of_any_integer_type_stand_in_for_the_volume(head, path, volume):
    if path == "tiny":
        torch.manual_seed(2)
        model = CTCLIPMultiAbnormalityModel(sizes=asdict(OTHER_SIZES), head=head)
        volume = torch.rand(3, 1, 8, 30, 30) * 2 - 1
        scatter(model)
        model.eval()
    else:
        model = ctclip(head, path)
    model.freeze_backbone()
    codes = model.encode_for_cache(volume)
    assert model.cache_format == "codes" and codes.dtype == torch.int64 and torch.equal(codes, model.code_ids(volume))
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint16):
        features = model.features_from_cache(codes.to(dtype))
        if head == "attention":
            assert torch.equal(features, model.features(volume))
        else:
            torch.testing.assert_close(features, model.encode(volume), rtol=0, atol=1e-6)
            torch.testing.assert_close(features, model.features(volume), rtol=0, atol=1e-6)
        torch.testing.assert_close(model.head(features), model(volume), rtol=0, atol=1e-5)


def test_latents_from_codes_do_not_depend_on_the_chunks(monkeypatch):
    model = ctclip("linear")
    codes = torch.randint(0, 64, (7, 4, 4, 4))
    whole = model.features_from_cache(codes)
    monkeypatch.setattr(ctclip_model, "LATENTS_AT_ONCE", 3)
    torch.testing.assert_close(model.features_from_cache(codes), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["pooled", "maps"])
@torch.no_grad()
def test_slice_features_are_pooled_unless_attention_needs_the_maps(kind):
    model = slices("resnet10t", "cbam" if kind == "maps" else None).eval()
    scatter(model)
    x = torch.rand(3, 1, 6, 64, 64) * 2 - 1
    features = model.features(x)
    assert model.cache_format == kind
    assert features.shape == ((3, 512) if kind == "pooled" else (3, 2, 512, 2, 2))
    assert torch.equal(model.encode_for_cache(x), features) and model.features_from_cache(features) is features
    assert torch.equal(model.head(features), model(x)) and model(x).any()
    maps = model.backbone(ctclip_model.slice_triplets(x, 2).flatten(0, 1))  # the definition: pool after attention
    pooled = model.attention(maps).mean((2, 3)).view(3, 2, -1).mean(1)
    torch.testing.assert_close(model(x), model.classifier(pooled), rtol=0, atol=1e-6)


def test_attention_features_are_tokens_exactly_where_a_gradient_reaches_them(volume):
    model = ctclip("attention")
    model.unfreeze_backbone(1)
    tokens = model.features(volume)
    assert tokens.is_floating_point() and tokens.shape == (2, 3, 4, 4, 32) and tokens.requires_grad
    with torch.no_grad():
        ids = model.features(volume)
        assert not ids.is_floating_point() and ids.shape == (2, 3, 4, 4)
        torch.testing.assert_close(model.head(tokens), model.head(ids), rtol=0, atol=1e-5)
    model.freeze_backbone()
    assert torch.equal(model.features(volume), ids)


def test_encoder_state_holds_all_that_cached_features_depend_on(volume):
    model = ctclip("linear")
    state = model.encoder_state()
    assert set(state) == {key for key in model.state_dict() if key.startswith("visual_transformer.")}
    assert set(ctclip("attention").encoder_state()) == set(state)
    one, other = slices("resnet10t"), slices("resnet10t")
    other.n_slices = 3
    state = one.encoder_state()
    assert {key for key in one.state_dict() if key.startswith("backbone.")} < set(state)
    assert all(key.startswith("backbone.") for key in state)
    different = [key for key, value in other.encoder_state().items() if not torch.equal(value, state[key])]
    assert different == ["backbone.n_slices"]  # changes what is pooled, and no tensor of the network


# -- layers and unfreezing ---------------------------------------------------------------------------------------------


def test_ctclip_layers_run_from_the_patches_to_the_latent():
    layers = ctclip("linear").layers()
    tower = "visual_transformer."
    assert len(layers) == 1 + 2 + 3
    starts = [("to_patch_emb.", "spatial_rel_pos_bias.")]
    starts += [(f"enc_spatial_transformer.layers.{i}.",) for i in range(2)]
    starts += [(f"enc_temporal_transformer.layers.{i}.",) for i in range(3)]
    starts[2] += ("enc_spatial_transformer.norm_out.",)
    starts[5] += ("enc_temporal_transformer.norm_out.",)
    for names, expected in zip(layers, starts, strict=True):
        allowed = tuple(tower + start for start in expected)
        assert names and all(name.startswith(allowed) or name == "to_visual_latent.weight" for name in names)
        assert all(any(name.startswith(start) for name in names) for start in allowed)
    assert "to_visual_latent.weight" in layers[-1]
    assert not any("to_visual_latent.weight" in names for names in ctclip("attention").layers())


@pytest.mark.parametrize(
    ("variant", "count"),
    [("linear", 6), ("attention", 6), ("resnet10t", 5), ("vit_tiny_patch16_224", 13), ("convnext_atto", 13)],
)
def test_every_backbone_parameter_is_in_exactly_one_layer(variant, count):
    model = ctclip(variant) if variant in HEADS else slices(variant)
    names = [name for layer in model.layers() for name in layer]
    backbone = {id(parameter) for parameter in model.backbone_parameters()}
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if id(p) in backbone)
    assert len(model.layers()) == count and all(model.layers())


def test_a_backbone_without_groups_is_one_layer(monkeypatch):
    model = slices("resnet10t")
    monkeypatch.delattr(type(model.backbone.net), "group_matcher")
    assert [len(layer) for layer in model.layers()] == [len(model.backbone_parameters())]


@pytest.mark.parametrize("variant", ["linear", "attention", "resnet10t"])
def test_parameter_groups_hold_every_parameter_once_at_its_layers_rate(variant):
    model = ctclip(variant) if variant in HEADS else slices(variant, attention="cbam")
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2, 1e-4, layer_decay=0.5, weight_decay=0.1), lr=9)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"])
             for group in optimizer.param_groups for p in group["params"]}  # fmt: skip
    rates = {name: 1e-4 * 0.5**below for below, layer in enumerate(reversed(model.layers())) for name in layer}
    rates |= {name: 1e-2 for name in names.values() if name.startswith(("classifier.", "attention."))}
    parameters = dict(model.named_parameters())
    assert found == {name: (rate, 0.1 if parameters[name].ndim > 1 else 0.0) for name, rate in rates.items()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    assert set(parameters) - set(found) == ({"to_visual_latent.weight"} if variant == "attention" else set())


@pytest.mark.parametrize("variant", ["linear", "mlp", "attention", "resnet10t", "convnext_atto"])
def test_only_open_layers_get_gradients(variant, volume):
    model = ctclip(variant) if variant in HEADS else slices(variant)
    scatter(model)
    x = volume if variant in HEADS else torch.rand(2, 3, 64, 64)
    layers = model.layers()
    head = {name for name in model.state_dict() if name.startswith("classifier.")}
    for count in (1, 2, None, 99):
        model.freeze_backbone()
        model.unfreeze_backbone(count)
        model.zero_grad()
        model.train()(x).square().sum().backward()
        opened = {name for layer in (layers[-count:] if count else layers) for name in layer}
        assert {name for name, p in model.named_parameters() if p.requires_grad} == opened | head
        found = set(gradients(model))
        unused = {"backbone.net.head.norm.weight", "backbone.net.head.norm.bias"}  # convnext's own classifier
        assert found - unused == (opened | head) - unused and found <= opened | head
        assert any(name in found for name in layers[-1])


@pytest.mark.parametrize("count", [0, -1])
def test_opening_no_layer_is_refused(count):
    with pytest.raises(ValueError, match=f"layers is {count}, expected at least 1"):
        ctclip("linear").unfreeze_backbone(count)


def test_the_backward_pass_ends_above_the_lowest_open_layer(volume):
    model = ctclip("linear")
    model.unfreeze_backbone(1)
    seen = []
    for transformer in ("enc_spatial_transformer", "enc_temporal_transformer"):
        for layer in getattr(model.visual_transformer, transformer).layers:
            layer[3].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model(volume)
    assert seen == [False, False, False, False, True]


def test_frozen_layers_stay_in_evaluation_mode_and_keep_their_batch_statistics():
    model = slices("resnet10t")
    model.unfreeze_backbone(2)  # layer3 and layer4
    before = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    model.train()
    model(torch.rand(4, 3, 64, 64))
    moved = {key for key, value in model.state_dict().items() if key in before and not torch.equal(before[key], value)}
    assert moved == {key for key in before if "layer3" in key or "layer4" in key}
    assert not model.backbone.net.layer1.training and model.backbone.net.layer4.training and model.training
    assert not model.eval().backbone.net.layer4.training
    assert model.train().backbone.net.layer4.training


def test_attention_leaves_the_latents_projection_out_but_keeps_it(volume):
    model = ctclip("attention", CLASSFINE)
    idle = model.to_visual_latent.weight
    for change in (model.freeze_backbone, model.unfreeze_backbone):
        change()
        assert not idle.requires_grad
    trained = [*model.backbone_parameters(), *model.head_parameters()]
    assert not any(parameter is idle for parameter in trained)
    assert {id(p) for p in trained} | {id(idle)} == {id(p) for p in model.parameters()}
    assert "to_visual_latent.weight" in model.state_dict()
    with torch.no_grad():
        linear = CTCLIPMultiAbnormalityModel(CLASSFINE).eval()
        assert torch.equal(model.encode(volume), linear.encode(volume))
        assert torch.equal(model.code_ids(volume), linear.code_ids(volume))


# -- gradient checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "count"), [("linear", None), ("linear", 2), ("attention", None), ("vit_tiny_patch16_224", None)]
)
def test_checkpointing_gives_the_same_gradients(variant, count, volume, monkeypatch):
    model = ctclip(variant) if variant in HEADS else slices(variant).eval()  # no dropout
    scatter(model)
    model.unfreeze_backbone(count)
    x = volume if variant in HEADS else torch.rand(1, 3, 224, 224)
    calls = []
    original = ctclip_model.Attention.forward
    monkeypatch.setattr(ctclip_model.Attention, "forward", lambda *a: calls.append(1) or original(*a))
    found = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        calls.clear()
        model.zero_grad()
        model(x).square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=0, atol=1e-6)
    if variant in HEADS:
        layers = 5
        assert len(calls) == layers + (layers if count is None else count)  # again those that need gradients, no others


def test_backbones_without_checkpointing_say_so():
    model = slices("resnet10t")
    model.backbone.net.set_grad_checkpointing = lambda enable: pytest.fail() if not enable else _unsupported()
    with pytest.raises(ValueError, match="'resnet10t' has no gradient checkpointing"):
        model.set_gradient_checkpointing()


def _unsupported():
    raise AssertionError("gradient checkpointing not supported")  # what timm does


# -- losses ------------------------------------------------------------------------------------------------------------

LOGIT, P = math.log(0.8 / 0.2), 0.8


@pytest.mark.parametrize(
    ("kind", "positive", "negative"),
    [
        # alpha 0.75, gamma 1, factor 4
        ("focal", 4 * 0.25 * 0.2 * -math.log(0.8), 4 * 0.75 * 0.8 * -math.log(0.2)),
        ("bce", -math.log(0.8), -math.log(0.2)),
        # timm's: gamma 1 on positives; on negatives gamma 4, and a probability of 0.05 for nothing
        ("asl", 0.2 * -math.log(0.8), (0.8 - 0.05) ** 4 * -math.log(0.2 + 0.05)),
    ],
)
def test_losses_by_hand(kind, positive, negative):
    logits = torch.full((1, 18), LOGIT)
    labels = torch.zeros(1, 18)
    labels[0, 0] = 1
    weights = torch.ones(18)
    weights[0] = 3.0
    mean = (positive + 17 * negative) / 18
    weighted = (3 * positive + 17 * negative) / 18
    assert create_loss(kind, 0.75, 1.0)(logits, labels).item() == pytest.approx(mean, rel=1e-5)
    assert create_loss(kind, 0.75, 1.0, weights)(logits, labels).item() == pytest.approx(weighted, rel=1e-5)
    twice = create_loss(kind, 0.75, 1.0)(logits.repeat(2, 1), labels.repeat(2, 1))  # a mean over volumes too
    assert twice.item() == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("kind", ["focal", "bce", "asl"])
def test_label_weights_scale_the_labels_gradient_on_both_sides(kind):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 18), (torch.rand(6, 18) < 0.4).float()
    weights = torch.ones(18)
    weights[3] = 2.0
    found = []
    for label_weights in (None, torch.ones(18), weights):
        leaf = logits.clone().requires_grad_()
        loss = create_loss(kind, 0.6, 2.0, label_weights)(leaf, labels)
        loss.backward()
        found.append((loss.item(), leaf.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1])
    torch.testing.assert_close(found[2][1][:, 3], 2 * found[0][1][:, 3])
    others = [i for i in range(18) if i != 3]
    torch.testing.assert_close(found[2][1][:, others], found[0][1][:, others])


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss 'hinge' is not known; expected focal, bce or asl"):
        create_loss("hinge")


def test_balanced_label_weights_by_hand():
    """Rates 1/2, 1/10, 9/10 and 1/100 of 100 volumes; the last label has no positive."""
    labels = torch.zeros(100, 5)
    for label, count in enumerate((50, 10, 90, 1, 0)):
        labels[:count, label] = 1
    weights = balanced_label_weights(labels)
    expected = torch.tensor([2.0, 10.0, 10.0, 20.0, 2.0])  # 100 is capped at ten times 2
    torch.testing.assert_close(weights, expected / expected.mean())
    assert weights.mean().item() == pytest.approx(1)
    assert torch.equal(balanced_label_weights(torch.zeros(4, 18)), torch.ones(18))


def test_weighting_labels_leaves_the_fitted_probability_alone():
    """A constant prediction fits the label rate under any weight, which a weight on positives would push up."""
    labels = (torch.arange(100) < 20).float()[:, None].expand(100, 18)
    logit = torch.zeros(1, 18, requires_grad=True)
    criterion = create_loss("bce", label_weights=torch.linspace(0.5, 1.5, 18))
    optimizer = torch.optim.LBFGS([logit], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = criterion(logit.expand(100, 18), labels)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    torch.testing.assert_close(logit.sigmoid(), torch.full((1, 18), 0.2), rtol=0, atol=1e-2)


# -- atomic files ------------------------------------------------------------------------------------------------------


def test_replacing_syncs_the_file_then_renames_then_syncs_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")
    seen = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle):
        seen.append("folder" if os.fstat(handle).st_mode & 0o040000 else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda *a: seen.append("rename") or replace(*a))
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and seen == ["file", "rename", "folder"]
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("place", ["block", "sync", "interrupt"])
def test_replacing_keeps_the_old_file_and_cleans_up_on_any_exception(tmp_path, monkeypatch, place):
    path = tmp_path / "a.json"
    path.write_text("old")
    error = KeyboardInterrupt if place == "interrupt" else OSError
    if place == "sync":
        monkeypatch.setattr(os, "fsync", lambda handle: _raise(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        if place != "sync":
            raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_mount_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(handle):
        if os.fstat(handle).st_mode & 0o040000:
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.json").read_text() == "new"


def _raise(error: BaseException):
    raise error
