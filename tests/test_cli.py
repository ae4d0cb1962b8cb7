"""How every command ends, how flags are read, and numbers as text: by hand."""

import os
import re
import sys

import pytest
import torch
from tqdm import tqdm

from ctclip.cli import (
    INTERRUPTED,
    OUT_OF_GPU_MEMORY,
    OUT_OF_MEMORY,
    READER_LOST,
    OneLineParser,
    refuse_unused,
    run_cli,
)
from ctclip.config import evaluation_parser, task_parser, training_parser
from ctclip.errors import UserError
from ctclip.formatting import BAR, plural, rate_text, size_text
from ctclip.hub.__main__ import hub_parser
from ctclip.inference.predictor import MachineError, choose_device, choose_workers
from ctclip.memory import available_cpus
from ctclip.phantoms.__main__ import phantom_parser
from ctclip_model import CheckpointError
from ctclip_setup import setup_parser


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("found a,\n expected b; mend it"), "error: found a, expected b; mend it"),
        (CheckpointError("found x"), "error: found x"),  # of ctclip_model, which imports nothing of ours
        (FileNotFoundError(2, "No such file or directory", "a.csv"), "error: [Errno 2] No such file"),
        (MemoryError(), f"error: {OUT_OF_MEMORY}"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), f"error: {OUT_OF_GPU_MEMORY}"),
        (RuntimeError("CUDA error: out of memory"), f"error: {OUT_OF_GPU_MEMORY}"),
        (RuntimeError("could not create a primitive"), f"error: {OUT_OF_MEMORY}"),  # oneDNN's
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), f"error: {OUT_OF_MEMORY}"),
        (RuntimeError("std::bad_alloc"), f"error: {OUT_OF_MEMORY}"),
        (RuntimeError("can't start new thread"), f"error: {OUT_OF_MEMORY}"),
        (OSError(12, "Cannot allocate memory"), f"error: {OUT_OF_MEMORY}"),
        (CheckpointError("found a damaged file (Cannot allocate memory (os error 12))"), f"error: {OUT_OF_MEMORY}"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), f"error: {READER_LOST}"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), f"error: {READER_LOST}"),
        (BrokenPipeError(32, "Broken pipe"), "error: [Errno 32] Broken pipe"),  # of another process than the reader
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), f"error: {OUT_OF_MEMORY}"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(error, line, capsys):
    assert run_cli(raising(error)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(line) and printed.err.count("\n") == 1 and not printed.out


def test_a_defect_keeps_its_traceback():
    for error in (RuntimeError("shapes differ"), KeyError("x"), ValueError("y")):
        with pytest.raises(type(error)):
            run_cli(raising(error))


def test_interruption_says_how_to_go_on(capsys, monkeypatch):
    assert run_cli(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == f"\nInterrupted: {INTERRUPTED}\n"
    monkeypatch.setenv("RANK", "3")
    stop = KeyboardInterrupt("saved after step 7")
    stop.exit_code = 143
    assert run_cli(raising(stop)) == 143
    assert capsys.readouterr().err == "\n[rank 3] Interrupted: saved after step 7\n"


def test_exit_codes_of_actions():
    assert run_cli(lambda: None) == 0 and run_cli(lambda: 1) == 1


def test_given_flags_are_spelled_as_the_parser_spells_them():
    parser = OneLineParser()
    parser.add_argument("--output-dir")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(["--output_dir=x_y", "--seed", "0"])
    assert args.output_dir == "x_y" and args.given == ("--output-dir", "--seed")
    refuse_unused(args.given, {"--seed": ("a draw", True)})
    with pytest.raises(UserError, match="found --seed, which goes with a draw only"):
        refuse_unused(args.given, {"--seed": ("a draw", False)})


@pytest.mark.parametrize("parser", [task_parser(""), training_parser(""), evaluation_parser()])
def test_help_shows_the_usual_flags_and_help_all_every_one(parser, capsys):
    flags = {flag for flag in parser._option_string_actions if flag.startswith("--")}
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([option])
        assert stop.value.code == 0
        shown[option] = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.M))
    assert shown["--help-all"] == flags
    assert shown["--help"] == {*parser.usual, "--help", "--help-all"} < flags and len(shown["--help"]) < 20


