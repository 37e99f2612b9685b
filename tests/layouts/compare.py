"""One DPO step in any layout, and rows that are awkward on purpose."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_fast.batch import PlannedCollator, TokenPlan
from dpo_fast.data import DataCollatorForPreference
from dpo_fast.layouts import PackedCollator, SharedPrefixCollator, segment_attention_in
from dpo_fast.models import Head, forward_scored, install_scoring
from dpo_fast.naive import naive_linear_logprobs

Row = dict[str, list[int]]

# Prompts of one token, answers of one token, equal answers, an answer that begins another one,
# answers with a common beginning, no prompt, and lengths beyond a window of 8.
AWKWARD: list[Row] = [
    {"prompt_ids": [5], "chosen_ids": [6, 7, 8], "rejected_ids": [9, 10]},
    {"prompt_ids": [11, 12, 13, 14], "chosen_ids": [15], "rejected_ids": [16]},
    {"prompt_ids": [17, 18], "chosen_ids": [19, 20, 21], "rejected_ids": [19, 20, 21]},
    {"prompt_ids": [22, 23, 24], "chosen_ids": [25, 26], "rejected_ids": [25, 26, 27, 28]},
    {"prompt_ids": [22, 23, 24], "chosen_ids": [25, 26, 30, 31], "rejected_ids": [25, 26]},
    {"prompt_ids": [], "chosen_ids": [32, 33, 34], "rejected_ids": [35, 36]},
    {
        "prompt_ids": list(range(40, 61)),
        "chosen_ids": list(range(70, 82)),
        "rejected_ids": list(range(90, 107)),
    },
]


class Step(NamedTuple):
    """``loss`` of DPO without a reference, ``logps [S]``, gradient of every parameter, aux loss."""

    loss: Tensor
    logps: Tensor
    grads: dict[str, Tensor]
    aux_loss: Tensor | None


def collators(**kwargs: Any) -> dict[str, Any]:
    """A collator of each layout with the same arguments."""
    return {
        "padded": PlannedCollator(DataCollatorForPreference(pad_token_id=0, **kwargs)),
        "packed": PackedCollator(pad_token_id=0, **kwargs),
        "shared_prefix": SharedPrefixCollator(pad_token_id=0, **kwargs),
    }


def run_step(
    model: nn.Module, batch: dict[str, Any], *, aux_loss: bool = False, backend: str = "auto"
) -> Step:
    """Forward and backward of ``-log sigmoid(chosen - rejected)``, summed over the pairs."""
    install_scoring(model)
    plan = TokenPlan.from_batch(batch)

    def score(hidden: Tensor, head: Head) -> Tensor:
        logps = naive_linear_logprobs(hidden, head.weight, plan.target, **head.kwargs())
        sums = torch.zeros(plan.num_sequences, dtype=logps.dtype, device=logps.device)
        return sums.index_add(0, plan.sequence_ids(), logps)

    model.zero_grad()
    packed = "pair_segments" in batch
    with segment_attention_in(model if packed else None, backend=backend):
        scored = forward_scored(model, batch, score, aux_loss=aux_loss)
        chosen, rejected = scored.value.chunk(2)
        # Not a function of the difference alone: both answers' gradients must be right.
        losses = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)) - 0.05 * chosen
        total = losses.sum()
        if scored.aux_loss is not None:
            total = total + scored.aux_loss
        total.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    aux = None if scored.aux_loss is None else scored.aux_loss.detach()
    return Step(total.detach(), scored.value.detach(), grads, aux)


def global_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the expected ones."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[n] - g).double().norm() ** 2) for n, g in expected.items())
    return (difference / sum(float(g.double().norm() ** 2) for g in expected.values())) ** 0.5


def worst_tensor_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest norm of the difference of a gradient, relative to the norm of all gradients."""
    scale = sum(float(g.double().norm() ** 2) for g in expected.values()) ** 0.5
    return max(float((found[n] - g).double().norm()) / scale for n, g in expected.items())
