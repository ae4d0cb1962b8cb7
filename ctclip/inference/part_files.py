"""Rows of predictions on the disk as soon as they are made, in a file for each process, until the output is written.

    out.part.jsonl          beside out.csv, of one process
    out.part.2of4.jsonl     of the second of four that torchrun started, or of --shard 2/4

A start appends a line with everything that its answers follow from (model, findings, scale, ...), and then one for each
scan, with the model's own probabilities. What a process finds there of an earlier start, whose number of processes may
have been another, is taken up where it follows from the same and the scan is the same file; other lines are left alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ctclip.data.readers import FILE_SUFFIXES
from ctclip.fileio import check_replaceable, naming, open_lines, write_all
from ctclip.formatting import plural
from ctclip.inference.scans import PredictionError, Scan
from ctclip.memory import torchrun_number
from ctclip.shard import Shard

FORMAT = "ctclip-rows"
HEAD = f'{{"format": "{FORMAT}"'  # every line of ours begins so
SAME_COMMAND = "the same command goes on from there"
Failures: TypeAlias = "list[tuple[str, str]]"  # (name, reason)


@dataclass(frozen=True, eq=False)
class ScanRow:
    """What became of a scan that was read: the model's own probabilities (L,), its warning, its files of heat maps."""

    probabilities: np.ndarray
    warning: str = ""
    heat_maps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a part by --shard, its last line: part `index` (from 0) of `count` of scans whose names, in order,
    have the digest `names`; those of its own, in order; (name, reason) of what has no answer."""

    index: int
    count: int
    names: str
    own: list[str]
    failures: list[list[str]]


def part_path(output: Path, part: str = "") -> Path:
    """`part`: such as 2of4."""
    return output.with_name(".".join(filter(None, (output.stem, "part", part, "jsonl"))))


def part_paths(output: Path) -> list[Path]:
    """Those that lie beside an output, whatever the number of processes was."""
    if not output.parent.is_dir():
        return []
    ours = re.compile(rf"{re.escape(output.stem)}\.part(\.[0-9]+of[0-9]+)?\.jsonl")
    return sorted(path for path in output.parent.iterdir() if ours.fullmatch(path.name) and is_part_file(path))


def is_part_file(path: Path) -> bool:
    """Whether its first line begins as ours; of one that a kill has cut, a few bytes may be there."""
    with path.open("rb") as file:
        return HEAD.encode().startswith(file.read(len(HEAD)).partition(b"\n")[0])


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole; one that a kill has cut is no JSON."""
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):
                content = json.loads(line)
                if isinstance(content, dict) and content.get("format") == FORMAT:
                    yield content


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Of all that answers follow from; what a run is called is not of that."""
    return digest({key: value for key, value in identity.items() if key != "checkpoint"})


def signature(scan: Scan) -> list[Any] | None:
    """Path, size and time of change of a scan's file, or of all files in its DICOM folder; None where it has none."""
    path = scan.path
    try:
        if path.name.lower().endswith(FILE_SUFFIXES) and path.is_file():
            entries = [path]
        else:
            entries = sorted((path if path.is_dir() else path.parent).iterdir())
        stats = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries]
    except OSError:  # reading it will fail as well, and say why
        return None
    return [os.path.abspath(path), sum(size for _, size, _ in stats), digest(stats)]


def signatures(scans: Iterable[Scan]) -> dict[str, list[Any] | None]:
    """Several at a time, because on a network file system each one waits for an answer."""
    scans = list(scans)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip([scan.name for scan in scans], pool.map(signature, scans), strict=True))


