"""The types of a call of the LM head, shared by its forward and its backwards.

Legend: N rows, H hidden, V vocabulary (of this shard), r rank of the head's adapter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast_kernels.engine import Engine, choose_engine
from dpo_fast_kernels.operands import Operands, make_operands
from dpo_fast_kernels.products import product
from dpo_fast_kernels.scoring import Scored

Lora = tuple[Tensor, Tensor, float]  # a [r, H], b [V, r], scale


class Scaled(NamedTuple):
    """Rows times ``v = -c scale / S``: the right sides of dW and dB."""

    xs: Tensor | None  # [N, H]
    low: Tensor | None  # [N, r]
    v: Tensor  # [N] float32
    unit: Tensor | None  # [1] power of two that xs carries (float16 only)
    low_unit: Tensor | None  # [1] the same for low
    dtype: torch.dtype  # of dX and dW


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_a: bool = False
    lora_b: bool = False

    @property
    def head(self) -> bool:
        """The gradients that read E together with c."""
        return self.weight or self.bias or self.lora_b

    @property
    def rows(self) -> bool:
        """The gradients that need E W or E B, which hold no c."""
        return self.hidden or self.lora_a


class Held(NamedTuple):
    """What the forward leaves for the backward. Tensors that are not needed are None."""

    scored: Scored
    e: Tensor | None = None  # [N, V]
    g: Tensor | None = None  # [N, H] float32: dX without its row factor
    eb: Tensor | None = None  # [N, r] float32: E B, the same for the adapter
    mask: Tensor | None = None  # [B, U] int8: tiles of E that the filtered mode keeps


class Gradients(NamedTuple):
    """Float32 sums, or the input's dtype where that saves a copy; None where not asked for."""

    hidden: Tensor | None = None  # [N, H]
    weight: Tensor | None = None  # [V, H]
    bias: Tensor | None = None  # [V]
    lora_a: Tensor | None = None  # [r, H]
    lora_b: Tensor | None = None  # [V, r]


class Problem(NamedTuple):
    """The tensors of a call, and the engine that runs it."""

    operands: Operands
    low: Tensor | None  # [N, r] float32: s x a^T
    lora: Lora | None
    engine: Engine | None  # None: nothing is computed again


def padded(vocab: int) -> int:
    """Row stride of E: rows on 128-byte borders at 2 bytes an element."""
    return -(-vocab // 64) * 64


def new_e(rows: int, vocab: int, dtype: torch.dtype, like: Tensor, buffer: Tensor | None) -> Tensor:
    """``[rows, vocab]`` with padded rows, in ``buffer`` (uint8) where there is one."""
    stride = padded(vocab)
    if buffer is None:
        flat = torch.empty(rows * stride, dtype=dtype, device=like.device)
    else:
        flat = buffer[: rows * stride * dtype.itemsize].view(dtype)
    return flat.view(rows, stride)[:, :vocab]


def make_problem(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,
    lora: Lora | None,
    softcap: float | None,
    scale: float,
    *,
    stats: bool = False,
    engine: str | None = None,
    e_dtype: torch.dtype | None = None,
    widest: int | None = None,
) -> Problem:
    """Operands of a call and the engine for them (``choose_engine``)."""
    operands, low = make_operands(hidden, weight, bias, lora, softcap, scale)
    return Problem(operands, low, lora, choose_engine(engine, operands, stats, e_dtype, widest))


def stored_problem(
    hidden: Tensor,
    weight: Tensor,  # [V, H]: only its shape and dtype are used
    lora: Lora | None,
    scale: float,
    *,
    low: bool,
) -> Problem:
    """The problem of a backward that computes nothing again: it reads neither weight nor bias.

    ``low``: s x a^T is needed (for dB).
    """
    operands = Operands(hidden, weight, None, None, None, scale)
    found = None
    if low and lora is not None:
        found = product(hidden, lora[0].T) * lora[2]
    return Problem(operands, found, lora, None)
