"""CT-RATE's tables and volumes from the hub: which ones, and a few transfers at a time within a room on the disk.

Which volumes there are is read from the label table; the repository (over 50,000 of them, 21 TB) is never listed.
"""

from __future__ import annotations

import os
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ctclip.data.preprocessing import (
    SPLITS,
    Volume,
    labels_path,
    listed_volumes,
    metadata_path,
    no_chest_path,
    volume_path,
)
from ctclip.formatting import row, size_text
from ctclip.hub.client import (
    HubTrouble,
    alone,
    check_disk,
    explain,
    fetch,
    find_token,
    listed,
    look_up,
    parts_of,
    persist,
)
from ctclip.paths import script
from ctclip_model import ABNORMALITIES

TRANSFERS = 3  # at once: one connection rarely fills a line
AHEAD = 8  # files that have arrived, are on their way or are in use
IN_A_ROW = 3  # volumes that fail for the same reason outside of them end the run


# ---- tables


def fetch_tables(splits: Sequence[str], data_dir: Path, token: str) -> None:
    """Labels, metadata and no-chest lists of the splits; one that is here and intact is not fetched again."""
    for split in splits:
        for path in (labels_path(split), metadata_path(split), no_chest_path(split)):
            file, target = path.as_posix(), data_dir / path
            remote = persist(lambda file=file: look_up(file, token), file, token, print_note)
            if not target.exists() or remote.differs(target):
                make_folder(target.parent)
                fetch(file, target, token, print_note, remote)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = f"found {folder}, which cannot be made ({error.strerror}), expected a folder to write to"
        raise HubTrouble(found, "name another --data-dir", kind="disk") from error


def print_note(text: str) -> None:
    tqdm.write(f"{'':<12}{text}")


# ---- which volumes


def draw_patients(volumes: Sequence[Volume], seed: int) -> list[str]:
    """All patients in random order, but those ahead who show a label that nobody before them does.

    So the first few of them hold every label that there is, and a larger cohort of the same seed contains the smaller.
    """
    labels: dict[str, np.ndarray] = {}
    for volume in volumes:
        labels[volume.patient] = np.maximum(labels.get(volume.patient, 0), volume.labels)
    patients = sorted(labels)
    seen = np.zeros(len(ABNORMALITIES))
    ahead, others = [], []
    for i in np.random.default_rng(seed).permutation(len(patients)):
        mine = labels[patients[i]]
        (ahead if (mine > seen).any() else others).append(patients[i])
        seen = np.maximum(seen, mine)
    return ahead + others


def choose(usable: Sequence[Volume], volumes: int | None, patients: int | None, seed: int) -> list[Volume]:
    """So many of the usable volumes or patients; all of them where neither number is given."""
    if volumes is None and patients is None:
        return list(usable)
    by_patient: dict[str, list[Volume]] = {}
    for volume in usable:
        by_patient.setdefault(volume.patient, []).append(volume)
    drawn = draw_patients(usable, seed)
    return [volume for patient in drawn[:patients] for volume in by_patient[patient]][:volumes]


def absent_labels(chosen: Sequence[Volume]) -> list[str]:
    found = np.sum([volume.labels for volume in chosen], axis=0)
    return [name for name, count in zip(ABNORMALITIES, found, strict=True) if not count]


# ---- transfers


@dataclass(eq=False)
class Item:
    """A volume to fetch: the hub's file, where it goes, its size and, if the hub told it, its SHA-256."""

    volume: Volume
    file: str
    target: Path
    size: int
    sha256: str | None
    trouble: HubTrouble | None = None

    @property
    def is_here(self) -> bool:
        """Whether its file is in place: only whole ones that had the hub's checksum get that name."""
        return self.target.exists() and self.target.stat().st_size == self.size


