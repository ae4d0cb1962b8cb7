"""CT-RATE's tables and volumes from the hub: which ones, and a few downloads at a time within the room on the disk.

Which volumes there are is read from the label table; the repository (over 50,000 of them, 21 TB) is never listed.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from math import inf
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ctclip.data.cohort import Volume, listed_volumes
from ctclip.data.ct_rate import COHORT, SPLITS, labels_path, metadata_path, no_chest_path, volume_path
from ctclip.fileio import move_aside
from ctclip.formatting import INDENT, print_row, size_text
from ctclip.hub import client
from ctclip.hub.client import HubError, file_lock, find_token, parts_of
from ctclip.paths import script
from ctclip_model import ABNORMALITIES

CONNECTIONS = 3  # at once: one rarely fills a line
AHEAD = 8  # files that have arrived, are on their way or are in use
IN_A_ROW = 3  # volumes that fail for the same reason outside of them end the command


# ---- tables


def _update_tables(splits: Sequence[str], data_dir: Path, token: str) -> None:
    """Labels, metadata and no-chest lists of the splits; one that is here and intact is not fetched again, one that is
    not the hub's keeps another name: it may have been edited."""
    for split in splits:
        for path in (labels_path(split), metadata_path(split), no_chest_path(split)):
            file, target = path.as_posix(), data_dir / path
            remote = client.retry(partial(client.file_metadata, file, token), file, token, print_note)
            if target.exists() and not remote.difference(target):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                print_note(f"{target} is not the hub's; what was there is kept as {move_aside(target).name}")
            client.download(file, target, token, print_note, remote)


def print_note(text: str) -> None:
    tqdm.write(f"{'':<{INDENT}}{text}")


def first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ---- which volumes


@dataclass(frozen=True)
class Selection:
    """Which part of CT-RATE: split, how many (None: all), and which of its two versions of the files."""

    split: str
    volumes: int | None = None
    patients: int | None = None
    seed: int = 0
    fixed: bool = True


def draw_patients(volumes: Sequence[Volume], seed: int) -> list[str]:
    """All patients in random order, but those ahead who show a label that nobody before them does.

    So the first few of them hold every label that there is, and a larger cohort of the same seed contains the smaller.
    """
    labels: dict[str, np.ndarray] = {}
    for volume in volumes:
        labels[volume.patient] = np.maximum(labels.get(volume.patient, 0), volume.labels)
    patients = sorted(labels)
    seen = np.zeros(len(ABNORMALITIES))
    ahead: list[str] = []
    others: list[str] = []
    for i in np.random.default_rng(seed).permutation(len(patients)):
        present = labels[patients[i]]
        (ahead if (present > seen).any() else others).append(patients[i])
        seen = np.maximum(seen, present)
    return ahead + others


def choose(usable: Sequence[Volume], volumes: int | None, patients: int | None, seed: int) -> list[Volume]:
    """So many patients, or as many as have no more than so many volumes together (one at least): always whole patients;
    all where neither number is given."""
    if volumes is None and patients is None:
        return list(usable)
    by_patient: dict[str, list[Volume]] = {}
    for volume in usable:
        by_patient.setdefault(volume.patient, []).append(volume)
    drawn = [by_patient[patient] for patient in draw_patients(usable, seed)][:patients]
    if volumes is not None:
        totals = accumulate(len(of_patient) for of_patient in drawn)
        drawn = drawn[: max(1, sum(total <= volumes for total in totals))]
    return [volume for of_patient in drawn for volume in of_patient]


def select_volumes(selection: Selection, data_dir: Path, token: str) -> list[Volume]:
    """Downloads the split's tables and chooses volumes from them. Prints what it finds."""
    _update_tables([selection.split], data_dir, token)
    cohort = listed_volumes(data_dir, selection.split, selection.fixed)
    if not cohort.volumes:
        found = "; ".join(f"{len(names)} x {reason}" for reason, names in cohort.reasons().items()) or "an empty table"
        table = data_dir / labels_path(selection.split)
        raise HubError(f"{table}: found no usable volume ({found}), expected at least one", "see the hub's own table")
    chosen = choose(cohort.volumes, selection.volumes, selection.patients, selection.seed)
    patients = len({volume.patient for volume in chosen})
    print_row("data", f"{selection.split}: {len(chosen)} of {len(cohort)} volumes, {patients} patients, in {data_dir}")
    for reason, names in cohort.reasons().items():
        print_row("", f"skipped: {len(names)} x {reason}")
    positives = np.sum([volume.labels for volume in chosen], axis=0)
    if absent := [name for name, count in zip(ABNORMALITIES, positives, strict=True) if not count]:
        print_row("", f"without any {', '.join(absent)}: choose more of them to have every label")
    return chosen


