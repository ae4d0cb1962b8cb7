"""NIfTI files (.nii, .nii.gz): header by nibabel, voxels as a stream."""

from __future__ import annotations

from math import isfinite

import nibabel as nib
import numpy as np

from ctclip.data.inflate import GzipFile
from ctclip.data.volume_file import CONVERT, RECOPY, Header, StreamFile, shortest_decimal, three_axes

NIFTI_SUFFIXES = (".nii", ".nii.gz")
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI code (0: not stated) -> mm
# NIfTI code -> stored type
NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8"}
SCAN_CODES = {1, 2}  # of sform and qform: the scanner's space, or aligned with another scan's; others are of atlases
MOST_APART = 1.0  # degrees between the axes of both, from rounding


class NiftiFile(StreamFile):
    """NIfTI-1 or -2, plain or gzip."""

    def open(self) -> None:
        magic = self.raw.read(2)
        self.raw.seek(0)
        self.stream = self.raw
        if magic == b"\x1f\x8b":
            self.stream = GzipFile(fileobj=self.raw, mode="rb")
        elif not magic:
            raise self.error("an empty file", "a NIfTI file", RECOPY)
        block = np.zeros(540, np.uint8)
        self.fill(block[:4])
        size = block[:4].tobytes()
        sizes = int.from_bytes(size, "little"), int.from_bytes(size, "big")
        if 348 not in sizes and 540 not in sizes:
            raise self.error(f"first bytes {size!r}", "a NIfTI header", f"{RECOPY}, or {CONVERT}")
        kind = nib.Nifti2Header if 540 in sizes else nib.Nifti1Header
        self.fill(block[4 : kind.sizeof_hdr])
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
        elif not isfinite(intercept):
            raise self.error(f"slope {slope:g} beside intercept {intercept:g}", "two numbers", "correct the header")
        unit = int(header["xyzt_units"]) & 7
        if unit not in MM_PER_UNIT:
            raise self.error(f"spacing in unit {unit}", "metres, millimetres or micrometres", "correct the header")
        affine = _nifti_affine(header)
        if affine is not None:
            affine[:3] *= MM_PER_UNIT[unit]
        self.notes += _orientation_notes(header)
        # Where the sform gives the axes, the sign of a spacing says nothing.
        signs = 1 if header["sform_code"] == 0 else np.sign(header["pixdim"][1:4])
        spacing = tuple(shortest_decimal(p * MM_PER_UNIT[unit]) for p in header["pixdim"][1:4] * signs)
        self.header = Header(shape, dtype, slope, intercept, spacing, affine)
        self.check_size(self.header, int(offset))
        self.skip(int(offset) - kind.sizeof_hdr)  # extensions, at least four bytes


def _orientation_notes(header: nib.Nifti1Header) -> list[str]:
    """Whether sform and qform, where both speak of the scan itself rather than of an atlas, contradict."""
    if not {int(header["sform_code"]), int(header["qform_code"])} <= SCAN_CODES:
        return []
    try:
        forms = np.array([header.get_sform(), header.get_qform()], float)[:, :3, :3]
    except (ValueError, nib.spatialimages.HeaderDataError):  # an impossible quaternion
        return ["an unusable qform beside the sform: sform used"]
    lengths = np.linalg.norm(forms, axis=1, keepdims=True)
    if not np.isfinite(forms).all() or lengths.min() == 0:
        return ["an unusable sform or qform: the other one used"]
    cosines = (forms[0] / lengths[0] * forms[1] / lengths[1]).sum(axis=0)
    apart = float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())
    if apart <= MOST_APART:
        return []
    sform, qform = ("".join(map(str, nib.aff2axcodes(nib.affines.from_matvec(form)))) for form in forms)
    found = f"sform {sform} beside qform {qform}" if sform != qform else f"sform and qform {apart:.0f} degrees apart"
    return [f"{found}: sform used"]


def _nifti_affine(header: nib.Nifti1Header) -> np.ndarray | None:
    """From sform, else qform; None also if all it says is the identity.

    NaN is no fault as long as the metadata row gives the geometry.
    """
    stated = False
    if header["pixdim"][0] == 0:  # where qform's handedness stands; 0 is taken for 1 by the standard
        header["pixdim"][0] = 1
    for code, get in (("sform_code", header.get_sform), ("qform_code", header.get_qform)):
        if header[code] == 0:
            continue
        stated = True
        try:
            affine = np.array(get(), float)
        except (ValueError, nib.spatialimages.HeaderDataError):  # an impossible quaternion
            continue
        affine[:3, 3] = np.nan_to_num(affine[:3, 3], nan=0.0, posinf=0.0, neginf=0.0)  # the place is of no account
        if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9:
            return None if np.array_equal(affine, np.eye(4)) else affine
    return np.full((4, 4), np.nan) if stated else None
