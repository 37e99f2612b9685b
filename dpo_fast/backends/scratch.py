"""Scratch memory that is used again.

A fresh half-gigabyte buffer costs more in page faults than the arithmetic on it. Only for memory
whose contents die inside one call; whatever autograd keeps is allocated normally.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

KEEP_BYTES = 128 * 2**20  # scratch kept between calls, in all


class BufferPool:
    """Lends uint8 buffers on the CPU and takes them back; elsewhere torch's allocator does that."""

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        self.keep_bytes = keep_bytes
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, num_bytes: int, device: torch.device) -> Iterator[Tensor]:
        """A buffer of at least ``num_bytes``, with unspecified contents, until the block ends."""
        if device.type != "cpu":
            yield torch.empty(num_bytes, dtype=torch.uint8, device=device)
            return
        buffer = self._take(num_bytes)
        try:
            yield buffer
        finally:
            self._give(buffer)

    def release(self) -> None:
        """Returns all memory that is not lent to the system."""
        with self._lock:
            self._free.clear()

    def kept_bytes(self) -> int:
        """Bytes held for later calls."""
        with self._lock:
            return sum(buffer.numel() for buffer in self._free)

    def _take(self, num_bytes: int) -> Tensor:
        with self._lock:
            fits = [b for b in self._free if b.numel() >= num_bytes]
            if fits:
                best = min(fits, key=Tensor.numel)
                self._free = [b for b in self._free if b is not best]
                return best
        return torch.empty(num_bytes, dtype=torch.uint8)

    def _give(self, buffer: Tensor) -> None:
        with self._lock:
            self._free.append(buffer)
            self._free.sort(key=Tensor.numel)
            while sum(b.numel() for b in self._free) > self.keep_bytes:
                # The largest that is too large by itself goes first, then the smallest.
                too_large = self._free[-1].numel() > self.keep_bytes
                self._free.pop(-1 if too_large else 0)


scratch = BufferPool()


def as_matrix(buffer: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The start of a uint8 ``buffer`` as ``[rows, columns]``, rows 64 bytes aligned."""
    stride = padded(columns, dtype)
    flat = buffer[: rows * stride * dtype.itemsize].view(dtype)
    return flat.view(rows, stride)[:, :columns]


def padded(columns: int, dtype: torch.dtype) -> int:
    """Row stride of scratch matrices, in elements: rows start on 64-byte borders."""
    per_line = 64 // dtype.itemsize
    return -(-columns // per_line) * per_line
