"""Fine-tuning of video ResNets on a small phantom cohort: what moves and what does not, to the bit; how a run with
random crops and windows goes on; the command line from training to prediction. References: the weights before, a run
that was not interrupted."""

import csv

import pytest
import torch
from helpers_training import history, moved_between, one_line, train_until_step, weights
from helpers_video import small_video  # noqa: F401

import run_task2
from ctclip.config import Machine, TrainingConfig
from ctclip.evaluation import command, figures
from ctclip.training.checkpoint import states
from ctclip.training.estimate import print_estimate
from ctclip.training.loop import train
from ctclip.training.run import build_model, first_micro_batch
from ctclip_model import CTCLIPMultiAbnormalityModel
from ctclip_training import main

pytestmark = pytest.mark.usefixtures("fast", "small_video")


@pytest.fixture(scope="module")
def config(phantoms, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(**changes) -> TrainingConfig:
        base = {"data_dir": str(phantoms), "model": "mc3_18", "pretrained": False, "cache_dir": cache, "limit": 10}
        base |= {"slice_spacing": 12.0, "slice_size": 40, "batch_size": 4, "epochs": 1, "freeze_epochs": 0}
        return TrainingConfig(**(base | changes))

    return make


@pytest.mark.parametrize("adapt", ["none", "last:1", "full"])
def test_what_is_adapted_moves_and_nothing_else_does(config, tmp_path, adapt, capsys):
    """The new backbone of the same seed is the one that the run began with."""
    settings = config(adapt=adapt)
    torch.manual_seed(settings.seed)
    model = build_model(settings, phantom=True)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    folder = train(settings, tmp_path / "run")
    moved = moved_between(start, weights(folder))
    layers = {"none": [], "last:1": model.layers()[-1:], "full": model.layers()}[adapt]
    trained = {name for names in layers for name in names}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    blocks = {name.rpartition(".")[0] for name in trained}
    expected = {"classifier.weight", "classifier.bias"} | trained
    expected |= {name for name in start if name.endswith(statistics) and name.rpartition(".")[0] in blocks}
    assert moved == expected
    assert ("mc3_18's stem is new and random, and not trained" in capsys.readouterr().out) == (adapt != "full")
    if adapt == "none":
        assert history(folder)[0]["stage"] == "frozen"


def test_a_run_that_was_stopped_ends_with_the_same_bits(config, tmp_path):
    """Crops, windows and noise are drawn as in the run that was not stopped, batch statistics go on; and volumes that
    are read from their files are those that were kept."""
    settings = config(adapt="full", epochs=2, window_jitter=100.0, augment=True, dropout=0.3)
    whole = train(settings, tmp_path / "whole")
    train_until_step(settings, tmp_path / "run", 3)  # the first of the second epoch
    again = train(settings, tmp_path / "run", Machine(volume_cache=False))
    assert not moved_between(weights(whole), weights(again))
    tensors = [torch.load(states(folder)[-1], weights_only=True)["tensors"] for folder in (whole, again)]
    assert tensors[0] and not moved_between(*tensors)
    assert [r["train_loss"] for r in history(whole)] == [r["train_loss"] for r in history(again)]
    losses = [r["train_loss"] for r in history(train(config(adapt="full"), tmp_path / "plain"))]
    assert losses[0] != history(whole)[0]["train_loss"], "jitter and noise change what is seen"


def test_the_command_line_from_training_to_prediction(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "write_figures", lambda *args: None)
    monkeypatch.setattr(command, "write_pictures", lambda *args: None)
    size = ["--slice-spacing", "12", "--slice-size", "48", "--stem-stride", "4", "--crop", "0.75", "--test-crops", "8"]
    flags = ["--mode", "train", "--train-volumes", "12", "--valid-volumes", "6", "--model", "mc3_18", "--no-pretrained",
             *size, "--windows=-1000:400", "--window-jitter", "50", "--loss-type", "bce", "--epochs", "1",
             "--freeze-epochs", "0", "--adapt", "full", "--output-dir", "run"]  # fmt: skip
    assert run_task2.main(flags) == 0
    assert "input (30, 48, 48), crops (22, 36, 36)" in capsys.readouterr().out
    model = CTCLIPMultiAbnormalityModel.from_pretrained("run")
    assert (model.is_video, model.test_crops, model.backbone.net.stem[0].kernel_size) == (True, 8, (4, 4, 4))
    assert run_task2.main(["--mode", "evaluate", "--checkpoint", "run", "--resamples", "100", "--pictures", "0"]) == 0
    scan = next(tmp_path.glob("data/*/dataset/valid_fixed/**/*.nii.gz"))
    predict = ["--mode", "predict", "--checkpoint", "run", "--input", str(scan), "--output", "table.csv"]
    assert run_task2.main([*predict, "--uncalibrated", "--explain", "Emphysema"]) == 0
    with open("table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 1 and 0 < float(table[0]["Emphysema"]) < 1
    assert len(list(tmp_path.rglob("*mphysema*.nii.gz"))) == 1


def test_a_plan_says_what_is_read_again_and_kept(config, tmp_path, capsys):
    settings = config(adapt="full", cache_dir=str(tmp_path / "cache"))
    for machine, kept in ((Machine(), True), (Machine(volume_cache=False), False)):
        print_estimate(settings, tmp_path / "run", machine)
        out = capsys.readouterr().out
        assert (" again" in out) == kept and (" for volumes of" in out) == kept
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--stem-stride", "4"], "found --stem-stride, which goes with a video ResNet (--model r3d_18"),
        (["--model", "test_vit", "--crop", "0.5"], "found --crop, which goes with a video ResNet"),
        (["--model", "test_vit", "--window-jitter", "5"], "found --window-jitter, which goes with a video ResNet"),
        (["--model", "test_vit", "--no-volume-cache"], "found --no-volume-cache, which goes with a video ResNet with"),
        (["--model", "r3d_18", "--crop", "1.5"], "--crop is 1.5, expected above 0 and at most 1"),
        (["--model", "r3d_18", "--no-pretrained", "--window-jitter", "600"], "--window-jitter is 600, expected below"),
        (["--model", "r3d_18", "--adapt", "lora"], "found --adapt lora with --model r3d_18, expected a vision"),
        (["--model", "r3d_18", "--head", "attention"], "found --head, which goes with --model ctclip or a slice"),
        (["--model", "r3d_18", "--use-attention", "cbam"], "found --use-attention, which goes with a slice backbone"),
        (["--model", "r3d_18", "--train-slices", "4"], "found --train-slices, which goes with a slice backbone"),
        (["--model", "r3d_18", "--no-pretrained", "--windows", "lung,bone"], "--model: found 2 windows for a video"),
    ],
)  # fmt: skip
def test_flags_that_would_be_ignored_are_refused(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert one_line(err) and line in err


@pytest.mark.parametrize(
    ("stem", "batch", "device", "size"),
    [(2, 10, "cuda", 10), (2, 16, "cpu", 2), (4, 16, "cpu", 16), (4, 99, "cuda", 80)],
)
def test_a_micro_batch_begins_with_the_crops_that_there_are_places_for(stem, batch, device, size):
    """At the published size."""
    settings = TrainingConfig(model="r3d_18", pretrained=False, stem_stride=stem, batch_size=batch)
    assert first_micro_batch(settings, build_model(settings, phantom=True), torch.device(device)) == size
