"""The LM head's weight as an engine keeps it: whole only while the head's own forward runs.

FSDP2 and ZeRO-3 gather a weight in hooks around the forward of the module that owns it. Logits are
never made, so nobody would call that forward; here the scoring function runs in its place.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


def in_head_forward(layer: nn.Module, hidden: Tensor, fn: Callable[[Tensor], T]) -> T:
    """``fn(hidden)`` as the forward of ``layer`` and of its parts that an engine hooks.

    Without an engine it is ``fn(hidden)``. Hooks may replace ``hidden`` by another view or dtype of
    it; ``fn`` gets what they hand on, which is what their part of the backward hangs on.
    """
    run = fn
    for part in [m for m in layer.modules() if _is_hooked(m)][::-1]:
        run = _as_forward_of(part, run)
    return run(hidden)


def _as_forward_of(part: nn.Module, fn: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
    def call(hidden: Tensor) -> T:
        before = part.__dict__.get("forward")
        part.__dict__["forward"] = fn
        try:
            return part(hidden)
        finally:
            if before is None:
                del part.__dict__["forward"]
            else:
                part.__dict__["forward"] = before

    return call


def _is_hooked(module: nn.Module) -> bool:
    """Whether FSDP2 shards this module as a unit, or ZeRO-3 a parameter of its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        return True
    return any(hasattr(param, "ds_id") for param in module.parameters(recurse=False))
