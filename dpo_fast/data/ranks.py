"""The processes of a distributed launch, as far as the preparation of data minds them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpo_fast.data.report import logger


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the block before the others do, who then find its cache."""
    if not _distributed():
        yield
        return
    from accelerate import PartialState

    state = PartialState()
    # The second scope is for caches on disks that the nodes do not share.
    with state.main_process_first(), state.local_main_process_first():
        yield


def warn(message: str) -> None:
    """Log a warning, once for all processes."""
    if not _distributed() or torch.distributed.get_rank() == 0:
        logger.warning(message)
