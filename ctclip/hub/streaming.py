"""CT-RATE through a disk of any size: volume N + 1 is fetched while volume N is read and encoded into the code cache,
and each file is deleted as soon as its codes are on the disk.

    <scratch_dir>/.stream/...             the files that are here at present
    <data_dir>/streamed_<split>.jsonl     what was encoded and deleted, and what could not be read and why
    <cache_dir>/codes-.../                the codes (see ctclip.data.feature_cache)

A volume's codes are on the disk before its line is, and its line before its file is deleted: whenever the process is
killed, the same command goes on where it was, a transfer from its last byte.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

from ctclip.data.feature_cache import (
    LINE_BYTES,
    FeatureCache,
    cache_key,
    cache_keys,
    encode_missing,
    encoding,
    existing,
    file_signature,
    write_all,
)
from ctclip.data.preprocessing import (
    VOLUME_SUFFIX,
    HuDecision,
    Streamed,
    Volume,
    VolumeError,
    read_streamed,
    read_volume,
    scan_of,
    streamed_path,
    volume_path,
)
from ctclip.distributed import Ranks
from ctclip.formatting import row, size_text
from ctclip.hub.client import SPARE_BYTES, HubTrouble, alone, find_token, parts_of
from ctclip.hub.download import (
    Failures,
    Item,
    Selection,
    Transfers,
    fetch_selection,
    items_of,
    make_folder,
    next_command,
    nothing_there,
    print_note,
)
from ctclip.inference.predictor import choose_device, print_failures
from ctclip_model import CLASSFINE_PATH, CTCLIPMultiAbnormalityModel

MANIFEST_BYTES = 512  # more than a line of the manifest takes, unless its reason is long
DISK_GB = 10.0
TICK_SECONDS = 2


@dataclass(frozen=True)
class Places:
    """Where a stream keeps what: cohort, cache, the encoder's weights; and how many GB of disk it may use in all."""

    data_dir: Path
    cache_dir: Path
    weights: Path
    scratch_dir: Path | None = None  # None: data_dir
    disk_gb: float = DISK_GB
    device: str | None = None

    @property
    def staging(self) -> Path:
        """A folder of its own, because what does not belong there is deleted."""
        return (self.scratch_dir or self.data_dir) / ".stream"


# ---- the manifest


