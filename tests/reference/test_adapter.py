"""One PEFT model for policy and reference: every kind of adapter, nothing left behind."""

import copy
import os
import warnings
from typing import Any

import peft
import pytest
import torch

from dpo_fast.reference.adapter import AdapterReference
from tests.reference.common import from_hidden, perturb, plain_logps, planned_batch
from tests.tiny import tiny_model

ATTENTION = ["q_proj", "v_proj"]


def lora(**kwargs: Any) -> peft.LoraConfig:
    fields: dict[str, Any] = {"r": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**fields, **kwargs})


CONFIGS: dict[str, Any] = {
    "lora": lambda: lora(),
    "dropout": lambda: lora(lora_dropout=0.5),
    "head": lambda: lora(target_modules=[*ATTENTION, "lm_head"]),
    "bias": lambda: lora(bias="all"),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head", "norm"]),
    "trainable_tokens": lambda: lora(trainable_token_indices=[3, 7, 11]),
    "target_parameters": lambda: lora(
        target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]
    ),
    "dora": lambda: lora(use_dora=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "random": lambda: lora(init_lora_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=ATTENTION, task_type="CAUSAL_LM"
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "ln_tuning": lambda: peft.LNTuningConfig(
        target_modules=["input_layernorm"], task_type="CAUSAL_LM"
    ),
    "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def model_for(name: str) -> Any:
    if name == "bias":
        return tiny_model("qwen2")
    return tiny_model("qwen3_moe" if name == "target_parameters" else "llama")


def wrapped(name: str, adapter_name: str = "default") -> tuple[Any, Any]:
    """(the plain model, the same model with an adapter)"""
    plain = model_for(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        policy = peft.get_peft_model(
            copy.deepcopy(plain), CONFIGS[name](), adapter_name=adapter_name
        )
    return plain, policy


def state_of(model: Any) -> dict[str, Any]:
    """Everything that a pass must not change."""
    return {
        "values": {n: p.detach().clone() for n, p in model.named_parameters()},
        "storage": {n: p.data_ptr() for n, p in model.named_parameters()},
        "grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "adapters": {n: getattr(m, "disable_adapters", None) for n, m in model.named_modules()},
        "active": list(model.active_adapters),
        "configs": sorted(model.peft_config),
        "modules": [n for n, _ in model.named_modules()],
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    values, others = before.pop("values"), after.pop("values")
    assert all(torch.equal(values[n], others[n]) for n in values)
    assert before == after


@pytest.mark.parametrize("name", CONFIGS)
def test_fresh_adapter_answers_as_the_model_it_was_put_on(name: str) -> None:
    plain, policy = wrapped(name)
    expected = plain_logps(plain, planned_batch())
    reference = AdapterReference(policy, fresh=True)
    perturb(policy)
    policy.train()
    before = state_of(policy)
    got = reference.logps(planned_batch())
    assert_same_state(before, state_of(policy))
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-5)
    assert (plain_logps(policy, planned_batch()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_that_goes_on_answers_as_it_was(name: str) -> None:
    _, policy = wrapped(name, "mine")
    perturb(policy)
    expected = plain_logps(policy, planned_batch())
    reference = AdapterReference(policy, fresh=False)
    perturb(policy, seed=2)
    policy.train()
    before = state_of(policy)
    got = reference.logps(planned_batch())
    assert_same_state(before, state_of(policy))
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-5)
    assert (plain_logps(policy, planned_batch()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    "name", ["lora", "head", "modules_to_save", "trainable_tokens", "prompt_tuning"]
)
def test_hidden_and_head_stay_the_reference_after_the_pass(name: str, fresh: bool) -> None:
    _, policy = wrapped(name)
    if not fresh:
        perturb(policy)
    reference = AdapterReference(policy, fresh=fresh)
    perturb(policy, seed=2)
    batch = planned_batch()
    torch.testing.assert_close(
        from_hidden(reference, batch), reference.logps(batch), rtol=1e-6, atol=1e-6
    )


def test_frozen_head_is_the_policys_own_tensor() -> None:
    """One pass over one weight for both needs to see that it is one."""
    _, policy = wrapped("lora")
    for fresh in (True, False):
        pair = AdapterReference(policy, fresh=fresh).hidden(planned_batch())
        assert pair is not None
        assert pair[1].weight is policy.get_output_embeddings().weight


@pytest.mark.parametrize("name", ["lora", "bias", "modules_to_save"])
def test_the_policys_backward_is_untouched_by_a_reference_pass_in_between(name: str) -> None:
    _, policy = wrapped(name)
    reference = AdapterReference(policy, fresh=False)
    perturb(policy)
    policy.train()
    batch = planned_batch()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}

    def gradients(with_reference: bool) -> dict[str, Any]:
        policy.zero_grad()
        logits = policy(**inputs, use_cache=False).logits
        if with_reference:
            reference.logps(batch)
        logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    alone, between = gradients(False), gradients(True)
    assert alone and alone.keys() == between.keys()
    assert all(torch.equal(alone[n], between[n]) for n in alone)


@pytest.mark.parametrize("fresh", [True, False])
def test_autocast_around_both_passes_keeps_no_weight_of_the_other(fresh: bool) -> None:
    """Autocast caches casts by parameter; within one context the policy's would be found stale."""
    _, policy = wrapped("modules_to_save")
    reference = AdapterReference(policy, fresh=fresh)
    perturb(policy, scale=0.3)
    batch = planned_batch()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}

    def gradients(with_reference: bool) -> Any:
        policy.zero_grad()
        passes = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if with_reference:
                passes.append(reference.logps(batch))
            logits = policy(**inputs, use_cache=False).logits
            if with_reference:
                passes.append(reference.logps(batch))
        logits.float().square().mean().backward()
        return passes, {n: None if p.grad is None else p.grad.clone() for n, p in trained.items()}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = reference.logps(batch)
    passes, between = gradients(with_reference=True)
    assert all(torch.equal(alone, each) for each in passes)
    _, plain = gradients(with_reference=False)
    assert all(g is not None and torch.equal(g, between[n]) for n, g in plain.items())


def test_gradient_checkpointing_and_dropout_are_off_in_the_pass(monkeypatch: Any) -> None:
    _, policy = wrapped("dropout")
    policy.gradient_checkpointing_enable()
    policy.enable_input_require_grads()
    reference = AdapterReference(policy, fresh=False)
    perturb(policy)
    policy.train()
    calls = []
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(a) or a[0](*a[1:])
    )
    first, second = reference.logps(planned_batch()), reference.logps(planned_batch())
    assert torch.equal(first, second) and not calls


def test_flags_of_the_user_survive() -> None:
    """PEFT's own enable() would make every weight of the adapter trainable again."""
    _, policy = wrapped("lora")
    frozen = next(n for n, p in policy.named_parameters() if "lora_A" in n)
    policy.get_parameter(frozen).requires_grad_(False)
    AdapterReference(policy, fresh=True).logps(planned_batch())
    assert not policy.get_parameter(frozen).requires_grad


def test_layers_that_switch_off_in_their_own_way_are_asked_to() -> None:
    """... and the flags that PEFT rewrites on the way are restored."""
    _, policy = wrapped("lora")
    perturb(policy)
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj
    asked = []

    class Odd(type(layer)):  # type: ignore[misc]
        def enable_adapters(self, enabled: bool) -> None:
            asked.append(enabled)
            super().enable_adapters(enabled)

    layer.__class__ = Odd
    layer.lora_A["default"].weight.requires_grad_(False)
    before = state_of(policy)
    AdapterReference(policy, fresh=True).logps(planned_batch())
    assert asked == [False, True]
    assert_same_state(before, state_of(policy))


def test_an_error_in_the_pass_leaves_the_policy_as_it_was() -> None:
    _, policy = wrapped("bias")
    reference = AdapterReference(policy, fresh=True)
    perturb(policy)
    policy.train()
    before = state_of(policy)
    with pytest.raises(ZeroDivisionError):
        reference._run(planned_batch(), lambda hidden, head: 1 / 0)
    assert_same_state(before, state_of(policy))
    reference.logps(planned_batch())


def test_nothing_is_left_in_saved_adapters(tmp_path: Any) -> None:
    _, policy = wrapped("lora", "mine")
    reference = AdapterReference(policy, fresh=False)
    perturb(policy)
    reference.logps(planned_batch())
    policy.save_pretrained(tmp_path)
    files = sorted(
        os.path.relpath(os.path.join(d, f), tmp_path) for d, _, fs in os.walk(tmp_path) for f in fs
    )
    assert files == ["README.md", "mine/adapter_config.json", "mine/adapter_model.safetensors"]


def test_memory_of_a_fresh_adapter_is_nothing() -> None:
    _, policy = wrapped("lora")
    assert len(AdapterReference(policy, fresh=True).exchange) == 0
    assert "no second model" in AdapterReference(policy, fresh=True).describe()
    continued = AdapterReference(policy, fresh=False)
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert continued.exchange.nbytes == trained


def test_refusals() -> None:
    with pytest.raises(TypeError, match="pass peft_config"):
        AdapterReference(tiny_model(), fresh=True)
    _, policy = wrapped("lora")
    policy.get_output_embeddings().weight.data[5, 3] = float("nan")
    with pytest.raises(ValueError, match=r"lm_head\.weight.*NaN"):
        AdapterReference(policy, fresh=True)


def test_trained_weights_that_share_memory_with_others_are_refused() -> None:
    """Their twin would go on answering for the policy inside of the reference's pass."""
    _, policy = wrapped("lora")
    layers = policy.base_model.model.model.layers
    first = layers[0].self_attn.q_proj.lora_A["default"]
    second = layers[1].self_attn.q_proj.lora_A["default"]
    second.weight = torch.nn.Parameter(first.weight.data.view(-1).view_as(first.weight))
    second.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"same memory.*reference='frozen'"):
        AdapterReference(policy, fresh=False)


def test_adaption_prompts_are_refused_by_name() -> None:
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    policy = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(ValueError, match="Adaption prompts"):
        AdapterReference(policy, fresh=True)


def test_a_tensor_cast_after_the_reference_was_made_raises() -> None:
    _, policy = wrapped("lora")
    reference = AdapterReference(policy, fresh=False)
    for param in policy.parameters():
        if param.requires_grad:
            param.data = param.data.bfloat16()
    before = state_of(policy)
    with pytest.raises(ValueError, match="float32 when the reference was made"):
        reference.logps(planned_batch())
    assert_same_state(before, state_of(policy))
