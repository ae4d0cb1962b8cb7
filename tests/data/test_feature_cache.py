"""The cache of frozen features, against what it stores: codes and features of the model itself, computed apart.

Checked: entries after truncation at every byte, after SIGKILL and on a full disk; writers side by side; what makes a
new entry and what finds an old one; damaged records; encoding by one process, by two, and with neighbours.
"""

import gzip
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_data import chest, put, row, write

from ctclip.data import feature_cache
from ctclip.data.cohort import Volume, load_cohort
from ctclip.data.ct_rate import volume_path
from ctclip.data.feature_cache import (
    CacheError,
    FeatureCache,
    encode_missing,
    encoder_digest,
)
from ctclip.data.hounsfield import HuDecision
from ctclip.data.preprocessing import read_volume
from ctclip.data.volume_key import cache_key, file_signature
from ctclip.distributed import Ranks
from ctclip_model import CTCLIPMultiAbnormalityModel

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
HU = HuDecision("hu", "")
BLANK = np.zeros(18, np.float32)
fork = multiprocessing.get_context("fork")


class Tower:
    """As much of a CT-CLIP model as opening a cache needs, with records of 2 * grid**3 bytes."""

    is_ctclip, cache_format = True, "codes"

    def __init__(self, grid: int = 1, codes: int = 8192, weight: float = 0.0):
        self.sizes = SimpleNamespace(grid=grid, temporal_patch=2, codes=codes)
        self.input_shape = (2 * grid, 4 * grid, 4 * grid)
        self.weight = weight

    def encoder_state(self) -> dict[str, torch.Tensor]:
        return {"b": torch.full((3,), self.weight), "a": torch.tensor(1)}


@pytest.fixture
def make_volumes(tmp_path):
    """Volumes whose files are there and are no CTs."""

    def make(count: int, start: int = 0) -> list[Volume]:
        (tmp_path / "files").mkdir(exist_ok=True)
        volumes = []
        for i in range(start, start + count):
            path = tmp_path / "files" / f"valid_{i}_a_1.nii.gz"
            path.write_bytes(i.to_bytes(12, "little"))
            volumes.append(Volume(path.name, path, BLANK))
        return volumes

    return make


def records_of(volumes: list[Volume], grid: int = 1) -> torch.Tensor:
    """What the tests store for these volumes: codes that follow from the name."""
    numbers = torch.tensor([int(volume.name.split("_")[1]) for volume in volumes])
    return (numbers.view(-1, 1, 1, 1) * 37 + torch.arange(grid**3).view(grid, grid, grid)) % 8192


def fill(cache: FeatureCache, volumes: list[Volume], grid: int = 1, at_once: int = 1) -> None:
    for i in range(0, len(volumes), at_once):
        part = volumes[i : i + at_once]
        cache.append(part, records_of(part, grid), [HU] * len(part))
    cache.close()


def stored(cache: FeatureCache, volumes: list[Volume], grid: int = 1) -> int:
    """How many of the volumes have an entry; each of those must be right."""
    found = [(volume, row) for volume, row in zip(volumes, cache.rows(volumes), strict=True) if row is not None]
    if found:
        there, rows = zip(*found, strict=True)
        assert cache.verify(rows) == 0
        assert torch.equal(cache.load(rows).long(), records_of(there, grid))
    return len(found)


def in_child(function, *arguments) -> fork.Process:
    child = fork.Process(target=function, args=arguments)
    child.start()
    return child


# ------------------------------------------------------------------ the folder


