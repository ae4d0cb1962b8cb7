"""Chest CT in, tensors out: readers, preprocessing, cohorts, the cache of encoded volumes."""

from ctclip.data.datasets import LabelledVolumes, slices
from ctclip.data.preprocessing import preprocess_volume

__all__ = ["LabelledVolumes", "preprocess_volume", "slices"]
