"""SPPO with hard labels.

Legend: P pairs.
"""

from torch import Tensor

from dpo_fast.losses.output import LossOutput, log_ratios, with_rewards
from dpo_fast.losses.pair_stats import PairStats
from dpo_fast.losses.traits import declares


@declares()
def sppo_hard(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
) -> LossOutput:
    """``(log-ratio(chosen) - 1 / (2 beta))^2 + (log-ratio(rejected) + 1 / (2 beta))^2``.

    ``beta`` is the paper's ``1 / eta``; the win probabilities are set to 1 and 0.

    Source: arXiv 2405.00675, eq. 4.7.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    target = 0.5 / beta
    losses = (ratios.chosen - target) ** 2 + (ratios.rejected + target) ** 2
    return with_rewards(losses, beta, *ratios)
