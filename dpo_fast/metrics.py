"""TRL's metrics without its host syncs: one device vector a micro-batch, one reduction and one sync
a log step.

Each micro-batch leaves sums and counts in a vector that stays on the device. At a log step the
vectors are stacked, summed over the ranks in one all-reduce, fetched once, and turned into the
values that TRL logs: pair metrics are means over the pairs, token metrics means over micro-batches
(weighted by their pairs) of token means. With equal micro-batches both equal TRL's; with a ragged
last one TRL counts it like a full one. The same all-reduce carries one number a rank: the step at
which its loss was first not finite.

Legend: P pairs, S = 2P sequences, N scored tokens, K micro-batches since the last log, R ranks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_fast.batch import COUNT_KEYS
from dpo_fast.functional import FusedDPOOutput

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
_FIELDS = (
    "pairs",
    *PAIR_METRICS,
    "aux_loss",
    *COUNT_KEYS,
    "nonfinite",
    "token_pairs",  # pairs of the micro-batch if it has token statistics, else 0
    "chosen_tokens",
    "rejected_tokens",
    "entropy",
    "top1",
    "chosen_logits",
    "rejected_logits",
)
_INDEX = {name: i for i, name in enumerate(_FIELDS)}


def packed_numel(micro_batches: int, num_ranks: int) -> int:
    """Numbers (float64) in the one all-reduce of a log step."""
    return micro_batches * len(_FIELDS) + num_ranks


class MicroBatchSums(NamedTuple):
    """``device [len(_FIELDS)]`` sums that only the device knows; ``host`` the numbers that the host
    knows already.
    """

    device: Tensor
    host: list[float]


def micro_batch_sums(
    output: FusedDPOOutput,
    seq_lens: Sequence[int],
    token_counts: Sequence[int],
    aux_loss: Tensor | None = None,
) -> MicroBatchSums:
    """Sums and counts of one micro-batch, float64. No host sync.

    Args:
        output: what :func:`dpo_fast.functional.fused_linear_dpo` returned.
        seq_lens: scored tokens of the S sequences, host numbers.
        token_counts: host numbers in the order of :data:`dpo_fast.batch.COUNT_KEYS`.
        aux_loss: load balancing loss of the micro-batch, scalar.
    """
    num_pairs = len(seq_lens) // 2
    chosen_tokens = sum(seq_lens[:num_pairs])
    chosen_logps, rejected_logps = output.logps[:num_pairs], output.logps[num_pairs:]
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    device = output.logps.device
    dtype = torch.float64
    zero = torch.zeros((), dtype=dtype, device=device)
    values: dict[str, Tensor] = {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": (chosen > rejected).sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": chosen_logps.sum(),
        "logps/rejected": rejected_logps.sum(),
        "nonfinite": (~torch.isfinite(output.loss.detach())).sum(),
    }
    host: dict[str, float] = {
        "pairs": num_pairs,
        **dict(zip(COUNT_KEYS, token_counts, strict=True)),
    }
    if aux_loss is not None:
        values["aux_loss"] = aux_loss.detach() * num_pairs
    stats = output.token_stats
    if stats is not None:
        host |= {"token_pairs": num_pairs, "chosen_tokens": chosen_tokens}
        host["rejected_tokens"] = sum(seq_lens) - chosen_tokens
        assert stats.entropy is not None and stats.mean_logit is not None
        assert stats.is_top1 is not None
        values["entropy"] = stats.entropy.sum(dtype=dtype)
        values["top1"] = stats.is_top1[:chosen_tokens].sum()
        values["chosen_logits"] = stats.mean_logit[:chosen_tokens].sum(dtype=dtype)
        values["rejected_logits"] = stats.mean_logit[chosen_tokens:].sum(dtype=dtype)
    sums = torch.stack([values.get(name, zero).to(dtype) for name in _FIELDS])
    return MicroBatchSums(sums, [host.get(name, 0.0) for name in _FIELDS])


class NonFinite(NamedTuple):
    """A rank whose loss was NaN or infinite, and the optimizer step (from 1) that saw it first."""

    rank: int
    step: int


class Counts(NamedTuple):
    """Since the last log, over all ranks: pairs, tokens by TRL's definition, positions of padded
    rows, tokens that the policy computed, and the ranks with a loss that was not finite.
    """

    pairs: int
    tokens: int
    padded: int
    executed: int
    nonfinite: tuple[NonFinite, ...]


class MetricBuffer:
    """Collects the vectors of train and eval micro-batches until the next log.

    Args:
        reduce: sums a tensor over the ranks; None in a single process.
        rank, num_ranks: of this process.
        copies: ranks that see the same pairs (tensor and sequence parallel): each pair counts once.
        eval_copies: the same in evaluation; None: as many.
    """

    def __init__(
        self,
        reduce: Callable[[Tensor], Tensor] | None = None,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        copies: int = 1,
        eval_copies: int | None = None,
    ) -> None:
        self._reduce = reduce
        self._rank, self._num_ranks = rank, num_ranks
        self._copies = {"train": copies, "eval": copies if eval_copies is None else eval_copies}
        self._rows: dict[str, list[MicroBatchSums]] = {"train": [], "eval": []}
        self._steps: dict[str, list[int]] = {"train": [], "eval": []}
        self._has_aux = False
        self.total_tokens = 0

    def add(self, mode: str, sums: MicroBatchSums, *, step: int = 1, has_aux: bool = False) -> None:
        """Keep one micro-batch's sums; ``mode`` is "train" or "eval", ``step`` counts from 1."""
        self._has_aux = has_aux
        self._rows[mode].append(sums)
        self._steps[mode].append(step)

    def pop(self, mode: str) -> tuple[dict[str, float], Counts] | None:
        """Metrics since the last call, TRL's keys, and the counts behind them; None if nothing was
        added.

        This is the one place where training waits for the device.
        """
        rows, self._rows[mode] = self._rows[mode], []
        steps, self._steps[mode] = self._steps[mode], []
        if not rows:
            return None
        table = torch.stack([row.device for row in rows])
        first_bad = _first_bad_step(table, steps)
        host = torch.tensor([row.host for row in rows], dtype=table.dtype)
        if self._reduce is None:
            table, bad = table.cpu() + host, [float(first_bad)]
        else:
            mine = (table + host.to(table.device)) / self._copies[mode]
            packed = torch.cat((mine.flatten(), self._slot(first_bad)))
            both = self._reduce(packed).cpu()
            table, bad = both[: table.numel()].view(table.shape), both[table.numel() :].tolist()
        total = table.sum(dim=0)
        counts = Counts(
            pairs=int(total[_INDEX["pairs"]]),
            tokens=int(total[_INDEX["num_tokens"]]),
            padded=int(total[_INDEX["padded_tokens"]]),
            executed=int(total[_INDEX["executed_tokens"]]),
            nonfinite=_bad_ranks(bad),
        )
        if mode == "train":
            self.total_tokens += counts.tokens
        metrics = _pair_means(total, self._has_aux) | _token_means(table)
        metrics["num_tokens"] = float(self.total_tokens)
        return metrics, counts

    def nonfinite(self, mode: str) -> tuple[NonFinite, ...]:
        """Ranks whose loss was not finite since the last :meth:`pop`: one reduction, one sync."""
        if not self._rows[mode]:
            return ()
        table = torch.stack([row.device for row in self._rows[mode]])
        slot = self._slot(_first_bad_step(table, self._steps[mode]))
        return _bad_ranks((slot if self._reduce is None else self._reduce(slot)).tolist())

    def _slot(self, first_bad: Tensor) -> Tensor:
        """``[R]``, zero but for this rank's own place."""
        slots = first_bad.new_zeros(self._num_ranks)
        slots[self._rank] = first_bad
        return slots


