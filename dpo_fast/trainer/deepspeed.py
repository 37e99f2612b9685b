"""A reference beside a policy that DeepSpeed runs: whole (ZeRO-1/2) or partitioned (ZeRO-3).

Imported only where accelerate has set DeepSpeed up.
"""

from typing import Any

import torch
from torch import nn

_OFFLOAD = "offload_param"


def place_reference(engine: str, accelerator: Any, module: nn.Module, args: Any) -> Any:
    """Put ``module``, a frozen model, where the engine will put the policy.

    ZeRO-3 partitions it in place: forwards of ``module`` then gather one layer at a time, and
    nothing stays gathered in between.

    Returns:
        DeepSpeed's engine, to be kept: it takes its hooks along when it goes. None for ZeRO-2.
    """
    if engine == "zero2":
        module.to(args.device)
        return None
    import deepspeed

    dtype = next(module.parameters()).dtype
    config = reference_config(accelerator, args, dtype)
    held, *_ = deepspeed.initialize(model=module, config=config)
    module.eval().requires_grad_(False)
    return held


def cast_early(accelerator: Any, args: Any, *models: nn.Module | None) -> None:
    """Cast the models now as DeepSpeed will cast the policy when it takes it: copies of it, and
    what is decided by their dtypes, are then right from the start.
    """
    dtype = compute_dtype(accelerator, args)
    for model in models:
        if dtype is not None and model is not None:
            model.to(dtype)


def compute_dtype(accelerator: Any, args: Any) -> torch.dtype | None:
    """The dtype that DeepSpeed casts the policy to; None: it stays."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    for name, dtype, wanted in (
        ("bf16", torch.bfloat16, args.bf16),
        ("fp16", torch.float16, args.fp16),
    ):
        enabled = config.get(name, {}).get("enabled", False)
        if wanted if enabled == "auto" else str(enabled).lower() == "true":
            return dtype
    return None


def reference_config(accelerator: Any, args: Any, dtype: torch.dtype) -> dict[str, Any]:
    """A DeepSpeed config for a model that is only read: no optimizer, no persistent weights."""
    zero = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    own: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if str(zero.get(_OFFLOAD, {}).get("device", "none")) != "none":
        own[_OFFLOAD] = zero[_OFFLOAD]
    elif args.ref_offload:
        own[_OFFLOAD] = {"device": "cpu", "pin_memory": args.device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "zero_optimization": own,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


@torch.no_grad()
def unpartition(model: nn.Module) -> None:
    """Whole weights in host memory for what ``deepspeed.zero.Init`` has cut while loading."""
    import deepspeed

    whole: dict[int, nn.Parameter] = {}  # a tied weight stays tied
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is None or not hasattr(param, "ds_id"):
                continue
            if id(param) not in whole:
                with deepspeed.zero.GatheredParameters([param]):
                    values = param.data.to("cpu", copy=True)
                whole[id(param)] = nn.Parameter(values, requires_grad=param.requires_grad)
            module._parameters[name] = whole[id(param)]