def test_entries_come_back_from_a_readable_folder(tmp_path, make_volumes):
    volumes = make_volumes(5)
    cache = FeatureCache(tmp_path / "cache", Tower(2))
    assert cache.rows(volumes) == [None] * 5 and not (tmp_path / "cache").exists()  # looking creates nothing
    cache.append(volumes[:3], records_of(volumes[:3], 2), [HU, HuDecision("stored", ""), HU])
    assert cache.rows(volumes) == [0, 1, 2, None, None]  # at once, and without opening it again
    cache.append(volumes[3:4], records_of(volumes[3:4], 2), [HU])

    cache = FeatureCache(tmp_path / "cache", Tower(2))
    codes = cache.load([3, 0, 1, 0])
    assert codes.dtype == torch.uint16 and codes.shape == (4, 2, 2, 2)
    assert torch.equal(codes.long(), records_of([volumes[i] for i in (3, 0, 1, 0)], 2))
    assert cache.readings([0, 1]) == ["hu", "stored"] and cache.load([]).shape == (0, 2, 2, 2)
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("codes-") and len(folder.name) == len("codes-") + 12
    assert sorted(path.name for path in folder.iterdir()) == ["0000.bin", "0000.jsonl", "key.json"]
    assert (folder / "0000.bin").stat().st_size == 4 * 16
    key = json.loads((folder / "key.json").read_text())
    assert key["kind"] == "codes" and key["shape"] == [2, 2, 2] and key["dtype"] == "uint16"
    assert key["input_shape"] == [4, 8, 8] and key["preprocessing_version"] == 2 and len(key["encoder_sha256"]) == 64
    lines = [json.loads(line) for line in (folder / "0000.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [volume.name for volume in volumes[:4]]


def test_type_of_codes_follows_from_the_codebook(tmp_path, make_volumes):
    volumes = make_volumes(1)
    for codes, dtype in ((2**16, torch.uint16), (2**16 + 1, torch.int32)):
        cache = FeatureCache(tmp_path, Tower(codes=codes))
        cache.append(volumes, torch.full((1, 1, 1, 1), codes - 1), [HU])
        assert cache.load([0]).dtype == dtype and cache.load([0]).long().item() == codes - 1


def test_rows_stay_what_they_are_while_others_append(tmp_path, make_volumes):
    volumes = make_volumes(6)
    first, second = (FeatureCache(tmp_path / "cache", Tower()) for _ in range(2))
    first.append(volumes[:1], records_of(volumes[:1]), [HU])
    second.append(volumes[1:2], records_of(volumes[1:2]), [HU])
    first.append(volumes[2:3], records_of(volumes[2:3]), [HU])
    assert first.rows(volumes[:4]) == [0, None, 1, None]
    second.append(volumes[3:4], records_of(volumes[3:4]), [HU])
    first.refresh()
    assert first.rows(volumes[:4]) == [0, 2, 1, 3]
    assert torch.equal(first.load([0, 1, 2, 3]).long(), records_of([volumes[i] for i in (0, 2, 1, 3)]))
    first.append(volumes[4:5], records_of(volumes[4:5]), [HU])  # its map of the shard has to grow
    assert stored(first, volumes) == 5
    assert len(list(first.folder.glob("*.bin"))) == 2


# ------------------------------------------------------------------ what is left after an accident


def test_truncated_at_every_byte_it_opens_with_the_complete_entries(tmp_path, make_volumes):
    volumes = make_volumes(3)
    model = Tower()  # records of 2 bytes
    whole = FeatureCache(tmp_path / "whole", model)
    fill(whole, volumes)
    data, index = ((whole.folder / name).read_bytes() for name in ("0000.bin", "0000.jsonl"))
    ends = [i + 1 for i, byte in enumerate(index) if byte == ord("\n")]
    assert len(data) == 6 and len(ends) == 3
    sources = [cache_key(volume) for volume in volumes]
    folder = tmp_path / "cut" / whole.folder.name
    folder.mkdir(parents=True)
    for n_data in range(len(data) + 1):
        (folder / "0000.bin").write_bytes(data[:n_data])
        for n_index in range(len(index) + 1):
            (folder / "0000.jsonl").write_bytes(index[:n_index])
            expected = min(n_data // 2, sum(end <= n_index for end in ends))
            cache = FeatureCache(tmp_path / "cut", model)
            assert cache.rows_of(sources) == [i if i < expected else None for i in range(3)]
            assert cache.verify(range(expected)) == 0
            assert torch.equal(cache.load(range(expected)).long(), records_of(volumes[:expected]))


def test_only_what_is_missing_is_done_again_after_a_cut(tmp_path, make_volumes):
    volumes, model = make_volumes(4), Tower()
    fill(FeatureCache(tmp_path / "cache", model), volumes)
    (folder,) = (tmp_path / "cache").iterdir()
    for name, length in (("0000.bin", 7), ("0000.jsonl", 400)):  # three records and a half, two lines and a piece
        os.truncate(folder / name, length)
    before = (folder / "0000.jsonl").read_bytes()
    cache = FeatureCache(tmp_path / "cache", model)
    missing = [volume for volume, row in zip(volumes, cache.rows(volumes), strict=True) if row is None]
    assert 0 < len(missing) < 4
    fill(cache, missing)
    assert stored(FeatureCache(tmp_path / "cache", model), volumes) == 4
    assert (folder / "0000.jsonl").read_bytes() == before and (folder / "0001.bin").stat().st_size == 2 * len(missing)


def test_zeros_in_an_index_and_a_missing_shard_cost_only_their_own_entries(tmp_path, make_volumes):
    volumes, model = make_volumes(4), Tower()
    cache = FeatureCache(tmp_path / "cache", model)
    fill(cache, volumes[:3])
    fill(cache, volumes[3:])
    lines = (cache.folder / "0000.jsonl").read_bytes().splitlines(keepends=True)
    (cache.folder / "0000.jsonl").write_bytes(lines[0] + bytes(50) + b"\n" + b"[1]\n" + b'{"record": "x"}\n' + lines[2])
    (cache.folder / "0001.bin").unlink()
    (cache.folder / "0000 (1).jsonl").write_bytes(lines[1])  # a synchronised folder's copy
    rows = FeatureCache(tmp_path / "cache", model).rows(volumes)
    assert [row is not None for row in rows] == [True, False, True, False]


def _append_for_ever(folder: Path, volumes: list[Volume], pipe) -> None:
    cache = FeatureCache(folder, Tower(4))
    for volume in volumes:
        cache.append([volume], records_of([volume], 4), [HU])
        pipe.send(volume.name)


def test_killed_at_any_moment_nothing_that_was_reported_is_lost(tmp_path, make_volumes):
    volumes, generator = make_volumes(400), random.Random(0)
    for _ in range(12):
        known = stored(FeatureCache(tmp_path / "cache", Tower(4)), volumes, 4)
        missing = [
            volume
            for volume, row in zip(volumes, FeatureCache(tmp_path / "cache", Tower(4)).rows(volumes), strict=True)
            if row is None
        ]
        receiver, sender = fork.Pipe(duplex=False)
        child = in_child(_append_for_ever, tmp_path / "cache", missing, sender)
        sender.close()
        assert receiver.recv() == missing[0].name
        time.sleep(generator.uniform(0, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        reported = 1
        try:
            while receiver.recv():
                reported += 1
        except EOFError:
            pass
        now = stored(FeatureCache(tmp_path / "cache", Tower(4)), volumes, 4)
        assert now in (known + reported, known + reported + 1)  # at most the one in flight
        assert child.exitcode == -signal.SIGKILL
    assert now < len(volumes)


def _append_with_a_limit(folder: Path, grid: int, limit: int, volumes: list[Volume], pipe) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    cache = FeatureCache(folder, Tower(grid))
    try:
        for i, volume in enumerate(volumes):
            cache.append([volume], records_of([volume], grid), [HU], remaining=len(volumes) - i)
    except CacheError as error:
        pipe.send((str(error), [row is not None for row in cache.rows(volumes)]))


@pytest.mark.parametrize(("grid", "limit"), [(8, 2500), (1, 600)], ids=["records", "index"])
def test_full_disk_is_one_line_and_keeps_what_was_stored(tmp_path, make_volumes, grid, limit):
    volumes = make_volumes(6)
    receiver, sender = fork.Pipe(duplex=False)
    child = in_child(_append_with_a_limit, tmp_path / "cache", grid, limit, volumes, sender)
    message, kept = receiver.recv()
    child.join()
    assert "\n" not in message and "File too large" in message and "free" in message and "--cache-dir" in message
    done = sum(kept)
    assert 1 < done < 6 and kept == [True] * done + [False] * (6 - done)
    assert f"{6 - done} more volumes" in message
    cache = FeatureCache(tmp_path / "cache", Tower(grid))
    assert stored(cache, volumes, grid) == done
    fill(cache, volumes[done:], grid)  # there is room again
    assert stored(FeatureCache(tmp_path / "cache", Tower(grid)), volumes, grid) == 6


def test_a_writer_goes_on_in_a_new_shard_after_a_failed_append(tmp_path, make_volumes, monkeypatch):
    volumes = make_volumes(3)
    cache = FeatureCache(tmp_path / "cache", Tower())
    cache.append(volumes[:1], records_of(volumes[:1]), [HU])
    write_all = feature_cache.write_all

    def interrupted(file, data):
        write_all(file, data[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_cache, "write_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.append(volumes[1:2], records_of(volumes[1:2]), [HU])
    monkeypatch.undo()
    cache.append(volumes[1:], records_of(volumes[1:]), [HU, HU])
    for opened in (cache, FeatureCache(tmp_path / "cache", Tower())):
        assert stored(opened, volumes) == 3


def test_a_record_is_on_the_disk_before_its_line(tmp_path, make_volumes, monkeypatch):
    volumes, synced = make_volumes(3), []

    def sync(number: int) -> None:
        status = os.fstat(number)
        suffixes = {path.stat().st_ino: path.suffix for path in cache.folder.glob("0*")}
        if status.st_ino in suffixes:  # neither key.json nor the folder
            synced.append((suffixes[status.st_ino], status.st_size))

    cache = FeatureCache(tmp_path / "cache", Tower())
    monkeypatch.setattr(os, "fsync", sync)
    for part in (volumes[:1], volumes[1:]):
        cache.append(part, records_of(part), [HU] * len(part))
    assert [suffix for suffix, _ in synced] == [".bin", ".jsonl"] * 2
    assert [size for suffix, size in synced if suffix == ".bin"] == [2, 6]


def test_any_layout_in_memory_is_stored_in_order(tmp_path, make_volumes):
    volumes = make_volumes(2)
    cache = FeatureCache(tmp_path / "cache", Tower(4))
    turned = records_of(volumes, 4).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not turned.is_contiguous()
    cache.append(volumes, turned, [HU] * 2)
    assert stored(FeatureCache(tmp_path / "cache", Tower(4)), volumes, 4) == 2


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, make_volumes):
    (tmp_path / "file").write_text("")
    volumes = make_volumes(1)
    cache = FeatureCache(tmp_path / "file" / "cache", Tower())
    with pytest.raises(CacheError, match="found Not a directory, expected a folder to write to;") as error:
        cache.append(volumes, records_of(volumes), [HU])
    assert "\n" not in str(error.value)


def test_damaged_records_are_dropped_and_never_loaded(tmp_path, make_volumes):
    volumes = make_volumes(4)
    cache = FeatureCache(tmp_path / "cache", Tower(2))
    fill(cache, volumes, 2)
    path = cache.folder / "0000.bin"
    content = bytearray(path.read_bytes())
    content[16 + 5] ^= 1
    path.write_bytes(content)
    cache = FeatureCache(tmp_path / "cache", Tower(2))
    rows = cache.rows(volumes)
    assert None not in rows
    with pytest.raises(CacheError, match="0000.bin: found a damaged record"):
        cache.load(rows)
    assert cache.verify(rows) == 1
    assert cache.rows(volumes) == [0, None, 2, 3]
    fill(cache, volumes[1:2], 2)
    for opened in (cache, FeatureCache(tmp_path / "cache", Tower(2))):
        assert stored(opened, volumes, 2) == 4


def _append_together(barrier, folder: Path, volumes: list[Volume]) -> None:
    cache = FeatureCache(folder, Tower(2))
    barrier.wait()
    for volume in volumes:
        cache.append([volume], records_of([volume], 2), [HU])


def test_writers_side_by_side_all_succeed(tmp_path, make_volumes):
    volumes = make_volumes(80)
    barrier = fork.Barrier(4)
    parts = [volumes[:30], volumes[20:40], volumes[40:60], volumes[60:]]  # ten volumes twice
    children = [in_child(_append_together, barrier, tmp_path / "cache", part) for part in parts]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    cache = FeatureCache(tmp_path / "cache", Tower(2))
    assert stored(cache, volumes, 2) == 80
    names = sorted(path.name for path in cache.folder.iterdir())
    assert names == sorted(["key.json", *(f"000{i}{end}" for i in range(4) for end in (".bin", ".jsonl"))])
    assert json.loads((cache.folder / "key.json").read_text()) == cache.key


def test_a_number_that_is_taken_meanwhile_is_passed_over(tmp_path, make_volumes, monkeypatch):
    """As if each writer had listed the folder before the others made their shards, and all were at key.json at once."""
    volumes = make_volumes(3)
    caches = [FeatureCache(tmp_path / "cache", Tower()) for _ in volumes]
    listing, replace = FeatureCache._shards, os.replace
    monkeypatch.setattr(FeatureCache, "_shards", lambda self, end: [] if end == ".bin" else listing(self, end))
    waiting = [1, 2]

    def replace_after_the_next(source, target) -> None:
        if waiting:
            i = waiting.pop(0)
            caches[i].append([volumes[i]], records_of([volumes[i]]), [HU])
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_after_the_next)
    caches[0].append(volumes[:1], records_of(volumes[:1]), [HU])
    monkeypatch.undo()
    cache = FeatureCache(tmp_path / "cache", Tower())
    assert stored(cache, volumes) == 3 and len(list(cache.folder.glob("*.bin"))) == 3
    assert not list(cache.folder.glob("*.tmp"))


# ------------------------------------------------------------------ what makes a new entry


def test_another_encoder_or_preprocessing_has_other_entries_and_the_old_ones_return(
    tmp_path, make_volumes, monkeypatch
):
    volumes, model = make_volumes(2), Tower(2)
    fill(FeatureCache(tmp_path / "cache", model), volumes, 2)
    for other in (Tower(2, weight=1e-7), Tower(2, weight=-0.0), Tower(2, codes=64)):
        assert (FeatureCache(tmp_path / "cache", other).rows(volumes) == [None, None]) == (other.sizes.codes == 8192)
    renamed, retyped = Tower(2), Tower(2)
    renamed.encoder_state = lambda: {"c": torch.zeros(3), "a": torch.tensor(1)}
    retyped.encoder_state = lambda: {"b": torch.zeros(3, dtype=torch.int32), "a": torch.tensor(1)}
    for other in (renamed, retyped):
        assert FeatureCache(tmp_path / "cache", other).rows(volumes) == [None, None]
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "PREPROCESSING_VERSION", 3)
        cache = FeatureCache(tmp_path / "cache", model)
        assert cache.rows(volumes) == [None, None]
        fill(cache, volumes[:1], 2)
        assert cache.rows(volumes) == [0, None]
    assert FeatureCache(tmp_path / "cache", model).rows(volumes) == [0, 1]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    reordered = Tower(2)
    reordered.encoder_state = lambda: dict(sorted(Tower(2).encoder_state().items()))
    assert FeatureCache(tmp_path / "cache", reordered).rows(volumes) == [0, 1]


def test_a_metadata_row_that_flips_the_verdict_makes_a_new_entry(tiny_classfine, tmp_path):
    """HU under a blank header: read by the row where both say the same, by the header where the row's scale is off."""
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    path = write(tmp_path / "a.nii.gz", chest(), spacing=(1.0, 1.0, 1.0), affine=np.eye(4))
    flat, shifted, stretched = (
        Volume("a.nii.gz", path, BLANK, metadata)
        for metadata in (row(intercept=0.0), row(intercept=-1024.0), row(spacing=(8.0, 8.0, 9.0), intercept=0.0))
    )
    readings = []
    for volume in (flat, shifted, stretched):
        assert FeatureCache(tmp_path / "cache", model).rows([volume]) == [None]
        cache, rows = run(model, tmp_path / "cache", [volume])
        assert torch.equal(cache.load(rows).long(), encoded(model, [volume], model.input_shape))
        readings += cache.readings(rows)
    assert readings == ["stored", "hu", "stored"]
    cache = FeatureCache(tmp_path / "cache", model)
    assert cache.readings(cache.rows([flat, shifted])) == ["stored", "hu"]  # back to the old row, the old entry
    assert not torch.equal(*cache.load(cache.rows([flat, stretched])).long())
    assert cache.rows([Volume("a.nii.gz", path, BLANK)]) == [None]
    # What the network does not see makes no new entry.
    assert cache.rows([Volume("a.nii.gz", path, BLANK + 1, flat.metadata | {"PatientAge": "061Y"})]) != [None]


def test_the_folder_the_name_and_the_file_are_part_of_the_source(tmp_path):
    name = "valid_1_a_1.nii.gz"
    one, two = put(tmp_path, name, True), put(tmp_path, name, False)
    shutil.copy(one, two)  # the same bytes, in the folder of version 1
    base = cache_key(Volume(name, one, BLANK))
    assert base != cache_key(Volume(name, two, BLANK))
    assert base != cache_key(Volume("valid_1_a_2.nii.gz", one, BLANK))
    assert cache_key(Volume(name, tmp_path / "gone" / name, BLANK)) is None
    copy = tmp_path / "elsewhere" / volume_path(name, True)
    copy.parent.mkdir(parents=True)
    shutil.copy(one, copy)
    os.utime(copy, (1, 1))
    assert base == cache_key(Volume(name, copy, BLANK))  # a .gz carries its identity in its last bytes
    before = one.read_bytes()
    write(one, chest(seed=7))
    assert base != cache_key(Volume(name, one, BLANK))
    one.write_bytes(before)
    assert base == cache_key(Volume(name, one, BLANK))
    one.write_bytes(b"\x1f")  # shorter than its identity
    assert cache_key(Volume(name, one, BLANK)) not in (None, base)

    plain = write(tmp_path / "plain.nii", chest())
    source = cache_key(Volume("plain.nii", plain, BLANK))
    os.utime(plain, ns=(1, plain.stat().st_mtime_ns + 1))
    assert source != cache_key(Volume("plain.nii", plain, BLANK))


def blocks(content: bytes) -> bytes:
    """As bgzip has it: members of 64 KB with their size in an extra field, and an empty one at the end. Stored, so that
    every size stays as it is."""
    out, header = b"", bytes.fromhex("1f8b08040000000000ff060042430200")
    for start in range(0, len(content), 65280):
        part = content[start : start + 65280]
        packer = zlib.compressobj(0, zlib.DEFLATED, -15)
        packed = packer.compress(part) + packer.flush()
        check = zlib.crc32(part).to_bytes(4, "little") + len(part).to_bytes(4, "little")
        out += header + (len(packed) + 25).to_bytes(2, "little") + packed + check
    return out + header + bytes.fromhex("1b0003000000000000000000")


@pytest.mark.parametrize("changed", [slice(None), slice(0, 1), slice(-70000, -69999)], ids=["all", "first", "late"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_bgzip_ed_file_that_is_rewritten_with_equal_size_is_another(changed, ended, tmp_path):
    """Its last eight bytes are those of an empty block, or of its last block, whatever is in the others."""
    content = np.random.default_rng(0).integers(0, 256, 2_000_000, np.uint8)
    path, signatures = tmp_path / "x.nii.gz", []
    for _ in range(2):
        packed = blocks(content.tobytes())
        path.write_bytes(packed if ended else packed[:-28])
        os.utime(path, (1, 1))
        signatures.append(file_signature(path))
        assert gzip.decompress(path.read_bytes()) == content.tobytes()
        content[changed] ^= 0xFF
    assert signatures[0][0] == signatures[1][0] and signatures[0] != signatures[1]
    copy = shutil.copy(path, tmp_path / "copy.nii.gz")
    assert file_signature(Path(copy)) == signatures[1]


def test_the_signature_of_other_gzip_files_is_their_last_eight_bytes(tmp_path):
    """Caches rest on it. With a file name in the header, as the command `gzip` has it, too."""
    path = tmp_path / "x.nii.gz"
    with gzip.GzipFile("x.nii", "wb", fileobj=path.open("wb")) as file:
        file.write(b"voxels")
    assert path.read_bytes()[3] == 8
    tail = zlib.crc32(b"voxels").to_bytes(4, "little") + (6).to_bytes(4, "little")
    assert file_signature(path) == (path.stat().st_size, tail.hex())


# ------------------------------------------------------------------ filling it


@pytest.fixture
def volumes(phantoms) -> list[Volume]:
    return load_cohort(phantoms, "valid").volumes[:7]


def encoded(model, volumes, shape) -> torch.Tensor:
    """Codes as the model gives them, volume by volume."""
    with torch.no_grad():
        return torch.cat([model.eval().code_ids(read_volume(volume, shape)[0][None]) for volume in volumes])


def run(model, folder, volumes, on_batch=None, ranks=None) -> tuple[FeatureCache, list[int | None]]:
    cache = FeatureCache(folder, model)
    return cache, encode_missing(model, cache, volumes, CPU, 0, ranks or Ranks(), on_batch)


def test_codes_in_the_cache_are_those_of_the_model_and_give_its_latents(tiny_classfine, volumes, tmp_path):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    seen = []
    cache, rows = run(model, tmp_path, volumes, lambda chosen, batch: seen.extend((chosen, v) for v in batch.decisions))
    codes = cache.load(rows)
    assert codes.dtype == torch.uint16 and torch.equal(codes.long(), encoded(model, volumes, model.input_shape))
    assert len(seen) == 7 and seen[0][0] == volumes
    assert cache.readings(rows) == [decision.reading for _, decision in seen] and "stored" in cache.readings(rows)
    x = torch.stack([read_volume(volume, model.input_shape)[0] for volume in volumes])
    with torch.no_grad():
        assert (model.features_from_cache(codes) - model.encode(x)).abs().max() < 1e-6
        assert (model.head(model.features_from_cache(codes)) - model(x)).abs().max() < 1e-5
    head = CTCLIPMultiAbnormalityModel(tiny_classfine, head="attention")
    assert FeatureCache(tmp_path, head).rows(volumes) == rows  # one cache for every head


def test_what_is_there_is_not_encoded_again(tiny_classfine, volumes, tmp_path, monkeypatch):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    seen = []
    run(model, tmp_path, volumes[:4])
    cache, rows = run(model, tmp_path, volumes, lambda chosen, batch: seen.extend(chosen[i] for i in batch.index))
    assert seen == volumes[4:] and None not in rows
    content = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in cache.folder.iterdir()}
    assert len(content) == 5

    def refuse(*_):
        raise AssertionError("opened for writing")

    monkeypatch.setattr(FeatureCache, "_new_shard", refuse)
    monkeypatch.setattr(CTCLIPMultiAbnormalityModel, "encode_for_cache", refuse)
    cache.folder.chmod(0o555)
    cache, again = run(model, tmp_path, volumes)
    cache.folder.chmod(0o755)
    assert torch.equal(cache.load(again).long(), cache.load(rows).long())
    assert content == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in cache.folder.iterdir()}


def test_a_volume_that_cannot_be_read_has_no_entry(tiny_classfine, volumes, tmp_path):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"\x1f\x8b no volume")
    broken = [Volume("bad.nii.gz", bad, BLANK), Volume("gone.nii.gz", tmp_path / "gone.nii.gz", BLANK)]
    failures = []
    for _ in range(2):
        cache, rows = run(
            model,
            tmp_path / "cache",
            [broken[0], volumes[0], broken[1]],
            lambda _, batch: failures.extend(name for name, _ in batch.failures),
        )
        assert [row is not None for row in rows] == [False, True, False]
    assert failures == ["bad.nii.gz", "gone.nii.gz"] * 2  # tried again, in case they have been mended
    _, rows = run(model, tmp_path / "other", broken)
    assert rows == [None, None] and not (tmp_path / "other").exists()


def test_an_entry_does_not_depend_on_its_neighbours_or_on_interruptions(tiny_classfine, volumes, tmp_path):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    together, rows = run(model, tmp_path / "together", volumes)
    for part in (volumes[3:4], volumes[:2], volumes[::-1]):
        apart, _ = run(model, tmp_path / "apart", part)
    assert torch.equal(apart.load(apart.rows(volumes)).long(), together.load(rows).long())
    slices = CTCLIPMultiAbnormalityModel(None, "test_resnet", pretrained=False, n_slices=2)
    together, rows = run(slices, tmp_path / "together", volumes[:3])
    for volume in volumes[2::-1]:
        apart, _ = run(slices, tmp_path / "apart", [volume])
    assert torch.equal(apart.load(apart.rows(volumes[:3])), together.load(rows))  # floats, to the last bit


def test_damaged_entries_are_reported_once_and_encoded_again(tiny_classfine, volumes, tmp_path, capsys):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    cache, rows = run(model, tmp_path, volumes)
    path = cache.folder / "0000.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 255
    content[-1] ^= 255
    path.write_bytes(content)
    before = capsys.readouterr().out
    seen = []
    cache, rows = run(model, tmp_path, volumes, lambda chosen, batch: seen.extend(chosen[i] for i in batch.index))
    out = capsys.readouterr().out
    assert not before and out.count("\n") == 1 and "found 2 damaged entries" in out
    assert seen == [volumes[0], volumes[-1]]
    assert torch.equal(cache.load(rows).long(), encoded(model, volumes, model.input_shape))
    run(model, tmp_path, volumes)
    assert not capsys.readouterr().out


def test_a_rewritten_file_is_encoded_again_and_its_old_entry_returns(tiny_classfine, tmp_path):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    name = "valid_1_a_1.nii.gz"
    path = put(tmp_path, name, True, seed=1)
    volume, before = Volume(name, path, BLANK), path.read_bytes()
    cache, (first,) = run(model, tmp_path / "cache", [volume])
    put(tmp_path, name, True, seed=2)
    assert cache.rows([volume]) == [None]
    cache, (second,) = run(model, tmp_path / "cache", [volume])
    assert not torch.equal(cache.load([first]).long(), cache.load([second]).long())
    path.write_bytes(before)
    assert cache.rows([volume]) == [first]


@pytest.mark.parametrize(("kind", "attention"), [("pooled", None), ("maps", "cbam"), ("tokens", None)])
def test_slice_backbones_keep_pooled_features_tokens_or_maps(volumes, tmp_path, kind, attention):
    torch.manual_seed(0)
    head = "attention" if kind == "tokens" else "linear"
    model = CTCLIPMultiAbnormalityModel(
        None, "test_resnet", attention=attention, pretrained=False, n_slices=2, head=head
    )
    model.train()
    running = {name: value.clone() for name, value in model.named_buffers()}
    cache, rows = run(model, tmp_path, volumes[:2])
    features = cache.load(rows)
    x = torch.stack([read_volume(volume, model.input_shape)[0] for volume in volumes[:2]])
    assert model.training and all(torch.equal(running[name], value) for name, value in model.named_buffers())
    with torch.no_grad():
        expected = model.eval().features(x)
        logits, again = model(x), model.head(model.features_from_cache(features.float()))
    assert features.shape == expected.shape and features.ndim == (2 if kind == "pooled" else 5)
    assert features.dtype == (torch.float32 if kind == "pooled" else torch.float16)
    assert torch.allclose(features.float(), expected, rtol=1e-3, atol=1e-4)
    assert (logits - again).abs().max() < 1e-3
    assert cache.key["backbone"] == "test_resnet" and cache.folder.name.startswith(f"{kind}-")


def test_backbones_with_the_same_tensors_do_not_share_entries(tmp_path):
    """The two differ in how they pad; with the same seed, or the same fine-tuned weights, in nothing else."""
    models = []
    for name in ("efficientnet_b0", "tf_efficientnet_b0"):
        torch.manual_seed(0)
        models.append(CTCLIPMultiAbnormalityModel(None, name, pretrained=False, n_slices=1))
    assert len({encoder_digest(model) for model in models}) == 1
    assert len({FeatureCache(tmp_path, model).folder for model in models}) == 2
    models[0].n_slices = 2
    assert len({encoder_digest(model) for model in models}) == 2


def test_encoding_is_float32_without_gradients_and_leaves_no_trace(tiny_classfine, volumes, tmp_path, monkeypatch):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine).train()
    seen = []
    encode = CTCLIPMultiAbnormalityModel.encode_for_cache

    def spy(self, x):
        flags = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        seen.append((*flags, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), self.training))
        return encode(self, x)

    monkeypatch.setattr(CTCLIPMultiAbnormalityModel, "encode_for_cache", spy)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cache, rows = run(model, tmp_path, volumes[:2])
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False, False, False, False)] * 2
    assert model.training and model.classifier.training
    assert torch.equal(cache.load(rows).long(), encoded(model, volumes[:2], model.input_shape))


