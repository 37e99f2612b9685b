"""The chunked LM head over a vocabulary that is split over processes.

Legend: N scored tokens, n rows of a chunk, H hidden, V vocabulary of this shard, r rank of the
head's adapter.

Each rank takes its GEMM, its row maximum ``k`` and ``R = sum_{j != y} exp(z_j - k)`` alone; the
target's column is left out of E on every rank, so that nothing depends on who owns it. Then two
collectives for all rows, three numbers a row: the maximum K of the k, and the sums of
``f R`` with ``f = exp(k - K)`` and of ``z_y - K`` (0 but for the owner). What E contributes to the
gradients is scaled by f, and the owner adds the target's own part::

    dX = v (f (E W) - R_all W[y])      dW = E^T (v f X), row y: -v R_all X      v = -dlogp scale / S

dX and dA are parts of a sum over the ranks, which the caller takes; dW, db and dB are whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.interface import HeadForward, HeadGrads, LinearHead, Needs, Saved
from dpo_fast.backends.shard import VocabShard
from dpo_fast.chunked.backend import ChunkedBackend
from dpo_fast.chunked.epilogue_torch import below_, shift_
from dpo_fast.chunked.frame import HeadShare, add_products, keep, walk, walk_back
from dpo_fast.chunked.head_grads import weighted
from dpo_fast.naive import LinearLogprobs

_LOWEST = -104.0  # exp of anything below is 0 in float32


class _Local(NamedTuple):
    """What this shard alone knows of each row, ``[n]``."""

    top: Tensor  # maximum of the row as `below_` leaves it; -inf where all logits are
    rest: Tensor  # R with k = top
    own: Tensor  # the target's entry as `below_` leaves it; 0 where another rank owns it
    slope: Tensor  # cap' at the target
    weighted: Tensor | None = None  # sum_{j != y} E (z - k)
    squares: Tensor | None = None  # sum_{j != y} E^2
    logit_sum: Tensor | None = None
    best: Tensor | None = None  # first column of the maximum, int64


class _Own(NamedTuple):
    """What the gradients of the head need beside E; None where they are not asked for."""

    factor: Tensor | None = None  # [N]: f
    target_part: Tensor | None = None  # [N]: -R_all g_y of the owner, 0 elsewhere
    column: Tensor | None = None  # [N]
    owned: Tensor | None = None  # this and what follows: to compute E again
    top: Tensor | None = None


class VocabParallelBackend(ChunkedBackend):
    """See the module's text. Deterministic up to the order in which a collective sums."""

    def forward(
        self,
        hidden: Tensor,
        head: LinearHead,
        target: Tensor,
        *,
        needs: Needs,
        outputs: tuple[str, ...],
        store: bool,
        buffer: Tensor | None = None,
        spare: int = 0,
    ) -> HeadForward:
        assert head.shard is not None
        owned, column = head.shard.locate(target, head.weight.shape[0])

        def epilogue(chunk: Tensor, part: slice) -> _Local:
            return _exponentials_(
                chunk, column[part], owned[part], head, slope=any(needs), outputs=outputs
            )

        walked = walk(hidden, head, epilogue, needs=needs, store=store, buffer=buffer)
        local = _join(walked.rows, walked.x, outputs)
        result, rest, total, factor = _over_ranks(local, target, owned, head, head.shard, outputs)
        if not any(needs):
            return HeadForward(result, None)
        target_part = torch.where(owned, -rest * local.slope, 0.0)
        if walked.dx is not None:
            _add_target_(walked.dx, factor, target_part, head.weight, column)
        if walked.eb is not None and head.lora is not None:
            _add_target_(walked.eb, factor, target_part, head.lora.b, column)
        own = _Own()
        if needs.head:
            own = _Own(factor, target_part, column)
            if walked.memory is None:
                own = own._replace(owned=owned, top=local.top)
        return HeadForward(result, keep(walked, hidden, head, total, needs, own))

    def backward(self, saved: Saved, dlogps: Tensor, into: HeadGrads | None = None) -> HeadGrads:
        return walk_back(saved, dlogps, into, _add_share)


def _add_share(total: HeadGrads, share: HeadShare) -> None:
    """``E^T`` times the factors scaled by f, and the target's own rows."""
    own, (x, v), needs = _Own(*share.own), (share.x, share.v), share.meta.needs
    assert own.factor is not None and own.target_part is not None and own.column is not None
    column, a, lora_scale = own.column, share.kept.lora_a, share.meta.lora_scale

    def epilogue(chunk: Tensor, part: slice, head: LinearHead) -> None:
        assert own.owned is not None and own.top is not None
        _exponentials_(chunk, column[part], own.owned[part], head, slope=True, top=own.top[part])

    add_products(total, share, weighted(x, v * own.factor, a, needs, lora_scale), epilogue)
    target = weighted(x, v * own.target_part, a, needs, lora_scale)
    for sums, values in (
        (total.weight, target.weight),
        (total.lora_b, target.lora_b),
        (total.bias, target.v),
    ):
        if sums is not None and values is not None:
            _add_rows_(sums, column, values)