def test_sizes_and_counts_as_text():
    assert size_text(1_770_000_000) == "1.77 GB" and size_text(123_456) == "0.12 MB"
    assert plural(1, "volume") == "1 volume" and plural(0, "volume") == "0 volumes"


def test_rates_as_text():
    rates = [rate_text(rate, "volume").removesuffix(" per second") for rate in (0.042, 0.5, 1.0, 1.04, 4.63, 9.6, 46.2)]
    assert rates == ["0.042 volumes", "0.5 volumes", "1 volume", "1 volume", "4.6 volumes", "10 volumes", "46 volumes"]


@pytest.mark.parametrize(("seconds", "said"), [(0.5, "4.00 volumes/s"), (8, "0.25 volumes/s")])
def test_a_bar_says_its_rate_per_second_also_where_it_is_slow(seconds, said):
    line = tqdm.format_meter(2, 9, seconds, prefix="encode", unit=" volumes", bar_format=BAR, ncols=80)
    assert line.startswith("encode:  22%|") and line.endswith(f"{said}]") and "| 2/9 [" in line


@pytest.mark.parametrize("address", ["hf-mirror.com", "someone:secret@mirror", "http://[bad", "https://mirror:99999"])
def test_an_endpoint_that_is_no_address_is_one_line_of_every_command(address, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert run_cli(lambda: None) == 2
    assert capsys.readouterr().err == (
        "error: found something else than an address in HF_ENDPOINT, expected https://HOST; correct it, or unset it "
        "for the hub itself\n"
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no working folder")
def test_a_working_folder_that_is_gone_is_one_line_of_every_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_cli(lambda: pytest.fail("torch would end the process")) == 2
    line = "error: found no working folder (No such file or directory), expected one; cd into a folder\n"
    assert capsys.readouterr().err == line
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "value", "good"), [
    ("TQDM_MININTERVAL", "abc", "7"), ("TQDM_NCOLS", "x", "7"), ("TQDM_BAR_FORMAT", "{no", "{l_bar}"),
])
def test_a_variable_that_tqdm_cannot_use_is_one_line_of_every_command(name, value, good, monkeypatch, capsys):
    for text in (value, good):
        monkeypatch.setenv(name, text)
        for module in [module for module in sys.modules if module.partition(".")[0] == "tqdm"]:
            monkeypatch.delitem(sys.modules, module)  # read when it is imported
        assert run_cli(lambda: None) == (2 if text == value else 0)
    err = capsys.readouterr().err
    assert err.startswith(f"error: found {name} with a value that progress bars cannot use (") and err.count("\n") == 1


@pytest.mark.parametrize(("flags", "line"), [
    (["--output-dir", ""], "found --output-dir without a value (an unset shell variable?), expected one"),
    (["--mode", "predict", "--input="], "found --input without a value"),
    (["--ctclip_path", " "], "found --ctclip-path without a value"),
    (["--resume", ""], "found --resume without a value"),  # not the newest run, as --resume alone
    (["--seed", "0", ""], "found an empty argument"),
    (["--epochs", "1_0"], "argument --epochs: found '1_0', expected a whole number"),
    (["--epochs", "\uff15"], "argument --epochs: found '\uff15', expected a whole number"),
    (["--seed", "1e3"], "argument --seed: found '1e3', expected a whole number"),
    (["--dropout", "0_1.5"], "argument --dropout: found '0_1.5', expected a finite number"),
    (["--alpha", "\u0660.5"], "argument --alpha: found"),
    (["--learning-rate", "nan"], "argument --learning-rate: found 'nan', expected a finite number"),
    (["--learning-rate", "inf"], "argument --learning-rate: found 'inf', expected a finite number"),
    (["--weight-decay", "inf"], "argument --weight-decay: found 'inf'"),
    (["--gamma", "inf"], "argument --gamma: found 'inf'"),
    (["--clip-norm", "1e999"], "argument --clip-norm: found '1e999', expected a finite number"),
    (["--save-minutes=Infinity"], "argument --save-minutes: found 'Infinity', expected a finite number"),
])
def test_flags_without_a_value_and_numbers_that_nobody_writes_are_refused(flags, line, capsys):
    with pytest.raises(SystemExit) as caught:
        task_parser("").parse_args(flags)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.startswith(f"error: {line}") and printed.count("\n") == 1


