"""Wrong paths and names end in one message, before a model is loaded."""

from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config

from dpo_fast.cli import main
from tests.cli.words import base_words


@pytest.fixture(autouse=True)
def _no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dpo_fast.trainer.setup.load_model", refuse)


def cases(material: Path) -> dict[str, tuple[dict[str, Any], str]]:
    held_out = {"eval_dataset_name": material / "eval.jsonl", "eval_strategy": "steps"}
    return {
        "model path": ({"model_name_or_path": "./nowhere"}, "there is no folder './nowhere'"),
        "model file": ({"model_name_or_path": material / "train.jsonl"}, "is a file"),
        "no model in it": ({"model_name_or_path": material}, "holds no model"),
        "encoder-decoder": ({"model_name_or_path": material / "t5"}, "is an encoder-decoder"),
        "hub name": ({"model_name_or_path": "nobody/nothing"}, "'nobody/nothing' cannot be loaded"),
        "reference path": ({"ref_model_name_or_path": "./nowhere"}, "--ref_model_name_or_path"),
        "data path": ({"dataset_name": "./nowhere.jsonl"}, "no file or folder './nowhere.jsonl'"),
        "data file's kind": ({"dataset_name": material / "model/config.txt"}, "config.txt"),
        "train split": ({"dataset_train_split": "tarin"}, 'Unknown split "tarin"'),
        "test split": ({"eval_strategy": "steps"}, "--eval_dataset_name"),
        "unused evaluation": ({**held_out, "eval_strategy": "no"}, "nothing would be evaluated"),
        "4 bits": ({"load_in_4bit": True}, "bitsandbytes"),
        "loss": ({"loss_type": "magic"}, "magic"),
        "two references": ({"reference": "ema", "precompute_ref_log_probs": True}, "two ref"),
        "adapter without PEFT": ({"reference": "adapter"}, "needs an adapter"),
        "offloaded adapter": ({"use_peft": True, "ref_offload": True}, "Drop ref_offload"),
        "output folder": ({"output_dir": material / "train.jsonl" / "out"}, "cannot be written"),
    }


@pytest.mark.parametrize("case", cases(Path()))
def test_refused(
    case: str, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = cases(material)[case]
    if case == "encoder-decoder":
        T5Config(num_layers=1).save_pretrained(material / "t5")
    output = options.pop("output_dir", tmp_path)
    assert main(["train", *base_words(material, output, **options)]) in (1, 2)
    shown = capsys.readouterr().err
    assert message in shown and "dpo-fast train: error: " in shown and "Traceback" not in shown


def test_folder_with_checkpoints_names_the_last(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    words = base_words(material, tmp_path / "out", model_name_or_path=tmp_path)
    assert main(["train", *words]) == 2
    assert f"Did you mean {tmp_path / 'checkpoint-4'}?" in capsys.readouterr().err


def test_quantised_without_adapter(
    material: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dpo_fast.cli.checks.find_spec", lambda name: object())
    assert main(["train", *base_words(material, tmp_path, load_in_4bit=True)]) == 2
    assert "add --use_peft" in capsys.readouterr().err
