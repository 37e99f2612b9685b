"""Where TRL 1.16 is wrong: what is right, and that TRL still differs (or fails)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

import dpo_fast
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.parity import both, config_kwargs, perturbed, rows, train


def ours(model: Any = None, **kwargs: Any) -> Any:
    config = config_kwargs(**kwargs.pop("config", {}))
    model = tiny_model("llama") if model is None else model
    return train(dpo_fast.Trainer, dpo_fast.DPOConfig, model, config=config, **kwargs)


def test_cache_knows_the_length_weight(tmp_path: Path) -> None:
    """TRL's key lacks ld_alpha when max_length is None: it reuses values of another weight."""
    reference = perturbed(tiny_model("llama"))
    shared = {"max_length": None, "max_steps": 1}
    columns = {}
    for alpha in (None, 0.0):
        cached = ours(
            ref_model=reference,
            config={
                **shared,
                "ld_alpha": alpha,
                "reference": "precomputed",
                "ref_cache_dir": str(tmp_path),
            },
        )
        online = ours(ref_model=reference, config={**shared, "ld_alpha": alpha})
        assert cached.log[0]["loss"] == pytest.approx(online.log[0]["loss"], rel=1e-5)
        columns[alpha] = cached.trainer.train_dataset["ref_chosen_logps"]
    assert not np.allclose(columns[None], columns[0.0])


def test_cache_does_not_know_the_learning_rate(tmp_path: Path) -> None:
    """TRL recomputes all log-probs when learning rate or output folder change."""
    computed = []
    for rate in (1e-3, 2e-3):
        run = ours(
            config={
                "learning_rate": rate,
                "max_steps": 1,
                "reference": "precomputed",
                "ref_cache_dir": str(tmp_path),
            }
        )
        computed.append(run.trainer.reference.computed)
    assert computed[0] > 0 and computed[1] == 0


def test_wpo_with_sft() -> None:
    """TRL multiplies an expanded scalar in place and raises; here likelihood stays unweighted."""
    config = config_kwargs(
        use_weighting=True, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], max_steps=1
    )
    with pytest.raises(RuntimeError):
        both(tiny_model("llama"), ref_model=perturbed(tiny_model("llama")), config=config)
    both_terms = ours(config=config).log[0]["loss"]
    weighted = ours(config={**config, "loss_type": ["sigmoid"], "loss_weights": [1.0]}).log[0][
        "loss"
    ]
    likelihood = ours(
        config={**config, "loss_type": ["sft"], "loss_weights": [0.5], "use_weighting": False}
    ).log[0]["loss"]
    assert both_terms == pytest.approx(weighted + likelihood, rel=1e-5)


def test_reference_leaves_after_precompute(tmp_path: Path) -> None:
    """TRL keeps an explicit reference in memory for the whole run; here no module is held."""
    run = ours(
        ref_model=perturbed(tiny_model("llama")),
        config={"reference": "precomputed", "ref_cache_dir": str(tmp_path), "max_steps": 1},
    )
    assert run.trainer.ref_model is None
    metrics = run.trainer.evaluate(rows(6, seed=9))  # new data after training: TRL raises
    assert np.isfinite(metrics["eval_loss"])


def test_ragged_evaluation_keeps_the_rejected_rows() -> None:
    """TRL returns 33 of 34 predictions for 17 pairs in batches of 4."""
    seen = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["rows"] = len(prediction.predictions)
        seen["labels"] = prediction.label_ids
        return {"rows": float(len(prediction.predictions))}

    trainer = dpo_fast.Trainer(
        tiny_model("llama"),
        args=dpo_fast.DPOConfig(**config_kwargs(max_length=None)),
        train_dataset=rows(8),
        eval_dataset=rows(17, seed=4),
        processing_class=tiny_tokenizer(),
        compute_metrics=metrics,
    )
    assert trainer.evaluate()["eval_rows"] == 34
    last = trainer.eval_dataset[16]
    expected = last["prompt_ids"] + last["rejected_ids"]
    assert seen["labels"][-1][: len(expected)].tolist() == expected


def test_ragged_evaluation_weighs_pairs_alike() -> None:
    """TRL averages the batches' means: one pair in a batch of its own counts as four."""
    metrics = {}
    for size in (4, 5):
        ours_now, theirs = both(
            tiny_model("llama"),
            ref_model=perturbed(tiny_model("llama")),
            config=config_kwargs(max_steps=1, per_device_eval_batch_size=size),
            trainer_kwargs={"eval_dataset": rows(5, seed=6)},
        )
        metrics[size] = [run.trainer.evaluate() for run in (ours_now, theirs)]
    for key in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        (mine, of_trl), (exact, exact_of_trl) = (
            [m[f"eval_{key}"] for m in metrics[size]] for size in (4, 5)
        )
        # margins are differences of sums near 100
        assert mine == pytest.approx(exact, rel=1e-5, abs=1e-5), key
        assert exact == pytest.approx(exact_of_trl, rel=1e-5, abs=1e-5), key
        assert abs(of_trl - exact) > 1e-3 * abs(exact), key


def test_tokenised_columns_are_accepted() -> None:
    """TRL raises KeyError('chosen')."""
    text = ours(config={"max_steps": 1})
    tokenised = text.trainer.train_dataset.select_columns(
        ["prompt_ids", "chosen_ids", "rejected_ids"]
    )
    assert isinstance(tokenised, Dataset)
    again = ours(config={"max_steps": 1}, dataset=tokenised)
    assert again.log[0]["loss"] == text.log[0]["loss"]
    assert torch.equal(again.update(), text.update())


def test_frozen_means_frozen() -> None:
    """TRL leaves requires_grad and train mode of the reference as they were."""
    reference = perturbed(tiny_model("llama")).train()
    trainer = ours(ref_model=reference, config={"max_steps": 1}).trainer
    assert not trainer.ref_model.training
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


def test_reference_is_the_policy_in_memory() -> None:
    """TRL reloads the reference from disk: edits in memory are lost, and a nameless model fails."""
    edited = perturbed(tiny_model("llama"), scale=0.1)
    run = ours(edited, config={"max_steps": 1})
    assert run.log[0]["rewards/margins"] == 0.0
