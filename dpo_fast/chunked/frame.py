"""The frame of every chunked head: rows in chunks through GEMM, epilogue and GEMM, and back.

Legend: N scored tokens, n rows of a chunk, H hidden, V vocabulary (of this rank's shard), r rank
of the head's adapter.

Heads differ in their epilogue, which turns a chunk of logits into E in place, and in what they add
to the gradients beside ``E^T (v X)``. What it takes to do so again in the backward is theirs; it
follows :class:`Kept` among the saved tensors.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.adapter_grad import lora_a_grad
from dpo_fast.backends.interface import HeadGrads, LinearHead, Needs, Saved
from dpo_fast.backends.scratch import as_matrix, scratch
from dpo_fast.chunked.chunks import chunk_rows, chunks, row_bytes
from dpo_fast.chunked.gemm import times_weight, wide_dtype
from dpo_fast.chunked.head_grads import Factors, add_grads, logits_of, new_totals
from dpo_fast.naive import HeadLoRA


class Meta(NamedTuple):
    """The plain half of what the backward needs."""

    needs: Needs
    softcap: float | None
    scale: float
    lora_scale: float
    vocab: int


class Kept(NamedTuple):
    """The other half: tensors, None where a backward does without."""

    row_scale: Tensor  # [N]: -scale / S
    dx: Tensor | None = None  # [N, H], unscaled
    eb: Tensor | None = None  # [N, r]: E B, unscaled
    memory: Tensor | None = None  # uint8: the stored E
    hidden: Tensor | None = None
    lora_a: Tensor | None = None
    weight: Tensor | None = None  # this and what follows: to compute E again
    bias: Tensor | None = None
    lora_b: Tensor | None = None


class Walk(NamedTuple):
    """What the forward leaves.

    Attributes:
        x: hidden states in the accumulators' dtype, ``[N, H]``.
        rows: what the epilogue found, a chunk each.
        dx: ``E W`` if hidden states need a gradient.
        eb: ``E B`` if they or lora.a need one and there is an adapter.
        memory: E of all rows, if it was to be stored.
    """

    x: Tensor
    rows: list[Any]
    dx: Tensor | None
    eb: Tensor | None
    memory: Tensor | None


def walk(
    hidden: Tensor,  # [N, H]
    head: LinearHead,
    epilogue: Callable[[Tensor, slice], Any],  # logits [n, V] of the rows, without bias; in place
    *,
    needs: Needs,
    store: bool,
    buffer: Tensor | None,
) -> Walk:
    """Logits, epilogue and products with E, chunk by chunk."""
    wide = wide_dtype(head.weight.dtype)
    rows, vocab = hidden.shape[0], head.weight.shape[0]
    x = hidden.to(wide)
    xa = None if head.lora is None else x @ head.lora.a.to(wide).t()
    dx = x.new_empty(x.shape) if needs.hidden else None
    eb = x.new_empty(xa.shape) if xa is not None and (needs.hidden or needs.lora_a) else None
    store = store and needs.head
    size = (rows if store else chunk_rows(rows, vocab, wide)) * row_bytes(vocab, wide)
    memory = x.new_empty(size, dtype=torch.uint8) if store and buffer is None else buffer
    found: list[Any] = []
    lend = scratch.borrow(size, x.device) if memory is None else nullcontext(memory)
    with lend as room:
        for part in chunks(rows, vocab, wide):
            chunk = as_matrix(room, part.stop if store else part.stop - part.start, vocab, wide)
            chunk = chunk[part] if store else chunk
            logits_of(chunk, x, xa, part, head)
            found.append(epilogue(chunk, part))
            if dx is not None:
                times_weight(chunk, head.weight, out=dx[part])
            if eb is not None and head.lora is not None:
                times_weight(chunk, head.lora.b, out=eb[part])
    return Walk(x, found, dx, eb, memory if store else None)


def keep(
    walked: Walk,
    hidden: Tensor,
    head: LinearHead,
    total: Tensor,  # [N]: S
    needs: Needs,
    own: tuple[Tensor | None, ...],
) -> Saved:
    """For the backward; adds the adapter's share to ``walked.dx`` on the way."""
    lora = head.lora
    if walked.dx is not None and walked.eb is not None and lora is not None:
        walked.dx.addmm_(walked.eb, lora.a.to(walked.x.dtype), alpha=lora.scale)
    kept = Kept(total.reciprocal().mul_(-head.scale), dx=walked.dx, memory=walked.memory)
    if needs.lora_a:
        kept = kept._replace(eb=walked.eb)
    if needs.head or needs.lora_a:
        kept = kept._replace(hidden=hidden)
    again = needs.head and walked.memory is None
    if lora is not None and (needs.lora_b or again):
        kept = kept._replace(lora_a=lora.a)
    if again:
        kept = kept._replace(
            weight=head.weight, bias=head.bias, lora_b=None if lora is None else lora.b
        )
    lora_scale = 0.0 if lora is None else lora.scale
    meta = Meta(needs, head.softcap, head.scale, lora_scale, head.weight.shape[0])
    return Saved((*kept, *own), meta)


