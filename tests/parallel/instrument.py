"""Counts collectives: their operators, as torch dispatches them, with the bytes that go in."""

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return []


class CountCollectives(TorchDispatchMode):
    """Inside, every ``c10d`` operator is counted, also those that DDP's reducer and FSDP2 issue.

    ``calls``: operator to its calls, each the number of bytes of its largest tensor: the whole
    buffer of an all-gather, reduce-scatter or all-reduce.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            sizes = [t.numel() * t.element_size() for t in _tensors(args)]
            self.calls[func._schema.name.removeprefix("c10d::")].append(max(sizes, default=0))
        return func(*args, **(kwargs or {}))

    def take(self) -> dict[str, list[int]]:
        """What was counted since the last call."""
        found, self.calls = dict(self.calls), defaultdict(list)
        return found
