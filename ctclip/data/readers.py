"""Which reader a path needs. A new format is a VolumeFile in a module of its own, and a branch in `open_volume`."""

from __future__ import annotations

from pathlib import Path

from ctclip.data.dicom import DicomSeries, is_dicom
from ctclip.data.metaimage import META_SUFFIX, MetaFile
from ctclip.data.nifti import NIFTI_SUFFIXES, NiftiFile
from ctclip.data.volume_file import VolumeFile, file_error

FILE_SUFFIXES = (*NIFTI_SUFFIXES, META_SUFFIX)
READ_HERE = ".nii, .nii.gz, .mha or DICOM"
_CONVERT = "convert it: python -c \"import SimpleITK as s; s.WriteImage(s.ReadImage('{path}'), '{stem}.nii.gz')\""
_UNPACK = "unpack it, and name the scan or folder that was in it"
_ORIGINAL = "name the scan that it was made of: it keeps neither HU nor spacing"
# Endings of other files that may hold a scan or a picture of one -> what to do.
OTHER_SUFFIXES = (
    dict.fromkeys((".nrrd", ".nhdr", ".mhd", ".hdr", ".img", ".gipl", ".mnc"), _CONVERT)
    | dict.fromkeys((".zip", ".rar", ".7z", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst"), _UNPACK)
    | dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".npy", ".npz", ".mat"), _ORIGINAL)
)


def other_suffix(path: Path) -> str | None:
    """The ending of a file that is no scan here, but may hold one or a picture of one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if not suffixes or suffixes[-1] not in OTHER_SUFFIXES or path.name.lower().endswith(FILE_SUFFIXES):
        return None
    return "".join(suffixes[-2:]) if suffixes[-2:-1] in ([".tar"], [".nii"]) else suffixes[-1]


def other_file(path: Path) -> tuple[str, str, str]:
    """(found, expected, remedy) for a file of another kind than those that are read here."""
    suffix = other_suffix(path)
    remedy = OTHER_SUFFIXES[path.suffix.lower()] if suffix else "name a scan, or a folder of scans"
    found = f"a file that ends in {suffix or path.suffix}" if suffix or path.suffix else "a file without an ending"
    return found, READ_HERE, remedy.format(path=path, stem=path.with_suffix(""))


def open_volume(path: str | Path) -> VolumeFile:
    """A .nii, .nii.gz or .mha file; a folder with one DICOM series, or any file of a series."""
    path = Path(path)
    if path.name.lower().endswith(META_SUFFIX):
        return MetaFile(path)
    if not path.name.lower().endswith(NIFTI_SUFFIXES) and (path.is_dir() or is_dicom(path)):
        return DicomSeries(path)
    if other_suffix(path) and path.is_file():
        raise file_error(path, *other_file(path))
    return NiftiFile(path)
