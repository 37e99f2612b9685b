"""The loop that fills the cache: rows by length, shared by ranks, in parts that survive a kill.

P pairs, S = 2P sequences, N scored tokens.
"""

import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpo_fast.batch import TokenPlan
from dpo_fast.functional.segments import segment_sum
from dpo_fast.out_of_memory import OutOfMemory, is_out_of_memory
from dpo_fast.ranks import Ranks
from dpo_fast.reference.cache import NUM_VALUES, LogpsCache
from dpo_fast.reference.progress import Progress
from dpo_fast.reference.rng import preserve_rng
from dpo_fast.reference.rows import RowKeys
from dpo_fast.reference.scored import ScoredReference

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("dpo_fast")

PART_ROWS = 1024
PART_SECONDS = 60.0


@dataclass(frozen=True)
class Precompute:
    """How the loop runs; nothing of it changes the key.

    Attributes:
        collator: rows to a batch (``PlannedCollator``).
        batch_size: pairs a forward.
        device: where the reference is.
        ranks: who share the work.
        part_rows, part_seconds: a part is written when it has so many rows or is so old; a kill
            loses at most that, on each rank.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    batch_size: int
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    part_rows: int = PART_ROWS
    part_seconds: float = PART_SECONDS

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(
                f"precompute_ref_batch_size={self.batch_size} must be at least 1 pair a forward"
            )


def plan_batches(keys: RowKeys, batch_size: int) -> list[np.ndarray]:
    """Row numbers of each forward: every distinct row once, longest first.

    The composition of a batch depends on the set of rows only, not on their order, nor on what is
    in the cache: a run that was killed goes on with the same batches and gets the same bits. The
    longest come first, so that a batch that does not fit in memory is the first one.
    """
    _, first = np.unique(keys.digests, axis=0, return_index=True)
    # np.unique sorts by digest; a stable sort by length keeps that order among equals
    order = first[np.argsort(-keys.lengths[first], kind="stable")]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def shares(tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The batches of each rank: one after the other to the rank that has the fewest tokens yet.

    Longest first, two ranks differ by at most one batch. All ranks get the same answer from the
    same ``tokens``.
    """
    load = [0] * num_ranks
    out: list[list[int]] = [[] for _ in range(num_ranks)]
    for batch, count in enumerate(tokens):
        rank = load.index(min(load))
        out[rank].append(batch)
        load[rank] += count
    return out


def share_of_missing(keys: RowKeys, cache: LogpsCache, how: Precompute) -> list[np.ndarray]:
    """Row numbers of the forwards that are this rank's; a row that any rank lacks is missing.

    What is missing is shared anew in every run, whoever computed the rest: after a kill any number
    of ranks goes on. Batches stay what they would have been, so the values are the same to the bit.
    """
    missing = how.ranks.any(~cache.has(keys.digests))
    planned = plan_batches(keys, how.batch_size)
    todo = [rows for batch in planned if len(rows := batch[missing[batch]])]
    tokens = [2 * len(rows) * int(keys.lengths[rows].max()) for rows in todo]
    return [todo[i] for i in shares(tokens, how.ranks.size)[how.ranks.rank]]


