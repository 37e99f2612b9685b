"""Which tokens of a packed row see which: the description that every attention function reads.

L tokens of the row, G segments. A *segment* is a run of queries with the keys they may see: a
prefix that lies elsewhere in the row (the shared prompt), then the run itself, causally. A plain
sequence is a segment without prefix; of a pair that shares its prompt, ``[prompt | chosen]`` is one
segment, and ``[rejected]`` is another one whose prefix is the prompt. The i-th query of a segment
is at position ``prefix_length + i`` of its sequence.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class Segment(NamedTuple):
    """Queries ``[start, start + length)`` with their keys.

    They see ``[prefix_start, prefix_start + prefix_length)`` and, causally, each other.
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def num_keys(self) -> int:
        return self.prefix_length + self.length


class VarlenIndex(NamedTuple):
    """What a variable-length attention kernel needs; tensors on one device.

    ``cu_q``, ``cu_k`` ``[G + 1]`` int32; ``key_index`` ``[sum of keys]`` int64, where the keys of
    the segments are, or None where they are the row itself; ``max_q``, ``max_k`` host ints.
    """

    cu_q: Tensor
    cu_k: Tensor
    key_index: Tensor | None
    max_q: int
    max_k: int


class ScoredPass:
    """One forward whose hidden states are read at scored positions only.

    Attributes:
        last_layer_runs: how often it has run the last layer.
        left_out: whether that has left out rows.
        is_over: whether it has returned; the layer runs again in a checkpoint's backward.
    """

    __slots__ = ("is_over", "last_layer_runs", "left_out")

    def __init__(self) -> None:
        self.last_layer_runs, self.left_out, self.is_over = 0, False, False

    @property
    def is_wrong(self) -> bool:
        """Whether the layer ran again after it had left out rows: it has read them."""
        return self.left_out and self.last_layer_runs > 1


class Segments:
    """The segments of one row of L tokens, in order, without gaps; made once a batch, on the host.

    It travels through the model as a keyword argument. Derived tensors (masks, indices, block
    masks) are built at the first layer that asks and kept for the others.

    Args:
        spans: the segments; together they cover ``[0, L)`` in order.
        scored: positions whose hidden states predict a scored token, in any order, repeats allowed;
            None: not known.

    Attributes:
        scored: sorted, each once, int64; None: not known.
        scored_pass: the forward that these are for, if nobody reads hidden states of it at other
            positions than ``scored``; None: all are read, in any number of forwards.

    Raises:
        ValueError: a gap, an empty segment, a prefix that does not start an earlier segment
            without prefix, or a scored position that is not in the row.
    """

    # A plain class: engines rebuild dataclasses and tuples that they find in a model's arguments.
    __slots__ = ("_calls", "_derived", "scored", "scored_pass", "spans")

    def __init__(self, spans: Iterable[Segment], scored: np.ndarray | None = None) -> None:
        self.spans: tuple[Segment, ...] = tuple(spans)
        self.scored = None if scored is None else np.unique(scored).astype(np.int64)
        self.scored_pass: ScoredPass | None = None
        self._derived: dict[Hashable, Any] = {}
        self._calls = [0]
        roots: dict[int, int] = {}
        expected = 0
        for span in self.spans:
            if span.start != expected or span.length < 1:
                raise ValueError(
                    f"segment {tuple(span)} must start at {expected} and hold a token or more: "
                    "segments cover the row in order, without gaps"
                )
            if span.prefix_length and span.prefix_length > roots.get(span.prefix_start, 0):
                raise ValueError(
                    f"the prefix of segment {tuple(span)} must be the start of an earlier segment "
                    "that has none"
                )
            if not span.prefix_length:
                roots[span.start] = span.length
            expected = span.stop
        if self.scored is not None and len(self.scored):
            first, last = int(self.scored[0]), int(self.scored[-1])
            if first < 0 or last >= expected:
                raise ValueError(
                    f"scored positions from {first} to {last} do not lie in a row of {expected} "
                    "tokens"
                )

    @property
    def length(self) -> int:
        """L."""
        return self.spans[-1].stop if self.spans else 0

    @property
    def lengths(self) -> list[int]:
        """Queries of each segment."""
        return [span.length for span in self.spans]

    @property
    def has_prefix(self) -> bool:
        """Whether any segment sees a prefix that lies elsewhere in the row."""
        return any(span.prefix_length for span in self.spans)

    @property
    def num_calls(self) -> int:
        """How often an attention layer has read them; a model that never does ignores them."""
        return self._calls[0]

    def count_call(self) -> None:
        """An attention layer reads them."""
        self._calls[0] += 1

    def derived(self, key: Hashable, build: Callable[[], T]) -> T:
        """``build()``, once for this batch."""
        if key not in self._derived:
            # A reference pass in inference mode may ask first; autograd must be able to save it.
            with torch.inference_mode(False), torch.no_grad():
                self._derived[key] = build()
        return self._derived[key]

    def for_scored(self) -> "Segments":
        """The same segments for one forward of which nobody reads other hidden states; what has
        been derived and counted is shared.
        """
        same = self.for_all()
        same.scored_pass = ScoredPass()
        return same

    def for_all(self) -> "Segments":
        """The same segments for forwards of which all hidden states are read; shared likewise."""
        same = Segments.__new__(Segments)
        same.spans, same.scored, same.scored_pass = self.spans, self.scored, None
        same._derived, same._calls = self._derived, self._calls
        return same

    def __getstate__(self) -> tuple[tuple[Segment, ...], np.ndarray | None]:
        return self.spans, self.scored

    def __setstate__(self, state: tuple[tuple[Segment, ...], np.ndarray | None]) -> None:
        self.spans, self.scored = state
        self.scored_pass, self._derived, self._calls = None, {}, [0]

    def __repr__(self) -> str:
        return f"Segments({len(self.spans)} segments, {self.length} tokens)"


def segment_mask(
    span: Segment, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Additive mask ``[length, num_keys]``: 0 where a query of a segment sees a key, else -inf.

    ``window``: a query sees the keys at distance 0 to ``window - 1``, by position.
    """
    query = torch.arange(span.prefix_length, span.num_keys, device=device)
    distance = query[:, None] - torch.arange(span.num_keys, device=device)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    mask = torch.zeros(distance.shape, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, float("-inf"))


def varlen_index(segments: Segments, device: torch.device) -> VarlenIndex:
    """Cumulative lengths of queries and keys, and where the keys are."""
    num_keys = [span.num_keys for span in segments.spans]
    key_index = None
    if segments.has_prefix:
        runs = [
            run
            for span in segments.spans
            for run in (
                np.arange(span.prefix_start, span.prefix_start + span.prefix_length),
                np.arange(span.start, span.stop),
            )
        ]
        key_index = to_device(np.concatenate(runs), device)
    return VarlenIndex(
        cu_q=to_device(_cumulative(segments.lengths), device),
        cu_k=to_device(_cumulative(num_keys), device),
        key_index=key_index,
        max_q=max(segments.lengths),
        max_k=max(num_keys),
    )


def _cumulative(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device, without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
