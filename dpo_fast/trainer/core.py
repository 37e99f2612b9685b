"""dpo_fast.Trainer: a transformers.Trainer whose step scores preference pairs without logits."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
import transformers
from torch import Tensor, nn

from dpo_fast.backends import choose as choose_backend
from dpo_fast.backends import filtered
from dpo_fast.batch import COUNT_KEYS, SHIFT_KEY
from dpo_fast.checkpoint import probe_writable
from dpo_fast.config import REMOVED_FIELDS, DPOConfig, refuse_removed
from dpo_fast.functional.segments import refuse_without_float64
from dpo_fast.heap import freed_memory_kept, return_freed_memory
from dpo_fast.models.given import check_model
from dpo_fast.models.scoring import NON_MODEL_KEYS
from dpo_fast.reference import choose_reference
from dpo_fast.reference.checks import vocabulary_sizes
from dpo_fast.trainer import setup
from dpo_fast.trainer.checkpointing import CheckpointingMixin
from dpo_fast.trainer.context_parallel import ContextParallelMixin
from dpo_fast.trainer.counts import BatchCounts, local_counts, on_device
from dpo_fast.trainer.datasets import DatasetsMixin
from dpo_fast.trainer.engines import EnginesMixin
from dpo_fast.trainer.layouts import LayoutsMixin
from dpo_fast.trainer.logs import LogsMixin
from dpo_fast.trainer.objective import Objective
from dpo_fast.trainer.oom import OutOfMemoryMixin

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftConfig
    from transformers import EvalPrediction, PreTrainedModel, TrainerCallback

    EvalDatasets: TypeAlias = Dataset | IterableDataset | dict[str, Dataset | IterableDataset]

logger = logging.getLogger("dpo_fast")

SIGNATURE_COLUMNS = (
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "ref_chosen_logps",
    "ref_rejected_logps",
)
# Arguments of TRL's and transformers' trainers that never were fields of DPOConfig.
REMOVED_ARGUMENTS = {
    "tokenizer": "processing_class=<tokenizer>",
    "model_init": "model=<a model or its name>",
    "preprocess_logits_for_metrics": "compute_metrics, which gets the logits",
}


class Trainer(
    LayoutsMixin,
    DatasetsMixin,
    LogsMixin,
    CheckpointingMixin,
    EnginesMixin,
    ContextParallelMixin,
    OutOfMemoryMixin,
    transformers.Trainer,
):
    """Direct Preference Optimization (arXiv 2305.18290) with the arguments of TRL's ``DPOTrainer``.

    Args:
        model: a name or folder, a ``PreTrainedModel``, or a ``PeftModel`` whose adapter goes on
            training.
        ref_model: the reference, a model or its name; None: the policy as it is now (what that
            means: ``args.reference``).
        args: a :class:`DPOConfig`, a ``trl.DPOConfig``, or None for the defaults.
        data_collator: rows to ``input_ids``, ``attention_mask``, ``completion_mask`` ``[2P, T]``;
            None: what ``args.batch_layout`` asks for.
        train_dataset: pairs in any of TRL's text formats, or tokenised.
        eval_dataset: the same, or a dict of them.
        processing_class: the tokenizer; None: the one saved with the model.
        compute_metrics: gets logits ``[2P, T, V]`` and ``input_ids``; the only place where logits
            exist.
        callbacks, optimizers: as in ``transformers.Trainer``.
        quantization_config: used when ``model`` is a name.
        peft_config: makes the policy an adapter of ``model``.

    Raises:
        ValueError, TypeError: a wrong argument or combination, with the remedy, before any work.
        ImportError: transformers is older than ``transformers_floor``.
    """

    transformers_floor: ClassVar[str] = "5.17"
    _tag_names = ("trl", "dpo", "dpo_fast")
    objective: Objective

    def __init__(
        self,
        model: "str | PreTrainedModel | nn.Module",
        ref_model: "PreTrainedModel | nn.Module | str | None" = None,
        args: DPOConfig | transformers.TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: "Dataset | IterableDataset | None" = None,
        eval_dataset: "EvalDatasets | None" = None,
        processing_class: Any = None,
        compute_metrics: "Callable[[EvalPrediction], dict[str, float]] | None" = None,
        callbacks: "list[TrainerCallback] | None" = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: "PeftConfig | None" = None,
        **removed: Any,
    ) -> None:
        setup.require_transformers(self.transformers_floor)
        _refuse_unknown(removed)
        check_model(model, "model")
        if ref_model is not None:
            check_model(ref_model, "ref_model")
        args = DPOConfig.from_args(args or DPOConfig(f"{_short_name(model)}-DPO"))
        refuse_without_float64(args.device)
        self.check_train_dataset(train_dataset, args)
        if isinstance(ref_model, nn.Module) and ref_model is model:
            raise ValueError(
                "model and ref_model are the same object, so the reference would move with the "
                "policy: omit ref_model, "
                "and a copy is kept for you."
            )
        probe_writable(args.output_dir or ".", "output")
        parts = setup.build_parts(
            model, ref_model, args, processing_class, quantization_config, peft_config
        )
        head_dtype = setup.head_dtype(parts.policy, args)
        backend = choose_backend(args.lm_head_backend, args.device.type, head_dtype)
        # what cannot run is refused before data is read
        filtered(backend, args.lm_head_filter_bound)
        self.loss = setup.build_objective_loss(args)
        plan = choose_reference(
            args,
            model=parts.policy,
            ref_model=parts.ref_model,
            adapter_is_new=peft_config is not None,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            needs_reference=self.loss.needs_reference,
        )
        self.configure_data(args, parts.tokenizer, vocabulary_sizes(parts.policy)[0])
        super().__init__(
            model=parts.policy,
            args=args,
            train_dataset=self.prepare(train_dataset, "train"),
            eval_dataset=self.prepare_eval(eval_dataset),
            processing_class=parts.tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._refuse_data_parallel()
        self.init_context_parallel()
        self.init_engine(parts.ref_model)
        # The loss is the share of a mean over the global batch already: the base class must not
        # scale it again.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._warned_logits = False
        self.router_aux_loss_coef = setup.moe_loss_weight(self.model, args)
        self.aux_loss_enabled = self.router_aux_loss_coef != 0.0
        self.objective = Objective(args, self.loss, self.router_aux_loss_coef)
        self.model.add_model_tags(list(self._tag_names))
        self.init_logs()
        self.init_layout(data_collator, parts.ref_model)
        self.start_reference(plan, parts.ref_model)
        self.shard_reference()
        self.hook_reference()

    # -- one step ----------------------------------------------------------------------------------
    # --------------------

    def compute_loss(  # type: ignore[override]  # the counts are ours
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: BatchCounts | None = None,
    ) -> Any:
        """This micro-batch's share of the mean over the global batch; see :class:`Objective`."""
        with self.reference_attention(inputs):
            output = self.objective(
                model,
                inputs,
                self.reference,
                num_items_in_batch,
                token_stats=self.wants_token_stats(),
                sequence_group=self.sequence_group if SHIFT_KEY in inputs else None,
            )
        self.record(output, [inputs[key] for key in COUNT_KEYS])
        # DDP and its kin average gradients over the ranks; the share is already of the global sum.
        loss = output.loss
        if num_items_in_batch is not None:
            loss = loss * self.data_parallel_size
        return (loss, output) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; on a CPU, freed memory stays with the process meanwhile."""
        try:
            with self.training_memory():
                return super().train(*args, **kwargs)
        finally:
            if self.args.device.type == "cpu":
                return_freed_memory()

    def training_memory(self) -> contextlib.AbstractContextManager[None]:
        """What ``train`` sets for the allocator; whoever runs steps by hand enters it around
        them.
        """
        if self.args.device.type != "cpu":
            return contextlib.nullcontext()
        return freed_memory_kept()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the layouts have it, with activations in host memory where ``activation_offloading``
        asks for it.
        """
        with self._activation_offload_context():
            return super().training_step(*args, **kwargs)

    def _activation_offload_context(self) -> contextlib.AbstractContextManager[Any]:
        if self.args.activation_offloading and self.args.device.type == "cuda":
            return torch.autograd.graph.save_on_cpu(pin_memory=True)
        return contextlib.nullcontext()

    @property
    def data_parallel_size(self) -> int:
        """Ranks over which the engine averages gradients."""
        return self.accelerator.num_processes // (self.get_tp_size() * self.summed_ranks)

    @property
    def ranks_per_pair(self) -> int:
        """Ranks that train on the same pairs: those of a tensor, context or sequence parallel
        group.
        """
        return self.ranks_per_eval_pair * self.get_sp_size()

    @property
    def ranks_per_eval_pair(self) -> int:
        """Ranks that evaluate the same pairs: DeepSpeed cuts no rows of an evaluation."""
        return self.get_tp_size() * self.get_cp_size()

    def _get_num_items_in_batch(  # type: ignore[override]
        self, batch_samples: list[dict[str, Any]], device: torch.device
    ) -> BatchCounts | None:
        """Pairs and chosen tokens of all micro-batches of a step, over the ranks."""
        if not batch_samples:
            return None
        counts = local_counts(batch_samples)
        if self.accelerator.num_processes == 1:
            return BatchCounts(*counts)
        total = self.accelerator.reduce(on_device(counts, device), "sum")
        return BatchCounts(*(total // self.ranks_per_pair).unbind())

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(SIGNATURE_COLUMNS)  # type: ignore[assignment]

    # -- evaluation --------------------------------------------------------------------------------
    # --------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss of a batch; with ``compute_metrics`` also its logits ``[2P, T, V]`` and
        ``input_ids``, for which rows stay whole under context parallelism.
        """
        inputs = self._prepare_inputs(inputs)
        self._eval_pairs = len(inputs["seq_lens"]) // 2
        if prediction_loss_only:
            context, inputs = self._prepare_context_parallel_inputs(model, inputs)
            with torch.no_grad(), context(), self.compute_loss_context_manager():
                return self.compute_loss(model, inputs), None, None
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            self._warn_logits()
            model_inputs = {k: v for k, v in inputs.items() if k not in NON_MODEL_KEYS}
            logits = model(**model_inputs, use_cache=False).logits
        return loss, logits, inputs["input_ids"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a ragged last batch keeps the rejected rows of its
        predictions.
        """
        self.gather_function = self._gather_pairs
        return super().evaluation_loop(*args, **kwargs)

    def _gather_pairs(self, tensor: Tensor) -> Tensor:
        # gather_for_metrics cuts the last batch to its number of pairs; predictions have two rows a
        # pair. The base class repeats a batch's loss as often as a whole batch has pairs, and only
        # cuts the last one where it knows the length: not of a stream.
        pairs = self._eval_pairs
        alone = self.accelerator.num_processes == self.ranks_per_eval_pair
        if tensor.dim() == 1 and alone:
            return self._gather_once(tensor[:pairs])
        if tensor.dim() < 2 or tensor.shape[0] != 2 * pairs:
            return self._gather_once(tensor)
        by_pair = tensor.unflatten(0, (2, pairs)).transpose(0, 1).contiguous()
        return self._gather_once(by_pair).transpose(0, 1).flatten(0, 1)

    def _gather_once(self, tensor: Tensor) -> Tensor:
        # of ranks that see the same pairs, which are neighbours, gather_for_metrics would take all
        copies = self.ranks_per_eval_pair
        if copies == 1:
            return self.accelerator.gather_for_metrics(tensor)
        alike = self.accelerator.gather(tensor).unflatten(0, (-1, copies, len(tensor)))
        once, ending = alike[:, 0].flatten(0, 1), self.accelerator.gradient_state
        return (
            once[: ending.remainder] if ending.end_of_dataloader and ending.remainder > 0 else once
        )

    def _warn_logits(self) -> None:
        if not self._warned_logits:
            self._warned_logits = True
            logger.warning(
                "compute_metrics and predict need logits: each batch takes one more forward, with "
                "[2P, T, V] in memory."
            )

    def _refuse_data_parallel(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs, which transformers would drive with "
                "nn.DataParallel: launch "
                "with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    refuse_removed(arguments, REMOVED_ARGUMENTS, "Trainer")
    refuse_removed(arguments, REMOVED_FIELDS, "Trainer (as DPOConfig)")
    for f in dataclasses.fields(DPOConfig):
        if f.name in arguments:
            raise TypeError(
                f"Trainer takes no {f.name!r}, which is a field of its args: write "
                f"args=DPOConfig({f.name}=...)."
            )
    if arguments:
        raise TypeError(f"Trainer got unexpected arguments: {', '.join(sorted(arguments))}.")


def _short_name(model: Any) -> str:
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    return name.rstrip("/").split("/")[-1] or "model"