def _exponentials_(
    chunk: Tensor,  # [n, V] logits without bias; on return E g, 0 in the target's column
    column: Tensor,  # [n]
    owned: Tensor,  # [n] bool
    head: LinearHead,
    *,
    slope: bool,
    outputs: tuple[str, ...] = (),
    top: Tensor | None = None,
) -> _Local:
    """E of a chunk of rows and what this shard knows of them; ``top`` where it is known already."""
    y = column.unsqueeze(1)
    gain = below_(chunk, head.bias, head.softcap, head.scale, slope)
    own = torch.where(owned, chunk.gather(1, y).squeeze(1), 0.0)
    at_target = torch.ones_like(own) if gain is None else gain.gather(1, y).squeeze(1)
    top = chunk.amax(dim=1) if top is None else top
    stats: dict[str, Tensor] = {}
    if outputs:
        stats["logit_sum"] = chunk.sum(dim=1)
        stats["best"] = chunk.argmax(dim=1)
    # a shard whose logits are all -inf: E = 0 instead of NaN
    shift_(chunk, top.masked_fill(top == -torch.inf, 0.0), head.softcap, head.scale)
    shifted = chunk.clamp_min(_LOWEST) if outputs else None
    chunk.exp_()
    chunk.scatter_(1, y, torch.where(owned, 0.0, chunk.gather(1, y).squeeze(1)).unsqueeze(1))
    rest = chunk.sum(dim=1)
    if shifted is not None:
        stats["weighted"] = (chunk * shifted).sum(dim=1)
        stats["squares"] = chunk.square().sum(dim=1)
    if gain is not None:
        chunk.mul_(gain)
    return _Local(top, rest, own, at_target, **stats)


def _over_ranks(
    local: _Local,
    target: Tensor,
    owned: Tensor,
    head: LinearHead,
    shard: VocabShard,
    outputs: tuple[str, ...],
) -> tuple[LinearLogprobs, Tensor, Tensor, Tensor]:
    """``(result, R_all, S, f)``, each ``[N]``: two collectives, a third for statistics."""
    unit = head.scale if head.softcap is None else 1.0  # from `below_`'s scale to that of z
    top = shard.max_(local.top.clone())
    above = torch.where(local.top == -torch.inf, -torch.inf, (local.top - top) * unit)
    factor = above.exp()
    # the owner's difference is taken before the scale: large logits keep their digits
    below = torch.where(owned, (local.own - top) * unit, 0.0)
    columns = [local.rest * factor, below]
    if outputs:
        assert local.weighted is not None and local.squares is not None
        assert local.logit_sum is not None
        shifted = factor * (local.weighted + above.clamp_min(_LOWEST) * local.rest)
        columns += [shifted, local.squares * factor.square(), local.logit_sum]
    rest, below, *sums = shard.sum_(torch.stack(columns)).unbind()
    e = below.exp()
    total = rest + e
    log_total = torch.where(below == 0, rest.log1p(), total.log())
    logps = torch.where(below == 0, -log_total, below - log_total)
    stats: dict[str, Tensor] = {}
    if outputs:
        shifted, squares, logit_sum = sums
        stats["entropy"] = log_total - (shifted + e * below.clamp_min(_LOWEST)) / total
        stats["log_sum_sq_probs"] = (squares + e.square()).log() - 2 * log_total
        stats["mean_logit"] = logit_sum * (unit / shard.total)
        assert local.best is not None
        first = torch.where(local.top == top, local.best + shard.start, shard.total)
        stats["is_top1"] = -shard.max_(-first) == target
    found = {name: stats[name] for name in outputs}
    return LinearLogprobs(logps, **found), rest, total, factor


def _join(parts: list[_Local], x: Tensor, outputs: tuple[str, ...]) -> _Local:
    names: tuple[str, ...] = ("top", "rest", "own", "slope")
    if outputs:
        names = (*names, "weighted", "squares", "logit_sum", "best")
    if not parts:
        empty = x.new_empty(0)
        return _Local(**{n: empty.long() if n == "best" else empty for n in names})
    return _Local(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


def _add_target_(
    product: Tensor, factor: Tensor, target_part: Tensor, weight: Tensor, column: Tensor
) -> None:
    """``f (E W) - R_all W[y]`` from E W, in place."""
    product.mul_(factor.unsqueeze(1))
    product.addcmul_(target_part.unsqueeze(1), weight[column].to(product.dtype))


def _add_rows_(sums: Tensor, column: Tensor, values: Tensor) -> None:
    """``sums[column[n]] += values[n]``, deterministic on every device."""
    if sums.device.type == "cpu":
        sums.index_add_(0, column, values)
    else:
        sums.index_put_((column,), values, accumulate=True)