def test_too_little_room_is_said_before_anything_is_encoded(tiny_classfine, volumes, tmp_path, monkeypatch):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 2000, 2000))  # an entry counts 384
    with pytest.raises(CacheError, match=r"found too little room .*for 7 more volumes; free that much") as error:
        run(model, tmp_path / "cache", volumes, lambda *_: pytest.fail("encoded"))
    assert "\n" not in str(error.value) and not (tmp_path / "cache").exists()
    assert run(model, tmp_path / "cache", volumes[:3])[1] == [0, 1, 2]


def test_a_model_that_has_changed_since_the_cache_was_opened_is_refused(tiny_classfine, volumes, tmp_path):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    cache = FeatureCache(tmp_path, model)
    with torch.no_grad():
        next(model.visual_transformer.parameters()).add_(1)
    with pytest.raises(CacheError, match="found other weights"):
        encode_missing(model, cache, volumes, CPU, 0, Ranks())


def test_features_that_half_precision_cannot_hold_are_refused(tmp_path, make_volumes):
    model = CTCLIPMultiAbnormalityModel(None, "test_resnet", attention="cbam", pretrained=False, n_slices=1)
    cache = FeatureCache(tmp_path / "cache", model)
    volumes = make_volumes(1)
    line = r"features of up to 70000 among valid_0_a_1.nii.gz, expected what float16 .*add --freeze-epochs 0, which"
    with pytest.raises(CacheError, match=line):
        cache.append(volumes, torch.full((1, *cache.shape), 7e4), [HU])
    assert not (tmp_path / "cache").exists()


