"""Whole DPO steps on the CPU in every batch layout, against the naive loop and TRL 1.16.

One process a workload, the variants interleaved in rotating order, medians of ratios within a
round; steps, models, optimizer and threads are those of ``benchmarks.train_step``. All variants
must first agree on the loss. Each result says how near the step is to its arithmetic: the FLOPs of
its GEMMs (backbone and LM head, forward of policy and reference, backward) at the rate that GEMMs
of these shapes reach in the same process, over the time it took.

    python -m benchmarks.layout [--lengths 2:1] [--rounds 7] [--quick]
"""

import argparse
import copy
import json
import logging
import statistics
import time
from typing import Any

import torch

from benchmarks.machine import machine_line, write_result
from benchmarks.train_step import stepper_of
from dpo_fast.bench.training.arithmetic import gemm_flops, tokens_of
from dpo_fast.bench.workload import LENGTHS, ModelShape, make_rows

BASELINES = ("naive", "trl")
LAYOUTS = ("packed", "shared_prefix")
VARIANTS = (*BASELINES, "dpo_fast", *LAYOUTS)
GOALS = {
    "1:1": {},
    "2:1": {"packed": 4.0, "shared_prefix": 4.7},
    "4:1": {"shared_prefix": 6.0},
}
PAIRS = 4


def gemm_rate(shape: ModelShape) -> float:
    """FLOP/s of the largest GEMM of a layer, the best of ten: what this process can reach now."""
    a, b = torch.randn(1600, shape.hidden), torch.randn(4 * shape.hidden, shape.hidden)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        a @ b.T
        best = min(best, time.perf_counter() - begin)
    return 2 * a.shape[0] * a.shape[1] * b.shape[0] / best


def measure(shape: ModelShape, lengths: str, rounds: int) -> dict[str, Any]:
    """Interleaved steps of all variants on one workload."""
    batches = [make_rows(LENGTHS[lengths], PAIRS, shape.vocab, seed=s) for s in range(4)]
    steppers = {v: stepper_of(v, shape) for v in VARIANTS}
    losses = {v: s.step(copy.deepcopy(batches[0]))[0] for v, s in steppers.items()}
    for variant, loss in losses.items():
        if abs(loss - losses["naive"]) > 1e-4 * abs(losses["naive"]):
            raise SystemExit(f"{variant} computes another loss: {losses}; no speed is reported.")
    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}
    cpu: dict[str, list[float]] = {v: [] for v in VARIANTS}
    bound: dict[str, list[float]] = {v: [] for v in VARIANTS}
    for i in range(rounds):
        rows = batches[(i + 1) % len(batches)]
        rate = gemm_rate(shape)
        shift = i % len(VARIANTS)
        for variant in VARIANTS[shift:] + VARIANTS[:shift]:
            begin, used = time.perf_counter(), time.process_time()
            steppers[variant].step(rows)
            taken = time.perf_counter() - begin
            cpu[variant].append(time.process_time() - used)
            seconds[variant].append(taken)
            bound[variant].append(gemm_flops(variant, shape, rows) / rate / taken)
    return {
        "lengths": LENGTHS[lengths].__dict__,
        "pairs": PAIRS,
        "tokens": {v: [tokens_of(v, rows) for rows in batches] for v in VARIANTS},
        **summary(lengths, seconds),
        "cpu_seconds_speedup": speedups(cpu),
        "share_of_gemm_bound": {v: statistics.median(b) for v, b in bound.items()},
        "seconds": seconds,
        "cpu_seconds": cpu,
        "losses": losses,
    }


def speedups(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median over the rounds of (the faster baseline's time / ours)."""
    baseline = [min(pair) for pair in zip(*(seconds[v] for v in BASELINES), strict=True)]
    return {
        v: statistics.median(b / s for b, s in zip(baseline, seconds[v], strict=True))
        for v in ("dpo_fast", *LAYOUTS)
    }


def summary(lengths: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, speed-ups, goals."""
    speedup = speedups(seconds)
    return {
        "median_seconds": {v: statistics.median(s) for v, s in seconds.items()},
        "pairs_per_second": {v: PAIRS / statistics.median(s) for v, s in seconds.items()},
        "speedup_over_faster_baseline": speedup,
        "goals": {
            v: {"at least": g, "reached": speedup[v] >= g} for v, g in GOALS[lengths].items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", choices=tuple(GOALS), default=None, help="one workload")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="a smaller model, three rounds")
    options = parser.parse_args()
    logging.getLogger("dpo_fast").setLevel(logging.WARNING)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shape = ModelShape(128, 2, 4, 8000) if options.quick else ModelShape()
    for lengths in [options.lengths] if options.lengths else GOALS:
        result = measure(shape, lengths, 3 if options.quick else options.rounds)
        payload = {"shape": shape.__dict__, **result}
        print(json.dumps({"machine": machine_line(), **payload}, indent=1), flush=True)
        if not options.quick:
            write_result(f"layout_{lengths.replace(':', '_')}_cpu", payload)


if __name__ == "__main__":
    main()
