"""The EMA in C++ on the CPU and in CUDA C++ on a GPU, through ``dpo_fast._C``."""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import cast

import torch

from dpo_fast.backends.ema.table import Blend, Draw, Entry, Table


@cache
def extension() -> ModuleType | str:
    """``dpo_fast._C``, or why it cannot be imported."""
    try:
        from dpo_fast import _C
    except ImportError as error:
        return f"dpo_fast._C is not there ({error}); reinstall with a C++ compiler to get it"
    return cast(ModuleType, _C)


@cache
def compiled_refusal(device: torch.device) -> str | None:
    """Why the compiled kernels cannot run on a device; None if they can."""
    module = extension()
    if isinstance(module, str):
        return module
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the compiled kernels run on the CPU and on CUDA devices, not on {str(device)!r}"
    if not module.with_cuda:
        return "dpo_fast._C was built without nvcc"
    reason = module.ema_cuda_refusal(device.index or 0)
    return f"the CUDA kernel cannot run on {device}: {reason}" if reason else None


def _scalars(blend: Blend, draw: Draw | None) -> tuple[float, bool, bool, bool, int, int]:
    seed, step = draw or (0, 0)
    return blend.weight, blend.from_policy, blend.copy, draw is not None, seed, step


class CompiledEma:
    """One parallel region on the CPU, one launch on a GPU.

    Args:
        isa: ``"auto"``, ``"avx512"``, ``"avx2"`` or ``"scalar"``; the CPU's instruction set. All of
            them give the same bits.
    """

    name = "compiled"

    def __init__(self, isa: str = "auto") -> None:
        self.isa = isa

    def prepare(self, entries: Sequence[Entry], device: torch.device) -> Table:
        table = Table.build(entries)
        self._module().ema_check_table(*table.arguments())
        return table.to(device)

    def run(self, prepared: Table, blend: Blend, draw: Draw | None) -> None:
        module, device = self._module(), prepared.rows.device
        if device.type == "cpu":
            module.ema_cpu(
                *prepared.arguments(),
                *_scalars(blend, draw),
                num_threads=torch.get_num_threads(),
                isa=self.isa,
            )
            return
        stream = torch.cuda.current_stream(device)
        for tensor in prepared:
            tensor.record_stream(stream)
        module.ema_cuda(
            *prepared.arguments(),
            *_scalars(blend, draw),
            device=device.index,
            stream=stream.cuda_stream,
        )

    @staticmethod
    def _module() -> ModuleType:
        module = extension()
        if isinstance(module, str):
            raise RuntimeError(module)
        return module
