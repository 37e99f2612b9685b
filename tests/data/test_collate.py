"""The padded collator: literal tensors, and TRL's own on random rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_fast import DataCollatorForPreference

ROWS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
]


def check(batch: dict[str, torch.Tensor], **expected: list) -> None:
    assert set(batch) == set(expected)
    for key, value in expected.items():
        assert batch[key].tolist() == value, key


def test_chosen_rows_then_rejected_rows():
    batch = DataCollatorForPreference(pad_token_id=0)(ROWS)
    check(
        batch,
        input_ids=[[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]],
        attention_mask=[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        completion_mask=[[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]],
    )
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_keep_start_cuts_the_end():
    check(
        DataCollatorForPreference(pad_token_id=9, max_length=3)(ROWS),
        input_ids=[[1, 2, 3], [7, 8, 9], [1, 2, 3], [7, 8, 10]],
        attention_mask=[[1, 1, 1]] * 4,
        completion_mask=[[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]],
    )


def test_keep_end_cuts_the_start():
    check(
        DataCollatorForPreference(pad_token_id=9, max_length=2, truncation_mode="keep_end")(ROWS),
        input_ids=[[4, 5], [8, 9], [3, 6], [10, 11]],
        attention_mask=[[1, 1]] * 4,
        completion_mask=[[1, 1], [0, 1], [0, 1], [1, 1]],
    )


def test_padding_to_a_multiple_and_reference_logps():
    rows = [
        row | {"ref_chosen_logps": -1.5 - i, "ref_rejected_logps": -2.25 - i}
        for i, row in enumerate(ROWS)
    ]
    batch = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].shape == batch["completion_mask"].shape == (4, 8)
    assert batch["input_ids"][0].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert batch["ref_chosen_logps"].tolist() == [-1.5, -2.5]
    assert batch["ref_rejected_logps"].tolist() == [-2.25, -3.25]
    assert batch["ref_chosen_logps"].dtype == torch.float32


tokens = st.lists(st.integers(0, 2**40), max_size=7)


@given(
    st.lists(
        st.fixed_dictionaries({"prompt_ids": tokens, "chosen_ids": tokens, "rejected_ids": tokens}),
        min_size=1,
        max_size=5,
    ),
    st.one_of(st.none(), st.integers(1, 12)),
    st.sampled_from(["keep_start", "keep_end"]),
    st.one_of(st.none(), st.integers(1, 8)),
    st.booleans(),
)
def test_equals_trls_collator(rows, max_length, mode, multiple, with_reference):
    from trl.trainer.dpo_trainer import DataCollatorForPreference as TRLCollator

    # torch.tensor([]) is float: TRL's collator gives float ids when the first sequence is empty.
    rows = [{**rows[0], "prompt_ids": [1, *rows[0]["prompt_ids"]]}, *rows[1:]]
    if with_reference:
        rows = [
            row | {"ref_chosen_logps": i / 7, "ref_rejected_logps": -i / 3}
            for i, row in enumerate(rows)
        ]
    arguments = {
        "pad_token_id": 3,
        "max_length": max_length,
        "truncation_mode": mode,
        "pad_to_multiple_of": multiple,
    }
    ours, theirs = (kind(**arguments)(rows) for kind in (DataCollatorForPreference, TRLCollator))
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key


def test_trls_positional_arguments():
    ours = DataCollatorForPreference(0, 4, "keep_end", 8, "pt")
    assert (ours.max_length, ours.truncation_mode, ours.pad_to_multiple_of) == (4, "keep_end", 8)


def test_subclasses_extend_torch_call_as_with_trls():
    class WithLengths(DataCollatorForPreference):
        def torch_call(self, examples):
            return super().torch_call(examples) | {"lengths": [len(e) for e in examples]}

    batch = WithLengths(pad_token_id=0)(ROWS)
    assert batch["lengths"] == [3, 3] and batch["input_ids"].shape == (4, 5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": -5}, "max_length=-5"),
        ({"truncation_mode": "middle"}, "'middle'.*keep_start.*keep_end"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
        ({"return_tensors": "np"}, "'np'"),
    ],
)
def test_arguments_out_of_range(arguments, named):
    with pytest.raises(ValueError, match=named):
        DataCollatorForPreference(pad_token_id=0, **arguments)


def test_rows_that_are_not_tokenised():
    with pytest.raises(
        ValueError, match=r"lack \['prompt_ids', 'rejected_ids'\].*chosen_ids.*text"
    ):
        DataCollatorForPreference(pad_token_id=0)([{"chosen_ids": [1], "text": "a"}])
    with pytest.raises(ValueError, match="no rows"):
        DataCollatorForPreference(pad_token_id=0)([])
