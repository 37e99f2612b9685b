"""Sums of token log-probs over the sequences of a batch, rows in fixed order.

One program a sequence; the order depends on the position within the sequence alone, so a sequence
gives the same bits wherever it stands in the batch. Summed in float64, rounded once.

Legend: S sequences, N tokens.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # tokens at a time


@triton.jit
def _segment_sum_kernel(
    value_ptr,  # [N] float32
    cu_ptr,  # [S + 1] int64
    out_ptr,  # [S] float32
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start = tl.load(cu_ptr + sequence)
    stop = tl.load(cu_ptr + sequence + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        total += tl.load(value_ptr + offs, mask=offs < stop, other=0.0).to(tl.float64)
    tl.store(out_ptr + sequence, tl.sum(total, 0).to(tl.float32))


@torch.library.custom_op("dpo_fast_kernels::segment_sum", mutates_args=())
def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[S]`` sums of float32 ``values[cu_seqlens[s] : cu_seqlens[s + 1]]``; differentiable."""
    sequences = cu_seqlens.shape[0] - 1
    out = torch.empty(sequences, dtype=torch.float32, device=values.device)
    if sequences:
        with torch.cuda.device_of(values):
            _segment_sum_kernel[(sequences,)](
                values.contiguous(), cu_seqlens.contiguous(), out, BLOCK=BLOCK, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


@segment_sum.register_fake
def _(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return values.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    values, cu_seqlens = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.num_tokens = values.shape[0]


def _backward(ctx, dsums: Tensor) -> tuple[Tensor, None]:
    (cu_seqlens,) = ctx.saved_tensors
    # The size is told, so that nothing waits for the lengths.
    return torch.repeat_interleave(dsums, cu_seqlens.diff(), output_size=ctx.num_tokens), None


segment_sum.register_autograd(_backward, setup_context=_setup_context)
