"""Sizes beyond 2^31 elements, and memory, on a GPU."""

import pytest
import torch

from dpo_fast.functional import linear_logprobs
from tests.kernels.test_gpu_head import make
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu

GIB = 2**30


def needs(gib):
    if torch.cuda.mem_get_info()[0] < gib * GIB:
        pytest.skip(f"gpu: needs {gib} GiB of free device memory")


def exact_logps(hidden, weight, target, chunk=8192):
    """Log-probs in float64, a slab of the vocabulary at a time."""
    top = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float64, device="cuda")
    total, own = torch.zeros_like(top), torch.zeros_like(top)
    for start in range(0, weight.shape[0], chunk):
        z = hidden.double() @ weight[start : start + chunk].double().T
        new = torch.maximum(top, z.amax(1))
        total = total * (top - new).exp() + (z - new[:, None]).exp().sum(1)
        top = new
        here = (target >= start) & (target < start + z.shape[1])
        column = (target - start).clamp(0, z.shape[1] - 1)
        own = torch.where(here, z.gather(1, column[:, None])[:, 0], own)
    return own - top - total.log()


def test_more_than_two_billion_probabilities():
    needs(20)
    leaves, target, _ = make(16500, 64, 131072)  # N V = 2.16e9
    hidden, weight = leaves["hidden"], leaves["weight"]
    logps = linear_logprobs(hidden, weight, target, backend="triton", mode="store")
    rows = torch.cat((torch.arange(64), torch.arange(16500 - 64, 16500))).cuda()
    right = exact_logps(hidden[rows], weight, target[rows])
    torch.testing.assert_close(logps[rows].double(), right, rtol=1e-5, atol=1e-4)
    upstream = torch.zeros(16500, device="cuda")
    upstream[rows] = torch.randn(128, device="cuda")
    dhidden, dweight = torch.autograd.grad(logps, [hidden, weight], upstream)
    part = [hidden[rows].detach().requires_grad_(), weight.detach().requires_grad_()]
    small = linear_logprobs(*part, target[rows], backend="triton", mode="store")
    expected = torch.autograd.grad(small, part, upstream[rows])
    # cuBLAS sums another batch in another order: single bfloat16 roundings may differ
    assert relative_error(dhidden[rows], expected[0]) < 1e-3
    assert relative_error(dweight, expected[1]) < 3e-3
    assert (dhidden[1000] == 0).all()


def test_weight_of_more_than_two_billion_elements():
    needs(40)
    width, vocab = 8200, 262144  # V H = 2.15e9
    weight = torch.empty(vocab, width, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    hidden = torch.randn(130, width, device="cuda").bfloat16()
    target = torch.randint(vocab, (130,), device="cuda")
    target[:4] = torch.tensor([0, vocab - 1, vocab - 2, 261_999])
    leaf = hidden.requires_grad_()
    logps = linear_logprobs(leaf, weight, target, backend="triton")
    right = exact_logps(hidden.detach(), weight, target)
    torch.testing.assert_close(logps.double(), right, rtol=1e-5, atol=2e-4)
    (dhidden,) = torch.autograd.grad(logps.sum(), leaf)
    assert torch.isfinite(dhidden).all() and (dhidden.float().norm(dim=1) > 0).all()


def test_memory_of_the_recomputing_mode():
    """V = 256k, N = 32k: at most 64 MiB beyond inputs, outputs and [N, H] buffers."""
    needs(12)
    rows, width, vocab = 32768, 512, 256000
    leaves, target, _ = make(rows, width, vocab)
    leaves = [leaves["hidden"], leaves["weight"]]
    upstream = torch.randn(rows, device="cuda")

    def step():
        logps = linear_logprobs(*leaves, target, backend="triton", mode="min-memory")
        return torch.autograd.grad(logps, leaves, upstream)

    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = step()
    extra = torch.cuda.max_memory_allocated() - before
    outputs = sum(g.numel() * g.element_size() for g in grads)
    buffers = rows * width * (4 + 2 + 4 + 2)  # G, xs, and the two steps of its rounding
    assert extra - outputs - buffers <= 64 * 2**20, (extra, outputs, buffers)
