"""The LM head of a causal LM: weight, bias, softcap, logit scale and the adapter that may sit on
it.

Legend: H hidden, V vocabulary, r rank of a LoRA adapter.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_fast.backends.shard import VocabShard
from dpo_fast.naive import HeadLoRA

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Names under which transformers' families keep a soft cap of their final logits (Gemma,
# RecurrentGemma, xLSTM).
_SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Factors of the logits (Cohere; Muse; Falcon-H1), applied before the soft cap.
_SCALE_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# `logits_scaling` divides the logits (Granite), except where it multiplies them (HyperCLOVA X).
_SCALING_MULTIPLIES = ("hyperclovax",)


@dataclass(frozen=True)
class Head:
    """One LM head, as :mod:`dpo_fast.functional` takes it: ``z = logit_scale * cap(x W^T + b +
    lora)``.

    ``weight [V, H]``, ``bias [V] | None``, ``softcap`` and ``logit_scale`` host numbers, ``lora``
    the two factors of an adapter on the head. All tensors are the live parameters, so gradients
    reach them.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    lora: HeadLoRA | None = None
    shard: VocabShard | None = None  # weight, bias and lora.b are these rows of a split vocabulary

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the ops of :mod:`dpo_fast.functional`, without the weight."""
        kwargs: dict[str, Any] = {
            "bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "lora": self.lora,
        }
        return kwargs if self.shard is None else {**kwargs, "group": self.shard}


def is_peft_model(model: nn.Module) -> bool:
    """Whether ``model`` is a ``peft.PeftModel``, without importing peft for models that are not."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def base_causal_lm(model: nn.Module) -> "PreTrainedModel":
    """The ``PreTrainedModel`` below the wrappers of PEFT, DDP and ``torch.compile``."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    model = getattr(model, "_orig_mod", model)
    if is_peft_model(model):
        model = model.get_base_model()  # type: ignore[operator]
    return model  # type: ignore[return-value]


def head_of(model: nn.Module) -> Head:
    """Read the LM head of ``model`` (any wrapper) with what its family does to the logits.

    Raises:
        ValueError: the model has no output embeddings, or an adapter on them that cannot be
        expressed.
    """
    model = base_causal_lm(model)
    layer = output_layer(model)
    softcap, scale = logit_transform(model.config.get_text_config())
    weight, bias, lora = head_parameters(layer)
    return Head(weight, bias, softcap, scale, lora)


def output_layer(model: "PreTrainedModel") -> nn.Module:
    """The module that makes the logits.

    Raises:
        ValueError: the model has no output embeddings.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings (get_output_embeddings() is None), "
            "so there is no LM head "
            "to score with. Use a causal LM such as AutoModelForCausalLM loads."
        )
    return layer


def logit_transform(config: "PretrainedConfig") -> tuple[float | None, float]:
    """``(softcap, logit_scale)`` of a text config, for ``z = logit_scale * cap(a)``.

    Families scale first and cap second: ``k * tanh(s * a / k) = s * cap_{k/s}(a)``.
    """
    scale = next((v for f in _SCALE_FIELDS if (v := getattr(config, f, None)) is not None), None)
    scaling = getattr(config, "logits_scaling", None)
    if scale is None and scaling is not None:
        scale = scaling if config.model_type in _SCALING_MULTIPLIES else 1.0 / scaling
    scale = 1.0 if scale is None else float(scale)
    cap = next((v for f in _SOFTCAP_FIELDS if (v := getattr(config, f, None)) is not None), None)
    return (None if cap is None else float(cap) / scale), scale


def head_parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None, HeadLoRA | None]:
    """``(weight, bias, lora)`` of an output layer: plain, PEFT ``modules_to_save``, or PEFT
    LoRA.
    """
    if hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):
        layer = _active_copy(layer)
    if not hasattr(layer, "base_layer"):
        return layer.weight, getattr(layer, "bias", None), None  # type: ignore[return-value]
    return _tuner_parameters(layer)


def _active_copy(wrapper: Any) -> nn.Module:
    """The module that a PEFT ``ModulesToSaveWrapper`` would run now."""
    active = [a for a in wrapper.active_adapters if a in wrapper.modules_to_save]
    if wrapper.disable_adapters or not active:
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _tuner_parameters(layer: Any) -> tuple[Tensor, Tensor | None, HeadLoRA | None]:
    base = layer.base_layer
    weight, bias = base.weight, getattr(base, "bias", None)
    active = [a for a in layer.active_adapters if a in getattr(layer, "lora_A", {})]
    if layer.disable_adapters or layer.merged or not active:
        if not layer.disable_adapters and not layer.merged and _has_adapter(layer):
            raise ValueError(_unsupported(layer, f"adapter type {type(layer).__name__}"))
        return weight, bias, None
    _check_lora(layer, active)
    if len(active) == 1:
        name = active[0]
        factors = HeadLoRA(
            layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
        )
        return weight, bias, factors
    # Several adapters at once: their factors side by side are one adapter of the summed rank.
    a = torch.cat([layer.lora_A[n].weight for n in active], dim=0)
    b = torch.cat([layer.lora_B[n].weight * float(layer.scaling[n]) for n in active], dim=1)
    return weight, bias, HeadLoRA(a, b, 1.0)


def _has_adapter(layer: Any) -> bool:
    return any(
        name in getattr(layer, kind)
        for kind in layer.adapter_layer_names
        for name in layer.active_adapters
        if hasattr(getattr(layer, kind, None), "keys")
    )


def _check_lora(layer: Any, active: list[str]) -> None:
    for name in active:
        if getattr(layer, "use_dora", {}).get(name) or name in getattr(layer, "lora_variant", {}):
            raise ValueError(
                _unsupported(layer, f"a LoRA variant (DoRA or similar) named {name!r}")
            )
        if getattr(layer.lora_B[name], "bias", None) is not None:
            raise ValueError(_unsupported(layer, f"lora_bias=True in adapter {name!r}"))
        dropout = layer.lora_dropout[name]
        if layer.training and getattr(dropout, "p", 0.0) > 0.0:
            raise ValueError(_unsupported(layer, f"dropout p={dropout.p} in adapter {name!r}"))


def _unsupported(layer: nn.Module, what: str) -> str:
    return (
        f"The LM head ({type(layer).__name__}) carries {what}, which cannot be computed without "
        "the logits. Use plain "
        "LoRA without dropout on the head (disable_dropout=True sets it to 0), put the head in "
        "modules_to_save, or leave "
        "it out of target_modules."
    )
