"""A reference of its own: frozen really, exact, and refused when it cannot be one."""

from typing import Any

import peft
import pytest
import torch

from dpo_fast.models import head_of
from dpo_fast.reference.checks import check_finite
from dpo_fast.reference.frozen import FrozenReference, frozen_copy
from dpo_fast.reference.protocol import Reference
from dpo_fast.reference.scored import Scoring
from tests.reference.common import from_hidden, perturb, plain_logps, planned_batch
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_answers_as_the_policy_was(family: str) -> None:
    policy = tiny_model(family)
    batch = planned_batch()
    expected = plain_logps(policy, batch)
    reference = FrozenReference.copy_of(policy)
    perturb(policy)
    got = reference.logps(batch)
    assert got.dtype == torch.float32 and got.shape == (8,) and not got.requires_grad
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(from_hidden(reference, batch), got, rtol=1e-6, atol=1e-6)


def test_edits_in_memory_are_in_the_copy() -> None:
    policy = tiny_model()
    policy.resize_token_embeddings(330)
    perturb(policy)
    expected = plain_logps(policy, planned_batch())
    reference = FrozenReference.copy_of(policy)
    perturb(policy, seed=2)
    torch.testing.assert_close(
        reference.logps(planned_batch()).double(), expected, rtol=2e-6, atol=2e-5
    )


def test_frozen_really() -> None:
    """A given reference in train mode, trainable, with dropout answers like one without."""
    policy, given = tiny_model(), tiny_model(seed=1, attention_dropout=0.5)
    expected = plain_logps(given, planned_batch())
    given.train()
    reference = FrozenReference(given, policy)
    assert reference.module is given and not any(m.training for m in given.modules())
    assert not any(p.requires_grad for p in given.parameters())
    given.train()  # somebody switches it back
    torch.testing.assert_close(
        reference.logps(planned_batch()).double(), expected, rtol=2e-6, atol=2e-5
    )
    assert isinstance(reference, Reference)


def test_ld_alpha_weighs_the_reference_too() -> None:
    policy = tiny_model()
    for alpha in (0.0, 0.3, 1.0):
        reference = FrozenReference.copy_of(policy, scoring=Scoring(ld_alpha=alpha))
        expected = plain_logps(policy, planned_batch(), ld_alpha=alpha)
        torch.testing.assert_close(
            reference.logps(planned_batch()).double(), expected, rtol=2e-6, atol=2e-5
        )


def test_token_logps_are_unweighted() -> None:
    reference = FrozenReference.copy_of(tiny_model(), scoring=Scoring(ld_alpha=0.0))
    batch = planned_batch()
    sums = reference.token_logps(batch).split(batch["seq_lens"])
    torch.testing.assert_close(
        torch.stack([s.sum() for s in sums]),
        FrozenReference.copy_of(reference.model).logps(batch),
        rtol=1e-5,
        atol=1e-5,
    )


def test_own_dtype_is_cast_while_copying() -> None:
    policy = tiny_model()
    policy.model.norm.weight.data = policy.model.norm.weight.data.double()  # an island
    reference = FrozenReference.copy_of(policy, dtype=torch.bfloat16)
    assert reference.model.lm_head.weight.dtype == torch.bfloat16
    assert reference.model.model.norm.weight.dtype == torch.float64
    assert policy.lm_head.weight.dtype == torch.float32
    assert "bfloat16" in reference.describe()
    policy = tiny_model()
    batch = planned_batch()
    half = FrozenReference.copy_of(policy, dtype=torch.bfloat16).logps(batch)
    assert 0 < (half - plain_logps(policy, batch)).abs().max() < 1.0


def test_tied_weights_stay_tied_in_the_copy() -> None:
    policy = tiny_model(tie_word_embeddings=True)
    for dtype in (None, torch.bfloat16):
        duplicate: Any = frozen_copy(policy, dtype)
        assert duplicate.lm_head.weight is duplicate.model.embed_tokens.weight
        assert duplicate.lm_head.weight is not policy.lm_head.weight


def test_a_model_that_cannot_be_copied_says_so() -> None:
    policy = tiny_model()
    policy.cached = policy.lm_head.weight * 2  # a tensor with a history
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be copied.*give ref_model"):
        FrozenReference.copy_of(policy)


def test_a_peft_policy_can_be_copied() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(tiny_model(), config)
    perturb(policy)
    expected = plain_logps(policy, planned_batch())
    reference = FrozenReference.copy_of(policy)
    perturb(policy, seed=2)
    torch.testing.assert_close(
        reference.logps(planned_batch()).double(), expected, rtol=2e-6, atol=2e-5
    )


def test_another_softcap_or_scale_gets_a_head_pass_of_its_own() -> None:
    """The one-pass op has one softcap and one scale for both."""
    policy = tiny_model("gemma2")
    given = tiny_model("gemma2", seed=1, final_logit_softcapping=9.0)
    expected = plain_logps(given, planned_batch())
    reference = FrozenReference(given, policy)
    assert head_of(given).softcap == 9.0 and reference.hidden(planned_batch()) is None
    torch.testing.assert_close(
        reference.logps(planned_batch()).double(), expected, rtol=2e-6, atol=2e-5
    )


def test_refusals() -> None:
    policy = tiny_model()
    with pytest.raises(ValueError, match="same object"):
        FrozenReference(policy, policy)
    with pytest.raises(ValueError, match=r"320 input and 320 output.*336 and 336.*resize"):
        FrozenReference(tiny_model(vocab_size=336), policy)
    broken = tiny_model(seed=1)
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    broken.model.norm.weight.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight' \(and 1 more\)"):
        FrozenReference(broken, policy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_every_place_and_dtype_of_a_broken_weight_is_seen(dtype: torch.dtype, value: float) -> None:
    layer = torch.nn.Linear(37, 5).to(dtype)
    check_finite(layer, "policy")
    for position in (0, 90, 37 * 5 - 1):
        kept = layer.weight.data.view(-1)[position].item()
        layer.weight.data.view(-1)[position] = value
        with pytest.raises(ValueError, match="policy's weight 'weight'"):
            check_finite(layer, "policy")
        layer.weight.data.view(-1)[position] = kept


def test_a_fixed_reference_refuses_a_moving_ones_state() -> None:
    reference = FrozenReference.copy_of(tiny_model())
    assert reference.state_dict() == {}
    reference.load_state_dict({})
    with pytest.raises(ValueError, match="reference='ema'"):
        reference.load_state_dict({"x": torch.zeros(1)})