# ---- downloads


@dataclass(eq=False)
class Transfer:
    """A volume to download, to its path: the hub's file, its size and, if the hub told it, its SHA-256."""

    volume: Volume
    file: str
    size: int
    sha256: str | None
    error: HubError | None = None
    checked: bool = True  # compared with a checksum; a mirror may have none

    @property
    def target(self) -> Path:
        return self.volume.path

    @property
    def is_here(self) -> bool:
        """Whether its file is in place: only whole ones that had the hub's checksum get that name."""
        return self.target.exists() and self.target.stat().st_size == self.size


def plan_transfers(chosen: Sequence[Volume], fixed: bool, token: str, place: Callable[[str], Path]) -> list[Transfer]:
    """The chosen volumes with their sizes, each to place(its name); those that the hub does not have are named and
    skipped."""
    files = {volume_path(volume.name, fixed).as_posix(): volume for volume in chosen}
    sizes = client.retry(lambda: client.file_sizes(list(files), token), "the volumes", token, print_note)
    if absent := [volume.name for file, volume in files.items() if file not in sizes]:
        print_row("", f"not on the hub: {len(absent)} volumes ({first_names(absent)})")
    return [Transfer(replace(volume, path=place(volume.name)), file, *sizes[file])
            for file, volume in files.items() if file in sizes]


def none_on_hub(chosen: Sequence[Volume]) -> HubError:
    return HubError(f"the hub has none of the {len(chosen)} volumes chosen", "see --data-version", kind="file")


class Downloader:
    """Carries out transfers in their order, `CONNECTIONS` at a time, while those not released yet are `AHEAD` at most
    and fit `room` bytes.

    Iterate over it for the transfers as they end (`error` says which failed), and `release` each when its file has gone
    or counts no more. Threads are daemons: a process that ends does not wait for them, and a download that is cut off
    there goes on from its last byte.
    """

    def __init__(self, transfers: Sequence[Transfer], token: str, room: float):
        self.waiting, self.token, self.room = deque(transfers), token, room
        self.left = len(transfers)
        self.bytes_held = self.files_held = 0  # here, or on their way, and not released
        self.done: deque[Transfer] = deque()
        self.changed = threading.Condition()

    def __enter__(self) -> Downloader:
        for _ in range(CONNECTIONS):
            threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self.changed:
            self.waiting.clear()
            self.changed.notify_all()

    def __iter__(self) -> Iterator[Transfer]:
        while self.left:
            with self.changed:
                self.changed.wait_for(lambda: self.done)
                transfer = self.done.popleft()
            self.left -= 1
            yield transfer

    def release(self, transfer: Transfer) -> None:
        with self.changed:
            self.bytes_held -= transfer.size
            self.files_held -= 1
            self.changed.notify_all()

    def _may_start(self) -> bool:
        """Whether the next transfer has room, or there is none any more."""
        if not self.waiting:
            return True
        return self.files_held < AHEAD and self.bytes_held + self.waiting[0].size <= self.room

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(self._may_start)
                if not self.waiting:
                    return
                transfer = self.waiting.popleft()
                self.bytes_held += transfer.size
                self.files_held += 1
            try:
                if not transfer.is_here:
                    transfer.target.parent.mkdir(parents=True, exist_ok=True)
                    fetch = partial(client.download, size=transfer.size, sha256=transfer.sha256)
                    remote = fetch(transfer.file, transfer.target, self.token, print_note)
                    transfer.checked = remote.checksum is not None
            except Exception as error:
                transfer.error = client.to_hub_error(error, transfer.file, self.token)
            with self.changed:
                self.done.append(transfer)
                self.changed.notify_all()


