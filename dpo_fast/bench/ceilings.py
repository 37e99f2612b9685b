"""What this machine gives at best, measured now: the rate of a GEMM, of FMAs, and of a copy."""

import ctypes
import time
from typing import NamedTuple

import torch

from dpo_fast.bench.native import compiler, library
from dpo_fast.bench.stream import Triad
from dpo_fast.bench.timing import Step, seconds

_GEMM_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
_REPEATS = 5


class Ceilings(NamedTuple):
    """Rates of this machine.

    Attributes:
        gemm_flops: FLOP/s of torch's best square GEMM in ``dtype``.
        fma_flops: FLOP/s of fp32 multiply-adds from registers, which no GEMM can exceed; CPU only,
            None without a C++ compiler.
        copy_bytes: bytes/s, read and written, of a copy, or of STREAM's triad if that is faster.
    """

    gemm_flops: float
    fma_flops: float | None
    copy_bytes: float
    dtype: str

    def seconds(self, *, flop: float = 0.0, moved: float = 0.0) -> float:
        """The least time for that much arithmetic and that many bytes: the slower of the two."""
        return max(flop / max(self.gemm_flops, self.fma_flops or 0.0), moved / self.copy_bytes)


def measure_ceilings(device: str, dtype: torch.dtype, quick: bool = False) -> Ceilings:
    """Takes a second or two; the best of a few, for a ceiling is what was reached once."""
    name = str(dtype).removeprefix("torch.")
    sizes = _GEMM_SIZES[device][: 1 if quick else None]
    gemm = max(_gemm_rate(device, dtype, n) for n in sizes)
    size = _COPY_BYTES[device] // (8 if quick else 1)
    copy = _copy_rate(device, size)
    if device == "cpu" and compiler() is not None:
        copy = max(copy, _triad_rate(size))
    return Ceilings(gemm, _fma_rate() if device == "cpu" else None, copy, name)


def _fma_rate() -> float | None:
    if compiler() is None:
        return None
    run = library("fma_peak").fma_peak
    run.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.POINTER(ctypes.c_float)]
    run.restype = ctypes.c_double
    sink, threads, rounds, best = ctypes.c_float(), torch.get_num_threads(), 2_000_000, 0.0
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        flop = run(rounds, threads, ctypes.byref(sink))
        best = max(best, flop / (time.perf_counter() - begin))
    return best


def _gemm_rate(device: str, dtype: torch.dtype, n: int) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * n**3 / _best(lambda: torch.mm(a, b, out=out), device)


def _copy_rate(device: str, num_bytes: int) -> float:
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _best(lambda: target.copy_(source), device)


def _triad_rate(num_bytes: int) -> float:
    triad = Triad(num_bytes // 2**20)
    return triad.bytes / min(_best(triad.run(streaming), "cpu") for streaming in (False, True))


def _best(step: Step, device: str) -> float:
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    until, best = time.monotonic() + 2.0, float("inf")
    for _ in range(_REPEATS):
        best = min(best, seconds(step, device))
        if time.monotonic() > until:
            break
    return best
