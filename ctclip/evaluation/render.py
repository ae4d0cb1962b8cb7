"""A report's sections (report.py) as text for the terminal, as Markdown, and as report.html, a single file that fetches
nothing. Names of volumes, files and settings come from tables that anyone may have written: jinja2 escapes them, and
the page's policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby, zip_longest
from operator import attrgetter
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from ctclip.errors import UserError
from ctclip.evaluation import report
from ctclip.evaluation.cases import Case
from ctclip.evaluation.figures import SWEEP_CURVES, check_matplotlib
from ctclip.evaluation.report import Block, Cell, Paragraph, Section, Table, flat
from ctclip.fileio import replacing
from ctclip.formatting import WIDTH, metric_text

TEMPLATE = Path(__file__).with_name("report.html")
TEXT_SECTIONS = ("data", "ensemble", "per_label", "clinical", "net_benefit_table", "calibration", "thresholds",
                 "threshold_table", "comparison", "subgroups", "baseline", "limits", "criteria")
PAGE_SECTIONS = ("headline", "criteria", "baseline", "ensemble", "comparison", "sweep", "thresholds", "per_label",
                 "clinical", "roc", "precision_recall", "reliability", "net_benefit", "net_benefit_table", "rates",
                 "training", "calibration", "subgroups", "cases", "limits", "files", "settings")


def format_report(metrics: Mapping) -> str:
    """The whole report of an evaluation's metrics (or of a metrics.json read back): at most WIDTH columns."""
    sections, parts = report.report_sections(metrics), []
    for section in (sections[key] for key in TEXT_SECTIONS if key in sections):
        lines, after_table = [section.title.upper()], False
        for block in section.blocks:
            lines += [""] if after_table else []
            after_table = isinstance(block, Table)
            if isinstance(block, Table):
                lines += _table_text(block)
            elif isinstance(block, Paragraph):
                lines += textwrap.wrap(block.text, WIDTH)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _table_text(table: Table) -> list[str]:
    if not table.columns:
        facts = [(flat(name), flat(value)) for name, value in table.rows]
        width = max(len(name) for name, _ in facts) + 4
        return [line for name, value in facts
                for line in textwrap.wrap(f"{name:<{width}}{value}", WIDTH, subsequent_indent=" " * width)]
    indent = "  " if any(len(row) == 1 for row in table.rows) else ""
    rows = [[flat(row[0])] + [""] * (len(table.columns) - 1) if len(row) == 1
            else [indent + flat(row[0]), *map(flat, row[1:])] for row in table.rows]
    columns = list(zip(table.columns, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if len(_fitting(widths)) > 1:  # headings over several lines
        widths = [max(map(len, [*title.split(), *cells])) for title, *cells in columns]
    lines: list[str] = []
    for chosen in _fitting(widths):
        titles = [textwrap.wrap(table.columns[i], widths[i])[::-1] for i in chosen]
        header = list(zip_longest(*titles, fillvalue=""))[::-1]
        lines += [""] if lines else []
        for line in (*header, ["-" * widths[i] for i in chosen], *([row[i] for i in chosen] for row in rows)):
            aligned = (cell.rjust(widths[i]) for i, cell in zip(chosen[1:], line[1:], strict=True))
            lines.append("  ".join([line[0].ljust(widths[0]), *aligned]).rstrip())
    return lines


def _fitting(widths: Sequence[int]) -> list[list[int]]:
    """Columns that fit beside each other, the first in each group, as it names the row."""
    groups = [[0]]
    for i in range(1, len(widths)):
        if sum(widths[j] + 2 for j in groups[-1]) + widths[i] > WIDTH:
            groups.append([0])
        groups[-1].append(i)
    return groups


def markdown(blocks: Iterable[Block]) -> str:
    """Paragraphs and tables; figures have no place in a model card."""
    parts = []
    for block in blocks:
        if isinstance(block, Paragraph):
            parts.append(f"**{_escaped(block.text)}**" if block.warning else _escaped(block.text))
        elif isinstance(block, Table) and not block.columns:
            parts.append("\n".join(f"- {_escaped(name)}: {_escaped(value)}" for name, value in block.rows))
        elif isinstance(block, Table):
            others = len(block.columns) - 1
            lines = [[*map(_escaped, block.columns)], ["---", *["--:"] * others]]
            lines += [[f"**{_escaped(row[0])}**", *[""] * others] if len(row) == 1 else [*map(_escaped, row)]
                      for row in block.rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _escaped(cell: Cell) -> str:
    return re.sub(r"\s+", " ", flat(cell).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|"))


def write_page(
    path: Path, metrics: Mapping, labels: np.ndarray, probabilities: np.ndarray, calibrated: np.ndarray,
    history: list[dict] | None, record: Mapping, cases: Sequence[Case],
) -> None:
    """Writes report.html, whole or not at all. Arrays (N, L) as evaluated. `history` is log.jsonl's list of epochs,
    `record` the content of a run's run.json, {} without a run."""
    data = report.data_name(record)
    sections = report.report_sections(metrics)
    sections |= report.figure_sections(metrics, labels, probabilities, calibrated, history)
    sections["settings"] = report.settings_section(metrics, record)
    if cases:
        lead = ("Per label, the volumes whose calibrated probability lies farthest on the wrong side of the threshold, "
                "some with an axial and a coronal slice: to tell a wrong label from a wrong model. Click a slice to "
                "enlarge it. Evidence is what adds most to the label's logit; the finding need not lie there. The "
                "command below a picture makes the whole heat map; files of CT-RATE's version 1 have none, as they "
                "cannot be read without the metadata table. Run it in the folder where the evaluation was started; of "
                "a cohort or run that was named by an absolute path only the last folder is shown, so add what comes "
                "before it.")
        sections["cases"] = Section("cases", "Worst errors", [Paragraph(lead)])
    if (files := report.files_section(path.parent)) is not None:
        sections["files"] = files
    beside = {key: name for key, name in report.FILE_OF_SECTION.items() if (path.parent / name).is_file()}
    facts = [*report.data_facts(metrics), ("Written", f"{datetime.now():%Y-%m-%d %H:%M}")]
    if data:
        facts.insert(0, ("Data", data))
    by_label = {label: list(own) for label, own in groupby(cases, attrgetter("label"))}  # they are in that order
    text = page_template(TEMPLATE.name).render(
        title=f"CT-CLIP evaluation{f', {data}' if data else ''}", facts=Table("Data", (), facts), note=metrics["note"],
        sections=[sections[key] for key in PAGE_SECTIONS if key in sections], cases=by_label,
        files=beside,
        curves=[(key, name, metric_text(metrics["at_0.5"][key], key)) for key, name, _ in SWEEP_CURVES],
        slider=report.slider_data(metrics, labels, probabilities, calibrated),
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def check_report_parts() -> None:
    """Raises UserError where the page or the figures could not be made in the end."""
    if not TEMPLATE.is_file():
        raise UserError(f"{TEMPLATE}: found no such file, expected the report's page; copy the folder ctclip again")
    check_matplotlib()


def page_template(name: str, folder: Path = TEMPLATE.parent) -> jinja2.Template:
    """A page of a folder of the package, with the filters that it may use."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )
    environment.filters |= {
        "typeset": _typeset,
        "typeset_interval": _typeset_interval,
        "sha256": lambda script: base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "base64": lambda content: base64.b64encode(content).decode(),
        "drawing": Markup,  # figures.svg's text, in which matplotlib has escaped names
    }
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment.get_template(name)


def _typeset(cell: Cell) -> Markup | str:
    """Minus signs and arrows; an interval in small, with a dash."""
    if not isinstance(cell, str):
        small = Markup(" <small>{}</small>").format(_typeset_interval(cell.interval)) if cell.interval else ""
        return Markup("{}{}").format(_typeset(cell.text), small)
    return re.sub(r"(?<![\w.)-])-(?=[\d ])", "\N{MINUS SIGN}", cell.replace("->", "\N{RIGHTWARDS ARROW}"))


def _typeset_interval(interval: str) -> str:
    return _typeset(re.sub(r"(?<=\d)-(?=\d)", "\N{EN DASH}", interval))
