"""Freed memory that is kept: fewer page faults inside, the allocator's own ways outside."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from dpo_fast.heap import why_not_kept

PROGRAM = """
import json, resource
import torch
from dpo_fast.heap import freed_memory_kept, return_freed_memory

def minor_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def buffer():
    return torch.ones(2**24)  # 64 MiB, above glibc's largest threshold

def faults():
    before = minor_faults()
    for _ in range(4):
        buffer()
    return minor_faults() - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
faults()
plain = faults()
with freed_memory_kept():
    kept = min(faults() for _ in range(16))  # until the free pieces fit
    held = resident()
return_freed_memory()
gone = held - resident()
# Eight at a time: one or two may lie in the heap's free pieces, whose pages went but whose
# addresses stay, and which are not given back by themselves when they are freed again.
before = minor_faults()
buffers = [buffer() for _ in range(8)]
after, held = minor_faults() - before, resident()
del buffers
print(json.dumps({
    "plain": plain, "kept": kept, "gone": gone, "after": after, "freed": held - resident()
}))
"""


def measure(**environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(why_not_kept() is not None, reason=f"allocator: {why_not_kept()}")
def test_large_buffers_are_faulted_in_a_few_times_inside_and_each_time_outside() -> None:
    found = measure()
    assert found["kept"] < found["plain"] / 10 and found["plain"] > 1000
    assert found["gone"] > 48 * 2**20
    assert found["after"] > 1.5 * found["plain"]  # eight buffers against four
    assert found["freed"] > 4 * 64 * 2**20


def test_an_allocator_set_by_the_user_is_left_alone() -> None:
    found = measure(GLIBC_TUNABLES="glibc.malloc.top_pad=131072")
    assert found["kept"] > found["plain"] / 2 > 500
