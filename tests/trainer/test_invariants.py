"""What must hold of any DPO training: log 2 at the start, accumulation that changes nothing, caches
that agree.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dpo_fast
from tests.kernels.support import interpreted
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.cells import lora_config
from tests.trainer.parity import config_kwargs, perturbed, relative_update_error, rows, train


def run(model: Any = None, dataset: Any = None, **config: Any) -> Any:
    reference = config.pop("ref_model", None)
    return train(
        dpo_fast.Trainer,
        dpo_fast.DPOConfig,
        tiny_model("llama") if model is None else model,
        ref_model=reference,
        config=config_kwargs(**config),
        dataset=dataset,
    )


@pytest.mark.parametrize("reference", ["frozen", "ema", "precomputed"])
def test_first_loss_is_log_2_to_the_bit(reference: str, tmp_path: Path) -> None:
    first = run(reference=reference, max_steps=1, ref_cache_dir=str(tmp_path)).log[0]
    tolerance = 1e-6 if reference == "precomputed" else 0.0  # other batch shapes round differently
    assert first["rewards/margins"] == pytest.approx(0.0, abs=tolerance)
    assert first["loss"] == pytest.approx(math.log(2), abs=max(tolerance, 1e-7))


@pytest.mark.parametrize("loss", [["sigmoid"], ["ipo"], ["sigmoid", "sft"]])
@pytest.mark.parametrize("count", [24, 21])  # 21: the last step has fewer pairs
def test_accumulation_equals_one_batch(loss: list[str], count: int) -> None:
    reference = perturbed(tiny_model("llama"))
    common = {"loss_type": loss, "ref_model": reference, "optim": "sgd", "max_steps": 3}
    common |= {
        "learning_rate": 0.05
    }  # large enough for the update to be more than float32's rounding of the weights
    common |= {"max_length": 24, "dataset": rows(count)}
    one = run(per_device_train_batch_size=8, **common)
    many = run(per_device_train_batch_size=1, gradient_accumulation_steps=8, **common)
    assert relative_update_error(many, one) < 1e-5
    for a, b in zip(one.log, many.log, strict=True):
        for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "num_tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key


def test_precomputed_equals_online(tmp_path: Path) -> None:
    reference = perturbed(tiny_model("llama"))
    online = run(ref_model=reference, ld_alpha=0.5)
    cached = run(
        ref_model=reference, ld_alpha=0.5, reference="precomputed", ref_cache_dir=str(tmp_path)
    )
    assert relative_update_error(cached, online) < 1e-3
    assert cached.log[0]["loss"] == pytest.approx(online.log[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_backends_agree(backend: str) -> None:
    reference = perturbed(tiny_model("llama"))
    expected = run(ref_model=reference, optim="sgd", learning_rate=0.05, max_steps=2)
    other = run(
        ref_model=reference, optim="sgd", learning_rate=0.05, max_steps=2, lm_head_backend=backend
    )
    assert relative_update_error(other, expected) < 1e-5


@interpreted
def test_filtered_head() -> None:
    """A bound of 0 is the exact training; a bound is near it, and the log says what was kept."""
    how = {
        "ref_model": perturbed(tiny_model("llama")), "optim": "sgd", "learning_rate": 0.05,
        "max_steps": 2, "lm_head_backend": "triton",
    }  # fmt: skip
    exact, everything = run(**how), run(**how, lm_head_filter_bound=0.0)
    assert relative_update_error(everything, exact) < 1e-5
    assert everything.log[0]["lm_head/kept_share"] == 1.0
    near = run(**how, lm_head_filter_bound=0.05)
    assert near.log[0]["loss"] == everything.log[0]["loss"]
    assert 0.2 < near.log[0]["lm_head/kept_share"] < 1.0
    assert 0.0 < near.log[0]["lm_head/most_skipped"] < 1.0
    assert 1e-5 < relative_update_error(near, exact) < 0.5
    assert "lm_head/kept_share" not in exact.log[0]


def test_lora_on_the_head_is_trained_and_equals_its_merged_twin() -> None:
    """TRL refuses an adapter on the LM head; here its first loss is that of the merged model."""
    from peft import get_peft_model

    config = lora_config(target_modules=["q_proj", "lm_head"])
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), config)
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    base = tiny_model("llama")
    fused = run(
        model, reference="frozen", ref_model=base, max_steps=1, optim="sgd", learning_rate=0.1
    )
    expected = run(merged, ref_model=base, max_steps=1, optim="sgd", learning_rate=0.1)
    assert fused.log[0]["loss"] == pytest.approx(expected.log[0]["loss"], rel=1e-5)
    trained = [n for n in fused.after if "lm_head" in n]
    assert trained and all(not torch.equal(fused.after[n], fused.before[n]) for n in trained)


def test_no_logits_are_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    model = tiny_model("llama")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the LM head was called: logits exist")

    trainer = dpo_fast.Trainer(
        model,
        args=dpo_fast.DPOConfig(**config_kwargs(max_steps=1)),
        train_dataset=rows(),
        eval_dataset=rows(4, 1),
        processing_class=tiny_tokenizer(),
    )
    for lm in (trainer.model, trainer.ref_model):
        assert isinstance(lm.lm_head, nn.Linear)
        monkeypatch.setattr(lm.lm_head, "forward", refuse)
    trainer.train()
    trainer.evaluate()
