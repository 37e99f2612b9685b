"""The LM heads that are compared, each as one training step of a DPO head.

A step is: log-probs of the policy (and of the reference where it is online), the sigmoid loss of
the pairs, gradients of the hidden states and, unless frozen, of the head.

Legend: P pairs, S = 2P sequences, T padded length, N scored tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_fast.bench.case import LeftOut, Step, Variant
from dpo_fast.bench.compiler import require_compiler
from dpo_fast.bench.heads.gold import HeadResult
from dpo_fast.bench.heads.inputs import BETA, Inputs
from dpo_fast.bench.peers import cut_cross_entropy, liger_dpo_loss, trl_logprob_function

Logps = Callable[[Tensor, Tensor], Tensor]


class SigmoidPairs:
    """DPO's loss over four ``[P]`` vectors (arXiv 2305.18290 eq. 7)."""

    separable = True

    def __call__(
        self, c: Tensor, r: Tensor, rc: Tensor, rr: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return -logsigmoid(BETA * ((c - rc) - (r - rr))), BETA * (c - rc), BETA * (r - rr)


def pair_loss(logps: Tensor, refs: Tensor) -> Tensor:
    """Mean over the pairs."""
    loss, *_ = SigmoidPairs()(*logps.chunk(2), *refs.chunk(2))
    return loss.mean()


def by_sequence(per_token: Tensor, x: Inputs) -> Tensor:
    """``[N]`` to ``[S]``."""
    return torch.segment_reduce(per_token, "sum", offsets=x.cu_seqlens)


def compact(x: Inputs, logps_of: Logps) -> Step:
    """A step over the scored rows: ``logps_of(hidden [N, H], weight) -> [N]``."""

    def step() -> HeadResult:
        refs = x.ref_logps
        if x.shape.online:
            with torch.no_grad():
                refs = by_sequence(logps_of(x.ref_hidden, x.ref_weight), x)
        logps = by_sequence(logps_of(x.hidden, x.weight), x)
        return _gradients(x, pair_loss(logps, refs), logps, x.hidden)

    return step


def over_rows(x: Inputs, logps_of: Logps) -> Step:
    """A step over padded rows: ``logps_of(hidden [S, T, H], weight) -> [S]``."""

    def step() -> HeadResult:
        refs = x.ref_logps
        if x.shape.online:
            with torch.no_grad():
                refs = logps_of(x.ref_padded, x.ref_weight)
        logps = logps_of(x.padded, x.weight)
        return _gradients(x, pair_loss(logps, refs), logps, x.padded)

    return step


def _gradients(x: Inputs, loss: Tensor, logps: Tensor, hidden: Tensor) -> HeadResult:
    leaves = [hidden] if x.shape.frozen else [hidden, x.weight]
    dhidden, *rest = torch.autograd.grad(loss, leaves)
    if hidden is x.padded:
        dhidden = x.scored(dhidden)
    return HeadResult(logps.detach(), dhidden, rest[0] if rest else None)


def naive(x: Inputs) -> Step:
    """What one writes after reading the paper: all logits of all rows, log-softmax, gather."""
    mask, target = x.labels != -100, x.labels.clamp(min=0).unsqueeze(-1)

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        z = _cap(hidden @ weight.T, x)
        return (z.log_softmax(-1).gather(-1, target).squeeze(-1) * mask).sum(-1)

    return over_rows(x, logps_of)


def trl_0_24(x: Inputs) -> Step:
    """The formula of TRL 0.24's ``concatenated_forward``: full logits of padded rows, target minus
    logsumexp row by row in fp32 (log-softmax row by row in narrower dtypes), mean logits for the
    metrics.
    """
    mask, target = x.labels != -100, x.labels.clamp(min=0)

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        z = _cap(hidden @ weight.T, x)
        per_token = target_logps_by_row(z, target)
        per_token = per_token.masked_fill(~mask, 0.0)
        with torch.no_grad():
            for half, scored in zip(z.chunk(2), mask.chunk(2), strict=True):
                half[scored].mean()
        return per_token.sum(-1)

    return over_rows(x, logps_of)


def target_logps_by_row(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probs of ``target [S, T]`` from ``logits [S, T, V]``, with the temporary memory of one
    sequence, as TRL computed them before it had a head of its own.
    """
    index = target.unsqueeze(-1)
    if logits.dtype in (torch.float32, torch.float64):
        chosen = logits.gather(-1, index).squeeze(-1)
        return chosen - torch.stack([row.logsumexp(-1) for row in logits])
    rows = [z.log_softmax(-1).gather(-1, i) for z, i in zip(logits, index, strict=True)]
    return torch.stack(rows).squeeze(-1)


def trl(x: Inputs) -> Step:
    """TRL 1.16's chunked function, over the rows that its trainer gives it: the scored ones on a
    GPU, all on a CPU.
    """
    function, chunk = trl_logprob_function()

    def per_token(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        out = function.apply(hidden, weight, None, target, 1.0, chunk, x.shape.softcap, 1.0, ())
        logps: Tensor = out[0]
        return logps

    if x.hidden.device.type == "cuda":
        return compact(x, lambda hidden, weight: per_token(hidden, weight, x.target))
    mask, target = x.labels != -100, x.labels.clamp(min=0).reshape(-1)

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        flat = per_token(hidden.reshape(-1, hidden.shape[-1]), weight, target)
        return flat.view(mask.shape).masked_fill(~mask, 0.0).sum(-1)

    return over_rows(x, logps_of)


def liger(x: Inputs) -> Step:
    """Liger's chunked DPO loss: plain PyTorch, compiled; prompt and padding rows included."""
    loss_class = liger_dpo_loss()
    if x.shape.softcap is not None or not x.shape.online:
        raise LeftOut("its DPO loss has no softcap and takes no precomputed reference")
    require_compiler(x.hidden.device.type)
    loss_of = loss_class(beta=BETA, use_ref_model=True)

    def step() -> HeadResult:
        loss, found = loss_of(
            x.weight, x.padded, x.labels, ref_input=x.ref_padded, ref_weight=x.ref_weight
        )
        return _gradients(x, loss, torch.cat([found[0], found[1]]), x.padded)

    return step


def cce(x: Inputs) -> Step:
    """Apple's cut-cross-entropy, exact (no filtering); its torch.compile form on a CPU."""
    function = cut_cross_entropy()
    device = x.hidden.device.type
    require_compiler(device)
    how: dict[str, Any] = {"impl": "torch_compile"} if device == "cpu" else {"filter_eps": None}

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = function(
            hidden, weight, x.target, softcap=x.shape.softcap, reduction="none", **how
        )
        return -loss.float()

    return compact(x, logps_of)


def compiled(x: Inputs) -> Step:
    """torch.compile of the naive formula over the scored rows."""
    require_compiler(x.hidden.device.type)

    @torch.compile(dynamic=True)
    def logps_of(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        z = _cap((hidden @ weight.T).float(), x)
        return z.gather(1, target[:, None])[:, 0] - z.logsumexp(1)

    return compact(x, lambda hidden, weight: logps_of(hidden, weight, x.target))


def ours(x: Inputs, **options: Any) -> Step:
    """``fused_linear_dpo``: loss and gradients in one op."""
    from dpo_fast.functional import fused_linear_dpo

    reference: dict[str, Any] = {"ref_logps": x.ref_logps}
    if x.shape.online:
        reference = {"ref_hidden": x.ref_hidden, "ref_weight": x.ref_weight}

    def step() -> HeadResult:
        out = fused_linear_dpo(
            x.hidden,
            x.weight,
            x.target,
            x.cu_seqlens,
            loss=SigmoidPairs(),
            seq_lens=x.lens,
            softcap=x.shape.softcap,
            ignore_index=None,  # every row has a target, for all variants
            **reference,
            **options,
        )
        return _gradients(x, out.loss, out.logps, x.hidden)

    return step


def ours_per_token(x: Inputs) -> Step:
    """``linear_logprobs`` under autograd, the loss written by hand around it."""
    from dpo_fast.functional import linear_logprobs

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:
        found = linear_logprobs(hidden, weight, x.target, softcap=x.shape.softcap)
        assert isinstance(found, Tensor)
        return found

    return compact(x, logps_of)


def _cap(z: Tensor, x: Inputs) -> Tensor:
    cap = x.shape.softcap
    return z if cap is None else cap * torch.tanh(z / cap)


HEADS: dict[str, Callable[[Inputs], Step]] = {
    "naive": naive,
    "TRL 0.24 style": trl_0_24,
    "TRL": trl,
    "Liger": liger,
    "cut-cross-entropy": cce,
    "torch.compile": compiled,
    "dpo_fast": ours,
    "dpo_fast per token": ours_per_token,
    "dpo_fast min-memory": lambda x: ours(x, mode="min-memory"),
}


def head_variants(x: Inputs, names: tuple[str, ...]) -> list[Variant]:
    """The heads of those names on ``x``."""

    def prepare(name: str) -> Callable[[], Step]:
        return lambda: HEADS[name](x)

    return [Variant(name, prepare(name)) for name in names]
