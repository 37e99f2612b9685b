"""What cannot be a policy or a reference is refused by name: before weights are loaded, and before
a row is read.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import dpo_fast
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.trainer.cells import lora_config
from tests.trainer.parity import config_kwargs, rows


def refused(error: type[Exception], message: str, **models: Any) -> None:
    """The trainer raises ``error`` with ``message``, and no row was asked for."""

    def no_rows() -> Any:
        raise AssertionError("a row was read")
        yield

    with pytest.raises(error, match=message):
        dpo_fast.Trainer(
            **{"model": tiny_model("llama"), **models},
            args=dpo_fast.DPOConfig(**config_kwargs()),
            train_dataset=IterableDataset.from_generator(no_rows),
            processing_class=tiny_tokenizer(),
        )


def tiny_t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=320, **sizes))


@pytest.mark.parametrize("role", ["model", "ref_model"])
def test_encoder_decoders(role: str, tmp_path: Path) -> None:
    t5 = tiny_t5()
    message = r"encoder-decoder \(model_type 't5'\).*causal LM"
    refused(ValueError, f"^{role} .*{message}", **{role: t5})
    t5.config.save_pretrained(tmp_path)  # no weights: the config alone is read
    refused(ValueError, message, **{role: str(tmp_path)})


@pytest.mark.parametrize("role", ["model", "ref_model"])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (nn.Linear(2, 2), TypeError, "is a Linear, a bare torch module.*AutoModelForCausalLM"),
        ({}, TypeError, r"hub name \(str\), or a causal LM.*got dict"),
        (Path("folder"), TypeError, r"got PosixPath.*str\(path\)"),
        (tiny_model("llama").model, ValueError, "LlamaModel has no output embeddings"),
        (nn.DataParallel(tiny_model("llama")), TypeError, r"in DataParallel.*model\.module"),
    ],
    ids=["module", "dict", "path", "backbone", "wrapped"],
)
def test_objects(role: str, given: Any, error: type[Exception], message: str) -> None:
    refused(error, message, **{role: given})


def test_no_model_and_no_arguments() -> None:
    """Without ``args`` the output folder is named after the model, which must be one first."""
    with pytest.raises(TypeError, match="got NoneType"):
        dpo_fast.Trainer(None)
    with pytest.raises(TypeError, match="bare torch module"):
        dpo_fast.Trainer(nn.Linear(2, 2))


@pytest.mark.parametrize("role", ["model", "ref_model"])
def test_paths(role: str, tmp_path: Path) -> None:
    refused(ValueError, f"^{role}: there is no folder '/no/such/model'", **{role: "/no/such/model"})
    (tmp_path / "checkpoint-4").mkdir()
    message = f"^{role}: the folder .* holds no model.*Did you mean .*checkpoint-4"
    refused(ValueError, message, **{role: str(tmp_path)})
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refused(ValueError, f"^{role}: .* is a file; give the folder", **{role: str(file)})


def test_adapter_folder_would_be_loaded_frozen(tmp_path: Path) -> None:
    from peft import get_peft_model

    get_peft_model(tiny_model("llama"), lora_config()).save_pretrained(tmp_path)
    refused(ValueError, r"holds an adapter.*is_trainable=True", model=str(tmp_path))
    refused(TypeError, "peft_config must be a peft.PeftConfig", peft_config=str(tmp_path))


def test_home_is_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HOME", str(tmp_path))
    save_tiny(tmp_path / "mine")
    trainer = dpo_fast.Trainer(
        "~/mine",
        args=dpo_fast.DPOConfig(**config_kwargs()),
        train_dataset=rows(8),
    )
    assert trainer.model.config._name_or_path == str(tmp_path / "mine")
