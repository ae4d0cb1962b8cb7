"""Weights files as people have them: wrapped, renamed, inside a training state, in the wrong place, damaged, with
numbers that are none. Each gives the logits of the same weights, or one line that says what the file is.

Reference: the logits of the unchanged file.
"""

import argparse
import gzip
import json
import os
import pickle
import time
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ctclip.config import TrainingConfig
from ctclip.training.run import build_model
from ctclip_model import (
    ABNORMALITIES,
    CheckpointError,
    CTCLIPMultiAbnormalityModel,
    ModelError,
    read_checkpoint,
)

FIXTURES = Path(__file__).parent / "fixtures"
CLASSFINE = FIXTURES / "tiny_a_classfine.pt"
STATE = read_checkpoint(CLASSFINE)
VOLUME = torch.linspace(-1, 1, 5 * 40 * 40).view(1, 1, 5, 40, 40)
EMBED = "visual_transformer.vq._codebook.embed"
Q = "visual_transformer.enc_spatial_transformer.layers.1.1.to_q.weight"


@torch.no_grad()
def logits(path, **options):
    return CTCLIPMultiAbnormalityModel(str(path), **options).eval()(VOLUME)


@pytest.fixture(scope="module")
def right():
    return logits(CLASSFINE)


def refusal(path, **options) -> str:
    with pytest.raises(ModelError) as error:
        CTCLIPMultiAbnormalityModel(str(path), **options)
    line = str(error.value)
    assert "\n" not in line and "expected" in line.lower() and line.startswith(str(path)) and len(line) < 600
    return line


def saved(path, content):
    torch.save(content, path)
    return path


# -- the keys ----------------------------------------------------------------------------------------------------------

PREFIXED = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "Lightning": lambda key: f"model.{key}",
    "DataParallel of a compiled model in Lightning": lambda key: f"model.module._orig_mod.{key}",
    "a compiled model in DataParallel": lambda key: f"module._orig_mod.{key}",
    "a compiled part": lambda key: key.replace("visual_transformer.", "visual_transformer._orig_mod."),
    "FSDP": lambda key: f"_fsdp_wrapped_module.{key}".replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "a network of one's own": lambda key: f"net.clip.{key}",
}


@pytest.mark.parametrize("wrapper", PREFIXED)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_keys_under_wrappers_load(tmp_path, right, wrapper, ending):
    state = {PREFIXED[wrapper](key): value.contiguous() for key, value in STATE.items()}
    assert not state.keys() & STATE.keys() - {"classifier.weight", "classifier.bias"} or wrapper == "a compiled part"
    path = tmp_path / f"a.{ending}"
    (torch.save if ending == "pt" else save_file)(state, path)
    assert torch.equal(logits(path), right)


def test_a_loss_beside_the_wrapped_model_is_dropped_by_name(tmp_path, right):
    state = {f"model.{key}": value for key, value in STATE.items()} | {"criterion.pos_weight": torch.ones(18)}
    model = CTCLIPMultiAbnormalityModel(str(saved(tmp_path / "a.ckpt", {"state_dict": state})))
    assert "1 settings of a loss" in str(model.load_report) and torch.equal(logits(tmp_path / "a.ckpt"), right)


def test_the_tower_under_two_prefixes_is_refused(tmp_path):
    state = {f"{name}.{key}": value for name in ("model", "ema_model") for key, value in STATE.items()}
    assert "holds the tower under 'ema_model' and 'model', expected it once" in refusal(saved(tmp_path / "a.pt", state))


def test_statistics_of_a_newer_codebook_are_dropped_by_name(tmp_path, right):
    newer = {f"visual_transformer.vq._codebook.{name}": torch.ones(1, 64)
             for name in ("embed_avg", "cluster_size", "initted", "batch_mean", "batch_variance", "codebook_mean")}
    model = CTCLIPMultiAbnormalityModel(str(saved(tmp_path / "a.pt", STATE | newer)))
    assert f"{len(newer)} codebook training statistics" in str(model.load_report)
    assert torch.equal(logits(tmp_path / "a.pt"), right)
    assert f"'{EMBED}' is not in the file" in refusal(
        saved(tmp_path / "b.pt", {key: value for key, value in STATE.items() if key != EMBED})
    )


