"""Micro-batches by a budget of tokens: the pairs of one optimizer step, cut anew.

An optimizer step holds the pairs that it would hold without a budget (batch size x accumulation x
ranks, in the sampler's order); only the cut into forwards and backwards changes. Pairs stay whole.

Legend: P pairs.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpo_fast.batch import SEGMENTS_KEY
from dpo_fast.data.collate import DataCollatorForPreference, check_rows
from dpo_fast.layouts.lengths import pair_lengths
from dpo_fast.layouts.packed import PackedCollator
from dpo_fast.layouts.packing import first_fit_decreasing

logger = logging.getLogger("dpo_fast")

Row = dict[str, Any]


class Rows:
    """Rows on their way from a loader's worker: opaque, so that nobody walks through their ids."""

    __slots__ = ("rows",)

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)


def collect_rows(examples: Sequence[Row]) -> dict[str, Any]:
    """A data collator that leaves the rows as they are: ``pair_index`` ``[P]`` and ``rows``.

    The pairs of a step come in several such batches; :class:`TokenBudget` cuts them together.

    Raises:
        ValueError: the rows are none or lack a key.
    """
    check_rows(examples)
    return {"pair_index": torch.arange(len(examples)), "rows": Rows(examples)}


class TokenBudget:
    """Cuts the pairs of a step into micro-batches of at most so many tokens.

    Args:
        collator: makes the batch of a micro-batch (:func:`dpo_fast.layouts.make_collator`); its
            layout decides what a pair costs.
        max_tokens_per_batch: tokens that one forward computes at most: padding counts, filling up
            to a few shapes does not. A pair that alone has more runs alone, with one warning.

    Raises:
        ValueError: the budget is smaller than 1, or the collator is somebody else's.
    """

    def __init__(
        self, collator: Callable[[list[Row]], dict[str, Any]], max_tokens_per_batch: int
    ) -> None:
        inner = getattr(collator, "collator", None)
        if not isinstance(inner, DataCollatorForPreference):
            raise ValueError(
                "max_tokens_per_batch needs to know what a pair costs, and the data collator is "
                "the caller's own: leave data_collator unset, or max_tokens_per_batch"
            )
        if max_tokens_per_batch < 1:
            raise ValueError(
                f"max_tokens_per_batch={max_tokens_per_batch} must be a positive number of tokens, "
                "or None for micro-batches of per_device_train_batch_size pairs"
            )
        self.collator, self.max_tokens = collator, max_tokens_per_batch
        self._rows_of = inner
        self._warned = False

    def cut(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Batches of all rows: first fit decreasing where rows are packed.

        Padded rows are sorted by length, so that those of one batch are of about one length.
        """
        inner = self._rows_of
        lengths = pair_lengths(rows, inner.max_length, inner.truncation_mode)
        if not isinstance(self.collator, PackedCollator):
            longest = [max(pair) for pair in zip(lengths.chosen, lengths.rejected, strict=True)]
            bins = padded_bins([int(n) for n in longest], self.max_tokens)
            costs = [2 * int(n) for n in longest]
        else:
            shares = self.collator.shares_prefix
            costs = (lengths.shared_prefix if shares else lengths.packed).tolist()
            bins = first_fit_decreasing(costs, self.max_tokens)
        self._warn(max(costs))
        return [self.collator([rows[i] for i in members]) for members in bins]

    def empty(self) -> dict[str, Any]:
        """A batch of no pairs: one token that is computed and not scored.

        Ranks that have fewer micro-batches forward it, since engines want all ranks to forward
        equally often.
        """
        if isinstance(self.collator, PackedCollator):
            return self.collator.empty()
        batch = PackedCollator(self._rows_of.pad_token_id).empty()
        del batch[SEGMENTS_KEY], batch["position_ids"]
        return batch

    def fill(self, batches: Sequence[dict[str, Any]], num_forwards: int) -> list[dict[str, Any]]:
        """``batches``, after empty ones up to ``num_forwards``.

        Raises:
            ValueError: there are more already.
        """
        missing = num_forwards - len(batches)
        if missing < 0:
            raise ValueError(f"{len(batches)} micro-batches are more than {num_forwards}")
        # Gradients are exchanged in the last backward, which should be a full one.
        return [self.empty() for _ in range(missing)] + list(batches)

    def _warn(self, longest: int) -> None:
        if longest > self.max_tokens and not self._warned:
            self._warned = True
            logger.warning(
                "A pair of %d tokens exceeds max_tokens_per_batch=%d: such pairs run alone.",
                longest,
                self.max_tokens,
            )


def padded_bins(longest: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of pairs such that two padded rows a pair have at most ``capacity`` positions.

    ``longest``: tokens of the longer sequence of each pair. The longest pairs come together first.
    A pair beyond the capacity has a bin of its own.
    """
    bins: list[list[int]] = []
    room = 0
    for item in sorted(range(len(longest)), key=lambda i: -longest[i]):
        if not room:
            bins.append([])
            room = max(capacity // max(2 * longest[item], 1), 1)
        bins[-1].append(item)
        room -= 1
    return sorted(sorted(b) for b in bins)
