"""Damaged, odd and hostile input files, each made from a right one by a numbered mutation: the same number gives the
same file. A generator writes one file (for DICOM a folder, for a run its folder) and says what was changed; where
that changes no weight, it begins with SAME."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from helpers_data import affine_of, chest, reoriented, write
from helpers_dicom import RTSTRUCT, write_multiframe, write_other, write_series
from helpers_scans import write_mha
from pydicom import dcmread
from pydicom.uid import RLELossless
from safetensors.torch import save_file

from ctclip.evaluation.calibration import Calibration
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel

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


# ------------------------------------------------------------------ checkpoints

CLASSFINE = Path(__file__).parents[1] / "fixtures" / "tiny_a_classfine.pt"
SAME = "the same weights"


@cache
def classfine() -> dict[str, torch.Tensor]:
    return torch.load(CLASSFINE, weights_only=True)


def checkpoint(folder: Path, rng: np.random.Generator) -> tuple[Path, str]:
    """ClassFine's tensors with one change to a tensor, the keys, what is around them, or the bytes."""
    state: dict[Any, Any] = dict(classfine())
    key = str(rng.choice([name for name, value in state.items()
                          if "text_" not in name and value.is_floating_point() and value.ndim and value.numel()]))
    path = folder / f"a{rng.choice(['.pt', '.pth', '.ckpt', '.safetensors'])}"
    kind = str(rng.choice(["tensor", "keys", "around", "bytes", "other"]))
    how = kind
    if kind == "tensor":
        name = str(rng.choice(list(ODD_TENSORS)))
        state[key], how = ODD_TENSORS[name](state[key]), f"{key} {name}"
    elif kind == "keys":
        prefix = str(rng.choice(["_orig_mod.", "module.", "model.", "model._orig_mod.", "module.model.", "net.clip."]))
        state, how = {prefix + name: value for name, value in state.items()}, f"{SAME}, prefix {prefix}"
        if rng.integers(3) == 0:
            odd = rng.choice(np.array([7, "model.x", "\ud800", "", "."], object))
            state[odd], how = torch.ones(2), f"a key {odd!r}"
    elif kind == "around":
        moments = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}
        extra = {"epoch": 3, "best": np.float64(0.7), "args": argparse.Namespace(lr=1e-3), "optimizer": moments}
        name = str(rng.choice(["state_dict", "model", "model_state_dict", "net"]))
        state, how = extra | {name: state}, f"{SAME} in {name}"
        if rng.integers(3) == 0:
            state, how = (moments, "moments") if rng.integers(2) else (state | {"ema": dict(classfine())}, "two")
    simple = all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())
    dense = simple and all(value.layout == torch.strided and not value.is_quantized and not value.is_meta
                           and value.numel() < 1e6 for value in state.values())  # fmt: skip
    if dense and not any("\ud800" in name for name in state) and rng.integers(2):
        save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=bool(rng.integers(4)))
    if kind == "bytes":
        content, how = damage_bytes(path.read_bytes(), rng)
        path.write_bytes(content)
    if kind == "other":
        how = str(rng.choice(list(OTHER_CONTENT)))
        path.write_bytes(OTHER_CONTENT[how](path.read_bytes()))
        if how == "zipped":
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(CLASSFINE, "a.pt")
    return path, how


def _with(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


ODD_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "NaN": _with(float("nan")), "inf": _with(float("inf")), "-inf": _with(float("-inf")), "1e38": _with(1e38),
    "double": torch.Tensor.double, "half": torch.Tensor.half, "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t > 0, "complex": lambda t: t.to(torch.complex64), "sparse": torch.Tensor.to_sparse,
    "float8": lambda t: t.to(torch.float8_e4m3fn), "meta": lambda t: t.to("meta"), "no tensor": torch.Tensor.tolist,
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "flat": torch.Tensor.flatten,
    "cut": lambda t: t[:-1], "scalar": lambda t: t.sum(), "empty": lambda t: t[:0],
    "turned": lambda t: t.movedim(0, -1),
    "expanded": lambda t: t.view(-1)[:1].clone().expand(t.shape),
}  # fmt: skip
OTHER_CONTENT: dict[str, Callable[[bytes], bytes]] = {
    "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1769\n",
    "page": lambda data: b"<!DOCTYPE html><html><title>Sign in</title></html>", "text": lambda data: b"no weights\n",
    "gzip": lambda data: gzip.compress(data[:1000]), "empty": lambda data: b"", "zeros": lambda data: bytes(len(data)),
    "json": lambda data: b'{"metadata": {}}', "zipped": lambda data: b"", "noise": lambda data: data[::-1],
}  # fmt: skip

