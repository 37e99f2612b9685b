"""What the engines refuse, without an engine."""

import pytest
import torch
from torch import nn

from dpo_fast.trainer.engines import has_empty_shards, refuse_alike_shards


@pytest.mark.parametrize("ranks", range(1, 9))
def test_empty_shards_are_those_that_chunk_leaves_out(ranks: int) -> None:
    for length in range(1, 40):
        parts = torch.arange(length).chunk(ranks)
        assert has_empty_shards(length, ranks) == (len(parts) < ranks), length


def test_shards_that_accelerate_could_not_tell_apart_are_refused() -> None:
    """One parameter without a shard on some rank is still known by having none; two are not."""
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Linear(8, 3, bias=False))
    refuse_alike_shards(model, 4)
    with pytest.raises(RuntimeError, match=r"over 5 ranks 2 parameters \(0\.weight.*eval_on_start"):
        refuse_alike_shards(model, 5)
