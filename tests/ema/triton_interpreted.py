"""Run by test_triton.py in a process of its own: the kernel in the interpreter, against torch."""

import os
import warnings
from itertools import product

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined

import torch

from tests.ema.common import (
    DTYPES,
    ROUNDINGS,
    assert_same_bits,
    shadow_of,
    weights,
)

warnings.filterwarnings("ignore", category=RuntimeWarning, message=".*encountered in.*")

SIZES = (1, 9, 4500)
OFFSETS = (3, 8, 2**40 - 4504)


def check(
    ref_dtype: torch.dtype,
    policy_dtype: torch.dtype,
    shadowed: bool,
    sizes: tuple[int, ...] = SIZES,
    skip: int = 0,
    **how: object,
) -> None:
    """The bits of the torch path, with NaNs and infinities; ``skip`` misaligns the tensors."""
    from dpo_fast.functional.ema import EmaPlan

    start = [weights(n + skip, ref_dtype, spread=6)[skip:] for n in sizes]
    policies = [weights(n + skip, policy_dtype, spread=6)[skip:] for n in sizes]
    policies[-1][:3] = torch.tensor([torch.nan, torch.inf, -0.0])
    start[-1][2:5] = torch.tensor([-0.0, torch.inf, torch.nan])
    results = []
    for backend in ("triton", "torch"):
        refs = [torch.cat((r.new_zeros(skip), r))[skip:] for r in start]
        shadow = shadow_of(refs) if shadowed else None
        plan = EmaPlan(refs, policies, shadow=shadow, offsets=OFFSETS, backend=backend)
        plan.update_(seed=2**63 + 5, step=2**35 + 1, **how)  # type: ignore[arg-type]
        results.append(refs + [s for s in shadow or [] if s is not None])
    assert_same_bits(results[0], results[1], (ref_dtype, policy_dtype, shadowed, skip, how))
    assert any(bool((a != b).any()) for a, b in zip(results[0], start, strict=False))


def main() -> None:
    bf16 = torch.bfloat16
    for ref, policy, shadowed, rounding in product(DTYPES, DTYPES, (False, True), ROUNDINGS):
        check(ref, policy, shadowed, alpha=0.01, rounding=rounding)
    for alpha, shadowed, rounding in product((0.6, 1.0), (False, True), ROUNDINGS):
        check(bf16, bf16, shadowed, alpha=alpha, rounding=rounding)
    check(bf16, bf16, False, skip=1, alpha=0.01, rounding="stochastic")
    check(torch.float32, bf16, True, skip=3, alpha=0.01, rounding="nearest")
    check(bf16, bf16, False, sizes=(3, 5, 33_000), alpha=0.01, rounding="stochastic")
    print("same bits")


if __name__ == "__main__":
    main()
