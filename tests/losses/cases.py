"""Inputs that the loss tests share: ragged, with policy and reference well apart.

Legend: P pairs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_fast.losses import LOSSES, PairStats

# Options without which a loss cannot be built, or is another one
OPTIONS: dict[str, dict[str, Any]] = {
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.1},
    "cdpo": {"label_smoothing": 0.2},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
}
TRL_LOSSES = tuple(LOSSES)[:15]
NEW_LOSSES = tuple(LOSSES)[15:]
F_LOSSES = (
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"),
    "cdpo",
)


class Vectors(NamedTuple):
    """The four ``[P]`` vectors, in the order of every loss's signature."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


def make_vectors(pairs: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Vectors:
    """Sums of 1 to 30 token log-probs; log-ratios of both signs, of a few nats."""
    rng = torch.Generator().manual_seed(seed)
    ref = -60 * torch.rand(2, pairs, generator=rng, dtype=torch.float64) - 3
    shift = 3 * torch.randn(2, pairs, generator=rng, dtype=torch.float64)
    policy = (ref + shift).clamp(max=-0.5)
    return Vectors(*(t.to(dtype) for t in (policy[0], policy[1], ref[0], ref[1])))


def make_stats(pairs: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> PairStats:
    """Ragged lengths, an NLL and WPO weights in (0, 1], and counts of a larger global batch."""
    rng = torch.Generator().manual_seed(seed + 1000)
    lengths = torch.randint(1, 30, (2, pairs), generator=rng).to(dtype)
    nll = 2 * lengths[0] * torch.rand(pairs, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.rand(pairs, generator=rng, dtype=torch.float64).to(dtype)
    return PairStats(
        chosen_len=lengths[0],
        rejected_len=lengths[1],
        chosen_nll_sum=nll,
        wpo_weight=weight,
        num_pairs=3 * pairs,
        num_chosen_tokens=int(lengths[0].sum()) * 3 + 7,
    )
