"""The whole task through its real command lines, as a user runs them in an empty folder: train, evaluate, predict.

A tiny CT-CLIP on a small phantom cohort: what is checked is that the parts join, not how good the answers are.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import run_task2
from ctclip.config import SYNTHETIC_NOTE, task_flag_uses, task_parser
from ctclip.evaluation.calibration import load_calibration
from ctclip.evaluation.run_folder import own_files
from ctclip.inference.predictor import load_model
from ctclip_model import ABNORMALITIES, CheckpointError

SUITE = Path(__file__).resolve().parent.parent


def call(folder: Path, script: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SUITE / script), *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def job(tmp_path_factory, phantoms, tiny_classfine):
    """One full run: (folder, finished process)."""
    folder = tmp_path_factory.mktemp("job")
    flags = ["--data-dir", str(phantoms), "--ctclip-path", tiny_classfine, "--epochs", "2", "--freeze_epochs", "1"]
    flags += ["--output-dir", "results/run", "--batch-size", "8", "--resamples", "100"]
    done = call(folder, "run_task2.py", *flags)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_full_run_prints_the_blocks_and_writes_the_folder(job):
    folder, done = job
    blocks = ["PREDICTION ANALYSIS", "CALIBRATION", "OPTIMAL THRESHOLD", "THRESHOLD TABLE", "PERFORMANCE COMPARISON"]
    blocks += ["SUBGROUPS", "SUCCESS CRITERIA"]
    run = folder / "results" / "run"
    report = (run / "report.txt").read_text()
    places = [report.index(block) for block in blocks]
    assert places == sorted(places)
    summary = done.stdout[done.stdout.index("PREDICTION ANALYSIS") :].splitlines()
    assert {"OPTIMAL THRESHOLD", "PERFORMANCE COMPARISON"} <= {line[:24].strip() for line in summary}
    assert len(summary) <= 20 and summary[-1].startswith("Next: python ") and "--mode predict" in summary[-1]
    assert "not clinical performance" in "\n".join(summary) and "not clinical performance" in report
    assert "Traceback" not in done.stderr
    written = {path.name for path in run.iterdir()}
    tables = {"predictions.csv", "labels.csv", "tuning_predictions.csv", "tuning_labels.csv", "per_label.csv"}
    tables |= {"predictions_calibrated.csv", "predictions_mapped.csv"}
    figures = {"roc.png", "threshold_sweep.png", "positive_rate.png", "training_curves.png"}
    figures |= {"precision_recall.png", "reliability.png", "net_benefit.png", "report.html"}
    weights = {"model.safetensors", "config.json", "state"}
    listed = tables | figures | weights | {"run.json", "log.jsonl", "metrics.json", "report.txt", "calibration.json"}
    assert listed | {"files.jsonl"} == written and set(own_files(run)) == listed - {"state"}
    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 18 and "not clinical performance" in page


def test_reported_patients_are_the_unseen_ones(job):
    run = job[0] / "results" / "run"
    reported = pd.read_csv(run / "predictions.csv")
    assert len(reported) == 16 and list(reported.columns) == ["VolumeName", *ABNORMALITIES]
    assert reported.VolumeName.str.startswith("valid_").all()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n_volumes"] == 16 and metrics["thresholds"]["fitted_on"] == "tuning patients"
    labels = pd.read_csv(run / "labels.csv", index_col=0)
    assert metrics["at_0.5"]["label_rate"] == pytest.approx(labels.to_numpy().mean())
    decided = reported.set_index("VolumeName").to_numpy() >= 0.5
    assert metrics["at_0.5"]["positive_rate"] == pytest.approx(decided.mean())
    assert metrics["at_0.5"]["hamming_accuracy"] == pytest.approx((decided == labels.to_numpy()).mean())


def test_evaluation_script_finds_the_newest_run_and_takes_a_baseline(job):
    folder, _ = job
    flags = ["--baseline", "results/run", "--output-dir", "results/again", "--resamples", "100", "--pictures", "0"]
    done = call(folder, "ctclip_evaluation.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "Evaluating the newest run in results/, results/run" in done.stdout
    metrics = json.loads((folder / "results" / "again" / "metrics.json").read_text())
    first = json.loads((folder / "results" / "run" / "metrics.json").read_text())
    assert metrics["tuned"] == first["tuned"] and metrics["baseline"] is not None


def test_another_cohort_leaves_the_run_s_own_results_alone(job, phantoms, undrawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(job[0])
    run = Path("results/run")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    other = tmp_path / "elsewhere"
    shutil.copytree(phantoms, other)
    (other / "phantom.json").unlink()  # as a cohort of patients would come: without the manifest of phantoms
    flags = ["--checkpoint", "results/run", "--data-dir", str(other), "--resamples", "100", "--pictures", "0"]
    assert run_task2.main(["--mode", "evaluate", *flags]) == 0
    assert SYNTHETIC_NOTE not in capsys.readouterr().out
    assert json.loads((run / "on_elsewhere" / "metrics.json").read_text())["phantom"] is False
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    shutil.rmtree(run / "on_elsewhere")


def test_predict_gives_one_row_per_scan_and_names_what_it_could_not_read(
    job, phantoms, tmp_path, monkeypatch, capsys
):
    folder, _ = job
    files = sorted(phantoms.glob("dataset/valid_fixed/*/*/*.nii.gz"))[:3]
    scans = tmp_path / "scans"
    scans.mkdir()
    for file in files:
        (scans / file.name).write_bytes(file.read_bytes())
    flags = ["--mode", "predict", "--checkpoint", "results/run", "--input", str(scans), "--output", "out/p.csv"]
    done = call(folder, "run_task2.py", *flags)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(folder / "out" / "p.csv", index_col=0)
    reported = pd.read_csv(folder / "results" / "run" / "predictions.csv", index_col=0)
    both = table.index.intersection(reported.index)
    assert len(table) == 3 and len(both) >= 2
    calibration = load_calibration(folder / "results" / "run" / "calibration.json")
    expected = calibration.apply(reported.loc[both].to_numpy())
    assert f"calibrated probabilities ({calibration.method}, {calibration.n_patients} tuning" in done.stdout
    highest = table[list(ABNORMALITIES)].mean().idxmax()
    following = f"--mode predict --checkpoint results/run --input {scans} --explain '{highest}'"
    assert done.stdout.splitlines()[-1].startswith("Next: python ") and done.stdout.endswith(f"{following}\n")
    assert set(table.pop("Scale")) == {calibration.calibrated_scale}
    assert load_calibration(folder / "out" / "p.calibration.json").content() == calibration.content()
    answers = table[list(ABNORMALITIES)]
    assert abs(answers.loc[both].to_numpy() - expected).max() < 2e-4
    calls = table[[f"Call: {name}" for name in ABNORMALITIES]]
    assert (calls.to_numpy() == (answers.to_numpy() >= calibration.calibrated_thresholds)).all()
    assert table.Summary.str.contains("cut").any() and f"  {table.index[0]}  {table.Summary.iloc[0]}" in done.stdout
    (scans / files[0].name).write_bytes(files[0].read_bytes()[:3000])
    monkeypatch.chdir(folder)
    assert run_task2.main([*flags, "--map-thresholds"]) == 2
    out, err = capsys.readouterr()
    assert files[0].name in err and "1 of 3 scans could not be read" in err
    mapped = pd.read_csv(folder / "out" / "p.csv", index_col=0)
    assert len(mapped) == 2 and "tuned thresholds (prevalence) lie at 0.5" in out
    assert set(mapped.pop("Scale")) == {"mapped"} and not (folder / "out" / "p.calibration.json").exists()
    both = mapped.index.intersection(reported.index)
    assert (mapped[calls.columns].loc[both] == calls.loc[both]).all(axis=None), "decided alike on every scale"
    mapped = mapped[list(ABNORMALITIES)]
    assert abs(mapped.loc[both].to_numpy() - calibration.rescale_to_half(reported.loc[both].to_numpy())).max() < 1e-4


WRONG_USAGE = [
    (["--mode", "predict"], "needs --input"),
    (["--mode", "predict", "--input", "x.nii.gz", "--checkpoint", "nothing.pt"], "found no such file or folder"),
    (["--mode", "evaluate"], "found no run"),
    (["--mode", "evaluate", "--map-thresholds"], "found --map-thresholds, which goes with --mode predict only"),
    (["--objective", "auroc"], "found objective 'auroc'"),
    (["--data-dir", "nowhere", "--model", "ctclip"], "found no folder nowhere"),
    (["--input", "scans"], "found --input, which goes with --mode predict or --export features or"),
    (["--mode", "evaluate", "--output-dir", "x"], "found --output-dir, which goes with --mode full or"),
    (["--mode", "predict", "--input", "x", "--epochs", "2"], "found --epochs, which goes with --mode full or"),
    (["--mode", "evaluate", "--report-to", "wandb"], "found --report-to, which goes with --mode full or --mode train"),
    (["--plan", "--objective", "f1"], "found --objective, which goes with an evaluation, not --plan, only"),
    (["--export", "onnx", "--workers=2"], "found --workers, which goes with --mode full or"),
    (["--mode", "train", "--resamples", "1000"], "found --resamples, which goes with --mode full or --mode evaluate"),
    (["--mode", "predict", "--batch-size", "4", "--epochs", "50"], "found --batch-size, which goes with --mode full"),
    (["--device", "meta", "--mode", "train"], "--device meta: not usable here"),
    (["--device", "cuda:77", "--mode", "train"], "--device cuda:77: not usable here"),
    (["--modell", "ctclip"], "unrecognized arguments: --modell ctclip (did you mean --model?); see --help"),
    (["--epoch=5", "-inputs", "x"], "unrecognized arguments: --epoch=5 -inputs x (did you mean --epochs and --input?)"),
    (["--zzz"], "unrecognized arguments: --zzz; see --help"),
    (["--mode", "quick-test"], "found 'quick-test', a mode of ctclip_training.py, expected one of full, train, "
     "evaluate, predict, runs; run python ctclip_training.py --mode quick_test"),
    (["--mode", "trane"], "invalid choice: 'trane'"),
]


def test_every_flag_goes_with_named_modes_or_with_all():
    """A flag that no mode names would be ignored by some without a word."""
    flags = {option for action in task_parser("")._actions for option in action.option_strings if option[:2] == "--"}
    with_all = {"--help", "--help-all", "--version", "--mode", "--export"}
    assert flags - with_all == set(task_flag_uses("full")) and with_all < flags


def test_torchrun_is_refused_in_every_mode_but_predict(tmp_path, monkeypatch, capsys):
    """Every rank would write the same files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for flags in ([], ["--mode", "runs"], ["--mode", "evaluate"], ["--export", "features"]):
        assert run_task2.main(flags) == 2
        assert "found torchrun with run_task2.py" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "line"), WRONG_USAGE)
