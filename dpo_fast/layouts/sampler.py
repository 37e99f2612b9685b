"""The order of the pairs, such that every rank gets about as many tokens in every optimizer step.

Legend: R ranks, b pairs a rank and micro-batch, a micro-batches a step.
"""

from collections.abc import Iterator, Sequence, Sized

from torch.utils.data import Sampler

from dpo_fast.layouts.packing import balanced_groups


class TokenBalancedSampler(Sampler[int]):
    """Reorders another sampler within the pairs of each optimizer step, never across steps.

    A data loader deals out batches of b pairs to the ranks in turn. Of each step's ``a * R * b``
    pairs every rank gets as many as before, but by weight: ranks that forward equally many tokens
    do not wait for each other. The last pairs of an epoch, too few for a step, stay as they are.
    With one rank the order is the base sampler's.

    It is a function of the base sampler's order and the weights alone, the same on every rank;
    skipping batches on resume skips the same pairs.

    Args:
        base: yields indices; its ``set_epoch`` is called where it has one.
        weights: tokens of each pair of the data set.
        batch_size: b. num_ranks: R. accumulation: a.
    """

    def __init__(
        self,
        base: Sampler[int],
        weights: Sequence[int],
        *,
        batch_size: int,
        num_ranks: int,
        accumulation: int = 1,
    ) -> None:
        if min(batch_size, num_ranks, accumulation) < 1:
            raise ValueError(
                f"batch_size={batch_size}, num_ranks={num_ranks} and accumulation={accumulation} "
                "must be positive"
            )
        self.base, self.weights = base, weights
        self.batch_size, self.num_ranks, self.accumulation = batch_size, num_ranks, accumulation

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to the base sampler."""
        set_epoch = getattr(self.base, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def __len__(self) -> int:
        assert isinstance(self.base, Sized)
        return len(self.base)

    def __iter__(self) -> Iterator[int]:
        size = self.batch_size * self.num_ranks * self.accumulation
        step: list[int] = []
        for index in self.base:
            step.append(index)
            if len(step) == size:
                yield from self._balanced(step)
                step = []
        yield from step

    def _balanced(self, step: list[int]) -> Iterator[int]:
        groups = balanced_groups([self.weights[i] for i in step], self.num_ranks)
        for micro in range(self.accumulation):
            for group in groups:
                start = micro * self.batch_size
                yield from (step[i] for i in group[start : start + self.batch_size])
