"""The naive twins: full logits in plain PyTorch, short enough to check by eye.

Oracle of the tests (`gold` is this module on float64 inputs), baseline of the benchmarks.

Legend: P pairs, S = 2P sequences (all chosen first, then all rejected), N scored tokens, H hidden,
V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUTS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


class HeadLoRA(NamedTuple):
    """A low-rank adapter on the LM head: ``logits += scale * (hidden @ a.T) @ b.T``."""

    a: Tensor  # [r, H]
    b: Tensor  # [V, r]
    scale: float


class LinearLogprobs(NamedTuple):
    """Per-token results of the LM head, each ``[N]``.

    The statistics are None unless asked for, and carry no gradient.
    """

    logps: Tensor  # log-probability of the target; 0 where ignored
    entropy: Tensor | None = None  # of the next-token distribution, in nats
    mean_logit: Tensor | None = None  # over the vocabulary, after softcap and scale
    is_top1: Tensor | None = None  # bool: the target is the argmax; ties go to the lowest index
    log_sum_sq_probs: Tensor | None = None  # log of sum_v p_v^2


def naive_logits(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    *,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    lora: HeadLoRA | None = None,
) -> Tensor:
    """``(logit_scale / temperature) * cap(x W^T + b + lora)`` as ``[N, V]``, at least float32."""
    logits = F.linear(hidden, weight, bias)
    if lora is not None:
        logits = logits + lora.scale * F.linear(F.linear(hidden, lora.a), lora.b)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits * (logit_scale / temperature)


def naive_linear_logprobs(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int64
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    lora: HeadLoRA | None = None,
    outputs: Sequence[str] = (),
) -> Tensor | LinearLogprobs:
    """Log-probability of each target, ``[N]``; ignored rows are 0 and get no gradient.

    With ``outputs`` (names out of :data:`OUTPUTS`) a :class:`LinearLogprobs`.
    """
    rows = (target != ignore_index).nonzero().squeeze(-1)
    z = naive_logits(
        hidden[rows],
        weight,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        lora=lora,
    )
    y = target[rows].unsqueeze(-1)
    log_probs = F.log_softmax(z, dim=-1)

    def scatter(values: Tensor) -> Tensor:
        return values.new_zeros(target.shape).index_put((rows,), values)

    logps = scatter(log_probs.gather(-1, y).squeeze(-1))
    if not outputs:
        return logps
    with torch.no_grad():
        stats = {
            "entropy": lambda: torch.special.entr(log_probs.exp()).sum(-1),
            "mean_logit": lambda: z.mean(-1),
            "is_top1": lambda: z.argmax(-1) == y.squeeze(-1) if z.numel() else y.squeeze(-1) < 0,
            "log_sum_sq_probs": lambda: torch.logsumexp(2 * log_probs, dim=-1),
        }
        return LinearLogprobs(logps, **{name: scatter(stats[name]()) for name in outputs})


def naive_segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of ``values[cu_seqlens[s] : cu_seqlens[s + 1]]``, ``[S]``; an empty sequence gives 0."""
    borders = cu_seqlens.tolist()
    sums = [values[a:b].sum() for a, b in pairwise(borders)]
    return torch.stack(sums) if sums else values[:0]


def naive_sequence_logprobs(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int64
    cu_seqlens: Tensor,  # [S + 1] int64
    *,
    token_weight: Tensor | None = None,  # [N]
    **head: Any,
) -> Tensor:
    """Sum of (weighted) token log-probs of each sequence, ``[S]``."""
    logps = naive_linear_logprobs(hidden, weight, target, **head)
    assert isinstance(logps, Tensor)
    return naive_segment_sum(logps if token_weight is None else logps * token_weight, cu_seqlens)


def naive_linear_dpo(
    policy_hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int64
    cu_seqlens: Tensor,  # [S + 1] int64
    *,
    loss: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ref_hidden: Tensor | None = None,  # [N, H]
    ref_weight: Tensor | None = None,  # [V, H]; None: the policy's weight and bias
    ref_bias: Tensor | None = None,
    ref_lora: HeadLoRA | None = None,
    ref_logps: Tensor | None = None,  # [S]
    stats: Any = None,
    pair_weight: Tensor | float | None = None,  # [P] or a number; None: 1 / P
    token_weight: Tensor | None = None,  # [N]
    bias: Tensor | None = None,
    lora: HeadLoRA | None = None,
    **head: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """``(objective, losses, logps [S], ref_logps [S], chosen_rewards, rejected_rewards)``.

    The objective is ``sum_p pair_weight[p] * losses[p]``; everything is on the tape. ``stats`` is
    handed to ``loss`` as the keyword ``stats`` when it is not None.
    """
    logps = naive_sequence_logprobs(
        policy_hidden,
        weight,
        target,
        cu_seqlens,
        token_weight=token_weight,
        bias=bias,
        lora=lora,
        **head,
    )
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        with torch.no_grad():
            ref_logps = naive_sequence_logprobs(
                ref_hidden,
                ref_weight,
                target,
                cu_seqlens,
                token_weight=token_weight,
                bias=ref_bias,
                lora=ref_lora,
                **head,
            )
    pairs = logps.shape[0] // 2
    refs = (None, None) if ref_logps is None else (ref_logps[:pairs], ref_logps[pairs:])
    kwargs = {} if stats is None else {"stats": stats}
    losses, chosen_rewards, rejected_rewards = loss(logps[:pairs], logps[pairs:], *refs, **kwargs)
    if pair_weight is None:
        pair_weight = 1.0 / pairs if pairs else 0.0
    return (losses * pair_weight).sum(), losses, logps, ref_logps, chosen_rewards, rejected_rewards


@torch.no_grad()
def naive_ema_(refs: Iterable[Tensor], policies: Iterable[Tensor], alpha: float) -> None:
    """``ref += alpha * (policy - ref)`` in place, computed in at least float32, rounded once.

    Source: TR-DPO, arXiv 2404.09656.
    """
    for ref, policy in zip(refs, policies, strict=True):
        wide = torch.promote_types(torch.promote_types(ref.dtype, policy.dtype), torch.float32)
        r = ref.to(wide)
        ref.copy_(r + alpha * (policy.to(wide) - r))
