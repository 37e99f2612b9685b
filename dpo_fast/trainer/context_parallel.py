"""Context parallelism as accelerate sets it up: the ranks of a group share one micro-batch, each
computing other positions of its rows.

accelerate cuts tensors along their positions; a plan of scored tokens cannot be cut so. A batch is
given to it with ``shift_labels`` in the plan's place, and each rank plans the positions that it
got. Sums over sequences are then reduced over the group. Evaluation is cut likewise, but for
``compute_metrics``, whose logits are of whole rows.

Legend: P pairs, T padded length, R ranks of a group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_fast.batch import IGNORE_INDEX, SHIFT_KEY, is_right_padded, shifted_batch


class ContextParallelMixin:
    """Part of :class:`dpo_fast.Trainer`: batches that accelerate may cut."""

    args: Any
    accelerator: Any
    reference: Any
    processing_class: Any

    @property
    def sequence_group(self) -> Any:
        """The ``ProcessGroup`` over which rows are cut; None where they are whole."""
        if self._context_ranks() == 1:
            return None
        return self.accelerator.torch_device_mesh["cp"].get_group()

    def init_context_parallel(self) -> None:
        """Called when the accelerator exists, before the layout is chosen.

        Raises:
            ValueError: sequence parallelism, or an option that cut rows cannot have.
        """
        refuse_cut_heads(self.accelerator)
        if self._context_ranks() > 1:
            refuse_options(self.args)

    def hook_reference(self) -> None:
        """A reference that is a model of its own attends as accelerate makes the policy attend."""
        module: nn.Module | None = getattr(self.reference, "module", None)
        if module is None or self._context_ranks() == 1:
            return
        from accelerate.big_modeling import _attach_context_parallel_hooks

        _attach_context_parallel_hooks(module)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers. The value that it returns is averaged over all ranks for the log, and
        ranks of a group have the same loss, not shares of it.
        """
        return super().training_step(*args, **kwargs) / self._context_ranks()  # type: ignore[misc]

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        ranks = self._context_ranks()
        if ranks > 1:
            inputs = cuttable(inputs, ranks, self.processing_class.pad_token_id)
        return super()._prepare_context_parallel_inputs(model, inputs)  # type: ignore[misc]

    def _context_ranks(self) -> int:
        parallel = getattr(self.accelerator, "parallelism_config", None)
        return int(getattr(parallel, "cp_size", 1) or 1)


def cuttable(batch: dict[str, Any], ranks: int, pad_token_id: int) -> dict[str, Any]:
    """A planned batch of padded rows as ``ranks`` may share it: ``input_ids``, ``position_ids`` and
    ``shift_labels``, ``[2P, T]`` with T a multiple of ``2 * ranks`` (head and tail of the rows go
    to one rank, so that causal attention costs all the same).

    ``attention_mask`` is left out: of rows that are padded on the right, no scored position sees
    padding.

    Raises:
        ValueError: rows are packed, or padded on the left.
    """
    mask = batch.get("attention_mask")
    if mask is not None and not is_right_padded(mask):
        raise ValueError(
            "cp_size > 1: the batch has rows that are padded on the left, and cut rows are "
            "attended causally without a mask: use a collator that pads on the right, as "
            "dpo_fast's does."
        )
    shifted = {k: v for k, v in shifted_batch(batch).items() if k != "attention_mask"}
    missing = -shifted["input_ids"].shape[1] % (2 * ranks)
    width = shifted["input_ids"].shape[1] + missing
    for key, value in (("input_ids", pad_token_id), (SHIFT_KEY, IGNORE_INDEX)):
        shifted[key] = F.pad(shifted[key], (0, missing), value=value).contiguous()
    ids: Tensor = shifted["input_ids"]
    shifted["position_ids"] = torch.arange(width, device=ids.device).repeat(ids.shape[0], 1)
    return shifted


def refuse_options(args: Any) -> None:
    """Raise ValueError for what needs whole rows on each rank; with the remedy."""
    wrong = {
        "batch_layout": args.batch_layout not in ("auto", "padded"),
        "ld_alpha": args.ld_alpha is not None,
        "max_tokens_per_batch": args.max_tokens_per_batch is not None,
        "router_aux_loss_coef": bool(args.router_aux_loss_coef),
        "activation_offloading": args.activation_offloading,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(
                f"{name}={getattr(args, name)!r} needs whole rows on each rank, and cp_size > 1 "
                f"cuts them along their positions: leave {name} at its default, or use FSDP2 "
                "without context parallelism."
            )


def refuse_cut_heads(accelerator: Any) -> None:
    """Raise ValueError under DeepSpeed's sequence parallelism, whose loaders cut every tensor."""
    parallel = getattr(accelerator, "parallelism_config", None)
    size = getattr(parallel, "sp_size", 1) or 1
    if size > 1:
        raise ValueError(
            f"parallelism_config has sp_size={size}: DeepSpeed's loader would cut the trainer's "
            "plans of scored tokens as if they were rows. Use context parallelism (cp_size, with "
            "FSDP2); or, in a loop of your own, score a batch with shift_labels by "
            "fused_linear_dpo(..., sequence_group=...)."
        )
