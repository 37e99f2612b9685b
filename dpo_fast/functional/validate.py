"""Checks of what users pass: each error names the value, the rule and the remedy.

Legend: S sequences, N scored tokens, H hidden, V vocabulary, r rank of the head's adapter.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dpo_fast.functional import host
from dpo_fast.naive import OUTPUTS, HeadLoRA

MODES = (None, "store", "min-memory")


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def check_floating(tensor: Tensor, name: str, dim: int, legend: str) -> None:
    """A floating tensor with ``dim`` dimensions, whole on this rank."""
    if hasattr(tensor, "placements"):
        raise ValueError(
            f"{name} is a DTensor with placements {tensor.placements}, and the ops compute with "
            "plain memory: under FSDP2 read it inside the forward of the module that owns it, "
            "whose hooks gather it; under tensor parallel score through "
            "dpo_fast.models.forward_scored, or pass weight.to_local() and "
            "group=VocabShard.even(process_group, V); elsewhere pass .full_tensor()"
        )
    if tensor.dim() != dim or not tensor.is_floating_point():
        raise ValueError(
            f"{name} is {_shape(tensor)} of {tensor.dtype}; it must be a floating {legend} tensor"
        )


def check_same(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Same device and dtype."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device} and {like_name} on {like.device}; "
            "move them to one device first"
        )
    if tensor.dtype != like.dtype:
        raise ValueError(
            f"{name} has dtype {tensor.dtype} and {like_name} {like.dtype}; cast one of them, or "
            "run under torch.autocast, which casts both"
        )


def check_target(
    target: Tensor, rows: int, vocab: int, ignore_index: int | None, like: Tensor
) -> None:
    """int64 ``[N]`` on the right device; the range is checked where :mod:`host` lets it."""
    if target.shape != (rows,) or target.dtype != torch.int64:
        raise ValueError(
            f"target is {_shape(target)} of {target.dtype}; it must be [N={rows}] int64, one token "
            "id for each row of hidden"
        )
    if target.device != like.device:
        raise ValueError(
            f"target is on {target.device} and hidden on {like.device}; move it there first"
        )
    if target.numel() == 0 or not host.may_check(target):
        return
    bad = (target < 0) | (target >= vocab)
    if ignore_index is not None:
        bad &= target != ignore_index
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        remedy = f"rows to skip must hold ignore_index = {ignore_index}"
        if ignore_index is None:
            remedy = (
                "ignore_index=None says that no row is skipped; name the target of those to skip"
            )
        raise ValueError(
            f"target[{row}] = {int(target[row])} is outside the vocabulary [0, {vocab}); {remedy}"
        )


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: HeadLoRA | None,
    names: tuple[str, str] = ("hidden", "weight"),
) -> None:
    """Shapes, dtypes and devices of hidden states and head agree."""
    hidden_name, weight_name = names
    check_floating(hidden, hidden_name, 2, "[N, H]")
    check_floating(weight, weight_name, 2, "[V, H]")
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{weight_name} is {_shape(weight)} and {hidden_name} {_shape(hidden)}; "
            "they must be [V >= 1, H] and [N, H] with the same H"
        )
    check_same(weight, weight_name, hidden, hidden_name)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias is {_shape(bias)}; it must be [V={weight.shape[0]}]")
        check_same(bias, "bias", hidden, hidden_name)
    if lora is not None:
        _check_lora(lora, weight, hidden, hidden_name)


def _check_lora(lora: HeadLoRA, weight: Tensor, hidden: Tensor, hidden_name: str) -> None:
    vocab, width = weight.shape
    check_floating(lora.a, "lora.a", 2, "[r, H]")
    check_floating(lora.b, "lora.b", 2, "[V, r]")
    if lora.a.shape[1] != width or lora.b.shape != (vocab, lora.a.shape[0]):
        raise ValueError(
            f"lora.a is {_shape(lora.a)} and lora.b {_shape(lora.b)}; "
            f"they must be [r, H={width}] and [V={vocab}, r] with one r"
        )
    check_same(lora.a, "lora.a", hidden, hidden_name)
    check_same(lora.b, "lora.b", hidden, hidden_name)


def check_main_grad(main_grad: Tensor | None, weight: Tensor) -> None:
    """None, or a float32 accumulator (float64 for float64 weights) of the weight's shape."""
    if main_grad is None:
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    if main_grad.shape != weight.shape or main_grad.dtype != wide:
        raise ValueError(
            f"main_grad is {_shape(main_grad)} of {main_grad.dtype}; it must be {_shape(weight)} "
            f"of {wide}, as the weight's gradient is accumulated"
        )
    if main_grad.device != weight.device or not main_grad.is_contiguous():
        raise ValueError(
            f"main_grad is on {main_grad.device} with strides {main_grad.stride()}; it must be "
            f"contiguous and on {weight.device}, like the weight"
        )
    if main_grad.requires_grad:
        raise ValueError("main_grad requires a gradient; pass main_grad.detach()")
    if not weight.requires_grad:
        raise ValueError(
            "main_grad is given and the weight takes no gradient: nothing would ever be added; "
            "call weight.requires_grad_(), or pass main_grad=None"
        )


