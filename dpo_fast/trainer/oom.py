"""Out of memory in training: raised again with the cheapest remedies and their GiB."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from dpo_fast.backends import LinearHead
from dpo_fast.backends import choose as choose_backend
from dpo_fast.models import base_causal_lm, head_of
from dpo_fast.out_of_memory import OutOfMemory, is_out_of_memory
from dpo_fast.reference.layer_stream import decoder_layers
from dpo_fast.remedies import MicroBatch, StepSetup, explain
from dpo_fast.trainer.setup import head_dtype


class OutOfMemoryMixin:
    """Part of :class:`dpo_fast.Trainer`: remembers a micro-batch's shape, explains what it took."""

    args: Any
    model: Any
    reference: Any
    _micro_batch: MicroBatch | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            OutOfMemory: with three remedies. ``auto_find_batch_size`` sees torch's own error first.
        """
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            seen = self._micro_batch
            if not is_out_of_memory(error) or seen is None or isinstance(error, OutOfMemory):
                raise
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            text = explain(self._model_config(), seen, self._step_setup())
            raise OutOfMemory(f"{error}\nOut of memory in step {step}. {text}") from error

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers."""
        if "executed_tokens" in inputs:
            self._micro_batch = shape_of(inputs)
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _model_config(self) -> Any:
        lm: Any = base_causal_lm(self.model)
        return lm.config

    def _step_setup(self) -> StepSetup:
        args = self.args
        second: nn.Module | None = getattr(self.reference, "module", None)
        mixed = args.bf16 or args.fp16
        layout = self.layout.name  # type: ignore[attr-defined]
        ranks = self.accelerator.num_processes  # type: ignore[attr-defined]
        parallel = str(self.accelerator.distributed_type)  # type: ignore[attr-defined]
        sharded = "FSDP" in parallel or "DEEPSPEED" in parallel
        shards = ranks if sharded else 1
        return StepSetup(
            weights=_bytes(self.model.parameters()) // shards,
            trained=_bytes(p for p in self.model.parameters() if p.requires_grad) // shards,
            trained_head=head_of(self.model).weight.requires_grad,
            reference=0 if second is None else _bytes(second.parameters()) // shards,
            may_precompute=getattr(self.reference, "name", "") in ("frozen", "adapter")
            and hasattr(self.train_dataset, "__len__"),  # type: ignore[attr-defined]
            itemsize=2 if mixed else next(self.model.parameters()).element_size(),
            checkpointing=args.gradient_checkpointing,
            may_pack=layout != "shared_prefix" and args.batch_layout != "auto",
            workspace=args.lm_head_workspace or _default_workspace(args, self.model),
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            token_budget=args.max_tokens_per_batch,
            on_cuda=args.device.type == "cuda",
            ranks=1 if sharded else ranks,
            offloadable=0 if args.ref_offload else _offloadable(self.reference, shards),
        )


def shape_of(batch: Mapping[str, Any]) -> MicroBatch:
    """From the host numbers of a planned batch; no sync."""
    scored = sum(batch["seq_lens"])
    pairs = len(batch["seq_lens"]) // 2
    attended, positions = batch["num_tokens"], batch["executed_tokens"]
    # a prompt stands once where both answers share it; both have it otherwise
    shared = max(attended - scored, 0) // 2
    return MicroBatch(pairs, positions, attended, shared, scored)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Of whole parameters, also where DeepSpeed keeps only a part of each here."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)


def _offloadable(reference: Any, shards: int) -> int:
    """What ``ref_offload`` would take off the device: all shards, or all layers but two."""
    if getattr(reference, "name", "") != "frozen":
        return 0
    if shards > 1:
        return _bytes(reference.module.parameters()) // shards
    try:
        layers = [_bytes(layer.parameters()) for layer in decoder_layers(reference.module)]
    except ValueError:  # too few to stream
        return 0
    return sum(layers) - 2 * max(layers)


def _default_workspace(args: Any, model: nn.Module) -> int:
    head = head_of(model)
    backend = choose_backend(args.lm_head_backend, args.device.type, head_dtype(model, args))
    return backend.default_workspace(LinearHead(head.weight, None, None, 1.0, None))
