"""Rows of a padded batch, run through the backbone in groups of like length.

A processor without an accelerator gains nothing from one large batch: a few rows fill its matrix
units, their activations stay in its caches, and what a row lacks to the longest one of its group is
all that is computed in vain. The batch and the hidden states that come out of it are those of
padded rows. This serves what packed rows do not (state spaces, ALiBi, the caller's own collator);
:mod:`dpo_fast.layouts.joined_rows` serves the rest. On a GPU, launches cost more than they save.

Legend: B rows, T padded length, H hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What one more pass through the layers costs, in tokens: their weight gradients are added up in
# memory (12 bytes a parameter, against 6 FLOP a parameter and token), and every op is called again.
PASS_TOKENS = 48


@dataclass(frozen=True)
class RowGroups:
    """``groups``: (row numbers, width) of each pass; every row is in one of them."""

    groups: tuple[tuple[tuple[int, ...], int], ...]

    @property
    def num_tokens(self) -> int:
        """Positions that the backbone computes."""
        return sum(len(rows) * width for rows, width in self.groups)

    def run(self, run: Callable[..., Tensor], inputs: Mapping[str, Any]) -> Tensor | None:
        """:func:`run_in_groups`."""
        return run_in_groups(run, inputs, self)


def group_rows(attention_mask: Tensor, token_index: Tensor | None = None) -> RowGroups | None:
    """Groups with the least work for ``attention_mask [B, T]``; None where one pass does best.

    Rows that are padded elsewhere than on the right, or not attended at all, are left together.
    ``token_index`` makes no difference: all positions of a group are computed.
    """
    sizes = right_padded_lengths(attention_mask)
    groups = _least_work(sizes) if sizes else ()
    return RowGroups(groups) if len(groups) > 1 else None


def right_padded_lengths(attention_mask: Tensor) -> list[int] | None:
    """Attended tokens of each row of ``attention_mask [B, T]``; None where a row is empty, or
    padded elsewhere than on the right.
    """
    attended = attention_mask != 0
    lengths = attended.sum(dim=1)
    right_padded = torch.equal(
        attended, torch.arange(attended.shape[1], device=attended.device) < lengths[:, None]
    )
    sizes: list[int] = lengths.tolist()
    return sizes if right_padded and sizes and min(sizes) > 0 else None


def _least_work(lengths: Sequence[int]) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Consecutive runs of the rows in order of length, by dynamic programming over the last run."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    best, start_of = [0], [0]
    for stop in range(1, len(order) + 1):
        width = lengths[order[stop - 1]]
        costs = [best[start] + (stop - start) * width + PASS_TOKENS for start in range(stop)]
        start = min(range(stop), key=lambda i: (costs[i], i))
        best.append(costs[start])
        start_of.append(start)
    groups, stop = [], len(order)
    while stop:
        start = start_of[stop]
        groups.append((tuple(order[start:stop]), lengths[order[stop - 1]]))
        stop = start
    return tuple(groups)


def run_in_groups(
    run: Callable[..., Tensor], inputs: Mapping[str, Any], groups: RowGroups
) -> Tensor | None:
    """``run(**inputs) -> [B, T, H]`` group by group; positions beyond a group's width are zero.

    None where that cannot be done: an input is a tensor of other than ``[B, T, ...]``, or there
    are no ``input_ids`` (prompt learning has made embeddings of them).
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape[0] != sum(len(rows) for rows, _ in groups.groups):
        return None
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    if any(v.shape[:2] != ids.shape for v in tensors.values()):
        return None
    parts = []
    for rows, width in groups.groups:
        index = torch.tensor(rows, device=ids.device)
        cut = {k: v.index_select(0, index)[:, :width] for k, v in tensors.items()}
        hidden = run(**{**inputs, **cut})
        parts.append(F.pad(hidden, (0, 0, 0, ids.shape[1] - width)))
    order = torch.tensor([row for rows, _ in groups.groups for row in rows], device=ids.device)
    return torch.cat(parts).index_select(0, order.argsort())
