"""Sums over sequences: borders, weights, gradients to both, and a sum that does not drift."""

import pytest
import torch

from dpo_fast.functional import linear_logprobs, sequence_logprobs
from dpo_fast.functional.segments import segment_sum
from dpo_fast.naive import naive_sequence_logprobs
from tests.functional.cases import borders, gradients, make_case
from tests.tolerances import assert_three_way

pytestmark = pytest.mark.usefixtures("each_cpu_backend")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_way(dtype, weighted):
    case = make_case(37, dtype=dtype, bias=True, softcap=4.0, rank=2)
    case.target[11] = -100
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(10, generator=g)
    weight = torch.rand(37, generator=g) if weighted else None

    def run(function, inputs):
        sums = function(
            inputs.hidden,
            inputs.weight,
            inputs.target,
            borders(),
            token_weight=weight,
            **inputs.kwargs,
        )
        return sums, gradients(sums, inputs, upstream.to(sums.dtype))

    ours = run(sequence_logprobs, case)
    eager = run(naive_sequence_logprobs, case.to(dtype))
    gold = run(naive_sequence_logprobs, case.to(torch.float64))
    assert_three_way(ours[0], eager[0], gold[0], dtype, "sums")
    assert ours[0][1] == 0 and ours[0][8] == 0  # the empty sequences
    for name, grad in ours[1].items():
        assert_three_way(grad, eager[1][name], gold[1][name], dtype, name)


def test_gradient_to_the_token_weight():
    case = make_case(37)
    weight = torch.rand(37, requires_grad=True)
    sums = sequence_logprobs(case.hidden, case.weight, case.target, borders(), token_weight=weight)
    (ours,) = torch.autograd.grad(sums.sum(), weight)
    logps = linear_logprobs(case.hidden, case.weight, case.target)
    torch.testing.assert_close(ours, logps.detach())


def test_long_sums_are_rounded_once():
    values = torch.full((100_000,), 0.1)
    total = segment_sum(values, torch.tensor([0, 100_000]))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(100_000 * values[0].double().item(), rel=6e-8)


def test_no_sequences_and_only_empty_ones():
    assert segment_sum(torch.empty(0), torch.tensor([0])).shape == (0,)
    assert segment_sum(torch.empty(0), torch.tensor([0, 0, 0])).tolist() == [0.0, 0.0]
    value = torch.empty(0, requires_grad=True)
    segment_sum(value, torch.tensor([0, 0])).sum().backward()
    assert value.grad.shape == (0,)


class _OnMetal(torch.Tensor):
    """Says that it is on a device that this machine does not have."""

    @property
    def device(self):
        return torch.device("mps")


def test_a_device_without_float64_is_refused_by_name():
    values = torch.zeros(3).as_subclass(_OnMetal)
    with pytest.raises(ValueError, match=r"'mps'.*no float64.*CPU"):
        segment_sum(values, torch.tensor([0, 2, 3]))
