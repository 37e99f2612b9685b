"""Sequences cut along their positions over two gloo processes equal one process."""

import pytest
import torch

from dpo_fast.batch import SHIFT_KEY, TokenPlan, plan_shifted, shifted_batch
from tests.layouts.compare import AWKWARD, collators
from tests.parallel.launch import run_ranks
from tests.parallel.sequence_worker import LOSSES


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    return run_ranks("tests.parallel.sequence_worker:sequence_cells", 2, folder)


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_equal_one(ranks, name):
    for cells in ranks:
        found, right, grads, expected = cells["cells"][name]
        for key, value in found.items():
            torch.testing.assert_close(value, right[key], rtol=1e-5, atol=2e-5)
        total = torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt()
        assert total > 1e-3 and grads.keys() == expected.keys()
        for key, grad in grads.items():
            assert (grad - expected[key]).norm() <= 2e-5 * total, key


def test_each_rank_scored_its_own_tokens(ranks):
    parts = [cells["tokens"] for cells in ranks]
    assert sum(parts) == ranks[0]["whole"] and all(parts)


def test_shifted_labels_plan_as_completion_masks_do():
    batch = collators()["padded"](AWKWARD)
    plan, again = TokenPlan.from_batch(batch), TokenPlan.from_batch(shifted_batch(batch))
    assert torch.equal(plan.token_index, again.token_index)
    assert torch.equal(plan.target, again.target) and plan.seq_lens == again.seq_lens
    assert torch.equal(plan.cu_seqlens, again.cu_seqlens)


def test_literal_shifted_labels():
    """A cut in the middle of an answer: both sides score what their positions predict."""
    left = plan_shifted(torch.tensor([[-100, 7, 8], [-100, -100, 5]]))
    right = plan_shifted(torch.tensor([[9, -100, -100], [-100, -100, -100]]))
    assert left["token_index"].tolist() == [1, 2, 5] and left["target"].tolist() == [7, 8, 5]
    assert right["token_index"].tolist() == [0] and right["cu_seqlens"].tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"shift_labels \(3, 2\) must be \[2P, T\]"):
        plan_shifted(torch.zeros(3, 2, dtype=torch.long))


def test_packed_rows_cannot_be_cut():
    batch = collators()["packed"](AWKWARD)
    with pytest.raises(ValueError, match=r"packed, and only padded rows .*batch_layout='padded'"):
        shifted_batch(batch)


def test_labels_in_the_batch_are_not_the_models():
    batch = shifted_batch(collators()["padded"](AWKWARD))
    assert SHIFT_KEY in batch and "token_index" not in batch
