"""Every example runs, offline and on a CPU, and does what it says."""

import importlib
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dpo_fast
from tests.tiny import save_tiny

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "offline")
NEEDS = {
    "trl_one_line": "trl",
    "lora": "peft",
    "tr_dpo_adapter": "peft",
    "lightning_module": "lightning",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "offline", raising=False)


def shorten(monkeypatch: pytest.MonkeyPatch, steps: int, pairs: int) -> None:
    """Fewer steps and pairs, everything else as in the scripts."""
    offline = importlib.import_module("offline")
    rows = offline.pairs(pairs)
    monkeypatch.setattr(offline, "pairs", lambda: rows)
    monkeypatch.setitem(offline.ARGUMENTS, "max_steps", steps)
    monkeypatch.setitem(offline.ARGUMENTS, "logging_steps", 1)


def run(name: str, *arguments: str) -> Any:
    """``main`` of an example, in this process."""
    needed = NEEDS.get(name, "dpo_fast")
    pytest.importorskip(needed, reason=f"{needed} is not installed: pip install {needed}")
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](*arguments)


def test_these_are_all() -> None:
    assert SCRIPTS == [
        "fsdp2_two_processes",
        "lightning_module",
        "lora",
        "precomputed_sweep",
        "quickstart",
        "raw_pytorch_loop",
        "tr_dpo_adapter",
        "trl_one_line",
    ]
    for name in SCRIPTS:
        text = (FOLDER / f"{name}.py").read_text()
        assert len(text.splitlines()) < 60 and f"examples/{name}.py [MODEL]" in text


@pytest.mark.parametrize("name", ["quickstart", "lora", "raw_pytorch_loop", "lightning_module"])
def test_training_learns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, 12, 96)
    assert run(name) > 0.5
    assert name != "lora" or Path("runs/lora/adapter/adapter_model.safetensors").is_file()


def test_trl_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_fast.integrations.trl import FusedLogProbs

    shorten(monkeypatch, 12, 96)
    utils = pytest.importorskip("trl.trainer.utils")
    original = utils._ChunkedLogProbFunction
    try:
        assert run("trl_one_line") > 0.5
        assert isinstance(utils._ChunkedLogProbFunction, FusedLogProbs)
    finally:
        dpo_fast.unpatch("trl")
    assert utils._ChunkedLogProbFunction is original


def test_sweep_computes_the_reference_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, 2, 24)
    assert run("precomputed_sweep") == {0.05: 24, 0.1: 0, 0.5: 0}


def test_tr_dpo_moves_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, 11, 96)
    assert run("tr_dpo_adapter") == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_with_a_model_of_ones_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path argument: a saved model and tokenizer, loaded as a hub's would be."""
    shorten(monkeypatch, 1, 8)
    path = save_tiny(tmp_path / "model", "qwen2")
    try:
        result = run(name, path)
    finally:
        dpo_fast.unpatch("trl")
    numbers = result.values() if isinstance(result, dict) else [result]
    assert all(math.isfinite(number) for number in numbers)


def test_from_the_command_line(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model")
    script = FOLDER / "raw_pytorch_loop.py"
    done = subprocess.run(
        [sys.executable, str(script), path], capture_output=True, text=True, check=True
    )
    assert "step 0: loss 0.6931, margin 0.00" in done.stdout
