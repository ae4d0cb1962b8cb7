"""Predictions by several processes, and by one that was ended: rows on the disk, what is taken up, parts of --shard.
Reference: the table, thresholds and heat maps that one undisturbed process writes, to the byte."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers_data import affine_of, chest, write
from helpers_dicom import write_series
from helpers_training import one_line

import run_task2
from ctclip.data import loading
from ctclip.errors import UserError
from ctclip.evaluation.tables import write_table
from ctclip.inference import merge, predictions
from ctclip.inference.part_files import PartFiles, ScanRow, identity_digest, part_path, part_paths, read_lines
from ctclip.inference.scans import Scan
from ctclip_model import CTCLIPMultiAbnormalityModel

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "fixtures" / "tiny_a_classfine.pt"
SPACING = (7.5, 7.9, 12.25)
SCANS = 16  # of which two cannot be read


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """run/, which can calibrate and decide; scans/, one of them a series; whole/, what one process writes of them."""
    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    CTCLIPMultiAbnormalityModel(str(MODEL)).save_pretrained(folder / "run")
    names, labels = [f"train_{i}_a_1.nii.gz" for i in range(60)], (rng.random((60, 18)) < 0.4).astype(int)
    write_table(folder / "run" / "tuning_labels.csv", names, labels)
    write_table(folder / "run" / "tuning_predictions.csv", names, rng.random((60, 18)).astype(np.float32))
    for number in range(SCANS - 1):
        hu = chest((26, 24, 12), seed=number)[:, :, : 6 if number % 2 else 12]  # every other one has a warning
        write(folder / "scans" / f"s{number:02d}.nii.gz", hu, SPACING, affine_of(SPACING))
    write_series(folder / "scans" / "series", chest((20, 18, 8)), affine_of(SPACING))
    (folder / "scans" / "s03.nii.gz").write_bytes(b"")
    (folder / "scans" / "s10.nii.gz").write_bytes((folder / "scans" / "s11.nii.gz").read_bytes()[:3000])
    assert predict(folder, folder / "whole" / "p.csv") == 2
    table = pd.read_csv(folder / "whole" / "p.csv")
    assert len(table) == SCANS - 2 and table.Warning.notna().sum() > 5 and not part_paths(folder / "whole" / "p.csv")
    return folder


def flags(world, output, *more):
    return list(map(str, ["--mode", "predict", "--checkpoint", world / "run", "--input", world / "scans", "--output",
                          output, "--device", "cpu", *more]))  # fmt: skip


def predict(world, output, *more) -> int:
    return run_task2.main(flags(world, output, *more))


def same_as_whole(world, output: Path) -> bool:
    whole = world / "whole" / "p.csv"
    return all(output.with_name(f"{output.stem}{end}").read_bytes() == whole.with_name(f"p{end}").read_bytes()
               for end in (".csv", ".calibration.json"))  # fmt: skip


def names_kept(*outputs: Path) -> list[str]:
    return [line["name"] for output in outputs for path in part_paths(output) for line in read_lines(path)
            if "name" in line]  # fmt: skip


@pytest.fixture
def reads(monkeypatch):
    """`names` of the scans that are read; the one with the number `stop` ends the command, as Ctrl-C does."""
    original, reads = loading.read_volume, SimpleNamespace(names=[], stop=0)

    def reading(volume, shape):
        reads.names.append(volume.name)
        if len(reads.names) == reads.stop:
            raise KeyboardInterrupt
        return original(volume, shape)

    monkeypatch.setattr(loading, "read_volume", reading)
    return reads


# ---- killed


@contextmanager
def forked(folder: Path, disks: str, seconds: float, arguments: list[str]):
    with subprocess.Popen(
        [sys.executable, ROOT / "tests" / "fork_predict.py", str(seconds), disks, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
    ) as server:  # fmt: skip
        yield server


def start(server: subprocess.Popen, processes: int) -> list[int]:
    server.stdin.write(f"{processes}\n")
    server.stdin.flush()
    return [int(child) for child in server.stdout.readline().split()]


@pytest.mark.parametrize("disks", ["shared", "own"])
def test_processes_killed_at_random_moments_end_in_the_table_of_one(disks, world, tmp_path):
    """As torchrun does it: when one dies, all are ended and started again; on a disk that all see, as another number of
    them, too. On disks of their own no process sees another's rows."""
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    folders = [tmp_path / f"disk{rank}" for rank in range(4)] if disks == "own" else [tmp_path]
    outputs = [folder / "p.csv" for folder in folders]
    progress = [0]
    with forked(tmp_path, disks, 0.03, flags(world, "p.csv")) as server:
        for processes in (4, 4 if disks == "own" else moments.randrange(1, 4), 4):
            last = len(progress) == 3
            children = start(server, processes)
            more, end = moments.randrange(1, 6), time.monotonic() + 100
            while not last and len(names_kept(*outputs)) < progress[-1] + more and time.monotonic() < end:
                time.sleep(0.005)
            moments.shuffle(children)
            for child in () if last else children:
                os.kill(child, signal.SIGKILL)
                time.sleep(moments.uniform(0, 0.02))
            codes = server.stdout.readline().split()
            kept = names_kept(*outputs)
            assert len(set(kept)) == len(kept), f"seed {seed}: predicted twice"
            progress.append(len(kept))
    log = (tmp_path / "log.txt").read_text()
    assert sorted(codes) == ["0", "0", "0", "2"], f"seed {seed}: {log[-2000:]}"  # two cannot be read
    assert 0 < progress[1] < progress[2] < progress[3] == SCANS - 2, f"seed {seed}: {progress}"
    assert same_as_whole(world, outputs[0]) and not any(output.exists() for output in outputs[1:]), f"seed {seed}"
    assert f"2 of {SCANS} scans could not be read" in log and "are in part files of p.csv" in log


