"""What happens to model, adapter and tokenizer before training: loading, wrapping, dropout,
checks.
"""

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import set_seed

from dpo_fast.config import DPOConfig
from dpo_fast.hub_names import local_name
from dpo_fast.losses import PreferenceLoss, build_loss
from dpo_fast.models import check_head, head_of, install_scoring, is_peft_model
from dpo_fast.models.given import check_config, is_adapter
from dpo_fast.reference.checks import check_finite
from dpo_fast.trainer.engines import complete_weights

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("dpo_fast")


class Parts(NamedTuple):
    """What a training is made of, ready to run: the policy scores, dropout is off, tokenizer and
    configs agree.
    """

    policy: nn.Module
    ref_model: nn.Module | None
    tokenizer: "PreTrainedTokenizerBase"


def build_parts(
    model: "str | nn.Module",
    ref_model: "str | nn.Module | None",
    args: DPOConfig,
    processing_class: Any,
    quantization_config: Any,
    peft_config: "PeftConfig | None",
) -> Parts:
    """Load what is given by name, wrap it with adapters, check it.

    Raises:
        ValueError, TypeError: broken weights, a head that cannot be scored, contradicting
        arguments.
    """
    set_seed(args.seed)  # adapters are initialised at random
    if isinstance(model, str):
        refuse_frozen_adapter(model)
        model = load_model(model, args, quantization_config)
    else:
        refuse_load_arguments(args, quantization_config)
    if isinstance(ref_model, str):
        ref_model = load_model(ref_model, args)
    complete_weights(model, "policy")
    if ref_model is not None:
        complete_weights(ref_model, "reference")
    tokenizer = resolve_tokenizer(processing_class, model, args)
    if peft_config is not None:
        model = wrap_peft(model, peft_config)
    if is_peft_model(model):
        prepare_peft(model, args)
    check_finite(model, "policy")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "No parameter of the policy requires a gradient, so nothing would be trained: call "
            "model.requires_grad_(True), or load the adapter with is_trainable=True."
        )
    if args.disable_dropout:
        disable_dropout(model)
        if ref_model is not None:
            disable_dropout(ref_model)
    install_scoring(model)
    check_head(model)
    return Parts(model, ref_model, tokenizer)


def build_objective_loss(args: DPOConfig) -> PreferenceLoss:
    """The loss that ``args`` names."""
    return build_loss(
        args.loss_type,
        args.loss_weights,
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        f_divergence_type=args.f_divergence_type,
        f_alpha_divergence_coef=args.f_alpha_divergence_coef,
        discopop_tau=args.discopop_tau,
        use_weighting=args.use_weighting,
        simpo_gamma=args.simpo_gamma,
        cpo_alpha=args.cpo_alpha,
        kto_desirable_weight=args.kto_desirable_weight,
        kto_undesirable_weight=args.kto_undesirable_weight,
    )


def load_model(name: str, args: DPOConfig, quantization_config: Any = None) -> "PreTrainedModel":
    """A causal LM from a hub name or a folder, the way TRL loads it: fp32 unless
    ``model_init_kwargs`` says otherwise.

    Raises:
        ValueError: ``quantization_config`` is given twice, a dtype that is none, an
        encoder-decoder.
    """
    from transformers import AutoModelForCausalLM

    kwargs = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "quantization_config is given to the trainer and in model_init_kwargs: give it "
                "once, to the trainer."
            )
        kwargs["quantization_config"] = quantization_config
    dtype = kwargs.get("dtype", "float32")
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"model_init_kwargs dtype={kwargs['dtype']!r} is no torch dtype: use 'auto', "
                "'float32', 'bfloat16' or "
                "'float16'."
            )
    kwargs["dtype"] = dtype
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if not is_adapter(name):
        check_config(name, "The model", **kwargs)
    return AutoModelForCausalLM.from_pretrained(local_name(name), **kwargs)


def refuse_frozen_adapter(name: str) -> None:
    """``AutoModelForCausalLM`` loads an adapter without gradients: there is nothing to train.

    Raises:
        ValueError: the folder ``name`` holds an adapter.
    """
    if is_adapter(name):
        raise ValueError(
            f"model={name!r} holds an adapter, which would be loaded frozen. To go on training it, "
            "give model=peft.AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True); "
            "`dpo-fast train` does so."
        )


def refuse_load_arguments(args: DPOConfig, quantization_config: Any) -> None:
    """A model given as an object cannot be loaded differently any more."""
    if args.model_init_kwargs is not None:
        logger.warning("model_init_kwargs is ignored: the model is given as an object.")
    if quantization_config is not None:
        raise ValueError(
            "quantization_config only applies when the model is loaded here: give the model by "
            "name, or omit it."
        )


