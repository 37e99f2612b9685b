"""LLaMA-Factory's own CustomDPOTrainer, patched and unpatched."""

import copy
import logging
from typing import Any

import pytest
import torch
import transformers

import dpo_fast
from dpo_fast.integrations import InterfaceChanged
from tests.integrations_trl024.support import NEEDED, classic_trl
from tests.peers import absent
from tests.sgd import run, sgd_arguments
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.parity import perturbed, rows

classic_trl()
pytest.importorskip("llamafactory", reason=f"llamafactory is not installed; {NEEDED}")


@pytest.fixture(scope="module")
def peer() -> Any:
    """The module of its trainer."""
    with pytest.MonkeyPatch.context() as patched:
        absent(patched, "torchaudio")
        patched.setenv("DISABLE_VERSION_CHECK", "1")
        import llamafactory.train.dpo.trainer as module

        yield module


def tokenised() -> list[dict[str, Any]]:
    tokenizer = tiny_tokenizer()
    made = []
    for row in rows(16):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answers = [tokenizer(row[k])["input_ids"] + [2] for k in ("chosen", "rejected")]
        made.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return made


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As LLaMA-Factory's pairwise collator: chosen rows first, padded, labels -100 elsewhere."""
    pairs = [(row["prompt"], row[kind]) for kind in ("chosen", "rejected") for row in batch]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs) + 3
    out = {
        "input_ids": torch.zeros(len(pairs), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(pairs), width, dtype=torch.long),
        "labels": torch.full((len(pairs), width), -100),
    }
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        out["input_ids"][i, :end] = torch.tensor(prompt + answer)
        out["attention_mask"][i, :end] = 1
        out["labels"][i, len(prompt) : end] = torch.tensor(answer)
    return out


def trainer(
    peer: Any, *, peft: bool = False, mixin: type | None = None, lr: float = 1e-2, **pref: Any
) -> Any:
    from llamafactory.hparams import FinetuningArguments

    model: Any = copy.deepcopy(tiny_model())
    finetuning = FinetuningArguments(stage="dpo", finetuning_type="full", **pref)
    reference = perturbed(model) if finetuning.use_ref_model and not peft else None
    if peft:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        )
    cls = (
        peer.CustomDPOTrainer if mixin is None else type("Own", (mixin, peer.CustomDPOTrainer), {})
    )
    return cls(
        model=model,
        ref_model=reference,
        args=transformers.TrainingArguments(
            **sgd_arguments(max_steps=2, learning_rate=lr, remove_unused_columns=False)
        ),
        finetuning_args=finetuning,
        processor=None,
        tokenizer=tiny_tokenizer(),
        data_collator=collate,
        train_dataset=tokenised(),
    )


CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid, answers' likelihood, LD": {"pref_ftx": 0.3, "ld_alpha": 0.4},
    # means over tokens have small gradients: at 1e-2 the rounding of the stored weights shows
    "ipo": {"pref_loss": "ipo", "lr": 0.1},
    "simpo": {"pref_loss": "simpo", "lr": 0.1},
    "orpo": {"pref_loss": "orpo"},
    "adapter": {"peft": True},
}


@pytest.mark.parametrize("case", CASES)
def test_same_losses_and_parameters(peer: Any, case: str) -> None:
    expected, expected_update = run(trainer(peer, **CASES[case]))
    with dpo_fast.patch("llamafactory"):
        log, update = run(trainer(peer, **CASES[case]))
    assert len(log) == len(expected) == 2
    for mine, theirs in zip(log, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() & {"loss", "rewards/margins", "logps/chosen", "odds_ratio_loss"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=2e-4), key
    assert expected_update.norm() > 1e-4
    assert (update - expected_update).norm() <= 1e-5 * expected_update.norm()


def test_as_a_mixin(peer: Any) -> None:
    from dpo_fast.integrations.llamafactory import FastDPOMixin

    expected, ours = trainer(peer), trainer(peer, mixin=FastDPOMixin)
    batch = collate(tokenised()[:4])
    theirs = expected.concatenated_forward(expected.model, dict(batch))
    mine = ours.concatenated_forward(ours.model, dict(batch))
    assert mine.keys() == theirs.keys() and mine["chosen_logits"].dim() == 0
    for key in ("chosen_logps", "rejected_logps", "chosen_logps_avg"):
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=2e-5)
    scored = batch["labels"][:4, 1:] != -100
    mean = theirs["chosen_logits"][:, :-1][scored].mean()
    torch.testing.assert_close(mine["chosen_logits"], mean, rtol=1e-4, atol=1e-5)


def test_other_inputs_than_text_are_left_alone(peer: Any, caplog: pytest.LogCaptureFixture) -> None:
    batch = {**collate(tokenised()[:4]), "cache_position": torch.arange(200)}
    with caplog.at_level(logging.INFO, logger="dpo_fast"), dpo_fast.patch("llamafactory"):
        made = trainer(peer)
        batch["cache_position"] = torch.arange(batch["input_ids"].shape[1])
        out = made.concatenated_forward(made.model, batch)
    assert out["chosen_logits"].dim() == 3
    assert "llamafactory 0.9.5: the batch has cache_position" in caplog.text


def test_patch_and_restore(peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = peer.CustomDPOTrainer.concatenated_forward
    with dpo_fast.patch("llamafactory"):
        assert peer.CustomDPOTrainer.concatenated_forward is not original
    assert peer.CustomDPOTrainer.concatenated_forward is original
    monkeypatch.setattr(peer.CustomDPOTrainer, "concatenated_forward", lambda self, batch: {})
    with pytest.raises(InterfaceChanged, match=r"llamafactory 0\.9\.5 takes \(self, batch\)"):
        dpo_fast.patch("llamafactory")