def _first_bad_step(table: Tensor, steps: list[int]) -> Tensor:
    """The first of ``steps`` whose row of ``table [K, F]`` has a loss that is not finite, else 0.
    No host sync but the copy of ``steps``.
    """
    when = torch.tensor(steps, dtype=table.dtype).to(table.device)
    never = torch.full_like(when, torch.inf)
    first = torch.where(table[:, _INDEX["nonfinite"]] > 0, when, never).amin()
    return torch.where(torch.isinf(first), torch.zeros_like(first), first)


def _bad_ranks(steps: Sequence[float]) -> tuple[NonFinite, ...]:
    return tuple(NonFinite(rank, round(step)) for rank, step in enumerate(steps) if step)


def _pair_means(total: Tensor, has_aux: bool) -> dict[str, float]:
    names = (*PAIR_METRICS, "aux_loss") if has_aux else PAIR_METRICS
    pairs = total[_INDEX["pairs"]]
    return {name: float(total[_INDEX[name]] / pairs) for name in names}


def _token_means(table: Tensor) -> dict[str, float]:
    table = table[table[:, _INDEX["token_pairs"]] > 0]
    if len(table) == 0:
        return {}
    weight = table[:, _INDEX["token_pairs"]]
    chosen, rejected = table[:, _INDEX["chosen_tokens"]], table[:, _INDEX["rejected_tokens"]]

    def mean(name: str, count: Tensor) -> float:
        per_micro_batch = table[:, _INDEX[name]] / count.clamp(min=1)
        return float((per_micro_batch * weight).sum() / weight.sum())

    return {
        "entropy": mean("entropy", chosen + rejected),
        "mean_token_accuracy": mean("top1", chosen),
        "logits/chosen": mean("chosen_logits", chosen),
        "logits/rejected": mean("rejected_logits", rejected),
    }
