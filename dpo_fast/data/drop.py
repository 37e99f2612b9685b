"""Which tokenised pairs can be trained on after truncation, and why the others cannot.

P pairs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_fast.data.rows import ID_COLUMNS

Lengths = npt.NDArray[np.int64]
REASONS = (
    "the prompt alone fills max_length",
    "the chosen answer has no token to score",
    "the rejected answer has no token to score",
)


@dataclass(frozen=True)
class Truncation:
    """How the collator will cut sequences: to ``max_length`` tokens (None: never), at which end."""

    max_length: int | None
    mode: str

    def __str__(self) -> str:
        return f"max_length={self.max_length}, truncation_mode={self.mode!r}"

    def scored(self, prompt: Lengths, answer: Lengths) -> Lengths:
        """Answer tokens that stay and have a token before them: a first token is not predicted.

        Args:
            prompt: ``[P]`` tokens of each prompt.
            answer: ``[P]`` tokens of each answer.
        """
        excess = self.excess(prompt, answer)
        if self.mode == "keep_start":
            kept, start = np.clip(answer - excess, 0, None), prompt
        else:
            start = np.clip(prompt - excess, 0, None)
            kept = np.minimum(answer, prompt + answer - excess)
        return np.where(start == 0, np.clip(kept - 1, 0, None), kept)

    def excess(self, prompt: Lengths, answer: Lengths) -> Lengths:
        """``[P]`` tokens that are cut off."""
        if self.max_length is None:
            return np.zeros_like(prompt)
        return np.clip(prompt + answer - self.max_length, 0, None)

    def fault(self, prompt: Lengths, chosen: Lengths, rejected: Lengths) -> Lengths:
        """``[P]``: position in :data:`REASONS` of what bars a pair from training, or -1."""
        fault = np.full(prompt.shape, -1)
        fault[self.scored(prompt, rejected) == 0] = 2
        fault[self.scored(prompt, chosen) == 0] = 1
        if self.max_length is not None and self.mode == "keep_start":
            fault[prompt >= self.max_length] = 0
        return fault


def token_lengths(dataset: Any) -> tuple[Lengths, Lengths, Lengths]:
    """Lengths ``[P]`` of prompt_ids, chosen_ids and rejected_ids of a ``datasets.Dataset``.

    Read from Arrow's offsets: no token is converted to Python.

    Raises:
        TypeError: a column is not a list of integers.
        ValueError: a row of a column is null.
    """
    import pyarrow.compute as pc
    import pyarrow.types

    lengths: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ID_COLUMNS}
    for table in dataset.select_columns(list(ID_COLUMNS)).with_format("arrow").iter(10_000):
        for name, parts in lengths.items():
            column = table.column(name)
            kind = column.type
            if not hasattr(kind, "value_type") or not (
                pyarrow.types.is_integer(kind.value_type) or pyarrow.types.is_null(kind.value_type)
            ):
                raise TypeError(f"column {name!r} holds {kind}, expected a list of token ids a row")
            if column.null_count:
                raise ValueError(f"column {name!r} is null in {column.null_count} rows")
            parts.append(pc.list_value_length(column).to_numpy())
    prompt, chosen, rejected = (
        np.concatenate(parts).astype(np.int64) for parts in lengths.values()
    )
    return prompt, chosen, rejected
