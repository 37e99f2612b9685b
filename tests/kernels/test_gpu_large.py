"""Sizes beyond 2^31 elements, memory, bits, graphs and tracing on a GPU."""

import pytest
import torch

from dpo_fast.functional import fused_linear_dpo, linear_logprobs
from tests.functional.cases import SigmoidLoss
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
    assert relative_error(dhidden[rows], expected[0]) < 1e-5
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


@pytest.mark.parametrize("width", [1024, 1023], ids=["tma", "pointers"])
def test_target_logit_has_the_bits_of_the_gemm(width):
    """k = zy and a scale of 2^20 make E of the target's own column exactly 1 if the bits agree."""
    from dpo_fast_kernels.exp_gemm import exp_gemm
    from dpo_fast_kernels.operands import make_operands, plan_launch
    from dpo_fast_kernels.problem import new_e
    from dpo_fast_kernels.target_logit import target_logits

    leaves, target, _ = make(1000, width, 9001, rank=8, bias=True)
    tensors = {k: v.detach() for k, v in leaves.items()}
    for lora in (None, (tensors["a"], tensors["b"], 0.5)):
        for stats in (False, True):
            operands, _ = make_operands(
                tensors["hidden"], tensors["weight"], None if lora is None else tensors["bias"],
                lora, None, 2.0**20,
            )  # fmt: skip
            launch = plan_launch(operands, stats)
            options = dict(ignore_index=-100, vocab_start=0, vocab_total=9001)
            rows = target_logits(operands, launch, target, **options)
            e = new_e(1000, 9001, torch.bfloat16, target, None)
            elsewhere = torch.full_like(rows.col, -1)
            open_rows = rows._replace(k=rows.zy, col=elsewhere)
            exp_gemm(operands, launch, open_rows, e=e, stats=stats)
            own = e.gather(1, target[:, None])[:, 0]
            assert (own == 1.0).all(), f"{int((own != 1).sum())} of 1000 rows differ"


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_log_ratio_of_equal_models_is_zero_in_bits(softcap):
    leaves, target, _ = make(1000, 512, 32001)
    hidden, weight = leaves["hidden"], leaves["weight"]
    options = dict(backend="triton", softcap=softcap)
    with torch.no_grad():
        alone = linear_logprobs(hidden, weight, target, **options)
        stats = linear_logprobs(hidden, weight, target, outputs=("entropy",), **options).logps
    stored = linear_logprobs(hidden, weight, target, mode="store", **options)
    assert torch.equal(alone, stored) and torch.equal(alone, stats)
    part = linear_logprobs(hidden[300:500], weight, target[300:500], **options)
    assert torch.equal(part, alone[300:500])  # a row's bits do not depend on its batch


@pytest.mark.parametrize("mode", ["store", "min-memory"])
def test_two_runs_agree_bit_for_bit(mode):
    leaves, target, _ = make(2000, 1024, 50257)
    leaves = [leaves["hidden"], leaves["weight"]]
    upstream = torch.randn(2000, device="cuda")

    def run():
        logps = linear_logprobs(*leaves, target, backend="triton", mode=mode)
        return logps.detach(), *torch.autograd.grad(logps, leaves, upstream)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


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


def test_fused_dpo_in_groups():
    leaves, target, _ = make(4000, 512, 32001)
    borders = torch.tensor([0, 700, 1000, 2000, 2100, 3000, 4000], device="cuda")
    lens = borders.diff().tolist()
    args = (leaves["hidden"], leaves["weight"], target, borders)
    reference = (leaves["hidden"].detach() + 0.1).bfloat16()
    both = [leaves["hidden"], leaves["weight"]]

    def run(backend, workspace=None):
        out = fused_linear_dpo(
            *args, ref_hidden=reference, loss=SigmoidLoss(), seq_lens=lens, backend=backend,
            workspace=workspace,
        )  # fmt: skip
        return out, torch.autograd.grad(out.loss * 3, both)

    exact, expected = run("naive")
    for workspace in (None, 2 * 32064 * 1500):
        found, grads = run("triton", workspace)
        torch.testing.assert_close(found.logps, exact.logps, rtol=1e-3, atol=2.0)  # naive: bf16
        for a, b in zip(grads, expected, strict=True):
            assert relative_error(a, b) < 3e-2  # the naive twin's own bfloat16 logits
    same = fused_linear_dpo(
        *args, ref_hidden=leaves["hidden"].detach(), loss=SigmoidLoss(), seq_lens=lens,
        backend="triton",
    )  # fmt: skip
    assert torch.equal(same.logps, same.ref_logps)
    torch.testing.assert_close(same.losses, torch.full_like(same.losses, 0.6931471805599453))
