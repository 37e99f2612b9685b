"""The demo itself: small in the ordinary run, whole in the slow one."""

import json
import os

import pytest

from dpo_fast.demo import run_demo
from dpo_fast.demo.processes import StageProcesses
from dpo_fast.demo.settings import STRATEGIES, Settings

TINY = Settings(hidden_size=16, sft_steps=3, steps=4, batch=8, eval_steps=4, warmup_steps=1)


def test_four_strategies_end_to_end_small(tmp_path, capfd):
    """Too few steps to learn anything: the table is complete, and the exit code says so."""
    code = run_demo(tmp_path, settings=TINY)
    shown = capfd.readouterr().out
    found = json.loads((tmp_path / "demo.json").read_text())
    assert code == 1 and "FAILED: accuracy after DPO, frozen" in shown
    assert list(found["strategies"]) == list(STRATEGIES)
    assert found["before"]["accuracy"] < 0.65
    results = found["strategies"]
    for result in results.values():
        assert result["seconds"] > 0 and result["peak_bytes"] > 0
        assert len(result["margins"]) == found["data"]["heldout"]
    assert results["frozen"]["reference_bytes"] == results["ema"]["reference_bytes"] > 0
    assert results["adapter"]["reference_bytes"] == results["precomputed"]["reference_bytes"] == 0
    assert results["precomputed"]["reference_disk_bytes"] > 2000 * 40
    assert results["precomputed"]["reference_seconds"]["before"] > 0
    assert results["frozen"]["reference_seconds"]["during"] > 0
    # the same reference, met in two ways
    assert results["precomputed"]["loss"] == pytest.approx(results["frozen"]["loss"], abs=1e-4)
    for name in STRATEGIES:
        assert (tmp_path / name / "metrics.jsonl").exists()
    assert "| precomputed" in (tmp_path / "demo.md").read_text()


def test_a_stage_that_fails_says_which():
    with pytest.raises(RuntimeError, match=r"train_strategy\('frozen',\) ended with exit code 1"):
        StageProcesses().run("train_strategy", "frozen", "/nowhere/at/all", TINY)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("DPO_FAST_DEMO_SEEDS", "1"))))
def test_the_demo_shows_what_it_claims(tmp_path, seed):
    """All thresholds, as `make demo` runs; more weights and orders: DPO_FAST_DEMO_SEEDS=3."""
    assert run_demo(tmp_path, seed=seed) == 0
