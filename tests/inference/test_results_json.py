"""The challenge's results.json from tables of predictions: every decision at 0.5, and every name, as `--mode predict`
writes them from the scans; and the scale that tables of predictions state, so that none is calibrated twice.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers_data import affine_of, chest, write
from helpers_evaluation import simulate
from helpers_scans import write_mha

import ctclip_evaluation
import run_task2
from ctclip.evaluation import command
from ctclip.evaluation import thresholds as th
from ctclip.evaluation.calibration import fit_calibration, load_calibration
from ctclip.evaluation.run_folder import RunError, run_calibration
from ctclip.evaluation.tables import load_labels, load_predictions, write_table
from ctclip.inference.predictions import predict
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel

SUITE = Path(__file__).resolve().parents[2]
MODEL = SUITE / "tests" / "fixtures" / "tiny_a_classfine.pt"
SPACING = (7.5, 7.9, 12.25)
NAMES = list(ABNORMALITIES)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Six scans: with either suffix, two of one stem, one below a folder."""
    folder = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate(("a.mha", "b.mha", "valid_3_a_1.mha")):
        write_mha(folder / name, chest(seed=seed), affine_of(SPACING))
    for seed, name in enumerate(("a.nii.gz", "deep/d.nii", "e.NII.GZ"), 3):
        write(folder / name, chest(seed=seed), SPACING)
    return folder


@pytest.fixture(scope="module")
def trained(scans, tmp_path_factory):
    """A run as training leaves it, whose thresholds lie among the scans' probabilities."""
    run = tmp_path_factory.mktemp("trained")
    CTCLIPMultiAbnormalityModel(str(MODEL)).save_pretrained(run)
    given = predict(scans, MODEL, device="cpu").to_numpy()
    rng, names = np.random.default_rng(0), [f"train_{i}_a_{k}.nii.gz" for i in range(60) for k in (1, 2)]
    labels = np.repeat(rng.random((60, 18)) < 0.4, 2, axis=0).astype(int)
    spread = given.std(axis=0) * (rng.normal(size=labels.shape) + labels)
    write_table(run / "tuning_labels.csv", names, labels)
    write_table(run / "tuning_predictions.csv", names, np.clip(given.mean(axis=0) + spread, 0, 1))
    return run


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for path in trained.iterdir():
        Path("run", path.name).write_bytes(path.read_bytes())
    return Path("run")


def predicted(scans, output, *flags):
    argv = ["--mode", "predict", "--checkpoint", "run", "--input", scans, "--device", "cpu", "--output", output]
    assert run_task2.main(list(map(str, [*argv, *flags]))) == 0
    return output


def made(output, *flags):
    assert ctclip_evaluation.main([*map(str, flags), "--results-json", str(output)]) == 0
    return output


def answers(path):
    """{name: probabilities} of a results.json, each name once."""
    rows = json.loads(Path(path).read_text())["predictions"]
    found = {row["input_image_name"]: list(row["probabilities"].values()) for row in rows}
    assert len(found) == len(rows) and all(tuple(row["probabilities"]) == ABNORMALITIES for row in rows)
    return found


def check_same_decisions(path, expected):
    found, expected = answers(path), answers(expected)
    assert list(found) == list(expected)
    decisions = np.array([*expected.values()]) >= 0.5
    assert np.array_equal(np.array([*found.values()]) >= 0.5, decisions)
    assert 0.05 < decisions.mean() < 0.95 and (decisions.any(axis=0) & ~decisions.all(axis=0)).sum() > 9


