"""DICOM as scanners and archives write it, by pydicom: CT slices with all that real exports have, multi-frame CT, and
the other objects that lie beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, ExplicitVRLittleEndian

CT, ENHANCED_CT, CONVERTED_CT = (UID(f"1.2.840.10008.5.1.4.1.1.2{end}") for end in ("", ".1", ".2"))
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
RTSTRUCT, KEY_OBJECT, PRESENTATION, DOSE_REPORT, RAW_DATA, DICOMDIR, SECONDARY_CAPTURE = map(UID, (
    "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.88.59", "1.2.840.10008.5.1.4.1.1.11.1",
    "1.2.840.10008.5.1.4.1.1.88.67", "1.2.840.10008.5.1.4.1.1.66", "1.2.840.10008.1.3.10",
    "1.2.840.10008.5.1.4.1.1.7",
))  # fmt: skip


def new_file(sop_class: UID, uid: str, series: str, encoding: UID = ExplicitVRLittleEndian) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = sop_class, uid, encoding
    file = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID, file.SOPInstanceUID = sop_class, uid
    file.StudyInstanceUID, file.SeriesInstanceUID, file.FrameOfReferenceUID = "1.2.3.4", series, "1.2.3.9"
    file.SeriesNumber, file.Modality, file.PatientName, file.PatientID = series.rsplit(".", 1)[-1], "CT", "A^B", "17"
    return file


def add_pixels(file: FileDataset, stored: np.ndarray) -> None:
    """stored (rows, columns) or (frames, rows, columns), 16 bits."""
    file.Rows, file.Columns = stored.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    file.PixelRepresentation = int(stored.dtype.kind == "i")
    file.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()


def placed(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(directions (3, 3) LPS, one column per file axis; spacing mm; position of the first voxel) of a RAS affine."""
    columns = RAS_TO_LPS @ affine[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    return columns / spacing, spacing, RAS_TO_LPS @ affine[:3, 3]


def decimals(values: Sequence[float] | np.ndarray, digits: int = 6) -> list[str]:
    return [f"{value:.{digits}g}" for value in values]


def write_series(
    folder: Path,
    hu: np.ndarray,
    affine: np.ndarray,
    series: str = "1.2.3.4.5",
    prefix: str = "IM",
    shear: float = 0.0,
    digits: int = 6,
    places: Sequence[float] | None = None,
    encoding: UID = ExplicitVRLittleEndian,
    edit: Callable[[FileDataset, int], object] | None = None,
    **tags: Any,
) -> Path:
    """One file per slice of (x, y, z) HU, stored as HU + 1024 with intercept -1024, names in another order than places.

    `shear` moves each slice so many mm along its rows, as a tilted gantry does; `places` are the slices' positions
    along the normal, mm; `digits` are those of positions; `tags` are set in each file, `edit` gets each file and its
    index before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    directions, spacing, origin = placed(affine)
    order = np.random.default_rng(0).permutation(hu.shape[2])
    for index in range(hu.shape[2]):
        number = int(order[index])
        file = new_file(CT, f"{series}.{number + 1}", series)
        along = spacing[2] * index if places is None else places[index]
        file.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        file.InstanceNumber, file.SliceThickness = number, f"{spacing[2]:g}"
        place = origin + directions[:, 2] * along + shear * index * directions[:, 0]
        file.ImagePositionPatient = decimals(place, digits)
        file.ImageOrientationPatient = decimals(directions[:, :2].T.ravel())
        file.PixelSpacing = decimals(spacing[1::-1], 8)
        file.RescaleSlope, file.RescaleIntercept, file.RescaleType = "1", "-1024", "HU"
        file.add_new(0x00091010, "UN", b"private")
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = RTSTRUCT, "1.2.3.8"
        file.ReferencedImageSequence = Items([reference])
        add_pixels(file, np.ascontiguousarray(hu[:, :, index].T + 1024).astype(np.uint16))
        for keyword, value in tags.items():
            setattr(file, keyword, value)
        if edit is not None:
            edit(file, index)
        if encoding != ExplicitVRLittleEndian:
            file.compress(encoding)
        file.save_as(folder / f"{prefix}{number:04d}.dcm", enforce_file_format=True)
    return folder


def to_jpeg_lossless(path: Path) -> None:
    """The most usual code of compressed CT, which pydicom does not write."""
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()


def write_multiframe(
    path: Path, hu: np.ndarray, affine: np.ndarray, sop_class: UID = ENHANCED_CT,
    encoding: UID = ExplicitVRLittleEndian, series: str = "1.2.3.4.5",
) -> Path:  # fmt: skip
    """All slices in one file, frames in another order than they lie, every other one with a rescale slope of a half."""
    directions, spacing, origin = placed(affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = new_file(sop_class, "1.2.3.7", series)
    order = np.random.default_rng(0).permutation(hu.shape[2])

    def group(**values: Any) -> Items:
        inside = Dataset()
        for keyword, value in values.items():
            setattr(inside, keyword, value)
        return Items([inside])

    shared = Dataset()
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=decimals(directions[:, :2].T.ravel()))
    shared.PixelMeasuresSequence = group(PixelSpacing=decimals(spacing[1::-1], 8), SliceThickness=f"{spacing[2]:g}")
    shared.CTImageFrameTypeSequence = group(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
    frames = []
    for index in order:
        frame = Dataset()
        place = origin + directions[:, 2] * spacing[2] * index
        frame.PlanePositionSequence = group(ImagePositionPatient=decimals(place))
        slope = "0.5" if index % 2 else "1"
        frame.PixelValueTransformationSequence = group(RescaleSlope=slope, RescaleIntercept="-1024", RescaleType="HU")
        frames.append(frame)
    file.SharedFunctionalGroupsSequence, file.PerFrameFunctionalGroupsSequence = Items([shared]), Items(frames)
    file.NumberOfFrames = hu.shape[2]
    factor = np.where(np.arange(hu.shape[2]) % 2, 2, 1)
    add_pixels(file, ((hu + 1024) * factor).transpose(2, 1, 0)[order].astype(np.uint16))
    if encoding != ExplicitVRLittleEndian:
        file.compress(encoding)
    file.save_as(path, enforce_file_format=True)
    return path


def write_other(path: Path, sop_class: UID, series: str = "1.2.3.4.99") -> Path:
    """An object that is no CT slice but refers to some."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = new_file(sop_class, f"1.2.3.6.{sop_class[-4:].strip('.')}", series)
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = CT, "1.2.3.4.5.1"
    file.ReferencedImageSequence = Items([reference])
    file.save_as(path, enforce_file_format=True)
    return path
