"""Writes ctclip_task2.ipynb from the cells of the guide, so that the two cannot differ:

    python docs/make_notebook.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "ctclip_task2.ipynb"
# Where this project is published: the only place. Whoever publishes a copy sets it and runs this script again.
REPOSITORY = "https://github.com/OWNER/ctclip-task2"

TITLE = """# CT-CLIP for VLM3D Task 2

[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})

Fine-tunes CT-CLIP on chest CT for the 18 abnormalities of CT-RATE. Run the cells from top to bottom; without data of
your own they use synthetic chests. **Results on phantoms are not clinical performance.** Explanations, and what each
cell prints, are in `CTCLIP_COLAB_README.md`."""

PROJECT = '''# Gets the project, where it is not here yet: an uploaded ctclip.zip, a folder on Drive, or its repository.
import os
import zipfile

REPOSITORY = "{repository}"  #@param {{type:"string"}}
DRIVE_FOLDER = ""  #@param {{type:"string"}}

def has_project(folder):
    return any(os.path.exists(f"{{folder}}/{{name}}") for name in ("ctclip_setup.py", "ctclip.zip"))

if DRIVE_FOLDER and not os.path.isdir("/content/drive"):
    from google.colab import drive
    drive.mount("/content/drive")
if not has_project("."):
    folder = DRIVE_FOLDER or "/content/ctclip-task2"
    if not has_project(folder) and "/OWNER/" in REPOSITORY:
        print("No project here: upload ctclip.zip or set REPOSITORY to its address, then run this cell again.")
    elif not has_project(folder):
        !git clone {{REPOSITORY}} {{folder}}
    if os.path.isdir(folder):
        %cd {{folder}}
if os.path.exists("ctclip.zip") and not os.path.exists("ctclip_setup.py"):
    try:
        zipfile.ZipFile("ctclip.zip").extract("ctclip_setup.py")  # the cell after next unpacks the rest
    except Exception as error:
        print(f"ctclip.zip is damaged ({{error}}): upload it again, then run this cell again.")'''

REPORT = '''# The report of the newest run, and a heat map of one scan.
from pathlib import Path
from IPython.display import Image, display
from ctclip_evaluation import show

reports = sorted(Path("results").glob("*/report.html"), key=lambda path: path.stat().st_mtime)
if reports:
    run, scan = reports[-1].parent, next(Path("data").rglob("valid_fixed/*/*/*.nii.gz"))
    out = "results/scan.csv"
    show(run)
    !python run_task2.py --mode predict --checkpoint {run} --input {scan} --output {out} --explain "Lung opacity"
    display(*(Image(str(path)) for path in sorted(Path("results/scan_explain").glob("*/Lung_opacity.png"))))
else:
    print("No report in results/ yet: run cells 3 and 4.")'''

OWN_DATA = '''# The same on volumes of your own, in CT-RATE's layout (the guide: "Your own data"). Drive is kept.
DATA_DIR = "/content/drive/MyDrive/ct_rate"  #@param {type:"string"}
RUN = "/content/drive/MyDrive/runs/first"  #@param {type:"string"}
EPOCHS = 8  #@param {type:"integer"}
if os.path.isdir(DATA_DIR):
    !python run_task2.py --data-dir {DATA_DIR} --output-dir {RUN} --epochs {EPOCHS}
else:
    print(f"no folder {DATA_DIR}: set DATA_DIR")'''

RESUME = '''# Goes on with a run that was interrupted.
if os.path.isdir(RUN):
    !python ctclip_training.py --resume {RUN}
else:
    print(f"no run in {RUN}")'''


def guide_cells(guide: str) -> list[tuple[str, str]]:
    """(kind, text) of the guide's five cells, each under its heading."""
    section = guide.split("\n## The five cells\n")[1].split("\n## ")[0]
    cells: list[tuple[str, str]] = []
    for heading, command in re.findall(r"^(\*\*\d\. .*?)\n\n```\n(!.*?)\n```", section, re.MULTILINE | re.DOTALL):
        cells += [("markdown", heading), ("code", command)]
    return cells


def secret_cell(guide: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)\n```", guide.split("\n## The five cells\n")[0], re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if "HF_TOKEN" in block)


def notebook() -> str:
    """The notebook's text, the same for the same guide."""
    guide = (ROOT / "CTCLIP_COLAB_README.md").read_text(encoding="utf-8")
    place = REPOSITORY.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{place}/blob/main/{NOTEBOOK.name}"
    cells = [
        ("markdown", TITLE.format(colab=colab)),
        ("code", PROJECT.format(repository=REPOSITORY)),
        ("markdown", "The weights of CT-CLIP need a Hugging Face token, stored as the Colab secret `HF_TOKEN`."),
        ("code", secret_cell(guide)),
        *guide_cells(guide),
        ("markdown", "**The report**"), ("code", REPORT),
        ("markdown", "**Your own data**"), ("code", OWN_DATA), ("code", RESUME),
    ]  # fmt: skip
    content = {
        "cells": [_cell(kind, text) for kind, text in cells],
        "metadata": {
            "accelerator": "GPU",
            "colab": {"name": NOTEBOOK.name, "provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, text: str) -> dict:
    cell = {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
    print(f"Wrote {NOTEBOOK.name}")
