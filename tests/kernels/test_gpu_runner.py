"""What runs the GPU's tests and benchmarks in parts: reports, resuming; every test is in a part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import resume
from tests import gpu

ROOT = Path(__file__).parents[2]

CASE = '<testcase classname="tests.kernels.test_gpu_bits" name="{}">{}</testcase>'
REPORT = "<testsuites><testsuite>{}</testsuite></testsuites>".format(
    CASE.format("test_a[1]", "")
    + CASE.format("test_b", '<failure message="x != y&#10;more"/>')
    + CASE.format("test_c", '<skipped message="no room"/>')
    + CASE.format("test_d", '<error message=""/>')
)


def test_outcome_of_a_report(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    found = gpu.outcome(report)
    assert found["passed"] == 1 and found["skipped"] == ["test_gpu_bits::test_c: no room"]
    assert found["failed"] == ["test_gpu_bits::test_b: x != y", "test_gpu_bits::test_d: "]
    died = gpu.outcome(tmp_path / "none.xml")
    assert died["failed"] and not gpu.good({"exit": -11, **died})
    assert gpu.good({"exit": 0, "passed": 3, "failed": [], "skipped": []})


def test_every_gpu_test_is_in_a_part():
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu\n" in path.read_text()
    }
    parts = {test for part in gpu.PARTS.values() for test in part.tests if test.endswith(".py")}
    assert marked == parts and "tests/kernels/test_gpu_head.py" in marked


@pytest.mark.slow
def test_gpu_tests_are_collected_without_what_a_gpu_machine_lacks():
    """No datasets, trl or liger there: the modules that hold GPU tests must not import them."""
    files = sorted({t for p in gpu.PARTS.values() for t in p.tests if t.endswith(".py")})
    code = (
        "import sys, pytest\n"
        "for name in ('datasets', 'trl', 'liger_kernel', 'cut_cross_entropy'):\n"
        "    sys.modules[name] = None\n"
        f"sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', *{files!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "test_target_logit_has_the_bits_of_the_gemm" in done.stdout


def test_results_are_resumed_with_the_same_sources_only(tmp_path, monkeypatch):
    line = {"gpu": "a GPU", "torch": "2", "triton": "3"}
    monkeypatch.setattr(resume, "RESULTS", tmp_path)
    monkeypatch.setattr(resume, "machine_line", lambda device: dict(line))
    monkeypatch.setattr(
        resume, "write_result",
        lambda name, payload, device: (tmp_path / f"{name}.json").write_text(
            json.dumps({"machine": line, **payload})
        ),
    )  # fmt: skip
    assert resume.load_parts("some") == {}
    resume.save_parts("some", {"a": 1})
    assert resume.load_parts("some") == {"a": 1}
    monkeypatch.setattr(resume, "machine_line", lambda device: line | {"gpu": "another"})
    assert resume.load_parts("some") == {}
    monkeypatch.setattr(resume, "machine_line", lambda device: dict(line))
    monkeypatch.setattr(resume, "sources", lambda: "changed")
    assert resume.load_parts("some") == {}


def test_fingerprint_sees_code_and_table_but_no_results(tmp_path):
    for name in ("kernels/a.py", "kernels/table.json", "benchmarks/results/b.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    first = resume.sources(tmp_path)
    (tmp_path / "benchmarks/results/b.json").write_text("2")
    assert resume.sources(tmp_path) == first
    (tmp_path / "kernels/table.json").write_text("2")
    assert resume.sources(tmp_path) != first


def test_table_of_the_head_s_benchmark(tmp_path):
    from benchmarks.head_table import write_table

    row = {"ms": 12.345, "tflops": 700.0, "peak_gib": 1.5, "over_gemms": 1.0, "over_ours": 0.8}
    providers = {"gemms": row | {"host_ms": 0.12}, "trl": {"left_out": "ImportError: none"}}
    part = {"batch": {"pairs": 3}, "gemm_count": 4, "error_nats": 1e-5, "providers": providers}
    write_table({"m N=1 forward": part}, {"gpu": "a GPU"}, tmp_path / "a.md")
    lines = (tmp_path / "a.md").read_text().splitlines()
    assert "| gemms | 12.35 | 0.12 | 700 | 1.000 | 1.250 | 1.50 |" in lines
    (absent,) = [line for line in lines if "ImportError" in line]
    assert absent.count("|") == lines[lines.index(absent) - 1].count("|")


def test_picture_of_the_head_s_benchmark(tmp_path):
    from benchmarks.head_plot import draw

    row = {"ms": 10.0, "peak_gib": 1.0, "over_gemms": 1.1}
    part = {"providers": {"gemms": row, "ours": row, "trl": {"left_out": "ImportError: none"}}}
    draw({f"m N={n} full/online": part for n in range(5)}, {"gpu": "a GPU"}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
