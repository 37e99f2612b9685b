"""DiscoPOP: the log-ratio modulated loss.

Legend: P pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.f_divergence import f_scores
from dpo_fast.losses.output import LossOutput, log_ratios, with_rewards
from dpo_fast.losses.pair_stats import PairStats
from dpo_fast.losses.traits import declares


@declares(f_divergence=True)
def discopop(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutput:
    """``-logsigmoid(z) (1 - m) + e^-z m`` with ``z = beta * delta`` and ``m = sigmoid(z / tau)``.

    Not convex. ``e^-z m`` is computed as ``exp(logsigmoid(z / tau) - z)``: as a product it would be
    inf * 0 for z below -88.

    Source: arXiv 2406.08414, eq. 5.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    z = beta * f_scores(ratios, f_divergence_type, f_alpha_divergence_coef).margin
    logistic = -F.logsigmoid(z) * F.sigmoid(-z / discopop_tau)
    exponential = torch.exp(F.logsigmoid(z / discopop_tau) - z)
    return with_rewards(logistic + exponential, beta, *ratios)
