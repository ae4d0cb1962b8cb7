"""Results in a notebook: a report that the notebook's own styles do not reach, predictions with a row for each finding.

    from ctclip_evaluation import show
    show("results/RUN")
    show_scan("scans/a.nii.gz", "out/p_explain/a/Emphysema.nii.gz")    # slices to scroll through, by ipyniivue
"""

from __future__ import annotations

import sys
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from ctclip.errors import UserError
from ctclip.evaluation.run_folder import PAGE
from ctclip.evaluation.runs import INDEX
from ctclip.paths import script
from ctclip_model import WINDOWS

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


def show_scan(scan: str | Path, heat_map: str | Path | None = None, window: str = "lung", height: int = 500) -> Any:
    """A viewer of a .nii or .nii.gz file, `height` pixels high, with a heat map over it, if one is named: the last line
    of a cell displays what this returns. window: one of WINDOWS.

    Raises UserError without the package ipyniivue, and where a file is missing.
    """
    if window not in WINDOWS:
        raise UserError(f"found window {window!r}, expected one of {', '.join(WINDOWS)}; choose one")
    for path in (scan, heat_map):
        if path is not None and not Path(path).is_file():
            raise UserError(f"{path}: found no such file, expected one to show; check the path")
    try:
        ipyniivue = import_module("ipyniivue")
    except ModuleNotFoundError as error:
        raise UserError("found no package ipyniivue, expected it to show scans in a notebook; install it: "
                        "pip install ipyniivue, or look at the page of --mode predict --output answers.html") from error
    level, width = WINDOWS[window]
    volumes = [{"path": str(scan), "cal_min": level - width / 2, "cal_max": level + width / 2}]
    if heat_map is not None:  # whose own header says where its colours end
        volumes.append({"path": str(heat_map), "colormap": "warm", "opacity": 0.5})
    viewer = ipyniivue.NiiVue(height=height)
    viewer.load_volumes(volumes)
    return viewer


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
