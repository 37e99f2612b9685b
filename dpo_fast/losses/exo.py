"""EXO for pairs.

Legend: P pairs.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.f_divergence import f_scores
from dpo_fast.losses.output import LossOutput, log_ratios, with_rewards
from dpo_fast.losses.pair_stats import PairStats
from dpo_fast.losses.traits import declares


@declares(f_divergence=True)
def exo_pair(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutput:
    """EXO-pref, ``KL(q || p)`` of ``q = (sigmoid(z), sigmoid(-z))`` and ``p = (1 - e, e)``:
    ``q_0 (log q_0 - log(1 - e)) + q_1 (log q_1 - log e)`` with ``z = beta * delta``.

    ``e = label_smoothing`` in (0, 1); the paper recommends 1e-3. Never negative, 0 where q = p.

    Source: arXiv 2402.00856, eq. 16.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    z = beta * f_scores(ratios, f_divergence_type, f_alpha_divergence_coef).margin
    chosen_term = F.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    rejected_term = F.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))
    return with_rewards(chosen_term + rejected_term, beta, *ratios)
