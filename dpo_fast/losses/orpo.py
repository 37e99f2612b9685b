"""ORPO: likelihood of the chosen answer plus an odds-ratio penalty, reference-free.

Legend: P pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.output import LossOutput, wide, with_rewards
from dpo_fast.losses.pair_stats import PairStats, chosen_nll_sum, lengths
from dpo_fast.losses.traits import declares


@declares(needs_reference=False, needs_nll=True, needs_lengths=True, wpo="preference_term")
def orpo(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None = None,  # unused
    ref_rejected_logps: Tensor | None = None,  # unused
    *,
    stats: PairStats | None = None,
    preference_weight: Tensor | None = None,  # [P]
    beta: float = 0.1,
) -> LossOutput:
    """``NLL / n_chosen - beta * logsigmoid(log odds(chosen) - log odds(rejected))``.

    ``odds(y) = P / (1 - P)`` with the per-token geometric mean ``P = exp(log pi(y) / n)``; ``beta``
    is the paper's lambda. ``preference_weight`` (WPO) multiplies the odds-ratio term only, for the
    reason given in :func:`~dpo_fast.losses.sft`. No f-divergence form: there is no reference.

    Rewards: ``beta * log pi(y) / n``.

    Source: arXiv 2403.07691, eqs. 4, 6 and 7.
    """
    nll = chosen_nll_sum(stats, "orpo")
    chosen, rejected = wide(chosen_logps), wide(rejected_logps)
    chosen_len, rejected_len = lengths(stats, "orpo", chosen.dtype)
    chosen, rejected = chosen / chosen_len, rejected / rejected_len
    penalty = -F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    if preference_weight is not None:
        penalty = penalty * preference_weight
    return with_rewards(nll / chosen_len + beta * penalty, beta, chosen, rejected)


def log_odds(log_p: Tensor) -> Tensor:
    """``log(p / (1 - p))`` from ``log p <= 0``; p is cut one rounding below 1, to stay finite."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))
