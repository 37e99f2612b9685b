"""What a preference loss may want to know beyond sums of log-probs, for one group of pairs.

Legend: P pairs of the batch, p pairs of a group, n scored tokens of the group.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast.functional.segments import segment_sum, sum_over_ranks
from dpo_fast.naive import LinearLogprobs


class PairGroup(NamedTuple):
    """What a ``stats`` callable of :func:`fused_linear_dpo` sees."""

    pairs: slice  # of the batch's P pairs
    logps: Tensor  # [n] unweighted token log-probs, chosen rows first; differentiable
    cu_seqlens: Tensor  # [2p + 1] borders of the group's sequences in logps
    token_stats: LinearLogprobs  # [n] each, what ``outputs`` asked for; no gradient
    ranks: Any = None  # process group over which the tokens of each sequence are spread


def chosen_nll_sum(group: PairGroup) -> Tensor:
    """Minus the sum of the unweighted token log-probs of each chosen answer, ``[p]``."""
    pairs = group.cu_seqlens.numel() // 2
    return -sum_over_ranks(segment_sum(group.logps, group.cu_seqlens), group.ranks)[:pairs]


def wpo_weight(group: PairGroup) -> Tensor:
    """``w(chosen) * w(rejected)`` with ``w = exp(mean_t(logp_t - log sum_v p_v^2))``, ``[p]``.

    No gradient. Source: WPO, arXiv 2406.11827, with the weights normalised by each distribution's
    own concentration.
    """
    concentration = group.token_stats.log_sum_sq_probs
    assert concentration is not None
    with torch.no_grad():
        lengths = sum_over_ranks(group.cu_seqlens.diff(), group.ranks).clamp_min(1)
        total = segment_sum(group.logps.detach() - concentration, group.cu_seqlens)
        weight = (sum_over_ranks(total, group.ranks) / lengths).exp()
        pairs = weight.shape[0] // 2
        return weight[:pairs] * weight[pairs:]


def needed_outputs(loss: Any, stats: Any, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """``outputs`` and what filling in ``stats`` takes beyond them."""
    fills_wpo = getattr(loss, "needs_wpo", False) and not callable(stats)
    if fills_wpo and getattr(stats, "wpo_weight", None) is None:
        return tuple(dict.fromkeys((*outputs, "log_sum_sq_probs")))
    return outputs


def check_stats(loss: Any, stats: Any) -> None:
    """A loss that says it needs statistics must get them."""
    if stats is not None:
        return
    wanted = [n for n in ("needs_lengths", "needs_nll", "needs_wpo") if getattr(loss, n, False)]
    if wanted:
        raise ValueError(
            f"stats=None, but the loss {loss!r} declares {', '.join(wanted)}; pass "
            "stats=PairStats(chosen_len=..., rejected_len=...): the sums are filled in here"
        )


def group_stats(
    loss: Any, stats: Callable[[PairGroup], Any] | Any | None, group: PairGroup
) -> dict[str, Any]:
    """The keyword arguments for ``loss``: ``stats`` of these pairs, gaps filled, or nothing."""
    if stats is None:
        return {}
    if callable(stats):
        return {"stats": stats(group)}
    part = stats.slice(group.pairs.start, group.pairs.stop)
    gaps: dict[str, Tensor] = {}
    if getattr(loss, "needs_nll", False) and part.chosen_nll_sum is None:
        gaps["chosen_nll_sum"] = chosen_nll_sum(group)
    if getattr(loss, "needs_wpo", False) and part.wpo_weight is None:
        gaps["wpo_weight"] = wpo_weight(group)
    return {"stats": dataclasses.replace(part, **gaps) if gaps else part}
