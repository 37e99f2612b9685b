"""A comparison of an attention backend with SDPA, on the device, before its first use.

Kernels differ in where they align causality when there are more keys than queries, and in whether
they know windows and soft caps. A small case decides; it costs milliseconds, once per process.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_fast.layouts.attention_sdpa import sdpa_segments
from dpo_fast.layouts.segments import Segment, Segments

logger = logging.getLogger("dpo_fast")

# A pair that shares 70 of 100 tokens, a prompt of one token, a sequence of its own.
_CASE = (
    Segment(0, 100),
    Segment(100, 50, 0, 70),
    Segment(150, 3),
    Segment(153, 40, 150, 1),
    Segment(193, 17),
)
_WINDOW = 24
_verdicts: dict[tuple[object, ...], str | None] = {}


def backend_error(
    name: str,
    attend: Callable[..., Tensor],
    query: Tensor,
    value: Tensor,
    softcap: float | None,
) -> str | None:
    """None if ``attend`` computes what SDPA computes, forward and backward; else what it did wrong.

    Decided once per process for a backend, device, dtype, head sizes and soft cap.
    """
    key = (name, query.device, query.dtype, query.shape[-1], value.shape[-1], softcap)
    if key not in _verdicts:
        _verdicts[key] = _compare(attend, query, value, softcap)
        if _verdicts[key] is None:
            logger.info("Attention of packed rows: %s.", name)
        else:
            logger.warning("Attention backend %s is not used: %s.", name, _verdicts[key])
    return _verdicts[key]


def _compare(
    attend: Callable[..., Tensor], query: Tensor, value: Tensor, softcap: float | None
) -> str | None:
    segments = Segments(_CASE)
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, size: int) -> Tensor:
        return torch.randn(1, heads, segments.length, size, generator=generator)

    leaves = draw(4, query.shape[-1]), draw(2, query.shape[-1]), draw(2, value.shape[-1])
    upstream = draw(4, value.shape[-1]).transpose(1, 2)
    for window in (None, _WINDOW):
        results = []
        for run, dtype in ((attend, query.dtype), (sdpa_segments, torch.float32)):
            # The reference sees the inputs as rounded to the backend's dtype.
            at = [x.to(query.device, query.dtype).to(dtype).requires_grad_() for x in leaves]
            options: dict[str, Any] = {"softcap": softcap} if run is sdpa_segments else {}
            with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
                attend_once: Any = run
                out = attend_once(
                    *at, segments, scale=query.shape[-1] ** -0.5, window=window, **options
                )
                grads = torch.autograd.grad(out, at, upstream.to(out))
            results.append([x.detach().float() for x in (out, *grads)])
        eps = 32 * torch.finfo(query.dtype).eps
        for what, ours, gold in zip(("output", "dq", "dk", "dv"), *results, strict=True):
            error = float((ours - gold).norm() / gold.norm())
            if not error <= eps:
                return f"its {what} is off by {error:.1e} (window {window}; tolerance {eps:.1e})"
    return None
