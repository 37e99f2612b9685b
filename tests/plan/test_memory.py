"""The plan's memory against peaks of real trainings: within 10 percent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_fast.plan import Batches, Device, Run, plan_cells
from tests.plan.cases import CASES

ROOT = Path(__file__).parents[2]
CPU = Device("cpu", "cpu", 2**36, 1e11, 1e11, 1e10, "made up: rates do not matter here")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """In a process of its own: torch's scratch and profiler start from nothing."""
    target = tmp_path_factory.mktemp("plan") / "peaks.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.plan.measure", str(target), *CASES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_measured_peak_within_ten_percent(
    name: str, measured: dict[str, int]
) -> None:
    case = CASES[name]
    run = Run(CPU, accumulation=case.accumulation, workspace=case.workspace, max_length=None)
    batches = Batches(case.rows(), case.rows(), "the case's")
    (cell,) = plan_cells(case.config(), batches, [case.setting], run, case.lora())
    assert cell.peak == pytest.approx(measured[name], rel=0.10), dict(cell.memory)


def test_the_cases_would_tell_a_forgotten_part() -> None:
    """Each part is worth more than the tolerance somewhere."""
    shares: dict[str, float] = {}
    for name in (
        "full-fp32-padded-frozen",
        "full-fp32-packed-precomputed",
        "full-mixed-checkpointing-shared-frozen",
    ):
        case = CASES[name]
        batches = Batches(case.rows(), case.rows(), "the case's")
        (cell,) = plan_cells(case.config(), batches, [case.setting], Run(CPU), None)
        for part, size in cell.memory.items():
            shares[part] = max(shares.get(part, 0.0), size / cell.peak)
    small = {part: share for part, share in shares.items() if share < 0.04}
    assert not small, shares
