"""Slice backbones: pooling by a learned query per label, against its definition written out token by token; class
tokens against timm's own; adapters against the merged weights; what a cache keeps and what is saved. Small timm
networks with random weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from ctclip.data.feature_cache import encoder_digest, record_format
from ctclip_model import CTCLIPMultiAbnormalityModel, QueryHead, slice_triplets, slices_at_once

VIT, CONV = "test_vit", "test_resnet"  # timm's for tests: 371 and 469 thousand parameters, 160 x 160 pixels


def model_of(backbone: str, tokens: str = "slice", head: str = "attention", n_slices: int = 4, scattered: bool = True,
             **options) -> CTCLIPMultiAbnormalityModel:  # fmt: skip
    """In evaluation mode, its head away from zero so that every parameter matters."""
    torch.manual_seed(7)
    model = CTCLIPMultiAbnormalityModel(
        None, backbone, pretrained=False, head=head, tokens=tokens, n_slices=n_slices, **options
    )
    with torch.no_grad():
        for parameter in model.head_parameters() if scattered else ():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def volume_of(size: int = 64, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 1, 8, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# -- the head --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_query_head_equals_its_definition():
    torch.manual_seed(0)
    head = QueryHead(6, (4, 3, 2)).eval()
    for parameter in head.parameters():
        parameter.normal_()
    x = torch.randn(2, 4, 3, 2, 6)
    logits = head(x)
    for label in (0, 17):
        scores, tokens = [], []
        for s in range(4):
            for i in range(3):
                for j in range(2):
                    tokens.append(x[:, s, i, j])
                    place = head.depth[label, s] + head.row[label, i] + head.column[label, j]
                    scores.append(x[:, s, i, j] @ head.query.weight[label] / math.sqrt(6) + place)
        share = torch.stack(scores, 1).softmax(1)
        pooled = (share[..., None] * torch.stack(tokens, 1)).sum(1)
        expected = pooled @ head.evidence.weight[label] + head.evidence.bias[label]
        torch.testing.assert_close(logits[:, label], expected, rtol=0, atol=1e-5)
    assert logits.sum().item() == pytest.approx(2.6190, abs=1e-3)
    attention, evidence = head.attend(x)
    assert attention.shape == evidence.shape == (2, 18, 4, 3, 2)
    torch.testing.assert_close(attention.sum((2, 3, 4)), torch.ones(2, 18))


@pytest.mark.parametrize("tokens", ["slice", "patch"])
@pytest.mark.parametrize("backbone", [VIT, CONV])
@torch.no_grad()
def test_a_new_head_gives_exactly_zero_and_begins_as_the_linear_head_on_the_mean(backbone, tokens):
    model = model_of(backbone, tokens, scattered=False)
    x = volume_of(160)
    assert torch.equal(model(x), torch.zeros(2, 18)) and torch.equal(model(x[:, 0, :3]), torch.zeros(2, 18))
    model.classifier.evidence.weight.normal_()
    mean = model.features(x).mean((1, 2, 3))
    torch.testing.assert_close(model(x), F.linear(mean, model.classifier.evidence.weight), rtol=0, atol=1e-4)
    torch.manual_seed(3)  # the same channels are dropped from every token: the mean's dropout
    dropped = model.train().classifier(torch.ones(2, 4, 1, 1, model.num_features))
    torch.manual_seed(3)
    kept = F.dropout(torch.ones(2, 1, 1, 1, model.num_features), 0.3)[:, 0, 0, 0]
    torch.testing.assert_close(dropped, F.linear(kept, model.classifier.evidence.weight), rtol=0, atol=1e-3)


@torch.no_grad()
def test_tokens_are_class_tokens_means_of_maps_or_places():
    x = volume_of(160)
    triplets = slice_triplets(x, 4).flatten(0, 1)
    vit, conv = model_of(VIT), model_of(CONV)
    assert vit.backbone.has_class_token and not conv.backbone.has_class_token
    inside = vit.backbone.net.forward_features(((triplets + 1) / 2 - vit.backbone.mean) / vit.backbone.std)
    assert torch.equal(vit.features(x).flatten(0, 3), inside[:, 0])
    maps = conv.backbone(triplets)
    assert torch.equal(conv.features(x).flatten(0, 3), maps.mean((2, 3)))
    patches = model_of(CONV, "patch").features(x)
    assert patches.shape == (2, 4, 5, 5, conv.num_features)
    assert torch.equal(patches.flatten(0, 1), maps.movedim(1, -1))
    assert torch.equal(model_of(VIT, "patch").features(x).flatten(0, 1).flatten(1, 2), inside[:, 1:])


@torch.no_grad()
def test_cbam_before_the_query():
    for tokens in ("slice", "patch"):
        model, x = model_of(CONV, tokens, attention="cbam"), volume_of()
        features = model.features(x)
        assert model.cache_format == "maps" and features.ndim == 5
        maps = model.attention(features.flatten(0, 1))
        expected = maps.mean((2, 3), keepdim=True) if tokens == "slice" else maps
        torch.testing.assert_close(
            model(x), model.classifier(expected.movedim(1, -1).unflatten(0, (2, 4))), rtol=0, atol=1e-5
        )


def test_only_heads_of_slice_backbones_are_taken():
    for head in ("mlp", "prompts"):
        with pytest.raises(ValueError, match="takes head='linear' or 'attention'"):
            CTCLIPMultiAbnormalityModel(None, CONV, pretrained=False, head=head)
    with pytest.raises(ValueError, match="tokens='all' is not known; expected one of slice, patch"):
        CTCLIPMultiAbnormalityModel(None, CONV, pretrained=False, head="attention", tokens="all")


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "per_volume"), [("slice", 4), ("patch", 4 * 7 * 7)])
@torch.no_grad()
def test_a_cache_keeps_tokens_in_half_precision(tokens, per_volume):
    model = model_of(CONV, tokens)
    dtype, shape = record_format(model)
    assert (model.cache_format, dtype) == ("tokens", "float16")
    assert math.prod(shape) == per_volume * model.num_features
    x = volume_of(224)
    stored = model.encode_for_cache(x).half()
    assert stored.shape[1:] == shape
    torch.testing.assert_close(model.head(model.features_from_cache(stored.float())), model(x), rtol=0, atol=2e-3)


# -- saving, layers, gradients, export, heat maps --------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["slice", "patch"])
@torch.no_grad()
def test_save_load_and_reset(tmp_path, tokens):
    model, x = model_of(CONV, tokens), volume_of()
    model.save_pretrained(tmp_path)
    again = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)
    assert (again.head_name, again.tokens) == ("attention", tokens) and torch.equal(again(x), model(x))
    again.reset_classifier(labels=["one", "two"])
    assert torch.equal(again(x), torch.zeros(2, 2)) and isinstance(again.classifier, QueryHead)
    again.save_pretrained(tmp_path / "two")
    assert CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "two").labels == ("one", "two")


@torch.no_grad()
def test_labels_that_the_head_has_keep_their_logits():
    model, x = model_of(CONV, "patch"), volume_of()
    before, names = model(x), model.labels
    assert model.select_labels([names[5], "another", names[0]]) == ["another"]
    torch.testing.assert_close(model(x)[:, [0, 2]], before[:, [5, 0]], rtol=0, atol=1e-5)
    assert not model(x)[:, 1].any()


def test_gradients_reach_the_head_alone_or_the_backbone_too():
    model, x = model_of(VIT), volume_of(160)
    groups = model.parameter_groups(1e-2)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    found = {}
    for name, change in (("frozen", model.freeze_backbone), ("all", model.unfreeze_backbone)):
        change()
        model.zero_grad()
        model(x).square().sum().backward()
        found[name] = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    places = {"classifier.row", "classifier.column"}  # with one place in plane they say nothing
    assert not any(model.get_parameter(name).requires_grad for name in places)
    assert found["frozen"] == {name for name, _ in model.named_parameters() if name.startswith("classifier.")} - places
    assert "backbone.net.cls_token" in found["all"] - found["frozen"]
    gradient = model.backbone.net.cls_token.grad.clone()
    model.set_gradient_checkpointing()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(model.backbone.net.cls_token.grad, gradient)


def test_a_query_finds_a_slice_that_the_mean_drowns():
    """One token of 32 says whether the finding is there; 300 cases to learn it from, 200 to show it."""
    torch.manual_seed(0)
    tokens = torch.randn(500, 32, 1, 1, 24)
    labels = (torch.arange(500) % 2).float()
    tokens[torch.arange(500), torch.randint(0, 32, (500,)), 0, 0, :4] += 4 * labels[:, None]
    area = {}
    for name in ("query", "mean"):
        head = QueryHead(24, (32, 1, 1), dropout=0.0, outputs=1)
        head.query.weight.requires_grad_(name == "query")
        head.depth.requires_grad_(name == "query")
        optimizer = torch.optim.AdamW(head.parameters(), lr=3e-2)
        for _ in range(150):
            loss = F.binary_cross_entropy_with_logits(head(tokens[:300])[:, 0], labels[:300])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits = head(tokens[300:])[:, 0]
        positive, negative = logits[labels[300:] > 0], logits[labels[300:] == 0]
        area[name] = (positive[:, None] > negative).float().mean().item()
    assert area["query"] > 0.95 and area["mean"] < area["query"] - 0.05, area


# -- adapters --------------------------------------------------------------------------------------------------------


def adapted(backbone: str = VIT, spread: float = 0.1, **options) -> CTCLIPMultiAbnormalityModel:
    model = model_of(backbone)
    model.add_lora(4, 8, **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in model.adapters().values():
            layer.lora_b.normal_(std=spread) if spread else None
    return model.eval()


@pytest.mark.parametrize("backbone", [VIT, "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_adapters_change_nothing_at_first_and_merge_to_equal_outputs(backbone, tmp_path):
    size = 160 if backbone == VIT else 224
    x = volume_of(size, 1)
    model = model_of(backbone)
    before, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    model.add_lora()
    assert torch.equal(model(x), before)
    names = set(model.adapters())
    assert {name.rpartition(".")[2] for name in names} == {"qkv", "proj"}
    assert "backbone.net.patch_embed.proj" in names
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    for layer in model.adapters().values():
        layer.lora_b.normal_(std=0.1)
    changed = model(x)
    assert (changed - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    merged = model.merged_state()
    assert merged.keys() == state.keys()
    model.merge_lora()
    assert not model.adapters() and all(torch.equal(model.state_dict()[key], merged[key]) for key in merged)
    torch.testing.assert_close(model(x), changed, rtol=0, atol=1e-4)
    assert torch.equal(CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)(x), model(x))


@torch.no_grad()
def test_an_adapter_equals_its_definition():
    model = adapted()
    linear, patch = (model.get_submodule(f"backbone.net.{name}") for name in ("blocks.0.attn.qkv", "patch_embed.proj"))
    x = torch.randn(3, 5, linear.in_features)
    change = 8 / 4 * linear.lora_b @ linear.lora_a
    torch.testing.assert_close(linear(x), x @ (linear.weight + change).T + linear.bias, rtol=0, atol=1e-5)
    images = torch.randn(2, 3, 32, 32)
    kernel = patch.weight + 2 * (patch.lora_b @ patch.lora_a.flatten(1)).view_as(patch.weight)
    expected = F.conv2d(images, kernel, patch.bias, patch.stride)
    torch.testing.assert_close(patch(images), expected, rtol=0, atol=1e-5)
    assert linear.train()(x).isnan().any().item() is False and not torch.equal(linear(x), linear.eval()(x))  # dropout


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_moves_adapters_and_head_and_not_a_bit_of_anything_else(checkpointing):
    model, x = adapted(), volume_of(160)
    model.set_gradient_checkpointing(checkpointing)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2))
    model.train()(x).square().sum().backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    adapters = {f"{name}.lora_{part}" for name in model.adapters() for part in "ab"}
    head = {"classifier.query.weight", "classifier.evidence.weight", "classifier.evidence.bias", "classifier.depth"}
    assert moved == adapters | head and len(adapters) == 26


def test_checkpointing_gives_adapters_the_same_gradients():
    model, x = adapted(dropout=0.0), volume_of(160)
    found = []
    for enabled in (False, True):
        model.set_gradient_checkpointing(enabled)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any(".lora_a" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=0, atol=1e-5)


def test_head_adapters_and_backbone_have_rates_of_their_own():
    model = adapted()
    assert model.layers()[-1] == [f"{name}.lora_{part}" for name in model.adapters() for part in "ab"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = model.parameter_groups(1e-2, 1e-4, layer_decay=0.5, weight_decay=0.1, adapter_lr=5e-3)
    found = {names[id(p)]: (group["lr"], group["layer"]) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    assert {found[name] for name in found if ".lora_" in name} == {(5e-3, 1)}
    assert {found[name] for name in found if name.startswith("classifier.")} == {(1e-2, 0)}
    assert found["backbone.net.norm.weight"] == (1e-4, 2)
    assert model.group_matcher()(model.layers()[-1][0]) == len(model.layers()) - 1
    model.freeze_backbone()
    assert not any(p.requires_grad for p in model.backbone_parameters())
    model.unfreeze_backbone()
    assert all(p.requires_grad for p in model.parameters() if p.shape[-1] > 1)


def test_the_cache_is_keyed_by_adapters_and_by_what_is_pooled():
    plain, fresh, other = model_of(VIT), adapted(spread=0), adapted()
    assert encoder_digest(plain) == encoder_digest(fresh) != encoder_digest(other)
    merged = adapted()
    merged.merge_lora()
    assert encoder_digest(merged) == encoder_digest(other)
    assert encoder_digest(plain) != encoder_digest(model_of(VIT, "patch"))


@pytest.mark.parametrize(
    ("backbone", "targets", "line"),
    [
        (CONV, ("attn.qkv", "patch_embed.proj"), "found no layer attn.qkv and no patch_embed.proj in 'test_resnet'"),
        (VIT, ("attn.qkv", "q_proj"), "found no layer q_proj in 'test_vit'"),
        ("eva02_tiny_patch14_224", ("attn.qkv",), "'eva02_tiny_patch14_224' does not call blocks.0.attn.qkv, "),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(backbone, targets, line):
    model = model_of(backbone)
    with pytest.raises(ValueError, match=line) as error:
        model.add_lora(targets=targets)
    assert "\n" not in str(error.value) and not model.adapters()


def test_a_convolution_of_a_convolutional_network_may_be_named():
    model = model_of(CONV)
    model.add_lora(targets=("conv2",))
    assert model.adapters() and {name.rpartition(".")[2] for name in model.adapters()} == {"conv2"}


@torch.no_grad()
def test_without_gradients_a_cpu_encodes_few_slices_at_once():
    model, x = model_of(CONV, n_slices=6), volume_of(32)
    seen, encode = [], model.backbone.tokens
    model.backbone.tokens = lambda slices, kind: seen.append(len(slices)) or encode(slices, kind)
    few = model.features(x)
    assert seen == [4, 4, 4] and slices_at_once(torch.device("cuda")) == 64
    with torch.enable_grad():
        assert torch.allclose(model.features(x), few, atol=1e-5)
    assert seen[3:] == [12]


# -- random slices ---------------------------------------------------------------------------------------------------


def test_training_takes_a_random_slice_of_each_part():
    model = model_of(CONV, n_slices=6)
    model.freeze_backbone()
    x = torch.arange(12.0).view(1, 1, 12, 1, 1).expand(2, 1, 12, 32, 32) / 12 - 0.5
    seen, encode = [], model.backbone.tokens
    model.backbone.tokens = lambda slices, kind: seen.append(slices) or encode(slices, kind)
    model.train_slices = 3
    torch.manual_seed(0)
    for _ in range(20):
        model.train()(x)
    middle = torch.stack([(slices[:, 1, 0, 0].view(2, 3) + 0.5) * 12 for slices in seen]).round().long()  # (20, 2, 3)
    centres = [1, 3, 5, 7, 9, 10]  # each has two neighbours
    for part in range(3):
        assert set(middle[..., part].flatten().tolist()) == set(centres[2 * part : 2 * part + 2])
    assert (middle[:, 0] != middle[:, 1]).any()  # each volume has its own
    seen.clear()
    model.eval()(x)
    assert seen[0].shape[0] == 12  # all of them
    torch.manual_seed(4)
    first = model.train()(x)
    torch.manual_seed(4)
    assert torch.equal(model(x), first)
