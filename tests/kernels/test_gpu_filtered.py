"""The filtered mode on a GPU: bfloat16 at real sizes, against the exact mode and float64."""

import pytest
import torch

from dpo_fast.functional import filter_report, linear_logprobs
from tests.kernels.filtered_oracle import oracle
from tests.kernels.test_gpu_head import make
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu


def peaked(rows=300, width=512, vocab=32001, **features):
    """Most of each row's probability lies in the first eighth of the vocabulary."""
    leaves, target, kwargs = make(rows, width, vocab, **features)
    with torch.no_grad():
        leaves["hidden"][:, 0] = 3.0
        leaves["weight"][:, 0] = -2.5
        leaves["weight"][: vocab // 8, 0] = 1.0
        target %= vocab // 8
        target[::50] = vocab - 5
    return leaves, target, kwargs


def grads_of(leaves, target, kwargs, upstream, **options):
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    logps = linear_logprobs(
        leaves["hidden"], leaves["weight"], target, bias=leaves.get("bias"), backend="triton",
        **kwargs, **options,
    )  # fmt: skip
    return logps.detach(), torch.autograd.grad(logps, wanted, upstream)


@pytest.mark.parametrize("width", [512, 509])  # 509: without TMA
@pytest.mark.parametrize(
    "features", [{}, {"bias": True}, {"softcap": 20.0}], ids=["plain", "bias", "softcap"]
)
def test_equals_the_oracle(features, width):
    leaves, target, kwargs = peaked(width=width, **features)
    upstream = torch.randn(target.shape, device="cuda")
    filter_report()
    logps, found = grads_of(leaves, target, kwargs, upstream, filter_bound=1e-5)
    report = filter_report()
    exact_logps, exact = grads_of(leaves, target, kwargs, upstream)
    assert torch.equal(logps, exact_logps)
    assert 0.05 < report.kept_share < 0.5
    wide = {k: v.detach().double() for k, v in leaves.items()}
    with torch.device("cuda"):
        right = oracle(
            wide["hidden"], wide["weight"], target, upstream.double(), bound=1e-5, rows=128,
            unit=128, bias=wide.get("bias"), **kwargs,
        )  # fmt: skip
    assert report.kept_share == pytest.approx(float(right.mask.double().mean()), abs=0.02)
    for ours, dense, oracles in zip(found[:2], exact[:2], right[2:], strict=True):
        assert relative_error(ours, oracles) < 4e-3
        assert relative_error(dense, oracles) < 2e-2  # what is left out is small
    if "bias" in features:
        assert torch.equal(found[2], exact[2])


@pytest.mark.parametrize("frozen", [False, True])
def test_bound_zero_keeps_everything(frozen):
    leaves, target, kwargs = peaked()
    leaves["weight"].requires_grad_(not frozen)
    upstream = torch.randn(target.shape, device="cuda")
    _, exact = grads_of(leaves, target, kwargs, upstream)
    _, found = grads_of(leaves, target, kwargs, upstream, filter_bound=0.0)
    assert filter_report().kept_share == 1.0
    for a, b in zip(found, exact, strict=True):
        assert relative_error(a, b) < 1e-3


def test_two_runs_are_equal_and_a_sum_is_added_to():
    leaves, target, kwargs = peaked()
    upstream = torch.randn(target.shape, device="cuda")
    first = grads_of(leaves, target, kwargs, upstream, filter_bound=1e-5)[1]
    second = grads_of(leaves, target, kwargs, upstream, filter_bound=1e-5)[1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    total = torch.ones_like(leaves["weight"], dtype=torch.float32)
    logps = linear_logprobs(
        leaves["hidden"], leaves["weight"], target, backend="triton", filter_bound=1e-5,
        main_grad=total, **kwargs,
    )  # fmt: skip
    logps.backward(upstream)
    assert relative_error(total - 1, first[1].float()) < 4e-3


def test_no_host_sync():
    leaves, target, kwargs = peaked()
    upstream = torch.randn(target.shape, device="cuda")
    grads_of(leaves, target, kwargs, upstream, filter_bound=1e-5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads_of(leaves, target, kwargs, upstream, filter_bound=1e-5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_refused(dtype):
    leaves, target, _ = make(140, 256, 8001, dtype)
    with pytest.raises(ValueError, match=r"use torch\.bfloat16"):
        linear_logprobs(
            leaves["hidden"], leaves["weight"], target, backend="triton", filter_bound=1e-5
        )
