"""CT-RATE through a disk of any size: volume N + 1 is downloaded while volume N is encoded into the code cache, each
file is deleted as soon as its codes are on the disk.

    <scratch_dir>/.stream/...             the files that are here at present
    <data_dir>/streamed_<split>.jsonl     what was encoded and deleted, and what could not be read and why
    <cache_dir>/codes-.../                the codes (see ctclip.data.feature_cache)

A volume's codes are on the disk before its line is, and its line before its file is deleted: whenever the process is
killed, the same command goes on where it was, a download from its last byte.

Several processes divide the volumes (`Shard`). Each has files in transit, a manifest (streamed_<split>.2of4.jsonl) and
cache shards of its own, so that none waits for another; what is left to do is decided anew at every start.
"""

from __future__ import annotations

import io
import json
import os
import queue
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

import torch
from tqdm.auto import tqdm

from ctclip.data import feature_cache
from ctclip.data.cohort import Streamed, Volume, read_streamed
from ctclip.data.ct_rate import COHORT, VOLUME_SUFFIX, scan_of, streamed_path, volume_path
from ctclip.data.feature_cache import FeatureCache, encode_missing
from ctclip.data.hounsfield import HuDecision
from ctclip.data.loading import Batch, count_notes, notes_of
from ctclip.data.preprocessing import read_volume
from ctclip.data.volume_file import VolumeError
from ctclip.data.volume_key import cache_key, cache_keys, file_signature
from ctclip.distributed import Ranks
from ctclip.fileio import LockedError, is_locked, locked, nearest_existing, open_lines, write_all
from ctclip.formatting import plural, print_row, size_text
from ctclip.hub import download
from ctclip.hub.client import DISK_GB, SPARE_BYTES, HubError, file_lock, find_token, parts_of
from ctclip.hub.download import Downloader, Failures, Selection, Transfer
from ctclip.inference.predictor import choose_device, print_failures
from ctclip.shard import Shard
from ctclip_model import CLASSFINE_PATH, CTCLIPMultiAbnormalityModel

MANIFEST_BYTES = 512  # more than a line of the manifest takes, unless its reason is long
TICK_SECONDS = 2
BAR = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}, ETA {remaining}{postfix}]"


@dataclass(frozen=True)
class StreamOptions:
    """Where cohort, cache and the encoder's weights are; how many GB of disk a stream may use in all; its device."""

    data_dir: Path
    cache_dir: Path
    weights: Path
    scratch_dir: Path | None = None  # None: data_dir
    disk_gb: float = DISK_GB
    device: str | None = None
    shard: Shard = field(default_factory=Shard)

    @property
    def staging(self) -> Path:
        """A folder of its own, because what does not belong there is deleted."""
        return (self.scratch_dir or self.data_dir) / "-".join(filter(None, (".stream", self.shard.name)))


def open_encoder(options: StreamOptions) -> tuple[CTCLIPMultiAbnormalityModel, FeatureCache]:
    """The model on its device, ready to encode, and its cache. Raises CheckpointError or CacheError."""
    device = choose_device(options.device)
    # It only encodes: whatever head the file has, none is needed.
    model = CTCLIPMultiAbnormalityModel(str(options.weights), head="linear", new_head=True).to(device).eval()
    print_row("encoder", f"{model.load_report} on {device}")
    return model, FeatureCache(options.cache_dir, model)


# ---- what is left to do


