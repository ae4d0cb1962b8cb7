"""ctclip_task2.ipynb, executed: all cells in a real kernel, from files uploaded flat, and the first cell by itself.

Reference: outputs that a user sees. Nothing in the cells is replaced; the `python` that they start makes the built-in
cohort smaller by the flags in SMALL, unless CTCLIP_SMALL is 0. No network: packages are here, and the hub is not.
"""

import base64
import io
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import make_notebook
import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from PIL import Image
from traitlets.config import Config

import ctclip_setup
from ctclip.environment.bundle import SCRIPTS, missing_files, write_bundle

ROOT = Path(__file__).resolve().parent.parent
COHORT = ["--train-volumes", "20", "--valid-volumes", "12"]
SMALL = {  # by the start of a command
    "ctclip_training.py": COHORT, "run_task2.py --model": [*COHORT, "--epochs", "2"],
    "ctclip_evaluation.py": ["--resamples", "100"],
}  # fmt: skip
PYTHON = """#!{executable}
import os, sys
command = " ".join(sys.argv[1:])
flags = [flags for start, flags in {small}.items() if command.startswith(start)]
os.execv({executable!r}, [{executable!r}, *sys.argv[1:], *(flags[0] if flags else [])])
"""


def upload(folder, *names):
    """Files as Colab's file pane puts them, beside the bundle."""
    folder.mkdir()
    write_bundle(folder / "ctclip.zip")
    for name in names:
        shutil.copy(ROOT / name, folder)
    return folder


def kernel_environment(folder):
    """`python` on the path is this interpreter; no token, no cache and no installed copy of this project."""
    start = folder / "bin" / "python"
    start.parent.mkdir()
    small = SMALL if os.environ.get("CTCLIP_SMALL") != "0" else {}
    start.write_text(PYTHON.format(executable=sys.executable, small=small))
    start.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|PYTHON|JUPYTER", name)}
    places = {"HOME": folder, "HF_HOME": folder / "hf", "IPYTHONDIR": folder / "ipython"}
    return kept | {name: str(place) for name, place in places.items()} | {
        "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PATH": f"{start.parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Source -> outputs of every code cell, executed in a folder that held the five scripts and ctclip.zip."""
    folder = tmp_path_factory.mktemp("notebook")
    environment = kernel_environment(folder)
    notebook = nbformat.read(make_notebook.NOTEBOOK, as_version=4)
    content = upload(folder / "content", *SCRIPTS)
    client = NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(content)}})
    client.execute(env=environment)  # raises where a cell does
    return {cell.source: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def only(cells, start):
    (found,) = [source for source in cells if start in source]
    return cells[found]


def text_of(outputs):
    """As a terminal shows it: of a line that was written over, the last state."""
    text = "".join(output.text for output in outputs if output.output_type == "stream").replace("\r\n", "\n")
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))


def data_of(outputs, kind):
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def test_the_cells_run_on_files_that_were_uploaded_flat(cells):
    """None fails, as the fixture has seen; what each prints is what it is for."""
    texts = {source: text_of(outputs) for source, outputs in cells.items()}
    assert len(texts) == 10 and not [text for text in texts.values() if "Traceback" in text]
    assert [source for source, text in texts.items() if "error: " in text] == [
        source for source in texts if "--model efficientnet_b0" in source  # whose weights are on the hub
    ]
    assert "no HF_TOKEN" in text_of(only(cells, "userdata.get"))
    setup = text_of(only(cells, "!python ctclip_setup.py"))
    assert re.search(r"bundle +\d+ of \d+ files of ctclip.zip unpacked", setup)
    assert "packages    all 12 are here" in setup and "works now   training, evaluation and prediction" in setup
    model = text_of(only(cells, "!python ctclip_model.py"))
    assert "CT-CLIP demo, volume" in model and "Output shape: (1, 18)" in model
    training = text_of(only(cells, "--mode quick_test"))
    assert re.search(r"^epoch +3/3 .*unfrozen", training, re.MULTILINE) and "Best epoch" in training
    assert "No --data-dir: using the built-in cohort of phantoms in data/phantoms_" in training
    (run,) = re.findall(r"^Next: python ctclip_evaluation.py --checkpoint (results/\S+)$", training, re.MULTILINE)
    evaluation = text_of(only(cells, "!python ctclip_evaluation.py"))
    assert run in evaluation and "AUROC macro" in evaluation and "Synthetic data" in evaluation
    assert "ImageNet weights of 'efficientnet_b0' could not be fetched" in text_of(only(cells, "--model efficientnet"))
    assert "set DATA_DIR" in text_of(only(cells, "DATA_DIR =")) and "no run in" in text_of(only(cells, "--resume"))


