"""What the EMA's tests share: raw bits, every implementation that runs on a CPU, random weights."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_fast.backends.ema.compiled import CompiledEma, extension
from dpo_fast.functional.ema import EmaPlan, Rounding, make_shadow

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
ISAS = ("avx512", "avx2", "scalar")
IMPLEMENTATIONS = (*ISAS, "torch")
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")


def bits(tensor: Tensor) -> Tensor:
    """The storage of a floating tensor as integers."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(kinds[tensor.element_size()])


def assert_same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor], about: object = "") -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        different = bits(a) != bits(b)
        if bool(different.any()):
            at = int(different.flatten().nonzero()[0])
            pair = a.flatten()[at].item(), b.flatten()[at].item()
            raise AssertionError(
                f"{about}: tensor {i}, {int(different.sum())} differ, {at}: {pair}"
            )


def require(implementation: str) -> None:
    """Skip, by name, what this machine cannot run."""
    if implementation == "torch":
        return
    module = extension()
    if isinstance(module, str):
        pytest.skip(f"{implementation}: {module}")
    if implementation not in module.ema_isas():
        pytest.skip(f"{implementation}: this processor does not have it")


def make_plan(implementation: str, *args: Any, **kwargs: Any) -> EmaPlan:
    """An EmaPlan run by one implementation: an instruction set of the compiled code, or torch."""
    require(implementation)
    if implementation == "torch":
        return EmaPlan(*args, backend="torch", **kwargs)
    plan = EmaPlan(*args, backend="compiled", **kwargs)
    backend = CompiledEma(implementation)
    plan._groups = [group._replace(backend=backend) for group in plan._groups]
    return plan


def weights(numel: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    """Weights whose magnitudes spread over ``spread`` e-foldings."""
    return (torch.randn(numel) * torch.exp(spread * torch.randn(numel))).to(dtype)


def shadow_of(refs: Sequence[Tensor]) -> list[Tensor | None]:
    """Masters a little off their references, so that a shadow that is ignored shows."""
    return [None if s is None else s.mul_(1 + 1e-4) for s in make_shadow(refs)]


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of a 16-bit type around float64 values in its normal range."""
    mantissa_bits = {torch.bfloat16: 7, torch.float16: 10}[dtype]
    return torch.exp2(value.abs().log2().floor() - mantissa_bits)
