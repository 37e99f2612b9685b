"""Log-probs of rows through the exp-GEMM: the eight launches in their order, without a host sync.

Legend: N rows, V vocabulary (of this shard), C planes of partial sums.

With ``reduce`` the vocabulary is split over processes, each holding ``[V, H]`` of it from
``start``: zy, the sums and the off-range maxima are reduced over them, unconditionally, so that
every process makes the same calls.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dpo_fast_kernels.exp_gemm import exp_gemm
from dpo_fast_kernels.kept_tiles import KeptTiles, join_kept, kept_tiles
from dpo_fast_kernels.off_range import off_range
from dpo_fast_kernels.operands import Launch, Operands
from dpo_fast_kernels.rows import RowState, compact, finish_rows, new_row_state, reduce_tiles
from dpo_fast_kernels.target_logit import OFFSET, TargetLogits, target_logits

Reduce = Callable[[Tensor, str], None]  # in place over the processes; "sum" or "max"

ROW_BLOCK = 4096  # rows a launch: bounds the partial sums (16 MiB at V = 128k, 120 waves of tiles)


class Vocabulary(NamedTuple):
    """Where this shard lies, and which target means "ignored"."""

    ignore_index: int = -100
    start: int = 0
    total: int | None = None
    reduce: Reduce | None = None
    largest: int | None = None  # rows of the longest shard: all ranks cut rows into blocks alike


class Scored(NamedTuple):
    """Everything that is known of the rows once they are scored."""

    rows: TargetLogits
    state: RowState
    logit_sum: Tensor | None  # [N] over the vocabulary, capped, before the scale (softcap + stats)
    kept: KeptTiles | None = None  # of E, in the filtered mode


def score_rows(
    operands: Operands,
    launch: Launch,
    target: Tensor,  # [N]
    *,
    e: Tensor | None,  # [N, V] out: probabilities, target entries fixed
    e_dtype: torch.dtype,
    stats: bool,
    vocabulary: Vocabulary,
    bound: float | None = None,
) -> Scored:
    """Scores rows in blocks of :data:`ROW_BLOCK`. ``bound``: name the tiles that hold as much."""
    n = operands.x.shape[0]
    blocks = []
    for start in range(0, n, ROW_BLOCK):
        stop = min(n, start + ROW_BLOCK)
        blocks.append(
            _score_block(
                operands.rows(start, stop),
                launch,
                target[start:stop],
                None if e is None else e[start:stop],
                e_dtype,
                stats,
                vocabulary,
                bound,
            )
        )
    if not blocks:
        rows = target_logits(operands, launch, target, ignore_index=0, vocab_start=0, vocab_total=0)
        state = new_row_state(0, stats, target.device)
        kept = None
        if bound is not None:
            part = rows.zy.new_empty(triton.cdiv(operands.w.shape[0], launch.tile.unit), 0)
            kept = kept_tiles(part, state.s, rows.col, rows.col, bound)
        return Scored(rows, state, rows.zy if stats else None, kept)
    return blocks[0] if len(blocks) == 1 else join_blocks(blocks)


def join_blocks(blocks: list[Scored]) -> Scored:
    def join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
        present = [p for p in parts if p is not None]
        return torch.cat(present, -1) if present else None

    rows = TargetLogits(*(torch.cat(t) for t in zip(*(b.rows for b in blocks), strict=True)))
    state = RowState(*(join(t) for t in zip(*(b.state for b in blocks), strict=True)))  # type: ignore[arg-type]
    kept = [b.kept for b in blocks if b.kept is not None]
    logit_sum = join(tuple(b.logit_sum for b in blocks))
    return Scored(rows, state, logit_sum, join_kept(kept) if kept else None)


def _score_block(
    operands: Operands,
    launch: Launch,
    target: Tensor,
    e: Tensor | None,
    e_dtype: torch.dtype,
    stats: bool,
    vocabulary: Vocabulary,
    bound: float | None,
) -> Scored:
    n, vocab = operands.x.shape[0], operands.w.shape[0]
    reduce = vocabulary.reduce
    rows = target_logits(
        operands,
        launch,
        target,
        ignore_index=vocabulary.ignore_index,
        vocab_start=vocabulary.start,
        vocab_total=vocab if vocabulary.total is None else vocabulary.total,
    )
    if reduce is not None:
        reduce(rows.zy, "sum")
        rows = rows._replace(k=rows.zy + OFFSET / operands.scale)
    part, lost_part = exp_gemm(operands, launch, rows, e=e, stats=stats)
    sums, lost = _reduced(part, lost_part, reduce, launch.programs)
    state = new_row_state(n, stats, target.device)
    flag = torch.empty(n, dtype=torch.int32, device=target.device)
    finish = partial(
        finish_rows,
        e=e,
        vocab=vocab,
        e_dtype=e_dtype,
        scale=operands.scale,
        programs=launch.programs,
    )
    finish(sums, rows, state, flag, lost=lost)
    again = _Again(flag, *compact(flag), reduce)
    kept = None if bound is None else kept_tiles(part[0], state.s, flag, rows.col, bound)
    tiles = -(-vocab // launch.tile.block_v)
    part = part.view(-1)[: part.shape[0] * tiles * n].view(-1, tiles, n)  # used again, by tile
    rows = _true_maximum(operands, launch, rows, again, part)
    off_range(
        operands, launch, rows, again.rows, again.number, part, maximum=False, e=e,
        lost=lost_part, stats=stats,
    )  # fmt: skip
    sums = again.reduced(part, sums, launch.programs)
    if lost is not None and lost_part is not None:
        lost = again.reduced(lost_part.unsqueeze(0), lost.unsqueeze(0), launch.programs)[0]
    finish(sums, rows, state, flag, lost=lost, index=again.rows, count=again.number, from_k=True)
    if kept is not None:
        state = state._replace(delta=state.delta + kept.skipped)
    return Scored(rows, state, sums[4] if stats and operands.softcap is not None else None, kept)


def _reduced(
    part: Tensor, lost_part: Tensor | None, reduce: Reduce | None, programs: int
) -> tuple[Tensor, Tensor | None]:
    """Sums over tiles and processes: ``[C, N]`` and ``[N]``."""
    sums = part.new_empty(part.shape[0], part.shape[2])
    reduce_tiles(part, sums, programs=programs)
    lost = None
    if lost_part is not None:
        lost = part.new_empty(part.shape[2])
        reduce_tiles(lost_part.unsqueeze(0), lost.unsqueeze(0), programs=programs)
    if reduce is not None:
        reduce(sums, "sum")
        if lost is not None:
            reduce(lost, "sum")
    return sums, lost


class _Again(NamedTuple):
    """The off-range rows of a block."""

    flag: Tensor  # [N] int32
    rows: Tensor  # [N] int32
    number: Tensor  # [1] int32
    reduce: Reduce | None

    def reduced(self, part: Tensor, old: Tensor, programs: int) -> Tensor:
        """``old`` [C, N] with the off-range rows' sums over ``part`` [C, tiles, positions]."""
        fresh = old if self.reduce is None else torch.zeros_like(old)
        reduce_tiles(part, fresh, index=self.rows, count=self.number, programs=programs)
        if self.reduce is None:
            return fresh
        self.reduce(fresh, "sum")
        return torch.where(self.flag != 0, fresh, old)


def _true_maximum(
    operands: Operands, launch: Launch, rows: TargetLogits, again: _Again, part: Tensor
) -> TargetLogits:
    """Off-range rows get k = max, and their target's logit from the kernel that redoes them."""
    index, count, reduce = again.rows, again.number, again.reduce
    first, top = rows, rows.k
    if reduce is not None:
        first = rows._replace(zy=torch.zeros_like(rows.zy))
        top = torch.full_like(rows.k, -torch.inf)
    off_range(
        operands, launch, first, index, count, part, maximum=True, e=None, lost=None, stats=False
    )
    reduce_tiles(
        part[:1], top.unsqueeze(0), maximum=True, index=index, count=count, programs=launch.programs
    )
    if reduce is None:
        return rows
    reduce(first.zy, "sum")
    reduce(top, "max")
    off = again.flag != 0
    return rows._replace(zy=torch.where(off, first.zy, rows.zy), k=torch.where(off, top, rows.k))
