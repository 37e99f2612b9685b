"""The kernels themselves on emulated tensor cores: bfloat16 operands, truncating sums.

Triton's interpreter runs the kernels' code; two of its operations are replaced. A dot decodes
bfloat16 (the interpreter multiplies raw bits) and adds K = 16 exact products at a time to a float32
accumulator, rounding towards zero, as tensor cores do. A cast to bfloat16 rounds to nearest even
(the interpreter truncates).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

STEP = 16  # products that are added exactly


def decoded(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Values in float64; bfloat16 is stored as its bits in uint16."""
    if dtype.scalar == tl.bfloat16:
        data = (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float64)


def towards_zero(values: np.ndarray) -> np.ndarray:
    """Float64 to float32, truncated."""
    rounded = values.astype(np.float32)
    over = np.abs(rounded.astype(np.float64)) > np.abs(values)
    return np.where(over, np.nextafter(rounded, np.float32(0)), rounded)


def truncating_dot(a: Any, b: Any, acc: np.ndarray) -> np.ndarray:
    left, right = decoded(a.data, a.dtype), decoded(b.data, b.dtype)
    for k in range(0, left.shape[1], STEP):
        acc = towards_zero(acc + left[:, k : k + STEP] @ right[k : k + STEP])
    return acc


def _create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    return interpreter.TensorHandle(truncating_dot(a, b, d.data), d.dtype.scalar)


def _nearest_even(data: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.array(data, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Within it, interpreted kernels compute as described above."""
    builder = interpreter.InterpreterBuilder
    plain_cast = builder.cast_impl

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_nearest_even(src.data), dst_type.scalar)
        return plain_cast(self, src, dst_type)

    with (
        mock.patch.object(builder, "create_dot", _create_dot),
        mock.patch.object(builder, "cast_impl", cast),
        np.errstate(over="ignore", invalid="ignore"),
    ):
        yield