@dataclass
class PartFiles:
    """The part file of this process, and what those of earlier starts hold. In a `with` block, at whose end they are
    removed, unless it is part of --shard; where the block ends early, what is kept is said.

    `resumes`: whether rows of earlier starts are taken up; `advice`: what to do with those that are kept.
    """

    output: Path
    shard: Shard = field(default_factory=Shard)
    resumes: bool = True
    advice: str = SAME_COMMAND

    def __post_init__(self) -> None:
        self.path = part_path(self.output, self.shard.name)
        self.rows: dict[str, ScanRow] = {}
        self.identity: dict[str, Any] = {}
        self.signatures: dict[str, list[Any] | None] = {}
        self.file: io.FileIO | None = None
        self.keep = self.shard.named_by_hand
        check_replaceable(self.path, is_part_file, "name another output, or move it")

    # ---- before and after the work

    def start(self, identity: Mapping[str, Any], scans: Sequence[Scan]) -> list[Scan]:
        """The scans that are left for this process: of a group's, each is left for one. `identity`: all that the
        answers follow from beside the scan, for JSON; "dtype" in it is the probabilities'."""
        if len(set(self.shard.ranks.all_gather(digest([scan.name for scan in scans])))) > 1:
            numbers = ", ".join(map(str, self.shard.ranks.all_gather(len(scans))))
            raise PredictionError(f"found other scans in one process than in another ({numbers}), expected the same "
                                  "in all; name a folder that all of them see")  # fmt: skip
        self.identity = dict(identity)
        assigned = self.shard.assigned(list(scans))
        if self.resumes:
            self.rows = self._take_up(assigned)
        left = self.shard.left_everywhere([scan for scan in assigned if scan.name not in self.rows], _name)
        self.signatures = signatures(left)
        to_do = int(self.shard.ranks.all_reduce_sum(len(left))[0])
        if self.shard.ranks.is_main and to_do < len(assigned):
            done = f"{len(assigned) - to_do} of {plural(len(assigned), 'scan')}"
            print(f"Going on: {done} are in part files of {self.output}, {to_do} left")
        return left

    def gather(self, scans: Sequence[Scan], failures: Failures) -> tuple[dict[str, ScanRow], Failures]:
        """The rows of `scans`, in their order, and the failures, of all processes, once all of them are here. Of a
        part by --shard its own."""
        rows: dict[str, ScanRow] = {}
        failed: dict[tuple[str, str], None] = {}
        for rows_of_rank, failures_of_rank in self.shard.ranks.all_gather((self.rows, failures)):
            rows |= rows_of_rank
            failed |= dict.fromkeys(failures_of_rank)
        place = {scan.name: number for number, scan in enumerate(scans)}
        if self.shard.named_by_hand:
            names = list(place)
            end = Finished(self.shard.index, self.shard.count, digest(names), self.shard.assigned(names),
                           [[*failure] for failure in failed])  # fmt: skip
            self._append({"finished": asdict(end)})
        # torchrun starts again where one process ends with an error: the others' rows are for then
        again = torchrun_number("TORCHELASTIC_RESTART_COUNT", 0) < torchrun_number("TORCHELASTIC_MAX_RESTARTS", 0)
        self.keep = self.keep or bool(failed and again)
        return {name: rows[name] for name in place if name in rows}, list(failed)

    def __enter__(self) -> PartFiles:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.file is not None:
            self.file.close()
        if error is None:
            self.shard.ranks.barrier()  # the main process has written the output
            for path in () if self.keep else part_paths(self.output):
                path.unlink(missing_ok=True)
            return
        if not self.rows:
            return
        kept = f"kept in {self.path}: {plural(len(self.rows), 'scan')}; {self.advice}"
        if isinstance(error, KeyboardInterrupt):
            error.args = (kept,)  # what run_cli prints
        else:
            print(f"\nK{kept[1:]}", file=sys.stderr)

    # ---- rows

    def append(self, name: str, row: ScanRow) -> None:
        """To the disk at once."""
        self._append({
            "name": name, "signature": self.signatures[name], "probabilities": row.probabilities.tolist(),
            "warning": row.warning, "heat_maps": row.heat_maps,
        })  # fmt: skip
        self.rows[name] = row

    def _append(self, content: dict[str, Any]) -> None:
        key: dict[str, Any] = {"format": FORMAT, "of": identity_digest(self.identity)}
        with naming(self.path):
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open_lines(self.path)
                self._write(key | {"identity": self.identity})
            self._write(key | content)

    def _write(self, content: dict[str, Any]) -> None:
        assert self.file is not None
        write_all(self.file, (json.dumps(content, allow_nan=False) + "\n").encode())

    def _take_up(self, scans: Sequence[Scan]) -> dict[str, ScanRow]:
        """Rows that earlier starts left of the same model and settings, for scans that are the same files; a part by
        --shard takes up its own only."""
        paths = [path for path in part_paths(self.output) if path == self.path or not self.shard.named_by_hand]
        known = {scan.name: scan for scan in scans}
        found: dict[str, list[dict[str, Any]]] = {}
        for line in (line for path in paths for line in read_lines(path)):
            if line["of"] == identity_digest(self.identity) and line.get("name") in known:
                found.setdefault(line["name"], []).append(line)
        now = signatures(known[name] for name in found)
        rows = {}
        for name, lines in found.items():
            same = [line for line in lines if line["signature"] is not None and line["signature"] == now[name]]
            row = row_of(same[-1], self.identity) if same else None
            if row is not None and all(os.path.exists(path) for path in row.heat_maps):
                rows[name] = row
        return rows


def row_of(line: Mapping[str, Any], identity: Mapping[str, Any]) -> ScanRow:
    probabilities = np.array(line["probabilities"], identity["dtype"])
    return ScanRow(probabilities, line["warning"], tuple(line["heat_maps"]))


def _name(scan: Scan) -> str:
    return scan.name