class Manifest:
    """A split's manifest, for appending (`read_streamed` reads it): a line is on the disk when `add` returns."""

    def __init__(self, path: Path):
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # a kill, in the middle of a line
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        if torn:
            self.file.write(b"\n")

    def add(self, name: str, entry: Streamed) -> None:
        line = {"name": name, "fixed": entry.fixed, "size": entry.size, "tail": entry.tail}
        line |= {"sha256": entry.sha256, "reason": entry.reason}
        write_all(self.file, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        self.file.close()


# ---- what is left to do


@dataclass
class Work:
    """The chosen volumes: those with a file, encoded in place; those to fetch; how many are done or in quarantine."""

    here: list[Volume]
    items: list[Item]
    done: int
    quarantined: int


def plan_work(
    chosen: Sequence[Volume], places: Places, selection: Selection, cache: FeatureCache, token: str
) -> Work:
    """Compares the chosen volumes with disk, manifest and cache, and asks the hub about those without a file here.

    A file that has another size or SHA-256 on the hub than in the manifest was replaced there: it counts as new.
    """
    paths = {volume.name: places.data_dir / volume_path(volume.name, selection.fixed) for volume in chosen}
    here = [replace(volume, path=paths[volume.name]) for volume in chosen if paths[volume.name].exists()]
    away = [volume for volume in chosen if not paths[volume.name].exists()]
    items = items_of(away, selection.fixed, token, lambda name: staged_path(places.staging, name, selection.fixed))
    if not here and not items:
        raise nothing_there(chosen)
    streamed = read_streamed(places.data_dir, selection.split)
    known = {name: entry for (name, fixed), entry in streamed.items() if fixed == selection.fixed}
    current = {
        item: entry
        for item in items
        if (entry := known.get(item.volume.name))
        and entry.size == item.size
        and (entry.sha256 is None or item.sha256 in (None, entry.sha256))
    }
    quarantined = [item for item, entry in current.items() if entry.reason is not None]
    streamed_once = {
        item: replace(item.volume, path=item.target, signature=(entry.size, entry.tail))
        for item, entry in current.items()
        if entry.reason is None
    }
    rows, _ = cache.intact(cache_keys(list(streamed_once.values())))
    done = [item for item, row in zip(streamed_once, rows, strict=True) if row is not None]
    settled = {*quarantined, *done}
    return Work(here, [item for item in items if item not in settled], len(done), len(quarantined))


def clear_staging(staging: Path, items: Sequence[Item], room: float) -> None:
    """Deletes what an earlier process left there, but for the beginning of `items`, as many as fit `room` together."""
    totals = accumulate(item.size for item in items)
    wanted = {item.target for item, total in zip(items, totals, strict=True) if total <= room}
    for path in [path for path in staging.rglob("*") if path.is_file()]:
        target = path.with_name(path.name[1:].rsplit(".", 2)[0]) if path.suffix == ".part" else path
        if target not in wanted:
            remove(path)


def staged_path(staging: Path, name: str, fixed: bool) -> Path:
    """Where a volume is while it is here. No two share a folder but that of their version: one may be deleted with its
    folders while another arrives."""
    version = volume_path(name, fixed).parts[1]
    return staging / version / name.removesuffix(VOLUME_SUFFIX) / scan_of(name) / name


def remove(path: Path) -> None:
    """A staged file, and its folders once they are empty."""
    path.unlink(missing_ok=True)
    for folder in path.parents[:2]:
        with suppress(OSError):  # not empty
            folder.rmdir()


# ---- the disk


def bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder, in which other threads are at work."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(root, name))
    return total


@dataclass
class Budget:
    """How the stream uses the disk: `limit` in all, of which `room` for files in transit; `encoded` by now, codes and
    lines of the manifest at `per_volume` each."""

    limit: float
    room: float
    encoded: float
    per_volume: int


def plan_disk(places: Places, cache: FeatureCache, items: Sequence[Item]) -> Budget:
    """The budget for these items: all their codes, and the rest for files. Raises HubTrouble where the largest file and
    the codes do not fit, in --disk-gb or on the disks as they are."""
    per_volume = cache.record_bytes + LINE_BYTES + MANIFEST_BYTES
    encoded, growth = bytes_in(cache.folder), len(items) * per_volume
    largest = max(items, key=lambda item: item.size)
    codes = f"the codes of {len(items)} volumes"
    file = f"{largest.volume.name} ({size_text(largest.size)})"
    limit = places.disk_gb * 1e9
    if limit < (least := encoded + growth + largest.size):
        found = f"found --disk-gb {places.disk_gb:g}, expected at least {size_text(least)} for {file} and {codes}"
        raise HubTrouble(found, "raise it, or choose fewer volumes", kind="disk")
    scratch, store = existing(places.staging), existing(cache.folder)
    together = scratch.stat().st_dev == store.stat().st_dev
    free = shutil.disk_usage(scratch).free + bytes_in(places.staging) - SPARE_BYTES - together * growth
    if free < largest.size:
        what = f"{file} and {codes}" if together else file
        raise too_small(scratch, shutil.disk_usage(scratch).free, largest.size + together * growth + SPARE_BYTES, what)
    if not together and shutil.disk_usage(store).free < growth + SPARE_BYTES:
        raise too_small(store, shutil.disk_usage(store).free, growth + SPARE_BYTES, codes)
    room = min(limit - encoded - growth, free)
    return Budget(encoded + growth + room, room, encoded, per_volume)


def too_small(folder: Path, free: float, needed: float, what: str) -> HubTrouble:
    found = f"the disk is too small: {size_text(free)} free in {folder}, {size_text(needed)} needed for {what}"
    remedy = "free some, or name a --data-dir, --scratch-dir and --cache-dir on larger disks"
    return HubTrouble(found, remedy, kind="disk")


# ---- fetch, read, encode


@dataclass
class Arrival:
    """A file that arrived: as a volume, how `ctclip.data.feature_cache` will know it, and what reading it gave."""

    item: Item
    volume: Volume
    source: str | None = None
    signature: tuple[int, str] = (0, "")
    tensor: torch.Tensor | None = None
    decision: HuDecision | None = None
    unreadable: str | None = None


def read(item: Item, shape: tuple[int, int, int]) -> Arrival:
    arrival = Arrival(item, replace(item.volume, path=item.target))
    if item.trouble is not None:
        return arrival
    arrival.source, arrival.signature = cache_key(arrival.volume), file_signature(item.target)
    try:
        arrival.tensor, arrival.decision = read_volume(arrival.volume, shape)
    except VolumeError as error:
        cause = error.__context__
        if isinstance(cause, OSError) and cause.errno:  # the disk's fault, not the volume's
            found = f"{item.target} could not be read ({cause.strerror})"
            item.trouble = HubTrouble(found, "check the disk of --scratch-dir, then run this again", kind="disk")
        else:  # the bytes are the hub's: fetching them again would not help
            arrival.unreadable = str(error).removeprefix(f"{item.target.name}: ")
    return arrival


def arrivals(transfers: Transfers, shape: tuple[int, int, int], tick: Callable[[], None]) -> Iterator[Arrival]:
    """Items as they arrive, read by a thread of its own: one is ready, at most, while another is being encoded. `tick`
    is called every now and then while there is none."""
    ready: queue.Queue = queue.Queue(maxsize=1)

    def work() -> None:
        try:
            for item in transfers:
                ready.put(read(item, shape))
        except BaseException as error:  # handed to the consumer below
            ready.put(error)

    left = transfers.left
    threading.Thread(target=work, daemon=True).start()
    while left:
        try:
            arrival = ready.get(timeout=TICK_SECONDS)
        except queue.Empty:
            tick()
            continue
        if isinstance(arrival, BaseException):
            raise arrival
        left -= 1
        yield arrival


def stream(selection: Selection, places: Places) -> None:
    """The chosen volumes into the cache; prints what it does.

    Raises HubTrouble, CacheError, CohortError or CheckpointError, each one line; what has been encoded is kept.
    """
    token = find_token()
    with alone(places.data_dir, places.staging):
        chosen = fetch_selection(selection, places.data_dir, token)
        make_folder(places.staging)
        device = choose_device(places.device)
        model = CTCLIPMultiAbnormalityModel(str(places.weights), head="linear").to(device).eval()  # only encodes
        row("encoder", f"{model.load_report} on {device}")
        cache = FeatureCache(places.cache_dir, model)
        work = plan_work(chosen, places, selection, cache, token)
        if work.here:
            encode_missing(model, cache, work.here, device, 0, Ranks(), lambda volumes, batch: print_failures(batch))
        total = size_text(sum(item.size for item in work.items))
        there = f"{work.done} are in the cache, {work.quarantined} in quarantine, {len(work.here)} have a file here"
        row("", f"{there}, {len(work.items)} to fetch, {total}")
        budget = plan_disk(places, cache, work.items) if work.items else None
        clear_staging(places.staging, work.items, budget.room if budget else 0)
        if budget:
            transit = size_text(budget.room)
            row("", f"disk: at most {size_text(budget.limit)}, of which {transit} for files in transit")
            encode_arrivals(model, cache, work.items, budget, selection, places, token)
        for folder in (*places.staging.iterdir(), places.staging):
            with suppress(OSError):  # not empty
                folder.rmdir()
    encoder = "" if str(places.weights) == CLASSFINE_PATH else f" --ctclip-path {shlex.quote(str(places.weights))}"
    more = f" --cache-dir {shlex.quote(str(places.cache_dir))}{encoder} --freeze-backbone"
    row("next", next_command(selection.split, places.data_dir, more))


def is_encoded(cache: FeatureCache, source: str) -> bool:
    """Whether its codes are there, intact: a process may have been killed after them and before their line."""
    (row,), _ = cache.intact([source])
    return row is not None


def encode_arrivals(
    model: CTCLIPMultiAbnormalityModel,
    cache: FeatureCache,
    items: Sequence[Item],
    budget: Budget,
    selection: Selection,
    places: Places,
    token: str,
) -> None:
    device = next(model.parameters()).device
    manifest_path = places.data_dir / streamed_path(selection.split)
    failures, quarantined, done, start = Failures(), [], 0, time.monotonic()
    bar = tqdm(
        total=len(items),
        desc="stream",
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}, ETA {remaining}{postfix}]",
    )

    def show(refresh: bool = True) -> None:
        per_minute = 60 * done / (time.monotonic() - start)
        used = size_text(budget.encoded + bytes_in(places.staging))
        bar.set_postfix_str(f"{per_minute:.1f} vol/min, disk {used} of {size_text(budget.limit)}", refresh)

    with (
        closing(Manifest(manifest_path)) as manifest,
        closing(cache),
        bar,
        encoding(model, device),
        Transfers(items, token, budget.room) as transfers,
    ):
        for arrival in arrivals(transfers, model.input_shape, show):
            item, name = arrival.item, arrival.item.volume.name
            if item.trouble:
                print_note(f"{name}: {item.trouble.reason}")
                failures.add(item)
                for part in parts_of(item.target):  # it would take room that others need
                    remove(part)
            else:
                failures.good()
                if arrival.unreadable:
                    print_note(f"quarantined: {name}: {arrival.unreadable}")
                    quarantined.append(name)
                elif not is_encoded(cache, arrival.source):
                    codes = model.encode_for_cache(arrival.tensor[None].to(device))
                    cache.append([arrival.volume], codes, [arrival.decision], [arrival.source], len(items) - done)
                manifest.add(name, Streamed(selection.fixed, *arrival.signature, item.sha256, arrival.unreadable))
                budget.encoded += budget.per_volume
            remove(item.target)
            transfers.release(item)
            done += 1
            show(refresh=False)
            bar.update()
    minutes = (time.monotonic() - start) / 60
    encoded = len(items) - len(failures.items) - len(quarantined)
    row("stream", f"{encoded} volumes encoded in {minutes:.1f} min, {encoded / minutes:.1f} per minute: {cache.folder}")
    if quarantined:
        row("", f"in quarantine, with the reason in {manifest_path}: {len(quarantined)} ({', '.join(quarantined[:3])})")
    failures.raise_if_any("what has been encoded is kept")
