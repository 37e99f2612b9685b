"""The choice of an EMA backend: made here, once a device, with its reason in the log."""

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from dpo_fast.backends.ema.compiled import CompiledEma, compiled_refusal
from dpo_fast.backends.ema.table import EmaBackend
from dpo_fast.backends.ema.torch_path import TorchEma

NAMES = ("auto", "compiled", "triton", "torch")

logger = logging.getLogger("dpo_fast")


def triton_refusal(device: torch.device) -> str | None:
    """Why the Triton kernel cannot run on a device; None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the Triton kernel runs on CUDA devices, not on {str(device)!r}"
    return None


def _triton() -> EmaBackend:
    from dpo_fast.backends.ema.triton_adapter import TritonEma

    return TritonEma()


_FACTORIES: dict[str, Callable[[], EmaBackend]] = {
    "compiled": CompiledEma,
    "triton": _triton,
    "torch": TorchEma,
}


@cache
def choose(name: str, device: torch.device) -> EmaBackend:
    """The backend called ``name`` on a device.

    ``"auto"`` is the compiled module where it runs, else Triton on a GPU, else torch, and logs its
    choice and reason once; any other name is obeyed or refused.

    Raises:
        ValueError: unknown name, or a backend asked for by name that cannot run here.
    """
    if name not in NAMES:
        raise ValueError(f"backend={name!r} is unknown; use one of {', '.join(map(repr, NAMES))}")
    refusals = {"compiled": compiled_refusal(device), "triton": triton_refusal(device)}
    if name != "auto":
        refusal = refusals.get(name)
        if refusal is not None:
            raise ValueError(f"backend={name!r} cannot run: {refusal}. Use backend='auto'.")
        return _FACTORIES[name]()
    if device.type == "cpu":
        del refusals["triton"]  # the interpreter is for tests, by name
    chosen = next((key for key, refusal in refusals.items() if refusal is None), "torch")
    passed = [f"not {key}: {why}" for key, why in refusals.items() if why is not None]
    logger.info("EMA on %s: backend %r (%s)", device, chosen, "; ".join(passed) or "first choice")
    return _FACTORIES[chosen]()
