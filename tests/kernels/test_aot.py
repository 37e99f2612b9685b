"""Every shipped tile of every kernel compiles for sm_90 and sm_80: no GPU, no spills."""

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
    from dpo_fast_kernels.aot import gemm_cases
    from dpo_fast_kernels.tiles import TABLE

    labels = [c.label for target in ("sm_90", "sm_80") for c in gemm_cases(target)]
    for rows in TABLE.values():
        for _, tile in rows:
            name = f"{tile.block_n}x{tile.block_v}x{tile.block_h} w{tile.num_warps}"
            assert any(name in label for label in labels), tile
    assert len(labels) == len(
        {(c.target, c.label) for t in ("sm_90", "sm_80") for c in gemm_cases(t)}
    )


def test_tiles_obey_the_kernels_rules():
    from dpo_fast_kernels.tiles import INTERPRETER, TABLE, choose_tile, tile_class

    found = [(v, t) for (_, v), rows in TABLE.items() for _, t in rows]
    for variant, tile in [*found, *INTERPRETER.items()]:
        for side in tile[:4]:
            assert side & (side - 1) == 0 and side >= 16
        assert tile.block_v % tile.unit == 0
        assert variant != "stats" or tile.block_v == tile.unit
    assert len({t.unit for _, t in found}) == 1
    for capability, tma, name in (
        ((9, 0), True, "sm_90"), ((9, 0), False, "sm_90-pointer"), ((8, 0), False, "sm_80"),
        ((8, 9), False, "sm_80"), ((12, 0), False, "sm_80"),
    ):  # fmt: skip
        assert tile_class(capability, tma) == name
        assert choose_tile(name, "plain", 1024) == TABLE[name, "plain"][-1][1]
    with pytest.raises(ValueError, match=r"7\.5"):
        tile_class((7, 5), False)
