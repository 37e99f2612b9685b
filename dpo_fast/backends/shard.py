"""A vocabulary split over processes: which rows of the head this one holds, and sums over all.

Legend: N scored tokens, V vocabulary (of all ranks), R ranks of the group.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Rows ``start : start + len(weight)`` of a ``[total, H]`` head; rank order is row order.

    Every rank of ``group`` calls the same ops on the same hidden states and targets.

    Attributes:
        group: a ``ProcessGroup``.
        start: row of the whole head that this rank's weight begins with.
        total: V.
        largest: rows of the longest shard; plans that all ranks must share are made with it. None:
            that of an even split (``torch.chunk``'s, as DTensor's ``Shard(0)`` has it).
    """

    group: Any
    start: int
    total: int
    largest: int | None = None

    @classmethod
    def even(cls, group: Any, total: int) -> "VocabShard":
        """This rank's part of DTensor's ``Shard(0)``: chunks of ``ceil(V / R)`` rows."""
        chunk = -(-total // dist.get_world_size(group))
        return cls(group, min(total, dist.get_rank(group) * chunk), total, chunk)

    @classmethod
    def exchange(cls, group: Any, rows: int, device: torch.device) -> "VocabShard":
        """The same for any split: the ranks tell each other their ``rows``. One collective, and a
        host sync; make it once and keep it.
        """
        table = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        table[dist.get_rank(group)] = rows
        dist.all_reduce(table, group=group)
        sizes = table.tolist()
        return cls(group, sum(sizes[: dist.get_rank(group)]), sum(sizes), max(sizes))

    @property
    def longest(self) -> int:
        """Rows of the longest shard."""
        even = -(-self.total // dist.get_world_size(self.group))
        return even if self.largest is None else self.largest

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def locate(self, target: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """``(owned [N] bool, column [N])`` of targets among this rank's ``rows``; 0 elsewhere."""
        column = target - self.start
        owned = (column >= 0) & (column < rows)
        return owned, torch.where(owned, column, 0)
