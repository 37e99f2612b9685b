"""Rows whose targets the host cannot read: all are scored, and those without a target are masked.

Legend: N rows, H hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MaskedTargets(NamedTuple):
    """Targets that every backend can take, and which rows they stand for."""

    target: Tensor  # [N] int64, inside the vocabulary everywhere
    counts: Tensor  # [N] bool: the row has a target
    fill: Tensor  # [N] float32, log-prob of the others: 0 where ignored, NaN where out of range

    def rows(self, hidden: Tensor) -> Tensor:
        """``hidden [N, H]``, zero where no target counts: a masked row may hold anything."""
        return torch.where(self.counts.unsqueeze(1), hidden, 0.0)

    def values(self, per_token: Tensor) -> Tensor:
        """``per_token [N]`` of the rows that count, the fill elsewhere (False for bool)."""
        if per_token.dtype == torch.bool:
            return per_token & self.counts
        return torch.where(self.counts, per_token, self.fill.to(per_token.dtype))


def mask_targets(target: Tensor, vocab: int, ignore_index: int | None) -> MaskedTargets:
    """:class:`MaskedTargets` of ``target [N]``, without a device sync."""
    ignored = torch.zeros_like(target, dtype=torch.bool)
    if ignore_index is not None:
        ignored = target == ignore_index
    inside = (target >= 0) & (target < vocab)
    counts = inside & ~ignored
    fill = torch.where(ignored, 0.0, torch.nan).to(torch.float32)
    return MaskedTargets(torch.where(counts, target, 0), counts, fill)
