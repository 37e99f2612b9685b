"""``FastDPOTrainer``: TRL's numbers, TRL's hooks, dpo_fast's layouts and references."""

import logging
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

import dpo_fast
from dpo_fast.integrations import InterfaceChanged
from tests.tiny import tiny_model, tiny_preferences, tiny_tokenizer
from tests.trainer.cells import lora_config
from tests.trainer.parity import (
    Run,
    assert_same_log,
    config_kwargs,
    perturbed,
    relative_update_error,
    rows,
    train,
)

trl = pytest.importorskip("trl")
FastDPOTrainer = dpo_fast.integrations.FastDPOTrainer


def both(config: dict[str, Any], own: dict[str, Any], **kwargs: Any) -> tuple[Run, Run]:
    """(FastDPOTrainer's, TRL's) runs; ours with ``own`` on top."""
    model = tiny_model("llama")
    if "trainer_kwargs" not in kwargs:
        kwargs["ref_model"] = perturbed(model)
    ours = train(
        FastDPOTrainer,
        dpo_fast.DPOConfig,
        model,
        config={**config_kwargs(), **config, **own},
        **kwargs,
    )
    theirs = train(trl.DPOTrainer, trl.DPOConfig, model, config=config_kwargs(**config), **kwargs)
    return ours, theirs


CELLS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "frozen, padded": ({}, {"batch_layout": "padded"}, {}),
    "frozen, shared prefix, accumulated": (
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"batch_layout": "shared_prefix"},
        {},
    ),
    "adapter, packed": (
        {"loss_type": ["ipo"]},
        {"batch_layout": "packed"},
        {"trainer_kwargs": {"peft_config": lora_config()}},
    ),
    "precomputed": ({"precompute_ref_log_probs": True}, {}, {}),
    "moving": (
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6},
        {},
        {},
    ),
}


@pytest.mark.parametrize("cell", CELLS)
def test_same_log_and_parameters(cell: str, tmp_path: Any) -> None:
    config, own, kwargs = CELLS[cell]
    ours, theirs = both(config, {**own, "ref_cache_dir": str(tmp_path)}, **kwargs)
    assert isinstance(ours.trainer, trl.DPOTrainer) and isinstance(ours.trainer, dpo_fast.Trainer)
    assert_same_log(ours, theirs)
    assert relative_update_error(ours, theirs) <= 1e-3


def trainer_of(cls: type, args: Any = None, **kwargs: Any) -> Any:
    model = tiny_model()
    return cls(
        model=model,
        ref_model=perturbed(model),
        args=args or trl.DPOConfig(**config_kwargs(max_steps=2)),
        **{"train_dataset": rows(8), "processing_class": tiny_tokenizer(), **kwargs},
    )


def test_trls_own_configuration_evaluation_and_checkpoints(tmp_path: Any) -> None:
    """A trl.DPOConfig, raw evaluation sets, a callback, saving and exact resume."""
    seen = []

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    def make(**own: Any) -> Any:
        fields = config_kwargs(max_steps=2, save_strategy="steps", save_steps=1, **own)
        return trainer_of(
            FastDPOTrainer, trl.DPOConfig(**fields), eval_dataset=rows(8), callbacks=[Callback()]
        )

    whole = make(output_dir=str(tmp_path))
    whole.train()
    assert seen == [1, 2]
    theirs = trainer_of(trl.DPOTrainer, eval_dataset=rows(8))
    theirs.train()
    ours, expected = whole.evaluate(), theirs.evaluate()
    assert set(expected) <= set(ours)
    for key in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_entropy"):
        assert ours[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key
    given = whole.evaluate({"a": rows(4, seed=1), "b": rows(4, seed=2)})
    assert {"eval_a_loss", "eval_b_loss"} <= set(given)
    resumed = make(output_dir=str(tmp_path))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_what_subclasses_of_trls_trainer_override() -> None:
    """Data preparation, the loss and the metrics, as one writes them for TRL's trainer."""

    class Own(FastDPOTrainer):  # type: ignore[misc, valid-type]
        prepared: list[str] = []

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            self.prepared.append(args[-1])
            dataset = super()._prepare_dataset(dataset, *args)
            return dataset.map(lambda row: {"chosen_ids": [5, *row["chosen_ids"]]})

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            loss = super()._compute_loss(model, inputs, return_outputs)
            self._metrics["train"]["doubled"].append(2 * float(loss.detach()))
            return 2 * loss

    trainer = trainer_of(Own, eval_dataset={"one": rows(4)})
    assert trainer.prepared == ["train", "one"]
    assert all(ids[0] == 5 for ids in trainer.train_dataset["chosen_ids"])
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    plain = trainer_of(FastDPOTrainer)
    assert plain.train_dataset["chosen_ids"] == [
        ids[1:] for ids in trainer.train_dataset["chosen_ids"]
    ]
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["doubled"], rel=1e-6)


