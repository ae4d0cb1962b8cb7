"""MetaImage files (.mha), read here rather than by ITK, which holds a compressed file whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from ctclip.data.inflate import decompressobj
from ctclip.data.volume_file import (
    CONVERT,
    LPS_TO_RAS,
    RECOPY,
    Header,
    StreamFile,
    file_error,
    shortest_decimal,
    three_axes,
)
from ctclip.formatting import plural

META_SUFFIX = ".mha"
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


class _ZlibStream:
    """What a zlib stream inflates to, read like a file."""

    def __init__(self, raw: IO[bytes]):
        self.raw, self.inflater, self.waiting = raw, decompressobj(), b""

    def readinto(self, view: memoryview) -> int:
        while not self.inflater.eof:
            data = self.waiting or self.raw.read(1 << 18)
            piece = self.inflater.decompress(data, len(view))
            self.waiting = self.inflater.unconsumed_tail
            if piece:
                view[: len(piece)] = piece
                return len(piece)
            if not data:
                raise EOFError
        return 0

    def read(self, count: int) -> bytes:
        buffer = bytearray(count)
        return bytes(buffer[: self.readinto(memoryview(buffer))])


class MetaFile(StreamFile):
    """MetaImage with its voxels in the same file (.mha), plain or zlib. Read here rather than by ITK, which holds a
    compressed file whole."""

    MOST_LINES, LINE_BYTES = 200, 4096

    def open(self) -> None:
        fields = self._fields()
        compressed = _flag(fields, "CompressedData", self.path)
        self.header = _parse_meta(fields, self.path)
        skip = _numbers(fields, "HeaderSize", 1, self.path, "0", whole=True)[0]
        size = os.fstat(self.raw.fileno()).st_size
        if skip == -1:  # the voxels are the last bytes of the file
            skip = size - self.raw.tell() - prod(self.header.shape) * self.header.dtype.itemsize
        if not 0 <= skip <= size:
            raise self.error(f"HeaderSize {skip:g}", "0", RECOPY)
        self.stream = self.raw
        self.skip(int(skip))
        if compressed:
            self.stream = _ZlibStream(self.raw)
        self.check_size(self.header, self.raw.tell())

    def _fields(self) -> dict[str, str]:
        """The lines of the header, up to and with ElementDataFile, after which the voxels begin."""
        fields: dict[str, str] = {}
        for _ in range(self.MOST_LINES):
            line = self.raw.readline(self.LINE_BYTES)
            key, equals, value = line.decode("latin-1").partition("=")
            if line.strip() and not equals or not line:
                break
            fields[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":
                if value.strip().upper() != "LOCAL":
                    raise self.error(f"voxels in {value.strip()[:60]!r}", "LOCAL, in this file", CONVERT)
                return fields
        found = f"{line[:20]!r}" if line else f"the end of the file after {plural(len(fields), 'line')}"
        raise self.error(f"{found}, no header that ends in ElementDataFile", "a MetaImage", RECOPY)


def _parse_meta(fields: Mapping[str, str], path: Path) -> Header:
    axes = int(_numbers(fields, "NDims", 1, path, whole=True)[0])
    if not 1 <= axes <= 8:
        raise file_error(path, f"{axes} axes", "3 axes of at least 2 voxels", CONVERT)
    shape = three_axes([int(n) for n in _numbers(fields, "DimSize", axes, path, whole=True)], path)
    kind = fields.get("ElementType", "nothing")
    channels = _numbers(fields, "ElementNumberOfChannels", 1, path, "1")[0]
    if kind not in META_TYPES or channels != 1:
        raise file_error(path, f"{channels:g} values of {kind[:40]} for each voxel", "one number", CONVERT)
    if not _flag(fields, "BinaryData", path, "True"):
        raise file_error(path, "voxels written as text", "BinaryData = True", CONVERT)
    for name, neutral in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        if _numbers(fields, name, 1, path, str(neutral))[0] != neutral:
            raise file_error(path, f"{name} {fields[name]}", f"{neutral}: HU as stored", CONVERT)
    big_endian = _flag(fields, "BinaryDataByteOrderMSB", path) or _flag(fields, "ElementByteOrderMSB", path)
    dtype = np.dtype((">" if big_endian else "<") + META_TYPES[kind])
    stated = next((name for name in ("ElementSpacing", "ElementSize") if name in fields), None)
    if stated is None:
        return Header(shape, dtype, 1.0, 0.0, (1.0, 1.0, 1.0), None)
    spacing = _numbers(fields, stated, axes, path)[:3]
    affine = _meta_affine(fields, axes, spacing, path)
    return Header(shape, dtype, 1.0, 0.0, tuple(map(shortest_decimal, spacing)), affine)


def _meta_affine(fields: Mapping[str, str], axes: int, spacing: Sequence[float], path: Path) -> np.ndarray:
    """File index -> RAS mm. The file gives, in LPS, one direction per axis (a row of its matrix) and the origin."""

    def field(names: Sequence[str], count: int, default: str) -> list[float]:
        name = next((name for name in names if name in fields), names[0])
        return _numbers(fields, name, count, path, default)

    identity = " ".join(str(int(n)) for n in np.eye(axes).ravel())
    directions = np.reshape(field(("TransformMatrix", "Rotation", "Orientation"), axes * axes, identity), (axes, axes))
    affine = np.eye(4)
    affine[:3, :3] = directions[:3, :3].T * spacing
    affine[:3, 3] = field(("Offset", "Position", "Origin"), axes, " ".join("0" * axes))[:3]
    affine = LPS_TO_RAS @ affine
    usable = np.isfinite(affine).all() and abs(np.linalg.det(directions[:3, :3])) > 1e-6
    return affine if usable else np.full((4, 4), np.nan)


def _numbers(
    fields: Mapping[str, str], name: str, count: int, path: Path, default: str | None = None, whole: bool = False
) -> list[float]:
    text = fields.get(name, default)
    try:
        numbers = [float(part) for part in (text or "").split()]
    except ValueError:
        numbers = []
    if len(numbers) != count or (whole and not all(abs(n) < 1e10 and n == int(n) for n in numbers)):
        found = "nothing" if text is None else repr(text[:60])
        expected = plural(count, "whole number" if whole else "number")
        raise file_error(path, f"{found} as {name}", expected, RECOPY)
    return numbers


def _flag(fields: Mapping[str, str], name: str, path: Path, default: str = "False") -> bool:
    value = fields.get(name, default).lower()
    if value[:1] not in ("t", "y", "1", "f", "n", "0"):  # ITK, too, looks at the first letter only
        raise file_error(path, f"{value[:20]!r} as {name}", "True or False", RECOPY)
    return value[:1] in ("t", "y", "1")
