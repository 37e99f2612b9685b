"""TRL's own trainers, patched and unpatched: the same losses and parameters, in fp32."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

import dpo_fast
from dpo_fast.integrations.trl import FusedLogProbs
from tests.sgd import STEPS, run, sgd_arguments
from tests.tiny import tiny_model, tiny_preferences, tiny_tokenizer
from tests.trainer.parity import perturbed, rows

trl = pytest.importorskip("trl")


def dpo(model: Any, **own: Any) -> Any:
    return trl.DPOTrainer(
        model=model,
        ref_model=perturbed(model),
        args=trl.DPOConfig(**sgd_arguments(max_length=24, **own)),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
    )


def sft(model: Any) -> Any:
    data = [{"text": row["prompt"] + row["chosen"]} for row in tiny_preferences(16)]
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**sgd_arguments(max_length=24)),
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_tokenizer(),
    )


def kto(model: Any) -> Any:
    data = [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in tiny_preferences(8)
        for key in ("chosen", "rejected")
    ]
    return trl.KTOTrainer(
        model=model,
        ref_model=perturbed(model),
        args=trl.KTOConfig(**sgd_arguments(max_length=24)),
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_tokenizer(),
    )


def grpo(model: Any) -> Any:
    """One step that samples; a reference, and the entropy bonus that carries a gradient."""

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 7) for text in completions]

    data = [{"prompt": row["prompt"][:20]} for row in tiny_preferences(4)]
    folder = tempfile.mkdtemp()  # TRL reloads the reference from where the policy came from
    perturbed(model).save_pretrained(folder)
    model.config._name_or_path = folder
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=length,
        args=trl.GRPOConfig(
            **sgd_arguments(
                max_steps=1,
                num_generations=2,
                max_completion_length=6,
                beta=0.1,
                entropy_coef=0.05,
                temperature=0.8,
            )
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=tiny_tokenizer(),
    )


def trained(make: Callable[[Any], Any], family: str) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """What one run logged, and how far it moved every parameter, as one float64 vector."""
    torch.manual_seed(0)
    model = copy.deepcopy(tiny_model(family))
    return run(make(model))


CASES = [(dpo, "llama"), (dpo, "gemma2"), (sft, "llama"), (kto, "llama"), (grpo, "llama")]


@pytest.mark.parametrize(("make", "family"), CASES)
def test_same_losses_and_parameters(
    make: Callable[[Any], Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    apply = FusedLogProbs.apply

    def counted(self: FusedLogProbs, *args: Any) -> Any:
        calls.append(len(args))
        return apply(self, *args)

    monkeypatch.setattr(FusedLogProbs, "apply", counted)
    expected, expected_update = trained(make, family)
    assert not calls
    with dpo_fast.patch("trl"):
        log, update = trained(make, family)
    assert calls, "TRL never called the adapter"
    assert len(log) == len(expected) == (1 if make is grpo else STEPS)
    for mine, theirs in zip(log, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() & {"loss", "entropy", "mean_token_accuracy", "logits/chosen", "kl"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key
    assert expected_update.norm() > 1e-4
    assert (update - expected_update).norm() <= 1e-5 * expected_update.norm()