# -- what is around them -----------------------------------------------------------------------------------------------

MOMENTS = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-3}]}
AROUND = {
    "state_dict": lambda state: {"state_dict": state},
    "model": lambda state: {"model": state},
    "with optimizer": lambda state: {"epoch": 3, "model_state_dict": state, "optimizer": MOMENTS,
                                     "loss": torch.ones(())},
    "numpy and flags": lambda state: {"model": state, "best": np.float64(0.7), "args": argparse.Namespace(lr=1e-3),
                                      "path": Path("x"), "curve": np.arange(3.0)},
    "Lightning": lambda state: {
        "epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.4.0", "loops": {"fit_loop": {"state_dict": {}}},
        "state_dict": {f"model.{key}": value for key, value in state.items()}, "optimizer_states": [MOMENTS],
        "callbacks": {"ModelCheckpoint{'monitor': 'auroc'}": {"best_model_score": torch.tensor(0.7)}},
        "hyper_parameters": {"lr": 1e-3},
    },
    "nested": lambda state: {"checkpoint": {"module": {"state_dict": state}}},
}  # fmt: skip


@pytest.mark.parametrize("form", AROUND)
def test_weights_inside_a_training_state_load(tmp_path, right, form):
    assert torch.equal(logits(saved(tmp_path / "a.pt", AROUND[form](STATE))), right)


def test_two_sets_of_weights_in_one_file_are_named(tmp_path):
    line = refusal(saved(tmp_path / "a.pt", {"model": STATE, "ema": {"state": STATE}}))
    assert "2 sets of weights, under ['model'] and ['ema']['state']" in line


def test_what_holds_no_weights_is_said(tmp_path):
    line = refusal(saved(tmp_path / "o.pt", MOMENTS))
    assert "an optimizer's state, which some training code saves over the weights" in line
    line = refusal(saved(tmp_path / "e.pt", {"epoch": 3, "args": {"lr": 0.1}}))
    assert "holds a dict (epoch, args), expected a non-empty dictionary of tensors" in line
    for content in ([torch.ones(2)], torch.ones(2), {}, 7, "text"):
        assert f"holds a {type(content).__name__}" in refusal(saved(tmp_path / "a.pt", content))


def test_settings_among_the_tensors_are_left_out_and_said(tmp_path, right):
    path = saved(tmp_path / "a.pt", {"epoch": 3, **STATE, "best_auroc": 0.7, "arch": "ctclip", "note": None})
    assert torch.equal(logits(path), right)
    report = str(CTCLIPMultiAbnormalityModel(str(path)).load_report)
    assert "4 no tensors (epoch, best_auroc, arch, note)" in report
    for key in ("temperature", "classifier.scale"):  # a weight, or what could be one
        assert f"found '{key}', which is no tensor" in refusal(saved(tmp_path / "b.pt", {**STATE, key: 4.6}))


# -- names of the head's rows ------------------------------------------------------------------------------------------

OURS = list(ABNORMALITIES)
SWAPPED = [OURS[1], OURS[0], *OURS[2:]]
NAMED = {
    "a list beside the weights": lambda names: {"model": STATE, "labels": names},
    "spelled otherwise": lambda names: {"model": STATE, "task": [name.upper().replace(" ", "_") for name in names]},
    "a tuple in the settings": lambda names: {"state_dict": STATE, "hyper_parameters": {"classes": tuple(names)}},
    "names by row": lambda names: {"model": STATE, "config": {"id2label": dict(enumerate(names))}},
    "text": lambda names: {"model": STATE, "labels": ",".join(names)},
    "JSON": lambda names: {"model": STATE, "labels": json.dumps(names).encode()},
    "an object each": lambda names: {"model": STATE, "labels": [{"name": name} for name in names]},
    "rows by name": lambda names: {"model": STATE, "label2id": {name: row for row, name in enumerate(names)}},
}


