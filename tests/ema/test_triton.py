"""The Triton kernel without a GPU: the interpreter's bits, and what the compiler makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton")


def run_module(name: str, *arguments: str) -> str:
    """A module of this folder in a process of its own: Triton reads its mode at import."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", f"tests.ema.{name}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_interpreter_gives_the_same_bits() -> None:
    assert "same bits" in run_module("triton_interpreted")


@pytest.mark.parametrize("arch", ["80", "90"])
def test_compiles_without_spills_or_fused_arithmetic(arch: str) -> None:
    reports = [json.loads(line) for line in run_module("triton_compiled", arch).splitlines()]
    assert len(reports) == 10
    for report in reports:
        assert report["spills"] == 0, report
        assert report["registers"] <= 128, report
        assert report["fused"] == report["flushing"] == 0, report
        aligned = report["name"] != "unaligned"
        assert (report["wide_loads"] > 0) == (report["wide_stores"] > 0) == aligned, report
