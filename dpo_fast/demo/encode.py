"""Pairs of text to tensors. P pairs, B dialogues, T padded length."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Dialogue(NamedTuple):
    """Token ids of a question with the start of its answer, and of the answer with its end."""

    prompt: list[int]
    answer: list[int]


def encode(tokenizer: "PreTrainedTokenizerBase", prompt: str, answer: str) -> Dialogue:
    """A question and its answer in the chat template."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    ids: Any = tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids[: len(prompt_ids)] == prompt_ids
    return Dialogue(prompt_ids, ids[len(prompt_ids) :])


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """A question, up to where the model goes on."""
    turn = [{"role": "user", "content": prompt}]
    ids: Any = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    return ids


class Batch(NamedTuple):
    """``input_ids``, ``attention_mask``, ``answer_mask``: ``[B, T]``, padded on the right."""

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor


def stack(dialogues: Sequence[Dialogue], pad_id: int, device: torch.device) -> Batch:
    """Pad ``dialogues`` to one length."""
    longest = max(len(d.prompt) + len(d.answer) for d in dialogues)
    shape = (len(dialogues), longest)
    ids = torch.full(shape, pad_id)
    attended, answers = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for i, (prompt, answer) in enumerate(dialogues):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        attended[i, :end] = 1
        answers[i, len(prompt) : end] = 1
    return Batch(ids.to(device), attended.to(device), answers.to(device))
