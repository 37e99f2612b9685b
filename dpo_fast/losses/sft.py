"""The supervised term: negative log-likelihood of the chosen answers.

Legend: P pairs.
"""

from torch import Tensor

from dpo_fast.losses.output import LossOutput, log_ratios, wide, with_rewards
from dpo_fast.losses.pair_stats import PairStats, token_mean_nll
from dpo_fast.losses.traits import declares


@declares(
    needs_reference=False, needs_nll=True, f_divergence=True, defines_rewards=False, wpo="none"
)
def sft(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None = None,  # [P]
    ref_rejected_logps: Tensor | None = None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
) -> LossOutput:
    """``chosen_nll_sum[p] * num_pairs / num_chosen_tokens``, from unweighted token log-probs.

    Its mean over the pairs of the global batch is the mean NLL over the global batch's chosen
    tokens. (TRL takes the token mean of each micro-batch, which depends on how the batch is split.)

    No log-ratio enters, so any f-divergence leaves it as it is. A WPO weight does not multiply it:
    the weight turns the expectation of a *preference* loss over given pairs into one over the
    policy's own (arXiv 2406.11827, eq. 2); the likelihood of the chosen answer is no preference
    loss, has nothing to do with how likely the rejected one is, and serves as an anchor exactly
    where the policy finds the chosen answer unlikely. TRL 1.16 raises on the combination.

    Rewards: ``beta * log-ratio``, as TRL logs them; ``beta * logp`` without a reference.

    Source: the supervised term of RPO, arXiv 2405.16436, and of MPO, arXiv 2411.10442.
    """
    losses = token_mean_nll(stats, "sft")
    if ref_chosen_logps is None or ref_rejected_logps is None:
        return with_rewards(losses, beta, wide(chosen_logps), wide(rejected_logps))
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return with_rewards(losses, beta, *ratios)
