"""Whether a model computes from packed rows and shared prefixes what it computes from padded rows.

Packed rows need an architecture in which tokens meet in the attention only, and an attention that
is fully described by the arguments that transformers hands to attention functions. Everything not
known to be so is refused with a reason.
"""

import inspect
from typing import Any

from torch import nn

from dpo_fast.models import base_causal_lm, is_peft_model

LAYER_TYPES = ("full_attention", "sliding_attention")


def why_not_packed(model: nn.Module) -> str | None:
    """The reason why packed rows would be wrong for ``model`` (any wrapper), or None."""
    if is_peft_model(model):
        configs: Any = model.peft_config
        learned = [c for c in configs.values() if c.is_prompt_learning]
        if learned:
            kind = getattr(learned[0].peft_type, "value", learned[0].peft_type)
            return f"{kind} prepends virtual tokens to every row"
    lm = base_causal_lm(model)
    config: Any = lm.config.get_text_config()
    return _state(lm, config) or _positions(lm, config) or _attention(lm, config)


def why_not_shared(model: nn.Module) -> str | None:
    """The reason why sharing prompts would be wrong for ``model``, or None."""
    reason = why_not_packed(model)
    if reason is not None:
        return reason
    rate = _dropout(base_causal_lm(model))
    if rate > 0.0:
        return (
            f"both answers would share the prompt's dropout (p={rate}; disable_dropout=True sets "
            "it to 0)"
        )
    return None


def _state(lm: nn.Module, config: Any) -> str | None:
    """State that runs along a row: recurrences, state spaces, convolutions."""
    name = type(lm).__name__
    types = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if types:
        return f"{name} has layers of type {', '.join(types)}"
    if getattr(lm, "_is_stateful", False):
        return f"{name} carries a state along the row"
    for path, module in lm.named_modules():
        if isinstance(module, nn.Conv1d | nn.RNNBase):
            return f"{name} mixes neighbouring tokens in {path} ({type(module).__name__})"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder"
    return None


def _positions(lm: nn.Module, config: Any) -> str | None:
    """Positions must come from ``position_ids``, not from a token's place in the row."""
    name = type(lm).__name__
    backbone: Any = type(lm.base_model)
    parameters = inspect.signature(backbone.forward).parameters
    if "position_ids" not in parameters:
        return f"{name} takes no position_ids"
    if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return f"{name} hands no arguments on to its attention"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "") == "alibi":
        return f"{name} biases its attention by the distance in the row (ALiBi)"
    return None


def _attention(lm: nn.Module, config: Any) -> str | None:
    name = type(lm).__name__
    if not getattr(lm, "_supports_attention_backend", False):
        return f"{name} does not take its attention from transformers' AttentionInterface"
    if not getattr(lm, "_supports_flash_attn", False):
        return f"the attention of {name} needs masks of its own"
    for path, _ in lm.named_parameters():
        if path.endswith("sinks"):
            return f"{name} has attention sinks ({path})"
    if not getattr(config, "is_causal", True):
        return f"{name} is not causal"
    return None


def _dropout(lm: nn.Module) -> float:
    """The highest dropout rate in the model, of modules and of attention."""
    rates = [m.p for m in lm.modules() if isinstance(m, nn.Dropout)]
    for module in lm.modules():
        for attribute in ("attention_dropout", "dropout_p"):
            rate = getattr(module, attribute, 0.0)
            if isinstance(rate, float):
                rates.append(rate)
    return max(rates, default=0.0)
