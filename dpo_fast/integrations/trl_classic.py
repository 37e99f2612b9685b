"""TRL up to 0.28: its DPOTrainer's ``concatenated_forward`` and Liger class on the fused LM head.

Its DPOTrainer scores policy and reference through one method, which makes the logits ``[2P, T, V]``
and returns a dict; the method here returns the same dict without them. With ``use_liger_loss=True``
the trainer makes a ``LigerFusedLinearDPOLoss``, whose place :class:`dpo_fast.FusedLinearDPOLoss`
takes. Subclasses that override the method are not reached: LLaMA-Factory's has an adapter of its
own, ms-swift's and the copy that Unsloth compiles have none. Known interface: TRL 0.24.0.

TRL's own method goes on to do what needs the logits or is not text: encoder-decoder models, images,
``use_weighting`` and ``ld_alpha`` (both as TRL 0.24 defines them, which is not their papers'
definition); one log line says so.

Legend: P pairs, T padded length, V vocabulary.
"""

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.batch import IGNORE_INDEX
from dpo_fast.functional.liger_compat import FusedLinearDPOLoss
from dpo_fast.integrations.interface import InterfaceChanged
from dpo_fast.integrations.methods import MethodPatch, SaidOnce, import_peer
from dpo_fast.integrations.padded_rows import RowScores, autocast_of, score_rows

MODULE = "trl.trainer.dpo_trainer"
LIGER = "LigerFusedLinearDPOLoss"  # in that module, where liger-kernel is installed
LIGER_ARGUMENTS = ("ignore_index", "beta", "use_ref_model", "average_log_prob", "loss_type")
IMAGE_KEYS = ("pixel_values", "pixel_attention_mask", "image_sizes", "token_type_ids")

_say = SaidOnce()