# ------------------------------------------------------------------ JSON

ODD_VALUES: tuple[Any, ...] = (None, True, -1, 0, 1e999, float("nan"), 10**400, "", "x", "1_0", [], {}, [1], {"a": 1},
                               "x" * 5000, 10**6, [[[]]])  # fmt: skip
COLUMNS = [np.full(len(ABNORMALITIES), value) for value in (1.2, -0.3, 0.0, 0.4)]
CALIBRATION = Calibration(ABNORMALITIES, "platt", *COLUMNS, 0.4, "prevalence", {"platt": 0.4}, 8, 4,
                          prevalence={"Emphysema": 0.2}).content()  # fmt: skip
LINE = {"epoch": 1, "stage": "frozen", "open_layers": 0, "train_loss": 0.5, "tuning_loss": 0.6, "best": True,
        "tuning_auroc_macro": 0.7, "positive_rate": 0.2, "label_rate": 0.2, "learning_rate": 1e-3, "skipped_steps": 0,
        "seconds": 2.5}  # fmt: skip
RECORD = {"status": "finished", "config": {"model": "ctclip", "epochs": 2, "learning_rate": None, "alpha": 0.35,
          "cache_dir": "cache", "ctclip_path": "a.pt", "seed": 0}, "data_dir": "d", "phantom": True, "device": "cpu",
          "volumes": {"train": 32, "tuning": 8}, "patients": {"train": 16, "tuning": 4}, "read_as": {"hu": 40},
          "left_out": [], "versions": {"ctclip": "0.7.0"}}  # fmt: skip


@cache
def saved_model() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        CTCLIPMultiAbnormalityModel(str(CLASSFINE)).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def run_files(folder: Path, rng: np.random.Generator) -> tuple[Path, str]:
    """A run's folder with one of its JSON files edited."""
    for name, content in saved_model().items():
        (folder / name).write_bytes(content)
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION))
    (folder / "run.json").write_text(json.dumps(RECORD))
    (folder / "log.jsonl").write_text("".join(json.dumps(LINE | {"epoch": epoch}) + "\n" for epoch in (1, 2, 3)))
    victim = folder / str(rng.choice(["calibration.json", "run.json", "log.jsonl", "config.json"]))
    content = victim.read_bytes()
    kind = str(rng.choice(["value", "value", "drop", "bytes", "deep", "coding", "whole"]))
    how = f"{victim.name} {kind}"
    if kind in ("value", "drop"):
        lines = content.splitlines() if victim.suffix == ".jsonl" else [content]
        at = int(rng.integers(len(lines)))
        holder = whole = json.loads(lines[at])
        key = str(rng.choice(list(holder)))
        while isinstance(holder[key], dict) and rng.integers(3):
            holder = holder[key]
            key = str(rng.choice(list(holder)))
        value = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
        if kind == "drop":
            del holder[key]
        else:
            holder[key] = value
        lines[at] = json.dumps(whole).encode()
        content, how = b"\n".join(lines), f"{victim.name} {kind} {key} {value!r:.30}"
    elif kind == "bytes":
        content, damage = damage_bytes(content, rng)
        how += f" {damage}"
    elif kind == "deep":
        depth = int(rng.choice([60, 900, 200_000]))
        opening, closing = (b"[", b"]") if rng.integers(2) else (b'{"a":', b"}")
        content = opening * depth + b"1" + closing * depth
    elif kind == "coding":
        coding = str(rng.choice(["utf-8-sig", "utf-16", "latin-1"]))
        content, how = (content.decode() + "\u00e9" * (coding == "latin-1")).encode(coding), f"{how} {coding}"
    else:
        content = json.dumps(ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]).encode()
    victim.write_bytes(content)
    return folder, how


# ------------------------------------------------------------------ tables