@pytest.mark.parametrize("form", NAMED)
def test_a_head_whose_rows_are_named_in_another_order_is_refused(tmp_path, right, form):
    assert torch.equal(logits(saved(tmp_path / "a.pt", NAMED[form](OURS))), right)
    path = saved(tmp_path / "b.pt", NAMED[form](SWAPPED))
    line = refusal(path)
    assert "found the 18 findings in another order under [" in line and f"expected '{OURS[0]}'" in line
    assert CTCLIPMultiAbnormalityModel(str(path), new_head=True).load_report.head == "linear, new"


def test_a_head_for_other_findings_is_refused(tmp_path):
    names = [f"finding {number}" for number in range(18)]
    line = refusal(saved(tmp_path / "a.pt", {"model": STATE, "class_names": names}))
    assert "found other findings under ['class_names'] ('finding 0' in row 1 of the head" in line


@pytest.mark.parametrize("text", [json.dumps(SWAPPED), ",".join(SWAPPED)])
def test_names_in_the_header_of_a_safetensors_file_count(tmp_path, text):
    state = {key: value.contiguous() for key, value in STATE.items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt", "labels": text})
    assert "in another order under ['labels']" in refusal(tmp_path / "a.safetensors")


def test_names_in_the_config_of_a_saved_model_count(tmp_path):
    """Its weights, given as a file, would lose them."""
    CTCLIPMultiAbnormalityModel(str(CLASSFINE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"labels": SWAPPED}))
    assert "under ['config.json']['labels']" in refusal(tmp_path / "model.safetensors")


# -- our own state dict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "mlp", "attention"])
@torch.no_grad()
def test_the_state_dict_of_our_own_model_loads_with_its_head(tmp_path, head):
    torch.manual_seed(0)
    model = CTCLIPMultiAbnormalityModel(str(CLASSFINE), head=head).eval()
    for parameter in model.head_parameters():
        nn.init.normal_(parameter)
    again = CTCLIPMultiAbnormalityModel(str(saved(tmp_path / "a.pt", model.state_dict()))).eval()
    assert again.head_name == head and again.load_report.new == () and torch.equal(again(VOLUME), model(VOLUME))
    assert "patches of 5 x 10 x 10 voxels assumed" in str(again.load_report)
    model.save_pretrained(tmp_path / "run")
    assert torch.equal(logits(tmp_path / "run" / "model.safetensors"), model(VOLUME))


@torch.no_grad()
def test_a_prompt_head_is_not_taken_for_a_linear_one(tmp_path):
    """They have the same tensors, and only one of them a ReLU before it. What tells them apart is a bias of zeros."""
    model = CTCLIPMultiAbnormalityModel(sizes=vars(CTCLIPMultiAbnormalityModel(str(CLASSFINE)).sizes), head="prompts")
    nn.init.normal_(model.classifier.weight)
    again = CTCLIPMultiAbnormalityModel(str(saved(tmp_path / "a.pt", model.state_dict()))).eval()
    assert again.head_name == "prompts" and torch.equal(again(VOLUME), model.eval()(VOLUME))


def test_a_state_dict_that_does_not_tell_its_patches_is_refused(tmp_path):
    state = CTCLIPMultiAbnormalityModel(str(CLASSFINE)).state_dict()
    for key in ("to_patch_emb.1.weight", "to_patch_emb.1.bias"):
        state[f"visual_transformer.{key}"] = torch.ones(720)
    assert "does not tell the size of a patch" in refusal(saved(tmp_path / "a.pt", state))


# -- other files in its place ------------------------------------------------------------------------------------------

