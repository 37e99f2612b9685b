"""TR-DPO: the reference follows the policy as the equation says, in every kind of model."""

import copy
from typing import Any

import peft
import pytest
import torch

from dpo_fast.reference.adapter import AdapterReference
from dpo_fast.reference.ema import EmaReference
from dpo_fast.reference.frozen import FrozenReference
from dpo_fast.reference.protocol import Reference
from tests.reference.common import from_hidden, perturb, plain_logps, planned_batch
from tests.tiny import tiny_model


def full(policy: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> EmaReference:
    base = FrozenReference.copy_of(policy, dtype=dtype)
    return EmaReference(base, policy, **{"alpha": 0.3, "every": 1, **kwargs})


def adapter_policy(**kwargs: Any) -> Any:
    fields = {"r": 4, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    policy = peft.get_peft_model(tiny_model(), peft.LoraConfig(**{**fields, **kwargs}))
    perturb(policy)
    return policy


def test_the_recursion_in_closed_form() -> None:
    """ref_n = (1 - a)^n ref_0 + sum_k a (1 - a)^(n - k) policy_k, in float64."""
    policy = tiny_model()
    reference = full(policy)
    alpha, expected = 0.3, {n: p.detach().double() for n, p in policy.named_parameters()}
    for step in range(1, 21):
        perturb(policy, seed=step)
        reference.on_step_end(step)
        for name, param in policy.named_parameters():
            expected[name] = (1 - alpha) * expected[name] + alpha * param.detach().double()
    for name, param in reference.module.named_parameters():  # type: ignore[union-attr]
        torch.testing.assert_close(param.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_like_trls_callback_in_float32() -> None:
    from trl.trainer.callbacks import SyncRefModelCallback

    policy = tiny_model()
    reference, theirs = full(policy, alpha=0.6), copy.deepcopy(policy)
    for step in range(1, 6):
        perturb(policy, seed=step)
        reference.on_step_end(step)
        SyncRefModelCallback._sync_target_model(policy, theirs, 0.6)
    for ours, other in zip(reference.module.parameters(), theirs.parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(ours, other.detach(), rtol=1e-6, atol=1e-7)


def test_every_so_many_steps_and_not_in_between() -> None:
    policy = tiny_model()
    reference = full(policy, every=3)
    batch = planned_batch()
    before = reference.logps(batch)
    perturb(policy)
    for step in (1, 2):
        reference.on_step_end(step)
        assert torch.equal(reference.logps(batch), before)
    reference.on_step_end(3)
    assert reference.updates == 1 and (reference.logps(batch) - before).abs().max() > 1e-3


def test_the_hard_update_copies_the_policy() -> None:
    policy = tiny_model()
    reference = full(policy, alpha=1.0)
    perturb(policy)
    reference.update()
    module: Any = reference.module
    pairs = zip(policy.parameters(), module.parameters(), strict=True)
    assert all(torch.equal(p, r) for p, r in pairs)
    torch.testing.assert_close(
        reference.logps(planned_batch()).double(),
        plain_logps(policy, planned_batch()),
        rtol=2e-6,
        atol=2e-5,
    )


@pytest.mark.parametrize("rounding", ["auto", "nearest", "stochastic", "shadow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_weights_stay_as_they_are(dtype: torch.dtype, rounding: Any) -> None:
    policy = tiny_model().to(dtype)
    reference = full(policy, alpha=0.6, rounding=rounding)
    before = {n: t.clone() for n, t in reference.state_dict().items()}
    for step in range(1, 4):
        reference.on_step_end(step)
    after = reference.state_dict()
    assert int(after.pop("updates")) == 3
    assert all(torch.equal(before[n], after[n]) for n in after)


def distance(model: Any, start: dict[str, torch.Tensor]) -> float:
    tensors = model.state_dict()
    return sum(float((tensors[n].float() - start[n]).abs().sum()) for n in start)


def test_small_steps_are_not_lost_in_bf16() -> None:
    """200 updates at alpha 0.01 towards a fixed policy close 87 % of the gap; nearest fewer."""
    closed = {}
    for rounding in ("auto", "shadow", "nearest"):
        policy = tiny_model().to(torch.bfloat16)
        reference = full(policy, alpha=0.01, rounding=rounding)
        start = {n: p.detach().float() for n, p in policy.named_parameters()}
        with torch.no_grad():
            for param in policy.parameters():
                param.mul_(1.05)
        for step in range(1, 201):
            reference.on_step_end(step)
        module: Any = reference.module

        closed[rounding] = distance(module, start) / distance(policy, start)
    assert closed["auto"] == pytest.approx(1 - 0.99**200, abs=0.02)
    assert closed["shadow"] == pytest.approx(1 - 0.99**200, abs=0.02)
    assert closed["nearest"] < 0.2


def test_buffers_follow() -> None:
    policy = tiny_model()
    policy.register_buffer("bias_of_router", torch.zeros(3))
    policy.register_buffer("tokens_seen", torch.zeros(2, dtype=torch.int64))
    policy.register_buffer("scratch", torch.zeros(1), persistent=False)
    reference = full(policy, alpha=0.25)
    for buffer in (policy.bias_of_router, policy.tokens_seen, policy.scratch):
        buffer.fill_(8)
    reference.update()
    module: Any = reference.module
    assert module.bias_of_router.tolist() == [2.0] * 3
    assert module.tokens_seen.tolist() == [8, 8] and module.scratch.item() == 0
    names = reference.state_dict().keys()
    assert {"ref.bias_of_router", "ref.tokens_seen"} <= names and "ref.scratch" not in names


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["norm"]}, {"bias": "all"}])
def test_with_peft_the_adapters_weights_are_averaged(kwargs: dict[str, Any]) -> None:
    """Against a loop by hand over a second model."""
    policy = adapter_policy(**kwargs)
    by_hand = copy.deepcopy(policy)
    reference = EmaReference(AdapterReference(policy, fresh=False), policy, alpha=0.3, every=2)
    for step in range(1, 7):
        perturb(policy, seed=step)
        reference.on_step_end(step)
        if step % 2 == 0:
            with torch.no_grad():
                for ref, live in zip(by_hand.parameters(), policy.parameters(), strict=True):
                    ref.add_(live - ref, alpha=0.3)
    batch = planned_batch()
    expected = plain_logps(by_hand, batch)
    torch.testing.assert_close(reference.logps(batch).double(), expected, rtol=2e-5, atol=1e-4)
    torch.testing.assert_close(
        from_hidden(reference, batch), reference.logps(batch), rtol=1e-6, atol=1e-6
    )
    assert reference.module is None
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert reference.state_dict().keys() == {f"ref.{n}" for n in trained} | {"updates"}


def test_with_peft_the_state_comes_back() -> None:
    policy = adapter_policy()
    reference = EmaReference(AdapterReference(policy, fresh=False), policy, alpha=0.3, every=1)
    start = {n: p.detach().clone() for n, p in policy.named_parameters()}
    perturb(policy, seed=5)
    reference.update()
    expected = reference.logps(planned_batch())
    state = {n: t.clone() for n, t in reference.state_dict().items()}
    with torch.no_grad():
        for name, param in policy.named_parameters():
            param.copy_(start[name])
    again = EmaReference(AdapterReference(policy, fresh=False), policy, alpha=0.3, every=1)
    assert again.fingerprint() == reference.fingerprint()
    again.load_state_dict(state)
    assert torch.equal(again.logps(planned_batch()), expected)


def test_stochastic_rounding_goes_on_where_it_was() -> None:
    """The random bits depend on the number of updates, which the state holds."""

    def run(resume_at: int | None) -> dict[str, torch.Tensor]:
        policy = tiny_model().to(torch.bfloat16)
        reference = full(policy, alpha=0.1, seed=3)
        for step in range(1, 7):
            perturb(policy, seed=step, scale=0.01)
            if step == resume_at:
                state = {n: t.clone() for n, t in reference.state_dict().items()}
                reference = full(tiny_model().to(torch.bfloat16), alpha=0.1, seed=3)
                reference.policy = policy
                reference.load_state_dict(state)
            reference.on_step_end(step)
        return reference.state_dict()

    whole, resumed = run(None), run(4)
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_shadows_are_in_the_state() -> None:
    policy = tiny_model().to(torch.bfloat16)
    reference = full(policy, rounding="shadow")
    assert reference.state_dict()["shadow.lm_head.weight"].dtype == torch.float32


def test_another_start_is_allowed_and_moves() -> None:
    policy, given = tiny_model(), tiny_model(seed=1)
    reference = EmaReference(FrozenReference(given, policy), policy, alpha=0.5, every=1)
    before = plain_logps(given, planned_batch())
    torch.testing.assert_close(
        reference.logps(planned_batch()).double(), before, rtol=2e-6, atol=2e-5
    )
    reference.update()
    assert (plain_logps(given, planned_batch()) - before).abs().max() > 1e-3
    assert isinstance(reference, Reference)


def test_the_fingerprint_is_of_the_start() -> None:
    policy = tiny_model()
    start = FrozenReference.copy_of(policy).fingerprint()
    reference = full(policy)
    perturb(policy)
    reference.update()
    assert reference.fingerprint() == start


def test_refusals() -> None:
    policy = tiny_model()
    base = FrozenReference.copy_of(policy)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            EmaReference(base, policy, alpha=alpha, every=1)
    with pytest.raises(ValueError, match="at least 1"):
        EmaReference(base, policy, alpha=0.5, every=0)
    wider = tiny_model(intermediate_size=96)
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.down_proj\.weight' is \(32, 96\).*\(32, 64\)"
    ):
        EmaReference(base, wider, alpha=0.5, every=1)
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing would ever change.*is_trainable=True"):
        EmaReference(base, policy, alpha=0.5, every=1)


def test_states_of_other_models_are_refused() -> None:
    reference = full(tiny_model())
    state = reference.state_dict()
    with pytest.raises(ValueError, match="another strategy"):
        reference.load_state_dict({})
    with pytest.raises(ValueError, match=r"lacks 'ref\.lm_head\.weight' and 0 more"):
        reference.load_state_dict({n: t for n, t in state.items() if n != "ref.lm_head.weight"})
    with pytest.raises(ValueError, match=r"lm_head\.weight' is \(3,\)"):
        reference.load_state_dict({**state, "ref.lm_head.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="bfloat16"):
        reference.load_state_dict(
            {**state, "ref.lm_head.weight": state["ref.lm_head.weight"].bfloat16()}
        )
