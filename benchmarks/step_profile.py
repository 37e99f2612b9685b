"""Where a training step's time goes on a GPU: busy and idle device, launches, the dearest kernels
and operators.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

_ROWS = 12


def profile_step(step: Callable[[], object]) -> dict[str, Any]:
    """One step under torch's profiler; run it warm.

    Returns:
        dict of ``wall_ms`` (of a step without the profiler), ``device_ms`` (sum of the kernels;
        less than the wall is an idle device), ``launches``, ``waits`` (calls in which the host
        waited for the device), and the largest ``kernels`` and ``operators`` as
        ``[name, calls, ms]``: on the device, and of the host alone under the profiler.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    wall = time.perf_counter() - begin
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = found.key_averages()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]
    host = [e for e in events if e.device_type == DeviceType.CPU]
    return {
        "wall_ms": 1e3 * wall,
        "device_ms": sum(e.self_device_time_total for e in kernels) / 1e3,
        "launches": sum(e.count for e in host if "LaunchKernel" in e.key),
        "waits": sum(e.count for e in host if e.key in _WAITS),
        "kernels": _largest(kernels, "self_device_time_total"),
        "operators": _largest(host, "self_cpu_time_total"),
    }


# `synchronize` of the benchmark itself is among the first.
_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def _largest(events: Any, key: str) -> list[list[Any]]:
    ordered = sorted(events, key=lambda e: -getattr(e, key))[:_ROWS]
    return [[e.key[:70], e.count, round(getattr(e, key) / 1e3, 3)] for e in ordered]


def show_profile(name: str, found: dict[str, Any]) -> None:
    """A table of :func:`profile_step`'s result."""
    print(
        f"    {name}: a step {found['wall_ms']:.0f} ms, device busy {found['device_ms']:.0f} ms, "
        f"{found['launches']} launches, {found['waits']} waits"
    )
    for kind in ("kernels", "operators"):
        for label, calls, milliseconds in found[kind]:
            print(f"      {kind[:-1]:8s} {milliseconds:9.2f} ms {calls:6d} x {label}")
