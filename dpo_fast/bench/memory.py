"""Peak memory of a step beyond what was held before it."""

import ctypes
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_extra(step: Callable[[], Any], device: str) -> float | None:
    """Bytes at the peak of one call beyond those before it, its results included.

    On CUDA the allocator's count; on Linux resident memory, after what is cached (our scratch, the
    C library's free lists) was given back; elsewhere None.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = step()
        torch.cuda.synchronize()
        del kept
        return float(torch.cuda.max_memory_allocated() - before)
    if not _STATUS.exists():
        return None
    give_back()
    before = _status("VmRSS")
    if _reset_peak():
        step()
        return float(max(0, _status("VmHWM") - before))
    return float(max(0, sampled_peak(step) - before))


def give_back() -> None:
    """Return cached free memory of this process to the system."""
    from dpo_fast.backends.scratch import scratch

    scratch.release()
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def resident_bytes() -> int:
    """Resident memory of this process.

    Raises:
        RuntimeError: not Linux.
    """
    if not _STATUS.exists():
        raise RuntimeError("/proc/self/status is not there: resident memory needs Linux.")
    return _status("VmRSS")


def sampled_peak(work: Callable[[], Any]) -> int:
    """Highest resident memory while ``work`` runs, sampled every millisecond, bytes."""
    done, highest = threading.Event(), [resident_bytes()]

    def watch() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return highest[0]


def _reset_peak() -> bool:
    """Whether the kernel set this process's VmHWM back to its VmRSS (proc(5), clear_refs)."""
    try:
        _CLEAR.write_text("5")
    except OSError:  # a container that forbids it
        return False
    return True


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field} line: this measurement needs Linux.")
