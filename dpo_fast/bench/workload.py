"""Preference batches with the length statistics of real sets, and a model to train on them.

P pairs; lengths are log-normal around the means.
"""

from dataclasses import dataclass

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of prompt, chosen and rejected, and the spread (sigma of the log)."""

    prompt: float
    chosen: float
    rejected: float
    sigma: float = 0.5


LENGTHS = {
    "2:1": Lengths(194, 98, 111),  # prompt to answer about 2:1
    "4:1": Lengths(400, 98, 111),
    "1:1": Lengths(105, 98, 111),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model."""

    hidden: int = 384
    layers: int = 6
    heads: int = 6
    vocab: int = 32000


def sample_lengths(mean: float, sigma: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` log-normal lengths of the given mean, at least 2."""
    mu = np.log(mean) - sigma**2 / 2
    return np.maximum(2, np.rint(rng.lognormal(mu, sigma, count))).astype(int)


def make_rows(lengths: Lengths, count: int, vocab: int, seed: int = 0) -> list[Row]:
    """``count`` tokenised preference rows of random tokens (token 0 is left for padding)."""
    rng = np.random.default_rng(seed)
    sizes = [
        sample_lengths(mean, lengths.sigma, count, rng)
        for mean in (lengths.prompt, lengths.chosen, lengths.rejected)
    ]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: rng.integers(1, vocab, n[i]).tolist() for name, n in zip(names, sizes, strict=True)}
        for i in range(count)
    ]


def make_model(shape: ModelShape, seed: int = 0) -> LlamaForCausalLM:
    """A randomly initialised Llama of that shape, fp32, untied, SDPA attention."""
    import torch

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=max(64, 4 * shape.hidden * 2 // 3 // 64 * 64),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]  # read by PreTrainedConfig
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)
