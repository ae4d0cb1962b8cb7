"""How every command ends, how flags are read, and numbers as text: by hand."""

import pytest
import torch

from ctclip.cli import INTERRUPTED, OUT_OF_MEMORY, OneLineParser, refuse_unused, run_cli
from ctclip.errors import UserError
from ctclip.formatting import plural, size_text
from ctclip_model import CheckpointError


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
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), f"error: {OUT_OF_MEMORY}"),
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


def test_sizes_and_counts_as_text():
    assert size_text(1_770_000_000) == "1.77 GB" and size_text(123_456) == "0.12 MB"
    assert plural(1, "volume") == "1 volume" and plural(0, "volume") == "0 volumes"
