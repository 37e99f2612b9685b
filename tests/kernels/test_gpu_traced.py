"""No host sync, CUDA graphs and tracing on a GPU."""

import pytest
import torch

from dpo_fast.functional import linear_logprobs
from tests.kernels.test_gpu_head import make

pytestmark = pytest.mark.gpu


def test_no_host_sync():
    leaves, target, _ = make(300, 512, 32001)
    leaves = [leaves["hidden"], leaves["weight"]]

    def step():
        logps = linear_logprobs(*leaves, target, backend="triton")
        torch.autograd.grad(logps, leaves, torch.ones_like(logps))

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    leaves, target, _ = make(300, 512, 8001)
    leaves = [leaves["hidden"], leaves["weight"]]
    upstream = torch.randn(300, device="cuda")

    def step():
        logps = linear_logprobs(*leaves, target, backend="triton", mode="store")
        return logps.detach(), *torch.autograd.grad(logps, leaves, upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].copy_(torch.randn(300, 512, device="cuda"))
        target.copy_(torch.randint(8001, (300,), device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


def test_compiled_whole():
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU()).cuda().bfloat16()
    head = torch.nn.Linear(512, 8001, bias=False).cuda().bfloat16()
    x = torch.randn(200, 256, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(8001, (200,), device="cuda")

    def loss(x, target):
        logps = linear_logprobs(body(x), head.weight, target, backend="triton")
        return -torch.nn.functional.logsigmoid(logps[:100].sum() - logps[100:].sum())

    parameters = [*body.parameters(), head.weight]
    plain = torch.autograd.grad(loss(x, target), parameters)
    compiled = torch.compile(loss, fullgraph=True)
    found = torch.autograd.grad(compiled(x, target), parameters)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
