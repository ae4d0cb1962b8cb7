"""One small cohort in the hub's layout."""

import pytest
from helpers_data import HEADER, META_HEADER, A, B, C, label_line, meta_line, put, tables


@pytest.fixture
def data_dir(tmp_path):
    """A: version 2; B: version 1; C: both. B and C have a metadata row."""
    put(tmp_path, A, True, seed=1)
    put(tmp_path, B, False, seed=2)
    put(tmp_path, C, True, seed=3)
    put(tmp_path, C, False, seed=3)
    labels = [HEADER, label_line(A, (0, 17)), label_line(B, (0, 17)), label_line(C)]
    return tables(tmp_path, labels, [META_HEADER, meta_line(B), meta_line(C)], "")
