"""Matrix products with float32 results.

On CUDA 16-bit operands go to cuBLAS as they are, accumulate in float32 and leave in float32. On a
CPU (interpreted kernels), and for float32, this is an ordinary float32 product: IEEE's, unless
torch's float32 matmul precision was lowered to TF32.
"""

import torch
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _native(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "cuda" and a.dtype == b.dtype and a.dtype != torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32."""
    if _native(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def add_product(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """``acc += a @ b``, acc float32."""
    if _native(a, b):
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
    else:
        acc.addmm_(a.float(), b.float())


def rounded_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` accumulated in float32 and rounded once to ``dtype``.

    Where cuBLAS could split the sum and add 16-bit parts (small results), float32 is in between;
    a large result is written in ``dtype`` at once, which saves the float32 copy of a whole head.
    """
    large = a.shape[0] * b.shape[1] >= 2**26
    if _native(a, b) and a.dtype == dtype and large:
        return torch.mm(a, b)
    return product(a, b).to(dtype)