OTHERS = {
    "a git-LFS pointer": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
    "a web page": lambda path: path.write_bytes(b"\n<!DOCTYPE html><title>Sign in</title>"),
    "a zip archive that holds ctclip.pt": lambda path: zipped(path),
    "a gzip archive": lambda path: path.write_bytes(gzip.compress(CLASSFINE.read_bytes()[:9000])),
    "JSON text": lambda path: path.write_bytes(b'{"weight_map": {}}'),
    "zeros": lambda path: path.write_bytes(bytes(4000)),
    "it is empty": lambda path: path.write_bytes(b""),
    "it begins with b'no weights at al'": lambda path: path.write_bytes(b"no weights at all"),
    "JSON text that lists the shards of weights": lambda path: path.write_text(
        json.dumps({"metadata": {"total_size": 9}, "weight_map": {"a": "model-00001-of-00002.safetensors"}})),
    "a NumPy array (.npy)": lambda path: np.save(path.open("wb"), np.ones(3)),
    "NumPy arrays (.npz)": lambda path: np.savez(path.open("wb"), a=np.ones(3), b=np.ones(2)),
    "pickled NumPy arrays": lambda path: path.write_bytes(pickle.dumps({"a": np.ones(3)})),
    "NumPy arrays or other objects, expected tensors": lambda path: torch.save(
        {"model": {key: value.numpy() for key, value in STATE.items()}}, path),
    "'classifier.bias', which is a NumPy array or another object": lambda path: torch.save(
        STATE | {"classifier.bias": STATE["classifier.bias"].numpy()}, path),
    "a TorchScript model": lambda path: torch.jit.script(nn.Linear(2, 2)).save(path),
}


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(CLASSFINE, "ctclip.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_that_is_no_weights_file_is_called_what_it_is(tmp_path, what, name):
    OTHERS[what](tmp_path / name)
    line = refusal(tmp_path / name)
    assert what in line and "could run code" not in line


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "pytorch_model-2-of-12.bin"])
def test_one_of_several_shards_is_refused_and_the_only_one_is_read(tmp_path, right, name):
    saved(tmp_path / name, dict(list(STATE.items())[:20]))
    line = refusal(tmp_path / name)
    assert "found one of several shards of weights" in line and "put the tensors of all shards into one" in line
    assert f"found weights in shards ({name}), expected one file; put the tensors" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match="found weights in shards"):
        CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)
    assert torch.equal(logits(saved(tmp_path / "model-00001-of-00001.pt", STATE)), right)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    assert "found a pipe or a device, expected a weights file; write it into a file first" in refusal(tmp_path / "a.pt")


def test_an_unpacked_file_is_said_to_be_one(tmp_path):
    with zipfile.ZipFile(CLASSFINE) as archive:
        archive.extractall(tmp_path)
    inner = next(tmp_path.iterdir())
    for folder in (tmp_path, inner):
        assert "found a folder, which is an unpacked .pt file" in refusal(folder)
        with pytest.raises(CheckpointError, match="an unpacked .pt file, expected the file itself; download it again"):
            CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    assert "found a part of an unpacked .pt file" in refusal(inner / "data.pkl")


def test_the_content_counts_not_the_name(tmp_path, right):
    save_file({key: value.contiguous() for key, value in STATE.items()}, tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(CLASSFINE.read_bytes())
    (tmp_path / "c.ckpt").write_bytes(CLASSFINE.read_bytes())
    assert all(torch.equal(logits(path), right) for path in tmp_path.iterdir())


def test_a_saved_model_whose_weights_are_a_pointer(tmp_path):
    CTCLIPMultiAbnormalityModel(str(CLASSFINE)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="model.safetensors: found a git-LFS pointer.*git lfs pull"):
        CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)


def test_objects_that_could_run_code_are_named(tmp_path):
    torch.save(CTCLIPMultiAbnormalityModel(str(CLASSFINE)), tmp_path / "whole.pt")
    line = refusal(tmp_path / "whole.pt")
    assert "holds more than tensors (ctclip_model.CTCLIPMultiAbnormalityModel" in line and "state_dict() alone" in line


@pytest.mark.parametrize("name", ["a.pt", "nowhere/a.pt", "a.safetensors", "/absent/folder", "a b", "../x"])
def test_from_pretrained_of_a_file_or_no_folder_is_answered_without_the_network(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("a.pt").write_bytes(CLASSFINE.read_bytes())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: pytest.fail("asks the hub"))
    with pytest.raises(CheckpointError, match="found .*, expected a saved model's folder") as error:
        CTCLIPMultiAbnormalityModel.from_pretrained(name)
    assert str(error.value).startswith(f"{name}: ") and "\n" not in str(error.value)
    assert (f"ctclip_path={name!r}" in str(error.value)) == name.endswith((".pt", ".safetensors"))


