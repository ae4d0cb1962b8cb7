"""Which part of the work this process does, of several that torchrun started, or that --shard names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ctclip.distributed import Ranks
from ctclip.errors import UserError
from ctclip.memory import local_world, torchrun_number

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Process `index` (from 0) of `count`, `local` of them on this machine. `ranks`: torchrun's group; one process
    where there is none, as with --shard, whose processes know nothing of each other."""

    index: int = 0
    count: int = 1
    local: int = 1
    ranks: Ranks = field(default_factory=Ranks.alone)

    @classmethod
    def named(cls, text: str | None) -> Shard:
        """Of --shard, such as 2/3; of torchrun's environment, whose group it joins; else the whole."""
        world = torchrun_number("WORLD_SIZE", 1)
        if text is None:
            return cls(torchrun_number("RANK", 0), world, local_world(), Ranks()) if world > 1 else cls()
        if world > 1:
            raise UserError(f"found --shard {text} with torchrun, expected one of them, as both divide the work; leave "
                            "one out")
        numbers = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        index, count = (int(number) for number in numbers.groups()) if numbers else (0, 0)
        if not 1 <= index <= count:
            raise UserError(f"found --shard {text}, expected I/N with I from 1 to N, such as 2/3; correct it")
        return cls(index - 1, count)

    @property
    def name(self) -> str:
        """Such as 2of3; empty for the whole."""
        return f"{self.index + 1}of{self.count}" if self.count > 1 else ""

    @property
    def named_by_hand(self) -> bool:
        """Whether it is one part of several by --shard."""
        return self.alone and self.count > 1

    @property
    def alone(self) -> bool:
        """Whether it works without a group: as the only process, or as one of --shard."""
        return self.ranks.world == 1

    def assigned(self, items: list[Item]) -> list[Item]:
        """With --shard every n-th, whatever the others have done; all where a group will divide what is left."""
        return items[self.index :: self.count] if self.alone else items

    def seen_here(self, items: Sequence[Item], key: Callable[[Item], str]) -> list[Item]:
        """This rank's part of items that only some ranks see, such as files on their own disks: each goes to one of
        those that see it."""
        seen_by: dict[str, list[int]] = {}
        for rank, keys in enumerate(self.ranks.all_gather([key(item) for item in items])):
            for each in keys:
                seen_by.setdefault(each, []).append(rank)
        takers = {each: ranks[number % len(ranks)] for number, (each, ranks) in enumerate(seen_by.items())}
        return [item for item in items if takers[key(item)] == self.ranks.rank]

    def left_everywhere(self, left: Sequence[Item], key: Callable[[Item], str]) -> list[Item]:
        """This rank's part of what is left to do on every rank: what another one has done, with a cache on a disk of
        its own perhaps, is done."""
        of_ranks = [set(keys) for keys in self.ranks.all_gather([key(item) for item in left])]
        return self.ranks.shard([item for item in left if all(key(item) in keys for keys in of_ranks)])
