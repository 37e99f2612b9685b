"""Batches, rows and the plain way to score them, for the tests of the references."""

import random
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.batch import PlannedCollator, TokenPlan
from dpo_fast.data.collate import DataCollatorForPreference
from tests.tiny import VOCAB_SIZE


def token_rows(n: int, seed: int = 0, longest: int = 12) -> list[dict[str, list[int]]]:
    """`n` tokenised pairs of ragged lengths; the first row has an answer of one token."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(low, high))]

    rows = [
        {
            "prompt_ids": ids(1, longest),
            "chosen_ids": ids(1, longest),
            "rejected_ids": ids(1, longest),
        }
        for _ in range(n)
    ]
    rows[0]["chosen_ids"] = rows[0]["chosen_ids"][:1]
    return rows


def collator(max_length: int | None = None, **kwargs: Any) -> PlannedCollator:
    return PlannedCollator(
        DataCollatorForPreference(pad_token_id=0, max_length=max_length, **kwargs)
    )


def planned_batch(n: int = 4, seed: int = 0, max_length: int | None = None) -> dict[str, Any]:
    return collator(max_length)(token_rows(n, seed))


@torch.no_grad()
def plain_logps(model: nn.Module, batch: dict[str, Any], ld_alpha: float | None = None) -> Tensor:
    """Sums of the completions' log-probs `[S]` from the model's own logits, in eval mode."""
    training = model.training
    model.eval()
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    model.train(training)
    ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:].bool()
    logps = logits[:, -batch["input_ids"].shape[1] : -1].double().log_softmax(-1)
    logps = logps.gather(-1, ids[..., None]).squeeze(-1) * mask
    if ld_alpha is not None:
        counts = mask.sum(1)
        shared = torch.minimum(*counts.chunk(2)).repeat(2)
        beyond = mask.cumsum(1) > shared[:, None]
        logps = torch.where(beyond, ld_alpha * logps, logps)
    return logps.sum(1)


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 1, scale: float = 0.05) -> None:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.add_(torch.randn(param.shape, generator=generator).to(param) * scale)


def from_hidden(reference: Any, batch: dict[str, Any]) -> Tensor:
    """Log-probs through what `hidden` hands to the one-pass path, after the pass is over."""
    from dpo_fast.functional import sequence_logprobs

    hidden, head = reference.hidden(batch)
    plan = TokenPlan.from_batch(batch)
    with torch.no_grad():
        return sequence_logprobs(hidden, head.weight, plan.target, plan.cu_seqlens, **head.kwargs())
