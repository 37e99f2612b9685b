"""The O(N H) kernels around the two backward GEMMs, and the sums over rows of stored E.

    v = -c * scale / S                         c = dL/dlogp [N], known last
    G = E W + delta W[y]                       G float32 [N, H]; the rank-one part: gather_axpy
    dX = v * G,  xs = v * X                    one pass: row_scale
    db = E^T v                                 column_sum, rows in fixed order

Legend: N rows, H hidden, V vocabulary (of this shard), K columns of any table.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N", "V"])
def _gather_axpy_kernel(
    out_ptr,  # [N, K] float32, in place
    table_ptr,  # [V, K]
    delta_ptr,  # [N]
    col_ptr,  # [N] int32
    N,
    V,
    K,
    stride_on,
    stride_tv,
    stride_tk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    col = tl.load(col_ptr + offs_n, mask=mask_n, other=-1)
    delta = tl.load(delta_ptr + offs_n, mask=mask_n, other=0.0)
    owned = mask_n & (col >= 0) & (col < V)
    mask = owned[:, None] & (offs_k < K)[None, :]
    column = tl.where(owned, col, 0).to(tl.int64)
    table = tl.load(
        table_ptr + column[:, None] * stride_tv + offs_k[None, :] * stride_tk, mask=mask, other=0.0
    )
    out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * stride_on + offs_k[None, :]
    out = tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, out + delta[:, None] * table.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _row_scale_kernel(
    c_ptr,  # [N]
    s_ptr,  # [N]
    unit_ptr,  # [1]: a power of two that xs carries, or None
    g_ptr,  # [N, H] float32 or None
    x_ptr,  # [N, H] or None
    dx_ptr,  # [N, H] out
    xs_ptr,  # [N, H] out
    v_ptr,  # [N] out
    N,
    H,
    stride_xn,
    stride_xh,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_XS: tl.constexpr,
    HAS_UNIT: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_h < H)[None, :]
    c = tl.load(c_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + offs_n, mask=mask_n, other=1.0)
    v = -c * scale / s
    first = tl.zeros((BLOCK_N,), tl.int32) + tl.program_id(1) == 0
    tl.store(v_ptr + offs_n, v, mask=mask_n & first)
    dense = offs_n.to(tl.int64)[:, None] * H + offs_h[None, :]
    silent = (v == 0)[:, None]  # such a row gives nothing, whatever it holds
    if NEED_DX:
        g = tl.load(g_ptr + dense, mask=mask, other=0.0)
        dx = tl.where(silent, 0.0, v[:, None] * g)
        tl.store(dx_ptr + dense, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEED_XS:
        x_ptrs = x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn + offs_h[None, :] * stride_xh
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        if HAS_UNIT:
            v = v * tl.load(unit_ptr)
        xs = tl.where(silent, 0.0, v[:, None] * x)
        tl.store(xs_ptr + dense, xs.to(xs_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "V"])
def _column_sum_kernel(
    e_ptr,  # [N, V]
    v_ptr,  # [N]
    out_ptr,  # [V] float32, added to
    N,
    V,
    stride_en,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < N)[:, None] & mask_v[None, :]
        e_ptrs = e_ptr + offs_n.to(tl.int64)[:, None] * stride_en + offs_v[None, :]
        e = tl.load(e_ptrs, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc += v[:, None] * e
    out = tl.load(out_ptr + offs_v, mask=mask_v, other=0.0)
    tl.store(out_ptr + offs_v, out + tl.sum(acc, 0), mask=mask_v)


@triton.jit(do_not_specialize=["N", "V", "start"])
def _target_fix_kernel(
    e_ptr,  # [N, V] columns start .. start + V of the vocabulary
    fix_ptr,  # [N]
    col_ptr,  # [N] int32
    N,
    V,
    start,
    stride_en,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    col = tl.load(col_ptr + offs, mask=mask, other=-1) - start
    fix = tl.load(fix_ptr + offs, mask=mask, other=0.0)
    hit = mask & (col >= 0) & (col < V)
    tl.store(e_ptr + offs.to(tl.int64) * stride_en + col, fix.to(e_ptr.dtype.element_ty), mask=hit)


def gather_axpy(out: Tensor, table: Tensor, delta: Tensor, col: Tensor) -> None:
    """``out[n] += delta[n] * table[col[n]]`` in float32, where that row of the table exists."""
    n, k = out.shape
    if n == 0:
        return
    grid = (triton.cdiv(n, 16), triton.cdiv(k, 128))
    strides = (out.stride(0), *table.stride())
    _gather_axpy_kernel[grid](
        out, table, delta, col, n, table.shape[0], k, *strides, BLOCK_N=16, BLOCK_K=128,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def row_scale(
    dlogps: Tensor,  # [N]
    s: Tensor,  # [N]
    scale: float,
    *,
    g: Tensor | None = None,  # [N, H] float32: give dX
    x: Tensor | None = None,  # [N, H]: give xs
    dtype: torch.dtype,  # of xs
    dx_dtype: torch.dtype | None = None,  # None: the same
    unit: Tensor | None = None,  # [1] power of two that xs carries
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """``(dX, xs, v)`` with ``v = -dlogps * scale / s``, v float32."""
    n = s.shape[0]
    like = g if g is not None else x
    h = like.shape[1] if like is not None else 1
    dx = s.new_empty(n, h, dtype=dx_dtype or dtype) if g is not None else None
    xs = s.new_empty(n, h, dtype=dtype) if x is not None else None
    v = torch.empty_like(s)
    if n:
        strides = x.stride() if x is not None else (h, 1)
        grid = (triton.cdiv(n, 16), triton.cdiv(h, 128))
        _row_scale_kernel[grid](
            dlogps, s, unit, g, x, dx, xs, v, n, h, *strides, scale, BLOCK_N=16, BLOCK_H=128,
            NEED_DX=g is not None, NEED_XS=x is not None, HAS_UNIT=unit is not None,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return dx, xs, v


def column_sum(e: Tensor, v: Tensor, out: Tensor) -> None:
    """``out += e.T @ v`` in float32, rows in fixed order."""
    n, width = e.shape
    if n:
        _column_sum_kernel[(triton.cdiv(width, 128),)](
            e, v, out, n, width, e.stride(0), BLOCK_N=32, BLOCK_V=128,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def target_fix(e: Tensor, fix: Tensor, col: Tensor, start: int) -> None:
    """``e[n, col[n] - start] = fix[n]`` where that column exists."""
    n, width = e.shape
    if n:
        _target_fix_kernel[(triton.cdiv(n, 256),)](
            e, fix, col, n, width, start, e.stride(0), BLOCK=256, num_warps=4
        )
