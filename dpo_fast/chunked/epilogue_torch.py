"""The epilogue of the logits GEMM in torch operations: any device, float32 and float64.

Legend: n rows of a chunk, V vocabulary. Twin of csrc/epilogue_row.h, which needs one pass.

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
    shift: Tensor  # maximum of the row: of a, or of z with a softcap
    rest: Tensor  # R
    total: Tensor  # S
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None  # bool
    log_sum_sq_probs: Tensor | None = None


def below_(
    chunk: Tensor, bias: Tensor | None, softcap: float | None, scale: float, slope: bool
) -> Tensor | None:
    """Turns ``chunk`` from logits into a (z with a softcap) in place.

    Returns cap'(a) if there is a softcap and ``slope`` asks for it.
    """
    if bias is not None:
        chunk.add_(bias)
    if softcap is None:
        return None
    chunk.div_(softcap)
    gain = None
    if slope:
        # 4u / (1 + u)^2 keeps its digits where 1 - tanh^2 is rounded to 0
        u = torch.exp(chunk.abs().mul_(-2))
        gain = u.mul(4).div_(u.add_(1).square_())
    chunk.tanh_().mul_(softcap * scale)
    return gain


def shift_(chunk: Tensor, shift: Tensor, softcap: float | None, scale: float) -> None:
    """``z - k`` in place. The difference is taken before the scale: large logits keep digits."""
    chunk.sub_(shift.unsqueeze(1))
    if softcap is None and scale != 1.0:
        chunk.mul_(scale)


def _store(chunk: Tensor, y: Tensor, rest: Tensor, gain: Tensor | None) -> None:
    chunk.scatter_(1, y, -rest.unsqueeze(1))
    if gain is not None:
        chunk.mul_(gain)


def epilogue_(
    chunk: Tensor,  # [n, V] logits without bias; on return E with the target fixed, if store
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
    gain = below_(chunk, bias, softcap, scale, store)
    shift = chunk.amax(dim=1)
    stats: dict[str, Tensor] = {}
    if "mean_logit" in outputs:
        stats["mean_logit"] = chunk.mean(dim=1) * (scale if softcap is None else 1.0)
    if "is_top1" in outputs:
        stats["is_top1"] = chunk.argmax(dim=1) == target
    shift_(chunk, shift, softcap, scale)
    below = chunk.gather(1, y).squeeze(1)  # z_y - k
    shifted = chunk.clone() if "entropy" in outputs else None
    chunk.exp_()
    e = chunk.gather(1, y).squeeze(1)
    squares = chunk.square().sum(dim=1) if "log_sum_sq_probs" in outputs else None
    rest = chunk.scatter_(1, y, 0.0).sum(dim=1)
    total = rest + e
    log_total = torch.where(below == 0, rest.log1p(), total.log())
    if squares is not None:
        stats["log_sum_sq_probs"] = squares.log() - 2 * log_total
    if shifted is not None:
        # a logit of -inf adds nothing, and 0 * -inf would be NaN
        weighted = chunk.scatter_(1, y, e.unsqueeze(1)) * shifted.clamp_min_(-104.0)
        stats["entropy"] = log_total - weighted.sum(dim=1) / total
    logps = torch.where(below == 0, -log_total, below - log_total)
    if store:
        _store(chunk, y, rest, gain)
    return EpilogueRows(logps, shift, rest, total, **stats)


def exponentials_(
    chunk: Tensor,  # [n, V] logits without bias; on return E with the target fixed
    target: Tensor,  # [n]
    *,
    shift: Tensor,  # [n]
    rest: Tensor,  # [n]
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
) -> None:
    """The stored chunk again, from fresh logits and what :func:`epilogue_` found: one pass."""
    gain = below_(chunk, bias, softcap, scale, True)
    shift_(chunk, shift, softcap, scale)
    chunk.exp_()
    _store(chunk, target.unsqueeze(1), rest, gain)