def test_the_report_is_in_a_frame_and_the_heat_map_is_a_picture(cells):
    outputs = only(cells, "show(run)")
    (frame,) = data_of(outputs, "text/html")
    assert frame.startswith("<iframe") and "srcdoc=" in frame and "&lt;html" in frame and len(frame) > 100_000
    (picture,) = data_of(outputs, "image/png")
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        assert min(image.size) > 200 and len(image.convert("RGB").getcolors(10**6)) > 100


def test_the_notebook_in_the_repository_holds_no_outputs():
    stored = nbformat.read(make_notebook.NOTEBOOK, as_version=4).cells
    code = [cell for cell in stored if cell.cell_type == "code"]
    assert len(code) == 10 and all(cell.outputs == [] and cell.execution_count is None for cell in code)


# ---- the first cell: where it gets the project from


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
    """Runs the first cell in a folder; -> the commands that it hands to the system. `replaced`: text -> text."""
    cell = next(cell for cell in nbformat.read(make_notebook.NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    commands: list[str] = []
    monkeypatch.setattr(type(shell), "system", lambda self, command: commands.append(self.var_expand(command, depth=1)))

    def run(folder, **replaced):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        source = cell.source.replace("/content/ctclip-task2", str(tmp_path / "clone"))
        for name, value in replaced.items():
            source, count = re.subn(rf'^{name} = ".*?"', f'{name} = "{value}"', source, flags=re.MULTILINE)
            assert count == 1
        assert shell.run_cell(source).success
        return commands

    return run


def test_a_project_that_is_here_is_used(first_cell, tmp_path, capsys):
    folder = upload(tmp_path / "content", *SCRIPTS)
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert first_cell(folder) == [] and sorted(folder.iterdir()) == before and capsys.readouterr().out == ""


def test_a_bundle_alone_is_enough(first_cell, tmp_path):
    """Setup, which the cell takes out of it, unpacks the rest."""
    folder = upload(tmp_path / "content")
    assert first_cell(folder) == []
    assert {path.name for path in folder.iterdir()} == {"ctclip.zip", "ctclip_setup.py"}
    ctclip_setup.unpack_bundle(folder)
    assert missing_files(folder) == []


def test_a_damaged_bundle_is_one_line(first_cell, tmp_path, capsys):
    for content in (b"<html>", b""):
        (tmp_path / "ctclip.zip").write_bytes(content)
        first_cell(tmp_path)
        said = capsys.readouterr().out
        assert said.startswith("ctclip.zip is damaged (") and said.count("\n") == 1


def test_a_folder_on_drive_is_mounted_and_made_the_current_one(first_cell, tmp_path, monkeypatch):
    mounted = []
    drive = SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=drive))
    folder = upload(tmp_path / "drive")
    assert first_cell(tmp_path / "content", DRIVE_FOLDER=folder) == [] and mounted == ["/content/drive"]
    assert Path.cwd() == folder and (folder / "ctclip_setup.py").is_file()


def test_without_a_project_its_address_has_to_be_set(first_cell, tmp_path, capsys):
    """As long as it is the placeholder; git would fail with a question for a user name."""
    assert first_cell(tmp_path / "content", REPOSITORY="https://github.com/OWNER/ctclip-task2") == []
    said = capsys.readouterr().out
    assert said.startswith("No project here: upload ctclip.zip or set REPOSITORY to its ") and said.count("\n") == 1

    address = "https://github.com/someone/ctclip-task2"
    assert first_cell(tmp_path / "content", REPOSITORY=address) == [f"git clone {address} {tmp_path / 'clone'}"]
    upload(tmp_path / "clone")
    first_cell(tmp_path / "content", REPOSITORY=address)
    assert Path.cwd() == tmp_path / "clone" and len(first_cell(tmp_path / "content")) == 1  # it is cloned once