def table(folder: Path, rng: np.random.Generator) -> tuple[Path, str]:
    """labels.csv, predictions.csv or metadata.csv, named by what they are."""
    kind, n = str(rng.choice(["labels", "predictions", "metadata"])), int(rng.integers(1, 9))
    names = [f"{rng.choice(['valid', 'train'])}_{i}_a_{rng.integers(1, 3)}.nii.gz" for i in range(n)]
    columns = ["PatientSex", "PatientAge", "SliceThickness"] if kind == "metadata" else list(ABNORMALITIES)
    cells = {
        "labels": lambda: str(rng.choice(["0", "1", "0.0", "1.0"])),
        "predictions": lambda: str(rng.choice([repr(float(rng.random())), "1e-3", "0", "1", ".5"])),
        "metadata": lambda: str(rng.choice(["F", "M", "036Y", "1.5", "", "a, b"])),
    }[kind]
    if rng.integers(3) == 0:
        columns.append("PatientID")
    rows = [["VolumeName", *columns], *([name, *(cells() for _ in columns)] for name in names)]
    told = [change_table(rows, rng) for _ in range(int(rng.integers(1, 3)))]
    text = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if rng.integers(4) == 0 else csv.QUOTE_MINIMAL
    newline = str(rng.choice(["\n", "\r\n", "\r"], p=[0.7, 0.2, 0.1]))
    mark = str(rng.choice([",", ";", "\t", "|"], p=[0.88, 0.04, 0.04, 0.04]))
    csv.writer(text, delimiter=mark, quoting=quoting, lineterminator=newline).writerows(rows)
    encoding = str(rng.choice(["utf-8", "utf-8-sig", "utf-16", "latin-1"], p=[0.8, 0.12, 0.04, 0.04]))
    content, how = text.getvalue().encode(encoding, "replace"), f"{kind}: {', '.join(told)}; {encoding} {mark!r}"
    if rng.integers(6) == 0:
        content, damage = damage_bytes(content, rng)
        how += f"; {damage}"
    if rng.integers(15) == 0:
        content, how = gzip.compress(content, 1), how + "; gzip"
    path = folder / f"{kind}.csv"
    path.write_bytes(content)
    return path, how


def change_table(rows: list[list[str]], rng: np.random.Generator) -> str:
    """Changes rows of cells in place: a cell, a name, a column, or a row."""
    row = int(rng.integers(len(rows)))
    line = rows[row]
    if not line:  # blank
        return "nothing"
    column = int(rng.integers(len(line)))
    kind = str(rng.choice(["cell", "name", "names", "drop column", "repeat column", "add column", "turn", "short",
                           "long", "commas", "row names", "repeat row", "blank", "spaces", "nothing"]))  # fmt: skip
    change = str(rng.choice(["upper", "stem", "mha", "path", "windows", "spaces", "empty"]))
    renamed = {
        "upper": str.upper, "stem": lambda name: name.removesuffix(".nii.gz"),
        "windows": lambda name: f"D:\\ct\\{name}", "mha": lambda name: name.replace(".nii.gz", ".mha"),
        "path": lambda name: f"data/{name}", "spaces": lambda name: f" {name} ", "empty": lambda name: "",
    }[change]  # fmt: skip
    match kind:
        case "cell":
            line[column] = str(rng.choice([*ABSURD_TEXTS, "NaN", "TRUE", "1 ", "+1", "1e5", "a\nb", 'x"y', "é"]))
        case "name":
            line[0] = renamed(line[0])
        case "names":
            for each in filter(None, rows[1:]):
                each[0] = renamed(each[0])
        case "drop column" | "repeat column" | "add column" | "turn":
            for each in filter(None, rows):
                if kind == "drop column" and len(each) > column:
                    each.pop(column)
                elif kind == "repeat column":
                    each.append(each[min(column, len(each) - 1)])
                elif kind == "add column":
                    each.append("Pneumothorax" if each is rows[0] else "1")
                else:
                    each.reverse()
        case "short":
            del line[max(1, column) :]
        case "long":
            line.append(str(rng.choice(["1", ""])))
        case "commas" | "row names":
            for at, each in enumerate(rows[1:], 1):
                each.insert(len(each) if kind == "commas" else 0, "" if kind == "commas" else str(at))
        case "repeat row":
            rows.append(list(line))
        case "blank":
            rows.insert(row, [])
        case "spaces":
            line[:] = [f" {cell} " for cell in line]
    return f"{kind} {change if 'name' in kind else ''} {row} {column}"


GENERATORS: dict[str, Callable[[Path, np.random.Generator], tuple[Path, str]]] = {
    "nifti": nifti, "metaimage": metaimage, "dicom": dicom, "checkpoint": checkpoint, "json": run_files,
    "table": table,
}  # fmt: skip
