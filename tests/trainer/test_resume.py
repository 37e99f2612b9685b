"""Killed and resumed equals uninterrupted, bit for bit, in all four strategies."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_fast.checkpoint import CheckpointError
from tests.tiny import tiny_model
from tests.trainer.cells import STRATEGIES
from tests.trainer.killed_run import build
from tests.trainer.parity import perturbed, trained_parameters


def kill_after(strategy: str, folder: Path, step: int) -> None:
    spec = json.dumps({"strategy": strategy, "folder": str(folder), "step": step})
    command = [sys.executable, "-m", "tests.trainer.killed_run", spec]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_and_resumed(strategy: str, tmp_path: Path) -> None:
    whole = build(strategy, str(tmp_path / "whole"))
    whole.train()
    kill_after(strategy, tmp_path / "killed", step=5)

    resumed = build(strategy, str(tmp_path / "killed"))
    resumed.train(resume_from_checkpoint=True)

    expected = trained_parameters(whole.model)
    for name, param in trained_parameters(resumed.model).items():
        assert torch.equal(param, expected[name]), name
    assert whole.state.log_history[-2]["num_tokens"] == resumed.state.log_history[-2]["num_tokens"]
    if strategy == "ema":
        moved = whole.reference.state_dict()
        assert any(not torch.equal(moved[n], t) for n, t in initial_reference(tmp_path).items())
        for name, tensor in resumed.reference.state_dict().items():
            assert torch.equal(tensor, moved[name]), name


def initial_reference(tmp_path: Path) -> dict[str, torch.Tensor]:
    return build("ema", str(tmp_path / "initial")).reference.state_dict()


def test_resume_against_another_reference_is_refused(tmp_path: Path) -> None:
    build("frozen", str(tmp_path)).train()
    other = build("frozen", str(tmp_path), ref_model=perturbed(tiny_model("llama"), seed=8))
    with pytest.raises(CheckpointError, match="trained against the reference"):
        other.train(resume_from_checkpoint=True)


def test_resume_skips_a_damaged_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build("frozen", str(tmp_path)).train()
    damaged = tmp_path / "run" / "checkpoint-7" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        build("frozen", str(tmp_path)).train(resume_from_checkpoint=str(damaged.parent))
    resumed = build("frozen", str(tmp_path))
    with caplog.at_level("WARNING", logger="dpo_fast"):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-7" in caplog.text and "bytes instead of" in caplog.text
    assert resumed.state.global_step == 7


def test_resume_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        build("frozen", str(tmp_path)).train(resume_from_checkpoint=True)
