"""The list of runs: what stands in it and in which order, against the runs' own files; what is no run; the page."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_evaluation import simulate

import run_task2
from ctclip.config import SYNTHETIC_NOTE, TrainingConfig
from ctclip.errors import UserError
from ctclip.evaluation import evaluate as ev
from ctclip.evaluation.run_folder import LOCK
from ctclip.evaluation.runs import comparison_command, format_runs, list_runs, write_index
from ctclip.fileio import locked
from ctclip.paths import script

HOLD = """
import sys
from pathlib import Path
from ctclip.fileio import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def make_run(folder: Path, seed: int | None = 0, status: str = "finished", phantom: bool = False, **changes) -> None:
    """A run's folder; without a seed, one that was not evaluated."""
    folder.mkdir(parents=True)
    record = {"config": vars(TrainingConfig(**changes)), "data_dir": "/home/jane/cohort", "phantom": phantom,
              "status": status, "labels": []}
    (folder / "run.json").write_text(json.dumps(record))
    if seed is not None:
        metrics = ev.evaluate(*simulate(30, seed=seed), resamples=100)
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "report.html").write_text("report")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "results"
    make_run(root / "first", 0, loss_type="bce", epochs=4)
    make_run(root / "again", 0, epochs=9)
    make_run(root / "second", 1, model="resnet18")
    make_run(root / "begun", None, status="running")
    make_run(root / "trained", None, phantom=True)
    other = ev.evaluate(*simulate(20, seed=5), resamples=100)
    (root / "first" / "on_elsewhere").mkdir()
    (root / "first" / "on_elsewhere" / "metrics.json").write_text(json.dumps(other))
    (root / "damaged").mkdir()
    (root / "damaged" / "run.json").write_text(json.dumps({"config": {}, "phantom": 3}))
    (root / "of_another_program").mkdir()
    (root / "of_another_program" / "run.json").write_text('{"id": 1}')
    return root


def test_runs_are_listed_with_what_their_files_say(results):
    runs = {run.name: run for run in list_runs(results)}
    assert set(runs) == {"first", "again", "first/on_elsewhere", "second", "begun", "trained", "damaged"}
    metrics = json.loads((results / "first" / "metrics.json").read_text())
    cells = runs["first"].cells()
    low, high = metrics["intervals"]["at_0.5"]["auroc_macro"]
    assert cells["auroc"] == f"{metrics['at_0.5']['auroc_macro']:.3f} ({low:.3f}-{high:.3f})"
    assert cells["f1"] == f"{metrics['tuned']['f1_macro']:.3f}" and cells["crg"] == f"{metrics['tuned']['crg']:.3f}"
    assert (cells["loss"], cells["epochs"], cells["data"], cells["head"]) == ("bce", "4", "cohort", "linear")
    assert {name: run.status for name, run in runs.items()} == {
        "first": "evaluated", "again": "evaluated", "first/on_elsewhere": "evaluated", "second": "evaluated",
        "begun": "not running", "trained": "not evaluated", "damaged": "unreadable"}
    assert runs["first/on_elsewhere"].data == "elsewhere"
    assert len({runs[name].compared_on for name in ("first", "second", "first/on_elsewhere")}) == 3  # other labels


@pytest.mark.parametrize("key", ["auroc", "f1", "crg", "name", "epochs"])
def test_runs_are_sorted_and_those_without_the_value_come_last(results, key):
    values = [run.value(key) for run in list_runs(results, key)]
    known = [value for value in values if value is not None]
    assert values[: len(known)] == known == sorted(known, reverse=key in ("auroc", "f1", "crg")) and len(known) >= 3


def test_the_text_names_faults_and_phantoms(results):
    text = format_runs(list_runs(results))
    assert "damaged: " in text and "found a value of another kind for phantom" in text
    assert text.endswith(SYNTHETIC_NOTE) and "AUROC (95 % CI)" in text.splitlines()[0]
    assert "not evaluated" in text and max(map(len, text.splitlines()[:8])) <= 120


@pytest.mark.parametrize("width", [120, 80])
def test_the_text_fits(results, width):
    runs = [run for run in list_runs(results) if not run.fault]
    long = [replace(run, name=f"2026112{i}-120000_vit_base_patch16_224.augreg_in21k_{run.name}")
            for i, run in enumerate(runs)]
    config = {"model": "vit_base_patch16_224.augreg_in21k", "head": "attention", "loss_type": "focal", "epochs": 100}
    long[0] = replace(long[0], data="a cohort with a long name", record={**long[0].record, "config": config})
    *table, note = format_runs(long, width).splitlines()[: len(long) + 2]
    assert max(map(len, table)) <= width and min(map(len, table)) > 30
    for run, line in zip(long, table[1:], strict=True):
        shortened = re.match(re.escape(run.name[:7]) + r"\.\.(\S{7,})  ", line)
        assert shortened and run.name.endswith(shortened[1])
    assert note == "On the page, too wide for here: " + (
        "loss, epochs" if width == 120 else "data, head, loss, epochs, f1, crg")


