"""Pairs that truncation leaves nothing to score: dropped, counted, reported."""

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_fast.batch import PlannedCollator
from dpo_fast.data import DataCollatorForPreference, PrepareReport, prepare_dataset
from dpo_fast.data.drop import REASONS, Truncation
from tests.data.rows import tokens
from tests.data.trl_side import trl_prepare
from tests.tiny import tiny_preferences, tiny_tokenizer


@example([(3, 2, 5)], 1, "keep_end")
@given(
    st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=6),
    st.one_of(st.none(), st.integers(1, 10)),
    st.sampled_from(["keep_start", "keep_end"]),
)
def test_dropped_rows_are_those_the_collator_leaves_nothing_to_score(lengths, max_length, mode):
    collator = PlannedCollator(DataCollatorForPreference(0, max_length, mode))
    columns = [np.array(column) for column in zip(*lengths, strict=True)]
    truncation = Truncation(max_length, mode)
    fault = truncation.fault(*columns)
    counted = [truncation.scored(columns[0], answer) for answer in columns[1:]]
    for i, (row, found) in enumerate(zip(tokens(*lengths), fault, strict=True)):
        scored_chosen, scored_rejected = collator([row])["seq_lens"]
        assert (counted[0][i], counted[1][i]) == (scored_chosen, scored_rejected)
        assert (found >= 0) == (scored_chosen == 0 or scored_rejected == 0)
        if found == REASONS.index("the chosen answer has no token to score"):
            assert scored_chosen == 0
        if found == REASONS.index("the rejected answer has no token to score"):
            assert scored_rejected == 0 and scored_chosen > 0


def test_every_drop_is_counted_with_its_reason(caplog):
    rows = tokens((9, 2, 2), (8, 1, 1), (3, 0, 2), (3, 2, 0), (0, 1, 2), (2, 3, 9), (2, 2, 2))
    kept, report = prepare_dataset(Dataset.from_list(rows), None, max_length=8)
    assert kept.to_list() == rows[5:]
    assert report == PrepareReport(
        name="train",
        rows_in=7,
        rows_out=2,
        dropped={
            "the prompt alone fills max_length": 2,
            "the chosen answer has no token to score": 2,
            "the rejected answer has no token to score": 1,
        },
        truncated=1,
        prompt_not_prefix=0,
    )
    assert report.describe() == (
        "train: 2 of 7 pairs kept, 2 dropped (the prompt alone fills max_length), 2 dropped (the "
        "chosen answer has no token to score), 1 dropped (the rejected answer has no token to "
        "score), 1 truncated"
    )
    (warning,) = caplog.messages
    assert report.describe() in warning and "max_length=8" in warning


def test_nothing_is_said_when_nothing_is_dropped(caplog):
    kept, report = prepare_dataset(Dataset.from_list(tokens((3, 2, 1))), None)
    assert (report.rows_in, report.rows_out, report.dropped) == (1, 1, {})
    assert caplog.messages == []
    assert report.describe() == "train: 1 of 1 pairs kept"
    assert len(kept) == 1


def test_keep_end_keeps_long_prompts_as_trl_does():
    dataset = Dataset.from_list(tiny_preferences(20))
    tokenizer = tiny_tokenizer()
    ours, report = prepare_dataset(dataset, tokenizer, max_length=30, truncation_mode="keep_end")
    assert ours.to_list() == trl_prepare(dataset, tokenizer, 30, "keep_end").to_list()
    assert report.rows_out == 20 and report.truncated > 10


def test_all_dropped_says_what_to_do():
    dataset = Dataset.from_list(tokens((9, 2, 2), (12, 2, 2)))
    with pytest.raises(
        ValueError, match=r"0 of 2 pairs.*max_length=8.*12 tokens.*raise max_length"
    ):
        prepare_dataset(dataset, None, max_length=8)


def test_first_dropped_row_of_a_stream_is_logged_once(caplog):
    rows = tokens((3, 2, 1), (9, 1, 1), (9, 2, 2), (1, 1, 1))
    stream, report = prepare_dataset(
        Dataset.from_list(rows).to_iterable_dataset(), None, max_length=8, name="valid"
    )
    assert caplog.messages == []
    assert list(stream) == [rows[0], rows[3]]
    (warning,) = caplog.messages
    assert "valid" in warning and REASONS[0] in warning and "max_length=8" in warning
    assert "stream" in report.describe()


def test_prompt_warning_of_a_stream_is_logged_once(caplog):
    rows = [{"prompt": "the riv", "chosen": "er carries", "rejected": "er paints"}] * 40
    stream, _ = prepare_dataset(
        IterableDataset.from_generator(lambda: iter(rows)), tiny_tokenizer()
    )
    assert len(list(stream)) == 40
    (warning,) = caplog.messages
    assert "' riv'" in warning
