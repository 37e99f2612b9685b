"""The exponential moving average of a reference model's weights (TR-DPO), in place, fused, exact.

One definition of the value, so that C++ (any instruction set), CUDA, Triton and torch give the same
bits:

    r, p    reference (its shadow where there is one) and policy, in float32
    value = r - alpha * (r - p)          for alpha < 0.5; each operation rounded on its own,
            p - (1 - alpha) * (p - r)    from 0.5 on;     alpha or 1 - alpha rounded to float32
            p                            at alpha = 1;    alpha = 0 touches nothing

These are torch.lerp's two forms, with the difference taken from the base, so that equal weights
stay as they are to the last bit, the sign of a zero included. Where the value is not a number, a
reference equal to the policy (the same infinity) or NaN like it stays unchanged, and any other
becomes the canonical NaN. Where either side is float64, the same is computed in float64.

Rounding to 16 bits: "nearest" rounds half to even. "stochastic" rounds a value between two
neighbours up with the probability of its distance from the lower one, in units of 2**-16 of their
distance (2**-13 for float16 above 2**-14): right on average, and a value that the type holds stays.
In bits: bf16 is ``(float32 bits + random) >> 16``; float16 adds ``random >> 3`` below its last
place, or, where it is subnormal, ``random`` to the magnitude in units of 2**-40. Values beyond the
largest finite number round to nearest. References of float32 and float64 take no part.

Random bits of the element at global position i (its tensor's offset plus its index in it):

    words = philox4x32_7(counter=(lo32(i >> 5), hi32(i >> 5), lo32(step), hi32(step)),
                          key=(lo32(seed), hi32(seed)))
    half(k) = (words[k >> 1] >> (16 * (k & 1))) & 0xFFFF,    k = i & 7,    s = (i >> 3) & 3
    random = half(k) if s == 0 else half(k) ^ half((k + s) & 7)

each uniform and any two of them independent (three need not be: the 32 values of a counter are
sums of its eight halves), so that means, and variances of sums, are those of independent bits. They
depend on seed, step and position, and not on sharding, device, backend or thread count.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dpo_fast.functional.ema_checks import Tensors, check_tensor, named
from dpo_fast.functional.ema_plan import EmaPlan, Rounding, ema_offsets
from dpo_fast.functional.ema_shards import is_zero3, local_of

__all__ = ["EmaPlan", "Rounding", "ema_", "ema_offsets", "make_shadow"]


def ema_(
    refs: Tensors,
    policies: Tensors,
    alpha: float,
    *,
    rounding: Rounding = "nearest",
    shadow: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    step: int = 0,
    offsets: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """``ref = alpha * policy + (1 - alpha) * ref`` of all tensors, in place; one launch a device.

    The same in three lines of PyTorch, in float32 and rounded once:

        for ref, policy in zip(refs, policies):
            ref.copy_(ref.float().lerp(policy.float(), alpha))

    Args:
        refs, policies, shadow, offsets, backend: see :class:`EmaPlan`.
        alpha: in [0, 1]; 1 copies the policy, 0 does nothing.
        rounding: how 16-bit references are rounded. ``"nearest"`` loses every step smaller than
            half of the gap to the next representable weight, so that a bf16 reference stands still
            at a small alpha; ``"stochastic"`` is right on average and needs no memory; ``shadow=``
            is exact and costs four bytes a parameter.
        seed, step: of stochastic rounding; pass the number of the synchronisation as step.

    Where policy and reference are equal, every bit of the reference stays, in all modes. Nothing is
    recorded for autograd; the version counters of references and shadows are raised.

    Memory moved a parameter, bf16 reference and policy: 6 bytes; 12 with a shadow.

    For repeated updates of the same tensors build an :class:`EmaPlan` once.

    Source: TR-DPO, arXiv 2404.09656 (soft update; alpha = 1 is the hard one).
    """
    plan = EmaPlan(refs, policies, shadow=shadow, offsets=offsets, backend=backend)
    plan.update_(alpha, rounding=rounding, seed=seed, step=step)


def make_shadow(refs: Iterable[Tensor], *, pinned: bool = False) -> list[Tensor | None]:
    """Float32 masters of 16-bit references, None for the others.

    Args:
        refs: the references, as they are before the first update. The master of a DTensor is a
            DTensor, that of a ZeRO-3 parameter its partition.
        pinned: keep the masters in pinned host memory instead of on the references' device; of a
            DTensor then its shard as a plain tensor.
    """
    masters: list[Tensor | None] = []
    for ref, name in zip(*named(list(refs), "refs"), strict=True):
        local = local_of(ref)
        check_tensor(local, name)
        if local.dtype in (torch.float32, torch.float64):
            masters.append(None)
        elif pinned:
            masters.append(local.detach().to("cpu", torch.float32).pin_memory())
        else:
            source = local if is_zero3(ref) else ref
            masters.append(source.detach().to(torch.float32))
    return masters
