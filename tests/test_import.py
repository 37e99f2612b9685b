"""`import dpo_fast` is free: nothing heavy is loaded, nothing is patched, no GPU is touched."""

import subprocess
import sys

PROGRAM = """
import sys, time
import torch
touched = []
torch.cuda._lazy_init = lambda: touched.append("cuda")
before = set(sys.modules)
forward = torch.nn.Module.__call__
begin = time.perf_counter()
import dpo_fast
seconds = time.perf_counter() - begin
names = {"transformers", "trl", "triton", "datasets", "peft", "accelerate", "matplotlib"}
heavy = names & set(sys.modules) - before
assert not heavy, f"loaded: {sorted(heavy)}"
assert not touched and torch.nn.Module.__call__ is forward
import dpo_fast.functional, dpo_fast.losses, dpo_fast.batch
heavy = (names - {"triton"}) & set(sys.modules) - before
assert not heavy, f"the ops loaded: {sorted(heavy)}"
print(seconds)
"""


def test_import_is_free() -> None:
    fastest = min(
        float(
            subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True).stdout
        )
        for _ in range(3)
    )
    assert fastest < 0.3