def test_a_row_that_a_kill_has_cut_is_predicted_again(tmp_path):
    """Wherever it was cut; what is appended afterwards stands on a line of its own."""
    scans = [Scan(name, tmp_path / name) for name in ("a.mha", "b.mha", "c.mha")]
    for scan in scans:
        scan.path.write_text(scan.name)
    row = ScanRow(np.float32([0.1, 1 / 3]), "a note; another")

    def parts() -> PartFiles:
        return PartFiles(tmp_path / "p.csv")

    def left(found: PartFiles) -> list[str]:
        return [scan.name for scan in found.start({"dtype": "float32"}, scans)]

    first = parts()
    assert left(first) == ["a.mha", "b.mha", "c.mha"]
    for name in ("a.mha", "b.mha"):
        first.append(name, row)
    whole = first.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 3 and left(parts()) == ["c.mha"]
    ends = {len(b"".join(lines[:number])) for number in (1, 2, 3)}
    for end in sorted({*range(0, len(whole), 23), *ends, *(end - 1 for end in ends)}):
        first.path.write_bytes(whole[:end])
        found = parts()
        here = sum(end >= len(b"".join(lines[:number])) - 1 for number in (2, 3))
        assert left(found) == ["a.mha", "b.mha", "c.mha"][here:], end
        if here:
            kept = found.rows["a.mha"]
            assert kept.probabilities.tobytes() == row.probabilities.tobytes() and kept.warning == row.warning
        found.append("c.mha", row)
        found.file.close()
        assert "c.mha" not in left(parts()), end
    first.path.write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        parts()
    assert part_paths(tmp_path / "p.csv") == [] and first.path.read_text() == "mine"


# ---- interrupted


