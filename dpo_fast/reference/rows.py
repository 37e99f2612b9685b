"""What a row of a preference dataset is to a reference: the tokens that it will be shown.

P pairs, S = 2P sequences.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.data.collate import DataCollatorForPreference
from dpo_fast.reference.cache import DIGEST_BYTES

if TYPE_CHECKING:
    from datasets import Dataset

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class RowKeys:
    """``digests [n, 16]`` uint8 and ``lengths [n]`` int64, the longer sequence's tokens."""

    digests: np.ndarray
    lengths: np.ndarray


def truncation_of(collator: Callable[..., Any]) -> dict[str, Any]:
    """What the collator does to a row's tokens, as a part of the key."""
    inner = getattr(collator, "collator", collator)
    if type(inner) is DataCollatorForPreference:
        mode = inner.truncation_mode if inner.max_length is not None else None
        return {"max_length": inner.max_length, "truncation_mode": mode}
    return {"collated": True}


def row_keys(dataset: "Dataset", collator: Callable[..., Any]) -> RowKeys:
    """Digest and length of every row.

    With our own collator from the columns (50,000 pairs a second); a collator of somebody else is
    asked for every row by itself, and what it returns is hashed.

    Raises:
        ValueError: a column is missing (names those seen), or a row holds null.
    """
    inner = getattr(collator, "collator", collator)
    if type(inner) is not DataCollatorForPreference:
        return _keys_of_batches(collator([row]) for row in dataset)
    missing = [name for name in ID_COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the dataset lacks {missing}; it has {dataset.column_names}. Tokenise it first "
            "(dpo_fast.data.prepare_dataset)."
        )
    return _keys_of_columns(dataset, inner.max_length)


def _keys_of_columns(dataset: "Dataset", max_length: int | None) -> RowKeys:
    import pyarrow.compute as pc

    digests = np.empty((len(dataset), DIGEST_BYTES), dtype=np.uint8)
    lengths = np.empty(len(dataset), dtype=np.int64)
    tables = dataset.select_columns(list(ID_COLUMNS)).with_format("arrow").iter(batch_size=1000)
    row = 0
    for table in tables:
        counts, starts, values = [], [], []
        for name in ID_COLUMNS:
            column = table[name]
            if column.null_count:
                raise ValueError(f"column {name!r} holds null; drop those rows first")
            count = pc.list_value_length(column).to_numpy().astype(np.int64)
            counts.append(count)
            starts.append(np.concatenate(([0], np.cumsum(count))))
            values.append(pc.list_flatten(column).to_numpy().astype(np.int64))
        for i, sizes in enumerate(zip(*counts, strict=True)):
            pieces = [v[s[i] : s[i + 1]] for v, s in zip(values, starts, strict=True)]
            digests[row] = _digest(np.array(sizes), *pieces)
            longest = int(sizes[0] + max(sizes[1], sizes[2]))
            lengths[row] = longest if max_length is None else min(longest, max_length)
            row += 1
    return RowKeys(digests, lengths)


def _keys_of_batches(batches: Iterator[dict[str, Any]]) -> RowKeys:
    digests, lengths = [], []
    for batch in batches:
        attended = batch["attention_mask"].bool().numpy()
        pieces = []
        for name in ("input_ids", "completion_mask"):
            for sequence, real in zip(batch[name].numpy(), attended, strict=True):
                pieces.append(sequence[real].astype(np.int64))
        sizes = attended.sum(axis=1)
        digests.append(_digest(sizes.astype(np.int64), *pieces))
        lengths.append(int(sizes.max()))
    shaped = np.array(digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    return RowKeys(shaped, np.array(lengths, dtype=np.int64))


def _digest(*arrays: np.ndarray) -> np.ndarray:
    hashed = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for array in arrays:
        hashed.update(array.astype("<i8", copy=False).tobytes())
    return np.frombuffer(hashed.digest(), dtype=np.uint8)
