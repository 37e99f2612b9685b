"""The cells of the table engine x strategy x layout: the same training wherever it runs."""

import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.functional.ema_shards import local_of
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainer.cells import strategy_arguments
from tests.trainer.parity import config_kwargs, rows

STRATEGIES = ("frozen", "adapter", "precomputed", "ema")
LAYOUTS = ("padded", "packed", "shared_prefix")
OFFLOADED = "frozen, offloaded"
PAIRS = 4  # of a step, over all ranks


ZERO = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 40},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def zero(stage: int) -> dict[str, Any]:
    """Arguments of a run under ZeRO: torch's AdamW, as everywhere else."""
    config = {**ZERO, "zero_optimization": {**ZERO["zero_optimization"], "stage": stage}}
    return {"deepspeed": config, "use_cpu": False, "ddp_backend": None}


def build(strategy: str, layout: str, ranks: int, **overrides: Any) -> Any:
    """A trainer of five AdamW steps whose global batch does not depend on ``ranks``.

    ``"bf16"`` and ``"bf16-adapter"``: mixed precision, and the reference is the policy as it is at
    the start; the adapter's moves. ``OFFLOADED``: "frozen" with its weights in host memory.
    """
    import dpo_fast

    offload = strategy == OFFLOADED
    arguments, shared, own = strategy_arguments("frozen" if offload else strategy)
    if offload:
        own["ref_offload"] = True
    if strategy == "bf16":
        arguments, own = {}, {"reference": "frozen", "bf16": True}
    if strategy == "bf16-adapter":
        arguments, shared, _ = strategy_arguments("adapter")
        own = {"reference": "ema", "ref_model_sync_steps": 2, "bf16": True}
    config = {
        **shared,
        **own,
        "batch_layout": layout,
        "per_device_train_batch_size": PAIRS // ranks,
        "per_device_eval_batch_size": PAIRS // ranks,
        "ref_cache_dir": tempfile.mkdtemp(),
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        # the copy of the policy that TR-DPO moves differs from it from the first update on
        "learning_rate": 1e-2,
        **overrides,
    }
    return dpo_fast.Trainer(
        tiny_model("llama"),
        arguments.get("ref_model"),
        dpo_fast.DPOConfig(**config_kwargs(**config)),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        **arguments.get("trainer_kwargs", {}),
    )


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All trained parameters, gathered; called on every rank."""
    return {n: gathered(p) for n, p in model.named_parameters() if p.requires_grad}


def gathered(tensor: Any) -> Tensor:
    """A parameter of any engine as a plain tensor."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor().detach().clone()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.data.detach().clone()
    return tensor.detach().clone()


def log_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def moved_reference(trainer: Any) -> dict[str, Tensor]:
    """The weights of a TR-DPO reference, gathered."""
    state = trainer.reference.state_dict()
    return {name: _whole_state(tensor) for name, tensor in state.items()}


def _whole_state(tensor: Any) -> Tensor:
    if hasattr(tensor, "ds_tensor"):
        part = tensor.ds_tensor.new_zeros(tensor.ds_tensor.ds_numel)
        own = local_of(tensor)
        part[: own.numel()] = own
        parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, part)
        return torch.cat(parts)[: tensor.ds_numel].view(tuple(tensor.ds_shape))
    return gathered(tensor)


def result(trainer: Any, before: dict[str, Tensor]) -> dict[str, Any]:
    """What the parent compares."""
    out = {"before": before, "after": whole(trainer.model), "log": log_of(trainer)}
    if trainer.reference is not None and trainer.reference.name == "ema":
        out["reference"] = moved_reference(trainer)
    return out
