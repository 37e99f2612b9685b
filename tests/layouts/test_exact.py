"""Padded rows, packed rows and shared prefixes give one loss, one set of log-probs and gradients."""

import pytest
import torch

from dpo_fast.layouts import segment_attention_in
from tests.layouts.compare import AWKWARD, Step, collators, global_error, run_step
from tests.tiny import FAMILIES, tiny_model

# Windows shorter than the rows, so that a distance counted by place in the row would show.
CONFIGS = {
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 3.0},
    "phi3": {"sliding_window": 8},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def steps(family: str, dtype: torch.dtype, layout: str, **kwargs: object) -> tuple[Step, Step]:
    """The step of padded rows under the family's own attention, and that of ``layout``."""
    model = tiny_model(family, **CONFIGS.get(family, {})).to(dtype).train()
    moe = family == "qwen3_moe"
    made = collators(**kwargs)
    # In float64 Gemma-2's eager attention of padded rows is NaN in transformers (the mask's lowest
    # float64 overflows its float32 softmax): ours stands in for it there.
    own = model if family == "gemma2" and dtype == torch.float64 else None
    with segment_attention_in(own):
        padded = run_step(model, made["padded"](AWKWARD), aux_loss=moe)
    return padded, run_step(model, made[layout](AWKWARD), aux_loss=moe)


def assert_equal_steps(found: Step, expected: Step, tolerance: float) -> None:
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.logps, expected.logps, rtol=tolerance, atol=tolerance)
    assert global_error(found.grads, expected.grads) <= tolerance
    assert expected.logps.abs().min() > 0.1  # of these rows every sequence scores a token


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree_in_fp32(family: str, layout: str) -> None:
    padded, ours = steps(family, torch.float32, layout)
    assert_equal_steps(ours, padded, 1e-5)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree_in_fp64(family: str, layout: str) -> None:
    # Other families keep float32 islands (rotary angles, norms, router) in a float64 model.
    padded, ours = steps(family, torch.float64, layout)
    assert_equal_steps(ours, padded, 1e-10 if family == "gpt2" else 1e-6)
