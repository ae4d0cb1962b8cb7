"""The tower, loading, freezing, slices and saving, against the golden files (numbers that the published implementation
produced on small random weights) and against properties that the architecture must have."""

import json
import pickle
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np
import plain_encoder
import pytest
import torch
from helpers_model import OTHER_SIZES, create_ctclip_checkpoint
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import ctclip_model
from ctclip_model import (
    ABNORMALITIES,
    CheckpointError,
    CTCLIPMultiAbnormalityModel,
    ModelError,
    PretrainedWeightsError,
    Quantizer,
    SpatialBias,
    TowerSizes,
    TransformerLayer,
    main,
    read_checkpoint,
    slice_triplets,
)

FIXTURES = Path(__file__).parent / "fixtures"
CLIP, CLASSFINE = FIXTURES / "tiny_a_clip.pt", FIXTURES / "tiny_a_classfine.pt"
GOLDEN_SIZES = TowerSizes(32, 4, 8, 10, 5, 4, 2, 3, 64, 16, 85, 32)


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURES / "tiny_a_expected.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file if file[key].dtype.kind in "fi"}


@pytest.fixture
def model():
    return CTCLIPMultiAbnormalityModel(str(CLASSFINE)).eval()


# -- golden numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CLIP, CLASSFINE])
@torch.no_grad()
def test_tower_equals_the_published_implementation(path, expected):
    """Tokens are compared through float64, where both have their rounding errors: the golden ones are off by up to
    2.05e-5 themselves. Which way ours round depends on the processor (below 2.1e-5 on an AMD EPYC, 2.24e-5 on an
    Intel Xeon with AVX-512), so ours may be off by a quarter more than the golden ones, as their means may."""
    model = CTCLIPMultiAbnormalityModel(str(path)).eval()
    assert model.sizes == GOLDEN_SIZES
    volume, golden = expected["volume"], expected["tokens_before_vq"]
    before = model.visual_transformer(volume)
    exact = CTCLIPMultiAbnormalityModel(str(path)).eval().double().visual_transformer(volume.double())
    torch.testing.assert_close(golden.double(), exact, rtol=0, atol=2.1e-5)
    assert (before - exact).abs().mean() < 1.25 * (golden - exact).abs().mean() < 2.5e-6
    assert (before - exact).abs().max() < 1.25 * (golden - exact).abs().max()
    assert torch.equal(model.code_ids(volume), expected["code_ids"])
    tokens = model.visual_transformer.vq(before)
    torch.testing.assert_close(tokens, expected["tokens"], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode(volume), expected["image_latents"], rtol=0, atol=1e-5)
    if path == CLASSFINE:
        torch.testing.assert_close(model(volume), expected["classfine_logits"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_plain_encoder_equals_the_published_implementation(expected):
    """The second witness, from which benchmarks take truth at the published size."""
    state = read_checkpoint(CLIP)
    _, ids, latents = plain_encoder.encode(state, expected["volume"])
    assert torch.equal(ids, expected["code_ids"])
    torch.testing.assert_close(latents, expected["image_latents"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [GOLDEN_SIZES, OTHER_SIZES], ids=["golden", "odd"])
@pytest.mark.parametrize("depth", [1, 4])
def test_tower_equals_the_plain_encoder_in_every_way_it_runs(sizes, depth, monkeypatch):
    """With gradients in float64, where only a mistake shows; without and in the smallest pieces, which are float32."""
    state = create_ctclip_checkpoint(sizes, seed=depth)
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(sizes)).double()
    model.load_state_dict({key: value for key, value in state.items() if key in model.state_dict()}, strict=False)
    _, height, width = sizes.input_shape
    volume = torch.rand(2, 1, depth * sizes.temporal_patch, height, width, dtype=torch.float64) * 2 - 1
    tokens, ids, latents = plain_encoder.encode(state, volume)

    def compare(model, volume, atol):
        torch.testing.assert_close(model.visual_transformer(volume).double(), tokens, rtol=0, atol=atol)
        torch.testing.assert_close(model.encode(volume).double(), latents, rtol=0, atol=atol)
        assert torch.equal(model.code_ids(volume), ids)

    compare(model, volume, 1e-12)
    for piece, chunk in ((10**9, 10**9), (1, 1)):
        monkeypatch.setattr(TransformerLayer, "TOKENS_AT_ONCE", piece)
        monkeypatch.setattr(Quantizer, "TOKENS_AT_ONCE", chunk)
        given = volume.float()
        with torch.no_grad():
            compare(model.float(), given, 2e-5)
        assert torch.equal(given, volume.float())  # pieces are changed in place, never what the caller gave


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("at_once", [10**9, 1])
def test_gradients_in_float32_on_a_cpu_equal_the_plain_encoders(checkpointing, at_once, monkeypatch):
    """The tower has backward passes of its own there; the plain encoder's are torch's."""
    state = {key: value.requires_grad_() for key, value in create_ctclip_checkpoint(OTHER_SIZES, seed=3).items()
             if value.is_floating_point()}  # fmt: skip
    model = CTCLIPMultiAbnormalityModel(sizes=asdict(OTHER_SIZES))
    model.load_state_dict({key: value for key, value in state.items() if key in model.state_dict()}, strict=False)
    model.unfreeze_backbone()
    model.set_gradient_checkpointing(checkpointing)
    monkeypatch.setattr(TransformerLayer, "TOKENS_AT_ONCE", at_once)
    _, height, width = OTHER_SIZES.input_shape
    volume = torch.rand(2, 1, 4 * OTHER_SIZES.temporal_patch, height, width) * 2 - 1
    tokens, plain = model.visual_transformer(volume), plain_encoder.tokens_before_codes(state, volume)
    direction = torch.randn_like(tokens)
    for each in (tokens, plain):
        (each * direction).sum().backward()
    for name, parameter in model.visual_transformer.named_parameters():
        expected = state["visual_transformer." + name].grad
        if name == "spatial_rel_pos_bias.net.2.bias":  # shifts all similarities alike, which changes nothing
            assert parameter.grad.norm() < 1e-3
            continue
        assert expected.norm() > 0, name
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm(), name


@torch.no_grad()
def test_code_ids_are_a_lossless_cache_of_the_latents(model, expected):
    ids = model.code_ids(expected["volume"])
    assert ids.dtype == torch.int64 and ids.shape == (2, 3, 4, 4)
    from_codes = model.project(model.visual_transformer.vq.lookup(ids))
    torch.testing.assert_close(from_codes, model.encode(expected["volume"]), rtol=0, atol=1e-6)


def test_spatial_bias_equals_the_network_on_all_pairs():
    """The gathered bias against the definition: the network run on every one of the (h*w)^2 pairs."""
    torch.manual_seed(0)
    bias, h, w = SpatialBias(dim=7, heads=2), 3, 4
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([y, x], -1).reshape(-1, 2).float()
    offset = place[:, None] - place[None, :]
    value = offset.sign() * torch.log(offset.abs() + 1)
    for layer in bias.net:
        value = layer(value)
    torch.testing.assert_close(bias(h, w)[0], value.permute(2, 0, 1))


def test_peg_is_causal_along_depth(model, expected):
    """Changing the last slab of the volume leaves the spatial transformer's tokens of the earlier slabs alone."""
    tower, volume = model.visual_transformer, expected["volume"]
    changed = volume.clone()
    changed[:, :, -5:] = -changed[:, :, -5:]
    tokens = []
    with torch.no_grad():
        for v in (volume, changed):
            x = tower.to_patch_emb(v)
            bias = tower.spatial_rel_pos_bias(4, 4)
            x = tower.enc_spatial_transformer(x.reshape(6, 16, 32), (2, 3, 4, 4), bias).view(2, 3, 16, 32)
            tokens.append(x)
    assert torch.equal(tokens[0][:, :2], tokens[1][:, :2])
    assert not torch.allclose(tokens[0][:, 2], tokens[1][:, 2])


# -- loading -----------------------------------------------------------------------------------------------------------


def test_report_counts_every_tensor_of_the_file(model):
    report, state = model.load_report, read_checkpoint(CLASSFINE)
    assert report.loaded + sum(report.dropped.values()) == len(state)
    assert report.loaded == len(model.state_dict()) and report.new == ()
    assert "85 tensors loaded" in str(report) and "43 text tower" in str(report)
    dropped = sum(report.dropped.values())
    assert repr(report) == f"{CLASSFINE}: 85 tensors loaded, {dropped} dropped by name; head: {report.head}"
    assert report._repr_html_() == f"<details><summary>{escape(repr(report))}</summary>{escape(str(report))}</details>"


def test_file_without_head_gets_a_new_one_with_logits_of_exactly_zero(expected):
    model = CTCLIPMultiAbnormalityModel(str(CLIP)).eval()
    assert model.load_report.new == ("classifier.weight", "classifier.bias")
    assert torch.equal(model(expected["volume"]), torch.zeros(2, 18))


def test_unseen_size_loads_without_configuration(tmp_path):
    state = create_ctclip_checkpoint(OTHER_SIZES, seed=3, classifier=True)
    path = tmp_path / "other.pt"
    torch.save(state, path)
    model = CTCLIPMultiAbnormalityModel(str(path)).eval()
    assert model.sizes == OTHER_SIZES and model.input_shape == (10, 30, 30)
    logits = model(torch.zeros(1, 1, 4, 30, 30))  # the depth is free in steps of the temporal patch
    assert logits.shape == (1, 18)
    codebook = state["trained_model.visual_transformer.vq._codebook.embed"]
    assert torch.equal(model.visual_transformer.vq._codebook.embed, codebook)


@pytest.mark.parametrize("prefix", ["module.", "module.trained_model.", "trained_model.module."])
def test_prefixes_and_position_ids_are_tolerated(tmp_path, prefix, expected):
    state = {prefix + key: value for key, value in read_checkpoint(CLIP).items()}
    state[prefix + "text_transformer.embeddings.position_ids"] = torch.arange(12)[None]
    torch.save(state, tmp_path / "prefixed.pt")
    model = CTCLIPMultiAbnormalityModel(str(tmp_path / "prefixed.pt")).eval()
    torch.testing.assert_close(model.encode(expected["volume"]), expected["image_latents"], rtol=0, atol=1e-5)


def test_safetensors_file_loads(tmp_path, expected):
    state = {key: value.contiguous() for key, value in read_checkpoint(CLASSFINE).items()}
    save_file(state, tmp_path / "a.safetensors")
    model = CTCLIPMultiAbnormalityModel(str(tmp_path / "a.safetensors")).eval()
    torch.testing.assert_close(model(expected["volume"]), expected["classfine_logits"], rtol=0, atol=1e-5)


def _in_another_form(path: Path, form: str) -> dict:
    """ClassFine's tensors, written to `path` in some way; -> as the model must have them."""
    state = dict(read_checkpoint(CLASSFINE))
    matrix = "visual_transformer.enc_spatial_transformer.layers.0.1.to_q.weight"
    if form == "half precision":
        state = {key: value.half() for key, value in state.items()}
    if form == "transposed":
        state[matrix] = state[matrix].T.contiguous().T
    if form == "one storage":
        both = torch.stack([state[matrix], state[matrix] + 1])
        state[matrix], state[matrix.replace("to_q", "to_out")] = both
    if form == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form != "before torch 1.6")
    return state


@pytest.mark.parametrize(
    "form", ["as published", "safetensors", "half precision", "transposed", "one storage", "before torch 1.6"]
)
def test_the_models_tensors_are_the_files_and_its_own(tmp_path, form):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    state = _in_another_form(path, form)
    model = CTCLIPMultiAbnormalityModel(str(path))
    path.write_bytes(b"")  # cut short in place: a mapping would kill this process at the next look
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32 and value.is_contiguous()
        assert torch.equal(value, state[key].float()), key


@pytest.mark.parametrize("form", ["as published", "safetensors", "one storage"])
def test_a_file_that_is_copied_in_many_parts_loses_none(tmp_path, monkeypatch, form):
    monkeypatch.setattr(ctclip_model, "READ_AT_ONCE", 1004)
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    state = _in_another_form(path, form)
    for key, value in CTCLIPMultiAbnormalityModel(str(path)).state_dict().items():
        assert torch.equal(value, state[key]), key


def test_nothing_is_drawn_for_a_saved_model(tmp_path):
    """Built without storage, then filled: random weights of 0.7 GB are not worth their time."""
    CTCLIPMultiAbnormalityModel(str(CLASSFINE), head="attention").save_pretrained(tmp_path)
    before = torch.get_rng_state()
    model = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(value.is_meta for value in model.state_dict().values())
    assert not model.training and not model.to_visual_latent.weight.requires_grad


def _refused(tmp_path, state) -> str:
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError) as error:
        CTCLIPMultiAbnormalityModel(str(tmp_path / "bad.pt"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_unexpected_and_misshapen_keys_are_errors_that_name_them(tmp_path):
    state = read_checkpoint(CLASSFINE)
    q = "visual_transformer.enc_spatial_transformer.layers.1.1.to_q.weight"
    assert f"missing: {q}" in _refused(tmp_path, {k: v for k, v in state.items() if k != q})
    assert "unexpected: visual_transformer.surprise" in _refused(
        tmp_path, state | {"visual_transformer.surprise": torch.ones(1)}
    )
    assert f"{q} is (31, 32), expected (32, 32)" in _refused(tmp_path, state | {q: state[q][:31]})
    fourteen = state | {"classifier.weight": torch.ones(14, 16), "classifier.bias": torch.ones(14)}
    assert "classifier.weight is (14, 16), expected (18, 16)" in _refused(tmp_path, fourteen)
    assert "half a head" in _refused(tmp_path, {k: v for k, v in state.items() if k != "classifier.bias"})


def test_weights_of_another_network_are_refused(tmp_path):
    """The recipe this project replaces: CT-CLIP's file into an EfficientNet, or the other way round."""
    message = _refused(tmp_path, nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict())
    assert "not a CT-CLIP checkpoint" in message


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickle_that_is_not_tensors_is_refused(tmp_path, capsys):
    torch.save({"weight": torch.ones(1), "payload": Payload()}, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload()))
    for name in ("bad.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="refused"):
            CTCLIPMultiAbnormalityModel(str(tmp_path / name))
    assert "code ran" not in capsys.readouterr().out


def test_damaged_empty_and_absent_files_are_one_line(tmp_path):
    (tmp_path / "cut.pt").write_bytes(CLIP.read_bytes()[:200_000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name in ("cut.pt", "empty.pt", "cut.safetensors"):
        with pytest.raises(CheckpointError) as error:
            read_checkpoint(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"CT-CLIP model not found: run python ctclip_setup.py first"):
        CTCLIPMultiAbnormalityModel(ctclip_path=str(tmp_path / "none.pt"))


# -- freezing ----------------------------------------------------------------------------------------------------------


def _train_steps(model, volume, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        loss = nn.functional.binary_cross_entropy_with_logits(model(volume), torch.ones(len(volume), 18))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_frozen_means_every_tower_tensor_is_bit_identical(model, expected):
    model.freeze_backbone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _train_steps(model, expected["volume"])
    after = model.state_dict()
    head = {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(before[key], after[key]) for key in before if key not in head)
    assert all(not torch.equal(before[key], after[key]) for key in head)
    assert not any(module.training for module in model.visual_transformer.modules())


def test_unfrozen_moves_every_layer_but_the_codebook(model, expected):
    model.freeze_backbone()
    model.unfreeze_backbone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _train_steps(model, expected["volume"])
    moved = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert moved == {key for key, _ in model.named_parameters()}
    assert "visual_transformer.vq._codebook.embed" not in moved


def test_frozen_batch_norm_statistics_do_not_move():
    model = CTCLIPMultiAbnormalityModel(None, "resnet18", attention="cbam", pretrained=False)
    model.freeze_backbone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _train_steps(model, torch.rand(2, 3, 32, 32))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert changed and not any(key.startswith("backbone.") for key in changed)
    assert any(key.startswith("attention.") for key in changed)


# -- slices ------------------------------------------------------------------------------------------------------------


def test_three_slices_become_one_temporal_patch(model):
    slices = torch.rand(2, 3, 224, 224) * 2 - 1
    assert model(slices).shape == (2, 18)
    assert model.code_ids(slices).shape == (2, 1, 4, 4)
    same = torch.rand(1, 1, 1, 40, 40)  # already at the tower's size and constant along depth: nothing to resize
    as_volume, as_slices = same.expand(1, 1, 5, 40, 40), same[:, 0].expand(1, 3, 40, 40)
    torch.testing.assert_close(model.encode(as_slices), model.encode(as_volume))


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224", "edgenext_xx_small"])
@torch.no_grad()
def test_slice_variant_takes_slices_and_volumes(backbone):
    model = CTCLIPMultiAbnormalityModel(None, backbone, attention="cbam", pretrained=False, n_slices=2).eval()
    slices = torch.rand(2, 3, 224, 224) * 2 - 1
    maps = model.features(slices)
    assert maps.shape[:3] == (2, 1, model.backbone.dim) and maps.shape[3] == maps.shape[4]
    assert torch.equal(model(slices), torch.zeros(2, 18))
    assert model.features(torch.rand(1, 1, 6, 224, 224)).shape[:2] == (1, 2)
    with pytest.raises(TypeError, match="no CT-CLIP latents"):
        model.encode(slices)


def test_slice_triplets_are_adjacent_and_spread():
    volume = torch.arange(12.0).view(1, 1, 12, 1, 1).expand(1, 1, 12, 2, 2)
    triplets = slice_triplets(volume, 3)[0, :, :, 0, 0]
    assert triplets.tolist() == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 15, 40, 40), (1, 1, 14, 40, 40), (1, 1, 15, 40, 30), (1, 1, 224, 224), (15, 40, 40), (1, 1, 0, 40, 40)],
)
def test_wrong_input_shapes_say_what_is_expected(model, shape):
    with pytest.raises(ValueError, match="expected|takes"):
        model(torch.zeros(shape))


def test_unknown_backbone_and_attention():
    with pytest.raises(ValueError, match="efficientnet_b0"):
        CTCLIPMultiAbnormalityModel(None, "efficientnet_b00", pretrained=False)
    with pytest.raises(ValueError, match="expected None or 'cbam'"):
        CTCLIPMultiAbnormalityModel(None, "resnet18", attention="cbamm", pretrained=False)
    with pytest.raises(ValueError, match="slice backbones"):
        CTCLIPMultiAbnormalityModel(str(CLIP), attention="cbam")


def test_unreachable_imagenet_weights_stop_with_the_way_on(monkeypatch, tmp_path):
    import timm

    def refuse(*args, **kwargs):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(PretrainedWeightsError, match=r"cannot reach the hub.*--no-pretrained"):
        CTCLIPMultiAbnormalityModel(None, "resnet18")


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "http://someone:secret@127.0.0.1:9"])  # no scheme; nobody there
@pytest.mark.parametrize("cached", [None, "model.safetensors"])
def test_the_probe_of_the_hub_has_no_side_effects(endpoint, cached, monkeypatch):
    """Other threads' downloads go on: the hub client's own switch is not touched; cached weights are named instead."""
    import huggingface_hub
    import timm
    from huggingface_hub import constants

    asked = []

    def create(name, **options):
        asked.append((constants.HF_HUB_OFFLINE, options.get("pretrained_cfg_overlay")))
        return torch.nn.Identity()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, file: cached)
    if cached:
        ctclip_model.create_backbone("resnet18", pretrained=True)
        assert asked == [(False, {"file": cached})]
    else:
        with pytest.raises(PretrainedWeightsError, match="no answer from the hub, and not in its cache") as caught:
            ctclip_model.create_backbone("resnet18", pretrained=True)
        assert not asked and "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_login_page_in_place_of_weights_is_one_line(monkeypatch):
    import timm

    def page(name, **options):
        raise SafetensorError("Error while deserializing header: header too large")

    monkeypatch.setattr(timm, "create_model", page)
    with pytest.raises(PretrainedWeightsError, match="could not be fetched .SafetensorError: .*--no-pretrained"):
        ctclip_model.create_backbone("resnet18", pretrained=True)


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["ctclip", "slices"])
def test_save_and_load_give_the_same_logits(tmp_path, variant):
    torch.manual_seed(1)
    if variant == "ctclip":
        model = CTCLIPMultiAbnormalityModel(str(CLASSFINE))
    else:
        model = CTCLIPMultiAbnormalityModel(None, "resnet18", attention="cbam", pretrained=False, n_slices=3)
    nn.init.normal_(model.classifier.weight)
    model.eval().save_pretrained(tmp_path)
    again = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(x), again(x)) and model(x).any()
    assert not list(tmp_path.glob("*.tmp"))
    again.save_pretrained(tmp_path / "second")  # and once more, from what was loaded
    assert torch.equal(CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "second").eval()(x), model(x))


