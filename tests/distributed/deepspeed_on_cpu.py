"""DeepSpeed through accelerate on a CPU, where accelerate 1.15 would count one process a rank.

accelerate knows no backend for a launch without accelerators, and every rank would read the same
pairs. It is told gloo here; DeepSpeed, its hooks and its collectives are the real ones.
"""

import os
from typing import Any

import accelerate.state
from accelerate.utils import DistributedType


def use_deepspeed_on_cpu() -> None:
    """From here on accelerate finds gloo and all ranks."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

    def backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_CPU

    accelerate.state.PartialState._prepare_backend = backend


def gather_uneven() -> None:
    """From here on ``deepspeed.comm.all_gather`` takes tensors of several sizes, as NCCL's does and
    gloo's does not: each rank's is broadcast, which is how NCCL's backend gathers such tensors.
    """
    import deepspeed.comm as comm
    import torch.distributed as dist

    usual = comm.all_gather

    def all_gather(tensor_list: list[Any], tensor: Any, group: Any = None, **kwargs: Any) -> Any:
        if all(one.shape == tensor.shape for one in tensor_list):
            return usual(tensor_list, tensor, group=group, **kwargs)
        for rank, one in enumerate(tensor_list):
            if rank == dist.get_rank(group):
                one.copy_(tensor)
            dist.broadcast(one, group=group, group_src=rank)
        return None

    comm.all_gather = all_gather
