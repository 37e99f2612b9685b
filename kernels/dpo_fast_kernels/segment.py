"""Sums of token log-probs over the sequences of a batch, rows in fixed order.

One program a sequence; the order depends on the position within the sequence alone, so a sequence
gives the same bits wherever it stands in the batch.

Legend: S sequences, N tokens.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _segment_sum_kernel(
    value_ptr,  # [N] float32
    weight_ptr,  # [N] float32 or None
    cu_ptr,  # [S + 1] int64
    out_ptr,  # [S]
    BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(cu_ptr + sequence)
    stop = tl.load(cu_ptr + sequence + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        value = tl.load(value_ptr + offs, mask=offs < stop, other=0.0)
        if HAS_WEIGHT:
            value *= tl.load(weight_ptr + offs, mask=offs < stop, other=0.0)
        total += value
    tl.store(out_ptr + sequence, tl.sum(total, 0))


def segment_sum(values: Tensor, cu_seqlens: Tensor, weight: Tensor | None = None) -> Tensor:
    """``[S]`` float32 sums of ``values[cu_seqlens[s] : cu_seqlens[s + 1]]`` (times ``weight``)."""
    sequences = cu_seqlens.shape[0] - 1
    out = torch.empty(sequences, dtype=torch.float32, device=values.device)
    if sequences:
        weight = weight.float().contiguous() if weight is not None else None
        _segment_sum_kernel[(sequences,)](
            values.float().contiguous(), weight, cu_seqlens.long(), out, BLOCK=512,
            HAS_WEIGHT=weight is not None, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
