"""What a run goes on from, whatever ended it: SIGTERM, Ctrl-C, SIGKILL, a damaged file, a full disk.

Reference for every run: an undisturbed one, bit for bit (weights, validation predictions, losses). For a state on its
own: what was saved.
"""

import errno
import json
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers_training import damage, history, one_line
from safetensors import SafetensorError

from ctclip.cli import run_cli
from ctclip.training import checkpoint, loop, steps
from ctclip.training import run as run_module
from ctclip.training.checkpoint import (
    StateError,
    full_disk_explained,
    load_newest,
    save_state,
    size_of,
    states,
)
from ctclip.training.loop import train
from ctclip.training.run import Interrupted, Machine, StopRequest, TrainingConfig
from ctclip_training import main

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from killed_runs import Forked, differences, run_with_kills  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast")
STEPS = 5  # of an epoch


@pytest.fixture(scope="module")
def flags(phantoms, tiny_classfine, tmp_path_factory) -> dict[str, str]:
    """Two frozen epochs, then two layers and four; dropout and averages are on."""
    cache = tmp_path_factory.mktemp("cache")
    named = {"data-dir": phantoms, "ctclip-path": tiny_classfine, "cache-dir": cache, "limit": 24, "batch-size": 4}
    return {k: str(v) for k, v in (named | {"epochs": 4, "freeze-epochs": 2, "ema-decay": 0.5}).items()}


@pytest.fixture(scope="module")
def config(flags) -> TrainingConfig:
    numbers = {"limit": int, "batch-size": int, "epochs": int, "freeze-epochs": int, "ema-decay": float}
    return TrainingConfig(**{k.replace("-", "_"): numbers.get(k, str)(v) for k, v in flags.items()})


@pytest.fixture(scope="module")
def undisturbed(fast, config, tmp_path_factory) -> Path:
    return train(config, tmp_path_factory.mktemp("runs") / "undisturbed")


def call_before(monkeypatch, name: str, number: int, action) -> None:
    """Has `action()` called when a step's function is called for the `number`-th time."""
    original, calls = getattr(steps, name), iter(range(1, 10**6))

    def counted(*args, **kwargs):
        if next(calls) == number:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(steps, name, counted)


def interrupt(config, folder: Path, function: str, number: int, *signals: int) -> int:
    """Exit code of a run whose process gets these signals when that function is called for that time."""
    with pytest.MonkeyPatch.context() as patch:
        call_before(patch, function, number, lambda: [os.kill(os.getpid(), each) for each in signals])
        return run_cli(lambda: train(config, folder))


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize(
    ("function", "number", "number_of_signal", "where", "newest"),
    [
        ("accumulate_gradients", STEPS + 3, signal.SIGTERM, "step 2 of 5 of epoch 2", "0001-000002"),  # from the cache
        ("predict_validation", 2, signal.SIGINT, "step 0 of 5 of epoch 3", "0002-000000"),  # frozen: ends first
        ("accumulate_gradients", 2 * STEPS + 5, signal.SIGTERM, "step 4 of 5 of epoch 3", "0002-000004"),  # the last
        ("accumulate_gradients", 3 * STEPS + 2, signal.SIGINT, "step 1 of 5 of epoch 4", "0003-000001"),  # more layers
        ("predict_volumes", 1, signal.SIGTERM, "the epoch's steps are saved", "0002-000005"),
    ],
)
def test_signals_end_a_run_that_goes_on_exactly(
    function, number, number_of_signal, where, newest, config, undisturbed, tmp_path, capsys
):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    folder = tmp_path / "run"
    assert interrupt(config, folder, function, number, number_of_signal) == 128 + number_of_signal
    captured = capsys.readouterr()
    assert one_line(captured.err) and where in captured.err and "--resume" in captured.err
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert states(folder)[-1].stem == newest
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert main(["--resume", str(folder)]) == 0
    assert "State found: going on after epoch" in capsys.readouterr().out
    assert differences(undisturbed, folder) == []


