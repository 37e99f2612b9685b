"""The other way to E: cuBLAS writes float32 logits of a chunk of rows, two kernels read them.

For dtypes that the exp-GEMM does not take (float32; float16, whose exponent range needs the true
maximum) and for shapes where cuBLAS plus passes over memory is faster. The offset is the row's
maximum, so no row is off range. Everything else is as in rows.py; a block of a row plays the part
of a tile of the GEMM.

Legend: n rows of a chunk, V vocabulary (of this shard).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels.device import (
    IGNORED,
    INVALID,
    LOG2E,
    exp_tile,
    logit_tile,
    store_statistics,
)
from dpo_fast_kernels.target_logit import TargetLogits

BLOCK = 4096


@triton.jit(do_not_specialize=["V", "N", "vocab_start", "vocab_total", "ignore_index"])
def _logits_max_kernel(
    z_ptr,  # [N, V] float32
    target_ptr,  # [N] int64
    zy_ptr,  # [N] out, zero before
    slope_ptr,  # [N] out, one before
    col_ptr,  # [N] int32 out
    part_ptr,  # [1, cdiv(V, BLOCK), N] out: maxima
    N,
    V,
    stride_zn,
    vocab_start,
    vocab_total,
    ignore_index,
    softcap,
    BLOCK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    pid_v = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    target = tl.load(target_ptr + row)
    local = tl.minimum(tl.maximum(target - vocab_start, -1), V).to(tl.int32)
    col = tl.where((target < 0) | (target >= vocab_total), INVALID, local)
    col = tl.where(target == ignore_index, IGNORED, col)
    offs_v = pid_v * BLOCK + tl.arange(0, BLOCK)
    inside = (offs_v < V)[None, :]
    z = tl.load(z_ptr + row[:, None] * stride_zn + offs_v[None, :], mask=inside, other=0.0)
    a, slope = logit_tile(z, softcap, HAS_SOFTCAP)
    tl.store(part_ptr + pid_v.to(tl.int64) * N + row, tl.max(tl.where(inside, a, float("-inf")), 1))
    hit = offs_v[None, :] == col[:, None]
    here = (col >= pid_v * BLOCK) & (col < min(V, pid_v * BLOCK + BLOCK))
    tl.store(zy_ptr + row, tl.sum(tl.where(hit, a, 0.0), 1), mask=here)
    if HAS_SOFTCAP:
        tl.store(slope_ptr + row, tl.sum(tl.where(hit, slope, 0.0), 1), mask=here)
    tl.store(col_ptr + row, col, mask=(pid_v + row) == row)  # by the first block


@triton.jit(do_not_specialize=["V", "N", "start"])
def _logits_exp_kernel(
    z_ptr,  # [N, V] float32
    e_ptr,  # [N, V] out; may be z itself
    k_ptr,  # [N]
    zy_ptr,  # [N]
    col_ptr,  # [N] int32
    part_ptr,  # [1, 4 or 5, cdiv(V, BLOCK), N] out
    lost_ptr,  # [cdiv(V, BLOCK), N] out, or None
    N,
    V,
    start,
    stride_zn,
    stride_en,
    scale,
    softcap,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
    STATS: tl.constexpr,
    STORE: tl.constexpr,
    HAS_LOST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    pid_v = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    k = tl.load(k_ptr + row)
    col = tl.load(col_ptr + row)
    col = tl.where(col >= 0, tl.maximum(col - start, -1), col)
    offs_v = pid_v * BLOCK + tl.arange(0, BLOCK)
    inside = (offs_v < V)[None, :]
    z = tl.load(z_ptr + row[:, None] * stride_zn + offs_v[None, :], mask=inside, other=0.0)
    a, slope = logit_tile(z, softcap, HAS_SOFTCAP)
    p = exp_tile(a, k, col, offs_v, V, scale * LOG2E)
    if STORE:
        out = p * slope
        rounded = out.to(e_ptr.dtype.element_ty)
        tl.store(e_ptr + row[:, None] * stride_en + offs_v[None, :], rounded, mask=inside)
        if HAS_LOST:
            lost = tl.sum(out - rounded.to(tl.float32), 1)
            tl.store(lost_ptr + pid_v.to(tl.int64) * N + row, lost)
    if SUMS:
        offsets = pid_v.to(tl.int64) * N + row
        tl.store(part_ptr + offsets, tl.sum(p, 1))
        if STATS:
            zy = tl.load(zy_ptr + row)
            plane = tl.cdiv(V, BLOCK).to(tl.int64) * N
            store_statistics(
                part_ptr, plane, offsets, row < N, p, a, k, zy, col, offs_v, V, scale, HAS_SOFTCAP
            )


def logits_max(
    z: Tensor,  # [n, V] float32
    softcap: float | None,
    target: Tensor,
    *,
    ignore_index: int,
    vocab_start: int,
    vocab_total: int,
) -> tuple[TargetLogits, Tensor]:
    """Targets' logits (offsets unwritten) and partial maxima ``[1, blocks, n]``."""
    n, vocab = z.shape
    zy = z.new_zeros(n)
    slope, k = z.new_ones(n), z.new_empty(n)
    col = torch.empty(n, dtype=torch.int32, device=z.device)
    blocks = triton.cdiv(vocab, BLOCK)
    part = z.new_empty(1, blocks, n)
    _logits_max_kernel[(n, blocks)](
        z, target, zy, slope, col, part, n, vocab, z.stride(0), vocab_start, vocab_total,
        ignore_index, softcap or 0.0, BLOCK=BLOCK, HAS_SOFTCAP=softcap is not None,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return TargetLogits(zy, slope, k, col), part


def logits_exp(
    z: Tensor,  # [n, V] float32
    softcap: float | None,
    scale: float,
    rows: TargetLogits,
    *,
    e: Tensor | None,  # [n, V] out, may be z
    part: Tensor | None,  # [1, 4 or 5, blocks, n] out
    stats: bool = False,
    start: int = 0,
) -> Tensor | None:
    """E of the non-target columns and its partial sums; ``[blocks, n]`` of what rounding took."""
    n, vocab = z.shape
    lost = None
    if e is not None and e.dtype != torch.float32:
        lost = z.new_empty(triton.cdiv(vocab, BLOCK), n)
    _logits_exp_kernel[(n, triton.cdiv(vocab, BLOCK))](
        z, e, rows.k, rows.zy, rows.col, part, lost, n, vocab, start, z.stride(0),
        0 if e is None else e.stride(0), scale, softcap or 0.0, BLOCK=BLOCK,
        SUMS=part is not None, STATS=stats, STORE=e is not None, HAS_LOST=lost is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return lost
