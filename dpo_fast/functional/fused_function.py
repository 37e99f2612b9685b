"""The autograd function of :func:`fused_linear_dpo`: its forward takes the gradients as well.

Legend: P pairs, S = 2P sequences, N scored tokens, n tokens of a group, H hidden, V vocabulary.

For each group of pairs: the reference's log-probs, the policy's (probabilities stay in one reused
buffer), the loss and its derivative c by autograd over ``[n]`` numbers, then the gradients of
hidden states and head. Groups exist only where they save a GEMM: a trained head and a separable
loss.

A single group whose probabilities fit needs no sum over groups: where the backend allows, its head
gradient waits for the backward (:class:`Late`) and is written once, in the head's own dtype.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpo_fast.backends import (
    HeadBackend,
    HeadGrads,
    LinearHead,
    Needs,
    Saved,
    VocabShard,
    buffer_bytes,
)
from dpo_fast.backends.scratch import scratch
from dpo_fast.functional import host
from dpo_fast.functional.autocast import no_autocast
from dpo_fast.functional.groups import Group, one_group, plan_groups
from dpo_fast.functional.linear import late_grads, may_store, spare_bytes, whole_grads
from dpo_fast.functional.masked import MaskedTargets, mask_targets
from dpo_fast.functional.pair_loss import GroupLoss, call_loss, gradient
from dpo_fast.functional.pair_stats import PairGroup, group_stats, needed_outputs
from dpo_fast.functional.segments import compacted_borders, segment_sum, sum_over_ranks
from dpo_fast.naive import HeadLoRA, LinearLogprobs


class Rows(NamedTuple):
    """Which token belongs where."""

    target: Tensor  # [N]
    cu_seqlens: Tensor  # [S + 1]
    seq_lens: Any  # host lengths, or None
    token_weight: Tensor | None  # [N]
    ignore_index: int | None
    masked: MaskedTargets | None = None  # None: every row counts

    def drop_ignored(self, vocab: int) -> tuple["Rows", Tensor | None]:
        """Without ignored rows, and the index [N'] of the kept ones (None if nothing is dropped).

        On a device whose values the host does not know, they stay and are masked instead.
        """
        if not host.on_host(self.target):
            masked = mask_targets(self.target, vocab, self.ignore_index)
            return self._replace(target=masked.target, masked=masked), None
        valid = None if self.ignore_index is None else self.target.ne(self.ignore_index)
        if valid is None or bool(valid.all()):
            return self, None
        keep = valid.nonzero().squeeze(1)
        weight = self.token_weight
        dropped = self._replace(
            target=self.target[keep],
            cu_seqlens=compacted_borders(self.cu_seqlens, valid),
            seq_lens=None,
            token_weight=None if weight is None else weight[keep],
        )
        return dropped, keep


class FusedJob(NamedTuple):
    """Everything that carries no gradient."""

    backend: HeadBackend
    rows: Rows
    reference: tuple[Tensor, LinearHead] | None
    ref_logps: Tensor | None  # [S]
    loss: Callable[..., tuple[Tensor, Tensor, Tensor]]
    stats: Any
    pair_weight: Tensor | float
    outputs: tuple[str, ...]
    mode: Any
    workspace: int | None
    sequence_group: Any = None
    main_grad: Tensor | None = None  # [V, H]


class Late(NamedTuple):
    """Gradients that the backward takes: what the backend saved, and the loss's derivative."""

    saved: Saved
    dlogps: Tensor  # [N]


class _Scored(NamedTuple):
    """One group's results; ``grads`` is :class:`Late` or what is added up over the groups."""

    loss: GroupLoss
    logps: Tensor  # [2p]
    ref_logps: Tensor | None  # [2p]
    tokens: LinearLogprobs  # [n]
    grads: HeadGrads | Late


class FusedLinearDPO(torch.autograd.Function):
    """Loss, results and gradients of all groups; the backward scales what the forward found."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        options: tuple[float | None, float, float, VocabShard | None],
        job: FusedJob,
        grad_enabled: bool,
    ) -> tuple[Tensor | None, ...]:
        softcap, scale, lora_scale, shard = options
        lora = None if lora_a is None or lora_b is None else HeadLoRA(lora_a, lora_b, lora_scale)
        head = LinearHead(weight, bias, softcap, scale, lora, shard)
        needs = Needs(*ctx.needs_input_grad[:5]) if grad_enabled else Needs()
        with no_autocast(hidden):
            outputs, grads = run_groups(job, hidden, head, needs)
        ctx.set_materialize_grads(False)
        ctx.late, ctx.main_grad = None, job.main_grad
        if isinstance(grads, Late):
            ctx.late = (job.backend, grads.saved.meta, shard)
            ctx.save_for_backward(*grads.saved.tensors, grads.dlogps)
        else:
            ctx.save_for_backward(*grads)
        ctx.dtypes = [
            None if t is None else t.dtype for t in (hidden, weight, bias, lora_a, lora_b)
        ]
        ctx.mark_non_differentiable(*(t for t in outputs[1:] if t is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 8
        if ctx.late is not None:
            backend, meta, shard = ctx.late
            *tensors, dlogps = ctx.saved_tensors
            saved = Saved(tuple(tensors), meta)
            with no_autocast(dloss):
                grads = late_grads(backend, saved, dlogps * dloss, shard, ctx.main_grad)
            pairs = zip(grads, ctx.dtypes, strict=True)
            return (*(None if g is None else g.to(d) for g, d in pairs), None, None, None)
        kept = _graph_is_kept()
        found = HeadGrads(*ctx.saved_tensors)
        if ctx.main_grad is not None and found.weight is not None:
            ctx.main_grad.addcmul_(found.weight, dloss)
            found = found._replace(weight=None)
        scaled = [
            None if g is None else _scaled(g, dloss, d, kept)
            for g, d in zip(found, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, kept: bool) -> Tensor:
    """``grad * factor`` in ``dtype``, rounded once.

    A gradient of the head is as large as the head: it is copied only where it is rounded anyway, or
    kept for a further backward.
    """
    if dtype != grad.dtype and not host.on_host(grad):
        # One pass on a device: 6 bytes an element instead of 14.
        return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
    return (torch.mul if kept else Tensor.mul_)(grad, factor).to(dtype)


def _graph_is_kept() -> bool:
    """Whether a further backward may read what this one reads (retain_graph); True if unknown."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()


def run_groups(
    job: FusedJob, hidden: Tensor, head: LinearHead, needs: Needs
) -> tuple[tuple[Tensor | None, ...], HeadGrads | Late]:
    """All groups in order: the op's outputs and the unscaled gradients."""
    rows, backend = hidden.shape[0], job.backend
    groups, limit = _plan(job, rows, head, needs)
    if backend.gradients_may_wait and len(groups) == 1 and needs.head and rows <= limit:
        part = _score_group(job, groups[0], hidden, head, needs, None, None)
        assert isinstance(part.grads, Late)
        return _collect(job, groups, [part], hidden), part.grads
    most = max((g.rows for g in groups if g.rows <= limit), default=0)
    size = buffer_bytes(most, backend.row_bytes(head))
    totals = HeadGrads()
    parts: list[_Scored] = []
    dhidden = None
    if needs.hidden and len(groups) != 1:
        dhidden = hidden.new_empty(hidden.shape, dtype=_wide(hidden))
    with scratch.borrow(size, hidden.device) as memory:
        for group in groups:
            room = memory if 0 < limit and group.rows <= limit else None
            part = _score_group(job, group, hidden, head, needs, room, totals)
            found = part.grads
            assert isinstance(found, HeadGrads)
            totals = found._replace(hidden=None)
            if len(groups) == 1:
                dhidden = found.hidden
            elif dhidden is not None and found.hidden is not None:
                group.put(dhidden, found.hidden)
            parts.append(part._replace(grads=HeadGrads()))
    grads = whole_grads(totals._replace(hidden=dhidden), head.shard)
    return _collect(job, groups, parts, hidden), grads


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _plan(job: FusedJob, rows: int, head: LinearHead, needs: Needs) -> tuple[list[Group], int]:
    """The groups, and up to how many rows the probabilities of a group are stored."""
    borders, everything = job.rows.cu_seqlens, max(1, rows)
    whole = one_group(borders.numel() // 2, rows)
    if not needs.head:
        return whole, 0
    if job.sequence_group is not None:  # groups would be cut by lengths that ranks do not share
        fits = may_store(job.backend, head, rows, job.mode, job.workspace)
        return whole, everything if fits else 0
    if may_store(job.backend, head, rows, None, job.workspace):
        return whole, 0 if job.mode == "min-memory" else everything
    if job.mode == "min-memory" or not getattr(job.loss, "separable", False):
        return whole, everything if job.mode == "store" else 0
    limit, alike = job.workspace, head.for_plans()
    if limit is None:
        limit = job.backend.default_workspace(alike)
    lens = job.rows.seq_lens
    known = borders.tolist() if lens is None else [0, *accumulate(lens)]
    max_rows = limit // job.backend.row_bytes(alike)
    if job.mode == "store":
        return plan_groups(known, max_rows, join_long=False), everything
    return plan_groups(known, max_rows), max_rows


def _score_group(
    job: FusedJob,
    group: Group,
    hidden: Tensor,
    head: LinearHead,
    needs: Needs,
    memory: Tensor | None,
    totals: HeadGrads | None,
) -> _Scored:
    """``memory``: scratch for the probabilities, or None: they are not kept.

    ``totals``: what the head's gradients are added to; None: all is kept for the backward.
    """
    backend, rows = job.backend, job.rows
    target = group.take(rows.target)
    borders = group.borders(rows.cu_seqlens)
    weight = None if rows.token_weight is None else group.take(rows.token_weight)
    masked = None if rows.masked is None else MaskedTargets(*map(group.take, rows.masked))
    pairs = job.rows.cu_seqlens.numel() // 2
    ref_logps = None
    if job.reference is not None:
        ref_hidden, ref_head = job.reference
        found = backend.forward(
            group.take(ref_hidden),
            ref_head,
            target,
            needs=Needs(),
            outputs=(),
            store=False,
            buffer=memory,
        )
        ref_logps = _sums(found.result.logps, masked, weight, borders, job.sequence_group)
    elif job.ref_logps is not None:
        ref_logps = torch.cat(
            (
                job.ref_logps[group.start : group.stop],
                job.ref_logps[pairs + group.start : pairs + group.stop],
            )
        )
    outputs = needed_outputs(job.loss, job.stats, job.outputs)
    found = backend.forward(
        group.take(hidden),
        head,
        target,
        needs=needs,
        outputs=outputs,
        store=memory is not None or totals is None,
        buffer=memory,
        spare=spare_bytes(backend, head, job.mode, job.workspace),
    )
    tokens = found.result
    leaf = tokens.logps.detach()
    with torch.set_grad_enabled(any(needs)):
        leaf.requires_grad_(any(needs))
        logps = _sums(leaf, masked, weight, borders, job.sequence_group)
        pairs_of = slice(group.start, group.stop)
        view = PairGroup(pairs_of, leaf, borders, tokens, job.sequence_group)
        if masked is not None:
            view = view._replace(logps=masked.values(leaf))
        kwargs = group_stats(job.loss, job.stats, view)
        answer = call_loss(job.loss, logps, ref_logps, kwargs)
        pair_weight = job.pair_weight
        if isinstance(pair_weight, Tensor):
            pair_weight = pair_weight.detach()[group.start : group.stop]
        objective = (answer[0] * pair_weight).sum()
    grads: HeadGrads | Late = HeadGrads()
    if found.saved is not None:
        dlogps = gradient(objective, leaf, job.loss)
        if totals is None:
            grads = Late(found.saved, dlogps)
        else:
            grads = backend.backward(found.saved, dlogps, into=totals)
    loss = GroupLoss(objective.detach(), *(t.detach() for t in answer))
    return _Scored(loss, logps.detach(), ref_logps, tokens, grads)


def _sums(
    logps: Tensor,
    masked: MaskedTargets | None,
    weight: Tensor | None,
    borders: Tensor,
    sequence_group: Any,
) -> Tensor:
    if masked is not None:
        logps = masked.values(logps)
    sums = segment_sum(logps if weight is None else logps * weight, borders)
    return sum_over_ranks(sums, sequence_group)


def _collect(
    job: FusedJob, groups: list[Group], parts: list[_Scored], hidden: Tensor
) -> tuple[Tensor | None, ...]:
    """The groups' results in the order of the batch."""
    losses, chosen, rejected = (
        torch.cat([getattr(p.loss, name) for p in parts])
        for name in ("losses", "chosen_rewards", "rejected_rewards")
    )
    objective = torch.stack([p.loss.objective for p in parts]).sum()

    def sequences(name: str) -> Tensor | None:
        found = [getattr(p, name) for p in parts]
        if found[0] is None:
            return None
        halves = [t.chunk(2) if t.numel() else (t, t) for t in found]
        return torch.cat([h[0] for h in halves] + [h[1] for h in halves])

    tokens: list[Tensor] = []
    for name in ("logps", *job.outputs) if job.outputs else ():
        column = getattr(parts[0].tokens, name)
        whole = column.new_empty(hidden.shape[0])
        for group, part in zip(groups, parts, strict=True):
            group.put(whole, getattr(part.tokens, name))
        if job.rows.masked is not None:
            whole = job.rows.masked.values(whole)
        tokens.append(whole)
    return (
        objective,
        losses,
        sequences("logps"),
        sequences("ref_logps"),
        chosen,
        rejected,
        *tokens,
    )
