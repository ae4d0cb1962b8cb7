"""Resampled volumes on disk. References: `read_volume` rounded to whole HU, crops by indexing."""

import errno
import json
import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers_data import SMALL
from helpers_training import damage

from ctclip.data import volume_cache
from ctclip.data.augmentation import Augmentation
from ctclip.data.cohort import load_cohort
from ctclip.data.loading import VolumeDataset, read_ahead, volume_loader
from ctclip.data.preprocessing import read_volume
from ctclip.data.volume_cache import VolumeCache

BOX = (slice(3, 9), slice(0, 7), slice(2, 11))


@pytest.fixture
def volumes(data_dir):
    return load_cohort(data_dir, "valid").volumes


def files(cache: VolumeCache) -> list:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file() and path.name != "key.json")


def whole_hu(volume, shape=SMALL) -> torch.Tensor:
    return (read_volume(volume, shape)[0] * 1000).round() / 1000


def count_readings(monkeypatch) -> list[str]:
    read: list[str] = []

    def counted(volume, shape):
        read.append(volume.name)
        return read_volume(volume, shape)

    monkeypatch.setattr(volume_cache, "read_volume", counted)
    return read


def test_what_is_read_equals_the_file_and_is_read_once(volumes, tmp_path, monkeypatch):
    read = count_readings(monkeypatch)
    cache, nothing = VolumeCache(tmp_path / "cache", SMALL), VolumeCache(None, SMALL)
    assert f"{cache.folder}: 0 of {len(volumes)}, about " in cache.summary(volumes)
    for volume in volumes:
        expected, decision = whole_hu(volume), read_volume(volume, SMALL)[1]
        for of in (cache, cache, nothing):
            tensor, said = of.read(volume)
            assert torch.equal(tensor, expected) and tensor.dtype == torch.float32 and said == decision
            assert torch.equal(of.read(volume, BOX)[0], expected[(slice(None), *BOX)])
        assert expected.std() > 0.1
    assert [read.count(volume.name) for volume in volumes] == [1 + 2] * len(volumes), "once, and twice without a cache"
    assert len(files(cache)) == len(volumes) and not list(tmp_path.rglob("*.tmp"))
    assert cache.summary(volumes) == f"{cache.folder}: {len(volumes)} of {len(volumes)}"
    assert json.loads((cache.folder / "key.json").read_text()) == cache.key


def test_every_value_of_a_volume_comes_back():
    hu = np.arange(-1000, 1001, dtype=np.int16)[:2000].reshape(4, 20, 25)
    slices = volume_cache._deflated(hu)
    assert (volume_cache._inflated(slices, (20, 25), None) == hu).all()
    assert (volume_cache._inflated(slices[1:3], (20, 25), (None, *BOX[1:])) == hu[1:3, BOX[1], BOX[2]]).all()


def test_another_file_shape_or_version_is_another_entry(volumes, tmp_path, monkeypatch):
    cache, volume = VolumeCache(tmp_path, SMALL), volumes[0]
    cache.read(volume)
    paths = {files(cache)[0]}
    copy = tmp_path / volume.name
    copy.write_bytes(volume.path.read_bytes())
    for other in (
        replace(volume, name="other.nii.gz"),
        replace(volume, assume_hu=True),
        replace(volume, metadata=(volume.metadata or {}) | {"ZSpacing": 9}),
    ):
        paths.add(cache._path(other, volume_cache.cache_key(other)))
    copy.write_bytes(volumes[1].path.read_bytes())
    changed = replace(volume, path=copy)
    paths.add(cache._path(changed, volume_cache.cache_key(changed)))
    folders = {cache.folder, VolumeCache(tmp_path, (20, 40, 41)).folder}
    for name in ("PREPROCESSING_VERSION", "FORMAT"):
        with monkeypatch.context() as patch:
            patch.setattr(volume_cache, name, 99)
            folders.add(VolumeCache(tmp_path, SMALL).folder)
    assert len(paths) == 5 and len(folders) == 4


@pytest.mark.parametrize("where", ["crc", "line", "slice", "cut", "empty"])
def test_a_damaged_file_is_said_and_made_again(volumes, tmp_path, where, capsys):
    cache, volume = VolumeCache(tmp_path, SMALL), volumes[0]
    expected, _ = cache.read(volume)
    path = files(cache)[0]
    good = path.read_bytes()
    if where == "slice":
        damage(path)
    elif where in ("cut", "empty"):
        path.write_bytes(good[:-9] if where == "cut" else b"")
    else:
        at = 3 if where == "crc" else good.index(b"reading") + 2
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    assert torch.equal(cache.read(volume)[0], expected)
    assert f"found a damaged copy of {volume.name}" in capsys.readouterr().out
    assert path.read_bytes() == good
    cache.read(volume)
    assert not capsys.readouterr().out


def test_a_crop_reads_its_own_slices_only(volumes, tmp_path, capsys):
    """The last byte of the file is damaged: a crop that does not hold the last slice does not see it."""
    cache, volume = VolumeCache(tmp_path, SMALL), volumes[0]
    cache.read(volume)
    path = files(cache)[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cache.read(volume, BOX)
    assert not capsys.readouterr().out
    cache.read(volume, (slice(SMALL[0] - 6, SMALL[0]), *BOX[1:]))
    assert "found a damaged copy" in capsys.readouterr().out


def test_a_full_disk_is_said_once_and_costs_no_volume(volumes, tmp_path, monkeypatch, capsys):
    cache = VolumeCache(tmp_path, SMALL)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    for volume in volumes:
        assert torch.equal(cache.read(volume)[0], whole_hu(volume))
    assert capsys.readouterr().out.count("found No space left on device, expected room for volumes") == 1


def test_loaders_give_the_same_crops_with_and_without(volumes, tmp_path):
    """In this process and in workers, from an empty cache and from a full one, and after all else that is drawn."""
    change = Augmentation(3, True, (6, 8, 9), 50.0, (-1000.0, 200.0))
    caches = [VolumeCache(None, SMALL), VolumeCache(tmp_path, SMALL), VolumeCache(tmp_path, SMALL)]
    found = [
        torch.cat([b.volumes for b in volume_loader(volumes, SMALL, 2, workers, change, cache=cache)])
        for cache, workers in zip(caches, (0, 0, 2), strict=True)
    ]
    assert found[0].shape == (len(volumes), 1, 6, 8, 9) and all(torch.equal(a, b) for a, b in pairwise(found))
    plain = VolumeDataset(volumes, SMALL, Augmentation(3, False, (6, 8, 9)), cache=caches[1])
    boxes = [plain.augmentation.box(SMALL, plain.augmentation.generator(volume.name)) for volume in volumes]
    for volume, box, (_, tensor, *_) in zip(volumes, boxes, plain, strict=False):
        assert torch.equal(tensor, whole_hu(volume)[(slice(None), *box)])
    ahead = next(read_ahead(volumes, SMALL, [[0]], cache=caches[1]))
    assert torch.equal(ahead.volumes[0], whole_hu(volumes[0]))


def test_a_volume_that_cannot_be_read_is_a_failure_as_without_a_cache(volumes, tmp_path):
    lost = replace(volumes[0], path=tmp_path / "nothing.nii.gz")
    items = [VolumeDataset([lost], SMALL, cache=cache)[0] for cache in (None, VolumeCache(tmp_path, SMALL))]
    assert items[0] == items[1] and items[0][1] is None
