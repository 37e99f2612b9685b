"""Inputs of the LM head's tests, and the naive twins on them.

Legend: P pairs, S = 2P sequences, N scored tokens, H hidden, V vocabulary, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_fast.backends import LinearHead, choose
from dpo_fast.naive import HeadLoRA

LENGTHS = [3, 0, 5, 7, 2, 4, 6, 1, 0, 9]  # five pairs: an empty answer on either side


@dataclass
class Case:
    """One set of inputs; ``kwargs`` are those of the head."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same values in another dtype, as fresh leaves."""
        move = lambda t: t.detach().to(dtype).requires_grad_(t.requires_grad)
        kwargs = dict(self.kwargs)
        if kwargs.get("bias") is not None:
            kwargs["bias"] = move(kwargs["bias"])
        if kwargs.get("lora") is not None:
            lora = kwargs["lora"]
            kwargs["lora"] = HeadLoRA(move(lora.a), move(lora.b), lora.scale)
        return replace(self, hidden=move(self.hidden), weight=move(self.weight), kwargs=kwargs)

    def leaves(self) -> dict[str, Tensor]:
        """Everything that may require a gradient, by name."""
        found = {"hidden": self.hidden, "weight": self.weight}
        if self.kwargs.get("bias") is not None:
            found["bias"] = self.kwargs["bias"]
        if self.kwargs.get("lora") is not None:
            found["lora_a"], found["lora_b"] = self.kwargs["lora"][:2]
        return {name: t for name, t in found.items() if t.requires_grad}


def make_case(
    rows: int = 23,
    width: int = 24,
    vocab: int = 101,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    bias: bool = False,
    rank: int = 0,
    requires_grad: Sequence[str] = ("hidden", "weight", "bias", "lora_a", "lora_b"),
    **kwargs: Any,
) -> Case:
    """Logits of a few units' spread; every third row confident, target 0 and V - 1 among them."""
    g = torch.Generator().manual_seed(seed)

    def normal(name: str, *shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(*shape, generator=g, dtype=torch.float64) * scale
        return value.to(dtype).requires_grad_(name in requires_grad)

    weight = normal("weight", vocab, width)
    hidden = normal("hidden", rows, width, scale=0.5)
    target = torch.randint(vocab, (rows,), generator=g)
    with torch.no_grad():
        if rows > 1:
            target[0], target[-1] = 0, vocab - 1
        hidden[::3] = weight[target[::3]]  # confident: the row of the weight itself
    if bias:
        kwargs["bias"] = normal("bias", vocab)
    if rank:
        a, b = normal("lora_a", rank, width, scale=0.3), normal("lora_b", vocab, rank)
        kwargs["lora"] = HeadLoRA(a, b, 0.5)
    return Case(hidden, weight, target, kwargs)


def borders(lengths: Sequence[int] = LENGTHS) -> Tensor:
    """``cu_seqlens`` of these lengths."""
    return torch.tensor([0, *accumulate(lengths)])


def workspace_of(rows: int, backend: str, vocab: int = 101) -> int:
    """Bytes that ``rows`` rows of stored probabilities take, in float32 on the CPU."""
    head = LinearHead(torch.empty(vocab, 1), None, None, 1.0, None)
    return rows * choose(backend, "cpu", torch.float32).row_bytes(head)


class SigmoidLoss:
    """DPO's loss, separable by choice; records the sizes it was called with."""

    def __init__(self, beta: float = 0.1, *, separable: bool = True) -> None:
        self.beta, self.separable, self.calls = beta, separable, []

    def __call__(
        self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(chosen.shape[0])
        chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
        losses = -logsigmoid(self.beta * (chosen_ratio - rejected_ratio))
        return losses, self.beta * chosen_ratio.detach(), self.beta * rejected_ratio.detach()


def gradients(value: Tensor, case: Case, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of all leaves by name."""
    leaves = case.leaves()
    found = torch.autograd.grad(value, list(leaves.values()), upstream)
    return dict(zip(leaves, found, strict=True))
