"""The Triton backend's filtered mode: gradients without the tiles of small probabilities.

Approximate, and only asked for. Log-probs and loss are exact; see
``kernels/dpo_fast_kernels/kept_tiles.py`` for what the gradients leave out.
"""

from typing import Any

import torch
from torch import Tensor

from dpo_fast.backends.interface import HeadForward, LinearHead, Needs
from dpo_fast.backends.triton_backend import TritonBackend

STORED = "the filtered mode leaves out tiles of stored probabilities"


class FilteredBackend(TritonBackend):
    """``bound``: a tile that holds less of each of its rows' probability is left out."""

    name = "triton, filtered"

    def __init__(self, bound: float) -> None:
        super().__init__("triton")
        self.bound = bound

    def forward(
        self,
        hidden: Tensor,
        head: LinearHead,
        target: Tensor,
        *,
        needs: Needs,
        outputs: tuple[str, ...],
        store: bool,
        buffer: Tensor | None = None,
        spare: int = 0,
    ) -> HeadForward:
        if any(needs):
            check(hidden, head, needs, store, self)
        options: Any = {"store": store, "buffer": buffer, "spare": spare}
        return super().forward(hidden, head, target, needs=needs, outputs=outputs, **options)


def check(
    hidden: Tensor, head: LinearHead, needs: Needs, store: bool, backend: FilteredBackend
) -> None:
    """Refuses, by name, what the filtered mode is not built for."""
    asked = f"filter_bound={backend.bound}"
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
        size = hidden.shape[0] * backend.row_bytes(head)
        raise ValueError(
            f"{asked}: {STORED}, and those of {hidden.shape[0]} rows exceed the workspace, or "
            f"mode='min-memory' is asked for; raise workspace to {size} bytes, or pass "
            "mode='store', or fewer rows, or filter_bound=None"
        )
