"""An EMA prepared once: what was checked, the tables, and which backend runs them."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpo_fast.backends.ema import Draw, EmaBackend, Entry, blend_of, choose
from dpo_fast.functional.ema_checks import (
    Tensors,
    check_alpha,
    check_lengths,
    check_offsets,
    check_overlap,
    check_pair,
    check_rounding,
    check_same_parameters,
    check_shadow,
    check_tensor,
    check_uint64,
    check_written,
    named,
)

Rounding = Literal["nearest", "stochastic"]


def ema_offsets(sizes: Iterable[int]) -> list[int]:
    """Global position of the first element of each whole tensor of ``sizes`` elements.

    The tensors follow each other, each on a multiple of 8: the random bits of eight elements come
    from one counter.
    """
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // 8) * 8
    return offsets


class _Group(NamedTuple):
    """The tensors of one device that one backend updates at once."""

    backend: EmaBackend
    prepared: Any


class EmaPlan:
    """The tables of an EMA, built once and used at every synchronisation.

    Args:
        refs: tensors to update in place, or a mapping of names to them; float64, float32, bfloat16
            or float16, in any mix; parameters that require a gradient are fine. Empty shards are
            skipped.
        policies: the tensors to move towards: as many, of the same shapes and devices.
        shadow: float32 masters, one for each 16-bit reference, None for the others
            (:func:`make_shadow`). They are updated, then rounded into the references, whose own
            values are not read.
        offsets: global position of each tensor's first element, for the random bits of stochastic
            rounding; default: :func:`ema_offsets` of the sizes. With shards: the offset of the
            whole parameter plus where this shard begins.
        backend: ``"auto"``, or ``"compiled"`` (C++, CUDA), ``"triton"``, ``"torch"`` by name.
            float64 and non-contiguous tensors always take torch.

    The plan keeps the tensors alive. Storage that moved (``.to()``, ``.data = ...``) is noticed and
    the tables are rebuilt; parameter objects that were *replaced* need a new plan.

    Memory: 64 bytes a tensor and 4 bytes per 32768 elements, on the device.

    Raises:
        TypeError, ValueError: lists that do not match (the first difference is named), shapes or
            devices that differ, tensors that are meta, sparse, of a type that cannot be averaged,
            DTensors, expanded; memory shared between two references, or reference and policy; a
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
        self._shadow = None if shadow is None else list(shadow)
        self._check_tensors()
        sizes = [ref.numel() for ref in self._refs.tensors]
        self._offsets = check_offsets(
            ema_offsets(sizes) if offsets is None else offsets, self._refs
        )
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
            self._check_tensors()
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

    def _check_tensors(self) -> None:
        refs, policies = self._refs, self._policies
        for ref, policy, ref_name, policy_name in zip(
            refs.tensors, policies.tensors, refs.names, policies.names, strict=True
        ):
            check_tensor(ref, ref_name)
            check_tensor(policy, policy_name)
            check_written(ref, ref_name)
            check_pair(ref, policy, ref_name, policy_name)
        written = list(zip(refs.names, refs.tensors, strict=True))
        if self._shadow is not None:
            written += self._check_shadow(self._shadow)
        check_overlap(written, list(zip(policies.names, policies.tensors, strict=True)))

    def _check_shadow(self, shadow: list[Tensor | None]) -> list[tuple[str, Tensor]]:
        refs = self._refs
        if len(shadow) != len(refs.tensors):
            raise ValueError(
                f"shadow has {len(shadow)} entries and refs {len(refs.tensors)} tensors; "
                "make_shadow(refs) builds the list"
            )
        for i, (master, ref) in enumerate(zip(shadow, refs.tensors, strict=True)):
            check_shadow(master, f"shadow[{i}]", ref, refs.names[i])
        return [(f"shadow[{i}]", t) for i, t in enumerate(shadow) if t is not None]

    def _build(self) -> None:
        """Tables, from tensors that were checked."""
        count = len(self._refs.tensors)
        shadow = self._shadow if self._shadow is not None else [None] * count
        self._entries = [
            Entry(ref.detach(), policy.detach(), None if s is None else s.detach(), offset)
            for ref, policy, s, offset in zip(
                self._refs.tensors, self._policies.tensors, shadow, self._offsets, strict=True
            )
            if ref.numel()
        ]
        self._written = [ref for ref in self._refs.tensors if ref.numel()]
        self._written += [s for s in shadow if s is not None and s.numel()]
        self._watched = [*self._refs.tensors, *self._policies.tensors]
        self._watched += [s for s in shadow if s is not None]
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
        return [(tensor.data_ptr(), tensor.numel(), tensor.dtype) for tensor in self._watched]
