"""The backward without stored E: a slab of the vocabulary and a block of rows at a time.

Vocabulary outside, rows inside: each slab of dW is summed over all rows in float32 and rounded
once, dX is summed over the slabs in float32. The offsets are known, so E comes back bit for bit.
Memory: one block of E (32 MiB at 2 bytes) and one slab of dW in float32; nothing of size N V, one
GEMM more. A caller with memory to spare gets wider slabs: dX is read and written once a slab, and a
slab costs the host half a millisecond.

Legend: N rows, H hidden, V vocabulary (of this shard), r rank of the head's adapter.
"""

import torch
from torch import Tensor

from dpo_fast_kernels.problem import Gradients, Problem, Scaled, Wanted, new_e
from dpo_fast_kernels.products import add_product
from dpo_fast_kernels.row_scale import column_sum, gather_axpy
from dpo_fast_kernels.rows import RowState
from dpo_fast_kernels.scoring import Scored
from dpo_fast_kernels.target_logit import TargetLogits

SLAB_COLUMNS = 2048  # a multiple of every block_v
SLAB_ROWS = 8192
SLAB_BYTES = 2**28  # of a block of E and a slab of dW together, from where on nothing is gained


def slab_columns(n: int, vocab: int, hidden: int, e_bytes: int, spare: int) -> int:
    """Columns of a slab: what ``spare`` bytes hold of E and dW, :data:`SLAB_COLUMNS` at least."""
    column = min(n, SLAB_ROWS) * e_bytes + 4 * hidden
    fit = min(spare, SLAB_BYTES) // column
    return min(vocab, max(SLAB_COLUMNS, fit - fit % SLAB_COLUMNS))


def give_back(problem: Problem, scored: Scored, g: Tensor | None, eb: Tensor | None) -> None:
    """Adds delta W[y] and delta B[y], then the adapter's part of dX."""
    delta, col, lora = scored.state.delta, scored.rows.col, problem.lora
    if eb is not None and lora is not None:
        gather_axpy(eb, lora[1], delta, col)
    if g is not None:
        gather_axpy(g, problem.operands.w, delta, col)
        if eb is not None and lora is not None:
            g.addmm_(eb, lora[0].float(), alpha=lora[2])


def recomputed(
    problem: Problem,
    scored: Scored,
    scaled: Scaled,
    wanted: Wanted,
    into: Gradients,
    spare: int = 0,  # bytes
) -> tuple[Gradients, Tensor | None]:
    """All gradients but dA, and ``E B`` for that one."""
    operands, lora, engine = problem.operands, problem.lora, problem.engine
    assert engine is not None
    x, vocab = operands.x, operands.w.shape[0]
    n = x.shape[0]
    g = torch.zeros_like(x, dtype=torch.float32) if wanted.hidden else None
    eb = None
    if problem.low is not None and wanted.rows:
        eb = torch.zeros_like(problem.low)
    lost = torch.zeros_like(scored.state.delta)
    out = _outputs(problem, wanted, into, scaled.dtype)
    width = slab_columns(n, vocab, x.shape[1], engine.e_dtype.itemsize, spare)
    buffer = new_e(min(n, SLAB_ROWS), width, engine.e_dtype, x, None)
    for start in range(0, vocab, width):
        stop = min(vocab, start + width)
        sums = _slab_sums(out, into, start, stop, scaled)
        slab = operands.columns(start, stop)
        for first in range(0, n, SLAB_ROWS):
            rows = slice(first, min(n, first + SLAB_ROWS))
            e = buffer[: rows.stop - first, : stop - start]
            taken = engine.again(
                slab.rows(first, rows.stop),
                TargetLogits(*(t[rows] for t in scored.rows)),
                start,
                e,
                RowState(*(None if t is None else t[..., rows] for t in scored.state)),  # type: ignore[arg-type]
            )
            if taken is not None:
                lost[rows] += taken
            if g is not None:
                add_product(g[rows], e, slab.w)
            if eb is not None and lora is not None:
                add_product(eb[rows], e, lora[1][start:stop].to(slab.w.dtype))
            if sums.weight is not None and scaled.xs is not None:
                add_product(sums.weight, e.T, scaled.xs[rows])
            if sums.lora_b is not None and scaled.low is not None:
                add_product(sums.lora_b, e.T, scaled.low[rows])
            if out.bias is not None:
                column_sum(e, scaled.v[rows], out.bias[start:stop])
        _round_slab(out, into, sums, start, stop, scaled)
    state = scored.state._replace(delta=scored.state.delta + lost)
    give_back(problem, scored._replace(state=state), g, eb)
    if g is not None:
        v = scaled.v.unsqueeze(1)
        out = out._replace(hidden=torch.where(v == 0, 0.0, g.mul_(v)).to(scaled.dtype))
    return out, eb


def _outputs(problem: Problem, wanted: Wanted, into: Gradients, dtype: torch.dtype) -> Gradients:
    """Where the head's gradients go: what is given, else new tensors."""
    w, lora = problem.operands.w, problem.lora
    weight, bias, lora_b = into.weight, into.bias, into.lora_b
    if wanted.weight and weight is None:
        weight = torch.empty(w.shape, dtype=dtype, device=w.device)
    if wanted.bias and bias is None:
        bias = torch.zeros(w.shape[0], dtype=torch.float32, device=w.device)
    if wanted.lora_b and lora_b is None and lora is not None:
        lora_b = torch.empty(lora[1].shape, dtype=torch.float32, device=w.device)
    return Gradients(
        weight=weight if wanted.weight else None,
        bias=bias if wanted.bias else None,
        lora_b=lora_b if wanted.lora_b else None,
    )


def _slab_sums(out: Gradients, into: Gradients, start: int, stop: int, scaled: Scaled) -> Gradients:
    """Float32 accumulators of a slab: the rows of ``into`` itself where nothing stands between."""

    def sums(total: Tensor | None, given: Tensor | None, unit: Tensor | None) -> Tensor | None:
        if total is None:
            return None
        if given is not None and unit is None:
            return given[start:stop]
        shape = (stop - start, total.shape[1])
        return torch.zeros(shape, dtype=torch.float32, device=total.device)

    return Gradients(
        weight=sums(out.weight, into.weight, scaled.unit),
        lora_b=sums(out.lora_b, into.lora_b, scaled.low_unit),
    )


def _round_slab(
    out: Gradients, into: Gradients, sums: Gradients, start: int, stop: int, scaled: Scaled
) -> None:
    """Writes a slab's sums to their place, rounding once."""
    pairs = (
        (out.weight, into.weight, sums.weight, scaled.unit),
        (out.lora_b, into.lora_b, sums.lora_b, scaled.low_unit),
    )
    for total, given, found, unit in pairs:
        if total is None or found is None or (given is not None and unit is None):
            continue
        if unit is not None:
            found.div_(unit)
        if given is None:
            total[start:stop] = found
        else:
            total[start:stop] += found