def test_an_interrupted_command_goes_on_where_it_was(world, tmp_path, reads, capsys):
    output = tmp_path / "p.csv"
    reads.stop = 9
    assert predict(world, output) == 130 and not output.exists()
    kept = names_kept(output)
    assert 3 <= len(kept) <= 8
    said = f"Interrupted: kept in {part_path(output)}: {len(kept)} scans; the same command goes on from there"
    assert said in capsys.readouterr().err
    reads.names, reads.stop = [], 0
    assert predict(world, output) == 2
    out, err = capsys.readouterr()
    assert f"Going on: {len(kept)} of {SCANS} scans are in part files of {output}, {SCANS - len(kept)} left" in out
    assert sorted(reads.names + kept) == sorted(path.name for path in (world / "scans").iterdir())
    assert same_as_whole(world, output) and not part_paths(output)
    assert "skipped: s03.nii.gz: found an empty file" in err


@pytest.fixture
def few(world, tmp_path):
    """Copies: run/, and scans/ of five scans, in this order: s00 to s02, a_series, s04."""
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.copytree(world / "scans" / "series", tmp_path / "scans" / "a_series")
    (tmp_path / "scans" / "last").mkdir()
    for name in ("s00", "s01", "s02", "last/s04"):
        shutil.copy2(world / "scans" / f"{Path(name).name}.nii.gz", tmp_path / "scans" / f"{name}.nii.gz")
    return tmp_path


def other_scale(folder, command):
    command.append("--uncalibrated")


def other_reading(folder, command):
    command.append("--assume-hu")


def other_model(folder, command):
    model = CTCLIPMultiAbnormalityModel.from_pretrained(folder / "run")
    model.classifier.bias.data += 1
    shutil.rmtree(folder / "run")
    model.save_pretrained(folder / "run")


def other_thresholds(folder, command):
    command += ["--objective", "f1"]


def other_time(folder, command):
    os.utime(folder / "scans" / "s00.nii.gz", (1, 1))


def other_file(folder, command):
    shutil.copy(folder / "scans" / "s02.nii.gz", folder / "scans" / "s00.nii.gz")


def other_slice(folder, command):
    os.utime(sorted((folder / "scans" / "a_series").iterdir())[-1], (1, 1))


def other_folder(folder, command):
    shutil.copytree(folder / "scans", folder / "copies")
    command[command.index("--input") + 1] = str(folder / "copies")


ALL = ["s00.nii.gz", "s01.nii.gz", "s02.nii.gz", "a_series"]
CHANGES = dict.fromkeys((other_scale, other_reading, other_model, other_thresholds, other_folder), ALL)
CHANGES |= {other_time: ALL[:1], other_file: ALL[:1], other_slice: ALL[3:]}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_rows_that_may_be_others_are_predicted_again(change, few, reads):
    """Of five scans, four of which were done."""
    command, output = flags(few, few / "p.csv"), few / "p.csv"
    reads.stop = 5
    assert run_task2.main(command) == 130 and names_kept(output) == ALL
    change(few, command)
    reads.names, reads.stop = [], 0
    assert run_task2.main(command) == 0
    assert reads.names == [*CHANGES[change], "s04.nii.gz"]
    resumed = output.read_bytes()
    assert run_task2.main(command) == 0 and output.read_bytes() == resumed


def test_a_scan_counts_as_done_once_its_heat_maps_are_written(few, tmp_path, monkeypatch, capsys, reads):
    """And as long as they are there."""
    command = flags(few, few / "p.csv", "--explain", "Emphysema")
    assert run_task2.main(command) == 0
    whole = {path: path.read_bytes() for path in (tmp_path / "p_explain").rglob("*") if path.is_file()}
    told = capsys.readouterr().out
    assert len(whole) == 5 * 4
    shutil.rmtree(tmp_path / "p_explain")
    written, original = [], predictions.write_scan_heat_maps

    def full(maps, folder, note):
        if len(written) == 2:
            raise OSError(28, "No space left on device", str(folder))
        written.append(folder)
        return original(maps, folder, note)

    monkeypatch.setattr(predictions, "write_scan_heat_maps", full)
    assert run_task2.main(command) == 2
    assert names_kept(tmp_path / "p.csv") == ["s00.nii.gz", "s01.nii.gz"]
    shutil.rmtree(tmp_path / "p_explain" / "s00")
    monkeypatch.setattr(predictions, "write_scan_heat_maps", original)
    reads.names.clear()
    capsys.readouterr()
    assert run_task2.main(command) == 0
    assert reads.names == ["s00.nii.gz", "s02.nii.gz", "a_series", "s04.nii.gz"]
    assert {path: path.read_bytes() for path in whole} == whole
    assert capsys.readouterr().out.splitlines()[1:] == told.splitlines()  # after what was taken up


