"""The preference loss of one group of pairs, and its derivative with respect to each token.

Legend: p pairs of the group, n scored tokens of the group.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class GroupLoss(NamedTuple):
    """What the loss says about a group; everything detached."""

    objective: Tensor  # scalar: sum_p pair_weight[p] * losses[p]
    losses: Tensor  # [p]
    chosen_rewards: Tensor  # [p]
    rejected_rewards: Tensor  # [p]


def call_loss(
    loss: Any, logps: Tensor, ref_logps: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss`` on the four vectors of a group, its answer checked."""
    pairs = logps.shape[0] // 2
    refs = (None, None) if ref_logps is None else (ref_logps[:pairs], ref_logps[pairs:])
    answer = loss(logps[:pairs], logps[pairs:], *refs, **kwargs)
    shapes = [getattr(t, "shape", None) for t in answer] if isinstance(answer, tuple) else answer
    if not isinstance(answer, tuple) or shapes != [torch.Size((pairs,))] * 3:
        raise ValueError(
            f"the loss {loss!r} returned {type(answer).__name__} {shapes}; it must return "
            f"(losses, chosen_rewards, rejected_rewards), each a tensor [P={pairs}]"
        )
    return answer


def gradient(objective: Tensor, leaf: Tensor, loss: Any) -> Tensor:
    """``d objective / d leaf``; zeros where the loss is constant.

    Raises:
        ValueError: the loss has trainable tensors of its own, which would get no gradient here.
    """
    if not objective.requires_grad:
        return torch.zeros_like(leaf)
    _refuse_other_leaves(objective, leaf, loss)
    (grad,) = torch.autograd.grad(objective, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad


def _refuse_other_leaves(objective: Tensor, leaf: Tensor, loss: Any) -> None:
    seen, stack = set(), [objective.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not leaf:
            raise ValueError(
                f"the loss {loss!r} depends on a trainable tensor of shape "
                f"{list(variable.shape)}, which fused_linear_dpo would give no gradient; use "
                "sequence_logprobs and apply the loss under autograd"
            )
        stack.extend(next_node for next_node, _ in node.next_functions)
