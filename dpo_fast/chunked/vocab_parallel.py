"""The chunked LM head over a vocabulary that is split over processes.

Legend: N scored tokens, n rows of a chunk, H hidden, V vocabulary of this shard, r rank of the
head's adapter.

Each rank takes its GEMM, its row maximum ``k`` and ``R = sum_{j != y} exp(z_j - k)`` alone; the
target's column is left out of E on every rank, so that nothing depends on who owns it. Then two
collectives for all rows, three numbers a row: the maximum K of the k, and the sums of
``f R`` with ``f = exp(k - K)`` and of ``z_y - K`` (0 but for the owner). What E contributes to the
gradients is scaled by f, and the owner adds the target's own part::

    dX = v (f (E W) - R_all W[y])      dW = E^T (v f X), row y: -v R_all X      v = -dlogp scale / S

dX and dA are parts of a sum over the ranks, which the caller takes; dW, db and dB are whole.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.interface import HeadForward, HeadGrads, LinearHead, Needs, Saved
from dpo_fast.backends.scratch import as_matrix, scratch
from dpo_fast.backends.shard import VocabShard
from dpo_fast.chunked.backend import ChunkedBackend
from dpo_fast.chunked.chunks import chunk_rows, chunks
from dpo_fast.chunked.epilogue_torch import below_, shift_
from dpo_fast.chunked.gemm import times_weight, wide_dtype
from dpo_fast.chunked.head_grads import (
    Factors,
    add_grads,
    logits_of,
    lora_a_grad,
    new_totals,
    weighted,
)
from dpo_fast.naive import HeadLoRA, LinearLogprobs

_LOWEST = -104.0  # exp of anything below is 0 in float32


class _Local(NamedTuple):
    """What this shard alone knows of each row, ``[n]``."""

    top: Tensor  # maximum of the row as `below_` leaves it; -inf where all logits are
    rest: Tensor  # R with k = top
    own: Tensor  # the target's entry as `below_` leaves it; 0 where another rank owns it
    slope: Tensor  # cap' at the target
    weighted: Tensor | None = None  # sum_{j != y} E (z - k)
    squares: Tensor | None = None  # sum_{j != y} E^2
    logit_sum: Tensor | None = None
    best: Tensor | None = None  # first column of the maximum, int64


class _Kept(NamedTuple):
    """Tensors for the backward; None where it does without."""

    row_scale: Tensor  # [N]: -scale / S
    dx: Tensor | None = None  # [N, H], unscaled
    eb: Tensor | None = None  # [N, r], unscaled
    factor: Tensor | None = None  # [N]: f
    target_part: Tensor | None = None  # [N]: -R_all g_y of the owner, 0 elsewhere
    column: Tensor | None = None  # [N]
    memory: Tensor | None = None  # uint8: the stored E
    hidden: Tensor | None = None
    lora_a: Tensor | None = None
    weight: Tensor | None = None  # this and what follows: to compute E again
    bias: Tensor | None = None
    lora_b: Tensor | None = None
    owned: Tensor | None = None
    top: Tensor | None = None


class _Meta(NamedTuple):
    needs: Needs
    softcap: float | None
    scale: float
    lora_scale: float
    vocab: int


class VocabParallelBackend(ChunkedBackend):
    """See the module's text. Deterministic up to the order in which a collective sums."""

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
        assert head.shard is not None
        wide = wide_dtype(head.weight.dtype)
        rows, vocab = hidden.shape[0], head.weight.shape[0]
        owned, column = head.shard.locate(target, vocab)
        x = hidden.to(wide)
        xa = None if head.lora is None else x @ head.lora.a.to(wide).t()
        dx = x.new_empty(x.shape) if needs.hidden else None
        eb = x.new_empty(xa.shape) if xa is not None and (needs.hidden or needs.lora_a) else None
        store = store and needs.head
        size = (rows if store else chunk_rows(rows, vocab, wide)) * self.row_bytes(head)
        memory = x.new_empty(size, dtype=torch.uint8) if store and buffer is None else buffer
        parts: list[_Local] = []
        lend = scratch.borrow(size, x.device) if memory is None else nullcontext(memory)
        with lend as room:
            for part in chunks(rows, vocab, wide):
                chunk = as_matrix(room, part.stop if store else part.stop - part.start, vocab, wide)
                chunk = chunk[part] if store else chunk
                logits_of(chunk, x, xa, part, head)
                parts.append(
                    _exponentials_(
                        chunk, column[part], owned[part], head, slope=any(needs), outputs=outputs
                    )
                )
                if dx is not None:
                    times_weight(chunk, head.weight, out=dx[part])
                if eb is not None and head.lora is not None:
                    times_weight(chunk, head.lora.b, out=eb[part])
        local = _join(parts, x, outputs)
        result, rest, total, factor = _over_ranks(local, target, owned, head, head.shard, outputs)
        if not any(needs):
            return HeadForward(result, None)
        target_part = torch.where(owned, -rest * local.slope, 0.0)
        if dx is not None:
            _add_target_(dx, factor, target_part, head.weight, column)
        if eb is not None and head.lora is not None:
            _add_target_(eb, factor, target_part, head.lora.b, column)
            if dx is not None:
                dx.addmm_(eb, head.lora.a.to(wide), alpha=head.lora.scale)
        kept = _Kept(total.reciprocal().mul_(-head.scale), dx, eb if needs.lora_a else None)
        if needs.head or needs.lora_a:
            kept = kept._replace(hidden=hidden)
        if needs.head:
            kept = kept._replace(factor=factor, target_part=target_part, column=column)
            kept = _what_gives_e(kept, head, memory if store else None, owned, local.top)
        lora_scale = 0.0 if head.lora is None else head.lora.scale
        return HeadForward(
            result,
            Saved(tuple(kept), _Meta(needs, head.softcap, head.scale, lora_scale, vocab)),
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
        assert kept.factor is not None and kept.target_part is not None
        assert kept.column is not None
        rank = 0 if kept.lora_a is None else kept.lora_a.shape[0]
        total = new_totals(needs, into, meta.vocab, x, rank)
        factors = weighted(x, v * kept.factor, kept.lora_a, needs, meta.lora_scale)
        if kept.memory is not None:
            add_grads(total, as_matrix(kept.memory, x.shape[0], meta.vocab, v.dtype), factors)
        else:
            _add_grads_again(total, x, factors, kept, meta)
        own = weighted(x, v * kept.target_part, kept.lora_a, needs, meta.lora_scale)
        for sums, values in (
            (total.weight, own.weight),
            (total.lora_b, own.lora_b),
            (total.bias, own.v),
        ):
            if sums is not None and values is not None:
                _add_rows_(sums, kept.column, values)
        return grads._replace(weight=total.weight, bias=total.bias, lora_b=total.lora_b)


def _what_gives_e(
    kept: _Kept, head: LinearHead, memory: Tensor | None, owned: Tensor, top: Tensor
) -> _Kept:
    """E itself, or what computes it once more."""
    lora = head.lora
    kept = kept._replace(memory=memory, lora_a=None if lora is None else lora.a)
    if memory is not None:
        return kept
    b = None if lora is None else lora.b
    return kept._replace(weight=head.weight, bias=head.bias, lora_b=b, owned=owned, top=top)


def _exponentials_(
    chunk: Tensor,  # [n, V] logits without bias; on return E g, 0 in the target's column
    column: Tensor,  # [n]
    owned: Tensor,  # [n] bool
    head: LinearHead,
    *,
    slope: bool,
    outputs: tuple[str, ...] = (),
    top: Tensor | None = None,
) -> _Local:
    """E of a chunk of rows and what this shard knows of them; ``top`` where it is known already."""
    y = column.unsqueeze(1)
    gain = below_(chunk, head.bias, head.softcap, head.scale, slope)
    own = torch.where(owned, chunk.gather(1, y).squeeze(1), 0.0)
    at_target = torch.ones_like(own) if gain is None else gain.gather(1, y).squeeze(1)
    top = chunk.amax(dim=1) if top is None else top
    stats: dict[str, Tensor] = {}
    if outputs:
        stats["logit_sum"] = chunk.sum(dim=1)
        stats["best"] = chunk.argmax(dim=1)
    # a shard whose logits are all -inf: E = 0 instead of NaN
    shift_(chunk, top.masked_fill(top == -torch.inf, 0.0), head.softcap, head.scale)
    shifted = chunk.clamp_min(_LOWEST) if outputs else None
    chunk.exp_()
    chunk.scatter_(1, y, torch.where(owned, 0.0, chunk.gather(1, y).squeeze(1)).unsqueeze(1))
    rest = chunk.sum(dim=1)
    if shifted is not None:
        stats["weighted"] = (chunk * shifted).sum(dim=1)
        stats["squares"] = chunk.square().sum(dim=1)
    if gain is not None:
        chunk.mul_(gain)
    return _Local(top, rest, own, at_target, **stats)


def _over_ranks(
    local: _Local,
    target: Tensor,
    owned: Tensor,
    head: LinearHead,
    shard: VocabShard,
    outputs: tuple[str, ...],
) -> tuple[LinearLogprobs, Tensor, Tensor, Tensor]:
    """``(result, R_all, S, f)``, each ``[N]``: two collectives, a third for statistics."""
    unit = head.scale if head.softcap is None else 1.0  # from `below_`'s scale to that of z
    top = shard.max_(local.top.clone())
    above = torch.where(local.top == -torch.inf, -torch.inf, (local.top - top) * unit)
    factor = above.exp()
    # the owner's difference is taken before the scale: large logits keep their digits
    below = torch.where(owned, (local.own - top) * unit, 0.0)
    columns = [local.rest * factor, below]
    if outputs:
        assert local.weighted is not None and local.squares is not None
        assert local.logit_sum is not None
        shifted = factor * (local.weighted + above.clamp_min(_LOWEST) * local.rest)
        columns += [shifted, local.squares * factor.square(), local.logit_sum]
    rest, below, *sums = shard.sum_(torch.stack(columns)).unbind()
    e = below.exp()
    total = rest + e
    log_total = torch.where(below == 0, rest.log1p(), total.log())
    logps = torch.where(below == 0, -log_total, below - log_total)
    stats: dict[str, Tensor] = {}
    if outputs:
        shifted, squares, logit_sum = sums
        stats["entropy"] = log_total - (shifted + e * below.clamp_min(_LOWEST)) / total
        stats["log_sum_sq_probs"] = (squares + e.square()).log() - 2 * log_total
        stats["mean_logit"] = logit_sum * (unit / shard.total)
        assert local.best is not None
        first = torch.where(local.top == top, local.best + shard.start, shard.total)
        stats["is_top1"] = -shard.max_(-first) == target
    found = {name: stats[name] for name in outputs}
    return LinearLogprobs(logps, **found), rest, total, factor


def _join(parts: list[_Local], x: Tensor, outputs: tuple[str, ...]) -> _Local:
    names: tuple[str, ...] = ("top", "rest", "own", "slope")
    if outputs:
        names = (*names, "weighted", "squares", "logit_sum", "best")
    if not parts:
        empty = x.new_empty(0)
        return _Local(**{n: empty.long() if n == "best" else empty for n in names})
    return _Local(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


def _add_target_(
    product: Tensor, factor: Tensor, target_part: Tensor, weight: Tensor, column: Tensor
) -> None:
    """``f (E W) - R_all W[y]`` from E W, in place."""
    product.mul_(factor.unsqueeze(1))
    product.addcmul_(target_part.unsqueeze(1), weight[column].to(product.dtype))


def _add_rows_(sums: Tensor, column: Tensor, values: Tensor) -> None:
    """``sums[column[n]] += values[n]``, deterministic on every device."""
    if sums.device.type == "cpu":
        sums.index_add_(0, column, values)
    else:
        sums.index_put_((column,), values, accumulate=True)


def _add_grads_again(
    total: HeadGrads, x: Tensor, factors: Factors, kept: _Kept, meta: _Meta
) -> None:
    """Gradients from E computed once more, chunk by chunk."""
    assert kept.weight is not None and kept.column is not None
    assert kept.owned is not None and kept.top is not None
    lora = None
    if kept.lora_a is not None and kept.lora_b is not None:
        lora = HeadLoRA(kept.lora_a, kept.lora_b, meta.lora_scale)
    head = LinearHead(kept.weight, kept.bias, meta.softcap, meta.scale, lora)
    xa = None if lora is None else x @ lora.a.to(x.dtype).t()
    rows = chunk_rows(x.shape[0], meta.vocab, x.dtype)
    with scratch.borrow(rows * ChunkedBackend().row_bytes(head), x.device) as memory:
        for part in chunks(x.shape[0], meta.vocab, x.dtype):
            chunk = as_matrix(memory, part.stop - part.start, meta.vocab, x.dtype)
            logits_of(chunk, x, xa, part, head)
            _exponentials_(
                chunk,
                kept.column[part],
                kept.owned[part],
                head,
                slope=True,
                top=kept.top[part],
            )
            add_grads(total, chunk, factors.rows(part))
