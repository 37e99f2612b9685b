"""Log-probs of rows through the exp-GEMM: the eight launches in their order, without a host sync.

Legend: N rows, V vocabulary (of this shard), C planes of partial sums.

With ``reduce`` the vocabulary is split over processes, each holding ``[V, H]`` of it from
``vocab_start``: zy, the sums and the off-range maxima are reduced over them, unconditionally, so that
every process makes the same calls.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast_kernels.exp_gemm import exp_gemm
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


class Scored(NamedTuple):
    """Everything that is known of the rows once they are scored."""

    rows: TargetLogits
    state: RowState
    logit_sum: Tensor | None  # [N] over the vocabulary, capped, before the scale (softcap + stats)


def score_rows(
    operands: Operands,
    launch: Launch,
    target: Tensor,  # [N]
    *,
    e: Tensor | None,  # [N, V] out: probabilities, target entries fixed
    e_dtype: torch.dtype,
    stats: bool,
    vocabulary: Vocabulary,
) -> Scored:
    """Scores rows in blocks of :data:`ROW_BLOCK`."""
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
            )
        )
    if not blocks:
        rows = target_logits(operands, launch, target, ignore_index=0, vocab_start=0, vocab_total=0)
        state = new_row_state(0, stats, target.device)
        return Scored(rows, state, rows.zy if stats else None)
    return blocks[0] if len(blocks) == 1 else join_blocks(blocks)


def join_blocks(blocks: list[Scored]) -> Scored:
    def join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
        present = [p for p in parts if p is not None]
        return torch.cat(present, -1) if present else None

    rows = TargetLogits(*(torch.cat(t) for t in zip(*(b.rows for b in blocks), strict=True)))
    state = RowState(*(join(t) for t in zip(*(b.state for b in blocks), strict=True)))  # type: ignore[arg-type]
    return Scored(rows, state, join(tuple(b.logit_sum for b in blocks)))


def _score_block(
    operands: Operands,
    launch: Launch,
    target: Tensor,
    e: Tensor | None,
    e_dtype: torch.dtype,
    stats: bool,
    vocabulary: Vocabulary,
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
    part = exp_gemm(operands, launch, rows, e=e, stats=stats)
    sums = part.new_empty(part.shape[0], n)
    reduce_tiles(part, sums, programs=launch.programs)
    if reduce is not None:
        reduce(sums, "sum")
    state = new_row_state(n, stats, target.device)
    flag = torch.empty(n, dtype=torch.int32, device=target.device)
    finish = dict(e=e, vocab=vocab, e_dtype=e_dtype, scale=operands.scale, programs=launch.programs)
    finish_rows(sums, rows, state, flag, **finish)  # type: ignore[arg-type]
    index, count = compact(flag)
    tiles = -(-vocab // launch.tile.block_v)
    part = part.view(-1)[: part.shape[0] * tiles * n].view(-1, tiles, n)  # used again, by tile
    redo = (index, count, part)
    rows, sums = _redo_sums(operands, launch, rows, sums, flag, redo, e, stats, reduce)
    finish_rows(sums, rows, state, flag, index=index, count=count, from_k=True, **finish)  # type: ignore[arg-type]
    return Scored(rows, state, sums[4] if stats and operands.softcap is not None else None)


def _redo_sums(
    operands: Operands,
    launch: Launch,
    rows: TargetLogits,
    sums: Tensor,
    flag: Tensor,
    redo: tuple[Tensor, Tensor, Tensor],
    e: Tensor | None,
    stats: bool,
    reduce: Reduce | None,
) -> tuple[TargetLogits, Tensor]:
    """Offsets and sums of the off-range rows, with k = max; the other rows' stay as they are."""
    index, count, part = redo
    position = dict(index=index, count=count, programs=launch.programs)
    first = rows if reduce is None else rows._replace(zy=torch.zeros_like(rows.zy))
    off_range(operands, launch, first, index, count, part, maximum=True, e=None, stats=False)
    top = rows.k if reduce is None else torch.full_like(rows.k, -torch.inf)
    reduce_tiles(part[:1], top.unsqueeze(0), maximum=True, **position)  # type: ignore[arg-type]
    if reduce is not None:
        reduce(first.zy, "sum")
        reduce(top, "max")
        again = flag != 0
        rows = rows._replace(
            zy=torch.where(again, first.zy, rows.zy), k=torch.where(again, top, rows.k)
        )
    off_range(operands, launch, rows, index, count, part, maximum=False, e=e, stats=stats)
    fresh = sums if reduce is None else torch.zeros_like(sums)
    reduce_tiles(part, fresh, **position)  # type: ignore[arg-type]
    if reduce is not None:
        reduce(fresh, "sum")
        fresh = torch.where(flag != 0, fresh, sums)
    return rows, fresh
