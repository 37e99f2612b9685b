"""The EMA in plain torch: any device, any layout, float64 too. The same bits as the native kernels.

Pieces of tensors are gathered into flat buffers, blended, rounded and scattered, so that temporary
memory is bounded and small tensors share their launches.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.ema.philox import random16
from dpo_fast.backends.ema.rounding import narrow
from dpo_fast.backends.ema.table import Blend, Draw, Entry

BUCKET = 2**22  # elements gathered at once

_HALF = (torch.bfloat16, torch.float16)


class Piece(NamedTuple):
    """A run of elements of one tensor, or a whole tensor that is not contiguous."""

    ref: Tensor
    policy: Tensor
    shadow: Tensor | None
    position: int


class Kind(NamedTuple):
    """Pieces of one kind are blended together."""

    ref_dtype: torch.dtype
    wide: torch.dtype  # float32, or float64 where either side is
    has_shadow: bool


def _pieces(entry: Entry) -> Iterator[Piece]:
    ref, policy, shadow, position = entry
    tensors = [t for t in (ref, policy, shadow) if t is not None]
    if not all(t.is_contiguous() for t in tensors):
        yield Piece(ref, policy, shadow, position)
        return
    flat = [t.view(-1) for t in tensors]
    for start in range(0, ref.numel(), BUCKET):
        part = [t[start : start + BUCKET] for t in flat]
        yield Piece(part[0], part[1], part[2] if shadow is not None else None, position + start)


def _kind(entry: Entry) -> Kind:
    float64 = torch.float64 in (entry.ref.dtype, entry.policy.dtype)
    wide = torch.float64 if float64 else torch.float32
    return Kind(entry.ref.dtype, wide, entry.shadow is not None)


def _gather(tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """All elements of the tensors as one flat tensor."""
    sizes = [t.numel() for t in tensors]
    flat = torch.empty(sum(sizes), dtype=dtype, device=device)
    parts = [f.view(t.shape) for f, t in zip(flat.split(sizes), tensors, strict=True)]
    torch._foreach_copy_(parts, list(tensors))
    return flat


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(
        list(tensors), [f.view(t.shape) for f, t in zip(parts, tensors, strict=True)]
    )


def _blended(r: Tensor, p: Tensor, blend: Blend) -> Tensor:
    """The value of each element, and of r where a NaN must not spread: see csrc/ema_math.h."""
    if blend.copy:
        value = p
    else:
        base, other = (p, r) if blend.from_policy else (r, p)
        weight = blend.exact_weight if r.dtype == torch.float64 else blend.weight
        value = base - (base - other).mul_(weight)  # three roundings, no fused multiply-add
    return torch.where(value.isnan(), torch.where(_unchanged(r, p), r, torch.nan), value)


def _unchanged(r: Tensor, p: Tensor) -> Tensor:
    return (p == r) | (p.isnan() & r.isnan())


def _update(kind: Kind, pieces: Sequence[Piece], blend: Blend, draw: Draw | None) -> None:
    refs = [piece.ref for piece in pieces]
    shadows = [piece.shadow for piece in pieces if piece.shadow is not None]
    device = refs[0].device
    p = _gather([piece.policy for piece in pieces], kind.wide, device)
    half = kind.ref_dtype in _HALF
    old = None
    if kind.has_shadow:
        r = _gather(shadows, kind.wide, device)
    elif half:
        refs = [ref.view(torch.int16) for ref in refs]
        old = _gather(refs, torch.int16, device)
        r = old.view(kind.ref_dtype).to(kind.wide)
    else:
        r = _gather(refs, kind.wide, device)
    value = _blended(r, p, blend)
    if kind.has_shadow:
        _scatter(value, shadows)
    if not half:
        _scatter(value, refs)
        return
    random = None
    if draw is not None:
        spans = [(piece.position, piece.ref.numel()) for piece in pieces]
        random = torch.cat([random16(at, count, *draw, device) for at, count in spans])
    out = narrow(value.to(torch.float32), kind.ref_dtype, random)
    if old is None:
        refs = [ref.view(torch.int16) for ref in refs]
    else:
        out = torch.where(value.isnan() & _unchanged(r, p), old, out)
    _scatter(out, refs)


def _buckets(entries: Iterable[Entry]) -> Iterator[tuple[Kind, list[Piece]]]:
    filling: dict[Kind, list[Piece]] = {}
    filled: dict[Kind, int] = {}
    for entry in entries:
        kind = _kind(entry)
        for piece in _pieces(entry):
            size = piece.ref.numel()
            if filled.get(kind, 0) + size > BUCKET and filling.get(kind):
                yield kind, filling.pop(kind)
                filled[kind] = 0
            filling.setdefault(kind, []).append(piece)
            filled[kind] = filled.get(kind, 0) + size
    yield from filling.items()


class TorchEma:
    """Temporary memory: about 80 bytes an element of a bucket of 2**22."""

    name = "torch"

    def prepare(self, entries: Sequence[Entry], device: torch.device) -> list[Entry]:
        return list(entries)

    @torch.no_grad()
    def run(self, prepared: list[Entry], blend: Blend, draw: Draw | None) -> None:
        for kind, pieces in _buckets(prepared):
            _update(kind, pieces, blend, draw)
