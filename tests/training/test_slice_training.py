"""Fine-tuning of slice backbones on a small phantom cohort, slices of 64 x 64: what is trained and what is not, to the
bit; what a run saves; how it goes on. References: the weights before, a run that was not interrupted."""

import inspect
import json
import shlex
from dataclasses import fields, replace

import pytest
import timm
import torch
from helpers_training import history, moved_between, one_line, train_until_step, weights
from safetensors.torch import save_file

import ctclip_model
from ctclip.config import Machine, TrainingConfig
from ctclip.training.checkpoint import states
from ctclip.training.loop import train
from ctclip.training.run import build_model, prepare
from ctclip.training.search import command_of
from ctclip_model import CTCLIPMultiAbnormalityModel
from ctclip_training import main

pytestmark = pytest.mark.usefixtures("fast", "small_slices")


@pytest.fixture(scope="module")
def small_slices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctclip_model, "SLICE_INPUT_SHAPE", (24, 64, 64))
        yield


@pytest.fixture(scope="module")
def config(phantoms, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(**changes) -> TrainingConfig:
        base = {"data_dir": str(phantoms), "model": "test_vit", "pretrained": False, "cache_dir": cache, "limit": 12}
        base |= {"batch_size": 4, "epochs": 2, "freeze_epochs": 1, "head": "attention"}
        return TrainingConfig(**(base | changes))

    return make


@pytest.mark.parametrize("tokens", ["slice", "patch"])
def test_a_query_head_is_trained_frozen_and_unfrozen(config, tmp_path, tokens):
    folder = train(config(tokens=tokens, epochs=3, freeze_epochs=2), tmp_path / "run")
    assert [record["stage"] for record in history(folder)] == ["frozen", "frozen", "unfrozen"]
    model = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    assert (model.head_name, model.tokens) == ("attention", tokens) and model.classifier.query.weight.any()
    assert json.loads((folder / "run.json").read_text())["config"]["tokens"] == tokens


def test_a_search_takes_the_other_head_once_its_tokens_are_in_the_cache(config, tmp_path, capsys):
    """Trained as an ordinary run, the best comes to the same AUROC, to the bit."""
    settings = config(head="linear", cache_dir=str(tmp_path / "cache"), freeze_epochs=20, seed=1)
    flags = [*shlex.split(command_of(settings))[2:], "--search", "3"]
    assert main([*flags, "--output-dir", str(tmp_path / "linear")]) == 0
    out = capsys.readouterr().out
    assert "--head attention is not searched: its features are not in" in out and "; heads linear\n" in out
    train(config(head="attention", cache_dir=str(tmp_path / "cache"), epochs=1, seed=1), tmp_path / "tokens")
    assert main([*flags, "--output-dir", str(tmp_path / "both")]) == 0
    out = capsys.readouterr().out
    assert "is not searched" not in out and "; heads attention, linear\n" in out
    trials = json.loads((tmp_path / "both" / "search.json").read_text())["trials"]
    assert {row["head"] for row in trials} == {"attention", "linear"}
    best = json.loads((tmp_path / "both" / "search.json").read_text())["best"]
    assert main([*shlex.split(best["command"])[2:], "--output-dir", str(tmp_path / "best")]) == 0
    assert max(line["tuning_auroc_macro"] for line in history(tmp_path / "best")) == best["auroc_macro"]


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("adapt", ["none", "lora", "last:1", "full"])
def test_what_is_adapted_moves_and_nothing_else_does(config, tmp_path, adapt):
    """The new backbone of the same seed is the one that the run began with; lora's saved weights are merged."""
    settings = config(adapt=adapt, epochs=2, freeze_epochs=1, tokens="patch", lora_rank=2)
    torch.manual_seed(settings.seed)
    model = build_model(settings, phantom=True)
    start = {name: value.clone() for name, value in model.merged_state().items()}
    folder = train(settings, tmp_path / "run")
    backbone = {name for name in moved_between(start, weights(folder)) if name.startswith("backbone.")}
    saved = [record["stage"] for record in history(folder) if record["best"]][-1]
    if adapt == "none":
        assert [record["stage"] for record in history(folder)] == ["frozen", "frozen"] and not backbone
        return
    assert [record["open_layers"] for record in history(folder)] == [0, len(model.layers()) if adapt == "full" else 1]
    content = torch.load(states(folder)[-1], weights_only=True)
    trained = {name for name in content["tensors"] if name.startswith("backbone.")}
    parts = {name for names in (model.layers() if adapt == "full" else model.layers()[-1:]) for name in names}
    assert trained == parts and (saved == "frozen" or backbone)
    moved = {name for name in trained & start.keys() if not torch.equal(content["tensors"][name], start[name])}
    assert adapt == "lora" or len(moved) > len(parts) / 2
    assert all(torch.equal(start[name], weights(folder)[name]) for name in start.keys() & (start.keys() - trained)
               if name.startswith("backbone.") and adapt != "lora")  # fmt: skip
    if adapt == "lora":
        adapted = {name.rpartition(".")[0] + ".weight" for name in trained}
        assert backbone <= adapted and not any("lora" in name for name in weights(folder))
        assert history(folder)[-1]["stage"] == "adapters trained"
        assert max(v.abs().max() for k, v in content["tensors"].items() if k.endswith(".lora_b")) > 0


@pytest.mark.parametrize("adapt", ["lora", "last:1"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(config, tmp_path, adapt):
    settings = config(adapt=adapt, epochs=2, freeze_epochs=1, train_slices=3, ema_decay=0.9)
    whole = train(settings, tmp_path / "whole")
    train_until_step(settings, tmp_path / "run", 4)  # the first unfrozen step
    again = train(settings, tmp_path / "run")
    a, b = weights(whole), weights(again)
    assert a.keys() == b.keys() and not moved_between(a, b)
    states_of = [torch.load(states(folder)[-1], weights_only=True)["tensors"] for folder in (whole, again)]
    assert not moved_between(*states_of)


def test_a_run_on_an_earlier_map_trains_its_last_layers_and_goes_on_with_the_same_bits(config, tmp_path):
    settings = config(model="test_resnet", feature_stride=16, tokens="patch", adapt="last:1")
    torch.manual_seed(settings.seed)
    model = build_model(settings, phantom=True)
    start, last = tensors_of(model), model.layers()[-1]
    whole = train(settings, tmp_path / "whole")
    train_until_step(settings, tmp_path / "run", 4)  # the first unfrozen step
    again = train(settings, tmp_path / "run")
    states_of = [torch.load(states(folder)[-1], weights_only=True)["tensors"] for folder in (whole, again)]
    assert not moved_between(*states_of) and not moved_between(weights(whole), weights(again))
    parameters = {name for name, _ in model.named_parameters() if name.startswith("backbone.")}
    assert states_of[0].keys() & parameters == set(last) and all("layer3" in name for name in last)
    assert any(not torch.equal(states_of[0][name], start[name]) for name in last)
    saved = CTCLIPMultiAbnormalityModel.from_pretrained(whole)
    assert saved.backbone.map_number == 3
    assert json.loads((whole / "run.json").read_text())["config"]["feature_stride"] == 16


def test_a_folder_windows_and_spacing_from_the_command_line(phantoms, tmp_path):
    net = timm.create_model("test_vit", num_classes=0, in_chans=1)
    (tmp_path / "net").mkdir()
    save_file(net.state_dict(), tmp_path / "net" / "model.safetensors")
    content = {"architecture": "test_vit", "model_args": {"in_chans": 1}, "pretrained_cfg": {}}
    (tmp_path / "net" / "config.json").write_text(json.dumps(content))
    flags = ["--data-dir", phantoms, "--limit", 12, "--model", tmp_path / "net", "--windows=-997:888:-142.39:360.97",
             "--slice-spacing", 60, "--slice-size", 64, "--head", "attention", "--cache-dir", tmp_path / "cache",
             "--epochs", 2, "--freeze-epochs", 1, "--adapt", "lora", "--lora-targets", "attn.qkv, attn.proj",
             "--output-dir", tmp_path / "run"]  # fmt: skip
    assert main([str(flag) for flag in flags]) == 0
    model = CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "run")
    assert (model.n_slices, model.input_shape, model.backbone.channels) == (6, (24, 64, 64), 1)
    low, high, factor, summand = model.backbone.window.flatten().tolist()
    assert (low, high) == pytest.approx((-0.997, 0.888))
    assert (factor, summand) == pytest.approx((1000 / 360.97, 142.39 / 360.97))
    assert torch.equal(model.backbone.net.patch_embed.proj.weight, net.patch_embed.proj.weight)


def test_defaults_and_choices_are_the_models():
    """The configuration is read before torch is imported, so that it has its own."""
    settings, choices = TrainingConfig(), {item.name: item.metadata.get("choices") for item in fields(TrainingConfig)}
    own = inspect.signature(CTCLIPMultiAbnormalityModel.add_lora).parameters
    assert tuple(settings.lora_targets.split(",")) == own["targets"].default == ctclip_model.LORA_TARGETS
    for name in ("rank", "alpha", "dropout"):
        assert getattr(settings, f"lora_{name}") == own[name].default
    rates = inspect.signature(CTCLIPMultiAbnormalityModel.parameter_groups).parameters
    assert settings.adapter_learning_rate == rates["adapter_lr"].default
    assert choices["tokens"] == ctclip_model.SLICE_TOKENS
    for spacing in (0.5, 180.0):
        replace(settings, model="test_vit", slice_spacing=spacing).check()
        assert ctclip_model.slices_at(spacing) == 360 / spacing


@pytest.mark.parametrize(
    ("adapt", "layers"),
    [(None, [0, 2, 4, 6]), ("none", [0, 0, 0, 0]), ("last:3", [0, 3, 3, 3]), ("last:30", [0, 9, 9, 9]),
     ("full", [0, 9, 9, 9]), ("lora", [0, 1, 1, 1])],
)  # fmt: skip
def test_how_many_of_nine_layers_are_trained(adapt, layers):
    settings = TrainingConfig(epochs=4, freeze_epochs=1, adapt=adapt)
    assert [settings.unfrozen_layers(epoch, 9) for epoch in range(4)] == layers


def test_what_needs_less_memory_contradicts_no_flag():
    frozen, slices = "keep the backbone frozen", "encode fewer slices per step (--train-slices)"
    vit = TrainingConfig(model="vit_tiny_patch16_224")
    for settings, ways in (
        (TrainingConfig(), ["unfreeze fewer layers (--unfreeze-layers 1)", f"{frozen} (--freeze-backbone)"]),
        (TrainingConfig(unfreeze_layers=1), [f"{frozen} (--freeze-backbone)"]),
        (replace(vit, adapt="full"), ["unfreeze fewer layers (--adapt last:1)", slices, f"{frozen} (--adapt none)"]),
        (replace(vit, adapt="lora"), [slices, f"{frozen} (--adapt none)"]),
        (replace(vit, adapt="lora", train_slices=1), [f"{frozen} (--adapt none)"]),
    ):
        assert settings.less_memory() == ways


def test_a_micro_batch_begins_with_no_more_slices_than_there_are_places_for(config, tmp_path):
    for changes, size in (({}, 8), ({"slice_spacing": 6.0}, 2), ({"slice_spacing": 6.0, "train_slices": 16}, 8)):
        job = prepare(config(batch_size=8, **changes), tmp_path / "run", Machine())
        assert job.run.micro_batch == size


def test_adapters_share_the_cache_of_the_backbone_that_they_begin_with(config, tmp_path):
    cache = tmp_path / "cache"
    for name, changes in (("one", {"adapt": "none"}), ("two", {"adapt": "lora", "epochs": 2, "freeze_epochs": 1})):
        train(config(cache_dir=str(cache), **changes), tmp_path / name)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--freeze-backbone", "--adapt", "full"], "found --freeze-backbone and --adapt full, expected one of them"),
        (["--adapt", "full", "--unfreeze-layers", "3"], "--unfreeze-layers, which goes with unfrozen epochs without"),
        (["--adapt", "none", "--freeze-epochs", "3"], "--freeze-epochs, which goes with a backbone that is unfrozen"),
        (["--adapt", "last:2", "--freeze-epochs", "22"], "found --adapt, which goes with unfrozen epochs"),
        (["--adapt", "last"], "--adapt is last, expected none, lora, last:N or full"),
        (["--adapt", "last:0"], "--adapt is last:0, expected none, lora"),
        (["--adapt", "lora"], "found --adapt lora with --model ctclip, expected a vision transformer"),
        (["--lora-rank", "4"], "found --lora-rank, which goes with --adapt lora"),
        (["--adapter-learning-rate", "4"], "found --adapter-learning-rate, which goes with --adapt lora"),
        (["--model", "test_vit", "--adapt", "lora", "--layer-decay", "1"], "found --layer-decay, which goes with"),
        (["--model", "test_vit", "--adapt", "lora", "--lora-dropout", "1"], "--lora-dropout is 1.0, expected at least"),
        (["--model", "test_vit", "--train-slices", "0"], "--train-slices is 0, expected at least 1"),
        (["--model", "test_vit", "--no-pretrained", "--train-slices", "9"], "--train-slices is 9, expected at most 8"),
        (["--train-slices", "4"], "found --train-slices, which goes with a slice backbone"),
        (["--model", "test_resnet", "--no-pretrained", "--adapt", "lora"], "--adapt lora: found no layer attn.qkv"),
        (["--windows", "lung"], "found --windows, which goes with a slice backbone"),
        (["--slice-spacing", "2"], "found --slice-spacing, which goes with a slice backbone"),
        (["--model", "test_vit", "--slice-spacing", "0.1"], "--slice-spacing is 0.1, expected 0.5 to 180 mm"),
        (["--model", "test_vit", "--slice-size", "5"], "--slice-size is 5, expected 16 to 2048 pixels"),
        (["--model", "test_vit", "--no-pretrained", "--windows", "liver"], "found the window 'liver', expected"),
        (["--tokens", "patch"], "found --tokens, which goes with a slice backbone and --head attention or max only"),
        (["--head", "attention", "--tokens", "patch"], "found --tokens, which goes with a slice backbone and"),
        (["--model", "test_vit", "--tokens", "patch"], "found --tokens, which goes with a slice backbone and"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert one_line(err) and line in err
