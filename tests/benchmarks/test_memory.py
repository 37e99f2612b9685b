"""Peak memory of a step is what it allocates beyond what was there."""

import sys

import pytest
import torch

from dpo_fast.bench.memory import peak_extra, resident_bytes, sampled_peak
from dpo_fast.bench.timing import median_ratio, quartiles, take_turns

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc: not on this system")


def touch(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MIB // 4)


@linux
def test_peak_counts_temporaries_and_not_what_was_held() -> None:
    held = touch(64)
    peak = peak_extra(lambda: touch(96).sum(), "cpu")
    assert peak is not None and 90 * MIB < peak < 130 * MIB
    assert held.numel() > 0


@linux
def test_sampled_peak() -> None:
    before = resident_bytes()
    assert sampled_peak(lambda: [touch(48).sum() for _ in range(10)]) > before + 30 * MIB


def test_turns_rotate_and_every_step_has_its_rounds() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = take_turns(steps, 3, "cpu")
    assert "".join(calls) == "abcbcacab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_statistics() -> None:
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 4.0)
    assert quartiles([2.0, 1.0]) == (1.0, 2.0)
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0
