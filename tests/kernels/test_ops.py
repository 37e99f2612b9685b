"""The operators: fake kernels, aliasing, tracing; the adapter behind dpo_fast.functional."""

import pytest
import torch

from dpo_fast.backends import LinearHead, choose
from dpo_fast.functional import fused_linear_dpo, host, linear_logprobs, sequence_logprobs
from dpo_fast.functional.linear import Scoring, score
from dpo_fast.naive import naive_linear_dpo, naive_linear_logprobs, naive_sequence_logprobs
from tests.functional.cases import LENGTHS, SigmoidLoss, borders, gradients, make_case
from tests.kernels.support import HEADS, interpreted, upstream_of
from tests.tolerances import assert_three_way, relative_error

pytestmark = interpreted

NAMES = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


def forward_args(wanted, *, stats=True, store=True, engine=None):
    case = make_case(9, 16, 37, bias=True, rank=2, requires_grad=())
    lora = case.kwargs["lora"]
    args = (case.hidden, case.weight, case.target, case.kwargs["bias"], lora.a, lora.b, 0.5)
    return (*args, 7.0, 0.8, -100, wanted, stats, store, engine, None, 0)


@pytest.mark.parametrize(
    ("wanted", "store"),
    [([True] * 5, True), ([True] * 5, False), ([True, False, False, True, False], False),
     ([False] * 5, True), ([False, True, False, False, False], True)],
)  # fmt: skip
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_opcheck(engine, wanted, store):
    from dpo_fast_kernels.ops import linear_logprob_bwd, linear_logprob_fwd

    args = forward_args(wanted, store=store, engine=engine)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(linear_logprob_fwd, args, test_utils=checks)
    logps, state, col, _, e, g, eb, mask = linear_logprob_fwd(*args)
    back = (*args[:2], *args[3:7], 7.0, 0.8, wanted, engine)
    saved = (logps, state, col, e, g, eb, mask, torch.randn(9), 0)
    torch.library.opcheck(linear_logprob_bwd, (*back, *saved), test_utils=checks)


def test_opcheck_of_the_segment_sum():
    from dpo_fast_kernels.segment import segment_sum

    values = torch.randn(9, requires_grad=True)
    torch.library.opcheck(segment_sum, (values, torch.tensor([0, 0, 4, 9])))


@pytest.mark.parametrize("mode", ["store", "min-memory"])
def test_traced_whole(mode):
    backend = choose("triton", "cpu", torch.float32)
    case = make_case(9, 16, 37)

    def loss(hidden, weight, target):
        head = LinearHead(weight, None, None, 1.0, None)
        logps = score(Scoring(backend, (), mode, None), hidden.tanh(), head, target).logps
        return (logps * logps).sum()

    leaves = (case.hidden, case.weight)
    plain = torch.autograd.grad(loss(*leaves, case.target), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(*leaves, case.target), leaves)
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", [None, "store", "min-memory"])
def test_a_model_and_its_loss_are_traced_whole(mode, monkeypatch):
    """As on a GPU, where no value is known to the host: one graph, sums over sequences included."""
    monkeypatch.setattr(host, "on_host", lambda tensor: False)
    body = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh())
    case = make_case(sum(LENGTHS), 16, 37, bias=True, rank=2)
    case.target[3] = -100
    cu = borders()
    x = torch.randn(sum(LENGTHS), 8)

    def loss(x, target, cu):
        logps = sequence_logprobs(
            body(x), case.weight, target, cu, mode=mode, backend="triton", softcap=9.0,
            **case.kwargs,
        )  # fmt: skip
        return -torch.nn.functional.logsigmoid(logps[:5] - logps[5:]).sum()

    leaves = [*body.parameters(), *list(case.leaves().values())[1:]]
    plain = torch.autograd.grad(loss(x, case.target, cu), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(x, case.target, cu), leaves)
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["store", "min-memory"])
@pytest.mark.parametrize("head", HEADS)
def test_linear_logprobs(head, mode):
    case = make_case(13, 24, 67, **HEADS[head])
    run = lambda f, c, **kw: f(c.hidden, c.weight, c.target, **c.kwargs, outputs=NAMES, **kw)
    ours = run(linear_logprobs, case, backend="triton", mode=mode)
    eager = run(naive_linear_logprobs, case)
    right = run(naive_linear_logprobs, case.to(torch.float64))
    assert_three_way(ours.logps, eager.logps, right.logps, torch.float32)
    assert torch.equal(ours.is_top1, right.is_top1)
    for name in ("entropy", "mean_logit", "log_sum_sq_probs"):
        torch.testing.assert_close(
            getattr(ours, name).double(), getattr(right, name), rtol=1e-5, atol=1.5e-5
        )
    upstream = upstream_of(case)
    expected = gradients(eager.logps, case, upstream)
    for name, grad in gradients(ours.logps, case, upstream).items():
        assert relative_error(grad, expected[name]) < 1e-5, name


