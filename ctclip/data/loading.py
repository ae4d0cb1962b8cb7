"""Volumes -> batches: a dataset, a loader with processes, a reader with threads. A bad file costs only itself."""

from __future__ import annotations

import os
import re
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import log2, prod
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ctclip.data.augmentation import Augmentation, Box
from ctclip.data.cohort import Volume
from ctclip.data.geometry import PUBLISHED_SHAPE, check_shape
from ctclip.data.hounsfield import HuDecision
from ctclip.data.preprocessing import read_volume
from ctclip.data.volume_cache import VolumeCache
from ctclip.data.volume_file import VolumeError
from ctclip.formatting import plural

NOTE_SEPARATOR = "; "

@dataclass
class Batch:
    """volumes (B, 1, D, H, W) float32 in [-1, 1]; labels (B, 18); index (B,) int64 into the list given; B counts the
    readable ones only, the others are in failures as (name, reason); decisions has one entry per readable one."""

    volumes: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    failures: list[tuple[str, str]]
    decisions: list[HuDecision]

    def pin_memory(self) -> Batch:
        """For DataLoader: from page-locked memory a GPU takes the volumes while the CPU goes on."""
        return replace(self, volumes=self.volumes.pin_memory(), labels=self.labels.pin_memory())


class VolumeDataset(Dataset):
    """Item i: (i, tensor, labels, decision), or (i, None, name, reason) for a file that cannot be used.

    The tensors are as `augmentation` makes them, if there is one. `device` is read_volume's; with a `cache`, which is
    for the CPU, volumes come from there, in whole HU.
    """

    def __init__(
        self,
        volumes: Sequence[Volume],
        shape: Sequence[int] = PUBLISHED_SHAPE,
        augmentation: Augmentation | None = None,
        device: torch.device | None = None,
        cache: VolumeCache | None = None,
    ):
        check_shape(shape)
        self.volumes, self.shape, self.augmentation, self.device = list(volumes), tuple(shape), augmentation, device
        self.cache = cache

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> tuple:
        volume, box = self.volumes[index], None
        if self.augmentation is not None:
            generator = self.augmentation.generator(volume.name)
            box = self.augmentation.box(self.shape, generator)
        try:
            try:
                tensor, decision = self._read(volume, box, self.device)
            except (OSError, MemoryError, torch.OutOfMemoryError):
                # A network mount, a full moment, a full GPU; a second failure counts.
                tensor, decision = self._read(volume, box)
                tensor = tensor.to(self.device or "cpu")
        except Exception as error:  # one bad file never stops the others, nor does a defect that it uncovers
            reason = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, (VolumeError, OSError, MemoryError)):
                reason = f"found {type(error).__name__} while it was read ({reason}), expected a volume; leave it out"
            return index, None, volume.name, reason.removeprefix(f"{volume.path.name}: ")
        if self.augmentation is not None:
            tensor = self.augmentation.change(tensor, generator)
        return index, tensor, torch.from_numpy(np.asarray(volume.labels, np.float32)), decision

    def _read(
        self, volume: Volume, box: Box | None, device: torch.device | None = None
    ) -> tuple[torch.Tensor, HuDecision]:
        if self.cache is not None:
            return self.cache.read(volume, box)
        on_device = {} if device is None else {"device": device}
        tensor, decision = read_volume(volume, self.shape, **on_device)
        return tensor if box is None else tensor[:, box[0], box[1], box[2]].clone(), decision

    def collate(self, items: Sequence[tuple]) -> Batch:
        """Items -> Batch; with no readable item the tensors have length 0."""
        good = [item for item in items if item[1] is not None]
        failures = [(name, reason) for _, tensor, name, reason in items if tensor is None]
        if len(good) == 1:  # not copied: it may be 221 MB
            volumes = good[0][1][None]
        else:
            volumes = torch.stack([item[1] for item in good]) if good else torch.empty(0, 1, *self.shape)
        return Batch(
            volumes=volumes,
            labels=torch.stack([item[2] for item in good]) if good else torch.empty(0, len(self.volumes[0].labels)),
            index=torch.tensor([item[0] for item in good], dtype=torch.int64),
            failures=failures,
            decisions=[item[3] for item in good],
        )


