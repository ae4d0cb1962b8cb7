"""Resampled volumes in whole HU, kept on disk: made once, from then on every epoch and every later run reads its crop.

    <cache_dir>/volumes-<12 hex of the key's hash>/
        key.json            what a file is a function of, beside the volume: shape, preprocessing, format
        <2 hex>/<30 hex>    a volume, named by `cache_key`: name, file, scaling and geometry

A file is a line of CRC-32 and JSON (how the volume was read, where slices end), then each slice's low bytes and high
bytes, deflated: 2.4 to 14 times smaller than int16, and a crop needs its own slices only. Each slice has a checksum. A
file appears whole under its name or not at all; one that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ctclip.data.augmentation import Box
from ctclip.data.cohort import Volume
from ctclip.data.hounsfield import HuDecision
from ctclip.data.inflate import InflateError, compress, decompress
from ctclip.data.preprocessing import PREPROCESSING_VERSION, read_volume
from ctclip.data.volume_key import cache_key, cache_keys
from ctclip.fileio import nearest_existing, replacing
from ctclip.formatting import size_text

FORMAT = 1  # raise it with every change of what is written
LEVEL = 1  # of deflate; 3 takes twice the time to write for the same size
USUAL_SHARE = 0.45  # of two bytes per voxel that a file takes; scans that fill less of the cube take less


class VolumeCache:
    """Volumes of one `shape` (D, H, W) under `cache_dir`; None: nothing is kept, tensors are the same.

    May be used by several processes at once, and copied to them.
    """

    def __init__(self, cache_dir: str | Path | None, shape: Sequence[int]):
        self.shape = tuple(shape)
        self.key = {"shape": list(shape), "preprocessing_version": PREPROCESSING_VERSION, "format": FORMAT}
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.folder = None if cache_dir is None else Path(cache_dir) / f"volumes-{digest[:12]}"

    def read(self, volume: Volume, box: Box | None = None) -> tuple[torch.Tensor, HuDecision]:
        """`read_volume` in whole HU: (1, D, H, W) float32 in [-1, 1], or the part of it that `box` names; from the
        cache where it is, else from the volume's file, and into the cache. Raises VolumeError."""
        path = self._path(volume, cache_key(volume))  # from before the file is read: it can change meanwhile
        if path is not None and (found := self._load(path, volume.name, box)) is not None:
            return found
        tensor, decision = read_volume(volume, self.shape)
        hu = np.rint(tensor[0].numpy() * np.float32(1000)).astype(np.int16)
        if path is not None:
            self._store(path, hu, decision)
        return as_tensor(hu if box is None else hu[box]), decision

    def missing(self, volumes: Sequence[Volume]) -> tuple[int, int]:
        """How many of the volumes are not kept yet, and about how many bytes they will take."""
        paths = [self._path(volume, key) for volume, key in zip(volumes, cache_keys(volumes), strict=True)]
        count = sum(path is not None and not path.is_file() for path in paths)
        return count, round(count * USUAL_SHARE * 2 * prod(self.shape))

    def summary(self, volumes: Sequence[Volume]) -> str:
        """How many of the volumes are there, and what the others will take."""
        if self.folder is None:
            return "not kept: every epoch reads the files"
        (missing, need), free = self.missing(volumes), shutil.disk_usage(nearest_existing(self.folder)).free
        room = f", about {size_text(need)} for the others ({size_text(free)} free)" if missing else ""
        return f"{self.folder}: {len(volumes) - missing} of {len(volumes)}{room}"

    def _path(self, volume: Volume, key: str | None) -> Path | None:
        """None where nothing is kept, or the volume has no file."""
        assumed = "-hu" if volume.assume_hu else ""
        return None if self.folder is None or key is None else self.folder / key[:2] / f"{key[2:]}{assumed}"

    def _load(self, path: Path, name: str, box: Box | None) -> tuple[torch.Tensor, HuDecision] | None:
        """None where there is no file, or a damaged one."""
        try:
            with open(path, "rb") as file:
                crc, _, line = file.readline().partition(b" ")
                if int(crc, 16) != zlib.crc32(line):
                    raise ValueError("its first line")
                header = json.loads(line)
                first, last = (0, self.shape[0]) if box is None else box[0].indices(self.shape[0])[:2]
                ends = header["ends"][first : last + 1]
                file.seek(ends[0], 1)
                hu = _inflated([file.read(end - start) for start, end in pairwise(ends)], self.shape[1:], box)
        except FileNotFoundError:
            return None
        except (ValueError, InflateError) as error:
            tqdm.write(f"{path}: found a damaged copy of {name} ({error}), expected what was written; reading its file")
            return None
        return as_tensor(hu), HuDecision(header["reading"], header["evidence"], tuple(header["notes"]))

    def _store(self, path: Path, hu: np.ndarray, decision: HuDecision) -> None:
        """A disk that takes no more is said, and the process goes on without the cache."""
        slices = _deflated(hu)
        ends = [0, *accumulate(map(len, slices))]
        line = json.dumps(decision._asdict() | {"ends": ends}).encode() + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (key := path.parents[1] / "key.json").exists():
                with replacing(key) as temporary:
                    temporary.write_text(json.dumps(self.key, indent=2) + "\n")
            with replacing(path) as temporary:
                temporary.write_bytes(b"".join([f"{zlib.crc32(line):08x} ".encode(), line, *slices]))
        except OSError as error:
            tqdm.write(f"{self.folder}: found {error.strerror or error}, expected room for volumes; going on without "
                       "keeping them: free some, or choose another --cache-dir or --no-volume-cache")  # fmt: skip
            self.folder = None


def as_tensor(hu: np.ndarray) -> torch.Tensor:
    """(D, H, W) int16 -> (1, D, H, W) float32, HU / 1000"""
    return torch.from_numpy(np.ascontiguousarray(hu)).float().div_(1000)[None]


def _deflated(hu: np.ndarray) -> list[bytes]:
    """Of each slice of (D, H, W), its low bytes, then its high bytes: neighbours differ little in either."""
    planes = np.moveaxis(hu.astype("<i2").view(np.uint8).reshape(*hu.shape, 2), -1, 1)
    return [compress(plane.tobytes(), LEVEL) for plane in planes]


def _inflated(slices: Sequence[bytes], shape: Sequence[int], box: Box | None) -> np.ndarray:
    """(slices, rows, columns) int16 of `_deflated` slices of `shape`, cut to the box in plane. Raises ValueError and
    InflateError."""
    rows, columns = (slice(None), slice(None)) if box is None else box[1:]
    height, width = len(range(shape[0])[rows]), len(range(shape[1])[columns])
    out = np.empty((len(slices), height, width, 2), np.uint8)
    for i, content in enumerate(slices):
        planes = np.frombuffer(decompress(content), np.uint8).reshape(2, *shape)
        out[i, ..., 0], out[i, ..., 1] = planes[0, rows, columns], planes[1, rows, columns]
    return out.view("<i2")[..., 0].astype(np.int16, copy=False)
