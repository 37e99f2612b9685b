"""Attention of a packed row through FlexAttention (CUDA): any dtype, soft caps, sliding windows.

Source: FlexAttention (arXiv 2412.05496), ``torch.nn.attention.flex_attention``.

Legend: L tokens, D head size, Hq and Hkv heads of queries and of keys.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dpo_fast.layouts.block_mask import make_block_mask
from dpo_fast.layouts.segments import Segments


def why_not_flex(query: Tensor, value: Tensor, dropout: float) -> str | None:
    """The reason why FlexAttention cannot run this call, or None."""
    if query.device.type != "cuda":
        return f"FlexAttention has no backward on {query.device.type}"
    if dropout:
        return "FlexAttention has no dropout"
    sizes = {query.shape[-1], value.shape[-1]}
    if min(sizes) < 16:
        return f"FlexAttention needs head sizes of 16 or more, not {sorted(sizes)}"
    return None


def flex_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one packed row; ``[1, Hq, L, D]`` to ``[1, L, Hq, D]``.

    The block mask is built once a batch and window. On a CPU (tests only) it runs uncompiled, and
    without a backward.
    """
    mask = segments.derived(
        ("flex", window, query.device), lambda: make_block_mask(segments, window, query.device)
    )
    out = _flex(query.device.type)(
        query,
        key,
        value,
        score_mod=None if softcap is None else _soft_cap(softcap),
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


@cache
def _soft_cap(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _flex(device_type: str) -> Callable[..., Any]:
    """FlexAttention, compiled where there is a GPU: uncompiled it evaluates L x L scores."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type != "cuda":
        return flex_attention
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled
