"""LLaMA-Factory's CustomDPOTrainer on the fused LM head: a mixin, or a patch for its command line.

LLaMA-Factory makes the logits of policy and reference in float32 and takes the log-softmax of all
of them. The method here returns the same dict from hidden states::

    import dpo_fast
    from llamafactory.train.tuner import run_exp

    dpo_fast.patch("llamafactory")
    run_exp()  # the arguments or the YAML of `llamafactory-cli train`

``chosen_logits`` and ``rejected_logits``, of which the trainer logs the mean, are that mean
already, over the answers' tokens; LLaMA-Factory's own counts prompts and padding, too. Batches with
images or other inputs than text go through the original method; one log line says so.

Known interface: LLaMA-Factory 0.9.5. Legend: P pairs, T padded length.
"""

import functools
from typing import Any

from torch import Tensor, nn

from dpo_fast.functional.segments import segment_sum
from dpo_fast.integrations.methods import MethodPatch, SaidOnce
from dpo_fast.integrations.padded_rows import autocast_of, score_rows

TEXT_KEYS = {"input_ids", "attention_mask", "position_ids", "labels"}
AVERAGED = ("ipo", "orpo", "simpo")

_say = SaidOnce()


class FastDPOMixin:
    """For a trainer of one's own: ``class Trainer(FastDPOMixin, CustomDPOTrainer)``."""

    lm_head_backend = "auto"

    def concatenated_forward(
        self, model: nn.Module, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """Log-probs of a batch of P chosen and P rejected rows, in LLaMA-Factory's dict."""
        other = sorted(batch.keys() - TEXT_KEYS)
        if other:
            _say(f"dpo_fast leaves concatenated_forward to LLaMA-Factory: the batch has {other[0]}")
            original = super().concatenated_forward  # type: ignore[misc]
            return original(model, batch, is_ref_model)
        return _forward(self, model, batch, is_ref_model, self.lm_head_backend)


def _method(original: Any, backend: str) -> Any:
    @functools.wraps(original)
    def concatenated_forward(
        self: Any, model: nn.Module, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        other = sorted(batch.keys() - TEXT_KEYS)
        if other:
            _say(
                f"dpo_fast leaves concatenated_forward to {PATCH.seen()}: the batch has {other[0]}"
            )
            return original(self, model, batch, is_ref_model)
        return _forward(self, model, batch, is_ref_model, backend)

    return concatenated_forward


PATCH = MethodPatch(
    package="llamafactory",
    module="llamafactory.train.dpo.trainer",
    class_name="CustomDPOTrainer",
    method="concatenated_forward",
    parameters=("self", "model", "batch", "is_ref_model"),
    make=_method,
    remedy="pip install llamafactory",
)
apply, restore = PATCH.apply, PATCH.restore


def knows() -> bool:
    """There is one interface so far; ``apply`` says what differs from it."""
    return True


def describe() -> str:
    """One line: what is replaced, in which version."""
    return f"{PATCH.seen()}: {PATCH.class_name} scores pairs without logits"


def _forward(
    trainer: Any, model: nn.Module, batch: dict[str, Any], is_ref_model: bool, backend: str
) -> dict[str, Tensor]:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with autocast_of(trainer.accelerator, model):
        scores = score_rows(
            model, batch["labels"], outputs=("mean_logit",), backend=backend, **inputs
        )
    plan, tokens = scores.plan, scores.tokens
    logps, lengths = scores.sums(), plan.cu_seqlens.diff()
    if trainer.ld_alpha is not None and not is_ref_model:
        weight = plan.ld_weight(trainer.ld_alpha)
        logps = segment_sum(tokens.logps * weight, plan.cu_seqlens)
    averaged = trainer.loss_type in AVERAGED
    if averaged:
        logps = logps / lengths
    half, chosen = plan.num_pairs, plan.num_chosen_tokens
    assert tokens.mean_logit is not None
    return {
        "chosen_logps": logps[:half],
        "rejected_logps": logps[half:],
        "chosen_logits": tokens.mean_logit[:chosen].mean(),
        "rejected_logits": tokens.mean_logit[chosen:].mean(),
        "chosen_logps_avg": logps[:half] if averaged else logps[:half] / lengths[:half],
    }