def test_torchrun_s_restarts_try_only_again_what_failed(world, tmp_path, monkeypatch, reads):
    """It starts again whatever ends with an error: rows stay until its last attempt, and none is predicted twice."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    for attempt, (read, parts) in enumerate([(SCANS, 1), (2, 0)]):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        reads.names.clear()
        assert predict(world, tmp_path / "p.csv") == 2
        assert len(reads.names) == read and len(part_paths(tmp_path / "p.csv")) == parts
        assert same_as_whole(world, tmp_path / "p.csv")


def test_a_page_begins_anew_and_its_rows_serve_a_table(world, tmp_path, reads, capsys):
    reads.stop = 6
    assert predict(world, tmp_path / "p.html") == 130
    assert f"a page begins anew, --output {tmp_path / 'p.csv'} goes on from there" in capsys.readouterr().err
    kept = names_kept(tmp_path / "p.csv")
    reads.names, reads.stop = [], 0
    assert kept and predict(world, tmp_path / "p.csv") == 2
    assert not set(kept) & set(reads.names) and same_as_whole(world, tmp_path / "p.csv")


def test_two_runs_as_one_go_on_as_well(few, world, reads):
    """Their probabilities are float64, and theirs is no run folder."""
    command = flags(few, few / "whole.csv")
    command.insert(command.index("--checkpoint") + 2, str(world / "run"))
    other_model(few, command)
    assert run_task2.main(command) == 0
    command[command.index("--output") + 1] = str(few / "p.csv")
    reads.names, reads.stop = [], 5
    assert run_task2.main(command) == 130 and names_kept(few / "p.csv") == ALL
    reads.names, reads.stop = [], 0
    assert run_task2.main(command) == 0 and reads.names == ["s04.nii.gz"]
    assert (few / "p.csv").read_bytes() == (few / "whole.csv").read_bytes()


# ---- --shard


@pytest.fixture(scope="module")
def shards(world, tmp_path_factory):
    """Three parts, each of a machine of its own."""
    folder = tmp_path_factory.mktemp("shards")
    for part in (1, 2, 3):
        assert predict(world, folder / str(part) / "p.csv", "--shard", f"{part}/3") == (0 if part == 3 else 2)
    return [part_path(folder / str(part) / "p.csv", f"{part}of3") for part in (1, 2, 3)]


def test_parts_are_merged_into_the_table_of_one_process(world, shards, tmp_path, capsys):
    assert all(path.is_file() for path in shards)
    assert merge.main([str(tmp_path / "p.csv"), *map(str, shards[::-1])]) == 2
    out, err = capsys.readouterr()
    assert same_as_whole(world, tmp_path / "p.csv")
    assert f"Wrote {tmp_path / 'p.csv'}: {SCANS - 2} scans, model run; calibrated probabilities" in out
    assert err.count("skipped: ") == 2 and f"2 of {SCANS} scans could not be read" in err


def test_a_part_goes_on_and_says_how_it_becomes_a_table(world, tmp_path, capsys, reads):
    reads.stop = 3
    assert predict(world, tmp_path / "p.csv", "--shard", "3/3") == 130
    part = part_path(tmp_path / "p.csv", "3of3")
    kept = names_kept(tmp_path / "p.csv")
    assert merge.main([str(tmp_path / "q.csv"), str(part)]) == 2
    assert f"{part}: found a part with {len(kept)} scan" in capsys.readouterr().err and kept
    reads.names, reads.stop = [], 0
    assert predict(world, tmp_path / "p.csv", "--shard", "3/3") == 0
    assert len(reads.names) == 5 - len(kept) and not (tmp_path / "p.csv").exists()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next, with all parts")]
    words = line.partition("merge ")[2].split()
    assert words == [str(tmp_path / name) for name in ("p.csv", *(f"p.part.{i}of3.jsonl" for i in (1, 2, 3)))]


def edited(path: Path, target: Path, change) -> str:
    """A copy of a part, its lines changed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    target.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
    return str(target)


