"""Bad input is refused when the trainer is built, by TRL's error types, with the value, the rule
and the remedy.
"""

from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

import dpo_fast
from tests.tiny import save_tiny, tiny_model, tiny_preferences, tiny_tokenizer
from tests.trainer.cells import lora_config
from tests.trainer.parity import config_kwargs, rows


def make(model: Any = None, **kwargs: Any) -> Any:
    config = config_kwargs(**kwargs.pop("config", {}))
    arguments = {"train_dataset": rows(8), "processing_class": tiny_tokenizer(), **kwargs}
    return dpo_fast.Trainer(
        tiny_model("llama") if model is None else model,
        args=dpo_fast.DPOConfig(**config),
        **arguments,
    )


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("max_prompt_length", 10, "max_length"),
        ("rpo_alpha", 1.0, "sft"),
        ("reference_free", True, "simpo"),
        ("padding_value", 0, "pad_token"),
        ("label_pad_token_id", -100, "completion mask"),
        ("chat_template_kwargs", {"persona": "x"}, "column in the dataset"),
        ("is_encoder_decoder", True, "not supported"),
        ("force_use_ref_model", True, "always used"),
    ],
)
def test_removed_fields_as_config_field_or_trainer_argument(
    name: str, value: Any, hint: str
) -> None:
    with pytest.raises(TypeError, match=f"DPOConfig has no '{name}'.*{hint}"):
        dpo_fast.DPOConfig("out", **{name: value})
    with pytest.raises(TypeError, match=f"Trainer .* has no '{name}'.*{hint}"):
        make(**{name: value})


@pytest.mark.parametrize("name", ["beta", "dataset_num_proc", "max_length", "learning_rate"])
def test_config_fields_as_trainer_arguments(name: str) -> None:
    with pytest.raises(TypeError, match=rf"field of its args.*DPOConfig\({name}=\.\.\.\)"):
        make(**{name: 1})


