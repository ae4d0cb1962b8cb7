"""What a frozen encoder makes of each volume, kept on disk: encoded once, read by every epoch and every later run.

CT-CLIP's tower ends in a vector quantiser, so in evaluation its token grid is `codebook[code_ids]`: 24 x 24 x 24 ids in
uint16, 27.6 KB per volume, are a lossless cache of 28 MB of tokens. Slice backbones keep pooled features (float32), for
the attention head tokens (float16: 2 bytes x slices x width, 20 KB for 8 slices of EfficientNet-B0, 131 KB for 64 of a
ViT-L; 1.0 MB for 8 x 7 x 7 patches of the former), or feature maps where CBAM follows (float16, as many as patches).

    <cache_dir>/<kind>-<12 hex of the key's hash>/
        key.json      what the records are a function of, beside the volume: encoder, input shape, preprocessing
        0000.bin      records of one size, one after the other
        0000.jsonl    a line for each: record number, volume name, source (`volume_key.cache_key`), reading, CRC-32
        0001.bin ...  the next writer's

A shard belongs to the one process that created it, and is never touched again after that. A record is on the disk
before its line is, so a whole line whose record is there makes an entry; whatever else a killed writer left behind is
ignored. Nothing is ever rewritten: a change of encoder, preprocessing or volume makes new entries.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ctclip.cli import OneLineParser, run_cli
from ctclip.data.cohort import Volume
from ctclip.data.ct_rate import FETCH_COMMAND, split_of
from ctclip.data.hounsfield import HuDecision
from ctclip.data.loading import Batch, micro_batch_size, volume_loader
from ctclip.data.preprocessing import PREPROCESSING_VERSION
from ctclip.data.volume_key import cache_keys
from ctclip.distributed import Ranks
from ctclip.errors import UserError
from ctclip.fileio import DISK_FULL, nearest_existing, read_json, replacing, write_all
from ctclip.formatting import BAR
from ctclip_model import CTCLIPMultiAbnormalityModel

MERGED_AT_ONCE = 256  # entries of another cache in memory
LINE_BYTES = 256  # more than an index line takes (about 150), for the estimate of disk space


class CacheError(UserError):
    """A cache that cannot be read or written. One line: what was found, what was expected, what to do."""


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest over names, types, shapes and bytes in the order of the names.

    Digests lie on disk: another order or another text makes every cache and every record one of something else.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encoder_digest(model: CTCLIPMultiAbnormalityModel) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors that `model.encode_for_cache` depends on."""
    return tensors_sha256(model.encoder_state())


def record_format(model: CTCLIPMultiAbnormalityModel) -> tuple[str, tuple[int, ...]]:
    """(numpy type, shape) of what is stored for one volume."""
    if model.cache_format == "codes":
        sizes = model.sizes
        assert sizes is not None
        depth = model.input_shape[0] // sizes.temporal_patch
        return "uint16" if sizes.codes <= 2**16 else "int32", (depth, sizes.grid, sizes.grid)
    device = next(model.parameters()).device
    with encoding(model, device):  # only the backbone knows its width and its map's size
        blank = model.encode_for_cache(torch.zeros(1, 1, *model.input_shape, device=device))
    return "float32" if model.cache_format == "pooled" else "float16", tuple(blank.shape[1:])


def backbone_key(model: CTCLIPMultiAbnormalityModel) -> str | list:
    """The architecture, with its arguments where a folder gave any: they can change what equal tensors compute."""
    if model.is_video:
        return str(model._hub_mixin_config["backbone"])
    architecture = model.backbone.net.pretrained_cfg["architecture"]
    config = model._hub_mixin_config["timm_config"]
    return [architecture, config["model_args"]] if config and config["model_args"] else architecture


