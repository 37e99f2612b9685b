"""What the kernels multiply, and how a problem is launched.

Legend: N rows, H hidden, V vocabulary (of this shard), r rank of the head's adapter, Q columns of
the low-rank tail (see ``low_rank_tail``).
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast_kernels.products import product
from dpo_fast_kernels.tiles import Tile, architecture, choose_tile, variant_of

PROGRAMS_INTERPRETED = 3  # enough to run every persistent loop more than once


class Operands(NamedTuple):
    """``z = scale * cap(x w^T + tail_x tail_w^T)``; the tail holds the adapter and the bias."""

    x: Tensor  # [N, H]
    w: Tensor  # [V, H]
    tail_x: Tensor | None  # [N, Q]
    tail_w: Tensor | None  # [V, Q]
    softcap: float | None
    scale: float

    def rows(self, start: int, stop: int) -> "Operands":
        """Some of the rows, as views."""
        tail = None if self.tail_x is None else self.tail_x[start:stop]
        return self._replace(x=self.x[start:stop], tail_x=tail)

    def columns(self, start: int, stop: int) -> "Operands":
        """Some of the vocabulary, as views."""
        return self._replace(
            w=self.w[start:stop],
            tail_w=None if self.tail_w is None else self.tail_w[start:stop],
        )


class Launch(NamedTuple):
    """Tile and grid of a problem; the same for every call with the same shapes and variant."""

    tile: Tile
    tma: bool
    programs: int  # of the persistent kernels


@cache
def device_facts(index: int) -> tuple[tuple[int, int], int]:
    """(compute capability, multiprocessors) of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def capability_of(x: Tensor) -> tuple[int, int] | None:
    """Compute capability of the tensor's device; None: the kernels are interpreted."""
    return device_facts(x.device.index)[0] if x.device.type == "cuda" else None


def num_programs(x: Tensor) -> int:
    """Programs of a persistent kernel: one a multiprocessor."""
    return device_facts(x.device.index)[1] if x.device.type == "cuda" else PROGRAMS_INTERPRETED


def uses_tma(operands: Operands) -> bool:
    """Whether the tensor copy engine exists and can load the operands."""
    capability = capability_of(operands.x)
    engine = capability is None or capability[0] in (9, 10)
    return engine and aligned(operands.x) and aligned(operands.w)


def architecture_of(operands: Operands) -> str:
    """The table's name of the device, for these operands."""
    return architecture(capability_of(operands.x), uses_tma(operands))


def plan_launch(operands: Operands, stats: bool, widest: int | None = None) -> Launch:
    """Tile and grid. ``stats``: the tile of the statistics variant, also where none are taken.

    ``widest``: rows of the longest shard of a split vocabulary.
    """
    vocab, hidden = operands.w.shape
    vocab = vocab if widest is None else widest
    variant = variant_of(operands.softcap is not None, stats)
    tile = choose_tile(architecture_of(operands), variant, hidden, vocab)
    return Launch(tile, uses_tma(operands), num_programs(operands.x))


def new_columns(count: int, rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """``count`` unwritten float32 vectors ``[rows]``, each on a 16-byte border whatever ``rows``:
    for another alignment Triton would compile every kernel anew.
    """
    whole = torch.empty(count, -(-rows // 4) * 4, dtype=torch.float32, device=device)
    return whole[:, :rows].unbind(0)


def aligned(matrix: Tensor) -> bool:
    """Whether TMA can load the matrix: unit stride within rows, rows on 16-byte borders."""
    size = matrix.element_size()
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) * size % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and matrix.numel() > 0
    )


def low_rank_tail(
    x: Tensor,  # [N, H]
    dtype: torch.dtype,
    lora: tuple[Tensor, Tensor, float] | None,  # a [r, H], b [V, r], scale
    bias: Tensor | None,  # [V]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(tail_x [N, Q], tail_w [V, Q], low [N, r])``: adapter and bias as columns beside x and w.

    ``tail_x tail_w^T = s x a^T b^T + bias`` and ``low = s x a^T`` in float32. 16-bit operands would
    round low to 8 bits, visible in the log-probs: it is split into two parts (and b, if it is wider
    than ``dtype``, too), which the matrix units multiply exactly; the bias is split into three,
    beside ones.
    """
    lefts, rights, low = [], [], None
    if lora is not None:
        a, b, scale = lora
        low = product(x, a.T) * scale
        high, *rest = _parts(low, dtype, 2)
        b_parts = _parts(b.float(), dtype, 1 if b.dtype == dtype else 2)
        lefts = [high, *rest] + [high] * (len(b_parts) - 1)
        rights = [b_parts[0]] * (1 + len(rest)) + b_parts[1:]
    if bias is not None:
        columns = _parts(bias.float(), dtype, 3)
        lefts.append(torch.ones(x.shape[0], len(columns), dtype=dtype, device=x.device))
        rights.append(torch.stack(columns, 1))
    return _concatenate(lefts), _concatenate(rights), low


def _parts(values: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Float32 ``values`` as a sum of ``count`` tensors of ``dtype``; one if that is float32."""
    parts = []
    for _ in range(1 if dtype == torch.float32 else count):
        part = values.to(dtype)
        parts.append(part)
        values = torch.where(torch.isfinite(part), values - part.float(), 0.0)
    return parts


def _concatenate(parts: list[Tensor]) -> Tensor:
    rank = sum(part.shape[1] for part in parts)
    width = -(-max(rank, 1) // 16) * 16
    out = parts[0].new_zeros(parts[0].shape[0], width)
    out[:, :rank] = torch.cat(parts, 1)
    return out


def make_operands(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None,
    softcap: float | None,
    scale: float,
) -> tuple[Operands, Tensor | None]:
    """Operands and, with an adapter, ``s x a^T`` in float32."""
    if lora is None and bias is None:
        return Operands(x, w, None, None, softcap, scale), None
    tail_x, tail_w, low = low_rank_tail(x, w.dtype, lora, bias)
    return Operands(x, w, tail_x, tail_w, softcap, scale), low
