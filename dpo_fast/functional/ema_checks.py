"""Checks of what is handed to the EMA: each error names the tensor, the rule and the remedy."""

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_WIDE = (torch.float64, torch.float32)

Tensors = Iterable[Tensor] | Mapping[str, Tensor]


class Named(NamedTuple):
    """A list of tensors and what to call each of them in a message."""

    tensors: list[Tensor]
    names: list[str]

    def pairs(self) -> Iterable[tuple[Tensor, str]]:
        return zip(self.tensors, self.names, strict=True)


def named(value: Tensors, argument: str) -> Named:
    """A list, a generator or a mapping of names to tensors."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{argument} is one tensor; pass a list of tensors, [tensor] for a single one"
        )
    if isinstance(value, Mapping):
        names = [f"{argument}[{key!r}]" for key in value]
        tensors = list(value.values())
    else:
        tensors = list(value)
        names = [f"{argument}[{i}]" for i in range(len(tensors))]
    for tensor, name in zip(tensors, names, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; it must be a torch.Tensor")
    return Named(tensors, names)


def check_same_parameters(refs: Tensors, policies: Tensors) -> None:
    """Two mappings have the same names in the same order; the first difference is named."""
    if not (isinstance(refs, Mapping) and isinstance(policies, Mapping)):
        return
    for i, (ref, policy) in enumerate(zip(refs, policies, strict=False)):
        if ref != policy:
            raise ValueError(
                f"refs and policies differ first at position {i}: {ref!r} in refs, {policy!r} in "
                "policies; pass the same parameters in the same order"
            )


def check_lengths(refs: Named, policies: Named) -> None:
    if len(refs.tensors) == len(policies.tensors):
        return
    longer = max(refs, policies, key=lambda side: len(side.tensors))
    first = min(len(refs.tensors), len(policies.tensors))
    raise ValueError(
        f"refs has {len(refs.tensors)} tensors and policies {len(policies.tensors)}: "
        f"{longer.names[first]} {_about(longer.tensors[first])} is the first without a partner; "
        "pass the same parameters in the same order"
    )


def _about(tensor: Tensor) -> str:
    return f"([{', '.join(map(str, tensor.shape))}] {tensor.dtype} on {tensor.device})"


def check_tensor(tensor: Tensor, name: str) -> None:
    """A dense, materialised, floating tensor of plain storage."""
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}; it must be dense: use .to_dense()")
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; only float64, float32, bfloat16 and float16 can be "
            "averaged: leave it out, and copy buffers of other types with ref.copy_(policy)"
        )
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device; materialise the weights first")
    if tensor.is_neg():
        raise ValueError(f"{name} is a lazily negated view; pass tensor.resolve_neg()")


def check_written(tensor: Tensor, name: str) -> None:
    """A tensor that is updated in place."""
    if tensor.is_inference():
        raise ValueError(
            f"{name} was made in inference mode and cannot be updated; clone it outside"
        )
    if any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(f"{name} is expanded: several elements share one address; clone it first")


def check_pair(ref: Tensor, policy: Tensor, ref_name: str, policy_name: str) -> None:
    if ref.shape != policy.shape:
        raise ValueError(
            f"{ref_name} {_about(ref)} and {policy_name} {_about(policy)} differ in shape; pass "
            "the same parameters in the same order"
        )
    if ref.device != policy.device:
        raise ValueError(
            f"{ref_name} is on {ref.device} and {policy_name} on {policy.device}; move the "
            "reference to the policy's device"
        )


def check_shadow(shadow: Tensor | None, name: str, ref: Tensor, ref_name: str) -> None:
    """An fp32 master of a reference; None only where the reference is at least fp32 itself."""
    if shadow is None:
        if ref.dtype in _WIDE:
            return
        raise ValueError(
            f"{name} is None and {ref_name} has dtype {ref.dtype}; None stands for a reference "
            "that needs no shadow (float32, float64): make_shadow(refs) builds the list"
        )
    check_tensor(shadow, name)
    check_written(shadow, name)
    if shadow.dtype != torch.float32 or ref.dtype == torch.float64:
        raise TypeError(
            f"{name} has dtype {shadow.dtype} beside {ref_name} of {ref.dtype}; a shadow is "
            "float32, and a float64 reference takes None"
        )
    if shadow.shape != ref.shape:
        raise ValueError(f"{name} {_about(shadow)} must have the shape of {ref_name} {_about(ref)}")
    pinned = ref.is_cuda and shadow.device.type == "cpu" and shadow.is_pinned()
    if shadow.device != ref.device and not pinned:
        raise ValueError(
            f"{name} is on {shadow.device} and {ref_name} on {ref.device}; put the shadow on the "
            "reference's device, or in pinned host memory beside a CUDA reference"
        )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last-plus-one address that a tensor can touch."""
    start = tensor.data_ptr()
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (steps + 1) * tensor.element_size()