def test_reference_log_probs_as_trl_computes_them() -> None:
    ours, theirs = trainer_of(FastDPOTrainer), trainer_of(trl.DPOTrainer)
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(4)])
    expected = theirs.compute_ref_log_probs(theirs.ref_model, batch)
    for mine, other in zip(ours.compute_ref_log_probs(None, batch), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert ours.ref_model is not None and ours.beta == 0.2 and ours.loss_types == ["sigmoid"]
    assert not ours.precompute_ref_logps


def test_rows_that_are_tokenised_already_and_streams() -> None:
    tokenised = trainer_of(FastDPOTrainer).train_dataset.select_columns(
        ["prompt_ids", "chosen_ids", "rejected_ids"]
    )
    losses = []
    for data in (tokenised, rows(8), rows(8).to_iterable_dataset()):
        trainer = trainer_of(
            FastDPOTrainer,
            trl.DPOConfig(**config_kwargs(max_steps=1, per_device_train_batch_size=8)),
            train_dataset=data,
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-6)


def test_conversations_are_tokenised_as_trl_does() -> None:
    data = Dataset.from_list(tiny_preferences(6, conversational=True))
    with pytest.raises(ValueError, match="left none of 6 pairs with max_length=24"):
        trainer_of(FastDPOTrainer, train_dataset=data)
    ours, theirs = (
        trainer_of(cls, trl.DPOConfig(**config_kwargs(max_length=60)), train_dataset=data)
        for cls in (FastDPOTrainer, trl.DPOTrainer)
    )
    report = ours.prepare_reports["train"]
    assert report.rows_in == 6 and report.rows_out == len(ours.train_dataset) < 6
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours.train_dataset[column] == theirs.train_dataset[column]


def test_wrong_arguments_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="train_dataset is required"):
        trainer_of(FastDPOTrainer, train_dataset=None)
    with pytest.raises(TypeError, match="beta"):
        trainer_of(FastDPOTrainer, beta=0.1)
    with pytest.raises(ValueError, match="vision"):
        trainer_of(FastDPOTrainer, train_dataset=rows(4).add_column("image", [None] * 4))
    simpo = dpo_fast.DPOConfig(**config_kwargs(loss_type=["simpo"]))
    model = tiny_model()
    free = FastDPOTrainer(
        model=model, args=simpo, train_dataset=rows(4), processing_class=tiny_tokenizer()
    )
    with pytest.raises(ValueError, match="needs no reference"):
        free.compute_ref_log_probs(None, {})


def test_a_trainer_of_trl_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.DPOTrainer, "get_train_dataloader", lambda self: None, raising=False)
    with pytest.raises(InterfaceChanged, match=r"trl 1\.\S+ also overrides get_train_dataloader"):
        trainer_of(FastDPOTrainer)
    monkeypatch.undo()
    monkeypatch.setattr(trl.DPOTrainer, "_prepare_dataset", lambda self, dataset: dataset)
    with pytest.raises(InterfaceChanged, match=r"_prepare_dataset of trl 1\.\S+ takes"):
        trainer_of(FastDPOTrainer)


def test_choice_of_reference_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        trainer_of(FastDPOTrainer)
    assert "reference='frozen'" in caplog.text


def test_predict_takes_raw_rows_and_what_a_subclass_adds() -> None:
    class Own(FastDPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            self._metrics["eval"]["one"].append(1.0)
            return super()._compute_loss(model, inputs, return_outputs)

    trainer = trainer_of(Own)
    output = trainer.predict(rows(5))
    assert output.predictions.shape[0] == 10
    assert output.metrics["test_one"] == 1.0 and "test_rewards/margins" in output.metrics
    assert not trainer._metrics["eval"]  # nothing is left for the next evaluation
