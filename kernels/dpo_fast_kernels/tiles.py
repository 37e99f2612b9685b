"""The shipped tiles: one table, keyed by (tile class, variant, class of H).

Unmeasured: the entries are those that compile without spills (`python -m dpo_fast_kernels.aot`),
ordered by the roofline; `benchmarks/tile_sweep.py` on a GPU prints what to put here. A tile is a
function of the architecture, the shapes and the variant only, never of free memory or of N: the
same inputs give the same bits.

Classes: "sm_90" has TMA and wgmma and up to 227 KiB of shared memory a block; "sm_80" stands for
every other device from 8.0 on, and stays within the 99 KiB that 8.6, 8.9 and 12.0 have.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """Blocks of the exp-GEMM and how it is compiled."""

    block_n: int
    block_v: int
    block_h: int
    block_q: int  # of the low-rank tail
    group_n: int
    num_warps: int
    num_stages: int
    unit: int = 128  # columns of a partial sum: one for all tiles, so that their sums agree in bits


# (tile class, variant) -> (H at least, Tile) in ascending order; the last row whose bound holds is
# taken. Variants: "plain", "softcap", "stats" (statistics, with or without a softcap).
TABLE: dict[tuple[str, str], tuple[tuple[int, Tile], ...]] = {
    ("sm_90", "plain"): ((0, Tile(128, 256, 64, 64, 8, 8, 3)),),
    ("sm_90", "softcap"): ((0, Tile(128, 128, 64, 64, 8, 8, 4)),),
    ("sm_90", "stats"): ((0, Tile(128, 128, 64, 64, 8, 8, 4)),),
    # pointer loads instead of TMA: rows or strides that are not 16-byte aligned
    ("sm_90-pointer", "plain"): ((0, Tile(128, 128, 64, 32, 8, 8, 3)),),
    ("sm_90-pointer", "softcap"): ((0, Tile(128, 128, 64, 32, 8, 8, 3)),),
    ("sm_90-pointer", "stats"): ((0, Tile(128, 128, 64, 32, 8, 8, 3)),),
    ("sm_80", "plain"): ((0, Tile(128, 128, 64, 32, 8, 8, 3)),),
    ("sm_80", "softcap"): ((0, Tile(128, 128, 64, 32, 8, 8, 3)),),
    ("sm_80", "stats"): ((0, Tile(64, 128, 64, 32, 8, 8, 3)),),
}

INTERPRETER = {
    "plain": Tile(16, 32, 16, 16, 2, 4, 2, 16),
    "softcap": Tile(16, 32, 16, 16, 2, 4, 2, 16),
    "stats": Tile(16, 16, 16, 16, 2, 4, 2, 16),
}

# Rows of an off-range block; it shares block_v with the main tile (they share the partial sums).
OFF_RANGE_BLOCK_N = 16


def tile_class(capability: tuple[int, int] | None, tma: bool) -> str:
    """Class of a device; None is the interpreter."""
    if capability is None:
        return "interpreter"
    if capability < (8, 0):
        raise ValueError(
            f"compute capability {capability[0]}.{capability[1]} has no bfloat16 matrix units; the "
            "Triton LM head needs 8.0 or newer. Use backend='chunked'."
        )
    if capability[0] in (9, 10):
        return "sm_90" if tma else "sm_90-pointer"
    return "sm_80"


def variant_of(softcap: bool, stats: bool) -> str:
    """The table's name of a set of features."""
    return "stats" if stats else "softcap" if softcap else "plain"


def choose_tile(name: str, variant: str, hidden_size: int) -> Tile:
    """The shipped tile of a class, variant and hidden size."""
    if name == "interpreter":
        return INTERPRETER[variant]
    rows = TABLE[name, variant]
    return [tile for least, tile in rows if hidden_size >= least][-1]
