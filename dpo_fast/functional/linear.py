"""Log-probabilities of target tokens from hidden states and LM head, without logits in memory.

Legend: N scored tokens, H hidden, V vocabulary, r rank of the head's adapter.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

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
    choose,
    choose_sharded,
    filtered,
)
from dpo_fast.functional import host, validate
from dpo_fast.functional.autocast import autocast_head, no_autocast
from dpo_fast.functional.masked import mask_targets
from dpo_fast.naive import OUTPUTS, HeadLoRA, LinearLogprobs

Mode = Literal["store", "min-memory"]


def linear_logprobs(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int64
    *,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    lora: HeadLoRA | None = None,
    group: Any = None,
    outputs: Sequence[str] = (),
    backend: str = "auto",
    mode: Mode | None = None,
    workspace: int | None = None,
    main_grad: Tensor | None = None,  # [V, H] float32
    filter_bound: float | None = None,
) -> Tensor | LinearLogprobs:
    """``log softmax(z)[target]`` of each row: the log-probability of each target token.

    The same as::

        z = (logit_scale / temperature) * softcap * tanh((hidden @ weight.T + bias) / softcap)
        torch.log_softmax(z.float(), -1).gather(-1, target[:, None])[:, 0]

    Args:
        ignore_index: the target of rows to skip. None: there are none, which saves a device a copy
            of hidden and of its gradient.
        lora: adapter on the head, ``x W^T + scale * (x a^T) b^T``.
        outputs: statistics to return as well, out of "entropy", "mean_logit", "is_top1",
            "log_sum_sq_probs"; they carry no gradient.
        backend: "auto" (chosen once, logged), or "cpu", "chunked", "naive", "triton": obeyed or
            refused with the reason.
        mode: "store" keeps the probabilities for a trained head's gradient, "min-memory" computes
            them again (one more GEMM); None stores what fits into ``workspace``.
        workspace: bytes that stored probabilities may occupy; None: at least 64 MiB on the CPU,
            1 GiB elsewhere, and at least the head's gradient.
        group: the vocabulary is split over processes, and ``weight``, ``bias`` and ``lora.b`` are
            this rank's rows of it: a :class:`VocabShard`, or a ``ProcessGroup`` (its ranks' rows in
            rank order; one more collective and a host sync a call). All ranks of the group pass the
            same ``hidden`` and ``target``, which counts over the whole vocabulary, and get the same
            log-probs. Reduced: two numbers a token forward (three without the Triton kernels, more
            with ``outputs``), the gradients of hidden and lora.a backward.
        main_grad: the backward adds the weight's gradient to this tensor, in place and without
            rounding it, and ``weight.grad`` gets nothing (as Megatron-LM fuses the accumulation of
            gradients; its optimizer reads ``main_grad``). Nothing that waits for ``weight.grad``,
            as DDP and FSDP do, will see it.
        filter_bound: **approximate**, Triton only: dX and dW leave out tiles of 128 rows by 128
            tokens of the vocabulary that hold less than this share of each of their rows'
            probability and no target (2**-12 is a start). Log-probs and loss stay exact;
            :func:`filter_report` says what was kept. None: exact.

    Returns:
        ``[N]`` float32 (float64 for float64 inputs), 0 where ``target == ignore_index``; with
        ``outputs`` a :class:`LinearLogprobs`.

    Gradients:
        To hidden, weight, bias, lora.a and lora.b, each only if it requires one; accumulated in
        float32, rounded once to the input's dtype, deterministic. Any upstream gradient; a second
        backward needs ``retain_graph=True``; double backward raises.

    Memory:
        Chunks of rows in reused scratch; ``[N, H]`` float32 for the backward; the probabilities
        if they fit into ``workspace`` and the head is trained. Under ``no_grad``: scratch only.

    Raises:
        ValueError: shapes, dtypes, devices, options; a target out of range (on CPU tensors; on
            CUDA that row's log-prob is NaN, and ``DPO_FAST_CHECK=1`` raises).

    Source: the non-target sum keeps ``1 - p`` exact; see ``chunked/epilogue_torch.py``.
    """
    names = validate.check_outputs(outputs)
    validate.check_scalars(softcap, logit_scale, temperature, mode, workspace)
    hidden, weight, bias, lora = autocast_head(hidden, weight, bias, lora)
    validate.check_head(hidden, weight, bias, lora)
    validate.check_main_grad(main_grad, weight)
    shard = vocab_shard(group, weight)
    head = LinearHead(weight, bias, softcap, logit_scale / temperature, lora, shard)
    validate.check_target(target, hidden.shape[0], head.vocab, ignore_index, hidden)
    pick = choose if shard is None else choose_sharded
    chosen = filtered(pick(backend, hidden.device.type, hidden.dtype), filter_bound)
    how = Scoring(chosen, names, mode, workspace, main_grad)
    result = score_valid(how, hidden, head, target, ignore_index)
    return result if names else result.logps


class Scoring(NamedTuple):
    """How rows are scored: everything of a call but its rows and its head."""

    backend: HeadBackend
    outputs: tuple[str, ...]
    mode: Mode | None
    workspace: int | None
    main_grad: Tensor | None = None


def score_valid(
    how: Scoring, hidden: Tensor, head: LinearHead, target: Tensor, ignore_index: int | None
) -> LinearLogprobs:
    """Scores the rows that are not ignored; the others get zeros and no gradient."""
    if not host.on_host(target):
        masked = mask_targets(target, head.vocab, ignore_index)
        rows = hidden if ignore_index is None else masked.rows(hidden)
        return _map(score(how, rows, head, masked.target), masked.values)
    valid = None if ignore_index is None else target.ne(ignore_index)
    if valid is None or bool(valid.all()):
        return score(how, hidden, head, target)
    keep = valid.nonzero().squeeze(1)
    result = score(how, hidden[keep], head, target[keep])
    return _map(result, lambda t: t.new_zeros(target.shape).index_put((keep,), t))


def _map(result: LinearLogprobs, change: Callable[[Tensor], Tensor]) -> LinearLogprobs:
    present = {name: change(t) for name, t in result._asdict().items() if t is not None}
    return LinearLogprobs(**present)


def score(how: Scoring, hidden: Tensor, head: LinearHead, target: Tensor) -> LinearLogprobs:
    """Checked inputs, no ignored rows: straight to the backend, under autograd."""
    lora = head.lora
    found = _LinearLogprobs.apply(
        hidden,
        head.weight,
        head.bias,
        None if lora is None else lora.a,
        None if lora is None else lora.b,
        target,
        _Options(
            how.backend,
            head.softcap,
            head.scale,
            0.0 if lora is None else lora.scale,
            head.shard,
            how.outputs,
            how.main_grad,
        ),
        may_store(how.backend, head, hidden.shape[0], how.mode, how.workspace),
        spare_bytes(how.backend, head, how.mode, how.workspace),
        torch.is_grad_enabled(),
    )
    return LinearLogprobs(found[0], **dict(zip(how.outputs, found[1:], strict=True)))


def may_store(
    backend: HeadBackend, head: LinearHead, rows: int, mode: Mode | None, workspace: int | None
) -> bool:
    """Whether probabilities of ``rows`` rows may be kept: by order, else by the workspace."""
    if mode is not None:
        return mode == "store"
    head = head.for_plans()
    limit = backend.default_workspace(head) if workspace is None else workspace
    return rows * backend.row_bytes(head) <= limit


def spare_bytes(
    backend: HeadBackend, head: LinearHead, mode: Mode | None, workspace: int | None
) -> int:
    """What a backward may use that computes the probabilities again: none by order, else all that
    they might have occupied.
    """
    if mode == "min-memory":
        return 0
    return backend.default_workspace(head.for_plans()) if workspace is None else workspace


class _Options(NamedTuple):
    """Everything of a call that autograd knows nothing of."""

    backend: HeadBackend
    softcap: float | None
    scale: float
    lora_scale: float
    shard: VocabShard | None
    outputs: tuple[str, ...]
    main_grad: Tensor | None


def vocab_shard(group: Any, weight: Tensor) -> VocabShard | None:
    """``group=`` of the public ops as a shard."""
    if group is None or isinstance(group, VocabShard):
        return group
    if isinstance(group, torch.distributed.ProcessGroup):
        return VocabShard.exchange(group, weight.shape[0], weight.device)
    raise ValueError(
        f"group={group!r} must be a VocabShard (VocabShard.even(process_group, V) for DTensor's "
        "Shard(0)) or a torch.distributed.ProcessGroup; for a whole vocabulary pass group=None"
    )


def whole_grads(grads: HeadGrads, shard: VocabShard | None) -> HeadGrads:
    """Gradients of what every rank holds whole, summed over the ranks' parts in place."""
    if shard is not None:
        for part in (grads.hidden, grads.lora_a):
            if part is not None:
                shard.sum_(part)
    return grads


def late_grads(
    backend: HeadBackend,
    saved: Saved,
    dlogps: Tensor,
    shard: VocabShard | None,
    main_grad: Tensor | None,
) -> HeadGrads:
    """A backward's gradients; the weight's goes to ``main_grad`` instead, where there is one."""
    into = None if main_grad is None else HeadGrads(weight=main_grad)
    grads = whole_grads(backend.backward(saved, dlogps, into), shard)
    return grads if main_grad is None else grads._replace(weight=None)


class _LinearLogprobs(torch.autograd.Function):
    """Autograd around a backend; what the backend saves belongs to the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        target: Tensor,
        options: _Options,
        store: bool,
        spare: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, ...]:
        backend, softcap, scale, lora_scale, shard, outputs, main_grad = options
        lora = None if lora_a is None or lora_b is None else HeadLoRA(lora_a, lora_b, lora_scale)
        # needs_input_grad does not know of no_grad, and here grad mode is off in any case.
        needs = Needs(*ctx.needs_input_grad[:5]) if grad_enabled else Needs()
        head = LinearHead(weight, bias, softcap, scale, lora, shard)
        with no_autocast(hidden):
            result, saved = backend.forward(
                hidden, head, target, needs=needs, outputs=outputs, store=store, spare=spare
            )
        ctx.set_materialize_grads(False)
        if saved is not None:
            ctx.save_for_backward(*saved.tensors)
            ctx.backend, ctx.meta, ctx.shard, ctx.main_grad = backend, saved.meta, shard, main_grad
            ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias, lora_a)]
        stats = tuple(getattr(result, name) for name in outputs)
        ctx.mark_non_differentiable(*stats)
        return (result.logps, *stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogps: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dlogps is None:
            return (None,) * 10
        saved = Saved(ctx.saved_tensors, ctx.meta)
        with no_autocast(dlogps):
            grads = late_grads(ctx.backend, saved, dlogps, ctx.shard, ctx.main_grad)
        dtypes = [*ctx.dtypes, ctx.dtypes[-1]]
        narrow = [None if g is None else g.to(d) for g, d in zip(grads, dtypes, strict=True)]
        return (*narrow, None, None, None, None, None)


assert set(LinearLogprobs._fields) == {"logps", *OUTPUTS}
