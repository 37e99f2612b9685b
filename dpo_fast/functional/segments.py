"""Sums over sequences and everything else that knows ``cu_seqlens``.

Legend: S sequences, N scored tokens.
"""

import torch
from torch import Tensor


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``values[cu_seqlens[s] : cu_seqlens[s + 1]].sum()`` of each sequence, ``[S]``.

    Summed in float64 in the order of the tokens, rounded once, deterministic; differentiable. An
    empty sequence gives 0.
    """
    if cu_seqlens.numel() < 2:
        return values.new_zeros(0)
    # `unsafe` leaves out checks that would wait for the device; the borders are checked before.
    sums = torch.segment_reduce(
        values.double(), "sum", offsets=cu_seqlens, unsafe=True, initial=0.0
    )
    return sums.to(values.dtype)


def compacted_borders(cu_seqlens: Tensor, valid: Tensor) -> Tensor:
    """``cu_seqlens`` after the rows outside the mask ``valid`` [N] have been dropped."""
    counts = torch.cat((valid.new_zeros(1, dtype=torch.int64), valid.cumsum(0)))
    return counts[cu_seqlens]
