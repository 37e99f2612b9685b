"""Seconds of variants that take turns: drift of the machine then hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Step = Callable[[], Any]


def seconds(step: Step, device: str) -> float:
    """One call, the device waited for."""
    if device == "cpu":
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def take_turns(steps: Mapping[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every step in every round; the order turns by one each round."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(steps[name], device))
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; the extremes where there are fewer than four values."""
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
