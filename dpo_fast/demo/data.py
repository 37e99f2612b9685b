"""The shipped preference set: `train.jsonl` and `heldout.jsonl`, conversational, made by
`dpo_fast.demo.generate`.
"""

import json
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
SPLITS = ("train", "heldout")


class Pair(NamedTuple):
    """One row, as text."""

    kind: str
    prompt: str
    chosen: str
    rejected: str


def path_of(split: str) -> Path:
    """The file of a split."""
    return FOLDER / f"{split}.jsonl"


def read_pairs(split: str) -> list[Pair]:
    """All rows of a split."""
    with open(path_of(split), encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    turns = ("prompt", "chosen", "rejected")
    return [Pair(row["kind"], *(row[turn][0]["content"] for turn in turns)) for row in rows]
