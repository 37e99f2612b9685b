"""Micro-batches by a budget of tokens: the pairs of one optimizer step, cut anew.

An optimizer step holds the pairs that it would hold without a budget (batch size x accumulation x
ranks, in the sampler's order); only the cut into forwards and backwards changes. Pairs stay whole.

Legend: P pairs.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpo_fast.data.collate import check_rows
from dpo_fast.layouts.packed import PackedCollator, PairTokens
from dpo_fast.layouts.packing import first_fit_decreasing

logger = logging.getLogger("dpo_fast")

MICRO_BATCHES_KEY = "micro_batches"


@dataclass
class BudgetCollator:
    """All pairs of one rank's part of an optimizer step, as micro-batches of few tokens.

    Args:
        collator: makes the batch of a micro-batch; its layout decides what a pair costs.
        max_tokens_per_batch: tokens that one forward computes at most, filling not counted. A pair
            that alone has more runs alone, with one warning.

    Calling it returns a dict of ``pair_index`` ``[P]``, ``seq_lens`` (scored tokens of all chosen,
    then of all rejected) and ``micro_batches``, a list of batches of ``collator``.

    Raises:
        ValueError: ``max_tokens_per_batch`` is smaller than 1.
    """

    collator: PackedCollator
    max_tokens_per_batch: int
    _warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_tokens_per_batch < 1:
            raise ValueError(
                f"max_tokens_per_batch={self.max_tokens_per_batch} must be a positive number of "
                "tokens, or None for micro-batches of per_device_train_batch_size pairs"
            )

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        check_rows(examples)
        pairs = [self.collator.pair_tokens(example) for example in examples]
        self._warn(pairs)
        bins = first_fit_decreasing([p.executed for p in pairs], self.max_tokens_per_batch)
        batches = []
        for members in bins:
            batch = self.collator.collate_pairs([pairs[i] for i in members])
            self.collator.add_references(batch, [examples[i] for i in members])
            batches.append(batch)
        return {
            "pair_index": torch.arange(len(pairs)),
            "seq_lens": _seq_lens(bins, batches, len(pairs)),
            MICRO_BATCHES_KEY: batches,
        }

    def _warn(self, pairs: Sequence[PairTokens]) -> None:
        longest = max(pair.executed for pair in pairs)
        if longest > self.max_tokens_per_batch and not self._warned:
            self._warned = True
            logger.warning(
                "A pair of %d tokens exceeds max_tokens_per_batch=%d: such pairs run alone.",
                longest,
                self.max_tokens_per_batch,
            )


def _seq_lens(bins: list[list[int]], batches: list[dict[str, Any]], num_pairs: int) -> list[int]:
    """Scored tokens of all sequences, chosen first, in the order of the rows."""
    lens = [0] * (2 * num_pairs)
    for members, batch in zip(bins, batches, strict=True):
        for i, pair in enumerate(members):
            lens[pair] = batch["seq_lens"][i]
            lens[num_pairs + pair] = batch["seq_lens"][len(members) + i]
    return lens


def split_step(
    batches: Sequence[dict[str, Any]], num_forwards: int, empty: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """The micro-batches of a rank, filled up with empty ones to the number that all ranks forward.

    Args:
        batches: the rank's own micro-batches, at least one.
        num_forwards: the largest number of micro-batches of any rank.
        empty: ``collator.empty()``, or None where there is one rank.

    Raises:
        ValueError: the rank has more than ``num_forwards``, or an empty batch is missing.
    """
    missing = num_forwards - len(batches)
    if missing < 0 or (missing and empty is None):
        raise ValueError(
            f"{len(batches)} micro-batches cannot be filled up to {num_forwards} "
            "without an empty one"
        )
    # Empty ones first: gradients are exchanged in the last backward, which should be a full one.
    return [dict(empty) for _ in range(missing) if empty is not None] + list(batches)
