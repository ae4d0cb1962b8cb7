"""A run and what is not its own: the user's files, other runs at the same time, data that change on the disk, a folder
from which paths are seen otherwise.

Reference: the bytes that were there before; an undisturbed run; the one line a user reads.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_training import one_line
from safetensors.torch import load_file, save_file

from ctclip.cli import run_cli
from ctclip.config import Machine, TrainingConfig, TrainingError
from ctclip.evaluation.run_folder import LOCK, own_files, writing
from ctclip.inference.predictor import load_model
from ctclip.training import estimate, loop, steps
from ctclip.training import run as run_module
from ctclip.training.checkpoint import states
from ctclip.training.loop import train
from ctclip.training.run import StopRequest
from ctclip_model import WRITTEN, CheckpointError
from ctclip_training import main

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from killed_runs import differences  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast")
ROOT = Path(__file__).resolve().parents[2]
USERS = ("labels.csv", "photo.png", "x.tmp", "metrics.json", "notes.txt")


@pytest.fixture(scope="module")
def config(phantoms, tiny_classfine, tmp_path_factory) -> TrainingConfig:
    """One frozen epoch, one unfrozen."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return TrainingConfig(
        data_dir=str(phantoms), ctclip_path=tiny_classfine, cache_dir=cache, limit=24, batch_size=8, epochs=2,
        freeze_epochs=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(fast, config, tmp_path_factory) -> Path:
    return train(config, tmp_path_factory.mktemp("runs") / "undisturbed")


def flags_of(config: TrainingConfig) -> list[str]:
    names = ("data_dir", "ctclip_path", "cache_dir", "limit", "batch_size", "epochs", "freeze_epochs")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stopped(config, folder: Path, function: str, call: int = 1) -> None:
    """A run that SIGTERM ends when a step's function is called for that time."""
    original, calls = getattr(steps, function), iter(range(1, 10**6))

    def counted(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, function, counted)
        assert run_cli(lambda: train(config, folder)) == 143


# ------------------------------------------------------------------ the user's files


