"""CT-RATE through a disk of any size: volume N + 1 is downloaded while volume N is encoded into the code cache, each
file is deleted as soon as its codes are on the disk.

    <scratch_dir>/.stream/...             the files that are here at present
    <data_dir>/streamed_<split>.jsonl     what was encoded and deleted, and what could not be read and why
    <cache_dir>/codes-.../                the codes (see ctclip.data.feature_cache)

A volume's codes are on the disk before its line is, and its line before its file is deleted: whenever the process is
killed, the same command goes on where it was, a download from its last byte.
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

from ctclip.data.cohort import Streamed, Volume, read_streamed
from ctclip.data.ct_rate import VOLUME_SUFFIX, scan_of, streamed_path, volume_path
from ctclip.data.feature_cache import (
    LINE_BYTES,
    FeatureCache,
    cache_key,
    cache_keys,
    encode_missing,
    encoding,
    file_signature,
    nearest_existing,
    write_all,
)
from ctclip.data.hounsfield import HuDecision
from ctclip.data.preprocessing import read_volume
from ctclip.data.volume_file import VolumeError
from ctclip.distributed import Ranks
from ctclip.formatting import print_row, size_text
from ctclip.hub.client import DISK_GB, SPARE_BYTES, HubError, file_lock, find_token, parts_of
from ctclip.hub.download import (
    Downloader,
    Failures,
    Selection,
    Transfer,
    first_names,
    make_folder,
    next_command,
    none_on_hub,
    plan_transfers,
    print_note,
    select_volumes,
)
from ctclip.inference.predictor import choose_device, print_failures
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
class StreamPlan:
    """The chosen volumes: those with a file, encoded in place; those to download; how many are in the cache or in
    quarantine."""

    on_disk: list[Volume]
    transfers: list[Transfer]
    cached: int
    quarantined: int


def plan_stream(
    chosen: Sequence[Volume], options: StreamOptions, selection: Selection, cache: FeatureCache, token: str
) -> StreamPlan:
    """Compares the chosen volumes with disk, manifest and cache, and asks the hub about those without a file here.

    A file that has another size or SHA-256 on the hub than in the manifest was replaced there: it counts as new.
    """
    paths = {volume.name: options.data_dir / volume_path(volume.name, selection.fixed) for volume in chosen}
    on_disk = [replace(volume, path=paths[volume.name]) for volume in chosen if paths[volume.name].exists()]
    others = [volume for volume in chosen if not paths[volume.name].exists()]

    def staged(name: str) -> Path:
        return staged_path(options.staging, name, selection.fixed)

    transfers = plan_transfers(others, selection.fixed, token, staged)
    if not on_disk and not transfers:
        raise none_on_hub(chosen)
    manifest = read_streamed(options.data_dir, selection.split)
    current = {
        transfer: entry
        for transfer in transfers
        if (entry := manifest.get((transfer.volume.name, selection.fixed)))
        and entry.size == transfer.size
        and (entry.sha256 is None or transfer.sha256 in (None, entry.sha256))
    }
    quarantined = [transfer for transfer, entry in current.items() if entry.reason is not None]
    encoded_once = {
        transfer: replace(transfer.volume, path=transfer.target, signature=(entry.size, entry.tail))
        for transfer, entry in current.items()
        if entry.reason is None
    }
    rows, _ = cache.intact(cache_keys(list(encoded_once.values())))
    cached = [transfer for transfer, row in zip(encoded_once, rows, strict=True) if row is not None]
    settled = {*quarantined, *cached}
    left = [transfer for transfer in transfers if transfer not in settled]
    return StreamPlan(on_disk, left, len(cached), len(quarantined))


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


@dataclass
class DiskBudget:
    """How the stream uses the disk: `limit` bytes in all, of which `room` for files in transit; `encoded` by now, codes
    and lines of the manifest at `per_volume` each."""

    limit: float
    room: float
    encoded: float
    per_volume: int


def plan_disk(options: StreamOptions, cache: FeatureCache, transfers: Sequence[Transfer]) -> DiskBudget:
    """All the codes, and the rest for files. Raises HubError where the largest file and the codes do not fit, in
    --disk-gb or on the disks as they are."""
    per_volume = cache.record_bytes + LINE_BYTES + MANIFEST_BYTES
    encoded, growth = bytes_in(cache.folder), len(transfers) * per_volume
    largest = max(transfers, key=lambda transfer: transfer.size)
    codes = f"the codes of {len(transfers)} volumes"
    file = f"{largest.volume.name} ({size_text(largest.size)})"
    limit = options.disk_gb * 1e9
    if limit < (least := encoded + growth + largest.size):
        found = f"found --disk-gb {options.disk_gb:g}, expected at least {size_text(least)} for {file} and {codes}"
        raise HubError(found, "raise it, or choose fewer volumes", kind="disk")
    scratch, store = nearest_existing(options.staging), nearest_existing(cache.folder)
    one_disk = scratch.stat().st_dev == store.stat().st_dev
    scratch_free, store_free = shutil.disk_usage(scratch).free, shutil.disk_usage(store).free
    shared = growth if one_disk else 0
    free = scratch_free + bytes_in(options.staging) - SPARE_BYTES - shared
    if free < largest.size:
        what = f"{file} and {codes}" if one_disk else file
        raise _too_small(scratch, scratch_free, largest.size + shared + SPARE_BYTES, what)
    if not one_disk and store_free < growth + SPARE_BYTES:
        raise _too_small(store, store_free, growth + SPARE_BYTES, codes)
    room = min(limit - encoded - growth, free)
    return DiskBudget(encoded + growth + room, room, encoded, per_volume)


def _too_small(folder: Path, free: float, needed: float, what: str) -> HubError:
    found = f"the disk is too small: {size_text(free)} free in {folder}, {size_text(needed)} needed for {what}"
    remedy = "free some, or name a --data-dir, --scratch-dir and --cache-dir on larger disks"
    return HubError(found, remedy, kind="disk")


# ---- download, read, encode


@dataclass
class DownloadedVolume:
    """A transfer that ended: as a volume, its key in the cache, and what reading it gave."""

    transfer: Transfer
    volume: Volume
    cache_key: str | None = None
    signature: tuple[int, str] = (0, "")
    tensor: torch.Tensor | None = None
    decision: HuDecision | None = None
    unreadable: str | None = None


def read(transfer: Transfer, shape: tuple[int, int, int]) -> DownloadedVolume:
    found = DownloadedVolume(transfer, replace(transfer.volume, path=transfer.target))
    if transfer.error is not None:
        return found
    size, tail = file_signature(transfer.target)
    found.cache_key, found.signature = cache_key(found.volume), (size, str(tail))
    try:
        found.tensor, found.decision = read_volume(found.volume, shape)
    except VolumeError as error:
        cause = error.__context__
        if isinstance(cause, OSError) and cause.errno:  # the disk's fault, not the volume's
            reason = f"{transfer.target} could not be read ({cause.strerror})"
            transfer.error = HubError(reason, "check the disk of --scratch-dir, then run this again", kind="disk")
        else:  # the bytes are the hub's: fetching them again would not help
            found.unreadable = str(error).removeprefix(f"{transfer.target.name}: ")
    return found


def prefetch(
    downloader: Downloader, shape: tuple[int, int, int], tick: Callable[[], None]
) -> Iterator[DownloadedVolume]:
    """Volumes as they arrive, read by a thread that prefetches one. `tick` is called every now and then while there is
    none."""
    ready: queue.Queue = queue.Queue(maxsize=1)

    def work() -> None:
        try:
            for transfer in downloader:
                ready.put(read(transfer, shape))
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


def stream(selection: Selection, options: StreamOptions) -> None:
    """The chosen volumes into the cache; prints what it does.

    Raises HubError, CacheError, CohortError or CheckpointError, each one line; what has been encoded is kept.
    """
    token = find_token()
    with file_lock(options.data_dir, options.staging):
        chosen = select_volumes(selection, options.data_dir, token)
        make_folder(options.staging)
        device = choose_device(options.device)
        model = CTCLIPMultiAbnormalityModel(str(options.weights), head="linear").to(device).eval()  # only encodes
        print_row("encoder", f"{model.load_report} on {device}")
        cache = FeatureCache(options.cache_dir, model)
        plan = plan_stream(chosen, options, selection, cache, token)
        if plan.on_disk:
            encode_missing(model, cache, plan.on_disk, device, 0, Ranks(), lambda volumes, batch: print_failures(batch))
        total = size_text(sum(transfer.size for transfer in plan.transfers))
        known = f"{plan.cached} are in the cache, {plan.quarantined} in quarantine"
        print_row("", f"{known}, {len(plan.on_disk)} have a file here, {len(plan.transfers)} to fetch, {total}")
        budget = plan_disk(options, cache, plan.transfers) if plan.transfers else None
        clear_staging(options.staging, plan.transfers, budget.room if budget else 0)
        if budget:
            transit = size_text(budget.room)
            print_row("", f"disk: at most {size_text(budget.limit)}, of which {transit} for files in transit")
            encode_transfers(model, cache, plan.transfers, budget, selection, options, token)
        for folder in (*options.staging.iterdir(), options.staging):
            with suppress(OSError):  # not empty
                folder.rmdir()
    encoder = "" if str(options.weights) == CLASSFINE_PATH else f" --ctclip-path {shlex.quote(str(options.weights))}"
    more = f" --cache-dir {shlex.quote(str(options.cache_dir))}{encoder} --freeze-backbone"
    print_row("next", next_command(selection.split, options.data_dir, more))


def is_encoded(cache: FeatureCache, key: str | None) -> bool:
    """Whether its codes are there, intact: a process may have been killed after them and before their line."""
    (row,), _ = cache.intact([key])
    return row is not None


def encode_transfers(
    model: CTCLIPMultiAbnormalityModel,
    cache: FeatureCache,
    transfers: Sequence[Transfer],
    budget: DiskBudget,
    selection: Selection,
    options: StreamOptions,
    token: str,
) -> None:
    device = next(model.parameters()).device
    manifest_path = options.data_dir / streamed_path(selection.split)
    failures, done, start = Failures(), 0, time.monotonic()
    quarantined: list[str] = []
    bar = tqdm(total=len(transfers), desc="stream", bar_format=BAR)

    def show(refresh: bool = True) -> None:
        per_minute = 60 * done / (time.monotonic() - start)
        used = size_text(budget.encoded + bytes_in(options.staging))
        bar.set_postfix_str(f"{per_minute:.1f} vol/min, disk {used} of {size_text(budget.limit)}", refresh)

    with (
        closing(Manifest(manifest_path)) as manifest,
        closing(cache),
        bar,
        encoding(model, device),
        Downloader(transfers, token, budget.room) as downloader,
    ):
        for found in prefetch(downloader, model.input_shape, show):
            transfer, name = found.transfer, found.volume.name
            if transfer.error:
                failures.add(transfer, transfer.error)
                for part in parts_of(transfer.target):  # it would take room that others need
                    remove(part)
            else:
                failures.reset()
                if found.unreadable:
                    print_note(f"quarantined: {name}: {found.unreadable}")
                    quarantined.append(name)
                elif found.tensor is not None and found.decision and not is_encoded(cache, found.cache_key):
                    codes = model.encode_for_cache(found.tensor[None].to(device))
                    cache.append([found.volume], codes, [found.decision], [found.cache_key], len(transfers) - done)
                manifest.add(name, Streamed(selection.fixed, *found.signature, transfer.sha256, found.unreadable))
                budget.encoded += budget.per_volume
            remove(transfer.target)
            downloader.release(transfer)
            done += 1
            show(refresh=False)
            bar.update()
    minutes = (time.monotonic() - start) / 60
    encoded = len(transfers) - len(failures.transfers) - len(quarantined)
    speed = f"{minutes:.1f} min, {encoded / minutes:.1f} per minute"
    print_row("stream", f"{encoded} volumes encoded in {speed}: {cache.folder}")
    if quarantined:
        names = first_names(quarantined)
        print_row("", f"in quarantine, with the reason in {manifest_path}: {len(quarantined)} ({names})")
    failures.raise_if_any("what has been encoded is kept")
