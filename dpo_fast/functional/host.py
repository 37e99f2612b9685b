"""What the host knows without waiting for a device.

Checks and shortcuts that read values run where that is free; elsewhere rows are masked instead.
``DPO_FAST_CHECK=1`` in the environment has the checks (not the shortcuts) wait for the device.
"""

import os

from torch import Tensor

CHECK = "DPO_FAST_CHECK"


def on_host(tensor: Tensor) -> bool:
    """Whether reading the tensor's values costs no wait for a device."""
    return tensor.device.type == "cpu"


def may_check(tensor: Tensor) -> bool:
    """Whether a check may read the tensor's values."""
    return on_host(tensor) or _check_asked_for()


def _check_asked_for() -> bool:
    return os.environ.get(CHECK, "0") == "1"


# A traced call takes the answer as it is at that moment (see backends/select.py).
_check_asked_for._dynamo_marked_constant = True  # type: ignore[attr-defined]
