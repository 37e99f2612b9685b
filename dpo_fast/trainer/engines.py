"""DDP, FSDP2 and DeepSpeed as accelerate sets them up: what of them touches DPO.

The policy is the engine's as in transformers. Ours is the rest: weights that are whole while the
trainer is built, a reference that is sharded as the policy is, and float32 results.
"""

import dataclasses
import logging
import os
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from dpo_fast.reference.rows import REF_COLUMNS
from dpo_fast.reference.shards import is_unit, reshard_all

logger = logging.getLogger("dpo_fast")

Engine = Literal["single", "ddp", "fsdp1", "fsdp2", "zero2", "zero3"]


class EnginesMixin:
    """Part of :class:`dpo_fast.Trainer`: sharding that accelerate leaves to the caller."""

    args: Any
    accelerator: Any
    model: Any
    model_wrapped: Any
    reference: Any
    _reference_engine: Any = None

    @property
    def engine(self) -> Engine:
        """Who holds the policy's weights."""
        state = self.accelerator.state
        deepspeed = getattr(state, "deepspeed_plugin", None)
        if deepspeed is not None:
            return "zero3" if int(deepspeed.zero_stage) == 3 else "zero2"
        fsdp = getattr(state, "fsdp_plugin", None)
        if fsdp is not None:
            return "fsdp2" if getattr(fsdp, "fsdp_version", 1) == 2 else "fsdp1"
        return "ddp" if self.accelerator.num_processes > 1 else "single"

    def init_engine(self, ref_model: nn.Module | None) -> None:
        """Called when the accelerator exists, before the reference is made or anything sharded.

        Raises:
            ValueError: FSDP version 1, or ranks that accelerate does not count.
        """
        refuse_uncounted_ranks(self.accelerator)
        if self.engine in ("single", "ddp") and fsdp_was_asked_for(self.args):
            logger.warning(
                "FSDP was asked for, but accelerate uses it on accelerators only and runs %s here: "
                "every rank holds the whole model.",
                self.engine,
            )
        if self.engine == "fsdp1":
            raise ValueError(
                "FSDP version 1 flattens parameters, so a reference could not be sharded, averaged "
                "or stored beside the policy: set fsdp_version: 2 in the accelerate config "
                "(examples/accelerate/fsdp2.yaml)."
            )
        if self.engine == "fsdp2":
            keep_results_exact(self.accelerator.state.fsdp_plugin)
        if self.engine in ("zero2", "zero3"):
            from dpo_fast.trainer.deepspeed import cast_early

            cast_early(self.accelerator, self.args, self.model, ref_model)

    def shard_reference(self) -> None:
        """Give a reference that is a model of its own to the engine, as the policy will be; with
        ``ref_offload`` its weights wait in host memory.

        Raises:
            ValueError: ``ref_offload`` of a model whose layers cannot be streamed.
        """
        module = getattr(self.reference, "module", None)
        if module is None:
            return
        offload = self.args.ref_offload
        if self.engine == "fsdp2":
            if self.reference.name == "frozen":
                hold_as_computed(self.accelerator.state.fsdp_plugin, module)
            shard_with_fsdp2(self.accelerator, module, offload=offload)
            if not offload:  # or its copies to the device would wait for the layer that computes
                gather_one_layer_ahead(module)
        elif self.engine in ("single", "ddp", "zero2") and offload:
            self._say(self.reference.offload_layers(self.args.device).describe())
            return
        elif self.engine in ("single", "ddp"):
            return
        else:
            from dpo_fast.trainer.deepspeed import place_reference

            self._reference_engine = place_reference(
                self.engine, self.accelerator, module, self.args
            )
        where = ", in host memory" if offload else ""
        self._say(f"The reference is held as the policy is ({self.engine}){where}.")

    def _say(self, text: str) -> None:
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            logger.info("%s", text)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; before training the model is given to the engine first.

        Otherwise accelerate would want an optimizer under FSDP2, and under DDP it would take the
        model for prepared and never wrap it: the ranks would then train apart, without a word.
        """
        if not self.accelerator._models:
            if self.engine == "fsdp2":
                # the plugin checkpoints layers before it shards them: left to train() then
                if not self.accelerator.state.fsdp_plugin.activation_checkpointing:
                    shard_with_fsdp2(self.accelerator, self.model, remember=True)
                    self.accelerator._models.append(self.model)
                    self.model_wrapped = self.model
            elif self.engine == "ddp":
                self._wrap_model(self.model)  # type: ignore[attr-defined]  # DDP's arguments
                self.model_wrapped = self.accelerator.prepare(self.model)
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a model that is sharded already, for an evaluation or by an earlier
        training, holds its shards first: the last forward leaves some units gathered, and an
        optimizer of gathered weights would move nothing.

        Raises:
            RuntimeError: such a model has parameters with fewer rows than there are ranks.
            CheckpointError: another number of DeepSpeed's ranks wrote the checkpoint, and it could
                not be converted.
        """
        if self.engine == "fsdp2" and is_unit(self.model):
            refuse_alike_shards(self.model, self.accelerator.num_processes)
            reshard_all(self.model)
        if resume_from_checkpoint is None or self.engine not in ("zero2", "zero3"):
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        from dpo_fast.trainer.zero_checkpoint import readable_checkpoint

        where = self.args.output_dir
        with readable_checkpoint(resume_from_checkpoint, self.accelerator, where) as path:
            return super().train(path, *args, **kwargs)  # type: ignore[misc]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in transformers, which under DeepSpeed casts floating-point inputs to the model's
        dtype: reference log-probs stay float32.
        """
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)  # type: ignore[misc]
        for key in REF_COLUMNS:
            if key in inputs:
                prepared[key] = inputs[key].to(self.args.device)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in transformers, which has just had DeepSpeed read its part of the checkpoint."""
        if checkpoint is not None and self.engine in ("zero2", "zero3"):
            from dpo_fast.trainer.zero_checkpoint import after_reading

            after_reading(self.model_wrapped, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; under FSDP2 with sharded checkpoints the model is written, too, when
        it is asked for by name (transformers would write nothing).
        """
        sharded = self.engine == "fsdp2" and "FULL" not in str(
            self.accelerator.state.fsdp_plugin.state_dict_type
        )
        if not sharded or _internal_call or not is_unit(self.model):
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        whole = self.accelerator.get_state_dict(self.model)  # on rank 0, in host memory
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=whole)  # type: ignore[attr-defined]
        self.accelerator.wait_for_everyone()


def refuse_uncounted_ranks(accelerator: Any) -> None:
    """Raise ValueError where more ranks were launched than accelerate counts."""
    ranks = _world_size()
    if ranks > accelerator.num_processes:
        raise ValueError(
            f"{ranks} ranks were launched and accelerate counts {accelerator.num_processes}, so "
            "all of them would train on the same pairs (seen with DeepSpeed on a CPU): launch on "
            "accelerators, or one process."
        )


def refuse_alike_shards(model: nn.Module, ranks: int) -> None:
    """Raise RuntimeError where the optimizer could not find its parameters again.

    accelerate knows a parameter by the address of its shard, and empty shards have none.
    """
    names = [name for name, p in model.named_parameters() if has_empty_shards(p.shape[0], ranks)]
    if len(names) > 1:
        raise RuntimeError(
            "evaluate(), predict() or an earlier train() has sharded the model under FSDP2, and "
            f"over {ranks} ranks {len(names)} parameters ({names[0]}, ..) have fewer parts than "
            "there are ranks, so that accelerate could not tell their shards apart: use "
            "eval_on_start=True, a trainer of its own, or fewer ranks."
        )


def has_empty_shards(length: int, ranks: int) -> bool:
    """Whether some of ``ranks`` get nothing of ``length`` rows, cut as ``torch.chunk`` cuts."""
    return -(-length // ranks) * (ranks - 1) >= length


def fsdp_was_asked_for(args: Any) -> bool:
    """By the launcher's environment, or by ``TrainingArguments.fsdp``."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def keep_results_exact(plugin: Any) -> None:
    """Log-probs and losses leave the model in float32: accelerate's policy would round them to the
    dtype of mixed precision (a log-prob of -300 by up to 1 in bf16).
    """
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


@torch.no_grad()
def hold_as_computed(plugin: Any, module: nn.Module) -> None:
    """Weights that never move are held in the dtype that FSDP2 would cast them to in every forward:
    the same values at half the memory and traffic.
    """
    policy = plugin.mixed_precision_policy
    dtype = None if policy is None else policy.param_dtype
    for param in module.parameters():
        if (
            dtype is not None
            and param.is_floating_point()
            and param.element_size() > dtype.itemsize
        ):
            param.data = param.data.to(dtype)


def shard_with_fsdp2(
    accelerator: Any, module: nn.Module, *, remember: bool = False, offload: bool = False
) -> None:
    """``fully_shard`` by accelerate's plugin, layer by layer, in place.

    Args:
        remember: the plugin keeps the classes of this model's layers; they are not found again by
            name in a model that is sharded.
        offload: the shards wait in host memory, whatever the plugin does with the policy's; each
            layer's are copied as FSDP2 gathers it, which is one layer ahead.
    """
    from accelerate.utils import fsdp2_prepare_model
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = accelerator.state.fsdp_plugin
    # which classes are layers is remembered from the first model, and the policy's may differ
    before = {
        name: getattr(plugin, name)
        for name in ("auto_wrap_policy", "transformer_cls_names_to_wrap", "cpu_offload")
    }
    if offload:
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=accelerator.device.type == "cuda")
    try:
        fsdp2_prepare_model(accelerator, module)
    finally:
        for name, value in before.items():
            if name == "cpu_offload" or not remember:
                setattr(plugin, name, value)


