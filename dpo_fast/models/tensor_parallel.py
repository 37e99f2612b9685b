"""A model whose LM head is split over a tensor-parallel mesh: local shard and group, no gather.

Legend: B rows, T padded length, H hidden, V vocabulary, r rank of the head's adapter.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.backends.shard import VocabShard
from dpo_fast.models.head import Head
from dpo_fast.naive import HeadLoRA


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor, without importing it for models that have none."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local_head(head: Head, model: nn.Module) -> Head:
    """The head as the ops take it: its DTensors as this rank's memory, gradients attached.

    A weight that is ``Shard(0)`` on a one-dimensional tensor-parallel mesh stays split over the
    vocabulary (``head.shard`` says where); a replicated one is taken as it is.

    Raises:
        ValueError: the weight is split in another way, or is FSDP2's and not gathered.
    """
    if not is_dtensor(head.weight):
        return head
    weight: Any = head.weight
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or _is_fsdp_shard(mesh, model):
        raise ValueError(
            f"the LM head's weight is a DTensor with placements {placements} on the mesh {mesh}: "
            "FSDP2 has not gathered it. Score inside the model's forward "
            "(dpo_fast.models.forward_scored), with the head in the root of fully_shard(model)."
        )
    if placements[0].is_replicate():
        return _local(head, None)
    if not placements[0].is_shard(0):
        raise ValueError(
            f"the LM head's weight is a DTensor with placements {placements}; it must be split "
            "over the vocabulary, Shard(0): give 'lm_head' the style 'colwise_gather_output' in "
            "the tp_plan (ColwiseParallel in parallelize_module), or leave it out of the plan."
        )
    shard = VocabShard.even(mesh.get_group(), weight.shape[0])
    rows = weight.to_local().shape[0]
    expected = _rows(shard)
    if rows != expected or rows == 0:
        raise ValueError(
            f"this rank holds {rows} rows of an LM head of {shard.total}, and Shard(0) over "
            f"{mesh.size()} ranks gives it {expected}: use fewer ranks than rows, and DTensor's "
            "own split."
        )
    return _local(head, shard)


def _is_fsdp_shard(mesh: Any, model: nn.Module) -> bool:
    """FSDP2's shards look like tensor parallel ones; the mesh's name tells, else who owns them."""
    names = mesh.mesh_dim_names or ()
    if any("tp" in str(name) for name in names):
        return False
    return any(hasattr(module, "_get_fsdp_state") for module in model.modules())


def _local(head: Head, shard: VocabShard | None) -> Head:
    lora = head.lora
    if lora is not None:
        lora = HeadLoRA(
            _same_rows(lora.a, None, "lora.a"), _same_rows(lora.b, shard, "lora.b"), lora.scale
        )
    bias = None if head.bias is None else _same_rows(head.bias, shard, "bias")
    weight = _same_rows(head.weight, shard, "weight")
    return replace(head, weight=weight, bias=bias, lora=lora, shard=shard)


def _same_rows(tensor: Any, shard: VocabShard | None, name: str) -> Tensor:
    """Local memory of a part of the head that must lie as the weight does (``shard`` None: whole).

    The gradient of what every rank holds whole is whole on every rank: the ops sum it.
    """
    if is_dtensor(tensor):
        right = (
            tensor.placements[0].is_replicate()
            if shard is None
            else tensor.placements[0].is_shard(0)
        )
        if tensor.device_mesh.ndim == 1 and right:
            return tensor.to_local(grad_placements=tensor.placements)
    elif shard is None:
        return tensor
    elif name != "weight":
        return _OwnRows.apply(tensor, shard)  # a whole [V] or [V, r] next to a split weight
    raise ValueError(
        f"the LM head's {name} lies otherwise than its weight "
        f"({getattr(tensor, 'placements', 'a plain tensor')}, weight "
        f"{'whole' if shard is None else 'Shard(0)'}): split both over the vocabulary."
    )


def _rows(shard: VocabShard) -> int:
    return max(0, min(shard.longest, shard.total - shard.start))


class _OwnRows(torch.autograd.Function):
    """A rank's rows of what every rank holds whole; the gradient is whole on every rank."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shard: VocabShard) -> Tensor:
        ctx.shape, ctx.shard = tensor.shape, shard
        return tensor.narrow(0, shard.start, _rows(shard)).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shard: VocabShard = ctx.shard
        whole = grad.new_zeros(ctx.shape)
        whole.narrow(0, shard.start, grad.shape[0]).copy_(grad)
        return shard.sum_(whole), None


def whole_hidden(hidden_states: Any) -> Tensor:
    """``[B, T, H]`` as plain memory: sequence-parallel states (``Shard(1)``) are gathered, a
    ``Partial`` sum is taken.
    """
    if not is_dtensor(hidden_states):
        return hidden_states
    from torch.distributed.tensor import Replicate

    mesh = hidden_states.device_mesh
    whole = hidden_states.redistribute(placements=[Replicate()] * mesh.ndim)
    # dX is summed over the vocabulary's ranks inside the op: it is whole on each
    return whole.to_local(grad_placements=[Replicate()] * mesh.ndim)
