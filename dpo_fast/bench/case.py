"""What a suite is made of: cases, and in each the variants that run against each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dpo_fast.bench.gate import Gate

Step = Callable[[], Any]


class LeftOut(Exception):
    """A variant that cannot run here; the message says why, and stands in the report."""


@dataclass(frozen=True)
class Variant:
    """Something to time.

    Attributes:
        prepare: makes the step; may raise :class:`LeftOut`.
        work: bytes or FLOPs of one step by this variant's own count, for "GB/s" in reports.
    """

    name: str
    prepare: Callable[[], Step]
    work: float | None = None


@dataclass(frozen=True)
class Contest:
    """Variants of one case, built when it is their turn.

    Attributes:
        gate: judges the outputs of all variants.
        flop, moved: FLOPs and bytes that no implementation can do without: the physical limit.
        dtype: of the GEMMs that the limit counts.
        yardsticks: variants that do nothing but move bytes (their ``work``); the best rate that one
            of them reached raises the ceiling.
        eager: the variant whose errors say what the dtype gives; it goes first.
        notes: facts for the report (numbers of tokens, settings).
    """

    variants: list[Variant]
    gate: Gate
    flop: float = 0.0
    moved: float = 0.0
    dtype: torch.dtype = torch.float32
    yardsticks: tuple[str, ...] = ()
    eager: str = "naive"
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One point of a suite.

    Attributes:
        axes: sizes, by name: what a curve is drawn over.
        curves: names of axes whose curve this case is a point of.
        build: makes the contest.
        rounds: timed steps of each variant; None: the run's.
    """

    name: str
    axes: Mapping[str, float]
    build: Callable[[], Contest]
    curves: tuple[str, ...] = ()
    rounds: int | None = None
