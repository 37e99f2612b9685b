"""Autocast for ops that autocast does not know.

Hidden states and head are cast once, on the tape; inside the op autocast is off, or it would round
the float32 products of the op's own GEMMs.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dpo_fast.naive import HeadLoRA


def autocast_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: HeadLoRA | None
) -> tuple[Tensor, Tensor, Tensor | None, HeadLoRA | None]:
    """What ``torch.nn.functional.linear`` would be given under the autocast in force, if any.

    float64 tensors stay as they are, as under autocast itself.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias, lora
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    if lora is not None:
        lora = HeadLoRA(cast(lora.a), cast(lora.b), lora.scale)
    return cast(hidden), cast(weight), None if bias is None else cast(bias), lora


def no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast switched off for the device of ``tensor``."""
    return torch.autocast(tensor.device.type, enabled=False)
