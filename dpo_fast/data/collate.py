"""Rows of token ids to a padded batch, with TRL's keys and values.

P pairs, S = 2P sequences (all chosen first, then all rejected), T padded length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

TRUNCATION_MODES = ("keep_start", "keep_end")
_ID_KEYS = ("prompt_ids", "chosen_ids", "rejected_ids")
_REF_KEYS = ("ref_chosen_logps", "ref_rejected_logps")


def check_truncation(max_length: int | None, truncation_mode: str) -> None:
    """Raise unless the pair of arguments means something.

    Raises:
        ValueError: ``max_length`` is smaller than 1, or ``truncation_mode`` is unknown.
    """
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(
            f"truncation_mode={truncation_mode!r} is unknown; use one of {list(TRUNCATION_MODES)}"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(
            f"max_length={max_length} leaves no token; use a positive number of tokens, or None "
            "for no truncation"
        )


@dataclass
class DataCollatorForPreference:
    """Preference rows to a right-padded batch: all chosen rows, then all rejected rows.

    Each row has ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` (lists of token ids), and
    optionally ``ref_chosen_logps`` and ``ref_rejected_logps`` (floats).

    Args:
        pad_token_id: fills ``input_ids`` to the right of a sequence.
        max_length: prompt and completion together are cut to this many tokens; None: never.
        truncation_mode: ``"keep_start"`` cuts the end, ``"keep_end"`` cuts the start.
        pad_to_multiple_of: round T up to a multiple of this; None: no rounding.
        return_tensors: ``"pt"`` only.

    Calling it returns a dict of ``input_ids``, ``attention_mask`` and ``completion_mask`` (each
    ``[2P, T]`` int64), plus ``ref_chosen_logps`` and ``ref_rejected_logps`` (each ``[P]`` float32)
    where the rows have them.

    Raises:
        ValueError: an argument is out of range, or (when called) the rows are none or lack a key.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        check_truncation(self.max_length, self.truncation_mode)
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of} must be a positive number, or None"
            )
        if self.return_tensors != "pt":
            raise ValueError(
                f"return_tensors={self.return_tensors!r} is not supported; only 'pt' is"
            )

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.torch_call(examples)

    def torch_call(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch; the method that subclasses of TRL's collator extend."""
        check_rows(examples)
        rows, starts = [], []
        for key in ("chosen_ids", "rejected_ids"):
            for example in examples:
                ids, start = self.truncate(example["prompt_ids"], example[key])
                rows.append(ids)
                starts.append(start)
        output = self._pad(rows, np.array(starts))
        for key in _REF_KEYS:
            if key in examples[0]:
                output[key] = torch.tensor([example[key] for example in examples])
        return output

    def truncate(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[int], int]:
        """Token ids of one sequence and the position where its completion starts (or would)."""
        ids = [*prompt, *answer]
        excess = len(ids) - self.max_length if self.max_length is not None else 0
        if excess <= 0:
            return ids, len(prompt)
        if self.truncation_mode == "keep_start":
            return ids[: self.max_length], len(prompt)
        return ids[excess:], max(len(prompt) - excess, 0)

    def _pad(self, rows: list[list[int]], starts: np.ndarray) -> dict[str, torch.Tensor]:
        lengths = np.array([len(row) for row in rows])
        multiple = self.pad_to_multiple_of or 1
        width = -(-int(lengths.max()) // multiple) * multiple
        position = np.arange(width)
        attended = position < lengths[:, None]
        input_ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        # A boolean mask is filled in row-major order, which is the order of the chained rows.
        input_ids[attended] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attended.astype(np.int64)),
            "completion_mask": torch.from_numpy(
                (attended & (position >= starts[:, None])).astype(np.int64)
            ),
        }


def check_rows(examples: Sequence[dict[str, Any]]) -> None:
    if not examples:
        raise ValueError(
            "the data collator was called with no rows; a batch needs at least one pair"
        )
    missing = [key for key in _ID_KEYS if key not in examples[0]]
    if missing:
        raise ValueError(
            f"the rows lack {missing}; they have {sorted(examples[0])}. Tokenise the dataset first "
            f"(dpo_fast.data.prepare_dataset), or pass rows with {', '.join(_ID_KEYS)}"
        )
