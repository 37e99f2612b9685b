"""The LM head over chunks of rows: torch GEMMs and an epilogue in place.

Nothing ``[N, V]``-sized exists beyond the workspace.

Legend: N scored tokens, n rows of a chunk, H hidden, V vocabulary, r rank of the head's adapter.

The forward stores ``E`` (epilogue_torch) in its GEMM's output. dX needs no loss: ``E W`` is taken
at once and kept ``[N, H]``, and the backward only scales rows by ``v = -dlogp * scale / S``. A
frozen head therefore recomputes nothing. The gradients of the head are ``E^T (v X)``: from the
stored E if it fits into the workspace, else from E computed again, chunk by chunk (one more GEMM).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.interface import HeadForward, HeadGrads, LinearHead, Needs, Saved
from dpo_fast.backends.scratch import as_matrix, padded, scratch
from dpo_fast.chunked.epilogue import epilogue_, exponentials_
from dpo_fast.chunked.epilogue_torch import EpilogueRows
from dpo_fast.chunked.gemm import add_lora_logits, logits_into, times_weight, wide_dtype
from dpo_fast.naive import HeadLoRA, LinearLogprobs

CHUNK_BYTES = 16 * 2**20  # of logits of one chunk of rows
WORKSPACE_BYTES = {"cpu": 64 * 2**20}
OTHER_WORKSPACE_BYTES = 2**30


class _Meta(NamedTuple):
    """The plain half of what the backward needs."""

    needs: Needs
    softcap: float | None
    scale: float
    lora_scale: float
    vocab: int


def chunk_rows(rows: int, vocab: int, wide: torch.dtype) -> int:
    """Rows of a chunk: a function of the shape alone, so equal inputs give equal bits."""
    fit = max(16, CHUNK_BYTES // (padded(vocab, wide) * wide.itemsize))
    chunks = max(1, -(-rows // fit))
    return max(1, -(-rows // chunks))


def _chunks(rows: int, vocab: int, wide: torch.dtype) -> Iterator[slice]:
    step = chunk_rows(rows, vocab, wide)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class ChunkedBackend:
    """See the module's text. Deterministic: equal shapes and inputs give equal bits."""

    name = "chunked"

    def row_bytes(self, head: LinearHead) -> int:
        wide = wide_dtype(head.weight.dtype)
        return padded(head.weight.shape[0], wide) * wide.itemsize

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
        memory = None
        if store and needs.head:
            size = rows * self.row_bytes(head)
            memory = buffer if buffer is not None else x.new_empty(size, dtype=torch.uint8)
        parts: list[EpilogueRows] = []
        dx = x.new_empty(x.shape) if needs.hidden else None
        eb = x.new_empty(xa.shape) if xa is not None and (needs.hidden or needs.lora_a) else None
        size = 0 if memory is not None else chunk_rows(rows, vocab, wide) * self.row_bytes(head)
        with scratch.borrow(size, x.device) as chunk_memory:
            for part in _chunks(rows, vocab, wide):
                n = part.stop - part.start
                if memory is not None:
                    chunk = as_matrix(memory, rows, vocab, wide)[part]
                else:
                    chunk = as_matrix(chunk_memory, n, vocab, wide)
                self._logits(chunk, x[part], xa, part, head)
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
                    dx[part] = times_weight(chunk, head.weight)
                if eb is not None and head.lora is not None:
                    eb[part] = times_weight(chunk, head.lora.b)
        result, columns = _gather(parts, x, outputs)
        if not any(needs):
            return HeadForward(result, None)
        if dx is not None and eb is not None and head.lora is not None:
            dx.addmm_(eb, head.lora.a.to(wide), alpha=head.lora.scale)
        row_scale = columns.total.reciprocal().mul_(-head.scale)
        again = needs.head and memory is None
        lora = head.lora
        tensors = (
            hidden if needs.head or needs.lora_a else None,
            row_scale,
            dx,
            eb if needs.lora_a else None,
            memory,
            head.weight if again else None,
            head.bias if again else None,
            lora.a if lora is not None and (again or needs.lora_b) else None,
            lora.b if lora is not None and again else None,
            target if again else None,
            columns.shift if again else None,
            columns.rest if again else None,
        )
        lora_scale = 0.0 if lora is None else lora.scale
        return HeadForward(
            result, Saved(tensors, _Meta(needs, head.softcap, head.scale, lora_scale, vocab))
        )

    def backward(self, saved: Saved, dlogps: Tensor, into: HeadGrads | None = None) -> HeadGrads:
        meta: _Meta = saved.meta
        needs = meta.needs
        hidden, row_scale, dx, eb, memory, *again = saved.tensors
        assert row_scale is not None
        v = (row_scale * dlogps).unsqueeze(1)
        wide = row_scale.dtype
        x = None if hidden is None else hidden.to(wide)
        lora_a = again[2]
        grads = {}
        if needs.hidden:
            assert dx is not None
            grads["hidden"] = v * dx
        if needs.lora_a:
            assert eb is not None and x is not None
            new = (v * eb).t().mm(x).mul_(meta.lora_scale)
            grads["lora_a"] = new if into is None or into.lora_a is None else into.lora_a.add_(new)
        if not needs.head:
            return HeadGrads(**grads)
        assert x is not None
        xs = v * x if needs.weight else None
        xa = None
        if needs.lora_b:
            assert lora_a is not None
            xa = (v * x).mm(lora_a.to(wide).t()).mul_(meta.lora_scale)
        total = self._new_totals(needs, into, meta.vocab, x, xa)
        if memory is not None:
            e = as_matrix(memory, x.shape[0], meta.vocab, wide)
            _add_head(total, e, v, xs, xa)
        else:
            self._again(total, x, v, xs, xa, meta, again)
        grads.update({k: t for k, t in total._asdict().items() if t is not None})
        return HeadGrads(**grads)

    def _logits(
        self, chunk: Tensor, x: Tensor, xa: Tensor | None, part: slice, head: LinearHead
    ) -> None:
        logits_into(chunk, x, head.weight)
        if xa is not None and head.lora is not None:
            add_lora_logits(chunk, xa[part], head.lora.b, head.lora.scale)

    def _again(
        self,
        total: HeadGrads,
        x: Tensor,
        v: Tensor,
        xs: Tensor | None,
        xa_scaled: Tensor | None,
        meta: _Meta,
        again: list[Tensor | None],
    ) -> None:
        """Head gradients from probabilities computed once more."""
        weight, bias, a, b, target, shift, rest = again
        assert weight is not None and target is not None
        assert shift is not None and rest is not None
        lora = None if a is None or b is None else HeadLoRA(a, b, meta.lora_scale)
        head = LinearHead(weight, bias, meta.softcap, meta.scale, lora)
        xa = None if lora is None else x @ lora.a.to(x.dtype).t()
        rows = x.shape[0]
        size = chunk_rows(rows, meta.vocab, x.dtype) * self.row_bytes(head)
        with scratch.borrow(size, x.device) as memory:
            for part in _chunks(rows, meta.vocab, x.dtype):
                chunk = as_matrix(memory, part.stop - part.start, meta.vocab, x.dtype)
                self._logits(chunk, x[part], xa, part, head)
                exponentials_(
                    chunk,
                    target[part],
                    shift=shift[part],
                    rest=rest[part],
                    bias=bias,
                    softcap=meta.softcap,
                    scale=meta.scale,
                )
                _add_head(
                    total,
                    chunk,
                    v[part],
                    None if xs is None else xs[part],
                    None if xa_scaled is None else xa_scaled[part],
                )

    @staticmethod
    def _new_totals(
        needs: Needs, into: HeadGrads | None, vocab: int, x: Tensor, xa: Tensor | None
    ) -> HeadGrads:
        into = into or HeadGrads()
        weight, bias, lora_b = into.weight, into.bias, into.lora_b
        if needs.weight and weight is None:
            weight = x.new_zeros(vocab, x.shape[1])
        if needs.bias and bias is None:
            bias = x.new_zeros(vocab)
        if needs.lora_b and lora_b is None:
            assert xa is not None
            lora_b = x.new_zeros(vocab, xa.shape[1])
        return HeadGrads(
            weight=weight if needs.weight else None,
            bias=bias if needs.bias else None,
            lora_b=lora_b if needs.lora_b else None,
        )


def _add_head(total: HeadGrads, e: Tensor, v: Tensor, xs: Tensor | None, xa: Tensor | None) -> None:
    """``dW += E^T (v X)``, ``db += E^T v``, ``dB += E^T (v X A^T) scale``."""
    if total.weight is not None and xs is not None:
        total.weight.addmm_(e.t(), xs)
    if total.bias is not None:
        total.bias.addmv_(e.t(), v.squeeze(1))
    if total.lora_b is not None and xa is not None:
        total.lora_b.addmm_(e.t(), xa)


def _gather(
    parts: list[EpilogueRows], x: Tensor, outputs: tuple[str, ...]
) -> tuple[LinearLogprobs, EpilogueRows]:
    if not parts:
        empty = x.new_empty(0)
        stats = {name: empty.bool() if name == "is_top1" else empty for name in outputs}
        columns = EpilogueRows(empty, empty, empty, empty, **stats)
    else:
        joined = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("logps", "shift", "rest", "total", *outputs)
        }
        columns = EpilogueRows(**joined)
    stats = {name: getattr(columns, name) for name in outputs}
    return LinearLogprobs(columns.logps, **stats), columns
