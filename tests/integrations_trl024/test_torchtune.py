"""The loss for torchtune's recipes against torchtune's own functions, models and loss."""

from typing import Any

import pytest
import torch

from dpo_fast.integrations import InterfaceChanged
from dpo_fast.integrations.torchtune import FusedDPOLoss
from tests.integrations_trl024.support import NEEDED

torchtune = pytest.importorskip("torchtune", reason=f"torchtune is not installed; {NEEDED}")
V = 97


def model(name: str = "llama3") -> Any:
    from torchtune.models.llama3 import llama3
    from torchtune.models.qwen2 import qwen2

    torch.manual_seed(0)
    sizes = {
        "vocab_size": V,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 32,
        "max_seq_len": 32,
        "intermediate_dim": 64,
    }
    if name == "llama3":
        return llama3(**sizes)
    return qwen2(**sizes, tie_word_embeddings=True)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, V, (4, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, -2:] = -100
    return ids, labels


def gradients(made: Any, logps: torch.Tensor) -> list[torch.Tensor]:
    made.zero_grad()
    (logps * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    return [p.grad.clone() for p in made.parameters()]


@pytest.mark.parametrize("name", ["llama3", "qwen2, tied"])
def test_log_probs_are_those_of_its_recipes(name: str) -> None:
    from torchtune import rlhf

    ids, labels = batch()
    made = model(name)
    expected = rlhf.get_batch_log_probs(made(ids), labels)
    expected_grads = gradients(made, expected)
    loss = FusedDPOLoss(beta=0.05)
    loss.set_model_output(made)
    assert loss.linear_projection is made.output and not list(loss.parameters())
    hidden = made(ids)
    assert hidden.shape == (4, 9, 32)
    found = loss.log_probs(hidden, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients(made, found), expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_its_dpo_loss(smoothing: float) -> None:
    from torchtune.rlhf.loss import DPOLoss

    vectors = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)) * 5
    found = FusedDPOLoss(0.2, smoothing)(*vectors)
    expected = DPOLoss(0.2, smoothing)(*vectors)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_instantiated_from_a_recipes_yaml() -> None:
    from omegaconf import OmegaConf
    from torchtune import config

    component = "dpo_fast.integrations.torchtune.FusedDPOLoss"
    loss = config.instantiate(OmegaConf.create({"_component_": component, "beta": 0.05}))
    assert isinstance(loss, FusedDPOLoss)


def test_refusals() -> None:
    ids, labels = batch()
    loss = FusedDPOLoss()
    with pytest.raises(RuntimeError, match="set_model_output"):
        loss.log_probs(torch.zeros(4, 9, 32), labels)
    made = model()
    logits = made(ids)
    loss.set_model_output(made)
    with pytest.raises(ValueError, match="must be hidden states"):
        loss.log_probs(logits, labels)
    with pytest.raises(InterfaceChanged, match=r"Linear of torchtune 0\.6\.1 has no 'output'"):
        loss.set_model_output(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs more than the four vectors"):
        FusedDPOLoss(loss_type="ipo")
    from torchtune.modules.peft import LoRALinear

    made.output = LoRALinear(32, V, rank=2, alpha=4.0)
    loss.set_model_output(made)
    with pytest.raises(ValueError, match="apply_lora_to_output"):
        loss.log_probs(made(ids), labels)
