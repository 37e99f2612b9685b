"""Preparation of an IterableDataset: the same rows as of a Dataset, made while they are read.

What happens to a stream cannot be counted beforehand; the first row that is dropped, and the first
prompt that loses its end, are logged once in each process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_fast.data.drop import REASONS, Truncation
from dpo_fast.data.ranks import warn
from dpo_fast.data.report import prompt_warning
from dpo_fast.data.rows import ID_COLUMNS, RowFormat
from dpo_fast.data.tokenize import PROMPT_END, RowTokenizer

# Small: a stream's first batch should not wait, and resuming reads a batch again.
_BATCH_ROWS = 16


@dataclass
class StreamTokenizer:
    """:class:`RowTokenizer` that warns about the first prompt that lost its end."""

    tokenizer: RowTokenizer
    name: str
    warned: bool = False

    def __call__(self, batch: Mapping[str, Any], indices: Sequence[int]) -> dict[str, list[Any]]:
        columns = self.tokenizer(batch, indices)
        ends = [end for end in columns.pop(PROMPT_END) if end is not None]
        if ends and not self.warned:
            self.warned = True
            warn(prompt_warning(self.name, ends[0], "rows of the stream (said once)"))
        return columns


@dataclass
class StreamFilter:
    """Predicate that keeps the pairs that can be trained on."""

    truncation: Truncation
    name: str
    warned: bool = False

    def __call__(self, row: Mapping[str, Any]) -> bool:
        prompt, chosen, rejected = (np.array([len(row[column])]) for column in ID_COLUMNS)
        fault = int(self.truncation.fault(prompt, chosen, rejected)[0])
        if fault >= 0 and not self.warned:
            self.warned = True
            warn(
                f"{self.name}: rows of the stream are dropped because {REASONS[fault]} "
                f"({self.truncation}); said once"
            )
        return fault < 0


def prepare_stream(
    dataset: Any,
    processing_class: Any,
    row_format: RowFormat,
    truncation: Truncation,
    name: str,
) -> Any:
    """The lazy dataset with its token columns, without the pairs that cannot be trained on."""
    if not row_format.tokenised:
        dataset = dataset.map(
            StreamTokenizer(RowTokenizer(processing_class, row_format), name),
            with_indices=True,
            batched=True,
            batch_size=_BATCH_ROWS,
        )
    return dataset.filter(StreamFilter(truncation, name))
