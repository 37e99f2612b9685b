"""The GEMMs of the LM head over a chunk of rows: float32 (float64) results from any dtype.

Legend: n rows of a chunk, H hidden, V vocabulary, r rank of the head's adapter.

Logits rounded to bf16 cost 0.3 to 6 nats a 512-token sequence, so no product is ever rounded to the
inputs' dtype: on the CPU narrow weights are widened tile by tile into scratch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dpo_fast.backends.scratch import as_matrix, scratch

TILE_BYTES = 4 * 2**20  # of a widened tile of the weight


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The accumulator's dtype: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def wide_tiles(weight: Tensor, wide: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """``(start, stop, weight[start:stop], widened)``; one tile where nothing is to widen."""
    rows, columns = weight.shape
    if weight.dtype == wide:
        yield 0, rows, weight
        return
    step = max(1, TILE_BYTES // max(1, columns * wide.itemsize))
    step = min(rows, max(256, step))
    with scratch.borrow(step * (columns + 16) * wide.itemsize, weight.device) as memory:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            tile = as_matrix(memory, stop - start, columns, wide)
            yield start, stop, tile.copy_(weight[start:stop])


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """``out [n, V] = hidden [n, H] @ weight.T``; ``hidden`` and ``out`` are wide."""
    for start, stop, tile in wide_tiles(weight, out.dtype):
        torch.mm(hidden, tile.t(), out=out[:, start:stop])


def add_lora_logits(out: Tensor, xa: Tensor, b: Tensor, scale: float) -> None:
    """``out [n, V] += scale * xa [n, r] @ b.T``."""
    for start, stop, tile in wide_tiles(b, out.dtype):
        out[:, start:stop].addmm_(xa, tile.t(), alpha=scale)


def times_weight(e: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out [n, H] = e [n, V] @ weight [V, H]``; all but the weight are wide."""
    first = True
    for start, stop, tile in wide_tiles(weight, e.dtype):
        if first:
            torch.mm(e[:, start:stop], tile, out=out)
        else:
            out.addmm_(e[:, start:stop], tile)
        first = False
