"""Losses of the margin between the answers: sigmoid, cdpo, robust, hinge, ipo, sigmoid_norm.

Legend: P pairs. ``s(x)`` is the f-divergence score (``x`` itself for reverse_kl) of a log-ratio
``x = log pi(y) - log pi_ref(y)``; ``delta = s(chosen) - s(rejected)``; ``n`` is the number of
tokens of a completion.
"""

import torch.nn.functional as F
from torch import Tensor

from dpo_fast.losses.f_divergence import f_scores
from dpo_fast.losses.output import LossOutput, log_ratios, with_rewards
from dpo_fast.losses.pair_stats import PairStats, lengths
from dpo_fast.losses.traits import declares


@declares(f_divergence=True)
def sigmoid(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutput:
    """DPO: ``-logsigmoid(beta * delta)``.

    Source: arXiv 2305.18290, eq. 7; with an f-divergence arXiv 2309.16240.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    delta = f_scores(ratios, f_divergence_type, f_alpha_divergence_coef).margin
    return with_rewards(-F.logsigmoid(beta * delta), beta, *ratios)


@declares(f_divergence=True)
def cdpo(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutput:
    """Conservative DPO: ``-(1 - e) logsigmoid(beta * delta) - e logsigmoid(-beta * delta)``.

    ``e = label_smoothing`` is the probability that a label is flipped. The gradient vanishes where
    ``sigmoid(beta * delta) = 1 - e``, so the margin stays finite.

    A loss of its own, because ``sigmoid`` ignores label_smoothing, as in TRL 1.16.

    Source: E. Mitchell, A note on DPO with noisy preferences and relationship to IPO, 2023 (no
    arXiv number); the same loss is the cDPO of arXiv 2403.00409.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    z = beta * f_scores(ratios, f_divergence_type, f_alpha_divergence_coef).margin
    return with_rewards(smoothed_logistic(z, label_smoothing), beta, *ratios)


@declares(f_divergence=True)
def robust(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutput:
    """Robust DPO: ``[-(1 - e) logsigmoid(z) + e logsigmoid(-z)] / (1 - 2e)``, ``z = beta * delta``.

    With labels flipped at the rate ``e = label_smoothing`` in [0, 0.5) its expectation is the DPO
    loss of the clean labels. It may be negative.

    Source: arXiv 2403.00409 (rDPO, the unbiased loss).
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    z = beta * f_scores(ratios, f_divergence_type, f_alpha_divergence_coef).margin
    clean, flipped = -F.logsigmoid(z), -F.logsigmoid(-z)
    losses = ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return with_rewards(losses, beta, *ratios)


@declares(f_divergence=True)
def hinge(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutput:
    """Hinge: ``max(0, 1 - beta * delta)``; ``beta`` is the reciprocal of the margin.

    Source: RSO, arXiv 2309.06657 (hinge-norm, with ``gamma`` for beta), after SLiC, arXiv
    2305.10425.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    delta = f_scores(ratios, f_divergence_type, f_alpha_divergence_coef).margin
    return with_rewards(F.relu(1 - beta * delta), beta, *ratios)


@declares(f_divergence=True, needs_lengths=True)
def ipo(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutput:
    """IPO: ``(s(chosen) / n_chosen - s(rejected) / n_rejected - 1 / (2 beta))^2``.

    ``beta`` is the paper's tau. Scores are averaged over tokens, as TRL does on the advice of the
    paper's authors: the paper's formula with sums would grow with the square of the length.

    Source: arXiv 2310.12036, eq. 17.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    scores = f_scores(ratios, f_divergence_type, f_alpha_divergence_coef)
    chosen_len, rejected_len = lengths(stats, "ipo", scores.chosen.dtype)
    delta = scores.chosen / chosen_len - scores.rejected / rejected_len
    return with_rewards((delta - 1 / (2 * beta)) ** 2, beta, *ratios)


@declares(f_divergence=True, needs_lengths=True)
def sigmoid_norm(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
    *,
    stats: PairStats | None = None,
    beta: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutput:
    """Length-normalised DPO: ``-logsigmoid(beta * d)``, ``d = s(chosen) / n_chosen - s(rejected) /
    n_rejected``.

    Source: Tulu 3, arXiv 2411.15124 (length-normalised DPO), after SimPO, arXiv 2405.14734.
    """
    ratios = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    scores = f_scores(ratios, f_divergence_type, f_alpha_divergence_coef)
    chosen_len, rejected_len = lengths(stats, "sigmoid_norm", scores.chosen.dtype)
    delta = scores.chosen / chosen_len - scores.rejected / rejected_len
    return with_rewards(-F.logsigmoid(beta * delta), beta, *ratios)


def smoothed_logistic(z: Tensor, label_smoothing: float) -> Tensor:
    """``-(1 - e) logsigmoid(z) - e logsigmoid(-z)``: cross-entropy with the target ``1 - e``."""
    e = label_smoothing
    return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
