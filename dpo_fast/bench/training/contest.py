"""Whole training steps as a contest: the same rows, models of the same weights."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from dpo_fast.bench.case import Contest, Step, Variant
from dpo_fast.bench.training.arithmetic import gemm_flops, tokens_of
from dpo_fast.bench.training.gold import training_gate
from dpo_fast.bench.training.naive import NaiveLoop
from dpo_fast.bench.training.stepper import Stepper, build_loop, models
from dpo_fast.bench.workload import ModelShape, Row


def training_contest(
    shape: ModelShape, rows: list[Row], variants: tuple[str, ...], device: str, dtype: torch.dtype
) -> Contest:
    """Steps of ``variants`` on ``rows``; the limit counts every token once and answers only."""
    policy, ref = models(shape, device, dtype)
    gold = NaiveLoop(policy.double(), ref.double())

    def prepare(name: str) -> Callable[[], Step]:
        def make() -> Step:
            return step_of(build_loop(name, shape, device, dtype), rows)

        return make

    answers = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    return Contest(
        [Variant(name, prepare(name)) for name in variants],
        training_gate(gold, rows, dtype),
        flop=gemm_flops("shared_prefix", shape, rows),
        dtype=dtype,
        notes={
            "pairs": len(rows),
            "answer tokens": answers,
            "backbone tokens": {
                layout: tokens_of(layout, rows)[0]
                for layout in ("padded", "packed", "shared_prefix")
            },
            "model": f"{shape.layers} layers, H {shape.hidden}, V {shape.vocab}",
        },
    )


def step_of(loop: Any, rows: list[Row]) -> Step:
    """A whole training step of ``loop`` on a fresh copy of the rows."""
    stepper = Stepper(loop)
    return lambda: stepper.step(copy.deepcopy(rows))
