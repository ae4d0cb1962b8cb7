"""`--average-epochs`: the mean of the weights after chosen epochs. Reference: the means taken here, of the weights in
the states that a run saves after each epoch."""

import json

import pandas as pd
import pytest
import torch
from helpers_training import one_line, rank_epochs, weights
from safetensors.torch import load_file

from ctclip.config import TrainingConfig, TrainingError
from ctclip.data.cohort import load_cohort
from ctclip.inference import predictor
from ctclip.training import checkpoint, loop
from ctclip.training.loop import train
from ctclip_model import read_checkpoint
from ctclip_training import main

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module")
def config(phantoms, tiny_classfine, tmp_path_factory):
    """Epoch 1 with a frozen backbone, then a layer more in each epoch: names of tensors differ from epoch to epoch."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(**changes) -> TrainingConfig:
        base = {"data_dir": str(phantoms), "ctclip_path": tiny_classfine, "cache_dir": cache, "batch_size": 16,
                "epochs": 3, "freeze_epochs": 1, "unfreeze_layers": 1, "average_epochs": "1,3"}  # fmt: skip
        return TrainingConfig(**(base | changes))

    return make


@pytest.fixture
def after_epochs(monkeypatch) -> dict[int, dict]:
    """The tensors of each epoch's state, with the backbone's own where they are not trained yet."""
    kept: dict[int, dict] = {}
    original = checkpoint.save_state

    def save(folder, epoch, step, content):
        if step == 0 and epoch:
            kept.setdefault(epoch, {name: value.clone() for name, value in content["tensors"].items()})
        return original(folder, epoch, step, content)

    monkeypatch.setattr(checkpoint, "save_state", save)
    return kept


def test_the_average_is_the_mean_of_the_weights_and_of_what_is_not_trained_yet(
    config, tmp_path, monkeypatch, after_epochs, tiny_classfine, capsys
):
    rank_epochs(monkeypatch, 0.5, 0.7, 0.6, 0.8)
    folder = train(config(), tmp_path / "run")
    before, found = read_checkpoint(tiny_classfine), weights(folder)
    first, last = after_epochs[1], after_epochs[3]
    assert len(last) > len(first) > 1 and set(last) < set(found) <= set(before)
    for name, value in found.items():
        if name in last:
            torch.testing.assert_close(value, (first.get(name, before[name]) + last[name]) / 2, rtol=0, atol=1e-7)
        else:
            assert torch.equal(value, before[name])
    assert json.loads((folder / "run.json").read_text())["average"] == {
        "epochs": [1, 3], "tuning_auroc_macro": 0.8, "kept": True}  # fmt: skip
    assert "Average of epochs 1, 3: macro AUROC 0.800, kept" in capsys.readouterr().out


def test_saved_tuning_predictions_are_those_of_the_average(config, tmp_path, monkeypatch):
    rank_epochs(monkeypatch, 0.5, 0.6, 0.7, 0.8)
    folder = train(config(epochs=2, average_epochs="1,2"), tmp_path / "run")
    saved = pd.read_csv(folder / "tuning_predictions.csv", index_col=0)
    monkeypatch.undo()
    volumes = [each for each in load_cohort(config().data_dir, "train").volumes if each.name in saved.index]
    read, logits = predictor.predict_volumes(predictor.load_model(folder), volumes, workers=0)
    again = pd.DataFrame(logits.sigmoid().numpy(), index=[volumes[i].name for i in read], columns=saved.columns)
    assert abs(again.loc[saved.index].to_numpy() - saved.to_numpy()).max() < 1e-6


def test_an_average_that_is_not_the_best_leaves_the_best_epochs_weights(config, tmp_path, monkeypatch, after_epochs):
    rank_epochs(monkeypatch, 0.5, 0.8, 0.6, 0.8)
    folder = train(config(), tmp_path / "run")
    found = weights(folder)
    assert all(torch.equal(found[name], value) for name, value in after_epochs[2].items())
    assert json.loads((folder / "run.json").read_text())["average"]["kept"] is False


def test_running_statistics_are_averaged_and_counts_are_the_last_epochs(config, tmp_path, monkeypatch, after_epochs):
    rank_epochs(monkeypatch, 0.5, 0.6, 0.8)
    changes = {"model": "resnet10t", "ctclip_path": None, "pretrained": False, "use_attention": "cbam", "limit": 8}
    folder = train(config(freeze_backbone=True, epochs=2, average_epochs="1,2", **changes), tmp_path / "run")
    found, name = load_file(folder / "model.safetensors"), "attention.spatial.conv.bn."
    mean = (after_epochs[1][name + "running_var"] + after_epochs[2][name + "running_var"]) / 2
    torch.testing.assert_close(found[name + "running_var"], mean, rtol=0, atol=1e-7)
    assert not torch.equal(mean, after_epochs[2][name + "running_var"])
    assert found[name + "num_batches_tracked"] == after_epochs[2][name + "num_batches_tracked"]


def test_a_run_killed_before_or_after_the_average_is_compared_comes_to_the_same(config, tmp_path):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    def killed_at_the_average(job, state):
        return killed() if state.average.compared else save_checkpoint(job, state)

    save_checkpoint = loop.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        rank_epochs(patch, 0.5, 0.6, 0.7, 0.8)
        whole = weights(train(config(), tmp_path / "whole"))
    ends = ("before", "compare_average", killed), ("after", "save_checkpoint", killed_at_the_average)
    for name, place, end in ends:
        with pytest.MonkeyPatch.context() as patch:
            rank_epochs(patch, 0.5, 0.6, 0.7, 0.8)
            patch.setattr(loop, place, end)
            with pytest.raises(Killed):
                train(config(), tmp_path / name)
        with pytest.MonkeyPatch.context() as patch:
            rank_epochs(patch, 0.8)
            found = weights(train(config(), tmp_path / name))
        assert all(torch.equal(found[key], value) for key, value in whole.items())


@pytest.mark.parametrize("epochs", ["3", "2,1", "1,1", "0,2", "2,4", "1;2", "1,", "x"])
def test_epochs_that_cannot_be_averaged_are_one_line(epochs, config, tmp_path, capsys):
    with pytest.raises(TrainingError, match="--average-epochs is .*, expected two or more of the epochs 1 to 3"):
        config(average_epochs=epochs).check()


def test_the_flag_reaches_the_run(config, capsys):
    assert main(["--average-epochs", "1,9", "--epochs", "3", "--plan"]) == 2
    assert one_line(capsys.readouterr().err)
