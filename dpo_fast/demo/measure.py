"""Seconds and bytes of one strategy: a trainer that keeps the time of its parts, and peak
memory.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpo_fast.perf import peak_memory_bytes
from dpo_fast.trainer import Trainer


class TimedTrainer(Trainer):
    """Keeps the seconds of training (evaluation excluded) and of what the reference takes.

    ``reference_seconds["before"]``: making the reference, computing its log-probs in advance;
    ``["during"]``: its forward passes and updates in the training steps. Where policy and reference
    share one pass through the LM head, that pass counts for the policy.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.train_seconds = 0.0
        self.reference_seconds = {"before": 0.0, "during": 0.0}
        super().__init__(*args, **kwargs)

    def start_reference(self, *args: Any, **kwargs: Any) -> None:
        """Timed; the reference's methods are timed from then on."""
        with self._timed("before"):
            super().start_reference(*args, **kwargs)
        for name in ("hidden", "logps", "on_step_end"):
            setattr(self.reference, name, self._wrap(getattr(self.reference, name)))

    def _wrap(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.model.training:
                return method(*args, **kwargs)
            with self._timed("during"):
                return method(*args, **kwargs)

        return timed

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = now()
        yield
        self.reference_seconds[part] += now() - begin

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Timed; evaluations in between are taken off again."""
        begin = now()
        result = super().train(*args, **kwargs)
        self.train_seconds += now() - begin
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Not a part of training."""
        begin = now()
        metrics = super().evaluate(*args, **kwargs)
        self.train_seconds -= now() - begin
        return metrics


def now() -> float:
    """Seconds; what the device was given before is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """Peak above what was in use when this was made, in bytes: allocated device memory on CUDA,
    else resident memory of this process.
    """

    def __init__(self) -> None:
        self._resets = False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts anew
            self._resets = True
        self._start = self._peak()

    def bytes(self) -> int:
        """So far."""
        return self._peak() - self._start

    def _peak(self) -> int:
        if not self._resets:
            return peak_memory_bytes()
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found.group(1)) * 1024


def reference_memory_bytes(trainer: Trainer) -> int:
    """Bytes of the reference's own parameters and buffers: what it does not share with the
    policy.
    """
    module = getattr(trainer.reference, "module", None)
    if module is None:
        return 0
    policy = {t.data_ptr() for t in _tensors(trainer.model)}
    own = {t.data_ptr(): t.nbytes for t in _tensors(module) if t.data_ptr() not in policy}
    return sum(own.values())


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``; 0 if it does not exist."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
