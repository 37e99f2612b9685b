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
