"""MetaImage files (.mha), read here rather than by ITK, which holds a compressed file whole."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from typing import IO, Any

import numpy as np

from ctclip.data.inflate import decompressobj
from ctclip.data.volume_file import (
    CONVERT,
    LPS_TO_RAS,
    RECOPY,
    Header,
    StreamFile,
    VolumeError,
    shape_text,
    shortest_decimal,
    three_axes,
)
from ctclip.formatting import parse_number, plural

META_SUFFIX = ".mha"
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


class _ZlibStream(io.RawIOBase):
    """What a zlib stream inflates to, read like a file."""

    def __init__(self, raw: IO[bytes]):
        self.raw, self.inflater, self.waiting = raw, decompressobj(), b""

    def readinto(self, view: Any, /) -> int:
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


class MetaFile(StreamFile):
    """MetaImage with its voxels in the same file, plain or zlib."""

    MOST_LINES, LINE_BYTES, MOST_MORE = 200, 4096, 0

    def open(self) -> None:
        self.fields = self._read_fields()
        self.header = self._parse()
        skip = self._numbers("HeaderSize", 1, "0", whole=True)[0]
        size = os.fstat(self.raw.fileno()).st_size
        if skip == -1:  # the voxels are the last bytes of the file
            skip = size - self.raw.tell() - prod(self.header.shape) * self.header.dtype.itemsize
        if not 0 <= skip <= size:
            raise self.error(f"HeaderSize {skip:g}", "0", RECOPY)
        self.stream = self.raw
        self.skip(int(skip))
        if self._flag("CompressedData"):
            self.stream = _ZlibStream(self.raw)
        elif (rest := size - self.raw.tell() - prod(self.header.shape) * self.header.dtype.itemsize) > 0:
            raise self.error(f"{rest} bytes more than its voxels", "none: the voxels may be shifted", RECOPY)
        self.check_size(self.header, self.raw.tell())

    def _read_fields(self) -> dict[str, str]:
        """The lines of the header, up to and with ElementDataFile, after which the voxels begin."""
        fields: dict[str, str] = {}
        repeated: set[str] = set()
        for _ in range(self.MOST_LINES):
            line = self.raw.readline(self.LINE_BYTES)
            key, equals, value = (part.strip() for part in line.decode("latin-1").partition("="))
            if line.strip() and not equals or not line:
                break
            repeated |= {key} & fields.keys() - {""}
            fields[key] = value
            if key == "ElementDataFile":
                if repeated:
                    raise self.error(f"{min(repeated)} twice in the header", "each field once", RECOPY)
                if value.upper() != "LOCAL":
                    raise self.error(f"voxels in {value[:60]!r}", "LOCAL, in this file", CONVERT)
                return fields
        found = f"{line[:20]!r}" if line else f"the end of the file after {plural(len(fields), 'line')}"
        raise self.error(f"{found}, no header that ends in ElementDataFile", "a MetaImage", RECOPY)

    def _parse(self) -> Header:
        axes = int(self._numbers("NDims", 1, whole=True)[0])
        if not 1 <= axes <= 8:
            raise self.error(f"{axes} axes", "3 axes of at least 2 voxels", CONVERT)
        shape = three_axes([int(n) for n in self._numbers("DimSize", axes, whole=True)], self.path)
        kind = self.fields.get("ElementType", "nothing")
        channels = self._numbers("ElementNumberOfChannels", 1, "1")[0]
        if kind not in META_TYPES or channels != 1:
            raise self.error(f"{channels:g} values of {kind[:40]} for each voxel", "one number", CONVERT)
        if not self._flag("BinaryData", "True"):
            raise self.error("voxels written as text", "BinaryData = True", CONVERT)
        for name, neutral in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
            if self._numbers(name, 1, str(neutral))[0] != neutral:
                raise self.error(f"{name} {self.fields[name]}", f"{neutral}: HU as stored", CONVERT)
        big_endian = self._flag("BinaryDataByteOrderMSB") or self._flag("ElementByteOrderMSB")
        dtype = np.dtype((">" if big_endian else "<") + META_TYPES[kind])
        stated = self._first("ElementSpacing", "ElementSize")
        if stated not in self.fields:
            return Header(shape, dtype, 1.0, 0.0, (1.0, 1.0, 1.0), None)
        spacing = self._numbers(stated, axes)[:3]
        with suppress(VolumeError):  # a size that is none says nothing
            size = self._numbers("ElementSize", axes)[:3]
            if not np.allclose(size, spacing, rtol=1e-4):
                found = f"ElementSize {shape_text(size)} beside {stated} {shape_text(spacing)} mm"
                self.notes.append(f"{found}: taken as {stated} says, as ITK does")
        return Header(shape, dtype, 1.0, 0.0, tuple(map(shortest_decimal, spacing)), self._affine(axes, spacing))

    def _affine(self, axes: int, spacing: Sequence[float]) -> np.ndarray:
        """File index -> RAS mm. The file gives, in LPS, one direction per axis (a row of its matrix) and the origin."""
        identity = " ".join(str(int(n)) for n in np.eye(axes).ravel())
        matrix = self._numbers(self._first("TransformMatrix", "Rotation", "Orientation"), axes * axes, identity)
        directions = np.reshape(matrix, (axes, axes))[:3, :3]
        origin = self._numbers(self._first("Offset", "Position", "Origin"), axes, " ".join("0" * axes))
        affine = np.eye(4)
        affine[:3, :3] = directions.T * spacing
        affine[:3, 3] = origin[:3]
        affine = LPS_TO_RAS @ affine
        usable = np.isfinite(affine).all() and abs(np.linalg.det(directions)) > 1e-6
        return affine if usable else np.full((4, 4), np.nan)

    def _first(self, *names: str) -> str:
        """The first of a field's names that is in the header, or would be."""
        return next((name for name in names if name in self.fields), names[0])

    def _numbers(self, name: str, count: int, default: str | None = None, whole: bool = False) -> list[float]:
        text = self.fields.get(name, default)
        try:
            numbers = [parse_number(part) for part in (text or "").split()]
        except ValueError:
            numbers = []
        if len(numbers) != count or (whole and not all(abs(n) < 1e10 and n == int(n) for n in numbers)):
            found = "nothing" if text is None else repr(text[:60])
            raise self.error(f"{found} as {name}", plural(count, "whole number" if whole else "number"), RECOPY)
        return numbers

    def _flag(self, name: str, default: str = "False") -> bool:
        value = self.fields.get(name, default).lower()
        if value not in ("true", "t", "yes", "y", "1", "false", "f", "no", "n", "0"):
            raise self.error(f"{value[:20]!r} as {name}", "True or False", RECOPY)
        return value in ("true", "t", "yes", "y", "1")
