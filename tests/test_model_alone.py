"""`ctclip_model.py` works alone: copied into an empty folder, with nothing else of this project within reach.

Reference: the golden logits, and the file's own import statements as `ast` lists them.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
ALLOWED = {*sys.stdlib_module_names, "torch", "timm", "huggingface_hub", "safetensors"}
OPTIONAL = {"transformers", "tokenizers", "torchvision"}  # imported where used: prompts, video ResNets (timm brings it)

# An installed copy of this project must not help: its modules are made impossible to import, however they are found.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top == "run_task2" or (top.startswith("ctclip") and top != "ctclip_model"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""

PROGRAM = BLOCK + """
sys.path.insert(0, sys.argv[1])
import numpy, torch
from ctclip_model import (ABNORMALITIES, CTCLIPMultiAbnormalityModel, AggressiveFocalLoss, create_balanced_loss)

fixtures = sys.argv[2]
with numpy.load(f"{fixtures}/tiny_a_expected.npz") as file:
    volume, expected = (torch.from_numpy(file[key]) for key in ("volume", "classfine_logits"))
model = CTCLIPMultiAbnormalityModel(ctclip_path=f"{fixtures}/tiny_a_classfine.pt").eval()
with torch.no_grad():
    logits = model(volume)
torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
model.save_pretrained("saved")
again = CTCLIPMultiAbnormalityModel.from_pretrained("saved").eval()
with torch.no_grad():
    assert torch.equal(again(volume), logits) and again.labels == ABNORMALITIES
zeroshot = CTCLIPMultiAbnormalityModel(ctclip_path=f"{fixtures}/tiny_a_clip.pt").eval()
assert not zeroshot(volume).any() and "no vocabulary found" in zeroshot.load_report.no_prompts_reason

slices = CTCLIPMultiAbnormalityModel(ctclip_path=None, backbone="resnet18", attention="cbam", pretrained=False).train()
criterion = create_balanced_loss(alpha=0.85, gamma=4.0)
loss = criterion(slices(torch.rand(2, 3, 64, 64)), torch.eye(18)[:2])
loss.backward()
assert isinstance(criterion, AggressiveFocalLoss) and slices.classifier.weight.grad.any()
slices.save_pretrained("slices")
CTCLIPMultiAbnormalityModel.from_pretrained("slices")

ours = {name: module.__file__ for name, module in sys.modules.items() if name.startswith(("ctclip", "run_task2"))}
assert list(ours) == ["ctclip_model"] and ours["ctclip_model"].startswith(sys.argv[1]), ours
print("alone")
"""


@pytest.fixture
def alone(tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(ROOT / "ctclip_model.py", folder)
    return folder


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """In isolated mode: neither PYTHONPATH nor the user's packages, the working folder or the script's are searched."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, "-I", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_file_works_in_an_empty_folder(alone):
    done = run(alone, "-c", PROGRAM, alone, FIXTURES)
    assert (done.returncode, done.stdout) == (0, "alone\n"), done.stderr
    assert {path.name for path in alone.iterdir()} - {"__pycache__"} == {"ctclip_model.py", "saved", "slices"}


def test_its_command_runs_in_an_empty_folder(alone):
    start = f"import runpy\nsys.argv = ['ctclip_model.py', '--backbone', 'resnet18', '--no-pretrained']\n" \
            f"runpy.run_path({str(alone / 'ctclip_model.py')!r}, run_name='__main__')"  # fmt: skip
    done = run(alone, "-c", BLOCK + start)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" not here (no file ") == 4 and "Next:" not in done.stdout
    assert "1 of 5 variants is here and works: resnet18" in done.stdout
    assert "Slice variant resnet18" in done.stdout and "Loss test: 0.6931" in done.stdout


def test_the_block_blocks(alone):
    (alone / "ctclip.py").write_text("")
    done = run(alone, "-c", BLOCK + f"sys.path.insert(0, {str(alone)!r})\nimport ctclip")
    assert done.returncode == 1 and "ctclip is blocked" in done.stderr


def test_it_imports_what_it_may_and_nothing_else():
    tree = ast.parse((ROOT / "ctclip_model.py").read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.partition(".")[0], node.col_offset) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found.append((node.module.partition(".")[0], node.col_offset))
    assert {"torch", "timm", "huggingface_hub", "safetensors", "transformers"} <= {name for name, _ in found}
    assert [name for name, column in found if name not in ALLOWED and not (name in OPTIONAL and column)] == []
