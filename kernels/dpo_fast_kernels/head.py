"""Forward and backward of the LM head: which GEMM runs when, and what is kept in between.

    forward:  E, R -> logp, S; target fix; G = E W + delta W[y] if dX is needed (no c in it)
    backward: v = -c scale / S; dX = v G; dW = E^T (v X); db = E^T v;
              dA = s (v E B)^T X; dB = E^T (v s X A^T)

Three ways to hold E ``[N, V]``:

- stored: one GEMM forward, one each for dX and dW;
- a frozen head needs E for G only: groups of rows through one buffer, nothing kept but G;
- otherwise it is computed again in the backward, a slab of the vocabulary and a block of rows at a
  time; no memory of size N V, one more GEMM.

With a ``bound`` the first two are filtered: dX and dW leave out tiles of E that hold less of each
of their rows (kept_tiles.py). Approximate.

Legend: N rows, H hidden, V vocabulary (of this shard), r rank of the head's adapter.
"""

import torch
from torch import Tensor

from dpo_fast_kernels.kept_product import kept_product
from dpo_fast_kernels.kept_tiles import count_tiles, kept_blocks
from dpo_fast_kernels.problem import Gradients, Held, Problem, Scaled, Wanted, new_e, padded
from dpo_fast_kernels.products import add_product, product, rounded_product
from dpo_fast_kernels.recompute import give_back, recomputed
from dpo_fast_kernels.row_scale import column_sum, row_scale
from dpo_fast_kernels.scoring import Scored, Vocabulary, join_blocks

GROUP_BYTES = 2**29  # E of a group of rows under a frozen head, at least
MOST_GROUP_BYTES = 2**30  # and at most: 7 % faster on an H200, and more gains nothing at H = 4096
ROW_TILE = 128  # rows of a group are a multiple of it, or the last tile of each GEMM is wasted

WHOLE = Vocabulary()


def forward(
    problem: Problem,
    target: Tensor,  # [N] int64
    *,
    wanted: Wanted,
    stats: bool,
    store: bool,
    vocabulary: Vocabulary = WHOLE,
    buffer: Tensor | None = None,
    bound: float | None = None,
    spare: int = 0,
) -> Held:
    """Scores the rows and does what the backward needs and c does not enter.

    ``spare``: bytes that E may occupy under a frozen head, beyond :data:`GROUP_BYTES`.
    """
    operands, engine = problem.operands, problem.engine
    assert engine is not None
    if bound is not None:
        _check_filter(problem, wanted, store, vocabulary)
    n, vocab = operands.x.shape[0], operands.w.shape[0]
    if not (wanted.head or wanted.rows) or (wanted.head and not store):
        scored = engine.score(operands, target, e=None, stats=stats, vocabulary=vocabulary)
        return Held(scored)
    if wanted.head:
        e = new_e(n, vocab, engine.e_dtype, operands.x, buffer)
        scored = engine.score(
            operands, target, e=e, stats=stats, vocabulary=vocabulary, bound=bound
        )
        g, eb = _row_products(problem, scored, e, wanted)
        return Held(scored, e, g, eb, None if scored.kept is None else scored.kept.mask)
    widest = vocab if vocabulary.largest is None else vocabulary.largest
    size = group_rows(n, padded(widest) * engine.e_dtype.itemsize, spare)
    e = new_e(min(n, size), vocab, engine.e_dtype, operands.x, buffer)
    parts = []
    for start in range(0, max(n, 1), size):
        stop = min(n, start + size)
        part = problem._replace(operands=operands.rows(start, stop))
        chunk = e[: stop - start]
        scored = engine.score(
            part.operands, target[start:stop], e=chunk, stats=stats, vocabulary=vocabulary,
            bound=bound,
        )  # fmt: skip
        parts.append(Held(scored, None, *_row_products(part, scored, chunk, wanted)))
    return _join(parts)


