"""ctclip_evaluation.py through its command line: the example, tables, runs, --apply; bad input and wrong usage end in
one line and exit code 2.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_evaluation import simulate
from sklearn import metrics as sk

import ctclip_evaluation
import run_task2
from ctclip.config import SYNTHETIC_NOTE
from ctclip.evaluation import calibration as cal
from ctclip.evaluation import command, figures, render
from ctclip.evaluation import run_folder as folders
from ctclip.evaluation import tables as tables_module
from ctclip.evaluation.run_folder import RunError
from ctclip.evaluation.tables import row_keys
from ctclip.inference import fusion
from ctclip.inference.run_predictions import run_inputs
from ctclip.paths import script
from ctclip.training import run as training_run
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel

SCRIPT = Path(__file__).resolve().parents[2] / "ctclip_evaluation.py"


def test_the_example_goes_from_97_percent_to_honest(undrawn, tmp_path, monkeypatch, capsys):
    """The guide's worked example: the tuned rate within two points of the label rate on unseen patients; calibrated and
    mapped tables rank as the given one does, and the mapped one decides at 0.5 as tuned."""
    monkeypatch.chdir(tmp_path)
    assert ctclip_evaluation.main(["--example", "--resamples", "100"]) == 0
    printed, folder = capsys.readouterr().out, Path("results/example")
    assert printed.count("Simulated predictions, neither patients nor a model") == 1
    assert (folder / "report.txt").read_text().count("Simulated predictions, neither patients nor a model") == 2
    assert len(printed.strip().splitlines()) <= 20
    assert printed.splitlines()[-1].startswith("Next: python ") and "LABELS.csv" in printed.splitlines()[-1]
    metrics = json.loads((folder / "metrics.json").read_text())
    half, tuned = metrics["at_0.5"], metrics["tuned"]
    assert half["positive_rate"] == pytest.approx(0.97, abs=0.005)
    assert half["auroc_macro"] == pytest.approx(0.75, abs=0.01)
    assert abs(tuned["positive_rate"] - tuned["label_rate"]) < 0.02 and tuned["auroc_macro"] == half["auroc_macro"]
    before, after = metrics["calibration"]["before"], metrics["calibration"]["after"]
    assert after["ece"] < 0.05 < 0.5 < before["ece"] and after["ece"] < 2 * after["ece_if_calibrated"]
    y = tables_module.load_labels(folder / "labels.csv").to_numpy()
    given, calibrated, mapped = (
        tables_module.load_predictions(folder / f"predictions{kind}.csv")[list(ABNORMALITIES)].to_numpy()
        for kind in ("", "_calibrated", "_mapped"))
    for j in range(18):
        auroc = sk.roc_auc_score(y[:, j], given[:, j])
        assert sk.roc_auc_score(y[:, j], calibrated[:, j]) == sk.roc_auc_score(y[:, j], mapped[:, j]) == auroc
    assert (mapped >= 0.5).mean() == pytest.approx(tuned["positive_rate"], abs=1e-12)
    assert abs(calibrated.mean() - y.mean()) < 0.01
    fitted = set(row_keys(tables_module.load_predictions(folder / "tuning_predictions.csv").index, "patient"))
    assert not fitted & set(row_keys(tables_module.load_predictions(folder / "predictions.csv").index, "patient"))




@pytest.fixture
def tables(tmp_path, monkeypatch):
    """p.csv, l.csv, and the working directory they lie in."""
    predictions, labels = simulate(12, seed=0)
    predictions.to_csv(tmp_path / "p.csv")
    labels.to_csv(tmp_path / "l.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(path, line, column, value):
    rows = [text.split(",") for text in path.read_text().splitlines()]
    rows[line - 1][column] = value
    path.write_text("\n".join(map(",".join, rows)) + "\n")


def drop_line(path, line):
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows[: line - 1] + rows[line:]) + "\n")


def copy_line(path):
    path.write_text(path.read_text() + path.read_text().splitlines()[2] + "\n")


BAD = {
    "probability above 1": ("p.csv", lambda f: edit(f, 3, 2, "1.5"),
                            "p.csv, line 3: found 1.5 for Arterial wall calcification of valid_1_a_2.nii.gz, expected"),
    "probability a little above 1": ("p.csv", lambda f: edit(f, 3, 2, "1.0000001"),
                                     "found 1.0000001 for Arterial wall calcification of valid_1_a_2.nii.gz, expected "
                                     "a probability in [0, 1]"),
    "label a little above 1": ("l.csv", lambda f: edit(f, 3, 2, "1.0000001"), "found 1.0000001 for Arterial"),
    "name with a zero-width space": ("p.csv", lambda f: edit(f, 2, 0, "valid_1_a_1\u200b.nii.gz"),
                                     "first 'valid_1_a_1\\u200b.nii.gz' (line 2) (it has 'valid_1_a_1.nii.gz', which "
                                     "differs in '\\u200b' (ZERO WIDTH SPACE) only)"),
    "name in the labels with one": ("l.csv", lambda f: edit(f, 2, 0, "valid_1_a_1.nii.gz\u200b"),
                                    "(it has 'valid_1_a_1.nii.gz\\u200b', which differs in '\\u200b' (ZERO"),
    "negative probability": ("p.csv", lambda f: edit(f, 3, 1, "-0.1"), "found -0.1 for Medical material"),
    "NaN": ("p.csv", lambda f: edit(f, 2, 1, "nan"), "line 2: found no number for Medical material"),
    "blank value": ("p.csv", lambda f: edit(f, 2, 1, ""), "line 2: found no number"),
    "text": ("p.csv", lambda f: edit(f, 2, 1, "high"), "line 2: found no number"),
    "an underscore": ("p.csv", lambda f: edit(f, 2, 1, "0_1"), "line 2: found no number"),
    "digits of another script": ("l.csv", lambda f: edit(f, 2, 1, "١"), "line 2: found no number"),
    "infinite": ("p.csv", lambda f: edit(f, 2, 1, "inf"), "found inf"),
    "missing column": ("p.csv", lambda f: edit(f, 1, 3, "Cardio"), "found no column 'Cardiomegaly', expected"),
    "column twice": ("p.csv", lambda f: f.write_text(
        "\n".join(f"{line},{'Emphysema' if not k else 0}" for k, line in enumerate(f.read_text().splitlines()))),
        "found column 'Emphysema' twice"),
    "semicolons": ("p.csv", lambda f: f.write_text(f.read_text().replace(",", ";")), "commas separate"),
    "duplicate": ("p.csv", copy_line, "line 26: found valid_1_a_2.nii.gz again, expected one row"),
    "short row": ("p.csv", lambda f: f.write_text(f.read_text() + "valid_90_a_1.nii.gz,0.5\n"),
                  "line 26: found 2 values, expected 19"),
    "no name": ("p.csv", lambda f: edit(f, 4, 0, " "), "line 4: found no VolumeName"),
    "empty": ("p.csv", lambda f: f.write_text(""), "found an empty file"),
    "header only": ("p.csv", lambda f: f.write_text(f.read_text().splitlines()[0]), "no rows below the header"),
    "absent": ("p.csv", lambda f: f.unlink(), "found no readable file (No such file"),
    "a folder": ("p.csv", lambda f: (f.unlink(), f.mkdir()), "found no readable file"),
    "not a CSV": ("p.csv", lambda f: f.write_bytes(bytes(range(256)) * 9), "not text in columns"),
    "open quote": ("p.csv", lambda f: f.write_text(f.read_text() + '"open'), "not text in columns"),
    "label not binary": ("l.csv", lambda f: edit(f, 5, 4, "2"),
                         "l.csv, line 5: found 2 for Pericardial effusion of valid_2_a_2.nii.gz, expected 0, 1 or"),
    "label that is no number": ("l.csv", lambda f: edit(f, 5, 4, "n/a"), "line 5: found no number"),
    "label -1": ("l.csv", lambda f: edit(f, 5, 4, "-1"), "say so with --minus-one-is-unknown"),
    "prediction missing": ("p.csv", lambda f: edit(f, 5, 4, ""), "line 5: found no number"),
    "prediction without label": ("l.csv", lambda f: drop_line(f, 2), "l.csv: found no row for 1 of the 24 volumes in "
                                 "p.csv, first valid_1_a_1.nii.gz (line 2), expected the same volumes"),
    "label without prediction": ("p.csv", lambda f: drop_line(f, 3), "p.csv: found no row for 1 of the 24 volumes in "
                                 "l.csv, first valid_1_a_2.nii.gz (line 3), expected the same volumes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tables, capsys):
    file, spoil, message = BAD[case]
    spoil(tables / file)
    assert ctclip_evaluation.main(["--predictions", "p.csv", "--labels", "l.csv"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and message in printed.err and "expected" in printed.err
    assert not (tables / "results").exists()


@pytest.mark.parametrize("argv, message", [
    ([], "results: found no run"),
    (["--checkpoint", "nowhere"], "nowhere: found no such folder"),
    (["--checkpoint", "."], "found no predictions.csv with labels.csv"),
    (["--apply", "c.json"], "found --apply without --predictions"),
    (["--apply", "c.json", "--predictions", "p.csv"], "c.json: found no readable file"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--resamples", "99"], "found --resamples 99, expected 100 to"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--metadata", "m.csv"], "m.csv: found no row for any of the 24"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--output-dir", "run"], "run: found a run, whose tables"),
    (["--example", "--output-dir", "run"], "run: found a run, whose tables"),
    (["--example", "--output-dir", "p.csv"], "p.csv: found a place that cannot be written"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--objective", "auroc"], "found objective 'auroc'"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--pictures", "-1"], "found --pictures -1"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--prevalence", "no.json"], "no.json: found no readable file"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--metadata", "no.csv"], "no.csv: found no readable file"),
    (["--predictions", "p.csv"], "found --predictions without --labels"),
    (["--labels", "l.csv"], "found --labels without --predictions"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--tuning-labels", "l.csv"], "without --tuning-predictions"),
    (["--tuning-predictions", "p.csv", "--tuning-labels", "l.csv"], "found tuning tables only"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--baseline", "no.csv"], "no.csv: found no readable file"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--tuning-predictions", "p.csv", "--tuning-labels", "l.csv"],
     "12 tuning patients among the reported"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--output-dir", "p.csv"], "p.csv: found a place that cannot"),
])
def test_wrong_usage_is_one_line_and_exit_code_2(argv, message, tables, capsys):
    (tables / "m.csv").write_text("VolumeName,PatientSex\nelsewhere.nii.gz,F\n")
    (tables / "run").mkdir()
    (tables / "run" / "run.json").write_text("{}")
    assert ctclip_evaluation.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err and "expected" in printed.err


@pytest.mark.parametrize("argv, unused, goes_with", [
    (["--checkpoint", ".", "--labels", "l.csv"], "--checkpoint", "an evaluation of a run"),
    (["--checkpoint", ".", "--example"], "--checkpoint", "an evaluation of a run"),
    (["--example", "--predictions", "p.csv"], "--predictions", "an evaluation of tables, or --apply,"),
    (["--example", "--data-dir", "d"], "--data-dir", "an evaluation of a run or of tables"),
    (["--apply", "c.json", "--predictions", "p.csv", "--labels", "l.csv"], "--labels", "an evaluation of tables"),
    (["--apply", "c.json", "--predictions", "p.csv", "--objective", "f1"], "--objective",
     "an evaluation, or thresholds fitted for --results-json,"),
    (["--apply", "c.json", "--predictions", "p.csv", "--example"], "--example", "an evaluation"),
    (["--predictions", "p.csv", "--labels", "l.csv", "--device", "cuda:9"], "--device", "an evaluation of a run"),
])
def test_a_flag_that_the_source_does_not_use_is_refused(argv, unused, goes_with, capsys):
    assert ctclip_evaluation.main(argv) == 2
    assert capsys.readouterr().err == (f"error: found {unused}, which goes with {goes_with} only; leave it out, or add "
                                       "what it goes with\n")


@pytest.mark.parametrize("source", ["tables", "--apply"])
def test_a_table_of_patients_from_the_command_line(source, tables, monkeypatch, capsys):
    """24 volumes with names of another form, two of each patient."""
    monkeypatch.setattr(command, "write_pictures", lambda *args: None)
    names = [f"chest_ct_scan_{i:03d}" for i in range(24)]
    for file in ("p.csv", "l.csv"):
        rows = (tables / file).read_text().splitlines()
        rows[1:] = [f"{name}.mha,{row.partition(',')[2]}" for name, row in zip(names, rows[1:], strict=True)]
        (tables / file).write_text("\n".join(rows))
    who = ["VolumeName,PatientID", *(f"{name},{i // 2}" for i, name in enumerate(names))]
    (tables / "who.csv").write_text("\n".join(who))
    argv = ["--predictions", "p.csv", "--labels", "l.csv"]
    if source == "tables":
        assert ctclip_evaluation.main(argv) == 0
        printed = capsys.readouterr().out
        assert "24 volumes of 24 patients" in printed and "24 of 24 names are not like train_12_a_1.nii.gz" in printed
        assert ctclip_evaluation.main([*argv, "--patients", "who.csv"]) == 0
        printed = capsys.readouterr().out
        assert "24 volumes of 12 patients" in printed and "are not like" not in printed
    else:
        predictions, labels = simulate(12, seed=1)
        fitted = cal.fit_calibration(labels.to_numpy(), predictions.to_numpy(), list(labels.index), unit="patient")
        fitted.save(tables / "c.json")
        applied = ["--apply", "c.json", *argv[:2], "--patients", "who.csv", "--output-dir", "o"]
        assert ctclip_evaluation.main(applied) == 0
        written = tables_module.load_predictions("o/predictions_calibrated.csv")
        assert written.index.tolist() == written["PatientID"].tolist() == [str(i) for i in range(12)]
        capsys.readouterr()
    (tables / "who.csv").write_text("VolumeName,PatientID\nelsewhere,1\n")
    assert ctclip_evaluation.main([*argv, "--patients", "who.csv"]) == 2
    assert "who.csv: found no row for any of the 24 volumes" in capsys.readouterr().err


def run_script(*argv, cwd):
    return subprocess.run([sys.executable, str(SCRIPT), *argv], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("function", "error", "line"),
    [
        ("worst_cases", MemoryError(), "error: out of memory; "),
        ("write_pictures", OSError(28, "No space left on device"), "error: [Errno 28]"),
        ("write_pictures", KeyboardInterrupt(), "\nInterrupted: "),
        ("write_pictures", ValueError("a defect of matplotlib"), None),
    ],
)
def test_tables_are_there_whatever_fails_while_drawing(function, error, line, tables, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(command, function, fail)
    argv = ["--predictions", "p.csv", "--labels", "l.csv", "--output-dir", "out", "--resamples", "100"]
    if line is None:
        with pytest.raises(ValueError, match="a defect"):
            ctclip_evaluation.main(argv)
    else:
        assert ctclip_evaluation.main(argv) in (2, 130)
    printed = capsys.readouterr()
    written = "Wrote out: report.txt, metrics.json, tables (*.csv), calibration.json; no report.html, no figures"
    assert written in printed.out
    assert line is None or printed.err.startswith(line)
    names = {"metrics.json", "report.txt", "predictions.csv", "per_label.csv", "calibration.json", "files.jsonl"}
    assert {path.name for path in Path("out").iterdir()} == names
    assert json.loads(Path("out/metrics.json").read_text())["tuned"]


def test_tables_are_there_where_the_log_s_disk_is_full(tables, monkeypatch, capsys):
    class FullDisk(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", FullDisk())
    argv = ["--predictions", "p.csv", "--labels", "l.csv", "--output-dir", "out", "--resamples", "100"]
    assert ctclip_evaluation.main(argv) == 2
    assert capsys.readouterr().err.startswith("error: standard output: No space left on device; free space")
    assert json.loads(Path("out/metrics.json").read_text())["tuned"] and Path("out/per_label.csv").is_file()


def test_script_on_tables(tables):
    done = run_script("--predictions", "p.csv", "--labels=l.csv", "--baseline", "p.csv", "--output_dir=re_sults/x",
                      "--objective", "f1", cwd=tables)  # spaces and =, dashes and underscores
    assert done.returncode == 0, done.stderr
    report = (tables / "re_sults" / "x" / "report.txt").read_text()
    assert "SUCCESS CRITERIA" in report and "Objective f1; cross-fitted: each fifth of" in report
    assert "CRITERIA" in done.stdout and "BASELINE" in done.stdout and "COMPARISON WITH THE BASELINE" in report
    assert "Report: re_sults/x/report.html" in done.stdout and "SUCCESS CRITERIA" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith("--apply re_sults/x --predictions NEW.csv")
    assert (tables / "re_sults" / "x" / "metrics.json").is_file()  # the flag's underscore is turned, the value's is not


def test_script_error_carries_no_traceback(tables):
    (tables / "p.csv").write_text("")
    done = run_script("--predictions", "p.csv", "--labels", "l.csv", cwd=tables)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: p.csv: found an empty file, expected") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [["--predictons", "p.csv"], ["--calibration", "x"], ["stray"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        ctclip_evaluation.main(argv)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1


def make_run(folder, phantom=True, seed=0):
    folder.mkdir(parents=True)
    for prefix, (predictions, labels) in {"": simulate(12, seed), "tuning_": simulate(12, seed + 1, first=50)}.items():
        predictions.assign(note=1).to_csv(folder / f"{prefix}predictions.csv")
        labels.to_csv(folder / f"{prefix}labels.csv")
    (folder / "run.json").write_text(json.dumps({"config": {}, "phantom": phantom}))
    lines = [json.dumps({"epoch": k, "stage": "frozen", "train_loss": 1 / k}) for k in (1, 2)]
    (folder / "log.jsonl").write_text("\n".join([*lines, '{"epoch": 3, "sta']))


def test_newest_run_is_evaluated_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("results/old"))
    make_run(Path("results/new"), seed=5)
    for path in Path("results/old").iterdir():
        os.utime(path, (1, 1))
    own = Path("results/new/predictions.csv").read_bytes()
    empty = figures.new_figure(1, 1)
    monkeypatch.setattr(figures, "label_figures", lambda *args: [(key, empty) for key in figures.LABEL_PLOTS])
    monkeypatch.setattr(figures, "label_svgs", lambda plot, salt, findings, *arrays: [None] * len(findings))
    assert ctclip_evaluation.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].startswith(f"Evaluating the newest run in results/, {Path('results/new')}")
    report = Path("results/new/report.txt").read_text()
    assert SYNTHETIC_NOTE in printed and "other patients" in printed and "none of them reported here" in report
    assert printed.splitlines()[-1] == f"Next: python {script('run_task2.py')} --mode predict --checkpoint " \
        f"{Path('results/new')} --input SCANS"
    assert Path("results/new/training_curves.png").is_file()
    assert Path("results/new/predictions.csv").read_bytes() == own  # its other columns are kept
    assert not Path("results/old/metrics.json").exists()


def test_a_run_is_read_as_training_left_it(tmp_path):
    make_run(tmp_path / "run", phantom=False)
    run = run_inputs(tmp_path / "run")
    assert [len(table.frame) for table in (run.predictions, run.labels, *run.tuning)] == [24] * 4
    assert [row["epoch"] for row in run.history] == [1, 2]  # the line cut off by an interruption is skipped
    assert run.phantom is False
    (tmp_path / "run" / "log.jsonl").write_text('{"epoch": \n{"epoch": 2}\n')
    with pytest.raises(RunError, match="log.jsonl, line 1: found no JSON"):
        run_inputs(tmp_path / "run")
    (tmp_path / "run" / "labels.csv").unlink()
    with pytest.raises(RunError, match="found no predictions.csv with labels.csv"):
        run_inputs(tmp_path / "run")


def test_applying_a_stored_calibration(tmp_path, monkeypatch, capsys):
    """To predictions of other patients, with no labels: what `apply` and `rescale_to_half` give."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    calibration = folders.run_calibration(tmp_path / "run")
    calibration.save(tmp_path / "run" / "calibration.json")
    new, _ = simulate(9, seed=7, first=300)
    new.to_csv("new.csv")
    assert ctclip_evaluation.main(["--apply", "run", "--predictions", "new.csv", "--output-dir", "out"]) == 0
    assert "18 volumes; calibration" in capsys.readouterr().out
    assert Path("out/calibration.json").read_bytes() == Path("run/calibration.json").read_bytes()
    for name, function in (("calibrated", calibration.apply), ("mapped", calibration.rescale_to_half)):
        written = tables_module.load_predictions(f"out/predictions_{name}.csv")
        assert list(written.index) == list(new.index)
        scales = {"calibrated": calibration.calibrated_scale, "mapped": "mapped"}
        assert written.pop("Scale").unique().tolist() == [scales[name]]
        assert np.array_equal(written.to_numpy(), function(new.to_numpy()))
    assert (written.to_numpy() >= 0.5).mean() == (new.to_numpy() >= calibration.thresholds).mean()