class LateRank(Ranks):
    """The second of two ranks, which looks when the first has begun to encode what it found missing: everything."""

    def __init__(self, missing: list[int]):
        super().__init__()
        self.rank, self.world, self.first = 1, 2, (missing, None)

    def all_gather(self, value):
        return [self.first if isinstance(value, tuple) else value, value]

    def barrier(self) -> None:
        pass


def test_a_late_rank_does_its_part_of_what_the_first_found_missing(tiny_classfine, volumes, tmp_path):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    run(model, tmp_path, volumes[:1])
    seen = []
    run(
        model,
        tmp_path,
        volumes,
        lambda chosen, batch: seen.extend(chosen[i] for i in batch.index),
        LateRank([0, 1, 2, 3, 4, 5, 6]),
    )
    assert seen == volumes[1::2]


TWO_RANKS = """
import sys, torch
from ctclip.data.feature_cache import CacheError, FeatureCache, encode_missing
from ctclip.data.cohort import load_cohort
from ctclip_model import CTCLIPMultiAbnormalityModel
from ctclip.distributed import Ranks

data, weights, folder, apart = sys.argv[1:]
ranks = Ranks()
model = CTCLIPMultiAbnormalityModel(weights)
cache = FeatureCache(folder + (str(ranks.rank) if apart == "apart" else ""), model)
volumes = load_cohort(data, "valid").volumes[:7]
seen = []
try:
    note = lambda chosen, batch: seen.extend(chosen[i].name for i in batch.index)
    rows = encode_missing(model, cache, volumes, torch.device("cpu"), 0, ranks, note)
    print(len(seen), int(cache.load(rows).long().sum()))
except CacheError as error:
    print(error)
ranks.destroy()
"""


