"""Every script at the edges of a terminal: a closed pipe, ASCII, Ctrl-C, `python -I`, a notebook's environment.

Checked in processes: what is printed (nothing, or one line) and the exit code.
"""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ctclip.cli import PIPE_CLOSED
from ctclip.paths import module_environment

SUITE = Path(__file__).resolve().parent.parent
SCRIPTS = ("run_task2", "ctclip_training", "ctclip_evaluation", "ctclip_setup", "ctclip_model")
MODULES = ("ctclip.hub", "ctclip.phantoms")


def command(script, *flags, python=(sys.executable,)):
    start = ["-m", script] if "." in script else [str(SUITE / f"{script}.py")]
    return [*python, *start, *flags]


def run(folder, script, *flags, python=(sys.executable,), **variables):
    return subprocess.run(
        command(script, *flags, python=python),
        cwd=folder, env=module_environment() | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def into_closed_pipe(folder, start, **variables):
    """(exit code, stderr) of a command whose reader ends before its first line, as `| head -0` may."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = module_environment() | {"PYTHONUNBUFFERED": ""} | variables
    done = subprocess.run(start, cwd=folder, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    return done.returncode, done.stderr.decode()


# ---- `| head -1`


@pytest.mark.parametrize("script", [*SCRIPTS, *MODULES])
def test_help_whose_reader_is_gone_ends_quietly(script, tmp_path):
    assert into_closed_pipe(tmp_path, command(script, "--help")) == (PIPE_CLOSED, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_is_gone_ends_quietly(unbuffered, tmp_path):
    start = command("ctclip.phantoms", "--data-dir", "D", "--train", "1", "--valid", "1", "--workers", "1")
    code, said = into_closed_pipe(tmp_path, start, PYTHONUNBUFFERED=unbuffered)
    assert code == PIPE_CLOSED and "Error" not in said and "Errno" not in said  # but for the progress bar
    assert (tmp_path / "D" / "phantom.json").is_file()


def test_errors_and_output_into_one_closed_pipe(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    start = command("run_task2", "--mode", "predict")
    done = subprocess.run(start, cwd=tmp_path, env=module_environment(), stdout=writer, stderr=writer, timeout=120)
    os.close(writer)
    assert done.returncode in (2, PIPE_CLOSED)


# ---- an ASCII terminal


@pytest.mark.parametrize("script", [*SCRIPTS, *MODULES])
def test_help_and_wrong_flags_on_an_ascii_terminal(script, tmp_path):
    assert run(tmp_path, script, "--help", PYTHONIOENCODING="ascii").returncode == 0
    done = run(tmp_path, script, "--\u00fc", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_path_with_an_umlaut_on_an_ascii_terminal(tmp_path):
    flags = ["--data-dir", "Universit\u00e4t", "--train", "1", "--valid", "1", "--workers", "1"]
    done = run(tmp_path, "ctclip.phantoms", *flags, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith("Universit\\xe4t: 1 training and 1 validation phantoms")


# ---- Ctrl-C while modules are imported


@pytest.mark.parametrize("script", [*SCRIPTS, *MODULES])
@pytest.mark.parametrize("module", ["argparse", "urllib.parse", "torch"])
def test_ctrl_c_during_the_imports_is_no_traceback(script, module, tmp_path):
    """In place of the signal, at a moment of its own: a module of that name which is interrupted at once."""
    flags = {"ctclip_model": [], "ctclip_setup": ["--doctor"], "ctclip.hub": ["weights", "x.pt"]}.get(script, [])
    flags += {"ctclip.phantoms": ["--data-dir", "D"], "ctclip_evaluation": ["--example"]}.get(script, [])
    path = tmp_path / "first" / (module.replace(".", "/") + ".py")
    path.parent.mkdir(parents=True)
    path.write_text("raise KeyboardInterrupt")
    if module == "urllib.parse":
        path.with_name("__init__.py").touch()
    done = run(tmp_path, script, *flags, PYTHONPATH=f"{path.parents[module.count('.')]}{os.pathsep}{SUITE}")
    assert "Traceback" not in done.stderr and "File" not in done.stderr
    if module != "torch" or script == "ctclip_model":
        assert (done.returncode, done.stderr, done.stdout) == (-signal.SIGINT, "", "")
    elif script not in ("ctclip_setup", "ctclip.phantoms"):  # which import torch in other processes, or never
        assert done.returncode == 130 and done.stderr.startswith("\nInterrupted: ") and done.stderr.count("\n") == 2


# ---- python -I, and a notebook's environment


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["-I", "-P"])
def test_isolated_python_finds_the_suite(script, flag, tmp_path):
    if flag == "-P" and sys.version_info < (3, 11):
        pytest.skip("from Python 3.11 on")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command(script, "--version", python=(sys.executable, flag)),
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("ctclip ")


NOTEBOOKS = "module://matplotlib_inline.backend_inline"
DRAW = """
import os, sys
from ctclip.evaluation import figures
figures.write_figure(figures.new_figure(2, 2), figures.Path("x.png"), None)
import matplotlib
print(matplotlib.rcParams["backend"].lower(), os.environ.get("MPLBACKEND"))
"""


@pytest.mark.parametrize(
    ("backend", "after"),
    [
        (NOTEBOOKS, NOTEBOOKS if find_spec("matplotlib_inline") else "agg"),  # which this interpreter may lack
        ("no such backend", "agg"),
        ("svg", "svg"),  # one that it has stays the user's
    ],
)
def test_pictures_are_drawn_whatever_backend_the_environment_names(backend, after, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DRAW],
        cwd=tmp_path, env=module_environment() | {"MPLBACKEND": backend}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{after} {backend}\n" and (tmp_path / "x.png").stat().st_size > 100


def test_every_import_of_matplotlib_comes_after_the_backend_is_chosen():
    """In the product, `import_matplotlib` or a figure is there first."""
    first = {"ctclip/evaluation/figures.py", "ctclip/evaluation/case_slices.py"}
    found = set()
    for path in (SUITE / "ctclip").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "\n    from matplotlib" in text or "\n        import matplotlib" in text:
            found.add(path.relative_to(SUITE).as_posix())
            assert "import_matplotlib" in text or "new_figure" in text
    assert found == first


# ---- torchrun's variables


@pytest.mark.parametrize(
    ("script", "variables", "told"),
    [("run_task2", {"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' in the environment"),
     ("ctclip_training", {"WORLD_SIZE": "2"}, "found no group of processes to join"),
     ("ctclip_training", {"RANK": "3"}, "RANK=3: found it beside WORLD_SIZE=1")],
)  # fmt: skip
def test_variables_that_torchrun_has_not_set_are_one_line(script, variables, told, tmp_path):
    flags = ("--mode", "quick_test") if script == "ctclip_training" else ()
    done = run(tmp_path, script, *flags, "--train-volumes", "2", "--valid-volumes", "2", **variables)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
