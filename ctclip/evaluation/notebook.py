"""Results in a notebook: a report that the notebook's own styles do not reach, predictions with a row for each finding.

    from ctclip_evaluation import show
    show("results/RUN")
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from ctclip.errors import UserError
from ctclip.evaluation.run_folder import PAGE
from ctclip.evaluation.runs import INDEX
from ctclip.paths import script

MOST_SCANS = 10  # columns that fit beside each other


def show(results: str | Path | pd.DataFrame, height: int = 800) -> None:
    """Displays the report of a run or of an evaluation's folder, or the page of `--mode runs`, `height` pixels high, or
    the table that `predict` returns, turned on its side. Outside of a notebook it prints where the page is, or the
    table.

    Raises UserError where the folder has no report.
    """
    if isinstance(results, pd.DataFrame):
        _show_table(results)
        return
    page = Path(results)
    if page.is_dir():
        page = page / (INDEX if (page / INDEX).is_file() and not (page / PAGE).is_file() else PAGE)
    if not page.is_file():
        raise UserError(f"{page}: found no such file, expected a report; evaluate the run first: "
                        f"python {script('ctclip_evaluation.py')} --checkpoint {results}")
    style = f"width: 100%; height: {height}px; border: 0"
    content = escape(page.read_text(encoding="utf-8"))
    _display(f'<iframe sandbox="allow-scripts" srcdoc="{content}" style="{style}"></iframe>', f"Report: {page}")


def _show_table(table: pd.DataFrame) -> None:
    turned = table.iloc[:MOST_SCANS].T
    more = f"The first {MOST_SCANS} of {len(table)} scans" if len(table) > MOST_SCANS else ""
    html, text = (write(float_format="{:.2f}".format) for write in (turned.to_html, turned.to_string))
    _display(html + (f"<p>{more}</p>" if more else ""), "\n".join(filter(None, (text, more))))


def _display(html: str, text: str) -> None:
    ipython: Any = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        print(text)
    else:
        ipython.display.display({"text/html": html, "text/plain": text}, raw=True)
