"""How many tokens each layout computes on a data set, from the lengths of its rows.

Legend: P pairs.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PairLengths(NamedTuple):
    """Tokens of each pair after truncation; ``[P]`` int64 each.

    ``shared`` is what both sequences have in common at least: their prompt. With
    ``truncation_mode="keep_end"`` it is 0 where truncation cuts the two differently.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    shared: np.ndarray

    @property
    def packed(self) -> np.ndarray:
        """Tokens of both sequences."""
        return self.chosen + self.rejected

    @property
    def shared_prefix(self) -> np.ndarray:
        """Tokens with the common prompt once."""
        return self.packed - self.shared

    def padded(self, batch_size: int) -> int:
        """Positions of padded batches of ``batch_size`` pairs, in this order."""
        longest = np.maximum(self.chosen, self.rejected)
        starts = np.arange(0, len(longest), batch_size)
        if not len(longest):
            return 0
        pairs = np.diff(np.append(starts, len(longest)))
        return int((2 * pairs * np.maximum.reduceat(longest, starts)).sum())


def pair_lengths(
    dataset: Any, max_length: int | None = None, truncation_mode: str = "keep_start"
) -> PairLengths:
    """Lengths of the pairs of a prepared data set (a ``datasets.Dataset``, or a list of rows).

    Reads the lengths of the token columns, not the tokens.
    """
    prompt, chosen, rejected = _column_lengths(dataset)
    first, second = prompt + chosen, prompt + rejected
    shared = prompt.copy()
    if max_length is not None:
        if truncation_mode == "keep_end":
            cut = np.maximum(first - max_length, 0), np.maximum(second - max_length, 0)
            shared = np.where(cut[0] == cut[1], np.maximum(prompt - cut[0], 0), 0)
        first, second = np.minimum(first, max_length), np.minimum(second, max_length)
        shared = np.minimum(shared, np.minimum(first, second))
    return PairLengths(first, second, shared)


def _column_lengths(dataset: Any) -> list[np.ndarray]:
    if hasattr(dataset, "with_format"):
        return _arrow_lengths(dataset)
    rows: Iterable[Any] = list(dataset)
    return [np.array([len(row[c]) for row in rows], dtype=np.int64) for c in _COLUMNS]


def _arrow_lengths(dataset: Any) -> list[np.ndarray]:
    import pyarrow.compute as pc

    batches = dataset.select_columns(list(_COLUMNS)).with_format("arrow")
    lengths: list[list[np.ndarray]] = [[], [], []]
    for table in batches.iter(batch_size=10_000):
        for column, found in zip(_COLUMNS, lengths, strict=True):
            found.append(pc.list_value_length(table[column]).to_numpy())
    empty = [np.zeros(0, dtype=np.int64)]
    return [np.concatenate(found or empty).astype(np.int64) for found in lengths]
