"""Numbers and lists as text, numbers from text, and the aligned rows that setup prints. Standard library only."""

from __future__ import annotations

import re
import textwrap
from math import isfinite
from typing import Iterable, Sequence  # noqa: UP035  (ctclip_setup must get as far as its Python check)

# Of tqdm, with a unit such as " volumes": a slow rate too is one per second, where tqdm's own turns it into s/volumes.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
WIDTH, INDENT, TIED = 100, 12, "\u00a0"  # TIED: a space at which no line is broken


def print_row(label: str, text: str, indent: int = INDENT) -> None:
    """One aligned entry of at most 100 columns; its further lines keep its own indentation, arrow or number."""
    hanging = " " * len(re.sub(r"^( *(?:-> )?(?:\d\. )?).*", r"\1", text, flags=re.DOTALL))
    body = textwrap.wrap(
        text, WIDTH - indent, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
    )
    for number, line in enumerate(body):
        print(f"{label if number == 0 else '':<{indent}}{line}".replace(TIED, " "), flush=True)


def parse_number(text: str) -> float:
    """A finite decimal number as files write them. ValueError for all that Python's float() also takes: 1_0, nan,
    digits of other scripts."""
    if text.isascii() and "_" not in text and isfinite(float(text)):
        return float(text)
    raise ValueError("no decimal number")


def plural(count: int, noun: str, several: str | None = None) -> str:
    """plural(1, "volume") -> "1 volume", plural(3000, "volume") -> "3000 volumes"; `several`: if no s will do."""
    return f"{count} {noun}" if count == 1 else f"{count} {several or noun + 's'}"


def rate_text(per_second: float, noun: str) -> str:
    """rate_text(0.42, "volume") -> "0.42 volumes per second"; from 10 on whole numbers."""
    number = f"{per_second:.2g}" if per_second < 9.5 else f"{per_second:.0f}"
    return f"{number} {noun}{'' if number == '1' else 's'} per second"


def comma_separated(items: Iterable) -> str:
    return ", ".join(str(item) for item in items)


def size_text(count: float, digits: int = 2) -> str:
    """Bytes as text, in decimal units."""
    return f"{count / 1e9:.{digits}f} GB" if count >= 1e8 else f"{count / 1e6:.{digits}f} MB"


def duration(seconds: float) -> str:
    """duration(0.21) -> "0.21 s", duration(7300) -> "2.0 h"."""
    if seconds < 120:
        return f"{max(seconds, 1e-3):.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def decimal(value: float | None, digits: int = 4) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def metric_text(value: float | None, key: str = "", digits: int = 4) -> str:
    """In the form of the metric `key` of metrics.json: rates in percent."""
    return percent(value) if value is not None and key.endswith("_rate") else decimal(value, digits)


def change_text(value: float | None, key: str = "", digits: int = 4) -> str:
    """A difference, with its sign; of rates in percentage points."""
    if value is None:
        return "undefined"
    return f"{100 * value:+.1f} pts" if key.endswith("_rate") else f"{value:+.{digits}f}"


def interval_text(bounds: Sequence[float] | None, key: str = "", digits: int = 4) -> str:
    """low-high, of rates in percent; without unit, as it stands behind a value that has one. Empty for None."""
    if bounds is None:
        return ""
    scale, digits = (100, 1) if key.endswith("_rate") else (1, digits)
    return (" to " if min(bounds) < 0 else "-").join(f"{scale * bound:.{digits}f}" for bound in bounds)
