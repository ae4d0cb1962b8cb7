"""Damaged, odd and hostile input files, each made from a right one by a numbered mutation: the same number gives the
same file. A generator writes one file (for DICOM a folder, for a run its folder) and says what was changed."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from helpers_data import affine_of, chest, reoriented, write
from helpers_dicom import RTSTRUCT, write_multiframe, write_other, write_series
from helpers_scans import write_mha
from pydicom import dcmread
from pydicom.uid import RLELossless

SPACING = (8.0, 8.0, 12.0)
ABSURD = (0, -1, 1, 2, 3, 255, 32767, -32768, 2**31 - 1, -(2**31))
ABSURD_NUMBERS = (0.0, -0.0, 1.0, -1.0, 1e-38, 1e38, -1e38, 1e-3, 1e3, float("nan"), float("inf"), float("-inf"))
ABSURD_TEXTS = ("", " ", "0", "-1", "nan", "inf", "1e999", "1_0", "١٢", "0x10", "1,5", "1 2 3 4", "x" * 5000, "1e-400")


def damage_bytes(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Cut, zeroed, repeated, exchanged or flipped somewhere."""
    kind, at = rng.choice(["cut", "zeros", "twice", "exchange", "flip", "append"]), int(rng.integers(1, len(data)))
    length = int(rng.integers(1, 1 + max(1, len(data) // 4)))
    end = at + length
    match kind:
        case "cut":
            data = data[:at]
        case "zeros":
            data = data[:at] + bytes(len(data[at:end])) + data[end:]
        case "twice":
            data = data[:end] + data[at:]
        case "exchange":
            other = int(rng.integers(len(data)))
            data = data[:at] + data[other : other + length] + data[end:]
        case "flip":
            damaged = bytearray(data)
            damaged[at] ^= 1 << int(rng.integers(8))
            data = bytes(damaged)
        case _:
            data = data + rng.bytes(length)
    return data, f"{kind} at {at}, {length} bytes"


def right_scan(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A small chest, stored in a random orientation."""
    codes = str(rng.choice(["LPS", "RAS", "LAI", "PIR", "SLP"]))
    return reoriented(chest((26, 24, 12), seed=int(rng.integers(3))), affine_of(SPACING), codes)


# ------------------------------------------------------------------ NIfTI


def nifti(folder: Path, rng: np.random.Generator) -> tuple[Path, str]:
    hu, affine = right_scan(rng)
    big_endian, kind = bool(rng.integers(2)), (nib.Nifti1Image, nib.Nifti2Image)[int(rng.integers(4) == 0)]
    codes = ((2, 0), (0, 1), (1, 1), (0, 0))[int(rng.integers(4))]
    spacing = nib.affines.voxel_sizes(affine)
    path = write(folder / "a.nii", hu, tuple(spacing), affine, codes, big_endian=big_endian, kind=kind)
    data = bytearray(path.read_bytes())
    header = kind.header_class(bytes(data[: kind.header_class.sizeof_hdr]), endianness=">" if big_endian else "<")
    order, told = header.endianness, []
    for _ in range(int(rng.integers(1, 3))):
        name = str(rng.choice(list(header.template_dtype.names)))
        dtype, offset = header.template_dtype.fields[name][:2]
        base, size = (dtype.subdtype[0], int(np.prod(dtype.subdtype[1]))) if dtype.subdtype else (dtype, 1)
        at = offset + int(rng.integers(size)) * base.itemsize
        if base.kind in "iu":
            limits = np.iinfo(base)
            value: Any = int(np.clip(int(rng.choice(ABSURD)), limits.min, limits.max))
        elif base.kind == "f":
            value = float(rng.choice(ABSURD_NUMBERS))
        else:
            value = rng.bytes(base.itemsize)
        with np.errstate(over="ignore"):
            new = np.array(value, base.newbyteorder(order)).tobytes()
        data[at : at + base.itemsize] = new
        told.append(f"{name} = {value!r}")
    content, how = bytes(data), ", ".join(told)
    if rng.integers(4) == 0:
        content, damage = damage_bytes(content, rng)
        how += f"; {damage}"
    path.unlink()
    compressed = bool(rng.integers(2))
    path = folder / ("a.nii.gz" if compressed else "a.nii")
    content = gzip.compress(content, 1) if compressed else content
    if compressed and rng.integers(6) == 0:
        content, damage = damage_bytes(content, rng)
        how += f"; compressed {damage}"
    path.write_bytes(content)
    return path, how


# ------------------------------------------------------------------ MetaImage


def metaimage(folder: Path, rng: np.random.Generator) -> tuple[Path, str]:
    path = write_mha(folder / "a.mha", *right_scan(rng), compressed=bool(rng.integers(2)))
    head, mark, voxels = path.read_bytes().partition(b"LOCAL\n")
    lines = head.decode().split("\n")
    at = int(rng.integers(len(lines)))
    name, _, value = lines[at].partition(" = ")
    parts = value.split(" ")
    place = int(rng.integers(len(parts)))
    match rng.choice(["word", "number", "drop", "twice", "swap", "keep"]):
        case "word":
            parts[place] = str(rng.choice(ABSURD_TEXTS))
        case "number":
            parts[place] = repr(float(rng.choice(ABSURD_NUMBERS)) if rng.integers(2) else int(rng.choice(ABSURD)))
        case "drop":
            parts.pop(place)
        case "twice":
            parts.insert(place, parts[place])
        case "swap":
            other = int(rng.integers(len(lines)))
            parts = lines[other].partition(" = ")[2].split(" ")
    how = f"{name} = {' '.join(parts)[:60]!r}"
    lines[at] = f"{name} = {' '.join(parts)}"
    content = "\n".join(lines).encode() + mark + voxels
    if rng.integers(4) == 0:
        content, damage = damage_bytes(content, rng)
        how += f"; {damage}"
    path.write_bytes(content)
    return path, how


# ------------------------------------------------------------------ DICOM


def dicom(folder: Path, rng: np.random.Generator) -> tuple[Path, str]:
    hu, affine = right_scan(rng)
    if rng.integers(4) == 0:
        path = write_multiframe(folder / "series" / "frames.dcm", hu, affine)
    else:
        coded = {"encoding": RLELossless} if rng.integers(4) == 0 else {}
        path = write_series(folder / "series", hu, affine, **coded)
    files = sorted((folder / "series").iterdir())
    victims = files if rng.integers(3) == 0 else [files[int(rng.integers(len(files)))]]
    kind = str(rng.choice(["element", "delete", "bytes", "other", "copy", "rename"]))
    how = f"{kind} of {len(victims)} of {len(files)}"
    if kind in ("element", "delete"):
        names = ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept",
                 "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel",
                 "PhotometricInterpretation", "SeriesInstanceUID", "SOPClassUID", "ImageType", "SliceThickness",
                 "PixelPaddingValue", "NumberOfFrames", "Modality", "PixelData"]  # fmt: skip
        name = str(rng.choice(names))
        number = float(rng.choice(ABSURD_NUMBERS))
        text = str(rng.choice(ABSURD_TEXTS))[:60].encode("latin-1", "replace").decode("latin-1")
        how += f": {name}"
        for victim in victims:
            file = dcmread(victim)
            if name in file and kind == "delete":
                delattr(file, name)
            elif name in file:
                how = f"{how}, {_replace_value(file[name], number, text)}" if victim is victims[0] else how
                _replace_value(file[name], number, text)
            file.save_as(victim)
    for victim in victims if kind == "bytes" else ():
        content, damage = damage_bytes(victim.read_bytes(), rng)
        victim.write_bytes(content)
        how += f"; {damage}" if victim is victims[0] else ""
    if kind == "other":
        write_other(folder / "series" / "other.dcm", RTSTRUCT, str(rng.choice(["1.2.3.4.5", "1.2.3.4.99"])))
    if kind == "copy":
        shutil.copy(victims[0], victims[0].with_name("copy.dcm"))
    if kind == "rename":
        victims[0].rename(victims[0].with_name(str(rng.choice(["DICOMDIR", "1.2.3", "x.txt", ".hidden", "a.dcm"]))))
    return (path if path.is_dir() else path.parent), how


def _replace_value(element: Any, number: float, text: str) -> str:
    """Puts something absurd into a DICOM element, past pydicom's own checks: what is in files is nobody's check."""
    if element.VR == "DS":
        count = max(1, element.VM)
        values = "\\".join([text if np.isnan(number) else f"{number:g}", *["1"] * (count - 1)])
        element._value = values.encode("utf-8", "replace")[:64].decode("utf-8", "replace")
        return values[:30]
    if element.VR == "US":
        element._value = int(abs(number)) % 65536 if np.isfinite(number) else 65535
    elif element.VR in ("CS", "UI", "IS"):
        element._value = text[:16] if element.VR != "IS" else (text[:8] or "0")
    elif element.VR in ("OW", "OB"):
        element._value = element._value[: len(element._value) // 2]
    return str(element._value)[:30]


GENERATORS: dict[str, Callable[[Path, np.random.Generator], tuple[Path, str]]] = {
    "nifti": nifti, "metaimage": metaimage, "dicom": dicom,
}  # fmt: skip
