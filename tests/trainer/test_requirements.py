"""What the trainer asks of transformers: its version, and an attention that keeps a softcap."""

import warnings
from typing import Any

import pytest

import dpo_fast
from dpo_fast.models.attention_softcap import warn_if_softcap_is_left_out
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.parity import config_kwargs, rows


def make(**config: Any) -> dpo_fast.Trainer:
    return dpo_fast.Trainer(
        tiny_model("llama"),
        args=dpo_fast.DPOConfig(**config_kwargs(**config)),
        train_dataset=rows(4),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize("version", ["4.56.2", "5.16.1"])
def test_transformers_below_the_floor(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=rf"5\.17, found {version}: pip install -U 'transf"):
        make()


def test_a_trainer_may_name_another_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.16.1")

    class Older(dpo_fast.Trainer):
        transformers_floor = "5.16"

    Older(
        tiny_model("llama"),
        args=dpo_fast.DPOConfig(**config_kwargs()),
        train_dataset=rows(4),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize(
    ("family", "implementation", "warned"),
    [("gemma2", "sdpa", True), ("gemma2", "eager", False), ("llama", "sdpa", False)],
)
def test_softcap_that_sdpa_leaves_out(family: str, implementation: str, warned: bool) -> None:
    own = {"attn_logit_softcapping": 3.0} if family == "gemma2" else {}
    model = tiny_model(family, **own)
    model.config._attn_implementation = implementation
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_if_softcap_is_left_out(model)
    assert [("eager" in str(w.message) and "3" in str(w.message)) for w in seen] == [True] * warned