@contextmanager
def encoding(model: CTCLIPMultiAbnormalityModel, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, and float32 throughout, whatever precision the caller trains with.

    Every later run rests on what is stored, near ties between codes flip below float32, and reading a volume costs more
    time than half precision would save: so no autocast, and no TF32 in matrix products and convolutions.
    """
    training, precision, tf32 = model.training, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        model.eval()
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(precision)
        model.train(training)


class Entry(NamedTuple):
    """One index line: where the record is, its CRC-32, how the file was read, what it was made from, and the volume."""

    shard: int
    record: int
    crc32: int
    reading: str
    source: str
    name: str


class FeatureCache:
    """The entries of one encoder under `cache_dir`; nothing is created there before the first `append`.

    A row is a number for one entry, good for this object only; `refresh` adds rows and never changes one.
    """

    def __init__(self, cache_dir: str | os.PathLike, model: CTCLIPMultiAbnormalityModel):
        dtype, shape = record_format(model)
        key = {
            "kind": model.cache_format,
            "shape": list(shape),
            "dtype": dtype,
            "encoder_sha256": encoder_digest(model),
            # timm has architectures that differ in padding or activation and not in a single tensor
            "backbone": None if model.is_ctclip else backbone_key(model),
            "input_shape": list(model.input_shape),
            "preprocessing_version": PREPROCESSING_VERSION,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._open(Path(cache_dir) / f"{model.cache_format}-{digest[:12]}", key)

    @classmethod
    def stored(cls, folder: Path, key: dict) -> FeatureCache:
        """The entries in `folder`, without the model, of the cache whose key.json is `key`."""
        cache = cls.__new__(cls)
        cache._open(folder, key)
        return cache

    def _open(self, folder: Path, key: dict) -> None:
        self.folder, self.key = folder, key
        self.shape, self.dtype = tuple(key["shape"]), np.dtype(key["dtype"])
        self.record_bytes = prod(self.shape) * self.dtype.itemsize
        self._entries: list[Entry] = []
        self._newest: dict[str, int] = {}  # cache_key of a volume -> row
        self._intact: set[int] = set()  # rows whose CRC has been compared
        self._indexed: dict[int, int] = {}  # shard -> bytes of its index that are in _entries
        self._memmaps: dict[int, np.ndarray] = {}  # shard -> (n, *shape)
        self._writing: tuple[int, IO[bytes], IO[bytes]] | None = None  # this process' own shard: number, .bin, .jsonl
        self.refresh()

    def refresh(self) -> None:
        """Takes in what other processes have appended since."""
        for shard in self._shards(".jsonl"):
            self._read_index(shard)

    def _shards(self, suffix: str) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob(f"*{suffix}") if path.stem.isdigit())

    def _file(self, shard: int, suffix: str) -> Path:
        return self.folder / f"{shard:04d}{suffix}"

    def _read_index(self, shard: int) -> None:
        with open(self._file(shard, ".jsonl"), "rb") as file:
            file.seek(self._indexed.get(shard, 0))
            new = file.read()
        path = self._file(shard, ".bin")
        records = path.stat().st_size // self.record_bytes if path.exists() else 0
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                fields = json.loads(line)
                entry = Entry(shard, *(fields[key] for key in Entry._fields[1:]))
                if entry.record < records:
                    self._newest[entry.source] = len(self._entries)
                    self._entries.append(entry)
            except (ValueError, KeyError, TypeError, RecursionError):  # a power cut can leave zeros where a line was
                continue
        self._indexed[shard] = self._indexed.get(shard, 0) + len(whole)
        self._memmaps.pop(shard, None)  # it has grown

    def rows(self, volumes: Sequence[Volume]) -> list[int | None]:
        """Row of each volume's entry, None where there is none for the volume as it is now."""
        return self.rows_of(cache_keys(volumes))

    def rows_of(self, keys: Sequence[str | None]) -> list[int | None]:
        return [self._newest.get(key) if key else None for key in keys]

    def readings(self, rows: Sequence[int]) -> list[str]:
        """How each volume's voxels were read: "hu" or "stored"."""
        return [self._entries[row].reading for row in rows]

    def _record(self, row: int) -> np.ndarray:
        entry = self._entries[row]
        if entry.shard not in self._memmaps:
            path = self._file(entry.shard, ".bin")
            shape = path.stat().st_size // self.record_bytes, *self.shape
            self._memmaps[entry.shard] = np.asarray(np.memmap(path, self.dtype, "r", shape=shape))
        return self._memmaps[entry.shard][entry.record]

    def _is_intact(self, row: int) -> bool:
        if row not in self._intact and zlib.crc32(self._record(row).data) == self._entries[row].crc32:
            self._intact.add(row)
        return row in self._intact

    def verify(self, rows: Sequence[int]) -> int:
        """Drops the entries whose record does not have its CRC any more, so that they count as missing; how many."""
        damaged = [row for row in rows if not self._is_intact(row)]
        for row in damaged:
            if self._newest.get(self._entries[row].source) == row:
                del self._newest[self._entries[row].source]
        return len(damaged)

    def intact(self, keys: Sequence[str | None]) -> tuple[list[int | None], int]:
        """(row of each intact entry, None without one; how many were damaged and count as missing from now on)."""
        damaged = self.verify([row for row in self.rows_of(keys) if row is not None])
        return self.rows_of(keys), damaged

    def load(self, rows: Sequence[int]) -> Tensor:
        """(n, *shape), as stored: uint16 or int32 codes, float16 maps or tokens, float32 pooled features.

        The CRC of a record is compared the first time; CacheError where it is wrong. `verify` finds that out before.
        """
        out = np.empty((len(rows), *self.shape), self.dtype)
        for i, row in enumerate(rows):
            if not self._is_intact(row):
                path = self._file(self._entries[row].shard, ".bin")
                raise CacheError(f"{path}: found a damaged record, expected what was written; start the run again")
            out[i] = self._record(row)
        return torch.from_numpy(out)

    def head_inputs(self, model: CTCLIPMultiAbnormalityModel, rows: Sequence[int], device: torch.device) -> Tensor:
        """What the head of `model`, whose cache this is, takes for these entries, on the device."""
        stored = self.load(rows)
        stored = stored.float() if stored.is_floating_point() else stored.int()  # few operations know 16 bits
        return model.features_from_cache(stored.to(device))

    def missing_message(self, volumes: Sequence[Volume], rows: Sequence[int | None]) -> str | None:
        """The one line for streamed volumes that have no entry, and no file to make one from; None without such."""
        streamed = [(volume, row) for volume, row in zip(volumes, rows, strict=True) if volume.signature is not None]
        known = sum(row is not None for _, row in streamed)
        if known == len(streamed):
            return None
        return (
            f"{self.folder}: found features of {known} of {len(streamed)} volumes that were streamed and have no file, "
            "expected those of all; choose the --cache-dir and the encoder (--model, --ctclip-path) that they were "
            f"streamed with, or fetch the files with {FETCH_COMMAND} {split_of(streamed[0][0].name)}"
        )

    def append(
        self,
        volumes: Sequence[Volume],
        arrays: Tensor,
        decisions: Sequence[HuDecision],
        keys: Sequence[str | None] | None = None,
        remaining: int = 0,
    ) -> None:
        """Adds an entry for each volume from `arrays` (n, *shape); they are on the disk when this returns.

        `keys`: those from before the files were read, since a file can change meanwhile; default: as they are now.
        Raises CacheError when the disk is full (the line speaks of the `remaining` volumes); earlier entries stay.
        """
        keys = cache_keys(volumes) if keys is None else keys
        with np.errstate(over="ignore"):
            records = arrays.detach().cpu().numpy().astype(self.dtype, order="C")
        if not np.isfinite(records).all():
            most = f"features of up to {arrays.abs().max():g} among {', '.join(volume.name for volume in volumes)}"
            raise CacheError(f"found {most}, expected what {self.dtype} can hold; see these volumes, or add "
                             "--freeze-epochs 0, which needs no cache")
        names, readings = [volume.name for volume in volumes], [decision.reading for decision in decisions]
        self._append(records, names, keys, readings, remaining)

    def _append(
        self,
        records: np.ndarray,
        names: Sequence[str],
        keys: Sequence[str | None],
        readings: Sequence[str],
        remaining: int,
    ) -> None:
        assert records.shape == (len(names), *self.shape), f"{records.shape} for {len(names)} x {self.shape}"
        try:
            shard, data, index = self._writing = self._writing or self._new_shard()
            number = data.tell() // self.record_bytes
            write_all(data, records.tobytes())
            lines: list[str] = []
            for name, key, reading, record in zip(names, keys, readings, records, strict=True):
                line = {"record": number + len(lines), "name": name, "source": key, "reading": reading}
                lines.append(json.dumps(line | {"crc32": zlib.crc32(record.data)}) + "\n")
            write_all(index, "".join(lines).encode())
        except BaseException as error:
            self.close()  # half a record must stay the last of its shard
            if not isinstance(error, OSError):
                raise
            found = error.strerror or str(error)
            message = f"{self.folder}: found {found}, expected a folder to write to; choose another --cache-dir"
            if error.errno in DISK_FULL:
                message = self.disk_full_message(max(remaining, len(names)), found)
            raise CacheError(message) from error
        self._read_index(shard)

    def take(self, other: FeatureCache) -> tuple[int, int, int]:
        """Appends the entries of `other`, of the same key, that this one does not have; -> how many were taken, were
        here, and are damaged there and left out."""
        keys = list(other._newest)
        _, damaged = other.intact(keys)
        keys = [key for key in keys if key in other._newest]
        here, _ = self.intact(keys)
        wanted = [key for key, row in zip(keys, here, strict=True) if row is None]
        need, free = self.disk_space(len(wanted))
        if need > free:
            raise CacheError(self.disk_full_message(len(wanted), "too little room"))
        for start in range(0, len(wanted), MERGED_AT_ONCE):
            chunk = wanted[start : start + MERGED_AT_ONCE]
            rows = [other._newest[key] for key in chunk]
            entries = [other._entries[row] for row in rows]
            names, readings = [entry.name for entry in entries], [entry.reading for entry in entries]
            self._append(other.load(rows).numpy(), names, chunk, readings, len(wanted) - start)
        self.close()
        return len(wanted), len(keys) - len(wanted), damaged

    def _new_shard(self) -> tuple[int, IO[bytes], IO[bytes]]:
        """Creates the next shard, which no other process can then take."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.json").exists():
            # Its own name: several writers may be here at once, on machines that number processes alike.
            with replacing(self.folder / "key.json", self.folder / f"key-{uuid4().hex}.tmp") as temporary:
                temporary.write_text(json.dumps(self.key, indent=2) + "\n")
        shard = max(self._shards(".bin"), default=-1) + 1
        while True:
            try:
                data = open(self._file(shard, ".bin"), "xb", buffering=0)  # noqa: SIM115  closed by close()
                return shard, data, open(self._file(shard, ".jsonl"), "xb", buffering=0)
            except FileExistsError:
                shard += 1

    def close(self) -> None:
        """Ends this process' shard, if it has begun one; a later `append` begins another."""
        if self._writing is not None:
            _, data, index = self._writing
            self._writing = None
            data.close()
            index.close()

    def disk_space(self, count: int) -> tuple[int, int]:
        """Bytes that `count` more volumes need, and bytes that are free on the folder's disk."""
        return count * (self.record_bytes + LINE_BYTES), shutil.disk_usage(nearest_existing(self.folder)).free

    def disk_full_message(self, count: int, found: str) -> str:
        """The one line for a disk that is full, or will be, or does not let us write."""
        need, free = self.disk_space(count)
        return (
            f"{self.folder}: found {found} ({free / 1e6:.1f} MB free on its disk), expected {need / 1e6:.1f} MB for "
            f"{count} more volumes; free that much on it, or choose a --cache-dir elsewhere, and start again: what is "
            "stored is kept"
        )


def encode_missing(
    model: CTCLIPMultiAbnormalityModel,
    cache: FeatureCache,
    volumes: Sequence[Volume],
    device: torch.device,
    workers: int,
    ranks: Ranks,
    on_batch: Callable[[list[Volume], Batch], None] | None = None,
) -> list[int | None]:
    """Encodes, on all ranks together, what `cache` does not have; returns the row of each volume, None if unreadable.

    `model` is on `device` and is the one that the cache was opened with. `on_batch` gets the list that a batch's
    `index` points into, and the batch. Raises CacheError when a streamed volume is not in the cache or the disk has too
    little room (before anything is encoded), when the disk fills up, or when it is not one that all ranks see.
    """
    keys = cache_keys(volumes)
    rows, damaged = cache.intact(keys)
    if damaged and ranks.is_main:
        tqdm.write(f"{cache.folder}: found {damaged} damaged entries, counting them as missing")
    missing = [i for i, row in enumerate(rows) if row is None]
    need, free = cache.disk_space(len(missing))
    message = cache.missing_message(volumes, rows)
    if message is None and need > free:
        message = cache.disk_full_message(len(missing), "too little room")
    # What the main rank sees counts: another one may have looked when the first new entries were there already.
    missing, message = ranks.all_gather((missing, message))[0]
    if message:
        raise CacheError(message)
    if missing and encoder_digest(model) != cache.key["encoder_sha256"]:
        raise CacheError(f"{cache.folder}: found other weights than the cache was opened with; open it with this model")
    mine = ranks.shard(missing)
    chosen = [volumes[i] for i in mine]
    size, pin = micro_batch_size(model.input_shape, 16), device.type == "cuda"
    loader = volume_loader(chosen, model.input_shape, size, num_workers=workers if chosen else 0, pin=pin)
    progress = tqdm(
        total=len(chosen), desc="encode", unit=" volumes", bar_format=BAR, delay=2, disable=not ranks.is_main
    )
    done = 0
    with encoding(model, device), progress:
        for batch in loader:
            if on_batch is not None:
                on_batch(chosen, batch)
            read = batch.index.tolist()
            if read:
                # One by one, because rounding depends on the shape of a batch: an entry must not depend on its
                # neighbours, on the number of ranks, or on where an earlier run was killed.
                uploads = (volume[None].to(device, non_blocking=True) for volume in batch.volumes)
                arrays = torch.cat([model.encode_for_cache(upload) for upload in uploads])
                before = [keys[mine[i]] for i in read]
                cache.append([chosen[i] for i in read], arrays, batch.decisions, before, len(chosen) - done)
            done += len(read) + len(batch.failures)
            progress.update(len(read) + len(batch.failures))
    cache.close()
    ranks.barrier()
    cache.refresh()
    rows = cache.rows_of(keys)
    present = [row is not None for row in rows]
    if any(other != present for other in ranks.all_gather(present)):
        found = "found different entries on different ranks, expected one folder that all of them see"
        raise CacheError(f"{cache.folder}: {found}; choose a --cache-dir on a shared file system")
    return rows


# ------------------------------------------------------------------ caches of several machines as one


def merge_caches(target: Path, sources: Sequence[Path]) -> Iterator[str]:
    """Takes what the caches under `sources` have and the one under `target` has not, which is made where there is none;
    a line for each encoder's."""
    for source in sources:
        folders = sorted(path.parent for path in source.glob("*/key.json"))
        if not folders or source.resolve() == target.resolve():
            found = "the cache to merge into" if folders else "no cache (no folder with a key.json)"
            raise CacheError(f"{source}: found {found}, expected another one's --cache-dir; correct it")
        for folder in folders:
            key = read_key(folder)
            there = target / folder.name
            if there.is_dir() and read_key(there) != key:
                raise CacheError(f"{there}: found another key.json than in {folder}, expected the same; remove the one "
                                 "that was edited")
            cache = FeatureCache.stored(there, key)
            taken, here, damaged = cache.take(FeatureCache.stored(folder, key))
            left_out = f", {damaged} damaged ones left out" if damaged else ""
            yield f"{folder}: {taken} entries taken into {there}, {here} were there{left_out}"


def read_key(folder: Path) -> dict:
    """What key.json in a cache's folder says."""
    try:
        key = read_json(folder / "key.json")
        prod(key["shape"]) * np.dtype(key["dtype"]).itemsize
        return key
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{folder / 'key.json'}: found no key of a cache ({error}), expected the one that was written "
                         "with it; remove the folder, or bring the file back") from error


def merge_parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m ctclip.data.feature_cache",
                           description="Merges feature caches, such as those of several machines.")  # fmt: skip
    merge = parser.add_subparsers(dest="command", required=True, metavar="merge").add_parser(
        "merge", help="take what other caches have into the first"
    )
    merge.add_argument("target", type=Path, metavar="TARGET", help="--cache-dir to merge into")
    merge.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="--cache-dir of another machine")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = merge_parser().parse_args(argv)

    def run() -> None:
        for line in merge_caches(args.target, args.sources):
            print(line, flush=True)

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
