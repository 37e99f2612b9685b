"""The kernels' LM head on the cases of tests/functional, and the naive twin beside it."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dpo_fast.naive import naive_linear_logprobs
from tests.functional.cases import Case, make_case

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="interpreter: arithmetic of tiny tiles, run without a GPU"
)

# bfloat16 inputs are absent here by name: the interpreter's bfloat16 dot multiplies raw bits.
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.7, "temperature": 1.3},
    "lora": {"rank": 4},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3, "rank": 4},
}
STATISTICS = ("entropy", "log_sum_sq_probs", "is_top1")


class Result(NamedTuple):
    logps: Tensor
    grads: dict[str, Tensor]
    stats: dict[str, Tensor]


def small_case(head: str, dtype: torch.dtype = torch.float32, rows=19, width=24, vocab=67) -> Case:
    return make_case(rows, width, vocab, dtype=dtype, **HEADS[head])


def upstream_of(case: Case) -> Tensor:
    return torch.randn(case.target.shape, generator=torch.Generator().manual_seed(3))


def run(
    case: Case,
    engine: str,
    *,
    e_dtype: torch.dtype | None = None,
    store: bool = True,
    frozen: bool = False,
    stats: bool = False,
    wide: bool = False,
    bound: float | None = None,
    spare: int = 0,
    upstream: Tensor | None = None,
) -> Result:
    """Forward and backward of the kernels on a case."""
    from dpo_fast_kernels import head as kernels
    from dpo_fast_kernels.problem import Gradients, Wanted, make_problem

    kw = case.kwargs
    scale = kw.get("logit_scale", 1.0) / kw.get("temperature", 1.0)
    detach = lambda t: None if t is None else t.detach()
    lora = kw.get("lora")
    problem = make_problem(
        case.hidden.detach(),
        case.weight.detach(),
        detach(kw.get("bias")),
        None if lora is None else (lora.a.detach(), lora.b.detach(), lora.scale),
        kw.get("softcap"),
        scale,
        stats=stats,
        engine=engine,
        e_dtype=e_dtype,
    )
    head = not frozen
    wanted = Wanted(
        True, head, head and kw.get("bias") is not None, lora is not None, head and lora is not None
    )
    held = kernels.forward(
        problem, case.target, wanted=wanted, stats=stats, store=store, bound=bound
    )
    dlogps = upstream_of(case) if upstream is None else upstream
    into = Gradients() if wide else None
    grads = kernels.backward(problem, held, dlogps, wanted, into, spare)
    named = {n: g for n, g in zip(Gradients._fields, grads, strict=True) if g is not None}
    state = held.scored.state
    found = {} if state.stats is None else dict(zip(STATISTICS, state.stats, strict=True))
    if stats and held.scored.logit_sum is not None:
        found["mean_logit"] = held.scored.logit_sum * (scale / case.weight.shape[0])
    return Result(state.logps, named, found)


def naive(case: Case, *, stats: bool = False, upstream: Tensor | None = None) -> Result:
    """The same of the naive twin."""
    names = (*STATISTICS, "mean_logit") if stats else ()
    out = naive_linear_logprobs(case.hidden, case.weight, case.target, **case.kwargs, outputs=names)
    logps = out.logps if stats else out
    leaves = case.leaves()
    dlogps = (upstream_of(case) if upstream is None else upstream).to(logps.dtype)
    grads = torch.autograd.grad(logps, list(leaves.values()), dlogps)
    found = {name: getattr(out, name) for name in names}
    return Result(logps.detach(), dict(zip(leaves, grads, strict=True)), found)


def gold(case: Case, **kwargs) -> Result:
    return naive(case.to(torch.float64), **kwargs)
