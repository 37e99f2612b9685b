"""FlexAttention block masks from segments: by arithmetic on block bounds, never over L x L.

Legend: L tokens, n blocks of ``BLOCK`` tokens.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_fast.layouts.segments import Segment, Segments

BLOCK = 128


class _Piece(NamedTuple):
    """Queries ``[q0, q1)`` at positions from ``q_pos`` against keys ``[k0, k1)`` from ``k_pos``."""

    q0: int
    q1: int
    q_pos: int
    k0: int
    k1: int
    k_pos: int


def block_classes(
    segments: Segments, window: int | None, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs of blocks must be computed.

    Returns:
        ``(partial, full)``, each ``[n, n]`` bool: blocks of which some keys are seen by some
        queries, and blocks of which all keys are seen by all queries.
    """
    n = -(-segments.length // block)
    touched, full = np.zeros((n, n), dtype=bool), np.zeros((n, n), dtype=bool)
    far = segments.length if window is None else window
    for span in segments.spans:
        for piece in _pieces(span):
            _classify(piece, far, block, touched, full)
    return touched & ~full, full


def _pieces(span: Segment) -> Iterator[_Piece]:
    q = (span.start, span.stop, span.prefix_length)
    yield _Piece(*q, span.start, span.stop, span.prefix_length)
    if span.prefix_length:
        yield _Piece(*q, span.prefix_start, span.prefix_start + span.prefix_length, 0)


def _classify(piece: _Piece, far: int, block: int, touched: np.ndarray, full: np.ndarray) -> None:
    """Mark the blocks of one piece. Distances of a rectangle fill an interval: bounds decide."""
    rows = np.arange(piece.q0 // block, -(-piece.q1 // block))
    cols = np.arange(piece.k0 // block, -(-piece.k1 // block))
    q_low, q_high = _bounds(rows, piece.q0, piece.q1, block)
    k_low, k_high = _bounds(cols, piece.k0, piece.k1, block)
    shift = (piece.q_pos - piece.q0) - (piece.k_pos - piece.k0)
    farthest = (q_high - 1 + shift)[:, None] - k_low[None, :]
    nearest = (q_low + shift)[:, None] - (k_high - 1)[None, :]
    whole = (q_high - q_low == block)[:, None] & (k_high - k_low == block)[None, :]
    at = np.ix_(rows, cols)
    touched[at] |= (farthest >= 0) & (nearest < far)
    full[at] |= whole & (nearest >= 0) & (farthest < far)


def _bounds(index: np.ndarray, start: int, stop: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(index * block, start), np.minimum((index + 1) * block, stop)


def make_block_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    """The ``BlockMask`` of a row, with a mask function of five ``[L]`` int32 lookups."""
    from torch.nn.attention.flex_attention import BlockMask

    partial, full = block_classes(segments, window)
    return BlockMask.from_kv_blocks(
        *_ordered(partial, device),
        *_ordered(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(segments, window, device),
        seq_lengths=(segments.length, segments.length),
    )


def _ordered(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """``[1, 1, n]`` number of blocks of each row, ``[1, 1, n, n]`` their columns first."""
    counts = torch.from_numpy(blocks.sum(axis=1, dtype=np.int32))
    order = torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32))
    return counts[None, None].to(device), order[None, None].to(device)


def _mask_mod(segments: Segments, window: int | None, device: torch.device) -> Any:
    spans = segments.spans
    lengths = np.array(segments.lengths)
    fields = [
        [span.start for span in spans],
        [span.prefix_start for span in spans],
        [span.prefix_start + span.prefix_length for span in spans],
        [span.prefix_length - span.start for span in spans],  # position - index
    ]
    start, prefix_start, prefix_stop, shift = (
        torch.from_numpy(np.repeat(np.array(field, dtype=np.int32), lengths)).to(device)
        for field in fields
    )
    position = torch.arange(segments.length, dtype=torch.int32, device=device) + shift
    far = segments.length if window is None else window

    def visible(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        own = (kv >= start[q]) & (kv <= q)
        shared = (kv >= prefix_start[q]) & (kv < prefix_stop[q])
        return (own | shared) & (position[q] - position[kv] < far)

    return visible
