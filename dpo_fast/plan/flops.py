"""Floating point operations of the operations that cost time: matrix products and attention."""

import math
from functools import cache
from typing import Any

import torch


@cache
def _formulas() -> dict[Any, Any]:
    from torch.utils.flop_counter import flop_registry

    return dict(flop_registry)


def count_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Operations of one call, multiplications and additions apart; 0 for what is no product."""
    packet = func._overloadpacket
    name = packet.__name__
    if "flash_attention_for_cpu" in name:
        return _attention(args, kwargs, backward="backward" in name)
    formula = _formulas().get(packet)
    if formula is None:
        return 0
    return int(formula(*args, **kwargs, out_val=out))


def _attention(args: Any, kwargs: Any, *, backward: bool) -> int:
    """Two products forward and five backward; half of each where the mask is causal."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    query, key = (tensors[1], tensors[2]) if backward else (tensors[0], tensors[1])
    booleans = [a for a in (*args, *kwargs.values()) if isinstance(a, bool)]
    batch, heads, length, width = query.shape
    full = 2 * batch * heads * length * key.shape[2] * width
    return math.ceil((5 if backward else 2) * full * (0.5 if any(booleans) else 1.0))
