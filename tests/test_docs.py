"""Every command and every import that the documents show is one that the code takes.

Checked: commands in code blocks and inline code of all Markdown files, by the parsers of the scripts themselves; files
and folders that pytest and python are given; names in `from ... import ...` lines. Nothing is run.
"""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import make_flags
import make_notebook
import pytest
import yaml
from torch.distributed.run import get_args_parser

import ctclip_setup
from ctclip import config
from ctclip.data.feature_cache import merge_parser
from ctclip.evaluation.tables import read_labels
from ctclip.hub.__main__ import hub_parser
from ctclip.inference import merge
from ctclip.phantoms.__main__ import phantom_parser
from ctclip_model import ABNORMALITIES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(path for folder in (".", "docs", "docker") for path in (ROOT / folder).glob("*.md"))
PARSERS = {
    "ctclip_training.py": config.training_parser("").parse_args,
    "ctclip_evaluation.py": config.evaluation_parser().parse_args,
    "run_task2.py": config.task_parser("").parse_args,
    "ctclip_setup.py": ctclip_setup.parse_options,
    "ctclip.data.feature_cache": merge_parser().parse_args,
    "ctclip.inference.merge": merge.merge_parser().parse_args,
    "ctclip.hub": hub_parser().parse_args,
    "ctclip.phantoms": phantom_parser().parse_args,
}
START = re.compile(r"^!?(?:\$ )?(?:[A-Z_]+=\S+ )*(?:python3?|torchrun|pytest)\s")


def commands(text: str) -> list[str]:
    """Lines of code blocks, continued lines joined, and inline code, that start a Python program."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    outside = re.sub(r"^```[a-z]*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", outside)]
    parts = [part.strip() for line in lines for part in re.split(r"\s&&\s|\s+#\s", line)]
    return [part for part in parts if START.match(part)]


def check(command: str) -> None:
    words = shlex.split(command.lstrip("!$ "))
    while "=" in words[0]:  # an environment variable
        del words[0]
    program, *rest = words
    if program == "torchrun":
        launched = get_args_parser().parse_args(rest)
        rest = ["-m"] * launched.module + [launched.training_script, *launched.training_script_args]
    if rest[:1] == ["-m"]:
        program, *rest = rest[1:]
    elif program != "pytest":
        program, *rest = rest
    if program == "pytest":
        missing = [word for word in rest if word.startswith("tests/") and not (ROOT / word.split("::")[0]).exists()]
        assert not missing
    elif program in PARSERS:
        # a bare "..." stands for further flags, one after a flag for its value
        PARSERS[program]([word for before, word in zip(["", *rest], rest, strict=False)
                          if word != "..." or before.startswith("--")])
    elif program.endswith(".py"):
        assert (ROOT / program).is_file()
    else:
        assert program in ("pip", "venv", "nox") or importlib.util.find_spec(program)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_taken_by_the_scripts(path, capsys):
    wrong = []
    for command in commands(path.read_text(encoding="utf-8")):
        try:
            check(command)
        except (SystemExit, AssertionError, ValueError) as error:
            wrong.append(f"{command}: {error or ''} {capsys.readouterr().err.strip()}")
    assert not wrong, "\n".join(wrong)


def test_the_notebook_has_the_cells_of_the_guide():
    """It is made from them; every command in it is one that the scripts take, every cell Python that compiles."""
    cells = json.loads(make_notebook.NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert make_notebook.NOTEBOOK.read_text(encoding="utf-8") == make_notebook.notebook(), "run docs/make_notebook.py"
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = [line.strip() for text in code for line in text.splitlines()]
    shown = [line for line in lines if line.startswith("!python ")]
    assert len([line for line in shown if "{" not in line]) == 5 and len(shown) == 8
    for line in shown:
        check(re.sub(r"\{EPOCHS\}", "8", line))
    for text in code:
        compile(re.sub(r"^(\s*)[!%].*", r"\1pass", text, flags=re.MULTILINE), "cell", "exec")


def test_the_cluster_examples_are_scripts_and_objects_whose_commands_are_taken():
    """Shell by bash -n, #SBATCH lines as options, YAML by a parser, commands by torchrun's and the scripts' parsers."""
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    blocks = {kind: re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for kind in ("bash", "yaml")}
    (batch,) = (script for script in blocks["bash"] if "#SBATCH" in script)
    for script in blocks["bash"]:
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    options = re.findall(r"^#SBATCH (.*)$", batch, re.MULTILINE)
    assert len(options) >= 5 and all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)
    launched = re.findall(r"^srun (torchrun .*)$", "".join(blocks["bash"]).replace("\\\n", " "), re.MULTILINE)
    assert len(launched) == 2 and f"srun {launched[0]}" in batch.replace("\\\n", " ")
    for command in launched:
        check(command.replace("$SLURM_NNODES", "4"))
    (objects,) = ([*yaml.safe_load_all(block)] for block in blocks["yaml"])
    service, job = {each["kind"]: each for each in objects}["Service"], objects[-1]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    check(shlex.join(container["command"]))
    spec, name = job["spec"], job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and service["metadata"]["name"] == name
    assert spec["completions"] == spec["parallelism"] == 4 and "--nnodes=4" in container["command"]
    assert spec["template"]["spec"]["subdomain"] == name
    assert f"--rdzv-endpoint={name}-0.{name}:29500" in container["command"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            wrong.append(link)
    assert not wrong


def test_the_page_of_flags_has_those_of_the_parsers():
    assert make_flags.FLAGS.read_text(encoding="utf-8") == make_flags.flags_page(), "run python docs/make_flags.py"


def test_the_label_table_of_the_guide_can_be_copied(tmp_path):
    guide = (ROOT / "CTCLIP_COLAB_README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^```text\n(VolumeName,.*?)^```", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "labels.csv").write_text(table)
    labels = read_labels(tmp_path / "labels.csv")  # PatientID is no finding
    findings = labels.frame[list(ABNORMALITIES)]
    assert findings.to_numpy().sum(axis=1).tolist() == [3, 4, 4] and len(labels.ids) == 3


def test_there_are_commands_to_check():
    found = {path: len(commands(path.read_text(encoding="utf-8"))) for path in DOCUMENTS}
    assert found[ROOT / "README.md"] > 20 and found[ROOT / "CTCLIP_COLAB_README.md"] > 10
    assert sum(found.values()) > 85, found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_that_are_imported_exist(path):
    text = path.read_text(encoding="utf-8")
    wrong = []
    for module, names in re.findall(r"^\s*from ((?:ctclip|run_task2)[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
        found = importlib.import_module(module)
        wrong += [f"{module}.{name}" for name in re.split(r",\s*", names.strip()) if not hasattr(found, name)]
    assert not wrong
