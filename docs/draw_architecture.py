"""The suite's import graph, read with ast (imports in functions and under TYPE_CHECKING count too), and its picture.

    python docs/draw_architecture.py            writes docs/images/architecture.png

tests/test_architecture.py checks the same graph.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "ctclip_model"
# From the bottom up. A module may import from its own layer and from those below it.
LAYERS = ("version", "model", "ground", "data", "phantoms", "evaluation", "inference", "training", "hub",
          "environment", "scripts")  # fmt: skip


def find_modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file, of the scripts at the top and of everything in the package."""
    files = [*root.glob("*.py"), *root.glob("ctclip/**/*.py")]
    names = {file: ".".join(file.relative_to(root).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in sorted(names.items()) if name != "noxfile"}


def layer_of(module: str) -> str:
    package, *parts = module.split(".")
    if package != "ctclip":
        return "model" if package == MODEL else "scripts"
    if not parts:
        return "version"
    return parts[0] if parts[0] in LAYERS else "ground"


def imported_names(tree: ast.AST, package: str) -> set[str]:
    """Every dotted name that a file of `package` imports; `from a import b` gives a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def import_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules among `modules` that it imports."""
    graph = {}
    for module, file in modules.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        names = imported_names(ast.parse(file.read_text(encoding="utf-8")), package)
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (found & modules.keys()) - {module}
    return graph


def layer_edges(graph: dict[str, set[str]]) -> dict[tuple[str, str], int]:
    """(importing layer, imported layer) -> how many imports of modules there are."""
    edges: dict[tuple[str, str], int] = {}
    for module, imported in graph.items():
        for pair in ((layer_of(module), layer_of(other)) for other in imported):
            if pair[0] != pair[1]:
                edges[pair] = edges.get(pair, 0) + 1
    return edges


def description(graph: dict[str, set[str]]) -> str:
    """What the picture shows, as text; kept in it, so that a test can tell an old picture from a new one."""
    pairs = ", ".join(f"{source} -> {goal}" for source, goal in sorted(layer_edges(graph)))
    return f"modules: {', '.join(sorted(graph))}; imports: {pairs}"


# ---- the picture: layers as boxes, one above the other. From each box a line of its own colour runs down on the right;
# where a dot joins it to the line into another box, a module of the one imports a module of the other.

WIDTH, LINE, GAP, PAD, TRACK = 66.0, 2.1, 2.4, 1.3, 3.5  # in the drawing's units, 102 to its width
LETTERS = 104  # in one line of a box
INK, GREY = "#1f2933", "#66727f"
COLOURS = ("#2a78d6", "#b04a00", "#00796b", "#8e44ad", "#b8860b", "#c2185b", "#4b6043", "#5d4037", "#455a64")
FILLS = {"scripts": "#dbeafe", "model": "#fdebd0"}
TITLES = {"scripts": "scripts", "model": "ctclip_model.py", "ground": "ctclip/*.py"}
PURPOSES = {
    "scripts": "What a user starts.",
    "ground": "What every part uses; all but device_cost, distributed and shard without torch.",
}


def purpose_of(layer: str) -> str:
    """The first sentence of the docstring of the layer's module or package."""
    file = ROOT / (f"{MODEL}.py" if layer == "model" else f"ctclip/{layer}/__init__.py")
    if layer in PURPOSES:
        return PURPOSES[layer]
    return re.split(r"\.\s", ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")[0]


def draw(graph: dict[str, set[str]], target: Path) -> None:
    from textwrap import wrap

    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    layers = LAYERS[:0:-1]
    members: dict[str, list[str]] = {layer: [] for layer in layers}
    for module in graph:
        layer = layer_of(module)
        if layer != "version" and module not in (MODEL, f"ctclip.{layer}") and "__main__" not in module:
            members[layer].append(module.removeprefix("ctclip." if layer == "ground" else f"ctclip.{layer}."))
    purposes = {layer: wrap(purpose_of(layer).rstrip(".") + ".", LETTERS) for layer in layers}
    lists = {layer: wrap(",  ".join(members[layer]), LETTERS) for layer in layers}
    boxes, top = {}, -4.0  # layer -> (bottom, top)
    for layer in layers:
        bottom = top - 2 * PAD - LINE * (len(purposes[layer]) + len(lists[layer]) + 0.9)
        boxes[layer], top = (bottom, top), bottom - GAP

    figure = Figure(figsize=(9.5, 9.5 * (2 - top) / 102), dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-2, 100), ylim=(top, 2))
    axes.axis("off")
    axes.text(0, 0, "From each box a line runs down; a dot joins it to a box that it imports from.", va="top", size=9,
              color=INK)  # fmt: skip
    for layer, (bottom, upper) in boxes.items():
        axes.add_patch(FancyBboxPatch((0, bottom), WIDTH, upper - bottom, "round,pad=0,rounding_size=0.7",
                                      facecolor=FILLS.get(layer, "#eef2f5"), edgecolor=GREY, linewidth=0.8))
        axes.text(1.5, upper - PAD, TITLES.get(layer, f"ctclip/{layer}/"), va="top", size=9.5, weight="bold", color=INK)
        for number, line in enumerate(purposes[layer] + lists[layer]):
            color = INK if number < len(purposes[layer]) else GREY
            axes.text(1.5, upper - PAD - LINE * (number + 1.15), line, va="top", size=7.8, color=color)

    edges = {pair for pair in layer_edges(graph) if set(pair) <= boxes.keys()}
    tracks = {layer: WIDTH + TRACK * number for number, layer in enumerate(LAYERS[1:])}  # the lowest one nearest
    for layer, (bottom, upper) in boxes.items():
        importers = [tracks[source] for source, goal in edges if goal == layer]
        if importers:
            ends = ((max(importers), bottom + PAD), (WIDTH, bottom + PAD))
            axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, color=GREY,
                                           linewidth=0.8))  # fmt: skip
        dots = [boxes[goal][0] + PAD for source, goal in edges if source == layer]
        if dots:
            color, x = COLOURS[LAYERS.index(layer) - 2], tracks[layer]
            axes.plot([WIDTH, x, x], [upper - PAD, upper - PAD, min(dots)], color=color, linewidth=1.4)
            axes.plot([x] * len(dots), dots, "o", color=color, markersize=5, zorder=3)
    figure.savefig(target, metadata={"Description": description(graph)})


if __name__ == "__main__":
    draw(import_graph(find_modules()), ROOT / "docs" / "images" / "architecture.png")
