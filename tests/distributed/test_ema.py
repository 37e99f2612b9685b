"""TR-DPO's update on shards: the bits of whole tensors, and no communication."""

from pathlib import Path

import pytest

from tests.distributed.launch import has_deepspeed, launch

NEEDS_DEEPSPEED = pytest.mark.skipif(
    not has_deepspeed(), reason="deepspeed: not installed (make test does)"
)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
def test_sharded_updates_have_the_bits_of_whole_ones(engine: str, tmp_path: Path) -> None:
    spec = {"engine": engine, "ranks": 2}
    checked = launch(2, "ema_bits", spec, tmp_path)
    assert checked == [{"stochastic": 3, "shadow": 3, "adapter": 3}] * 2
