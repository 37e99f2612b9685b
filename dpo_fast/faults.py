"""One rank fails, and the others say why instead of "connection closed by peer".

A rank that ends with an error leaves its reason in the launch's store and, under torchrun, in the
error file from which torchrun's summary is made. A rank whose collective then breaks looks the
reason up. A rank that was killed leaves none: the survivors find out who is missing.

What ends a collective whose peer is gone is torch's business: gloo sees the closed connection at
once, NCCL's watchdog aborts after ``ddp_timeout`` (default 30 minutes), and torchrun or
``accelerate launch`` stop all ranks within a second of the first failure.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_REASON, _ALIVE, _SAID = "dpo_fast/reason", "dpo_fast/alive", "_dpo_fast_said"
_ROLL_CALL_SECONDS = 5.0
_BROKEN = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "NCCL error")


class RankError(RuntimeError):
    """Another rank failed; the message has its number and its reason."""


@contextmanager
def reasons_shared() -> Iterator[None]:
    """Inside, an error of this rank reaches the others, and theirs this one. Nesting is harmless.

    In a single process, and for anything but errors, it does nothing.

    Raises:
        RankError: a collective broke because another rank is gone.
    """
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        if not _launched() or getattr(error, _SAID, False):
            raise
        if is_broken_collective(error):
            raise RankError(_what_happened()) from error
        setattr(error, _SAID, True)
        _leave(error)
        raise


def is_broken_collective(error: BaseException) -> bool:
    """Whether ``error`` says that a peer of a collective is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _BROKEN)


def _launched() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _leave(error: Exception) -> None:
    """Store the reason of this rank; under torchrun also its error file."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    text = f"rank {dist.get_rank()} of {dist.get_world_size()}: {type(error).__name__}: {error}"
    try:
        # the first reason counts: compare_set takes it only where there is none
        _store().compare_set(_REASON, "", text)
    except dist.DistError:
        pass  # the store went with the rank that kept it: nobody is left to read it


def _what_happened() -> str:
    go_on = (
        "This rank stops with it. The last complete checkpoint is untouched: correct the cause and "
        "start again with resume_from_checkpoint=True."
    )
    try:
        reason, silent = _roll_call()
    except dist.DistError as error:
        return (
            "Another rank is gone, and with it the store that all ranks share, so its reason is "
            f"not known here ({error}): look at the log of rank 0. {go_on}"
        )
    if reason is not None:
        return f"Another rank failed first, {reason}\n{go_on}"
    if silent:
        who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        return (
            f"{who} of {dist.get_world_size()} died without a word: killed from outside (out of "
            "host memory, preemption, kill -9) or crashed in native code; see its log and dmesg. "
            f"{go_on}"
        )
    return f"A collective broke while all ranks live: the network failed. {go_on}"


def _roll_call() -> tuple[str | None, list[int]]:
    """The reason that was left, or the ranks that do not answer within a few seconds."""
    store, rank, size = _store(), dist.get_rank(), dist.get_world_size()
    store.set(f"{_ALIVE}/{rank}", "yes")
    deadline = time.monotonic() + _ROLL_CALL_SECONDS
    while True:
        if store.check([_REASON]):
            return store.get(_REASON).decode(), []
        silent = [other for other in range(size) if not store.check([f"{_ALIVE}/{other}"])]
        if not silent or time.monotonic() > deadline:
            return None, silent
        time.sleep(0.05)
