"""Random search on a small phantom cohort with a tiny CT-CLIP: what is drawn, that a trial is the run of its printed
command, how a search goes on, what the best is said to be worth.

References: the run itself, to the bit; an undisturbed search; simulated trials whose AUROCs are known.
"""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_training import damage, history, one_line
from scipy.special import logit

from ctclip.config import TrainingConfig, TrainingError, config_from_flags, training_parser
from ctclip.evaluation.metrics import compute_metrics
from ctclip.memory import SystemMemory
from ctclip.training import search, trial_workers
from ctclip.training.search import CTCLIP_HEADS, SEARCHED, Trial, command_of, draw_setting, score_elsewhere
from ctclip.training.trial_workers import TrialWorkers, processes_to_start
from ctclip_training import main

pytestmark = pytest.mark.usefixtures("fast")
TRIALS = 5


@pytest.fixture(scope="module")
def flags(phantoms, tiny_classfine, tmp_path_factory) -> list[str]:
    cache = str(tmp_path_factory.mktemp("cache"))
    rest = ["--cache-dir", cache, "--epochs", "2", "--batch-size", "16", "--seed", "3"]
    return ["--data-dir", str(phantoms), "--ctclip-path", tiny_classfine, *rest]


@pytest.fixture(scope="module")
def searched(fast, flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "search"
    assert main([*flags, "--search", str(TRIALS), "--output-dir", str(folder)]) == 0
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "search.json").read_text())


def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "search.csv").drop(columns="seconds")


def config_of(command: str) -> TrainingConfig:
    return config_from_flags(training_parser("").parse_args(shlex.split(command)[2:]))


def test_settings_are_drawn_by_the_seed_and_their_number():
    base = TrainingConfig(freeze_backbone=True, seed=4)
    drawn = [draw_setting(base, (), CTCLIP_HEADS, number) for number in range(1, 201)]
    assert drawn[0] == base and drawn[:50] == [draw_setting(base, (), CTCLIP_HEADS, n) for n in range(1, 51)]
    assert draw_setting(replace(base, seed=5), (), CTCLIP_HEADS, 2) != drawn[1]
    for config in drawn:
        config.check()
        assert 3e-3 <= config.head_learning_rate <= 0.3 and 1e-4 <= config.weight_decay <= 1
        assert 0.15 <= config.alpha <= 0.85 and 0 <= config.gamma <= 4 and 0 <= config.dropout <= 0.6
        assert config.loss_type == "focal" or (config.alpha, config.gamma) == (base.alpha, base.gamma)
        assert replace(config, **{name: getattr(base, name) for name in SEARCHED}) == base
    for name in ("head", "loss_type"):
        counts = pd.Series([getattr(config, name) for config in drawn]).value_counts()
        assert len(counts) == 3 and counts.min() > 45  # a third each
    rates = np.log([config.head_learning_rate for config in drawn[1:]])
    assert np.median(rates) == pytest.approx(np.log(0.03), abs=0.4)


def test_flags_that_are_given_stay(searched, flags):
    base = TrainingConfig(head="mlp", dropout=0.1, loss_type="bce")
    drawn = [draw_setting(base, ("head", "dropout", "loss_type"), CTCLIP_HEADS, number) for number in range(2, 20)]
    assert {(each.head, each.dropout, each.loss_type, each.alpha) for each in drawn} == {("mlp", 0.1, "bce", 0.35)}
    assert len({each.learning_rate for each in drawn}) > 10


def test_the_table_is_sorted_and_begins_with_the_best(searched, capsys):
    record, rows = results(searched), table(searched)
    assert record["status"] == "finished" and len(rows) == TRIALS == len(record["trials"])
    assert rows.auroc_macro.is_monotonic_decreasing and sorted(rows.trial) == list(range(1, TRIALS + 1))
    assert record["best"]["auroc_macro"] == rows.auroc_macro[0] and record["note"].startswith("Synthetic data")
    assert set(rows["head"]) > {"linear"}


def test_printed_commands_train_to_the_auroc_of_the_table_to_the_bit(searched, flags, tmp_path):
    """The best one's, and one of each other head."""
    record = results(searched)
    rows = {row["head"]: row for row in record["trials"][::-1]}
    rows[record["best"]["head"]] = record["best"]
    assert len(rows) > 1
    for head, row in rows.items():
        config = draw_setting(config_of(command_of(base_config(flags))), (), CTCLIP_HEADS, row["trial"])
        command = command_of(config)
        assert row["trial"] != record["best"]["trial"] or command == record["best"]["command"]
        folder = tmp_path / head
        assert main([*shlex.split(command)[2:], "--output-dir", str(folder)]) == 0
        scores = [line["tuning_auroc_macro"] for line in history(folder)]
        assert max(scores) == row["auroc_macro"] and scores.index(max(scores)) + 1 == row["epoch"]


def base_config(flags) -> TrainingConfig:
    return replace(config_from_flags(training_parser("").parse_args(flags)), freeze_backbone=True)


