"""The one table of absolute tolerances, and the three-way comparison that uses it.

`gold` is the naive twin one precision up, `eager` the naive twin in the test's dtype. Ours passes
if its error against gold is at most twice eager's, plus an atol far below the values compared.
"""

import torch
from torch import Tensor

ATOL = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-4,
    torch.bfloat16: 1e-4,
}


def error(found: Tensor, gold: Tensor) -> float:
    """Largest absolute difference, in float64."""
    if gold.numel() == 0:
        assert found.shape == gold.shape
        return 0.0
    return (found.double() - gold.double()).abs().max().item()


def assert_three_way(
    ours: Tensor, eager: Tensor, gold: Tensor, dtype: torch.dtype, what: str = "value"
) -> None:
    """``err(ours, gold) <= 2 * err(eager, gold) + atol[dtype]``; finite first, shapes equal.

    The atol is scaled by the largest gold value where that exceeds 1, and must stay below it: no
    tolerance here lets an output of zeros pass.
    """
    assert ours.shape == eager.shape == gold.shape, (what, ours.shape, eager.shape, gold.shape)
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    size = gold.abs().max().item() if gold.numel() else 0.0
    limit = 2 * error(eager, gold) + ATOL[dtype] * max(1.0, size)
    found = error(ours, gold)
    assert found <= limit, f"{what}: error {found:.3e}, limit {limit:.3e}, size {size:.3e}"


def relative_error(found: Tensor, gold: Tensor) -> float:
    """Relative L2 error, in float64."""
    gold = gold.double()
    return ((found.double() - gold).norm() / gold.norm().clamp_min(1e-300)).item()
