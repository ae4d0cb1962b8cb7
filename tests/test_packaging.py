"""The wheel against the tree: what it holds, what it asks for, and that modules and commands work from it, installed
nowhere near the checkout. Built offline, with the setuptools at hand. `nox -s package` does the same by way of pip.
"""

import configparser
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import ctclip
from ctclip.environment.packages import parse_requirements

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("ctclip_setup", "ctclip_model", "ctclip_training", "ctclip_evaluation", "run_task2")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for pattern in ("*.py", "ctclip", "models", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        for path in ROOT.glob(pattern):
            if path.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "ctclip_*fine.*", "ctclip_zeroshot.*")  # 1.8 GB each
                shutil.copytree(path, source / path.name, ignore=ignore)
            else:
                shutil.copy(path, source)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    done = subprocess.run([sys.executable, "-c", BUILD, folder], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def of_wheel(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as file:
        return file.read(f"{wheel.name.split('-py3')[0]}.dist-info/{name}").decode()


def test_the_wheel_holds_the_scripts_the_package_and_the_demo_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    listed = subprocess.run(["git", "ls-files", "ctclip"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert len(listed) > 40
    assert held == {*listed, *(f"{script}.py" for script in SCRIPTS), "ctclip/demo/ctclip_demo.pt"}


def test_the_wheel_asks_for_what_requirements_txt_names(wheel):
    metadata = message_from_string(of_wheel(wheel, "METADATA"))
    assert metadata["Version"] == ctclip.__version__
    runtime, development = parse_requirements((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    asked = metadata.get_all("Requires-Dist")
    assert parse_requirements("\n".join(line for line in asked if "ctclip-task2" not in line)) == (runtime, development)
    assert len(runtime) > 10 and len(development) > 8
    extras = {line.split('extra == "')[1].split('"')[0] for line in asked if "extra" in line}
    assert extras == set(metadata.get_all("Provides-Extra")) == {"prompts", "dicom", "onnx", "tensorboard", "dev"}


def test_modules_demo_and_commands_work_from_the_wheel(wheel, tmp_path):
    """Unpacked is installed, for a wheel of Python files; the commands are called as the ones that pip writes do."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()

    def run(program: str, *arguments: str) -> str:
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {program}"]
        done = subprocess.run([*command, *arguments], cwd=tmp_path / "elsewhere", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    answer = run("import ctclip, ctclip_model, run_task2; print(ctclip.__file__, ctclip_model.DEMO_PATH);"
                 "ctclip_model.CTCLIPMultiAbnormalityModel(ctclip_model.DEMO_PATH)")
    assert all(Path(path).is_relative_to(tmp_path / "site") for path in answer.split())
    commands = configparser.ConfigParser()
    commands.read_string(of_wheel(wheel, "entry_points.txt"))
    assert len(commands["console_scripts"]) == 4
    for name, target in commands["console_scripts"].items():
        module, function = target.split(":")
        call = f"import {module}; sys.argv[0] = {name!r}; sys.exit({module}.{function}())"
        assert run(call, "--version") == f"ctclip {ctclip.__version__}\n"
        assert run(call, "--help").startswith(f"usage: {name} ")