def test_a_results_json_from_a_table_decides_as_the_one_from_scans(scans, run):
    """Of the model's own, of calibrated and of mapped probabilities; the commands as a user runs them."""
    def call(script, *flags):
        done = subprocess.run([sys.executable, SUITE / script, *flags], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    predict_flags = ["--mode", "predict", "--checkpoint", "run", "--input", str(scans), "--device", "cpu", "--output"]
    call("run_task2.py", *predict_flags, "scans.json", "--map-thresholds")
    call("run_task2.py", *predict_flags, "u.csv", "--uncalibrated")
    printed = call("ctclip_evaluation.py", "--apply", "run", "--predictions", "u.csv", "--results-json", "out/u.json")
    assert printed == "Wrote out/u.json: 6 scans; tuned thresholds (prevalence) lie at 0.5\n"
    predicted(scans, "p.csv")
    predicted(scans, "m.csv", "--map-thresholds")
    names = list(answers("scans.json"))
    assert sorted(names) == ["a", "a.nii.gz", "b", "d", "e", "valid_3_a_1"]
    for path in ("out/u.json", made("p.json", "--apply", "run", "--predictions", "p.csv"),
                 made("m.json", "--predictions", "m.csv"),
                 made("c.json", "--apply", "p.calibration.json", "--predictions", "p.csv"),
                 made("t.json", "--predictions", "u.csv", "--tuning-predictions", "run/tuning_predictions.csv",
                      "--tuning-labels", "run/tuning_labels.csv")):
        check_same_decisions(path, "scans.json")


def test_an_objective_is_chosen_at_prediction_too(scans, run):
    uncalibrated = load_predictions(predicted(scans, "u.csv", "--uncalibrated"))[NAMES].to_numpy()
    labels, p = (load(run / f"tuning_{kind}.csv").to_numpy()
                 for load, kind in ((load_labels, "labels"), (load_predictions, "predictions")))
    decisions = {}
    for objective in ("prevalence", "f1", "crg"):
        scored = predicted(scans, f"{objective}.json", "--map-thresholds", "--objective", objective)
        decisions[objective] = np.array([*answers(scored).values()]) >= 0.5
        assert np.array_equal(decisions[objective], uncalibrated >= th.tune_label_thresholds(labels, p, objective))
        again = made("again.json", "--apply", "run", "--predictions", "u.csv", "--objective", objective)
        check_same_decisions(again, scored)
    assert decisions["f1"].mean() > decisions["prevalence"].mean()
    predicted(scans, "f1.csv", "--objective", "f1")
    assert load_calibration("f1.calibration.json").objective == "f1"
    assert not (run / "calibration.json").exists(), "a choice at prediction is not the run's"


@pytest.mark.parametrize("unit", ["scan", "patient"])
def test_what_was_chosen_for_merged_scans_is_kept_for_volumes(unit, scans, run):
    """`--unit` changes what thresholds are fitted on; method, objective and prevalence stay as they were chosen."""
    labels, p = load_labels(run / "tuning_labels.csv"), load_predictions(run / "tuning_predictions.csv")
    chosen = {"method": "temperature", "objective": "f1", "prevalence": {"Emphysema": 0.1}}
    merged = [labels.to_numpy()[::2], p.to_numpy()[::2], np.arange(60)]
    fit_calibration(*merged, **chosen, unit=unit).save(run / "calibration.json")
    expected = fit_calibration(labels.to_numpy(), p.to_numpy(), np.repeat(np.arange(60), 2), **chosen)
    assert run_calibration(run).content() == expected.content()
    other = run_calibration(run, objective="crg", method="platt")
    assert (other.objective, other.method, other.prevalence) == ("crg", "platt", {"Emphysema": 0.1})
    table = pd.read_csv(predicted(scans, "p.csv"), index_col=0)
    assert set(table.pop("Scale")) == {expected.calibrated_scale}
    scored = predicted(scans, "scans.json", "--map-thresholds")
    check_same_decisions(made("p.json", "--apply", "run", "--predictions", "p.csv"), scored)
    thresholds = load_calibration("p.calibration.json").calibrated_thresholds
    assert np.array_equal(table[list(expected.findings)].to_numpy() >= thresholds,
                          np.array([*answers(scored).values()]) >= 0.5)
    fit_calibration(*merged, unit=unit).save(run / "calibration.json")
    assert run_calibration(run).chosen["method"] == "auto", "what was compared is compared again"


def test_an_earlier_version_s_prevalence_is_asked_for_not_forgotten(run):
    labels, p = load_labels(run / "tuning_labels.csv"), load_predictions(run / "tuning_predictions.csv")
    fitted = fit_calibration(labels.to_numpy(), p.to_numpy(), list(p.index), prevalence={"Emphysema": 0.1}, unit="scan")
    content = fitted.content()
    del content["prevalence"]
    (run / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="for another prevalence that an earlier version did not store"):
        run_calibration(run)
    assert run_calibration(run, prevalence={"Emphysema": 0.2}).prevalence == {"Emphysema": 0.2}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Predictions and labels of 24 and tuning patients, names without suffix; labels of one volume more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "write_pictures", lambda *args: None)
    for prefix, (p, y) in {"": simulate(24, 0), "tuning_": simulate(40, 1, first=500)}.items():
        names = [f"scan{prefix}{i}" for i in range(len(p))]
        write_table(f"{prefix}p.csv", names[:-1] if not prefix else names, p.to_numpy()[: -1 if not prefix else None])
        write_table(f"{prefix}y.csv", names, y.to_numpy().astype(int))
    return ["--predictions", "p.csv", "--labels", "y.csv", "--tuning-predictions", "tuning_p.csv", "--tuning-labels",
            "tuning_y.csv", "--resamples", "100", "--output-dir", "out"]  # fmt: skip