def test_removed_and_unknown_trainer_arguments() -> None:
    with pytest.raises(TypeError, match="processing_class"):
        make(tokenizer=tiny_tokenizer())
    with pytest.raises(TypeError, match="unexpected arguments: nonsense"):
        make(nonsense=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"reference": "none"}, "reference='none' must be one of"),
        ({"token_stats": "sometimes"}, "token_stats"),
        ({"truncation_mode": "middle"}, "keep_start"),
        ({"max_length": 1}, "max_length=1"),
        ({"ref_model_mixup_alpha": 1.5}, "1.5"),
        ({"ref_model_sync_steps": 0}, "at least 1"),
        ({"ld_alpha": -0.1}, "ld_alpha"),
        ({"pad_to_multiple_of": "many"}, "pad_to_multiple_of"),
        ({"lm_head_workspace": 0}, "lm_head_workspace"),
        ({"lm_head_filter_bound": 1.0}, "lm_head_filter_bound=1.0 must lie in"),
    ],
)
def test_config_values(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_fast.DPOConfig(**config_kwargs(**config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss_type": ["dpo"]}, "(?s)dpo.*sigmoid"),
        ({"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]}, "loss_weights"),
        ({"loss_type": ["exo_pair"]}, "label_smoothing"),
        ({"loss_type": ["apo_zero"], "f_divergence_type": "forward_kl"}, "f_divergence_type"),
        ({"reference": "adapter"}, "needs an adapter"),
        ({"precompute_ref_log_probs": True, "sync_ref_model": True}, "exclude each other"),
        ({"reference": "frozen", "sync_ref_model": True}, "name two references"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef"),
        ({"lm_head_backend": "cuda"}, "lm_head_backend|backend"),
        ({"lm_head_filter_bound": 1e-3, "lm_head_backend": "chunked"}, "backend here is 'chunked'"),
    ],
)
def test_combinations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(config=config)


def test_models() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="same object"):
        make(model, ref_model=model)
    with pytest.raises(ValueError, match=r"(?s)vocabular.*320.*330"):
        make(ref_model=tiny_model("llama", vocab_size=330))
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(
        ValueError, match=r"policy's weight 'model\.layers\.1\.mlp\.up_proj\.weight'"
    ):
        make(broken)
    with pytest.raises(ValueError, match=r"reference's weight .* NaN"):
        make(ref_model=broken)
    with pytest.raises(TypeError, match="peft_config"):
        make(peft_config={"r": 4})
    with pytest.raises(ValueError, match="quantization_config"):
        make(quantization_config=object())


def test_quantization_config_reaches_the_loader(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader alone is replaced: quantised weights need bitsandbytes' CUDA kernels."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    loaded = []

    def load(name: str, **kwargs: Any) -> Any:
        loaded.append((name, kwargs))
        return tiny_model("llama")

    policy, reference = (save_tiny(tmp_path / name) for name in ("policy", "reference"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    config = BitsAndBytesConfig(load_in_4bit=True)
    make(
        policy,
        ref_model=reference,
        quantization_config=config,
        peft_config=lora_config(),
        config={"model_init_kwargs": {"dtype": "bfloat16"}},
    )
    (first, first_kwargs), (second, second_kwargs) = loaded
    assert (first, second) == (policy, reference)
    assert first_kwargs["quantization_config"] is config
    assert first_kwargs["dtype"] is second_kwargs["dtype"] is torch.bfloat16
    assert "quantization_config" not in second_kwargs  # the reference keeps its own precision
    with pytest.raises(ValueError, match="given to the trainer and in model_init_kwargs"):
        make(
            policy,
            quantization_config=config,
            config={"model_init_kwargs": {"quantization_config": config}},
        )


def test_several_gpus_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo_fast.DPOConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*accelerate launch.*CUDA_VISIBLE_DEVICES"):
        make()


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    device = property(lambda self: torch.device("mps"))
    monkeypatch.setattr(dpo_fast.DPOConfig, "device", device)
    with pytest.raises(ValueError, match=r"'mps'.*no float64.*use_cpu=True"):
        make()


def test_peft_model_and_config() -> None:
    from peft import get_peft_model

    model = get_peft_model(tiny_model("llama"), lora_config())
    with pytest.raises(ValueError, match="merge"):
        make(model, peft_config=lora_config())


def test_datasets() -> None:
    with pytest.raises(ValueError, match="train_dataset is required"):
        make(train_dataset=None)
    with pytest.raises(TypeError, match="list"):
        make(train_dataset=tiny_preferences(3))
    with pytest.raises(ValueError, match="no rows"):
        make(train_dataset=Dataset.from_list([]))
    with pytest.raises(ValueError, match="question"):
        make(train_dataset=Dataset.from_list([{"question": "a", "answer": "b"}]))
    with pytest.raises(ValueError, match="prompt"):
        make(train_dataset=Dataset.from_list([{"prompt": "a"}]))
    stream = IterableDataset.from_generator(lambda: iter(tiny_preferences(3)))
    with pytest.raises(ValueError, match="stream"):
        make(train_dataset=stream, config={"reference": "precomputed"})


def test_token_ids_beyond_the_model() -> None:
    ids = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [319]}
    make(train_dataset=Dataset.from_list([ids]))
    with pytest.raises(
        ValueError, match=r"rejected_ids hold token id 320.*resize_token_embeddings"
    ):
        make(train_dataset=Dataset.from_list([ids, {**ids, "rejected_ids": [4, 320]}]))


def test_tokenizer_is_needed() -> None:
    with pytest.raises(ValueError, match="processing_class"):
        make(processing_class=None)
    with pytest.raises(TypeError, match="tokenizer"):
        make(processing_class="gpt2")


def test_unwritable_output_folder(tmp_path: Any) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("here already")
    with pytest.raises(OSError, match="output"):
        make(config={"output_dir": str(occupied / "run")})


def test_model_by_name_and_stream(tmp_path: Any) -> None:
    folder = save_tiny(tmp_path / "model")
    stream = IterableDataset.from_generator(lambda: iter(tiny_preferences(12)))
    trainer = make(
        folder,
        ref_model=folder,
        train_dataset=stream,
        processing_class=None,
        config={"max_steps": 2, "max_length": None},
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.model.dtype == torch.float32


def test_trl_config_is_accepted() -> None:
    import trl

    args = trl.DPOConfig(**config_kwargs(beta=0.3, max_steps=1))
    trainer = dpo_fast.Trainer(
        tiny_model("llama"), args=args, train_dataset=rows(8), processing_class=tiny_tokenizer()
    )
    trainer.train()
    assert trainer.args.beta == 0.3 and trainer.args.reference == "auto"


def test_nan_loss_is_reported_with_a_remedy() -> None:
    trainer = make(config={"max_steps": 3, "learning_rate": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(FloatingPointError, match="learning rate"):
        trainer.train()


def test_a_policy_without_trainable_parameters() -> None:
    with pytest.raises(ValueError, match="nothing would be trained"):
        make(tiny_model("llama").requires_grad_(False))
