"""Attention of a packed row on a CPU, in C++: ``dpo_fast._C.Attention`` (``csrc/attention.h``).

At the lengths of preference data, PyTorch's fused CPU kernel runs far below what the processor's
multiply-adds allow, and a mask makes it compute what the mask hides. This one takes the segments as
they are, a panel of queries at a time, and keeps the panel's scores in cache.

Legend: L tokens, D head size, Hq and Hkv heads of queries and of keys, G segments.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_fast.backends.compiled import compiled
from dpo_fast.backends.scratch import scratch
from dpo_fast.layouts.segments import Segments


def why_not_compiled(
    query: Tensor, value: Tensor, softcap: float | None, dropout: float
) -> str | None:
    """Why the C++ kernel does not serve a call; None if it does."""
    if query.device.type != "cpu":
        return f"the C++ attention is for the CPU, the tensors are on {query.device}"
    if query.dtype != torch.float32 or value.dtype != torch.float32:
        dtypes = f"{query.dtype} queries and {value.dtype} values"  # autocast leaves both
        return f"the C++ attention computes float32, and there are {dtypes}"
    if softcap is not None:
        return "the C++ attention has no soft cap of the scores"
    if dropout:
        return "the C++ attention has no dropout"
    module = compiled()
    if module is None:
        return "the compiled module dpo_fast._C is missing (`dpo-fast doctor`)"
    if not hasattr(module, "Attention"):
        return "dpo_fast._C was built from older sources: install again"
    sizes = query.shape[-1], value.shape[-1]
    if not module.attention_serves(*sizes):
        return f"heads of {sizes} are not multiples of 16, or this processor has no AVX2"
    return None


def compiled_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of one packed row; arguments and result as of ``sdpa_segments``, which it equals.

    Gradients: to query, key and value, in float32, the same bits for any number of threads; once
    differentiable.

    Memory: the result, ``[Hq, L]`` for the backward, and a few hundred KiB a thread.

    Raises:
        TypeError: a tensor is not float32 on the CPU.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise TypeError(
                f"{name} is {x.dtype} on {x.device}; the C++ attention reads float32 on the CPU: "
                "use sdpa_segments"
            )
    out: Tensor = _CompiledAttention.apply(query, key, value, segments, scale, window)
    return out


class _CompiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,  # [1, Hq, L, D]
        key: Tensor,  # [1, Hkv, L, D]
        value: Tensor,  # [1, Hkv, L, Dv]
        segments: Segments,
        scale: float,
        window: int | None,
    ) -> Tensor:  # [1, L, Hq, Dv]
        query, key, value = (_rows_contiguous(x) for x in (query, key, value))
        op = _attention(query, key, value, segments, scale, window)
        heads, length = query.shape[1:3]
        out = query.new_empty(1, length, heads, value.shape[-1])
        lse = query.new_empty(heads, length)
        with scratch.borrow(4 * op.scratch_floats(False), out.device) as memory:
            op.forward(_view(out.transpose(1, 2)), lse.data_ptr(), memory.data_ptr())
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.how = segments, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        op = _attention(query, key, value, *ctx.how)
        dout = _rows_contiguous(dout)
        # in the order of the projections, [1, L, H, D], where their backward reads them
        grads = [x.new_zeros(1, x.shape[2], x.shape[1], x.shape[3]) for x in (key, value)]
        dkey, dvalue = (x.transpose(1, 2) for x in grads)
        dquery = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        views = [_view(x.transpose(1, 2)) for x in (out, dout)]
        targets = [_view(x) for x in (dquery, dkey, dvalue)]
        with scratch.borrow(4 * op.scratch_floats(True), out.device) as memory:
            op.backward(*views, lse.data_ptr(), *targets, memory.data_ptr())
        return dquery, dkey, dvalue, None, None, None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
) -> Any:
    table = segments.derived("table", lambda: torch.tensor(segments.spans, dtype=torch.int64))
    module: Any = compiled()
    return module.Attention(
        *(_view(x) for x in (query, key, value)),
        query_heads=query.shape[1],
        kv_heads=key.shape[1],
        length=query.shape[2],
        size=query.shape[3],
        value_size=value.shape[3],
        segments=table.data_ptr(),
        num_segments=len(segments.spans),
        scale=scale,
        window=0 if window is None else window,
        num_threads=torch.get_num_threads(),
    )


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _view(x: Tensor) -> tuple[int, int, int]:
    """Of ``[1, H, L, D]``: address, stride of heads, stride of tokens."""
    return x.data_ptr(), x.stride(1), x.stride(2)
