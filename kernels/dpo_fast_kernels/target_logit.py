"""The target's logit of every row, taken from the matrix units.

``zy = cap(x . W[y] + bias[y] + tail)``. Tensor cores truncate partial sums, an ordinary dot product
does not, and the difference would reach the log-prob undamped. So 64 rows of x meet their own 64
gathered rows of W in one MMA tile, in the block size and order of the main GEMM, and the diagonal
is kept: 64 times the arithmetic needed, ``64 N H`` of ``N V H``.

Legend: N rows, H hidden, V vocabulary (of this shard), Q columns of the low-rank tail.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels.device import IGNORED, INVALID, softcapped
from dpo_fast_kernels.operands import Launch, Operands, new_columns

BLOCK = 64  # rows a program, and gathered rows of W
OFFSET = 24.0  # nats between zy and k: centres the exponent range of bfloat16


@triton.jit(do_not_specialize=["N", "V", "vocab_start", "vocab_total", "ignore_index"])
def _target_logit_kernel(
    x_ptr,  # [N, H]
    w_ptr,  # [V, H]
    tail_x_ptr,  # [N, Q]
    tail_w_ptr,  # [V, Q]
    target_ptr,  # [N] int64
    zy_ptr,  # [N] out
    slope_ptr,  # [N] out: derivative of the softcap
    k_ptr,  # [N] out: zy + offset
    col_ptr,  # [N] int32 out: column in this shard, or the kind of the row (device.py)
    N,
    V,
    H,
    Q,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    vocab_start,
    vocab_total,
    ignore_index,
    softcap,
    offset,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=ignore_index)
    local = tl.minimum(tl.maximum(target - vocab_start, -1), V).to(tl.int32)
    invalid = (target < 0) | (target >= vocab_total)
    col = tl.where(invalid, INVALID, local)
    col = tl.where(target == ignore_index, IGNORED, col)
    owned = (col >= 0) & (col < V)
    column = tl.where(owned, col, 0).to(tl.int64)

    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    offs_h = tl.arange(0, BLOCK_H)
    x_ptrs = x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn + offs_h[None, :] * stride_xh
    w_ptrs = w_ptr + column[None, :] * stride_wv + offs_h[:, None] * stride_wh
    for h in range(0, tl.cdiv(H, BLOCK_H)):
        mask_h = offs_h < H - h * BLOCK_H
        x = tl.load(x_ptrs, mask=mask_n[:, None] & mask_h[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=owned[None, :] & mask_h[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_H * stride_xh
        w_ptrs += BLOCK_H * stride_wh
    if HAS_TAIL:
        offs_q = tl.arange(0, BLOCK_Q)
        x_ptrs = tail_x_ptr + offs_n.to(tl.int64)[:, None] * Q + offs_q[None, :]
        w_ptrs = tail_w_ptr + column[None, :] * Q + offs_q[:, None]
        for q in range(0, tl.cdiv(Q, BLOCK_Q)):
            mask_q = offs_q < Q - q * BLOCK_Q
            x = tl.load(x_ptrs, mask=mask_n[:, None] & mask_q[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=owned[None, :] & mask_q[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            x_ptrs += BLOCK_Q
            w_ptrs += BLOCK_Q

    lane = tl.arange(0, BLOCK)
    zy = tl.sum(tl.where(lane[:, None] == lane[None, :], acc, 0.0), 1)
    slope = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_SOFTCAP:
        zy, slope = softcapped(zy, softcap)
    zy = tl.where(owned, zy, 0.0)
    tl.store(zy_ptr + offs_n, zy, mask=mask_n)
    tl.store(slope_ptr + offs_n, slope, mask=mask_n)
    tl.store(k_ptr + offs_n, zy + offset, mask=mask_n)
    tl.store(col_ptr + offs_n, col, mask=mask_n)


class TargetLogits(NamedTuple):
    """Per-row inputs of the GEMM, each ``[N]``."""

    zy: Tensor  # float32, after the softcap, before the scale
    slope: Tensor  # float32
    k: Tensor  # float32
    col: Tensor  # int32


def target_logits(
    operands: Operands,
    launch: Launch,
    target: Tensor,  # [N] int64
    *,
    ignore_index: int,
    vocab_start: int,
    vocab_total: int,
) -> TargetLogits:
    """Logit, slope, offset and kind of every row's target."""
    x, w = operands.x, operands.w
    n, hidden = x.shape
    zy, slope, k = new_columns(3, n, x.device)
    col = torch.empty(n, dtype=torch.int32, device=x.device)
    q = 0 if operands.tail_x is None else operands.tail_x.shape[1]
    if n:
        _target_logit_kernel[(triton.cdiv(n, BLOCK),)](
            x, w, operands.tail_x, operands.tail_w, target, zy, slope, k, col,
            n, w.shape[0], hidden, q, *x.stride(), *w.stride(), vocab_start, vocab_total,
            ignore_index, operands.softcap or 0.0, OFFSET / operands.scale,
            BLOCK_H=launch.tile.block_h, BLOCK_Q=launch.tile.block_q, BLOCK=BLOCK,
            HAS_SOFTCAP=operands.softcap is not None, HAS_TAIL=operands.tail_x is not None,
            num_warps=4, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return TargetLogits(zy, slope, k, col)
