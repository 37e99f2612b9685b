"""What an EMA backend is handed: the tensors as a table of addresses, the blend, the random bits.

The table's layout is that of ``csrc/ema.h``; the Triton kernel reads the same rows.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # dtypes of the native kernels
CHUNK = 32768  # elements a block or a thread takes at once; a multiple of 8


class Entry(NamedTuple):
    """One tensor of the model: checked, detached, not empty."""

    ref: Tensor
    policy: Tensor
    shadow: Tensor | None  # fp32, the shape of ref
    position: int  # global position of element 0

    @property
    def native(self) -> bool:
        """True if the compiled and Triton kernels take it; torch takes every entry."""
        tensors = (self.ref, self.policy) + (() if self.shadow is None else (self.shadow,))
        return all(t.dtype in CODES and t.is_contiguous() for t in tensors)


class Blend(NamedTuple):
    """``base - weight * (base - other)``: base is the policy if from_policy, else the reference."""

    weight: float  # rounded to float32
    exact_weight: float  # for float64 tensors
    from_policy: bool
    copy: bool  # alpha = 1: the policy itself


class Draw(NamedTuple):
    """Where the random bits of stochastic rounding come from."""

    seed: int  # unsigned 64 bits
    step: int  # unsigned 64 bits


class EmaBackend(Protocol):
    """Runs the EMA of entries that all live on one device."""

    name: str

    def prepare(self, entries: Sequence[Entry], device: torch.device) -> Any:
        """What is built once and reused by every run."""
        ...

    def run(self, prepared: Any, blend: Blend, draw: Draw | None) -> None:
        """Update the references (and shadows) in place; stochastic rounding if draw is given."""
        ...


def blend_of(alpha: float) -> Blend:
    """The form of torch.lerp that alpha takes."""
    from_policy = alpha >= 0.5
    weight = 1.0 - alpha if from_policy else alpha
    single = torch.tensor(weight, dtype=torch.float64).to(torch.float32).item()
    return Blend(single, weight, from_policy, alpha == 1.0)


class Table(NamedTuple):
    """Addresses and sizes of all tensors, and the chunks they are cut into."""

    rows: Tensor  # [tensors, 8] int64: three addresses, numel, position, first chunk, two dtypes
    chunk_rows: Tensor  # [chunks] int32: the row each chunk belongs to

    @classmethod
    def build(cls, entries: Sequence[Entry]) -> "Table":
        """The table in host memory, for contiguous entries of the native dtypes."""
        rows = []
        num_chunks = [-(-entry.ref.numel() // CHUNK) for entry in entries]
        first_chunks = accumulate(num_chunks, initial=0)
        for (ref, policy, shadow, position), first_chunk in zip(
            entries, first_chunks, strict=False
        ):
            addresses = [
                ref.data_ptr(),
                policy.data_ptr(),
                shadow.data_ptr() if shadow is not None else 0,
            ]
            dtypes = [CODES[ref.dtype], CODES[policy.dtype]]
            rows.append([*addresses, ref.numel(), position, first_chunk, *dtypes])
        counts = torch.tensor(num_chunks, dtype=torch.int64)
        chunk_rows = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(counts)
        return cls(torch.tensor(rows, dtype=torch.int64), chunk_rows)

    def to(self, device: torch.device) -> "Table":
        return Table(self.rows.to(device), self.chunk_rows.to(device))

    def arguments(self) -> tuple[int, int, int, int, int]:
        """What the compiled entry points take first."""
        rows, chunks = self
        return rows.data_ptr(), rows.shape[0], chunks.data_ptr(), chunks.shape[0], CHUNK
