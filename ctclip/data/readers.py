"""Which reader a path needs. A new format is a VolumeFile in a module of its own, and a branch in `open_volume`."""

from __future__ import annotations

from pathlib import Path

from ctclip.data.dicom import DicomSeries, is_dicom
from ctclip.data.metaimage import META_SUFFIX, MetaFile
from ctclip.data.nifti import NIFTI_SUFFIXES, NiftiFile
from ctclip.data.volume_file import VolumeFile

FILE_SUFFIXES = (*NIFTI_SUFFIXES, META_SUFFIX)


def open_volume(path: str | Path) -> VolumeFile:
    """A .nii, .nii.gz or .mha file; a folder with one DICOM series, or any file of a series."""
    path = Path(path)
    if path.name.lower().endswith(META_SUFFIX):
        return MetaFile(path)
    if not path.name.lower().endswith(NIFTI_SUFFIXES) and (path.is_dir() or is_dicom(path)):
        return DicomSeries(path)
    return NiftiFile(path)
