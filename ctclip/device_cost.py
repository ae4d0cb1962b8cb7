"""Time and memory that an action takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import nan
from typing import NamedTuple

import torch

from ctclip.memory import local_world, process_memory, reset_peak_memory, system_memory

LONG = 30  # seconds: what takes longer is not measured again, with the memory that it has got by then


class Cost(NamedTuple):
    """Seconds, and the most bytes that this process held on the device, weights included (nan: not known here)."""

    seconds: float
    peak: float


def measure(device: torch.device, action: Callable[[], object]) -> Cost:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    known = on_gpu or reset_peak_memory()
    start = time.perf_counter()
    action()
    if on_gpu:
        torch.cuda.synchronize(device)
    return Cost(time.perf_counter() - start, held_memory(device, peak=True) if known else nan)


def measure_warm(device: torch.device, action: Callable[[], object]) -> Cost:
    first = measure(device, action)
    return first if first.seconds > LONG else measure(device, action)


def held_memory(device: torch.device, peak: bool = False) -> float:
    """Bytes that this process holds on the device, or the most since that was last reset; nan: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    held = process_memory(peak)
    return nan if held is None else held


def available_memory(device: torch.device) -> float:
    """Bytes that this process can have on the device, with those that it holds already; nan: not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    memory = system_memory()
    return nan if memory is None else memory.available / local_world() + held_memory(device)
