"""Padded rows in groups of like length: the least work, and the numbers of one pass."""

import itertools
from typing import Any

import pytest
import torch

from dpo_fast.batch import COUNT_KEYS, GROUPS_KEY, PlannedCollator
from dpo_fast.data.collate import DataCollatorForPreference
from dpo_fast.models import forward_scored, install_scoring
from dpo_fast.row_groups import PASS_TOKENS, RowGroups, group_rows, run_in_groups
from tests.tiny import tiny_model


def mask_of(*lengths: int) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def pairs(*lengths: tuple[int, int, int], vocab: int = 90) -> list[dict[str, list[int]]]:
    """Rows of (prompt, chosen, rejected) lengths."""
    g = torch.Generator().manual_seed(1)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {
            n: torch.randint(5, vocab, (k,), generator=g).tolist()
            for n, k in zip(names, row, strict=True)
        }
        for row in lengths
    ]


ROWS = pairs((100, 3, 90), (7, 5, 4), (3, 230, 2), (40, 41, 60))


def test_rows_of_like_length_go_together() -> None:
    groups = group_rows(mask_of(400, 101, 100, 399))
    assert groups == RowGroups((((3, 0), 400), ((2, 1), 101)))
    assert groups.num_tokens == 1002


@pytest.mark.parametrize("lengths", [(7,), (50, 50, 50), (50, 49, 48), (1, 2)])
def test_one_pass_where_it_does_best(lengths: tuple[int, ...]) -> None:
    assert group_rows(mask_of(*lengths)) is None


def test_left_padded_and_empty_rows_stay_together() -> None:
    assert group_rows(mask_of(400, 10).flip(1)) is None
    mask = mask_of(400, 10)
    mask[1] = 0
    assert group_rows(mask) is None


@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_is_less_work(seed: int) -> None:
    lengths = torch.randint(1, 300, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = group_rows(mask_of(*lengths))
    found = groups.groups if groups else ((tuple(range(6)), max(lengths)),)
    assert sorted(row for rows, _ in found for row in rows) == list(range(6))
    assert all(width == max(lengths[row] for row in rows) for rows, width in found)
    work = sum(len(rows) * width + PASS_TOKENS for rows, width in found)
    ordered = sorted(lengths)
    for cuts in itertools.product([False, True], repeat=5):
        starts = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 6]
        other = sum((b - a) * ordered[b - 1] + PASS_TOKENS for a, b in itertools.pairwise(starts))
        assert work <= other


def batches() -> tuple[dict, dict]:
    """One batch, whole and in groups."""
    collator = DataCollatorForPreference(pad_token_id=0)
    whole = PlannedCollator(collator)(ROWS)
    cut = PlannedCollator(collator, plan_rows=group_rows)(ROWS)
    assert GROUPS_KEY not in whole and GROUPS_KEY in cut
    return whole, cut


def test_the_batch_counts_what_is_computed() -> None:
    whole, cut = batches()
    attended, padded, executed = (cut[key] for key in COUNT_KEYS)
    assert [whole[key] for key in COUNT_KEYS] == [attended, padded, padded]
    assert attended <= executed == cut[GROUPS_KEY].num_tokens < padded


def model_of(family: str) -> Any:
    if family != "mamba":
        return tiny_model(family)
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=100)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "mamba"])
def test_same_hidden_states_and_gradients(family: str) -> None:
    model = model_of(family).double().eval()  # no dropout
    install_scoring(model)
    calls: list[int] = []
    model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for batch in batches():
        model.zero_grad()
        hidden = forward_scored(model, batch, lambda hidden, head: hidden).value
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).double()
        (hidden * upstream).sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((hidden.detach(), grads, len(calls)))
    (gold, gold_grads, one), (hidden, grads, passes) = results
    assert one == 1 and passes == 1 + len(batches()[1][GROUPS_KEY].groups) > 2
    # families keep float32 islands
    torch.testing.assert_close(hidden, gold, rtol=1e-5, atol=1e-6)
    error = sum((a - b).square().sum() for a, b in zip(grads, gold_grads, strict=True))
    assert error < 1e-10 * sum(g.square().sum() for g in gold_grads)


def test_inputs_that_cannot_be_cut_run_whole() -> None:
    cut = batches()[1]
    groups, ids = cut[GROUPS_KEY], cut["input_ids"]

    def run(**inputs: torch.Tensor) -> torch.Tensor:
        pytest.fail("a group was run")

    assert run_in_groups(run, {"inputs_embeds": ids}, groups) is None
    assert run_in_groups(run, {"input_ids": ids[:2]}, groups) is None
    assert run_in_groups(run, {"input_ids": ids, "pixels": ids[:, :3]}, groups) is None


def test_router_statistics_are_of_all_tokens_at_once() -> None:
    model = tiny_model("qwen3_moe").train()
    install_scoring(model)
    whole, cut = (
        forward_scored(model, batch, lambda hidden, head: hidden, aux_loss=True)
        for batch in batches()
    )
    assert whole.aux_loss is not None and torch.equal(whole.aux_loss, cut.aux_loss)
