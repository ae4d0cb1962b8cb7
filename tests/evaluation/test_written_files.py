"""Which files of a folder are ours: only those are replaced or removed, and they are read only as they were written.

Reference: the bytes that lay there before, and the one line a user reads.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_evaluation import simulate
from helpers_training import damage, one_line

import ctclip_evaluation
import run_task2
from ctclip.cli import run_cli
from ctclip.evaluation import figures, render
from ctclip.evaluation.run_folder import LOCK, RunError, list_names, own_files, run_record, writing
from ctclip.inference import fusion, run_predictions
from ctclip_model import WRITTEN, CheckpointError, CTCLIPMultiAbnormalityModel, check_written, written_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pictures and the page are drawn elsewhere."""
    monkeypatch.setattr(figures, "write_figures", lambda *args: None)
    monkeypatch.setattr(render, "write_page", lambda path, *args: path.write_text("page"))


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """p.csv and l.csv in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, table in zip(("p.csv", "l.csv"), simulate(12, seed=0), strict=True):
        table.to_csv(name)
    return ["--predictions", "p.csv", "--labels", "l.csv", "--resamples", "100"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------ the list


def test_what_was_written_is_listed_with_its_digest_and_may_be_replaced(tmp_path):
    for text in ("one", "two"):
        with writing(tmp_path, "a.csv", "b.csv"):
            assert written_files(tmp_path) == {"a.csv": "", "b.csv": ""}  # ours, whatever a kill leaves of them
            (tmp_path / "a.csv").write_text(text)
    assert list(own_files(tmp_path)) == ["a.csv"]
    check_written(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("Two")
    with pytest.raises(CheckpointError, match=r"a.csv: found other content than was written \(SHA-256 .*; copy it"):
        check_written(tmp_path / "a.csv")
    (tmp_path / WRITTEN).unlink()
    check_written(tmp_path / "a.csv")
    with pytest.raises(RunError, match="found a.csv, which no run or evaluation wrote"), writing(tmp_path, "a.csv"):
        pass
    assert (tmp_path / "a.csv").read_text() == "Two"


def test_a_writer_that_fails_leaves_its_files_to_the_next_one(tmp_path):
    with pytest.raises(OSError), writing(tmp_path, "a.csv"):
        (tmp_path / "a.csv").write_text("half")
        raise OSError(errno.ENOSPC, "full")
    check_written(tmp_path / "a.csv")
    with writing(tmp_path, "a.csv"):
        (tmp_path / "a.csv").write_text("whole")


def test_a_torn_or_damaged_list_counts_for_what_can_be_read_of_it(tmp_path):
    with writing(tmp_path, "a", "b"):
        (tmp_path / "a").write_text("1")
    path = tmp_path / WRITTEN
    path.write_bytes(path.read_bytes() + b'{"c": "ab')  # by a kill
    with writing(tmp_path, "d"):
        (tmp_path / "d").write_text("2")
    assert list(own_files(tmp_path)) == ["a", "d"]
    lines = [b"\xff\xfe", b"[1, 2]", b"7", b"null", b'{"e": 3}', b"[" * 200_000, b'"text"']
    path.write_bytes(path.read_bytes() + b"\n".join(lines))
    assert list(own_files(tmp_path)) == ["a", "d"]


def test_a_list_names_no_files_of_other_folders(tmp_path):
    names = ["../a", "/etc/passwd", "b/c", "..\\a", "C:a", "..", ".", ""]
    (tmp_path / WRITTEN).write_text(json.dumps(dict.fromkeys(names, "")))
    assert own_files(tmp_path) == {}


# ------------------------------------------------------------------ evaluations


USERS = ("predictions.csv", "labels.csv", "tuning_labels.csv", "metrics.json", "report.html", "calibration.json",
         "predictions_mapped.csv", "roc.png")  # fmt: skip


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("source", ["tables", "example", "apply"])
def test_an_evaluation_replaces_no_file_of_the_user(source, name, tables, capsys):
    written = {"apply": ("predictions_mapped.csv", "calibration.json"),
               "tables": set(USERS) - {"labels.csv", "tuning_labels.csv"}}
    if name not in written.get(source, USERS):
        pytest.skip("not among what it writes")
    assert ctclip_evaluation.main([*tables, "--output-dir", "earlier"]) == 0
    Path(name).write_text("mine")
    before, flags = content(Path(".")), {"apply": ["--apply", "earlier", *tables[:2]], "example": ["--example"]}
    capsys.readouterr()
    assert ctclip_evaluation.main([*flags.get(source, tables), "--output-dir", "."]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f".: found {name}, which no run or evaluation wrote" in err
    assert content(Path(".")) == before


def test_an_evaluation_beside_other_files_leaves_them_and_may_be_made_again(tables):
    for name in ("photo.png", "x.tmp", "notes.json", "labels.csv"):
        Path(name).write_text("mine")
    before = content(Path("."))
    for _ in range(2):
        assert ctclip_evaluation.main([*tables, "--output-dir", "."]) == 0
    after = content(Path("."))
    assert {name: after[name] for name in before} == before and "metrics.json" in after


def test_the_tables_of_an_evaluation_may_lie_where_it_is_written(tables):
    shutil.move("p.csv", "predictions.csv")
    own = Path("predictions.csv").read_bytes()
    for _ in range(2):
        assert ctclip_evaluation.main(["--predictions", "predictions.csv", *tables[2:], "--output-dir", "."]) == 0
    assert Path("predictions.csv").read_bytes() == own and "predictions.csv" not in own_files(Path("."))


def test_an_evaluation_of_before_there_was_a_list_may_be_made_again(tables):
    assert ctclip_evaluation.main([*tables, "--output-dir", "out"]) == 0
    Path("out", WRITTEN).unlink()
    Path("out", "predictions.csv").unlink()
    assert ctclip_evaluation.main([*tables, "--output-dir", "out"]) == 0


# ------------------------------------------------------------------ runs


CHANGED = ("predictions.csv", "labels.csv", "tuning_predictions.csv", "tuning_labels.csv", "run.json", "log.jsonl")


@pytest.fixture
def run(tmp_path):
    """A run as training leaves it, for an evaluation; its weights are not needed."""
    folder = tmp_path / "run"
    folder.mkdir()
    with writing(folder, *CHANGED):
        for prefix, first in (("", 1), ("tuning_", 50)):
            for name, table in zip(("predictions", "labels"), simulate(12, seed=first, first=first), strict=True):
                table.to_csv(folder / f"{prefix}{name}.csv")
        (folder / "run.json").write_text(json.dumps({"phantom": True}))
        (folder / "log.jsonl").write_text(json.dumps({"epoch": 1, "stage": "frozen", "train_loss": 1.0}) + "\n")
    return folder


@pytest.mark.parametrize("name", CHANGED)
def test_a_table_or_record_of_a_run_that_has_changed_is_refused(name, run, capsys):
    path = run / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert ctclip_evaluation.main(["--checkpoint", str(run), "--resamples", "100"]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"{path}: found other content than was written" in err and f"delete {run / WRITTEN}" in err
    assert not (run / "metrics.json").exists()


def test_a_stored_calibration_that_has_changed_is_refused(run, tables, capsys):
    assert ctclip_evaluation.main(["--checkpoint", str(run), "--resamples", "100"]) == 0
    damage(run / "calibration.json")
    capsys.readouterr()
    assert ctclip_evaluation.main(["--apply", str(run), "--predictions", "p.csv"]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "calibration.json: found other content than was written" in err
    assert ctclip_evaluation.main(["--checkpoint", str(run), "--resamples", "100"]) == 0  # makes it again


def test_a_run_of_before_there_was_a_list_is_read_and_evaluated_as_before(run):
    (run / WRITTEN).unlink()
    edited = json.loads((run / "run.json").read_text()) | {"note": 1}
    (run / "run.json").write_text(json.dumps(edited))
    for _ in range(2):
        assert ctclip_evaluation.main(["--checkpoint", str(run), "--resamples", "100"]) == 0
    assert own_files(run)["run.json"] == "" != own_files(run)["metrics.json"]
    assert run_record(run) == edited


def test_files_that_the_user_put_into_a_run_are_not_replaced(run, capsys):
    (run / "metrics.json").write_text("mine")
    assert ctclip_evaluation.main(["--checkpoint", str(run), "--resamples", "100"]) == 2
    assert "found metrics.json, which no run or evaluation wrote" in capsys.readouterr().err
    assert run_task2.main(["--mode", "evaluate", "--checkpoint", str(run)]) == 2
    assert (run / "metrics.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.json", "report.html"])
def test_a_folder_in_the_place_of_a_result_is_said_before_any_work(name, run, capsys):
    (run / name).mkdir()
    assert run_task2.main(["--mode", "evaluate", "--checkpoint", str(run)]) == 2
    assert ctclip_evaluation.main(["--checkpoint", str(run)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(f"{run / name}: found a folder, expected a file or none" in line for line in lines)


@pytest.mark.parametrize("flags", [[], ["--checkpoint"]], ids=["tables", "run"])
def test_an_evaluation_where_another_process_writes_is_refused(flags, run, tables, tmp_path, capsys):
    folder = run if flags else tmp_path / "out"
    folder.mkdir(exist_ok=True)
    before = content(folder)
    hold = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
    hold += "from ctclip.fileio import locked\n"
    hold += f"with locked(Path({str(folder / LOCK)!r}), ''):\n    print(1, flush=True)\n    input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"1\n"
        flags = [*flags, str(run)] if flags else [*tables, "--output-dir", "out"]
        assert ctclip_evaluation.main(flags) == 2
        err = capsys.readouterr().err
        assert one_line(err) and f"{folder.name}: found another process that trains or evaluates in it" in err
        assert {name: data for name, data in content(folder).items() if name != LOCK} == before
        holder.communicate(b"\n")
    assert ctclip_evaluation.main(flags) == 0


def test_exported_and_predicted_files_of_the_user_are_not_replaced_by_default(
    phantoms, tiny_classfine, tmp_path, monkeypatch, capsys
):
    """By names that nobody has chosen; a run of before there was a list stays one."""
    monkeypatch.chdir(tmp_path)
    CTCLIPMultiAbnormalityModel(tiny_classfine).save_pretrained("run")
    Path("run/run.json").write_text(json.dumps({"phantom": True}))
    for path in ("run/model.onnx", "results/predictions.csv"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("mine")
    scan = str(next(phantoms.glob("dataset/valid_fixed/*/*/*.nii.gz")))
    predict = ["--mode", "predict", "--checkpoint", "run", "--input", scan]
    for flags in (["--export", "onnx", "--checkpoint", "run"], predict):
        assert run_task2.main(flags) == 2
        err = capsys.readouterr().err
        assert one_line(err) and "found a file that this command did not write, expected none" in err
    assert Path("run/model.onnx").read_text() == "mine" == Path("results/predictions.csv").read_text()
    Path("results/predictions.csv").unlink()
    assert run_task2.main(predict) == 0 == run_task2.main(predict)
    list_names(Path("run"), "model.onnx")
    assert own_files(Path("run")) == dict.fromkeys(("run.json", "model.safetensors", "config.json", "model.onnx"), "")


# ------------------------------------------------------------------ a place that cannot be written, a disk that is full


@pytest.fixture
def untested(phantoms, tiny_classfine, tmp_path):
    """A run whose unseen volumes have not been predicted yet."""
    folder = tmp_path / "untested"
    CTCLIPMultiAbnormalityModel(tiny_classfine).save_pretrained(folder)
    with writing(folder, "run.json"):
        (folder / "run.json").write_text(json.dumps({"phantom": True, "data_dir": str(phantoms)}))
    return folder


def test_a_place_that_cannot_be_written_is_said_before_anything_is_predicted(untested, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write anywhere
    monkeypatch.setattr(fusion, "predict_volumes", None)
    for output in ([], ["--output-dir", "elsewhere/new"]):
        assert ctclip_evaluation.main(["--checkpoint", str(untested), *output]) == 2
        err = capsys.readouterr().err
        place = "elsewhere/new" if output else str(untested)
        assert one_line(err) and f"{place}: found a place that cannot be written (Permission denied)" in err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("could not create a primitive")], ids=["own", "oneDNN"])
def test_out_of_memory_while_a_run_is_evaluated_is_one_line_without_resume(error, untested, monkeypatch, capsys):
    def full(*args, **options):
        raise error

    monkeypatch.setattr(fusion, "predict_volumes", full)
    assert ctclip_evaluation.main(["--checkpoint", str(untested)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and err.startswith("error: out of memory; ") and "--resume" not in err


def test_rows_that_are_predicted_survive_a_failure_at_the_end(untested, monkeypatch, capsys):
    def full(path, *args):
        raise OSError(errno.EFBIG, "File too large", str(path))

    write_table = run_predictions.write_table
    monkeypatch.setattr(run_predictions, "write_table", full)
    assert ctclip_evaluation.main(["--checkpoint", str(untested)]) == 2
    err, part = capsys.readouterr().err, untested / "predictions.part.csv"
    assert f"Kept in {part}: 16 scans" in err and f"error: {untested / 'labels.csv'}: File too large; free space" in err
    assert len(part.read_text().splitlines()) == 17
    monkeypatch.setattr(run_predictions, "write_table", write_table)
    assert ctclip_evaluation.main(["--checkpoint", str(untested), "--resamples", "100", "--pictures", "0"]) == 0
    kept, made = (np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(1, 19)) for path in
                  (part, untested / "predictions.csv"))
    assert np.allclose(kept, made, rtol=0, atol=1e-6)  # a sigmoid of one row, and of all


def test_a_failed_write_names_its_file(tmp_path, capsys):
    from ctclip.fileio import replacing

    def write():
        with replacing(tmp_path / "a.csv") as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    assert run_cli(write) == 2
    err = capsys.readouterr().err
    remedy = "free space on its disk, raise the limit, or write to another place"
    assert err == f"error: {tmp_path / 'a.csv'}: No space left on device; {remedy}\n"
    assert list(tmp_path.iterdir()) == []
