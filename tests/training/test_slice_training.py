"""Fine-tuning of slice backbones on a small phantom cohort, slices of 64 x 64: what is trained and what is not, to the
bit; what a run saves; how it goes on. References: the weights before, a run that was not interrupted."""

import json

import pytest
from helpers_training import history, one_line

import ctclip_model
from ctclip.config import TrainingConfig
from ctclip.training.loop import train
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


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--tokens", "patch"], "found --tokens, which goes with a slice backbone and --head attention only"),
        (["--head", "attention", "--tokens", "patch"], "found --tokens, which goes with a slice backbone and"),
        (["--model", "test_vit", "--tokens", "patch"], "found --tokens, which goes with a slice backbone and"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert one_line(err) and line in err
