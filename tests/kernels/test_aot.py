"""Every shipped tile of every kernel compiles for sm_90 and sm_80: no GPU, no spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_shipped_kernels_compile_within_their_limits(target):
    """In a process of its own: kernels that the interpreter defined here cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT / "kernels"), *sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "dpo_fast_kernels.aot", "--target", target],
        capture_output=True, text=True, env=environment, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert sum("exp_gemm" in line for line in lines) >= 16
    assert lines[-1].endswith("0 broken")


def test_limits_are_limits():
    from dpo_fast_kernels.aot import SHARED_LIMIT, Report, shipped_cases

    case = next(c for c in shipped_cases("sm_90") if c.wgmma and c.spill_limit == 0)
    fine = Report(case, 200, 0, SHARED_LIMIT["sm_90"], 4, None)
    assert fine.faults() == []
    for bad in (
        fine._replace(spills=1),
        fine._replace(shared=SHARED_LIMIT["sm_90"] + 1),
        fine._replace(wgmma=0),
        fine._replace(error="CompilationError"),
    ):
        assert len(bad.faults()) == 1


def test_every_tile_of_the_table_is_checked():
    from dpo_fast_kernels.aot_cases import gemm_cases
    from dpo_fast_kernels.tiles import table

    cases = [c for target in ("sm_90", "sm_80") for c in gemm_cases(target)]
    for row in table().tiles:
        tile, way = row.value, "tma" if row.arch == "sm_90" else "ptr"
        name = f"{way} {tile.block_n}x{tile.block_v}x{tile.block_h} w{tile.num_warps}"
        target, aligned = row.arch.removesuffix("-pointer"), row.arch != "sm_90-pointer"
        own = [c for c in cases if c.target == target and c.aligned == aligned]
        assert any(name in c.label for c in own), row
    assert len(cases) == len({(c.target, c.label, c.aligned) for c in cases})


@pytest.mark.slow
def test_what_is_launched_is_what_is_compiled():
    """Triton's launch path with a stand-in for the driver; every call of every mode."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), *sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launches"],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["target"] for r in reports] == ["sm_90", "sm_80"]
    for report in reports:
        assert not report["faults"], report["faults"]
        assert report["launches"] > 60 and len(report["kernels"]) == 16, report["kernels"]
