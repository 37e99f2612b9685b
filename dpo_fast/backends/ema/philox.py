"""Philox4x32-7 in torch: the random bits of stochastic rounding, as in ``csrc/philox.h``.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments
_ROUNDS = 7
PER_COUNTER = 32  # elements


def philox_words(groups: Tensor, seed: int, step: int) -> Tensor:
    """The four words of each counter: ``[G]`` int64 -> ``[G, 4]`` int64 in [0, 2**32).

    Products of two 32-bit words wrap around in int64; the masks read the right bits all the same.
    """
    c0, c1 = groups & _MASK, (groups >> 32) & _MASK
    c2, c3 = torch.full_like(c0, step & _MASK), torch.full_like(c0, step >> 32)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _M0, c2 * _M1
        c0 = ((product1 >> 32) & _MASK) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=1)


def counter_halves(words: Tensor) -> Tensor:
    """The values of the 32 elements of each counter: ``[G, 4]`` -> ``[G, 32]``, in [0, 2**16).

    Four octets: the counter's own eight halves, then each of them XOR the one 1, 2 and 3 further
    on. No two of the 32 are the same sum of halves, so any two are independent.
    """
    own = torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten(1)
    return torch.cat([own, *(own ^ own.roll(-by, dims=1) for by in (1, 2, 3))], dim=1)


def random16(position: int, count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """16 random bits of each element at ``position + arange(count)``: ``[count]`` int32."""
    first, last = position // PER_COUNTER, (position + count - 1) // PER_COUNTER
    words = philox_words(torch.arange(first, last + 1, device=device), seed, step)
    phase = position % PER_COUNTER
    return counter_halves(words).to(torch.int32).flatten()[phase : phase + count]
