"""What a loss may need of a pair beyond the four log-probability vectors.

Legend: P pairs of this batch.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_PER_PAIR = ("chosen_len", "rejected_len", "chosen_nll_sum", "wpo_weight")


@dataclass(frozen=True)
class PairStats:
    """Per-pair vectors of one batch, and two counts of an optimizer step's whole batch.

    The counts make a loss over tokens (``sft``) exact under gradient accumulation and across ranks:
    the objective is ``(1 / num_pairs) * sum_p losses[p]`` with the global ``num_pairs``.

    Raises:
        ValueError: a per-pair field is not a vector of the length of ``chosen_len``.
        TypeError: a per-pair field is not a tensor.
    """

    chosen_len: Tensor  # [P] float32: completion tokens incl. EOS, after truncation
    rejected_len: Tensor  # [P] float32
    chosen_nll_sum: Tensor | None = None  # [P]: -sum of unweighted token logps, differentiable
    wpo_weight: Tensor | None = None  # [P]: w(chosen) * w(rejected), no gradient
    num_pairs: Tensor | int | None = None  # global; None: P
    num_chosen_tokens: Tensor | int | None = None  # global, scored; None: chosen_len.sum()

    def __post_init__(self) -> None:
        for name in _PER_PAIR:
            self._check(name, getattr(self, name))
        if self.num_pairs is None:
            object.__setattr__(self, "num_pairs", self.chosen_len.shape[0])
        if self.num_chosen_tokens is None:
            object.__setattr__(self, "num_chosen_tokens", self.chosen_len.sum())

    def _check(self, name: str, value: Tensor | None) -> None:
        if value is None and name in ("chosen_nll_sum", "wpo_weight"):
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"PairStats.{name} must be a tensor [P], got {type(value).__name__}")
        if value.dim() != 1 or value.shape != self.chosen_len.shape:
            raise ValueError(
                f"PairStats.{name} has shape {list(value.shape)}; every per-pair field must be "
                f"[P], like chosen_len {list(self.chosen_len.shape)}"
            )

    def slice(self, start: int, stop: int) -> "PairStats":
        """Pairs ``start:stop`` as views. The global counts stay: losses of slices add up."""
        parts: dict[str, Any] = {}
        for name in _PER_PAIR:
            value = getattr(self, name)
            parts[name] = None if value is None else value[start:stop]
        return replace(self, **parts)


def lengths(stats: PairStats | None, loss: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(chosen_len, rejected_len)``, at least 1, in ``dtype``; ValueError without stats."""
    if stats is None:
        raise ValueError(
            f"the loss {loss!r} divides by completion lengths: pass "
            "stats=PairStats(chosen_len=..., rejected_len=...)"
        )
    return stats.chosen_len.clamp(min=1).to(dtype), stats.rejected_len.clamp(min=1).to(dtype)


def chosen_nll_sum(stats: PairStats | None, loss: str) -> Tensor:
    """``stats.chosen_nll_sum`` in at least float32; ValueError where it is missing."""
    if stats is None or stats.chosen_nll_sum is None:
        raise ValueError(
            f"the loss {loss!r} needs the negative log-likelihood of the chosen answers: pass "
            "stats=PairStats(..., chosen_nll_sum=-sum of the chosen token log-probs, [P])"
        )
    nll = stats.chosen_nll_sum
    return nll.to(torch.promote_types(nll.dtype, torch.float32))


def token_mean_nll(stats: PairStats | None, loss: str) -> Tensor:
    """``[P]`` whose mean over the global pairs is the mean NLL over the global chosen tokens.

    ``chosen_nll_sum[p] * num_pairs / num_chosen_tokens``; a batch without a chosen token gives 0.
    """
    nll = chosen_nll_sum(stats, loss)
    assert stats is not None
    pairs, tokens = stats.num_pairs, stats.num_chosen_tokens
    assert pairs is not None and tokens is not None
    tokens = tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1)
    return nll * pairs / tokens  # in this order: int / int would be a float32 tensor