def test_an_evaluation_that_was_cut_off_goes_on(config, fast, tmp_path, monkeypatch):
    """The undisturbed run evaluates two at a time as well: on some processors rounding depends on a batch's size."""
    monkeypatch.setattr(loop, "VALIDATION_CHUNK", 2)
    undisturbed = train(config, tmp_path / "undisturbed")
    folder, machine = tmp_path / "run", Machine(save_minutes=0)
    with pytest.MonkeyPatch.context() as patch:
        call_before(patch, "predict_volumes", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_cli(lambda: train(config, folder, machine)) == 143
    assert len(load_newest(folder, print)["progress"]["predicted"]) == 2
    evaluated, predict = [], steps.predict_volumes

    def counted(model, volumes, *rest, **options):
        evaluated.append([volume.name for volume in volumes])
        return predict(model, volumes, *rest, **options)

    monkeypatch.setattr(steps, "predict_volumes", counted)
    assert main(["--resume", str(folder)]) == 0
    names = [name for chunk in evaluated for name in chunk]
    tuning = json.loads((folder / "run.json").read_text())["volumes"]["tuning"]
    assert len(names) == 2 * tuning - 2  # two unfrozen epochs, less what was evaluated before
    assert differences(undisturbed, folder) == []


def test_a_frozen_evaluation_that_was_complete_is_not_made_again(config, undisturbed, tmp_path, monkeypatch):
    """Killed between saving it and the end of its epoch."""

    def killed(*args):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "validation_metrics", killed)
        assert run_cli(lambda: train(config, folder, Machine(save_minutes=0))) == 130
    assert main(["--resume", str(folder)]) == 0
    assert differences(undisturbed, folder) == []