def notes_of(volumes: Sequence[Volume], batch: Batch) -> dict[str, str]:
    """{name: what a reader of its answer should know}, of the volumes of a batch that have notes; `volumes` is the list
    that the batch's index points into."""
    decided = zip(batch.index.tolist(), batch.decisions, strict=True)
    return {volumes[index].name: NOTE_SEPARATOR.join(decision.notes) for index, decision in decided if decision.notes}


def count_notes(notes: Mapping[str, str]) -> list[str]:
    """A line for each kind of note in {name: notes, joined as by `notes_of`}: those that differ in numbers only."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, told in notes.items():
        for note in told.split(NOTE_SEPARATOR):
            kinds.setdefault(re.sub(r"\d+", "", note), []).append((name, note))
    return [f"{plural(len(of_kind), 'volume')} with a warning, first {of_kind[0][0]}: {of_kind[0][1]}"
            for of_kind in kinds.values()]


def micro_batch_size(shape: Sequence[int], batch_size: int) -> int:
    """Volumes to hold at once to begin with: the largest power of two within the voxels of two published volumes.

    A batch of 16 published volumes would be 3.5 GB before the network sees it; its gradients are accumulated instead.
    """
    most = max(1, 2 * prod(PUBLISHED_SHAPE) // prod(shape))
    return 1 << int(log2(min(most, batch_size)))


def volume_loader(
    volumes: Sequence[Volume],
    shape: Sequence[int] = PUBLISHED_SHAPE,
    batch_size: int = 1,
    num_workers: int = 0,
    augmentation: Augmentation | None = None,
    micro_batches: Sequence[Sequence[int]] | None = None,
    pin: bool = False,
    cache: VolumeCache | None = None,
) -> DataLoader:
    """DataLoader of Batch, in order; `augmentation` and `cache` are VolumeDataset's.

    micro_batches: the indices of every batch, empty ones too, in place of `batch_size`. pin: leave batches in
    page-locked memory, for a GPU. Each worker prepares one batch ahead in shared memory: 221 MB per volume at the
    published shape. Where shared memory is small (containers give 64 or 128 MB) use num_workers=0.
    """
    dataset = VolumeDataset(volumes, shape, augmentation, cache=cache)
    options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 1} if num_workers else {}
    options |= {"batch_size": batch_size} if micro_batches is None else {"batch_sampler": micro_batches}
    return DataLoader(
        dataset,
        num_workers=num_workers,
        generator=torch.Generator(),  # of the workers' seeds: reading must not disturb the random numbers of training
        collate_fn=dataset.collate,
        worker_init_fn=_ignore_interrupts,
        pin_memory=pin,
        **options,
    )


def read_ahead(
    volumes: Sequence[Volume],
    shape: Sequence[int],
    micro_batches: Sequence[Sequence[int]],
    readers: int = 1,
    device: torch.device | None = None,
    cache: VolumeCache | None = None,
) -> Iterator[Batch]:
    """A Batch for each of `micro_batches` (indices into volumes), in order; threads read the next ones meanwhile.

    Reading spends its time where Python's lock is released. Unlike volume_loader's processes, threads need no shared
    memory, of which a container may have 64 MB; at most `readers` volumes, or the next micro-batch, wait in memory,
    that of the `device` if one is given (see read_volume); `cache` is VolumeDataset's.
    """
    dataset = VolumeDataset(volumes, shape, device=device, cache=cache)
    waiting: deque[list] = deque()
    pool = ThreadPoolExecutor(max(1, readers))
    try:
        for indices in micro_batches:
            waiting.append([pool.submit(dataset.__getitem__, index) for index in indices])
            if sum(map(len, list(waiting)[1:])) >= readers:
                yield dataset.collate([item.result() for item in waiting.popleft()])
        while waiting:
            yield dataset.collate([item.result() for item in waiting.popleft()])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C, `timeout` and the shell's `kill %1` signal every process of a group. The main one decides when to stop,
    and a step in flight still needs its batch: workers ignore Ctrl-C and leave the group. SIGTERM stays as torch has
    set it in a worker: with the default action, torch would report a killed worker whenever a run ends early."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
