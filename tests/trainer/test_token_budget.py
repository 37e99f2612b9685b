"""Token budgets in the trainer: the same optimizer steps, cut otherwise; resume; refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch

import dpo_fast
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.parity import config_kwargs, perturbed, relative_update_error, rows
from tests.trainer.test_layouts import SGD, ours


@pytest.mark.parametrize(
    ("layout", "count", "loss"),
    [
        ("padded", 24, ["sigmoid"]),
        ("packed", 21, ["bco_pair"]),  # 21: the last step has fewer pairs
        ("shared_prefix", 24, ["sigmoid"]),
        ("shared_prefix", 21, ["ipo", "sft"]),
    ],
)
def test_a_token_budget_changes_the_cut_only(layout: str, count: int, loss: list[str]) -> None:
    common = {**SGD, "loss_type": loss, "dataset": rows(count), "per_device_train_batch_size": 2}
    common |= {"gradient_accumulation_steps": 4, "batch_layout": layout}
    plain = ours(**common)
    cut = ours(max_tokens_per_batch=40, **common)
    assert relative_update_error(cut, plain) < 1e-5
    for a, b in zip(cut.log, plain.log, strict=True):
        for key in ("loss", "rewards/margins", "rewards/accuracies", "num_tokens", "epoch"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key


def test_the_budget_bounds_every_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    compute = dpo_fast.Trainer.compute_loss

    def spy(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        sizes.append((inputs["input_ids"].numel(), len(inputs["pair_index"])))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(dpo_fast.Trainer, "compute_loss", spy)
    ours(
        max_tokens_per_batch=200,
        batch_layout="shared_prefix",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_steps=2,
    )
    assert sum(pairs for _, pairs in sizes) == 24
    assert all(tokens <= 200 for tokens, _ in sizes)
    assert 2 < len(sizes) < 24 / 4  # fewer and fuller than micro-batches of four pairs


def test_resume_with_a_budget_in_mid_epoch(tmp_path: Path) -> None:
    """The same remaining batches: bit for bit the same parameters."""

    def build(**config: Any) -> Any:
        return dpo_fast.Trainer(
            tiny_model("llama"),
            perturbed(tiny_model("llama")),
            dpo_fast.DPOConfig(
                **config_kwargs(
                    output_dir=str(tmp_path),
                    max_steps=5,
                    batch_layout="shared_prefix",
                    max_tokens_per_batch=60,
                    per_device_train_batch_size=2,
                    gradient_accumulation_steps=3,
                    save_strategy="steps",
                    save_steps=2,
                    **config,
                )
            ),
            train_dataset=rows(),
            processing_class=tiny_tokenizer(),
        )

    whole = build()
    whole.train()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, param in whole.model.named_parameters():
        assert torch.equal(param, resumed.model.get_parameter(name)), name


def test_streams_are_packed_and_cut() -> None:
    common = {**SGD, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    stream = rows().to_iterable_dataset()
    plain = ours(dataset=stream, batch_layout="padded", **common)
    cut = ours(dataset=stream, max_tokens_per_batch=40, **common)
    assert cut.trainer.layout.name == "shared_prefix"
    assert relative_update_error(cut, plain) < 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0"),
        ({"max_tokens_per_batch": 64, "loss_type": ["aot"]}, "couples the pairs"),
        (
            {"max_tokens_per_batch": 64, "trainer_kwargs": {"data_collator": lambda r: r}},
            "caller's own",
        ),
    ],
)
def test_budgets_that_cannot_work_are_refused_at_construction(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours(max_steps=1, **config)