def test_states_of_another_format_are_one_line_and_exit_code_2(config, tmp_path, capsys):
    folder = tmp_path / "run"
    train(replace(config, epochs=1), folder)
    content = load_newest(folder, print)
    del content["format"]  # those of version 0.6 had none
    for path in states(folder):
        path.unlink()
    save_state(folder, 1, 0, content)
    assert main(["--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found states of format 1, expected 3" in err and "start a new one" in err


def test_interrupted_while_encoding_keeps_what_is_encoded(config, undisturbed, tmp_path, monkeypatch, capsys):
    config = replace(config, cache_dir=str(tmp_path / "cache"))
    batches = []

    def interrupted(run, role, volumes, batch):
        batches.append(len(batch.index))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_module.Run, "record", interrupted)
    encode, left = steps.encode_missing, []

    def count_missing(model, cache, volumes, *rest):
        left.append(cache.rows(volumes).count(None))
        return encode(model, cache, volumes, *rest)

    monkeypatch.setattr(steps, "encode_missing", count_missing)
    assert run_cli(lambda: train(config, tmp_path / "run")) == 143
    assert "what has been encoded is in the cache" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(batches) == 1 and left[0] > batches[0]
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert differences(undisturbed, tmp_path / "run") == []


def test_second_ctrl_c_ends_at_once_and_the_last_state_serves(config, undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    assert interrupt(config, folder, "accumulate_gradients", STEPS + 3, signal.SIGINT, signal.SIGINT) == 130
    assert "what was saved last, if anything, is kept" in capsys.readouterr().err
    assert states(folder)[-1].stem == "0001-000000"
    assert main(["--resume", str(folder)]) == 0
    assert differences(undisturbed, folder) == []


def test_volumes_that_turned_out_unreadable_stay_skipped(config, phantoms, tmp_path):
    """They are found out in the frozen stage; the batches of the unfrozen one depend on it."""
    cohort = shutil.copytree(phantoms, tmp_path / "cohort")
    harmed = sorted(cohort.glob("dataset/train*/*/*/*.nii.gz"))[:4]
    assert len(harmed) == 4
    for path in harmed:
        path.write_bytes(b"not a scan")
    config = replace(config, data_dir=str(cohort), epochs=3)
    undisturbed = train(config, tmp_path / "undisturbed")
    left_out = {row["name"] for row in json.loads((undisturbed / "run.json").read_text())["left_out"]}
    assert len(left_out & {path.name for path in harmed}) > 1
    folder = tmp_path / "run"
    assert interrupt(config, folder, "predict_validation", 2, signal.SIGTERM) == 143
    assert main(["--resume", str(folder)]) == 0
    assert differences(undisturbed, folder) == []


def test_a_stop_request_names_the_signal():
    with StopRequest() as stop:
        stop.check("nothing yet")
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="saved") as caught:
            stop.check("saved")
    assert caught.value.exit_code == 143


def test_killed_runs_end_as_the_undisturbed_one(flags, undisturbed, tmp_path):
    """The benchmark of the same name does it with more kills."""
    spelled = [part for name, value in flags.items() for part in (f"--{name}", value)]
    hits = run_with_kills(tmp_path / "run", spelled, kills=3, seed=1, longest=1.2, start=Forked)
    assert hits >= 2  # a fast machine may be done before the third
    assert differences(undisturbed, tmp_path / "run") == []


@pytest.fixture(scope="module")
def interrupted(config, undisturbed, tmp_path_factory) -> Path:
    """A run in its last epoch: two states. To be copied."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    interrupt(config, folder, "accumulate_gradients", 3 * STEPS + 2, signal.SIGTERM)
    assert [path.stem for path in states(folder)] == ["0003-000000", "0003-000001"]
    return folder


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [damage, truncate])
def test_damaged_newest_state_is_reported_and_the_one_before_serves(harm, interrupted, undisturbed, tmp_path, capsys):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    harm(states(folder)[-1])
    assert main(["--resume", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "0003-000001.pt is damaged" in out and "using the state before it" in out
    assert "going on after epoch 3 of 4 and 0 steps" in out
    assert differences(undisturbed, folder) == []


def test_no_intact_state_is_one_line_and_exit_code_2(interrupted, tmp_path, capsys):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    for path in states(folder):
        damage(path)
    assert main(["--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "found 2 states, all damaged" in err and "start a new run" in err


@pytest.mark.parametrize("content", ["{", "[1]", '{"config": {}', '{"config": {"epoch": 4}}', "{}"])
def test_damaged_run_record_is_one_line_and_exit_code_2(content, tmp_path, capsys):
    (tmp_path / "run.json").write_text(content)
    assert main(["--resume", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and str(tmp_path / "run.json") in err


@contextmanager
def largest_file(size: int):
    """Inside the block no file of this process grows beyond `size` bytes: the full disk that anyone can have."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("file", "what", "newest"),
    [
        ("state/0003-000005.pt", "The training state", "the last good state is {}/state/0003-000000.pt"),
        ("model.safetensors", "The best weights", "no state has been saved yet"),  # after the first epoch
    ],
)
def test_full_disk_leaves_the_last_state_and_says_what_to_free(
    file, what, newest, config, undisturbed, tmp_path, capsys
):
    folder = tmp_path / "run"
    with largest_file((undisturbed / file).stat().st_size - 1):
        assert run_cli(lambda: train(config, folder)) == 2
    err = capsys.readouterr().err
    assert one_line(err) and what in err and "Free space there" in err and f"--resume {folder}" in err
    assert newest.format(folder) in err
    assert not list(folder.rglob("*.tmp"))
    assert main(["--resume", str(folder)]) == 0
    assert differences(undisturbed, folder) == []


def test_resume_keeps_the_split_of_a_cohort_that_has_grown_and_misses_what_is_gone(config, phantoms, tmp_path, capsys):
    """A split made anew would move most patients to the other side."""
    cohort = shutil.copytree(phantoms, tmp_path / "cohort")
    table = next(cohort.glob("dataset/multi_abnormality_labels/train*.csv"))
    rows = table.read_text().splitlines()
    taken = next(row for row in rows if row.split(",")[0].endswith("_2.nii.gz"))
    table.write_text("\n".join(row for row in rows if row != taken) + "\n")
    config = replace(config, data_dir=str(cohort), limit=None, class_weights=True)
    undisturbed = train(config, tmp_path / "undisturbed")
    folder = tmp_path / "run"
    assert interrupt(config, folder, "predict_validation", 3, signal.SIGTERM) == 143
    table.write_text("\n".join(rows) + "\n")
    assert main(["--resume", str(folder)]) == 0
    assert differences(undisturbed, folder) == []
    kept = pd.read_csv(folder / "tuning_labels.csv").VolumeName[0]
    table.write_text("\n".join(row for row in rows if not row.startswith(kept)) + "\n")
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and f"first missing: {kept}" in err and "bring them back" in err


