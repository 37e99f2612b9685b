"""The prepared plan: reuse, storage that moves, autograd, layouts, what it says of itself."""

import logging

import pytest
import torch
from torch import nn

from dpo_fast.backends.ema import choose
from dpo_fast.functional.ema import EmaPlan, ema_, ema_offsets, make_shadow
from tests.ema.common import HALF, IMPLEMENTATIONS, assert_same_bits, make_plan, weights


def test_a_plan_follows_its_tensors() -> None:
    """Many updates of tensors that change in between equal single calls."""
    sizes = (1000, 3, 40_000)
    policies = [weights(n, torch.bfloat16) for n in sizes]
    refs = [weights(n, torch.bfloat16) for n in sizes]
    single = [ref.clone() for ref in refs]
    plan = EmaPlan(refs, policies)
    for step in range(4):
        for policy in policies:
            policy.add_(0.1)
        plan.update_(0.1, rounding="stochastic", seed=1, step=step)
        ema_(single, policies, 0.1, rounding="stochastic", seed=1, step=step)
    assert_same_bits(refs, single)


def test_storage_that_moved_is_noticed() -> None:
    layer = nn.Linear(30, 30)
    ref = layer.weight.detach().clone().zero_()
    plan = EmaPlan([ref], [layer.weight])
    plan.update_(1.0)
    layer.weight.data = torch.full((30, 30), 2.0)
    plan.update_(1.0)
    assert bool((ref == 2.0).all())
    layer.bfloat16()  # another dtype too
    plan.update_(0.5)
    assert bool((ref == 2.0).all())
    layer.weight.data = torch.full((30, 29), 2.0)
    with pytest.raises(ValueError, match="differ in shape"):
        plan.update_(0.5)


def test_a_resharded_tensor_of_another_size_is_noticed() -> None:
    ref, policy = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.ones(8))
    plan = EmaPlan([ref], [policy])
    ref.data, policy.data = torch.zeros(0), torch.zeros(0)  # a parameter that gave its storage back
    plan.update_(1.0)
    ref.data, policy.data = torch.zeros(16), torch.full((16,), 3.0)
    plan.update_(1.0)
    assert bool((ref == 3.0).all())


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autograd_sees_the_update(backend: str) -> None:
    """Parameters that require a gradient are updated; a graph that saved them says so."""
    for shadowed in (False, True):
        ref = nn.Parameter(torch.randn(100).to(torch.bfloat16))
        policy = nn.Parameter(torch.randn(100).to(torch.bfloat16))
        before = ref.detach().clone()
        product = (ref * ref).sum()
        version = ref._version
        ema_([ref], [policy], 0.5, backend=backend, shadow=make_shadow([ref]) if shadowed else None)
        assert ref._version > version
        assert ref.grad is None and ref.requires_grad and ref.is_leaf
        assert not torch.equal(ref.detach(), before)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_policies_of_inference_mode_are_fine() -> None:
    with torch.inference_mode():
        policy = torch.ones(50)
    for backend in ("auto", "torch"):
        ref = torch.zeros(50)
        ema_([ref], [policy], 0.25, backend=backend)
        assert bool((ref == 0.25).all())


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_layouts(dtype: torch.dtype, rounding: str) -> None:
    """Transposed, sliced, channels-last, on either side: the values of contiguous ones."""

    def layouts(value: torch.Tensor) -> list[torch.Tensor]:
        return [
            value.clone(),
            value.transpose(0, 1).contiguous().transpose(0, 1),
            torch.zeros(9, 10, 22, 5, dtype=dtype)[:, :, ::2, :4].copy_(value),
            value.to(memory_format=torch.channels_last),
        ]

    start, policy = (weights(9 * 10 * 11 * 4, dtype).view(9, 10, 11, 4) for _ in range(2))
    expected = start.clone()
    how = {"rounding": rounding, "seed": 4}
    ema_([expected], [policy], 0.3, offsets=[16], **how)  # type: ignore[arg-type]
    for ref in layouts(start):
        for target in layouts(policy):
            own = ref.clone(memory_format=torch.preserve_format)
            ema_([own], [target], 0.3, offsets=[16], **how)  # type: ignore[arg-type]
            assert torch.equal(own, expected)


