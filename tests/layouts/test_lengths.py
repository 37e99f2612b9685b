"""Token counts from lengths alone are the counts of the collators."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.layouts import pair_lengths
from tests.layouts.compare import collators

ids = st.lists(st.integers(1, 100), max_size=9)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=7),
    st.sampled_from([None, 1, 4, 8]),
    st.sampled_from(["keep_start", "keep_end"]),
    st.integers(1, 8),
)
def test_lengths_equal_the_collators_counts(parts, length, mode, batch_size):
    rows = [
        # answers that begin differently: tokens shared beyond the prompt are not read here
        {"prompt_ids": p, "chosen_ids": [101, *c], "rejected_ids": [102, *r]}
        for p, c, r in parts
    ]
    lengths = pair_lengths(rows, length, mode)
    made = collators(max_length=length, truncation_mode=mode)
    padded = 0
    for start in range(0, len(rows), batch_size):
        padded += made["padded"](rows[start : start + batch_size])["padded_tokens"]
    assert lengths.padded(batch_size) == padded
    assert lengths.packed.sum() == made["packed"](rows)["executed_tokens"]
    shared = made["shared_prefix"](rows)["executed_tokens"]
    if mode == "keep_start":
        assert lengths.shared_prefix.sum() == shared
    else:  # what is left after unequal cuts may agree by chance
        assert lengths.shared_prefix.sum() >= shared


def test_lengths_of_a_dataset_follow_its_indices():
    rows = [
        {"prompt_ids": [1] * i, "chosen_ids": [2] * (i + 1), "rejected_ids": [3], "other": "x"}
        for i in range(7)
    ]
    dataset = Dataset.from_list(rows).select([6, 0, 3])
    lengths = pair_lengths(dataset, max_length=8)
    assert lengths.chosen.tolist() == [8, 1, 7]
    assert lengths.rejected.tolist() == [7, 1, 4]
    assert lengths.shared.tolist() == [6, 0, 3]


@pytest.mark.parametrize(
    "empty", [[], Dataset.from_dict({k: [] for k in ("prompt_ids", "chosen_ids", "rejected_ids")})]
)
def test_no_rows_have_no_tokens(empty):
    lengths = pair_lengths(empty)
    assert lengths.padded(4) == 0 and len(lengths.packed) == 0