def check_scalars(
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    mode: str | None,
    workspace: int | None,
) -> None:
    """Ranges of the numbers between the GEMM and the softmax, and the options' names."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive; pass None for no softcap")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; 1.0 leaves logits alone")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale={logit_scale} must be positive; 1.0 leaves logits alone")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; use one of {', '.join(map(repr, MODES))}")
    if workspace is not None and workspace < 0:
        raise ValueError(f"workspace={workspace} must be a number of bytes, or None")


def check_outputs(outputs: Sequence[str]) -> tuple[str, ...]:
    """A tuple of known names of statistics."""
    if isinstance(outputs, str):
        raise ValueError(
            f"outputs={outputs!r} is one string; pass a tuple of names: ({outputs!r},)"
        )
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"outputs={unknown} unknown; choose among {OUTPUTS}")
    return tuple(dict.fromkeys(outputs))


def check_borders(cu_seqlens: Tensor, rows: int, like: Tensor) -> None:
    """int64 ``[S + 1]`` from 0 to N without a step back; values read as in :func:`check_target`."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype != torch.int64:
        raise ValueError(
            f"cu_seqlens is {_shape(cu_seqlens)} of {cu_seqlens.dtype}; it must be [S + 1] int64: "
            "0, then the running sum of the sequences' lengths"
        )
    if cu_seqlens.device != like.device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device} and hidden on {like.device}; move it there first"
        )
    if host.may_check(cu_seqlens):
        check_host_borders(cu_seqlens.tolist(), rows)


def check_host_borders(borders: list[int], rows: int) -> None:
    """The same for borders as a list of integers."""
    steps_back = any(b < a for a, b in pairwise(borders))
    if borders[0] != 0 or borders[-1] != rows or steps_back:
        raise ValueError(
            f"cu_seqlens={borders} must start at 0, end at N={rows} (the rows of hidden) and never "
            "decrease: the running sum of the sequences' lengths"
        )


def check_token_weight(token_weight: Tensor | None, rows: int, like: Tensor) -> None:
    """A number a token."""
    if token_weight is None:
        return
    if token_weight.shape != (rows,):
        raise ValueError(
            f"token_weight is {_shape(token_weight)}; it must be [N={rows}], one number a token"
        )
    if token_weight.device != like.device:
        raise ValueError(
            f"token_weight is on {token_weight.device} and hidden on {like.device}; move it first"
        )


def check_tokens(
    hidden: Tensor,
    vocab: int,
    target: Tensor,
    ignore_index: int | None,
    cu_seqlens: Tensor,
    token_weight: Tensor | None,
) -> None:
    """Everything that has one entry a token, and the borders of the sequences."""
    rows = hidden.shape[0]
    check_target(target, rows, vocab, ignore_index, hidden)
    check_borders(cu_seqlens, rows, hidden)
    check_token_weight(token_weight, rows, hidden)


def check_pairs(
    cu_seqlens: Tensor,
    seq_lens: Sequence[int] | None,
    pair_weight: Tensor | float | None,
    ref_logps: Tensor | None,
    hidden: Tensor,
) -> int:
    """Everything that has one entry a pair or a sequence; returns the number of pairs."""
    sequences = cu_seqlens.numel() - 1
    if sequences % 2:
        raise ValueError(
            f"cu_seqlens describes {sequences} sequences; there must be an even number: "
            "all chosen ones first, then all rejected ones"
        )
    if seq_lens is not None:
        if len(seq_lens) != sequences:
            raise ValueError(
                f"seq_lens has {len(seq_lens)} entries; it must have one for each of the "
                f"{sequences} sequences of cu_seqlens"
            )
        check_host_borders([0, *accumulate(seq_lens)], hidden.shape[0])
    pairs = sequences // 2
    for name, value, length in (
        ("pair_weight", pair_weight, pairs),
        ("ref_logps", ref_logps, sequences),
    ):
        if isinstance(value, Tensor) and (
            value.shape != (length,) or value.device != hidden.device
        ):
            raise ValueError(
                f"{name} is {_shape(value)} on {value.device}; "
                f"it must be [{length}] on {hidden.device}"
            )
    return pairs
