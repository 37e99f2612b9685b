"""Tensors of a reference beside parameters that FSDP2 or ZeRO-3 has sharded: cut, exchanged, put
back into force.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpo_fast.functional.ema_shards import (
    is_contiguous_shard,
    is_zero3,
    local_of,
    shard_start,
)

# What activation checkpointing and torch.compile put into the names of parameters.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers that an engine may have put around modules."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def cut_like(whole: Tensor, param: Any, name: str) -> Tensor:
    """This rank's part of ``whole``, sharded as ``param`` is, on its device and in its dtype.

    No communication: every rank has all of ``whole``.

    Raises:
        ValueError: ``param`` is split along another dimension than the first.
    """
    return wrap_like(range_of(whole, param, name).to(local_of(param), copy=True), param)


def wrap_like(piece: Tensor, param: Any) -> Tensor:
    """This rank's part as a sharded tensor, which the EMA and a checkpoint read as ``param``."""
    if is_zero3(param):
        return _like_zero3(piece, param)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        piece,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def range_of(whole: Tensor, param: Any, name: str) -> Tensor:
    """A view of the elements of ``whole`` that ``param`` has on this rank, in its local shape."""
    if not is_contiguous_shard(param):
        raise ValueError(
            f"{name!r} is split as {param.placements}: a reference beside it needs shards that are "
            "rows of the parameter (FSDP2, ZeRO-3, DDP). Use reference='precomputed', which is "
            "computed before the model is sharded."
        )
    local, start = local_of(param), shard_start(param)
    return whole.detach().reshape(-1)[start : start + local.numel()].view(local.shape)


def _like_zero3(piece: Tensor, param: Any) -> Tensor:
    stand_in: Any = torch.empty(0, dtype=piece.dtype, device=piece.device)
    part: Any = piece.detach()  # a tensor object of its own, on the same memory
    part.ds_numel = param.ds_tensor.ds_numel
    stand_in.ds_tensor, stand_in.ds_numel = part, param.ds_numel
    stand_in.ds_shape, stand_in.ds_process_group = param.ds_shape, param.ds_process_group
    return stand_in


@torch.no_grad()
def exchange_values(one: Tensor, other: Tensor) -> None:
    """Swap what two equal shards hold. The gathered copies of neither are touched: :func:`reshard`
    them.
    """
    a, b = local_of(one), local_of(other)
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def reshard(modules: Iterable[nn.Module], params: Iterable[Any] = ()) -> None:
    """Drop gathered weights, so that the next forward gathers what the shards hold by then.

    Args:
        modules: units of FSDP2; those with ``reshard_after_forward=False`` stay gathered until
            the backward.
        params: of ZeRO-3, which keeps small ones, and any that are used again soon, gathered.
    """
    for module in modules:
        module.reshard()  # type: ignore[operator]
    for param in params:
        if is_zero3(param) and param.ds_status.name == "AVAILABLE":
            param.partition()


def units_of(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The units of FSDP2 in ``module`` that gather the parameters ``names``."""
    known = {name: unit for name, unit in module.named_modules() if is_unit(unit)}
    units: dict[str, nn.Module] = {}
    for path in names if known else ():
        while path:
            path = path.rpartition(".")[0]
            if path in known:
                units[path] = known[path]
                break
    return list(units.values())


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 gathers this module's parameters at once; imports nothing."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def reshard_all(module: nn.Module) -> None:
    """:func:`reshard` everything in ``module``: its parameters are the shards afterwards."""
    reshard(filter(is_unit, module.modules()), module.parameters())
