"""The GPU tests in parts, each in a process of its own, so that a crash in one leaves the others.

    python -m tests.gpu [PART ..] [--seconds 500] [--again] [--list]

A part that passed with the same sources is skipped, no new one is started after --seconds, and
what happened is written after each part to benchmarks/results/test_gpu.json: run the same command
again until it says that everything passed. The order is from the smallest thing to the largest.
The part "together", which runs only when it is named, is all of them but the sanitizer in one call
on as many processes as there are cores: a minute where the parts take several.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.resume import load_parts, save_parts

ROOT = Path(__file__).parents[1]
NAME = "test_gpu"


class Part(NamedTuple):
    """Arguments of pytest, and how it is run."""

    tests: tuple[str, ...]
    workers: int = 0  # processes that share the GPU: what compiles for long and needs little memory
    sanitizer: bool = False


PARTS = {
    "products": Part(("tests/kernels/test_gpu_products.py",)),
    "bits": Part(("tests/kernels/test_gpu_bits.py",), workers=4),
    "head": Part(("tests/kernels/test_gpu_head.py",), workers=12),
    "filtered": Part(("tests/kernels/test_gpu_filtered.py",), workers=4),
    "fused": Part(("tests/kernels/test_gpu_fused.py",), workers=4),
    "trainer": Part(("tests/trainer/test_gpu.py",), workers=8),
    "traced": Part(("tests/kernels/test_gpu_traced.py",), workers=3),
    "large": Part(("tests/kernels/test_gpu_large.py",)),
    "batch": Part(("tests/test_batch.py",)),
    "ema": Part(("tests/ema/test_gpu.py",), workers=8),
    "attention": Part(("tests/layouts/test_attention.py",), workers=4),
    "sanitizer": Part(
        ("tests/kernels/test_gpu_head.py", "-k", "odd_shapes and (129 or 77) or every_number"),
        sanitizer=True,
    ),
}


TOGETHER = "together"
PARTS[TOGETHER] = Part(
    tuple(sorted({t for part in PARTS.values() for t in part.tests if t.endswith(".py")})),
    workers=min(14, os.cpu_count() or 1),
)


def command_of(part: Part, report: Path) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", "--tb=short", "-n", str(part.workers), *part.tests]
    if part.sanitizer:
        tool = "compute-sanitizer"
        return [
            tool,
            "--tool",
            "memcheck",
            "--error-exitcode",
            "9",
            "--print-limit",
            "20",
            *command,
        ]
    return command


def run(name: str, seconds: float) -> dict[str, Any]:
    """Runs one part; the result counts tests and names what failed."""
    part, began = PARTS[name], time.monotonic()
    if part.sanitizer and shutil.which("compute-sanitizer") is None:
        return {"passed": 0, "failed": [], "skipped": ["no compute-sanitizer here"], "exit": 0}
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": paths}
    if part.sanitizer:  # each tensor an allocation of its own: a stray access leaves it
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        try:
            done = subprocess.run(
                command_of(part, report), cwd=ROOT, env=environment, timeout=seconds, check=False
            )
            code, found = done.returncode, outcome(report)
        except subprocess.TimeoutExpired:
            code, found = -1, {"passed": 0, "failed": [f"stopped after {seconds:.0f} s"]}
    return {"seconds": round(time.monotonic() - began, 1), "exit": code, **found}


def outcome(report: Path) -> dict[str, Any]:
    """Counts and first lines of a JUnit report; none was written if the process died."""
    if not report.exists():
        return {"passed": 0, "failed": ["the process died before it reported"], "skipped": []}
    passed, failed, skipped = 0, [], []
    for case in ElementTree.parse(report).iter("testcase"):
        label = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        bad = [e for e in case if e.tag in ("failure", "error")]
        if bad:
            said = (bad[0].get("message") or "").splitlines() or [""]
            failed.append(f"{label}: {said[0][:300]}")
        elif (skip := case.find("skipped")) is not None:
            skipped.append(f"{label}: {(skip.get('message') or '')[:200]}")
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


def good(found: dict[str, Any]) -> bool:
    return found["exit"] == 0 and not found["failed"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(argv)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; `make test` runs what needs none")
    names = options.parts or [name for name in PARTS if name != TOGETHER]
    results = load_parts(NAME)
    if options.list:
        print("\n".join(f"{n}: {results.get(n, 'not run with these sources')}" for n in PARTS))
        return 0
    began, left = time.monotonic(), []
    for name in names:
        if name in results and good(results[name]) and not options.again:
            continue
        remaining = options.seconds - (time.monotonic() - began)
        if remaining < 30:
            left.append(name)
            continue
        print(f"\n== {name}", flush=True)
        results[name] = run(name, remaining)
        save_parts(NAME, results)
    bad = [n for n in names if n in results and not good(results[n])]
    for name in bad:
        print(f"\n{name}:\n  " + "\n  ".join(results[name]["failed"] or ["exit status"]))
    total = sum(results[n]["passed"] for n in names if n in results)
    print(f"\n{total} tests passed; parts failed: {bad or 'none'}; not started: {left or 'none'}")
    return 1 if bad or left else 0


if __name__ == "__main__":
    sys.exit(main())
