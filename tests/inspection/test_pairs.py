"""Counts of a data set that is small enough to count by hand."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from dpo_fast.inspection import draw, inspect_dataset
from tests.tiny import tiny_tokenizer

P, Q = [1, 2, 3, 4], [7, 8]
ROWS = [
    {"prompt_ids": P, "chosen_ids": [10, 11], "rejected_ids": [12]},
    {"prompt_ids": P, "chosen_ids": [12], "rejected_ids": [10, 11]},  # exchanged
    {"prompt_ids": P, "chosen_ids": [10, 11], "rejected_ids": [12]},  # as the first
    {"prompt_ids": Q, "chosen_ids": [13], "rejected_ids": [13]},  # a tie
    {"prompt_ids": [9], "chosen_ids": [14] * 5 + [15], "rejected_ids": [14] * 5},  # a tie once cut
    {"prompt_ids": [9] * 6, "chosen_ids": [16], "rejected_ids": [17]},  # nothing is left of these
    {"prompt_ids": [8], "chosen_ids": [], "rejected_ids": [17]},
]


def test_every_count() -> None:
    found = inspect_dataset(Dataset.from_list(ROWS), None, max_length=6, batch_size=2)
    assert (found.rows, found.kept) == (7, 5)
    assert found.dropped == {
        "the prompt alone fills max_length": 1,
        "the chosen answer has no token to score": 1,
    }
    assert found.truncated == 1
    assert (found.ties, found.ties_after_truncation) == (1, 1)
    assert (found.duplicates, found.contradictions) == (1, 3)
    assert (found.prompts, found.shared_prompts) == (4, 3)
    assert found.lengths["prompt"].tolist() == [4, 4, 4, 2, 1, 6]  # of the pairs with answers
    assert found.quantiles()["longer sequence"]["max"] == 7
    # Pairs of 6+5, 5+6, 6+5, 3+3, 6+6 tokens, two to a padded batch of the longest row.
    assert found.tokens == {"padded": 4 * 6 + 4 * 6 + 2 * 6, "packed": 51, "shared_prefix": 36}
    assert found.padding_share == pytest.approx(9 / 60)
    assert found.prefix_share == pytest.approx(15 / 51)
    assert found.as_dict()["lengths"]["prompt"]["median"] == 4.0


def test_counts_agree_with_what_training_prepares() -> None:
    from dpo_fast.data import prepare_dataset
    from tests.tiny import tiny_preferences

    rows = tiny_preferences(60)
    options: dict[str, Any] = {"max_length": 48, "truncation_mode": "keep_end"}
    found = inspect_dataset(Dataset.from_list(rows), tiny_tokenizer(), **options)
    prepared, report = prepare_dataset(Dataset.from_list(rows), tiny_tokenizer(), **options)
    assert (found.kept, found.truncated) == (len(prepared), report.truncated)
    assert found.prompt_not_prefix == report.prompt_not_prefix
    assert found.dropped == report.dropped


def test_prompts_that_do_not_begin_their_sequences() -> None:
    # "ri" and "ver" are one token together: the prompt's own tokens are not a prefix.
    rows = [{"prompt": "the ri", "chosen": "ver", "rejected": "ver follows"}]
    found = inspect_dataset(Dataset.from_list(rows), tiny_tokenizer())
    assert found.prompt_not_prefix == 1
    assert found.prompt_example is not None


def test_a_stream_is_refused() -> None:
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match="stream"):
        inspect_dataset(stream, None)


def test_the_picture_is_a_png_of_any_data_set() -> None:
    found = inspect_dataset(Dataset.from_list(ROWS[:1]), None, max_length=None)
    assert draw(found).startswith(b"\x89PNG")
    assert np.all(found.lengths["prompt"] == 4)
