"""The GEMM of the LM head: row sums of ``E = exp(z - k)`` and, where asked, E itself; no logits.

``a = x W^T + tail`` (adapter, bias), ``z = scale * cap(a)``, ``k`` [N] known beforehand
(target_logit.py). Per tile the epilogue takes one exponential an element and writes

- ``part[0, u, row] = sum_j E`` over the non-target columns of UNIT columns, float32; UNIT is the
  same for every tile, so that the sums agree in bits between variants with different tiles;
- with STORE ``e[row, j] = E * slope`` (slope of the softcap), the target's entry 0: it is fixed
  afterwards (rows.py); and what rounding took from the stored entries;
- with STATS the planes of device.store_statistics.

No maximum, no rescaling, no atomics: bit-reproducible, and equal with and without the store.

Legend: N rows, H hidden, V columns from `start` of the vocabulary, Q of the low-rank tail. With TMA
the four operands and e are host-side tensor descriptors, otherwise pointers with strides.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dpo_fast_kernels.device import LOG2E, exp_tile, logit_tile, store_statistics, tile_of
from dpo_fast_kernels.operands import Launch, Operands
from dpo_fast_kernels.products import TRITON_DTYPES
from dpo_fast_kernels.target_logit import TargetLogits


@triton.jit
def _tile_product(
    x,
    w,
    pid_n,
    pid_v,
    N,
    V,
    K,
    stride_xn,
    stride_xk,
    stride_wv,
    stride_wk,
    acc,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """``acc + x[rows] @ w[columns].T`` over K in steps of BLOCK_K."""
    if TMA:
        for i in range(0, tl.cdiv(K, BLOCK_K)):
            left = x.load([pid_n * BLOCK_N, i * BLOCK_K])
            right = w.load([pid_v * BLOCK_V, i * BLOCK_K])
            acc = tl.dot(left, right.T, acc, input_precision="ieee")
    else:
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
        offs_k = tl.arange(0, BLOCK_K)
        x_ptrs = x + offs_n.to(tl.int64)[:, None] * stride_xn + offs_k[None, :] * stride_xk
        w_ptrs = w + offs_v.to(tl.int64)[None, :] * stride_wv + offs_k[:, None] * stride_wk
        for i in range(0, tl.cdiv(K, BLOCK_K)):
            mask_k = offs_k < K - i * BLOCK_K
            left = tl.load(x_ptrs, mask=(offs_n < N)[:, None] & mask_k[None, :], other=0.0)
            right = tl.load(w_ptrs, mask=(offs_v < V)[None, :] & mask_k[:, None], other=0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
            x_ptrs += BLOCK_K * stride_xk
            w_ptrs += BLOCK_K * stride_wk
    return acc


@triton.jit(do_not_specialize=["N", "V", "start"])
def _exp_gemm_kernel(
    x,  # [N, H]
    w,  # [V, H]
    tail_x,  # [N, Q]
    tail_w,  # [V, Q]
    e,  # [N, V] out
    k_ptr,  # [N]
    zy_ptr,  # [N], read with STATS
    col_ptr,  # [N] int32
    part_ptr,  # [1, 4 or 5, cdiv(V, UNIT), N] out
    lost_ptr,  # [cdiv(V, BLOCK_V), N] out: what rounding took from the stored entries
    N,
    V,
    H,
    Q,
    start,
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
    GROUP_N: tl.constexpr,
    TMA: tl.constexpr,
    UNIT: tl.constexpr,
    STORE: tl.constexpr,
    HAS_LOST: tl.constexpr,
    E_DTYPE: tl.constexpr,
    STATS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_n, num_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    plane = num_v.to(tl.int64) * N
    for index in tl.range(tl.program_id(0), num_n * num_v, tl.num_programs(0), flatten=FLATTEN):
        pid_n, pid_v = tile_of(index, num_n, num_v, GROUP_N)
        acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        acc = _tile_product(
            x, w, pid_n, pid_v, N, V, H, stride_xn, stride_xh, stride_wv, stride_wh, acc,
            BLOCK_N, BLOCK_V, BLOCK_H, TMA,
        )  # fmt: skip
        if HAS_TAIL:
            acc = _tile_product(
                tail_x, tail_w, pid_n, pid_v, N, V, Q, Q, 1, Q, 1, acc,
                BLOCK_N, BLOCK_V, BLOCK_Q, TMA,
            )  # fmt: skip
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_n = offs_n < N
        k = tl.load(k_ptr + offs_n, mask=mask_n, other=0.0)
        col = tl.load(col_ptr + offs_n, mask=mask_n, other=-2)
        col = tl.where(col >= 0, tl.maximum(col - start, -1), col)
        a, slope = logit_tile(acc, softcap, HAS_SOFTCAP)
        p = exp_tile(a, k, col, offs_v, V, scale * LOG2E)
        offsets = pid_v.to(tl.int64) * N + offs_n
        if BLOCK_V > UNIT:  # the same order of summation whatever the tile
            units: tl.constexpr = BLOCK_V // UNIT
            r = tl.sum(tl.reshape(p, (BLOCK_N, units, UNIT)), 2)
            unit_v = pid_v * units + tl.arange(0, units)
            r_ptrs = part_ptr + unit_v.to(tl.int64)[None, :] * N + offs_n[:, None]
            tl.store(r_ptrs, r, mask=mask_n[:, None] & (unit_v * UNIT < V)[None, :])
        else:
            tl.store(part_ptr + offsets, tl.sum(p, 1), mask=mask_n)
        # The store comes first, so that the slope need not outlive it.
        if STORE:
            out = p * slope
            rounded = out.to(E_DTYPE)
            if HAS_LOST:
                lost = tl.sum(out - rounded.to(tl.float32), 1)
                tl.store(lost_ptr + offsets, lost, mask=mask_n)
            if TMA:
                e.store([pid_n * BLOCK_N, pid_v * BLOCK_V], rounded)
            else:
                e_ptrs = e + offs_n.to(tl.int64)[:, None] * stride_en + offs_v[None, :]
                tl.store(e_ptrs, rounded, mask=mask_n[:, None] & (offs_v < V)[None, :])
        if STATS:
            if STORE:  # E again instead of keeping it in registers: k read twice defeats the reuse
                k = tl.load(k_ptr + offs_n, mask=mask_n, other=0.0, volatile=True)
                p = exp_tile(a, k, col, offs_v, V, scale * LOG2E)
            zy = tl.load(zy_ptr + offs_n, mask=mask_n, other=0.0)
            store_statistics(
                part_ptr, plane, offsets, mask_n, p, a, zy, zy, col, offs_v, V, scale, HAS_SOFTCAP
            )


def num_planes(operands: Operands, stats: bool) -> int:
    """Partial sums a tile: R, and the planes of the statistics."""
    return 1 if not stats else 5 if operands.softcap is not None else 4


def exp_gemm(
    operands: Operands,
    launch: Launch,
    rows: TargetLogits,
    *,
    e: Tensor | None,  # [N, V] out, unit stride within rows
    stats: bool,
    start: int = 0,  # first column of operands.w within the vocabulary of rows.col
) -> tuple[Tensor, Tensor | None]:
    """Partial sums ``[C, units, N]`` float32; fills ``e`` except the target's entries.

    With a 16-bit ``e`` also ``[tiles, N]`` sums of what rounding took from its entries.
    """
    x, w, tile = operands.x, operands.w, launch.tile
    n, vocab = x.shape[0], w.shape[0]
    assert tile.block_v == tile.unit or not stats, "the statistics have one block a unit"
    units = triton.cdiv(vocab, tile.unit)
    part = x.new_empty(num_planes(operands, stats), units, n, dtype=torch.float32)
    tiles = triton.cdiv(vocab, tile.block_v)
    lost = None
    if e is not None and e.dtype != torch.float32:
        lost = part.new_empty(tiles, n)
    if n == 0:
        return part, lost
    capped, tailed = operands.softcap is not None, operands.tail_x is not None
    args: list[Any] = [x, w, operands.tail_x, operands.tail_w]
    if launch.tma:
        heights = (tile.block_n, tile.block_v) * 2
        widths = (tile.block_h, tile.block_h, tile.block_q, tile.block_q)
        args = [
            None if t is None else TensorDescriptor.from_tensor(t, [height, width])
            for t, height, width in zip(args, heights, widths, strict=True)
        ]
    target: Any = e
    if e is not None and launch.tma:
        target = TensorDescriptor.from_tensor(e, [tile.block_n, tile.block_v])
    grid = (min(launch.programs * tile.per_sm, triton.cdiv(n, tile.block_n) * tiles),)
    _exp_gemm_kernel[grid](
        *args, target, rows.k, rows.zy, rows.col, part, lost,
        n, vocab, x.shape[1], 0 if operands.tail_x is None else operands.tail_x.shape[1], start,
        *x.stride(), *w.stride(), 0 if e is None else e.stride(0), operands.scale,
        operands.softcap or 0.0,
        BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, BLOCK_H=tile.block_h, BLOCK_Q=tile.block_q,
        GROUP_N=tile.group_n, UNIT=tile.unit, TMA=launch.tma, STORE=e is not None,
        HAS_LOST=lost is not None, E_DTYPE=TRITON_DTYPES[torch.float32 if e is None else e.dtype],
        STATS=stats, HAS_SOFTCAP=capped, HAS_TAIL=tailed, FLATTEN=tile.flatten,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return part, lost