def test_a_slice_between_others_is_left_in_place() -> None:
    buffer = torch.zeros(6, 8)
    ema_([buffer[:, 2:5]], [torch.ones(6, 3)], 0.5)
    assert float(buffer.sum()) == 9.0 and bool((buffer[:, 2:5] == 0.5).all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_do(implementation: str) -> None:
    make_plan(implementation, [], []).update_(0.5)
    ref, policy = [torch.zeros(0), torch.zeros(3, 0), torch.tensor(1.0)], torch.tensor(3.0)
    plan = make_plan(implementation, ref, [torch.zeros(0), torch.zeros(3, 0), policy])
    plan.update_(0.5)
    assert ref[2].item() == 2.0


def test_generators_and_mappings() -> None:
    policy, reference = nn.Linear(4, 3), nn.Linear(4, 3)
    ema_(reference.parameters(), policy.parameters(), 1.0)
    assert torch.equal(reference.weight, policy.weight)
    with torch.no_grad():
        policy.weight.add_(1.0)
    ema_(dict(reference.named_parameters()), dict(policy.named_parameters()), 1.0)
    assert torch.equal(reference.weight, policy.weight)
    with pytest.raises(ValueError, match=r"refs\['bias'\] .*differ in shape"):
        other = nn.Linear(4, 3)
        other.bias.data = torch.zeros(5)
        ema_(dict(other.named_parameters()), dict(policy.named_parameters()), 1.0)


def test_offsets_leave_no_two_tensors_one_counter() -> None:
    assert ema_offsets([5, 32, 0, 33, 1]) == [0, 32, 64, 64, 128]


def test_make_shadow() -> None:
    refs = [
        torch.randn(3),
        torch.randn(3).double(),
        torch.randn(3).half(),
        torch.randn(3).bfloat16(),
    ]
    shadow = make_shadow(nn.Parameter(ref) for ref in refs)
    assert [s is None for s in shadow] == [True, True, False, False]
    for master, ref in zip(shadow[2:], refs[2:], strict=True):
        assert master is not None and master.dtype == torch.float32 and not master.requires_grad
        assert torch.equal(master, ref.float())
    with pytest.raises(TypeError, match=r"refs\[0\] has dtype torch.int64"):
        make_shadow([torch.arange(3)])


def test_traffic_and_description() -> None:
    numel = 1000
    half = [torch.zeros(numel, dtype=torch.bfloat16)]
    policy = [torch.zeros(numel, dtype=torch.bfloat16)]
    assert EmaPlan(half, policy).traffic == 6 * numel
    assert EmaPlan(half, policy, shadow=make_shadow(half)).traffic == 12 * numel
    assert EmaPlan([torch.zeros(numel)], policy).traffic == 10 * numel
    text = EmaPlan(half, policy, shadow=make_shadow(half), backend="torch").describe()
    assert text.startswith("EMA of 1 tensors, 1000 elements on cpu with fp32 shadow: backend torch")


def test_automatic_choice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        choose("auto", torch.device("cpu"))
        choose("auto", torch.device("cpu"))
    assert len(caplog.records) == 1 and "EMA on cpu: backend" in caplog.text


def test_without_the_extension_torch_runs_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dpo_fast.backends.ema import select

    monkeypatch.setattr(select, "compiled_refusal", lambda device: "dpo_fast._C is not there")
    choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        assert choose("auto", torch.device("cpu")).name == "torch"
    assert "backend 'torch' (not compiled: dpo_fast._C is not there)" in caplog.text
    choose.cache_clear()
