"""The adapter against TRL's own chunked function: values, gradients, dtypes, one call at a time.

Legend: N scored tokens, H hidden, V vocabulary.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_fast.functional import linear_logprobs
from dpo_fast.integrations.trl import OUTPUTS, FusedLogProbs

ChunkedLogProbFunction = pytest.importorskip("trl.kernels").ChunkedLogProbFunction

N, H, V = 13, 16, 101
HEADS = [
    {},
    {"temperature": 0.7},
    {"final_logit_softcapping": 3.0},
    {"final_logit_softcapping": 3.0, "logit_scale": 0.25, "temperature": 1.3},
    {"logit_scale": 4.0},
]


@pytest.fixture
def ours() -> Iterator[FusedLogProbs]:
    yield FusedLogProbs(ChunkedLogProbFunction, "auto")


def inputs(bias: bool = True, dtype: torch.dtype = torch.float32, rows: int = N) -> list[Any]:
    rng = torch.Generator().manual_seed(1)
    head = [torch.randn(rows, H, generator=rng), torch.randn(V, H, generator=rng)]
    if bias:
        head.append(torch.randn(V, generator=rng))
    tensors = [t.to(dtype).requires_grad_() for t in head]
    return [*tensors, *([] if bias else [None]), torch.randint(V, (rows,), generator=rng)]


def call(
    function: Any, args: list[Any], head: dict[str, Any], outputs: Any = tuple(OUTPUTS)
) -> Any:
    options = {"temperature": 1.0, "final_logit_softcapping": None, "logit_scale": 1.0, **head}
    return function.apply(
        *args,
        options["temperature"],
        17,
        options["final_logit_softcapping"],
        options["logit_scale"],
        outputs,
    )


def run(function: Any, head: dict[str, Any], bias: bool, entropy_coef: float) -> list[Tensor]:
    """The five outputs, then the gradients of all inputs under a random upstream gradient."""
    args = inputs(bias)
    out = call(function, args, head)
    upstream = torch.randn(N, generator=torch.Generator().manual_seed(5))
    loss = (out[0] * upstream).sum()
    if entropy_coef:
        loss = loss + entropy_coef * (out[1] * upstream.flip(0)).sum()
    leaves = [t for t in args[:3] if t is not None]
    return [*out, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_values_and_gradients(
    ours: FusedLogProbs, head: dict[str, Any], bias: bool, entropy_coef: float
) -> None:
    got = run(ours, head, bias, entropy_coef)
    expected = run(ChunkedLogProbFunction, head, bias, entropy_coef)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("names", [(), ("log_probs",), ("entropy",), ("mean_logits", "is_top1")])
def test_outputs_that_are_not_asked_for_are_none(
    ours: FusedLogProbs, names: tuple[str, ...]
) -> None:
    args = inputs()
    for mine, theirs in zip(
        call(ours, args, {}, names), call(ChunkedLogProbFunction, args, {}, names), strict=True
    ):
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.requires_grad == theirs.requires_grad


def test_the_entropy_alone_may_carry_the_gradient(ours: FusedLogProbs) -> None:
    grads = []
    for function in (ours, ChunkedLogProbFunction):
        args = inputs()
        grads.append(torch.autograd.grad(call(function, args, {})[1].sum(), args[0])[0])
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads)


def test_logged_entropy_costs_no_second_pass(ours: FusedLogProbs) -> None:
    class Refuses:
        @staticmethod
        def apply(*args: Any) -> None:
            raise AssertionError("TRL's function was called without a gradient of the entropy")

    ours.original = Refuses
    out = call(ours, inputs(), {})
    (out[0].sum() + out[1].detach().sum()).backward()


def test_no_grad_gives_leaves(ours: FusedLogProbs) -> None:
    with torch.no_grad():
        out = call(ours, inputs(), {})
    assert not any(t.requires_grad for t in out)


def test_frozen_head(ours: FusedLogProbs) -> None:
    """LoRA: only the hidden states need a gradient, of the entropy, too."""
    grads = []
    for function in (ours, ChunkedLogProbFunction):
        args = inputs()
        args[1], args[2] = args[1].detach(), args[2].detach()
        out = call(function, args, {})
        (out[0].sum() - 0.1 * out[1].sum()).backward()
        grads.append(args[0].grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=2e-5)


def test_autocast_computes_in_its_dtype(ours: FusedLogProbs) -> None:
    """bf16 autocast over fp32 parameters: as near to the fp32 values as TRL's own."""
    args = inputs()
    gold = call(ChunkedLogProbFunction, args, {})
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = call(ours, args, {}), call(ChunkedLogProbFunction, args, {})
    (mine[0].sum() + mine[1].sum()).backward()
    assert args[0].grad.dtype == torch.float32
    for i in (0, 1, 2):
        assert mine[i].dtype == torch.float32
        error, allowed = (mine[i] - gold[i]).abs().max(), (theirs[i] - gold[i]).abs().max()
        assert 0 < error <= 2 * allowed + 1e-4


def test_head_of_another_dtype_is_cast(ours: FusedLogProbs) -> None:
    """cast_lm_head_to_fp32: fp32 hidden states, bf16 head, no autocast."""
    results = []
    for function in (ours, ChunkedLogProbFunction):
        hidden, *head = inputs(dtype=torch.bfloat16)
        args = [hidden.detach().float().requires_grad_(), *head]
        out = call(function, args, {})
        out[0].sum().backward()
        assert head[0].grad.dtype == torch.bfloat16
        results.append((out[0], args[0].grad, head[0].grad.float()))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)


def test_no_token_at_all(ours: FusedLogProbs) -> None:
    args = inputs(rows=0)
    out = call(ours, args, {})
    assert [tuple(t.shape) for t in out] == [(0,)] * 5
    (out[0].sum() + out[1].sum()).backward()
    assert not args[1].grad.any()


def test_head_that_a_sharding_engine_empties_after_the_forward(
    ours: FusedLogProbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed ZeRO-3 takes the gathered parameter away between forward and backward.

    Nothing is stored here, so the backward reads the head again.
    """
    frugal = functools.partial(linear_logprobs, mode="min-memory")
    monkeypatch.setattr("dpo_fast.integrations.trl.linear_logprobs", frugal)
    grads = []
    for emptied in (False, True):
        hidden, weight, *rest = inputs(bias=False)
        if emptied:
            weight.ds_id = 0
        kept = weight.view_as(weight)  # what the gradient is asked of: shapes of the full head
        if emptied:
            kept.ds_id = 0
        out = call(ours, [hidden, kept, *rest], {})
        if emptied:
            kept.data = torch.empty(0)
        grads.append(torch.autograd.grad(out[0].sum(), (hidden, kept)))
    for whole, gathered in zip(*grads, strict=True):
        assert torch.equal(whole, gathered)


def test_entropy_gradient_of_a_gathered_head(
    ours: FusedLogProbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 TRL's backward asks head and bias whether they are gathered: they are."""
    asked = []

    def gather(*params: Any) -> Any:
        asked.extend(p.ds_status for p in params)
        return contextlib.nullcontext()

    args = inputs()
    for param in args[1:3]:
        param.ds_id, param.ds_status = 0, "available"
    out = call(ours, args, {})
    monkeypatch.setattr("trl.trainer.utils.maybe_gather_lm_head_ctx", gather)
    out[1].sum().backward()
    assert asked == ["available", "available"]


def test_the_backend_is_obeyed_or_refused() -> None:
    with pytest.raises(ValueError, match="no-such"):
        call(FusedLogProbs(ChunkedLogProbFunction, "no-such"), inputs(), {})
