"""APO: losses anchored at the reference's own likelihoods. No f-divergence form.

Legend: P pairs; ``a = beta * log-ratio`` of the chosen answer, ``b`` of the rejected one.
"""

import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.output import LossOutput, log_ratios, with_rewards
from dpo_fast.losses.pair_stats import PairStats
from dpo_fast.losses.traits import declares


@declares()
def apo_zero(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
) -> LossOutput:
    """``1 - sigmoid(a) + sigmoid(b)``: chosen up, rejected down.

    For chosen answers better than the model's own.

    Source: arXiv 2408.06266, eq. 7.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses = F.sigmoid(-beta * ratios.chosen) + F.sigmoid(beta * ratios.rejected)
    return with_rewards(losses, beta, *ratios)


@declares()
def apo_down(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
) -> LossOutput:
    """``sigmoid(a) + 1 - sigmoid(a - b)``: both down, rejected more.

    For chosen answers worse than the model's own.

    Source: arXiv 2408.06266, eq. 8.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses = F.sigmoid(beta * ratios.chosen) + F.sigmoid(-beta * ratios.margin)
    return with_rewards(losses, beta, *ratios)
