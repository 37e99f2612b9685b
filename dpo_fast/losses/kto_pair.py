"""KTO on paired data: each answer is judged by itself against a reference point.

Legend: P pairs.
"""

import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.output import LossOutput, log_ratios, with_rewards
from dpo_fast.losses.pair_stats import PairStats
from dpo_fast.losses.traits import declares


@declares(separable=False)
def kto_pair(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    kto_desirable_weight: float = 1.0,
    kto_undesirable_weight: float = 1.0,
) -> LossOutput:
    """``[w_D (1 - sigmoid(beta (c - z_c))) + w_U (1 - sigmoid(beta (z_r - r)))] / 2``.

    ``c``, ``r`` are the log-ratios. The reference points stand for the KL divergence from the
    reference: ``z_c = max(0, mean of the batch's r)`` and ``z_r = max(0, mean of the batch's c)``,
    each estimated on the other half, without gradient. They couple the pairs of one call (one
    micro-batch of one rank): not separable. The half makes the mean over pairs the paper's mean
    over answers. ``z = 0`` would be half of ``apo_zero``.

    No f-divergence form: rewards enter one at a time.

    Source: arXiv 2402.01306, eq. 7. The paper estimates z on mismatched prompts and answers, which
    would cost another forward of both models; halves are what a paired batch offers.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    z_chosen = ratios.rejected.detach().mean().clamp(min=0)
    z_rejected = ratios.chosen.detach().mean().clamp(min=0)
    desirable = F.sigmoid(-beta * (ratios.chosen - z_chosen))
    undesirable = F.sigmoid(beta * (ratios.rejected - z_rejected))
    losses = 0.5 * (kto_desirable_weight * desirable + kto_undesirable_weight * undesirable)
    return with_rewards(losses, beta, *ratios)