def compute_missing(
    reference: ScoredReference,
    dataset: "Dataset",
    keys: RowKeys,
    cache: LogpsCache,
    how: Precompute,
    name: str,
    todo: Sequence[np.ndarray],
) -> int:
    """Compute the rows ``todo`` of ``dataset`` that ``cache`` lacks; return how many.

    The global random generators stay as they were. Interrupted, it stores what is done.

    Args:
        todo: row numbers of each forward (:func:`share_of_missing`).

    Raises:
        ValueError: a log-prob is NaN or infinite; names the row.
        OSError: the cache cannot be written any more; says what is kept.
        KeyboardInterrupt: with the way to go on in the message.
    """
    total = sum(len(rows) for rows in todo)
    if not total:
        return 0
    if cache.is_being_filled():
        # jobs of one sweep, started together: each in an order of its own, seeing what others did
        todo = random.Random(os.getpid()).sample(todo, len(todo))
    plain = dataset.with_format(None)
    part = _Part(cache, keys, how)
    try:
        with preserve_rng(), Progress(total, name, show=how.ranks.rank == 0) as progress:
            for planned in todo:
                rows = planned[~cache.has(keys.digests[planned])]
                if not len(rows):
                    progress.advance(len(planned), 0)
                    continue
                batch = how.collator([plain[int(i)] for i in rows])
                values = _scored(reference, batch, how)
                part.add(rows, values)
                progress.advance(len(rows), int(batch["attention_mask"].sum()))
            part.write()
    except KeyboardInterrupt:
        part.write()
        raise KeyboardInterrupt(
            f"precompute of {name!r} interrupted: {part.written} of {total} rows are in "
            f"{cache.folder}. Run the same command again: it goes on from there."
        ) from None
    return part.written


def _scored(reference: ScoredReference, batch: Mapping[str, Any], how: Precompute) -> Tensor:
    """:func:`pair_sums` on the device.

    Raises:
        OutOfMemory: with the smaller batch that would do.
    """
    try:
        return pair_sums(reference, _to_device(batch, how.device))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        pairs = len(batch["seq_lens"]) // 2
        smaller = (
            f"set precompute_ref_batch_size={max(pairs // 2, 1)}"
            if pairs > 1
            else "one pair alone is too long: set lm_head_workspace or a smaller max_length"
        )
        raise OutOfMemory(
            f"{error}\nOut of memory in a reference forward of {pairs} pairs, "
            f"{batch['executed_tokens']:,} positions: {smaller}. The longest batches come first: "
            "what is stored is kept, and later ones are smaller."
        ) from error


def pair_sums(reference: ScoredReference, batch: Mapping[str, Any]) -> Tensor:
    """``[P, 4]`` float64: sums over head and tail of the chosen, then of the rejected answer."""
    logps = reference.token_logps(batch)
    plan = TokenPlan.from_batch(batch).to(logps.device)
    in_head = plan.ld_weight(0.0) > 0
    zero = torch.zeros_like(logps)
    sums = [
        segment_sum(torch.where(mask, logps, zero).double(), plan.cu_seqlens).view(2, -1)
        for mask in (in_head, ~in_head)
    ]
    return torch.stack((sums[0][0], sums[1][0], sums[0][1], sums[1][1]), dim=1)


class _Part:
    """Rows on their way to the cache; on the device until they are written."""

    def __init__(self, cache: LogpsCache, keys: RowKeys, how: Precompute) -> None:
        self.cache, self.keys, self.how = cache, keys, how
        self.written = 0
        self._clear()

    def _clear(self) -> None:
        self._rows: list[np.ndarray] = []
        self._values: list[Tensor] = []
        self._since = time.monotonic()

    def add(self, rows: np.ndarray, values: Tensor) -> None:
        self._rows.append(rows)
        self._values.append(values)
        full = sum(map(len, self._rows)) >= self.how.part_rows
        if full or time.monotonic() - self._since >= self.how.part_seconds:
            self.write()

    def write(self) -> None:
        if not self._rows:
            return
        rows = np.concatenate(self._rows[: len(self._values)])
        values = torch.cat(self._values).cpu().numpy()
        assert values.shape == (len(rows), NUM_VALUES)
        broken = ~np.isfinite(values).all(axis=1)
        if broken.any():
            row = int(rows[broken.argmax()])
            raise ValueError(
                f"The reference's log-prob of row {row} (and {int(broken.sum()) - 1} others) is "
                "NaN or infinite, so nothing of this part was stored. Look for overflow "
                "(float16: use bfloat16 or float32) or a damaged reference."
            )
        self.cache.write(self.keys.digests[rows], values)
        self.written += len(rows)
        self._clear()
        self.cache.refresh()  # what other jobs have done in the meantime


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
