"""Which engine a call runs: by name, by dtype, or from the shipped table; said once in the log.

"triton" writes E in the GEMM's epilogue, "cublas" passes over float32 logits (engine.py).
"""

import logging
from functools import cache

import torch

from dpo_fast_kernels.operands import Operands, architecture_of
from dpo_fast_kernels.tiles import choose_tile, pick, table, variant_of

logger = logging.getLogger("dpo_fast")

ENGINES = ("triton", "cublas")
BY_DTYPE = {
    torch.float32: "float32 products are IEEE's",
    torch.float16: "float16's range needs the row's true maximum",
}


def engine_name(name: str | None, dtype: torch.dtype) -> str:
    """The engine as far as a dtype tells; bfloat16 may become "cublas" by the table."""
    if name is None:
        return "cublas" if dtype in BY_DTYPE else "triton"
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is unknown; use 'triton', 'cublas' or None")
    return name


def stored_dtype(name: str | None, dtype: torch.dtype) -> torch.dtype:
    """Dtype of E for a weight's dtype: the weight's, but never float16 from the exp-GEMM."""
    triton_half = engine_name(name, dtype) == "triton" and dtype == torch.float16
    return torch.bfloat16 if triton_half else dtype


def decide(name: str | None, operands: Operands, widest: int | None = None) -> str:
    """The engine of a call, from its shapes and its device alone.

    ``widest``: rows of the longest shard where the vocabulary is split: all ranks decide alike.
    """
    vocab, hidden = operands.w.shape
    vocab = vocab if widest is None else widest
    capped = operands.softcap is not None
    return _decide(name, operands.w.dtype, architecture_of(operands), capped, hidden, vocab)


@cache
def _decide(
    name: str | None, dtype: torch.dtype, arch: str, capped: bool, hidden: int, vocab: int
) -> str:
    engine, why = engine_name(name, dtype), "asked for by name"
    if name is None and dtype in BY_DTYPE:
        why = BY_DTYPE[dtype]
    elif name is None and arch == "interpreter":
        why = "interpreted"
    elif name is None:
        row = pick(table().engines, arch, "bfloat16", variant_of(capped, False), hidden, vocab)
        on = table().measured.get(arch)
        engine, why = row.value, f"{row.label()}; measured on {on}" if on else row.label()
        why += "" if on else "; nothing measured yet on this architecture"
    if engine == "triton" and dtype == torch.float32 and arch != "interpreter":
        raise ValueError(
            "engine='triton' multiplies 16-bit operands and the weight is float32; use 'cublas'"
        )
    details = ""
    if engine == "triton":
        tile = choose_tile(arch, variant_of(capped, False), hidden, vocab)
        details = f", tile {tile.block_n}x{tile.block_v}x{tile.block_h}"
        details += f" with {tile.num_warps} warps and {tile.num_stages} stages"
    logger.info(
        "LM head kernels on %s, %s, H=%d, V=%d: engine %r%s (%s)",
        arch, dtype, hidden, vocab, engine, details, why,
    )  # fmt: skip
    return engine


def forget() -> None:
    """The next call decides, and logs, anew."""
    _decide.cache_clear()
