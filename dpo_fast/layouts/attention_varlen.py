"""Attention of all segments in one launch of a variable-length FlashAttention kernel (CUDA).

Queries stay as they are; keys and values are gathered so that each segment's prefix lies before its
own keys. The kernels align causality at the last query and key, so a segment's distances are by
position, sliding windows included.

Sources: FlashAttention-2 (arXiv 2307.08691), its variable-length interface in
``torch.nn.attention.varlen`` and in the ``flash-attn`` package (>= 2.1 for that alignment).

Legend: L tokens, D head size, Hq and Hkv heads of queries and of keys, G segments.
"""

import inspect
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dpo_fast.layouts.segments import Segments, VarlenIndex, varlen_index

HEAD_SIZE_LIMIT = 256
_DTYPES = (torch.float16, torch.bfloat16)


def why_not_varlen(
    query: Tensor, value: Tensor, softcap: float | None, dropout: float
) -> str | None:
    """The reason why torch's kernel cannot run this call, or None."""
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if softcap is not None:
        return "torch.nn.attention.varlen has no soft cap of the scores"
    return _why_not_flash(query, value, dropout)


def why_not_flash_attn(query: Tensor, value: Tensor, dropout: float) -> str | None:
    """The reason why the flash-attn package cannot run this call, or None."""
    if find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return _why_not_flash(query, value, dropout)


def _why_not_flash(query: Tensor, value: Tensor, dropout: float) -> str | None:
    if query.device.type != "cuda":
        return f"FlashAttention runs on CUDA devices, not on {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"FlashAttention takes float16 and bfloat16, not {query.dtype}"
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > HEAD_SIZE_LIMIT:
        return (
            f"FlashAttention takes one head size up to {HEAD_SIZE_LIMIT}, not "
            f"{query.shape[-1]} and {value.shape[-1]}"
        )
    return "dropout is left to the other backends" if dropout else None


def varlen_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of one packed row with torch's kernel; ``[1, Hq, L, D]`` to ``[1, L, Hq, D]``."""
    from torch.nn.attention.varlen import varlen_attn

    index = _index(segments, query.device)
    q, k, v = _rows(query, key, value, index)
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if _takes_gqa():
            options["enable_gqa"] = True
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        index.cu_q,
        index.cu_k,
        index.max_q,
        index.max_k,
        scale=scale,
        window_size=_window(window, index),
        **options,
    )
    assert isinstance(out, Tensor)  # no auxiliary output was asked for
    return out.unsqueeze(0)


def flash_attn_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same with the flash-attn package, which also has a soft cap."""
    from flash_attn import flash_attn_varlen_func

    index = _index(segments, query.device)
    q, k, v = _rows(query, key, value, index)
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        index.cu_q,
        index.cu_k,
        index.max_q,
        index.max_k,
        softmax_scale=scale,
        causal=True,
        window_size=_window(window, index),
        softcap=softcap or 0.0,
    )
    return out.unsqueeze(0)


def _index(segments: Segments, device: torch.device) -> VarlenIndex:
    return segments.derived(("varlen", device), lambda: varlen_index(segments, device))


def _rows(
    query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex
) -> tuple[Tensor, Tensor, Tensor]:
    """``[L, Hq, D]`` queries; keys and values ``[sum of keys, Hkv, D]`` in segment order."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if index.key_index is not None:
        k, v = k.index_select(0, index.key_index), v.index_select(0, index.key_index)
    return q, k, v


def _window(window: int | None, index: VarlenIndex) -> tuple[int, int]:
    """Keys to the left and right of a query that it sees, besides the one at its own position."""
    if window is None or window >= index.max_k:
        return (-1, 0)
    return (window - 1, 0)


@cache
def _takes_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
