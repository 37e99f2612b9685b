"""Named moments of a run, counted; the process dies by SIGKILL at one of them.

A moment is before or after a call that writes, syncs, renames or deletes, and before, between or
after the calls of a training step. Of a file that a library writes, there is a moment at which half
of it is on the disk.
"""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Events:
    """Counts moments; dies at the ``fatal``-th (from 1), if there is one.

    ``names``: what the moments were, in order.
    """

    def __init__(self, fatal: int | None = None) -> None:
        self.fatal = fatal
        self.names: list[str] = []

    def happen(self, name: str, before_death: Callable[[], None] | None = None) -> None:
        self.names.append(name)
        if len(self.names) == self.fatal:
            if before_death is not None:
                before_death()
            print(f"killed at moment {self.fatal}: {name}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str) -> None:
        """Moments before and after each call of ``owner.name``."""
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.happen(f"before {name}")
            result = original(*args, **kwargs)
            self.happen(f"after {name}")
            return result

        setattr(owner, name, watched)

    def watch_sync(self) -> None:
        """Before ``os.fsync`` half of the file is on the disk, where it was open for writing."""
        original = os.fsync

        def watched(descriptor: int) -> None:
            self.happen("in fsync", lambda: lose_half(descriptor))
            original(descriptor)
            self.happen("after fsync")

        os.fsync = watched

    def watch_writer(self, owner: Any, name: str) -> None:
        """``owner.name(what, path, ...)`` writes a file: also a moment when half of it is there."""
        original = getattr(owner, name)

        def watched(what: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            self.happen(f"before {name}")
            result = original(what, path, *args, **kwargs)
            self.happen(f"in {name}", lambda: cut_in_half(path))
            return result

        setattr(owner, name, watched)


def cut_in_half(path: Any) -> None:
    """A file that was being written when the process died."""
    if isinstance(path, str | os.PathLike):
        os.truncate(path, Path(path).stat().st_size // 2)


def lose_half(descriptor: int) -> None:
    """What the kernel has not written yet is lost with the power."""
    try:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    except OSError as error:
        assert error.errno in (errno.EBADF, errno.EINVAL)  # open for reading, or a folder


def watch_everything(events: Events) -> None:
    """All moments of a training with checkpoints, a cache and an EMA."""
    import safetensors.torch
    import torch
    import transformers.modeling_utils
    from transformers import TrainerState

    from dpo_fast.functional.ema import EmaPlan
    from dpo_fast.trainer.objective import Objective

    for name in ("replace", "rename", "unlink"):
        events.watch(os, name)
    events.watch_sync()
    events.watch(shutil, "rmtree")
    events.watch_writer(torch, "save")
    events.watch_writer(safetensors.torch, "save_file")
    events.watch_writer(transformers.modeling_utils, "safe_save_file")
    events.watch_writer(TrainerState, "save_to_json")
    events.watch(torch.optim.AdamW, "step")
    events.watch(Objective, "__call__")
    events.watch(EmaPlan, "update_")
