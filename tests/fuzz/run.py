"""Any number of mutated inputs, by hand:

    python tests/fuzz/run.py --seed 7 --seconds 600 --only dicom

Every input gives the right answer or one line. What is read must be what nibabel, SimpleITK or pandas make of the file,
where they read it; a checkpoint with the same weights in another wrapping must give the same logits. Prints a line for
each input that does not, with the seed and number that make it again.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import tempfile
import time
import traceback
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import nibabel as nib
import pandas as pd
import SimpleITK
from helpers_data import SMALL, write
from mutations import CLASSFINE, GENERATORS, SAME

from ctclip.data.cohort import read_metadata
from ctclip.data.ct_rate import volume_name
from ctclip.data.preprocessing import preprocess_volume
from ctclip.errors import UserError
from ctclip.evaluation.calibration import load_calibration
from ctclip.evaluation.report import settings_section
from ctclip.evaluation.run_folder import read_history, run_record
from ctclip.evaluation.tables import read_labels, read_predictions
from ctclip.hub.model_card import model_card
from ctclip.inference.predictor import load_model
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel, ModelError

SLOWEST = 10.0  # seconds
LONGEST = {"checkpoint": 700, "json": 700}  # characters of a message; 400 for scans
MEMORY = 3 << 30  # address space beyond what importing takes
# What the references take otherwise than the formats have it: nibabel takes the header for voxels where vox_offset is
# too small, ITK stops at a wrong CompressedDataSize, gives objects of an unknown kind no geometry and stacks a copy of
# a slice on the slice.
MISREAD = ("vox_offset", "CompressedDataSize", "SOPClassUID", "copy of")
TOLERANCE = 2e-3  # of what is read, against another reader: 2 HU


def check(kind: str, seed: int, number: int) -> tuple[str, str]:
    """(outcome, what was changed): "read", "refused", or what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path, how = GENERATORS[kind](Path(folder), np.random.default_rng([seed, number, len(kind)]))
        start = time.monotonic()
        try:
            outcome = READERS.get(kind, _read_scan)(kind, path, how)
        except (UserError, ModelError) as error:
            message = str(error)
            usable = "\n" not in message and "expected" in message.lower() and len(message) < LONGEST.get(kind, 400)
            outcome = "refused" if usable else f"message: {message!r}"
        except Exception:
            outcome = traceback.format_exc(limit=-4).replace("\n", " | ")
        if time.monotonic() - start > SLOWEST:
            outcome = f"{time.monotonic() - start:.0f} s"
        return outcome, how


def _read_scan(kind: str, path: Path, how: str) -> str:
    found = preprocess_volume(path, None, SMALL)
    misread = any(word in how for word in MISREAD)
    return _judge(found, None if misread else _read_elsewhere(kind, path, path.parent))


@torch.inference_mode()
def _read_checkpoint(kind: str, path: Path, how: str) -> str:
    logits = CTCLIPMultiAbnormalityModel(str(path)).eval()(VOLUME)
    if how.startswith(SAME) and not torch.equal(logits, _right_logits()):
        return "other logits than of the same weights"
    return "read" if logits.isfinite().all() or "1e38" in how else "logits that are no numbers"


VOLUME = torch.linspace(-1, 1, 5 * 40 * 40).view(1, 1, 5, 40, 40)


@cache
def _right_logits() -> torch.Tensor:
    return CTCLIPMultiAbnormalityModel(str(CLASSFINE)).eval()(VOLUME)


@torch.inference_mode()
def _read_run(kind: str, path: Path, how: str) -> str:
    """All that the suite reads of a run's JSON files."""
    model = load_model(path, "cpu")
    answers = load_calibration(path / "calibration.json").apply(model(VOLUME).sigmoid().numpy())
    record, history = run_record(path), read_history(path / "log.jsonl")
    settings_section({"settings": {}, "versions": {}}, record)
    if history:
        np.array([[line.get(key) for line in history] for key in ("train_loss", "positive_rate", "seconds")], float)
    card = model_card(model, path)
    right = np.isfinite(answers).all() and answers.shape == (1, len(ABNORMALITIES)) and card
    return "read" if right else "answers that are no numbers"


