"""The EMA's Triton kernel behind the backends' interface."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.ema.table import CHUNK, Blend, Draw, Entry, Table
from dpo_fast_kernels.ema import ema, variant_code


class Prepared(NamedTuple):
    """The table on the device, and which specialisations of the kernel it needs."""

    table: Table
    variants: Tensor  # [tensors] int32
    variant_mask: int


class TritonEma:
    """One launch; the first one of a kind of tensors compiles."""

    name = "triton"

    def prepare(self, entries: Sequence[Entry], device: torch.device) -> Prepared:
        table = Table.build(entries)
        codes = [variant_code(row) for row in table.rows.tolist()]
        mask = sum(1 << code for code in set(codes))
        variants = torch.tensor(codes, dtype=torch.int32, device=device)
        return Prepared(table.to(device), variants, mask)

    def run(self, prepared: Prepared, blend: Blend, draw: Draw | None) -> None:
        table, variants, mask = prepared
        if variants.is_cuda:
            stream = torch.cuda.current_stream(variants.device)
            for tensor in (*table, variants):
                tensor.record_stream(stream)
        ema(
            table.rows,
            table.chunk_rows,
            variants,
            mask,
            CHUNK,
            weight=blend.weight,
            from_policy=blend.from_policy,
            copy=blend.copy,
            draw=draw,
        )
