"""Whole DPO steps on the CPU: naive full-logits loop, TRL 1.16, dpo_fast.

One process, the three variants interleaved, medians; a step is collator, batch preparation, policy
and reference forward, backward, clipping and AdamW. The model, rows, optimizer, clipping, attention
and thread count are the same for all. The naive loop and dpo_fast must first agree on the loss.
Peak memory is measured in a process of its own for each variant.

    python -m benchmarks.train_step [--quick]
"""

import argparse
import copy
import json
import logging
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.machine import machine_line, write_result
from dpo_fast.bench.memory import resident_bytes, sampled_peak
from dpo_fast.bench.training.stepper import Stepper, build_loop
from dpo_fast.bench.workload import LENGTHS, ModelShape, Row, make_rows

VARIANTS = ("naive", "trl", "dpo_fast")
LOOPS = {"trl": "TRL", "packed": "dpo_fast packed", "shared_prefix": "dpo_fast shared_prefix"}


def stepper_of(variant: str, shape: ModelShape) -> Stepper:
    """The variant with models of its own; a layout's name stands for dpo_fast in it."""
    return Stepper(build_loop(LOOPS.get(variant, variant), shape, "cpu", torch.float32))


def measure_time(shape: ModelShape, batches: list[list[Row]], rounds: int) -> dict[str, Any]:
    """Medians of whole steps, variants interleaved, order rotated."""
    steppers = {v: stepper_of(v, shape) for v in VARIANTS}
    losses = {v: s.step(copy.deepcopy(batches[0]))[0] for v, s in steppers.items()}
    for variant, loss in losses.items():
        if abs(loss - losses["naive"]) > 1e-4 * abs(losses["naive"]):
            raise SystemExit(f"{variant} computes another loss: {losses}; no speed is reported.")
    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}
    for i in range(rounds):
        rows = batches[(i + 1) % len(batches)]
        for variant in VARIANTS[i % 3 :] + VARIANTS[: i % 3]:
            begin = time.perf_counter()
            steppers[variant].step(rows)
            seconds[variant].append(time.perf_counter() - begin)
    return {"seconds": seconds, "losses": losses}


def measure_memory(variant: str, shape: ModelShape, rows: list[Row]) -> dict[str, float]:
    """Peak resident memory of one step beyond what the built variant holds, MiB (run in its own
    process).
    """
    stepper = stepper_of(variant, shape)
    stepper.step(make_rows(LENGTHS["1:1"], 1, shape.vocab, seed=9))  # optimizer state, thread pools
    before = resident_bytes() / 2**20
    peak = sampled_peak(lambda: stepper.step(rows)) / 2**20
    return {"before": before, "extra_peak": peak - before}


def memory_in_child(variant: str, quick: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--memory-of", variant]
    done = subprocess.run(
        command + (["--quick"] if quick else []), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def report(timing: dict[str, Any], memory: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Table, ratios and goals."""
    medians = {v: statistics.median(s) for v, s in timing["seconds"].items()}
    ratios = [
        min(naive, trl) / ours
        for naive, trl, ours in zip(*(timing["seconds"][v] for v in VARIANTS), strict=True)
    ]
    baseline_memory = min(memory[v]["extra_peak"] for v in ("naive", "trl"))
    return {
        "pairs_per_second": {v: pairs / s for v, s in medians.items()},
        "median_seconds": medians,
        "speedup_over_faster_baseline": min(medians["naive"], medians["trl"]) / medians["dpo_fast"],
        "speedup_median_of_ratios": statistics.median(ratios),
        "extra_peak_mib": {v: memory[v]["extra_peak"] for v in VARIANTS},
        "memory_ratio": memory["dpo_fast"]["extra_peak"] / baseline_memory,
        "goals": {"speedup": ">= 3.0", "memory_ratio": "<= 0.5"},
        "seconds": timing["seconds"],
        "losses": timing["losses"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, three rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", default=None, help="name of the result file")
    options = parser.parse_args()
    logging.getLogger("dpo_fast").setLevel(logging.WARNING)
    shape = ModelShape(128, 2, 4, 8000) if options.quick else ModelShape()
    pairs = 4
    batches = [make_rows(LENGTHS["2:1"], pairs, shape.vocab, seed=s) for s in range(4)]
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, shape, batches[0])))
        return
    memory = {v: memory_in_child(v, options.quick) for v in VARIANTS}
    timing = measure_time(shape, batches, 3 if options.quick else options.rounds)
    result = report(timing, memory, pairs)
    print(json.dumps({"machine": machine_line(), **result}, indent=1))
    if not options.quick:
        workload = {"shape": shape.__dict__, "lengths": LENGTHS["2:1"].__dict__, "pairs": pairs}
        write_result(options.out or "train_step_cpu", {"workload": workload, **result})


if __name__ == "__main__":
    main()
