"""Fine-tuning on a small phantom cohort with a tiny CT-CLIP: what moves and what does not, what is saved, what a
resumed run gives, what the flags do. References: the weights before, an undisturbed run, the schedule's formula."""

import json
import math
import os
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import ctclip_training
from ctclip_model import CTCLIPMultiAbnormalityModel, read_checkpoint
from ctclip_training import TrainingConfig, TrainingError, guarded, main, schedule, train


@pytest.fixture
def config(phantoms, tiny_classfine):
    def make(**changes) -> TrainingConfig:
        base = {"data_dir": str(phantoms), "ctclip_path": tiny_classfine, "epochs": 3, "freeze_epochs": 2}
        return TrainingConfig(**(base | {"batch_size": 8} | changes))

    return make


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def history(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_run_folder_is_complete_and_split_by_patient(config, tmp_path, phantoms, capsys):
    folder = train(config(), tmp_path / "run")
    lines = history(folder)
    assert [line["stage"] for line in lines] == ["frozen", "frozen", "unfrozen"]
    assert all(math.isfinite(line["train_loss"]) and 0 <= line["positive_rate"] <= 1 for line in lines)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["phantom"] is True
    assert record["volumes"]["train"] + record["volumes"]["tuning"] == 40 == sum(record["read_as"].values())
    assert record["read_as"]["stored"] > 0  # both file versions were read
    tuning = pd.read_csv(folder / "tuning_predictions.csv", index_col=0)
    labels = pd.read_csv(folder / "tuning_labels.csv", index_col=0)
    assert list(tuning.index) == list(labels.index) and len(tuning) == record["volumes"]["tuning"]
    assert {"_".join(name.split("_")[:2]) for name in tuning.index} == set(record["tuning_patients"])
    assert not list(folder.glob("*.tmp"))
    out = capsys.readouterr().out
    assert out.count("backbone frozen") == 2 and out.count("backbone unfrozen") == 1
    assert f"(labels {lines[0]['label_rate']:.3f})" in out and "peak memory" in out


def test_saved_tuning_predictions_are_those_of_the_saved_weights(config, tmp_path, phantoms):
    from ctclip_data import load_cohort
    from ctclip_evaluation import load_model, predict_volumes

    folder = train(config(), tmp_path / "run")
    saved = pd.read_csv(folder / "tuning_predictions.csv", index_col=0)
    volumes = [volume for volume in load_cohort(phantoms, "train").volumes if volume.name in saved.index]
    read, logits = predict_volumes(load_model(folder), volumes, workers=0)
    again = pd.DataFrame(logits.sigmoid().numpy(), index=[volumes[i].name for i in read], columns=saved.columns)
    again = again.loc[saved.index].to_numpy()
    assert abs(again - saved.to_numpy()).max() < 1e-6


def test_frozen_run_leaves_every_tower_tensor_bit_identical(config, tmp_path, tiny_classfine):
    folder = train(config(freeze_backbone=True), tmp_path / "run")
    assert {line["stage"] for line in history(folder)} == {"frozen"}
    before, after = read_checkpoint(tiny_classfine), weights(folder)
    tower = [key for key in after if not key.startswith("classifier.")]
    assert len(tower) == 83 and all(torch.equal(before[key], after[key]) for key in tower)


def test_unfrozen_stage_moves_the_tower_but_not_the_codebook(config, tmp_path, tiny_classfine):
    folder = tmp_path / "run"
    train(config(epochs=1, freeze_epochs=0), folder)
    before, after = read_checkpoint(tiny_classfine), weights(folder)
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    fixed = {key for key in after if key.endswith((".beta", "._codebook.embed"))}  # buffers
    assert moved == set(after) - fixed


def test_cached_features_give_the_run_that_encoding_every_epoch_gives(config, tmp_path, monkeypatch, capsys):
    cached = weights(train(config(freeze_backbone=True), tmp_path / "cached"))
    monkeypatch.setattr(ctclip_training, "FEATURE_MEMORY", 0)
    encoded = weights(train(config(freeze_backbone=True), tmp_path / "encoded"))
    assert "every frozen epoch encodes anew" in capsys.readouterr().out
    for key, value in cached.items():
        torch.testing.assert_close(value, encoded[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_interrupted_and_resumed_equals_undisturbed(config, tmp_path, monkeypatch, finished):
    """Ctrl-C in the epoch after `finished` ones, in the frozen stage, between the stages and in the unfrozen one."""
    undisturbed = tmp_path / "undisturbed"
    train(config(epochs=4), undisturbed)
    folder = tmp_path / "interrupted"
    original = ctclip_training.tune

    def interrupt(*args, **kwargs):
        if (folder / "log.jsonl").exists() and len(history(folder)) == finished:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(ctclip_training, "tune", interrupt)
    assert guarded(lambda: train(config(epochs=4), folder)) == 130
    assert len(history(folder)) == finished
    monkeypatch.setattr(ctclip_training, "tune", original)
    train(config(epochs=4), folder)
    expected, found = torch.load(undisturbed / "resume.pt"), torch.load(folder / "resume.pt")
    assert expected["model"].keys() == found["model"].keys()
    assert all(torch.equal(value, found["model"][key]) for key, value in expected["model"].items())
    assert all(torch.equal(value, weights(folder)[key]) for key, value in weights(undisturbed).items())
    losses = [[line["train_loss"] for line in history(run)] for run in (undisturbed, folder)]
    assert losses[0] == losses[1]


def test_batches_encoded_in_pieces_give_the_gradients_of_the_whole(config, tmp_path, monkeypatch):
    build = ctclip_training.build_model

    def without_dropout(*args):
        model = build(*args)
        model.dropout.p = 0.0  # its random numbers would fall on other rows
        return model

    monkeypatch.setattr(ctclip_training, "build_model", without_dropout)
    whole = weights(train(config(epochs=1, freeze_epochs=0), tmp_path / "whole"))
    monkeypatch.setattr(ctclip_training, "piece_size", lambda shape, batch_size: 2)
    pieces = weights(train(config(epochs=1, freeze_epochs=0), tmp_path / "pieces"))
    for key, value in whole.items():
        torch.testing.assert_close(pieces[key], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "batch", "pieces"), [((240, 480, 480), 16, 2), ((240, 480, 480), 5, 1), ((64, 96, 96), 16, 16)]
)
def test_pieces_divide_the_batch_and_bound_the_memory(shape, batch, pieces):
    assert ctclip_training.piece_size(shape, batch) == pieces


def test_unreadable_volumes_are_counted_and_stop_nothing(config, tmp_path, phantoms, capsys):
    cohort = tmp_path / "cohort"
    shutil.copytree(phantoms, cohort)
    files = sorted(cohort.glob("dataset/train_fixed/*/*/*.nii.gz"))[:2]
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:5000])
    files[1].write_bytes(b"not a scan")
    folder = train(config(data_dir=str(cohort), epochs=1, freeze_epochs=1), tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    left_out = {row["name"] for row in record["left_out"]}
    assert {file.name for file in files} <= left_out
    assert record["volumes"]["train"] + record["volumes"]["tuning"] == 38
    assert "Left out while reading: 2 volumes" in capsys.readouterr().out


def test_slice_backbone_with_cbam_trains_frozen_from_cached_maps(config, tmp_path):
    changes = {"model": "resnet10t", "ctclip_path": None, "pretrained": False, "use_attention": "cbam", "limit": 10}
    folder = train(config(freeze_backbone=True, epochs=2, **changes), tmp_path / "run")
    model = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    assert not model.is_ctclip and any(key.startswith("attention.") for key in weights(folder))
    assert len(history(folder)) == 2


def test_higher_alpha_predicts_fewer_positives(config, tmp_path):
    rates = []
    for alpha in (0.15, 0.85):
        changes = {"alpha": alpha, "epochs": 12, "freeze_backbone": True, "learning_rate": 0.1}
        rates.append(history(train(config(**changes), tmp_path / str(alpha)))[-1]["positive_rate"])
    assert rates[0] > rates[1] + 0.1


def test_loss_that_is_not_finite_ends_the_run_with_the_remedy(config, tmp_path, monkeypatch):
    monkeypatch.setattr(ctclip_training, "create_loss", lambda config: lambda logits, labels: logits.sum() * math.nan)
    with pytest.raises(TrainingError, match="lower --learning-rate"):
        train(config(), tmp_path / "run")


def test_schedule_warms_up_then_falls_to_zero_over_its_own_span():
    values = [schedule(epoch, 2, 10, 0.25) for epoch in (0, 1.9, 2, 3, 4, 6, 10)]
    assert values[:3] == [0, 0, 0]
    assert values[3] == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 8)))
    assert values[4] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert values[5] == pytest.approx(0.5) and values[6] == pytest.approx(0)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--alpha", "1.5"], "--alpha is 1.5, expected between 0 and 1"),
        (["--epochs", "0"], "--epochs is 0, expected at least 1"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--ctclip-path", "nothing.pt"], "CT-CLIP model not found: run python ctclip_setup.py first"),
        (["--use_attention", "cbam"], "is for slice backbones"),
        (["--model", "resnet18", "--ctclip_path", "x.pt"], "goes with --model ctclip"),
        (["--resume", "nowhere"], "no run.json in nowhere"),
        (["--model", "efficientnet_b00"], "'efficientnet_b00' is not a timm model; close names: "),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, line, phantoms, tiny_classfine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"--data-dir": str(phantoms), "--ctclip-path": tiny_classfine, "--output-dir": "run"}
    for flag in flags[::2]:
        given.pop(flag.replace("_", "-"), None)
    if flags[0] == "--resume":
        given = {}
    if flags[0] == "--model":
        given.pop("--ctclip-path", None)
    assert main([*flags, *(part for pair in given.items() for part in pair)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and line in captured.err


def test_command_line_trains_resumes_and_refuses_to_overwrite(phantoms, tiny_classfine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--data_dir", str(phantoms), "--ctclip-path", tiny_classfine, "--epochs", "2", "--freeze-epochs", "1"]
    assert main(["--mode", "full_train", "--output_dir", "results/run", *flags]) == 0
    assert "Next: python ctclip_evaluation.py --checkpoint results/run" in capsys.readouterr().out
    assert main(["--output-dir", "results/run", *flags]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["--resume", "--epochs", "5"]) == 2
    assert "found other values for --epochs" in capsys.readouterr().err
    os.remove("results/run/model.safetensors")
    assert main(["--resume"]) == 0  # nothing left to do
    assert "Continuing after epoch 2 of 2" in capsys.readouterr().out


def test_quick_test_is_200_and_50_phantoms_in_three_epochs():
    """The plan of the cohort stands in for its files: names and labels are all that a split needs."""
    import numpy as np

    from ctclip_data import Volume, split_by_patient
    from ctclip_phantom import plan_split
    from ctclip_training import QUICK_TEST, QUICK_TEST_VOLUMES

    config = TrainingConfig(**QUICK_TEST)
    plans = [plan for plan in plan_split("train", config.train_volumes, 0) if not plan.head]
    volumes = [Volume(plan.name, plan.path, np.array(plan.labels, np.float32)) for plan in plans]
    train, tuning = split_by_patient(volumes, config.tuning_fraction, config.seed)
    assert len(train) >= QUICK_TEST_VOLUMES[0] == 200 and len(tuning) >= QUICK_TEST_VOLUMES[1] == 50
    assert (config.batch_size, config.epochs, config.frozen_epochs) == (16, 3, 2)
