"""Which epilogue runs: the compiled one-pass form on the CPU, torch operations everywhere else.

Legend: n rows of a chunk, V vocabulary.
"""

from types import ModuleType

import torch
from torch import Tensor

from dpo_fast.backends.compiled import compiled
from dpo_fast.chunked import epilogue_torch
from dpo_fast.chunked.epilogue_torch import EpilogueRows


def _takes(chunk: Tensor) -> ModuleType | None:
    """The compiled module if it can work on this chunk: float32 on the CPU, rows contiguous."""
    if chunk.device.type != "cpu" or chunk.dtype != torch.float32 or chunk.stride(1) != 1:
        return None
    return compiled()


def _arguments(
    chunk: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> tuple[int | float, ...]:
    rows, vocab = chunk.shape
    bias_address = 0 if bias is None else bias.data_ptr()
    return (
        chunk.data_ptr(),
        rows,
        vocab,
        chunk.stride(0) if rows > 1 else vocab,
        target.data_ptr(),
        bias_address,
        softcap or 0.0,
        scale,
    )


def epilogue_(
    chunk: Tensor,  # [n, V]
    target: Tensor,  # [n] int64
    *,
    bias: Tensor | None,  # [V]
    softcap: float | None,
    scale: float,
    store: bool,
    outputs: tuple[str, ...] = (),
    isa: str = "auto",
) -> EpilogueRows:
    """:func:`epilogue_torch.epilogue_`, compiled where that is possible.

    ``isa`` names an instruction set out of ``_C.epilogue_isas()``, for tests.
    """
    module = _takes(chunk)
    if module is None:
        return epilogue_torch.epilogue_(
            chunk, target, bias=bias, softcap=softcap, scale=scale, store=store, outputs=outputs
        )
    target = target.contiguous()
    bias = None if bias is None else bias.to(chunk.dtype).contiguous()
    out = chunk.new_empty(8, chunk.shape[0])
    module.epilogue(
        *_arguments(chunk, target, bias, softcap, scale),
        out.data_ptr(),
        store,
        bool(outputs),
        isa,
        torch.get_num_threads(),
    )
    columns = dict(zip(_COLUMNS, out.unbind(), strict=True))
    stats = {name: columns[name] for name in outputs}
    if "is_top1" in stats:
        stats["is_top1"] = stats["is_top1"] != 0
    return EpilogueRows(*out[:4].unbind(), **stats)


_COLUMNS = (
    *("logps", "shift", "rest", "total"),
    *("entropy", "mean_logit", "is_top1", "log_sum_sq_probs"),
)


def exponentials_(
    chunk: Tensor,  # [n, V]
    target: Tensor,  # [n]
    *,
    shift: Tensor,  # [n]
    rest: Tensor,  # [n]
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    isa: str = "auto",
) -> None:
    """:func:`epilogue_torch.exponentials_`, compiled where that is possible."""
    module = _takes(chunk)
    if module is None:
        epilogue_torch.exponentials_(
            chunk, target, shift=shift, rest=rest, bias=bias, softcap=softcap, scale=scale
        )
        return
    target, shift, rest = target.contiguous(), shift.contiguous(), rest.contiguous()
    bias = None if bias is None else bias.to(chunk.dtype).contiguous()
    module.exponentials(
        *_arguments(chunk, target, bias, softcap, scale),
        shift.data_ptr(),
        rest.data_ptr(),
        isa,
        torch.get_num_threads(),
    )
