"""Kernels of dpo_fast_kernels run in Triton's interpreter where there is no GPU.

Triton reads TRITON_INTERPRET when a kernel is defined, so it is set here, before any test of this
folder imports one. On a GPU machine kernels are compiled, and the tests of this folder that are
about arithmetic on tiny tiles in float32 are skipped by name (``support.interpreted``).
"""

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _numpy_is_silent() -> Iterator[None]:
    """The interpreter computes in numpy, which warns where exp overflows on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, message=".*encountered in.*")
        yield
