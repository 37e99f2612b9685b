"""Packed rows: literal tensors, and the padded collator as the oracle for everything scored.

Legend: P pairs, S = 2P sequences (all chosen first, then all rejected), L tokens of the row.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dpo_fast.batch import PLAN_KEYS, TokenPlan
from dpo_fast.layouts import PackedCollator, SharedPrefixCollator
from dpo_fast.layouts.packed import common_prefix
from dpo_fast.layouts.shapes import rounded_length
from tests.layouts.compare import AWKWARD, collators

ROWS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [8, 9]},
]


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_packed_row_by_hand():
    batch = PackedCollator(pad_token_id=0)(ROWS)
    assert {k: plain(v) for k, v in batch.items() if k != "pair_segments"} == {
        "pair_index": [0, 1],
        "input_ids": [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 7, 8, 9]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2]],
        "attention_mask": [[1] * 14],
        "token_index": [2, 3, 9, 7, 11, 12],
        "target": [4, 5, 8, 6, 8, 9],
        "cu_seqlens": [0, 2, 3, 4, 6],
        "seq_lens": [2, 1, 1, 2],
        "completion_lens": [2, 1, 1, 2],
        "num_tokens": 14,
        "padded_tokens": 4 * 5,
        "executed_tokens": 14,
    }
    assert [tuple(s) for s in batch["pair_segments"].spans] == [
        (0, 5, 0, 0),
        (5, 4, 0, 0),
        (9, 2, 0, 0),
        (11, 3, 0, 0),
    ]


def test_shared_row_by_hand():
    """The last prompt token predicts both first tokens; a common first token is held once."""
    batch = SharedPrefixCollator(pad_token_id=0)(ROWS)
    assert {k: plain(v) for k, v in batch.items() if k != "pair_segments"} == {
        "pair_index": [0, 1],
        "input_ids": [[1, 2, 3, 4, 5, 6, 7, 8, 9]],
        "position_ids": [[0, 1, 2, 3, 4, 3, 0, 1, 2]],
        "attention_mask": [[2, 2, 2, 1, 1, 1, 2, 2, 1]],
        "token_index": [2, 3, 6, 2, 6, 7],
        "target": [4, 5, 8, 6, 8, 9],
        "cu_seqlens": [0, 2, 3, 4, 6],
        "seq_lens": [2, 1, 1, 2],
        "completion_lens": [2, 1, 1, 2],
        "num_tokens": 14,
        "padded_tokens": 4 * 5,
        "executed_tokens": 9,
    }
    assert [tuple(s) for s in batch["pair_segments"].spans] == [
        (0, 5, 0, 0),
        (5, 1, 0, 3),
        (6, 2, 0, 0),
        (8, 1, 6, 2),
    ]


def test_keep_end_cuts_unequal_answers_apart():
    """Cut from the start, sequences of one pair begin differently: each stands alone."""
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}]
    batch = SharedPrefixCollator(0, max_length=3, truncation_mode="keep_end")(rows)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 2, 3, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert not batch["pair_segments"].has_prefix
    equal = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7]}]
    batch = SharedPrefixCollator(0, max_length=4, truncation_mode="keep_end")(equal)
    assert batch["input_ids"].tolist() == [[2, 3, 4, 5, 6, 7]]


ids = st.lists(st.integers(1, 3), max_size=7)
rows_of_ids = st.lists(
    st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}),
    min_size=1,
    max_size=4,
)


@given(
    rows_of_ids,
    st.sampled_from([None, 1, 2, 5, 9]),
    st.sampled_from(["keep_start", "keep_end"]),
    st.booleans(),
)
def test_every_layout_scores_the_same_tokens_in_the_same_context(rows, length, mode, few):
    """What a query may see, read off the segments, is what precedes it in its padded row."""
    made = collators(max_length=length, truncation_mode=mode)
    padded = made["padded"](rows)
    for name in ("packed", "shared_prefix"):
        collator = made[name]
        collator.few_shapes = few
        batch = collator(rows)
        for key in ("target", "cu_seqlens", "seq_lens", "completion_lens", "num_tokens"):
            assert plain(batch[key]) == plain(padded[key])
        assert batch["padded_tokens"] == padded["padded_tokens"]
        assert batch["executed_tokens"] == batch["input_ids"].numel()
        assert int(batch["attention_mask"].sum()) == batch["num_tokens"]
        plans = TokenPlan.from_batch(padded), TokenPlan.from_batch(batch)
        width = padded["input_ids"].shape[1]
        for at, where in zip(*(plan.token_index.tolist() for plan in plans), strict=True):
            row, t = divmod(at, width)
            assert context(batch, where) == padded["input_ids"][row, : t + 1].tolist()


def context(batch: dict[str, Any], index: int) -> list[int]:
    """Tokens that the query at ``index`` sees, in order of position, which must have no gap."""
    tokens, positions = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    span = next(s for s in batch["pair_segments"].spans if s.start <= index < s.stop)
    seen = list(range(span.prefix_start, span.prefix_start + span.prefix_length))
    seen += range(span.start, index + 1)
    assert [positions[i] for i in seen] == list(range(len(seen)))
    return [tokens[i] for i in seen]


def test_few_shapes_fill_the_row_with_a_sequence_that_nothing_sees():
    batch = SharedPrefixCollator(pad_token_id=7, few_shapes=True)(ROWS)
    assert batch["input_ids"].shape == (1, 128) and batch["executed_tokens"] == 128
    assert batch["input_ids"][0, 9:].tolist() == [7] * 119
    assert not batch["position_ids"][0, 9:].any() and not batch["attention_mask"][0, 9:].any()
    assert tuple(batch["pair_segments"].spans[-1]) == (9, 119, 0, 0)
    assert batch["num_tokens"] == 14


def test_rounded_lengths_are_few_and_near():
    sizes = {rounded_length(n) for n in range(1, 16385)}
    assert len(sizes) <= 32 + 2 * 32 and all(size % 128 == 0 for size in sizes)
    for n in range(1, 16385):
        size = rounded_length(n)
        assert n <= size < n + max(128, n / 32 + 1)
        assert rounded_length(size) == size
    with pytest.raises(ValueError, match="length=0"):
        rounded_length(0)


@pytest.mark.parametrize("collator", [PackedCollator(5), SharedPrefixCollator(5, few_shapes=True)])
def test_an_empty_batch_has_one_token_and_no_pair(collator):
    batch = collator.empty()
    assert batch["input_ids"].tolist() == [[5]] and batch["seq_lens"] == []
    assert batch["attention_mask"].tolist() == [[1]]
    plan = TokenPlan.from_batch(batch)
    assert (plan.num_pairs, plan.num_tokens) == (0, 0)
    assert plan.gather(torch.ones(1, 1, 3)).shape == (0, 3)
    assert [batch[k] for k in ("num_tokens", "padded_tokens", "executed_tokens")] == [0, 0, 1]


def test_references_and_keys():
    rows = [
        {**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0 * i}
        for i, row in enumerate(ROWS)
    ]
    batch = SharedPrefixCollator(0)(rows)
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -1.5]
    assert batch["ref_rejected_logps"].dtype == torch.float32
    assert set(PLAN_KEYS) <= set(batch) and next(iter(batch)) == "pair_index"


def test_batches_travel_through_workers():
    loader = DataLoader(AWKWARD, batch_size=4, collate_fn=SharedPrefixCollator(0), num_workers=1)
    batch = next(iter(loader))
    expected = SharedPrefixCollator(0)(AWKWARD[:4])
    assert batch["pair_segments"].spans == expected["pair_segments"].spans
    assert torch.equal(batch["token_index"], expected["token_index"])
    assert type(batch["num_tokens"]) is int


def test_transformers_and_accelerate_handle_the_batch(tmp_path):
    from accelerate.utils import find_batch_size, send_to_device
    from transformers import Trainer, TrainingArguments

    batch = SharedPrefixCollator(0)(ROWS)
    assert find_batch_size(batch) == 2
    moved = send_to_device(batch, "cpu")
    trainer = Trainer(
        torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    )
    moved = trainer._prepare_inputs(moved)
    assert moved["pair_segments"].spans == batch["pair_segments"].spans
    assert moved["seq_lens"] == batch["seq_lens"]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        PackedCollator(0)([])
    with pytest.raises(ValueError, match="rejected_ids"):
        SharedPrefixCollator(0)([{"prompt_ids": [1], "chosen_ids": [2]}])
    with pytest.raises(ValueError, match="max_length"):
        PackedCollator(0, max_length=0)


def test_common_prefix():
    import numpy as np

    def prefix(a: list[int], b: list[int]) -> int:
        return common_prefix(np.array(a), np.array(b))

    assert [prefix([1, 2], [1, 3]), prefix([1], [1, 2]), prefix([], [1]), prefix([2], [1])] == [
        1,
        1,
        0,
        0,
    ]
