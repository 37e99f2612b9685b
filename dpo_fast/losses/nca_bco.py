"""Losses of each answer's own reward: nca_pair and bco_pair.

Neither is a function of a difference of rewards, so neither has an f-divergence form.

Legend: P pairs; ``a = beta * log-ratio`` of the chosen answer, ``b`` of the rejected one.
"""

import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.output import LossOutput, log_ratios, with_rewards
from dpo_fast.losses.pair_stats import PairStats
from dpo_fast.losses.traits import declares


@declares()
def nca_pair(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
) -> LossOutput:
    """NCA for two answers: ``-logsigmoid(a) - logsigmoid(-a) / 2 - logsigmoid(-b) / 2``.

    The middle term pulls the chosen reward back to a finite value.

    Source: arXiv 2402.05369 (NCA, K = 2 with preference labels).
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    a, b = (beta * x for x in ratios)
    losses = -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)
    return with_rewards(losses, beta, *ratios)


@declares()
def bco_pair(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
) -> LossOutput:
    """Binary classifier of chosen against rejected: ``-logsigmoid(a) - logsigmoid(-b)``.

    The reward shift of the paper (a running mean) is 0, as in TRL and in MPO, arXiv 2411.10442.

    Source: BCO, arXiv 2404.04656.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    losses = -F.logsigmoid(beta * ratios.chosen) - F.logsigmoid(-beta * ratios.rejected)
    return with_rewards(losses, beta, *ratios)
