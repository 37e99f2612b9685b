"""An EMA prepared once: what was checked, the tables, and which backend runs them."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.ema import PER_COUNTER, Draw, EmaBackend, Entry, blend_of, choose
from dpo_fast.functional.ema_checks import (
    Named,
    Tensors,
    check_alpha,
    check_lengths,
    check_offsets,
    check_rounding,
    check_same_parameters,
    check_shadows,
    check_tensors,
    check_uint64,
    named,
)
from dpo_fast.functional.ema_shards import (
    check_sharded_alike,
    local_of,
    shard_start,
    whole_shape,
)

Rounding = Literal["nearest", "stochastic"]


def ema_offsets(sizes: Iterable[int]) -> list[int]:
    """Global position of the first element of each whole tensor of ``sizes`` elements.

    The tensors follow each other, each on a multiple of 32: the random bits of 32 elements come
    from one counter.
    """
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // PER_COUNTER) * PER_COUNTER
    return offsets


class _Group(NamedTuple):
    """The tensors of one device that one backend updates at once."""

    backend: EmaBackend
    prepared: Any


class EmaPlan:
    """The tables of an EMA, built once and used at every synchronisation.

    Args:
        refs: tensors to update in place, or a mapping of names to them; float64, float32, bfloat16
            or float16, in any mix; parameters that require a gradient are fine. DTensors and the
            parameters of ZeRO-3 are updated shard by shard on their own ranks, without
            communication. Empty shards are skipped.
        policies: the tensors to move towards: as many, of the same shapes, devices and shards.
        shadow: float32 masters, one for each 16-bit reference, None for the others
            (:func:`make_shadow`). They are updated, then rounded into the references, whose own
            values are not read.
        offsets: global position of each tensor's first element, for the random bits of stochastic
            rounding; default: :func:`ema_offsets` of the sizes of the whole tensors, plus where a
            DTensor's or ZeRO-3's shard begins. For shards that are plain tensors, add the latter
            yourself.
        backend: ``"auto"``, or ``"compiled"`` (C++, CUDA), ``"triton"``, ``"torch"`` by name.
            float64 and non-contiguous tensors always take torch.

    The plan keeps the tensors alive. Storage that moved (``.to()``, ``.data = ...``) is noticed and
    the tables are rebuilt; parameter objects that were *replaced* need a new plan.

    Memory: 64 bytes a tensor and 4 bytes per 32768 elements, on the device.

    Raises:
        TypeError, ValueError: lists that do not match (the first difference is named), shapes,
            devices or shards that differ, tensors that are meta, sparse, of a type that cannot be
            averaged, expanded; memory shared between two references, or reference and policy; a
            shadow that does not fit.
    """

    def __init__(
        self,
        refs: Tensors,
        policies: Tensors,
        *,
        shadow: Sequence[Tensor | None] | None = None,
        offsets: Sequence[int] | None = None,
        backend: str = "auto",
    ) -> None:
        check_same_parameters(refs, policies)
        self._refs, self._policies = named(refs, "refs"), named(policies, "policies")
        check_lengths(self._refs, self._policies)
        for ref, policy in zip(self._refs.pairs(), self._policies.pairs(), strict=True):
            check_sharded_alike(*ref, *policy)
        self._shadow = None if shadow is None else list(shadow)
        if offsets is None:
            whole = ema_offsets(whole_shape(ref).numel() for ref in self._refs.tensors)
            starts = map(shard_start, self._refs.tensors)
            offsets = [at + start for at, start in zip(whole, starts, strict=True)]
        self._offsets = check_offsets(offsets, self._local(self._refs))
        self._backend_name = backend
        self._build()

    def update_(
        self, alpha: float, *, rounding: Rounding = "nearest", seed: int = 0, step: int = 0
    ) -> None:
        """Move every reference by ``alpha`` towards its policy; arguments as of ``ema_``."""
        alpha = check_alpha(alpha)
        check_rounding(rounding)
        draw = Draw(check_uint64(seed, "seed"), check_uint64(step, "step"))
        if alpha == 0.0:
            return
        if self._storage_now() != self._storage:
            self._build()
        blend = blend_of(alpha)
        for group in self._groups:
            group.backend.run(group.prepared, blend, draw if rounding == "stochastic" else None)
        torch.autograd.graph.increment_version(self._written)

    @property
    def traffic(self) -> int:
        """Bytes an update reads and writes: 6 a parameter in bf16, 12 with a shadow."""
        total = 0
        for ref, policy, shadow, _ in self._entries:
            masters = 2 * shadow.element_size() - ref.element_size() if shadow is not None else 0
            each = 2 * ref.element_size() + policy.element_size() + masters
            total += each * ref.numel()
        return total

    def describe(self) -> str:
        """One line: how many tensors and elements, on which devices, through which backends."""
        elements = sum(entry.ref.numel() for entry in self._entries)
        backends = ", ".join(sorted({group.backend.name for group in self._groups})) or "none"
        devices = ", ".join(sorted({str(entry.ref.device) for entry in self._entries})) or "none"
        shadowed = " with fp32 shadow" if self._shadow is not None else ""
        return (
            f"EMA of {len(self._entries)} tensors, {elements} elements on {devices}{shadowed}: "
            f"backend {backends}, {self.traffic / 1e9:.3g} GB an update"
        )

    @staticmethod
    def _local(side: Named) -> Named:
        return Named([local_of(tensor) for tensor in side.tensors], side.names)

    def _build(self) -> None:
        """Check all tensors, then make the tables."""
        refs, policies = self._local(self._refs), self._local(self._policies)
        masters: list[Tensor | None] = [None] * len(refs.tensors)
        if self._shadow is not None:
            masters = [None if s is None else local_of(s) for s in self._shadow]
            check_shadows(masters, refs)
        check_tensors(refs, policies, masters)
        sides = zip(refs.tensors, policies.tensors, masters, self._offsets, strict=True)
        self._entries = [
            Entry(ref.detach(), policy.detach(), None if s is None else s.detach(), offset)
            for ref, policy, s, offset in sides
            if ref.numel()
        ]
        self._written = [t for t in (*refs.tensors, *masters) if t is not None and t.numel()]
        self._watched = [*self._refs.tensors, *self._policies.tensors]
        self._watched += [s for s in self._shadow or () if s is not None]
        self._storage = self._storage_now()
        parts: dict[tuple[torch.device, str], list[Entry]] = {}
        for entry in self._entries:
            name = self._backend_name if entry.native else "torch"
            parts.setdefault((entry.ref.device, name), []).append(entry)
        self._groups = []
        for (device, name), entries in parts.items():
            backend = choose(name, device)
            self._groups.append(_Group(backend, backend.prepare(entries, device)))

    def _storage_now(self) -> list[tuple[int, int, torch.dtype]]:
        local = [local_of(tensor) for tensor in self._watched]
        return [(tensor.data_ptr(), tensor.numel(), tensor.dtype) for tensor in local]
