"""The callback in TRL's DPOTrainer against TRL's own, and in a plain transformers.Trainer."""

import copy
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from dpo_fast.integrations import EmaReferenceCallback
from tests.sgd import flat
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.parity import config_kwargs, perturbed, rows

ALPHA, EVERY = 0.3, 2


def trl_run(own: bool, **config: Any) -> tuple[Any, list[float]]:
    trl = pytest.importorskip("trl")
    sync = {
        "sync_ref_model": True,
        "ref_model_mixup_alpha": ALPHA,
        "ref_model_sync_steps": EVERY,
    }
    base = config_kwargs(learning_rate=1e-2, max_steps=7, **config)
    model = tiny_model()
    trainer = trl.DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=perturbed(model),
        args=trl.DPOConfig(**base, **({} if own else sync)),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
    )
    if own:
        trainer.add_callback(EmaReferenceCallback(trainer.ref_model, alpha=ALPHA, every=EVERY))
    trainer.train()
    return trainer, [e["loss"] for e in trainer.state.log_history if "loss" in e]


def test_equals_trls_own_callback() -> None:
    """Full runs in fp32: losses of every step, policy and moved reference."""
    (ours, our_losses), (theirs, their_losses) = trl_run(True), trl_run(False)
    assert len(our_losses) == 7
    assert our_losses == pytest.approx(their_losses, rel=1e-5, abs=1e-5)
    for mine, expected in ((ours.ref_model, theirs.ref_model), (ours.model, theirs.model)):
        torch.testing.assert_close(flat(mine), flat(expected), rtol=1e-5, atol=1e-5)
    assert (flat(theirs.ref_model) - flat(perturbed(tiny_model()))).norm() > 0.1


class Snapshots(TrainerCallback):
    """The policy after each step."""

    def __init__(self) -> None:
        self.taken: dict[int, nn.Module] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.taken[state.global_step] = copy.deepcopy(kwargs["model"])


def plain_run(
    reference: nn.Module,
    folder: str,
    *,
    steps: int = 4,
    callbacks: tuple[TrainerCallback, ...] = (),
    resume: str | None = None,
    **callback: Any,
) -> EmaReferenceCallback:
    """A language model trained by transformers' Trainer, its reference moved by the callback."""
    ids = torch.randint(3, 300, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    args = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    moving = EmaReferenceCallback(reference, **{"alpha": ALPHA, "every": 1, **callback})
    trainer = Trainer(
        model=tiny_model(), args=args, train_dataset=data, callbacks=[*callbacks, moving]
    )
    trainer.train(resume_from_checkpoint=resume)
    return moving


def test_plain_trainer(tmp_path: Path) -> None:
    reference, snapshots = perturbed(tiny_model()), Snapshots()
    expected = flat(reference)
    plain_run(reference, str(tmp_path), callbacks=(snapshots,), every=EVERY)
    for step in (2, 4):
        expected = ALPHA * flat(snapshots.taken[step]) + (1 - ALPHA) * expected
    torch.testing.assert_close(flat(reference), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rounding", ["stochastic", "shadow"])
def test_bf16_reference_follows_small_updates(rounding: Any, tmp_path: Path) -> None:
    """At alpha = 1e-3 rounding to nearest stands still; the mean of the reference must not."""
    moved = {}
    for kind in ("nearest", rounding):
        reference = tiny_model().to(torch.bfloat16)
        start = flat(reference)
        callback = EmaReferenceCallback(reference, alpha=1e-3, every=1, rounding=kind)
        policy = tiny_model().to(torch.bfloat16)
        with torch.no_grad():
            for param in policy.parameters():
                param.add_(0.125)
        args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=0)
        callback.on_train_begin(args, state, None, model=policy)  # type: ignore[arg-type]
        for step in range(1, 101):
            state.global_step = step
            callback.on_step_end(args, state, None, model=policy)  # type: ignore[arg-type]
        moved[kind] = float((flat(reference) - start).mean())
    expected = 0.125 * (1 - (1 - 1e-3) ** 100)
    assert moved[rounding] == pytest.approx(expected, rel=0.05)
    assert moved["nearest"] < 0.7 * expected
    assert EmaReferenceCallback(reference).rounding == "stochastic"


@pytest.mark.parametrize("rounding", ["auto", "shadow"])
def test_resumed_equals_uninterrupted(rounding: Any, tmp_path: Path) -> None:
    def reference() -> nn.Module:
        model = perturbed(tiny_model())
        return model.to(torch.bfloat16) if rounding == "shadow" else model

    whole, folder = reference(), str(tmp_path / "whole")
    plain_run(whole, folder, rounding=rounding)
    resumed = reference()
    plain_run(resumed, folder, rounding=rounding, resume=f"{folder}/checkpoint-2")
    assert torch.equal(flat(resumed), flat(whole))
    assert not torch.equal(flat(whole), flat(reference()))


def test_resume_from_elsewhere(tmp_path: Path) -> None:
    first, second = str(tmp_path / "a"), str(tmp_path / "b")
    whole = perturbed(tiny_model())
    moving = plain_run(whole, first)
    with pytest.raises(ValueError, match=r"callback\.load"):
        plain_run(perturbed(tiny_model()), second, resume=f"{first}/checkpoint-2")
    loaded = perturbed(tiny_model())
    callback = EmaReferenceCallback(loaded)
    callback.load(f"{first}/checkpoint-4")
    assert torch.equal(flat(loaded), flat(whole))
    with pytest.raises(ValueError, match="another model"):
        EmaReferenceCallback(tiny_model("gpt2")).load(f"{first}/checkpoint-4")
    assert not list(Path(first).rglob(".tmp-*")) and moving.rounding == "nearest"


def test_refusals() -> None:
    model = tiny_model()
    with pytest.raises(TypeError, match="reference='ema'"):
        EmaReferenceCallback(None)  # type: ignore[arg-type]
    for options, message in (
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"every": 0}, "every=0"),
        ({"rounding": "up"}, "rounding='up'"),
    ):
        with pytest.raises(ValueError, match=message):
            EmaReferenceCallback(model, **options)  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=0)
    args = SimpleNamespace(output_dir=tempfile.gettempdir(), sync_ref_model=False)

    def begin(reference: nn.Module, **own: Any) -> None:
        arguments = SimpleNamespace(**{**vars(args), **own})
        EmaReferenceCallback(reference).on_train_begin(arguments, state, None, model=model)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="sync_ref_model=True"):
        begin(tiny_model(seed=1), sync_ref_model=True)
    with pytest.raises(ValueError, match=r"wte|embed_tokens"):
        begin(tiny_model("gpt2"))
    with pytest.raises(ValueError, match=r"memory|share"):
        begin(model)
    sharded = tiny_model()
    next(sharded.parameters()).ds_id = 3
    with pytest.raises(ValueError, match="sharded over ranks"):
        EmaReferenceCallback(sharded)
