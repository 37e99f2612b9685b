"""From the GEMM's partial sums to log-probs: per-row kernels, all in fixed order.

    S = R + e,  e = exp(zy - k)            logp = -log1p(R / e)   (e = 0: zy - k - log S)
    E[row, y] = -R * slope                 the target fix: one store a row, rounded once
    delta = what rounding took from all entries of the row: dX gets it back in float32, at W[y].
            Without it a common mean of the weight's rows would not cancel.

A row is off range if S > exp(60), S is not finite or e = 0: finish_rows flags it and sets it again
after off_range.py recomputed R with k = max. Rows are compacted on the device, so no host sync.

Legend: N rows, V vocabulary (of this shard), C planes of partial sums (1, or 5 with statistics).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels.device import IGNORED, INVALID, LOG2E, SQUARE_SCALE, log1p
from dpo_fast_kernels.operands import new_columns
from dpo_fast_kernels.products import TRITON_DTYPES
from dpo_fast_kernels.target_logit import TargetLogits

S_LIMIT = tl.constexpr(1.1420073898156842e26)  # exp(60)


@triton.jit(do_not_specialize=["N", "num_v"])
def _reduce_tiles_kernel(
    part_ptr,  # [C, num_v, N]
    rows_ptr,  # [N] int32: row of position i, or None for the identity
    count_ptr,  # [1] int32: positions in use, or None for N
    out_ptr,  # [C, N]
    N,
    num_v,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MAXIMUM: tl.constexpr,
    INDIRECT: tl.constexpr,
):
    """``out[c, row] = sum`` (or max) ``over tiles of part[c, tile, position]``."""
    plane = tl.program_id(1).to(tl.int64)
    count = N
    if INDIRECT:
        count = tl.load(count_ptr)
    for block in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK_N), tl.num_programs(0)):
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < count
        offs_t = tl.arange(0, BLOCK_T)
        empty = float("-inf") if MAXIMUM else 0.0
        total = tl.full((BLOCK_T, BLOCK_N), empty, tl.float32)
        for start in range(0, num_v, BLOCK_T):
            tiles = start + offs_t
            source = part_ptr + (plane * num_v + tiles[:, None]) * N + offs_n[None, :]
            values = tl.load(source, mask=(tiles < num_v)[:, None] & mask_n[None, :], other=empty)
            if MAXIMUM:
                total = tl.maximum(total, values)
            else:
                total += values
        row = offs_n
        if INDIRECT:
            row = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
        result = tl.max(total, 0) if MAXIMUM else tl.sum(total, 0)
        tl.store(out_ptr + plane * N + row, result, mask=mask_n)


@triton.jit(do_not_specialize=["N", "V"])
def _finish_rows_kernel(
    sums_ptr,  # [C, N]: R, and with STATS sum E d, sum E^2, columns that beat the target
    lost_ptr,  # [N] what rounding took from the other entries of E, or None
    zy_ptr,  # [N]
    k_ptr,  # [N]
    slope_ptr,  # [N]
    col_ptr,  # [N] int32
    rows_ptr,  # [N] int32 or None
    count_ptr,  # [1] int32 or None
    logp_ptr,  # [N] out
    s_ptr,  # [N] out
    fix_ptr,  # [N] out: -R * slope, the target's entry of E
    delta_ptr,  # [N] out
    flag_ptr,  # [N] int32 out: off range
    stats_ptr,  # [3, N] out: entropy, log sum p^2, is_top1
    e_ptr,  # [N, V] out at the target's column, or None
    N,
    V,
    stride_en,
    scale,
    BLOCK: tl.constexpr,
    E_DTYPE: tl.constexpr,
    STATS: tl.constexpr,
    STORE: tl.constexpr,
    HAS_LOST: tl.constexpr,
    FROM_K: tl.constexpr,  # sum E d was measured from k, not from zy
    INDIRECT: tl.constexpr,
):
    count = N
    if INDIRECT:
        count = tl.load(count_ptr)
    for block in tl.range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        mask = offs < count
        row = offs
        if INDIRECT:
            row = tl.load(rows_ptr + offs, mask=mask, other=0)
        rest = tl.load(sums_ptr + row, mask=mask, other=0.0)
        zy = tl.load(zy_ptr + row, mask=mask, other=0.0)
        k = tl.load(k_ptr + row, mask=mask, other=0.0)
        slope = tl.load(slope_ptr + row, mask=mask, other=1.0)
        col = tl.load(col_ptr + row, mask=mask, other=IGNORED)
        e = tl.exp2((zy - k) * (scale * LOG2E))
        total = rest + e
        logp = tl.where(e > 1e-20, -log1p(rest / e), (zy - k) * scale - tl.log(total))
        if not INDIRECT:
            in_range = (total <= S_LIMIT) & (e > 0)  # False for NaN
            tl.store(flag_ptr + row, ((col > IGNORED) & (in_range == 0)).to(tl.int32), mask=mask)
        bad = float("nan")
        logp = tl.where(col == IGNORED, 0.0, tl.where(col == INVALID, bad, logp))
        s_out = tl.where(col == IGNORED, float("inf"), tl.where(col == INVALID, bad, total))
        fix = tl.where(col > IGNORED, -rest * slope, 0.0)
        rounded = fix.to(E_DTYPE)
        owned = (col >= 0) & (col < V)
        delta = fix - rounded.to(tl.float32)
        if HAS_LOST:
            delta += tl.load(lost_ptr + row, mask=mask, other=0.0)
        delta = tl.where(col > IGNORED, delta, 0.0)
        tl.store(logp_ptr + row, logp, mask=mask)
        tl.store(s_ptr + row, s_out, mask=mask)
        tl.store(fix_ptr + row, fix, mask=mask)
        tl.store(delta_ptr + row, delta, mask=mask)
        if STORE:
            tl.store(e_ptr + row.to(tl.int64) * stride_en + col, rounded, mask=mask & owned)
        if STATS:
            weighted = tl.load(sums_ptr + N + row, mask=mask, other=0.0)
            squares = tl.load(sums_ptr + 2 * N + row, mask=mask, other=0.0)
            beaten = tl.load(sums_ptr + 3 * N + row, mask=mask, other=0.0)
            if FROM_K:  # zy may be -inf there
                own = tl.where(e > 0, e * (zy - k) * scale, 0.0)
                entropy = tl.log(total) - (weighted + own) / total
            else:
                entropy = -logp - weighted / total
            small = e * SQUARE_SCALE
            ratio = squares / (small * small)
            near = 2.0 * logp + log1p(ratio)
            far = tl.log(squares + small * small) - 2.0 * tl.log(total * SQUARE_SCALE)
            square = tl.where(ratio < 1e4, near, far)  # NaN and inf take the second
            alive = col > IGNORED
            top = alive & (beaten == 0) & (logp == logp)
            tl.store(stats_ptr + row, tl.where(alive, entropy, logp), mask=mask)
            tl.store(stats_ptr + N + row, tl.where(alive, square, logp), mask=mask)
            tl.store(stats_ptr + 2 * N + row, tl.where(top, 1.0, 0.0), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _compact_kernel(flag_ptr, rows_ptr, count_ptr, N, BLOCK: tl.constexpr):
    """Indices of the flagged rows in ascending order, and their number; one program."""
    count = tl.zeros((), tl.int32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        flag = tl.load(flag_ptr + offs, mask=offs < N, other=0)
        position = count + tl.cumsum(flag, 0) - flag
        tl.store(rows_ptr + position, offs, mask=flag != 0)
        count += tl.sum(flag, 0)
    tl.store(count_ptr, count)


class RowState(NamedTuple):
    """Per-row results, each ``[N]`` float32 (stats ``[3, N]``), and the rows' kinds and offsets."""

    logps: Tensor
    s: Tensor  # S: v = -c * scale / s
    fix: Tensor  # the target's entry of E, unrounded
    delta: Tensor  # what rounding took from the stored row
    stats: Tensor | None  # entropy, log sum p^2, is_top1


