"""Scores of padded rows through a model's fused head, for frameworks whose loops are their own.

Legend: B rows, T padded length, N scored tokens, H hidden, V vocabulary.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_fast.batch import IGNORE_INDEX, TokenPlan, plan_rows
from dpo_fast.functional import LinearLogprobs, linear_logprobs
from dpo_fast.functional.segments import segment_sum
from dpo_fast.models import Head, base_causal_lm, install_scoring


class RowScores(NamedTuple):
    """Log-probs of padded rows.

    ``tokens``: of the N scored tokens; ``plan``: which these are; ``aux_loss``: load balancing
    loss of a mixture of experts that was asked for router logits.
    """

    tokens: LinearLogprobs
    plan: TokenPlan
    aux_loss: Tensor | None

    def sums(self) -> Tensor:
        """``[B]``: log-prob of each row's labels, float32."""
        return segment_sum(self.tokens.logps, self.plan.cu_seqlens)

    def lengths(self) -> Tensor:
        """``[B]`` float32: labels of each row, one at position 0 included."""
        return torch.tensor(
            self.plan.completion_lens, dtype=torch.float32, device=self.plan.target.device
        )

    def per_position(self, values: Tensor) -> Tensor:
        """``[N]`` to ``[B, T - 1]``: position t holds what is known of token t + 1; else 0."""
        flat = values.new_zeros(self.plan.rows * self.plan.width)
        flat = flat.index_put((self.plan.token_index,), values)
        return flat.view(self.plan.rows, self.plan.width)[:, :-1]


def score_rows(
    model: nn.Module,
    labels: Tensor,  # [B, T]
    *,
    outputs: Sequence[str] = (),
    temperature: float = 1.0,
    backend: str = "auto",
    flattened: Tensor | None = None,  # [B, T] bool
    **inputs: Any,
) -> RowScores:
    """Log-probs of ``labels`` (-100: not scored, not shifted) under ``model(**inputs)``.

    The head runs inside the model's forward, where the hooks of FSDP2 and ZeRO-3 have gathered it;
    the logits are never made.

    Args:
        model: a causal LM in any wrapper. The instance learns to be scored; otherwise its forward
            stays what it was.
        labels: ``[B, T]`` int64.
        outputs, temperature, backend: of :func:`dpo_fast.functional.linear_logprobs`.
        flattened: where the model gets the rows without padding as a single one, which positions
            of ``[B, T]`` it gets.
        inputs: of the model.
    """
    install_scoring(model)
    rows, width = labels.shape
    plan = TokenPlan(**plan_rows(labels, labels != IGNORE_INDEX), width=width, rows=rows)

    def scoring(hidden_states: Tensor, head: Head) -> LinearLogprobs:
        result = linear_logprobs(
            _gathered(hidden_states, plan, flattened).to(head.weight.device),
            head.weight,
            plan.target.to(head.weight.device),
            **head.kwargs(),
            temperature=temperature,
            outputs=tuple(outputs),
            backend=backend,
        )
        return LinearLogprobs(result) if isinstance(result, Tensor) else result

    scored = model(**inputs, use_cache=False, scoring=scoring)
    return RowScores(scored.value, plan, scored.aux_loss)


def autocast_of(accelerator: Any, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """accelerate's autocast where it wrapped the model's forward in it, which scoring goes past."""
    if hasattr(base_causal_lm(model), "_original_forward"):
        return accelerator.autocast()
    return contextlib.nullcontext()


def _gathered(hidden_states: Tensor, plan: TokenPlan, flattened: Tensor | None) -> Tensor:
    """``[N, H]``: the hidden states that predict the scored tokens."""
    if flattened is None:
        return plan.gather(hidden_states)
    place = flattened.flatten().cumsum(0) - 1
    return hidden_states.flatten(0, 1).index_select(0, place[plan.token_index])