def test_a_search_goes_on_after_an_interruption_and_may_grow(searched, flags, tmp_path, monkeypatch, capsys):
    folder, trained = tmp_path / "search", []
    original = search.HeadJob.train

    def train(self, number, config):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(number)
        return original(self, number, config)

    with monkeypatch.context() as patch:
        patch.setattr(search.HeadJob, "train", train)
        assert main([*flags, "--search", "4", "--output-dir", str(folder)]) == 130
    err = capsys.readouterr().err
    assert one_line(err) and "2 of 4 settings are done; the same command goes on" in err
    assert results(folder)["status"] == "running" and not (folder / "search.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in (folder / "trials").iterdir()}
    assert len(before) == 2
    assert main([*flags, "--search", str(TRIALS), "--output-dir", str(folder)]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    pd.testing.assert_frame_equal(table(folder), table(searched))
    assert results(folder)["on_other_patients"] == results(searched)["on_other_patients"]
    assert main([*flags, "--search", "4", "--output-dir", str(folder)]) == 2
    assert "other values for --search" in capsys.readouterr().err
    damage(folder / "trials" / "0001.npz")
    assert main([*flags, "--search", str(TRIALS), "--output-dir", str(folder)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "0001.npz: found a damaged trial" in err


def in_two_processes(monkeypatch) -> None:
    monkeypatch.setattr(search, "SECONDS_WORTH_PROCESSES", 0)
    monkeypatch.setattr(search, "processes_to_start", lambda device, pending: 2)


def test_processes_side_by_side_come_to_the_same_table(searched, flags, tmp_path, monkeypatch):
    in_two_processes(monkeypatch)
    made = []
    monkeypatch.setattr(search, "TrialWorkers", lambda *args: made.append(TrialWorkers(*args)) or made[-1])
    assert main([*flags, "--search", str(TRIALS), "--output-dir", str(tmp_path / "search")]) == 0
    assert len(made) == 1 and len(made[0].processes) == 2 and not any(p.is_alive() for p in made[0].processes)
    pd.testing.assert_frame_equal(table(tmp_path / "search"), table(searched))


def test_a_process_that_is_killed_is_said():
    with TrialWorkers(1, TrainingConfig) as workers:
        workers.processes[0].kill()
        with pytest.raises(TrainingError, match=r"has ended \(out of memory\?\).*the same command goes on"):
            list(workers.train({1: TrainingConfig()}))


def test_as_many_processes_as_threads_and_memory_allow(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(trial_workers, "process_memory", lambda: 10)
    for available, pending, expected in ((100, 9, 6), (100, 3, 3), (45, 9, 4), (5, 9, 1)):
        monkeypatch.setattr(trial_workers, "system_memory", lambda held=available: SystemMemory(held, 200))
        assert processes_to_start(cpu, pending) == expected
    assert processes_to_start(torch.device("cuda"), 9) == 1


def test_a_setting_that_diverges_is_listed_and_the_search_goes_on(flags, tmp_path, monkeypatch, capsys):
    original = draw_setting
    monkeypatch.setattr(
        search, "draw_setting",
        lambda *args: replace(original(*args), learning_rate=1e38 if args[-1] == 2 else 0.01, loss_type="bce"),
    )  # fmt: skip
    assert main([*flags, "--head", "linear", "--search", "2", "--output-dir", str(tmp_path / "search")]) == 0
    best, failed = results(tmp_path / "search")["trials"]
    assert best["trial"] == 1 and failed["auroc_macro"] is None and "not finite" in failed["failed"]
    assert "not finite" in capsys.readouterr().out


def test_a_search_needs_a_finding_with_both_classes_among_the_validation_patients(flags, tmp_path, capsys):
    assert main([*flags, "--limit", "4", "--search", "2", "--output-dir", str(tmp_path / "search")]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found no finding with both classes" in err


def simulated(quality: list[float], seed: int, patients: int = 120) -> tuple[list[Trial], np.ndarray, list[str]]:
    """Trials of one epoch whose logits are quality * label + noise."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((patients, 3)) < 0.3).astype(np.float32)
    trials = []
    for number, strength in enumerate(quality, 1):
        logits = strength * labels + rng.normal(size=labels.shape)
        score = compute_metrics(labels, 1 / (1 + np.exp(-logits)))["auroc_macro"]
        trials.append(Trial(number, TrainingConfig(), np.array([score]), logits[None], 1.0))
    return trials, labels, [f"p{i}" for i in range(patients)]


def test_the_best_of_many_alike_is_worth_what_each_is():
    """Settings that know nothing: the best looks better than 0.5 on those who chose it; on others it is 0.5."""
    apparent, elsewhere = [], []
    for seed in range(6):
        trials, labels, patients = simulated([0.0] * 20, seed)
        apparent.append(max(trial.score for trial in trials))
        elsewhere.append(score_elsewhere(trials, labels, patients, 0, 30)["auroc_macro"])
    assert np.mean(apparent) > 0.54 and abs(np.mean(elsewhere) - 0.5) < 0.015


def test_a_setting_that_is_better_is_found_and_its_gain_is_said():
    trials, labels, patients = simulated([0.5, 3.0, 0.5], 1)
    found = score_elsewhere(trials, labels, patients, 0, 60)
    assert found["agreement"] == 1 and found["auroc_macro"] == pytest.approx(trials[1].score, abs=0.01)
    assert found["gain"] == pytest.approx(trials[1].score - trials[0].score, abs=0.02) and found["gain"] > 0.2
    assert found == score_elsewhere(trials, labels, patients, 0, 60)


def test_a_copy_of_the_first_setting_gains_nothing():
    trials, labels, patients = simulated([0.7], 2)
    copy = Trial(2, TrainingConfig(), trials[0].scores, trials[0].logits, 1.0)
    assert score_elsewhere([*trials, copy], labels, patients, 0, 60)["gain"] == 0
    probabilities = 1 / (1 + np.exp(-trials[0].logits[0]))
    assert np.allclose(logit(probabilities), trials[0].logits[0])


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig(),
        TrainingConfig(data_dir="a folder/with space", freeze_backbone=True, learning_rate=0.0123, seed=7, limit=9),
        TrainingConfig(model="resnet18", pretrained=False, class_weights=True, weight_decay=1e-4, windows="-1000:200"),
        TrainingConfig(mode="quick_test", train_volumes=270, valid_volumes=100, epochs=3, freeze_epochs=2, alpha=0.5),
    ],
)
def test_a_configuration_is_what_its_command_line_says(config):
    assert config_of(command_of(config)) == config
