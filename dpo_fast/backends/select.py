"""The choice of a backend: made here, once per kind of input, with its reason in the log."""

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

from dpo_fast.backends.compiled import compiled
from dpo_fast.backends.interface import HeadBackend
from dpo_fast.backends.naive_backend import NaiveBackend

NAMES = ("auto", "naive", "chunked", "cpu", "triton")

logger = logging.getLogger("dpo_fast")


@cache
def _naive() -> HeadBackend:
    return NaiveBackend()


@cache
def _chunked() -> HeadBackend:
    from dpo_fast.chunked import ChunkedBackend

    return ChunkedBackend()


@cache
def _triton() -> HeadBackend:
    from dpo_fast.backends.triton_backend import TritonBackend

    return TritonBackend()


@cache
def _cpu() -> HeadBackend:
    from dpo_fast.backends.cpu_backend import CpuBackend

    return CpuBackend()


def cpu_refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the compiled head of the CPU cannot run such inputs here; None if it can."""
    from dpo_fast.backends.cpu_backend import refusal

    return refusal(device_type, dtype)


def triton_refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run such inputs here; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        # said here, so that a CPU run does not load triton to learn it
        return f"the tensors are on {device_type!r}, and the Triton kernels run on CUDA devices"
    from dpo_fast.backends.triton_backend import refusal

    return refusal(device_type, dtype)


@cache
def choose(name: str, device_type: str, dtype: torch.dtype) -> HeadBackend:
    """The backend called ``name`` for tensors of this device type and dtype.

    ``"auto"`` decides and logs its choice and reason once; any other name is obeyed or refused.

    Raises:
        ValueError: unknown name, or a backend asked for by name that cannot run.
    """
    if name not in NAMES:
        raise ValueError(f"backend={name!r} is unknown; use one of {', '.join(map(repr, NAMES))}")
    if name == "naive":
        return _naive()
    if name == "chunked":
        return _chunked()
    triton = triton_refusal(device_type, dtype)
    cpu = cpu_refusal(device_type, dtype)
    for asked, refusal, make in (("triton", triton, _triton), ("cpu", cpu, _cpu)):
        if name == asked:
            if refusal is not None:
                raise ValueError(f"backend={name!r} cannot run: {refusal}. Use backend='auto'.")
            return make()
    return _automatic(device_type, dtype, triton, cpu)


def _automatic(
    device_type: str, dtype: torch.dtype, triton: str | None, cpu: str | None
) -> HeadBackend:
    """The best backend that does not refuse, with the reason in the log."""
    backend, level = _chunked(), logging.INFO
    reason = f"not triton: {triton}; not cpu: {cpu}"
    if device_type == "cuda" and triton is None:
        backend, reason = _triton(), "a CUDA device and a dtype that the kernels take"
    elif cpu is None:
        backend, reason = _cpu(), "CPU tensors and a processor it is compiled for"
    elif device_type == "cpu" and compiled() is None:
        level = logging.WARNING  # an installation that could be faster
    logger.log(
        level, "LM head on %s, %s: backend %r (%s)", device_type, dtype, backend.name, reason
    )
    return backend
