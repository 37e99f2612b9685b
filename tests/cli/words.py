"""Words of command lines that the tests share."""

import json
from pathlib import Path
from typing import Any


def base_words(material: Path, output: Path, **options: Any) -> list[str]:
    """A short fp32 training on the CPU; ``options`` come last and win."""
    chosen: dict[str, Any] = {
        "model_name_or_path": material / "model",
        "dataset_name": material / "train.jsonl",
        "output_dir": output,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_length": 128,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        **options,
    }
    return as_words(chosen)


def as_words(options: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
