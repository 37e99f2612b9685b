"""Sharded parameters in the EMA: every rank updates its own shard, and nothing is gathered.

A DTensor (FSDP2, tensor parallelism) is replaced by its local tensor, a parameter of DeepSpeed's
ZeRO-3 (which is empty itself) by its partition, and either by where that begins in the whole
parameter, so that stochastic rounding draws the same bits on any number of ranks.
"""

import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """True for a DTensor; does not import torch.distributed, without which there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_zero3(tensor: Any) -> bool:
    """True for a parameter that DeepSpeed's ZeRO-3 has partitioned."""
    return getattr(tensor, "ds_tensor", None) is not None


def is_sharded(tensor: Any) -> bool:
    """Whether a rank holds a part of the parameter outside of a forward."""
    return is_dtensor(tensor) or is_zero3(tensor)


def whole_shape(tensor: Any) -> torch.Size:
    """The shape of the parameter that ``tensor`` is a shard of."""
    return torch.Size(tensor.ds_shape) if is_zero3(tensor) else tensor.shape


def local_of(tensor: Any) -> Tensor:
    """The shard of this rank (of ZeRO-3: ``[n]``, without the padding); a plain tensor is its own.

    Writing into it writes into the parameter, as the next gather will see it.
    """
    if is_zero3(tensor):
        _, count = _partition(tensor)
        return tensor.ds_tensor.detach().narrow(0, 0, count)
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():  # as to_local() is then a look-up
        return tensor.to_local()


def _partition(tensor: Any) -> tuple[int, int]:
    """First element and number of elements of this rank's part: equal parts, the last padded."""
    size = tensor.ds_tensor.ds_numel
    first = torch.distributed.get_rank(tensor.ds_process_group) * size
    return first, max(0, min(size, tensor.ds_numel - first))


def check_sharded_alike(ref: Any, ref_name: str, policy: Any, policy_name: str) -> None:
    """Both plain, or both split over the same ranks in the same way."""
    for kind, what in ((is_dtensor, "a DTensor"), (is_zero3, "partitioned by ZeRO-3")):
        if kind(ref) != kind(policy):
            plain, sharded = (policy_name, ref_name) if kind(ref) else (ref_name, policy_name)
            raise ValueError(
                f"{sharded} is {what} and {plain} is not; shard policy and reference alike"
            )
    if is_dtensor(ref):
        for tensor, name in ((ref, ref_name), (policy, policy_name)):
            if any(placement.is_partial() for placement in tensor.placements):
                raise ValueError(
                    f"{name} has partial placements {tensor.placements}; redistribute it"
                )
    if not is_sharded(ref):
        return
    if whole_shape(ref) != whole_shape(policy) or _split(ref) != _split(policy):
        raise ValueError(
            f"{ref_name} {tuple(whole_shape(ref))} {_split(ref)[-1]} and {policy_name} "
            f"{tuple(whole_shape(policy))} {_split(policy)[-1]} are split differently, or over "
            "different ranks; shard policy and reference alike"
        )


def _split(tensor: Any) -> tuple[Any, ...]:
    """What says how a sharded tensor is split."""
    if is_zero3(tensor):
        return torch.distributed.get_world_size(tensor.ds_process_group), _partition(tensor)
    return tensor.device_mesh, tensor.placements


def shard_start(tensor: Any) -> int:
    """Where this rank's shard begins among the elements of the whole parameter.

    Exact for parameters split along their first dimension, as FSDP2 does, for ZeRO-3, and for
    replicas. A split along another dimension scatters a shard over the parameter: its elements then
    get positions of their own, which depend on the number of ranks.
    """
    if is_zero3(tensor):
        return _partition(tensor)[0]
    if not is_dtensor(tensor) or tensor.dim() == 0:
        return 0
    mesh, first, rows = tensor.device_mesh, 0, tensor.shape[0]
    index, count, by_rows = 0, 1, True
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        ranks, rank = mesh.size(dim), mesh.get_local_rank(dim)
        index, count = index * ranks + rank, count * ranks
        by_rows = by_rows and placement.is_shard(0) and type(placement).__name__ == "Shard"
        size = -(-rows // ranks)
        begin = min(rank * size, rows)
        first, rows = first + begin, min(size, rows - begin)
    local = local_of(tensor)
    if by_rows and local.shape[0] == rows:
        return first * (local.numel() // rows if rows else 0)
    return index * -(-tensor.numel() // count)


def is_contiguous_shard(tensor: Any) -> bool:
    """Whether the shard is one range of the flattened parameter: whole, by rows, or of ZeRO-3."""
    if not is_dtensor(tensor):
        return True
    return all(
        p.is_replicate() or (p.is_shard(0) and type(p).__name__ == "Shard")
        for p in tensor.placements
    )
