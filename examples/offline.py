"""What the examples train when no model is named: a small random Llama that reads single bytes,
and questions with a right and a wrong answer. Nothing is downloaded. The wrong answers hedge, which
such a model learns to tell apart within seconds; it does not learn to compare numbers."""

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

# What each example tells the trainer; bf16 pays on a GPU only.
ARGUMENTS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 8,
    "max_steps": 30,
    "logging_steps": 10,
    "bf16": torch.cuda.is_available(),
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
}


def pairs(count: int = 256) -> Dataset:
    """Preference pairs: which of two numbers is larger?"""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        low, high = sorted(rng.sample(range(10, 100), 2))
        asked = rng.sample((low, high), 2)
        question = f"Which is larger, {asked[0]} or {asked[1]}?"
        rows.append({"prompt": question, "chosen": f" {high}.", "rejected": f" {low}, I think."})
    return Dataset.from_list(rows)


def model_and_tokenizer(path: str | None = None) -> tuple[Any, Any]:
    """The causal LM and tokenizer of a folder or hub name, or the small ones made here."""
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    vocabulary = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: i for i, token in enumerate(vocabulary)}
    bytewise = Tokenizer(models.BPE(vocab=ids, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, **special)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    tokens = {"vocab_size": len(ids), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    fields: dict[str, Any] = {**shape, **tokens, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**fields)), tokenizer
