"""``dpo_fast.patch("trl")`` in TRL 0.24: the same dict, losses, metrics and parameters."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dpo_fast
from dpo_fast.integrations import InterfaceChanged
from dpo_fast.integrations.trl_classic import LIGER, MODULE
from tests.integrations_trl024.support import classic_trl, trainer
from tests.sgd import run

trl = classic_trl()
dpo_trainer = __import__(MODULE, fromlist=["DPOTrainer"])
METHOD = trl.DPOTrainer.concatenated_forward
KEYS = ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected")
LOGITS = ("logits/chosen", "logits/rejected")


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    dpo_fast.unpatch("trl")
    assert trl.DPOTrainer.concatenated_forward is METHOD


@pytest.fixture
def accelerate_state() -> Iterator[None]:
    """accelerate keeps the first mixed precision of a process, in a variable and in a singleton."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def outputs(made: Any, is_ref_model: bool = False) -> tuple[dict[str, Any], torch.Tensor]:
    """The method's dict for the first batch, and the gradient of a sum of what carries one."""
    batch = next(iter(made.get_train_dataloader()))
    made.model.zero_grad()
    out = made.concatenated_forward(made.model, batch, is_ref_model=is_ref_model)
    weights = torch.linspace(-1.0, 1.0, 4)
    total = (out["chosen_logps"] * weights).sum() + (out["rejected_logps"] * weights.flip(0)).sum()
    for name in ("nll_loss", "aux_loss"):
        total = total + out[name] if name in out else total
    total.backward()
    grads = [p.grad.double().flatten() for p in made.model.parameters() if p.grad is not None]
    return out, torch.cat(grads)


CASES: dict[str, dict[str, Any]] = {
    "keep_end": {"truncation_mode": "keep_end"},
    "keep_start": {"truncation_mode": "keep_start"},
    "no truncation": {"max_length": None, "max_prompt_length": None},
    "ipo": {"loss_type": "ipo"},
    "rpo": {"rpo_alpha": 0.5},
    "padding free": {"padding_free": True},
    "logits to keep": {"use_logits_to_keep": True},
    "experts": {"family": "qwen3_moe"},
    "softcap": {"family": "gemma2"},
    "adapter, on the head as well": {"peft": True},
}


@pytest.mark.parametrize("case", CASES)
def test_same_dict_and_gradient(case: str) -> None:
    options = CASES[case]
    expected, expected_grad = outputs(trainer(**options))
    with dpo_fast.patch("trl"):
        found, grad = outputs(trainer(**options))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=2e-5)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()


TRAININGS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "several losses": {
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
    },
    "adapter": {"peft": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "moving": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "checkpointed, accumulated": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", TRAININGS)
def test_same_training(case: str) -> None:
    expected, expected_update = run(trainer(**TRAININGS[case]))
    with dpo_fast.patch("trl"):
        log, update = run(trainer(**TRAININGS[case]))
    assert len(log) == len(expected) == 3
    for mine, theirs in zip(log, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key in (*KEYS, *LOGITS):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key
    assert expected_update.norm() > 1e-4
    assert (update - expected_update).norm() <= 1e-5 * expected_update.norm()


@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_zero"])
def test_in_the_place_of_ligers_loss(loss_type: str) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1", "Liger would compile for minutes"
    options = {"use_liger_loss": True, "loss_type": loss_type}
    original = getattr(dpo_trainer, LIGER)
    expected, expected_update = run(trainer(**options))
    with dpo_fast.patch("trl"):
        assert isinstance(trainer(**options).dpo_loss_fn, dpo_fast.FusedLinearDPOLoss)
        log, update = run(trainer(**options))
    assert getattr(dpo_trainer, LIGER) is original
    for mine, theirs in zip(log, expected, strict=True):
        for key in (*KEYS, *LOGITS):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key
    assert (update - expected_update).norm() <= 1e-5 * expected_update.norm()


@pytest.mark.parametrize("prepared", [True, False])
def test_bf16_mixed_precision(prepared: bool, accelerate_state: None) -> None:
    """accelerate's autocast holds although scoring goes past the forward that it wraps."""

    def made(bf16: bool) -> Any:
        one = trainer(bf16=bf16)
        if prepared:
            one.model = one.accelerator.prepare_model(one.model)
        return one

    gold, rough = outputs(made(False)), outputs(made(True))
    with dpo_fast.patch("trl"):
        ours = outputs(made(True))
    for key in ("chosen_logps", "rejected_logps"):
        error, allowed = ((out[0][key] - gold[0][key]).abs().max() for out in (ours, rough))
        assert (error > 1e-3) == (allowed > 1e-3) == prepared
        assert error <= 2 * allowed + 1e-3
        assert ours[0][key].dtype == torch.float32


@pytest.mark.parametrize("option", [{"use_weighting": True}, {"ld_alpha": 0.5}])
def test_what_is_left_to_trl_is_said_once(
    option: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    expected = outputs(trainer(**option))
    with caplog.at_level(logging.INFO, logger="dpo_fast"), dpo_fast.patch("trl"):
        made = trainer(**option)
        found = outputs(made)
        outputs(made)
    assert torch.equal(found[1], expected[1])
    lines = [r for r in caplog.messages if "leaves concatenated_forward to trl 0." in r]
    assert len(lines) == 1 and next(iter(option)) in lines[0]


def test_patched_twice_restored_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dpo_fast"):
        dpo_fast.patch("trl")
    assert "trl 0." in caplog.text and "concatenated_forward" in caplog.text
    patched = trl.DPOTrainer.concatenated_forward
    assert patched is not METHOD and not dpo_fast.patch("trl").applied
    assert trl.DPOTrainer.concatenated_forward is patched
    with pytest.raises(ValueError, match="backend='auto'"):
        dpo_fast.patch("trl", backend="naive")
    dpo_fast.unpatch("trl")
    assert trl.DPOTrainer.concatenated_forward is METHOD


def test_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(trl.DPOTrainer, "concatenated_forward", lambda self, model, batch: {})
        with pytest.raises(InterfaceChanged, match=r"of trl 0\.\S+ takes \(self, model, batch\)"):
            dpo_fast.patch("trl")
    with monkeypatch.context() as patched:
        patched.setattr(dpo_trainer, LIGER, type("L", (), {"__init__": lambda self, beta: None}))
        with pytest.raises(InterfaceChanged, match=f"{LIGER} of trl .* takes no ignore_index"):
            dpo_fast.patch("trl")
