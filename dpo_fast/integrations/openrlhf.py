"""OpenRLHF's Actor on the fused LM head: its log-prob branch without logits.

``Actor.forward`` makes the logits of every token in float32; its DPO, KD and PPO trainers then use
one log-prob a token. With ``dpo_fast.patch("openrlhf")`` it scores the attended tokens (PPO: the
actions) and returns zeros elsewhere, which the trainers mask anyway. With packing_samples the model
gets the attended tokens as one row without padding, as the original gives them to it.

The original method goes on to do: calls that want the logits or the entropy (its gradient is part
of PPO's loss), ring attention (a rank holds a slice of the packed row), images. One log line says
so.

Known interface: OpenRLHF 0.11.2. Legend: B rows, T padded length, A actions.
"""

import functools
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from dpo_fast.batch import IGNORE_INDEX
from dpo_fast.integrations.methods import MethodPatch, SaidOnce
from dpo_fast.integrations.padded_rows import score_rows

PARAMETERS = (
    *("self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits"),
    *("return_logprobs", "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs"),
)

_say = SaidOnce()


def _method(original: Any, backend: str) -> Any:
    @functools.wraps(original)
    def forward(
        self: Any,
        sequences: Tensor,  # [B, T]
        action_mask: Tensor | None = None,  # [B, A], of the last A predictions
        attention_mask: Tensor | None = None,  # [B, T]
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        reason = None
        if action_mask is None and not return_logprobs:
            reason = "the call wants the logits"
        elif return_entropy:
            reason = "the call wants the entropy"
        elif ring_attn_group is not None:
            reason = "ring attention (--ds.ring_attn_size) cuts the packed row over ranks"
        elif mm_inputs:
            reason = "the batch has images"
        if reason is not None or attention_mask is None:
            _say(f"dpo_fast leaves Actor.forward to {PATCH.seen()}: {reason or 'no mask'}")
            return original(
                self,
                sequences,
                action_mask=action_mask,
                attention_mask=attention_mask,
                return_output=return_output,
                allgather_logits=allgather_logits,
                return_logprobs=return_logprobs,
                ring_attn_group=ring_attn_group,
                packed_seq_lens=packed_seq_lens,
                return_entropy=return_entropy,
                **mm_inputs,
            )
        logps, output = _log_probs(self, sequences, attention_mask, action_mask, backend)
        return (logps, output) if return_output else logps

    return forward


PATCH = MethodPatch(
    package="openrlhf",
    module="openrlhf.models.actor",
    class_name="Actor",
    method="forward",
    parameters=PARAMETERS,
    make=_method,
    remedy="pip install openrlhf",
)
apply, restore = PATCH.apply, PATCH.restore


def knows() -> bool:
    """There is one interface so far; ``apply`` says what differs from it."""
    return True


def describe() -> str:
    """One line: what is replaced, in which version."""
    return f"{PATCH.seen()}: Actor computes log-probs without logits"


def _log_probs(
    actor: Any, sequences: Tensor, attention_mask: Tensor, action_mask: Tensor | None, backend: str
) -> tuple[Tensor, ModelOutput]:
    """``[B, T - 1]``, or ``[B, A]`` of actions, and the output as far as the trainers read it."""
    labels = sequences.masked_fill(attention_mask == 0, IGNORE_INDEX)
    if action_mask is not None:
        actions = action_mask.shape[1]
        labels[:, :-actions] = IGNORE_INDEX
        labels[:, -actions:].masked_fill_(action_mask == 0, IGNORE_INDEX)
    scores = score_rows(
        actor.model,
        labels,
        temperature=actor.temperature,
        backend=backend,
        **_inputs(actor, sequences, attention_mask),
    )
    logps = scores.per_position(scores.tokens.logps)
    if action_mask is not None:
        logps = logps[:, -action_mask.shape[1] :]
    output = ModelOutput()
    if scores.aux_loss is not None:
        output["aux_loss"] = scores.aux_loss
    return logps, output


def _inputs(actor: Any, sequences: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """What the original hands to the model, padded or packed."""
    positions = attention_mask.long().cumsum(-1) - 1
    inputs: dict[str, Any]
    if actor.packing_samples:
        attended = attention_mask.bool()
        inputs = {
            "input_ids": sequences[attended].unsqueeze(0),
            "attention_mask": None,
            "position_ids": positions[attended].unsqueeze(0),
            "flattened": attended,
        }
    else:
        inputs = {
            "input_ids": sequences,
            "attention_mask": attention_mask,
            "position_ids": positions.masked_fill_(attention_mask == 0, 1),
        }
        if getattr(actor, "is_vlm", False):
            inputs["position_ids"] = None
    if _asks_for_router(actor.model):
        inputs["output_router_logits"] = True
    return inputs


def _asks_for_router(model: Any) -> bool:
    from dpo_fast.models import base_causal_lm

    config = base_causal_lm(model).config.get_text_config()
    return bool(getattr(config, "output_router_logits", False))
