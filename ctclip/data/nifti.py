"""NIfTI files (.nii, .nii.gz): header by nibabel, voxels as a stream."""

from __future__ import annotations

from math import isfinite

import nibabel as nib
import numpy as np

from ctclip.data.inflate import GzipFile
from ctclip.data.volume_file import CONVERT, RECOPY, Header, StreamFile, shortest_decimal, three_axes

NIFTI_SUFFIXES = (".nii", ".nii.gz")
# NIfTI code -> stored type
NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8"}


class NiftiFile(StreamFile):
    """NIfTI-1 or -2, plain or gzip."""

    def open(self) -> None:
        magic = self.raw.read(2)
        self.raw.seek(0)
        self.stream = self.raw
        if magic == b"\x1f\x8b":
            self.stream = GzipFile(fileobj=self.raw, mode="rb")
        elif self.path.suffix == ".gz":
            found = f"first bytes {magic!r}" if magic else "an empty file"
            raise self.error(found, "gzip data (b'\\x1f\\x8b')", RECOPY)
        block = np.zeros(540, np.uint8)
        self.fill(block[:348])
        sizes = {int.from_bytes(block[:4].tobytes(), order) for order in ("little", "big")}
        kind = nib.Nifti1Header
        if 540 in sizes:
            kind = nib.Nifti2Header
            self.fill(block[348:])
        elif 348 not in sizes:
            raise self.error(f"first bytes {block[:4].tobytes()!r}", "a NIfTI header", CONVERT)
        header = kind(block[: kind.sizeof_hdr].tobytes(), check=False)
        magic = header["magic"].item()
        if magic.rstrip(b"\0") not in (b"n+1", b"n+2", b"n+2\0\r\n\x1a\n"):
            raise self.error(f"magic {magic!r}", "b'n+1' (header and voxels in one file)", CONVERT)
        dims = [int(n) for n in header["dim"]]
        shape = three_axes(dims[1 : 1 + dims[0]] if 0 < dims[0] <= 7 else dims, self.path)
        code = int(header["datatype"])
        if code not in NIFTI_TYPES:
            raise self.error(f"voxels of NIfTI type {code}", "integers or floats", CONVERT)
        dtype = np.dtype(header.endianness + NIFTI_TYPES[code])
        offset = float(header["vox_offset"]) or float(header.single_vox_offset)  # some writers leave it 0
        if not header.sizeof_hdr <= offset < 1e9:  # False for NaN too
            raise self.error(f"voxels at byte {offset}", f"at least {header.sizeof_hdr}", CONVERT)
        slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
        if not isfinite(slope) or slope == 0:  # the standard's way of saying "not scaled"
            slope, intercept = 1.0, 0.0
        intercept = intercept if isfinite(intercept) else 0.0
        spacing = tuple(shortest_decimal(p) for p in header["pixdim"][1:4])
        self.header = Header(shape, dtype, slope, intercept, spacing, _nifti_affine(header))
        self.check_size(self.header, int(offset))
        self.skip(int(offset) - kind.sizeof_hdr)  # extensions, at least four bytes


def _nifti_affine(header: nib.Nifti1Header) -> np.ndarray | None:
    """From sform, else qform; None also if all it says is the identity.

    NaN is no fault as long as the metadata row gives the geometry.
    """
    stated = False
    for code, get in (("sform_code", header.get_sform), ("qform_code", header.get_qform)):
        if header[code] == 0:
            continue
        stated = True
        try:
            affine = np.asarray(get(), float)
        except (ValueError, nib.spatialimages.HeaderDataError):  # an impossible quaternion
            continue
        if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9:
            return None if np.array_equal(affine, np.eye(4)) else affine
    return np.full((4, 4), np.nan) if stated else None
