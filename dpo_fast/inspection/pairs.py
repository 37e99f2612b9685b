"""What is in a data set of preference pairs, as training would see it.

Legend: P pairs.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_fast.data.collate import DataCollatorForPreference
from dpo_fast.data.drop import REASONS, Truncation, token_lengths
from dpo_fast.data.prepare import prepare_dataset
from dpo_fast.data.rows import ID_COLUMNS
from dpo_fast.layouts.lengths import pair_lengths

QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Inspection:
    """Counts of pairs, and lengths in tokens.

    Attributes:
        name: of the data set.
        rows: pairs given. kept: pairs that training would use.
        dropped: pairs it would leave out, by reason.
        truncated: kept pairs of which an answer's sequence exceeds ``max_length``.
        prompt_not_prefix: pairs whose tokenised prompt does not begin its tokenised answers; an
            example of an end that is left out of training.
        ties: chosen and rejected are the same tokens. ties_after_truncation: of the others, those
            whose difference is cut off.
        duplicates: pairs that occurred before.
        contradictions: pairs that occur with chosen and rejected exchanged, too.
        prompts: different prompts. shared_prompts: pairs whose prompt has other pairs.
        lengths: ``[P]`` each: prompt, chosen, rejected, and the longer sequence of a pair.
        tokens: what each layout would compute, once through the kept pairs.
        batch_size: pairs of a padded batch. max_length: of a sequence, or None.
    """

    name: str
    rows: int
    kept: int
    dropped: dict[str, int]
    truncated: int
    prompt_not_prefix: int
    prompt_example: str | None
    ties: int
    ties_after_truncation: int
    duplicates: int
    contradictions: int
    prompts: int
    shared_prompts: int
    lengths: Mapping[str, np.ndarray]
    tokens: Mapping[str, int]
    batch_size: int
    max_length: int | None

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Of each length, and its mean."""
        return {
            name: {
                **{key: float(np.quantile(values, q)) for key, q in QUANTILES.items()},
                "mean": float(values.mean()),
            }
            for name, values in self.lengths.items()
        }

    @property
    def padding_share(self) -> float:
        """Share of a padded batch's positions that is padding."""
        return 1.0 - self.tokens["packed"] / max(self.tokens["padded"], 1)

    @property
    def prefix_share(self) -> float:
        """Share of all tokens that is the second copy of a prompt."""
        return 1.0 - self.tokens["shared_prefix"] / max(self.tokens["packed"], 1)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: lengths as quantiles."""
        skipped = ("lengths", "tokens")
        plain = {k: v for k, v in vars(self).items() if k not in skipped}
        return {
            **plain,
            "lengths": self.quantiles(),
            "tokens": dict(self.tokens),
            "padding_share": self.padding_share,
            "prefix_share": self.prefix_share,
        }


def inspect_dataset(
    dataset: Any,
    processing_class: Any,
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    batch_size: int = 8,
    name: str = "train",
) -> Inspection:
    """Tokenise a data set as training does, and count.

    Args: as :func:`dpo_fast.data.prepare_dataset`; ``batch_size``: pairs of a padded batch.

    Raises:
        ValueError, TypeError: as ``prepare_dataset``; a stream, which has no end to count to.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"the {name} dataset is a stream: counting reads every pair, so load it without "
            "streaming (a slice such as 'train[:10000]' is enough for large ones)"
        )
    prepared, report = prepare_dataset(
        dataset, processing_class, max_length=None, num_proc=num_proc, name=name
    )
    truncation = Truncation(max_length, truncation_mode)
    prompt, chosen, rejected = token_lengths(prepared)
    fault = truncation.fault(prompt, chosen, rejected)
    dropped = Counter(report.dropped)
    dropped.update({r: int((fault == i).sum()) for i, r in enumerate(REASONS)})
    excess = np.maximum(truncation.excess(prompt, chosen), truncation.excess(prompt, rejected))
    cut = (excess > 0) & (fault < 0)
    kept = prepared.select(np.flatnonzero(fault < 0))
    lengths = pair_lengths(kept, max_length, truncation_mode)
    collator = DataCollatorForPreference(0, max_length, truncation_mode)
    return Inspection(
        name=name,
        rows=len(dataset),
        kept=len(kept),
        dropped={reason: count for reason, count in dropped.items() if count},
        truncated=int(cut.sum()),
        prompt_not_prefix=report.prompt_not_prefix or 0,
        prompt_example=report.prompt_example,
        **_repetitions(prepared),
        ties_after_truncation=_hidden_ties(prepared, np.flatnonzero(cut).tolist(), collator),
        lengths={
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "longer sequence": prompt + np.maximum(chosen, rejected),
        },
        tokens={
            "padded": lengths.padded(batch_size),
            "packed": int(lengths.packed.sum()),
            "shared_prefix": int(lengths.shared_prefix.sum()),
        },
        batch_size=batch_size,
        max_length=max_length,
    )


def _repetitions(dataset: Any) -> dict[str, int]:
    """Ties, duplicates, contradictions and shared prompts."""
    prompts: Counter[bytes] = Counter()
    pairs: Counter[tuple[bytes, bytes, bytes]] = Counter()
    ties = 0
    for key in _digests(dataset):
        prompts[key[0]] += 1
        pairs[key] += 1
        ties += key[1] == key[2]
    exchanged = [
        number
        for (prompt, chosen, rejected), number in pairs.items()
        if chosen != rejected and (prompt, rejected, chosen) in pairs
    ]
    return {
        "ties": ties,
        "duplicates": len(dataset) - len(pairs),
        "contradictions": sum(exchanged),
        "prompts": len(prompts),
        "shared_prompts": sum(number for number in prompts.values() if number > 1),
    }


def _digests(dataset: Any) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Of each pair's three token columns: equal ones are equal tokens."""
    columns = dataset.select_columns(list(ID_COLUMNS)).with_format("numpy")
    for batch in columns.iter(batch_size=1000):
        for row in zip(*(batch[name] for name in ID_COLUMNS), strict=True):
            prompt, chosen, rejected = (_digest(ids) for ids in row)
            yield prompt, chosen, rejected


def _digest(ids: Any) -> bytes:
    data = np.ascontiguousarray(ids, dtype=np.int64).tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def _hidden_ties(
    dataset: Any, truncated: Sequence[int], collator: DataCollatorForPreference
) -> int:
    """Of the truncated pairs, those that differ before and not after."""
    found = 0
    for row in dataset.select(truncated).select_columns(list(ID_COLUMNS)):
        prompt, chosen, rejected = (row[name] for name in ID_COLUMNS)
        if chosen != rejected:
            both = [collator.truncate(prompt, answer) for answer in (chosen, rejected)]
            found += both[0] == both[1]
    return found
