"""Cross-validation and runs by seed on a small phantom cohort with a tiny CT-CLIP.

References: the sets of patients; the folds' own tables; an undisturbed study, bit for bit; a plain run of one seed.
"""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers_training import history, one_line, weights
from scipy.special import logit

from ctclip.config import Settings, TrainingConfig, TrainingError
from ctclip.data.cohort import load_cohort
from ctclip.evaluation import command
from ctclip.evaluation.metrics import compute_metrics
from ctclip.evaluation.run_folder import run_record
from ctclip.evaluation.saved_ensemble import saved_ensemble
from ctclip.evaluation.tables import load_labels, load_predictions
from ctclip.inference.run_predictions import run_inputs
from ctclip.training import folds, loop
from ctclip.training.loop import train
from ctclip.training.run import split_cohort
from ctclip.training.study import study_folder
from ctclip_training import main

pytestmark = pytest.mark.usefixtures("fast")
FOLDS = 3


@pytest.fixture(scope="module")
def flags(phantoms, tiny_classfine, tmp_path_factory) -> list[str]:
    cache = str(tmp_path_factory.mktemp("cache"))
    frozen = ["--epochs", "2", "--freeze-backbone", "--batch-size", "16"]
    return ["--data-dir", str(phantoms), "--ctclip-path", tiny_classfine, "--cache-dir", cache, *frozen]


@pytest.fixture(scope="module")
def study(fast, flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "folds"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folds, "Settings", lambda: Settings(resamples=100))
        patch.setattr(command, "draw", lambda *args: [])
        assert main([*flags, "--folds", str(FOLDS), "--output-dir", str(folder)]) == 0
    return folder


def members(folder: Path) -> list[Path]:
    return [folder / f"fold_{number}" for number in range(1, FOLDS + 1)]


def test_folds_are_disjoint_complete_and_not_seen_by_what_steers_them(phantoms, flags, study):
    volumes = load_cohort(phantoms, "train").volumes
    everyone = {volume.patient for volume in volumes}
    held_out = []
    for folder in members(study):
        record = run_record(folder)
        sides = [{v.patient for v in split.volumes}
                 for split in split_cohort(TrainingConfig(**record["config"]), volumes)]
        assert set.union(*sides) == everyone and sum(map(len, sides)) == len(everyone) and all(sides)
        assert sides[1] == set(record["tuning_patients"]) and sides[2] == set(record["held_out_patients"])
        assert record["patients"] == dict(zip(("train", "tuning", "held_out"), map(len, sides), strict=True))
        tuning = load_predictions(folder / "tuning_predictions.csv").index
        assert {"_".join(name.split("_")[:2]) for name in tuning} == sides[1]
        held_out += sides[2]
    assert sorted(held_out) == sorted(everyone)


def test_the_table_of_all_folds_is_each_folds_own(phantoms, study):
    pooled = load_predictions(study / "predictions.csv")
    assert sorted(pooled.index) == sorted(volume.name for volume in load_cohort(phantoms, "train").volumes)
    for folder in members(study):
        own = load_predictions(folder / "predictions.csv")
        assert set(own.index) == set(load_labels(folder / "labels.csv").index) and len(own) > 5
        pd.testing.assert_frame_equal(pooled.loc[own.index], own)
    record = json.loads((study / "folds.json").read_text())
    metrics = json.loads((study / "metrics.json").read_text())
    assert record["status"] == "finished" and metrics["n_volumes"] == len(pooled) == 40
    assert metrics["ensemble"]["method"] == "pooled" and metrics["thresholds"]["fitted_on"] != "tuning"
    alone = [row["auroc_macro"] for row in record["folds"]]
    assert record["auroc_macro"] == {"mean": np.mean(alone), "sd": np.std(alone, ddof=1)}
    assert metrics["ensemble"]["auroc_macro"] == pytest.approx(record["auroc_macro"])
    ensemble = saved_ensemble(study / "fused")
    assert list(ensemble.partners) == members(study) and ensemble.weights is None
    pd.testing.assert_frame_equal(load_predictions(study / "fused" / "tuning_predictions.csv"), pooled)
    members_alone = [run_inputs(run, phantoms, tables=run / "on_phantoms").predictions.frame for run in members(study)]
    together = run_inputs(study / "fused").predictions.frame
    assert set(together.index) == {volume.name for volume in load_cohort(phantoms, "valid").volumes}
    expected = np.mean([logit(table.loc[together.index]) for table in members_alone], axis=0)
    assert np.allclose(logit(together), expected, atol=1e-4)
    assert metrics["intervals"]["at_0.5"]["auroc_macro"] and (study / "report.txt").is_file()


