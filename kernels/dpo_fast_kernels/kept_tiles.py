"""Which tiles of E the filtered mode keeps, and what the others held. Approximate, asked for.

A tile is ROWS rows by UNIT columns. It is kept if in one of its rows it holds ``bound`` or more of
the row's probability (``R_tile / S``, the partial sums of the exp-GEMM), a target, or a row whose
sums are redone (off_range.py); NaN is kept. So a tile left out holds less than ``bound`` of each of
its rows, and ``bound = 0`` keeps everything.

``skipped`` is what a row's left-out tiles held, in units of E. Added to ``delta`` it makes

    G = sum over kept E_j W_j + delta W[y] = sum over kept E_j (W_j - W[y])

(without a softcap): a common mean of the weight's rows cancels as it does in the exact gradient.

The idea of leaving out blocks of small probabilities: Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models", 2024.

Legend: N rows, V vocabulary, B = cdiv(N, ROWS), U = cdiv(V, UNIT).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo_fast_kernels.operands import capability_of
from dpo_fast_kernels.tiles import INTERPRETER

ROWS = 128  # of a tile, and of an output tile of E W; ROW_BLOCK and ROW_TILE are multiples of it
UNIT = 128  # of every shipped tile of the exp-GEMM


class KeptTiles(NamedTuple):
    """The kept tiles of a call; ``mask`` is all that the backward needs."""

    mask: Tensor  # [B, U] int8
    units: Tensor  # [B, U] int32: for each row block the units kept, ascending, then anything
    lengths: Tensor  # [B] int32: how many they are
    skipped: Tensor  # [N] float32: sum of E over the tiles left out


def tile_shape(interpreted: bool) -> tuple[int, int]:
    """(ROWS, UNIT)"""
    return (16, INTERPRETER["plain"].unit) if interpreted else (ROWS, UNIT)


def mask_shape(n: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """(B, U)"""
    rows, unit = tile_shape(device.type == "cpu")
    return -(-n // rows), -(-vocab // unit)


@triton.jit(do_not_specialize=["N", "num_units"])
def _kept_tiles_kernel(
    part_ptr,  # [U, N]: sums of E over the non-target columns of a unit
    s_ptr,  # [N]
    flag_ptr,  # [N] int32: off range
    col_ptr,  # [N] int32
    mask_ptr,  # [B, U] int8 out
    units_ptr,  # [B, U] int32 out
    count_ptr,  # [B] int32 out
    skipped_ptr,  # [N] out
    N,
    num_units,
    bound,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """One program a row block: its units in order."""
    block = tl.program_id(0)
    offs_n = block * ROWS + tl.arange(0, ROWS)
    mask_n = offs_n < N
    limit = tl.load(s_ptr + offs_n, mask=mask_n, other=1.0) * bound
    redone = tl.max(tl.load(flag_ptr + offs_n, mask=mask_n, other=0), 0)
    col = tl.load(col_ptr + offs_n, mask=mask_n, other=-1)
    own = tl.where(col >= 0, col // UNIT, -1)
    count = tl.zeros((), tl.int32)
    skipped = tl.zeros((ROWS,), tl.float32)
    row = block.to(tl.int64) * num_units
    for start in range(0, num_units, BLOCK_U):
        unit = start + tl.arange(0, BLOCK_U)
        mask = (unit < num_units)[:, None] & mask_n[None, :]
        source = part_ptr + unit.to(tl.int64)[:, None] * N + offs_n[None, :]
        part = tl.load(source, mask=mask, other=0.0)
        needed = mask & (((part < limit[None, :]) == 0) | (own[None, :] == unit[:, None]))
        keep = tl.maximum(tl.max(needed.to(tl.int32), 1), redone)
        keep = tl.where(unit < num_units, keep, 0)
        skipped += tl.sum(tl.where(keep[:, None] == 0, part, 0.0), 0)
        tl.store(mask_ptr + row + unit, keep.to(tl.int8), mask=unit < num_units)
        tl.store(units_ptr + row + count + tl.cumsum(keep, 0) - keep, unit, mask=keep != 0)
        count += tl.sum(keep, 0)
    tl.store(count_ptr + block, count)
    tl.store(skipped_ptr + offs_n, skipped, mask=mask_n)


@triton.jit(do_not_specialize=["num_blocks", "num_units"])
def _kept_blocks_kernel(
    mask_ptr,  # [B, U] int8
    blocks_ptr,  # [U, B] int32 out
    count_ptr,  # [U] int32 out
    num_blocks,
    num_units,
    BLOCK_U: tl.constexpr,
):
    """For each unit the row blocks that keep it, ascending."""
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    mask = unit < num_units
    count = tl.zeros((BLOCK_U,), tl.int32)
    for block in range(0, num_blocks):
        source = mask_ptr + tl.cast(block, tl.int64) * num_units + unit
        keep = tl.load(source, mask=mask, other=0).to(tl.int32)
        where = blocks_ptr + unit.to(tl.int64) * num_blocks + count
        tl.store(where, tl.zeros((BLOCK_U,), tl.int32) + block, mask=keep != 0)
        count += keep
    tl.store(count_ptr + unit, count, mask=mask)


def kept_tiles(part: Tensor, s: Tensor, flag: Tensor, col: Tensor, bound: float) -> KeptTiles:
    """The tiles kept of ``part`` [U, N], for rows whose sums are finished, without a host sync."""
    num_units, n = part.shape
    rows, unit = tile_shape(capability_of(part) is None)
    blocks = -(-n // rows)
    new = part.new_empty
    found = KeptTiles(
        new(blocks, num_units, dtype=torch.int8),
        new(blocks, num_units, dtype=torch.int32),
        new(blocks, dtype=torch.int32),
        new(n),
    )
    if n:
        _kept_tiles_kernel[(blocks,)](
            part, s, flag, col, *found, n, num_units, bound, ROWS=rows,
            UNIT=unit, BLOCK_U=32, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return found


def kept_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks ``[U, B]`` int32, count ``[U]`` int32) of a mask ``[B, U]``: its columns as lists."""
    num_blocks, num_units = mask.shape
    blocks = mask.new_empty(num_units, num_blocks, dtype=torch.int32)
    count = mask.new_zeros(num_units, dtype=torch.int32)
    if num_blocks:
        _kept_blocks_kernel[(triton.cdiv(num_units, 32),)](
            mask, blocks, count, num_blocks, num_units, BLOCK_U=32, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return blocks, count


def join_kept(parts: list[KeptTiles]) -> KeptTiles:
    """Of consecutive rows; all but the last hold whole tiles."""
    return KeptTiles(*(torch.cat(t) for t in zip(*parts, strict=True)))


class Tally(NamedTuple):
    """What the filtered calls since the last tally kept."""

    kept_share: float  # tiles kept / tiles
    most_skipped: float  # largest share of a row's probability that was left out


_counts: dict[torch.device, Tensor] = {}  # [3] float64: tiles kept, tiles, most skipped


def count_tiles(kept: KeptTiles, s: Tensor) -> None:
    """Adds a call to the tally, on its device and without a sync."""
    if kept.mask.numel() == 0:
        return
    count = _counts.get(s.device)
    if count is None:
        count = _counts[s.device] = torch.zeros(3, dtype=torch.float64, device=s.device)
    count[0] += kept.mask.sum()
    count[1] += kept.mask.numel()
    share = torch.where(kept.skipped > 0, kept.skipped / s, 0.0).amax()
    count[2] = torch.maximum(count[2], share.double())


def take_tally() -> Tally | None:
    """The tally over all devices, which begins anew; None if nothing was filtered. Syncs."""
    counts = [count.tolist() for count in _counts.values()]
    for count in _counts.values():
        count.zero_()
    tiles = sum(c[1] for c in counts)
    if not tiles:
        return None
    return Tally(sum(c[0] for c in counts) / tiles, max(c[2] for c in counts))
