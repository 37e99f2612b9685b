"""PairStats: defaults, slices, refusals."""

import dataclasses

import pytest
import torch

from dpo_fast.losses import PairStats
from tests.losses.cases import make_stats


def test_counts_default_to_this_batch():
    stats = PairStats(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]))
    assert stats.num_pairs == 2
    assert stats.num_chosen_tokens.item() == 7
    assert stats.chosen_nll_sum is None and stats.wpo_weight is None


def test_slices_keep_the_counts_and_share_memory():
    stats = make_stats(pairs=5)
    part = stats.slice(1, 3)
    assert (part.num_pairs, part.num_chosen_tokens) == (stats.num_pairs, stats.num_chosen_tokens)
    for name in ("chosen_len", "rejected_len", "chosen_nll_sum", "wpo_weight"):
        assert torch.equal(getattr(part, name), getattr(stats, name)[1:3])
        assert getattr(part, name).data_ptr() == getattr(stats, name)[1:].data_ptr()
    assert stats.slice(2, 2).chosen_len.shape == (0,)


def test_slices_of_defaulted_counts_keep_the_whole_batchs_counts():
    part = PairStats(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])).slice(0, 1)
    assert part.num_pairs == 2
    assert part.num_chosen_tokens.item() == 7
    assert part.wpo_weight is None


def test_it_is_frozen_and_replaceable():
    stats = make_stats(pairs=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.num_pairs = 3
    assert dataclasses.replace(stats, wpo_weight=None).num_pairs == stats.num_pairs


@pytest.mark.parametrize("name", ["rejected_len", "chosen_nll_sum", "wpo_weight"])
def test_another_shape_is_refused(name):
    fields = {"chosen_len": torch.ones(3), "rejected_len": torch.ones(3)}
    with pytest.raises(ValueError, match=rf"{name} has shape \[2\].*\[3\]"):
        PairStats(**{**fields, name: torch.ones(2)})
    with pytest.raises(ValueError, match=name):
        PairStats(**{**fields, name: torch.ones(3, 1)})


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="chosen_len must be a tensor"):
        PairStats([1.0], torch.ones(1))
    with pytest.raises(TypeError, match="rejected_len must be a tensor"):
        PairStats(torch.ones(1), None)
