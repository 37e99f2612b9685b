"""Micro-batches by tokens: the same pairs, the same gradient, hardly a token for nothing."""

import logging

import numpy as np
import pytest
import torch

from benchmarks.workload import LENGTHS, make_rows
from dpo_fast.layouts import (
    MICRO_BATCHES_KEY,
    BudgetCollator,
    PackedCollator,
    SharedPrefixCollator,
    split_step,
)
from tests.layouts.compare import AWKWARD, global_error, run_step
from tests.tiny import tiny_model


@pytest.mark.parametrize("layout", [PackedCollator, SharedPrefixCollator])
def test_micro_batches_keep_pairs_whole_and_within_the_budget(layout):
    rows = make_rows(LENGTHS["2:1"], 64, 1000)
    collator = layout(pad_token_id=0)
    step = BudgetCollator(collator, 3000)(rows)
    batches = step[MICRO_BATCHES_KEY]
    assert step["pair_index"].tolist() == list(range(64))
    assert sum(len(b["pair_index"]) for b in batches) == 64
    assert all(b["executed_tokens"] <= 3000 for b in batches)
    whole = collator(rows)
    assert step["seq_lens"] == whole["seq_lens"]
    for key in ("num_tokens", "executed_tokens"):
        assert sum(b[key] for b in batches) == whole[key]
    found = torch.cat([b["target"] for b in batches]).sort().values
    assert torch.equal(found, whole["target"].sort().values)


def test_the_gradient_of_a_step_is_that_of_its_micro_batches():
    model = tiny_model("llama")
    collator = SharedPrefixCollator(pad_token_id=0)
    whole = run_step(model, collator(AWKWARD))
    step = BudgetCollator(collator, 14)(AWKWARD)
    batches = split_step(step[MICRO_BATCHES_KEY], 6, collator.empty())
    assert [len(b["pair_index"]) for b in batches[:2]] == [0, 0] and len(batches) == 6
    parts = [run_step(model, batch) for batch in batches]
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
    needed = sum(collator.pair_tokens(row).executed for row in rows)
    made = [BudgetCollator(collator, 8192)(rows[i : i + 64]) for i in range(0, 512, 64)]
    batches = [batch for step in made for batch in step[MICRO_BATCHES_KEY]]
    executed = sum(b["executed_tokens"] for b in batches)
    assert executed == sum(b["input_ids"].numel() for b in batches)
    assert needed / executed >= (0.95 if few_shapes else 1.0)
    assert len({b["input_ids"].shape for b in batches}) <= (24 if few_shapes else 512)
    fullness = needed / sum(len(s[MICRO_BATCHES_KEY]) * 8192 for s in made)
    fewest = sum(
        -(-sum(collator.pair_tokens(r).executed for r in rows[i : i + 64]) // 8192)
        for i in range(0, 512, 64)
    )
    assert len(batches) <= fewest + 1 and fullness > 0.6


def test_a_pair_beyond_the_budget_runs_alone_and_is_said_once(caplog):
    collator = BudgetCollator(SharedPrefixCollator(pad_token_id=0), 10)
    with caplog.at_level(logging.WARNING, "dpo_fast"):
        batches = collator(AWKWARD)[MICRO_BATCHES_KEY]
        collator(AWKWARD)
    sizes = [(len(b["pair_index"]), b["executed_tokens"]) for b in batches]
    assert (1, 50) in sizes and all(n == 1 or size <= 10 for n, size in sizes)
    assert [r.getMessage() for r in caplog.records] == [
        "A pair of 50 tokens exceeds max_tokens_per_batch=10: such pairs run alone."
    ]


def test_references_follow_their_pairs():
    rng = np.random.default_rng(0)
    rows = [
        {**row, "ref_chosen_logps": float(rng.normal()), "ref_rejected_logps": float(i)}
        for i, row in enumerate(AWKWARD)
    ]
    step = BudgetCollator(SharedPrefixCollator(pad_token_id=0), 14)(rows)
    for batch in step[MICRO_BATCHES_KEY]:
        starts = batch["token_index"]
        assert len(batch["ref_rejected_logps"]) == len(batch["pair_index"]) and len(starts)
        for i, number in enumerate(batch["ref_rejected_logps"].tolist()):
            row = AWKWARD[int(number)]
            length = batch["completion_lens"][len(batch["pair_index"]) + i]
            assert length == len(row["rejected_ids"])


def test_bad_budgets_are_refused():
    with pytest.raises(ValueError, match="max_tokens_per_batch=0"):
        BudgetCollator(PackedCollator(0), 0)
    with pytest.raises(ValueError, match="cannot be filled up to 1"):
        split_step([{}, {}], 1, {})
    with pytest.raises(ValueError, match="without an empty one"):
        split_step([{}], 2, None)
    assert split_step([{}], 1, None) == [{}]