def test_a_run_that_a_process_trains_is_told_from_one_that_stopped(results):
    path = results / "begun" / "run.json"
    os.utime(path, (time.time() - 3 * 3600,) * 2)
    begun = next(run for run in list_runs(results) if run.name == "begun")
    assert "nor running on this machine (--resume continues one); last written: begun 3 h ago" in format_runs([begun])
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path.with_name(LOCK))], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        assert process.stdout.readline() == "locked\n" and begun.status == "running"
        assert "last written" not in format_runs([begun])
        process.kill()
    assert begun.status == "not running" and path.with_name(LOCK).exists()
    with locked(path.with_name(LOCK)):
        assert begun.status == "running"
    assert begun.status == "not running"


def test_what_all_runs_have_in_common_is_said_once(results):
    text = format_runs([run for run in list_runs(results) if run.name in ("first", "trained")])
    assert "All: data cohort, model ctclip, head linear" in text and "Model" not in text.splitlines()[0]


def test_the_page_holds_every_run_and_can_be_written_again(results, tmp_path, capsys):
    page = tmp_path / "index.html"
    for _ in range(2):
        assert run_task2.main(["--mode", "runs", "--input", str(results), "--output", str(page)]) == 0
    assert re.search(r"^first/.*\.\..*lsewhere  ", capsys.readouterr().out, re.MULTILINE)
    text = page.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    runs = {row["name"]: row for row in data}
    assert runs["first"]["report"].endswith("results/first/report.html") and runs["begun"]["report"] is None
    assert list(runs["first"]["results"])[:4] == ["Data", "Volumes", "Patients", "Label rate"]
    assert runs["first"]["kind"] == runs["again"]["kind"] != runs["second"]["kind"] and runs["begun"]["kind"] is None
    assert SYNTHETIC_NOTE in text and "http" not in text.replace("http-equiv", "")
    assert "/home/jane" not in json.dumps([row["cells"] for row in data])


def test_the_two_best_of_the_same_volumes_can_be_compared(tmp_path, monkeypatch, capsys):
    """Seeds make other labels: `best` has the highest AUROC, and none to be compared with."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b c", 0), ("best", 1)):
        make_run(Path("results", name), seed)
    for name, auroc in (("a", 0.8), ("b c", 0.9), ("best", 0.95)):
        path = Path("results", name, "metrics.json")
        metrics = json.loads(path.read_text())
        metrics["at_0.5"]["auroc_macro"] = auroc
        path.write_text(json.dumps(metrics))
    assert comparison_command(list_runs("results")) is None  # no tables of predictions
    for path in Path("results").iterdir():
        (path / "predictions.csv").touch()
    expected = f"python {script('ctclip_evaluation.py')} --checkpoint 'results/b c' --baseline results/a"
    assert run_task2.main(["--mode", "runs"]) == 0
    assert capsys.readouterr().out.endswith(f"The two best, volume by volume, with intervals: {expected}\n")
    data = json.loads(re.search(r'id="data">(.*?)</script>', Path("results/index.html").read_text(), re.DOTALL)[1])
    assert {row["name"]: row["folder"] for row in data}["b c"] == "'results/b c'"
    write_index(Path("elsewhere.html"), list_runs(tmp_path / "results"))
    assert str(tmp_path) not in Path("elsewhere.html").read_text()


def test_what_is_the_users_is_not_replaced(results, tmp_path, capsys):
    page = tmp_path / "index.html"
    page.write_text("<h1>mine</h1>")
    assert run_task2.main(["--mode", "runs", "--input", str(results), "--output", str(page)]) == 2
    assert "found a file that this command did not write" in capsys.readouterr().err and "mine" in page.read_text()


@pytest.mark.parametrize("flags, message", [
    (["--mode", "runs", "--input", "nowhere"], "nowhere: found no run, expected folders with run.json"),
    (["--mode", "runs", "--output", "runs.pdf"], "expected .html"),
    (["--mode", "runs", "--epochs", "3"], "found --epochs, which goes with --mode full or --mode train only"),
    (["--mode", "train", "--sort", "f1"], "found --sort, which goes with --mode runs only"),
    (["--name", "a/b"], "found --name 'a/b', expected a name without slashes"),
    (["--name", ".."], "found --name '..'"),
    (["--name", "a", "--output-dir", "b"], "found --name and --output-dir, expected one of them"),
    (["--resume", "r", "--name", "a"], "found --name too"),
])  # fmt: skip
def test_wrong_usage_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_task2.main(flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err, err


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="found no run"):
        list_runs(tmp_path)


def test_paths_of_the_page_lead_to_the_reports(results):
    write_index(results / "index.html", list_runs(results))
    text = (results / "index.html").read_text()
    assert 'href="first/report.html"' in text
    (results / "index.html").unlink()