def test_saved_weights_that_lack_a_tensor_are_not_loaded(tmp_path, model):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["classifier.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="classifier.bias"):
        CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)


def test_saving_refuses_a_folder_whose_files_describe_other_weights(tmp_path, model):
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # its own
    (tmp_path / "README.md").write_text("")
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path)  # nothing there that could describe the others
    (tmp_path / "calibration.json").write_text("{}")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.classifier.bias += 1
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match=r"found other weights .*\(calibration.json\), expected .*; choose another"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("names", [("metrics.json", "calibration.json", "run.json", "a.png", "x.tmp"), ("README.md",)])
def test_saving_into_a_folder_of_the_user_s_leaves_its_files(tmp_path, model, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "model.safetensors", "config.json"}
    assert all((tmp_path / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", ["mine", '{"model_type": "bert"}'])
def test_saving_replaces_no_weights_and_no_configuration_of_another_program(tmp_path, model, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=f"{name}: found a file that no saved model of ours goes with, expected no"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / name).read_text() == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name, origin",
    [("ctclip_vocabfine.pt", "ctclip_vocabfine"), ("CT-CLIP_v2.pt", "CT-CLIP_v2"), ("jane_doe.pt", "other")],
)
def test_where_the_weights_come_from_is_kept_without_a_private_path(tmp_path, name, origin):
    (tmp_path / name).write_bytes(CLASSFINE.read_bytes())
    CTCLIPMultiAbnormalityModel(str(tmp_path / name)).save_pretrained(tmp_path / "a")
    CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["derived_from"] == origin and {path.name for path in (tmp_path / "b").iterdir()} == {
        "model.safetensors",
        "config.json",
    }
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"derived_from": "/home/jane/x.pt"}))
    assert CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "b").derived_from == "other"