def test_a_folder_in_the_place_of_a_file(tmp_path):
    assert "found a folder, expected a weights file" in refusal(tmp_path)


# -- heads for other findings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [14, 16, 17])
def test_a_head_of_another_number_of_classes_can_be_left_aside(tmp_path, n):
    head = {"classifier.weight": torch.ones(n, 16), "classifier.bias": torch.ones(n)}
    path = saved(tmp_path / "a.pt", STATE | head)
    line = refusal(path)
    assert f"classifier.weight is ({n}, 16), expected (18, 16)" in line
    assert "with a new head: in training --init-head new, in Python new_head=True" in line
    model = CTCLIPMultiAbnormalityModel(str(path), new_head=True)
    assert not model(VOLUME).any() and "2 the file's head" in str(model.load_report)
    assert torch.equal(model.encode(VOLUME), CTCLIPMultiAbnormalityModel(str(CLASSFINE)).encode(VOLUME))
    for kind in ("linear", "mlp", "attention"):
        config = TrainingConfig(ctclip_path=str(path), head=kind, init_head="new")
        config.check()
        assert not build_model(config, False).eval()(VOLUME).any()


def test_a_head_of_another_kind_can_be_left_aside(tmp_path):
    model = CTCLIPMultiAbnormalityModel(str(CLASSFINE), head="mlp")
    path = saved(tmp_path / "a.pt", model.state_dict())
    assert "unexpected: classifier.hidden.weight" in refusal(path, head="linear")
    assert "--init-head new" in refusal(path, head="linear")
    assert not logits(path, head="linear", new_head=True).any()


def test_a_broken_tower_is_not_offered_with_a_new_head(tmp_path):
    line = refusal(saved(tmp_path / "a.pt", STATE | {Q: STATE[Q][:31], "classifier.bias": torch.ones(14)}))
    assert "Nothing was loaded" in line and "--init-head" not in line


# -- numbers that are not numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
@pytest.mark.parametrize("key", [EMBED, Q, "to_visual_latent.weight", "classifier.bias",
                                 "visual_transformer.enc_temporal_transformer.norm_out.beta"])  # fmt: skip
def test_a_number_that_is_none_is_refused_by_the_tensors_name(tmp_path, key, value):
    """In the tower, the quantiser would hide it behind finite answers. 1e300 is beyond the model's type."""
    spoilt = STATE[key].double() if value == 1e300 else STATE[key].clone()
    spoilt.view(-1)[-1] = value
    state = STATE | {key: spoilt}
    assert f"found NaN or infinity in {key}" in refusal(saved(tmp_path / "a.pt", state))
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert f"found NaN or infinity in {key}" in refusal(tmp_path / "old.pt")
    CTCLIPMultiAbnormalityModel(str(CLASSFINE)).save_pretrained(tmp_path / "run")
    own = {name: value.contiguous() for name, value in state.items() if not name.startswith(("text", "temp", "to_te"))}
    model = CTCLIPMultiAbnormalityModel(str(CLASSFINE))
    save_file({name: own[name] for name in model.state_dict()}, tmp_path / "run" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: found NaN or infinity in {key}"):
        CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path / "run")


def test_numbers_that_overflow_and_an_empty_codebook_are_refused_and_large_ones_read(tmp_path):
    for number, (key, change, told) in enumerate((
        ("classifier.weight", lambda value: torch.full_like(value, 3e38), "numbers up to 3e\\+38 in classifier.weight"),
        (EMBED, torch.zeros_like, "one number in all of"),
    )):  # fmt: skip
        with pytest.raises(CheckpointError, match=told):
            CTCLIPMultiAbnormalityModel(str(saved(tmp_path / f"{number}.pt", STATE | {key: change(STATE[key])})))
    state = STATE | {"classifier.weight": torch.full((18, 16), 1e5)}  # whose sum is above the bound
    CTCLIPMultiAbnormalityModel(str(saved(tmp_path / "a.pt", state)))


