"""The triple that every loss returns, and the log-ratios that most start from.

Legend: P pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LossOutput(NamedTuple):
    """What a loss returns, each ``[P]``, at least float32. The rewards are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class LogRatios(NamedTuple):
    """``log pi(y) - log pi_ref(y)`` of both answers, each ``[P]``, at least float32."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


def wide(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_ratios(
    chosen_logps: Tensor,  # [P]
    rejected_logps: Tensor,  # [P]
    ref_chosen_logps: Tensor | None,  # [P]
    ref_rejected_logps: Tensor | None,  # [P]
) -> LogRatios:
    """Log-ratios to the reference.

    Raises:
        ValueError: no reference log-probs.
    """
    if ref_chosen_logps is None or ref_rejected_logps is None:
        raise ValueError(
            "this loss compares with a reference: pass ref_chosen_logps and ref_rejected_logps, "
            "or take a reference-free loss (simpo, orpo, cpo)"
        )
    chosen = wide(chosen_logps) - wide(ref_chosen_logps)
    return LogRatios(chosen, wide(rejected_logps) - wide(ref_rejected_logps))


def with_rewards(losses: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> LossOutput:
    """``losses`` with the rewards ``beta * chosen`` and ``beta * rejected``, detached."""
    return LossOutput(losses, beta * chosen.detach(), beta * rejected.detach())
