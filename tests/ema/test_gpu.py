"""On a GPU: the CPU's bits, the caller's stream, one launch, pinned shadows, graphs, size."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_fast.backends.ema.compiled import compiled_refusal
from dpo_fast.functional.ema import EmaPlan, make_shadow
from tests.ema.common import DTYPES, HALF, ROUNDINGS, assert_same_bits, shadow_of, weights

pytestmark = pytest.mark.gpu

BACKENDS = ("compiled", "triton", "torch")
SIZES = (1, 9, 4500, 100_003)
OFFSETS = (3, 8, 2**40 - 4504, 16)


def device_for(backend: str) -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device())
    refusal = compiled_refusal(device) if backend == "compiled" else None
    if refusal is not None:
        pytest.skip(f"compiled: {refusal}")
    return device


def moved(values: list[Tensor], device: torch.device, skip: int) -> list[Tensor]:
    """Copies on the device that begin ``skip`` elements into their storage."""
    return [torch.cat((v[:1].expand(skip), v)).to(device)[skip:] for v in values]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_gives_the_cpu_s_bits(backend: str, dtype: torch.dtype) -> None:
    device = device_for(backend)
    for policy_dtype, shadowed, rounding, skip in product(DTYPES, (False, True), ROUNDINGS, (0, 1)):
        start = [weights(n, dtype, spread=6) for n in SIZES]
        policies = [weights(n, policy_dtype, spread=6) for n in SIZES]
        policies[2][:3] = torch.tensor([torch.nan, torch.inf, -0.0])
        start[2][2:5] = torch.tensor([-0.0, torch.inf, torch.nan])
        for alpha in (0.01, 0.6, 1.0):
            how: dict[str, Any] = {"rounding": rounding, "seed": 2**63 + 5, "step": 2**35 + 1}
            expected = [ref.clone() for ref in start]
            masters = shadow_of(expected) if shadowed else None
            found = moved(start, device, skip)
            copies = None
            if masters is not None:
                copies = [None if m is None else m.to(device) for m in masters]
            EmaPlan(expected, policies, shadow=masters, offsets=OFFSETS).update_(alpha, **how)
            targets = moved(policies, device, skip)
            plan = EmaPlan(found, targets, shadow=copies, offsets=OFFSETS, backend=backend)
            plan.update_(alpha, **how)
            about = (policy_dtype, shadowed, skip, alpha, how)
            assert_same_bits([f.cpu() for f in found], expected, about)
            for copy, master in zip(copies or [], masters or [], strict=True):
                if copy is not None and master is not None:
                    assert_same_bits([copy.cpu()], [master], about)


@pytest.mark.parametrize("backend", ("compiled", "triton"))
def test_the_caller_s_stream_and_one_launch(backend: str) -> None:
    device = device_for(backend)
    refs = [torch.zeros(50_000, dtype=torch.bfloat16, device=device) for _ in range(100)]
    policies = [torch.ones_like(ref) for ref in refs]
    plan = EmaPlan(refs, policies, backend=backend)
    plan.update_(0.5)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # an update on another stream would not wait for this
        for policy in policies:
            policy.fill_(3.0)
        plan.update_(1.0)
    stream.synchronize()
    assert all(bool((ref == 3.0).all()) for ref in refs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        refs[0].fill_(0.0)
        plan.update_(0.5)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        pytest.skip("gpu: the profiler sees no kernels on this machine")
    assert len(kernels) == 2, kernels  # the fill, and ours


@pytest.mark.parametrize("backend", ("compiled", "triton"))
def test_cuda_graph(backend: str) -> None:
    device = device_for(backend)
    ref = torch.zeros(10_000, device=device)
    policy = torch.ones(10_000, device=device)
    plan = EmaPlan([ref], [policy], backend=backend)
    plan.update_(0.5)
    ref.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update_(0.5)
    ref.zero_()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert bool((ref == 0.75).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_shadow_in_pinned_host_memory(backend: str, dtype: torch.dtype) -> None:
    device = device_for(backend)
    start, policy = weights(70_001, dtype), weights(70_001, dtype)
    expected = start.clone()
    EmaPlan([expected], [policy], shadow=(masters := make_shadow([expected]))).update_(0.01)
    ref = start.to(device)
    shadow = make_shadow([ref], pinned=True)
    assert shadow[0] is not None and shadow[0].is_pinned()
    plan = EmaPlan([ref], [policy.to(device)], shadow=shadow, backend=backend)
    plan.update_(0.01)
    torch.cuda.synchronize()
    assert masters[0] is not None
    assert_same_bits([ref.cpu(), shadow[0]], [expected, masters[0]])
    with pytest.raises(ValueError, match="pinned"):
        EmaPlan([ref], [policy.to(device)], shadow=[start.float()])


@pytest.mark.parametrize("backend", ("compiled", "triton"))
def test_more_elements_than_int32_counts(backend: str) -> None:
    device = device_for(backend)
    numel = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 4 * numel + 2**31:
        pytest.skip("not enough GPU memory for two tensors of 2**31 elements")
    ref = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    policy = torch.ones(numel, dtype=torch.bfloat16, device=device)
    EmaPlan([ref], [policy], backend=backend).update_(0.5)
    assert int((ref == 0.5).sum()) == numel


def test_automatic_choice_takes_a_gpu_backend() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ref = torch.zeros(10, device=device)
    plan = EmaPlan([ref], [torch.ones(10, device=device)])
    assert plan.describe().split("backend ")[1].split(",")[0] in ("compiled", "triton")
