"""`--accelerate-config`: the same command on two processes, started by accelerate's launcher."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from dpo_fast.cli.errors import UsageError
from dpo_fast.cli.launch import ENGINES, engine_names, launch_command
from tests.cli.words import base_words, read_lines


@pytest.fixture(autouse=True)
def _not_in_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def test_shipped_configs() -> None:
    assert engine_names() == ["ddp", "fsdp2", "zero2", "zero3"]
    examples = Path(__file__).parents[2] / "examples" / "accelerate"
    for name in engine_names():
        path = ENGINES / f"{name}.yaml"
        assert (examples / f"{name}.yaml").resolve() == path.resolve()
        assert yaml.safe_load(path.read_text())["distributed_type"]


def test_accelerate_understands_them() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = [load_config_from_file(str(ENGINES / f"{n}.yaml")) for n in engine_names()]
    names = [str(getattr(kind.distributed_type, "value", kind.distributed_type)) for kind in kinds]
    assert names == ["MULTI_GPU", "FSDP", "DEEPSPEED", "DEEPSPEED"]


def test_the_launchers_words_go_to_it() -> None:
    words = ["--beta", "0.2", "--accelerate-config=fsdp2", "--num_processes", "4", "--bf16"]
    command = launch_command("train", words)
    assert command == [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ENGINES / "fsdp2.yaml"),
        "--num_processes",
        "4",
        "-m",
        "dpo_fast.cli",
        "train",
        "--beta",
        "0.2",
        "--bf16",
    ]
    assert launch_command("train", ["--beta", "0.2"]) is None


@pytest.mark.parametrize(
    "words,message",
    [
        (["--accelerate-config", "fsdp3"], "none of the shipped ones"),
        (["--accelerate_config"], "needs a value"),
        (["--num_processes", "2"], "option of the launcher: add --accelerate-config"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        launch_command("train", words)


def test_not_inside_of_another_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="one of a launcher's already"):
        launch_command("train", ["--accelerate-config", "ddp"])


def test_deepspeed_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_fast.cli.launch.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install deepspeed"):
        launch_command("train", ["--accelerate-config", "zero3"])


def test_two_processes(material: Path, tmp_path: Path) -> None:
    """A real launch with a config of one's own. On a CPU accelerate runs DDP: that is said."""
    config: dict[str, Any] = yaml.safe_load((ENGINES / "fsdp2.yaml").read_text())
    config["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] = True
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    words = base_words(material, tmp_path / "out", per_device_train_batch_size=1)
    launcher = ["--accelerate-config", str(tmp_path / "own.yaml"), "--num_processes", "2"]
    command = [sys.executable, "-m", "dpo_fast.cli", "train", *words, *launcher]
    env = {**os.environ, "DPO_FAST_TRACEBACK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "FSDP was asked for" in done.stderr and "runs ddp here" in done.stderr
    logs = [log for log in read_lines(tmp_path / "out" / "metrics.jsonl") if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3]
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (material / "model", tmp_path / "out")
    )
    assert any((before[name] != after[name]).any() for name in before)
