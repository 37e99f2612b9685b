"""FSDP2 through accelerate on a CPU, where accelerate 1.15 would run DDP without a word.

accelerate honours an FSDP plugin on accelerators only; the state that it keeps of a run is replaced
by one that says FSDP. Everything below that, the preparation of models and optimizers, the hooks,
collectives over gloo, checkpoints, is the real one. :func:`assert_sharded` proves that it happened.
"""

from typing import Any

import accelerate.accelerator
import accelerate.state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor


def plugin(**options: Any) -> FullyShardedDataParallelPlugin:
    """What ``examples/accelerate/fsdp2.yaml`` asks for."""
    return FullyShardedDataParallelPlugin(
        **{
            "fsdp_version": 2,
            "auto_wrap_policy": "transformer_based_wrap",
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT",
            "cpu_ram_efficient_loading": False,
            **options,
        }
    )


class _State(accelerate.state.AcceleratorState):
    options: dict[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "fsdp_plugin", None) is None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin(**self.options)
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def use_fsdp2(**options: Any) -> None:
    """From here on every accelerator of this process runs FSDP2."""
    _State.options = options
    accelerate.accelerator.AcceleratorState = _State


def assert_sharded(model: nn.Module, ranks: int) -> None:
    """Every parameter is a DTensor, and this rank holds a part of the whole."""
    parameters = dict(model.named_parameters())
    assert parameters
    for name, param in parameters.items():
        assert isinstance(param, DTensor), f"{name} is {type(param).__name__}: not sharded"
        if ranks > 1:
            assert param.to_local().numel() < param.numel(), name