def _read_table(kind: str, path: Path, how: str) -> str:
    """Every volume has the cells that pandas finds in its row, as text or as numbers, unless pandas fails."""
    if path.name == "metadata.csv":
        found = {name: list(row.items()) for name, row in read_metadata(path).items()}
    else:
        frame = (read_labels if path.name == "labels.csv" else read_predictions)(path).frame
        found = {name: list(row.items()) for name, row in frame.to_dict("index").items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True, index_col=False,
                                encoding="utf-8-sig", header=None).fillna("")
    except Exception:  # whatever pandas has against the file
        return "read"
    header = [cell.strip() for cell in other.iloc[0]]
    for row in other.iloc[1:].to_numpy():
        cells = dict(zip(header, map(str.strip, map(str, row)), strict=True))
        for column, value in found.pop(volume_name(cells["VolumeName"]), ()):
            if cells[column] != value if isinstance(value, str) else float(cells[column]) != value:
                return f"{cells['VolumeName']}: {column} is {value!r}, and {cells[column]!r} for pandas"
    return f"pandas has no {', '.join(found)}" if found else "read"


READERS = {"checkpoint": _read_checkpoint, "json": _read_run, "table": _read_table}


def _judge(found: torch.Tensor, expected: torch.Tensor | None) -> str:
    if not bool(torch.isfinite(found).all()) or float(found.abs().max()) > 1:
        return "values out of [-1, 1]"
    if expected is not None and float((found - expected).abs().max()) > TOLERANCE:
        return f"another scan than the reference reads: {float((found - expected).abs().max()):.3f}"
    return "read"


def _read_elsewhere(kind: str, path: Path, folder: Path) -> torch.Tensor | None:
    """The tensor of what nibabel or SimpleITK read, written again as a plain NIfTI; None where they do not read it."""
    try:
        if kind == "nifti":
            image = nib.load(path)
            hu, affine = np.asarray(image.get_fdata(dtype=np.float32)), image.affine
            if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
                return None  # no orientation: nibabel makes one up
        elif kind == "metaimage":
            itk = SimpleITK.ReadImage(str(path), SimpleITK.sitkFloat32)
            hu = SimpleITK.GetArrayFromImage(itk).T
        else:
            itk = _itk_series(path)
            hu = SimpleITK.GetArrayFromImage(itk).T
        if kind != "nifti":
            affine = np.eye(4)
            affine[:3, :3] = np.reshape(itk.GetDirection(), (3, 3)) * itk.GetSpacing()
            affine[:3, 3] = itk.GetOrigin()
            affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        hu = np.nan_to_num(hu, nan=0.0)
        spacing = nib.affines.voxel_sizes(affine)
        return preprocess_volume(write(folder / "reference.nii", hu, tuple(spacing), affine), None, SMALL)
    except Exception:  # whatever the reference has against the file, or we against what it made of it
        return None


def _itk_series(folder: Path) -> SimpleITK.Image:
    """The only series of a folder, as ITK reads it."""
    (identity,) = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    reader = SimpleITK.ImageSeriesReader()
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), identity)
    if len(files) != len(list(folder.iterdir())):
        raise ValueError("ITK passes over files that it cannot read")
    reader.SetFileNames(files)
    reader.SetOutputPixelType(SimpleITK.sitkFloat32)
    return reader.Execute()


def limit_memory() -> None:
    """On Linux, MEMORY beyond what is in use: a file that asks for more ends in an error here."""
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--count", type=int, help="inputs of each kind, whatever time they take")
    parser.add_argument("--only", choices=list(GENERATORS), nargs="+", default=list(GENERATORS))
    parser.add_argument("--first", type=int, default=0, help="number to begin with")
    args = parser.parse_args()
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    limit_memory()
    start, number, bad = time.monotonic(), args.first, 0
    counts = {kind: {"read": 0, "refused": 0} for kind in args.only}
    while number - args.first < args.count if args.count else time.monotonic() - start < args.seconds:
        for kind in args.only:
            outcome, how = check(kind, args.seed, number)
            if outcome in counts[kind]:
                counts[kind][outcome] += 1
            else:
                bad += 1
                print(f"{kind} --seed {args.seed} --first {number} ({how}): {outcome}", flush=True)
        number += 1
    for kind, count in counts.items():
        print(f"{kind}: {count['read']} read, {count['refused']} refused")
    print(f"{bad} wrong, {time.monotonic() - start:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
