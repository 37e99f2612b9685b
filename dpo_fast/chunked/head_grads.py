"""Gradients of the head's parameters from probabilities.

Legend: N scored tokens, n rows of a chunk, H hidden, V vocabulary, r rank of the head's adapter.

With ``E`` the stored epilogue's output and ``v = -dlogp * scale / S``::

    dW += E^T (v X)      db += E^T v      dB += lora_scale * E^T (v X A^T)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.interface import HeadGrads, LinearHead, Needs
from dpo_fast.chunked.gemm import add_lora_logits, logits_into


class Factors(NamedTuple):
    """The right-hand sides of the formulas above; None where not needed."""

    v: Tensor  # [N]
    weight: Tensor | None  # v X, [N, H]
    lora_b: Tensor | None  # lora_scale * v X A^T, [N, r]

    def rows(self, part: slice) -> "Factors":
        """Those of a chunk."""
        return Factors(
            self.v[part],
            None if self.weight is None else self.weight[part],
            None if self.lora_b is None else self.lora_b[part],
        )


def new_totals(needs: Needs, into: HeadGrads | None, vocab: int, x: Tensor, rank: int) -> HeadGrads:
    """Accumulators of the head's gradients: those of ``into``, or zeros."""
    into = into or HeadGrads()
    weight, bias, lora_b = into.weight, into.bias, into.lora_b
    if needs.weight and weight is None:
        weight = x.new_zeros(vocab, x.shape[1])
    if needs.bias and bias is None:
        bias = x.new_zeros(vocab)
    if needs.lora_b and lora_b is None:
        lora_b = x.new_zeros(vocab, rank)
    return HeadGrads(
        weight=weight if needs.weight else None,
        bias=bias if needs.bias else None,
        lora_b=lora_b if needs.lora_b else None,
    )


def add_grads(total: HeadGrads, e: Tensor, factors: Factors) -> None:
    """Adds a chunk's share, in place and in the accumulators' dtype."""
    if total.weight is not None and factors.weight is not None:
        total.weight.addmm_(e.t(), factors.weight)
    if total.bias is not None:
        total.bias.addmv_(e.t(), factors.v)
    if total.lora_b is not None and factors.lora_b is not None:
        total.lora_b.addmm_(e.t(), factors.lora_b)


def logits_of(chunk: Tensor, x: Tensor, xa: Tensor | None, part: slice, head: LinearHead) -> None:
    """``x W^T + lora`` of the rows ``part`` into ``chunk``, without bias."""
    logits_into(chunk, x[part], head.weight)
    if xa is not None and head.lora is not None:
        add_lora_logits(chunk, xa[part], head.lora.b, head.lora.scale)


def weighted(x: Tensor, v: Tensor, a: Tensor | None, needs: Needs, lora_scale: float) -> Factors:
    """:class:`Factors` of all rows."""
    column = v.unsqueeze(1)
    lora_b = None
    if needs.lora_b:
        assert a is not None
        lora_b = torch.mm(column * x, a.to(x.dtype).t()).mul_(lora_scale)
    return Factors(v, column * x if needs.weight else None, lora_b)
