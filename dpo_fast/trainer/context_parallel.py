"""Context and sequence parallelism as accelerate sets them up: the ranks of a group share one
micro-batch, each computing other positions of its rows.

``cp_size`` (FSDP2): the loader gives whole rows to the ranks of a group, and accelerate cuts them
around the step, head and tail of the rows to one rank, so that causal attention costs all the same.
Evaluation is cut likewise, but for ``compute_metrics``, whose logits are of whole rows.

``sp_size`` (DeepSpeed): DeepSpeed's loader cuts the batches of training
(:mod:`dpo_fast.trainer.ulysses`); evaluation is of whole rows, each rank's own.

Legend: R ranks of a group.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.batch import SHIFT_KEY
from dpo_fast.trainer import ulysses
from dpo_fast.trainer.cut_rows import cuttable, refuse_options


class ContextParallelMixin:
    """Part of :class:`dpo_fast.Trainer`: batches whose rows are cut along their positions."""

    args: Any
    accelerator: Any
    model: Any
    reference: Any
    processing_class: Any
    _resumed_from: str | None = None

    @property
    def cut_by(self) -> str | None:
        """What cuts rows along their positions, as the user set it; None where they are whole."""
        for name in ("cp_size", "sp_size"):
            if self._ranks_by(name) > 1:
                return f"{name}={self._ranks_by(name)}"
        return None

    @property
    def sequence_group(self) -> Any:
        """The ``ProcessGroup`` over which rows are cut; None where they are whole.

        Under ``sp_size`` there is one once training has begun.
        """
        if self._ranks_by("cp_size") > 1:
            return self.accelerator.torch_device_mesh["cp"].get_group()
        return ulysses.group() if self._ranks_by("sp_size") > 1 else None

    def init_context_parallel(self) -> None:
        """Called when the accelerator exists, before the layout is chosen.

        Raises:
            ValueError: an option that cut rows cannot have, or DeepSpeed's attention the model.
            ImportError: DeepSpeed or accelerate is too old.
        """
        if self.cut_by is not None:
            refuse_options(self.args, self.cut_by)
        if self._ranks_by("sp_size") > 1:
            ulysses.prepare(self.accelerator, self.args, self.model)

    def loader_collator(self, collator: Any) -> Any:
        """``collator`` as the training loader calls it."""
        ranks = self._ranks_by("sp_size")
        if ranks == 1:
            return collator
        return ulysses.AdapterCollator(collator, ranks, self.processing_class.pad_token_id)

    def hook_reference(self) -> None:
        """A reference that is a model of its own attends as the policy is made to attend.

        Raises:
            ValueError: it cannot.
        """
        module: nn.Module | None = getattr(self.reference, "module", None)
        if module is None:
            return
        if self._ranks_by("cp_size") > 1:
            from accelerate.big_modeling import _attach_context_parallel_hooks

            _attach_context_parallel_hooks(module)
        if self._ranks_by("sp_size") > 1:
            ulysses.refuse_other_attention(module, self.model)

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: under ``sp_size``, a checkpoint from within an epoch.
        """
        self._resumed_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As in transformers; a loader that DeepSpeed will wrap is told the epoch to go on from,
        since its wrapper takes none.
        """
        values = super().set_initial_training_values(args, dataloader)  # type: ignore[misc]
        if self._ranks_by("sp_size") > 1 and self._resumed_from is not None:
            per_epoch = values[1]
            epoch = ulysses.epoch_of(self._resumed_from, per_epoch, args.ignore_data_skip)
            dataloader.set_epoch(epoch)
        return values

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As in transformers, of batches that DeepSpeed's loader may have cut."""
        if self._ranks_by("sp_size") > 1:
            epoch_iterator = map(ulysses.unpack, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]

    @property
    def summed_ranks(self) -> int:
        """Ranks of a group whose gradients the engine sums, before it averages over groups; 1 where
        it averages over all.

        DeepSpeed (0.18.4 to 0.19.8) sums them in ZeRO-2 and averages them in ZeRO-3.
        """
        return 1 if self.engine == "zero3" else self._ranks_by("sp_size")  # type: ignore[attr-defined]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers. The value that it returns is averaged over all ranks for the log, and
        ranks of a group have the same loss, not shares of it.
        """
        alike = self._ranks_by("cp_size") * self._ranks_by("sp_size")
        return super().training_step(*args, **kwargs) / (alike // self.summed_ranks)  # type: ignore[misc]

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        ranks = self._ranks_by("cp_size")
        if ranks > 1:
            inputs = cuttable(inputs, 2 * ranks, self.processing_class.pad_token_id)
        elif SHIFT_KEY in inputs:
            inputs = ulysses.plan_positions(inputs)
        return super()._prepare_context_parallel_inputs(model, inputs)  # type: ignore[misc]

    def reference_attention(self, inputs: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Inside, a reference answers for the positions that this rank got of ``inputs``."""
        if self._ranks_by("sp_size") == 1 or SHIFT_KEY not in inputs:
            return contextlib.nullcontext()
        return ulysses.exchanged_in_eval_mode(self.model.config._attn_implementation)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: under ``sp_size``, before training.
        """
        if self._ranks_by("sp_size") > 1:
            if not self.accelerator._models:
                raise ValueError(
                    f"evaluate() and predict() under {self.cut_by} come after train(): DeepSpeed "
                    "makes its groups of ranks once, when it takes the model with an optimizer. "
                    "Use eval_on_start=True, or leave sp_size at 1 to evaluate alone."
                )
            ulysses.undo_replication(self.model, getattr(self.reference, "module", None))
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _ranks_by(self, name: str) -> int:
        """R by ``"cp_size"`` or ``"sp_size"``."""
        parallel = getattr(self.accelerator, "parallelism_config", None)
        return int(getattr(parallel, name, 1) or 1)
