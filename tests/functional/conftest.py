"""Every test of the ops that says so runs once on each backend of the CPU."""

import pytest
import torch

from dpo_fast import backends
from dpo_fast.functional import fused, linear

NAMES = ["chunked"]
if backends.cpu_refusal("cpu", torch.float32) is None:
    NAMES.insert(0, "cpu")


@pytest.fixture(params=NAMES)
def each_cpu_backend(request, monkeypatch):
    """What "auto" means for the test, where that backend takes the dtype."""

    def choose(name, device_type, dtype):
        if name == "auto" and (request.param, dtype) != ("cpu", torch.float64):
            name = request.param
        return backends.choose(name, device_type, dtype)

    for module in (linear, fused):
        monkeypatch.setattr(module, "choose", choose)
    return request.param
