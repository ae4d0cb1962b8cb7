"""Batches: loaders that survive bad files and Ctrl-C, and a shuffle that follows its generator."""

import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch
from helpers_data import SMALL, chest, row_for, write

from ctclip.data.cohort import Volume, load_cohort
from ctclip.data.loading import VolumeDataset, volume_loader
from ctclip.data.preprocessing import preprocess_volume


@pytest.fixture
def mixed(data_dir):
    """The three good volumes with a truncated, a missing and an all-zero one between them."""
    volumes = load_cohort(data_dir, "valid").volumes
    truncated = data_dir / "truncated.nii.gz"
    truncated.write_bytes(volumes[0].path.read_bytes()[:2000])
    zero = write(data_dir / "zero.nii.gz", np.zeros_like(chest()))
    bad = [Volume(p.name, p, np.zeros(18, np.float32)) for p in (truncated, data_dir / "missing.nii.gz", zero)]
    return [volumes[0], bad[0], volumes[1], bad[1], bad[2], volumes[2]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_survives_bad_files(mixed, num_workers):
    loader = volume_loader(mixed, SMALL, batch_size=2, num_workers=num_workers)
    for _ in range(2):  # persistent workers: a second epoch works alike
        batches = list(loader)
        assert [b.index.tolist() for b in batches] == [[0], [2], [5]]
        assert [name for b in batches for name, _ in b.failures] == [
            "truncated.nii.gz",
            "missing.nii.gz",
            "zero.nii.gz",
        ]
    assert [[v.reading for v in b.decisions] for b in batches] == [["hu"], ["stored"], ["hu"]]
    for batch, volume in zip(batches, (mixed[0], mixed[2], mixed[5]), strict=True):
        assert batch.volumes.dtype == batch.labels.dtype == torch.float32 and batch.index.dtype == torch.int64
        assert torch.equal(batch.volumes[0], preprocess_volume(volume.path, volume.metadata and row_for(volume), SMALL))
        assert torch.equal(batch.labels[0], torch.from_numpy(volume.labels))
    reasons = dict(failure for b in batches for failure in b.failures)
    assert "truncated" in reasons["truncated.nii.gz"] and not reasons["zero.nii.gz"].startswith("zero.nii.gz")


def test_a_batch_of_failures_only_is_empty(mixed):
    (batch,) = volume_loader([mixed[1], mixed[3]], SMALL, batch_size=2)
    assert batch.volumes.shape == (0, 1, *SMALL) and batch.labels.shape == (0, 18) and batch.index.shape == (0,)
    assert len(batch.failures) == 2 and batch.decisions == []


def test_dataset_checks_its_shape():
    with pytest.raises(ValueError, match="three positive numbers"):
        VolumeDataset([], (480, 480))
    assert len(VolumeDataset([], SMALL)) == 0


# ------------------------------------------------------------------ signals


class Reporting(VolumeDataset):
    """Says who reads instead of reading: process and its group."""

    def __getitem__(self, index):
        return torch.tensor([os.getpid(), os.getpgid(0)])


@pytest.mark.skipif(sys.platform == "win32", reason="signals to a process group are a POSIX matter")
def test_workers_leave_stopping_to_the_main_process(monkeypatch):
    """Ctrl-C, sent to a worker, changes nothing; the main process can end it, whatever SIGTERM does to itself."""
    monkeypatch.setattr("ctclip.data.loading.VolumeDataset", Reporting)
    monkeypatch.setattr(Reporting, "collate", lambda self, items: items[0])
    before = signal.signal(signal.SIGTERM, lambda *arguments: None)
    try:
        loader = volume_loader([None] * 6, SMALL, num_workers=1)
        pids = []
        for pid, group in loader:
            assert group == pid != os.getpid()
            os.kill(int(pid), signal.SIGINT)
            pids.append(int(pid))
        assert len(pids) == 6 and len(set(pids)) == 1, "one worker, from the first to the last"
        (worker,) = (child for child in multiprocessing.active_children() if child.pid == pids[0])
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    finally:
        signal.signal(signal.SIGTERM, before)