class HeadShare(NamedTuple):
    """What a head adds its part of the head's gradients with.

    Attributes:
        x: ``[N, H]`` in the accumulators' dtype.
        v: ``[N]``: ``-dlogp * scale / S``.
        own: what it kept for itself.
    """

    x: Tensor
    v: Tensor
    kept: Kept
    meta: Meta
    own: tuple[Tensor | None, ...]


def walk_back(
    saved: Saved,
    dlogps: Tensor,
    into: HeadGrads | None,
    add_share: Callable[[HeadGrads, HeadShare], None],
) -> HeadGrads:
    """Gradients for ``dlogps`` [N]; ``add_share`` adds those of the head to the sums in place."""
    kept, own = Kept(*saved.tensors[: len(Kept._fields)]), saved.tensors[len(Kept._fields) :]  # type: ignore[arg-type]
    meta: Meta = saved.meta
    v = kept.row_scale * dlogps
    grads = HeadGrads()
    if kept.dx is not None:
        grads = grads._replace(hidden=v.unsqueeze(1) * kept.dx)
    if kept.hidden is None:
        return grads
    x = kept.hidden.to(v.dtype)
    if kept.eb is not None:
        grads = grads._replace(lora_a=lora_a_grad(v, kept.eb, x, meta.lora_scale, into))
    if not meta.needs.head:
        return grads
    rank = 0 if kept.lora_a is None else kept.lora_a.shape[0]
    total = new_totals(meta.needs, into, meta.vocab, x, rank)
    add_share(total, HeadShare(x, v, kept, meta, own))
    return grads._replace(weight=total.weight, bias=total.bias, lora_b=total.lora_b)


def add_products(
    total: HeadGrads,
    share: HeadShare,
    factors: Factors,
    epilogue: Callable[[Tensor, slice, LinearHead], object],
) -> None:
    """Adds ``E^T`` times the factors, from the stored E or from E computed once more.

    Args:
        epilogue: logits ``[n, V]`` of the rows, without bias, to E in place.
    """
    x, kept, meta = share.x, share.kept, share.meta
    if kept.memory is not None:
        add_grads(total, as_matrix(kept.memory, x.shape[0], meta.vocab, x.dtype), factors)
        return
    assert kept.weight is not None
    lora = None
    if kept.lora_a is not None and kept.lora_b is not None:
        lora = HeadLoRA(kept.lora_a, kept.lora_b, meta.lora_scale)
    head = LinearHead(kept.weight, kept.bias, meta.softcap, meta.scale, lora)
    xa = None if lora is None else x @ lora.a.to(x.dtype).t()
    size = chunk_rows(x.shape[0], meta.vocab, x.dtype) * row_bytes(meta.vocab, x.dtype)
    with scratch.borrow(size, x.device) as memory:
        for part in chunks(x.shape[0], meta.vocab, x.dtype):
            chunk = as_matrix(memory, part.stop - part.start, meta.vocab, x.dtype)
            logits_of(chunk, x, xa, part, head)
            epilogue(chunk, part, head)
            add_grads(total, chunk, factors.rows(part))
