"""What chat rows bring along reaches the template, through the trainer and the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import dpo_fast
from dpo_fast.cli.build import build_trainer
from dpo_fast.cli.parser import parse
from tests.tiny import save_tiny, tiny_model, tiny_preferences, tiny_tokenizer
from tests.trainer.parity import config_kwargs

TOOL = {"type": "function", "function": {"name": "weather"}}


def chats() -> list[dict[str, Any]]:
    """Each row with a persona of its own, every other one with a tool."""
    return [
        row
        | {"chat_template_kwargs": {"persona": f"pirate {i}"}, "tools": [TOOL] if i % 2 else None}
        for i, row in enumerate(tiny_preferences(6, conversational=True))
    ]


def assert_rendered(dataset: Any) -> None:
    """The trained token ids hold what the row brought: the template prints both."""
    tokenizer = tiny_tokenizer()
    for i, row in enumerate(dataset):
        for answer in ("chosen_ids", "rejected_ids"):
            text = tokenizer.decode(row["prompt_ids"] + row[answer])
            assert f"<|im_start|>persona\npirate {i}<|im_end|>" in text
            assert ('"name": "weather"' in text) == bool(i % 2)


@pytest.mark.parametrize("as_json", [False, True])
def test_columns_of_a_data_set(as_json: bool) -> None:
    rows = chats()
    if as_json:
        rows = [
            row | {k: row[k] and json.dumps(row[k]) for k in ("chat_template_kwargs", "tools")}
            for row in rows
        ]
    trainer = dpo_fast.Trainer(
        tiny_model("llama"),
        args=dpo_fast.DPOConfig(**config_kwargs(max_length=None, max_steps=1)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    assert_rendered(trainer.train_dataset)
    assert_rendered(trainer.eval_dataset)
    (first,) = trainer.get_eval_dataloader(trainer.eval_dataset.select(range(1)))
    length = int(first["attention_mask"][0].sum())
    assert "pirate 0" in tiny_tokenizer().decode(first["input_ids"][0, :length])


def test_a_file_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats()))
    options = {
        "model_name_or_path": save_tiny(tmp_path / "model"),
        "dataset_name": tmp_path / "chats.jsonl",
        "output_dir": tmp_path / "out",
        "max_length": "none",
        "bf16": False,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert_rendered(build_trainer(parse("dpo-fast train", "", words)).train_dataset)
