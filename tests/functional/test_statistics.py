"""Token statistics that come with the log-probs."""

import itertools

import pytest
import torch

from dpo_fast.functional import linear_logprobs
from dpo_fast.naive import OUTPUTS, naive_linear_logprobs
from tests.functional.cases import make_case
from tests.tolerances import assert_three_way

pytestmark = pytest.mark.usefixtures("each_cpu_backend")

HEADS = {
    "plain": {},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3, "rank": 4},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_three_way(dtype, head):
    case = make_case(40, dtype=dtype, **HEADS[head])
    case.target[5] = -100
    call = lambda f, c: f(c.hidden, c.weight, c.target, **c.kwargs, outputs=OUTPUTS)
    ours = call(linear_logprobs, case)
    eager, gold = (
        call(naive_linear_logprobs, case),
        call(naive_linear_logprobs, case.to(torch.float64)),
    )
    for name in ("logps", "entropy", "mean_logit", "log_sum_sq_probs"):
        a, b, c = (getattr(r, name).detach() for r in (ours, eager, gold))
        assert_three_way(a, b, c, dtype, name)
        assert a[5] == 0
    assert torch.equal(ours.is_top1, gold.is_top1)
    assert ours.is_top1.any() and not ours.is_top1.all() and not ours.is_top1[5]


@pytest.mark.parametrize("count", range(1, 5))
def test_any_subset_in_any_order(count):
    case = make_case(9)
    everything = linear_logprobs(case.hidden, case.weight, case.target, outputs=OUTPUTS)
    for names in itertools.permutations(OUTPUTS, count):
        out = linear_logprobs(case.hidden, case.weight, case.target, outputs=names)
        for name in OUTPUTS:
            value = getattr(out, name)
            assert (value is None) == (name not in names)
            if value is not None:
                assert torch.equal(value, getattr(everything, name))


def test_statistics_leave_logps_and_gradients_alone():
    case = make_case(bias=True, softcap=4.0)
    plain = linear_logprobs(case.hidden, case.weight, case.target, **case.kwargs)
    out = linear_logprobs(case.hidden, case.weight, case.target, **case.kwargs, outputs=OUTPUTS)
    assert torch.equal(plain, out.logps)
    leaves = list(case.leaves().values())
    for a, b in zip(
        torch.autograd.grad(plain.sum(), leaves),
        torch.autograd.grad(out.logps.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_statistics_carry_no_gradient():
    case = make_case(9)
    out = linear_logprobs(case.hidden, case.weight, case.target, outputs=OUTPUTS)
    assert out.logps.requires_grad
    assert not any(getattr(out, name).requires_grad for name in OUTPUTS)


def test_ties_go_to_the_lowest_index():
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    out = linear_logprobs(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]), outputs=("is_top1",))
    assert out.is_top1.tolist() == [False, True, False]


def test_near_certain_tokens_have_small_positive_entropy():
    weight = torch.eye(4) * 40
    out = linear_logprobs(torch.eye(4), weight, torch.arange(4), outputs=("entropy",))
    p = torch.tensor(-40.0, dtype=torch.float64).exp()
    expected = 3 * p * (1 + 40.0)  # -3p log p - log(1 - 3p), to first order
    torch.testing.assert_close(out.entropy.double(), expected.expand(4), rtol=1e-4, atol=0)


def test_no_tokens():
    case = make_case(0)
    out = linear_logprobs(case.hidden, case.weight, case.target, outputs=OUTPUTS)
    assert all(getattr(out, name).shape == (0,) for name in ("logps", *OUTPUTS))
    assert out.is_top1.dtype == torch.bool
