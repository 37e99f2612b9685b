"""The two ways from hidden states to E and log-probs, behind one interface.

:class:`ExpGemm` writes E in the GEMM's epilogue; :class:`Logits` lets cuBLAS write float32 logits
of a chunk of rows and passes over them. Both give the same :class:`Scored` and can write E of a
slab of the vocabulary again, for offsets that are known.

Legend: N rows, H hidden, V vocabulary (of this shard).
"""

from typing import Protocol

import torch
from torch import Tensor

from dpo_fast_kernels.choice import decide, stored_dtype
from dpo_fast_kernels.exp_gemm import exp_gemm, num_planes
from dpo_fast_kernels.logits import BLOCK, logits_exp, logits_max
from dpo_fast_kernels.operands import Launch, Operands, num_programs, plan_launch
from dpo_fast_kernels.products import add_product, product
from dpo_fast_kernels.row_scale import target_fix
from dpo_fast_kernels.rows import RowState, finish_rows, new_row_state, reduce_tiles
from dpo_fast_kernels.scoring import Scored, Vocabulary, join_blocks, score_rows
from dpo_fast_kernels.target_logit import TargetLogits

LOGITS_BYTES = 2**28  # float32 logits of a chunk of rows
HALF_UNIT = 2.0**14  # float16: E is stored so that its non-target sum is this


class Engine(Protocol):
    """How E comes about."""

    e_dtype: torch.dtype

    def score(
        self,
        operands: Operands,
        target: Tensor,
        *,
        e: Tensor | None,
        stats: bool,
        vocabulary: Vocabulary,
        bound: float | None = None,
    ) -> Scored:
        """Log-probs of the rows; fills ``e`` [N, V], target entries included.

        ``bound``: name the tiles that the filtered mode keeps (kept_tiles.py).
        """
        ...

    def again(
        self, operands: Operands, rows: TargetLogits, start: int, e: Tensor, state: RowState
    ) -> Tensor | None:
        """E of the slab ``operands`` [N, v], which begins at column ``start``, into ``e``.

        Returns what rounding took from its entries (without the target's), ``[N]``, or None.
        """
        ...


class ExpGemm:
    """E from the epilogue of the GEMM: 16-bit inputs, E in bfloat16 (or float32)."""

    def __init__(self, launch: Launch, e_dtype: torch.dtype) -> None:
        self.launch, self.e_dtype = launch, e_dtype

    def score(
        self,
        operands: Operands,
        target: Tensor,
        *,
        e: Tensor | None,
        stats: bool,
        vocabulary: Vocabulary,
        bound: float | None = None,
    ) -> Scored:
        return score_rows(
            operands,
            self.launch,
            target,
            e=e,
            e_dtype=self.e_dtype,
            stats=stats,
            vocabulary=vocabulary,
            bound=bound,
        )

    def again(
        self, operands: Operands, rows: TargetLogits, start: int, e: Tensor, state: RowState
    ) -> Tensor | None:
        _, lost_part = exp_gemm(operands, self.launch, rows, e=e, stats=False, start=start)
        target_fix(e, state.fix, rows.col, start)
        return _over_tiles(lost_part, self.launch.programs)