def plan_stream(
    chosen: Sequence[Volume], options: StreamOptions, selection: Selection, cache: FeatureCache, token: str
) -> tuple[list[Volume], list[Transfer]]:
    """-> (chosen volumes with a file here, transfers left to do), after disk, manifest, cache and the hub's answer.

    A file that has another size or SHA-256 on the hub than in the manifest was replaced there: it counts as new.
    """
    fixed = selection.fixed
    placed = [replace(volume, path=options.data_dir / volume_path(volume.name, fixed)) for volume in chosen]
    on_disk = [volume for volume in placed if volume.path.exists()]
    others = [volume for volume in placed if not volume.path.exists()]
    transfers = download.plan_transfers(others, fixed, token, lambda name: staged_path(options.staging, name, fixed))
    if not on_disk and not transfers:
        raise download.none_on_hub(chosen)
    manifest = read_streamed(options.data_dir, selection.split)
    quarantined, encoded_once = set(), {}
    for transfer in transfers:
        entry = manifest.get((transfer.volume.name, fixed))
        if entry is None or entry.size != transfer.size:
            continue
        if transfer.sha256 != entry.sha256 and transfer.sha256 and entry.sha256:
            continue
        if entry.reason is not None:
            quarantined.add(transfer)
        else:
            encoded_once[transfer] = replace(transfer.volume, signature=(entry.size, entry.tail))
    rows, _ = cache.intact(cache_keys(list(encoded_once.values())))
    cached = {transfer for transfer, row in zip(encoded_once, rows, strict=True) if row is not None}
    left = [transfer for transfer in transfers if transfer not in quarantined | cached]
    known = f"{len(cached)} are in the cache, {len(quarantined)} in quarantine, {len(on_disk)} have a file here"
    total = size_text(sum(transfer.size for transfer in left))
    print_row("", f"{known}, {len(left)} to fetch, {total}")
    return on_disk, left


def clear_staging(staging: Path, transfers: Sequence[Transfer], room: float) -> None:
    """Deletes what an earlier process left there, but for the first `transfers`, as many as fit `room` together."""
    totals = accumulate(transfer.size for transfer in transfers)
    wanted = {transfer.target for transfer, total in zip(transfers, totals, strict=True) if total <= room}
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


def plan_disk(options: StreamOptions, cache: FeatureCache, transfers: Sequence[Transfer]) -> tuple[float, float]:
    """-> (bytes in all, of which for files in transit): all the codes, and the rest for files. Of several processes on
    a machine each has its share of both. Raises HubError where the largest file and the codes do not fit, in --disk-gb
    or on the disks as they are."""
    local = options.shard.local
    growth = len(transfers) * (cache.record_bytes + feature_cache.LINE_BYTES + MANIFEST_BYTES)
    encoded = bytes_in(cache.folder) / local
    largest = max(transfers, key=lambda transfer: transfer.size)
    codes = f"the codes of {len(transfers)} volumes"
    file = f"{largest.volume.name} ({size_text(largest.size)})"
    limit = options.disk_gb * 1e9 / local
    if limit < (least := encoded + growth + largest.size):
        each = f", for each of {local} processes here" if local > 1 else ""
        found = (f"found --disk-gb {options.disk_gb:g}, expected at least {size_text(least * local)} for {file} and "
                 f"{codes}{each}")
        raise HubError(found, "raise it, or choose fewer volumes", kind="disk")
    scratch, store = nearest_existing(options.staging), nearest_existing(cache.folder)
    here = bytes_in(options.staging)
    needs = [(scratch, largest.size, here, file), (store, growth, 0, codes)]
    shared = 0
    if scratch.stat().st_dev == store.stat().st_dev:
        needs, shared = [(scratch, largest.size + growth, here, f"{file} and {codes}")], growth
    for folder, needed, reused, what in needs:
        free = shutil.disk_usage(folder).free / local
        if free + reused < needed + SPARE_BYTES:
            found = f"{size_text(free)} free in {folder}, {size_text(needed + SPARE_BYTES)} needed for {what}"
            remedy = "free some, or name a --data-dir, --scratch-dir and --cache-dir on larger disks"
            raise HubError(f"the disk is too small: {found}", remedy, kind="disk")
    room = min(limit - encoded - growth, shutil.disk_usage(scratch).free / local + here - SPARE_BYTES - shared)
    return encoded + growth + room, room


# ---- download, read, encode


