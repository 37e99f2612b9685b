"""The brief supervised fine-tuning before DPO: the model learns to talk, and to prefer nothing."""

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from dpo_fast.demo.encode import Dialogue, stack
from dpo_fast.demo.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def finetune(
    model: "PreTrainedModel",
    dialogues: Sequence[Dialogue],
    pad_id: int,
    settings: Settings,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Next-token training of ``model``, in place, on every token of ``dialogues``.

    Args:
        dialogues: right and wrong answers in equal parts, so that neither becomes likelier.
        report: called with step and loss every fifty steps and after the last.

    Returns:
        The mean loss of the last ten steps, in nats a token.
    """
    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.sft_learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rise_and_fall(step, settings.sft_steps)
    )
    model.train()
    order: list[int] = []
    losses: list[float] = []
    for step in range(1, settings.sft_steps + 1):
        if len(order) < settings.sft_batch:
            order = rng.sample(range(len(dialogues)), len(dialogues))
        batch = stack(
            [dialogues[order.pop()] for _ in range(settings.sft_batch)], pad_id, model.device
        )
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        target = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0 or step == settings.sft_steps:
            report(step, losses[-1])
    return sum(losses[-10:]) / len(losses[-10:])


def rise_and_fall(step: int, steps: int) -> float:
    """Factor of the learning rate: up over a tenth of the steps, then down to a twentieth."""
    rise = max(1, steps // 10)
    return min((step + 1) / rise, max(0.05, (steps - step) / max(1, steps - rise)))