@pytest.mark.parametrize("parser", [evaluation_parser(), training_parser(""), setup_parser(), phantom_parser()])
def test_every_parser_refuses_an_empty_folder_and_an_underscore_in_a_number(parser, capsys):
    for flags in (["--data-dir", ""], ["--data-dir", "D", "--workers", "1_0"], ["--data-dir", "D", "--seed", "1_0"]):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(flags)
        assert caught.value.code == 2
    assert "found --data-dir without a value" in capsys.readouterr().err


def test_numbers_as_people_write_them():
    args = task_parser("").parse_args(["--epochs", "+3", "--alpha", " .5", "--gamma", "1e-1", "--learning-rate=3e-2"])
    assert (args.epochs, args.alpha, args.gamma, args.learning_rate) == (3, 0.5, 0.1, 0.03)
    assert task_parser("").parse_args(["--resume"]).resume == ""  # the newest


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full is Linux's")
def test_output_that_a_full_disk_does_not_take_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_cli(lambda: print("less than a buffer")) == 2
    assert capsys.readouterr().err.startswith("error: standard output: No space left on device; free space")


# ---- CPUs


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "max 100000"}, 16),
        ({"proc/self/cgroup": "0::/job/step", "sys/fs/cgroup/job/cpu.max": "250000 100000"}, 2.5),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/d", "sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "400000",
          "sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000"}, 4),
        ({"proc/self/cgroup": "4:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 16),
    ],
)  # fmt: skip
def test_cpus_are_those_of_the_process_and_its_cgroup(files, cpus, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)), raising=False)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert available_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("cpus", "processes", "readers"), [(16, 1, 8), (16, 8, 0), (64, 8, 8), (24, 8, 3), (2, 1, 0)])
def test_processes_of_torchrun_share_the_cpus(cpus, processes, readers, monkeypatch):
    monkeypatch.setattr("ctclip.inference.predictor.available_cpus", lambda: cpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert choose_workers(None) == readers and choose_workers(5) == 5


@pytest.mark.parametrize("name", ["meta", "meta:0", "mkldnn", "no_such", "cuda:77"])
def test_a_device_that_computes_nothing_is_one_line(name):
    with pytest.raises(MachineError, match=f"--device {name}: not usable here .*, expected cpu, cuda or cuda:N"):
        choose_device(name)
    assert choose_device("cpu").type == "cpu"


def test_a_second_input_is_refused_and_of_other_flags_the_last_one_counts(capsys):
    assert task_parser("").parse_args(["--seed", "1", "--seed", "2"]).seed == 2
    with pytest.raises(SystemExit) as caught:
        task_parser("").parse_args(["--mode", "predict", "--input", "a.nii.gz", "--input", "b.nii.gz"])
    assert caught.value.code == 2 and "found --input more than once" in capsys.readouterr().err


def test_a_flag_and_a_mode_that_another_script_has_are_named(capsys):
    with pytest.raises(SystemExit):
        training_parser("").parse_args(["--mode", "predict"])
    assert "found 'predict', a mode of run_task2.py, expected one of quick_test, full_train" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        hub_parser().parse_args(["card", "run", "--pushed", "a/b"])
    assert "(did you mean --push?); see --help" in capsys.readouterr().err