ReadResult: TypeAlias = "tuple[torch.Tensor, HuDecision] | str | None"


def read(transfer: Transfer, shape: tuple[int, int, int]) -> ReadResult:
    """Its tensor and how it was read; why the volume cannot be read; None where the transfer failed, or the disk."""
    if transfer.error is not None:
        return None
    try:
        return read_volume(transfer.volume, shape)
    except VolumeError as error:
        cause = error.__context__
        if isinstance(cause, OSError) and cause.errno:  # the disk's fault, not the volume's
            reason = f"{transfer.target} could not be read ({cause.strerror})"
            transfer.error = HubError(reason, "check the disk of --scratch-dir, then run this again", kind="disk")
            return None
        return str(error).removeprefix(f"{transfer.target.name}: ")  # the bytes are the hub's: no use in another try


def prefetch(
    downloader: Downloader, shape: tuple[int, int, int], tick: Callable[[], None]
) -> Iterator[tuple[Transfer, ReadResult]]:
    """Transfers as they end, read by a thread that prefetches one. `tick` is called every now and then while there is
    none."""
    ready: queue.Queue = queue.Queue(maxsize=1)

    def work() -> None:
        try:
            for transfer in downloader:
                ready.put((transfer, read(transfer, shape)))
        except BaseException as error:  # raised in the consumer's thread below
            ready.put(error)

    left = downloader.left
    threading.Thread(target=work, daemon=True).start()
    while left:
        try:
            found = ready.get(timeout=TICK_SECONDS)
        except queue.Empty:
            tick()
            continue
        if isinstance(found, BaseException):
            raise found
        left -= 1
        yield found


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Waits until no other process is in the block of the same path."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(path))
                break
            except LockedError:
                time.sleep(0.2)
        yield


def clear_other_shards(options: StreamOptions) -> None:
    """Deletes what processes left in transit that were of another number, unless they are at work."""
    scratch, keep = options.staging.parent, options.shard.name.partition("of")[2]
    for folder in scratch.glob(".stream*"):
        other = folder.name.partition("of")[2] != keep
        if other and folder.is_dir() and not is_locked(folder.with_name(f".{folder.name}.lock")):
            shutil.rmtree(folder)


def stream(selection: Selection, options: StreamOptions) -> None:
    """The chosen volumes into the cache; prints what it does, or the main one of several processes does.

    Raises HubError, CacheError, CohortError or CheckpointError, each one line; what has been encoded is kept.
    """
    token, shard = find_token(), options.shard
    quiet = nullcontext() if shard.ranks.is_main else redirect_stdout(io.StringIO())
    cohort = [options.data_dir / COHORT] if shard.index == 0 else []  # of several processes the first locks it for all
    with file_lock(*cohort, options.staging), ExitStack() as planning:
        planning.enter_context(quiet)
        with in_turn(options.data_dir / ".tables.lock") if shard.count > 1 else nullcontext():
            chosen = shard.assigned(download.select_volumes(selection, options.data_dir, token))
        if shard.named_by_hand:
            print_row("", f"part {shard.index + 1} of {shard.count}: {plural(len(chosen), 'volume')}")
        clear_other_shards(options)
        options.staging.mkdir(parents=True, exist_ok=True)
        model, cache = open_encoder(options)
        device = next(model.parameters()).device
        on_disk, left = plan_stream(chosen, options, selection, cache, token)
        on_disk = shard.seen_here(on_disk, lambda volume: volume.name)
        transfers = shard.left_everywhere(left, lambda transfer: transfer.volume.name)
        notes: dict[str, str] = {}

        def on_batch(volumes: list[Volume], batch: Batch) -> None:
            print_failures(batch)
            notes.update(notes_of(volumes, batch))

        if on_disk:
            encode_missing(model, cache, on_disk, device, 0, Ranks.alone(), on_batch)
        shard.ranks.destroy()  # from here on none waits for another
        limit, room = plan_disk(options, cache, transfers) if transfers else (0, 0)
        clear_staging(options.staging, transfers, room)
        if transfers:
            print_row("", f"disk: at most {size_text(limit)}, of which {size_text(room)} for files in transit")
            planning.close()
            with Downloader(transfers, token, room) as downloader:
                notes |= encode_transfers(model, cache, downloader, limit, selection, options)
        for line in count_notes(notes):
            print_row("", line)
        for folder in (*sorted(options.staging.rglob("*"), reverse=True), options.staging):  # the deepest first
            with suppress(OSError):  # not empty
                folder.rmdir()
    encoder = "" if str(options.weights) == CLASSFINE_PATH else f" --ctclip-path {shlex.quote(str(options.weights))}"
    more = f" --cache-dir {shlex.quote(str(options.cache_dir))}{encoder} --freeze-backbone"
    if shard.ranks.is_main:
        print_row("next", download.next_command(selection.split, options.data_dir, more))


