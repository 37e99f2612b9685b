"""The shipped table: engines and tiles by (architecture, dtype, variant, class of H, class of V).

``table.json`` beside this file holds it. ``benchmarks/tile_sweep.py`` on a GPU measures and writes
the rows of that GPU's architecture, and under "measured" on what; the rows of an architecture that
is absent there are those that compile without spills, ordered by the roofline. Every tile in it is
compiled by ``python -m dpo_fast_kernels.aot``.

A row is a function of the architecture, the shapes and the variant only, never of free memory or of
N: the same inputs give the same bits. Engines do not depend on the statistics, or the log-probs of
a logging step would differ from those of the reference beside it.

Architectures: "sm_90" has TMA and wgmma and up to 227 KiB of shared memory a block, "sm_90-pointer"
is the same without TMA; "sm_80" stands for every other device from 8.0 on, and stays within the 99
KiB that 8.6, 8.9 and 12.0 have.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).with_name("table.json")
ARCHITECTURES = ("sm_90", "sm_90-pointer", "sm_80")
VARIANTS = ("plain", "softcap", "stats")  # stats: with or without a softcap


class Tile(NamedTuple):
    """Blocks of the exp-GEMM, how it is compiled and launched."""

    block_n: int
    block_v: int
    block_h: int
    block_q: int  # of the low-rank tail
    group_n: int
    num_warps: int
    num_stages: int
    unit: int = 128  # columns of a partial sum: one for all tiles, so that their sums agree in bits
    per_sm: int = 1  # programs a multiprocessor
    flatten: bool = False  # one loop over tiles and H: the next tile's loads run in the epilogue


class Row(NamedTuple):
    """An entry of the table: it holds from these sizes on, until a row of larger ones."""

    arch: str
    dtype: str
    variant: str
    hidden: int
    vocab: int
    value: Any  # a Tile, or the name of an engine

    def label(self) -> str:
        """Its key in words."""
        return f"{self.arch}, {self.dtype}, {self.variant}, H >= {self.hidden}, V >= {self.vocab}"


class Table(NamedTuple):
    """The contents of table.json."""

    engines: tuple[Row, ...]
    tiles: tuple[Row, ...]
    measured: dict[str, Any]  # architecture -> on what


INTERPRETER = {
    "plain": Tile(16, 32, 16, 16, 2, 4, 2, 16),
    "softcap": Tile(16, 32, 16, 16, 2, 4, 2, 16),
    "stats": Tile(16, 16, 16, 16, 2, 4, 2, 16),
}

# Rows of an off-range block; it shares block_v with the main tile (they share the partial sums).
OFF_RANGE_BLOCK_N = 16


@cache
def table() -> Table:
    """The shipped table, read once."""
    return parsed(json.loads(PATH.read_text()))


def parsed(content: dict[str, Any]) -> Table:
    """Rows of the file's lists."""

    def rows(name: str, value: str) -> tuple[Row, ...]:
        keys = Row._fields[:-1]
        return tuple(Row(**{k: row[k] for k in keys}, value=row[value]) for row in content[name])

    tiles = tuple(row._replace(value=Tile(*row.value)) for row in rows("tiles", "tile"))
    return Table(rows("engines", "engine"), tiles, content["measured"])


def pick(
    rows: tuple[Row, ...], arch: str, dtype: str, variant: str, hidden: int, vocab: int
) -> Row:
    """The row that holds for these sizes: of the largest H class, then of the largest V class."""
    fits = [
        row
        for row in rows
        if row[:3] == (arch, dtype, variant) and row.hidden <= hidden and row.vocab <= vocab
    ]
    return max(fits, key=lambda row: (row.hidden, row.vocab))


def architecture(capability: tuple[int, int] | None, tma: bool) -> str:
    """The table's name of a device; None is the interpreter."""
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


def choose_tile(arch: str, variant: str, hidden: int, vocab: int) -> Tile:
    """The shipped tile of the exp-GEMM, for 16-bit inputs."""
    if arch == "interpreter":
        return INTERPRETER[variant]
    tile: Tile = pick(table().tiles, arch, "bfloat16", variant, hidden, vocab).value
    return tile
