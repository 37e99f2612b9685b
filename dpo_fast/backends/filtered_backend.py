"""The Triton backend's filtered mode: gradients without the tiles of small probabilities.

Approximate, and only asked for. Log-probs and loss are exact; see
``kernels/dpo_fast_kernels/kept_tiles.py`` for what the gradients leave out.
"""

import torch
from torch import Tensor

from dpo_fast.backends.interface import LinearHead, Needs
from dpo_fast.backends.triton_backend import TritonBackend

STORED = "the filtered mode leaves out tiles of stored probabilities"


class FilteredBackend(TritonBackend):
    """``bound``: a tile that holds less of each of its rows' probability is left out."""

    name = "triton, filtered"

    def __init__(self, bound: float) -> None:
        super().__init__("triton")
        self.bound = bound

    def check(self, hidden: Tensor, head: LinearHead, needs: Needs, store: bool) -> None:
        """Refuses, by name, what the filtered mode is not built for."""
        if not any(needs):
            return
        asked = f"filter_bound={self.bound}"
        # float16 has not the range, float32 no tiles on a device; the interpreter has float32 alone
        taken = torch.bfloat16 if hidden.device.type == "cuda" else torch.float32
        if hidden.dtype != taken:
            raise ValueError(
                f"{asked} with {hidden.dtype}: {STORED}, which exist by tiles for {taken} only; "
                f"use {taken}, or filter_bound=None"
            )
        if head.lora is not None:
            raise ValueError(f"{asked} takes no adapter on the LM head; pass filter_bound=None")
        if head.shard is not None:
            raise ValueError(
                f"{asked} takes no vocabulary that is split over processes; pass filter_bound=None"
            )
        if needs.head and not store:
            size = hidden.shape[0] * self.row_bytes(head)
            raise ValueError(
                f"{asked}: {STORED}, and those of {hidden.shape[0]} rows exceed the workspace, or "
                f"mode='min-memory' is asked for; raise workspace to {size} bytes, or pass "
                "mode='store', or fewer rows, or filter_bound=None"
            )
