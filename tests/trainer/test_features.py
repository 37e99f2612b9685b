"""What users expect of a trainer: precision, adapters, best model, statistics, names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dpo_fast
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.cells import lora_config
from tests.trainer.parity import config_kwargs, perturbed, relative_update_error, rows, train

TOKEN_KEYS = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}


def ours(model: Any = None, **kwargs: Any) -> Any:
    config = config_kwargs(**kwargs.pop("config", {}))
    model = tiny_model("llama") if model is None else model
    return train(dpo_fast.Trainer, dpo_fast.DPOConfig, model, config=config, **kwargs)


def test_bf16_autocast_follows_fp32() -> None:
    reference = perturbed(tiny_model("llama"))
    exact = ours(ref_model=reference)
    mixed = ours(ref_model=reference, config={"bf16": True})
    for a, b in zip(exact.log, mixed.log, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=0.03)
    assert all(p.dtype == torch.float32 for p in mixed.after.values())
    assert ours(config={"bf16": True, "max_steps": 1}).log[0]["rewards/margins"] == 0.0


def test_bf16_weights() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    run = ours(model, config={"bf16": False, "max_steps": 2, "reference": "ema"})
    assert run.trainer.reference.rounding == "stochastic"
    assert torch.isfinite(run.update()).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapter_with_checkpointing(checkpointing: bool) -> None:
    run = ours(
        trainer_kwargs={"peft_config": lora_config()},
        config={"gradient_checkpointing": checkpointing, "max_steps": 2},
    )
    assert run.trainer.ref_model is None
    assert run.trainer.reference.name == "adapter"
    assert all("lora" in name for name in run.after) and run.update().norm() > 0


def test_continued_adapter_leaves_no_reference_behind(tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), lora_config(), adapter_name="mine")
    trainer = dpo_fast.Trainer(
        model,
        args=dpo_fast.DPOConfig(
            **config_kwargs(
                output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=2
            )
        ),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0.0  # the copy, not the bare base
    assert trainer.state.log_history[1]["rewards/margins"] != 0.0
    saved = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("adapter_model*")}
    assert saved and not any("ref" in Path(name).parts for name in saved)
    assert list(trainer.model.peft_config) == ["mine"]
    folder = next(p.parent for p in tmp_path.rglob("checkpoint-2/**/adapter_model*"))
    PeftModel.from_pretrained(tiny_model("llama"), folder)


def test_statistics_on_log_steps_only() -> None:
    run = ours(config={"logging_steps": 2, "max_steps": 4})
    assert [e["step"] for e in run.log] == [2, 4]
    assert all(e.keys() >= TOKEN_KEYS for e in run.log)
    never = ours(config={"token_stats": "never", "max_steps": 2})
    assert not any(e.keys() & TOKEN_KEYS for e in never.log)


def test_performance_metrics() -> None:
    entry = ours(config={"max_steps": 2}).log[-1]
    assert entry["perf/tokens_per_sec"] > 0 and entry["perf/pairs_per_sec"] > 0
    assert entry["perf/peak_mem_gib"] > 0
    assert "perf/mfu" not in entry  # no known peak of this device


def test_best_model_and_model_card(tmp_path: Path) -> None:
    args = dpo_fast.DPOConfig(
        **config_kwargs(
            output_dir=str(tmp_path),
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="rewards/margins",
            greater_is_better=True,
        )
    )
    trainer = dpo_fast.Trainer(
        tiny_model("llama"),
        args=args,
        train_dataset=rows(),
        eval_dataset=rows(8, 2),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir()
    state = json.loads((best / "trainer_state.json").read_text())
    assert "staging" not in json.dumps(state)
    card = (best / "README.md").read_text()
    assert "2305.18290" in card and "- dpo" in card and str(tmp_path) not in card
    loaded = AutoModelForCausalLM.from_pretrained(best)
    for name, param in loaded.named_parameters():
        assert torch.equal(param, trainer.model.get_parameter(name)), name
    assert not list(tmp_path.glob(".staging*"))


def test_saved_model_is_plain(tmp_path: Path) -> None:
    run = ours(config={"max_steps": 1})
    run.trainer.save_model(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, run.trainer.model(ids).logits)
    assert run.trainer.model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_what_a_drop_in_is_read_for() -> None:
    trainer = ours(config={"max_steps": 1}).trainer
    assert {"trl", "dpo", "dpo_fast"} <= set(trainer.model.model_tags)
    assert {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(trainer.train_dataset.column_names)
    assert trainer.aux_loss_enabled is False
    assert trainer.ref_model is not None and trainer.processing_class is not None


def test_user_collator_with_labels() -> None:
    own = ours(config={"max_steps": 2, "batch_layout": "padded"})
    inner = own.trainer.data_collator.collator
    plain = ours(config={"max_steps": 2}, trainer_kwargs={"data_collator": inner})

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = inner(examples)
        batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
        return batch

    again = ours(config={"max_steps": 2}, trainer_kwargs={"data_collator": collate})
    assert torch.equal(plain.update(), again.update())
    # rows of our own collator run joined: the same to rounding
    assert relative_update_error(own, plain) < 1e-3


def test_user_loss() -> None:
    def squared(chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any) -> Any:
        return (chosen - rejected - ref_chosen + ref_rejected - 1.0) ** 2

    run = ours(config={"loss_type": [squared], "max_steps": 1})
    assert run.log[0]["loss"] == pytest.approx(1.0)


@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo"])
def test_reference_free_losses_hold_no_reference(loss: str) -> None:
    run = ours(config={"loss_type": [loss], "beta": 2.0, "max_steps": 2})
    assert run.trainer.reference is None and run.trainer.ref_model is None
    assert run.update().norm() > 0


def test_a_stream_to_evaluate_on() -> None:
    trainer = ours(config={"max_steps": 1}).trainer
    listed = rows(6, seed=3)
    stream = listed.to_iterable_dataset()
    expected, streamed = trainer.evaluate(listed), trainer.evaluate(stream)
    assert streamed["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def test_image_columns_are_refused() -> None:
    dataset = rows(4).add_column("images", [["x"]] * 4)
    with pytest.raises(ValueError, match="image"):
        ours(dataset=dataset)