def test_an_evaluation_writes_what_it_reports_and_every_listed_volume(tables, capsys):
    made("r.json", *tables, "--allow-partial", "--objective", "f1")
    last = capsys.readouterr().out.splitlines()
    assert "Wrote r.json: 48 scans; tuned thresholds (f1) lie at 0.5" in last
    instead = "is answered with the tuning patients' prevalence"
    assert f"1 volume of y.csv without a prediction, first scan47, {instead}" in last
    found = answers("r.json")
    assert list(found) == [f"scan{i}" for i in range(48)]
    rates = load_labels("tuning_y.csv").to_numpy().mean(axis=0)
    assert np.allclose(found.pop("scan47"), rates, atol=1e-15)
    decisions = np.array([*found.values()]) >= 0.5
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert decisions.mean() == pytest.approx(metrics["tuned"]["positive_rate"], abs=1e-12)
    thresholds = load_calibration("out/calibration.json").thresholds
    assert np.array_equal(decisions, load_predictions("p.csv").to_numpy() >= thresholds)
    made("again.json", "--apply", "out", "--predictions", "p.csv")
    assert answers("again.json") == found
    made("again.json", "--apply", "out", "--predictions", "out/predictions_calibrated.csv")
    assert np.array_equal(np.array([*answers("again.json").values()]) >= 0.5, decisions)


REFUSED = [
    (["--apply", "cal", "--predictions", "cal.csv"], "cal.csv: found predictions that are calibrated"),
    (["--apply", "cal", "--predictions", "map.csv"], "map.csv: found predictions that are mapped, expected"),
    (["--apply", "cal", "--predictions", "cal.csv", "--results-json", "r.json"], "cal.csv: found predictions that are"),
    (["--apply", "cal", "--predictions", "map.csv", "--results-json", "r.json"], "expected uncalibrated ones, or cali"),
    (["--apply", "scan.json", "--predictions", "p.csv", "--results-json", "r.json"], "one row per scan, expected some"),
    (["--apply", "cal/calibration.json", "--predictions", "p.csv", "--results-json", "r.json", "--objective", "f1"],
     "found a file and objective, expected a run"),
    (["--apply", "nothing", "--predictions", "p.csv", "--results-json", "r.json"], "nothing: found no"),
    (["--apply", "cal", "--predictions", "five.csv", "--results-json", "r.json"], "five.csv: found no column"),
    (["--apply", "cal", "--predictions", "p.csv", "--results-json", "r.csv"], "expected .json; rename it"),
    (["--apply", "cal", "--predictions", "p.csv", "--results-json", "mine.json"], "did not write"),
    (["--apply", "cal", "--predictions", "p.csv", "--results-json", "r.json", "--output-dir", "o"], "--output-dir, w"),
    (["--predictions", "p.csv", "--results-json", "r.json"], "and no tuning patients, expected some"),
    (["--predictions", "p.csv", "--results-json", "r.json", "--objective", "f1"], "found --objective, which goes with"),
    (["--predictions", "p.csv", "tuning_p.csv", "--results-json", "r.json"], "found 2 --predictions"),
    (["--predictions", "p.csv", "--labels", "y.csv", "--results-json", "r.json"], "found --results-json and no tuning"),
    (["--checkpoint", "nothing", "--results-json", "r.json"], "nothing: found no tuning_predictions.csv, expected the"),
    (["{tables}", "--unit", "scan", "--results-json", "r.json"], "found --unit scan with --results-json"),
    (["{tables}", "--findings", "Emphysema,Hiatal hernia", "--results-json", "r.json"], "and 2 findings, expected the"),
    (["--example", "--results-json", "r.json"], "found --results-json, which goes with an evaluation of a run or"),
    (["--predictions", "cal.csv", "{rest}"], "found tuning predictions that are uncalibrated, expected calibrated"),
    (["--predictions", "cal.csv", "--labels", "y.csv", "--calibration", "platt"], "expected uncalibrated ones for"),
    (["--predictions", "cal.csv", "--labels", "y.csv", "--prevalence", "ct-rate"], "expected uncalibrated ones for"),
    (["--predictions", "p.csv", "map.csv", "--labels", "y.csv"], "map.csv: found predictions that are mapped, e"),
    (["--predictions", "mixed.csv", "--labels", "y.csv"], "mixed.csv: found rows with 'mapped' and rows with"),
    (["--predictions", "percent.csv", "--labels", "y.csv"], "found 'percent' in the column Scale"),
]


