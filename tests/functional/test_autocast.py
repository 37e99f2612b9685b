"""Under autocast: the values of cast inputs, gradients of full precision to the originals."""

import pytest
import torch

from dpo_fast.functional import fused_linear_dpo, linear_logprobs
from tests.functional.cases import SigmoidLoss, borders, gradients, make_case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_are_those_of_cast_inputs(dtype):
    case = make_case(bias=True, rank=2)
    with torch.autocast("cpu", dtype):
        ours = linear_logprobs(case.hidden, case.weight, case.target, **case.kwargs)
    narrow = case.to(dtype)
    expected = linear_logprobs(narrow.hidden, narrow.weight, narrow.target, **narrow.kwargs)
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    upstream = torch.randn(23)
    grads, wanted = gradients(ours, case, upstream), gradients(expected, narrow, upstream)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, wanted[name].float()), name


def test_mixed_dtypes_are_fine_under_autocast_only():
    case = make_case()
    hidden = case.hidden.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_logprobs(hidden, case.weight, case.target)
    expected = linear_logprobs(hidden, case.weight.bfloat16(), case.target)
    assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match="autocast"):
        linear_logprobs(hidden, case.weight, case.target)


def test_float64_is_left_alone_as_torch_does():
    case = make_case(dtype=torch.float64)
    plain = linear_logprobs(case.hidden, case.weight, case.target)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_logprobs(case.hidden, case.weight, case.target)
    assert ours.dtype == torch.float64 and torch.equal(ours, plain)


def test_fused_op_and_its_reference():
    case, other = make_case(37), make_case(37, seed=4, requires_grad=())
    call = lambda c, o: fused_linear_dpo(
        c.hidden,
        c.weight,
        c.target,
        borders(),
        ref_hidden=o.hidden,
        ref_weight=o.weight,
        loss=SigmoidLoss(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = call(case, other)
    expected = call(case.to(torch.bfloat16), other.to(torch.bfloat16))
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(ours.ref_logps, expected.ref_logps)
    grads = gradients(ours.loss, case)
    assert all(g.dtype == torch.float32 for g in grads.values())