def test_a_fold_is_a_run_that_predicts_the_patients_it_has_not_seen(study):
    """Also where its table is made anew."""
    folder = members(study)[1]
    before = load_predictions(folder / "predictions.csv")
    (folder / "predictions.csv").unlink()
    inputs = run_inputs(folder)
    pd.testing.assert_frame_equal(inputs.predictions.frame, before)
    assert set(inputs.tuning[0].frame.index).isdisjoint(before.index)


def test_an_interrupted_study_goes_on_with_the_same_command_to_the_bit(flags, study, tmp_path, monkeypatch, capsys):
    """Without a name, too: the folder is found by its settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folds, "evaluate_and_write", lambda *args, **options: None)
    original, calls = loop.validate, iter(range(1, 100))

    def interrupted(job, state):
        if next(calls) in (2, 3):  # the last epoch of the first fold, the first of the second
            os.kill(os.getpid(), signal.SIGTERM)
        return original(job, state)

    line = [*flags, "--folds", str(FOLDS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "validate", interrupted)
        for where in ("fold_1 is trained; the same command goes on with fold_1", "goes on with fold_2"):
            assert main(line) == 128 + signal.SIGTERM
            err = capsys.readouterr().err
            assert one_line(err) and err.endswith(f"{where}\n")
    (folder,) = (tmp_path / "results").iterdir()
    first = (folder / "fold_1" / "model.safetensors").stat().st_mtime_ns
    assert not (folder / "fold_3").exists()
    assert main(line) == 0
    assert f"Going on with results/{folder.name}\n" in capsys.readouterr().out
    assert (folder / "fold_1" / "model.safetensors").stat().st_mtime_ns == first and len(list(tmp_path.iterdir())) == 1
    for one, other in zip(members(folder), members(study), strict=True):
        assert [line["train_loss"] for line in history(one)] == [line["train_loss"] for line in history(other)]
        assert all(value.equal(weights(other)[name]) for name, value in weights(one).items())
        assert (one / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()
    config = TrainingConfig(**json.loads((folder / "folds.json").read_text())["config"])
    assert study_folder("folds", FOLDS, config, None) != folder.relative_to(tmp_path)  # it is finished


def test_folds_of_a_cohort_that_has_changed_meanwhile_are_refused(tmp_path):
    for number, patients in enumerate((["a", "b"], ["c"]), 1):
        folder = tmp_path / f"fold_{number}"
        folder.mkdir()
        counts = {"train": 2 - number, "tuning": 1, "held_out": len(patients)}
        content = {"patients": counts, "held_out_patients": patients}
        (folder / "run.json").write_text(json.dumps(content))
    runs = [tmp_path / "fold_1", tmp_path / "fold_2"]
    with pytest.raises(TrainingError, match=r"fold_1: found 4 patients, and 3 whom the folds hold out"):
        folds.check_one_cohort(runs)
    (tmp_path / "fold_1" / "run.json").write_text(json.dumps({
        "patients": {"train": 0, "tuning": 1, "held_out": 2}, "held_out_patients": ["a", "b"]}))
    (tmp_path / "fold_2" / "run.json").write_text(json.dumps({
        "patients": {"train": 1, "tuning": 1, "held_out": 1}, "held_out_patients": ["c"]}))
    folds.check_one_cohort(runs)


def test_seeds_share_the_split_and_say_how_far_they_lie_apart(flags, tmp_path, capsys):
    folder = tmp_path / "seeds"
    assert main([*flags, "--head", "mlp", "--seeds", "2", "--seed", "5", "--output-dir", str(folder)]) == 0
    runs = [folder / "seed_5", folder / "seed_6"]
    tables = [load_predictions(run / "tuning_predictions.csv") for run in runs]
    assert list(tables[0].index) == list(tables[1].index) and not np.allclose(tables[0], tables[1])
    rows = pd.read_csv(folder / "seeds.csv", index_col=0)
    best = [max(line["tuning_auroc_macro"] for line in history(run)) for run in runs]
    assert rows.loc["macro", ["seed_5", "seed_6"]].tolist() == pytest.approx(best)
    assert rows.loc["macro", "mean"] == pytest.approx(np.mean(best))
    assert rows.loc["macro", "sd"] == pytest.approx(abs(best[0] - best[1]) / np.sqrt(2))
    logits = logit([table.to_numpy() for table in tables]).mean(axis=0)
    together = load_predictions(folder / "fused" / "tuning_predictions.csv")
    assert np.allclose(logit(together.to_numpy()), logits)
    labels = load_labels(runs[0] / "tuning_labels.csv").to_numpy()
    assert rows.loc["macro", "together"] == pytest.approx(compute_metrics(labels, together.to_numpy())["auroc_macro"])
    assert len(rows) == 19 and f"mean {np.mean(best):.3f}, SD" in capsys.readouterr().out
    config = TrainingConfig(**run_record(runs[0])["config"])
    plain = train(replace(config, split_seed=None), tmp_path / "plain")
    assert all(value.equal(weights(runs[0])[name]) for name, value in weights(plain).items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--folds", "3", "--seeds", "3"], "found --folds and --seeds, expected one of them"),
        (["--folds", "1"], "--folds is 1, expected at least 2"),
        (["--folds", "33"], "found 32 patients for 33 folds"),
        (["--seeds", "2", "--resume"], "found --resume with --seeds"),
        (["--search", "2", "--plan"], "found --plan with --search"),
        (["--search", "2", "--adapt", "last:2"], "found --adapt with --search, expected a frozen backbone"),
        (["--search", "2", "--save-minutes", "1"], "found --save-minutes, which goes with runs that are kept"),
        (["--search", "2", "--augment"], "found --augment with --search, expected a frozen backbone"),
        (["--search", "2", "--head", "linear", "--loss-type", "bce", "--learning-rate", "1", "--weight-decay", "0",
          "--dropout", "0"], "found flags for all of --head"),
    ],
)  # fmt: skip
def test_what_makes_no_study_is_one_line(given, said, flags, tmp_path, capsys):
    few = [flag for flag in flags if flag != "--freeze-backbone"]
    folder = tmp_path / "study"
    assert main([*few, *given, "--output-dir", str(folder)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and said in err and not list(folder.glob("*/model.safetensors"))
    if "--folds" in given:  # a record of what could not begin keeps no name
        assert study_folder("folds", 3, TrainingConfig(), folder) == folder


def test_a_folder_with_another_study_or_a_run_is_refused(flags, study, capsys):
    assert main([*flags, "--folds", "3", "--alpha", "0.5", "--output-dir", str(study)]) == 2
    assert "holds a study with other values for --alpha" in capsys.readouterr().err
    assert main([*flags, "--folds", "4", "--output-dir", str(study)]) == 2
    assert "holds a study with other values for --folds" in capsys.readouterr().err
    assert main([*flags, "--seeds", "3", "--output-dir", str(study / "fold_1")]) == 2
    assert "holds a run, expected a folder of its own for --seeds" in capsys.readouterr().err
    settings = [*flags[:6], "--config", str(study / "fold_1"), "--folds", "3"]
    assert main([*settings, "--output-dir", str(study.parent / "other")]) == 2
    assert "found the settings of a study's run (--config) with --folds" in capsys.readouterr().err
