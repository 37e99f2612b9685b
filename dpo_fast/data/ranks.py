"""The processes of a distributed launch, as far as the preparation of data minds them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dpo_fast.data.report import logger


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in turns, so that what one process caches the others find.

    The global main process goes first, then the main process of each node (whose disk may not be
    shared), then all others. An exception of one does not keep the others waiting. Without a
    process group the block simply runs.

    This waits at barriers of the default process group itself: accelerate's ``PartialState`` takes
    a CPU launch for a single process unless it was first made with ``cpu=True``.
    """
    if not _distributed():
        yield
        return
    local_main = int(os.environ.get("LOCAL_RANK", "0")) == 0
    turn = 0 if dist.get_rank() == 0 else 1 if local_main else 2
    for _ in range(turn):
        _barrier()
    try:
        yield
    finally:
        for _ in range(2 - turn):
            _barrier()


def _barrier() -> None:
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def warn(message: str) -> None:
    """Log a warning, once for all processes."""
    if not _distributed() or dist.get_rank() == 0:
        logger.warning(message)