def gather_one_layer_ahead(module: nn.Module) -> None:
    """Names to FSDP2 the layer that is gathered while one computes, in a model that only runs
    forwards.

    Its own prefetch keeps the flat memory of one all-gather until the next one is laid out: a third
    layer at the peak. After a prefetch by name that memory goes at once. A model whose units are
    not the layers of one list is left as it is.
    """
    lists = [
        m for m in module.modules() if isinstance(m, nn.ModuleList) and m and all(map(is_unit, m))
    ]
    if len(lists) != 1:
        return
    module._set_unshard_async_op(True)  # type: ignore[operator]
    for layer, following in pairwise(lists[0]):
        layer.set_modules_to_forward_prefetch([following])  # type: ignore[operator]


@torch.no_grad()
def complete_weights(model: nn.Module, what: str) -> None:
    """Every rank has all weights of ``model`` in host memory; a no-op where it has.

    accelerate's ``fsdp_cpu_ram_efficient_loading`` leaves them on the meta device of all ranks but
    the first, and DeepSpeed's ``zero.Init`` cuts them while they are loaded. Fingerprints, the
    copy that becomes the reference, and the checks of head and layout need them whole; the engine
    shards them afterwards.
    """
    if any(hasattr(param, "ds_id") for param in model.parameters()):
        from dpo_fast.trainer.deepspeed import unpartition

        logger.warning("%s: gathered from ZeRO-3's parts into the host memory of each rank.", what)
        unpartition(model)
        return
    if _world_size() == 1:
        return
    device = torch.accelerator.current_accelerator() if _has_nccl() else torch.device("cpu")
    absent = any(param.is_meta for param in model.parameters())
    flag = torch.tensor(int(absent), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    if not int(flag):
        return
    logger.warning("%s: broadcast from rank 0 into the host memory of each rank.", what)
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is not None and param.is_meta:
                empty = torch.empty_like(param, device="cpu")
                module._parameters[name] = nn.Parameter(empty, requires_grad=param.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    for tensor in (*model.parameters(), *model.buffers()):
        moved = tensor.detach().to(device)
        torch.distributed.broadcast(moved, 0)
        tensor.copy_(moved)


def _world_size() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def _has_nccl() -> bool:
    return "nccl" in str(torch.distributed.get_backend()) and torch.cuda.is_available()