@pytest.mark.parametrize(("argv", "line"), REFUSED, ids=[line for _, line in REFUSED])
def test_what_is_refused_is_one_line(argv, line, tables, capsys):
    p = load_predictions("p.csv")
    write_table("cal.csv", p.index, p.to_numpy(), scale="calibrated 01234567")
    write_table("map.csv", p.index, p.to_numpy(), scale="mapped")
    write_table("percent.csv", p.index, p.to_numpy(), scale="percent")
    p.iloc[:, :5].to_csv("five.csv")
    p.assign(Scale=["mapped"] * 20 + ["uncalibrated"] * 27).to_csv("mixed.csv")
    Path("mine.json").write_text("{}")
    tuning = load_labels("tuning_y.csv").to_numpy(), load_predictions("tuning_p.csv").to_numpy()
    Path("cal").mkdir()
    for path, unit in (("cal/calibration.json", "volume"), ("scan.json", "scan")):
        fit_calibration(*tuning, np.arange(80), unit=unit).save(path)
    Path("nothing").mkdir()
    argv = [each for flag in argv for each in {"{tables}": tables, "{rest}": tables[2:]}.get(flag, [flag])]
    assert ctclip_evaluation.main([*argv, *(["--allow-partial"] if "--labels" in argv else [])]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err and "traceback" not in err.lower()
    assert not Path("r.json").exists()


def test_a_table_that_says_it_is_calibrated_is_not_called_uncalibrated_without_a_word(tables, capsys):
    """It is evaluated as it is: nothing is calibrated a second time, and the files keep its scale."""
    p = load_predictions("p.csv")
    write_table("cal.csv", p.index, p.to_numpy(), scale="calibrated 01234567")
    assert ctclip_evaluation.main(["--predictions", "cal.csv", *tables[2:4], *tables[-4:], "--allow-partial"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "Scale the predictions say that they are calibrated 01234567, not the model's own: they are not" in words
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["scale"] == "calibrated 01234567" and metrics["calibration"]["method"] == "none"
    before, after = (metrics["calibration"][when]["brier"] for when in ("before", "after"))
    assert after == pytest.approx(before, abs=1e-12)
    stored = load_calibration("out/calibration.json")
    assert stored.scale == stored.calibrated_scale == "calibrated 01234567"
    assert np.allclose(stored.thresholds, stored.calibrated_thresholds, rtol=0, atol=1e-12)
    assert set(load_predictions("out/predictions.csv").Scale) == {"calibrated 01234567"}
    assert ctclip_evaluation.main(["--apply", "out", "--predictions", "p.csv", "--output-dir", "new"]) == 2
    assert "p.csv: found predictions that are uncalibrated, expected calibrated 01234567" in capsys.readouterr().err
    assert ctclip_evaluation.main(["--predictions", "p.csv", *tables[2:], "--allow-partial"]) == 0
    assert "Scale" not in capsys.readouterr().out
    with_baseline = ["--allow-partial", "--baseline", "cal.csv"]
    assert ctclip_evaluation.main(["--predictions", "p.csv", *tables[2:], *with_baseline]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "Scale the baseline's predictions say that they are calibrated 01234567" in words
    assert json.loads(Path("out/metrics.json").read_text())["baseline"]["scale"] == "calibrated 01234567"


def test_another_evaluation_s_calibration_is_not_replaced(tables, capsys):
    assert ctclip_evaluation.main([*tables, "--allow-partial"]) == 0
    shutil.copytree("out", "other")
    kept = Path("other/calibration.json").read_bytes()
    apply = ["--apply", "out", "--predictions", "p.csv", "--output-dir"]
    assert ctclip_evaluation.main([*apply, "other"]) == 2
    assert "other: found an evaluation, whose tables and calibration others would replace" in capsys.readouterr().err
    assert ctclip_evaluation.main([*apply, "new"]) == ctclip_evaluation.main([*apply, "out"]) == 0
    assert {path.read_bytes() for path in Path().glob("*/calibration.json")} == {kept}
    assert ctclip_evaluation.main(["--apply", "new", "--predictions", "p.csv", "--results-json", "r.json"]) == 0


UNUSED = [
    (["--objective", "f1", "--uncalibrated"], "found --objective, which goes with --map-thresholds, or a table"),
    (["--objective", "f1", "--output", "r.json"], "found --objective, which goes with --map-thresholds, or a table"),
    (["--calibration", "platt", "--map-thresholds"], "found --calibration, which goes with calibrated probabilities"),
    (["--prevalence", "ct-rate", "--uncalibrated"], "found --prevalence, which goes with calibrated probabilities or"),
    (["--objective", "auroc", "--map-thresholds"], "found objective 'auroc'"),
    (["--unit", "scan"], "found --unit, which goes with --mode full or --mode evaluate only"),
    (["--objective", "f1", "--checkpoint", str(MODEL)], "found no tuning patients, expected some to fit"),
    (["--objective", "f1", "--map-thresholds", "--checkpoint", "bare"], "found no tuning_predictions.csv"),
]


@pytest.mark.parametrize(("flags", "line"), UNUSED)
def test_a_choice_that_would_change_nothing_is_refused(flags, line, scans, run, capsys):
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("bare", name).write_bytes((run / name).read_bytes())
    argv = ["--mode", "predict", "--input", str(scans), "--checkpoint", "run", "--device", "cpu", *flags]
    assert run_task2.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and line in err


def test_a_file_of_the_user_beside_the_table_is_not_replaced(scans, run, capsys):
    Path("p.calibration.json").write_text('{"mine": true}')
    argv = ["--mode", "predict", "--input", str(scans), "--checkpoint", "run", "--device", "cpu", "--output", "p.csv"]
    assert run_task2.main(argv) == 2
    assert "p.calibration.json: found a file that this command did not write" in capsys.readouterr().err
    assert Path("p.calibration.json").read_text() == '{"mine": true}' and not Path("p.csv").exists()


def test_an_ensemble_writes_one_and_its_folder_the_same_from_new_tables(tables):
    for prefix in ("", "tuning_"):
        p = load_predictions(f"{prefix}p.csv")
        write_table(f"{prefix}q.csv", p.index, np.sqrt(p.to_numpy()))
    several = ["--predictions", "p.csv", "q.csv", *tables[2:4], "--tuning-predictions", "tuning_p.csv", "tuning_q.csv"]
    made("r.json", *several, *tables[6:], "--allow-partial")
    made("s.json", "--apply", "out", "--predictions", "p.csv", "q.csv")
    found = answers("s.json")
    assert len(found) == 47 and found.items() <= answers("r.json").items()
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert (np.array([*found.values()]) >= 0.5).mean() == pytest.approx(metrics["tuned"]["positive_rate"], abs=1e-12)


def test_an_evaluation_of_a_run_writes_its_unseen_split(run, monkeypatch, capsys):
    monkeypatch.setattr(command, "write_pictures", lambda *args: None)
    p, y = simulate(12, 2)
    write_table(run / "predictions.csv", p.index, p.to_numpy())
    write_table(run / "labels.csv", p.index, y.to_numpy().astype(int))
    made("r.json", "--checkpoint", "run", "--resamples", "100", "--prevalence", "ct-rate")
    assert "Wrote r.json: 24 scans; tuned thresholds (prevalence) lie at 0.5" in capsys.readouterr().out
    found = answers("r.json")
    assert list(found) == [name.removesuffix(".nii.gz") for name in p.index]
    thresholds = load_calibration(run / "calibration.json").thresholds
    assert np.array_equal(np.array([*found.values()]) >= 0.5, p.to_numpy() >= thresholds)
    check = made("s.json", "--apply", "run", "--predictions", run / "predictions.csv")
    assert answers(check) == found, "the stored calibration keeps the prevalence"
