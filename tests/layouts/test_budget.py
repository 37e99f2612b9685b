"""Micro-batches by tokens: the same pairs, the same gradient, hardly a token for nothing."""

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast.batch import PlannedCollator, TokenPlan
from dpo_fast.bench.workload import LENGTHS, make_rows
from dpo_fast.layouts import (
    PackedCollator,
    SharedPrefixCollator,
    TokenBudget,
    collect_rows,
    pair_lengths,
)
from dpo_fast.layouts.budget import padded_bins
from tests.layouts.compare import AWKWARD, collators, global_error, run_step
from tests.tiny import tiny_model

LAYOUTS = ("padded", "packed", "shared_prefix")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_keep_pairs_whole_and_within_the_budget(layout):
    rows = make_rows(LENGTHS["2:1"], 64, 1000)
    collator = collators()[layout]
    batches = TokenBudget(collator, 3000).cut(rows)
    assert sum(len(b["pair_index"]) for b in batches) == 64
    assert all(b["executed_tokens"] <= 3000 for b in batches)
    assert all(b["executed_tokens"] == b["input_ids"].numel() for b in batches)
    whole = collator(rows)
    assert sum(b["num_tokens"] for b in batches) == whole["num_tokens"]
    found = torch.cat([b["target"] for b in batches]).sort().values
    assert torch.equal(found, whole["target"].sort().values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_a_step_is_that_of_its_micro_batches(layout):
    model = tiny_model("llama")
    collator = collators()[layout]
    whole = run_step(model, collator(AWKWARD))
    budget = TokenBudget(collator, 16)
    batches = budget.cut(AWKWARD)
    assert len(batches) > 2
    filled = budget.fill(batches, len(batches) + 2)
    assert [len(b["pair_index"]) for b in filled[:2]] == [0, 0]
    parts = [run_step(model, batch) for batch in filled]
    assert all(part.grads.keys() == whole.grads.keys() for part in parts)
    grads = {name: sum(part.grads[name] for part in parts) for name in whole.grads}
    assert global_error(grads, whole.grads) < 1e-5
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", ["1:1", "2:1", "4:1"])
@pytest.mark.parametrize("few_shapes", [False, True])
def test_hardly_a_token_is_computed_for_nothing(lengths, few_shapes):
    """Tokens needed over tokens computed, with the sizes that compiled code wants, too."""
    rows = make_rows(LENGTHS[lengths], 512, 1000)
    collator = SharedPrefixCollator(pad_token_id=0, few_shapes=few_shapes)
    budget = TokenBudget(collator, 8192)
    steps = [rows[i : i + 64] for i in range(0, 512, 64)]
    needed = [int(pair_lengths(step).shared_prefix.sum()) for step in steps]
    cut = [budget.cut(step) for step in steps]
    batches = [batch for step in cut for batch in step]
    executed = sum(b["input_ids"].numel() for b in batches)
    assert executed == sum(b["executed_tokens"] for b in batches)
    assert sum(needed) / executed >= (0.95 if few_shapes else 1.0)
    assert len({b["input_ids"].shape for b in batches}) <= (24 if few_shapes else 512)
    for tokens, step in zip(needed, cut, strict=True):
        assert len(step) <= -(-tokens // 8192) + 1


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 200))
def test_padded_bins(longest, capacity):
    bins = padded_bins(longest, capacity)
    assert sorted(i for b in bins for i in b) == list(range(len(longest)))
    for b in bins:
        assert 2 * len(b) * max(longest[i] for i in b) <= capacity or len(b) == 1


def test_a_pair_beyond_the_budget_runs_alone_and_is_said_once(caplog):
    budget = TokenBudget(SharedPrefixCollator(pad_token_id=0), 10)
    with caplog.at_level(logging.WARNING, "dpo_fast"):
        batches = budget.cut(AWKWARD)
        budget.cut(AWKWARD)
    sizes = [(len(b["pair_index"]), b["executed_tokens"]) for b in batches]
    assert (1, 50) in sizes and all(n == 1 or size <= 10 for n, size in sizes)
    assert [r.getMessage() for r in caplog.records] == [
        "A pair of 50 tokens exceeds max_tokens_per_batch=10: such pairs run alone."
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_references_follow_their_pairs(layout):
    rows = [
        {**row, "ref_chosen_logps": 0.5, "ref_rejected_logps": float(i)}
        for i, row in enumerate(AWKWARD)
    ]
    batches = TokenBudget(collators()[layout], 16).cut(rows)
    found = []
    for batch in batches:
        pairs = len(batch["pair_index"])
        for i, number in enumerate(batch["ref_rejected_logps"].tolist()):
            answer = AWKWARD[int(number)]["rejected_ids"]
            assert batch["completion_lens"][pairs + i] == len(answer)
            found.append(int(number))
    assert sorted(found) == list(range(len(AWKWARD)))


def test_rows_pass_a_loader_untouched():
    from accelerate.utils import find_batch_size, send_to_device

    batch = send_to_device(collect_rows(AWKWARD), "cpu")
    assert batch["rows"].rows == AWKWARD and find_batch_size(batch) == len(AWKWARD)
    with pytest.raises(ValueError, match="no rows"):
        collect_rows([])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch_is_fed_but_not_counted(layout):
    batch = TokenBudget(collators()[layout], 8).empty()
    plan = TokenPlan.from_batch(batch)
    assert (plan.num_pairs, plan.num_tokens, plan.rows) == (0, 0, 1)
    assert (batch["num_tokens"], batch["padded_tokens"], batch["executed_tokens"]) == (0, 0, 1)
    assert batch["attention_mask"].tolist() == [[1]]
    assert ("pair_segments" in batch) == (layout != "padded")
    assert [x.shape for x in (*plan.pair_lengths(), plan.ld_weight(0.5))] == [(0,)] * 3


def test_bad_budgets_are_refused():
    with pytest.raises(ValueError, match="max_tokens_per_batch=0"):
        TokenBudget(PackedCollator(0), 0)
    with pytest.raises(ValueError, match="more than 1"):
        TokenBudget(PackedCollator(0), 8).fill([{}, {}], 1)

    def own(rows: list[Any]) -> dict[str, Any]:
        return {}

    for collator in (own, PlannedCollator(own)):
        with pytest.raises(ValueError, match="caller's own"):
            TokenBudget(collator, 8)