def test_a_run_s_calibration_is_stored_used_and_made_anew_where_it_does_not_fit(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    fitted = folders.run_calibration(run)
    assert fitted.n_patients == 12 and not (run / "calibration.json").exists()
    other = "temperature" if fitted.method == "platt" else "platt"
    cal.Calibration(**{**fitted.__dict__, "method": other}).save(run / "calibration.json")
    assert folders.run_calibration(run).method == other
    cal.Calibration(**{**fitted.__dict__, "method": other, "unit": "scan"}).save(run / "calibration.json")
    assert folders.run_calibration(run).method == fitted.method  # merged scans are not what predict sees
    for name in ("calibration.json", "tuning_predictions.csv"):
        (run / name).unlink()
    assert folders.run_calibration(run) is None


def test_verbose_prints_the_whole_report_before_the_summary(tables, undrawn, capsys):
    argv = ["--predictions", "p.csv", "--labels", "l.csv", "--output-dir", "out", "--resamples", "100", "--verbose"]
    assert ctclip_evaluation.main(argv) == 0
    printed = capsys.readouterr().out
    assert Path("out/report.txt").read_text() in printed
    assert printed.index("SUCCESS CRITERIA") < printed.index("\nCRITERIA")


def test_a_baseline_may_be_a_run_s_folder(tables, undrawn, capsys):
    argv = ["--predictions", "p.csv", "--labels", "l.csv", "--resamples", "100", "--baseline"]
    make_run(Path("run"))
    for number, baseline in enumerate(("run", "run/predictions.csv")):
        assert ctclip_evaluation.main([*argv, baseline, "--output-dir", f"out{number}"]) == 0
        assert "(run/predictions.csv)" in capsys.readouterr().out
    first, second = (json.loads(Path(f"out{k}/metrics.json").read_text())["baseline"] for k in range(2))
    assert first == second and "settings" not in first  # the predictions are no run's
    record = json.loads(Path("run/run.json").read_text())
    assert command.baseline_record("run/predictions.csv") == command.baseline_record("run") == record
    Path("empty").mkdir()
    Path("empty/run.json").write_text('{"id": 1}')  # another program's
    assert [command.baseline_record(path) for path in ("empty/other.csv", "p.csv", None)] == [{}] * 3
    assert ctclip_evaluation.main([*argv, "empty"]) == 2
    assert "--baseline empty: found no predictions.csv in this folder, expected an evaluated run; evaluate it first: " \
        in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--baseline", "--metadata"])
def test_a_table_about_other_volumes_is_refused_before_anything_is_predicted(
    flag, phantoms, tiny_classfine, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    CTCLIPMultiAbnormalityModel(tiny_classfine).save_pretrained("run")
    Path("run/run.json").write_text(json.dumps({"phantom": True, "data_dir": str(phantoms)}))
    simulate(12, seed=0, first=9000)[0].assign(PatientSex="F").to_csv("other.csv")
    monkeypatch.setattr(fusion, "predict_volumes", None)
    for main, argv in ((ctclip_evaluation.main, []), (run_task2.main, ["--mode", "evaluate"])):
        assert main([*argv, "--checkpoint", "run", flag, "other.csv"]) == 2
        assert "other.csv: found no row for any of the 16 volumes" in capsys.readouterr().err
    monkeypatch.setattr(training_run, "write_phantom_cohort", None)
    assert run_task2.main([flag, "other.csv", "--train-volumes", "8", "--valid-volumes", "4"]) == 2
    assert "other.csv: found no row for any of the 5 volumes" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["page", "matplotlib"])
def test_what_the_report_is_made_of_is_missed_before_anything_is_read(missing, tables, monkeypatch, capsys):
    if missing == "page":
        monkeypatch.setattr(render, "TEMPLATE", Path("nowhere.html"))
    else:
        monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(training_run, "write_phantom_cohort", None)
    for main, argv in ((ctclip_evaluation.main, ["--predictions", "p.csv", "--labels", "l.csv"]),
                       (run_task2.main, ["--mode", "evaluate", "--checkpoint", "run"]), (run_task2.main, [])):
        assert main(argv) == 2
        err = capsys.readouterr().err
        said = "nowhere.html: found no" if missing == "page" else "pip install matplotlib"
        assert err.count("\n") == 1 and said in err
    assert not Path("results").exists()


def test_a_run_is_evaluated_into_its_own_folder_only(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "write_tables", lambda *args: None)
    monkeypatch.setattr(command, "write_pictures", lambda *args: None)
    make_run(tmp_path / "run")
    run = str(tmp_path / "run")
    tables = ["--predictions", f"{run}/predictions.csv", "--labels", f"{run}/labels.csv"]
    assert ctclip_evaluation.main(["--checkpoint", run]) == ctclip_evaluation.main([*tables, "--output-dir", run]) == 0
    assert ctclip_evaluation.main(["--checkpoint", run, "--data-dir", str(tmp_path), "--output-dir", run]) == 2
    tuning = ["--predictions", f"{run}/tuning_predictions.csv", "--labels", f"{run}/tuning_labels.csv"]
    assert ctclip_evaluation.main([*tuning, "--output-dir", run]) == 2
    folders.run_calibration(tmp_path / "run").save(tmp_path / "run" / "calibration.json")
    assert ctclip_evaluation.main(["--apply", run, *tables[:2], "--output-dir", run]) == 2


def test_tables_of_a_phantom_run_stay_phantoms(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    monkeypatch.setattr(command, "write_tables", lambda *args: None)
    monkeypatch.setattr(command, "write_pictures", lambda *args: None)
    folder = str(tmp_path / "run")
    argv = ["--predictions", f"{folder}/predictions.csv", "--labels", f"{folder}/labels.csv"]
    assert ctclip_evaluation.main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    assert SYNTHETIC_NOTE in capsys.readouterr().out
