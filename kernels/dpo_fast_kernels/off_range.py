"""Rows whose log-prob lies outside what the known offset covers, computed again with k = max.

Always launched with a fixed grid, so that nothing depends on the host: with no such row every
program exits at once, with all rows the result is right, only slow. Position i of ``rows`` [count]
is the i-th off-range row; the partial sums are indexed by position.

- MAXIMUM: ``part[0, tile, i] = max_j cap(a)``, and the target's logit again, from this accumulator.
- otherwise: row sums of E with the new k, statistics measured from k, and with STORE the row of E.

Legend: N rows, H hidden, V vocabulary (of this shard), Q columns of the low-rank tail.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels.device import LOG2E, exp_tile, logit_tile, store_statistics
from dpo_fast_kernels.operands import Launch, Operands
from dpo_fast_kernels.target_logit import TargetLogits
from dpo_fast_kernels.tiles import OFF_RANGE_BLOCK_N


@triton.jit
def _rows_product(
    x_ptr,
    w_ptr,
    row,
    offs_v,
    mask_i,
    V,
    K,
    stride_xn,
    stride_xk,
    stride_wv,
    stride_wk,
    acc,
    BLOCK_K: tl.constexpr,
):
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * stride_xn + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_v.to(tl.int64)[None, :] * stride_wv + offs_k[:, None] * stride_wk
    for i in range(0, tl.cdiv(K, BLOCK_K)):
        mask_k = offs_k < K - i * BLOCK_K
        left = tl.load(x_ptrs, mask=mask_i[:, None] & mask_k[None, :], other=0.0)
        right = tl.load(w_ptrs, mask=(offs_v < V)[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    return acc


@triton.jit(do_not_specialize=["N", "V"])
def _off_range_kernel(
    x_ptr,  # [N, H]
    w_ptr,  # [V, H]
    tail_x_ptr,  # [N, Q]
    tail_w_ptr,  # [V, Q]
    e_ptr,  # [N, V] out
    k_ptr,  # [N]
    zy_ptr,  # [N]; written by MAXIMUM
    col_ptr,  # [N] int32
    rows_ptr,  # [N] int32
    count_ptr,  # [1] int32
    part_ptr,  # [1 or 5, cdiv(V, BLOCK_V), N] out
    lost_ptr,  # [cdiv(V, BLOCK_V), N] out, or None
    N,
    V,
    H,
    Q,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    stride_en,
    scale,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MAXIMUM: tl.constexpr,
    STORE: tl.constexpr,
    HAS_LOST: tl.constexpr,
    STATS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    num_v = tl.cdiv(V, BLOCK_V)
    plane = num_v.to(tl.int64) * N
    count = tl.load(count_ptr)
    for index in tl.range(
        tl.program_id(0), tl.cdiv(count, BLOCK_N) * num_v, tl.num_programs(0), num_stages=1
    ):
        pid_v = index % num_v
        offs_i = index // num_v * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_i = offs_i < count
        row = tl.load(rows_ptr + offs_i, mask=mask_i, other=0)
        offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
        acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        acc = _rows_product(
            x_ptr, w_ptr, row, offs_v, mask_i, V, H,
            stride_xn, stride_xh, stride_wv, stride_wh, acc, BLOCK_H,
        )  # fmt: skip
        if HAS_TAIL:
            acc = _rows_product(
                tail_x_ptr, tail_w_ptr, row, offs_v, mask_i, V, Q, Q, 1, Q, 1, acc, BLOCK_Q
            )
        a, slope = logit_tile(acc, softcap, HAS_SOFTCAP)
        col = tl.load(col_ptr + row, mask=mask_i, other=-2)
        offsets = pid_v.to(tl.int64) * N + offs_i
        if MAXIMUM:
            inside = (offs_v < V)[None, :]
            tl.store(part_ptr + offsets, tl.max(tl.where(inside, a, float("-inf")), 1), mask=mask_i)
            hit = offs_v[None, :] == col[:, None]
            here = (col >= pid_v * BLOCK_V) & (col < min(V, pid_v * BLOCK_V + BLOCK_V))
            tl.store(zy_ptr + row, tl.sum(tl.where(hit, a, 0.0), 1), mask=mask_i & here)
        else:
            k = tl.load(k_ptr + row, mask=mask_i, other=0.0)
            p = exp_tile(a, k, col, offs_v, V, scale * LOG2E)
            tl.store(part_ptr + offsets, tl.sum(p, 1), mask=mask_i)
            if STATS:
                zy = tl.load(zy_ptr + row, mask=mask_i, other=0.0)
                store_statistics(
                    part_ptr, plane, offsets, mask_i, p, a, k, zy, col, offs_v, V, scale,
                    HAS_SOFTCAP,
                )  # fmt: skip
            if STORE:
                out = p * slope
                rounded = out.to(e_ptr.dtype.element_ty)
                e_ptrs = e_ptr + row.to(tl.int64)[:, None] * stride_en + offs_v[None, :]
                tl.store(e_ptrs, rounded, mask=mask_i[:, None] & (offs_v < V)[None, :])
                if HAS_LOST:
                    lost = tl.sum(out - rounded.to(tl.float32), 1)
                    tl.store(lost_ptr + offsets, lost, mask=mask_i)


def off_range(
    operands: Operands,
    launch: Launch,
    rows: TargetLogits,
    index: Tensor,  # [N] int32
    count: Tensor,  # [1] int32
    part: Tensor,  # [C, tiles, N] out, by position
    *,
    maximum: bool,
    e: Tensor | None,  # [N, V] out
    lost: Tensor | None,  # [tiles, N] out, by position
    stats: bool,
) -> None:
    """One pass over the rows ``index[:count]``; writes ``part``, and ``rows.zy`` or ``e``."""
    x, w, tile = operands.x, operands.w, launch.tile
    _off_range_kernel[(launch.programs,)](
        x, w, operands.tail_x, operands.tail_w, e, rows.k, rows.zy, rows.col,
        index, count, part, lost, x.shape[0], w.shape[0], x.shape[1],
        0 if operands.tail_x is None else operands.tail_x.shape[1],
        *x.stride(), *w.stride(), 0 if e is None else e.stride(0), operands.scale,
        operands.softcap or 0.0,
        BLOCK_N=OFF_RANGE_BLOCK_N, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h,
        BLOCK_Q=tile.block_q, MAXIMUM=maximum, STORE=e is not None, HAS_LOST=lost is not None,
        STATS=stats, HAS_SOFTCAP=operands.softcap is not None,
        HAS_TAIL=operands.tail_x is not None,
        num_warps=max(4, tile.block_v // 32), num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
