"""Headers of DICOM slices in the usual encodings, little-endian with explicit or implicit value representations.

Nothing is interpreted here: `read_header` finds where elements lie, and only in files as the standard wants them; for
any other it gives None, and pydicom reads it (DICOM PS3.5, chapter 7).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Container
from typing import NamedTuple

import numpy as np

HEADER_BYTES = 1 << 15  # of a file that are looked at
EXPLICIT, IMPLICIT = b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2"
BIG_ENDIAN, DEFLATED = b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"
SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # a length of four bytes, behind two empty ones
KNOWN = SHORT | LONG
UNDEFINED = 0xFFFFFFFF
MOST_NESTED = 8  # sequences in each other
META_TAGS = frozenset((0x00020002, 0x00020010))  # SOP class, transfer syntax
CHARACTER_SET, INSTANCE, POSITION, SYNTAX = 0x00080005, 0x00080018, 0x00200032, 0x00020010
META_END, PIXEL_GROUP, PIXELS = 0x00030000, 0x7FE00000, 0x7FE00010
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
PHOTOMETRIC = 0x00280004
# Samples in a voxel, rows, columns, bits allocated, bits stored, high bit, representation: how pixels are stored.
STORED_TAGS = (0x00280002, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103)
NEEDED_TAGS = frozenset((CHARACTER_SET, INSTANCE, POSITION, PHOTOMETRIC, *STORED_TAGS))
_explicit, _implicit = struct.Struct("<HH2sH").unpack_from, struct.Struct("<HHL").unpack_from
_long, _short = struct.Struct("<L").unpack_from, struct.Struct("<H").unpack

Element = tuple[bytes, bytes]  # value representation (empty where it is implicit), value


class StoredPixels(NamedTuple):
    """Plain pixels of 16 bits, the last bytes of a file: where they begin, what their element begins with, and how many
    of the bits are unused (those above the others)."""

    offset: int
    start: bytes  # tag, VR and length, which lie before the offset
    dtype: np.dtype
    unused: int


class SliceHeader(NamedTuple):
    """What a header says: what only one slice has, and all else that was asked for, which its neighbours may share."""

    instance: str  # SOPInstanceUID
    position: str  # ImagePositionPatient as it is written
    shared: tuple[tuple[int, Element], ...]  # by tag
    pixels: StoredPixels | None  # None: compressed, or stored otherwise


def read_header(data: bytes, size: int, tags: Container[int]) -> SliceHeader | None:
    """The header of a file of `size` bytes that begins with `data`; None where pydicom has to look at it.

    tags: the elements of the dataset that are asked for, NEEDED_TAGS among them.
    """
    if data[128:134] != b"DICM\2\0":  # the meta information, group 2, comes first
        return None
    found: dict[int, Element] = {}
    try:
        begin = _walk(data, 132, len(data), False, META_END, found, META_TAGS)
        vr, syntax = found[SYNTAX][0], found[SYNTAX][1].rstrip(b"\0 ")
        implicit = syntax == IMPLICIT
        if vr != b"UI" or syntax in (BIG_ENDIAN, DEFLATED) or (data[begin + 4 : begin + 6] in KNOWN) == implicit:
            return None
        at = _walk(data, begin, len(data), implicit, PIXEL_GROUP, found, tags)
        tag, vr, length, offset = _element(data, at, implicit)
        if tag != PIXELS:
            return None
        instance, position = _text_of(found.pop(INSTANCE), b"UI"), _text_of(found.pop(POSITION), b"DS")
        plain = syntax in (EXPLICIT, IMPLICIT) and vr in (b"", b"OW", b"OB") and offset + length == size
        stored = _stored_pixels(found, offset, length, data[at:offset]) if plain else None
        return SliceHeader(instance, position, tuple(found.items()), stored)
    except (struct.error, LookupError, ValueError):  # cut short, or otherwise than expected
        return None


def _element(data: bytes, at: int, implicit: bool) -> tuple[int, bytes, int, int]:
    """(tag, value representation, length of its value, where that begins) of the element at a place."""
    if implicit:
        group, number, length = _implicit(data, at)
        return group << 16 | number, b"", length, at + 8
    group, number, vr, length = _explicit(data, at)
    if vr in LONG:
        return group << 16 | number, vr, _long(data, at + 8)[0], at + 12
    return group << 16 | number, vr, length, at + 8


def _walk(
    data: bytes, at: int, end: int | None, implicit: bool, stop: int, found: dict[int, Element] | None = None,
    tags: Container[int] = (), depth: int = 0,
) -> int:  # fmt: skip
    """The elements of a dataset from `at` on into `found`; returns where the first one from tag `stop` on begins. That
    of an item ends at `end`, or, where that is None, with its delimiter, behind which it returns."""
    previous = -1
    while at != end:
        tag, vr, length, value = _element(data, at, implicit)
        if tag == ITEM_END and end is None and not any(data[at + 4 : at + 8]):
            return at + 8
        if tag >= stop and not depth:
            return at
        if not (implicit or vr in KNOWN) or not previous < tag < stop or (end is not None and value > end):
            raise ValueError
        previous, at = tag, value + length
        if length == UNDEFINED:
            if vr not in (b"", b"SQ") or tag in tags or depth == MOST_NESTED:
                raise ValueError
            at = _skip_sequence(data, value, implicit, depth + 1)
        elif found is not None and tag in tags:
            found[tag] = vr, data[value:at]
    return at


def _skip_sequence(data: bytes, at: int, implicit: bool, depth: int) -> int:
    """Where a sequence of undefined length ends."""
    while True:
        group, number, length = _implicit(data, at)
        tag, at = group << 16 | number, at + 8
        if tag == SEQUENCE_END and not length:
            return at
        if tag != ITEM:
            raise ValueError
        end = None if length == UNDEFINED else at + length
        at = _walk(data, at, end, implicit, ITEM, depth=depth)


def _text_of(element: Element, expected: bytes) -> str:
    """The text of a UID or of numbers; ValueError where there is none, or pydicom might read another one."""
    vr, value = element
    text = value.decode("ascii").strip("\0 ")
    if vr not in (b"", expected) or not text:
        raise ValueError
    if expected == b"UI" and not re.fullmatch(rb"[0-9.]+[\0 ]*", value):
        raise ValueError
    return text


def _stored_pixels(found: dict[int, Element], offset: int, length: int, start: bytes) -> StoredPixels | None:
    if PHOTOMETRIC not in found or not {found[tag][0] for tag in STORED_TAGS} <= {b"", b"US"}:
        return None
    samples, rows, columns, allocated, used, high, signed = (_short(found[tag][1])[0] for tag in STORED_TAGS)
    if (samples, allocated, high) != (1, 16, used - 1) or not 1 <= used <= 16 or signed not in (0, 1):
        return None
    if length != 2 * rows * columns:
        return None
    return StoredPixels(offset, start, np.dtype("<i2" if signed else "<u2"), allocated - used)