def wrap_peft(model: nn.Module, peft_config: "PeftConfig") -> nn.Module:
    """``get_peft_model`` with the checks and the settings that TRL makes.

    Raises:
        TypeError: ``peft_config`` is no PeftConfig. ValueError: the model has an adapter already.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            "peft_config must be a peft.PeftConfig such as LoraConfig, got "
            f"{type(peft_config).__name__}."
        )
    if is_peft_model(model):
        raise ValueError(
            "The model is a PeftModel and a peft_config is given too. Either go on training its "
            "adapter (omit "
            "peft_config), or merge it first (model.merge_and_unload()) and pass the merged model."
        )
    return get_peft_model(model, peft_config)


def prepare_peft(model: nn.Module, args: DPOConfig) -> None:
    """Settings that adapter training needs: input gradients for checkpointing, bf16 adapters on
    quantised models.
    """
    if args.gradient_checkpointing:
        model.enable_input_require_grads()  # type: ignore[operator]
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        # QLoRA (arXiv 2305.14314, section 3) keeps adapters in bf16. DoRA's magnitude stays in
        # fp32: its updates are smaller than bf16 resolves (huggingface/trl#7268).
        for name, param in model.named_parameters():
            if param.requires_grad and "lora_magnitude_vector" not in name:
                param.data = param.data.to(torch.bfloat16)


def resolve_tokenizer(
    processing_class: Any, model: nn.Module, args: DPOConfig
) -> "PreTrainedTokenizerBase":
    """The tokenizer, with a pad token that the model's configs share.

    Raises:
        TypeError: not a tokenizer. ValueError: a processor (images are not supported).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

    config = model.config
    if processing_class is None:
        name = config._name_or_path  # type: ignore[union-attr]
        if not name:
            raise ValueError(
                "processing_class is None and the model was not loaded from a folder or the hub, "
                "so its tokenizer is "
                "unknown: pass processing_class=<tokenizer>."
            )
        processing_class = AutoTokenizer.from_pretrained(
            name, trust_remote_code=args.trust_remote_code
        )
    if isinstance(processing_class, ProcessorMixin):
        processing_class = processing_class.tokenizer
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            "processing_class must be a tokenizer (PreTrainedTokenizerBase), got "
            f"{type(processing_class).__name__}."
        )
    if args.pad_token is not None:
        processing_class.pad_token = args.pad_token
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    pad = processing_class.pad_token_id
    config.get_text_config().pad_token_id = pad  # type: ignore[operator, union-attr]
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = pad  # type: ignore[union-attr]
    return processing_class


def disable_dropout(model: nn.Module) -> int:
    """Set every dropout to 0: modules (LoRA's included) and the rates that attention reads as a
    number.

    Returns how many were above 0; they are named in one log line.
    """
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = 0.0
            changed.append(name)
        for attribute in ("attention_dropout", "dropout_p"):
            rate = getattr(module, attribute, None)
            if isinstance(rate, float) and rate > 0:
                setattr(module, attribute, 0.0)
                changed.append(f"{name}.{attribute}")
    if changed:
        lora = sum("lora_dropout" in name for name in changed)
        note = f", {lora} of them lora_dropout" if lora else ""
        logger.info("disable_dropout=True set %d dropout rates to 0%s.", len(changed), note)
    return len(changed)


def head_dtype(model: nn.Module, args: DPOConfig) -> torch.dtype:
    """In what the LM head will compute: mixed precision's dtype, or its weight's."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return head_of(model).weight.dtype


def moe_loss_weight(model: nn.Module, args: DPOConfig) -> float:
    """Weight of the load balancing loss: ``router_aux_loss_coef``, or the model's own; 0 where
    there is none.

    Raises:
        ValueError: a weight is asked for on a model without experts.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    coef = args.router_aux_loss_coef
    has_router = hasattr(config, "output_router_logits")
    if coef and not has_router:
        raise ValueError(
            f"router_aux_loss_coef={coef}, but {type(model).__name__} has no experts that report "
            "router logits: "
            "leave it unset."
        )
    if coef is None:
        coef = getattr(config, "router_aux_loss_coef", 0.0)
    return float(coef) if has_router else 0.0


def require_transformers(floor: str) -> None:
    """A trainer needs the hooks of its ``transformers_floor``; the ops work below.

    Raises:
        ImportError: with the version found and the remedy.
    """
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(floor):
        raise ImportError(
            f"dpo_fast.Trainer needs transformers >= {floor}, found {transformers.__version__}: "
            f"pip install -U 'transformers>={floor}'. dpo_fast.functional, losses and integrations "
            "work with 4.56 and later."
        )
