"""A deep stack of like layers, traced at two small depths: what grows, grows by the layer.

A step over L layers is a sequence of passages, one a layer, forward and back, between what comes
before, at the loss and after. Layers that are alike pass alike: each passage starts where the one
before has ended, so the bytes alive at any moment of a step are linear in the number of layers
between it and the start. Two depths therefore give every depth, exactly, moment by moment; the
peak is the largest of the moments, which may be another one at each depth. The last layer is a
passage of its own: of packed rows it computes the scored ones only.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_fast.models import base_causal_lm
from dpo_fast.plan.live import LiveMemory

_OWN_NUMBER = ("idx", "index", "number")  # ends of names that say which layer this is


class Stack(NamedTuple):
    """The layers of a model that repeat: ``lead`` of their own, then periods of ``period``.

    Attributes:
        layers: the model's list.
        depth: of the whole model.
    """

    layers: nn.ModuleList
    depth: int
    lead: int
    period: int

    @property
    def shallow(self) -> tuple[int, int]:
        """The two depths: the lead, one period or two, the layers counted from the back, and what
        lets a whole number of periods lie between them and the model.
        """
        least = self.lead + self.period + self.from_back
        first = least + (self.depth - least) % self.period
        return first, first + self.period

    @property
    def from_back(self) -> int:
        """Layers counted from the back: the last one, and a period before it."""
        return self.period + 1

    def times(self) -> int:
        """How often the difference of the two lies between the first of them and the model."""
        first, second = self.shallow
        return (self.depth - first) // (second - first)

    @contextlib.contextmanager
    def cut(self, depth: int) -> Iterator[None]:
        """Inside, the model has its first ``depth`` layers only."""
        whole = self.layers._modules
        self.layers._modules = dict(list(whole.items())[:depth])
        try:
            yield
        finally:
            self.layers._modules = whole

    @contextlib.contextmanager
    def marks(self, memory: LiveMemory) -> Iterator[None]:
        """Inside, each layer's passage is a moment of its own: the first layers counted from the
        front, the last ones from the back, so that passages have one name at every depth.
        """
        depth, passes = len(self.layers), 0

        def place(i: int) -> str:
            return f"layer {i}" if i < depth - self.from_back else f"layer {i - depth}"

        def before(i: int) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                nonlocal passes
                if not memory.moment.phase == "backward":  # there it is a recomputation
                    passes += i == 0
                    memory.mark(f"pass {passes}, {place(i)}")

            return hook

        def after(i: int) -> Any:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                hidden = out if isinstance(out, Tensor) else out[0]
                if memory.moment.phase == "forward" and hidden.requires_grad:
                    name = f"pass {passes}, {place(i)}"
                    hidden.register_hook(lambda grad: memory.mark(name))

            return hook

        handles = []
        for i, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(before(i)))
            handles.append(layer.register_forward_hook(after(i)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_stack(model: nn.Module) -> Stack | None:
    """The stack of a model whose layers repeat often enough to be worth it; None of others."""
    lm: Any = base_causal_lm(model)
    depth = getattr(lm.config, "num_hidden_layers", 0)
    lists = [m for m in lm.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1 or depth < 4:
        return None
    kinds = [_kind(layer) for layer in lists[0]]
    found = [
        Stack(lists[0], depth, lead, period)
        for lead in range(depth)
        for period in range(1, (depth - lead) // 4 + 1)
        if all(kinds[i] == kinds[i + period] for i in range(lead, depth - period))
    ]
    return min(found, key=lambda stack: stack.shallow[1], default=None)


def _kind(layer: nn.Module) -> list[Any]:
    """Equal for layers that compute and keep alike: classes, settings, shapes."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | torch.dtype | None)
            and not key.endswith(_OWN_NUMBER)
        }
        tensors = [
            (key, t.shape, t.dtype, t.requires_grad)
            for own in (module.named_parameters, module.named_buffers)
            for key, t in own(recurse=False)
        ]
        found.append((name, type(module), settings, tensors))
    return found
