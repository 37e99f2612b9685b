"""The identity of a reference: moved by everything that changes log-probs, by nothing else."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

from dpo_fast.reference import fingerprint as module
from dpo_fast.reference.adapter import AdapterReference
from dpo_fast.reference.fingerprint import fingerprint_tensors, model_fingerprint
from dpo_fast.reference.frozen import FrozenReference
from tests.reference.common import perturb
from tests.tiny import tiny_model


def lora(**kwargs: Any) -> Any:
    fields = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**fields, **kwargs})


def one_bit(model: Any) -> None:
    model.lm_head.weight.data.view(torch.int32)[7, 3] ^= 1


def rows_swapped(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]]


def layers_swapped(model: Any) -> None:
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


def config_value(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


@pytest.mark.parametrize(
    "change",
    [
        one_bit,
        rows_swapped,
        layers_swapped,
        lambda m: m.to(torch.bfloat16),
        config_value("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
        config_value("rms_norm_eps", 1e-3),
        config_value("hidden_act", "gelu"),
        config_value("an_unknown_setting", 3),
    ],
)
def test_what_changes_values_changes_it(change: Callable[[Any], None]) -> None:
    model = tiny_model()
    before = model_fingerprint(model)
    change(model)
    assert model_fingerprint(model) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.train(),
        lambda m: m.requires_grad_(False),
        config_value("_name_or_path", "/elsewhere"),
        config_value("use_cache", False),
        config_value("pad_token_id", 5),
        config_value("attention_dropout", 0.3),
        lambda m: m.set_attn_implementation("eager"),
        lambda m: m.gradient_checkpointing_enable(),
        lambda m: FrozenReference.copy_of(m),
    ],
)
def test_what_does_not_does_not(change: Callable[[Any], None]) -> None:
    model = tiny_model()
    before = model_fingerprint(model)
    change(model)
    assert model_fingerprint(model) == before


def test_equal_in_other_processes_and_with_other_threads_and_pieces(monkeypatch: Any) -> None:
    tensors = {
        "b": torch.arange(1000.0),
        "a": torch.ones(3, dtype=torch.bfloat16),
        "c": torch.tensor(2),
    }
    own = fingerprint_tensors(tensors)
    assert fingerprint_tensors(dict(reversed(tensors.items())), threads=3) == own
    code = (
        "import torch; from dpo_fast.reference.fingerprint import fingerprint_tensors as f;"
        "ones = torch.ones(3, dtype=torch.bfloat16);"
        "print(f({'a': ones, 'b': torch.arange(1000.0), 'c': torch.tensor(2)}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == own


def test_pieces_are_all_read(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 64)
    values = torch.arange(1001.0)
    seen = {fingerprint_tensors({"a": values})}
    for position in (0, 15, 16, 999, 1000):
        changed = values.clone()
        changed[position] += 1
        seen.add(fingerprint_tensors({"a": changed}))
    assert len(seen) == 6


def test_views_and_layouts_do_not_count() -> None:
    values = torch.randn(6, 8)
    assert fingerprint_tensors({"a": values}) == fingerprint_tensors(
        {"a": values.t().contiguous().t()}
    )
    shapes = (values, values.view(8, 6), values.view(torch.int32))
    assert len({fingerprint_tensors({"a": t}) for t in shapes}) == 3
    assert fingerprint_tensors({"a": torch.empty(0)}) != fingerprint_tensors({"b": torch.empty(0)})


def test_strategies_that_answer_alike_share_it() -> None:
    """A sweep over LoRA and full fine-tuning on one base shares one cache of log-probs."""
    plain = tiny_model("qwen2")
    expected = FrozenReference.copy_of(plain).fingerprint()
    for config in (
        lora(),
        lora(target_modules=["q_proj", "lm_head"], r=8),
        lora(modules_to_save=["lm_head"]),
        lora(trainable_token_indices=[3, 4]),
        lora(bias="all"),
        lora(use_dora=True),
        peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        peft.VBLoRAConfig(
            r=4, num_vectors=8, vector_length=16, target_modules=["q_proj"], task_type="CAUSAL_LM"
        ),
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ):
        policy = peft.get_peft_model(copy.deepcopy(plain), config)
        reference = AdapterReference(policy, fresh=True)
        perturb(policy)  # training moves adapters and biases, not the reference
        assert reference.fingerprint() == expected, config


def test_an_adapter_that_goes_on_counts_with_weights_and_settings() -> None:
    def reference(seed: int = 0, name: str = "default", **kwargs: Any) -> AdapterReference:
        torch.manual_seed(0)
        policy = peft.get_peft_model(tiny_model(), lora(**kwargs), adapter_name=name)
        perturb(policy, seed=seed)
        return AdapterReference(policy, fresh=False)

    first = reference()
    assert reference().fingerprint() == first.fingerprint()
    assert reference(name="mine").fingerprint() == first.fingerprint()
    assert reference(lora_dropout=0.5).fingerprint() == first.fingerprint()
    others = {
        reference(seed=1).fingerprint(),
        reference(lora_alpha=3).fingerprint(),
        reference(use_rslora=True).fingerprint(),
        FrozenReference.copy_of(tiny_model()).fingerprint(),
        first.fingerprint(),
    }
    assert len(others) == 5
    perturb(first.model, seed=3)
    assert first.fingerprint() == reference().fingerprint()
    late = reference()
    perturb(late.model, seed=3)  # computed after training began
    assert late.fingerprint() == first.fingerprint()


def test_prompt_encoders_count() -> None:
    def reference(seed: int) -> str:
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        policy = peft.get_peft_model(tiny_model(), config)
        perturb(policy, seed=seed)
        return AdapterReference(policy, fresh=False).fingerprint()

    assert reference(1) == reference(1) != reference(2)


def test_quantised_scales_count() -> None:
    """Equal codes with other scales are other weights."""

    class State:
        def __init__(self, absmax: float) -> None:
            self.absmax = absmax

        def as_dict(self, packed: bool) -> dict[str, torch.Tensor]:
            return {"absmax": torch.tensor([self.absmax])}

    def digest(absmax: float) -> str:
        model = tiny_model()
        model.lm_head.weight.quant_state = State(absmax)
        return model_fingerprint(model)

    assert digest(1.0) == digest(1.0) != digest(2.0)


def test_meta_and_sharded_tensors_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'w' is on the meta device"):
        fingerprint_tensors({"w": torch.empty(3, device="meta")})
    model = tiny_model()
    model.lm_head.weight.ds_id = 1
    with pytest.raises(ValueError, match=r"lm_head\.weight' is sharded"):
        model_fingerprint(model)
