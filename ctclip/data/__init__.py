"""Chest CT in, tensors out: readers, preprocessing, cohorts, the cache of encoded volumes."""

from ctclip.data.preprocessing import preprocess_volume

__all__ = ["preprocess_volume"]
