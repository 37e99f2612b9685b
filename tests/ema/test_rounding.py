"""Rounding to 16 bits: to nearest as torch casts, stochastically with the right probabilities."""

import pytest
import torch

from dpo_fast.functional.ema import EmaPlan
from tests.ema.common import HALF, IMPLEMENTATIONS, assert_same_bits, make_plan


def hard_cases(dtype: torch.dtype) -> torch.Tensor:
    """Ties, their neighbours, subnormals, the ends of the range, and random float32 values."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[values.isfinite()].float().sort().values
    middles = (values[1:].double() + values[:-1].double()).div(2).float()
    infinity = torch.full_like(middles, torch.inf)
    around = [torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)]
    return torch.cat((values, middles, *around, torch.randn(1000) * 1e-6, torch.randn(1000) * 1e4))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_nearest_is_torch_s_cast(implementation: str, dtype: torch.dtype) -> None:
    policy = hard_cases(dtype)
    ref = torch.zeros(policy.shape, dtype=dtype)
    make_plan(implementation, [ref], [policy]).update_(1.0)
    assert_same_bits([ref + 0], [policy.to(dtype) + 0])  # + 0: either zero will do


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stochastic_stays_between_the_neighbours(dtype: torch.dtype) -> None:
    policy = hard_cases(dtype)
    policy = policy[policy.abs() <= torch.finfo(dtype).max]
    lower, upper = policy.to(dtype).float(), policy.to(dtype).float()
    grid = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    grid = grid[grid.isfinite()].sort().values
    lower = grid[torch.searchsorted(grid, policy, right=True) - 1]
    upper = grid[torch.searchsorted(grid, policy).clamp(max=grid.numel() - 1)]
    for step in range(8):
        ref = torch.zeros(policy.shape, dtype=dtype)
        EmaPlan([ref], [policy]).update_(1.0, rounding="stochastic", step=step)
        inside = (ref.float() == lower) | (ref.float() == upper)
        assert bool(inside.all()), policy[~inside][:5]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stochastic_is_right_on_average(dtype: torch.dtype, sign: float) -> None:
    """Normal numbers, subnormal ones and the border between them; 4 standard errors."""
    n = 2**17
    tiny = torch.finfo(dtype).smallest_normal
    eps = torch.finfo(dtype).eps
    cases = [1 + eps * 0.3, 1.999 + eps * 0.6, 2 - eps * 0.4, 3 * tiny * (1 + 0.29 * eps)]
    if dtype == torch.float16:
        cases += [tiny * eps * 0.125, tiny * eps * 5.75, tiny * (1 - 0.25 * eps)]
    for value in cases:
        policy = torch.full((n,), sign * value, dtype=torch.float32)
        ref = torch.zeros(n, dtype=dtype)
        EmaPlan([ref], [policy]).update_(1.0, rounding="stochastic", seed=11)
        error = ref.double() - policy.double()
        spacing = ref.double().unique()
        assert spacing.numel() == 2, (value, spacing)
        resolution = float(spacing.diff().abs()) * 2.0**-13  # of float16's 13 random bits
        assert abs(error.mean()) < 4 * error.std() / n**0.5 + resolution, value
