"""Writes docs/flags.md, every flag of every command, from the commands' own parsers:

    python docs/make_flags.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ctclip import config  # noqa: E402  (found through the path above)
from ctclip.hub.__main__ import hub_parser  # noqa: E402
from ctclip.inference.merge import merge_parser  # noqa: E402
from ctclip.phantoms.__main__ import phantom_parser  # noqa: E402
from ctclip.recipes import NOT_MEASURED, RECIPES  # noqa: E402
from ctclip_setup import setup_parser  # noqa: E402

FLAGS = ROOT / "docs" / "flags.md"
HEAD = """# Flags

Every flag of every command, made from their parsers by `python docs/make_flags.py`. `--help` shows the usual ones,
`--help-all` every one, `--version` the version. A flag that a command would not look at is refused.
"""


RECIPES_HEAD = f"""What `--recipe NAME` sets; other flags win. Published figures are on test sets that differ: they
compare no recipe with another. {NOT_MEASURED}"""


def parsers() -> dict[str, argparse.ArgumentParser]:
    return {
        "run_task2.py": config.task_parser(""),
        "ctclip_setup.py": setup_parser(),
        "ctclip_training.py": config.training_parser(""),
        "ctclip_evaluation.py": config.evaluation_parser(),
        "python -m ctclip.inference.merge": merge_parser(),
        "python -m ctclip.hub": hub_parser(),
        "python -m ctclip.phantoms": phantom_parser(),
    }


def rows(parser: argparse.ArgumentParser) -> list[str]:
    """A table for each group of flags, and one for each subcommand."""
    lines = []
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if not isinstance(action, argparse._SubParsersAction)
                 and not {"--help", "--help-all", "--version"} & set(action.option_strings)]
        if shown:
            lines += ["", f"| {group.title} | |", "|---|---|", *map(row, shown)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                lines += ["", f"### {name}", *rows(command)]
    return lines


def row(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    value = ""
    if action.option_strings and action.nargs != 0:
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
        value = str(action.metavar or choices) + (" ..." if action.nargs == "+" else "")
    text = (action.help or "") % {"default": action.default, "prog": ""}
    cell = f"`{name} {value}`" if value else f"`{name}`"
    return f"| {cell.replace('|', chr(92) + '|')} | {text.replace('|', chr(92) + '|')} |"


def recipe(name: str) -> str:
    what = RECIPES[name]
    return f"""
### {name}

{what.what[0].upper()}{what.what[1:]}. Source: {what.source}. Published: macro AUROC {what.published}.
Differs: {what.differs}.

    {" ".join(config.flags_of(what.settings))}"""


def flags_page() -> str:
    """The page's text."""
    parts = [HEAD]
    for command, parser in parsers().items():
        parts.append("\n".join([f"\n## {command}", *rows(parser)]))
    parts.append("\n".join(["\n## Recipes", "", RECIPES_HEAD, *map(recipe, RECIPES)]))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FLAGS.write_text(flags_page(), encoding="utf-8")
    print(f"Wrote {FLAGS.relative_to(ROOT)}")
