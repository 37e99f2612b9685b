"""The memory bandwidth that a CPU gives: STREAM's triad."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from dpo_fast.bench.native import library

ALIGNMENT = 64  # bytes


class Triad:
    """``a = b + s * c`` over three fp32 arrays of ``megabytes`` each.

    Bytes count once for every array, as in STREAM. With ordinary stores the processor also reads
    ``a`` before it is overwritten; with streaming ones it does not. The faster of the two is the
    ceiling.
    """

    def __init__(self, megabytes: int) -> None:
        self.threads = torch.get_num_threads()
        self.numel = megabytes * 2**20 // 4 // (16 * self.threads) * 16 * self.threads
        self.arrays = [self._aligned() for _ in range(3)]
        self.function = _compile()

    @property
    def bytes(self) -> int:
        return 3 * 4 * self.numel

    def run(self, streaming: bool) -> Callable[[], None]:
        addresses = [array.data_ptr() for array in self.arrays]
        return lambda: self.function(*addresses, 3.0, self.numel, self.threads, int(streaming))

    def check(self) -> None:
        """The arrays hold what the triad computes."""
        a, b, c = (array[:1000] for array in self.arrays)
        for streaming in (False, True):
            a.fill_(torch.nan)
            self.run(streaming)()
            torch.testing.assert_close(a, b + 3.0 * c)

    def _aligned(self) -> Tensor:
        array = torch.empty(self.numel + ALIGNMENT // 4).uniform_(-1, 1)
        skip = -array.data_ptr() % ALIGNMENT // 4
        return array[skip : skip + self.numel]


def _compile() -> Callable[..., None]:
    function = library("stream_triad").triad
    address = ctypes.c_void_p
    function.argtypes = [address] * 3 + [ctypes.c_float, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    function.restype = None
    return function
