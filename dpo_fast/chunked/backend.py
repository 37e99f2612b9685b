"""The LM head over chunks of rows: torch GEMMs and an epilogue in place.

Nothing ``[N, V]``-sized exists beyond the workspace.

Legend: N scored tokens, n rows of a chunk, H hidden, V vocabulary, r rank of the head's adapter.

The forward stores ``E`` (epilogue_torch) in its GEMM's output. dX needs no loss: ``E W`` is taken
at once and kept ``[N, H]``, and the backward only scales rows by ``v = -dlogp * scale / S``. A
frozen head therefore recomputes nothing. The gradients of the head are ``E^T (v X)``: from the
stored E if it fits into the workspace, else from E computed again, chunk by chunk (one more GEMM).
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.interface import HeadForward, HeadGrads, LinearHead, Needs, Saved
from dpo_fast.backends.scratch import as_matrix, scratch
from dpo_fast.chunked.chunks import chunk_rows, chunks, row_bytes
from dpo_fast.chunked.epilogue import epilogue_
from dpo_fast.chunked.epilogue_torch import EpilogueRows
from dpo_fast.chunked.gemm import times_weight, wide_dtype
from dpo_fast.chunked.head_grads import (
    Again,
    add_grads,
    add_grads_again,
    logits_of,
    lora_a_grad,
    new_totals,
    weighted,
)
from dpo_fast.naive import HeadLoRA, LinearLogprobs

WORKSPACE_BYTES = {"cpu": 64 * 2**20}
OTHER_WORKSPACE_BYTES = 2**30


class _Meta(NamedTuple):
    """The plain half of what the backward needs."""

    needs: Needs
    softcap: float | None
    scale: float
    lora_scale: float
    vocab: int


class _Kept(NamedTuple):
    """The other half: tensors, None where a backward does without."""

    row_scale: Tensor  # [N]: -scale / S
    dx: Tensor | None = None  # [N, H]: E W
    eb: Tensor | None = None  # [N, r]: E B
    memory: Tensor | None = None  # uint8: the stored E
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    target: Tensor | None = None
    shift: Tensor | None = None
    rest: Tensor | None = None


class ChunkedBackend:
    """See the module's text. Deterministic: equal shapes and inputs give equal bits."""

    name = "chunked"
    gradients_may_wait = False

    def row_bytes(self, head: LinearHead) -> int:
        return row_bytes(head.weight.shape[0], wide_dtype(head.weight.dtype))

    def default_workspace(self, head: LinearHead) -> int:
        weight = head.weight
        floor = WORKSPACE_BYTES.get(weight.device.type, OTHER_WORKSPACE_BYTES)
        # The gradient of a trained head occupies as much anyway.
        return max(floor, weight.numel() * wide_dtype(weight.dtype).itemsize)

    def forward(
        self,
        hidden: Tensor,
        head: LinearHead,
        target: Tensor,
        *,
        needs: Needs,
        outputs: tuple[str, ...],
        store: bool,
        buffer: Tensor | None = None,
    ) -> HeadForward:
        wide = wide_dtype(head.weight.dtype)
        rows, vocab = hidden.shape[0], head.weight.shape[0]
        x = hidden.to(wide)
        xa = None if head.lora is None else x @ head.lora.a.to(wide).t()
        dx = x.new_empty(x.shape) if needs.hidden else None
        eb = x.new_empty(xa.shape) if xa is not None and (needs.hidden or needs.lora_a) else None
        store = store and needs.head
        size = (rows if store else chunk_rows(rows, vocab, wide)) * self.row_bytes(head)
        owned = x.new_empty(size, dtype=torch.uint8) if store and buffer is None else buffer
        parts: list[EpilogueRows] = []
        lend = scratch.borrow(size, x.device) if owned is None else nullcontext(owned)
        with lend as memory:
            for part in chunks(rows, vocab, wide):
                chunk = as_matrix(
                    memory, part.stop if store else part.stop - part.start, vocab, wide
                )
                chunk = chunk[part] if store else chunk
                logits_of(chunk, x, xa, part, head)
                parts.append(
                    epilogue_(
                        chunk,
                        target[part],
                        bias=head.bias,
                        softcap=head.softcap,
                        scale=head.scale,
                        store=any(needs),
                        outputs=outputs,
                    )
                )
                if dx is not None:
                    times_weight(chunk, head.weight, out=dx[part])
                if eb is not None and head.lora is not None:
                    times_weight(chunk, head.lora.b, out=eb[part])
        columns = _join(parts, x, outputs)
        result = LinearLogprobs(columns.logps, **{n: getattr(columns, n) for n in outputs})
        if not any(needs):
            return HeadForward(result, None)
        if dx is not None and eb is not None and head.lora is not None:
            dx.addmm_(eb, head.lora.a.to(wide), alpha=head.lora.scale)
        kept = self._kept(hidden, head, target, needs, columns, owned if store else None)
        kept = kept._replace(dx=dx, eb=eb if needs.lora_a else None)
        lora_scale = 0.0 if head.lora is None else head.lora.scale
        meta = _Meta(needs, head.softcap, head.scale, lora_scale, vocab)
        return HeadForward(result, Saved(tuple(kept), meta))

    @staticmethod
    def _kept(
        hidden: Tensor,
        head: LinearHead,
        target: Tensor,
        needs: Needs,
        columns: EpilogueRows,
        memory: Tensor | None,
    ) -> _Kept:
        lora = head.lora
        kept = _Kept(columns.total.reciprocal().mul_(-head.scale), memory=memory)
        if needs.head or needs.lora_a:
            kept = kept._replace(hidden=hidden)
        if lora is not None and needs.lora_b:
            kept = kept._replace(lora_a=lora.a)
        if not needs.head or memory is not None:
            return kept
        return kept._replace(
            weight=head.weight,
            bias=head.bias,
            lora_a=None if lora is None else lora.a,
            lora_b=None if lora is None else lora.b,
            target=target,
            shift=columns.shift,
            rest=columns.rest,
        )

    def backward(self, saved: Saved, dlogps: Tensor, into: HeadGrads | None = None) -> HeadGrads:
        kept, meta = _Kept(*saved.tensors), saved.meta  # type: ignore[arg-type]
        needs: Needs = meta.needs
        v = kept.row_scale * dlogps
        grads = HeadGrads()
        if kept.dx is not None:
            grads = grads._replace(hidden=v.unsqueeze(1) * kept.dx)
        if kept.hidden is None:
            return grads
        x = kept.hidden.to(v.dtype)
        if kept.eb is not None:
            grads = grads._replace(lora_a=lora_a_grad(v, kept.eb, x, meta.lora_scale, into))
        if not needs.head:
            return grads
        factors = weighted(x, v, kept.lora_a, needs, meta.lora_scale)
        rank = 0 if kept.lora_a is None else kept.lora_a.shape[0]
        total = new_totals(needs, into, meta.vocab, x, rank)
        if kept.memory is not None:
            add_grads(total, as_matrix(kept.memory, x.shape[0], meta.vocab, v.dtype), factors)
        else:
            add_grads_again(total, x, factors, _again(kept, meta))
        return grads._replace(weight=total.weight, bias=total.bias, lora_b=total.lora_b)


def _again(kept: _Kept, meta: _Meta) -> Again:
    assert kept.weight is not None and kept.target is not None
    assert kept.shift is not None and kept.rest is not None
    lora = None
    if kept.lora_a is not None and kept.lora_b is not None:
        lora = HeadLoRA(kept.lora_a, kept.lora_b, meta.lora_scale)
    head = LinearHead(kept.weight, kept.bias, meta.softcap, meta.scale, lora)
    return Again(head, kept.target, kept.shift, kept.rest)


def _join(parts: list[EpilogueRows], x: Tensor, outputs: tuple[str, ...]) -> EpilogueRows:
    names = ("logps", "shift", "rest", "total", *outputs)
    if not parts:
        empty = x.new_empty(0)
        return EpilogueRows(**{n: empty.bool() if n == "is_top1" else empty for n in names})
    if len(parts) == 1:
        return parts[0]
    return EpilogueRows(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