@pytest.mark.parametrize("names", [USERS, *((name,) for name in USERS)], ids=["all", *USERS])
def test_a_folder_that_holds_other_things_is_refused_and_stays_as_it_is(names, config, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "project"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("mine")
    for module in (run_module, estimate):  # said before any work
        monkeypatch.setattr(module, "prepare", None)
    assert main([*flags_of(config), "--output-dir", str(folder)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"{folder}: found a folder with other files ({sorted(names)[0]}" in err
    assert "expected one that is absent, empty or a run; choose another --output-dir" in err
    assert content(folder) == dict.fromkeys(names, b"mine")
    monkeypatch.undo()
    with pytest.raises(TrainingError, match="found a folder with other files"):
        train(config, folder)  # from Python
    assert content(folder) == dict.fromkeys(names, b"mine")


@pytest.mark.parametrize("leftover", [None, LOCK, WRITTEN, "run.json.77.tmp", ".gitkeep"])
def test_an_empty_folder_and_one_that_was_killed_at_once_become_a_run(leftover, config, undisturbed, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    if leftover:
        (folder / WRITTEN).write_text('{"run.json": ""}\n')
        (folder / leftover).touch()
    train(config, folder)
    assert differences(undisturbed, folder) == [] and not list(folder.glob("*.tmp"))


def test_a_run_removes_results_of_earlier_weights_and_nothing_of_the_user(config, undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    stopped(config, folder, "accumulate_gradients", 4)  # the second epoch, which is the best
    with writing(folder, "metrics.json", "predictions.csv", "roc.png"):  # by an evaluation meanwhile
        for name in ("metrics.json", "predictions.csv", "roc.png"):
            (folder / name).write_text("of the first epoch")
    mine = ["labels.csv", "photo.png", "x.tmp", "model.safetensors.bak", "report.html", "a.1.tmp", "state/mine.pt",
            "state/x.tmp", "state/mine.pt.12.tmp"]  # fmt: skip
    for name in mine:
        (folder / name).write_text("mine")
    for name in ("config.json.9999.tmp", "state/0001-000000.pt.9999.tmp"):
        (folder / name).write_text("left by a process that was killed")
    scores = iter((9.0,))
    original = steps.compute_metrics
    monkeypatch.setattr(steps, "compute_metrics", lambda *args: original(*args) | {"auroc_macro": next(scores)})
    assert main(["--resume", str(folder)]) == 0
    assert {name: (folder / name).read_text() for name in mine} == dict.fromkeys(mine, "mine")
    assert not [name for name in ("metrics.json", "predictions.csv", "roc.png") if (folder / name).exists()]
    assert sorted(path.name for path in folder.rglob("*.tmp")) == ["a.1.tmp", "mine.pt.12.tmp", "x.tmp", "x.tmp"]
    assert not any(name in own_files(folder) for name in mine)


def test_a_run_of_before_there_was_a_list_goes_on(config, undisturbed, tmp_path):
    folder = tmp_path / "run"
    stopped(config, folder, "accumulate_gradients", 4)
    (folder / WRITTEN).unlink()
    assert main(["--resume", str(folder)]) == 0
    assert differences(undisturbed, folder) == []
    assert own_files(folder)["model.safetensors"] != ""


# ------------------------------------------------------------------ one bit


def test_weights_of_a_run_with_one_bit_flipped_are_refused(undisturbed, tmp_path, capsys):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors: found other content than was written"):
        load_model(folder)
    assert main(["--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"{path}: found other content than was written" in err
    (folder / WRITTEN).unlink()  # the change is the user's
    load_model(folder)


def test_weights_of_one_s_own_making_are_read_once_the_list_is_gone(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"by": "me"})
    with pytest.raises(CheckpointError, match="if the change is yours, delete"):
        load_model(folder)


def test_missing_best_weights_are_named_when_a_run_goes_on(config, tmp_path, capsys):
    folder = tmp_path / "run"
    stopped(config, folder, "accumulate_gradients", 4)
    (folder / "model.safetensors").unlink()
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found no model.safetensors, expected the weights of epoch 1, the best so far" in err


# ------------------------------------------------------------------ two at a time


def test_runs_started_in_one_second_have_folders_of_their_own(config, undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    folders = [train(replace(config, alpha=alpha)) for alpha in (0.35, 0.9, 0.35)]
    names = [f"20260102-030405_ctclip{number}" for number in ("", "_2", "_3")]
    assert folders == [Path("results", name) for name in names]
    assert [json.loads((folder / "run.json").read_text())["config"]["alpha"] for folder in folders] == [0.35, 0.9, 0.35]
    assert differences(undisturbed, folders[0]) == [] == differences(undisturbed, folders[2])


HOLD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from ctclip.fileio import locked
with locked(Path(sys.argv[1]), "busy"):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("begun", [False, True])
def test_a_second_process_on_one_folder_is_refused(begun, config, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    if begun:
        stopped(config, folder, "accumulate_gradients", 4)
    before = {name: data for name, data in content(folder).items() if name != LOCK}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(folder / LOCK)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        capsys.readouterr()
        flags = ["--resume", str(folder)] if begun else [*flags_of(config), "--output-dir", str(folder)]
        assert main(flags) == 2
        err = capsys.readouterr().err
        assert one_line(err) and f"{folder}: found another process that trains in it" in err
        assert {name: data for name, data in content(folder).items() if name != LOCK} == before
    finally:
        holder.kill()
        holder.wait()
    assert main(flags) == 0  # the lock ends with its process


def test_a_run_that_another_process_has_finished_meanwhile_is_not_gone_on_with(config, undisturbed, tmp_path):
    """Both were started with one --output-dir before there was anything in it."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    before = content(folder)
    with pytest.raises(TrainingError, match=r"holds a run already; .* \(it has other values for --alpha\)"):
        train(replace(config, alpha=0.9), folder)
    assert content(folder) == before


# ------------------------------------------------------------------ signals


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_a_closed_terminal_does_not_end_a_run_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check("nothing")
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == stop._note
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------ data that change, folders that are elsewhere


@pytest.fixture
def cohort(phantoms, tmp_path) -> Path:
    return shutil.copytree(phantoms, tmp_path / "data")


def swap(first: Path, second: Path) -> None:
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


@pytest.mark.parametrize("when", ["in one process", "before it goes on", "in the frozen stage"])
def test_volumes_swapped_after_they_were_cached_end_the_run(when, config, cohort, tmp_path, monkeypatch, capsys):
    config = replace(config, data_dir=str(cohort), limit=None)
    folder, files = tmp_path / "run", sorted(cohort.glob("dataset/train_fixed/*/*/*.nii.gz"))[:2]
    if when == "in one process":
        load = steps.load_features

        def load_then_swap(job):
            load(job)
            swap(*files)

        monkeypatch.setattr(steps, "load_features", load_then_swap)
        assert run_cli(lambda: train(config, folder)) == 2
    else:
        stopped(config, folder, "accumulate_gradients", 3 if when == "in the frozen stage" else 7)
        assert states(folder)[-1].name.startswith("0000") == (when == "in the frozen stage")
        swap(*files)
        capsys.readouterr()
        assert main(["--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"{cohort}: found another file, metadata or labels than when the run began for 2 of" in err
    assert f"(first {files[0].name})" in err
    monkeypatch.undo()
    swap(*files)
    assert main(["--resume", str(folder)]) == 0


def test_labels_changed_before_a_run_goes_on_end_it(config, cohort, tmp_path, capsys):
    config = replace(config, data_dir=str(cohort), limit=None)
    folder, table = tmp_path / "run", next(cohort.glob("dataset/multi_abnormality_labels/train*.csv"))
    stopped(config, folder, "accumulate_gradients", 3)
    rows = table.read_text().splitlines()
    rows[1] = rows[1][:-1] + str(1 - int(rows[1][-1]))
    table.write_text("\n".join(rows) + "\n")
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "for 1 of 40 volumes" in err and rows[1].split(",")[0] in err


def test_volumes_copied_to_another_disk_are_the_same(config, cohort, undisturbed, tmp_path):
    folder = tmp_path / "run"
    stopped(config, folder, "accumulate_gradients", 4)
    assert main(["--resume", str(folder), "--data-dir", str(cohort)]) == 0
    assert differences(undisturbed, folder) == []


def test_a_run_with_relative_folders_goes_on_from_another_one(
    config, cohort, undisturbed, tmp_path, monkeypatch, capsys
):
    shutil.copy(config.ctclip_path, tmp_path / "own.pt")
    monkeypatch.chdir(tmp_path)
    relative = replace(config, data_dir="data", ctclip_path="own.pt", cache_dir="codes")
    stopped(relative, Path("run"), "accumulate_gradients", 4)
    assert json.loads(Path("run/run.json").read_text())["config"]["data_dir"] == "data"  # as it was given
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert differences(undisturbed, tmp_path / "run") == [] and not list(elsewhere.iterdir())
    (tmp_path / "data").rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"found no folder {tmp_path / 'data'}, expected the data of the run; name it with" in err
    assert main(["--resume", str(tmp_path / "run"), "--data-dir", "../moved"]) == 0


@pytest.mark.parametrize("epoch", [1, 2], ids=["frozen", "unfrozen"])
def test_a_run_killed_between_its_last_validation_volume_and_the_epoch_s_save_goes_on(
    epoch, config, undisturbed, tmp_path
):
    original, calls = loop.logging.epoch_record, iter(range(1, 9))

    def killed(*args):
        if next(calls) == epoch:
            raise KeyboardInterrupt
        return original(*args)

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.logging, "epoch_record", killed)
        assert run_cli(lambda: train(config, folder, Machine(save_minutes=0))) == 130
    assert main(["--resume", str(folder)]) == 0
    assert differences(undisturbed, folder) == []