def _method(original: Any, backend: str) -> Any:
    @functools.wraps(original)
    def concatenated_forward(
        self: Any, model: nn.Module, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        reason = _why_original(self, batch, is_ref_model)
        if reason is not None:
            _say(f"dpo_fast leaves concatenated_forward to {PATCH.seen()}: {reason}")
            return original(self, model, batch, is_ref_model)
        return _forward(self, model, batch, backend)

    return concatenated_forward


PATCH = MethodPatch(
    package="trl",
    module=MODULE,
    class_name="DPOTrainer",
    method="concatenated_forward",
    parameters=("self", "model", "batch", "is_ref_model"),
    make=_method,
    remedy="pip install trl",
)


def knows() -> bool:
    """Whether this TRL's DPOTrainer has the method."""
    trainer = getattr(import_peer(MODULE, "trl", PATCH.remedy), "DPOTrainer", None)
    return hasattr(trainer, PATCH.method)


def apply(backend: str) -> bool:
    """Put both in place; False if they were there already. See ``dpo_fast.patch``."""
    module = import_peer(MODULE, "trl", PATCH.remedy)
    liger = getattr(module, LIGER, None)
    if liger is not None and not _is_ours(liger):
        taken = inspect.signature(liger.__init__).parameters
        missing = [name for name in LIGER_ARGUMENTS if name not in taken]
        if missing:
            raise InterfaceChanged(
                f"{MODULE}.{LIGER} of {PATCH.seen()} takes no {', '.join(missing)}. "
                "Nothing was patched."
            )
    applied = PATCH.apply(backend)
    if liger is not None and not _is_ours(liger):
        setattr(module, LIGER, _LigerPlace(liger, backend))
    return applied


def restore() -> None:
    """Put TRL's method and Liger's class back, the very objects."""
    PATCH.restore()
    module = sys.modules.get(MODULE)
    current = getattr(module, LIGER, None)
    if isinstance(current, _LigerPlace):
        setattr(module, LIGER, current.original)


def describe() -> str:
    """One line: what is replaced, in which version."""
    return (
        f"{PATCH.seen()} scores pairs through dpo_fast's concatenated_forward, and with "
        "use_liger_loss through dpo_fast.FusedLinearDPOLoss"
    )


class _LigerPlace:
    """Stands where TRL calls Liger's class."""

    def __init__(self, original: Any, backend: str) -> None:
        self.original, self.backend = original, backend

    def __call__(self, *args: Any, **kwargs: Any) -> FusedLinearDPOLoss:
        return FusedLinearDPOLoss(*args, **kwargs, backend=self.backend)


def _is_ours(liger: Any) -> bool:
    return isinstance(liger, _LigerPlace)


def _why_original(trainer: Any, batch: dict[str, Any], is_ref_model: bool) -> str | None:
    """What of this call is not done here, or None."""
    if trainer.is_encoder_decoder:
        return "the model is an encoder-decoder"
    images = [key for key in IMAGE_KEYS if key in batch]
    if images:
        return f"the batch has {images[0]}"
    if trainer.use_weighting:
        return "use_weighting=True needs the logits"
    if trainer.args.ld_alpha is not None and not is_ref_model:
        return "ld_alpha counts positions from the start of the row there"
    return None


def _forward(
    trainer: Any, model: nn.Module, batch: dict[str, Any], backend: str
) -> dict[str, Tensor]:
    pad = trainer.pad_token_id if hasattr(trainer, "pad_token_id") else trainer.padding_value
    rows = trainer.concatenated_inputs(batch, padding_value=pad)
    input_ids = torch.cat((rows["prompt_input_ids"], rows["completion_input_ids"]), dim=1)
    prompt, answer = rows["prompt_attention_mask"], rows["completion_attention_mask"]
    attention_mask = torch.cat((prompt, answer), dim=1)
    scored = torch.cat((torch.zeros_like(prompt), answer), dim=1)
    attention_mask, input_ids, scored = _cut(
        attention_mask, input_ids, scored, trainer.max_length, trainer.truncation_mode
    )
    labels = input_ids.masked_fill(scored == 0, IGNORE_INDEX)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    flattened = None
    if trainer.padding_free:
        flattened = attention_mask.bool()
        positions = (attention_mask.cumsum(1) - 1)[flattened]
        inputs = {"input_ids": input_ids[flattened][None], "position_ids": positions[None]}
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    with autocast_of(trainer.accelerator, model):
        scores = score_rows(
            model, labels, outputs=("mean_logit",), backend=backend, flattened=flattened, **inputs
        )
    return _output(trainer, scores)


def _cut(
    attention_mask: Tensor,  # [2P, T]
    input_ids: Tensor,
    scored: Tensor,
    max_length: int | None,
    truncation_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows without padding on the left or in between, cut to ``max_length``."""
    if truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode={truncation_mode!r} must be 'keep_start' or 'keep_end'.")
    lengths = attention_mask.sum(1)
    order = attention_mask.argsort(dim=1, descending=True, stable=True)
    width = int(lengths.max())
    if max_length is not None and max_length < attention_mask.shape[1]:
        width = min(width, max_length)
        if truncation_mode == "keep_end":
            start = (lengths - width).clamp_min(0)
            index = torch.arange(width, device=order.device) + start[:, None]
            order = order.gather(1, index)
    order = order[:, :width]
    attention_mask, input_ids, scored = (
        t.gather(1, order) for t in (attention_mask, input_ids, scored)
    )
    return attention_mask, input_ids, scored


def _output(trainer: Any, scores: RowScores) -> dict[str, Tensor]:
    """TRL's dict."""
    plan, tokens = scores.plan, scores.tokens
    logps = scores.sums()
    if "ipo" in trainer.loss_type:
        logps = logps / scores.lengths()
    half, chosen = plan.num_pairs, plan.num_chosen_tokens
    assert tokens.mean_logit is not None
    output = {
        "chosen_logps": logps[:half],
        "rejected_logps": logps[half:],
        "mean_chosen_logits": tokens.mean_logit[:chosen].mean(),
        "mean_rejected_logits": tokens.mean_logit[chosen:].mean(),
    }
    if trainer.args.rpo_alpha is not None or "sft" in trainer.loss_type:
        counted = plan.target[:chosen] != 0  # TRL's mean leaves out the token whose id is 0
        output["nll_loss"] = -tokens.logps[:chosen][counted].mean()
    if scores.aux_loss is not None:
        output["aux_loss"] = scores.aux_loss
    return output
