"""CPO: DPO against a uniform reference, plus likelihood of the chosen answer.

Legend: P pairs.
"""

import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.output import LossOutput, wide, with_rewards
from dpo_fast.losses.pair_stats import PairStats, token_mean_nll
from dpo_fast.losses.traits import declares


@declares(needs_reference=False, needs_nll=True, wpo="preference_term")
def cpo(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None = None,  # unused
    ref_rejected_logps: Tensor | None = None,  # unused
    *,
    stats: PairStats | None = None,
    preference_weight: Tensor | None = None,  # [P]
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
) -> LossOutput:
    """``-logsigmoid(beta * (log pi(chosen) - log pi(rejected))) + cpo_alpha * NLL``.

    The NLL is that of :func:`~dpo_fast.losses.sft`, a mean over the batch's chosen tokens, as in
    TRL's CPOTrainer; the paper writes the sum over the sequence, which would drown the preference
    term. ``preference_weight`` (WPO) multiplies the preference term only. No f-divergence form:
    the reference is taken as uniform.

    Rewards: ``beta * log pi(y)``.

    Source: arXiv 2401.08417, eq. 3 (the preference term), plus its likelihood term.
    """
    chosen, rejected = wide(chosen_logps), wide(rejected_logps)
    preference = -F.logsigmoid(beta * (chosen - rejected))
    if preference_weight is not None:
        preference = preference * preference_weight
    losses = preference + cpo_alpha * token_mean_nll(stats, "cpo")
    return with_rewards(losses, beta, chosen, rejected)
