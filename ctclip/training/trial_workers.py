"""Processes that train a search's settings side by side: a head's small operations gain little from more threads."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ctclip.config import TrainingConfig, TrainingError
from ctclip.errors import UserError
from ctclip.memory import process_memory, system_memory
from ctclip.training.study import SAME_COMMAND

MOST = 8
Train = Callable[[int, TrainingConfig], object]  # (number, its configuration) -> the trial


def processes_to_start(device: torch.device, pending: int) -> int:
    """How many processes can train at once on a CPU: one for each of torch's threads, as long as each has as much
    memory as this one holds. 1 on a GPU, which one process keeps busy."""
    if device.type != "cpu":
        return 1
    memory, held = system_memory(), process_memory()
    fitting = MOST if memory is None or not held else memory.available // held
    return max(1, min(torch.get_num_threads(), MOST, pending, fitting))


class TrialWorkers:
    """`count` processes, each with a trainer of its own: `make_trainer(*args)`, made there, so that both are pickled.

    In a `with` block, at whose end they are ended. One whose parent is gone ends by itself after its setting.
    """

    def __init__(self, count: int, make_trainer: Callable[..., Train], *args: object):
        context = get_context("spawn")  # a forked process may hang in torch's threads
        self.ends: list[Connection] = []
        self.processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            given = theirs, max(1, torch.get_num_threads() // count), make_trainer, args
            process = context.Process(target=_work, args=given, daemon=True)
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def train(self, configs: Mapping[int, TrainingConfig]) -> Iterator[Any]:
        """What the trainers give, in the order in which they end. Raises the UserError of the first that fails."""
        waiting, idle, busy = list(configs.items()), list(self.ends), list[Any]()
        while waiting or busy:
            while waiting and idle:
                busy.append(idle.pop())
                with _other_side_lives():
                    busy[-1].send(waiting.pop(0))
            ready: list[Any] = wait(busy)
            for end in ready:
                with _other_side_lives():
                    result = end.recv()
                if isinstance(result, UserError):
                    raise result
                busy.remove(end)
                idle.append(end)
                yield result

    def __enter__(self) -> TrialWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
        for process, end in zip(self.processes, self.ends, strict=True):
            process.join()
            end.close()


@contextmanager
def _other_side_lives() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise TrainingError("found that a process which trained settings has ended (out of memory?), expected its "
                            f"result; {SAME_COMMAND}, with fewer threads (OMP_NUM_THREADS) if that happens again"
                            ) from error


def _work(end: Connection, threads: int, make_trainer: Callable[..., Train], args: tuple) -> None:
    """The whole of a process: settings in, trials out, until the other side is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    torch.set_num_threads(threads)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what preparing a job prints has been printed
    try:
        train = make_trainer(*args)
        while True:
            number, config = end.recv()
            end.send(train(number, config))
    except (EOFError, ConnectionError):
        return
    except UserError as error:
        end.send(error)
