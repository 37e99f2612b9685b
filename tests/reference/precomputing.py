"""What the tests of precomputed log-probs share: rows, a source, the pass over them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from dpo_fast.reference.precompute import Precompute
from dpo_fast.reference.precomputed import PrecomputedReference
from dpo_fast.reference.sources import PolicySource
from tests.reference.common import collator, token_rows
from tests.tiny import tiny_model

ROWS = 23
CPU = torch.device("cpu")


def how(max_length: int | None = 14, batch_size: int = 4, **kwargs: Any) -> Precompute:
    collate = kwargs.pop("collator", None) or collator(max_length)
    return Precompute(collate, batch_size, CPU, **kwargs)


def of_policy(root: Path, model: Any = None, **kwargs: Any) -> PrecomputedReference:
    model = tiny_model() if model is None else model
    scoring = kwargs.pop("scoring", None)
    keep = kwargs.pop("keep", "auto")
    source = PolicySource(model, scoring, keep)
    return PrecomputedReference(source, how(**kwargs), scoring, root)


def dataset(n: int = ROWS, seed: int = 0) -> Dataset:
    return Dataset.from_list(token_rows(n, seed))


def columns(data: Dataset) -> np.ndarray:
    return np.stack([np.array(data[c]) for c in ("ref_chosen_logps", "ref_rejected_logps")])


def edited(model: Any) -> Any:
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    return model