def two_ranks(phantoms, weights: str, folder: Path, apart: str = "together") -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", TWO_RANKS, str(phantoms), weights, str(folder), apart]
    children = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    return [child.communicate(timeout=120)[0].strip() for child in children]


def test_two_ranks_share_the_work_and_get_the_entries_of_one(phantoms, tiny_classfine, volumes, tmp_path):
    model = CTCLIPMultiAbnormalityModel(tiny_classfine)
    total = int(encoded(model, volumes, model.input_shape).sum())
    assert two_ranks(phantoms, tiny_classfine, tmp_path / "cache") == [f"4 {total}", f"3 {total}"]
    cache, rows = run(model, tmp_path / "cache", volumes, lambda *_: pytest.fail("encoded again"))
    assert torch.equal(cache.load(rows).long(), encoded(model, volumes, model.input_shape))
    assert len(list(cache.folder.glob("*.bin"))) == 2 and len(list(cache.folder.glob("*.tmp"))) == 0
    lines = [line for path in cache.folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 7  # each volume once


def test_ranks_that_do_not_see_one_folder_are_told(phantoms, tiny_classfine, tmp_path):
    for line in two_ranks(phantoms, tiny_classfine, tmp_path / "cache", "apart"):
        assert "found different entries on different ranks" in line and "shared file system" in line


def test_loading_is_fast(tmp_path, make_volumes):
    """Records of 28 KB at a rate that memory explains; a loop over bytes would take minutes."""
    volumes, grid = make_volumes(200), 24
    cache = FeatureCache(tmp_path / "cache", Tower(grid))
    fill(cache, volumes, grid, at_once=100)
    rows = random.Random(0).sample(cache.rows(volumes), 200)
    cache.load(rows)
    best = min(_seconds(cache, rows) for _ in range(5))
    assert math.isfinite(best) and best < 0.5


def _seconds(cache: FeatureCache, rows: list[int]) -> float:
    start = time.perf_counter()
    cache.load(rows)
    return time.perf_counter() - start
