"""The batches that a plan is made for: of pairs with given lengths, or out of a data set.

Legend: P pairs of a micro-batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_fast.layouts import LayoutChoice, make_collator, pair_lengths
from dpo_fast.layouts.joined_rows import join_rows
from dpo_fast.row_groups import group_rows

Row = dict[str, Any]


class Batches(NamedTuple):
    """``largest``: the rows whose memory counts; ``typical``: those whose time counts."""

    largest: list[Row]
    typical: list[Row]
    source: str


def batches_of_lengths(
    pairs: int, prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]
) -> Batches:
    """Pairs with these numbers of tokens, taken in turn where there are fewer numbers than pairs.

    Raises:
        ValueError: a number is smaller than 1.
    """
    named = {"pairs": [pairs], "prompt": prompt, "chosen": chosen, "rejected": rejected}
    for name, numbers in named.items():
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name}={list(numbers)} must be numbers of at least 1")
    rows = [
        {
            "prompt_ids": [3] * prompt[i % len(prompt)],
            # Different from the start: what both answers share is the prompt alone.
            "chosen_ids": [1] * chosen[i % len(chosen)],
            "rejected_ids": [2] * rejected[i % len(rejected)],
        }
        for i in range(pairs)
    ]
    source = (
        f"{pairs} pairs a micro-batch, prompts of {_numbers(prompt)}, chosen {_numbers(chosen)}, "
        f"rejected {_numbers(rejected)} tokens"
    )
    return Batches(rows, rows, source)


def _numbers(values: Sequence[int]) -> str:
    return "/".join(map(str, values))


def batches_of_dataset(
    dataset: Any, pairs: int, max_length: int | None, truncation_mode: str
) -> Batches:
    """Of a prepared data set: the longest pairs, which may meet in one batch, and pairs spread
    evenly over all lengths.
    """
    pairs = min(pairs, len(dataset))
    lengths = pair_lengths(dataset, max_length, truncation_mode)
    order = np.argsort(lengths.packed, kind="stable")
    spread = order[((np.arange(pairs) + 0.5) / pairs * len(order)).astype(int)]
    source = (
        f"{pairs} pairs a micro-batch out of {len(dataset)}; memory for the longest ones, time for "
        "pairs spread evenly over all lengths"
    )
    return Batches(_rows(dataset, order[-pairs:]), _rows(dataset, spread), source)


def _rows(dataset: Any, indices: np.ndarray) -> list[Row]:
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: dataset[int(i)][name] for name in columns} for i in indices]


def collate(
    rows: list[Row],
    layout: str,
    *,
    max_length: int | None,
    truncation_mode: str,
    on_accelerator: bool,
    joins_rows: bool,
) -> dict[str, Any]:
    """The batch that the trainer would make of the rows.

    ``joins_rows``: the model computes the same from packed rows.
    """
    plan_rows = join_rows if joins_rows else group_rows
    collator = make_collator(
        LayoutChoice(layout, "planned"),
        pad_token_id=0,
        max_length=max_length,
        truncation_mode=truncation_mode,
        few_shapes=on_accelerator,
        plan_rows=None if on_accelerator else plan_rows,
    )
    return collator(rows)