class Transfers:
    """Fetches items in their order, `TRANSFERS` at a time, while those not released yet are `AHEAD` at most and fit
    `room`.

    Iterate over it for the items as they arrive (`trouble` says which did not), and `release` each when its file has
    gone or counts no more. Threads are daemons: a process that ends does not wait for them, and a transfer that is cut
    off there goes on from its last byte.
    """

    def __init__(self, items: Sequence[Item], token: str, room: float):
        self.waiting, self.token, self.room = deque(items), token, room
        self.left = len(items)
        self.held = self.count = 0  # bytes and files that are here, or on their way, and not released
        self.done: deque[Item] = deque()
        self.changed = threading.Condition()
        self.stopped = False

    def __enter__(self) -> Transfers:
        for _ in range(TRANSFERS):
            threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def __iter__(self) -> Iterator[Item]:
        while self.left:
            with self.changed:
                self.changed.wait_for(lambda: self.done)
                item = self.done.popleft()
            self.left -= 1
            yield item

    def release(self, item: Item) -> None:
        with self.changed:
            self.held -= item.size
            self.count -= 1
            self.changed.notify_all()

    def _next(self) -> Item | None:
        """The next item, its room reserved; None when there are no more."""

        def ready() -> bool:
            if self.stopped or not self.waiting:
                return True
            return self.count < AHEAD and self.held + self.waiting[0].size <= self.room

        with self.changed:
            self.changed.wait_for(ready)
            if self.stopped or not self.waiting:
                return None
            self.held += self.waiting[0].size
            self.count += 1
            return self.waiting.popleft()

    def _work(self) -> None:
        while item := self._next():
            try:
                if not item.is_here:
                    make_folder(item.target.parent)
                    fetch(item.file, item.target, self.token, print_note, size=item.size)
            except Exception as error:
                item.trouble = explain(error, item.file, self.token)
            with self.changed:
                self.done.append(item)
                self.changed.notify_all()


@dataclass
class Failures:
    """Items that did not arrive, and how many in a row for the same reason."""

    items: list[Item] = field(default_factory=list)
    kind: str = ""
    in_a_row: int = 0

    def add(self, item: Item) -> None:
        """Raises the trouble once it has kept `IN_A_ROW` items from arriving, one after the other."""
        self.items.append(item)
        self.in_a_row = self.in_a_row + 1 if item.trouble.kind == self.kind else 1
        self.kind = item.trouble.kind
        if self.in_a_row >= IN_A_ROW and self.kind != "file":
            raise item.trouble

    def good(self) -> None:
        self.in_a_row, self.kind = 0, ""

    def raise_if_any(self, kept: str) -> None:
        """The end of a run that could not do everything."""
        if self.items:
            first = self.items[0]
            names = ", ".join(item.volume.name for item in self.items[:3])
            more = ", ..." if len(self.items) > 3 else ""
            raise HubTrouble(
                f"{len(self.items)} volumes could not be fetched ({names}{more}): {first.trouble.reason}",
                f"run the same command again: {kept}",
            )


# ---- the command


@dataclass(frozen=True)
class Selection:
    """Which part of CT-RATE: split, how many (None: all), and which of its two versions of the files."""

    split: str
    volumes: int | None = None
    patients: int | None = None
    seed: int = 0
    fixed: bool = True


def fetch_selection(selection: Selection, data_dir: Path, token: str) -> list[Volume]:
    """The tables of the split, fetched, and the volumes chosen from them. Prints what it finds."""
    fetch_tables([selection.split], data_dir, token)
    cohort = listed_volumes(data_dir, selection.split, selection.fixed)
    if not cohort.volumes:
        found = "; ".join(f"{len(names)} x {reason}" for reason, names in cohort.reasons().items()) or "an empty table"
        table = data_dir / labels_path(selection.split)
        raise HubTrouble(f"{table}: found no usable volume ({found}), expected at least one", "see the hub's own table")
    chosen = choose(cohort.volumes, selection.volumes, selection.patients, selection.seed)
    patients = len({volume.patient for volume in chosen})
    row("data", f"{selection.split}: {len(chosen)} of {len(cohort)} volumes, {patients} patients, in {data_dir}")
    for reason, names in cohort.reasons().items():
        row("", f"skipped: {len(names)} x {reason}")
    if missing := absent_labels(chosen):
        row("", f"without any {', '.join(missing)}: choose more of them to have every label")
    return chosen