# -- the script --------------------------------------------------------------------------------------------------------


def test_script_reports_each_variant_and_goes_on_after_an_absent_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "ctclip_classfine.pt").write_bytes(CLASSFINE.read_bytes())
    (tmp_path / "models" / "ctclip_zeroshot.pt").write_bytes(CLIP.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ctclip_model, "DEMO_PATH", str(tmp_path / "none.pt"))
    assert main(["--backbone", "resnet18", "--no_pretrained"]) == 0
    out = capsys.readouterr().out
    assert out.count("Output shape: (1, 18)") == 2 and out.count("Output shape: (2, 18)") == 3
    end = out[out.index("3 of 5 variants") :].splitlines()
    assert end == [
        "3 of 5 variants are here and work: classfine, zeroshot, resnet18",
        "  vocabfine  not here (no file models/ctclip_vocabfine.pt); python ctclip_setup.py --model vocabfine fetches"
        " it",
        f"  demo       not here (no file {tmp_path / 'none.pt'}); it comes with the project",
    ]
    assert "Error" not in out and max(len(line) for line in out.splitlines() if "Weights:" in line) < 120
    assert "Loss test: 0.6931  (untrained head on balanced labels)" in out
    assert "head 9,234, total 11,185,746" in out  # resnet18: 512 x 18 + 18 on 11,176,512


