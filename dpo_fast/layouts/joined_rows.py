"""Padded rows, run through the backbone as one row without padding.

The batch and the hidden states that come out of it are those of padded rows; in between, the
attended tokens lie one after the other, and the attention gets the rows as segments. On a CPU this
is what padded rows of models do that compute the same from packed rows;
:mod:`dpo_fast.row_groups` serves the others.

Legend: B rows, T padded length, L attended tokens of all rows, H hidden.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_fast.batch import GROUPS_KEY, SEGMENTS_KEY
from dpo_fast.layouts.segments import Segment, Segments
from dpo_fast.models.backbone import run_backbone
from dpo_fast.row_groups import right_padded_lengths


class JoinedRows:
    """What a padded batch carries in place of ``RowGroups``.

    Args:
        lengths: attended tokens of each row, the row's first ones.
        scored: ``[N]`` positions of the joined row that predict a scored token; None: not known.
    """

    # A plain class: engines rebuild dataclasses that they find in a model's arguments.
    def __init__(self, lengths: list[int], scored: np.ndarray | None = None) -> None:
        self.lengths = lengths
        self.segments = Segments(map(Segment, row_starts(lengths), lengths), scored)

    @property
    def num_tokens(self) -> int:
        """Positions that the backbone computes."""
        return self.segments.length

    def run(self, run: Callable[..., Tensor], inputs: Mapping[str, Any]) -> Tensor | None:
        """``run(**inputs) -> [B, T, H]``, zero where nothing is attended, and no more than what
        scored tokens need where they are known.

        Args:
            run: the backbone, from ``[1, L]`` to ``[1, L, H]``.
            inputs: ``input_ids`` and ``attention_mask`` ``[B, T]``, and what is no tensor.

        Returns:
            None where that cannot be done: the attention does not read segments, there are other
            tensors among the inputs, or no ``input_ids`` (prompt learning has made embeddings).
        """
        ids = inputs.get("input_ids")
        tensors = {k for k, v in inputs.items() if isinstance(v, Tensor)}
        rows = len(self.lengths)
        if tensors != {"input_ids", "attention_mask"} or ids is None or ids.shape[0] != rows:
            return None
        position = torch.cat([torch.arange(n) for n in self.lengths]).to(ids.device)
        starts = [torch.full((n,), i) for i, n in enumerate(self.lengths)]
        row = torch.cat(starts).to(ids.device)
        index = row * ids.shape[1] + position
        joined = {
            "input_ids": ids.flatten()[index][None],
            "position_ids": position[None],
            # Who sees whom is in the segments; a 4-D mask is handed on as it is.
            "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device),
            SEGMENTS_KEY: self.segments.for_scored(),
        }
        calls = self.segments.num_calls
        hidden = run_backbone(run, {**inputs, **joined})[0]
        if self.segments.num_calls == calls:
            return None
        padded = hidden.new_zeros(ids.numel(), hidden.shape[-1]).index_copy(0, index, hidden)
        return padded.view(*ids.shape, -1)

    def __repr__(self) -> str:
        return f"JoinedRows({self.lengths})"


def join_rows(attention_mask: Tensor, token_index: Tensor | None = None) -> JoinedRows | None:
    """The rows of ``attention_mask [B, T]``; None where one is empty or not padded on the right.

    ``token_index [N]``: flat positions in ``[B * T]`` that predict a scored token, on the CPU.
    """
    lengths = right_padded_lengths(attention_mask)
    if not lengths:
        return None
    if token_index is None:
        return JoinedRows(lengths)
    row, position = np.divmod(token_index.cpu().numpy(), attention_mask.shape[1])
    return JoinedRows(lengths, np.array(row_starts(lengths))[row] + position)


def row_starts(lengths: list[int]) -> list[int]:
    """Where each row of the joined one begins."""
    return [sum(lengths[:i]) for i in range(len(lengths))]


def has_segments(batch: Mapping[str, Any]) -> bool:
    """Whether a forward of the batch asks the attention to read segments."""
    return SEGMENTS_KEY in batch or isinstance(batch.get(GROUPS_KEY), JoinedRows)
