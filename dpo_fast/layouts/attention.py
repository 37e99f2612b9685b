"""The attention implementation that transformers' models call by the name ``dpo_fast``.

With ``pair_segments`` among the model's arguments, a call attends within the segments of a packed
row; without it (generation, evaluation of padded rows), it is ordinary masked attention. What a
family asks of its attention beyond what is known here is refused by name: an argument that is
silently dropped would train on wrong numbers.

Legend: L tokens, D head size, Hq and Hkv heads of queries and of keys.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.layouts.attention_compiled import compiled_segments, why_not_compiled
from dpo_fast.layouts.attention_flex import flex_segments, why_not_flex
from dpo_fast.layouts.attention_sdpa import capped_attention, sdpa_segments
from dpo_fast.layouts.attention_varlen import (
    flash_attn_segments,
    varlen_segments,
    why_not_flash_attn,
    why_not_varlen,
)
from dpo_fast.layouts.backend_check import backend_error
from dpo_fast.layouts.segments import Segment, Segments, segment_mask

logger = logging.getLogger("dpo_fast")

IMPLEMENTATION = "dpo_fast"
# Backend -> name in transformers, which reads meaning into names that hold "sdpa" or "flash".
_NAMES = {
    "auto": IMPLEMENTATION,
    "varlen": f"{IMPLEMENTATION}_varlen",
    "flash_attn": f"{IMPLEMENTATION}_fa",
    "flex": f"{IMPLEMENTATION}_flex",
    "compiled": f"{IMPLEMENTATION}_compiled",
    "sdpa": f"{IMPLEMENTATION}_by_segment",
}
BACKENDS = tuple(_NAMES)
# Arguments of a model that reach its attention and do not change what it computes.
_HARMLESS = (
    "position_ids",
    "position_embeddings",
    "cache_position",
    "use_cache",
    "output_router_logits",
)


# What choose_backend found, by what it depends on: it is asked by every layer of every pass.
_chosen: dict[tuple[object, ...], Callable[..., Tensor]] = {}


class UnsupportedAttention(ValueError):
    """A family asks something of its attention that packed rows do not have."""


def implementation_name(backend: str = "auto") -> str:
    """The ``attn_implementation`` of a backend.

    Raises:
        ValueError: the backend is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; use one of {list(BACKENDS)}")
    return _NAMES[backend]


