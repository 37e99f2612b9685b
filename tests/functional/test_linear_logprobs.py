"""linear_logprobs against the naive twin: every feature, dtype, mode and backend."""

import itertools

import pytest
import torch

from dpo_fast.functional import linear_logprobs
from dpo_fast.naive import naive_linear_logprobs
from tests.functional.cases import make_case
from tests.tolerances import assert_three_way, relative_error

pytestmark = pytest.mark.usefixtures("each_cpu_backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.7, "temperature": 1.3},
    "lora": {"rank": 4},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3, "rank": 4},
}
MODES = {
    "kept": {},
    "recomputed": {"mode": "min-memory"},
    "too large for the workspace": {"workspace": 0},
}


def run(function, case, upstream, **options):
    logps = function(case.hidden, case.weight, case.target, **case.kwargs, **options)
    return logps, gradients_of(logps, case, upstream)


def gradients_of(logps, case, upstream):
    leaves = case.leaves()
    grads = torch.autograd.grad(logps, list(leaves.values()), upstream.to(logps.dtype))
    return dict(zip(leaves, grads, strict=True))


def compare(case, dtype, **options):
    upstream = torch.randn(case.target.shape, generator=torch.Generator().manual_seed(3))
    ours = run(linear_logprobs, case, upstream, **options)
    eager = run(naive_linear_logprobs, case.to(dtype), upstream)
    gold = run(naive_linear_logprobs, case.to(torch.float64), upstream)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    assert_three_way(ours[0], eager[0], gold[0], dtype, "logps")
    for name, grad in ours[1].items():
        assert grad.dtype == dtype, name
        assert_three_way(grad, eager[1][name], gold[1][name], dtype, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_way(dtype, head, mode):
    compare(make_case(dtype=dtype, **HEADS[head]), dtype, **MODES[mode])


@pytest.mark.parametrize("head", HEADS)
def test_naive_backend_is_the_naive_twin(head):
    compare(make_case(**HEADS[head]), torch.float32, backend="naive")


@pytest.mark.parametrize(
    ("rows", "width", "vocab"),
    [(1, 1, 1), (1, 7, 2), (2, 3, 17), (13, 31, 127), (5, 8, 50257), (300, 5, 16), (3, 64, 4099)],
)
def test_odd_shapes(rows, width, vocab):
    compare(make_case(rows, width, vocab), torch.float32)


def test_many_chunks_of_rows(monkeypatch):
    from dpo_fast.chunked import chunks

    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunks, "MIN_ROWS", 4)
    for options in MODES.values():
        compare(make_case(**HEADS["all"]), torch.float32, **options)


def test_widened_tiles_of_a_narrow_weight(monkeypatch):
    from dpo_fast.chunked import gemm

    monkeypatch.setattr(gemm, "TILE_BYTES", 1)
    case = make_case(7, 16, 1000, dtype=torch.bfloat16, rank=3)  # tiles of 256 rows, a ragged last
    compare(case, torch.bfloat16)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_no_tokens(backend):
    case = make_case(0, bias=True, rank=2)
    logps = linear_logprobs(case.hidden, case.weight, case.target, **case.kwargs, backend=backend)
    assert logps.shape == (0,) and logps.dtype == torch.float32
    for name, grad in gradients_of(logps, case, torch.empty(0)).items():
        assert (grad == 0).all(), name
        assert grad.shape == case.leaves()[name].shape


def test_ignored_rows_are_zero_and_get_no_gradient():
    case = make_case()
    with torch.no_grad():
        case.hidden[4] = float("nan")  # a row that is ignored may hold anything
    case.target[[4, 9]] = -7
    logps = linear_logprobs(case.hidden, case.weight, case.target, ignore_index=-7)
    assert logps[4] == 0 and logps[9] == 0
    dhidden, dweight = torch.autograd.grad(logps.sum(), [case.hidden, case.weight])
    assert (dhidden[[4, 9]] == 0).all() and dhidden[[3, 5]].any()
    keep = torch.tensor([i for i in range(23) if i not in (4, 9)])
    part = linear_logprobs(case.hidden[keep], case.weight, case.target[keep])
    assert torch.equal(part, logps[keep])
    (expected,) = torch.autograd.grad(part.sum(), case.weight)
    assert torch.equal(dweight, expected)


def test_all_rows_ignored():
    case = make_case(5)
    logps = linear_logprobs(case.hidden, case.weight, torch.full((5,), -100))
    assert (logps == 0).all()
    for grad in gradients_of(logps, case, torch.ones(5)).values():
        assert (grad == 0).all()


def test_strided_inputs():
    case = make_case(12, 24, 101, bias=True)
    hidden = torch.empty(24, 30).t()[2:26, ::2].t().detach()  # no unit stride anywhere
    hidden.copy_(case.hidden.detach())
    weight = torch.empty(24, 101).t().copy_(case.weight.detach())
    bias = torch.empty(202)[::2].copy_(case.kwargs["bias"].detach())
    target = case.target.repeat_interleave(2)[::2]
    assert not hidden.is_contiguous() and not weight.is_contiguous()
    assert not bias.is_contiguous() and not target.is_contiguous()
    strided = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    logps = linear_logprobs(hidden, weight, target, bias=bias)
    plain = linear_logprobs(case.hidden, case.weight, case.target, **case.kwargs)
    torch.testing.assert_close(logps, plain)
    grads = torch.autograd.grad(logps.sum(), strided)
    for ours, expected in zip(
        grads, gradients_of(plain, case, torch.ones(12)).values(), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "wanted",
    [
        c
        for n in (1, 2, 3)
        for c in itertools.combinations(("hidden", "weight", "bias", "lora_a", "lora_b"), n)
    ],
    ids="-".join,
)
def test_every_subset_of_gradients(wanted):
    compare(make_case(bias=True, rank=3, requires_grad=wanted), torch.float32)
    compare(make_case(bias=True, rank=3, requires_grad=wanted), torch.float32, mode="min-memory")


def test_fp32_gradients_to_one_millionth_of_naive():
    case = make_case(64, 48, 1999, bias=True)
    upstream = torch.randn(64)
    ours = run(linear_logprobs, case, upstream)
    theirs = run(naive_linear_logprobs, case, upstream)
    assert relative_error(ours[0], theirs[0]) < 1e-6
    for name, grad in ours[1].items():
        assert relative_error(grad, theirs[1][name]) < 1e-6, name
