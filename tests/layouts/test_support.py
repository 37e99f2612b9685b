"""Which models may use which layout, and what is said when one may not."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from dpo_fast.batch import PlannedCollator
from dpo_fast.layouts import (
    PackedCollator,
    SharedPrefixCollator,
    choose_layout,
    make_collator,
    pair_lengths,
)
from dpo_fast.layouts.probe import can_probe, probe_error
from dpo_fast.layouts.support import why_not_packed, why_not_shared
from tests.tiny import FAMILIES, VOCAB_SIZE, tiny_model

NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
# Families for which packed rows would be wrong -> what is said.
REFUSED = {
    "mamba": ({"state_size": 4}, "linear_attention"),
    "jamba": ({}, "linear_attention"),
    "rwkv": ({"attention_hidden_size": 32}, "state along the row"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "llama4_text": ({"head_dim": 8, "num_local_experts": 2}, "chunked_attention"),
    "bloom": ({"n_head": 4}, "takes no position_ids"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "gptj": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
        "AttentionInterface",
    ),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 4}, "attention sinks"),
}
# Families beyond those of the exactness tests, windows shorter than the probe's rows.
ACCEPTED: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "cohere2": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4, "sliding_window": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
    },
}


def build(family: str, **overrides: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**COMMON, **overrides})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", REFUSED)
def test_architectures_that_mix_tokens_elsewhere_are_padded(family):
    overrides, reason = REFUSED[family]
    model = build(family, **overrides)
    assert reason in str(why_not_packed(model))
    for layout in ("auto", "packed", "shared_prefix"):
        choice = choose_layout(layout, model)
        assert choice.name == "padded" and reason in choice.reason


@pytest.mark.parametrize("family", [*FAMILIES, *ACCEPTED])
def test_other_families_share_prefixes(family):
    if family in ACCEPTED:
        model = build(family, **ACCEPTED[family])
    else:
        model = tiny_model(family, **NO_DROPOUT.get(family, {}))
    choice = choose_layout("shared_prefix", model)
    assert choice.name == "shared_prefix", choice.reason


def test_the_probe_finds_what_structure_does_not_show(caplog):
    """Phimoe hands a window to its attention that its masks do not have; Nemotron calls its own."""
    phimoe = build("phimoe", num_local_experts=4, sliding_window=4)
    assert why_not_packed(phimoe) is None
    assert "computes other hidden states" in str(probe_error(phimoe, PackedCollator(0)))
    nemotron = build("nemotron")
    assert why_not_packed(nemotron) is None
    assert "does not call" in str(probe_error(nemotron, SharedPrefixCollator(0)))
    with caplog.at_level(logging.WARNING, "dpo_fast"):
        assert choose_layout("shared_prefix", nemotron).name == "padded"
    assert len(caplog.records) == 1 and "does not call" in caplog.text
    assert nemotron.config._attn_implementation == "sdpa"


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    state = torch.get_rng_state()
    assert probe_error(model, SharedPrefixCollator(0)) is None
    assert model.training and not model.model.layers[1].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_probe_knows_rounding_from_error(dtype):
    model = tiny_model("llama").to(dtype)
    assert probe_error(model, SharedPrefixCollator(0)) is None

    class Blind(SharedPrefixCollator):
        def collate_pairs(self, pairs):
            batch = super().collate_pairs(pairs)
            spans = batch["pair_segments"].spans  # rejected sees one token of its prompt less
            cut = [s._replace(prefix_length=max(s.prefix_length - 1, 0)) for s in spans]
            batch["pair_segments"] = type(batch["pair_segments"])(cut)
            return batch

    assert "other hidden states" in str(probe_error(model, Blind(0)))


def test_sharded_weights_are_not_probed():
    assert can_probe(tiny_model("llama"))
    assert not can_probe(tiny_model("llama").to("meta"))


def test_dropout_keeps_prompts_apart():
    gpt2 = tiny_model("gpt2")
    assert why_not_packed(gpt2) is None and "disable_dropout" in str(why_not_shared(gpt2))
    choice = choose_layout("shared_prefix", gpt2)
    assert choice.name == "packed" and "p=0.1" in choice.reason
    llama = tiny_model("llama", attention_dropout=0.2)
    assert "p=0.2" in str(why_not_shared(llama))


def test_prompt_tuning_is_padded():
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    choice = choose_layout("packed", get_peft_model(tiny_model("llama"), config))
    assert choice.name == "padded" and "PROMPT_TUNING" in choice.reason


def test_the_callers_own_collator_is_padded(caplog):
    with caplog.at_level(logging.INFO, "dpo_fast"):
        choice = choose_layout(
            "shared_prefix", tiny_model("llama"), unsupported="the collator is own"
        )
    assert choice.name == "padded" and "own" in choice.reason
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_reference_must_allow_the_layout_too():
    llama = tiny_model("llama")
    choice = choose_layout("packed", llama, ref_model=build("rwkv", **REFUSED["rwkv"][0]))
    assert choice.name == "padded" and "Rwkv" in choice.reason
    assert choose_layout("packed", llama, ref_model=tiny_model("llama", 1)).name == "packed"


def rows(prompt: int, chosen: list[int], rejected: list[int]) -> list[dict[str, list[int]]]:
    return [
        {"prompt_ids": [1] * prompt, "chosen_ids": [2] * c, "rejected_ids": [3] * r}
        for c, r in zip(chosen, rejected, strict=True)
    ]


@pytest.mark.parametrize(
    ("data", "name", "said"),
    [
        (rows(40, [10, 30], [20, 5]), "shared_prefix", "1.93x fewer"),
        (rows(0, [10, 30], [20, 5]), "packed", "1.85x fewer"),
        (rows(1, [400, 100], [20, 50]), "packed", "2.79x fewer"),
        (rows(0, [30, 30], [30, 30]), "padded", "less than 2 percent"),
    ],
)
def test_auto_takes_the_simplest_layout_that_pays(data, name, said, caplog):
    with caplog.at_level(logging.INFO, "dpo_fast"):
        choice = choose_layout("auto", tiny_model("llama"), lengths=pair_lengths(data))
    assert choice.name == name and said in choice.reason
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert choice.reason in caplog.text


def test_auto_without_lengths_says_so():
    choice = choose_layout("auto", tiny_model("llama"))
    assert choice.name == "shared_prefix" and "not known" in choice.reason


def test_named_layouts_are_taken():
    model = tiny_model("llama")
    for layout in ("padded", "packed", "shared_prefix"):
        assert choose_layout(layout, model).name == layout
    with pytest.raises(ValueError, match="batch_layout='dense'"):
        choose_layout("dense", model)


def test_collators_of_the_layouts():
    made = {
        name: make_collator(
            choose_layout(name, tiny_model("llama")),
            pad_token_id=3,
            max_length=9,
            truncation_mode="keep_end",
            pad_to_multiple_of=4,
            few_shapes=True,
        )
        for name in ("padded", "packed", "shared_prefix")
    }
    assert isinstance(made["padded"], PlannedCollator)
    assert made["padded"].collator.pad_to_multiple_of == 4
    assert type(made["packed"]) is PackedCollator
    assert made["shared_prefix"] == SharedPrefixCollator(3, 9, "keep_end", True)
