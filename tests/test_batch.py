"""The plan of the scored tokens against a loop that can be checked by eye.

P pairs, S = 2P sequences (all chosen first, then all rejected), T padded length, N scored tokens,
H hidden.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from dpo_fast.batch import PLAN_KEYS, PlannedCollator, TokenPlan, plan_tokens
from dpo_fast.data import DataCollatorForPreference


@st.composite
def padded_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """``[2P, T]`` input_ids and an arbitrary completion_mask: empty answers, no prompts, gaps."""
    shape = (2 * draw(st.integers(1, 4)), draw(st.integers(1, 9)))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    density = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    mask = (torch.rand(shape, generator=generator) < density).long()
    return torch.randint(0, 50, shape, generator=generator), mask


def loop_plan(input_ids: Tensor, mask: Tensor) -> list[list[tuple[int, int]]]:
    """For each sequence, (position of the predicting hidden state, token) of each scored token."""
    width = input_ids.shape[1]
    return [
        [
            (row * width + t - 1, int(input_ids[row, t]))
            for t in range(1, width)
            if mask[row, t] == 1
        ]
        for row in range(input_ids.shape[0])
    ]


def planned(input_ids: Tensor, mask: Tensor) -> TokenPlan:
    return TokenPlan.from_batch({"input_ids": input_ids, "completion_mask": mask})


@given(padded_batches())
def test_plan_equals_the_loop(batch):
    input_ids, mask = batch
    plan = plan_tokens(input_ids, mask)
    expected = loop_plan(input_ids, mask)
    flat = [pair for sequence in expected for pair in sequence]
    assert plan["token_index"].tolist() == [index for index, _ in flat]
    assert plan["target"].tolist() == [token for _, token in flat]
    assert plan["seq_lens"] == [len(sequence) for sequence in expected]
    assert plan["cu_seqlens"].tolist() == [
        sum(plan["seq_lens"][:s]) for s in range(len(expected) + 1)
    ]
    assert plan["completion_lens"] == mask.sum(dim=1).tolist()
    for key in ("token_index", "target", "cu_seqlens"):
        assert plan[key].dtype == torch.int64


@given(padded_batches(), st.integers(0, 3))
def test_gather_and_its_gradient_equal_the_loop(batch, virtual):
    input_ids, mask = batch
    num_sequences, width = input_ids.shape
    hidden = torch.randn(num_sequences, virtual + width, 5, dtype=torch.float64, requires_grad=True)
    gathered = planned(input_ids, mask).gather(hidden)
    rows = [
        hidden[row, virtual + t - 1]
        for row in range(num_sequences)
        for t in range(1, width)
        if mask[row, t] == 1
    ]
    expected = torch.stack(rows) if rows else hidden.new_zeros(0, 5)
    assert torch.equal(gathered, expected)
    upstream = torch.randn_like(gathered)
    (grad,) = torch.autograd.grad((gathered * upstream).sum(), hidden)
    (wanted,) = torch.autograd.grad((expected * upstream).sum() + 0 * hidden.sum(), hidden)
    assert torch.equal(grad, wanted)


@given(padded_batches(), st.sampled_from([0.0, 0.3, 1.0]))
def test_ld_weight_and_sequence_ids_equal_the_loop(batch, alpha):
    plan = planned(*batch)
    lens = plan.seq_lens
    weights, ids = [], []
    for s, count in enumerate(lens):
        shared = min(lens[s % plan.num_pairs], lens[s % plan.num_pairs + plan.num_pairs])
        weights += [1.0 if position < shared else alpha for position in range(count)]
        ids += [s] * count
    weight = plan.ld_weight(alpha)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, torch.tensor(weights, dtype=torch.float32))
    assert plan.sequence_ids().tolist() == ids


def test_literal_batch():
    # Two pairs; the second has no prompt, so the first token of its answers is not scored.
    input_ids = torch.tensor([[1, 2, 3, 4], [7, 8, 0, 0], [1, 2, 5, 0], [9, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])
    plan = planned(input_ids, mask)
    assert plan.token_index.tolist() == [1, 2, 4, 9]
    assert plan.target.tolist() == [3, 4, 8, 5]
    assert plan.cu_seqlens.tolist() == [0, 2, 3, 4, 4]
    assert list(plan.seq_lens) == [2, 1, 1, 0]
    assert list(plan.completion_lens) == [2, 2, 1, 1]
    assert (plan.num_pairs, plan.num_sequences, plan.num_tokens) == (2, 4, 4)
    assert plan.num_chosen_tokens == 3
    chosen, rejected = plan.pair_lengths()
    assert chosen.tolist() == [2.0, 2.0] and rejected.tolist() == [1.0, 1.0]
    assert chosen.dtype == rejected.dtype == torch.float32
    assert plan.ld_weight(0.5).tolist() == [1.0, 0.5, 0.5, 1.0]


def test_ld_weight_and_lengths_equal_trls():
    """TRL's LD-DPO sums, over its own masks, are the weighted sums over ours."""
    torch.manual_seed(3)
    mask = (torch.arange(9) >= torch.tensor([2, 0, 4, 5, 0, 2])[:, None]).long()
    mask *= (torch.arange(9) < torch.tensor([9, 5, 6, 9, 7, 4])[:, None]).long()
    plan = planned(torch.randint(0, 9, mask.shape), mask)
    logps = torch.randn(mask.shape[0], mask.shape[1] - 1)
    shifted = mask[:, 1:]
    position = shifted.cumsum(dim=1)
    shared = shifted.sum(dim=1).view(2, -1).amin(dim=0).repeat(2)[:, None]
    near = (position <= shared) & (shifted == 1)
    far = (position > shared) & (shifted == 1)
    expected = (logps * near).sum(dim=1) + 0.25 * (logps * far).sum(dim=1)
    weighted = logps[shifted == 1] * plan.ld_weight(0.25)
    ours = torch.zeros(6).index_add(0, plan.sequence_ids(), weighted)
    torch.testing.assert_close(ours, expected)


