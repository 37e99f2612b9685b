"""Freed memory that stays with the process while a model is trained on a CPU.

glibc gives each freed buffer above 32 MiB back to the system, and the next step's gradients and
temporaries of that size are faulted in again page by page. Inside :func:`freed_memory_kept` it
keeps them for the next request.

The setting is the whole process's. Whoever sets glibc's allocator by environment variables keeps
those, and nothing is changed; other C libraries and allocators are left alone, too.
"""

import ctypes
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

logger = logging.getLogger("dpo_fast")

# Numbers of mallopt, <malloc.h>
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1  # of the trim threshold
# What glibc starts with, and where its own adjustment of the trim threshold ends.
_MMAPS, _TRIM_AT = 65536, 64 * 2**20
_VARIABLES = (
    *("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"),
    *("GLIBC_TUNABLES", "LD_PRELOAD"),
)


def why_not_kept() -> str | None:
    """Why the allocator is left as it is; None if freed memory can be kept."""
    if platform.libc_ver()[0] != "glibc":
        return "the C library is not glibc"
    own = [name for name in _VARIABLES if name in os.environ]
    return f"{own[0]} is set" if own else None


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, the main thread's freed memory is used again instead of being faulted in anew.

    Afterwards large buffers go back to the system when they are freed, as before; what is free by
    then stays until :func:`return_freed_memory`. Not to be nested.
    """
    if (reason := why_not_kept()) is not None:
        logger.info("Freed CPU memory goes back to the system: %s.", reason)
        yield
        return
    libc = _libc()
    logger.info("Freed CPU memory stays with the process (set MALLOC_MMAP_MAX_ to prevent it).")
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _MMAPS)
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_AT)


def return_freed_memory() -> None:
    """Give free memory back to the system."""
    if why_not_kept() is None:
        _libc().malloc_trim(0)