def test_resume_wants_the_weights_that_the_run_began_with(config, tiny_classfine, tmp_path, capsys):
    folder = train(replace(config, epochs=1), tmp_path / "run")
    state = torch.load(tiny_classfine, weights_only=True)
    other = dict(state)
    key = next(key for key in other if key.endswith("enc_spatial_transformer.norm_out.gamma"))
    other[key] = other[key] + 1e-3
    torch.save(other, tmp_path / "other.pt")
    torch.save(state, tmp_path / "moved.pt")
    assert main(["--resume", str(folder), "--ctclip-path", str(tmp_path / "moved.pt")]) == 0
    capsys.readouterr()
    assert main(["--resume", str(folder), "--ctclip-path", str(tmp_path / "other.pt")]) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "weights are not those" in err


# ------------------------------------------------------------------ states


CONTENT = {"progress": {"epoch": 1}, "names": ["a", "b"], "tensors": {"w": torch.arange(50.0), "n": torch.tensor(3)}}


def test_a_line_that_cannot_be_printed_costs_no_epoch(config, undisturbed, tmp_path, monkeypatch, capsys):
    """As with the output on a disk that is full."""

    def write(text):
        if text.startswith("epoch  3"):  # the first that is not frozen
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(run_module.tqdm, "write", write)
        assert run_cli(lambda: train(config, tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert one_line(err) and "standard output: No space left on device; free space" in err
    assert [line["epoch"] for line in history(tmp_path / "run")] == [1, 2, 3]
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert "State found: going on after epoch 3" in capsys.readouterr().out
    assert differences(undisturbed, tmp_path / "run") == []


def test_newest_two_states_are_kept_and_come_back(tmp_path):
    assert load_newest(tmp_path, print) is None
    for epoch, step in ((0, 900), (0, 10_000), (1, 0), (1, 20)):
        save_state(tmp_path, epoch, step, CONTENT | {"step": step})
    assert [path.name for path in states(tmp_path)] == ["0001-000000.pt", "0001-000020.pt"]
    (tmp_path / "state" / "0002-000000.pt.tmp").write_bytes(b"killed while writing")
    state = load_newest(tmp_path, print)
    assert (state["step"], state["names"], state["progress"]) == (20, ["a", "b"], {"epoch": 1})
    assert torch.equal(state["tensors"]["w"], torch.arange(50.0)) and state["tensors"]["n"].item() == 3


def test_any_damage_is_found(tmp_path):
    """Names and offsets inside the file too, which the format's own checksums do not cover."""
    path = save_state(tmp_path, 1, 0, CONTENT)
    whole = path.read_bytes()
    harmed = [whole[:at] for at in (0, 1, len(whole) // 2, len(whole) - 1)] + [whole + b"\0", bytes(len(whole))]
    harmed += [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    for content in harmed:
        path.write_bytes(content)
        with pytest.raises(StateError, match="all damaged"):
            load_newest(tmp_path, lambda text: None)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_explained_whoever_met_it(error, tmp_path):
    with (
        pytest.raises(StateError, match=r"Weights could not be written .* MB free.*no state has been saved yet"),
        full_disk_explained(tmp_path, "Weights", 10),
    ):
        raise error
    newest = save_state(tmp_path, 3, 4, CONTENT)
    size = size_of({"a": [torch.zeros(2_500_000)], "b": torch.zeros(1), "c": 3})
    with pytest.raises(StateError) as caught, full_disk_explained(tmp_path, "Weights", size):
        raise error
    assert f"expected room for 11 MB; the last good state is {newest}" in str(caught.value)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), SafetensorError("(os error 13)")])
def test_other_errors_of_writing_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)), full_disk_explained(tmp_path, "Weights", 10):
        raise error


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("size", [10, 10**6], ids=["at the end", "on the way"])
def test_reason_of_a_failed_save_is_not_lost(size):
    with pytest.raises(OSError) as caught:
        checkpoint._save({"tensor": torch.zeros(size)}, Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC
