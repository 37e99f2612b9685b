"""The doctor's self-check: our fast ops against the naive twins, on every device and precision.

The rule is the tests' own: with *gold* the naive twin in float64 and *eager* the naive twin in the
precision that is checked, ``error(ours, gold) <= 2 * error(eager, gold) + atol``.

Legend: N scored tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dpo_fast.cli.doctor_facts import Check, device_types, dtypes_of
from dpo_fast.functional import linear_logprobs
from dpo_fast.naive import naive_ema_, naive_linear_logprobs

N, H, V = 61, 64, 1009  # primes: no tile fits
SOFTCAP = 20.0
REPORT = "please report it, with the output of `dpo-fast doctor --json`"
ATOL = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}

Measure = Callable[[str, torch.dtype], list[tuple[str, float, float]]]


def parity_checks() -> Iterator[Check]:
    """Log-probs, both gradients and the EMA, each with its error and tolerance."""
    for device in device_types():
        for name in dtypes_of(device):
            for measure in (head_errors, ema_errors):
                yield from _checks(measure, device, name)


def _checks(measure: Measure, device: str, dtype_name: str) -> Iterator[Check]:
    try:
        found = measure(device, getattr(torch, dtype_name))
    except _failures() as failure:
        what = f"{measure.__name__}, {device} {dtype_name}"
        yield Check("self-check", what, "fail", f"{type(failure).__name__}: {failure}", REPORT)
        return
    for what, error, limit in found:
        good = error <= limit  # a NaN is not
        yield Check(
            "self-check",
            f"{what}, {device} {dtype_name}",
            "ok" if good else "fail",
            f"error {error:.1e}, tolerance {limit:.1e}",
            "" if good else REPORT,
        )


def _failures() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not compile, load or run on this machine."""
    kinds: tuple[type[Exception], ...] = (ImportError, OSError, RuntimeError, ValueError)
    if find_spec("triton") is not None:
        from triton.errors import TritonError

        kinds += (TritonError,)
    return kinds


def head_errors(device: str, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """``(what, error, tolerance)`` of log-probs, dhidden and dweight, with bias and softcap."""
    make = torch.Generator().manual_seed(0)
    hidden, weight, bias, upstream = (
        torch.randn(shape, generator=make) for shape in ((N, H), (V, H), (V,), (N,))
    )
    hidden[: N // 4] = weight[: N // 4]  # confident tokens: 1 - p is small
    weight *= 0.3
    target = torch.randint(V, (N,), generator=make)
    target[: N // 4] = torch.arange(N // 4)
    inputs = [t.to(device, dtype) for t in (hidden, weight, bias)]

    def values(op: Callable[..., Any], wide: bool = False) -> list[Tensor]:
        x, w, b = (t.double() if wide else t for t in inputs)
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        logps = op(x, w, target.to(device), bias=b, softcap=SOFTCAP)
        logps.backward(upstream.to(device, logps.dtype))
        assert x.grad is not None and w.grad is not None
        return [logps.detach(), x.grad, w.grad]

    ours = values(linear_logprobs)
    eager, gold = values(naive_linear_logprobs), values(naive_linear_logprobs, wide=True)
    names = ("log-probs", "dhidden", "dweight")
    return [(names[i], *compared(ours[i], eager[i], gold[i], dtype)) for i in range(len(names))]


def ema_errors(device: str, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """The same of the moving reference's update."""
    from dpo_fast.functional import ema_

    make = torch.Generator().manual_seed(1)
    ref, policy = (torch.randn(1009, generator=make).to(device, dtype) for _ in range(2))
    ours, eager, gold = ref.clone(), ref.clone(), ref.double()
    ema_([ours], [policy], 0.6)
    naive_ema_([eager], [policy], 0.6)
    naive_ema_([gold], [policy.double()], 0.6)
    return [("EMA", *compared(ours, eager, gold, dtype))]


def compared(ours: Tensor, eager: Tensor, gold: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """``(error, tolerance)``: largest absolute difference to gold, and what is allowed."""

    def error(found: Tensor) -> float:
        return (found.double() - gold).abs().max().item()

    size = gold.abs().max().item()
    return error(ours), 2 * error(eager) + ATOL[dtype] * max(1.0, size)
