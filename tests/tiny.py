"""Tiny real models, a real tokenizer and ragged preference rows, made from configs and sentences.

Nothing is downloaded. The models are transformers' own classes with random weights large enough
that log-probabilities differ from token to token; the tokenizer is a byte-level BPE with a ChatML
template (Qwen-like: EOS ``<|im_end|>``).
"""

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "qwen3_moe", "phi3", "gpt2")
VOCAB_SIZE = 320

PAD, EOS, IM_START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"

# Each message ends with EOS and a newline, as in ChatML. `tools` is read, and `persona`, an extra
# variable that comes from chat_template_kwargs.
CHAT_TEMPLATE = (
    "{%- if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif -%}"
    "{%- if persona is defined %}<|im_start|>persona\n{{ persona }}<|im_end|>\n{% endif -%}"
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if message['content'] else '' }}"
    "{%- if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif -%}"
    "<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)

_SUBJECTS = (
    "the river",
    "a small robot",
    "my neighbour",
    "the old library",
    "a cautious pilot",
    "rain",
)
_VERBS = ("carries", "repairs", "remembers", "explains", "paints", "follows")
_OBJECTS = (
    "three copper coins",
    "the broken clock",
    "a letter",
    "every map",
    "warm bread",
    "the northern road",
)
_TAILS = (
    "before sunrise",
    "without a word",
    "for the children",
    "in the quiet harbour",
    "again",
    "twice a week",
)


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS, _TAILS))


def tiny_tokenizer(*, padding_side: str = "right") -> Any:
    """A fast tokenizer of at most VOCAB_SIZE tokens, with pad, EOS and a chat template.

    Each call gives a fresh object.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[IM_START],
        padding_side=padding_side,
        model_max_length=100_000,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@lru_cache(maxsize=1)
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, IM_START, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator([_sentence(rng) for _ in range(200)], trainer)
    return tokenizer.to_str()


def tiny_model(family: str = "llama", seed: int = 0, **config_overrides: Any) -> Any:
    """A random fp32 causal LM of `family` in eval mode: 2 layers, hidden 32, VOCAB_SIZE tokens.

    Equal arguments give equal weights; another `seed` gives a model that differs everywhere
    (a perturbed reference).
    Raises ValueError for a family that is not in FAMILIES.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    config = AutoConfig.for_model(family, **{**_config_fields(family), **config_overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if family == "qwen3_moe" and hasattr(model, "set_experts_implementation"):
        # the grouped GEMM crashes in fp64 on a CPU (transformers 4 has no such choice)
        model.set_experts_implementation("eager")
    return model.eval()


def _config_fields(family: str) -> dict[str, Any]:
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "initializer_range": 0.15,
    }
    if family == "gpt2":
        return {**common, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    fields = {
        **common,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    if family in ("qwen3", "qwen3_moe", "gemma2"):
        fields["head_dim"] = 8
    if family == "gemma2":
        fields |= {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}
    if family == "qwen3_moe":
        fields |= {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
        fields |= {"output_router_logits": True, "router_aux_loss_coef": 0.01}
    return fields


def tiny_preferences(
    n: int, seed: int = 0, *, conversational: bool = False
) -> list[dict[str, Any]]:
    """`n` rows of prompt, chosen and rejected: 1 to 3 sentences a prompt, 1 to 4 an answer.

    The two answers of a row are never equal.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        prompt, chosen, rejected = (
            ". ".join(_sentence(rng) for _ in range(rng.randint(1, most))) for most in (3, 4, 4)
        )
        if chosen == rejected:
            rejected += " instead"
        if conversational:
            row: dict[str, Any] = {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        else:
            row = {"prompt": prompt + "?", "chosen": " " + chosen, "rejected": " " + rejected}
        rows.append(row)
    return rows


def save_tiny(
    path: str | Path, family: str = "llama", seed: int = 0, **config_overrides: Any
) -> str:
    """Writes model and tokenizer to the folder `path`, to be loaded with `from_pretrained`."""
    tiny_model(family, seed, **config_overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)
