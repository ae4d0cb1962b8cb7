"""Numbers and lists as text, and the aligned rows that setup prints. Standard library only."""

from __future__ import annotations

import re
import textwrap
from typing import Iterable  # noqa: UP035  (ctclip_setup must get as far as its Python check)

WIDTH, INDENT, TIED = 100, 12, "\u00a0"  # TIED: a space at which no line is broken


def print_row(label: str, text: str) -> None:
    """One aligned entry of at most 100 columns; its further lines keep its own indentation, number or [seconds]."""
    hanging = " " * len(re.sub(r"^( *(?:\d\. |\[[ \d]+ s\] )?).*", r"\1", text, flags=re.DOTALL))
    body = textwrap.wrap(
        text, WIDTH - INDENT, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
    )
    for number, line in enumerate(body):
        print(f"{label if number == 0 else '':<{INDENT}}{line}".replace(TIED, " "), flush=True)


def plural(count: int, noun: str) -> str:
    """plural(1, "volume") -> "1 volume", plural(3000, "volume") -> "3000 volumes"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def comma_separated(items: Iterable) -> str:
    return ", ".join(str(item) for item in items)


def size_text(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
