"""The choice of a backend: made here, once per kind of input, with its reason in the log."""

import logging
from functools import cache

import torch

from dpo_fast.backends.interface import HeadBackend
from dpo_fast.backends.naive_backend import NaiveBackend

NAMES = ("auto", "naive", "chunked", "triton")

logger = logging.getLogger("dpo_fast")


@cache
def _naive() -> HeadBackend:
    return NaiveBackend()


@cache
def _chunked() -> HeadBackend:
    from dpo_fast.chunked import ChunkedBackend

    return ChunkedBackend()


def triton_refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run such inputs here; None if they can.

    This is the place where ``dpo_fast_kernels`` is wired in: an adapter with the members of
    ``HeadBackend`` around its launchers, a ``_triton()`` factory above, None returned here for what
    the kernels take, and ``"auto"`` below picks it.
    """
    if device_type != "cuda":
        return f"the tensors are on {device_type!r}, and the Triton kernels run on CUDA devices"
    return "this version of dpo_fast has no Triton LM head"


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
    refusal = triton_refusal(device_type, dtype)
    if name == "triton":
        raise ValueError(f"backend='triton' cannot run: {refusal}. Use backend='auto'.")
    backend = _chunked()
    reason = f"not triton: {refusal}"
    logger.info("LM head on %s, %s: backend %r (%s)", device_type, dtype, backend.name, reason)
    return backend