def test_script_says_which_file_cannot_be_used_and_which_weights_are_not_here(tmp_path, monkeypatch, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "ctclip_classfine.pt").write_bytes(b"damaged")
    monkeypatch.chdir(tmp_path)

    import timm

    def no_network(*args, **kwargs):
        raise OSError("no answer from the hub. Try again")

    monkeypatch.setattr(timm, "create_model", no_network)
    assert main([]) == 0
    out = capsys.readouterr().out
    lines = out[out.index("1 of 5 variants is here and works: demo") :].splitlines()
    assert lines[1].startswith("  classfine        cannot be used: models/ctclip_classfine.pt")
    absent = "ImageNet weights not here (no answer from the hub); --no-pretrained tests it without"
    assert lines[4] == f"  efficientnet_b0  {absent}"
    assert lines[5].startswith("Next: python ") and lines[5].endswith("ctclip_training.py --mode quick_test")
    assert len(lines) == 6 and "head: linear, new" in out and "zero-shot" not in out  # no advice on the demo's prompts


def test_eighteen_labels_in_the_challenge_order():
    assert len(ABNORMALITIES) == 18 == len(set(ABNORMALITIES))
    assert ABNORMALITIES[0] == "Medical material" and ABNORMALITIES[-1] == "Interlobular septal thickening"


