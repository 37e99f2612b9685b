"""The models of a command: policy, adapter, quantisation, reference."""

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_fast.cli.arguments import ModelArguments
from dpo_fast.cli.errors import UsageError
from dpo_fast.config import DPOConfig
from dpo_fast.hub_names import local_name
from dpo_fast.models.given import is_adapter

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger("dpo_fast")


def model_arguments(model: ModelArguments, args: DPOConfig) -> dict[str, Any]:
    """Arguments of the trainer that name its models; ``args.model_init_kwargs`` is set on the way.

    A folder with an adapter goes on training it; everything else is loaded by the trainer.

    Raises:
        UsageError: an adapter, and a second one asked for on top.
    """
    kwargs = load_arguments(model, args)
    name = local_name(str(model.model_name_or_path))
    quantization = quantization_config(model)
    goes_on = is_adapter(name)
    if goes_on and model.use_peft:
        raise UsageError(
            f"--model_name_or_path {name} is an adapter, and --use_peft asks for another one on "
            "top: drop --use_peft to go on training it, or merge it into its base beforehand."
        )
    args.model_init_kwargs = None if goes_on else kwargs
    policy: dict[str, Any] = {"model": name, "quantization_config": quantization}
    if goes_on:
        policy = _adapter_arguments(name, args, kwargs, quantization)
    return {
        **policy,
        "ref_model": reference_model(model, args, kwargs),
        "peft_config": lora_config(model),
    }


def load_arguments(model: ModelArguments, args: DPOConfig) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: what the flags say, and over it ``model_init_kwargs``."""
    kwargs: dict[str, Any] = {"dtype": model.dtype or "float32"}
    if model.model_revision != "main":
        kwargs["revision"] = model.model_revision
    if model.attn_implementation is not None:
        kwargs["attn_implementation"] = model.attn_implementation
    return {**kwargs, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]


def load_tokenizer(model: ModelArguments, args: DPOConfig) -> Any:
    """The tokenizer that a training of this model would use.

    Raises:
        UsageError: there is none.
    """
    from transformers import AutoTokenizer

    name = local_name(str(model.model_name_or_path))
    if is_adapter(name) and not (Path(name) / "tokenizer_config.json").is_file():
        from peft import PeftConfig

        name = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer comes with {name!r}: {error}") from error


def _adapter_arguments(
    name: str, args: DPOConfig, kwargs: dict[str, Any], quantization: Any
) -> dict[str, Any]:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    kwargs = {"trust_remote_code": args.trust_remote_code, **kwargs}
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    logger.info("Going on with the adapter in %s.", name)
    out = {"model": AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **kwargs)}
    if (Path(name) / "tokenizer_config.json").is_file():
        out["processing_class"] = AutoTokenizer.from_pretrained(name)
    return out


def reference_model(model: ModelArguments, args: DPOConfig, kwargs: dict[str, Any]) -> Any:
    """The reference's name, to be loaded by the trainer as the policy is; or, where that would be
    another revision or other arguments, the model. None: no reference was named.
    """
    if model.ref_model_name_or_path is None:
        return None
    name = local_name(model.ref_model_name_or_path)
    if kwargs.get("revision", "main") == model.ref_model_revision and args.model_init_kwargs:
        return name
    from dpo_fast.trainer.setup import load_model

    own = copy.copy(args)
    own.model_init_kwargs = {**kwargs, "revision": model.ref_model_revision}
    return load_model(name, own)


def lora_config(model: ModelArguments) -> "LoraConfig | None":
    """The adapter that the flags describe, or None."""
    if not model.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type=model.lora_task_type,
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.target_modules,
        target_parameters=model.lora_target_parameters,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        bias="none",
    )


def quantization_config(model: ModelArguments) -> Any:
    """A ``BitsAndBytesConfig``, or None."""
    if not model.quantised:
        return None
    from transformers import BitsAndBytesConfig

    if model.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=None if model.dtype == "auto" else model.dtype,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model.bnb_4bit_quant_storage,
    )