def test_sequence_logprobs_and_ignored_rows():
    case = make_case(sum(LENGTHS), 16, 53)
    case.target[[2, 11]] = -100
    args = (case.hidden, case.weight, case.target, borders())
    ours = sequence_logprobs(*args, backend="triton")
    torch.testing.assert_close(ours, naive_sequence_logprobs(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workspace", [None, 64 * 4 * 12], ids=["one group", "groups"])
def test_fused_dpo(workspace):
    case = make_case(sum(LENGTHS), 16, 53, bias=True, rank=2)
    ref = torch.randn(sum(LENGTHS), 16)
    args = (case.hidden, case.weight, case.target, borders())
    ours = fused_linear_dpo(
        *args, ref_hidden=ref, loss=SigmoidLoss(), backend="triton", workspace=workspace,
        **case.kwargs,
    )  # fmt: skip
    right = naive_linear_dpo(
        *args, ref_hidden=ref, ref_lora=None, loss=SigmoidLoss(), **case.kwargs
    )
    torch.testing.assert_close(ours.loss, right[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.logps, right[2].detach(), rtol=1e-5, atol=1e-5)
    expected = gradients(right[0] * 3.0, case)
    for name, grad in gradients(ours.loss * 3.0, case).items():
        assert relative_error(grad, expected[name]) < 1e-5, name


def test_equal_models_give_log_two_in_bits():
    case = make_case(sum(LENGTHS), 16, 53)
    loss = SigmoidLoss()
    for outputs in ((), ("entropy",)):
        found = fused_linear_dpo(
            case.hidden, case.weight, case.target, borders(), ref_hidden=case.hidden.detach(),
            loss=loss, backend="triton", outputs=outputs,
        )  # fmt: skip
        if not outputs:
            assert torch.equal(found.logps, found.ref_logps)
        torch.testing.assert_close(found.logps, found.ref_logps, rtol=1e-6, atol=0)


WAYS = {"store": ("store", True), "again": ("min-memory", True), "frozen": (None, False)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["triton", "cublas"])
def test_two_forwards_before_one_backward_and_retain_graph(engine, way):
    """Chosen and rejected in separate calls, each held until the loss of both is known."""
    from dpo_fast.backends.triton_backend import TritonBackend

    mode, trained = WAYS[way]
    case = make_case(18, 16, 37, requires_grad=("hidden", "weight") if trained else ("hidden",))
    leaves = list(case.leaves().values())
    backend = TritonBackend(engine)

    def logps(rows):
        head = LinearHead(case.weight, None, None, 1.0, None)
        return score(
            Scoring(backend, (), mode, None), case.hidden[rows], head, case.target[rows]
        ).logps

    def grads(loss, keep=True):
        return torch.autograd.grad(loss, leaves, retain_graph=keep)

    chosen, rejected = logps(slice(0, 9)), logps(slice(9, 18))
    pair = lambda c, r: -torch.nn.functional.logsigmoid(0.1 * (c.sum() - r.sum()))
    both = grads(pair(chosen, rejected))
    again = grads(pair(chosen, rejected))
    alone = grads(chosen.sum()), grads(rejected.sum())
    apart = grads(chosen.sum() + 3 * rejected.sum(), keep=False)
    z = naive_linear_logprobs(case.hidden, case.weight, case.target)
    expected = grads(pair(z[:9], z[9:]), keep=False)
    for a, b, c in zip(both, again, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)
    for a, b, c in zip(apart, *alone, strict=True):
        torch.testing.assert_close(a, b + 3 * c, rtol=1e-5, atol=1e-6)


def test_stored_backward_reads_no_weight():
    case = make_case(9, 16, 37)
    logps = linear_logprobs(case.hidden, case.weight, case.target, backend="triton", mode="store")
    expected = torch.autograd.grad(logps.sum(), [case.hidden, case.weight], retain_graph=True)
    with torch.no_grad():
        case.weight.fill_(torch.nan)  # as an engine that frees gathered weights does
    found = torch.autograd.grad(logps.sum(), [case.hidden, case.weight])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_choice_and_refusal():
    assert choose("triton", "cpu", torch.float32).name == "triton"
    assert choose("auto", "cpu", torch.float32).name != "triton"
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match="cannot run"):
            choose("triton", "cpu", dtype)
