"""Groups of whole pairs whose probabilities fit into the workspace together.

Legend: P pairs, S = 2P sequences (all chosen first, then all rejected), N scored tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Pairs ``start:stop`` and the rows of their tokens in ``[N]``."""

    start: int
    stop: int
    chosen: slice
    rejected: slice

    @property
    def rows(self) -> int:
        return self.chosen.stop - self.chosen.start + self.rejected.stop - self.rejected.start

    def take(self, values: Tensor) -> Tensor:
        """The group's rows of ``values [N, ...]``, chosen first; a view where they are adjacent."""
        if self.chosen.stop == self.rejected.start:
            return values[self.chosen.start : self.rejected.stop]
        return torch.cat((values[self.chosen], values[self.rejected]))

    def put(self, into: Tensor, values: Tensor) -> None:
        """Writes the group's rows back into ``into [N, ...]``."""
        split = self.chosen.stop - self.chosen.start
        into[self.chosen] = values[:split]
        into[self.rejected] = values[split:]

    def borders(self, cu_seqlens: Tensor) -> Tensor:
        """Running lengths of the group's sequences, ``[2p + 1]``, without a device sync."""
        pairs = cu_seqlens.numel() // 2
        if self.start == 0 and self.stop == pairs:
            return cu_seqlens
        chosen = cu_seqlens[self.start : self.stop + 1] - self.chosen.start
        rejected = cu_seqlens[pairs + self.start + 1 : pairs + self.stop + 1]
        split = self.chosen.stop - self.chosen.start
        return torch.cat((chosen, rejected - (self.rejected.start - split)))


def one_group(pairs: int, rows: int) -> list[Group]:
    """All pairs at once."""
    return [Group(0, pairs, slice(0, rows), slice(rows, rows))]


def plan_groups(borders: list[int], max_rows: int, *, join_long: bool = True) -> list[Group]:
    """Consecutive pairs with at most ``max_rows`` rows a group, of about equal size.

    Pairs with more rows than that are groups apart from the others: with neighbours of their kind
    (``join_long``), where nothing is kept of them, or alone.
    """
    pairs = len(borders) // 2
    sizes = [
        borders[p + 1] - borders[p] + borders[pairs + p + 1] - borders[pairs + p]
        for p in range(pairs)
    ]
    rows = sum(size for size in sizes if size <= max_rows)
    even = -(-rows // max(1, -(-rows // max(1, max_rows))))
    groups: list[Group] = []
    start = used = 0
    for p, size in enumerate(sizes):
        long = size > max_rows
        full = not long and (used + size > max_rows or used >= even)
        apart = long != (sizes[p - 1] > max_rows) or (long and not join_long)
        if p > start and (full or apart):
            groups.append(_group(borders, start, p))
            start, used = p, 0
        used += size
    if pairs:
        groups.append(_group(borders, start, pairs))
    return groups


def _group(borders: list[int], start: int, stop: int) -> Group:
    pairs = len(borders) // 2
    return Group(
        start,
        stop,
        slice(borders[start], borders[stop]),
        slice(borders[pairs + start], borders[pairs + stop]),
    )
