"""AOT: the distribution of one reward is made to dominate another's, quantile by quantile.

The sort couples all pairs of a call: neither loss is separable, and ``losses[i]`` belongs to the
i-th quantile, not to pair i. The pairs of one micro-batch of one rank are sorted together, as in
TRL; another split gives another objective. No f-divergence form.

Legend: P pairs.
"""

from torch import Tensor

from dpo_fast.losses.dpo import smoothed_logistic
from dpo_fast.losses.output import LossOutput, log_ratios, wide, with_rewards
from dpo_fast.losses.pair_stats import PairStats
from dpo_fast.losses.traits import declares


@declares(separable=False, wpo="unsupported")
def aot(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Paired: ``d = sort(log pi(chosen) - log pi(rejected)) - sort(the same of the reference)``,
    loss ``-(1 - e) logsigmoid(beta d) - e logsigmoid(-beta d)``, ``e = label_smoothing``.

    Source: arXiv 2406.05882 (AOT, paired, logistic loss).
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    assert ref_chosen_logps is not None and ref_rejected_logps is not None
    policy = (wide(chosen_logps) - wide(rejected_logps)).sort().values
    reference = (wide(ref_chosen_logps) - wide(ref_rejected_logps)).sort().values
    losses = smoothed_logistic(beta * (policy - reference), label_smoothing)
    return with_rewards(losses, beta, *ratios)


@declares(separable=False, wpo="unsupported")
def aot_unpaired(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Unpaired: ``d = sort(chosen log-ratios) - sort(rejected log-ratios)``, then as :func:`aot`.

    Source: arXiv 2406.05882 (AOT, unpaired, logistic loss).
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    delta = ratios.chosen.sort().values - ratios.rejected.sort().values
    return with_rewards(smoothed_logistic(beta * delta, label_smoothing), beta, *ratios)
