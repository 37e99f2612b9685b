"""What everything else on a GPU stands on, each alone: run first, so that a failure is named.

The products' overloads with a float32 result, the smallest kernels, the segment sum, the engine's
choice, another device than the current one.
"""

import logging
from itertools import pairwise

import pytest
import torch

from dpo_fast.functional import linear_logprobs
from dpo_fast.functional.segments import segment_sum
from tests.kernels.test_gpu_head import call, check, make
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_leave_in_float32(dtype):
    from dpo_fast_kernels.products import add_product, product, rounded_product

    a, b = normal(70, 96, dtype=dtype)[:, :90], normal(90, 40, dtype=dtype)  # padded rows
    right = a.double() @ b.double()
    assert relative_error(product(a, b), right) < 1e-6
    left = normal(70, 8, dtype=dtype)
    assert relative_error(product(a.T, left), a.double().T @ left.double()) < 1e-6
    acc = torch.randn(70, 40, device="cuda")
    expected = acc.double() + right
    add_product(acc, a, b)
    assert relative_error(acc, expected) < 1e-6
    whole = torch.randn(100, 40, device="cuda")
    expected = whole.clone().double()
    expected[9:79] += right
    add_product(whole[9:79], a, b)  # a slice of rows, in place
    assert relative_error(whole, expected) < 1e-6
    assert rounded_product(a, b, dtype).dtype == dtype
    assert relative_error(rounded_product(a, b, dtype), right) < 4e-3
    empty = product(a[:0], b)
    assert empty.shape == (0, 40) and (product(a[:0].T, normal(0, 5, dtype=dtype)) == 0).all()


def test_segment_sum_is_the_kernel_s():
    values = torch.randn(5000, device="cuda").requires_grad_()
    cu = torch.tensor([0, 0, 3, 1700, 1700, 5000], device="cuda")
    found = segment_sum(values, cu)
    assert "segment_sum" in type(found.grad_fn).__name__.lower()
    right = torch.stack([values[a:b].double().sum() for a, b in pairwise(cu.tolist())])
    torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(5, device="cuda")
    (grad,) = torch.autograd.grad(found, values, upstream)
    assert torch.equal(grad, upstream.repeat_interleave(cu.diff()))
    assert segment_sum(values[:0], cu[:2]).tolist() == [0.0]


def test_smallest_head():
    check(make(3, 64, 300), torch.bfloat16, limit=8e-3)


@pytest.mark.parametrize("features", [{}, {"bias": True, "rank": 8}], ids=["plain", "tail"])
def test_no_rows(features):
    leaves, target, kwargs = make(0, 64, 300, **features)
    logps = call(linear_logprobs, leaves, target, kwargs, backend="triton")
    grads = torch.autograd.grad(logps.sum(), list(leaves.values()))
    assert logps.shape == (0,) and all((grad == 0).all() for grad in grads)


def test_choice_is_logged_with_its_reason(caplog):
    from dpo_fast_kernels.choice import forget

    forget()
    leaves, target, kwargs = make(5, 64, 300)
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        call(linear_logprobs, leaves, target, kwargs)
    (line,) = [r.getMessage() for r in caplog.records if "LM head kernels" in r.getMessage()]
    assert "bfloat16, H=64, V=300" in line and "H >= 0" in line


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="gpu: needs two devices")
def test_tensors_on_another_device_than_the_current_one():
    leaves, target, _ = make(65, 128, 999)
    here = linear_logprobs(leaves["hidden"], leaves["weight"], target, backend="triton")
    there = [leaves[k].detach().to("cuda:1").requires_grad_() for k in ("hidden", "weight")]
    logps = linear_logprobs(*there, target.to("cuda:1"), backend="triton")
    assert torch.equal(logps.cpu(), here.cpu())
    torch.autograd.grad(logps.sum(), there)