def test_shipped_demo_model_is_small_and_complete():
    path = Path(ctclip_model.DEMO_PATH)
    assert path.stat().st_size <= 4_000_000
    model = CTCLIPMultiAbnormalityModel(str(path)).eval()
    assert model.load_report.new == ("classifier.weight", "classifier.bias")
    volume = torch.rand(1, 1, *model.input_shape) * 2 - 1
    assert len(model.code_ids(volume).unique()) > 1
    assert model.encode(volume).norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("values", [1, 2 * 4 * 5 * 6, 10**6], ids=["a slice", "two of five", "all slices"])
def test_the_position_filter_s_gradients_are_torch_s(monkeypatch, values):
    monkeypatch.setattr(ctclip_model, "FILTER_VALUES", values)
    torch.manual_seed(0)
    peg = ctclip_model.PEG(6).double()
    x, direction = torch.randn(2, 2, 5, 4, 5, 6, dtype=torch.float64)
    shape = x.shape[:4]

    def gradients(peg, x):
        x = x.clone().requires_grad_()
        (peg(x, shape) * direction.to(x)).sum().backward()
        return [x.grad, *(parameter.grad.clone() for parameter in peg.parameters())]

    expected = gradients(peg, x)  # in float64, by torch
    peg.float().zero_grad(set_to_none=True)
    for found, reference in zip(gradients(peg, x.float()), expected, strict=True):
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-5)