def items_of(chosen: Sequence[Volume], fixed: bool, token: str, place: Callable[[str], Path]) -> list[Item]:
    """What is to be fetched, with sizes, each to place(its name); volumes the hub does not have are named, left out."""
    files = {volume: volume_path(volume.name, fixed).as_posix() for volume in chosen}
    found = persist(lambda: listed(list(files.values()), token), "the volumes", token, print_note)
    absent = [volume.name for volume, file in files.items() if file not in found]
    if absent:
        row("", f"not on the hub: {len(absent)} volumes ({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''})")
    return [Item(volume, file, place(volume.name), *found[file]) for volume, file in files.items() if file in found]


def nothing_there(chosen: Sequence[Volume]) -> HubTrouble:
    return HubTrouble(f"the hub has none of the {len(chosen)} volumes chosen", "see --data-version", kind="file")


def download_tables(data_dir: Path) -> None:
    """`--data labels`."""
    token = find_token()
    with alone(data_dir):
        fetch_tables(SPLITS, data_dir, token)
    for split in SPLITS:
        cohort = listed_volumes(data_dir, split, fixed=True)
        patients = len({volume.patient for volume in cohort.volumes})
        row("data" if split == SPLITS[0] else "", f"{split}: {len(cohort)} volumes, {patients} patients, {data_dir}")


def download_volumes(selection: Selection, data_dir: Path) -> None:
    """`--data train|valid`: the chosen volumes as files in the hub's layout; those that are here are not fetched."""
    token = find_token()
    with alone(data_dir):
        fetch_volumes(selection, data_dir, token)
    row("next", next_command(selection.split, data_dir))


def fetch_volumes(selection: Selection, data_dir: Path, token: str) -> None:
    chosen = fetch_selection(selection, data_dir, token)
    items = items_of(chosen, selection.fixed, token, lambda name: data_dir / volume_path(name, selection.fixed))
    if not items:
        raise nothing_there(chosen)
    wanted = [item for item in items if not item.is_here]
    total = sum(item.size for item in wanted)
    here = f"{len(items) - len(wanted)} are here, " if len(wanted) < len(items) else ""
    row("", f"{here}{len(wanted)} to fetch, {size_text(total)}")
    try:
        check_disk(data_dir, total - sum(_begun(item) for item in wanted))
    except HubTrouble as trouble:
        few = "take fewer (--volumes, --patients), name a --data-dir on a larger disk, or keep only the codes of each "
        raise HubTrouble(trouble.reason, few + "volume with --stream-cache", kind="disk") from trouble
    failures, start = Failures(), time.monotonic()
    bar = tqdm(total=total, desc="fetch", unit="B", unit_scale=True, disable=not wanted)
    with bar, Transfers(wanted, token, inf) as transfers:
        for item in transfers:
            if item.trouble:
                print_note(f"{item.volume.name}: {item.trouble.reason}")
                failures.add(item)
            else:
                failures.good()
                bar.update(item.size)
            transfers.release(item)
    failures.raise_if_any("what has arrived is kept")
    if wanted:
        seconds = time.monotonic() - start
        row("", f"{len(wanted)} volumes, {size_text(total)} in {seconds:.0f} s, each with the hub's checksum")


def next_command(split: str, data_dir: Path, more: str = "") -> str:
    """What to do with a split that is here; `more` flags for training."""
    where = f"--data-dir {shlex.quote(str(data_dir))}"
    if split == "valid":
        return f"python {script('ctclip_evaluation.py')} --checkpoint results/RUN {where}"
    return f"python {script('ctclip_training.py')} {where}{more}"


def _begun(item: Item) -> int:
    """Bytes of it that are on the disk already."""
    return sum(os.path.getsize(part) for part in parts_of(item.target))
