"""Sharded parameters in the EMA: every rank updates its own shard, and nothing is gathered.

A DTensor (FSDP2, tensor parallelism) is replaced by its local tensor and by where that begins in
the whole parameter, so that stochastic rounding draws the same bits on any number of ranks.
"""

import sys
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """True for a DTensor; does not import torch.distributed, without which there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Any) -> Tensor:
    """The shard of this rank; a plain tensor is its own."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():  # as to_local() is then a look-up
        return tensor.to_local()


def check_sharded_alike(ref: Any, ref_name: str, policy: Any, policy_name: str) -> None:
    """Both plain, or both split over the same ranks in the same way."""
    if not is_dtensor(ref) and not is_dtensor(policy):
        return
    if not (is_dtensor(ref) and is_dtensor(policy)):
        plain, sharded = (policy_name, ref_name) if is_dtensor(ref) else (ref_name, policy_name)
        raise ValueError(
            f"{sharded} is a DTensor and {plain} is not; shard policy and reference alike"
        )
    for tensor, name in ((ref, ref_name), (policy, policy_name)):
        if any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(f"{name} has partial placements {tensor.placements}; redistribute it")
    same = ref.device_mesh == policy.device_mesh and ref.placements == policy.placements
    if ref.shape != policy.shape or not same:
        raise ValueError(
            f"{ref_name} {tuple(ref.shape)} {ref.placements} and {policy_name} "
            f"{tuple(policy.shape)} {policy.placements} are split differently, or over different "
            "ranks; shard policy and reference alike"
        )


def shard_start(tensor: Any) -> int:
    """Where this rank's shard begins among the elements of the whole parameter.

    Exact for parameters split along their first dimension, as FSDP2 does, and for replicas. A split
    along another dimension scatters a shard over the parameter: its elements then get positions of
    their own, which depend on the number of ranks.
    """
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
