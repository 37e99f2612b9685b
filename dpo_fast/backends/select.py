"""The choice of a backend: made here, once per kind of input, with its reason in the log."""

import logging
import os
from collections.abc import Callable
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
def _filtered(bound: float) -> HeadBackend:
    from dpo_fast.backends.filtered_backend import FilteredBackend

    return FilteredBackend(bound)


@cache
def _cpu() -> HeadBackend:
    from dpo_fast.backends.cpu_backend import CpuBackend

    return CpuBackend()


@cache
def _chunked_shards() -> HeadBackend:
    from dpo_fast.chunked.vocab_parallel import VocabParallelBackend

    return VocabParallelBackend()


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


_FACTORIES: dict[str, Callable[[], HeadBackend]] = {
    "naive": _naive,
    "chunked": _chunked,
    "triton": _triton,
    "cpu": _cpu,
}


def choose(name: str, device_type: str, dtype: torch.dtype) -> HeadBackend:
    """The backend called ``name`` for tensors of this device type and dtype.

    ``"auto"`` decides and logs its choice and reason once; any other name is obeyed or refused.

    Raises:
        ValueError: unknown name, or a backend asked for by name that cannot run.
    """
    return _FACTORIES[resolve(name, device_type, dtype)]()


def choose_sharded(name: str, device_type: str, dtype: torch.dtype) -> HeadBackend:
    """:func:`choose` among the backends whose vocabulary may be split over processes."""
    found = _resolve_sharded(name, device_type, dtype)
    return _chunked_shards() if found == "chunked" else _FACTORIES[found]()


def filtered(backend: HeadBackend, bound: float | None) -> HeadBackend:
    """The Triton backend that filters by ``bound``; None: the backend itself.

    Raises:
        ValueError: a bound outside [0, 1), or a backend that has no filtered mode.
    """
    if bound is None:
        return backend
    if not isinstance(bound, int | float) or not 0 <= bound < 1:
        raise ValueError(
            f"filter_bound={bound!r} must lie in [0, 1): the share of a row's probability below "
            "which a tile is left out of the gradients; None leaves out nothing"
        )
    if backend.name != "triton":
        raise ValueError(
            f"filter_bound={bound} is a mode of backend='triton', and the backend here is "
            f"{backend.name!r}; train on a CUDA device, or pass filter_bound=None"
        )
    return _filtered(float(bound))


def resolve(name: str, device_type: str, dtype: torch.dtype) -> str:
    """The name of the backend that :func:`choose` returns."""
    return _resolve(name, device_type, dtype)


# What torch.compiler.assume_constant_result sets, without importing dynamo: a traced call takes the
# name as it is at that moment instead of following the probes below.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget() -> None:
    """The next choice is made, and logged, anew."""
    _resolve.cache_clear()
    _resolve_sharded.cache_clear()


@cache
def _resolve_sharded(name: str, device_type: str, dtype: torch.dtype) -> str:
    if name in ("naive", "cpu"):
        raise ValueError(
            f"backend={name!r} computes whole vocabularies, and this one is split over processes: "
            "use backend='auto', or 'chunked', or 'triton' on a GPU."
        )
    if name != "auto":
        return _resolve(name, device_type, dtype)
    refused = triton_refusal(device_type, dtype)
    backend = "triton" if device_type == "cuda" and refused is None else "chunked"
    reason = "the kernels take it" if backend == "triton" else f"not triton: {refused}"
    logger.info(
        "LM head split over processes on %s, %s: backend %r (%s)",
        *(device_type, dtype, backend, reason),
    )
    return backend


@cache
def _resolve(name: str, device_type: str, dtype: torch.dtype) -> str:
    if name not in NAMES:
        raise ValueError(f"backend={name!r} is unknown; use one of {', '.join(map(repr, NAMES))}")
    if name in ("naive", "chunked"):
        return name
    refusals = {
        "triton": triton_refusal(device_type, dtype),
        "cpu": cpu_refusal(device_type, dtype),
    }
    if name == "auto":
        return _automatic(device_type, dtype, refusals["triton"], refusals["cpu"])
    if refusals[name] is not None:
        raise ValueError(f"backend={name!r} cannot run: {refusals[name]}. Use backend='auto'.")
    return name


def _automatic(device_type: str, dtype: torch.dtype, triton: str | None, cpu: str | None) -> str:
    """The best backend that does not refuse, with the reason in the log."""
    backend, level = "chunked", logging.INFO
    reason = f"not triton: {triton}; not cpu: {cpu}"
    if device_type == "cuda" and triton is None:
        backend, reason = "triton", "a CUDA device and a dtype that the kernels take"
    elif cpu is None:
        backend, reason = "cpu", "CPU tensors and a processor it is compiled for"
    elif device_type == "cpu" and compiled() is None:
        level = logging.WARNING  # an installation that could be faster
    logger.log(level, "LM head on %s, %s: backend %r (%s)", device_type, dtype, backend, reason)
    return backend
