"""The global random generators, left exactly as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Python's, numpy's and torch's generators (CPU and every accelerator) as before, afterwards.

    Work in the context may seed or draw as it likes: a run that finds its log-probs in the cache
    and one that computes them go on with the same numbers.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = _accelerator_module()
    states = _device_states(device)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if states is not None:
            _restore(device, states)


def _accelerator_module() -> Any:
    accelerator = torch.accelerator.current_accelerator()
    return None if accelerator is None else torch.get_device_module(accelerator.type)


def _device_states(device: Any) -> Any:
    if device is None or (hasattr(device, "is_initialized") and not device.is_initialized()):
        return None  # nothing has drawn from it, and asking would start it
    if hasattr(device, "get_rng_state_all"):
        return device.get_rng_state_all()
    return device.get_rng_state()


def _restore(device: Any, states: Any) -> None:
    if hasattr(device, "set_rng_state_all"):
        device.set_rng_state_all(states)
    else:
        device.set_rng_state(states)
