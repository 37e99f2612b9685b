"""A lock on a folder that dies with its holder: ``flock``, freed by the kernel after a SIGKILL."""

import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger("dpo_fast")

LOCK_FILE = ".lock"
PATIENCE_SECONDS = 120.0
_RETRY_SECONDS = 0.02
# file systems without flock: some network mounts
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def folder_lock(folder: Path, patience: float = PATIENCE_SECONDS) -> Iterator[bool]:
    """Inside, no other process (or thread) is inside for the same folder.

    For work that is right without the lock and better with it: where the file system knows no
    locks, or a holder sleeps on its lock for longer than ``patience`` seconds, the block runs all
    the same, and a warning says so.

    Yields:
        Whether the lock is held.
    """
    if os.name == "nt":
        yield False
        return
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _acquire(descriptor, folder, patience)
    finally:
        os.close(descriptor)  # frees the lock


def _acquire(descriptor: int, folder: Path, patience: float) -> bool:
    import fcntl

    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                logger.warning(
                    "%s has been locked by another process for %.0f s, which may be suspended: "
                    "going on without the lock.",
                    folder,
                    patience,
                )
                return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        time.sleep(_RETRY_SECONDS)
