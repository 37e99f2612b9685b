"""The benchmark runs, checks what it times, and its triad computes a triad."""

import shutil
from typing import Any

import pytest
import torch

from benchmarks import ema as benchmark


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    if shutil.which("g++") is None:
        pytest.skip("g++: not on this machine")
    return benchmark.run_cpu(rounds=2, model="tiny")


def test_reports_every_variant(results: dict[str, Any]) -> None:
    assert set(results) == {"float32", "bfloat16"}
    ours = {"dpo_fast_nearest", "dpo_fast_stochastic", "dpo_fast_shadow"}
    variants = results["bfloat16"]["variants"]
    assert set(variants) == ours | {"triad", "triad_streaming", "trl_loop", "foreach_lerp"}
    for row in variants.values():
        assert row["seconds"] > 0 and row["gb_per_s"] > 0
    parameters = results["bfloat16"]["parameters"]
    assert variants["dpo_fast_nearest"]["gb"] == pytest.approx(6e-9 * parameters)
    assert variants["dpo_fast_shadow"]["gb"] == pytest.approx(12e-9 * parameters)
    assert variants["trl_loop"]["gb"] == pytest.approx(10e-9 * parameters)
    assert variants[results["bfloat16"]["ceiling"]]["of_ceiling"] == pytest.approx(1.0)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.EmaPlan, "update_", lambda *args, **kwargs: None)
    with pytest.raises(SystemExit, match="nothing is timed"):
        benchmark.check_against_float64(torch.bfloat16)


def test_sizes_are_what_the_names_say() -> None:
    counts = {
        name: sum(torch.Size(s).numel() for s in model.shapes())
        for name, model in benchmark.MODELS.items()
    }
    assert counts["0.25B"] == pytest.approx(0.25e9, rel=0.02)  # 1 GB in float32
    assert counts["0.5B"] == 494_032_768  # Qwen2.5-0.5B
    assert counts["8B"] == pytest.approx(8.03e9, rel=0.001)  # Llama-3-8B
    assert len(benchmark.MODELS["0.5B"].shapes()) == 290
