"""Sums over sequences and everything else that knows ``cu_seqlens``.

Legend: S sequences, N scored tokens.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_fast.backends import triton_refusal
from dpo_fast.functional import host


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``values[cu_seqlens[s] : cu_seqlens[s + 1]].sum()`` of each sequence, ``[S]``.

    Summed in float64 in a fixed order, rounded once, deterministic; differentiable. An empty
    sequence gives 0. On CUDA one program of the Triton kernel takes one sequence.

    Raises:
        ValueError: the device has no float64.
    """
    refuse_without_float64(values.device)
    if cu_seqlens.numel() < 2:
        return values.new_zeros(0)
    device = values.device.type
    if values.dtype == torch.float32 and not host.on_host(values) and has_kernel(device):
        from dpo_fast_kernels.segment import segment_sum as kernel

        return kernel(values, cu_seqlens)
    # `unsafe` leaves out checks that would wait for the device; the borders are checked before.
    sums = torch.segment_reduce(
        values.double(), "sum", offsets=cu_seqlens, unsafe=True, initial=0.0
    )
    return sums.to(values.dtype)


def refuse_without_float64(device: torch.device) -> None:
    """Sums over tokens are taken in float64, which Apple's GPUs do not have.

    Raises:
        ValueError: ``device`` is one of them.
    """
    if device.type == "mps":
        raise ValueError(
            "The device is 'mps' (Apple's Metal), which has no float64, and dpo_fast sums the "
            "log-probs of a sequence in float64: work on the CPU (use_cpu=True for trainers), or "
            "on CUDA."
        )


def has_kernel(device_type: str) -> bool:
    """Whether the Triton kernel runs on such devices here."""
    return _has_kernel(device_type)


has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see backends/select.py


@cache
def _has_kernel(device_type: str) -> bool:
    return triton_refusal(device_type, torch.float32) is None


def compacted_borders(cu_seqlens: Tensor, valid: Tensor) -> Tensor:
    """``cu_seqlens`` after the rows outside the mask ``valid`` [N] have been dropped."""
    counts = torch.cat((valid.new_zeros(1, dtype=torch.int64), valid.cumsum(0)))
    return counts[cu_seqlens]


def sum_over_ranks(values: Tensor, group: Any) -> Tensor:
    """Sum of ``values`` over the processes of ``group`` (None: ``values``), the same bits on each.

    For sums over sequences whose tokens are spread over the processes. The gradient is passed on as
    it is: every rank computes the same loss, and its gradient is that of its own tokens.
    """
    return values if group is None else _SumOverRanks.apply(values, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
