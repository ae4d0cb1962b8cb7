"""Fine-tuning on a small phantom cohort with a tiny CT-CLIP: what is trained and what is not, what is saved, what a
step survives, what the flags do.

References: the weights before, another run that must come to the same, losses and averages worked by hand. How a run
goes on after an interruption is in test_checkpoint.py.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from helpers_training import history, one_line, rank_epochs, weights
from torch import nn

import run_task2
from ctclip import __version__
from ctclip import config as config_module
from ctclip.cli import OneLineParser, run_cli
from ctclip.config import PHANTOM_ENCODER_NOTE, QUICK_TEST, QUICK_TEST_VOLUMES, Machine, TrainingConfig, flag_of
from ctclip.data.cohort import Volume, load_cohort, split_by_patient
from ctclip.data.ct_rate import labels_path
from ctclip.data.loading import micro_batch_size
from ctclip.evaluation import figures
from ctclip.evaluation.run_folder import own_files, run_calibration, run_record
from ctclip.evaluation.tables import load_labels, load_predictions
from ctclip.inference import predictor
from ctclip.paths import script
from ctclip.phantoms.cohort import plan_split
from ctclip.training import logging, loop, steps
from ctclip.training import run as run_module
from ctclip.training.checkpoint import states
from ctclip.training.loop import train
from ctclip.training.optimization import EMA, TrainableParameters, schedule
from ctclip.training.run import build_model, label_notes, prepare
from ctclip_model import (
    ABNORMALITIES,
    DEMO_PATH,
    WRITTEN,
    CTCLIPMultiAbnormalityModel,
    balanced_label_weights,
    create_loss,
    read_checkpoint,
    sha256_of,
)
from ctclip_training import main

pytestmark = pytest.mark.usefixtures("fast")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(phantoms, tiny_classfine, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def make(**changes) -> TrainingConfig:
        base = {"data_dir": str(phantoms), "ctclip_path": tiny_classfine, "cache_dir": cache, "batch_size": 8}
        return TrainingConfig(**(base | {"epochs": 3, "freeze_epochs": 2} | changes))

    return make


@pytest.fixture
def flags(config) -> list[str]:
    """The same on the command line."""
    names = ("data_dir", "ctclip_path", "cache_dir", "batch_size", "epochs", "freeze_epochs")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(config(), name)))]


def assert_close(first: Path, second: Path, atol: float) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys() and len(a) > 2
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


# ------------------------------------------------------------------ what is said before the first step


def relabelled(phantoms: Path, folder: Path, change: Callable[[pd.DataFrame], None]) -> str:
    """A cohort of the same files with other training labels."""
    shutil.copytree(phantoms, folder, copy_function=os.link)
    table = folder / labels_path("train")
    labels = pd.read_csv(table, index_col=0)
    change(labels)
    table.unlink()
    labels.to_csv(table)
    return str(folder)


def test_findings_of_one_class_are_named_before_training(config, tmp_path, phantoms, capsys):
    def change(labels):
        labels["Emphysema"], labels["Hiatal hernia"] = 0, 1
        labels["Atelectasis"] = 0
        labels.loc[labels.index.isin(held_out), "Atelectasis"] = 1

    settings = config(epochs=1, freeze_epochs=1)
    volumes = load_cohort(phantoms, "train").volumes
    held_out = {volume.name for volume in split_by_patient(volumes, settings.tuning_fraction, settings.seed)[1]}
    cohort = relabelled(phantoms, tmp_path / "cohort", change)
    job = prepare(replace(settings, data_dir=cohort), tmp_path / "run", Machine())
    measured = np.stack([volume.labels for volume in job.validation.volumes])
    expected = {name for name, column in zip(ABNORMALITIES, measured.T, strict=True) if len(set(column)) == 1}
    learned, undefined = label_notes(job)
    assert "findings are all 0 or all 1 in the 3" in learned and "training volumes; they cannot be learned: " in learned
    assert {"Emphysema", "Hiatal hernia"} <= {*learned.partition(": ")[2].split(", ")}
    assert {*undefined.partition("is undefined: ")[2].split(", ")} == expected >= {"Emphysema", "Hiatal hernia"}
    logging.print_setup(job)
    assert f"{learned}\n{undefined}\n" in capsys.readouterr().out


@pytest.mark.parametrize("label", [0, 1])
def test_labels_that_are_all_alike_are_one_line_before_training(label, flags, tmp_path, phantoms, capsys):
    def change(labels):
        labels[:] = label

    cohort = relabelled(phantoms, tmp_path / "cohort", change)
    assert main([*flags, "--data-dir", cohort, "--output-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"found the label {label} for every finding of all " in err
    assert not (tmp_path / "run").exists()


def test_a_patient_of_the_unseen_split_among_those_to_train_on_is_one_line(flags, tmp_path, phantoms, capsys):
    """The line of an evaluation, before anything is trained."""
    volumes = [volume for split in ("train", "valid") for volume in load_cohort(phantoms, split).volumes]
    first = {load_cohort(phantoms, split).volumes[0].patient for split in ("train", "valid")}
    rows = [f"{volume.name},{'one' if volume.patient in first else volume.patient}\n" for volume in volumes]
    (tmp_path / "patients.csv").write_text("VolumeName,PatientID\n" + "".join(rows))
    given = [*flags, "--patients", str(tmp_path / "patients.csv"), "--output-dir", str(tmp_path / "run")]
    assert main(given) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found 1 patient of the unseen split among the training patients ('one')" in err
    assert not (tmp_path / "run").exists()


def test_an_unseen_split_that_cannot_be_read_is_said_and_does_not_stop_training(config, tmp_path, phantoms, capsys):
    shutil.copytree(phantoms, tmp_path / "cohort", copy_function=os.link)
    table = tmp_path / "cohort" / labels_path("valid")
    table.unlink()
    table.write_text("not,a,table\n")
    prepare(config(data_dir=str(tmp_path / "cohort")), tmp_path / "run", Machine())
    assert "Not checked whether patients of the unseen split are trained on: " in capsys.readouterr().out


# ------------------------------------------------------------------ what a run leaves behind


def test_run_folder_is_complete_and_split_by_patient(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging, "write_training_figure", figures.write_training_figure)
    folder = train(config(), tmp_path / "run")
    lines = history(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["stage"] for line in lines] == ["frozen", "frozen", "unfrozen"]
    assert [line["open_layers"] for line in lines] == [0, 0, 2] and lines[0]["best"] is True
    assert all(math.isfinite(line["train_loss"]) and 0 <= line["positive_rate"] <= 1 for line in lines)
    assert all(line["skipped_steps"] == 0 and line["seconds"] > 0 for line in lines)
    best = max(line["tuning_auroc_macro"] for line in lines)
    assert [line["tuning_auroc_macro"] for line in lines if line["best"]][-1] == best

    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["phantom"] is True and record["processes"] == 1
    assert TrainingConfig(**record["config"]) == config() and record["versions"]["ctclip"] == __version__
    assert record["micro_batch"] == 8 and record["gradient_checkpointing"] is False
    assert record["volumes"]["train"] + record["volumes"]["tuning"] == 40 == sum(record["read_as"].values())
    assert record["read_as"]["stored"] > 0  # both file versions were read

    tuning = pd.read_csv(folder / "tuning_predictions.csv", index_col=0)
    labels = pd.read_csv(folder / "tuning_labels.csv", index_col=0)
    assert list(tuning.index) == list(labels.index) and len(tuning) == record["volumes"]["tuning"]
    assert list(tuning.columns) == list(labels.columns) == list(ABNORMALITIES)
    assert {"_".join(name.split("_")[:2]) for name in tuning.index} == set(record["tuning_patients"])
    names = {"config.json", "log.jsonl", "model.safetensors", "run.json", "state", "training_curves.png"}
    assert set(own_files(folder)) == names - {"state"} | {"tuning_predictions.csv", "tuning_labels.csv"}
    assert all(digest == sha256_of(folder / name) for name, digest in own_files(folder).items())
    names |= {WRITTEN}
    assert {path.name for path in folder.iterdir()} == names | {"tuning_predictions.csv", "tuning_labels.csv"}
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.tmp")) and len(states(folder)) == 2

    out = capsys.readouterr().out
    assert out.count("backbone frozen") == 2 and out.count("2 layers unfrozen") == 1
    assert f"(labels {100 * lines[0]['label_rate']:.1f} %)" in out and "peak memory" in out


def test_a_table_of_patients_splits_the_run_and_stays_in_its_tables(config, tmp_path, phantoms):
    """--patients: two of CT-RATE's patients are one here, and never on both sides."""
    volumes = load_cohort(phantoms, "train").volumes
    who = {volume.name: f"P{int(volume.patient.split('_')[1]) // 2}" for volume in volumes}
    table = tmp_path / "who.csv"
    table.write_text("\n".join(["VolumeName,PatientID", *(f"{name},{patient}" for name, patient in who.items())]))
    folder = train(config(patients=str(table), epochs=1, freeze_epochs=1), tmp_path / "run")
    predictions, labels = (load(folder / f"tuning_{name}.csv") for name, load in (
        ("predictions", load_predictions), ("labels", load_labels)))
    for frame in (predictions, labels):
        assert frame["PatientID"].to_dict() == {name: who[name] for name in frame.index}
    tuning = set(predictions["PatientID"])
    assert set(json.loads((folder / "run.json").read_text())["tuning_patients"]) == tuning
    assert {name for name, patient in who.items() if patient in tuning} == set(predictions.index)
    assert run_calibration(folder).n_patients == len(tuning)