def test_a_slice_backbone_with_nan_is_refused(tmp_path):
    model = CTCLIPMultiAbnormalityModel(None, "resnet18", pretrained=False)
    with torch.no_grad():
        model.backbone.net.bn1.running_var[3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="NaN or infinity in backbone.net.bn1.running_var"):
        CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)


KINDS = {
    "is int8, expected float32": lambda t: t.to(torch.int8),
    "is bool, expected float32": lambda t: t > 0,
    "is complex64, expected float32": lambda t: t.to(torch.complex64),
    "is float8_e4m3fn, expected float32": lambda t: t.to(torch.float8_e4m3fn),
    "sparse or nested": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "without its numbers (meta)": lambda t: t.to("meta"),
    "no tensor": lambda t: t.tolist(),
    "has more numbers than the file holds": lambda t: t.view(-1)[:1].clone().expand(t.shape),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", [EMBED, Q])
def test_other_kinds_of_tensors_are_refused_by_name(tmp_path, kind, key):
    line = refusal(saved(tmp_path / "a.pt", STATE | {key: KINDS[kind](STATE[key])}))
    assert kind in line and key in line


@pytest.mark.parametrize("key", [7, b"classifier", ("a", 1), None])
def test_keys_that_are_no_text_are_refused(tmp_path, key):
    assert "as the name of a tensor, expected text" in refusal(saved(tmp_path / "a.pt", STATE | {key: torch.ones(2)}))


def test_sizes_of_nothing_and_other_axes_are_refused(tmp_path):
    for key, value in ((EMBED, torch.ones(64, 32)), ("to_visual_latent.weight", torch.ones(0, 512)),
                       ("visual_transformer.enc_spatial_transformer.norm_out.gamma", torch.ones(()))):  # fmt: skip
        assert "axes of at least 1: the file is damaged" in refusal(saved(tmp_path / "a.pt", STATE | {key: value}))


# -- config.json -------------------------------------------------------------------------------------------------------

CONFIGS = {
    "depth 100,000": lambda c: c["sizes"].update(spatial_depth=100_000),
    "codes 10^12": lambda c: c["sizes"].update(codes=10**12),
    "patch 0": lambda c: c["sizes"].update(patch=0),
    "patch 7": lambda c: c["sizes"].update(patch=7),
    "negative": lambda c: c["sizes"].update(heads=-4),
    "text": lambda c: c["sizes"].update(dim="32"),
    "a half": lambda c: c["sizes"].update(dim=32.0),
    "true": lambda c: c["sizes"].update(spatial_depth=True),
    "a list": lambda c: c.update(sizes=[1, 2]),
    "another size": lambda c: c["sizes"].update(depth=1),
    "no sizes": lambda c: c["sizes"].clear(),
    "labels of numbers": lambda c: c.update(labels=list(range(18))),
    "labels as text": lambda c: c.update(labels="Emphysema"),
    "labels twice": lambda c: c.update(labels=["Emphysema"] * 18),
    "another head": lambda c: c.update(head=["linear"]),
    "dropout of text": lambda c: c.update(dropout="0.3"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_edited_config_is_one_line_before_anything_is_built(tmp_path, case):
    CTCLIPMultiAbnormalityModel(str(CLASSFINE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    CONFIGS[case](config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="config.json: found .*, expected ") as error:
        CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and time.monotonic() - start < 5


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000 + b"1" + b"}" * 200_000, b"\xff{}", b"7"])
def test_a_config_that_is_no_json_is_one_line(tmp_path, content):
    CTCLIPMultiAbnormalityModel(str(CLASSFINE)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json: found (no JSON|other content)"):
        CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)


def test_a_config_never_sends_for_weights(tmp_path, monkeypatch):
    import timm

    CTCLIPMultiAbnormalityModel(None, "resnet18", pretrained=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(config | {"pretrained": True}))
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, pretrained, **more: pretrained or create(*names, **more))
    CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_slices": "8"}))
    with pytest.raises(CheckpointError, match="n_slices is '8', expected a whole number"):
        CTCLIPMultiAbnormalityModel.from_pretrained(tmp_path)
