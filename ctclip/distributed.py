"""The processes of one run: one, or as many as `torchrun` started. With one process every method is a no-op or returns
its input, so that callers need no second path."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its functions take the group there is on import as the default of an argument. Imported later, by an optimiser,
# it keeps the group alive after its end, whose threads may then abort the interpreter.
import torch.distributed.nn.functional  # noqa: F401
from torch import Tensor

from ctclip.errors import UserError
from ctclip.memory import torchrun_number


class Ranks:
    """Rank, world size and collective operations of the process group. Call each on all ranks or on none."""

    def __init__(self, device: torch.device | None = None):
        """Joins the group that torchrun's environment describes; gloo on CPU, nccl on `device`'s GPU."""
        self.rank, self.world = torchrun_number("RANK", 0), torchrun_number("WORLD_SIZE", 1)
        if self.rank >= max(1, self.world):
            raise UserError(f"RANK={self.rank}: found it beside WORLD_SIZE={self.world}, expected a smaller number; "
                            "start with torchrun, or unset RANK")
        self.device = torch.device("cpu") if device is None else device
        if self.world > 1 and not dist.is_initialized():
            # One rank may read slowly while the others wait: encoding a cohort takes hours.
            wait = timedelta(hours=12)
            try:
                store, rank, world = next(dist.rendezvous("env://", timeout=wait))
                # After a restart torchrun's store may be the one before, with the addresses of processes that are gone.
                store = dist.PrefixStore(f"attempt_{torchrun_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
                backend = "nccl" if self.device.type == "cuda" else "gloo"
                dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0][:150]
                raise UserError(f"WORLD_SIZE={self.world}: found no group of processes to join ({reason}), expected "
                                "torchrun's; start with torchrun, or unset WORLD_SIZE") from error

    @classmethod
    def alone(cls) -> Ranks:
        """One process that belongs to no group, whatever torchrun's environment says."""
        ranks = cls.__new__(cls)
        ranks.rank, ranks.world, ranks.device = 0, 1, torch.device("cpu")
        return ranks

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def shard(self, items: list) -> list:
        """This rank's shard of `items`; the shards of all ranks are disjoint and together are `items`."""
        return items[self.rank :: self.world]

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every rank, in the order of ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def all_reduce_max(self, *values: float) -> list[float]:
        """Each value's maximum over the ranks."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Each value's sum over the ranks, in their order."""
        return [sum(of_ranks) for of_ranks in zip(*self.all_gather(values), strict=True)]

    def average(self, tensor: Tensor) -> None:
        """Overwrites it with its mean over the ranks."""
        total = tensor.contiguous()
        dist.all_reduce(total)
        tensor.copy_(total / self.world)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites each tensor with that of rank 0."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def destroy(self) -> None:
        """Ends the process group; no call on this object after it."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # what still refers to the group, in cycles: it ends with the last of them
