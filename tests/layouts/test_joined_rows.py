"""Padded rows that run as one row without padding: the numbers of padded rows.

Legend: B rows, T padded length, H hidden.
"""

import pickle
from typing import Any

import pytest
import torch

import dpo_fast
from dpo_fast.batch import COUNT_KEYS, GROUPS_KEY, PlannedCollator
from dpo_fast.data.collate import DataCollatorForPreference
from dpo_fast.layouts import segment_attention_in
from dpo_fast.layouts.joined_rows import JoinedRows, has_segments, join_rows
from dpo_fast.models import forward_scored, install_scoring
from dpo_fast.row_groups import RowGroups
from tests.test_row_groups import ROWS, mask_of
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.parity import config_kwargs, perturbed, rows

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2"]


def batches() -> tuple[dict[str, Any], dict[str, Any]]:
    """One batch, whole and joined."""
    collator = DataCollatorForPreference(pad_token_id=0)
    return PlannedCollator(collator)(ROWS), PlannedCollator(collator, plan_rows=join_rows)(ROWS)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_hidden_states_and_gradients(family: str) -> None:
    overrides = {"sliding_window": 50} if family in ("mistral", "gemma2") else {}
    model = tiny_model(family, max_position_embeddings=512, **overrides).double().eval()
    install_scoring(model)
    results, passes = [], []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with segment_attention_in(model):
        for batch in batches():
            model.zero_grad()
            hidden = forward_scored(model, batch, lambda hidden, head: hidden).value
            upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
            (hidden * upstream.double()).sum().backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append((hidden.detach(), grads))
    (gold, gold_grads), (hidden, grads) = results
    assert passes == [batches()[0]["input_ids"].shape, (1, batches()[1]["executed_tokens"])]
    # families keep float32 islands
    torch.testing.assert_close(hidden, gold, rtol=1e-5, atol=1e-6)
    error = sum((a - b).square().sum() for a, b in zip(grads, gold_grads, strict=True))
    assert error < 1e-10 * sum(g.square().sum() for g in gold_grads)


def test_the_batch_counts_what_is_computed() -> None:
    whole, joined = batches()
    attended, padded, executed = (joined[key] for key in COUNT_KEYS)
    assert [whole[key] for key in COUNT_KEYS] == [attended, padded, padded]
    assert attended == executed == joined[GROUPS_KEY].num_tokens < padded
    assert has_segments(joined) and not has_segments(whole)


def test_left_padded_and_empty_rows_stay_together() -> None:
    assert join_rows(mask_of(400, 10).flip(1)) is None
    mask = mask_of(400, 10)
    mask[1] = 0
    assert join_rows(mask) is None


def test_what_cannot_be_joined_runs_whole() -> None:
    joined, ids, mask = JoinedRows([3, 2]), torch.ones(2, 3, dtype=torch.long), mask_of(3, 2)

    def run(**inputs: torch.Tensor) -> torch.Tensor:
        pytest.fail("the rows were joined")

    assert joined.run(run, {"inputs_embeds": ids, "attention_mask": mask}) is None
    assert joined.run(run, {"input_ids": ids[:1], "attention_mask": mask[:1]}) is None
    more = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids}
    assert joined.run(run, more) is None


def test_an_attention_that_ignores_segments_gets_padded_rows() -> None:
    model = tiny_model("llama").eval()
    install_scoring(model)
    whole, joined = (
        forward_scored(model, batch, lambda hidden, head: hidden).value for batch in batches()
    )
    assert torch.equal(whole, joined)


def test_it_travels_to_a_worker_and_back() -> None:
    there = pickle.loads(pickle.dumps(JoinedRows([4, 1])))
    assert there.lengths == [4, 1] and there.segments.lengths == [4, 1]


def trainer_of(model: Any, **arguments: Any) -> Any:
    return dpo_fast.Trainer(
        model,
        perturbed(model),
        args=dpo_fast.DPOConfig(**config_kwargs(batch_layout="padded", max_steps=1)),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        **arguments,
    )


def test_the_trainer_joins_padded_rows_where_the_model_allows_it() -> None:
    trainer = trainer_of(tiny_model("llama"))
    batch = next(iter(trainer.get_train_dataloader()))
    assert isinstance(batch[GROUPS_KEY], JoinedRows)
    before = trainer.model.config._attn_implementation
    trainer.train()
    assert trainer.model.config._attn_implementation == before
    own = trainer_of(tiny_model("llama"), data_collator=DataCollatorForPreference(pad_token_id=0))
    assert isinstance(next(iter(own.get_train_dataloader())).get(GROUPS_KEY), RowGroups | None)
