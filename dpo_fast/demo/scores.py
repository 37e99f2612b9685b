"""What a model of the demo prefers, and what it says. Plain transformers, none of dpo_fast's heads:
the judge is not the defendant.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo_fast.demo.data import Pair
from dpo_fast.demo.encode import Dialogue, encode, encode_prompt, stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS = 70


def sequence_logps(model: "PreTrainedModel", dialogues: Sequence[Dialogue], pad_id: int) -> Tensor:
    """``[B]`` float32: log-probability of each answer, its end included."""
    batch = stack(dialogues, pad_id, model.device)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = logits[:, :-1].float().log_softmax(-1)
    logps = logps.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return (logps * batch.answer_mask[:, 1:]).sum(-1)


@torch.no_grad()
def preference_margins(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[Pair]
) -> list[float]:
    """Log-probability of the chosen answer minus that of the rejected one, in nats, pair by
    pair.
    """
    model.eval()
    margins: list[float] = []
    for start in range(0, len(pairs), _ROWS):
        some = pairs[start : start + _ROWS]
        logps = [
            sequence_logps(
                model,
                [
                    encode(tokenizer, pair.prompt, answer)
                    for pair, answer in zip(some, answers, strict=True)
                ],
                tokenizer.pad_token_id,
            )
            for answers in ([pair.chosen for pair in some], [pair.rejected for pair in some])
        ]
        margins += (logps[0] - logps[1]).tolist()
    return margins


def accuracy_of(margins: Sequence[float]) -> float:
    """Share of positive margins; zero counts half."""
    return sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins)


@torch.no_grad()
def answers_of(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]
) -> list[str]:
    """What the model says to each question, greedily."""
    model.eval()
    said: list[str] = []
    for start in range(0, len(prompts), _ROWS):
        ids = [encode_prompt(tokenizer, prompt) for prompt in prompts[start : start + _ROWS]]
        batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        generate: Any = model.generate
        out = generate(
            **batch.to(model.device),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = out[:, batch["input_ids"].shape[1] :]
        said += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return said
