"""The epilogue of the logits GEMM in torch operations: any device, float32 and float64.

Legend: n rows of a chunk, V vocabulary. Twin of csrc/epilogue.cpp, which does the same in one pass.

With ``a`` the GEMM's result plus bias, ``z = scale * cap(a)``, ``k`` the row's maximum of z and y
the target::

    E = exp(z - k)    R = sum_{j != y} E[j]    e = E[y]    S = R + e
    logp = -log1p(R)               where z_y is the maximum: 1 - p is R / S, not rounded away
           (z_y - k) - log(R + e)  elsewhere: two numbers of one sign, e may underflow
    chunk <- E * g, target entry -R * g_y, with g = cap'(a):   dz/da-weighted  S * (p - onehot)
"""

from typing import NamedTuple

import torch
from torch import Tensor


class EpilogueRows(NamedTuple):
    """What an epilogue finds out about each row, ``[n]`` in the chunk's dtype."""

    logps: Tensor
    shift: Tensor  # k
    rest: Tensor  # R
    total: Tensor  # S
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None  # bool
    log_sum_sq_probs: Tensor | None = None


def _capped(
    chunk: Tensor, bias: Tensor | None, softcap: float | None, scale: float, slope: bool
) -> Tensor | None:
    """Turns ``chunk`` into z in place; returns cap'(a) if there is a softcap and ``slope`` asks."""
    if bias is not None:
        chunk.add_(bias)
    gain = None
    if softcap is not None:
        chunk.div_(softcap)
        if slope:
            # 4u / (1 + u)^2 keeps its digits where 1 - tanh^2 is rounded to 0
            u = torch.exp(chunk.abs().mul_(-2))
            gain = u.mul(4).div_(u.add(1).square_())
        chunk.tanh_().mul_(softcap)
    if scale != 1.0:
        chunk.mul_(scale)
    return gain


def _store(chunk: Tensor, y: Tensor, rest: Tensor, gain: Tensor | None) -> None:
    chunk.scatter_(1, y, -rest.unsqueeze(1))
    if gain is not None:
        chunk.mul_(gain)


def epilogue_(
    chunk: Tensor,  # [n, V] a without bias; on return E with the target fixed, if store
    target: Tensor,  # [n] int64
    *,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    store: bool,
    outputs: tuple[str, ...] = (),
) -> EpilogueRows:
    """Log-probs and statistics of a chunk of rows; see the module's formulas."""
    y = target.unsqueeze(1)
    gain = _capped(chunk, bias, softcap, scale, store)
    shift = chunk.amax(dim=1)
    stats: dict[str, Tensor] = {}
    if "mean_logit" in outputs:
        stats["mean_logit"] = chunk.mean(dim=1)
    if "is_top1" in outputs:
        stats["is_top1"] = chunk.argmax(dim=1) == target
    chunk.sub_(shift.unsqueeze(1))
    below = chunk.gather(1, y).squeeze(1)  # z_y - k
    shifted = chunk.clone() if "entropy" in outputs else None
    chunk.exp_()
    e = chunk.gather(1, y).squeeze(1)
    if "log_sum_sq_probs" in outputs:
        stats["log_sum_sq_probs"] = chunk.square().sum(dim=1).log()
    rest = chunk.scatter_(1, y, 0.0).sum(dim=1)
    total = rest + e
    if "log_sum_sq_probs" in outputs:
        stats["log_sum_sq_probs"] -= 2 * total.log()
    if shifted is not None:
        # 0 * -inf: a logit of -inf adds nothing
        t = chunk.scatter_(1, y, e.unsqueeze(1)).mul(shifted).masked_fill_(chunk == 0, 0.0)
        stats["entropy"] = torch.where(below == 0, rest.log1p(), total.log()) - t.sum(1) / total
    logps = torch.where(below == 0, -rest.log1p(), below - total.log())
    if store:
        _store(chunk, y, rest, gain)
    return EpilogueRows(logps, shift, rest, total, **stats)


def exponentials_(
    chunk: Tensor,  # [n, V] a without bias; on return E with the target fixed
    target: Tensor,
    *,
    shift: Tensor,
    rest: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> None:
    """The stored chunk again, from fresh logits and what :func:`epilogue_` found: one pass."""
    gain = _capped(chunk, bias, softcap, scale, True)
    chunk.sub_(shift.unsqueeze(1)).exp_()
    _store(chunk, target.unsqueeze(1), rest, gain)
