"""SimPO: length-normalised, reference-free, with a target margin.

Legend: P pairs.
"""

import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.output import LossOutput, wide, with_rewards
from dpo_fast.losses.pair_stats import PairStats, lengths
from dpo_fast.losses.traits import declares


@declares(needs_reference=False, needs_lengths=True)
def simpo(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None = None,  # unused
    ref_rejected_logps: Tensor | None = None,  # unused
    *,
    stats: PairStats | None = None,
    beta: float = 2.0,
    simpo_gamma: float = 0.5,
) -> LossOutput:
    """``-logsigmoid(beta * (log pi(chosen) / n_chosen - log pi(rejected) / n_rejected) - gamma)``.

    The paper's ``beta`` is 2 to 2.5, far above DPO's 0.1: it multiplies a mean over tokens.
    No f-divergence form: there is no reference to diverge from.

    Rewards: ``beta * log pi(y) / n`` (eq. 4).

    Source: arXiv 2405.14734, eq. 6.
    """
    chosen, rejected = wide(chosen_logps), wide(rejected_logps)
    chosen_len, rejected_len = lengths(stats, "simpo", chosen.dtype)
    chosen, rejected = chosen / chosen_len, rejected / rejected_len
    losses = -F.logsigmoid(beta * (chosen - rejected) - simpo_gamma)
    return with_rewards(losses, beta, chosen, rejected)
