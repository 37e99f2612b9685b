"""What is alive at a time, and at most: storages counted as operations make and drop tensors.

Works on fake tensors, which have sizes and no memory: a training step of a model of any size runs
and says what it would hold. Each storage counts once, whatever views there are, under the name of
the part that made it.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Moment(NamedTuple):
    """When in a step: what it was doing, and where in the model."""

    phase: str = ""
    place: str = ""


class LiveMemory(TorchDispatchMode):
    """Bytes alive while the mode is on, by part, and their state at the peak of each moment.

    Attributes:
        live: bytes now, by part.
        peaks: bytes by part when their sum is largest, of each moment.
        moment: what the step is doing.
        flops: of all operations that ``count`` knows.

    Args:
        count: floating point operations of an operation, from it, its arguments and its result.
    """

    def __init__(self, count: Callable[[Any, Any, Any, Any], int] | None = None) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peaks: dict[Moment, Counter[str]] = {}
        self.moment = Moment()
        self.flops = 0
        self._count = count
        self._part = "activations"
        self._total = 0
        self._most: dict[Moment, int] = {}
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made inside belongs to ``name``."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """A peak inside is in ``phase``."""
        before, self.moment = self.moment, Moment(phase)
        try:
            yield
        finally:
            self.moment = before

    def mark(self, place: str) -> None:
        """From now on a peak is at ``place`` of the phase."""
        self.moment = self.moment._replace(place=place)

    @property
    def peak(self) -> Counter[str]:
        """Bytes at the peak, by part."""
        return self.peaks.get(self._highest(), Counter())

    @property
    def phase(self) -> str:
        """What the step was doing at the peak."""
        return self._highest().phase

    def _highest(self) -> Moment:
        return max(self._most, key=lambda moment: self._most[moment], default=self.moment)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._storages:
            return
        reference = weakref.ref(storage, lambda _: self._drop(key))
        self._storages[key] = (reference, size, self._part)
        self._move(self._part, size)

    def ignore(self, tensor: Tensor) -> None:
        """A tensor that is counted elsewhere, such as a weight."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            reference = weakref.ref(storage, lambda _: self._drop(key))
            self._storages[key] = (reference, 0, self._part)

    def rename(self, tensor: Tensor, part: str) -> None:
        """Move a counted tensor to another part."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            reference, size, before = self._storages[key]
            self._storages[key] = (reference, size, part)
            self.live[before] -= size
            self.live[part] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._count is not None:
            self.flops += self._count(func, args, kwargs or {}, out)
        tree_map_only(torch.Tensor, self.add, out)
        return out

    def _drop(self, key: int) -> None:
        _, size, part = self._storages.pop(key)
        self._move(part, -size)

    def _move(self, part: str, size: int) -> None:
        self.live[part] += size
        self._total += size
        if self._total > self._most.get(self.moment, -1):
            self._most[self.moment], self.peaks[self.moment] = self._total, self.live.copy()