def encode_transfers(
    model: CTCLIPMultiAbnormalityModel,
    cache: FeatureCache,
    downloader: Downloader,
    limit: float,
    selection: Selection,
    options: StreamOptions,
) -> dict[str, str]:
    """Each volume that arrives into the cache and the manifest; then its file goes. Returns {name: note}."""
    device, total = next(model.parameters()).device, downloader.left
    shard = options.shard
    manifest_path = options.data_dir / streamed_path(selection.split, shard.name)
    label = " ".join(filter(None, ("stream", shard.name)))
    failures, done, start = Failures(), 0, time.monotonic()
    quarantined: list[str] = []
    notes: dict[str, str] = {}

    def show(refresh: bool = True) -> None:
        per_minute = 60 * done / (time.monotonic() - start)
        used = size_text(bytes_in(cache.folder) / shard.local + bytes_in(options.staging))
        bar.set_postfix_str(f"{per_minute:.1f} vol/min, disk {used} of {size_text(limit)}", refresh)

    bar = tqdm(total=total, desc=label, bar_format=BAR, disable=not shard.ranks.is_main)
    with open_lines(manifest_path) as manifest, closing(cache), bar, feature_cache.encoding(model, device):
        for transfer, found in prefetch(downloader, model.input_shape, show):
            volume, unreadable = transfer.volume, found if isinstance(found, str) else None
            if not failures.add(transfer):
                for part in parts_of(transfer.target):  # it would take room that others need
                    remove(part)
            else:
                key, (size, tail) = cache_key(volume), file_signature(transfer.target)
                if unreadable:
                    download.print_note(f"quarantined: {volume.name}: {unreadable}")
                    quarantined.append(volume.name)
                # Its codes may be there, intact: a process may have been killed after them and before their line.
                elif isinstance(found, tuple) and cache.intact([key])[0] == [None]:
                    tensor, decision = found
                    notes |= {volume.name: "; ".join(decision.notes)} if decision.notes else {}
                    codes = model.encode_for_cache(tensor[None].to(device))
                    cache.append([volume], codes, [decision], [key], total - done)
                entry = Streamed(selection.fixed, size, str(tail), transfer.sha256, unreadable)
                line = json.dumps({"name": volume.name, **entry._asdict(), "time": round(time.time(), 3)})
                write_all(manifest, f"{line}\n".encode())
            remove(transfer.target)
            downloader.release(transfer)
            done += 1
            show(refresh=False)
            bar.update()
    minutes = (time.monotonic() - start) / 60
    encoded = total - len(failures.errors) - len(quarantined)
    speed = f"{minutes:.1f} min, {encoded / minutes:.1f} per minute"
    print_row(label, f"{encoded} volumes encoded in {speed}: {cache.folder}")
    if quarantined:
        names = download.first_names(quarantined)
        print_row("", f"in quarantine, with the reason in {manifest_path}: {len(quarantined)} ({names})")
    failures.raise_if_any("what has been encoded is kept")
    return notes
