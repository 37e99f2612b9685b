"""Pairs to one row without padding: every sequence once, or with what both answers share once.

Legend: P pairs, S = 2P sequences (all chosen first, then all rejected), L tokens of the row,
N scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from dpo_fast.batch import COUNT_KEYS, SEGMENTS_KEY
from dpo_fast.data.collate import DataCollatorForPreference, check_rows
from dpo_fast.layouts.segments import Segment, Segments
from dpo_fast.layouts.shapes import rounded_length

_REF_KEYS = ("ref_chosen_logps", "ref_rejected_logps")


class PairTokens(NamedTuple):
    """One pair, truncated: ids (int64 arrays), where each completion starts, tokens shared."""

    chosen: np.ndarray
    chosen_start: int
    rejected: np.ndarray
    rejected_start: int
    shared: int

    @property
    def num_tokens(self) -> int:
        """Tokens of both sequences, the prompt in both."""
        return len(self.chosen) + len(self.rejected)

    @property
    def executed(self) -> int:
        """Tokens that the model computes."""
        return self.num_tokens - self.shared


@dataclass
class PackedCollator:
    """Preference rows to one row ``[1, L]`` without padding, positions restarting at each sequence.

    The row holds chosen and rejected of the first pair, then of the second, and so on. What
    concerns the scored tokens is in the order of every layout: all chosen, then all rejected.

    Args:
        pad_token_id: fills the row up when ``few_shapes`` is set, and an empty batch's one token.
        max_length: prompt and completion together are cut to this many tokens; None: never.
        truncation_mode: ``"keep_start"`` cuts the end, ``"keep_end"`` cuts the start.
        few_shapes: round L up to few sizes (:func:`dpo_fast.layouts.shapes.rounded_length`), for
            compiled code; the tokens added are a sequence of their own that nothing sees.

    Calling it returns a dict, made on the CPU, of

    - ``pair_index`` ``[P]``; ``input_ids``, ``position_ids`` ``[1, L]`` int64; ``attention_mask``
      ``[1, L]`` int64, in how many padded rows the token would be: 0 (filling), 1, or 2 (shared);
    - ``pair_segments``: :class:`~dpo_fast.layouts.segments.Segments`, for the model's attention;
    - the plan of :func:`dpo_fast.batch.plan_tokens` (``token_index`` into the row; it holds a
      position twice where one hidden state predicts a token of both answers);
    - ``num_tokens``, ``padded_tokens``, ``executed_tokens``: host numbers, see
      :data:`dpo_fast.batch.COUNT_KEYS`;
    - ``ref_chosen_logps``, ``ref_rejected_logps`` ``[P]`` float32 where the rows have them.

    Attributes:
        collator: the padded collator with the same arguments, which truncates.

    Raises:
        ValueError: an argument is out of range, or (when called) the rows are none or lack a key.
    """

    shares_prefix: ClassVar[bool] = False

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    few_shapes: bool = False
    collator: DataCollatorForPreference = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.collator = DataCollatorForPreference(
            self.pad_token_id, self.max_length, self.truncation_mode
        )

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        check_rows(examples)
        batch = self.collate_pairs([self.pair_tokens(example) for example in examples])
        for key in _REF_KEYS:
            if key in examples[0]:
                batch[key] = torch.tensor([example[key] for example in examples])
        return batch

    def pair_tokens(self, example: dict[str, Any]) -> PairTokens:
        """Both sequences of a row, truncated as the padded collator does it."""
        prompt = example["prompt_ids"]
        chosen, chosen_start = self.collator.truncate(prompt, example["chosen_ids"])
        rejected, rejected_start = self.collator.truncate(prompt, example["rejected_ids"])
        c, r = np.array(chosen, dtype=np.int64), np.array(rejected, dtype=np.int64)
        shared = common_prefix(c, r) if self.shares_prefix else 0
        return PairTokens(c, chosen_start, r, rejected_start, shared)

    def empty(self) -> dict[str, Any]:
        """A batch of no pairs: one token that is computed and not scored, nor counted as fed."""
        batch = self.collate_pairs([])
        batch["attention_mask"].fill_(1)  # a mask of zeros would make router statistics NaN
        return batch

    def collate_pairs(self, pairs: Sequence[PairTokens]) -> dict[str, Any]:
        """The batch of pairs that are truncated already."""
        row = _Row()
        places = [row.add_pair(pair) for pair in pairs]
        executed = row.length
        if self.few_shapes or not executed:
            row.fill(rounded_length(executed) if executed else 1, self.pad_token_id)
        longest = max((max(len(p.chosen), len(p.rejected)) for p in pairs), default=0)
        counts = (sum(p.num_tokens for p in pairs), 2 * len(pairs) * longest, row.length)
        plan = _plan(pairs, places)
        return {
            "pair_index": torch.arange(len(pairs)),
            "input_ids": row.tensor("tokens"),
            "position_ids": row.tensor("positions"),
            "attention_mask": row.tensor("weights"),
            SEGMENTS_KEY: Segments(row.spans, plan["token_index"].numpy()),
            **plan,
            **dict(zip(COUNT_KEYS, counts, strict=True)),
        }


@dataclass
class SharedPrefixCollator(PackedCollator):
    """Preference rows to one row ``[1, L]``: of each pair ``[prompt | chosen | rejected]``.

    What both sequences of a pair have in common from their start on (the prompt, and the first
    tokens of the answers where those agree) is held once. Rejected tokens continue its positions
    and do not see the chosen ones; the first token of both answers is predicted from the one last
    token in common. Sequences that differ from the start (``truncation_mode="keep_end"`` may cut
    them differently) stand alone.

    Arguments, result and errors: :class:`PackedCollator`.
    """

    shares_prefix: ClassVar[bool] = True


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading elements in which two 1-D arrays agree."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


class _Row:
    """The row while it is put together."""

    def __init__(self) -> None:
        self.length = 0
        self.spans: list[Segment] = []
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def add_pair(self, pair: PairTokens) -> tuple[int, int]:
        """Append a pair; returns where chosen starts and where rejected's own tokens start."""
        shared, start = pair.shared, self.length
        weights = np.ones(len(pair.chosen), dtype=np.int64)
        weights[:shared] = 2
        self._append(pair.chosen, np.arange(len(pair.chosen)), weights)
        own = pair.rejected[shared:]
        prefix = (start, shared) if shared else (0, 0)
        branch = self._append(
            own, np.arange(shared, len(pair.rejected)), np.ones(len(own), dtype=np.int64), *prefix
        )
        return start, branch

    def fill(self, length: int, token: int) -> None:
        """Append ``token`` up to ``length``, as a sequence that stands alone, at position 0."""
        missing = length - self.length
        zeros = np.zeros(missing, dtype=np.int64)
        self._append(zeros + token, zeros, zeros)

    def _append(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        weights: np.ndarray,
        prefix_start: int = 0,
        prefix_length: int = 0,
    ) -> int:
        start = self.length
        if len(tokens):
            self.spans.append(Segment(start, len(tokens), prefix_start, prefix_length))
            self.tokens.append(tokens)
            self.positions.append(positions)
            self.weights.append(weights)
            self.length += len(tokens)
        return start

    def tensor(self, name: str) -> torch.Tensor:
        """``[1, L]`` int64."""
        return torch.from_numpy(np.concatenate(getattr(self, name))).unsqueeze(0)


def _plan(pairs: Sequence[PairTokens], places: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The scored tokens: position t of a sequence is predicted at t - 1, wherever that lies."""
    index, target, seq_lens, completion_lens = [], [], [], []
    for rejected in (False, True):
        for pair, (start, branch) in zip(pairs, places, strict=True):
            ids = pair.rejected if rejected else pair.chosen
            first = pair.rejected_start if rejected else pair.chosen_start
            before = np.arange(max(first, 1) - 1, len(ids) - 1)
            at = start + before
            if rejected:
                at = np.where(before < pair.shared, at, branch + before - pair.shared)
            index.append(at)
            target.append(ids[max(first, 1) :])
            seq_lens.append(len(at))
            completion_lens.append(max(len(ids) - first, 0))
    bounds = np.concatenate([[0], np.cumsum(seq_lens, dtype=np.int64)])
    return {
        "token_index": _int64(index),
        "target": _int64(target),
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int64)),
        "seq_lens": seq_lens,
        "completion_lens": completion_lens,
    }


def _int64(parts: list[np.ndarray]) -> torch.Tensor:
    joined = np.concatenate(parts) if parts else np.zeros(0)
    return torch.from_numpy(joined.astype(np.int64))