def new_row_state(n: int, stats: bool, device: torch.device) -> RowState:
    """Unwritten results for n rows."""
    found = torch.empty(3, n, dtype=torch.float32, device=device) if stats else None
    logps, s, fix, delta = new_columns(4, n, device)
    return RowState(logps, s, fix, delta, found)


def reduce_tiles(
    part: Tensor,  # [C, tiles, N]
    out: Tensor,  # [C, N]
    *,
    maximum: bool = False,
    index: Tensor | None = None,  # [N] int32: row of a position
    count: Tensor | None = None,  # [1] int32
    programs: int,
) -> None:
    """Sums (or maxima) over the tiles, in order; with ``index`` of ``index[:count]`` only."""
    planes, tiles, n = part.shape
    blocks = triton.cdiv(n, 32)
    grid = (min(blocks, programs) if index is not None else blocks, planes)
    _reduce_tiles_kernel[grid](
        part, index, count, out, n, tiles, BLOCK_N=32, BLOCK_T=256, MAXIMUM=maximum,
        INDIRECT=index is not None, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def finish_rows(
    sums: Tensor,  # [C, N]
    rows: TargetLogits,
    out: RowState,
    flag: Tensor,  # [N] int32 out; not written with index
    *,
    lost: Tensor | None,  # [N]
    e: Tensor | None,  # [N, V]: its target entries are set
    vocab: int,
    e_dtype: torch.dtype,
    scale: float,
    index: Tensor | None = None,
    count: Tensor | None = None,
    from_k: bool = False,
    programs: int,
) -> None:
    """Log-probs and the rest of ``out``; with ``index`` of the off-range rows ``index[:count]``."""
    n = out.logps.shape[0]
    if n == 0:
        return
    blocks = triton.cdiv(n, 128)
    _finish_rows_kernel[(min(blocks, programs) if index is not None else blocks,)](
        sums, lost, rows.zy, rows.k, rows.slope, rows.col, index, count, out.logps, out.s, out.fix,
        out.delta, flag, out.stats, e, n, vocab, 0 if e is None else e.stride(0), scale,
        BLOCK=128, E_DTYPE=TRITON_DTYPES[e_dtype], STATS=out.stats is not None,
        STORE=e is not None, HAS_LOST=lost is not None, FROM_K=from_k,
        INDIRECT=index is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def compact(flag: Tensor) -> tuple[Tensor, Tensor]:
    """(rows [N] int32, count [1] int32): ascending indices of the flagged rows, on the device."""
    n = flag.shape[0]
    rows = torch.empty_like(flag)
    count = torch.empty(1, dtype=torch.int32, device=flag.device)
    _compact_kernel[(1,)](flag, rows, count, n, BLOCK=4096, num_warps=8)
    return rows, count
