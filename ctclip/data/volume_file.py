"""What every reader of volume files is: a header, then slices from front to back, as they are stored.

A file stores three axes, the fastest first, so its slices lie along the third. They are read, and inflated where they
are compressed, a few at a time while the ones before are worked on: no file is ever held whole, and no size that a
header claims is believed before the file could hold it. Whatever is wrong with a file is a VolumeError of one line.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np

from ctclip.data.inflate import InflateError
from ctclip.errors import UserError
from ctclip.formatting import plural

RECOPY = "copy or download the file again"
CONVERT = "convert it to a 3-D NIfTI of numbers"
DEFLATE_LIMIT = 1032  # deflate cannot shrink anything by more than this
SLAB_BYTES = 4 << 20  # read and inflated at a time
SLABS_AHEAD = 3  # with a single one, reading and work on it wait for each other in turns
MOST_PLANE = 4096 * 4096  # voxels of a slice: 16 times those of a fine CT
MOST_VOXELS = 1 << 31  # more than CT-RATE's largest volume has; a few bytes of gzip can claim more
MOST_BYTES = 1 << 33  # of voxels: 16 GB of zeros are a file of 16 MB, or a sparse one of none
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
Result = TypeVar("Result")
DAMAGED = (OSError, zlib.error, InflateError)
HEADER_SIZES = (348, 540)  # of NIfTI-1 and -2, their first four bytes in either order
META_START = re.compile(rb"(ObjectType|ObjectSubType|NDims|Comment) *=")
FIRST_BYTES = {
    b"PK\3\4": ".zip", b"7z\xbc\xaf": ".7z", b"Rar!": ".rar", b"BZh": ".bz2", b"\xfd7zXZ": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst", b"NRRD": ".nrrd", b"\x93NUMPY": ".npy", b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg",
}  # fmt: skip


class VolumeError(UserError):
    """A volume file that cannot be used: one line naming what was found, what was expected, what to do."""


def file_error(path: Path, found: str, expected: str, remedy: str) -> VolumeError:
    return VolumeError(f"{path.name}: found {found}, expected {expected}; {remedy}")


def shape_text(shape: Sequence[float]) -> str:
    return " x ".join(str(n) for n in shape)


def shortest_decimal(value: float) -> float:
    """The shortest decimal of the same float32: 0.699999988 mm is 0.7. A size, in voxels, may hang on it, and one
    scan must not be a voxel longer in a format that keeps more digits."""
    with np.errstate(over="ignore"):  # to infinity, which is refused as such
        return float(str(np.float32(value)))


def content_suffix(start: bytes) -> str | None:
    """The ending that a file should have by its first bytes, inflated; None where they do not say. DICOM has a test of
    its own."""
    if int.from_bytes(start[:4], "little") in HEADER_SIZES or int.from_bytes(start[:4], "big") in HEADER_SIZES:
        return ".nii"
    if META_START.match(start):
        return ".mha"
    return next((suffix for first, suffix in FIRST_BYTES.items() if start.startswith(first)), None)


def inflated(start: bytes) -> bytes | None:
    """What the first bytes of a gzip file inflate to, a few; None for another file."""
    if start[:2] != b"\x1f\x8b":
        return None
    try:
        return zlib.decompressobj(31).decompress(start, 512)
    except zlib.error:
        return b""


@dataclass(frozen=True)
class Header:
    """What a file says of itself. Three file axes, fastest first; spacing in mm.

    `affine` (4, 4), file index -> RAS mm, is None where no orientation is stated and NaN where an unusable one is.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    slope: float
    intercept: float
    spacing: tuple[float, ...]
    affine: np.ndarray | None

    @property
    def blank(self) -> bool:
        """No orientation and unit spacing: what a writer leaves when it was told nothing (CT-RATE version 1)."""
        return self.affine is None and set(self.spacing) == {1.0}