def with_identity(key, value):
    def change(lines):
        identity = lines[0]["identity"] | {key: value}
        return [line | ({"identity": identity} if "identity" in line else {}) | {"of": identity_digest(identity)}
                for line in lines]  # fmt: skip

    return change


def with_end(**values):
    return lambda lines: [line | {"finished": line["finished"] | values} if "finished" in line else line
                          for line in lines]  # fmt: skip


def with_s00(lines):
    """A row of the first part's in place of s01's."""
    return json.loads(json.dumps(lines).replace("s01.nii.gz", "s00.nii.gz"))


REFUSED = {
    "model": (with_identity("model", {"model.safetensors": "0"}), "found another model than in"),
    "scale": (with_identity("form", "uncalibrated"), "found another form than in"),
    "findings": (with_identity("findings", ["a"]), "found another findings than in"),
    "scans": (with_end(names="0"), "found a part of other scans"),
    "parts": (with_end(count=4), "found a part of other scans, or of 4 parts"),
    "twice": (with_end(index=0), "found part 1, 1, 3 of 3, expected each once"),
    "overlap": (with_s00, "found parts that share scans or lack some"),
    "no row": (lambda lines: lines[:1] + lines[2:], "found no row of 's01.nii.gz'"),
    "no end": (lambda lines: lines[:-1], "and no end, expected a finished one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_belong_together_are_refused(case, shards, tmp_path, capsys):
    change, said = REFUSED[case]
    second = edited(shards[1], tmp_path / "second.jsonl", change)
    assert merge.main([str(tmp_path / "p.csv"), str(shards[0]), second, str(shards[2])]) == 2
    err = capsys.readouterr().err
    assert said in err and one_line(err) and not (tmp_path / "p.csv").exists()


def test_a_part_that_is_missing_or_none_is_one_line(shards, tmp_path, capsys):
    (tmp_path / "table.csv").write_text("VolumeName\n")
    for parts, said in ((shards[:2], "found part 1, 2 of 3, expected each once"),
                        ([tmp_path / "table.csv"], "found no rows of predictions"),
                        ([tmp_path / "nowhere"], "found no rows of predictions")):  # fmt: skip
        assert merge.main([str(tmp_path / "p.csv"), *map(str, parts)]) == 2
        err = capsys.readouterr().err
        assert said in err and one_line(err) and not (tmp_path / "p.csv").exists()


@pytest.mark.parametrize(
    ("name", "shard", "torchrun", "said"),
    [("p.html", "1/2", None, "found a page for several processes"),
     ("p.html", None, "2", "found a page for several processes"),
     ("p.json", "1/2", None, "found --shard 1/2 for a .json, expected a .csv"),
     ("p.answers.json", "1/2", None, "found --shard 1/2 for a .json, expected a .csv"),
     ("p.csv", "3/2", None, "found --shard 3/2, expected I/N"),
     ("p.csv", "1/2", "2", "found --shard 1/2 with torchrun")],
)  # fmt: skip
def test_what_several_processes_cannot_write_is_refused(name, shard, torchrun, said, world, tmp_path, monkeypatch,
                                                        capsys):  # fmt: skip
    if torchrun:
        monkeypatch.setenv("WORLD_SIZE", torchrun)
    assert predict(world, tmp_path / name, *(["--shard", shard] if shard else [])) == 2
    err = capsys.readouterr().err
    assert said in err and one_line(err) and list(tmp_path.iterdir()) == []
