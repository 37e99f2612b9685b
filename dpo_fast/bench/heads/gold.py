"""The LM head in float64: log-probs of all sequences, gradients of some rows and columns.

Legend: S sequences, N scored tokens, H hidden, V vocabulary; k rows and m words are checked.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_fast.bench.gate import Errors, Gate
from dpo_fast.bench.heads.inputs import BETA, Inputs

CHUNK = 1024  # rows whose float64 logits exist at a time
SAMPLE = 128  # rows, and words, whose gradients are compared

# What a result may be off by: as good as exact, and wrong whatever the naive loop gives. Log-probs
# in nats a sequence; gradients relative, in the L2 norm.
SOFT = {
    torch.float32: {"logps": 2e-2, "dhidden": 1e-3, "dweight": 1e-3},
    torch.bfloat16: {"logps": 1.0, "dhidden": 2e-2, "dweight": 2e-2},
}
HARD = {
    torch.float32: {"logps": 1e-1, "dhidden": 1e-2, "dweight": 1e-2},
    torch.bfloat16: {"logps": 30.0, "dhidden": 0.6, "dweight": 0.6},
}


class HeadResult(NamedTuple):
    """What a step gives: log-probs ``[S]`` and the gradients that the setting has."""

    logps: Tensor
    dhidden: Tensor  # [N, H]
    dweight: Tensor | None  # [V, H]


class Gold(NamedTuple):
    """Float64 values, and where they are."""

    logps: Tensor  # [S]
    rows: Tensor  # [k]
    dhidden: Tensor  # [k, H]
    words: Tensor  # [m]
    dweight: Tensor  # [m, H]


@torch.no_grad()
def head_gold(x: Inputs) -> Gold:
    """The step of ``x`` in float64; one GEMM a model, and small ones."""
    w = x.weight.double()
    lse, logps = _scores(x, x.hidden, w)
    refs = x.ref_logps.double()
    if x.shape.online:
        refs = _sums(_scores(x, x.ref_hidden, x.ref_weight.double())[1], x)
    sums = _sums(logps, x)
    c = _dlogps(sums - refs).repeat_interleave(torch.tensor(x.lens, device=w.device))
    g = torch.Generator("cpu").manual_seed(1)
    rows = torch.randperm(len(x.target), generator=g)[:SAMPLE].to(w.device)
    words = torch.randperm(w.shape[0], generator=g)[: SAMPLE // 2].to(w.device)
    words = torch.unique(torch.cat([words, x.target[rows[: SAMPLE // 2]]]))
    every = torch.arange(len(x.target), device=w.device)
    of_rows = _dlogits(x, rows, slice(None), w, lse, c)
    of_words = _dlogits(x, every, words, w[words], lse, c)
    return Gold(sums, rows, of_rows @ w, words, of_words.T @ x.hidden.double())


def head_gate(x: Inputs) -> Gate:
    """Compares a :class:`HeadResult` with the gold of ``x``."""
    gold = head_gold(x)

    def measure(result: HeadResult) -> Errors:
        errors = {"logps": float((result.logps.double() - gold.logps).abs().max())}
        errors["dhidden"] = relative(result.dhidden[gold.rows], gold.dhidden)
        if result.dweight is not None:
            errors["dweight"] = relative(result.dweight[gold.words], gold.dweight)
        return errors

    names = ["logps", "dhidden"] + ([] if x.shape.frozen else ["dweight"])
    soft, hard = SOFT[x.shape.dtype], HARD[x.shape.dtype]
    return Gate(measure, {n: soft[n] for n in names}, {n: hard[n] for n in names})


def relative(found: Tensor, gold: Tensor) -> float:
    """L2 norm of the difference over that of ``gold``."""
    return float((found.double() - gold).norm() / gold.norm())


def _scores(x: Inputs, hidden: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(log of the softmax's denominator, log-prob of the target) of each row."""
    parts = []
    for rows, target in zip(hidden.split(CHUNK), x.target.split(CHUNK), strict=True):
        z = _capped(x, rows.double() @ w.T)
        lse = z.logsumexp(1)
        parts.append((lse, z.gather(1, target[:, None])[:, 0] - lse))
    lse, logps = (torch.cat(column) for column in zip(*parts, strict=True))
    return lse, logps


def _capped(x: Inputs, z: Tensor) -> Tensor:
    cap = x.shape.softcap
    return z if cap is None else cap * torch.tanh(z / cap)


def _dlogps(logratios: Tensor) -> Tensor:
    """Derivative of the mean sigmoid loss with respect to the log-prob of each sequence."""
    with torch.enable_grad():
        ratios = logratios.detach().requires_grad_()
        chosen, rejected = ratios.chunk(2)
        loss = -logsigmoid(BETA * (chosen - rejected)).mean()
        return torch.autograd.grad(loss, ratios)[0]


def _dlogits(
    x: Inputs, rows: Tensor, words: Tensor | slice, w: Tensor, lse: Tensor, c: Tensor
) -> Tensor:
    """Derivatives with respect to the logits before the cap, of some rows and some words."""
    z = _capped(x, x.hidden[rows].double() @ w.T)
    names = torch.arange(x.weight.shape[0], device=w.device)[words]
    hot = (x.target[rows][:, None] == names).double()
    dz = c[rows][:, None] * (hot - (z - lse[rows][:, None]).exp())
    cap = x.shape.softcap
    return dz if cap is None else dz * (1 - (z / cap) ** 2)


def _sums(values: Tensor, x: Inputs) -> Tensor:
    return torch.stack([part.sum() for part in values.split(x.lens)])