@pytest.mark.parametrize("changes", [{}, {"head": "attention", "ema_decay": 0.6, "unfreeze_layers": 0}])
def test_saved_validation_predictions_are_those_of_the_saved_weights(changes, config, tmp_path, monkeypatch, phantoms):
    rank_epochs(monkeypatch, 0.5, 0.6, 0.7)  # the unfrozen epoch is the best
    folder = train(config(**changes), tmp_path / "run")
    saved = pd.read_csv(folder / "tuning_predictions.csv", index_col=0)
    volumes = [volume for volume in load_cohort(phantoms, "train").volumes if volume.name in saved.index]
    read, logits = predictor.predict_volumes(predictor.load_model(folder), volumes, workers=0)
    again = pd.DataFrame(logits.sigmoid().numpy(), index=[volumes[i].name for i in read], columns=saved.columns)
    assert abs(again.loc[saved.index].to_numpy() - saved.to_numpy()).max() < 1e-6
    state = torch.load(states(folder)[-1], weights_only=True)
    averages = state["ema"]["tensors"]
    assert set(averages) == (set(dict(state["tensors"])) if changes else set())
    for name, value in (averages or state["tensors"]).items():  # and the weights are the averages, where there are any
        assert torch.equal(weights(folder)[name], value)
        assert not averages or not torch.equal(value, state["tensors"][name]) or name.endswith("null_kv")


def test_ema_is_that_of_the_formula():
    """timm's warm-up: decay 1 - n ** (-2 / 3) at the n-th update, up to `decay`; the first one copies."""
    parameter, other = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([5.0]))
    ema = EMA(0.5)
    ema.track({"a.b": parameter})
    assert ema.averages["a.b"].item() == 1
    expected = 1.0
    for value, decay in ((2.0, 0.0), (4.0, 1 - 2 ** (-2 / 3)), (8.0, 0.5), (0.0, 0.5)):  # 1 - 3 ** (-2/3) = 0.519
        parameter.data.fill_(value)
        ema.update()
        expected = decay * expected + (1 - decay) * value
        assert ema.averages["a.b"].item() == pytest.approx(expected, rel=1e-6)
    ema.track({"a.b": parameter, "c": other})  # layers were unfrozen
    assert ema.averages["a.b"].item() == pytest.approx(expected, rel=1e-6)
    assert ema.averages["c"].item() == 5 and parameter.item() == 0
    off = EMA(0.0)
    off.track({"a": parameter})
    off.update()
    assert off.averages == {}


@pytest.mark.parametrize(
    "changes", [{"loss_type": "focal"}, {"loss_type": "bce"}, {"loss_type": "asl"}, {"class_weights": True}]
)
def test_loss_of_the_log_is_the_one_asked_for(changes, config, tmp_path):
    """Worked again from the tables in the run's folder."""
    folder = train(config(epochs=1, freeze_backbone=True, **changes), tmp_path / "run")
    (line,) = history(folder)
    tuning = pd.read_csv(folder / "tuning_predictions.csv", index_col=0)
    labels = pd.read_csv(folder / "tuning_labels.csv", index_col=0)
    cohort = load_cohort(config().data_dir, "train").volumes
    others = torch.tensor(np.stack([volume.labels for volume in cohort if volume.name not in tuning.index]))
    asked = config(**changes)
    label_weights = balanced_label_weights(others) if asked.class_weights else None
    criterion = create_loss(asked.loss_type, asked.alpha, asked.gamma, label_weights)
    logits = torch.tensor(tuning.to_numpy()).logit().float()
    expected = criterion(logits, torch.tensor(labels.to_numpy()).float()).item()
    assert line["tuning_loss"] == pytest.approx(expected, abs=1e-5)


