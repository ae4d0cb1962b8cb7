"""The shape of the suite against its rules: what lies at the top, which way imports run, how long a file may be.

Imports are read with ast by docs/draw_architecture.py, those inside functions and under TYPE_CHECKING included.
"""

import ast
import graphlib
import re
import subprocess

import pytest
from draw_architecture import LAYERS, ROOT, description, find_modules, import_graph, layer_of

SCRIPTS = {"ctclip_setup", "ctclip_training", "ctclip_evaluation", "run_task2"}
TOP_LEVEL = {
    *(f"{script}.py" for script in SCRIPTS), "ctclip_model.py", "ctclip", "models", "results", "tests", "docker",
    "docs", ".ci", ".github", "requirements.txt", "pyproject.toml", "noxfile.py", ".gitignore", ".dockerignore",
    ".pre-commit-config.yaml", "README.md", "CTCLIP_COLAB_README.md", "LOG.md", "CONTRIBUTING.md", "CHANGELOG.md",
    "CITATION.cff", "LICENSE", "ctclip_task2.ipynb",
}  # fmt: skip
MOST_LINES = 800  # of a file; the model module is one file on purpose


@pytest.fixture(scope="module")
def graph():
    graph = import_graph(find_modules())
    assert SCRIPTS | {"ctclip_model", "ctclip"} <= graph.keys() and len(graph) > 40
    assert sum(map(len, graph.values())) > 100
    return graph


def test_no_imports_in_a_circle(graph):
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_import_points_upwards(graph):
    assert set(map(layer_of, graph)) == set(LAYERS)
    upwards = [
        f"{module} ({layer_of(module)}) imports {other} ({layer_of(other)})"
        for module, imported in graph.items()
        for other in sorted(imported)
        if LAYERS.index(layer_of(other)) > LAYERS.index(layer_of(module))
    ]
    assert not upwards, "\n".join(upwards)


def test_the_model_module_imports_no_other_module_of_the_suite(graph):
    assert graph["ctclip_model"] <= {"ctclip"}  # its version, for --version, where the package is there


def test_the_graph_counts_lazy_relative_and_type_checking_imports(tmp_path):
    (tmp_path / "ctclip" / "data").mkdir(parents=True)
    for name, text in {
        "a.py": "def f():\n    from ctclip.data import b\n",
        "ctclip/__init__.py": "",
        "ctclip/errors.py": "",
        "ctclip/data/__init__.py": "from .b import x\n",
        "ctclip/data/b.py": "if TYPE_CHECKING:\n    from . import c\n",
        "ctclip/data/c.py": "import ctclip.data.b, os\nfrom ..errors import UserError\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert import_graph(find_modules(tmp_path)) == {
        "a": {"ctclip.data.b"},
        "ctclip": set(),
        "ctclip.errors": set(),
        "ctclip.data": {"ctclip.data.b"},
        "ctclip.data.b": {"ctclip.data.c"},
        "ctclip.data.c": {"ctclip.data.b", "ctclip.errors"},
    }


def test_the_top_level_holds_what_it_should_and_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == TOP_LEVEL


def test_no_file_is_too_long():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in find_modules().items()}
    assert len(lines) > 40
    assert {name: n for name, n in lines.items() if n > MOST_LINES and name != "ctclip_model"} == {}


def test_the_picture_is_of_todays_imports(graph):
    from PIL import Image

    with Image.open(ROOT / "docs" / "images" / "architecture.png") as picture:
        assert picture.text["Description"] == description(graph), "run python docs/draw_architecture.py"


def test_the_page_on_architecture_names_what_is_there():
    """Of its table: files that exist, and names that the file named before them defines at its top level."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line for line in text.split("| to add |")[1].splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    checked = 0
    for row in rows:
        defined = None
        for name in re.findall(r"`([^`]+)`", row):
            if "/" in name or "." in name:
                assert (ROOT / name).exists(), f"{row}: no {name}"
                defined = names_in(ROOT / name) if name.endswith(".py") else None
            elif defined is not None and name.isidentifier():
                assert name in defined, f"{row}: no {name}"
                checked += 1
    assert checked > 15


def test_the_page_on_architecture_has_a_paragraph_on_every_part():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^\*\*`(ctclip[^`]*/)(?:\*\.py)?`\*\* · (.*?)\n\n", text, re.MULTILINE | re.DOTALL))
    packages = {f"ctclip/{layer}/" for layer in LAYERS if (ROOT / "ctclip" / layer).is_dir()}
    assert parts.keys() == packages | {"ctclip/"} and len(packages) == 7
    for folder, paragraph in parts.items():
        for name in re.findall(r"`(\w+\.py)`", paragraph):
            assert (ROOT / folder / name).exists() or (ROOT / name).exists(), f"no {folder}{name}"


def names_in(file):
    """What a module defines: at its top level, and in its classes (methods, attributes of self)."""
    names, tree = set(), ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names |= {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names |= {getattr(target, "name", getattr(target, "id", None)) for target in targets}
    return names
