"""Parts of --shard as the table that one process writes; neither model nor scans are needed.

    python -m ctclip.inference.merge out.csv out.part.1of3.jsonl out.part.2of3.jsonl out.part.3of3.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctclip.cli import OneLineParser, run_cli
from ctclip.data.tables import some
from ctclip.formatting import plural
from ctclip.inference.commands import print_predictions
from ctclip.inference.part_files import (
    Finished,
    ScanRow,
    digest,
    identity_digest,
    is_part_file,
    read_lines,
    row_of,
)
from ctclip.inference.predictions import AnswerForm, Predictions, check_output, predictions_of, write_predictions
from ctclip.inference.scans import PredictionError, Scan

MAY_DIFFER = ("checkpoint", "device")  # what the run's folder is called; CPU and GPU differ by rounding
AGAIN = "run its command again"


@dataclass(frozen=True, eq=False)
class Part:
    """A finished part: what its answers follow from, its end, and the rows of its scans."""

    path: Path
    identity: dict[str, Any]
    end: Finished
    rows: dict[str, ScanRow]

    @property
    def settings(self) -> dict[str, Any]:
        """What all parts must have in common."""
        return {key: value for key, value in self.identity.items() if key not in MAY_DIFFER}

    @property
    def failures(self) -> list[tuple[str, str]]:
        return [(name, reason) for name, reason in self.end.failures if name not in self.rows]


def read_part(path: Path) -> Part:
    """A part as its last start left it. Raises PredictionError where that did not come to its end."""
    if not path.is_file() or not is_part_file(path):
        raise PredictionError(f"{path}: found no rows of predictions, expected what --mode predict --shard I/N wrote; "
                              "check the name")
    identity: dict[str, Any] = {}
    end, rows = None, {}
    for line in read_lines(path):
        if "identity" in line:
            identity, end = line["identity"], None
        elif "finished" in line:
            end = Finished(**line["finished"])
        else:
            rows[line["of"], line["name"]] = line
    if end is None:
        raise PredictionError(f"{path}: found a part with {plural(len(rows), 'scan')} and no end, expected a finished "
                              f"one; {AGAIN}")
    key = identity_digest(identity)
    own = {name: row_of(rows[key, name], identity) for name in end.own if (key, name) in rows}
    failed = {name for name, _ in end.failures}
    if lost := [name for name in end.own if name not in own and name not in failed]:
        raise PredictionError(f"{path}: found no row of {some(lost)}, expected one for each of its scans; {AGAIN}")
    return Part(path, identity, end, own)


def check_together(parts: Sequence[Part]) -> None:
    """Raises PredictionError for parts that are not all those of one prediction, each once."""
    first = parts[0]
    for part in parts[1:]:
        if different := [key for key, value in first.settings.items() if part.settings.get(key) != value]:
            raise PredictionError(f"{part.path}: found another {' and '.join(different)} than in {first.path}, "
                                  "expected the same model and settings; predict both by the same command")
        if (part.end.count, part.end.names) != (first.end.count, first.end.names):
            raise PredictionError(f"{part.path}: found a part of other scans, or of {part.end.count} parts, expected "
                                  f"one of the same scans as {first.path} in {first.end.count} parts; predict it again")
    given = [part.end.index + 1 for part in parts]
    if sorted(given) != [*range(1, first.end.count + 1)]:
        raise PredictionError(f"found part {', '.join(map(str, sorted(given)))} of {first.end.count}, expected each "
                              "once; name all parts")


def merge_parts(paths: Sequence[Path]) -> Predictions:
    """What one process would have predicted. Raises PredictionError for parts that do not belong together."""
    parts = sorted(map(read_part, paths), key=lambda part: part.end.index)
    check_together(parts)
    identity, count = parts[0].identity, len(parts)
    names = [""] * sum(len(part.end.own) for part in parts)
    for part in parts:
        names[part.end.index :: count] = part.end.own
    if digest(names) != parts[0].end.names:
        raise PredictionError(f"{parts[0].path}: found parts that share scans or lack some, expected each scan in one; "
                              "predict them again")
    rows = {name: row for part in parts for name, row in part.rows.items()}
    return predictions_of(
        {name: rows[name] for name in names if name in rows},
        [Scan(name, Path(name)) for name in names],
        list(dict.fromkeys(failure for part in parts for failure in part.failures)),
        identity["findings"],
        AnswerForm.parse(identity),
        identity["note"],
    )


def merge_command(output: Path, paths: Sequence[Path]) -> None:
    if output.suffix != ".csv":
        raise PredictionError(f"{output}: found the ending {output.suffix or 'none'}, expected .csv; name a table")
    predictions = merge_parts(paths)
    check_output(output, list(predictions.table.columns))
    write_predictions(output, predictions, output)
    print_predictions(predictions, output, read_part(paths[0]).identity["checkpoint"])


def merge_parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m ctclip.inference.merge",
                           description="Merges the parts that --mode predict --shard I/N wrote.")  # fmt: skip
    parser.add_argument("output", type=Path, metavar="TABLE", help="the .csv to write")
    parser.add_argument("parts", type=Path, nargs="+", metavar="PART", help="every part, such as out.part.1of3.jsonl")
    return parser


def main(argv: list[str] | None = None) -> int:
    args: argparse.Namespace = merge_parser().parse_args(argv)
    return run_cli(lambda: merge_command(args.output, args.parts))


if __name__ == "__main__":
    sys.exit(main())
