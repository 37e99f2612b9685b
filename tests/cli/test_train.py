"""`dpo-fast train` on a tiny model: what it leaves, from flags and from a file, LoRA, resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dpo_fast.cli import main
from tests.cli.words import base_words, read_lines

FILES = ("metrics.jsonl", "curves.png", "config.json", "tokenizer.json", "README.md")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training with evaluation."""
    out = tmp_path_factory.mktemp("trained")
    evaluation = {"eval_dataset_name": material / "eval.jsonl", "eval_strategy": "steps"}
    assert main(["train", *base_words(material, out, **evaluation, eval_steps=2)]) == 0
    return out


def test_output_folder(material: Path, trained: Path) -> None:
    assert all((trained / name).is_file() for name in FILES)
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not equal(weights(trained), weights(material / "model"))


def test_metrics_hold_every_log(trained: Path) -> None:
    logs = read_lines(trained / "metrics.jsonl")
    assert [log["step"] for log in logs if "loss" in log] == [1, 2, 3]
    assert [log["step"] for log in logs if "eval_loss" in log] == [2, 3]
    first = next(log for log in logs if "loss" in log)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3) and "rewards/margins" in first
    assert logs[-1]["train_runtime"] > 0


def test_file_gives_the_same_model_as_flags(material: Path, trained: Path, tmp_path: Path) -> None:
    words = base_words(material, tmp_path / "out")
    names = [word.removeprefix("--") for word in words[::2]]
    config: dict[str, Any] = dict(zip(names, map(yaml.safe_load, words[1::2]), strict=True))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "learning_rate": 1.0}))
    flags = ["--learning_rate", "1e-3"]  # over the file's 1.0
    assert main(["train", "--config", str(tmp_path / "run.yaml"), *flags]) == 0
    assert equal(weights(tmp_path / "out"), weights(trained))


def test_plain_lines(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *base_words(material, tmp_path)]) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith("step ")]
    assert len(lines) == 4 and lines[0].startswith("step 1/3 | epoch 0.17 | loss 0.69")
    assert "margin" in lines[2] and "pairs/s" in lines[2] and "left" in lines[2]
    assert "done in" in lines[3] and "{'loss'" not in shown.out
    assert "reference='frozen'" in shown.err and str(tmp_path) in shown.err


def test_lora_and_going_on_with_it(material: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    lora = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "save_strategy": "steps"}
    words = base_words(material, first, **lora, lora_target_modules=["q_proj", "v_proj"])
    assert main(["train", *words]) == 0
    config = json.loads((first / "adapter_config.json").read_text())
    assert (config["r"], sorted(config["target_modules"])) == (4, ["q_proj", "v_proj"])
    assert not (first / "model.safetensors").exists()
    adapter = load_file(first / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for key, value in adapter.items() if "lora_B" in key)

    assert main(["train", *base_words(material, second, model_name_or_path=first)]) == 0
    moved = load_file(second / "adapter_model.safetensors")
    assert moved.keys() == adapter.keys() and not equal(moved, adapter)
    assert not (second / "ref").exists() and (second / "tokenizer.json").is_file()
    logs = read_lines(second / "metrics.jsonl")
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # its reference is where it stood


def test_reference_model_is_used(material: Path, tmp_path: Path) -> None:
    words = base_words(material, tmp_path, ref_model_name_or_path=material / "other")
    assert main(["train", *words]) == 0
    first = read_lines(tmp_path / "metrics.jsonl")[0]
    assert abs(first["loss"] - 0.6931) > 1e-2


def test_resume(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    constant = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    assert main(["train", *base_words(material, whole, **constant, max_steps=4)]) == 0
    assert main(["train", *base_words(material, parts, **constant, max_steps=2)]) == 0
    again = base_words(material, parts, **constant, max_steps=4)
    assert main(["train", *again, "--resume_from_checkpoint"]) == 0
    assert equal(weights(whole), weights(parts))
    steps = [log["step"] for log in read_lines(parts / "metrics.jsonl") if "loss" in log]
    assert steps == [1, 2, 3, 4]
    path = str(whole / "checkpoint-2")
    assert main(["train", *again, "--resume_from_checkpoint", path]) == 0
    assert equal(weights(whole), weights(parts))
    empty = base_words(material, tmp_path / "empty", resume_from_checkpoint=True)
    capsys.readouterr()
    assert main(["train", *empty]) == 1
    assert "holds no complete checkpoint" in capsys.readouterr().err


def test_streaming(material: Path, tmp_path: Path) -> None:
    assert main(["train", *base_words(material, tmp_path, streaming=True)]) == 0
    assert (tmp_path / "model.safetensors").is_file()


def test_other_ranks_are_silent(
    material: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import TrainerState

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(TrainerState, "is_world_process_zero", False, raising=False)
    monkeypatch.setattr("dpo_fast.trainer.Trainer.is_world_process_zero", lambda self: False)
    init = TrainerState.__init__

    def not_first(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.is_world_process_zero = False

    monkeypatch.setattr(TrainerState, "__init__", not_first)
    assert main(["train", *base_words(material, tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "step " not in shown.out and "reference=" not in shown.err
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (FloatingPointError("NaN"), 1)]
)
def test_stopped_run_keeps_metrics_and_curves(
    error: BaseException,
    code: int,
    material: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dpo_fast.trainer import Trainer

    step = Trainer.training_step

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise error
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stopping)
    monkeypatch.setattr("dpo_fast.cli.errors._is_ours", lambda trace: True)
    assert main(["train", *base_words(material, tmp_path)]) == code
    assert "Traceback" not in capsys.readouterr().err
    assert [log["step"] for log in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "curves.png").is_file()
    assert not (tmp_path / "model.safetensors").exists()


def test_file_formats(material: Path, tmp_path: Path) -> None:
    """One file of each kind gives one model; so does a folder of parquet files with a split of its
    own to evaluate on.
    """
    from datasets import Dataset

    lines = read_lines(material / "train.jsonl")
    rows = Dataset.from_list(lines)
    rows.to_csv(tmp_path / "pairs.csv")
    rows.to_parquet(tmp_path / "pairs.parquet")
    (tmp_path / "pairs.json").write_text(json.dumps(lines))
    (tmp_path / "pairs.jsonl").write_bytes((material / "train.jsonl").read_bytes())
    for split in ("train", "test"):
        (tmp_path / "parts").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "parts" / f"{split}-0.parquet")
    for kind in ("csv", "json", "jsonl", "parquet"):
        file = {"dataset_name": tmp_path / f"pairs.{kind}"}
        assert main(["train", *base_words(material, tmp_path / kind, **file)]) == 0
        assert equal(weights(tmp_path / kind), weights(tmp_path / "csv")), kind
    parts = {"dataset_name": tmp_path / "parts", "eval_strategy": "steps", "eval_steps": 3}
    assert main(["train", *base_words(material, tmp_path / "b", **parts)]) == 0
    assert any("eval_loss" in log for log in read_lines(tmp_path / "b" / "metrics.jsonl"))
    assert equal(weights(tmp_path / "csv"), weights(tmp_path / "b"))