@cache
def register() -> None:
    """Make the implementations known to transformers, through its public interfaces; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    # A compiled model breaks its graph here: segments are host lists that differ in every batch.
    # Decorated here, since torch.compiler imports triton, and only where there is a model.
    outside = torch.compiler.disable(segment_attention)
    for backend in BACKENDS:
        name = implementation_name(backend)
        AttentionInterface.register(name, partial(outside, backend=backend))
        # Rows without segments are padded: they get the mask that SDPA gets.
        AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: str = "auto",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    pair_segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' ``AttentionInterface``.

    Args:
        module: the attention layer.
        query: ``[B, Hq, L, D]``.
        key, value: ``[B, Hkv, L, D]``.
        attention_mask: used only without segments.
        backend: one of ``BACKENDS``; a name runs or raises.
        scaling: factor of the scores; None: ``D ** -0.5``.
        dropout: rate on the probabilities.
        sliding_window: positions that a query sees, its own included.
        softcap: scores pass through ``softcap * tanh(scores / softcap)``.
        is_causal: only True and None are known.
        pair_segments: of the one row of the batch.

    Returns:
        ``([B, L, Hq, D], None)``.

    Raises:
        UnsupportedAttention: the layer is not causal, passes an argument that is not known here,
            or its window contradicts its layer type.
        ValueError: the segments are of another row, or a backend asked for by name cannot run.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if pair_segments is None:
        options = {"dropout": dropout, "is_causal": is_causal, **kwargs}
        return _masked(module, query, key, value, attention_mask, scale, softcap, options)
    _refuse_unknown(module, is_causal, kwargs)
    _refuse_window(module, sliding_window)
    _check_row(query, key, pair_segments)
    pair_segments.count_call()
    attend = choose_backend(backend, query, value, softcap, dropout)
    out = attend(query, key, value, pair_segments, scale=scale, window=sliding_window)
    return out.contiguous(), None


def choose_backend(
    backend: str, query: Tensor, value: Tensor, softcap: float | None, dropout: float
) -> Callable[..., Tensor]:
    """The function that runs the call: the first of the backends that can, or the one named.

    A backend other than SDPA is compared with it on the device once before its first use.

    Raises:
        ValueError: the one named cannot run, with the reason.
    """
    sizes = query.shape[-1], value.shape[-1]
    key = (backend, query.device, query.dtype, value.dtype, *sizes, softcap, dropout)
    if key not in _chosen:
        _chosen[key] = _choose(backend, query, value, softcap, dropout)
    return _chosen[key]


def _choose(
    backend: str, query: Tensor, value: Tensor, softcap: float | None, dropout: float
) -> Callable[..., Tensor]:
    candidates: dict[str, tuple[str | None, Callable[..., Tensor]]] = {
        "varlen": (why_not_varlen(query, value, softcap, dropout), varlen_segments),
        "flash_attn": (
            why_not_flash_attn(query, value, dropout),
            partial(flash_attn_segments, softcap=softcap),
        ),
        "flex": (why_not_flex(query, value, dropout), partial(flex_segments, softcap=softcap)),
        "compiled": (why_not_compiled(query, value, softcap, dropout), compiled_segments),
        "sdpa": (None, partial(sdpa_segments, softcap=softcap, dropout=dropout)),
    }
    names = list(candidates) if backend == "auto" else [backend]
    for name in names:
        reason, attend = candidates[name]
        if reason is None and name != "sdpa":
            reason = backend_error(name, attend, query, value, softcap)
        if reason is None:
            return attend
        if backend != "auto":
            raise ValueError(f"attention backend {name!r} cannot run: {reason}; use 'auto'")
    raise AssertionError("sdpa runs everywhere")


def _masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention of padded rows, under the mask that transformers makes for SDPA."""
    from transformers import AttentionInterface

    if softcap is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, mask, scaling=scale, **options)
    if mask is None:
        causal = Segment(0, query.shape[2], 0, key.shape[2] - query.shape[2])
        mask = segment_mask(causal, None, query.dtype, query.device)
    elif mask.dtype == torch.bool:
        hidden = ~mask
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
        mask = mask.masked_fill_(hidden, lowest)
    out = capped_attention(query, key, value, mask, scale, softcap, options["dropout"])
    return out.transpose(1, 2).contiguous(), None


def _refuse_unknown(module: nn.Module, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedAttention(f"{type(module).__name__} is not causal")
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in _HARMLESS:
            raise UnsupportedAttention(
                f"{type(module).__name__} passes {name!r} to its attention, which packed rows do "
                "not support; use batch_layout='padded'"
            )


def _refuse_window(module: nn.Module, window: int | None) -> None:
    """The layer's type and the window that it passes must say the same."""
    config = getattr(module, "config", None)
    types, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if types is None or index is None:
        return
    if (types[index] == "sliding_attention") != (window is not None):
        raise UnsupportedAttention(
            f"layer {index} of {type(module).__name__} is of type {types[index]!r} and passes "
            f"sliding_window={window}: packed rows cannot tell what it sees; use "
            "batch_layout='padded'"
        )


def _check_row(query: Tensor, key: Tensor, segments: Segments) -> None:
    rows, length = query.shape[0], query.shape[2]
    if rows != 1 or length != segments.length or key.shape[2] != length:
        raise ValueError(
            f"queries {tuple(query.shape)} and keys {tuple(key.shape)} do not belong to "
            f"{segments!r}: expected one row of {segments.length} tokens without a cache"
        )
