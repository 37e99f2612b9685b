"""The two backward GEMMs over the kept tiles of E: float32 sums in a fixed order, no atomics.

    E W      [N, H]: a row block walks over the units that it keeps
    E^T X    [V, H]: a unit walks over the row blocks that keep it

Both are one kernel: an output tile of BLOCK_M rows (of E, or of its transpose) by BLOCK_H columns,
and a list of tiles of E (kept_tiles.py) that it multiplies, ``DEPTH`` of the inner index each. The
columns of an output row block run side by side, so that E is read from memory once; rows and
columns beyond the edge are zeros.

Legend: N rows, H hidden, V vocabulary, M rows of the output, L the longest list.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (arguments of device functions are typed by the compiler)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dpo_fast_kernels.kept_tiles import tile_shape
from dpo_fast_kernels.operands import aligned, capability_of


class KeptTile(NamedTuple):
    """Blocks of the output and of the inner loop, and how it is compiled."""

    block_h: int
    block_k: int
    num_warps: int
    num_stages: int  # one of them for the index of the tile

    def adding(self) -> "KeptTile":
        """The same for a result that is added to: what was there takes registers, too."""
        return self._replace(block_h=self.block_h // 2)


KEPT_TILES = {
    "sm_90": KeptTile(256, 64, 8, 7),
    "sm_90-pointer": KeptTile(128, 64, 8, 7),
    "sm_80": KeptTile(128, 32, 8, 7),
    "interpreter": KeptTile(16, 8, 4, 2),
}


@triton.jit(do_not_specialize=["N", "V", "width"])
def _kept_product_kernel(
    e,  # [N, V]
    right,  # [V, H], or [N, H] with TRANSPOSED
    out_ptr,  # [M, H]
    list_ptr,  # [cdiv(M, BLOCK_M), L] int32
    count_ptr,  # [cdiv(M, BLOCK_M)] int32
    N,
    V,
    H,
    width,  # L
    stride_en,
    stride_rk,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    TMA: tl.constexpr,
):
    tile_m, tile_h = tl.program_id(1), tl.program_id(0)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_k = tl.arange(0, BLOCK_K)
    steps: tl.constexpr = DEPTH // BLOCK_K
    M = V if TRANSPOSED else N
    K = N if TRANSPOSED else V
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    count = tl.load(count_ptr + tile_m)
    lists = list_ptr + tile_m.to(tl.int64) * width
    for i in range(0, count * steps):
        first = tl.load(lists + i // steps) * DEPTH + (i % steps) * BLOCK_K
        if TMA:
            if TRANSPOSED:
                left = e.load([first, tile_m * BLOCK_M]).T
            else:
                left = e.load([tile_m * BLOCK_M, first])
            values = right.load([first, tile_h * BLOCK_H])
        else:
            inner = first + offs_k
            mask_k = inner < K
            mask = (offs_m < M)[:, None] & mask_k[None, :]
            if TRANSPOSED:
                e_ptrs = e + inner.to(tl.int64)[None, :] * stride_en + offs_m[:, None]
            else:
                e_ptrs = e + offs_m.to(tl.int64)[:, None] * stride_en + inner[None, :]
            left = tl.load(e_ptrs, mask=mask, other=0.0)
            r_ptrs = right + inner.to(tl.int64)[:, None] * stride_rk + offs_h[None, :]
            values = tl.load(r_ptrs, mask=mask_k[:, None] & (offs_h < H)[None, :], other=0.0)
        acc = tl.dot(left.to(values.dtype), values, acc, input_precision="ieee")
    mask = (offs_m < M)[:, None] & (offs_h < H)[None, :]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * H + offs_h[None, :]
    if ADD:
        acc += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def kept_product(
    e: Tensor,  # [N, V]
    right: Tensor,  # [V, H], or [N, H] with transposed
    lists: Tensor,  # [blocks, L] int32
    count: Tensor,  # [blocks] int32
    *,
    transposed: bool,
    dtype: torch.dtype = torch.float32,
    into: Tensor | None = None,  # [M, H] contiguous
) -> Tensor:
    """``E right`` (``E^T right``) over the tiles listed for each block of the result's rows.

    Accumulated in float32; added to ``into``, or rounded once to ``dtype``.
    """
    n, vocab = e.shape
    m, hidden = (vocab if transposed else n), right.shape[1]
    out = right.new_empty(m, hidden, dtype=dtype) if into is None else into
    if m == 0 or hidden == 0:
        return out
    if right.stride(1) != 1:
        right = right.contiguous()
    capability = capability_of(e)
    rows, unit = tile_shape(capability is None)
    block_m, depth = (unit, rows) if transposed else (rows, unit)
    copies = capability is None or capability[0] in (9, 10)
    tma = copies and aligned(e) and aligned(right)
    arch = "interpreter" if capability is None else "sm_80"
    if capability is not None and copies:
        arch = "sm_90" if tma else "sm_90-pointer"
    tile = KEPT_TILES[arch] if into is None else KEPT_TILES[arch].adding()
    operands: list[Any] = [e, right]
    if tma:
        box = (tile.block_k, block_m) if transposed else (block_m, tile.block_k)
        operands = [
            TensorDescriptor.from_tensor(e, list(box)),
            TensorDescriptor.from_tensor(right, [tile.block_k, tile.block_h]),
        ]
    _kept_product_kernel[(triton.cdiv(hidden, tile.block_h), triton.cdiv(m, block_m))](
        *operands, out, lists, count, n, vocab, hidden, lists.shape[1], e.stride(0),
        right.stride(0), BLOCK_M=block_m, BLOCK_H=tile.block_h, BLOCK_K=tile.block_k, DEPTH=depth,
        TRANSPOSED=transposed, ADD=into is not None, TMA=tma, num_warps=tile.num_warps,
        num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out
