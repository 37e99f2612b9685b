"""The filtered mode in plain PyTorch: the naive twin's probabilities, tiles left out by a mask."""

from typing import NamedTuple

import torch
from torch import Tensor


class Filtered(NamedTuple):
    mask: Tensor  # [B, U] bool: kept
    skipped: Tensor  # [N] share of a row's probability in tiles that were left out
    hidden: Tensor  # [N, H] gradient
    weight: Tensor  # [V, H] gradient


def oracle(
    hidden: Tensor,  # [N, H] float64
    weight: Tensor,  # [V, H] float64
    target: Tensor,  # [N]
    dlogps: Tensor,  # [N]
    *,
    bound: float,
    rows: int,
    unit: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Filtered:
    """Gradients of ``sum(dlogps * logps)`` over tiles of ``rows`` x ``unit`` that are kept."""
    n, vocab = hidden.shape[0], weight.shape[0]
    a = hidden @ weight.T
    a = a if bias is None else a + bias
    slope = torch.ones_like(a)
    if softcap is not None:
        a = softcap * torch.tanh(a / softcap)
        slope = 1 - (a / softcap) ** 2
    p = (scale * a).softmax(1)
    p[torch.arange(n), target] = 0  # the target's own is -rest
    rest = p.sum(1)
    row_tile = torch.arange(n) // rows
    column_tile = torch.arange(vocab) // unit
    held = torch.zeros(n, int(column_tile[-1]) + 1, dtype=p.dtype).index_add_(1, column_tile, p)
    needed = held >= bound
    needed[torch.arange(n), column_tile[target]] = True
    mask = torch.zeros(int(row_tile[-1]) + 1, needed.shape[1], dtype=torch.long)
    mask = mask.index_add_(0, row_tile, needed.long()) > 0
    kept = p * mask[row_tile][:, column_tile]
    skipped = rest - kept.sum(1)
    own = slope[torch.arange(n), target]
    e = kept * slope
    e[torch.arange(n), target] = -rest * own
    v = -dlogps * scale
    # a common mean of the weight's rows cancels in a row that leaves tiles out, too
    dhidden = v[:, None] * (e @ weight + skipped[:, None] * weight[target])
    return Filtered(mask, skipped, dhidden, e.T @ (v[:, None] * hidden))