def test_higher_alpha_predicts_fewer_positives(config, tmp_path):
    rates = []
    for alpha in (0.15, 0.85):
        changes = {"alpha": alpha, "epochs": 12, "freeze_backbone": True, "learning_rate": 0.1}
        rates.append(history(train(config(**changes), tmp_path / str(alpha)))[-1]["positive_rate"])
    assert rates[0] > rates[1] + 0.1


def test_volumes_with_a_warning_are_counted_in_one_line(config, tmp_path, phantoms, capsys):
    """Two bodies without lungs in a cohort of chests."""
    cohort = shutil.copytree(phantoms, tmp_path / "cohort")
    files = sorted(cohort.glob("dataset/train_fixed/*/*/*.nii.gz"))[:2]
    for file in files:
        image = nib.load(file)
        hu = np.asarray(image.dataobj)
        middle = tuple(slice(size // 5, -(size // 5)) for size in hu.shape[:2])
        hu[middle][hu[middle] < -300] = 40
        nib.save(nib.Nifti1Image(hu, image.affine, image.header), file)
    train(config(data_dir=str(cohort), epochs=2, freeze_epochs=1), tmp_path / "run")
    told = [line for line in capsys.readouterr().out.splitlines() if "with a warning" in line]
    assert len(told) == 1 and told[0].startswith("2 volumes with a warning, first train_")
    assert told[0].endswith(" mL): is this a chest?")


def test_unreadable_volumes_are_counted_and_stop_nothing(config, tmp_path, phantoms, capsys):
    cohort = shutil.copytree(phantoms, tmp_path / "cohort")
    files = sorted(cohort.glob("dataset/train_fixed/*/*/*.nii.gz"))[:2]
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:5000])
    files[1].write_bytes(b"not a scan")
    folder = train(config(data_dir=str(cohort), epochs=1, freeze_epochs=1), tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    left_out = {row["name"] for row in record["left_out"]}
    assert {file.name for file in files} <= left_out
    assert record["volumes"]["train"] + record["volumes"]["tuning"] == 38
    assert "Volumes that could not be read: 2," in capsys.readouterr().out


# ------------------------------------------------------------------ what is trained


def digests(state: dict[str, torch.Tensor], prefixes: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of every tensor whose name begins so."""
    chosen = {name: value for name, value in state.items() if name.startswith(prefixes)}
    return {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in chosen.items()}


@pytest.mark.parametrize("changes", [{}, {"augment": True}], ids=["cached", "encoded"])
def test_frozen_run_leaves_every_tower_tensor_as_it_was(changes, config, tmp_path, tiny_classfine):
    folder = train(config(freeze_backbone=True, epochs=2, **changes), tmp_path / "run")
    assert {line["stage"] for line in history(folder)} == {"frozen"}
    tower = ("visual_transformer.", "to_visual_latent.")
    before, after = (digests(state, tower) for state in (read_checkpoint(tiny_classfine), weights(folder)))
    assert len(after) == 83 and after == {name: before[name] for name in after}
    head = weights(folder)["classifier.weight"]
    assert not torch.equal(head, read_checkpoint(tiny_classfine)["classifier.weight"])


def test_frozen_slice_backbone_stays_as_it_was_with_its_running_statistics(config, tmp_path):
    """Trained with cbam from cached maps."""
    changes = {"model": "resnet10t", "ctclip_path": None, "pretrained": False, "use_attention": "cbam", "limit": 8}
    config = config(freeze_backbone=True, epochs=2, batch_size=4, **changes)
    folder = train(config, tmp_path / "run")
    model = CTCLIPMultiAbnormalityModel.from_pretrained(folder)
    assert not model.is_ctclip and any(key.startswith("attention.") for key in weights(folder))
    torch.manual_seed(config.seed)
    before, after = (
        digests(state, ("backbone.",)) for state in (build_model(config, True).state_dict(), model.state_dict())
    )
    assert before == after and any(name.endswith("running_mean") for name in after)
    assert len(history(folder)) == 2


def test_the_best_epochs_batch_statistics_of_cbam_are_saved_with_its_weights(config, tmp_path, monkeypatch):
    rank_epochs(monkeypatch, 0.6, 0.5, 0.4)
    changes = {"model": "resnet10t", "ctclip_path": None, "pretrained": False, "use_attention": "cbam", "limit": 8}
    folder = train(config(freeze_backbone=True, epochs=3, batch_size=8, **changes), tmp_path / "run")
    assert [line["best"] for line in history(folder)] == [True, False, False]
    state = torch.load(states(folder)[-1], weights_only=True)
    counter = "attention.spatial.conv.bn.num_batches_tracked"
    assert (weights(folder)[counter], state["tensors"][counter]) == (1, 3)  # one batch in each epoch


@pytest.mark.parametrize(("epochs", "unfreeze_layers", "unfrozen"), [(1, 1, 1), (2, 1, 2), (1, 0, 6)])
def test_exactly_the_unfrozen_layers_are_trained(
    epochs, unfreeze_layers, unfrozen, config, tmp_path, tiny_classfine, monkeypatch
):
    rank_epochs(monkeypatch, 0.5, 0.6)  # the last epoch is what is saved
    folder = tmp_path / "run"
    train(config(epochs=epochs, freeze_epochs=0, unfreeze_layers=unfreeze_layers), folder)
    before, after = read_checkpoint(tiny_classfine), weights(folder)
    layers = CTCLIPMultiAbnormalityModel(tiny_classfine).layers()
    assert len(layers) == 6
    due = {name for layer in layers[-unfrozen:] for name in layer} | {"classifier.weight", "classifier.bias"}
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert moved == due
    fixed = {key for key in after if key.endswith((".beta", "._codebook.embed"))}  # buffers
    assert fixed and not fixed & moved and (unfrozen < 6 or moved == set(after) - fixed)
    assert history(folder)[-1]["open_layers"] == unfrozen


@pytest.mark.parametrize("head", ["linear", "attention"])
def test_cached_features_give_the_run_that_encoding_every_epoch_gives(head, config, tmp_path, monkeypatch):
    """Dropout included: both draw the same random numbers."""
    frozen = config(freeze_backbone=True, epochs=2, head=head)
    cached = train(frozen, tmp_path / "cached")
    monkeypatch.setattr(steps, "load_features", lambda *args: None)
    assert_close(cached, train(frozen, tmp_path / "encoded"), atol=1e-6)


def test_augmentation_turns_the_cache_off_for_training_volumes_and_says_so(config, tmp_path, capsys):
    runs = [train(config(epochs=1, augment=augment), tmp_path / str(augment)) for augment in (False, True)]
    assert capsys.readouterr().out.count("--augment changes voxels: no cache for training volumes") == 1
    first, second = (weights(folder)["classifier.weight"] for folder in runs)
    assert (first - second).abs().max() > 1e-4


def test_micro_batches_of_a_step_give_the_gradients_of_the_whole(config, tmp_path):
    """Without dropout, whose random numbers would fall on other rows."""
    unfrozen = config(epochs=1, freeze_epochs=0, unfreeze_layers=0, dropout=0.0)
    whole = train(unfrozen, tmp_path / "whole")
    small = train(unfrozen, tmp_path / "small", Machine(micro_batch=3, gradient_checkpointing="on"))
    assert json.loads((small / "run.json").read_text())["micro_batch"] == 3
    assert_close(whole, small, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "batch", "size"), [((240, 480, 480), 16, 2), ((240, 480, 480), 5, 2), ((64, 96, 96), 5, 4)]
)
def test_micro_batches_bound_the_memory(shape, batch, size):
    assert micro_batch_size(shape, batch) == size


def test_schedule_warms_up_then_falls_to_zero_over_its_own_span():
    values = [schedule(epoch, 2, 10, 0.25) for epoch in (0, 1.9, 2, 3, 4, 6, 10)]
    assert values[:3] == [0, 0, 0]
    assert values[3] == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 8)))
    assert values[4] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert values[5] == pytest.approx(0.5) and values[6] == pytest.approx(0)


@pytest.mark.parametrize(
    ("changes", "unfrozen"),
    [
        ({"freeze_epochs": 2, "unfreeze_layers": 2}, [0, 0, 2, 4, 5, 5]),
        ({"freeze_epochs": 3, "unfreeze_layers": 1}, [0, 0, 0, 1, 2, 3]),
        ({"freeze_epochs": 0, "unfreeze_layers": 4}, [4, 5, 5, 5, 5, 5]),
        ({"freeze_epochs": 4, "unfreeze_layers": 0}, [0, 0, 0, 0, 5, 5]),
        ({"freeze_epochs": 9, "unfreeze_layers": 2}, [0] * 6),
        ({"freeze_backbone": True, "freeze_epochs": 1}, [0] * 6),
    ],
)
def test_layers_are_unfrozen_from_the_output_down(changes, unfrozen):
    config = TrainingConfig(epochs=6, **changes)
    assert [config.unfrozen_layers(epoch, 5) for epoch in range(6)] == unfrozen


def test_layers_have_their_own_rates_and_matrices_their_decay(config, tmp_path):
    changes = {"freeze_epochs": 1, "unfreeze_layers": 1, "layer_decay": 0.5, "backbone_learning_rate": 1e-3}
    folder = train(config(**changes, weight_decay=0.1, learning_rate=0.2, warmup_fraction=0.0), tmp_path / "run")
    groups = torch.load(states(folder)[-1], weights_only=True)["optimizer"]["param_groups"]
    peaks = {(group["layer"], group["start"]): group["peak"] for group in groups}  # layers from the output down
    assert peaks == {(0, 0): 0.2, (1, 1): 1e-3, (2, 2): 5e-4}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    steps = math.ceil(json.loads((folder / "run.json").read_text())["volumes"]["train"] / 8)
    for group in groups:  # the rate of a step is that of its middle: no step has none
        assert group["lr"] == group["peak"] * schedule(3 - 0.5 / steps, group["start"], 3, 0.0) > 0


def test_half_precision_with_loss_scaling_learns_and_counts_no_overflow_as_a_defect(config, tmp_path, monkeypatch):
    """What a T4 does, on the CPU: float16 with a GradScaler whose first scale overflows."""
    monkeypatch.setattr(run_module, "choose_precision", lambda device: torch.float16)
    changes = {"epochs": 2, "freeze_epochs": 0, "backbone_learning_rate": 1e-3, "dropout": 0.0, "ema_decay": 0.5}
    half = train(config(**changes), tmp_path / "half")
    monkeypatch.undo()
    whole = train(config(**changes), tmp_path / "whole")
    assert json.loads((half / "run.json").read_text())["precision"] == "float16"
    assert torch.load(states(half)[-1], weights_only=True)["scaler"]["scale"] >= 1
    for found, expected in zip(history(half), history(whole), strict=True):
        assert found["skipped_steps"] == 0
        assert found["train_loss"] == pytest.approx(expected["train_loss"], abs=0.02)


def test_quick_test_is_200_and_50_phantoms_in_three_epochs():
    """The plan of the cohort stands in for its files: names and labels are all that a split needs."""
    config = TrainingConfig(**QUICK_TEST)
    plans = [plan for plan in plan_split("train", config.train_volumes, 0) if not plan.head]
    volumes = [Volume(plan.name, plan.path, np.array(plan.labels, np.float32)) for plan in plans]
    train, tuning = split_by_patient(volumes, config.tuning_fraction, config.seed)
    assert len(train) >= QUICK_TEST_VOLUMES[0] == 200 and len(tuning) >= QUICK_TEST_VOLUMES[1] == 50
    assert (config.batch_size, config.epochs, config.frozen_epochs) == (16, 3, 2)


# ------------------------------------------------------------------ what a step survives


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_goes_on_with_smaller_micro_batches(error, config, tmp_path, monkeypatch, capsys):
    unfrozen = config(epochs=1, freeze_epochs=0)  # with dropout: the step that failed must not have used up numbers
    expected = train(unfrozen, tmp_path / "expected", Machine(micro_batch=2))
    forward = CTCLIPMultiAbnormalityModel.forward

    def limited(model, x):
        if len(x) > 2:
            raise error
        return forward(model, x)

    monkeypatch.setattr(CTCLIPMultiAbnormalityModel, "forward", limited)
    capsys.readouterr()
    found = train(unfrozen, tmp_path / "found")
    out = capsys.readouterr().out
    assert out.count("Out of memory on cpu: going on with 4 volumes at a time; a step still sees 8") == 1
    assert out.count("Out of memory on cpu: going on with 2 volumes at a time") == 1 == out.count("2 volumes at a time")
    assert json.loads((found / "run.json").read_text())["micro_batch"] == 2
    assert_close(expected, found, atol=1e-6)
    assert history(found)[0]["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({}, ["1 volume at a time", "gradient checkpointing"]),
        # a slice backbone that cannot do the second
        ({"model": "dla46_c", "ctclip_path": None, "pretrained": False, "limit": 4}, ["1 volume at a time"]),
    ],
    ids=["tower", "slices"],
)
def test_out_of_memory_with_one_volume_ends_in_one_line(changes, tried, config, tmp_path, monkeypatch, capsys):
    def full(model, x):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(CTCLIPMultiAbnormalityModel, "forward", full)
    unfrozen = config(epochs=1, freeze_epochs=0, **changes)
    assert run_cli(lambda: train(unfrozen, tmp_path / "run", Machine(micro_batch=2))) == 2
    captured = capsys.readouterr()
    assert re.findall("going on with (.*);", captured.out) == tried
    assert one_line(captured.err) and "out of memory on cpu with one volume at a time" in captured.err
    assert ("and gradient checkpointing" in captured.err) == ("gradient checkpointing" in tried)


def test_out_of_memory_elsewhere_is_one_line(config, tmp_path, monkeypatch, capsys):
    def full(trainable):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(TrainableParameters, "clip_and_step", full)
    assert run_cli(lambda: train(config(), tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert one_line(err) and err.startswith("error: out of memory; ")


def test_weights_with_nan_train_nothing_and_fill_no_cache(config, tiny_classfine, tmp_path, capsys):
    """The quantiser would hide it: every volume would have the same finite codes."""
    key = "visual_transformer.enc_spatial_transformer.layers.1.1.to_q.weight"
    state = read_checkpoint(tiny_classfine)
    state[key][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    spoilt = config(ctclip_path=str(tmp_path / "nan.pt"), cache_dir=str(tmp_path / "cache"))
    assert run_cli(lambda: train(spoilt, tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"found NaN or infinity in {key}" in err
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_curves_that_cannot_be_drawn_end_no_run(config, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise MemoryError("no room for a picture")

    monkeypatch.setattr(logging, "write_training_figure", fail)
    folder = train(config(epochs=1, freeze_epochs=1), tmp_path / "run")
    said = "training_curves.png could not be drawn (MemoryError: no room for a picture); training goes on"
    assert said in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert (folder / "model.safetensors").is_file() and len(history(folder)) == 1


class NaNAt(nn.Module):
    """A loss that is not a number in these calls."""

    def __init__(self, criterion: nn.Module, *calls: int):
        super().__init__()
        self.criterion, self.calls, self.count = criterion, calls, 0

    def forward(self, logits, labels):
        self.count += 1
        loss = self.criterion(logits, labels)
        return loss * math.nan if self.count in self.calls else loss


def test_step_that_is_not_finite_is_skipped_and_counted(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "create_loss", lambda *args: NaNAt(create_loss(*args), 2, 4))
    folder = train(config(epochs=2, freeze_backbone=True), tmp_path / "run")
    assert [line["skipped_steps"] for line in history(folder)] == [2, 0]
    assert all(math.isfinite(line["train_loss"]) for line in history(folder))
    assert all(value.isfinite().all() for value in weights(folder).values())
    out = capsys.readouterr().out
    assert "Step 2 of epoch 1 skipped: not finite (train_" in out and "Step 4 of epoch 1" in out
    assert "Steps skipped because they were not finite: 2" in out


def poison(monkeypatch, first: int) -> list[str]:
    """From this step on one volume of each has features that are not numbers. Returns their names, as they come."""
    original, names, numbers = steps.accumulate_gradients, [], iter(range(1, 10**6))

    def poisoned(job, micro_batches, batch_size):
        def with_nan():
            for micro_batch in micro_batches:
                inputs = micro_batch.inputs.clone()
                inputs[0] = math.nan
                names.append(micro_batch.names[0])
                yield micro_batch._replace(inputs=inputs)

        return original(job, with_nan() if next(numbers) >= first else micro_batches, batch_size)

    monkeypatch.setattr(steps, "accumulate_gradients", poisoned)
    return names


@pytest.mark.parametrize("batch_size", [8, 64], ids=["steps of an epoch", "epochs of one step"])
def test_three_such_steps_in_a_row_end_the_run_with_the_volumes(batch_size, config, tmp_path, monkeypatch, capsys):
    config = config(epochs=5, freeze_backbone=True, batch_size=batch_size)
    expected = train(config, tmp_path / "expected")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        names = poison(patch, first=6 if batch_size == 8 else 2)  # in the second epoch
        assert run_cli(lambda: train(config, folder)) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "3 steps in a row were not finite" in err and "lower --learning-rate" in err
    listed = re.search(r"volumes: (.*)\);", err)[1].split(", ")
    assert listed == list(dict.fromkeys(names)) and len(names) == 3
    if batch_size == 8:  # nothing of the second epoch was saved: without the poison it is as if it had never been
        assert [path.stem for path in states(folder)] == ["0001-000000"]
        assert main(["--resume", str(folder)]) == 0
        assert_close(expected, folder, atol=0)


def test_auroc_that_falls_by_more_than_its_noise_ends_the_run_at_its_best(
    config, tmp_path, tiny_classfine, monkeypatch, capsys
):
    rank_epochs(monkeypatch, 0.9, 0.8, 0.7, 0.6, 0.5)
    monkeypatch.setattr(steps, "auroc_difference", lambda *args: (0.1, 0.01))
    folder = tmp_path / "run"
    train(config(epochs=6, freeze_epochs=1, patience=2), folder)
    lines = history(folder)
    assert [line["best"] for line in lines] == [True, False, False]
    out = capsys.readouterr().out
    assert "more than one standard error in 2 epochs in a row: back to the weights of epoch 1, training ends" in out
    before, after = read_checkpoint(tiny_classfine), weights(folder)
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert moved == {"classifier.weight", "classifier.bias"}  # epoch 1 was frozen
    assert "back to the weights of epoch 1" in json.loads((folder / "run.json").read_text())["status"]
    content = (folder / "model.safetensors").read_bytes()

    monkeypatch.setattr(steps, "accumulate_gradients", None)  # nothing is trained
    assert main(["--resume", str(folder)]) == 0
    assert "State found: validation AUROC below the best" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == content and history(folder) == lines


@pytest.mark.parametrize("difference", [(0.01, 0.02), None], ids=["within the noise", "unknown"])
def test_auroc_within_its_noise_ends_nothing(difference, config, tmp_path, monkeypatch):
    rank_epochs(monkeypatch, 0.9, 0.8, 0.7)
    monkeypatch.setattr(steps, "auroc_difference", lambda *args: difference)
    folder = train(config(epochs=3, freeze_epochs=1, patience=1, limit=12), tmp_path / "run")
    assert len(history(folder)) == 3 and json.loads((folder / "run.json").read_text())["status"] == "finished"


# ------------------------------------------------------------------ two processes


TRAIN_AND_LIST_THREADS = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from ctclip_training import main
code = main()
threads = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
Path("threads_" + os.environ["RANK"]).write_text("".join(threads))  # two processes share one stdout
sys.exit(code)
"""


def test_two_processes_come_to_the_numbers_of_one(config, flags, tmp_path):
    one = train(config(epochs=2, freeze_epochs=1, dropout=0.0), tmp_path / "one")
    two, cache = tmp_path / "two", tmp_path / "cache"
    changes = ["--epochs", "2", "--freeze-epochs", "1", "--dropout", "0", "--cache-dir", cache, "--output-dir", two]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = tmp_path / "script.py"
    script.write_text(TRAIN_AND_LIST_THREADS.format(root=str(ROOT)))
    ended = subprocess.run(
        [*launcher, script, *flags, *changes],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    threads = [(tmp_path / f"threads_{rank}").read_text() for rank in (0, 1)]
    assert all("python" in names for names in threads)
    assert "gloo" not in "".join(threads)  # threads of a group that outlive it may abort the interpreter at its end
    assert ended.stdout.count("epoch  1/") == 1 == ended.stdout.count("Next: ") and "2 processes" in ended.stdout
    for expected, found in zip(history(one), history(two), strict=True):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-5)
        assert found["tuning_loss"] == pytest.approx(expected["tuning_loss"], abs=1e-5)
        for name in ("tuning_auroc_macro", "positive_rate", "label_rate"):
            assert found[name] == pytest.approx(expected[name], abs=1e-9)
        assert found["stage"] == expected["stage"] and found["best"] == expected["best"]
    predictions = [pd.read_csv(folder / "tuning_predictions.csv", index_col=0) for folder in (one, two)]
    assert list(predictions[0].index) == list(predictions[1].index) and predictions[1].index.is_unique
    assert abs(predictions[0].to_numpy() - predictions[1].to_numpy()).max() < 1e-5
    lines = [json.loads(line) for path in cache.rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 40 == len({line["name"] for line in lines})
    assert len(list(cache.rglob("*.jsonl"))) == 4  # both processes have encoded training and validation volumes
    record = json.loads((two / "run.json").read_text())
    assert record["processes"] == 2 and sum(record["read_as"].values()) == 40


# ------------------------------------------------------------------ command line


def test_tensorboard_has_one_value_per_epoch_also_after_an_interruption(config, flags, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    save, calls = loop.save_checkpoint, iter(range(1, 10))

    def killed(*args):
        if next(calls) == 2:  # epoch 2 is in the events and not in a state
            raise KeyboardInterrupt
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", killed)
        assert main([*flags, "--freeze-epochs", "3", "--report-to", "tensorboard", "--output-dir", str(folder)]) == 130
    assert main(["--resume", str(folder), "--report-to", "tensorboard"]) == 0
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    values = events.Scalars("tuning_auroc_macro")
    assert [value.step for value in values] == [1, 2, 3]
    expected = [line["tuning_auroc_macro"] for line in history(folder)]
    assert [value.value for value in values] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_tracker_without_its_package_is_one_line_and_exit_code_2(name, module, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert main([*flags, "--report-to", name, "--output-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"pip install {name}" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_is_given_the_settings_and_each_epoch(name, flags, tmp_path, monkeypatch):
    """By the calls that both packages document: init, log with a step, finish."""
    calls = []
    module = types.ModuleType(name)
    module.init = lambda **options: calls.append(("init", options))
    module.log = lambda values, step: calls.append(("log", step, values))
    module.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, module)
    folder = tmp_path / "first"
    assert main([*flags, "--epochs", "2", "--report-to", name, "--output-dir", str(folder)]) == 0
    (_, options), one, two, end = calls
    assert options["name"] == "first" and options["resume"] == "allow" and options["config"]["epochs"] == 2
    assert (one[:2], two[:2], end) == (("log", 1), ("log", 2), ("finish",))
    assert two[2]["tuning_auroc_macro"] == history(folder)[1]["tuning_auroc_macro"] and "stage" not in two[2]


def test_a_tracker_that_does_not_start_is_one_line_and_the_run_goes_on_without(flags, tmp_path, monkeypatch, capsys):
    module = types.ModuleType("wandb")
    module.init = mock.Mock(side_effect=ConnectionError("No API key configured"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    folder = tmp_path / "run"
    flags += ["--epochs", "1", "--freeze-epochs", "1", "--output-dir", str(folder)]
    assert main([*flags, "--report-to", "wandb"]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "No API key configured" in err and f"--resume {folder}" in err
    assert main(["--resume", str(folder)]) == 0 and len(history(folder)) == 1


def test_settings_of_an_earlier_run_are_taken_and_flags_win(flags, config, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*flags, "--epochs", "2", "--alpha", "0.4", "--output-dir", str(first)]) == 0
    stored = run_record(first)["config"]
    for source in (first, first / "run.json", first / "config.json"):  # the folder, its record, the model's file
        assert config_module.read_settings(source) == stored
    assert main(["--config", str(first), "--epochs", "1", "--output-dir", str(second)]) == 0
    assert run_record(second)["config"] == stored | {"epochs": 1}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("epochs: 8", "found no JSON"),
        ("[8]", "found no settings"),
        ('{"epoch": 8}', "found 'epoch', expected settings"),
        ('{"epochs": "8"}', "found '8' for epochs, expected another type; see --epochs"),
        ('{"data_dir": ""}', "found '' for data_dir, expected a value; give one, or leave it out"),
        ('{"epochs": 8, "epochs": 9}', "the key 'epochs' twice"),
        ('{"epochs": 0}', "--epochs is 0, expected at least 1"),
        (None, "No such file"),
    ],
)
def test_settings_that_are_none_are_one_line(text, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("mine.json").write_text(text)
    assert main(["--config", "mine.json"]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and line in err and not Path("results").exists()


def test_a_resumed_run_takes_no_other_settings(tmp_path, capsys):
    assert main(["--resume", str(tmp_path), "--config", str(tmp_path)]) == 2
    assert "found --config too" in capsys.readouterr().err


def actions() -> dict[str, object]:
    """Flag -> argparse action."""
    parser = OneLineParser()
    config_module.add_training_flags(parser)
    return {flag: action for action in parser._actions for flag in action.option_strings}


def test_every_setting_has_a_flag_that_shows_its_default():
    found = actions()
    for settings in (TrainingConfig(), Machine()):
        for name in (field.name for field in fields(settings) if field.metadata):
            flag = flag_of(name)
            assert found[flag].dest == name
            default = getattr(settings, name)
            if default not in (None, False, True):
                text = re.sub(r"%\(default\)[sg]", str(default), found[flag].help)
                assert type(default)(re.search(r"\(default (.*?)[):]", text)[1]) == default, flag


ALWAYS = {  # flags that every run looks at
    "--mode", "--output-dir", "--resume", "--plan", "--device", "--workers", "--micro-batch", "--save-minutes",
    "--report-to", "--config", "--name", "--data-dir", "--limit", "--tuning-fraction", "--augment", "--model",
    "--epochs", "--freeze-backbone", "--batch-size", "--learning-rate", "--weight-decay", "--warmup-fraction",
    "--clip-norm", "--ema-decay", "--average-epochs", "--recipe", "--loss-type", "--class-weights", "--seed",
    "--help", "--help-all", "--version", "--folds", "--seeds", "--search",
}  # fmt: skip


def test_every_flag_has_an_effect_or_is_refused():
    table = config_module.training_flag_uses(TrainingConfig())
    found = [flag for flag in config_module.training_parser("")._option_string_actions if flag.startswith("--")]
    assert sorted(found) == sorted([*ALWAYS, *table])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--ctclip-path", "nowhere.pt"], "CT-CLIP model not found: run python ctclip_setup.py first"),
        (["--model", "resnet5O"], "--model: "),
        (["--cache-dir", "file/cache"], "file/cache: found a place that cannot be written"),
        (["--output-dir", "file/run"], "file/run: found a place that cannot be written"),
    ],
)
def test_what_a_run_needs_is_missed_before_a_cohort_is_written(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "write_phantom_cohort", None)
    Path("file").touch()
    for command in (main, run_task2.main):
        assert command(flags) == 2
        err = capsys.readouterr().err
        assert one_line(err) and line in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_results_that_cannot_be_written_is_said_before_a_cohort_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "write_phantom_cohort", None)
    Path("results").touch()
    assert main([]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found a place that cannot be written" in err and "name an --output-dir" in err


@pytest.mark.parametrize(("open_layers", "said"), [(0, "backbone frozen"), (1, "1 layer unfrozen"), (4, "4 layers")])
def test_an_epoch_is_one_line(open_layers, said):
    record = {"epoch": 3, "stage": "unfrozen" if open_layers else "frozen", "open_layers": open_layers,
              "train_loss": 0.5, "tuning_loss": 0.4, "tuning_auroc_macro": 0.8, "positive_rate": 0.109,
              "label_rate": 0.2, "seconds": 21.66, "best": True}  # fmt: skip
    line = logging.epoch_line(record, 12)
    assert line.startswith(f"epoch  3/12  {said}") and line.endswith("  21.7 s  best") and "\n" not in line
    assert "train loss 0.5000  validation loss 0.4000  AUROC 0.800  positive rate 10.9 % (labels 20.0 %)" in line
    some = logging.epoch_line(record | {"tuning_auroc_findings": 17, "findings": 18}, 12)
    assert some == line.replace("AUROC 0.800", "AUROC 0.800 over 17 of 18 findings")
    assert logging.epoch_line(record | {"tuning_auroc_findings": 18, "findings": 18}, 12) == line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--data-dir", "D", "--train-volumes", "30"], "--train-volumes, which goes with the built-in cohort"),
        (["--data-dir", "D", "--valid-volumes=30"], "--valid-volumes, which goes with the built-in cohort"),
        (["--loss-type", "bce", "--alpha", "0.35"], "--alpha, which goes with --loss-type focal"),
        (["--loss-type", "asl", "--gamma", "2"], "--gamma, which goes with --loss-type focal"),
        (["--freeze_backbone", "--unfreeze_layers", "2"], "--unfreeze-layers, which goes with unfrozen epochs"),
        (["--freeze-epochs", "5", "--epochs", "5", "--patience", "2"], "--patience, which goes with unfrozen epochs"),
        (["--freeze-backbone", "--layer-decay", "1"], "--layer-decay, which goes with unfrozen epochs"),
        (["--freeze-backbone", "--backbone-learning-rate", "1"], "--backbone-learning-rate, which goes with unfrozen"),
        (["--freeze-backbone", "--gradient-checkpointing", "on"], "--gradient-checkpointing, which goes with unfrozen"),
        (["--freeze-backbone", "--freeze-epochs", "2"], "--freeze-epochs, which goes with a backbone that is unfrozen"),
        (["--freeze-epochs", "0", "--cache-dir", "C"], "--cache-dir, which goes with frozen epochs"),
        (["--no-pretrained"], "--no-pretrained, which goes with a slice backbone"),
        (["--head", "mlp", "--init-head", "file"], "--init-head, which goes with --model ctclip and --head linear"),
    ],
)
def test_a_flag_without_effect_is_refused_also_with_its_default(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert one_line(err) and err.startswith(f"error: found {line}") and "leave it out" in err
    assert not list(tmp_path.iterdir())


def test_more_frozen_epochs_than_epochs_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--epochs", "5", "--freeze-epochs", "6"]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found --freeze-epochs 6 with --epochs 5, expected at most as many; raise" in err


def test_flags_become_settings(flags):
    """Underscores as well; what is left out keeps its default."""
    parser = OneLineParser()
    config_module.add_training_flags(parser)
    args = parser.parse_args(
        ["--ema_decay=0.99", "--unfreeze_layers", "0", "--no-pretrained", "--micro_batch", "3", "--cache_dir", "a_b"]
    )
    expected = {"ema_decay": 0.99, "unfreeze_layers": 0, "pretrained": False, "cache_dir": "a_b"}
    assert config_module.config_from_flags(args) == TrainingConfig(**expected)
    assert config_module.machine_from_flags(args) == Machine(micro_batch=3)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--alpha", "1.5"], "--alpha is 1.5, expected between 0 and 1"),
        (["--epochs", "0"], "--epochs is 0, expected at least 1"),
        (["--freeze-epochs", "-1"], "--freeze-epochs is -1, expected at least 0"),
        (["--unfreeze-layers", "-1"], "--unfreeze-layers is -1, expected at least 0"),
        (["--patience", "0"], "--patience is 0, expected at least 1"),
        (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["--micro-batch", "0"], "--micro-batch is 0, expected at least 1"),
        (["--workers", "-1"], "--workers is -1, expected at least 0"),
        (["--device", "abacus"], "--device abacus"),
        (["--dropout", "1"], "--dropout is 1.0, expected at least 0 and below 1"),
        (["--backbone-learning-rate", "-1"], "--backbone-learning-rate is -1.0, expected at least 0"),
        (["--layer-decay", "1.1"], "--layer-decay is 1.1, expected above 0 and at most 1"),
        (["--ema-decay", "1"], "--ema-decay is 1.0, expected at least 0 (off) and below 1"),
        (["--weight_decay", "-1"], "--weight-decay is -1.0, expected at least 0"),
        (["--warmup-fraction", "2"], "--warmup-fraction is 2.0, expected between 0 and 1"),
        (["--clip-norm", "0"], "--clip-norm is 0.0, expected above 0"),
        (["--gamma", "1023"], "--gamma is 1023.0, expected 0 to 100"),
        (["--seed", "99999999999999999999"], "--seed is 99999999999999999999, expected at least 0 and below 2^32"),
        (["--device", "meta"], "--device meta: not usable here"),
        (["--seed", "-1"], "--seed is -1, expected at least 0"),
        (["--limit", "1"], "--limit is 1, expected at least 2 volumes"),
        (["--tuning-fraction", "0"], "--tuning-fraction is 0.0, expected between 0 and 1"),
        (["--save-minutes", "-1"], "--save-minutes is -1.0, expected"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--ctclip-path", "nothing.pt"], "CT-CLIP model not found: run python ctclip_setup.py first"),
        (["--use_attention", "cbam"], "found --use-attention, which goes with a slice backbone"),
        (["--model", "resnet18", "--ctclip_path", "x.pt"], "goes with --model ctclip only"),
        (["--model", "resnet18", "--head", "mlp"], "--head, which goes with --model ctclip, where it is mlp, only"),
        (["--model", "dla46_c", "--no-pretrained", "--gradient-checkpointing", "on"], "dla46_c has no such mode"),
        (["--resume", "nowhere"], "no run.json in nowhere"),
        (["--resume", "nowhere", "--output-dir", "run"], "leave it out"),
        (["--model", "efficientnet_b00"], "'efficientnet_b00' is not a timm model; close names: "),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, line, phantoms, tiny_classfine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"--data-dir": str(phantoms), "--ctclip-path": tiny_classfine, "--output-dir": "run"}
    for flag in flags:
        given.pop(flag.replace("_", "-"), None)
    if flags[0] == "--resume":
        given = {}
    if flags[0] == "--model":
        given.pop("--ctclip-path", None)
    assert main([*flags, *(part for pair in given.items() for part in pair)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and one_line(err) and line in err
    assert not list(tmp_path.iterdir())


def test_command_line_trains_resumes_and_refuses_to_overwrite(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*flags, "--freeze_epochs=3"]
    assert main(["--mode", "full_train", "--output_dir", "results/run", *flags]) == 0
    assert f"Next: python {script('ctclip_evaluation.py')} --checkpoint results/run" in capsys.readouterr().out
    assert main(["--output-dir", "results/run", *flags]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["--resume", "--epochs", "5"]) == 2
    assert "found other values for --epochs; leave them out" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in Path("results/run").rglob("*.*")}
    assert main(["--resume", "--epochs", "3", "--save-minutes", "1"]) == 0  # nothing left to do
    out = capsys.readouterr().out
    assert "State found: all 3 epochs are done\n" in out
    evaluate = f"python {script('ctclip_evaluation.py')} --checkpoint results/run"
    said = f"results/run is already finished; evaluate it: {evaluate}\n"
    assert out.endswith(said)
    assert {path: path.stat().st_mtime_ns for path in Path("results/run").rglob("*.*")} == before
    Path("results/run/report.html").touch()
    assert main(["--resume"]) == 0
    assert capsys.readouterr().out.endswith("results/run is already finished; report: results/run/report.html\n")
    assert {path.name for path in tmp_path.iterdir()} == {"results"}


def test_folders_may_have_moved_when_a_run_goes_on(config, tmp_path, monkeypatch, capsys):
    config = replace(config(epochs=2, freeze_backbone=True, limit=8), cache_dir=str(tmp_path / "cache"))
    expected = train(config, tmp_path / "expected")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:

        def stop(*args):
            raise KeyboardInterrupt

        patch.setattr(logging, "write_history", stop)  # after the first epoch's state
        assert run_cli(lambda: train(config, folder)) == 130
    moved = tmp_path / "moved"
    (tmp_path / "cache").rename(moved)
    assert main(["--resume", str(folder), "--cache_dir", str(moved)]) == 0
    assert "going on after epoch 1 of 2" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
    assert json.loads((folder / "run.json").read_text())["config"]["cache_dir"] == str(moved)
    assert_close(expected, folder, atol=0)


def test_a_run_on_the_demo_s_encoder_says_so(config, tmp_path, monkeypatch, capsys):
    """A renamed copy of the demo's weights, on a cohort that is not phantoms."""
    monkeypatch.setattr(run_module, "is_phantom_cohort", lambda folder: False)
    weights_file = shutil.copy(DEMO_PATH, tmp_path / "mine.pt")
    folder = train(config(ctclip_path=str(weights_file), epochs=1, freeze_epochs=1, limit=8), tmp_path / "run")
    before, _, after = capsys.readouterr().out.partition("epoch  1/1")
    assert PHANTOM_ENCODER_NOTE in before and PHANTOM_ENCODER_NOTE in after
    assert json.loads((folder / "run.json").read_text())["phantom_encoder"] is True
    assert json.loads((folder / "config.json").read_text())["derived_from"] == "ctclip_demo"
