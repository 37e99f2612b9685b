"""The loop that fills the cache: rows by length, in parts that survive a kill.

P pairs, S = 2P sequences, N scored tokens.
"""

import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpo_fast.batch import TokenPlan
from dpo_fast.functional.segments import segment_sum
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
        rank, world_size: every rank computes every ``world_size``-th batch.
        part_rows, part_seconds: a part is written when it has so many rows or is so old; a kill
        loses
            at most that.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    batch_size: int
    device: torch.device
    rank: int = 0
    world_size: int = 1
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


def compute_missing(
    reference: ScoredReference,
    dataset: "Dataset",
    keys: RowKeys,
    cache: LogpsCache,
    how: Precompute,
    name: str,
) -> int:
    """Compute this rank's share of the rows of ``dataset`` that ``cache`` lacks; return how many.

    The global random generators stay as they were. Interrupted, it stores what is done.

    Raises:
        ValueError: a log-prob is NaN or infinite; names the row.
        KeyboardInterrupt: with the way to go on in the message.
    """
    batches = plan_batches(keys, how.batch_size)[how.rank :: how.world_size]
    found = cache.has(keys.digests)
    todo = [rows for batch in batches if len(rows := batch[~found[batch]])]
    total = sum(len(rows) for rows in todo)
    if not total:
        return 0
    if cache.is_being_filled():
        # jobs of one sweep, started together: each in an order of its own, seeing what others did
        random.Random(os.getpid()).shuffle(todo)
    plain = dataset.with_format(None)
    part = _Part(cache, keys, how)
    try:
        with preserve_rng(), Progress(total, name, show=how.rank == 0) as progress:
            for planned in todo:
                rows = planned[~cache.has(keys.digests[planned])]
                if not len(rows):
                    progress.advance(len(planned), 0)
                    continue
                batch = how.collator([plain[int(i)] for i in rows])
                values = pair_sums(reference, _to_device(batch, how.device))
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
