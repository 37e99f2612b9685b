"""Attention segment by segment through PyTorch's own scaled dot product: any device, any dtype.

On a CPU a call costs little, and a causal kernel skips what a mask would compute; everywhere the
exact fallback, and what the other backends are checked against.

Legend: L tokens, D head size, Hq and Hkv heads of queries and of keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast.layouts.segments import Segment, Segments, segment_mask


def sdpa_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of one packed row.

    Args:
        query: ``[1, Hq, L, D]``.
        key, value: ``[1, Hkv, L, D]``, Hkv divides Hq.
        segments: of that row.
        scale: factor of the scores.
        window: keys at a distance of ``window`` positions or more are not seen.
        softcap: scores pass through ``softcap * tanh(scores / softcap)``; computed without a fused
            kernel, with ``[Hq, length, keys]`` scores of one segment in memory.
        dropout: rate on the probabilities.

    Returns:
        ``[1, L, Hq, D]``, contiguous.
    """
    lengths = segments.lengths
    keys, values = key.split(lengths, dim=2), value.split(lengths, dim=2)
    place = {span.start: i for i, span in enumerate(segments.spans)}
    outputs = []
    for i, (span, q) in enumerate(zip(segments.spans, query.split(lengths, dim=2), strict=True)):
        k, v = keys[i], values[i]
        if span.prefix_length:
            j = place[span.prefix_start]
            k = torch.cat([keys[j][:, :, : span.prefix_length], k], dim=2)
            v = torch.cat([values[j][:, :, : span.prefix_length], v], dim=2)
        mask = _mask(segments, span, window, query) if _needs_mask(span, window) else None
        if softcap is not None:
            if mask is None:
                mask = _mask(segments, span, window, query)
            out = capped_attention(q, k, v, mask, scale, softcap, dropout)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
    dropout: float = 0.0,
) -> Tensor:
    """``softmax(softcap * tanh(scale * q k^T / softcap) + mask) v``, ``[B, Hq, Lq, D]``.

    The softmax is at least float32.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    probs = scores.softmax(dim=-1, dtype=wide).to(query.dtype)
    return F.dropout(probs, dropout) @ value


def _needs_mask(span: Segment, window: int | None) -> bool:
    """Whether PyTorch's causal flag (aligned at the first query and key) does not say it all."""
    return span.prefix_length > 0 or (window is not None and span.num_keys > window)


def _mask(segments: Segments, span: Segment, window: int | None, like: Tensor) -> Tensor:
    seen = window if window is not None and span.num_keys > window else None
    shape = (span.prefix_length, span.length, seen)
    return segments.derived(
        ("mask", *shape, like.dtype, like.device),
        lambda: segment_mask(span, seen, like.dtype, like.device),
    )