class VolumeFile:
    """An open volume, read once from front to back. Every fault raises VolumeError."""

    header: Header

    def __init__(self, path: Path):
        self.path = path
        self._tasks: Generator[None, None, None] | None = None  # of the thread that reads
        self.notes: list[str] = []  # what a reader of the answers should know about the file, a line each

    def __enter__(self) -> VolumeFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks is not None:
            self._tasks.close()  # waits for the thread, where `slabs` was left in the midst
        self.close()

    def close(self) -> None:
        pass

    def error(self, found: str, expected: str, remedy: str) -> VolumeError:
        return file_error(self.path, found, expected, remedy)

    def read(self, slices: np.ndarray, first: int) -> None:
        """Fill (n, middle axis, fastest axis) with the slices from `first` on; called in order, all of them."""
        raise NotImplementedError

    def check_end(self) -> None:
        """After the last slice."""

    def slabs(self) -> Generator[tuple[int, np.ndarray], None, None]:
        """(first index, slices as stored (n, middle axis, fastest axis)). Valid until the next one is asked for.

        While one slab is being worked on, a thread reads up to SLABS_AHEAD others.
        """
        fast, middle, slow = self.header.shape
        step = min(slow, max(1, SLAB_BYTES // (fast * middle * self.header.dtype.itemsize)))
        starts = range(0, slow, step)
        buffers = [np.empty((step, middle, fast), self.header.dtype) for _ in range(SLABS_AHEAD + 1)]
        slabs = [buffers[i % len(buffers)][: min(step, slow - start)] for i, start in enumerate(starts)]
        reads = (partial(self.read, slab, start) for slab, start in zip(slabs, starts, strict=True))
        tasks: Iterator[Callable[[], None]] = chain(reads, [self.check_end])
        with closing(in_order(tasks, 1, SLABS_AHEAD)) as done:
            self._tasks = done
            for start, slab in zip(starts, slabs, strict=True):
                next(done)
                yield start, slab
            next(done)


def in_order(tasks: Iterator[Callable[[], Result]], threads: int, ahead: int) -> Generator[Result, None, None]:
    """What the tasks return, in their order; `ahead` of them are waiting, running or done beside the one last given."""
    pool = ThreadPoolExecutor(threads)
    try:
        pending = deque(pool.submit(task) for task in islice(tasks, ahead))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(task) for task in islice(tasks, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


class StreamFile(VolumeFile):
    """A header, then the voxels, in one file. Subclasses set `stream`, where the voxels come from, and the header."""

    MOST_MORE = 1 << 20  # bytes tolerated behind the voxels
    stream: io.RawIOBase | io.BufferedIOBase

    def __init__(self, path: Path):
        super().__init__(path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise self.error("a pipe or device", "a file", "name the file itself")  # opening it might never return
        try:
            self.raw = open(path, "rb")  # noqa: SIM115  closed in close()
        except FileNotFoundError:
            raise file_error(path, "no such file", "a volume", "check the path or download it") from None
        except OSError as error:
            raise file_error(path, f"unreadable ({error.strerror})", "a file", "check its permissions") from None
        try:
            self.open()
        except OSError as error:
            self.close()
            raise file_error(path, f"unreadable ({error.strerror or error})", "a file", RECOPY) from None
        except BaseException:
            self.close()
            raise

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.raw.close()

    def read(self, slices: np.ndarray, first: int) -> None:
        self.fill(slices.reshape(-1).view(np.uint8))

    def fill(self, buffer: np.ndarray) -> None:
        """Fill a uint8 array from the stream, to the last byte."""
        view, done = buffer.data, 0
        try:
            while done < len(view):
                count = self.stream.readinto(view[done:])
                if not count:
                    raise EOFError
                done += count
        except EOFError:
            raise self.error("a truncated file", "as many voxels as its header declares", RECOPY) from None
        except DAMAGED as error:
            raise self.error(f"damaged data ({error})", "a readable file", RECOPY) from None

    def skip(self, count: int) -> None:
        scratch = np.empty(min(count, SLAB_BYTES), np.uint8)
        while count > 0:
            self.fill(scratch[: min(count, len(scratch))])
            count -= len(scratch)

    def check_end(self) -> None:
        """Reads what is inflated to its end, to its checksum: repeated pieces inflate without an error."""
        more = 0
        try:
            while self.stream is not self.raw and more <= self.MOST_MORE and (piece := self.stream.read(1 << 16)):
                more += len(piece)
        except (EOFError, *DAMAGED) as error:
            reason = "the stream ends early" if isinstance(error, EOFError) else error
            raise self.error(f"damaged data ({reason})", "a readable file", RECOPY) from None
        if more > self.MOST_MORE:
            raise self.error("more bytes than its voxels", "none: the voxels may be shifted", RECOPY)

    def check_size(self, header: Header, offset: int) -> None:
        """Refuse a size that the file cannot hold, before allocating anything of that size."""
        voxels = prod(header.shape)
        declared = offset + voxels * header.dtype.itemsize
        at_most = os.fstat(self.raw.fileno()).st_size * (DEFLATE_LIMIT if self.stream is not self.raw else 1)
        if declared > at_most:
            found = f"{shape_text(header.shape)} voxels declared, {declared} bytes"
            raise self.error(found, f"at most {at_most} bytes in a file of this size (truncated?)", RECOPY)
        most = min(MOST_VOXELS, MOST_BYTES // header.dtype.itemsize)
        if voxels > most or prod(header.shape[:2]) > MOST_PLANE:
            found = f"{shape_text(header.shape)} voxels of {plural(header.dtype.itemsize, 'byte')}"
            expected = f"at most {MOST_PLANE} in a slice and {most} in all"
            raise self.error(found, expected, "store it as 16-bit integers, or resample it first")


def three_axes(shape: Sequence[int], path: Path) -> tuple[int, int, int]:
    if len(shape) < 3 or any(n > 1 for n in shape[3:]) or min(shape[:3]) < 2:
        expected = "3 axes of at least 2 voxels"
        raise file_error(path, f"{len(shape)} axes of {shape_text(shape)} voxels", expected, CONVERT)
    fast, middle, slow = shape[:3]
    return fast, middle, slow
