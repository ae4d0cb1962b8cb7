"""Shared by the tests: one small phantom cohort on disk, a tiny CT-CLIP, and no way to a model hub."""

import os
from pathlib import Path

# Before huggingface_hub and torch are imported, and for the processes that tests start: no way to a model hub, where a
# test does not open one; and one thread, because models of 93 thousand parameters are slower with two.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

FIXTURES = Path(__file__).parent / "fixtures"
LONGEST = (  # files that take longest, in that order
    "test_streaming.py", "test_terminals.py", "test_run_task2.py", "test_onnx_export.py", "test_notebook.py",
    "test_checkpoint.py", "test_setup.py", "test_training.py", "test_report.py", "test_fuzz.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first: at the end, one process would wait for the other."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def tiny_classfine() -> str:
    """A ClassFine checkpoint of 93 thousand parameters, input (20, 40, 40)."""
    return str(FIXTURES / "tiny_a_classfine.pt")


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A cohort of 40 training and 16 validation phantoms in the hub's layout. Read-only: copy it to change it."""
    from ctclip.phantoms.cohort import write_phantom_cohort

    return write_phantom_cohort(tmp_path_factory.mktemp("phantoms"), 40, 16, seed=5, progress=False)


@pytest.fixture
def undrawn(monkeypatch):
    """Evaluations without drawings, which are most of their time: test_report.py and test_evaluate.py look at those."""
    from ctclip.evaluation import figures

    monkeypatch.setattr(figures, "write_figures", lambda *args: None)
    monkeypatch.setattr(figures, "label_svgs", lambda plot, salt, findings, *arrays: [None] * len(findings))
    monkeypatch.setattr(figures, "svg", lambda *args: "")


@pytest.fixture(scope="module")
def fast():
    """Volumes from memory, no figure, and one thread, as in processes that tests start: the last bit shows it."""
    import torch
    from helpers_training import read_once

    from ctclip.data import loading
    from ctclip.training import logging

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "read_volume", read_once)
        patch.setattr(logging, "write_training_figure", lambda *args: None)
        yield
    torch.set_num_threads(threads)