def check_overlap(
    written: Sequence[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]]
) -> None:
    """No memory is written twice, or written and read as another tensor.

    Strided tensors count with everything between their first and last element.
    """
    spans = [(*_extent(t), t.device, name, True) for name, t in written if t.numel()]
    spans += [(*_extent(t), t.device, name, False) for name, t in read if t.numel()]
    spans.sort(key=lambda span: (str(span[2]), span[0]))
    open_read: tuple[int, str] = (0, "")  # where the reads so far end, and whose they are
    open_write: tuple[int, str] = (0, "")
    device = None
    for start, end, on, name, is_write in spans:
        if on != device:
            device, open_read, open_write = on, (0, ""), (0, "")
        for until, other in (open_write, open_read) if is_write else (open_write,):
            if start < until:
                raise ValueError(
                    f"{other} and {name} share memory; the reference needs storage of its own "
                    "(ref = policy.detach().clone()), and a tied weight is passed once"
                )
        if is_write:
            open_write = max(open_write, (end, name))
        else:
            open_read = max(open_read, (end, name))


def check_tensors(refs: Named, policies: Named, masters: Sequence[Tensor | None]) -> None:
    """Each reference beside its policy, and all of them against each other."""
    for (ref, ref_name), (policy, policy_name) in zip(refs.pairs(), policies.pairs(), strict=True):
        check_tensor(ref, ref_name)
        check_tensor(policy, policy_name)
        check_written(ref, ref_name)
        check_pair(ref, policy, ref_name, policy_name)
    written = [(name, ref) for ref, name in refs.pairs()]
    written += [(f"shadow[{i}]", s) for i, s in enumerate(masters) if s is not None]
    check_overlap(written, [(name, policy) for policy, name in policies.pairs()])


def check_shadows(masters: Sequence[Tensor | None], refs: Named) -> None:
    if len(masters) != len(refs.tensors):
        raise ValueError(
            f"shadow has {len(masters)} entries and refs {len(refs.tensors)} tensors; "
            "make_shadow(refs) builds the list"
        )
    for i, (master, (ref, name)) in enumerate(zip(masters, refs.pairs(), strict=True)):
        check_tensor(ref, name)
        check_shadow(master, f"shadow[{i}]", ref, name)


def check_alpha(alpha: float) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"alpha is {alpha!r}; it must be a number in [0, 1]")
    value = float(alpha)
    if math.isnan(value) or not 0.0 <= value <= 1.0:
        raise ValueError(
            f"alpha = {value} is outside [0, 1]: 0 keeps the reference, 1 copies the policy"
        )
    return value


def check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        options = " or ".join(map(repr, ROUNDINGS))
        raise ValueError(
            f"rounding={rounding!r} is unknown; use {options} (a shadow is passed as shadow=)"
        )


def check_uint64(value: int, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be an integer in [0, 2**64)")
    number = operator.index(value)
    if not 0 <= number < 2**64:
        raise ValueError(f"{name} = {number} is outside [0, 2**64)")
    return number


def check_offsets(offsets: Sequence[int], refs: Named) -> list[int]:
    """Global positions of the first elements, one a tensor, within 63 bits."""
    if len(offsets) != len(refs.tensors):
        raise ValueError(
            f"offsets has {len(offsets)} entries and refs {len(refs.tensors)} tensors; pass the "
            "global position of the first element of each"
        )
    out = []
    for i, (offset, ref) in enumerate(zip(offsets, refs.tensors, strict=True)):
        number = operator.index(offset)
        if number < 0 or number + ref.numel() > 2**63 - 1:
            raise ValueError(
                f"offsets[{i}] = {number} with {ref.numel()} elements leaves [0, 2**63 - 1)"
            )
        out.append(number)
    return out