def test_wrong_usage_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, line):
    monkeypatch.chdir(tmp_path)
    try:
        code = run_task2.main(flags)
    except SystemExit as stop:  # the parser's own way out
        code = stop.code
    printed = capsys.readouterr().err
    assert code == 2 and line in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing was left behind


@pytest.mark.parametrize(
    ("script", "flags", "line"),
    [
        ("run_task2.py", *WRONG_USAGE[2]),
        ("run_task2.py", *WRONG_USAGE[-1]),
        ("ctclip_training.py", ["--batch-size", "many"], "found 'many', expected a whole number"),
    ],
)
def test_scripts_exit_with_that_line_and_code(tmp_path, script, flags, line):
    done = call(tmp_path, script, *flags)
    assert done.returncode == 2 and line in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_trained_or_evaluated_again(job, monkeypatch, capsys):
    monkeypatch.chdir(job[0])
    run = Path("results/run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert run_task2.main(["--resume", "results/run"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("results/run is already finished; report: results/run/report.html\n") and err == ""
    assert "PREDICTION ANALYSIS" not in out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_out_of_memory_while_predicting_is_one_line_without_resume(job, phantoms, monkeypatch, capsys):
    def full(*args, **options):
        raise RuntimeError("could not create a primitive")

    monkeypatch.chdir(job[0])
    monkeypatch.setattr("ctclip.inference.fusion.predict_volumes", full)
    scan = str(next(phantoms.glob("dataset/valid_fixed/*/*/*.nii.gz")))
    assert run_task2.main(["--mode", "predict", "--checkpoint", "results/run", "--input", scan]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: out of memory; ") and "--resume" not in error
    assert len(warnings) == 1 and "fitted on 6 patients only" in warnings[0]


def test_damaged_weights_are_named(job, tmp_path):
    run = job[0] / "results" / "run"
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="model.safetensors: found a damaged file") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
