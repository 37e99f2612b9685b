"""Padded rows, packed rows and shared prefixes: one loss, one set of log-probs and gradients."""

import pytest
import torch

from dpo_fast.layouts import segment_attention_in
from dpo_fast.models import SegmentsIgnored, forward_scored, install_scoring
from tests.layouts.compare import AWKWARD, Step, collators, global_error, run_step
from tests.tiny import FAMILIES, tiny_model

# Windows shorter than the rows, so that a distance counted by place in the row would show.
CONFIGS = {
    "mistral": {"sliding_window": 8},
    # sdpa of transformers before 5.23, its default there, leaves the softcap out
    "gemma2": {
        "sliding_window": 8,
        "attn_logit_softcapping": 3.0,
        "attn_implementation": "eager",
    },
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


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_runs_the_same_attention_again(layout: str, reentrant: bool) -> None:
    model = tiny_model("mistral", **CONFIGS["mistral"]).train()
    batch = collators()[layout](AWKWARD)
    plain = run_step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = batch["pair_segments"].num_calls
    again = run_step(model, batch)
    assert batch["pair_segments"].num_calls == calls + 4  # two layers, forward and backward
    assert_equal_steps(again, plain, 1e-6)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_adapters_train_the_same(layout: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("qwen2"), config).train()
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.3)
    made = collators()
    padded, ours = (run_step(model, made[name](AWKWARD)) for name in ("padded", layout))
    assert len(padded.grads) == 2 * 2 * 7
    assert_equal_steps(ours, padded, 1e-5)


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncated_rows_agree(layout: str, mode: str) -> None:
    padded, ours = steps("llama", torch.float32, layout, max_length=24, truncation_mode=mode)
    assert_equal_steps(ours, padded, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_filling_changes_nothing(family: str) -> None:
    model = tiny_model(family, **CONFIGS.get(family, {})).train()
    made = collators()["shared_prefix"]
    plain = run_step(model, made(AWKWARD), aux_loss=family == "qwen3_moe")
    made.few_shapes = True
    filled = run_step(model, made(AWKWARD), aux_loss=family == "qwen3_moe")
    assert_equal_steps(filled, plain, 1e-5)


def test_router_statistics_count_a_shared_prompt_twice() -> None:
    """The load balancing loss is that of padded rows: both rows of a pair hold the prompt."""
    padded, ours = steps("qwen3_moe", torch.float32, "shared_prefix")
    assert ours.aux_loss is not None and float(padded.aux_loss) > 0.1
    torch.testing.assert_close(ours.aux_loss, padded.aux_loss, rtol=1e-6, atol=0)
    model = tiny_model("qwen3_moe").train()
    once = collators()["shared_prefix"](AWKWARD)
    once["attention_mask"] = once["attention_mask"].clamp(max=1)
    other = run_step(model, once, aux_loss=True).aux_loss
    assert abs(float(other / padded.aux_loss) - 1) > 1e-5


def test_compiled_models_agree() -> None:
    model = tiny_model("llama").train()
    batch = collators()["shared_prefix"](AWKWARD)
    plain = run_step(model, batch)
    compiled = torch.compile(model, backend="eager")
    again = run_step(compiled, batch)
    grads = {name.removeprefix("_orig_mod."): grad for name, grad in again.grads.items()}
    assert_equal_steps(again._replace(grads=grads), plain, 1e-5)


def test_packed_rows_outside_the_attention_are_refused() -> None:
    model = tiny_model("llama")
    install_scoring(model)
    batch = collators()["shared_prefix"](AWKWARD)
    with pytest.raises(SegmentsIgnored, match="segment_attention_in"):
        forward_scored(model, batch, lambda hidden, head: hidden)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_no_mask_of_the_whole_row_is_made(family: str) -> None:
    model = tiny_model(family, **CONFIGS.get(family, {}))
    seen = []
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
            )
    run_step(model, collators()["shared_prefix"](AWKWARD))
    assert len(seen) == 2
    for args, kwargs in seen:
        masks = [x for x in (*args, *kwargs.values()) if getattr(x, "dtype", None) == torch.bool]
        assert [mask.numel() for mask in masks] == [1]
