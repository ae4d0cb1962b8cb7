"""Which reader a path needs. A new format is a VolumeFile in a module of its own, and a branch in `open_volume`."""

from __future__ import annotations

from pathlib import Path

from ctclip.data.dicom import DicomSeries, beginning, begins_as_dicom, is_dicom
from ctclip.data.metaimage import META_SUFFIX, MetaFile
from ctclip.data.nifti import NIFTI_SUFFIXES, NiftiFile
from ctclip.data.volume_file import VolumeFile, content_suffix, file_error, inflated

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
    """A .nii, .nii.gz or .mha file, read as what it is where its name says another of these; a folder with one DICOM
    series, or any file of a series."""
    path = Path(path)
    if path.name.lower().endswith(FILE_SUFFIXES):
        return MetaFile(path) if _format_suffix(path) == META_SUFFIX else NiftiFile(path)
    if path.is_dir() or is_dicom(path):
        return DicomSeries(path)
    if other_suffix(path) and path.is_file():
        raise file_error(path, *other_file(path))
    return NiftiFile(path)


def _format_suffix(path: Path) -> str:
    """.nii or .mha: what a file with one of FILE_SUFFIXES is by its first bytes; by its name where they do not say.
    Raises VolumeError where it is something else, which its reader would call damaged."""
    by_name = META_SUFFIX if path.name.lower().endswith(META_SUFFIX) else ".nii"
    start = beginning(path) if path.is_file() else b""
    unpacked = inflated(start)
    content = start if unpacked is None else unpacked
    suffix = content_suffix(content) or (".dcm" if begins_as_dicom(content) else "")
    if unpacked is not None and suffix != ".nii" and (suffix or by_name == META_SUFFIX):
        suffix += ".gz"
    if suffix in ("", ".nii", META_SUFFIX):
        return suffix or by_name
    remedy = OTHER_SUFFIXES.get(Path(f"scan{suffix}").suffix, _CONVERT)
    remedy = f"end its name in {suffix}" if remedy is _CONVERT else remedy
    raise file_error(path, f"the content of a {suffix} file", READ_HERE, remedy)
