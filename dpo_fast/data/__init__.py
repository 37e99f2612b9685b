"""Preference rows to batches: formats, tokenisation, counted drops, collation and loading."""

from dpo_fast.data.collate import DataCollatorForPreference
from dpo_fast.data.load import load_preferences
from dpo_fast.data.prepare import prepare_dataset
from dpo_fast.data.report import PrepareReport

__all__ = [
    "DataCollatorForPreference",
    "PrepareReport",
    "load_preferences",
    "prepare_dataset",
]