def group_rows(rows: int, row_bytes: int, spare: int = 0) -> int:
    """Rows of a group: as equal as whole row tiles allow, and within the group's bytes."""
    fit = max(1, max(GROUP_BYTES, min(spare, MOST_GROUP_BYTES)) // row_bytes)
    if rows <= fit:
        return max(1, rows)
    tile = ROW_TILE if fit >= ROW_TILE else 1
    fit -= fit % tile
    even = -(-rows // -(-rows // fit))  # of as many groups as there must be
    return min(fit, -(-even // tile) * tile)


def _row_products(
    problem: Problem, scored: Scored, e: Tensor, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None]:
    """``(E W + .., E B)`` as far as dX and dA need them, the fix's rounding given back."""
    operands, lora = problem.operands, problem.lora
    g = None
    if scored.kept is not None:
        count_tiles(scored.kept, scored.state.s)
        if wanted.hidden:
            kept = scored.kept
            g = kept_product(e, operands.w, kept.units, kept.lengths, transposed=False)
    elif wanted.hidden:
        g = product(e, operands.w)
    eb = product(e, lora[1].to(operands.w.dtype)) if lora is not None and wanted.rows else None
    give_back(problem, scored, g, eb)
    return g, eb


def _check_filter(problem: Problem, wanted: Wanted, store: bool, vocabulary: Vocabulary) -> None:
    """What the filtered mode is not built for."""
    if wanted.head and not store:
        raise ValueError("the filtered mode reads stored probabilities, and store=False")
    if problem.lora is not None:
        raise ValueError("the filtered mode takes no adapter on the head")
    if vocabulary.reduce is not None:
        raise ValueError("the filtered mode takes no vocabulary that is split over processes")


def _join(parts: list[Held]) -> Held:
    if len(parts) == 1:
        return parts[0]
    gs = [p.g for p in parts if p.g is not None]
    ebs = [p.eb for p in parts if p.eb is not None]
    return Held(
        join_blocks([p.scored for p in parts]),
        None,
        torch.cat(gs) if gs else None,
        torch.cat(ebs) if ebs else None,
    )


def backward(
    problem: Problem,
    held: Held,
    dlogps: Tensor,  # [N]
    wanted: Wanted,
    into: Gradients | None = None,
    spare: int = 0,
) -> Gradients:
    """All gradients for ``dlogps``.

    Those of the head are added to ``into`` where it holds a tensor; then all are float32. Without
    ``into`` dX and dW are rounded once to their input's dtype. ``spare``: bytes that a recomputing
    backward may use beyond what it must.
    """
    operands, state = problem.operands, held.scored.state
    x = operands.x
    dtype = operands.w.dtype if into is None else torch.float32
    recompute = wanted.head and held.e is None
    unit = half_unit(x, dlogps, state.s, operands.scale) if wanted.weight else None
    dhidden, xs, v = row_scale(
        dlogps,
        state.s,
        operands.scale,
        g=held.g if wanted.hidden and not recompute else None,
        x=x if wanted.weight else None,
        dtype=x.dtype,
        dx_dtype=dtype,
        unit=unit,
    )
    low = low_unit = None
    if wanted.lora_b:
        assert problem.low is not None
        low_unit = half_unit(problem.low.to(x.dtype), dlogps, state.s, operands.scale)
        low = problem.low * (v if low_unit is None else v * low_unit).unsqueeze(1)
        low = low.to(operands.w.dtype)
    scaled = Scaled(xs, low, v, unit, low_unit, dtype)
    into = Gradients() if into is None else into
    found, eb = Gradients(hidden=dhidden), held.eb
    if recompute:
        found, eb = recomputed(problem, held.scored, scaled, wanted, into, spare)
    elif wanted.head:
        assert held.e is not None
        found = found._replace(**_head_gradients(held, scaled, wanted, into))
    if wanted.lora_a:
        assert eb is not None and problem.lora is not None
        lora_a = (eb * (v * problem.lora[2]).unsqueeze(1)).T @ x.float()
        found = found._replace(lora_a=lora_a if into.lora_a is None else into.lora_a.add_(lora_a))
    return found


def half_unit(matrix: Tensor, dlogps: Tensor, s: Tensor, scale: float) -> Tensor | None:
    """Power of two that keeps ``v * matrix`` inside float16, divided out of the product again.

    None for wider dtypes.
    """
    if matrix.dtype != torch.float16 or matrix.numel() == 0:
        return None
    top = (dlogps.abs() * (scale / s) * matrix.abs().amax(1).float()).amax()
    exponent = torch.floor(10.0 - torch.log2(top))
    exponent = torch.where(torch.isfinite(exponent), exponent, 0.0)
    return torch.exp2(exponent.clamp(-100, 100)).reshape(1)


def _head_gradients(
    held: Held, scaled: Scaled, wanted: Wanted, into: Gradients
) -> dict[str, Tensor]:
    """dW, db, dB from stored E."""
    e, found = held.e, {}
    assert e is not None
    if scaled.xs is not None and held.mask is not None:
        lists, dtype = kept_blocks(held.mask), scaled.dtype
        found["weight"] = kept_product(
            e, scaled.xs, *lists, transposed=True, dtype=dtype, into=into.weight
        )
    elif scaled.xs is not None:
        found["weight"] = _product_t(e, scaled.xs, scaled.unit, scaled.dtype, into.weight)
    if scaled.low is not None:
        f32 = torch.float32
        found["lora_b"] = _product_t(e, scaled.low, scaled.low_unit, f32, into.lora_b)
    if wanted.bias:
        bias = into.bias
        if bias is None:
            bias = torch.zeros(e.shape[1], dtype=torch.float32, device=e.device)
        column_sum(e, scaled.v, bias)
        found["bias"] = bias
    return found


def _product_t(
    e: Tensor, right: Tensor, unit: Tensor | None, dtype: torch.dtype, into: Tensor | None
) -> Tensor:
    """``E^T right / unit``, added to ``into`` in float32 or rounded once."""
    if unit is not None:
        gradient = product(e.T, right).div_(unit)
        return gradient.to(dtype) if into is None else into.add_(gradient)
    if into is None:
        return rounded_product(e.T, right, dtype)
    add_product(into, e.T, right)
    return into
