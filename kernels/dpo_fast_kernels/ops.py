"""The LM head as two opaque operators with fake kernels, and the plain functions behind them.

    linear_logprob_fwd(...) -> logps, state, col, stats, e, g, eb, mask
    linear_logprob_bwd(...) -> dhidden, dweight, dbias, dlora_a, dlora_b

E and everything else that the backward reads are outputs: they belong to the graph that made them,
so that two forwards before one backward, accumulation and retain_graph are right. A tensor that a
call does not need has no elements. Neither operator mutates its inputs; the plain functions can
write E into a caller's buffer and add to a caller's gradients.

Legend: N rows, H hidden, V vocabulary, r rank of the head's adapter.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from dpo_fast_kernels.choice import stored_dtype
from dpo_fast_kernels.head import backward, forward
from dpo_fast_kernels.kept_tiles import mask_shape
from dpo_fast_kernels.problem import (
    Gradients,
    Held,
    Lora,
    Wanted,
    make_problem,
    padded,
    stored_problem,
)
from dpo_fast_kernels.rows import RowState
from dpo_fast_kernels.scoring import Scored, Vocabulary
from dpo_fast_kernels.target_logit import TargetLogits

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(
    function: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Runs with the first argument's device as the current one: Triton launches on that."""

    @wraps(function)
    def guarded(hidden: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(hidden):
            return function(hidden, *args, **kwargs)

    return guarded


class Flat(NamedTuple):
    """A forward's results as tensors only."""

    logps: Tensor  # [N] float32
    state: Tensor  # [6, N] float32: s, fix, delta, zy, slope, k
    col: Tensor  # [N] int32
    stats: Tensor  # [4, N] float32: entropy, log sum p^2, is_top1, mean logit; or [0]
    e: Tensor  # [N, V padded] or [0]
    g: Tensor  # [N, H] float32 or [0]
    eb: Tensor  # [N, r] float32 or [0]
    mask: Tensor  # [B, U] int8 or [0]: the tiles of E that the filtered mode keeps


def _lora(a: Tensor | None, b: Tensor | None, scale: float) -> Lora | None:
    return None if a is None or b is None else (a, b, scale)


def mean_logit(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None, scale: float
) -> Tensor:
    """Mean of z over the vocabulary, ``[N]`` float32, without a softcap: ``scale x . mean(W)``."""
    x = hidden.float()
    mean = x @ weight.mean(0, dtype=torch.float32)
    if bias is not None:
        mean = mean + bias.mean(dtype=torch.float32)
    if lora is not None:
        a, b, low_scale = lora
        mean = mean + low_scale * ((x @ a.float().T) @ b.mean(0, dtype=torch.float32))
    return scale * mean


@on_its_device
def run_forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int64
    bias: Tensor | None,  # [V]
    lora_a: Tensor | None,  # [r, H]
    lora_b: Tensor | None,  # [V, r]
    lora_scale: float,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    wanted: list[bool],  # hidden, weight, bias, lora_a, lora_b
    stats: bool,
    store: bool,
    engine: str | None,
    bound: float | None = None,  # the filtered mode's
    spare: int = 0,
    buffer: Tensor | None = None,  # uint8, for E
    vocabulary: Vocabulary | None = None,  # where it is split over processes
) -> Flat:
    """Log-probs, statistics, and what :func:`run_backward` needs."""
    lora = _lora(lora_a, lora_b, lora_scale)
    where = Vocabulary(ignore_index) if vocabulary is None else vocabulary
    problem = make_problem(
        hidden, weight, bias, lora, softcap, scale, stats=stats, engine=engine, widest=where.largest
    )
    held = forward(
        problem,
        target,
        wanted=Wanted(*wanted),
        stats=stats,
        store=store,
        vocabulary=where,
        buffer=buffer,
        bound=bound,
        spare=spare,
    )
    state, rows = held.scored.state, held.scored.rows
    found = hidden.new_empty(0, dtype=torch.float32)
    if stats and state.stats is not None:
        if softcap is None:
            mean = mean_logit(hidden, weight, bias, lora, scale)
            if vocabulary is not None and vocabulary.reduce is not None and vocabulary.total:
                mean = mean * (weight.shape[0] / vocabulary.total)
                vocabulary.reduce(mean, "sum")
            mean = torch.where(rows.col == -2, 0.0, mean)
        else:
            assert held.scored.logit_sum is not None
            whole = weight.shape[0] if vocabulary is None else vocabulary.total
            mean = held.scored.logit_sum * (scale / (whole or weight.shape[0]))
        found = torch.cat((state.stats, mean.unsqueeze(0)))
    e = held.e
    if e is None:
        e = hidden.new_empty(0)
    elif buffer is None:
        e = e.as_strided((e.shape[0], padded(e.shape[1])), (padded(e.shape[1]), 1))
    return Flat(
        state.logps.clone(),
        torch.stack((state.s, state.fix, state.delta, rows.zy, rows.slope, rows.k)),
        rows.col.clone(),
        found,
        e,
        hidden.new_empty(0, dtype=torch.float32) if held.g is None else held.g,
        hidden.new_empty(0, dtype=torch.float32) if held.eb is None else held.eb,
        hidden.new_empty(0, dtype=torch.int8) if held.mask is None else held.mask,
    )


