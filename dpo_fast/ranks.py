"""The ranks of a launch talking through host memory: what they have, found and failed at.

Work that takes one rank longer than another by more than the timeout of the training's process
group (10 to 30 minutes) must not wait there. These calls wait on a gloo group of their own for as
long as the others live: gloo notices at once when one of them dies.
"""

import datetime
import os
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=7)


class Ranks:
    """A process by itself; :class:`LaunchedRanks` is several.

    Attributes:
        rank, size: this process's number, and how many there are.
    """

    rank = 0
    size = 1
    is_local_main = True

    def any(self, mask: np.ndarray) -> np.ndarray:
        """Elementwise: is ``mask [n]`` (bool) true on any rank."""
        return mask

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, in order."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value``."""
        return value

    def barrier(self) -> None:
        """Wait for all."""


class LaunchedRanks(Ranks):
    """The processes of a distributed launch."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.is_local_main = int(os.environ.get("LOCAL_RANK", "0")) == 0

    def any(self, mask: np.ndarray) -> np.ndarray:
        flags = torch.from_numpy(mask.astype(np.uint8))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return flags.numpy().astype(bool)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: T) -> T:
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self._group)
        return held[0]

    def barrier(self) -> None:
        dist.barrier(group=self._group)


def all_ranks() -> Ranks:
    """The ranks of this launch. The first call is collective: every rank makes it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()
    return LaunchedRanks(_host_group(dist.group.WORLD))


@lru_cache(maxsize=1)
def _host_group(world: Any) -> Any:
    """Made once for each default group."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
