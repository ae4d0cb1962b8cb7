"""All runs of a folder beside each other, from their run.json and metrics.json: as text, and as a page that compares
two.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from os.path import relpath
from pathlib import Path
from typing import Any

from ctclip.config import RUN_COLUMNS, SYNTHETIC_NOTE
from ctclip.errors import UserError
from ctclip.evaluation.render import page_template
from ctclip.evaluation.report import AUROCS, METRIC_ROWS, data_name
from ctclip.evaluation.run_folder import LOCK, PAGE, RECORDS, TABLES, is_run, run_record
from ctclip.evaluation.saved_ensemble import saved_ensemble
from ctclip.fileio import check_replaceable, check_writable, is_locked, read_json, replacing
from ctclip.formatting import decimal, interval_text, metric_text, percent
from ctclip.paths import script
from ctclip_model import CheckpointError, check_written

INDEX = "index.html"
GENERATOR = "ctclip runs"  # in the page, by which it is known as ours
HIGHEST_FIRST = ("auroc", "f1", "crg", "date")
TITLES = ("Run", "Date", "Status", "Data", "Model", "Head", "Loss", "Epochs", "AUROC (95 % CI)", "F1",
          "Positive (labels)", "CRG")  # fmt: skip
COLUMNS = dict(zip(RUN_COLUMNS, TITLES, strict=True))
COMMON = ("data", "model", "head", "loss", "epochs")  # of the text, said once where all runs have the same
UNKNOWN_CELL = "-"
NOT_RUNNING = "not running"  # nor finished: interrupted, or trained by another machine
# Of the text: columns whose cells may be shortened, each to no less than so many characters; and those that are left
# out, in this order, where that does not suffice.
SHORTENED = {"name": 16, "data": 8, "model": 8}
LEFT_OUT = ("loss", "epochs", "head", "crg", "f1", "data", "date")
DEFAULT_WIDTH = 120  # characters, of a list that is no terminal's


@dataclass(frozen=True)
class RunSummary:
    """A run, or its evaluation on another cohort. `record` is run.json's content, `metrics` metrics.json's, {} before
    an evaluation; `fault` says why either could not be read."""

    name: str
    folder: Path
    record: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    fault: str = ""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.record.get("config") or {}

    @property
    def written(self) -> datetime | None:
        times = [path.stat().st_mtime for name in (*RECORDS, "metrics.json") if (path := self.folder / name).is_file()]
        return datetime.fromtimestamp(max(times)) if times else None

    @property
    def status(self) -> str:
        if self.fault:
            return "unreadable"
        if str(self.record.get("status", "running")) == "running":
            run = self.folder.parent if self.folder.name.startswith("on_") else self.folder
            return "running" if is_locked(run / LOCK) else NOT_RUNNING
        return "evaluated" if self.metrics else "not evaluated"

    @property
    def compared_on(self) -> tuple:
        """What two evaluations have in common that can be compared: volumes and labels, by how many there are of each
        finding; and whether they are phantoms."""
        labels = tuple((name, row["positives"], row.get("known")) for name, row in self.metrics["per_label"].items())
        return self.metrics["n_volumes"], self.metrics["n_patients"], self.metrics["phantom"], labels

    def value(self, key: str) -> Any:
        """What --sort compares; None where there is nothing."""
        metrics, config = self.metrics, self.config
        values: dict[str, Callable[[], Any]] = {
            "name": lambda: self.name, "date": lambda: self.written, "status": lambda: self.status,
            "data": lambda: self.data, "model": lambda: config.get("model"), "loss": lambda: config.get("loss_type"),
            "head": lambda: config.get("head"), "epochs": lambda: config.get("epochs"),
            "auroc": lambda: metrics and metrics["at_0.5"]["auroc_macro"],
            "f1": lambda: metrics and metrics["tuned"]["f1_macro"], "crg": lambda: metrics and metrics["tuned"]["crg"],
            "positive_rate": lambda: metrics and metrics["tuned"]["positive_rate"],
        }  # fmt: skip
        found = values[key]()
        return None if found == {} else found

    def cells(self) -> dict[str, str]:
        """Each column as text."""
        cells = {key: UNKNOWN_CELL if (value := self.value(key)) is None else str(value) for key in COLUMNS}
        if self.written:
            cells["date"] = f"{self.written:%Y-%m-%d %H:%M}"
        if self.metrics:
            bounds = interval_text(self.metrics["intervals"]["at_0.5"]["auroc_macro"], "", 3)
            cells["auroc"] = decimal(self.value("auroc"), 3) + (f" ({bounds})" if bounds else "")
            cells["f1"], cells["crg"] = (decimal(self.value(key), 3) for key in ("f1", "crg"))
            rates = (percent(self.metrics["tuned"][key]) for key in ("positive_rate", "label_rate"))
            cells["positive_rate"] = "{} ({})".format(*rates)
        return cells


def list_runs(root: str | Path, sort: str = "date") -> list[RunSummary]:
    """Every run of a folder, and its evaluations on other cohorts, sorted; raises UserError where there is none."""
    folders = sorted(path.parent for path in Path(root).glob("*/run.json") if is_run(path.parent))
    if not folders:
        raise UserError(f"{root}: found no run, expected folders with run.json; train one with "
                        "'python ctclip_training.py --mode quick_test', or name another folder with --input")
    found = [_summary(folder.name, folder, folder) for folder in folders]
    for folder in folders:
        others = sorted(path.parent for path in folder.glob("on_*/metrics.json"))
        found += [_summary(f"{folder.name}/{other.name}", other, folder) for other in others]
    return sorted(found, key=lambda run: _sort_key(run, sort))


def _sort_key(run: RunSummary, key: str) -> tuple[bool, Any]:
    value = run.value(key)
    if value is not None and key in HIGHEST_FIRST:
        value = -(value.timestamp() if isinstance(value, datetime) else value)
    return value is None, 0 if value is None else value


def _summary(name: str, folder: Path, run: Path) -> RunSummary:
    record: dict[str, Any] = {}
    try:
        record = run_record(run)
        if (ensemble := saved_ensemble(run)) is not None:
            config = record.get("config", {}) | {"model": ensemble.description}
            record = record | {"config": config}
        metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
        check_written(folder / "metrics.json")
        data = data_name(record) if folder == run else folder.name.removeprefix("on_")
        summary = RunSummary(name, folder, record, metrics, data)
        summary.cells()
    except (UserError, CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return RunSummary(name, folder, fault=" ".join(str(error).split()) or type(error).__name__)
    return summary


def format_runs(runs: Sequence[RunSummary], width: int = DEFAULT_WIDTH) -> str:
    """A table of at most `width` characters; below it what all runs have in common, what was left out for the width,
    when runs that are not finished were last written, faults, and the note on phantoms."""
    rows = [run.cells() for run in runs]
    for run, row in zip(runs, rows, strict=True):  # to fit beside each other: the status where there are no results
        row["date"] = row["date"].partition(" ")[0]
        row["auroc"] = row["auroc"] if run.metrics else row["status"]
    common = [key for key in COMMON if len(runs) > 1 and len({row[key] for row in rows}) == 1]
    keys = [key for key in COLUMNS if key not in (*common, "status")]
    widths = _widths({key: max(len(COLUMNS[key]), *(len(row[key]) for row in rows)) for key in keys}, width)
    table = ["  ".join(_shortened(line[key], room).ljust(room) for key, room in widths.items()).rstrip()
             for line in (COLUMNS, *rows)]
    narrow = [COLUMNS[key].lower() for key in keys if key not in widths]
    left_out = [f"On the page, too wide for here: {', '.join(narrow)}"] if narrow else []
    faults = [f"{run.name}: {run.fault}" for run in runs if run.fault]
    notes = [f"Runs on phantoms are among them. {SYNTHETIC_NOTE}"] if any(_of_phantoms(run) for run in runs) else []
    same = [f"All: {', '.join(f'{COLUMNS[key].lower()} {rows[0][key]}' for key in common)}"] if common else []
    return "\n".join([*table, *same, *left_out, *_unfinished(runs), *faults, *notes])


def _widths(wanted: Mapping[str, int], most: int) -> dict[str, int]:
    """The columns that fit into `most` characters, two between each, and how wide they are."""
    widths = dict(wanted)
    for key in ("", *LEFT_OUT):
        widths.pop(key, None)
        if _total({key: min(SHORTENED.get(key, width), width) for key, width in widths.items()}) <= most:
            break
    while _total(widths) > most and (long := [key for key in widths if widths[key] > SHORTENED.get(key, widths[key])]):
        widths[max(long, key=widths.__getitem__)] -= 1
    return widths


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + 2 * (len(widths) - 1)


def _shortened(text: str, width: int) -> str:
    """The text without its middle, where it is longer than `width`."""
    if len(text) <= width:
        return text
    start = (width - 1) // 2
    return f"{text[:start]}..{text[len(text) - (width - 2 - start):]}"


def _unfinished(runs: Sequence[RunSummary]) -> list[str]:
    """A line for the runs that are not finished and that no process of this machine trains."""
    now = datetime.now()
    found = [f"{run.name} {_age(now - run.written)} ago" for run in runs if run.written and run.status == NOT_RUNNING]
    if not found:
        return []
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"Not finished, nor running on this machine (--resume continues one); last written: {', '.join(found[:3])}"
            f"{more}"]


def _age(passed: timedelta) -> str:
    minutes = max(0, round(passed.total_seconds() / 60))
    if minutes < 120:
        return f"{minutes} min"
    return f"{round(minutes / 60)} h" if minutes < 48 * 60 else f"{round(minutes / 1440)} d"


def _of_phantoms(run: RunSummary) -> bool:
    return bool(run.record.get("phantom"))


def check_index(path: Path) -> None:
    """Raises UserError, before any work, where a file is there that is not an index of ours."""
    check_replaceable(path, lambda path: GENERATOR in path.read_text(encoding="utf-8", errors="replace")[:2000],
                      "name another --output")


def write_index(path: Path, runs: Sequence[RunSummary]) -> None:
    """The page, whole or not at all: a table that can be sorted, links to reports, two runs beside each other."""
    kinds = list(dict.fromkeys(run.compared_on for run in runs if run.metrics))
    content = [
        {
            "name": run.name, "cells": list(run.cells().values()), "fault": run.fault,
            "order": [_plain(run.value(key)) for key in COLUMNS],
            "report": relpath(run.folder / PAGE, path.parent) if (run.folder / PAGE).is_file() else None,
            "results": _results(run), "settings": {key: _text(value) for key, value in run.config.items()},
            "kind": kinds.index(run.compared_on) if run.metrics else None, "phantom": _of_phantoms(run),
            "folder": shlex.quote(run.folder.as_posix()) if _can_be_compared(run) and not run.folder.is_absolute()
            else None,
        }
        for run in runs
    ]  # fmt: skip
    text = page_template("runs.html").render(
        columns=list(COLUMNS.values()), runs=content, generator=GENERATOR, note=SYNTHETIC_NOTE,
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _results(run: RunSummary) -> dict[str, str]:
    """What is compared of two runs: each metric as the report has it."""
    if not run.metrics:
        return {}
    half, tuned, intervals = run.metrics["at_0.5"], run.metrics["tuned"], run.metrics["intervals"]
    rows = [*((title, half, intervals["at_0.5"], key) for title, key in AUROCS),
            *((f"{title}, tuned", tuned, intervals["tuned"], key) for title, key in METRIC_ROWS if key != "label_rate")]
    found = {"Label rate": metric_text(half["label_rate"], "label_rate")}
    for title, values, bounds, key in rows:
        interval = interval_text(bounds[key], key)
        found[title] = metric_text(values[key], key) + (f" ({interval})" if interval else "")
    data = f"{run.data} (phantoms)" if run.metrics["phantom"] else run.data
    return {"Data": data, "Volumes": str(run.metrics["n_volumes"]), "Patients": str(run.metrics["n_patients"]), **found}


def _text(value: object) -> str:
    return {True: "yes", False: "no", None: "-"}[value] if value is None or isinstance(value, bool) else str(value)


def _plain(value: object) -> Any:
    return value.timestamp() if isinstance(value, datetime) else value


def comparison_command(runs: Sequence[RunSummary]) -> str | None:
    """What compares the two runs of the highest AUROC among those evaluated on the same volumes; None where no two
    were."""
    best: dict[tuple, list[RunSummary]] = {}
    for run in sorted(filter(_can_be_compared, runs), key=lambda run: _sort_key(run, "auroc")):
        best.setdefault(run.compared_on, []).append(run)
    pairs = [group[:2] for group in best.values() if len(group) > 1]
    if not pairs:
        return None
    first, second = (shlex.quote(run.folder.as_posix()) for run in pairs[0])
    return f"python {script('ctclip_evaluation.py')} --checkpoint {first} --baseline {second}"


def _can_be_compared(run: RunSummary) -> bool:
    """Whether --baseline takes it: a run's own evaluation, not one on another cohort."""
    has_tables = bool(run.metrics) and (run.folder / TABLES[0]).is_file()
    return has_tables and run.value("auroc") is not None and not run.folder.name.startswith("on_")


def runs_command(root: str | None, output: str | None, sort: str) -> None:
    """`--mode runs`: prints the list, and writes the page."""
    folder = Path(root or "results")
    page = Path(output or folder / INDEX)
    if page.suffix != ".html":
        raise UserError(f"{page}: found the ending {page.suffix or 'none'}, expected .html; rename it")
    check_index(page)
    check_writable(page.parent, "name another --output")
    runs = list_runs(folder, sort)
    print(format_runs(runs, shutil.get_terminal_size().columns if sys.stdout.isatty() else DEFAULT_WIDTH))
    write_index(page, runs)
    print(f"Wrote {page}: the same as a page, with links to the reports; tick two runs there to compare them")
    if (command := comparison_command(runs)) is not None:
        print(f"The two best, volume by volume, with intervals: {command}")
