"""Rows padded on the right are attended without a mask: the same numbers, and only there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from dpo_fast.batch import RIGHT_PADDED_KEY, TokenPlan, is_right_padded
from dpo_fast.models import forward_scored, install_scoring
from dpo_fast.models.right_padded import causal_without_mask
from tests.layouts.compare import AWKWARD, collators
from tests.tiny import FAMILIES, tiny_model

CONFIGS: dict[str, dict[str, Any]] = {
    **{family: {} for family in FAMILIES},
    "mistral, a short window": {"sliding_window": 4},
    "gemma2, a short window": {"sliding_window": 4},
}


def scored(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Hidden states of the scored tokens, and what their random sum gives to every parameter."""
    hidden = forward_scored(model, batch, lambda hidden, head: hidden).value
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    used = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad((hidden * weight).sum(), used, allow_unused=True)
    return hidden.detach(), [g for g in grads if g is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_hidden_states_and_gradients(name: str) -> None:
    model = tiny_model(name.partition(",")[0], **CONFIGS[name]).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    install_scoring(model)
    batch = collators()["padded"](AWKWARD)
    assert batch[RIGHT_PADDED_KEY] and not batch["attention_mask"].all()
    found, grads = scored(model, batch)
    right, expected = scored(model, {**batch, RIGHT_PADDED_KEY: False})
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    total = torch.stack([g.norm() for g in expected]).norm()
    assert total > 1.0
    for one, other in zip(grads, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * total


def masks_of(name: str, batch: dict[str, Any], **config: Any) -> list[Tensor | None]:
    """The masks that the layers of a model get."""
    model = tiny_model(name, **config)
    install_scoring(model)
    seen: list[Tensor | None] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["attention_mask"])

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        forward_scored(model, batch, lambda hidden, head: hidden)
    return seen


def test_only_full_causal_layers_go_without() -> None:
    batch = collators()["padded"](AWKWARD)
    batch.pop("row_groups", None)
    assert masks_of("llama", batch) == [None, None]
    assert None not in masks_of("llama", {**batch, RIGHT_PADDED_KEY: False})
    assert None not in masks_of("mistral", batch, sliding_window=4)
    assert masks_of("mistral", batch, sliding_window=400) == [None, None]
    assert None not in masks_of("gemma2", batch, attn_implementation="eager")


def test_left_padding_is_told_apart() -> None:
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert is_right_padded(right) and is_right_padded(right[1:2])
    assert not is_right_padded(right.flip(1)) and not is_right_padded(torch.tensor([[1, 0, 1]]))


def test_transformers_is_left_as_it_was() -> None:
    usual = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    local = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
    with pytest.raises(RuntimeError, match="inside"), causal_without_mask(True):
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not usual
        with causal_without_mask(True):
            pass
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not usual
        raise RuntimeError("inside")
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is usual
    assert ALL_MASK_ATTENTION_FUNCTIONS._local_mapping == local
    plan = TokenPlan.from_batch(collators()["packed"](AWKWARD))
    assert plan.num_tokens > 0 and RIGHT_PADDED_KEY not in collators()["packed"](AWKWARD)