class Logits:
    """E from float32 logits: any dtype; E in the weight's dtype."""

    def __init__(self, programs: int, e_dtype: torch.dtype) -> None:
        self.programs, self.e_dtype = programs, e_dtype

    def score(
        self,
        operands: Operands,
        target: Tensor,
        *,
        e: Tensor | None,
        stats: bool,
        vocabulary: Vocabulary,
        bound: float | None = None,
    ) -> Scored:
        if bound is not None:
            raise ValueError("engine 'cublas' has no sums by tile to filter by; use 'triton'")
        n, vocab = operands.x.shape[0], operands.w.shape[0]
        widest = vocab if vocabulary.largest is None else vocabulary.largest
        chunk = max(1, LOGITS_BYTES // (4 * widest))
        blocks = []
        for first in range(0, n, chunk):
            last = min(n, first + chunk)
            part_e = None if e is None else e[first:last]
            rows = operands.rows(first, last)
            blocks.append(self._chunk(rows, target[first:last], part_e, stats, vocabulary))
        if not blocks:
            empty = torch.empty(0, dtype=torch.float32, device=target.device)
            state = new_row_state(0, stats, target.device)
            return Scored(TargetLogits(empty, empty, empty, empty.int()), state, empty)
        return join_blocks(blocks)

    def _chunk(
        self,
        operands: Operands,
        target: Tensor,
        e: Tensor | None,
        stats: bool,
        vocabulary: Vocabulary,
    ) -> Scored:
        z = _logits(operands)
        n, vocab = z.shape
        cap, reduce = operands.softcap, vocabulary.reduce
        rows, part = logits_max(
            z,
            cap,
            target,
            ignore_index=vocabulary.ignore_index,
            vocab_start=vocabulary.start,
            vocab_total=vocab if vocabulary.total is None else vocabulary.total,
        )
        reduce_tiles(part, rows.k.unsqueeze(0), maximum=True, programs=self.programs)
        if reduce is not None:
            reduce(rows.zy, "sum")
            reduce(rows.k, "max")
        part = z.new_empty(num_planes(operands, stats), -(-vocab // BLOCK), n)
        half = self.e_dtype == torch.float16
        early = None if half else e
        lost_part = logits_exp(z, cap, operands.scale, rows, e=early, part=part, stats=stats)
        lost = _over_tiles(lost_part, self.programs)
        sums = z.new_empty(part.shape[0], n)
        reduce_tiles(part, sums, programs=self.programs)
        if reduce is not None:
            reduce(sums, "sum")
            if lost is not None:
                reduce(lost, "sum")
        state = new_row_state(n, stats, z.device)
        finish_rows(
            sums,
            rows,
            state,
            torch.empty_like(rows.col),
            lost=lost,
            e=early,
            vocab=vocab,
            e_dtype=self.e_dtype,
            scale=operands.scale,
            from_k=True,
            programs=self.programs,
        )
        if half:
            rows, state = half_precision(rows, state, sums[0], operands.scale)
            if e is not None:
                lost_part = logits_exp(z, cap, operands.scale, rows, e=e, part=None)
                target_fix(e, state.fix, rows.col, 0)
                lost = _over_tiles(lost_part, self.programs)
                assert lost is not None
                if reduce is not None:
                    reduce(lost, "sum")
                state = state._replace(delta=state.delta + torch.where(rows.col > -2, lost, 0.0))
        return Scored(rows, state, sums[4] if stats and cap is not None else None)

    def again(
        self, operands: Operands, rows: TargetLogits, start: int, e: Tensor, state: RowState
    ) -> Tensor | None:
        n, width = e.shape
        chunk = max(1, LOGITS_BYTES // (4 * width))
        found = []
        for first in range(0, n, chunk):
            last = min(n, first + chunk)
            part = operands.rows(first, last)
            lost_part = logits_exp(
                _logits(part),
                part.softcap,
                part.scale,
                TargetLogits(*(t[first:last] for t in rows)),
                e=e[first:last],
                part=None,
                start=start,
            )
            found.append(_over_tiles(lost_part, self.programs))
        target_fix(e, state.fix, rows.col, start)
        lost = [t for t in found if t is not None]
        return torch.cat(lost) if lost else None


def _over_tiles(lost_part: Tensor | None, programs: int) -> Tensor | None:
    """Sums ``[N]`` of ``[tiles, N]``."""
    if lost_part is None:
        return None
    lost = lost_part.new_empty(lost_part.shape[1])
    reduce_tiles(lost_part.unsqueeze(0), lost.unsqueeze(0), programs=programs)
    return lost


def _logits(operands: Operands) -> Tensor:
    """``x w^T`` and the tail in float32, before the softcap."""
    z = product(operands.x, operands.w.T)
    if operands.tail_x is not None and operands.tail_w is not None:
        add_product(z, operands.tail_x, operands.tail_w.T)
    return z


def half_precision(
    rows: TargetLogits, state: RowState, rest: Tensor, scale: float
) -> tuple[TargetLogits, RowState]:
    """Offsets at which float16 holds E of every row: its non-target sum becomes 2^14.

    Confident rows would underflow, flat rows overflow otherwise. The factor moves into s.
    """
    alive = (rest > 0) & (rest < torch.inf) & (rows.col > -2)
    factor = torch.where(alive, HALF_UNIT / torch.where(alive, rest, 1.0), 1.0)
    factor = torch.where(factor < torch.inf, factor, 1.0)
    fix = -rest * factor * rows.slope
    fix = torch.where(rows.col > -2, fix, 0.0)
    return rows._replace(k=rows.k - factor.log() / scale), state._replace(
        s=state.s * factor, fix=fix, delta=fix - fix.half().float()
    )


def choose_engine(
    name: str | None,
    operands: Operands,
    stats: bool,
    e_dtype: torch.dtype | None = None,
    widest: int | None = None,
) -> Engine:
    """The engine of a call; ``e_dtype`` overrides :func:`stored_dtype` (tests round E that way).

    ``widest``: see :func:`decide`.
    """
    if e_dtype is None:
        e_dtype = stored_dtype(name, operands.w.dtype)
    if decide(name, operands, widest) == "triton":
        return ExpGemm(plan_launch(operands, stats, widest), e_dtype)
    return Logits(num_programs(operands.x), e_dtype)
