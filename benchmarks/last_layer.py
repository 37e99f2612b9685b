"""What it saves that the last layer computes scored rows only: whole CPU steps with and without.

    python -m benchmarks.last_layer [--rounds 9]

The same trainer, model and batches in turn; losses must agree first. "ratio" is the median of the
ratios within rounds, beside what the GEMMs say (``dpo_fast.bench.training.arithmetic``). Written to
``results/last_layer_cpu.json``.
"""

import argparse
import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from benchmarks.machine import write_result
from benchmarks.train_step import stepper_of
from dpo_fast.bench.timing import median_ratio
from dpo_fast.bench.training.arithmetic import last_position_wise, parameters_of, tokens_of
from dpo_fast.bench.training.stepper import Stepper
from dpo_fast.bench.workload import LENGTHS, ModelShape, Row, make_rows
from dpo_fast.layouts import last_layer

PAIRS = 4


@contextmanager
def all_rows() -> Iterator[None]:
    """Inside, the last layer computes all rows."""
    before, last_layer._WORTH = last_layer._WORTH, 0.0
    try:
        yield
    finally:
        last_layer._WORTH = before


def seconds_of_step(stepper: Stepper, rows: list[Row]) -> float:
    given = copy.deepcopy(rows)
    begin = time.perf_counter()
    stepper.step(given)
    return time.perf_counter() - begin


def check_loss(stepper: Stepper, rows: list[Row]) -> None:
    """Exit unless both ways compute the same loss."""
    found = float(stepper.loop.loss(copy.deepcopy(rows)))
    with all_rows():
        whole = float(stepper.loop.loss(copy.deepcopy(rows)))
    if abs(found - whole) > 1e-5 * abs(whole):
        raise SystemExit(f"scored rows: loss {found}, all rows: {whole}; no speed is reported")


def gemm_ratio(layout: str, shape: ModelShape, rows: list[Row]) -> float:
    """GEMM FLOPs of a step with all rows over those with scored rows."""
    layers, head = parameters_of(shape)
    backbone, scored = tokens_of(layout, rows)
    whole = backbone * layers + scored * head
    return whole / (whole - (backbone - scored) * last_position_wise(shape))


def measure(layout: str, lengths: str, shape: ModelShape, rounds: int) -> dict[str, Any]:
    batches = [make_rows(LENGTHS[lengths], PAIRS, shape.vocab, seed=s) for s in range(4)]
    stepper = stepper_of(layout, shape)
    seconds: dict[str, list[float]] = {"scored": [], "all": []}
    check_loss(stepper, batches[0])
    for i in range(-1, rounds):  # the first round is not counted
        rows = batches[i % len(batches)]
        for name in sorted(seconds, reverse=bool(i % 2)):
            with all_rows() if name == "all" else nullcontext():
                taken = seconds_of_step(stepper, rows)
            if i >= 0:
                seconds[name].append(taken)
    ratio = median_ratio(seconds["all"], seconds["scored"])
    gemms = [gemm_ratio(layout, shape, rows) for rows in batches]
    return {"ratio": ratio, "gemm_ratio": sum(gemms) / len(gemms), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    logging.getLogger("dpo_fast").setLevel(logging.WARNING)
    shape = ModelShape()
    result: dict[str, Any] = {"shape": shape.__dict__, "pairs": PAIRS}
    for lengths in ("2:1", "4:1"):
        for layout in ("dpo_fast", "packed", "shared_prefix"):
            found = measure(layout, lengths, shape, options.rounds)
            result[f"{layout} {lengths}"] = found
            print(
                f"{layout:14s} {lengths}  all rows / scored rows: {found['ratio']:.3f} "
                f"(GEMMs {found['gemm_ratio']:.3f})",
                flush=True,
            )
    print(write_result("last_layer_cpu", result))


if __name__ == "__main__":
    main()