@dataclass
class Failures:
    """Transfers that failed; the last ones, in a row, for the same kind of reason."""

    errors: dict[str, HubError] = field(default_factory=dict)  # by the volume's name
    in_a_row: list[HubError] = field(default_factory=list)

    def add(self, transfer: Transfer) -> bool:
        """Whether it succeeded. Else prints its error, and raises it once `IN_A_ROW` transfers, one after the other,
        have failed for that reason."""
        if (error := transfer.error) is None:
            self.in_a_row = []
            return True
        print_note(f"{transfer.volume.name}: {error.reason}")
        self.errors[transfer.volume.name] = error
        self.in_a_row = [*(earlier for earlier in self.in_a_row if earlier.kind == error.kind), error]
        if len(self.in_a_row) >= IN_A_ROW and error.kind != "file":
            raise error
        return False

    def raise_if_any(self, kept: str) -> None:
        """At the end of a command that could not do everything."""
        if self.errors:
            reason = next(iter(self.errors.values())).reason
            failed = f"{len(self.errors)} volumes could not be fetched ({first_names(list(self.errors))}): {reason}"
            raise HubError(failed, f"run the same command again: {kept}")


# ---- the commands


def download_tables(data_dir: Path) -> None:
    """`--data labels`."""
    token = find_token()
    with file_lock(data_dir / COHORT):
        _update_tables(SPLITS, data_dir, token)
    for split in SPLITS:
        cohort = listed_volumes(data_dir, split, fixed=True)
        found = f"{len(cohort)} volumes, {len({volume.patient for volume in cohort.volumes})} patients"
        print_row("data" if split == SPLITS[0] else "", f"{split}: {found}, {data_dir}")


def download_volumes(selection: Selection, data_dir: Path) -> None:
    """`--data train|valid`: the chosen volumes as files in the hub's layout; those that are here are not fetched."""
    token = find_token()
    with file_lock(data_dir / COHORT):
        chosen = select_volumes(selection, data_dir, token)
        transfers = plan_transfers(
            chosen, selection.fixed, token, lambda name: data_dir / volume_path(name, selection.fixed)
        )
        if not transfers:
            raise none_on_hub(chosen)
        absent, failures = [transfer for transfer in transfers if not transfer.is_here], Failures()
        for transfer in absent:
            if transfer.target.exists():
                found = f"{transfer.target} is here with another size than on the hub, and left as it is"
                transfer.error = HubError(found, "move it to another place", kind="file")
                failures.add(transfer)
        wanted = [transfer for transfer in absent if transfer.error is None]
        total = sum(transfer.size for transfer in wanted)
        here = f"{len(transfers) - len(absent)} are here, " if len(absent) < len(transfers) else ""
        print_row("", f"{here}{len(wanted)} to fetch, {size_text(total)}")
        try:
            begun = sum(part.stat().st_size for transfer in wanted for part in parts_of(transfer.target))
            client.check_free_space(data_dir, total - begun)
        except HubError as error:
            remedy = "take fewer (--volumes, --patients), name a --data-dir on a larger disk, or keep only the codes "
            raise HubError(error.reason, remedy + "of each volume with --stream-cache", kind="disk") from error
        start = time.monotonic()
        bar = tqdm(total=total, desc="fetch", unit="B", unit_scale=True, disable=not wanted)
        with bar, Downloader(wanted, token, inf) as downloader:
            for transfer in downloader:
                if failures.add(transfer):
                    bar.update(transfer.size)
                downloader.release(transfer)
        failures.raise_if_any("what has arrived is kept")
        if wanted:
            done = f"{len(wanted)} volumes, {size_text(total)} in {time.monotonic() - start:.0f} s"
            unchecked = sum(not transfer.checked for transfer in wanted)
            how = "each with the hub's checksum"
            if unchecked:
                how = f"{unchecked} of them not checked: the hub told no checksum"
            print_row("", f"{done}, {how}")
    print_row("next", next_command(selection.split, data_dir))


def next_command(split: str, data_dir: Path, more: str = "") -> str:
    """What to do with a split that is here; `more` flags for training."""
    where = f"--data-dir {shlex.quote(str(data_dir))}"
    if split == "valid":
        return f"python {script('ctclip_evaluation.py')} --checkpoint results/RUN {where}"
    return f"python {script('ctclip_training.py')} {where}{more}"
