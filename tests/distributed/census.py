"""All memory that tensors hold at each operation of a step, at the size that it has then.

A census of storages: each counts once, whatever views there are, at its present size (FSDP2 resizes
the memory of gathered weights to nothing and back). It sees every storage that an operator returned
and those that it was told of, sharded tensors by their local part, and looks after every operator.
"""

import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Census(TorchDispatchMode):
    """``peaks``: the most bytes at once, by phase; a look outside of any counts for ``""``."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}
        self.before = 0
        self._phase = ""
        self._known: dict[int, weakref.ref[Any]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Looks inside count for ``name``."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def add(self, tensors: Iterable[Any]) -> None:
        """Know the storages of ``tensors`` from here on."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            tensor = getattr(tensor, "_local_tensor", tensor)
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known[key] = weakref.ref(storage, lambda _, key=key: self._known.pop(key))

    def total(self) -> int:
        """Bytes that the known storages have now."""
        held = (reference() for reference in list(self._known.values()))
        return sum(storage.nbytes() for storage in held if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(tree_leaves(out))
        held, most = self.total(), self.peaks.get(self._phase, 0)
        if held > most:
            # gloo's thread drops its hold on a finished collective's tensors a moment after the
            # wait for it has returned: what goes by itself while nothing runs is not held
            time.sleep(0.005)
            self.peaks[self._phase] = max(most, self.total())
        return out


def watch_second_step(trainer: Any) -> Census:
    """Of the second step of ``trainer``, when the optimizer's states are there: its peaks, those of
    the reference's forward as ``"reference"``. ``before``: bytes when it begins.
    """
    census, steps = Census(), 0
    step, reference = trainer.training_step, trainer.reference

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps != 2:
            return step(*args, **kwargs)
        know(census, trainer)
        census.before = census.total()
        with census:
            return step(*args, **kwargs)

    trainer.training_step = watched
    run = getattr(reference, "_run", None)
    if run is not None:

        def of_the_reference(*args: Any, **kwargs: Any) -> Any:
            with census.phase("reference"):
                return run(*args, **kwargs)

        reference._run = of_the_reference
    return census


def know(census: Census, trainer: Any) -> None:
    """What stands already: weights, optimizer's states, memory that FSDP2 keeps for gathering."""
    from dpo_fast.reference.shards import is_unit

    census.add(t for state in trainer.optimizer.state.values() for t in state.values())
    for model in (trainer.model, trainer.ref_model):
        if model is None:
            continue
        census.add([*model.parameters(), *model.buffers()])
        for unit in filter(is_unit, model.modules()):
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                for param in group.fsdp_params:
                    census.add([param._sharded_param_data, *param.all_gather_outputs])
