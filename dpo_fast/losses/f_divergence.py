"""Scores of f-DPO: what replaces the log-ratio when the KL penalty becomes an f-divergence.

Source: Beyond Reverse KL, arXiv 2309.16240: the implicit reward is
``beta * f'(pi / pi_ref)`` plus a term of the prompt alone, which cancels only in differences of the
two answers. Losses that are no function of such a difference therefore have no f-divergence form.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.output import LogRatios

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
F_DIVERGENCES: tuple[str, ...] = get_args(FDivergence)

# exp stays finite in float32; beyond it the score is constant and the gradient 0
_MAX_EXPONENT = 80.0


def f_score(
    log_ratio: Tensor,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Tensor:
    """``f'(e^x)`` of a log-ratio ``x``, any shape.

    ==================  =====================================================
    reverse_kl          ``x``
    forward_kl          ``1 - e^-x``
    js_divergence       ``log 2 + logsigmoid(x)``
    alpha_divergence    ``(e^((a - 1) x) - 1) / (a - 1)``; ``x`` for ``a = 1``
    ==================  =====================================================

    The constants matter to losses that divide the scores by lengths. Exponents are cut at 80.

    Raises:
        ValueError: unknown divergence.
    """
    x = log_ratio
    if f_divergence_type == "reverse_kl":
        return x
    if f_divergence_type == "forward_kl":
        return -torch.expm1((-x).clamp(max=_MAX_EXPONENT))
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(x)
    if f_divergence_type == "alpha_divergence":
        order = f_alpha_divergence_coef - 1.0
        if abs(order) < 1e-6:
            return x
        return torch.expm1((order * x).clamp(max=_MAX_EXPONENT)) / order
    raise ValueError(
        f"f_divergence_type={f_divergence_type!r} must be one of {', '.join(F_DIVERGENCES)}"
    )


def f_scores(
    ratios: LogRatios, f_divergence_type: str, f_alpha_divergence_coef: float
) -> LogRatios:
    """:func:`f_score` of both answers."""
    chosen, rejected = (f_score(x, f_divergence_type, f_alpha_divergence_coef) for x in ratios)
    return LogRatios(chosen, rejected)
