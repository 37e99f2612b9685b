"""A preference loss over the LM head in one op: groups of pairs, four GEMMs, no logits.

Legend: P pairs, S = 2P sequences (all chosen first, then all rejected), N scored tokens, H hidden,
V vocabulary, r rank of the head's adapter.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends import LinearHead, choose, choose_sharded, filtered
from dpo_fast.functional import validate
from dpo_fast.functional.autocast import autocast_head
from dpo_fast.functional.fused_function import FusedJob, FusedLinearDPO, Rows
from dpo_fast.functional.linear import Mode, vocab_shard
from dpo_fast.functional.pair_stats import PairGroup, check_stats
from dpo_fast.naive import HeadLoRA, LinearLogprobs

Loss = Callable[..., tuple[Tensor, Tensor, Tensor]]


class FusedDPOOutput(NamedTuple):
    """Result of :func:`fused_linear_dpo`; only ``loss`` carries a gradient."""

    loss: Tensor  # scalar: sum_p pair_weight[p] * losses[p]
    losses: Tensor  # [P]
    logps: Tensor  # [S] of the policy, token weights applied
    ref_logps: Tensor | None  # [S]
    chosen_rewards: Tensor  # [P]
    rejected_rewards: Tensor  # [P]
    token_stats: LinearLogprobs | None  # [N] each, of the policy, when `outputs` asks


def fused_linear_dpo(
    policy_hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] int64
    cu_seqlens: Tensor,  # [S + 1] int64
    *,
    ref_hidden: Tensor | None = None,  # [N, H]
    ref_weight: Tensor | None = None,  # [V, H]
    ref_bias: Tensor | None = None,  # [V]
    ref_lora: HeadLoRA | None = None,
    ref_logps: Tensor | None = None,  # [S]
    loss: Loss,
    stats: Callable[[PairGroup], Any] | Any | None = None,
    pair_weight: Tensor | float | None = None,  # [P]
    token_weight: Tensor | None = None,  # [N]
    seq_lens: Sequence[int] | None = None,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    lora: HeadLoRA | None = None,
    group: Any = None,
    sequence_group: Any = None,
    outputs: Sequence[str] = (),
    backend: str = "auto",
    mode: Mode | None = None,
    workspace: int | None = None,
    main_grad: Tensor | None = None,  # [V, H] float32
    filter_bound: float | None = None,
) -> FusedDPOOutput:
    """``sum_p pair_weight[p] * loss(...)[p]`` from hidden states, in as few GEMMs as there can be.

    The same as::

        logps = sequence_logprobs(policy_hidden, weight, target, cu_seqlens, ...)
        with torch.no_grad():
            ref_logps = sequence_logprobs(ref_hidden, ref_weight, target, cu_seqlens, ...)
        losses, chosen_rewards, rejected_rewards = loss(
            logps[:P], logps[P:], ref_logps[:P], ref_logps[P:], stats=stats
        )
        (pair_weight * losses).sum()

    with the GEMMs counted: three for the policy, one for an online reference; two for a frozen
    head, one under ``no_grad``.

    Args:
        ref_hidden: the reference model's states; ``ref_weight=None`` then means the policy's weight
            and (unless ``ref_bias`` is given) bias. ``ref_lora`` is the reference's own adapter.
        ref_logps: instead of ``ref_hidden``: known log-probs, token weights applied. With neither,
            the loss gets None twice; one with the attribute ``needs_reference = True`` is refused.
        loss: any callable ``(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)``
            of ``[P]`` vectors, returning ``(losses, chosen_rewards, rejected_rewards)``. With the
            attribute ``separable = True`` it may be called on groups of pairs; any other gets all
            pairs at once, and the probabilities are computed twice if they exceed the workspace.
        stats: passed on as the keyword ``stats`` if not None: a ``PairStats`` (sliced for each
            group; ``chosen_nll_sum`` and ``wpo_weight`` are filled in if the loss declares
            ``needs_nll``, ``needs_wpo`` and they are None), or a callable that makes one from a
            :class:`PairGroup`.
        pair_weight: None means ``1 / P``.
        seq_lens: lengths of the S sequences on the host; saves a device sync on CUDA.
        sequence_group: a ``ProcessGroup`` over which the tokens of each sequence are spread
            (context or sequence parallel): the ranks pass the same S sequences with their own
            tokens, sums over sequences are reduced, and losses, logps and rewards are those of
            whole sequences on every rank. The gradient on a rank is that of its own tokens: the
            engine must sum gradients over the group (where it averages, multiply the loss by the
            group's size). ``ref_logps`` are of whole sequences, lengths in ``stats`` as well.
        group: as :func:`linear_logprobs`; ``ref_weight`` is then split like ``weight``.
        outputs, backend, mode, workspace, main_grad, filter_bound, ignore_index, and the head's
            parameters: as :func:`linear_logprobs`.

    Returns:
        :class:`FusedDPOOutput`.

    Gradients:
        Of ``.loss`` only, to policy_hidden, weight, bias, lora.a and lora.b where they require one,
        for any upstream gradient. Deterministic. Double backward raises. Everything else is
        detached. Neither way of taking them reads the weight in the backward.

    Memory:
        At most ``workspace`` bytes of probabilities, chunks of rows in reused scratch. On CUDA,
        where all rows fit, the probabilities live until the backward and each gradient is written
        once in its own dtype; elsewhere, and for several groups, the forward takes the gradients,
        and float32 dhidden and dweight live until the backward.

    Raises:
        ValueError: as :func:`linear_logprobs`; a missing or doubled reference; wrong lengths; a
            loss that returns something else or has trainable tensors of its own.

    Source: DPO, arXiv 2305.18290 eq. 7; any loss with a derivative with respect to log-probs works.
    """
    names = validate.check_outputs(outputs)
    validate.check_scalars(softcap, logit_scale, temperature, mode, workspace)
    if not callable(loss):
        raise ValueError(
            f"loss={loss!r} must be callable; build_loss({loss!r}) makes one of a name"
        )
    scale = logit_scale / temperature
    validate.check_main_grad(main_grad, weight)
    hidden, head = _checked_head(policy_hidden, LinearHead(weight, bias, softcap, scale, lora))
    head = head._replace(shard=vocab_shard(group, head.weight))
    validate.check_tokens(hidden, head.vocab, target, ignore_index, cu_seqlens, token_weight)
    pairs = validate.check_pairs(cu_seqlens, seq_lens, pair_weight, ref_logps, hidden)
    if ref_hidden is None and ref_weight is not None:
        raise ValueError(
            "ref_weight without ref_hidden: pass the reference's hidden states as well"
        )
    ref_head = LinearHead(
        weight, bias if ref_bias is None else ref_bias, softcap, scale, ref_lora, head.shard
    )
    if ref_weight is not None:
        ref_head = ref_head._replace(weight=ref_weight, bias=ref_bias)
    reference = _checked_reference(hidden, head, ref_hidden, ref_head, ref_logps, loss)
    check_stats(loss, stats)
    pick = choose if head.shard is None else choose_sharded
    rows = Rows(target, cu_seqlens, seq_lens, token_weight, ignore_index)
    job = FusedJob(
        backend=filtered(pick(backend, hidden.device.type, hidden.dtype), filter_bound),
        rows=rows,
        reference=reference,
        ref_logps=None if ref_logps is None else ref_logps.detach(),
        loss=loss,
        stats=stats,
        pair_weight=1.0 / max(1, pairs) if pair_weight is None else pair_weight,
        outputs=names,
        mode=mode,
        workspace=workspace,
        sequence_group=sequence_group,
        main_grad=main_grad,
    )
    return _run(job, hidden, head)


def _checked_head(
    hidden: Tensor, head: LinearHead, names: tuple[str, str] = ("policy_hidden", "weight")
) -> tuple[Tensor, LinearHead]:
    """Hidden states and head as the autocast in force wants them, checked against each other."""
    hidden, weight, bias, lora = autocast_head(hidden, head.weight, head.bias, head.lora)
    validate.check_head(hidden, weight, bias, lora, names)
    return hidden, head._replace(weight=weight, bias=bias, lora=lora)


def _checked_reference(
    hidden: Tensor,
    head: LinearHead,
    ref_hidden: Tensor | None,
    ref_head: LinearHead,
    ref_logps: Tensor | None,
    loss: Loss,
) -> tuple[Tensor, LinearHead] | None:
    if ref_hidden is None:
        if ref_logps is None and getattr(loss, "needs_reference", False):
            raise ValueError(
                f"the loss {loss!r} needs a reference: "
                "pass ref_hidden (and ref_weight), or ref_logps"
            )
        return None
    if ref_logps is not None:
        raise ValueError("ref_hidden and ref_logps both given: pass the one that shall count")
    with torch.no_grad():
        ref_hidden, ref_head = _checked_head(ref_hidden, ref_head, ("ref_hidden", "ref_weight"))
    if ref_hidden.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"ref_hidden has {ref_hidden.shape[0]} rows and policy_hidden {hidden.shape[0]}; "
            "both models must score the same N tokens"
        )
    if ref_head.shard is not None and ref_head.weight.shape[0] != head.weight.shape[0]:
        raise ValueError(
            f"ref_weight has {ref_head.weight.shape[0]} rows on this rank and weight "
            f"{head.weight.shape[0]}; under a group both are split alike: compute the "
            "reference's log-probs apart and pass ref_logps"
        )
    return ref_hidden, ref_head


def _run(job: FusedJob, hidden: Tensor, head: LinearHead) -> FusedDPOOutput:
    """Drops ignored rows, runs the op, and puts the statistics back where their tokens were."""
    lora = head.lora
    scored, keep = job.rows.drop_ignored(head.vocab)
    wanted = None  # of the rows of hidden states
    if keep is not None:
        wanted = lambda states: states[keep]
    elif scored.masked is not None and scored.ignore_index is not None:
        wanted = scored.masked.rows
    if wanted is not None:
        hidden = wanted(hidden)
        if job.reference is not None:
            job = job._replace(reference=(wanted(job.reference[0]), job.reference[1]))
    found = FusedLinearDPO.apply(
        hidden,
        head.weight,
        head.bias,
        None if lora is None else lora.a,
        None if lora is None else lora.b,
        (head.softcap, head.scale, 0.0 if lora is None else lora.scale, head.shard),
        job._replace(rows=scored),
        torch.is_grad_enabled(),
    )
    loss, losses, logps, ref_logps, chosen, rejected, *tokens = found
    stats = None
    if job.outputs:
        if keep is not None:
            shape = job.rows.target.shape
            tokens = [t.new_zeros(shape).index_put((keep,), t) for t in tokens]
        stats = LinearLogprobs(tokens[0], **dict(zip(job.outputs, tokens[1:], strict=True)))
    return FusedDPOOutput(loss, losses, logps, ref_logps, chosen, rejected, stats)
