"""TRL's own preparation of a dataset, without a trainer around it."""

from types import SimpleNamespace
from typing import Any


def trl_prepare(
    dataset: Any,
    processing_class: Any,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
) -> Any:
    """What `trl.DPOTrainer` makes of a dataset: its method, on the two attributes that it reads."""
    from trl import DPOTrainer

    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    arguments = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode=truncation_mode
    )
    return DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), dataset, processing_class, arguments, "train"
    )