@on_its_device
def run_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    softcap: float | None,
    scale: float,
    wanted: list[bool],
    engine: str | None,
    saved: Flat,
    dlogps: Tensor,  # [N]
    spare: int = 0,
    into: Gradients | None = None,
) -> Gradients:
    """Gradients for ``dlogps``; see :func:`dpo_fast_kernels.head.backward` for the rest.

    The values of weight and bias are read only if E was not stored though the head's gradients are
    asked for.
    """
    lora, want = _lora(lora_a, lora_b, lora_scale), Wanted(*wanted)
    if want.head and saved.e.dim() != 2:
        problem = make_problem(hidden, weight, bias, lora, softcap, scale, engine=engine)
    else:
        problem = stored_problem(hidden, weight, lora, scale, low=want.lora_b)
    s, fix, delta, zy, slope, k = saved.state.unbind(0)
    vocab = weight.shape[0]
    scored = Scored(
        TargetLogits(zy, slope, k, saved.col), RowState(saved.logps, s, fix, delta, None), None
    )
    held = Held(
        scored,
        saved.e[:, :vocab] if saved.e.dim() == 2 else None,
        saved.g if saved.g.dim() == 2 else None,
        saved.eb if saved.eb.dim() == 2 else None,
        saved.mask if saved.mask.dim() == 2 else None,
    )
    return backward(problem, held, dlogps.contiguous(), want, into, spare)


@torch.library.custom_op("dpo_fast_kernels::linear_logprob_fwd", mutates_args=())
def linear_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    wanted: list[bool],
    stats: bool,
    store: bool,
    engine: str | None,
    bound: float | None,
    spare: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`run_forward` as an operator."""
    return run_forward(
        hidden,
        weight,
        target,
        bias,
        lora_a,
        lora_b,
        lora_scale,
        softcap,
        scale,
        ignore_index,
        wanted,
        stats,
        store,
        engine,
        bound,
        spare,
    )


@linear_logprob_fwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    wanted: list[bool],
    stats: bool,
    store: bool,
    engine: str | None,
    bound: float | None,
    spare: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, width = hidden.shape
    want = Wanted(*wanted)
    held = want.rows and (store or not want.head)
    e_dtype = stored_dtype(engine, weight.dtype)
    f32 = torch.float32

    def none() -> Tensor:
        return hidden.new_empty(0, dtype=f32)

    e = hidden.new_empty(0)
    if want.head and store:
        e = hidden.new_empty(n, padded(weight.shape[0]), dtype=e_dtype)
    has_eb = lora_a is not None and held
    masked = bound is not None and want.head and store
    return (
        hidden.new_empty(n, dtype=f32),
        hidden.new_empty(6, n, dtype=f32),
        hidden.new_empty(n, dtype=torch.int32),
        hidden.new_empty(4, n, dtype=f32) if stats else none(),
        e,
        hidden.new_empty(n, width, dtype=f32) if want.hidden and held else none(),
        hidden.new_empty(n, lora_a.shape[0], dtype=f32)
        if has_eb and lora_a is not None
        else none(),
        hidden.new_empty(
            mask_shape(n, weight.shape[0], hidden.device) if masked else 0, dtype=torch.int8
        ),
    )


@torch.library.custom_op("dpo_fast_kernels::linear_logprob_bwd", mutates_args=())
def linear_logprob_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    softcap: float | None,
    scale: float,
    wanted: list[bool],
    engine: str | None,
    logps: Tensor,
    state: Tensor,
    col: Tensor,
    e: Tensor,
    g: Tensor,
    eb: Tensor,
    mask: Tensor,
    dlogps: Tensor,
    spare: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`run_backward` as an operator; a gradient not asked for has no elements."""
    saved = Flat(logps, state, col, logps, e, g, eb, mask)
    found = run_backward(
        hidden,
        weight,
        bias,
        lora_a,
        lora_b,
        lora_scale,
        softcap,
        scale,
        wanted,
        engine,
        saved,
        dlogps,
        spare,
    )
    a, b, c, d, f = (hidden.new_empty(0) if t is None else t for t in found)
    return a, b, c, d, f


@linear_logprob_bwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    softcap: float | None,
    scale: float,
    wanted: list[bool],
    engine: str | None,
    logps: Tensor,
    state: Tensor,
    col: Tensor,
    e: Tensor,
    g: Tensor,
    eb: Tensor,
    mask: Tensor,
    dlogps: Tensor,
    spare: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    want = Wanted(*wanted)

    def like(asked: bool, of: Tensor | None, dtype: torch.dtype) -> Tensor:
        if not asked or of is None:
            return hidden.new_empty(0)
        return hidden.new_empty(of.shape, dtype=dtype)

    # of a stored head the bias itself is not handed on: only its size matters, which is V
    column = weight[:, 0]

    return (
        like(want.hidden, hidden, hidden.dtype),
        like(want.weight, weight, weight.dtype),
        like(want.bias, column, torch.float32),
        like(want.lora_a, lora_a, torch.float32),
        like(want.lora_b, lora_b, torch.float32),
    )
