"""Bins, groups and orders: who goes where, and that nobody is lost."""

import math

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from dpo_fast.layouts import TokenBalancedSampler
from dpo_fast.layouts.packing import balanced_groups, first_fit_decreasing


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_bins_hold_everything_once_within_capacity(weights, capacity):
    bins = first_fit_decreasing(weights, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(weights)))
    for b in bins:
        assert b == sorted(b)
        assert sum(weights[i] for i in b) <= capacity or len(b) == 1
    assert [b[0] for b in bins] == sorted(b[0] for b in bins)
    light = [w for w in weights if w <= capacity]
    heavy = len(weights) - len(light)
    fewest = math.ceil(sum(light) / capacity)
    # any two bins of first fit hold more than one capacity together
    assert len(bins) - heavy <= max(2 * fewest, 1)


def test_first_fit_decreasing_by_hand():
    assert first_fit_decreasing([2, 6, 4, 7, 1], 10) == [[0, 3, 4], [1, 2]]
    assert first_fit_decreasing([11, 3], 10) == [[0], [1]]
    assert first_fit_decreasing([], 10) == []
    with pytest.raises(ValueError, match="capacity=0"):
        first_fit_decreasing([1], 0)


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**31))
def test_groups_are_equal_in_number_and_close_in_weight(num_groups, size, seed):
    weights = np.random.default_rng(seed).integers(1, 100, num_groups * size).tolist()
    groups = balanced_groups(weights, num_groups)
    assert sorted(i for g in groups for i in g) == list(range(len(weights)))
    assert {len(g) for g in groups} == {size}
    loads = [sum(weights[i] for i in g) for g in groups]
    straight = [sum(weights[g * size : (g + 1) * size]) for g in range(num_groups)]
    if num_groups > 1 and size > 1:
        assert max(loads) - min(loads) <= max(max(straight) - min(straight), max(weights))
    with pytest.raises(ValueError, match="do not divide"):
        balanced_groups([1, 2, 3], 2)


def order(sampler: TokenBalancedSampler, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_steps_hold_the_pairs_that_they_held(num_ranks, accumulation):
    """Through accelerate's own sharding, every step has the base sampler's pairs, balanced."""
    batch, pairs = 2, 50
    rng = np.random.default_rng(0)
    weights = np.rint(rng.lognormal(6, 0.7, pairs)).astype(int).tolist()
    base = RandomSampler(range(pairs), generator=torch.Generator().manual_seed(1))
    straight = list(base)
    base.generator.manual_seed(1)
    ours = TokenBalancedSampler(
        base, weights, batch_size=batch, num_ranks=num_ranks, accumulation=accumulation
    )
    balanced = list(ours)
    assert len(ours) == pairs
    step = batch * num_ranks * accumulation
    for start in range(0, pairs, step):
        assert sorted(balanced[start : start + step]) == sorted(straight[start : start + step])
    full = pairs // step * step
    assert balanced[full:] == straight[full:]
    if num_ranks == 1:
        assert [sorted(balanced[i : i + step]) for i in range(0, full, step)] == [
            sorted(straight[i : i + step]) for i in range(0, full, step)
        ]

    def spread(indices: list[int]) -> float:
        shards = [
            [weights[i] for b in shard for i in b][: full // num_ranks]
            for shard in (
                BatchSamplerShard(BatchSampler(indices, batch, False), num_ranks, rank)
                for rank in range(num_ranks)
            )
        ]
        per_step = batch * accumulation
        loads = np.array([np.add.reduceat(s, np.arange(0, len(s), per_step)) for s in shards])
        return float((loads.max(axis=0) / loads.mean(axis=0)).mean())

    if num_ranks > 1:
        assert spread(balanced) < spread(straight)
    if num_ranks == 2 and accumulation == 3:
        assert spread(balanced) < 1.1


def test_the_order_is_a_function_of_the_epoch():
    class Seeded(RandomSampler):
        def set_epoch(self, epoch: int) -> None:
            self.generator = torch.Generator().manual_seed(epoch)

    weights = list(range(1, 25))
    samplers = [
        TokenBalancedSampler(Seeded(range(24)), weights, batch_size=2, num_ranks=2, accumulation=2)
        for _ in range(2)
    ]
    assert order(samplers[0], 3) == order(samplers[1], 3) != order(samplers[1], 4)
    # Resumed in mid-epoch: the same remaining batches.
    whole = list(BatchSampler(samplers[0], 2, False))
    samplers[0].set_epoch(5)
    whole = list(BatchSampler(samplers[0], 2, False))
    from accelerate.data_loader import SkipBatchSampler

    samplers[1].set_epoch(5)
    rest = list(SkipBatchSampler(BatchSampler(samplers[1], 2, False), skip_batches=7))
    assert rest == whole[7:]


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="num_ranks=0"):
        TokenBalancedSampler(SequentialSampler(range(3)), [1, 1, 1], batch_size=1, num_ranks=0)
