"""Every suite runs in its quick size, writes its three files, and can be run in parts."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_fast.bench import SUITES, run
from dpo_fast.bench.command import main
from dpo_fast.bench.settings import Settings
from dpo_fast.bench.suites import ema, head, layout, precompute, reference, train_step

MODULES = {
    "head": head,
    "layout": layout,
    "train_step": train_step,
    "reference": reference,
    "ema": ema,
    "precompute": precompute,
}
# suite -> the cases run here ("a": adapter and ema), and the variants that must have a number
RUN = {
    "head": ("N = 16", {"naive", "dpo_fast"}),
    "layout": ("pairs 1", {"naive", "dpo_fast", "dpo_fast packed", "dpo_fast shared_prefix"}),
    "train_step": ("pairs = 1", {"naive", "dpo_fast", "dpo_fast shared_prefix"}),
    "reference": ("a", {"naive", "dpo_fast", "dpo_fast shared_prefix"}),
    "ema": ("bfloat16", {"TRL's loop", "torch._foreach_lerp_", "dpo_fast"}),
    "precompute": ("pairs = 4", {"naive", "dpo_fast", "dpo_fast, found in the cache"}),
}


def run_one(suite: str, out: Path, **options: Any) -> dict[str, Any]:
    written = run([suite], "cpu", True, out, rounds=1, say=lambda line: None, **options)
    assert [path.suffix for path in written] == [".json", ".md", ".png"]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads(written[0].read_text())
    assert all(name in written[1].read_text() for name in found["cases"])
    return found


@pytest.mark.parametrize("suite", SUITES)
def test_quick_suite(suite: str, tmp_path: Path) -> None:
    only, expected = RUN[suite]
    found = run_one(suite, tmp_path, only=only)
    assert found["suite"] == suite and found["quick"] and found["machine"]["commit"]
    assert found["cases"]
    for name, case in found["cases"].items():
        timed = {variant for variant, row in case["rows"].items() if "seconds" in row}
        assert expected <= timed, name
        for variant, row in case["rows"].items():
            assert ("seconds" in row) != ("left_out" in row or "refused" in row)
            for kind, error in row.get("errors", {}).items():
                assert "refused" in row or error <= case["limits"][kind], (name, variant)
        assert case["floor_seconds"] > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("suite", SUITES)
def test_cases_have_names_of_their_own_and_curves_have_axes(
    suite: str, quick: bool, device: str
) -> None:
    cases = MODULES[suite].cases(Settings(device, quick))  # type: ignore[attr-defined]
    names = [case.name for case in cases]
    assert names and len(set(names)) == len(names)
    assert all(set(case.curves) <= set(case.axes) for case in cases)


def test_a_result_is_continued_if_it_is_of_the_same_code(tmp_path: Path) -> None:
    first = run_one("head", tmp_path, only="N = 16")
    said: list[str] = []
    run(["head"], "cpu", True, tmp_path, rounds=1, only="N = ", say=said.append)
    path = tmp_path / "suite_head_cpu_quick.json"
    both = json.loads(path.read_text())
    assert list(both["cases"]) == ["N = 16", "N = 32"]
    assert both["cases"]["N = 16"] == first["cases"]["N = 16"]
    assert len(said) == 1 and said[0].startswith("head: N = 32:")
    path.write_text(json.dumps({**both, "sources": "older"}))
    run(["head"], "cpu", True, tmp_path, rounds=1, only="N = 32", say=said.append)
    assert list(json.loads(path.read_text())["cases"]) == ["N = 32"]


def test_no_case_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    """And nothing is written, an older result least of all."""
    said: list[str] = []
    older = tmp_path / "suite_head_cpu_quick.json"
    older.write_text(json.dumps({"sources": "older", "machine": {}, "cases": {"N = 16": {}}}))
    before = older.read_text()
    assert run(["head"], "cpu", True, tmp_path, only="N = ", seconds=0.0, say=said.append) == []
    assert said == ["head: out of time before 'N = 16'; run the same command again"]
    assert older.read_text() == before and list(tmp_path.iterdir()) == [older]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(suites=["heads"]), r"no suites \['heads'\]: there are head, layout"),
        (dict(suites=[]), r"no suites \(none given\)"),
        (dict(device="tpu"), "device='tpu' must be one of cpu, cuda"),
        (dict(suites=["ema"], only="nothing"), "ema has no case with 'nothing'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(**{"quick": True, "out": tmp_path, **arguments})


def test_the_command_prints_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["head", "--quick", "--only", "N = 16", "--rounds", "1", "--out", str(tmp_path)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("head: N = 16: naive ")
    assert lines[-1] == str(tmp_path / "suite_head_cpu_quick.png")
