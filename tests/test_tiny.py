"""The shared fixtures hold what the other tests take for granted."""

import pytest
import torch

from tests.tiny import (
    EOS,
    FAMILIES,
    VOCAB_SIZE,
    save_tiny,
    tiny_model,
    tiny_preferences,
    tiny_tokenizer,
)


def test_tokenizer_round_trips_and_its_template_keeps_the_prompt_a_prefix():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) <= VOCAB_SIZE
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = "the river carries warm bread, naïve 漢字\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    row = tiny_preferences(1, conversational=True)[0]
    prompt = tokenizer.apply_chat_template(
        row["prompt"], tokenize=False, add_generation_prompt=True
    )
    full = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    assert full.startswith(prompt)
    assert full.rstrip().endswith(EOS)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with_tools = tokenizer.apply_chat_template(
        row["prompt"], tools=tools, persona="x", tokenize=False
    )
    assert '"f"' in with_tools and "persona\nx" in with_tools


@pytest.mark.parametrize("family", FAMILIES)
def test_models_run_and_are_reproducible(family):
    model, same, other = (tiny_model(family, seed) for seed in (0, 0, 1))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.randint(3, VOCAB_SIZE, (2, 7))
    with torch.no_grad():
        logits, again, perturbed = (m(input_ids=ids).logits for m in (model, same, other))
    assert logits.shape == (2, 7, VOCAB_SIZE)
    assert torch.equal(logits, again)
    assert not torch.allclose(logits, perturbed, atol=1e-2)
    assert logits.std() > 0.1, "nearly uniform predictions would make every parity test pass"


def test_unknown_family_is_refused_and_overrides_reach_the_config():
    with pytest.raises(ValueError, match="rwkv"):
        tiny_model("rwkv")
    assert (
        tiny_model("llama", vocab_size=101, tie_word_embeddings=True).lm_head.weight.shape[0] == 101
    )


def test_preferences_are_ragged_and_reproducible():
    rows = tiny_preferences(30, seed=3)
    assert rows == tiny_preferences(30, seed=3) != tiny_preferences(30, seed=4)
    for column in ("prompt", "chosen", "rejected"):
        assert len({len(row[column]) for row in rows}) > 5
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_saved_folder_loads_like_a_hub_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = save_tiny(tmp_path / "model", "qwen2", seed=2)
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, value in tiny_model("qwen2", seed=2).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert AutoTokenizer.from_pretrained(path).eos_token == EOS