ROWS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
    {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [8, 9, 10]},
    {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
]


def test_planned_collator_keeps_the_batch_and_puts_the_pairs_first():
    collator = DataCollatorForPreference(pad_token_id=0)
    batch = PlannedCollator(collator)(ROWS)
    for key, value in collator(ROWS).items():
        assert torch.equal(batch[key], value)
    assert set(PLAN_KEYS) <= set(batch)
    assert next(iter(batch)) == "pair_index"
    assert batch["pair_index"].tolist() == [0, 1, 2]
    for key in ("seq_lens", "completion_lens"):
        assert type(batch[key]) is list and all(type(n) is int for n in batch[key])


def test_transformers_counts_pairs():
    from transformers.trainer_pt_utils import find_batch_size

    collator = DataCollatorForPreference(pad_token_id=0)
    assert find_batch_size(collator(ROWS)) == 6
    assert find_batch_size(PlannedCollator(collator)(ROWS)) == 3


def test_plan_travels_through_a_worker_and_is_found_again():
    loader = DataLoader(
        ROWS,
        batch_size=2,
        collate_fn=PlannedCollator(DataCollatorForPreference(pad_token_id=0)),
        num_workers=1,
    )
    batches = list(loader)
    assert [batch["pair_index"].numel() for batch in batches] == [2, 1]
    made = TokenPlan.from_batch(batches[0])
    again = planned(batches[0]["input_ids"], batches[0]["completion_mask"])
    assert torch.equal(made.token_index, again.token_index)
    assert made.seq_lens == again.seq_lens and made.width == again.width
    # The plan of the batch is used, not made again.
    marked = {**batches[0], "target": batches[0]["target"] + 100}
    assert torch.equal(TokenPlan.from_batch(marked).target, made.target + 100)


def test_labels_take_the_place_of_completion_mask():
    batch = DataCollatorForPreference(pad_token_id=0)(ROWS)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def collate(rows: list) -> dict[str, Tensor]:
        return {"input_ids": batch["input_ids"], "labels": labels}

    ours = PlannedCollator(collate)(ROWS)
    expected = PlannedCollator(lambda rows: batch)(ROWS)
    assert "labels" not in ours
    for key in ("completion_mask", "token_index", "target", "cu_seqlens"):
        assert torch.equal(ours[key], expected[key])

    def shifted(rows: list) -> dict[str, Tensor]:
        return {"input_ids": batch["input_ids"], "labels": labels.roll(-1, dims=1)}

    with pytest.raises(ValueError, match="unshifted"):
        PlannedCollator(shifted)(ROWS)


def test_wrong_batches_are_refused_by_name():
    ids = torch.zeros(4, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\['attention_mask', 'input_ids'\].*completion_mask"):
        PlannedCollator(lambda rows: {"input_ids": ids, "attention_mask": ids})(ROWS)
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 2\)"):
        plan_tokens(ids, ids[:, :2])
    with pytest.raises(ValueError, match="batch of 3 rows"):
        plan_tokens(ids[:3], ids[:3])
    with pytest.raises(ValueError, match="labels"):
        PlannedCollator(lambda rows: {"input_ids": ids, "labels": ids[:, :2]})(ROWS)
    plan = planned(ids, torch.ones_like(ids))
    for hidden in (torch.zeros(4, 2, 5), torch.zeros(3, 3, 5), torch.zeros(12, 5)):
        with pytest.raises(ValueError, match="do not belong to this batch"):
            plan.gather(hidden)
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="ld_alpha"):
            plan.ld_weight(alpha)


def test_plan_moves_between_devices():
    plan = planned(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    moved = plan.to("meta")
    assert {moved.token_index.device.type, moved.target.device.type} == {"meta"}
    assert moved.cu_seqlens.device.type == "meta" and moved.seq_lens == plan.seq_lens


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    batch = PlannedCollator(DataCollatorForPreference(pad_token_id=0))(ROWS)
    expected = TokenPlan.from_batch(batch)
    on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch.items()}
    hidden = torch.randn(6, batch["input_ids"].shape[1] + 2, 8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = TokenPlan.from_batch(on_gpu)
        results = (plan.gather(hidden), plan.ld_weight(0.5), plan.sequence_ids())
        chosen, rejected = plan.pair_lengths()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = (expected.gather(hidden.cpu()), expected.ld_weight(0.5), expected.sequence_ids())
    for ours, theirs in zip(results, wanted, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert torch.equal(torch.cat([chosen, rejected]).cpu(), torch.cat(expected.pair_lengths()))
