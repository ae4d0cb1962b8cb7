"""Every row of "fast and small": what was measured, the goal, pass or FAIL, as one table.

    python tests/benchmarks/all.py [--only encoder loading] [--compare results/benchmarks_2026-11-28_101500.json]

Runs the scripts one after the other, each in a process of its own; nothing else should keep the machine busy. One that
fails (15 minutes at most) is run once more, and if it fails again the table says why. The table is written as JSON too,
for --compare: each row then has its earlier figure, and what became worse is marked, by more than 10 % in a ratio or
25 % in seconds, bytes and rates, which compare on the same machine only. Needs Linux, 8 GB of memory and 3 GB in the
temporary folder. Exit code 1 where a goal is missed, an output is wrong or a script failed twice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rows import BENCHMARKS, Row, machine

from ctclip.cli import OneLineParser, run_cli
from ctclip.errors import UserError
from ctclip.fileio import make_folder, read_json, replacing

SCRIPTS = (
    "encoder", "unfrozen_step", "preprocessing", "readers", "predict_folder", "maps", "loading", "startup",
    "frozen_epoch", "volume_cache", "phantoms",
)  # fmt: skip
LIMIT_SECONDS = 900
# Two runs of the same code differ by 5 to 10 % in a ratio of times taken in turns, by more in seconds.
RATIOS, RATIO_NOISE, OTHER_NOISE = ("x", " times"), 0.10, 0.25


def cause_of(name: str, path: Path) -> str:
    """Runs a script, which writes its rows to `path`. Returns why it failed: "" if it did not."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", str(path)]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, stdout=sys.stderr, stderr=errors, start_new_session=True)
        try:
            code = process.wait(LIMIT_SECONDS)
            cause = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            cause += " (out of memory?)" if code == -signal.SIGKILL else ""
        except subprocess.TimeoutExpired:
            code, cause = None, f"not done after {LIMIT_SECONDS:g} s"
        finally:
            with suppress(ProcessLookupError):  # what it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        said = errors.read()
    print(said, end="", file=sys.stderr)
    if code in (0, 1) and rows_in(path):
        return ""
    cause = f"no rows, {cause}" if code in (0, 1) else cause
    return ": ".join([cause, *[line.strip() for line in said.splitlines() if line.strip()][-1:]])


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows in a script's file; none where it was not written, or not to its end."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return []


def measured(names: Sequence[str]) -> list[dict[str, Any]]:
    """What each script gave, in order: {"script", "failures", "rows"}; one that fails has two tries."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            failures = []
            for attempt in (1, 2):
                path = Path(folder, f"{name}_{attempt}.json")
                if not (cause := cause_of(name, path)):
                    break
                failures.append(cause)
            results.append({"script": name, "failures": failures, "rows": [] if cause else rows_in(path)})
    return results


def change(row: Row, earlier: Row) -> str:
    """Says by how much a row became worse; "" where it did not, or by no more than the noise."""
    noise = RATIO_NOISE if row.unit in RATIOS else OTHER_NOISE
    new, old = (row.measured, earlier.measured) if not row.at_least else (earlier.measured, row.measured)
    if new <= old * (1 + noise):
        return ""
    return f"worse by {100 * (new / old - 1):.0f} %" if old else "worse"


def table(results: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]] | None) -> str:
    """One line for each row, and one for each script without rows; `earlier`: results to compare with."""
    before = {row["what"]: Row(**row) for result in earlier or () for row in result["rows"]}
    lines = [("what", "goal", "before", "measured", "")]
    for result in results:
        for row in (Row(**fields) for fields in result["rows"]):
            old = before.get(row.what)
            notes = [row.verdict, change(row, old) if old else "", *(f"2nd try; 1st: {c}" for c in result["failures"])]
            figures = [f"{r.measured:.3g}{r.unit}" if r else "-" for r in (old, row)]
            lines.append((row.what, row.bound, *figures, ", ".join(filter(None, notes))))
        if not result["rows"]:
            first, second = result["failures"]
            causes = f"twice: {first}" if first == second else f"{first}; 2nd try: {second}"
            lines.append((f"{result['script']}.py", "-", "-", "-", f"FAILED {causes}"))
    if earlier is None:
        lines = [line[:2] + line[3:] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[-1] = 0
    padded = ([f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def commit() -> str:
    """The checkout's, with -dirty where files were changed; "" where there is none."""
    command = ["git", "-C", str(BENCHMARKS), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # no git
        return ""


def read_earlier(path: Path) -> dict[str, Any]:
    """What an earlier call wrote. Raises UserError where the file is another."""
    try:
        content = read_json(path)
        table(content["results"], content["results"])
        return {key: content[key] for key in ("machine", "date", "commit", "results")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        found = "no file" if isinstance(error, FileNotFoundError) else "something else"
        raise UserError(f"{path}: found {found}, expected results of this script; see --help") from error


def measure_and_report(argv: Sequence[str] | None) -> int:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME", help=", ".join(SCRIPTS))
    parser.add_argument("--json", type=Path, help="default: results/benchmarks_DATE_TIME.json")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="the JSON of an earlier call")
    args = parser.parse_args(argv)
    stamp = time.strftime("%Y-%m-%d_%H%M%S")
    path = args.json or Path("results", f"benchmarks_{stamp}.json")
    make_folder(path.parent, "name another file with --json")
    earlier = read_earlier(args.compare) if args.compare else None
    results = measured(args.only)
    found = {"date": stamp, "machine": machine(), "commit": commit(), "results": results}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    print(found["machine"])
    if earlier:
        print(f"before: {earlier['date']}, commit {earlier['commit'] or 'unknown'}, {earlier['machine']}")
    print(f"\n{table(results, earlier and earlier['results'])}\n\n{path}")
    return 0 if all(r["rows"] and all(Row(**row).passes for row in r["rows"]) for r in results) else 1


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(lambda: measure_and_report(argv))


if __name__ == "__main__":
    sys.exit(main())
