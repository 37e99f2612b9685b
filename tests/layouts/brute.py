"""Who sees whom, token by token, and attention over a dense mask: what fast paths must equal."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from dpo_fast.layouts import Segment, Segments


def visible(segments: Segments, window: int | None = None) -> Tensor:
    """``[L, L]`` bool, one query and key at a time."""
    position, root = {}, {}
    for span in segments.spans:
        for i in range(span.length):
            position[span.start + i] = span.prefix_length + i
            root[span.start + i] = span
    size = segments.length
    seen = torch.zeros(size, size, dtype=torch.bool)
    for q in range(size):
        span = root[q]
        keys = list(range(span.prefix_start, span.prefix_start + span.prefix_length))
        keys += range(span.start, q + 1)
        for k in keys:
            seen[q, k] = window is None or position[q] - position[k] < window
    return seen


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """``[1, Hq, L, D]`` to ``[1, L, Hq, D]`` over a dense mask, formula by formula."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bhkd->bqhd", probs, value)


@st.composite
def segment_rows(draw: st.DrawFn, longest: int = 40) -> Segments:
    """Rows of plain sequences and of pairs that share all, a part or nothing of their first run."""
    spans: list[Segment] = []
    for _ in range(draw(st.integers(1, 4))):
        start = spans[-1].stop if spans else 0
        first = Segment(start, draw(st.integers(1, longest)))
        spans.append(first)
        if draw(st.booleans()):
            shared = draw(st.integers(0, first.length))
            prefix = (start, shared) if shared else (0, 0)
            spans.append(Segment(first.stop, draw(st.integers(1, longest)), *prefix))
    return Segments(spans)
