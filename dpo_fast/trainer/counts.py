"""How many pairs and tokens an optimizer step averages over, on all ranks: exchanged, not awaited.

Legend: P pairs, R ranks, K micro-batches of a step.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BatchCounts(NamedTuple):
    """Pairs and scored chosen tokens of the global batch that one optimizer step averages over.

    Numbers in one process. With several, scalars on the device: the sum over the ranks is queued
    there, and the host never waits for it.
    """

    num_pairs: Tensor | int
    num_chosen_tokens: Tensor | int

    def pair_weight(self, pairs: int) -> Tensor | float:
        """``1 / num_pairs``, as ``fused_linear_dpo`` takes it for a micro-batch of ``pairs``."""
        if isinstance(self.num_pairs, Tensor):
            # float64 first: the same float32 number as from a host integer
            return self.num_pairs.double().reciprocal().float().expand(pairs)
        return 1.0 / self.num_pairs


def local_counts(batches: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Pairs and scored chosen tokens of this rank's planned micro-batches."""
    pairs = tokens = 0
    for batch in batches:
        lens = batch["seq_lens"]
        pairs += len(lens) // 2
        tokens += sum(lens[: len(lens) // 2])
    return pairs, tokens


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """``[len]`` int64; the copy to a GPU leaves from pinned memory and is not waited for."""
    host = torch.tensor(list(numbers), pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
