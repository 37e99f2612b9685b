"""Float32 to 16 bits in integer arithmetic: the torch twin of ``narrow`` in ``csrc/ema_math.h``."""

import torch
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_MAX_BF16 = 0x7F7F0000  # float32 bits of the largest finite bfloat16
_MAX_F16 = 0x477FE000  # of 65504
_INF_F16 = 0x477FF000  # of 65520: from here on the nearest float16 is infinity
_MIN_NORMAL_F16 = 0x38800000  # of 2**-14
_REBIAS_F16 = (127 - 15) << 10


def _narrow_bf16(bits: Tensor, random: Tensor | None) -> Tensor:
    magnitude = bits & _MAGNITUDE
    addend = 0x7FFF + ((bits >> 16) & 1)
    if random is not None:
        addend = torch.where(magnitude <= _MAX_BF16, random, addend)
    rounded = (bits + addend) >> 16
    return torch.where(magnitude > _INFINITY, (bits >> 16) | 0x40, rounded)


def _narrow_f16(bits: Tensor, random: Tensor | None) -> Tensor:
    magnitude = bits & _MAGNITUDE
    value = magnitude.view(torch.float32)
    if random is None:
        normal = magnitude + 0xFFF + ((magnitude >> 13) & 1)
        small = (value + 0.5).view(torch.int32) - 0x3F000000  # units of 2**-24
    else:
        normal = magnitude + (random >> 3)
        in_range = torch.where(magnitude < _MIN_NORMAL_F16, value, 0.0)
        small = ((in_range * 2.0**40).to(torch.int32) + random) >> 16
    out = torch.where(magnitude < _MIN_NORMAL_F16, small, (normal >> 13) - _REBIAS_F16)
    out = torch.where(magnitude > _MAX_F16, 0x7BFF + (magnitude >= _INF_F16).to(torch.int32), out)
    out = torch.where(magnitude > _INFINITY, 0x7E00 | ((magnitude >> 13) & 0x3FF), out)
    return out - ((bits >> 16) & 0x8000)  # the sign, in the range of int16


def narrow(value: Tensor, dtype: torch.dtype, random: Tensor | None) -> Tensor:
    """The bits, int16, of float32 values rounded to ``dtype``.

    Args:
        value: float32.
        dtype: torch.bfloat16 or torch.float16.
        random: int32 in [0, 2**16), the shape of value: rounded stochastically. None: to nearest.
    """
    bits = value.view(torch.int32)
    out = (_narrow_bf16 if dtype == torch.bfloat16 else _narrow_f16)(bits, random)
    return out.to(torch.int16)
